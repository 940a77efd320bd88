"""Time and memory on a GPU, of anything that can be called. Times in ms, memory in bytes."""

from __future__ import annotations

import contextlib
import gc
import math
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol
from unittest import mock

import torch
from torch import Tensor

try:
    from triton.testing import do_bench
except ModuleNotFoundError:  # torch's CPU builds bring no triton, and nothing is timed without a GPU
    do_bench = None

Step = Callable[[], Any]
MOST_CALLS = 100


class Clock(Protocol):
    """How often to measure, and how to time a step once."""

    @property
    def rounds(self) -> int: ...

    def time_ms(self, step: Step) -> float: ...


@dataclass(frozen=True)
class Budget:
    """How long to measure: in each of `rounds`, `warmup_ms` and `rep_ms` of do_bench for every system."""

    rounds: int
    warmup_ms: int = 10
    rep_ms: int = 60

    def time_ms(self, step: Step) -> float:
        """The median time of `step` in one do_bench, which empties the L2 cache before every call."""
        return do_bench(step, warmup=self.warmup_ms, rep=self.rep_ms, return_mode="median")


@dataclass(frozen=True)
class Calls:
    """For steps of tens of ms, of which do_bench would spend six to find out how long one takes.

    Shorter steps are called more often, until they fill `least_ms`.

    Attributes:
        begun: an event that a call has recorded, from which its time is counted; from its beginning, if None.
    """

    rounds: int
    calls: int = 2
    least_ms: float = 40.0
    begun: Callable[[], torch.cuda.Event] | None = None

    def time_ms(self, step: Step) -> float:
        """The median time of the calls of `step`, after one that is not counted."""
        ms = self._median_of_calls(step, self.calls)
        if self.calls * ms < self.least_ms:
            ms = self._median_of_calls(step, min(MOST_CALLS, math.ceil(self.least_ms / ms)))
        return ms

    def _median_of_calls(self, step: Step, calls: int) -> float:
        """The host goes ahead by the first call, which is not counted."""
        step()
        return statistics.median(gpu_ms(step, calls, begun=self.begun))


def gpu_ms(
    step: Step,
    calls: int,
    before_each: Step | None = None,
    begun: Callable[[], torch.cuda.Event] | None = None,
) -> list[float]:
    """The GPU's time for each call of `step`; the host waits for none but the last.

    Args:
        before_each: launches what is not counted.
        begun: as that of `Calls`.
    """
    events = [_events_of(step, before_each or nothing, begun) for _ in range(calls)]
    torch.cuda.synchronize()
    return [start.elapsed_time(end) for start, end in events]


def _events_of(
    step: Step, before: Step, begun: Callable[[], torch.cuda.Event] | None
) -> tuple[torch.cuda.Event, torch.cuda.Event]:
    before()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    step()
    end.record()
    return (start if begun is None else begun()), end


def host_and_wall_ms(step: Step, calls: int) -> tuple[float, float]:
    """(the host's time for a step, the time until the GPU has done it too), of an idle GPU: medians in ms."""
    step()
    both = [_host_and_wall_ms(step) for _ in range(calls)]
    host, wall = (statistics.median(column) for column in zip(*both, strict=True))
    return host, wall


def _host_and_wall_ms(step: Step) -> tuple[float, float]:
    torch.cuda.synchronize()
    start = time.perf_counter()
    result = step()
    launched = time.perf_counter()
    torch.cuda.synchronize()
    del result
    return 1e3 * (launched - start), 1e3 * (time.perf_counter() - start)


def median_and_spread(round_ms: Sequence[float]) -> tuple[float, float]:
    """(the median of the rounds in ms, the distance of the slowest from the fastest over that median)."""
    median = statistics.median(round_ms)
    return median, (max(round_ms) - min(round_ms)) / median


def interleaved(
    steps: Mapping[str, Step], budget: Clock, before_each: Step, after_each: Step
) -> dict[str, list[float]]:
    """The time of every step in every round, in ms; each round times each step once.

    Odd rounds go through the steps backwards, so that none always follows the same neighbour.

    Args:
        steps: what to time, warm.
        budget: rounds, and the length of each measurement.
        before_each: called before each measurement, to put inputs right.
        after_each: called after each measurement, to show progress.
    """
    times: dict[str, list[float]] = {name: [] for name in steps}
    for i in range(budget.rounds):
        for name in list(steps)[:: -1 if i % 2 else 1]:
            before_each()
            times[name].append(budget.time_ms(steps[name]))
            after_each()
    return times


def timed(steps: Mapping[str, Step], clock: Clock) -> dict[str, tuple[float, float, list[float]]]:
    """(median, spread, every round) of every step, in ms but for the spread."""
    times = interleaved(steps, clock, before_each=nothing, after_each=nothing)
    return {name: (*median_and_spread(rounds), rounds) for name, rounds in times.items()}


def over(a: float | None, b: float | None) -> float | None:
    """a / b, or None where one is missing."""
    return a / b if a is not None and b else None


def peak_extra_bytes(step: Step) -> int:
    """The most memory that one call of `step` holds beyond what was allocated before it, results included."""
    gc.collect()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    result = step()
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated()
    del result
    return peak - before


def nothing() -> None:
    """For inputs that no step changes."""


def poison(like: Tensor) -> None:
    """Leave NaN where the next allocation of this size goes, so that an output not written shows."""
    torch.cuda.empty_cache()
    torch.full_like(like, torch.nan)


@dataclass(frozen=True)
class Ceilings:
    """The least time in ms for `size` bytes: `copy_ms` to read and write them, `read_ms` to read them."""

    size: int
    copy_ms: float
    read_ms: float

    @property
    def two_pass_ms(self) -> float:
        """Read once and write once: a gradient that is made in the forward, logits read once."""
        return self.copy_ms

    @property
    def three_pass_ms(self) -> float:
        """Read in the forward, then read and write in the backward."""
        return self.read_ms + self.copy_ms


def ceilings(buffer: Tensor, budget: Budget) -> Ceilings:
    """How fast this GPU copies `buffer`, and how fast the best of a few torch reductions reads it."""
    target = torch.empty_like(buffer)
    flat = buffer.view(-1)
    words = flat[: flat.numel() // 2 * 2].view(torch.float32)
    readers: list[Step] = [words.sum, words.amax, lambda: buffer.sum(dim=1, dtype=torch.float32)]

    def median_ms(step: Step) -> float:
        return statistics.median(budget.time_ms(step) for _ in range(3))

    return Ceilings(
        size=buffer.numel() * buffer.element_size(),
        copy_ms=median_ms(lambda: target.copy_(buffer)),
        read_ms=min(map(median_ms, readers)),
    )


@contextlib.contextmanager
def fresh_caches() -> Iterator[None]:
    """Inductor's and Triton's caches in a folder of their own, which goes on leaving the block.

    NOTE no cache of another run
    The caches may hold what another version of a pass, or of a template, made.
    """
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        places = {"TORCHINDUCTOR_CACHE_DIR": folder, "TRITON_CACHE_DIR": str(Path(folder, "triton"))}
        with mock.patch.dict(os.environ, places):
            yield
