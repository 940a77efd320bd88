"""The command line of the benchmarks."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from . import distil, divergences, recognise, rows
from .ce import command as ce
from .head import command as head
from .tp import command as tp
from .train import command as train

RESULTS = Path(__file__).parent / "results"


class Command(Protocol):
    """What a benchmark gives: what it is, its options, and what it does with them."""

    HELP: str
    __doc__: str | None

    def add_arguments(self, parser: argparse.ArgumentParser) -> None: ...

    def main(self, options: argparse.Namespace) -> int: ...


COMMANDS: dict[str, Command] = {
    "ce": ce,
    "head": head,
    "distil": distil,
    "divergences": divergences,
    "rows": rows,
    "tp": tp,
    "train": train,
    "recognise": recognise,
}


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit status: 0; 1 where a system that is no peer failed or was wrong; 2 for bad usage or no GPU."""
    options = parse(arguments)
    return COMMANDS[options.command].main(options)


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m inductor_ce.bench", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, command in COMMANDS.items():
        its_parser = commands.add_parser(name, help=command.HELP, description=command.__doc__)
        command.add_arguments(its_parser)
        its_parser.add_argument(
            "--out",
            type=Path,
            default=RESULTS,
            help="folder for the results (default: bench/results of the package)",
        )
        its_parser.add_argument("--seed", type=int, default=0, help="of what is drawn (default: 0)")
        its_parser.add_argument("--commit", help="what to record as the commit where git cannot tell")
    return parser.parse_args(arguments)
