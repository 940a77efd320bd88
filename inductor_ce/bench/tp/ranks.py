"""The ranks of a benchmark: one process and one GPU each, in step with each other."""

from __future__ import annotations

import contextlib
import functools
import gc
import math
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

from ..shared import measure
from ..shared.body import occupy
from ..shared.measure import Budget, Step

T = TypeVar("T")

COMMAND = "torchrun --nproc-per-node 4 -m inductor_ce.bench tp"
L2_BYTES = 2**28  # more than any cache holds
FEWEST, MOST, WARM_UP = 5, 200, 3
AHEAD, MARGIN_MS = 2, 5  # a GPU waits so many times what a host needs for a step, and a margin
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


@dataclass(frozen=True)
class FarAhead:
    """A clock for steps that hosts have launched before the GPUs come to them: these are what is timed."""

    rounds: int
    products: int

    def time_ms(self, step: Step) -> float:
        return statistics.median(slowest(step_ms(step, FEWEST, self.products)))


def step_ms(step: Step, count: int, products: int = 0) -> list[float]:
    """The times of `count` steps on this rank's GPU, the L2 cache empty before each.

    NOTE Ranks wait for each other on their GPUs, by a collective of one number before each step. Hosts run
    ahead, as they do in training; if they waited too, every launch would show. Where a host is slower than
    its GPU it falls behind all the same, but for work that keeps the GPU busy: `products` before each step.
    """
    cache = torch.empty(L2_BYTES // 4, dtype=torch.int32, device="cuda")
    gate = torch.zeros(1, device="cuda")

    def together() -> None:
        if products:
            occupy(products)
        cache.zero_()
        dist.all_reduce(gate)

    of_all(None)
    for _ in range(WARM_UP):
        step()
    return measure.gpu_ms(step, count, together)


def host_ms(step: Step) -> float:
    """The time that the slowest host needs for a step."""
    of_all(None)
    return max(of_all(measure.host_and_wall_ms(step, FEWEST)[0]))


def products_for(host_ms: float) -> int:
    """How many products of matrices take longer than a host for its step, and by far."""
    return math.ceil((AHEAD * host_ms + MARGIN_MS) / _product_ms())


@functools.cache
def _product_ms() -> float:
    """On the rank that is fastest. All ranks call."""
    return min(of_all(statistics.median(measure.gpu_ms(lambda: occupy(FEWEST), FEWEST)))) / FEWEST


def are_ahead(step: Step, products: int) -> bool:
    """Whether each host launches steps before its GPU has done so many products. All ranks take as many."""
    of_all(None)
    return all(map(all, of_all([_is_ahead(step, products) for _ in range(WARM_UP)])))


def _is_ahead(step: Step, products: int) -> bool:
    reached = torch.cuda.Event()
    occupy(products)
    reached.record()
    step()
    ahead = not reached.query()
    torch.cuda.synchronize()
    return ahead


def collective_ms(step: Step, products: int) -> float:
    """How long the collectives of one step take, without the time that a rank waits in them for others.

    That is seen on the rank that comes to them last. With hosts far ahead none is late by its host.
    """
    of_all(None)
    with profile(activities=[ProfilerActivity.CUDA]) as found:
        for _ in range(FEWEST):
            occupy(products)
            step()
        torch.cuda.synchronize()
    kernels = ((event.key, event.self_device_time_total) for event in found.key_averages())
    return min(of_all(in_collectives_ms(kernels) / FEWEST))


def in_collectives_ms(kernels: Iterable[tuple[str, float]]) -> float:
    """The sum over the kernels of NCCL, of names and microseconds."""
    return sum(us for name, us in kernels if COLLECTIVE.match(name)) / 1e3
