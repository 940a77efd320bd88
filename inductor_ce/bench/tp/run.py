"""Cross entropy over a sharded vocabulary, forward and backward: the loop over shapes, tasks and systems."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from tqdm import tqdm

from ..shared import measure
from ..shared.compilers import DEFAULT, GRAPHS, MODES
from . import ranks
from .check import Trial
from .ranks import InStep
from .systems import BASELINE, SYSTEMS
from .tasks import IGNORED_EVERY, TASKS, Task

SHAPES = ((8192, 128256), (4096, 256000))
STATISTICS = 3  # rows that one rank tells the others: maximum, sum of exponentials, picked logit

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
    own = torch.zeros(STATISTICS, N, device=device)
    all_of_them = own.new_empty(mesh.size() * STATISTICS, N)
    return budget.time_ms(lambda: dist.all_gather_into_tensor(all_of_them, own, mesh.get_group()))


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
        times = measure.interleaved(steps, budget, before_each=measure.nothing, after_each=measure.nothing)
    for name, round_ms in times.items():
        ms, spread = measure.median_and_spread(round_ms)
        rows[name].update(ms=ms, spread=spread, round_ms=round_ms)
    for row in rows.values():
        row["ratio"] = row["ms"] / rows[BASELINE]["ms"] if BASELINE in rows else None
    return list(rows.values()), not_measured


def method(budget: InStep) -> dict[str, Any]:
    """How the numbers are made, for the record."""
    nccl = ".".join(map(str, torch.cuda.nccl.version())) if torch.cuda.is_available() else None
    return {**METHOD, **asdict(budget), "nccl": nccl, "modes": [DEFAULT, GRAPHS]}
