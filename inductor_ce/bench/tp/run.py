"""Cross entropy over a sharded vocabulary, forward and backward: the loop over shapes, tasks and systems."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from tqdm import tqdm

from ..shared import measure
from ..shared.compilers import MODES
from . import ranks
from .check import Trial
from .ranks import FarAhead, InStep
from .systems import BASELINE, PLAIN, SYSTEMS, System, baseline
from .tasks import IGNORED_EVERY, TASKS, Task

SHAPES = ((8192, 128256), (4096, 256000))
RATIOS = {"ratio": "ms", "wall_ratio": "wall_ms", "host_ratio": "host_ms", "memory_ratio": "extra_bytes"}
STATISTICS = 3  # rows that one rank tells the others: maximum, sum of exponentials, picked logit

METHOD = {
    "logits": "bf16, 3 * randn, or h W^T with as large ones",
    "labels": f"uniform, every {IGNORED_EVERY}th ignored, on every rank",
    "sharding": "the vocabulary over all ranks, all else on each; gradients stay where a system has them",
    "step": "loss of DTensors, then torch.autograd.grad; tensors are parameters of a module",
    "tasks": "loss, of given logits; rich, the same with smoothing, z-loss and soft-cap; linear, with the "
    "head; sequence, the same of hidden states whose rows are sharded, gathered in the program",
    "peers": "of local logits and a group; TransformerEngine's writes over its logits and is given a copy",
    "compiled": "fullgraph, static shapes, empty caches for every system",
    "ms": "of the GPUs: each step behind work that lasts longer than the hosts need for it; median over the "
    "rounds of a round's median; a repetition takes as long as on the slowest rank, ranks start it together "
    "on their GPUs, with empty L2 caches; the systems take turns within a round",
    "ahead": "whether all hosts had launched the step before their GPUs came to it; ms says less where not",
    "wall_ms": "as ms without that work: steps one after another, as fast as hosts and GPUs can",
    "host_ms": "of the host's clock for the call of a step, the GPU idle before, on the slowest rank",
    "spread, wall_spread": "(slowest round - fastest round) / median",
    "ratio, wall_ratio, host_ratio, memory_ratio": "of ms, wall_ms, host_ms, extra_bytes to those of "
    f"{BASELINE}, or of {PLAIN} where that cannot do the task, for the same shape, task and mode",
    "collective_ms": "NCCL's kernels in the profile of a step, hosts ahead, on the rank that waits least",
    "share": "collective_ms / ms",
    "all_gather_ms": f"an all-gather of [{STATISTICS}, N] float32 by itself",
    "extra_bytes": "peak of the memory allocated in a warm step less that before it, largest over the ranks; "
    "not known of CUDA graphs, whose memory is a pool of their own",
    "errors": "relative to float64 over all rows and the columns of a rank, largest over the ranks",
}


@dataclass(frozen=True)
class Asked:
    """What to measure: everything with everything, and what the others are compared with."""

    shapes: Sequence[tuple[int, int]]
    tasks: Collection[str] = tuple(TASKS)
    systems: Collection[str] = tuple(SYSTEMS)
    modes: Sequence[str] = MODES

    def systems_of(self, task: str, mode: str) -> dict[str, System]:
        wanted = {baseline(task), *self.systems}
        return {name: each for name, each in SYSTEMS.items() if name in wanted and each.serves(task, mode)}

    @property
    def total(self) -> int:
        """Rows there may be."""
        each = (len(self.systems_of(task, mode)) for task in self.tasks for mode in self.modes)
        return len(self.shapes) * sum(each)


def table(
    asked: Asked, budget: InStep, device: str = "cuda", tasks: Mapping[str, Any] = TASKS
) -> Iterator[dict[str, Any]]:
    """Measure; yields what was found at each shape, the same on every rank, as soon as it is complete."""
    mesh = init_device_mesh(device, (dist.get_world_size(),), mesh_dim_names=("tp",))
    with tqdm(total=asked.total, file=sys.stderr, unit="system", disable=not ranks.is_first()) as bar:
        for N, V in asked.shapes:
            found: dict[str, Any] = {"N": N, "V": V, "ranks": mesh.size(), "logits_bytes": 2 * N * V}
            found.update(all_gather_ms=all_gather_ms(mesh, N, budget, device), rows=[], not_measured=[])
            for name in asked.tasks:
                task = tasks[name](mesh, N, V, device)
                for mode in asked.modes:
                    rows, not_measured = case(task, mode, asked.systems_of(name, mode), budget, bar)
                    found["rows"] += rows
                    found["not_measured"] += not_measured
                del task
            yield found


def all_gather_ms(mesh: DeviceMesh, N: int, budget: InStep, device: str) -> float:
    own = torch.zeros(STATISTICS, N, device=device)
    all_of_them = own.new_empty(mesh.size() * STATISTICS, N)
    return budget.time_ms(lambda: dist.all_gather_into_tensor(all_of_them, own, mesh.get_group()))


def case(
    task: Task, mode: str, systems: Mapping[str, System], budget: InStep, bar: tqdm
) -> tuple[list[dict], list[dict]]:
    """(a row for each system that ran, a reason for each that did not) for one task and mode."""
    torch.compiler.reset()
    where = {"task": task.name, "mode": mode}
    rows: dict[str, dict[str, Any]] = {}
    steps: dict[str, measure.Step] = {}
    not_measured = []
    with contextlib.ExitStack() as caches:
        for name, system in systems.items():
            bar.set_description(f"{task.name}, {mode}, {name}")
            caches.enter_context(measure.fresh_caches())
            try_it = Trial(name, system, task, mode)
            row, reason = try_it()
            if reason is None:
                rows[name], steps[name] = {**where, "system": name, **row}, try_it.step
            else:
                not_measured.append({**where, "system": name, "reason": reason})
            bar.update()
        put_times(rows, steps, budget)
    beside = rows.get(baseline(task.name), {})
    for row in rows.values():
        row.update({name: measure.over(row[key], beside.get(key)) for name, key in RATIOS.items()})
    return list(rows.values()), not_measured


def put_times(rows: dict[str, dict[str, Any]], steps: Mapping[str, measure.Step], budget: InStep) -> None:
    """Of the GPUs, behind work that is the same for all systems; and by the wall."""
    if not rows:
        return
    products = ranks.products_for(max(row["host_ms"] for row in rows.values()))
    for name, (ms, spread, round_ms) in measure.timed(steps, FarAhead(budget.rounds, products)).items():
        ahead = ranks.are_ahead(steps[name], products)
        rows[name].update(ms=ms, spread=spread, round_ms=round_ms, ahead=ahead)
        rows[name]["share"] = rows[name]["collective_ms"] / ms
    for name, (wall_ms, wall_spread, _) in measure.timed(steps, budget).items():
        rows[name].update(wall_ms=wall_ms, wall_spread=wall_spread)


def method(budget: InStep) -> dict[str, Any]:
    """How the numbers are made, for the record."""
    nccl = ".".join(map(str, torch.cuda.nccl.version())) if torch.cuda.is_available() else None
    return {**METHOD, **asdict(budget), "nccl": nccl}
