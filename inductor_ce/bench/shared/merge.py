"""Records of several calls, put together: a table may take longer than one call may."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from . import record

MUST_AGREE = ("gpu", "torch", "triton", "commit", "peers")


def add_merge(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--merge", type=Path, nargs="+", metavar="JSON", help="measure nothing: put these records together"
    )


def merged(paths: Sequence[Path]) -> dict[str, Any] | None:
    """One record with the cases of all; None, and why is printed, where machines or versions differ."""
    results = [json.loads(path.read_text()) for path in paths]
    first = results[0]
    for path, result in zip(paths, results, strict=True):
        for key in MUST_AGREE:
            ours, theirs = first["environment"][key], result["environment"][key]
            if ours != theirs:
                print(f"{path} is of another {key}: {theirs}, not {ours}; nothing was merged")
                return None
    cases = [case for result in results for case in result["cases"]]
    return {**first, "cases": cases, "merged": [path.name for path in paths]}


def merged_path(result: dict[str, Any], folder: Path) -> Path:
    path = record.json_path(result, folder)
    return path.with_stem(f"{path.stem}-merged")
