"""Cross entropy over given logits, forward and backward."""

from __future__ import annotations

import argparse
from typing import Any

import torch

from ..shared import record
from ..shared.losses import LOSSES
from ..shared.measure import Budget, fresh_caches
from ..shared.options import add_shapes, has_gpu, shapes
from . import render, run
from .systems import PEERS

HELP = "cross entropy over given logits"
ROUNDS, QUICK_ROUNDS = 7, 3


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--losses", choices=LOSSES, nargs="+", default=list(LOSSES), help="(default: all of them)"
    )
    add_shapes(parser)


def main(options: argparse.Namespace) -> int:
    return measured(options) if has_gpu() else 2


def measured(options: argparse.Namespace) -> int:
    """Measure, keep the JSON complete after every shape, print the table, draw the plot."""
    torch.manual_seed(options.seed)
    budget = Budget(rounds=QUICK_ROUNDS if options.quick else ROUNDS)
    result = record.new("ce", {**run.method(budget), "seed": options.seed}, options.commit, shapes=[])
    path = record.json_path(result, options.out)
    losses = [LOSSES[name] for name in options.losses]
    with fresh_caches():
        for found in run.table(shapes(options, run.SHAPES), losses, budget):
            result["shapes"].append(found)
            record.write(result, path)
    render.plot(result, path.with_suffix(".png"))
    print(render.table(result), f"\n{path}", path.with_suffix(".png"), sep="\n")
    return int(any(map(failed, result["shapes"])))


def failed(found: dict[str, Any]) -> bool:
    """Whether a system that must work did not, or was wrong. Peers may be absent, and may err."""
    wrong = [row["system"] for row in found["rows"] if row["problems"]]
    absent = [each["system"] for each in found["not_measured"]]
    return any(name not in PEERS for name in wrong + absent)
