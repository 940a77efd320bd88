"""Everything about a system but its time, on all ranks: compilation, errors against float64, memory."""

from __future__ import annotations

import sys
import time
import traceback
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from tqdm import tqdm

from ...api.counts import counted, forget_counts
from ..shared import measure
from ..shared.compilers import GRAPHS, OURS, WARM_UP
from ..shared.peers import NotOffered
from . import ranks
from .ranks import of_all
from .systems import System
from .tasks import Task


class Trial:
    """One system at one task: built, run and checked by all ranks."""

    def __init__(self, name: str, system: System, task: Task, mode: str):
        self.name, self.system, self.task, self.mode = name, system, task, mode

    def __call__(self) -> tuple[dict[str, Any], str | None]:
        """(what was found, why nothing was): the same on every rank. A failure is a reason, never raised.

        The ranks agree after each stage, so that none goes on to a collective that another will not reach.
        """
        row: dict[str, Any] = {}
        for stage in (self._build, self._first_call, self._check):
            reasons = [why for why in of_all(_why_not(stage, row)) if why]
            if reasons:
                return {}, reasons[0]
        return self._of_ranks(of_all(row)), None

    def step(self) -> dict[str, DTensor]:
        torch.compiler.cudagraph_mark_step_begin()
        return self.task.step(self._function, self.system.context())

    def _build(self, row: dict[str, Any]) -> NotOffered | None:
        built = self.system.build(self.task, self.mode)
        if isinstance(built, NotOffered):
            return built
        self._function = built
        return None

    def _first_call(self, row: dict[str, Any]) -> None:
        forget_counts()
        start = time.perf_counter()
        self.step()["loss"].to_local().item()
        row["first_call_s"] = time.perf_counter() - start
        row["sites"] = counted().get("sites", 0)

    def _check(self, row: dict[str, Any]) -> None:
        """Everything else on this rank but the time of a step."""
        for _ in range(WARM_UP - 1):
            self.step()
        measure.poison(next(self.task.held.parameters()).to_local())
        found = self.step()
        row["errors"] = self.task.errors(found)
        row["placements"] = {name: str(x.placements[0]) for name, x in found.items()}
        del found
        row["extra_bytes"] = None if self.mode == GRAPHS else measure.peak_extra_bytes(self.step)
        row["host_ms"] = ranks.host_ms(self.step)
        row["collective_ms"] = ranks.collective_ms(self.step, ranks.products_for(row["host_ms"]))

    def _of_ranks(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        """The worst of all ranks."""
        worst = {
            name: None if rows[0][name] is None else max(row[name] for row in rows)
            for name in ("extra_bytes", "first_call_s")
        }
        errors = {name: _largest(row["errors"][name] for row in rows) for name in rows[0]["errors"]}
        problems = self._problems(errors)
        if self.name == OURS and not all(row["sites"] for row in rows):
            problems.append("no loss was rewritten")
        return {**rows[0], **worst, "errors": errors, "problems": problems}

    def _problems(self, errors: dict[str, float]) -> list[str]:
        """What is wrong with a result. NaN never passes.

        The limit of a gradient is that of its roundings to bf16 and a twentieth; that of the loss, a float32
        sum of N rows, is 1e-5.
        """
        rounding = torch.finfo(torch.bfloat16).eps / 2
        limits = dict.fromkeys(errors, 1.05 * self.task.roundings * rounding) | {"loss": 1e-5}
        return [
            f"{name}: error {error:.1e}, above {limits[name]:.1e}"
            for name, error in errors.items()
            if not error <= limits[name]
        ]


def _why_not(stage: Callable[[dict[str, Any]], NotOffered | None], row: dict[str, Any]) -> str | None:
    """Why a system does not take part, or what a stage raised, in a line."""
    try:
        absent = stage(row)
        return absent.reason if absent else None
    except Exception as error:  # whatever one system raises, the others are still worth their numbers
        tqdm.write(traceback.format_exc(), file=sys.stderr)
        reason = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
        return f"failed on rank {dist.get_rank()}: {reason}"


def _largest(errors: Iterator[float]) -> float:
    """NaN where one is."""
    return torch.tensor(list(errors), dtype=torch.float64).amax().item()
