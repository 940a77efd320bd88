"""Linear layer and cross entropy, forward and backward."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from ..shared import labels, merge, record
from ..shared.compilers import BASELINE, MODES, OURS
from ..shared.measure import Calls, fresh_caches
from ..shared.options import add_systems, has_gpu
from . import bars, render, run
from .inputs import ACTIVATIONS, SHAPES, Shape
from .run import Asked
from .systems import SYSTEMS

HELP = "linear layer and cross entropy"
ROUNDS, QUICK_ROUNDS = 5, 2

# What is measured where the command line does not say: usually, and over shares of ignored labels.
USUAL = Asked([*SHAPES.values()], [*ACTIVATIONS], [*SYSTEMS])
SHARES = Asked([SHAPES["llama"], SHAPES["qwen"]], ["random"], [OURS], modes=MODES)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--shapes",
        type=shape,
        nargs="+",
        metavar="SHAPE",
        help=f"{', '.join(SHAPES)}, or rows x vocabulary x hidden size as NxVxD (default: all of these "
        "names; with --ignored, llama and qwen)",
    )
    parser.add_argument(
        "--activations", choices=ACTIVATIONS, nargs="+", help="(default: both; with --ignored, random)"
    )
    parser.add_argument("--modes", choices=MODES, nargs="+", help="(default: default; with --ignored, both)")
    parser.add_argument(
        "--ignored",
        type=share,
        nargs="+",
        metavar="SHARE",
        help="shares of the labels that are ignored, as 0 0.5 0.75 (default: every 17th; of mlm, 0.85)",
    )
    parser.add_argument(
        "--patterns",
        choices=labels.PATTERNS,
        nargs="+",
        default=[*labels.PATTERNS],
        help="which those are: the starts of sequences, or scattered (default: both)",
    )
    add_systems(parser, SYSTEMS)
    parser.set_defaults(systems=None)
    parser.add_argument("--quick", action="store_true", help="fewer rounds")
    parser.add_argument(
        "--before", type=Path, metavar="JSON", help="the record of an earlier version, to compare ours with"
    )
    merge.add_merge(parser)


def share(text: str) -> float:
    """At least 0, less than 1."""
    found = float(text)
    if not 0 <= found < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no share of labels of which some are left")
    return found


def asked(options: argparse.Namespace) -> Asked:
    """What the command line says, and what it leaves open."""
    usual = USUAL if options.ignored is None else SHARES
    wanted = None
    if options.ignored is not None:
        wanted = [each for one in options.ignored for each in labels.of_share(one, options.patterns)]
    return Asked(
        options.shapes or usual.shapes,
        options.activations or usual.activations,
        {BASELINE, *(options.systems or usual.systems)},
        wanted,
        options.modes or usual.modes,
    )


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
    torch.manual_seed(options.seed)
    clock = Calls(rounds=QUICK_ROUNDS if options.quick else ROUNDS)
    times = {key: value for key, value in asdict(clock).items() if key != "begun"}
    method = {**run.METHOD, **times, "seed": options.seed}
    result = record.new("head", method, options.commit, cases=[], bars=[])
    if options.before:
        result["before"] = bars.earlier(options.before)
    path = record.json_path(result, options.out)
    with fresh_caches():
        for case in run.table(asked(options), clock):
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
