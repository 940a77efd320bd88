"""Records of several calls, put together: a table may take longer than one call may."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from . import record

MUST_AGREE = ("gpu", "torch", "triton", "commit", "peers")


def add_merge(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--merge", type=Path, nargs="+", metavar="JSON", help="measure nothing: put these records together"
    )


def put_together(
    paths: Sequence[Path],
    folder: Path,
    show: Callable[[dict[str, Any], Path], None],
    complete: Callable[[dict[str, Any]], None] = lambda result: None,
    key: str = "cases",
) -> int:
    """Keep one record with the cases of all, and show it. Returns the status of the command.

    Args:
        paths: of records of one machine and version.
        folder: where it is kept.
        show: is given the record and its path.
        complete: puts in what the record says of all cases.
        key: under which a record has its cases.
    """
    results = [json.loads(path.read_text()) for path in paths]
    first = results[0]
    for path, result in zip(paths, results, strict=True):
        for what in MUST_AGREE:
            ours, theirs = first["environment"][what], result["environment"][what]
            if ours != theirs:
                print(f"{path} is of another {what}: {theirs}, not {ours}; nothing was merged")
                return 2
    cases = [case for result in results for case in result[key]]
    merged = {**first, key: cases, "merged": [path.name for path in paths]}
    complete(merged)
    path = record.json_path(merged, folder)
    path = path.with_stem(f"{path.stem}-merged")
    record.write(merged, path)
    show(merged, path)
    return 0
