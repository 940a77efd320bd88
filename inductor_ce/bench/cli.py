"""The command line of the benchmark."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from . import ce, ranks, recognise, record, render, tp, tp_render
from .head import command as head
from .head import run
from .losses import LOSSES
from .measure import Budget, fresh_caches
from .peers import PEERS

RESULTS = Path(__file__).parent / "results"
ROUNDS, QUICK_ROUNDS = 7, 3
SHAPES = {"ce": ce.SHAPES, "tp": tp.SHAPES}
NO_GPU = "the benchmark times GPU kernels, and torch.cuda sees no GPU here: nothing was measured"


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit status: 0; 1 where a system that is no peer failed or was wrong; 2 for bad usage or no GPU."""
    options = parse(arguments)
    if options.command == "recognise":
        return run_recognise(options)
    if options.command == "head" and options.merge:
        return head.merged(options)
    if options.command == "tp":
        return run_tp(options)
    if not torch.cuda.is_available():
        print(NO_GPU, file=sys.stderr)
        return 2
    return head.measured(options) if options.command == "head" else run_ce(options)


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m inductor_ce.bench", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    ce_parser = commands.add_parser("ce", help="cross entropy over given logits", description=ce.__doc__)
    ce_parser.add_argument(
        "--losses", choices=LOSSES, nargs="+", default=list(LOSSES), help="(default: all of them)"
    )
    tp_parser = commands.add_parser(
        "tp", help="the same over a sharded vocabulary, under torchrun", description=tp.__doc__
    )
    for command in (ce_parser, tp_parser):
        command.add_argument(
            "--shapes",
            type=shape,
            nargs="+",
            metavar="NxV",
            help="rows x vocabulary (default: those of the table)",
        )
        command.add_argument("--quick", action="store_true", help="the first shape only, in fewer rounds")
    head_parser = commands.add_parser("head", help="linear layer and cross entropy", description=run.__doc__)
    head.add_arguments(head_parser)
    reading = commands.add_parser(
        "recognise", help="the time that recognition takes; needs no GPU", description=recognise.__doc__
    )
    for command in (ce_parser, tp_parser, head_parser, reading):
        command.add_argument(
            "--out",
            type=Path,
            default=RESULTS,
            help="folder for the results (default: bench/results of the package)",
        )
        command.add_argument("--commit", help="what to record as the commit where git cannot tell")
    options = parser.parse_args(arguments)
    if options.command in SHAPES:
        shapes = SHAPES[options.command]
        options.shapes = options.shapes or list(shapes[:1] if options.quick else shapes)
    return options


def shape(text: str) -> tuple[int, int]:
    """(N, V) from "8192x128256"."""
    try:
        N, V = map(int, text.split("x"))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not like 8192x128256") from None
    if N < 2 or V < 2:
        raise argparse.ArgumentTypeError(f"{text!r} needs two rows and two columns at least")
    return N, V


def run_ce(options: argparse.Namespace) -> int:
    """Measure, keep the JSON complete after every shape, print the table, draw the plot."""
    budget = Budget(rounds=QUICK_ROUNDS if options.quick else ROUNDS)
    result: dict[str, Any] = {
        "benchmark": "ce",
        "environment": record.environment(options.commit),
        "method": {**ce.method(budget), "seed": torch.seed()},
        "shapes": [],
    }
    path = record.json_path(result, options.out)
    with fresh_caches():
        for found in ce.table(options.shapes, [LOSSES[name] for name in options.losses], budget):
            result["shapes"].append(found)
            record.write(result, path)
    render.plot(result, path.with_suffix(".png"))
    print(render.table(result), f"\n{path}", path.with_suffix(".png"), sep="\n")
    return int(any(map(failed, result["shapes"])))


def run_tp(options: argparse.Namespace) -> int:
    """As `run_ce`, by all ranks; the first one writes, prints and draws."""
    lacking = ranks.missing()
    if lacking is not None:
        if ranks.is_first():
            print(f"the benchmark compares GPUs that share a vocabulary: {lacking}", file=sys.stderr)
        return 2
    with ranks.joined():
        return measure_tp(options, tp.table)


def measure_tp(options: argparse.Namespace, table: Callable[..., Iterable[dict[str, Any]]]) -> int:
    """What `table` finds, kept by the first rank."""
    budget = ranks.InStep(rounds=QUICK_ROUNDS if options.quick else ROUNDS)
    seed = ranks.of_all(torch.seed())[0]
    result: dict[str, Any] = {
        "benchmark": "tp",
        "environment": record.environment(options.commit),
        "method": {**tp.method(budget), "seed": seed},
        "shapes": [],
    }
    path = record.json_path(result, options.out)
    for found in table(options.shapes, budget):
        result["shapes"].append(found)
        if ranks.is_first():
            record.write(result, path)
    if ranks.is_first():
        tp_render.plot(result, path.with_suffix(".png"))
        print(tp_render.table(result), f"\n{path}", path.with_suffix(".png"), sep="\n")
    return int(any(map(tp.failed, result["shapes"])))


def run_recognise(options: argparse.Namespace) -> int:
    """Measure, keep the JSON, print the table."""
    result: dict[str, Any] = {
        "benchmark": "recognise",
        "environment": record.environment(options.commit),
        "method": recognise.METHOD,
        "found": recognise.measure(recognise.ROUNDS),
    }
    path = record.json_path(result, options.out)
    record.write(result, path)
    print(recognise.table(result), path, sep="\n")
    return 0


def failed(found: dict[str, Any]) -> bool:
    """Whether a system that must work did not, or was wrong. Peers may be absent, and may err."""
    wrong = [row["system"] for row in found["rows"] if row["problems"]]
    absent = [each["system"] for each in found["not_measured"]]
    return any(name not in PEERS for name in wrong + absent)
