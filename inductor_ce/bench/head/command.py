"""Linear layer and cross entropy, forward and backward."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from ..shared import merge, record
from ..shared.compilers import BASELINE
from ..shared.measure import Calls, fresh_caches
from ..shared.options import add_systems, has_gpu
from . import bars, render, run
from .inputs import ACTIVATIONS, SHAPES, Shape
from .systems import SYSTEMS

HELP = "linear layer and cross entropy"
ROUNDS, QUICK_ROUNDS = 5, 2


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--shapes",
        type=shape,
        nargs="+",
        default=list(SHAPES.values()),
        metavar="SHAPE",
        help=f"{', '.join(SHAPES)}, or rows x vocabulary x hidden size as NxVxD (default: the three)",
    )
    parser.add_argument(
        "--activations", choices=ACTIVATIONS, nargs="+", default=list(ACTIVATIONS), help="(default: both)"
    )
    add_systems(parser, SYSTEMS)
    parser.add_argument("--quick", action="store_true", help="fewer rounds")
    merge.add_merge(parser)


def shape(text: str) -> Shape:
    """A shape by its name, or from "8192x128256x4096"."""
    if text in SHAPES:
        return SHAPES[text]
    try:
        N, V, D = map(int, text.split("x"))
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{text!r} is none of {', '.join(SHAPES)}, nor like 8192x128256x4096"
        ) from None
    if min(N, V, D) < 2:
        raise argparse.ArgumentTypeError(f"{text!r} needs two of everything at least")
    return Shape(text, N, V, D)


def main(options: argparse.Namespace) -> int:
    if options.merge:
        return merge.put_together(options.merge, options.out, show, judge)
    return measured(options) if has_gpu() else 2


def measured(options: argparse.Namespace) -> int:
    """Measure, keep the JSON complete after every case, print the tables, draw the plot."""
    clock = Calls(rounds=QUICK_ROUNDS if options.quick else ROUNDS)
    method = {**run.METHOD, **asdict(clock), "seed": torch.seed()}
    result = record.new("head", method, options.commit, cases=[], bars=[])
    path = record.json_path(result, options.out)
    with fresh_caches():
        for case in run.table(options.shapes, options.activations, {BASELINE, *options.systems}, clock):
            result["cases"].append(case)
            judge(result)
            record.write(result, path)
    show(result, path)
    return int(any(map(failed, result["cases"])))


def judge(result: dict[str, Any]) -> None:
    """Say of a record which bars its cases keep to."""
    result["bars"] = bars.bars(result)


def show(result: dict[str, Any], path: Path) -> None:
    render.plot(result, path.with_suffix(".png"))
    print(render.table(result), f"\n{path}", path.with_suffix(".png"), sep="\n")


def failed(case: dict[str, Any]) -> bool:
    """Whether a system that is no peer did not run, or was wrong."""
    wrong = [row["system"] for row in case["rows"] + case["forward"] if row["problems"]]
    broken = [each["system"] for each in case["not_measured"] if each["reason"].startswith("failed")]
    return any(SYSTEMS[name.partition(",")[0]].kind != "peer" for name in wrong + broken)
