"""A training step of whole models of transformers, as their users write it."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from ..shared import merge, record
from ..shared.compilers import BASELINE
from ..shared.measure import fresh_caches
from ..shared.options import add_systems, has_gpu
from . import render, run
from .models import MODELS
from .systems import LIGER, SYSTEMS

HELP = "training steps of whole models"
ROUNDS, QUICK_ROUNDS = 3, 2


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--models", choices=MODELS, nargs="+", default=list(MODELS), help="(default: all of them)"
    )
    add_systems(parser, SYSTEMS)
    parser.add_argument("--quick", action="store_true", help="fewer rounds")
    parser.add_argument(
        "--profile",
        action="store_true",
        help="also profile a step: does the GPU idle before the head?",
    )
    merge.add_merge(parser)


def main(options: argparse.Namespace) -> int:
    if options.merge:
        return merge.put_together(options.merge, options.out, show)
    return measured(options) if has_gpu() else 2


def measured(options: argparse.Namespace) -> int:
    """Measure, keep the JSON complete after every model, print the table, draw the plot."""
    torch.manual_seed(options.seed)
    rounds = QUICK_ROUNDS if options.quick else ROUNDS
    length = run.Length(rounds=rounds, profile=options.profile)
    method = {**run.METHOD, **asdict(length), "seed": options.seed}
    result = record.new("train", method, options.commit, cases=[])
    path = record.json_path(result, options.out)
    systems = [system for name, system in SYSTEMS.items() if name in {BASELINE, *options.systems}]
    with fresh_caches():
        for case in run.table([MODELS[name] for name in options.models], systems, length):
            result["cases"].append(case)
            record.write(result, path)
    show(result, path)
    return int(any(map(failed, result["cases"])))


def show(result: dict[str, Any], path: Path) -> None:
    render.plot(result, path.with_suffix(".png"))
    print(render.table(result), f"\n{path}", path.with_suffix(".png"), sep="\n")


def failed(case: dict[str, Any]) -> bool:
    """Whether a system that is no peer did not run."""
    return any(each["system"] != LIGER for each in case["not_measured"])
