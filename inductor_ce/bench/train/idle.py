"""Where the GPU idles in a step, by the trace of torch.profiler: all times in us, as it has them.

The kernels of our head are those of templates, by name, which the models here have from nobody else, and
those that its operators launch where torch's dispatcher calls them.
"""

from __future__ import annotations

import json
import re
import tempfile
from bisect import bisect_right
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.profiler import ProfilerActivity, profile, schedule

OPERATOR, TEMPLATE = "inductor_ce::", re.compile(r"^triton_tem_")
ON_GPU = {"kernel", "gpu_memcpy", "gpu_memset"}
LAUNCHES = {"cuda_runtime", "cuda_driver"}
BEFORE_US = 2000.0  # how long before the head a gap is still before it

Event = dict[str, Any]  # of a trace in Chrome's format


class Work(NamedTuple):
    start: float
    end: float
    name: str
    of_head: bool


class Gap(NamedTuple):
    start: float
    end: float

    @property
    def us(self) -> float:
        return self.end - self.start


def profiled(step: Callable[[], Any]) -> dict[str, Any]:
    """`idle` of one call of a step, after another that only warms the profiler."""
    activities = [ProfilerActivity.CPU, ProfilerActivity.CUDA]
    with profile(activities=activities, schedule=schedule(wait=0, warmup=1, active=1)) as found:
        step()
        torch.cuda.synchronize()
        found.step()
        step()
        torch.cuda.synchronize()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "trace.json")
        found.export_chrome_trace(str(path))
        return idle(json.loads(path.read_text())["traceEvents"])


def idle(events: list[Event]) -> dict[str, Any]:
    """What a trace says, from its first work on a GPU to its last; None of what there is none of.

    idle_share           the time without work over all
    gap_before_head_us   the longest without work that ends within BEFORE_US before the head, or at its start
    gap_in_head_us       the longest between its first kernel and its last
    head_us              from its first kernel to its last
    first_of_head        the name of the first
    """
    work = sorted(_work(events))
    gaps = [*_gaps(work)]
    whole = max((w.end for w in work), default=0.0) - work[0].start if work else 0.0
    found: dict[str, Any] = {"idle_share": sum(gap.us for gap in gaps) / whole if whole else None}
    head = [w for w in work if w.of_head]
    if not head:
        return found | dict.fromkeys(("gap_before_head_us", "gap_in_head_us", "head_us", "first_of_head"))
    start, end = head[0].start, max(w.end for w in head)
    return found | {
        "gap_before_head_us": _longest(g for g in gaps if start - BEFORE_US < g.end <= start),
        "gap_in_head_us": _longest(g for g in gaps if start <= g.start and g.end <= end),
        "head_us": end - start,
        "first_of_head": head[0].name,
    }


def _work(events: list[Event]) -> Iterator[Work]:
    launched = _launched_by_operators(events)
    for event in events:
        if event.get("cat") in ON_GPU:
            of_head = bool(TEMPLATE.search(event["name"])) or _correlation(event) in launched
            yield Work(event["ts"], event["ts"] + event["dur"], event["name"], of_head)


def _launched_by_operators(events: list[Event]) -> set[Any]:
    """What relates to their work on the GPU the launches within our operators, on the operator's thread."""
    spans: dict[Any, list[tuple[float, float]]] = {}
    for event in events:
        if event.get("cat") == "cpu_op" and event["name"].startswith(OPERATOR):
            spans.setdefault(event["tid"], []).append((event["ts"], event["ts"] + event["dur"]))
    outermost = {thread: _outermost(each) for thread, each in spans.items()}
    launches = (event for event in events if event.get("cat") in LAUNCHES)
    return {_correlation(e) for e in launches if _is_within(e["ts"], outermost.get(e["tid"], []))}


def _outermost(spans: list[tuple[float, float]]) -> list[tuple[float, float]]:
    found: list[tuple[float, float]] = []
    for span in sorted(spans, key=lambda s: (s[0], -s[1])):
        if not found or span[0] >= found[-1][1]:
            found.append(span)
    return found


def _is_within(time: float, spans: list[tuple[float, float]]) -> bool:
    before = bisect_right(spans, (time, float("inf"))) - 1
    return before >= 0 and time <= spans[before][1]


def _correlation(event: Event) -> Any:
    return event.get("args", {}).get("correlation")


def _gaps(work: list[Work]) -> Iterator[Gap]:
    """Between pieces of work, of whatever stream, in the order of their starts."""
    end = work[0].end if work else 0.0
    for each in work[1:]:
        if each.start > end:
            yield Gap(end, each.start)
        end = max(end, each.end)


def _longest(gaps: Iterator[Gap]) -> float:
    return max((gap.us for gap in gaps), default=0.0)
