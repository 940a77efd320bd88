"""Cross entropy over a vocabulary that is sharded over ranks, forward and backward, under torchrun."""

from __future__ import annotations

import contextlib
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor
from tqdm import tqdm

from ..common.compat.distributed import all_gather_blocks
from ..common.compat.dynamo import counters
from . import measure, ranks
from .ranks import InStep, of_all
from .tp_systems import BASELINE, DEFAULT, GRAPHS, MODES, OURS, SYSTEMS, System
from .tp_tasks import IGNORED_EVERY, TASKS, Task

SHAPES = ((8192, 128256), (4096, 256000))
STATISTICS = 3  # rows that one rank tells the others: maximum, sum of exponentials, picked logit
WARM_UP = 3  # calls until CUDA graphs are recorded and replayed

METHOD = {
    "logits": "bf16, 3 * randn, or h W^T with as large ones",
    "labels": f"uniform, every {IGNORED_EVERY}th ignored, on every rank",
    "sharding": "the vocabulary over all ranks, all else on each; gradients stay where a system has them",
    "step": "loss of DTensors, then torch.autograd.grad; tensors are parameters of a module",
    "compiled": "fullgraph, static shapes, empty caches for every system",
    "ms": "median over the rounds of a round's median; a repetition takes as long as on the slowest rank, "
    "ranks start it together on their GPUs, with empty L2 caches; the systems take turns within a round",
    "spread": "(slowest round - fastest round) / median",
    "ratio": f"ms / ms of {BASELINE} for the same shape, task and mode",
    "collective_ms": "NCCL's kernels in the profile of a step, on the rank that waits least in them",
    "all_gather_ms": f"an all-gather of [{STATISTICS}, N] float32 by itself",
    "extra_bytes": "peak of the memory allocated in a warm step less that before it, largest over the ranks; "
    "not known of CUDA graphs, whose memory is a pool of their own",
    "errors": "relative to float64 over all rows and the columns of a rank, largest over the ranks",
}


def table(
    shapes: Sequence[tuple[int, int]],
    budget: InStep,
    device: str = "cuda",
    tasks: Mapping[str, Any] = TASKS,
    modes: Sequence[str] = MODES,
) -> Iterator[dict[str, Any]]:
    """Measure; yields what was found at each shape, the same on every rank, as soon as it is complete."""
    mesh = init_device_mesh(device, (dist.get_world_size(),), mesh_dim_names=("tp",))
    total = len(shapes) * len(tasks) * len(modes) * len(SYSTEMS)
    with tqdm(total=total, file=sys.stderr, unit="system", disable=not ranks.is_first()) as bar:
        for N, V in shapes:
            found: dict[str, Any] = {"N": N, "V": V, "ranks": mesh.size(), "logits_bytes": 2 * N * V}
            found.update(all_gather_ms=all_gather_ms(mesh, N, budget, device), rows=[], not_measured=[])
            for make in tasks.values():
                task = make(mesh, N, V, device)
                for mode in modes:
                    rows, not_measured = case(task, mode, budget, bar)
                    found["rows"] += rows
                    found["not_measured"] += not_measured
            yield found


def all_gather_ms(mesh: DeviceMesh, N: int, budget: InStep, device: str) -> float:
    own, group = torch.zeros(STATISTICS, N, device=device), mesh.get_group().group_name
    return budget.time_ms(lambda: all_gather_blocks(own, group))


def case(task: Task, mode: str, budget: InStep, bar: tqdm) -> tuple[list[dict], list[dict]]:
    """(a row for each system that ran, a reason for each that did not) for one task and mode."""
    torch.compiler.reset()
    where = {"task": task.name, "mode": mode}
    rows: dict[str, dict[str, Any]] = {}
    steps: dict[str, measure.Step] = {}
    not_measured = []
    with contextlib.ExitStack() as caches:
        for name, system in SYSTEMS.items():
            bar.set_description(f"{task.name}, {mode}, {name}")
            bar.update()
            if mode not in system.modes:
                continue
            caches.enter_context(measure.fresh_caches())
            try_it = Trial(name, system, task, mode)
            row, reason = try_it()
            if reason is None:
                rows[name], steps[name] = {**where, "system": name, **row}, try_it.step
            else:
                not_measured.append({**where, "system": name, "reason": reason})
        times = measure.interleaved(steps, budget, before_each=lambda: None, after_each=lambda: None)
    for name, round_ms in times.items():
        ms, spread = measure.median_and_spread(round_ms)
        rows[name].update(ms=ms, spread=spread, round_ms=round_ms)
    for row in rows.values():
        row["ratio"] = row["ms"] / rows[BASELINE]["ms"] if BASELINE in rows else None
    return list(rows.values()), not_measured


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
            reason = _failure_of(stage, row)
            reasons = [f"failed on rank {i}: {why}" for i, why in enumerate(of_all(reason)) if why]
            if reasons:
                return {}, reasons[0]
        return self._of_ranks(of_all(row)), None

    def step(self) -> dict[str, DTensor]:
        torch.compiler.cudagraph_mark_step_begin()
        return self.task.step(self._function, self.system.context())

    def _build(self, row: dict[str, Any]) -> None:
        self._function = self.system.build(self.task.function, self.mode)

    def _first_call(self, row: dict[str, Any]) -> None:
        counters.clear()
        start = time.perf_counter()
        self.step()["loss"].to_local().item()
        row["first_call_s"] = time.perf_counter() - start
        row["sites"] = counters["inductor_ce"]["sites"]

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
        row["collective_ms"] = ranks.collective_ms(self.step)

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


def _failure_of(stage: Callable[[dict[str, Any]], None], row: dict[str, Any]) -> str | None:
    """What a stage raised, in a line."""
    try:
        stage(row)
    except Exception as error:  # whatever one system raises, the others are still worth their numbers
        tqdm.write(traceback.format_exc(), file=sys.stderr)
        return f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
    return None


def _largest(errors: Iterator[float]) -> float:
    """NaN where one is."""
    return torch.tensor(list(errors), dtype=torch.float64).amax().item()


def failed(found: dict[str, Any]) -> bool:
    """Whether inductor_ce did not run, or was wrong. The others may fail, and may err."""
    wrong = [row["system"] for row in found["rows"] if row["problems"]]
    return OURS in wrong + [each["system"] for each in found["not_measured"]]


def method(budget: InStep) -> dict[str, Any]:
    """How the numbers are made, for the record."""
    nccl = ".".join(map(str, torch.cuda.nccl.version())) if torch.cuda.is_available() else None
    return {**METHOD, **asdict(budget), "nccl": nccl, "modes": [DEFAULT, GRAPHS]}
