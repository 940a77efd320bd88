"""The ranks of a benchmark: one process and one GPU each, in step with each other."""

from __future__ import annotations

import contextlib
import gc
import os
import re
import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.profiler import ProfilerActivity, profile

from ..shared.measure import Budget, Step

T = TypeVar("T")

COMMAND = "torchrun --nproc-per-node 4 -m inductor_ce.bench tp"
L2_BYTES = 2**28  # more than any cache holds
FEWEST, MOST, WARM_UP = 5, 200, 3
TIMEOUT = timedelta(minutes=10)

# The kernels of NCCL. Its ranges in the profile, `nccl:all_gather`, would count the same time again.
COLLECTIVE = re.compile(r"^nccl(Dev)?Kernel")


def missing(environment: Mapping[str, str] = os.environ) -> str | None:
    """What there is too little of here to be a rank among others; None where nothing is."""
    if not torch.cuda.is_available():
        return "no GPU: torch.cuda sees none here"
    if not {"RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR"} <= environment.keys():
        return f"no ranks: this process was not started by torchrun; try {COMMAND}"
    if int(environment["WORLD_SIZE"]) < 2:
        return f"one rank alone: the vocabulary is sharded over two at least; try {COMMAND}"
    here, gpus = int(environment["LOCAL_WORLD_SIZE"]), torch.cuda.device_count()
    if here > gpus:
        return f"{here} ranks on a machine with {gpus} GPUs: each needs one of its own"
    return None


def is_first(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether this process is the one that speaks and writes."""
    return environment.get("RANK", "0") == "0"


@contextlib.contextmanager
def joined() -> Iterator[None]:
    """Within the block this process is a rank: NCCL for what is measured, gloo for what ranks tell.

    NOTE A rank that fails alone inside a collective leaves the others waiting. They give up after TIMEOUT,
    and the run ends with what was complete before.
    """
    torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("cpu:gloo,cuda:nccl", timeout=TIMEOUT)
    try:
        yield
    finally:
        torch.compiler.reset()  # a communicator does not end while a CUDA graph has it
        gc.collect()
        dist.destroy_process_group()


def of_all(value: T) -> list[T]:
    """The value of each rank, on every rank. No rank returns before all have called."""
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def slowest(times: Sequence[float]) -> list[float]:
    """For each repetition the time of the rank that took longest."""
    return [max(each) for each in zip(*of_all(list(times)), strict=True)]


@dataclass(frozen=True)
class InStep(Budget):
    """A budget for steps that ranks take together: all of them as often, and timed by the slowest."""

    def time_ms(self, step: Step) -> float:
        estimate = statistics.median(slowest(step_ms(step, FEWEST)))
        count = max(FEWEST, min(MOST, round(self.rep_ms / estimate)))
        return statistics.median(slowest(step_ms(step, count)))


def step_ms(step: Step, count: int) -> list[float]:
    """The times of `count` steps on this rank's GPU, the L2 cache empty before each.

    NOTE Ranks wait for each other on their GPUs, by a collective of one number before each step. Hosts run
    ahead, as they do in training; if they waited too, every launch would show.
    """
    cache = torch.empty(L2_BYTES // 4, dtype=torch.int32, device="cuda")
    gate = torch.zeros(1, device="cuda")
    pairs = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(count)]
    of_all(None)
    for _ in range(WARM_UP):
        step()
    for start, end in pairs:
        cache.zero_()
        dist.all_reduce(gate)
        start.record()
        step()
        end.record()
    torch.cuda.synchronize()
    return [start.elapsed_time(end) for start, end in pairs]


def collective_ms(step: Step) -> float:
    """How long the collectives of one step take, without the time that a rank waits in them for others."""
    of_all(None)
    with profile(activities=[ProfilerActivity.CUDA]) as found:
        for _ in range(FEWEST):
            step()
        torch.cuda.synchronize()
    kernels = ((event.key, event.self_device_time_total) for event in found.key_averages())
    return min(of_all(in_collectives_ms(kernels) / FEWEST))


def in_collectives_ms(kernels: Iterable[tuple[str, float]]) -> float:
    """The sum over the kernels of NCCL, of names and microseconds."""
    return sum(us for name, us in kernels if COLLECTIVE.match(name)) / 1e3
