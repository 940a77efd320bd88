"""What the command lines of the benchmarks have in common."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Collection, Sequence

import torch

from .compilers import BASELINE

NO_GPU = "the benchmark times GPU kernels, and torch.cuda sees no GPU here: nothing was measured"


def has_gpu() -> bool:
    """Whether there is a GPU; where there is none, the user is told."""
    if not torch.cuda.is_available():
        print(NO_GPU, file=sys.stderr)
    return torch.cuda.is_available()


def add_shapes(parser: argparse.ArgumentParser) -> None:
    """`--shapes` of N x V, and `--quick`."""
    parser.add_argument(
        "--shapes",
        type=shape,
        nargs="+",
        metavar="NxV",
        help="rows x vocabulary (default: those of the table)",
    )
    parser.add_argument("--quick", action="store_true", help="the first shape only, in fewer rounds")


def add_systems(parser: argparse.ArgumentParser, systems: Collection[str]) -> None:
    """`--systems`, to choose among these."""
    names = ", ".join(systems).replace("%", "%%")  # argparse formats its help by %
    parser.add_argument(
        "--systems",
        choices=systems,
        nargs="+",
        default=list(systems),
        metavar="SYSTEM",
        help=f"besides {BASELINE}, which all are compared with: {names} (default: all)",
    )


def shape(text: str) -> tuple[int, int]:
    """(N, V) from "8192x128256"."""
    try:
        N, V = map(int, text.split("x"))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not like 8192x128256") from None
    if N < 2 or V < 2:
        raise argparse.ArgumentTypeError(f"{text!r} needs two rows and two columns at least")
    return N, V


def shapes(options: argparse.Namespace, usual: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """Those asked for; else the usual ones, of which the first is enough in a hurry."""
    return options.shapes or list(usual[:1] if options.quick else usual)
