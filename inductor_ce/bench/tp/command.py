"""Cross entropy over a vocabulary that is sharded over ranks, forward and backward, under torchrun."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch

from ..shared import merge, record
from ..shared.compilers import DEFAULT, MODES, OURS
from ..shared.options import add_shapes, add_systems, shapes
from . import bars, ranks, render, run
from .run import Asked
from .systems import SYSTEMS
from .tasks import TASKS

HELP = "the same over a sharded vocabulary, under torchrun"
ROUNDS, QUICK_ROUNDS = 5, 2


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_shapes(parser)
    parser.add_argument("--tasks", choices=TASKS, nargs="+", default=[*TASKS], help="(default: all)")
    parser.add_argument("--modes", choices=MODES, nargs="+", help="(default: both; with --quick, default)")
    add_systems(parser, SYSTEMS)
    merge.add_merge(parser)


def asked(options: argparse.Namespace) -> Asked:
    """What the command line says, and what it leaves open."""
    modes = options.modes or ([DEFAULT] if options.quick else MODES)
    return Asked(shapes(options, run.SHAPES), options.tasks, options.systems, modes)


def main(options: argparse.Namespace) -> int:
    """By all ranks; the first one writes, prints and draws."""
    if options.merge:
        return merge.put_together(options.merge, options.out, show, complete, key="shapes")
    lacking = ranks.missing()
    if lacking is not None:
        if ranks.is_first():
            print(f"the benchmark compares GPUs that share a vocabulary: {lacking}", file=sys.stderr)
        return 2
    with ranks.joined():
        return measured(options, run.table)


def measured(options: argparse.Namespace, table: Callable[..., Iterable[dict[str, Any]]]) -> int:
    """What `table` finds, kept by the first rank."""
    budget = ranks.InStep(rounds=QUICK_ROUNDS if options.quick else ROUNDS)
    torch.manual_seed(options.seed)
    method = {**run.method(budget), "seed": options.seed}
    result = record.new("tp", method, options.commit, shapes=[], bars=[])
    path = record.json_path(result, options.out)
    for found in table(asked(options), budget):
        result["shapes"].append(found)
        judge(result)
        if ranks.is_first():
            record.write(result, path)
    if ranks.is_first():
        show(result, path)
    return int(any(map(failed, result["shapes"])))


def complete(result: dict[str, Any]) -> None:
    """Put the rows of one shape together, which calls of several modes or tasks have apart."""
    shapes: dict[tuple[int, ...], dict[str, Any]] = {}
    for shape in result["shapes"]:
        known = shapes.setdefault(
            (shape["N"], shape["V"], shape["ranks"]), {**shape, "rows": [], "not_measured": []}
        )
        known["rows"] += shape["rows"]
        known["not_measured"] += shape["not_measured"]
    result["shapes"] = list(shapes.values())
    judge(result)


def judge(result: dict[str, Any]) -> None:
    """Say of a record which bars its shapes keep to."""
    result["bars"] = bars.bars(result)


def show(result: dict[str, Any], path: Path) -> None:
    render.plot(result, path.with_suffix(".png"))
    print(render.table(result), f"\n{path}", path.with_suffix(".png"), sep="\n")


def failed(found: dict[str, Any]) -> bool:
    """Whether inductor_ce did not run, or was wrong. The others may fail, and may err."""
    wrong = [row["system"] for row in found["rows"] if row["problems"]]
    return OURS in wrong + [each["system"] for each in found["not_measured"]]
