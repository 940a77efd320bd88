"""Cross entropy over a vocabulary that is sharded over ranks, forward and backward, under torchrun."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterable
from typing import Any

import torch

from ..shared import record
from ..shared.options import add_shapes, shapes
from . import ranks, render, run
from .systems import OURS

HELP = "the same over a sharded vocabulary, under torchrun"
ROUNDS, QUICK_ROUNDS = 7, 3


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_shapes(parser)


def main(options: argparse.Namespace) -> int:
    """By all ranks; the first one writes, prints and draws."""
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
    result = record.new("tp", {**run.method(budget), "seed": options.seed}, options.commit, shapes=[])
    path = record.json_path(result, options.out)
    for found in table(shapes(options, run.SHAPES), budget):
        result["shapes"].append(found)
        if ranks.is_first():
            record.write(result, path)
    if ranks.is_first():
        render.plot(result, path.with_suffix(".png"))
        print(render.table(result), f"\n{path}", path.with_suffix(".png"), sep="\n")
    return int(any(map(failed, result["shapes"])))


def failed(found: dict[str, Any]) -> bool:
    """Whether inductor_ce did not run, or was wrong. The others may fail, and may err."""
    wrong = [row["system"] for row in found["rows"] if row["problems"]]
    return OURS in wrong + [each["system"] for each in found["not_measured"]]
