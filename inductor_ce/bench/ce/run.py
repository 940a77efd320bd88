"""Cross entropy over given logits, forward and backward: the loop over shapes, losses and systems."""

from __future__ import annotations

import functools
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any

import torch
from tqdm import tqdm

from ..shared import measure
from ..shared.compilers import BASELINE
from ..shared.losses import Loss
from ..shared.measure import Budget
from ..shared.peers import NotOffered
from .check import admit
from .inputs import IGNORED_EVERY, Inputs
from .systems import SYSTEMS

SHAPES = ((8192, 128256), (8192, 32000), (4096, 256000))

METHOD = {
    "logits": "bf16, 3 * randn",
    "labels": f"uniform, every {IGNORED_EVERY}th ignored",
    "reduction": "mean",
    "step": "loss, then torch.autograd.grad(loss, logits)",
    "compiled": "fullgraph, static shapes, caches empty at the start of the run",
    "ms": "median over the rounds of do_bench's median; the systems take turns within a round",
    "spread": "(slowest round - fastest round) / median",
    "in place": "a system that writes over its input meets fresh logits once in every do_bench",
    "ratio": f"ms / ms of {BASELINE} for the same shape and loss",
    "extra_bytes": "peak of the memory allocated in a warm step less that before it: no inputs, but dz",
    "errors": "relative to float64 over all rows: |loss - ref| / |ref| and norm(dz - ref) / norm(ref)",
    "limits": "two passes: a copy of the logits; three passes: a read and a copy; measured at each shape",
}


def table(
    shapes: Sequence[tuple[int, int]], losses: Sequence[Loss], budget: Budget, device: str = "cuda"
) -> Iterator[dict[str, Any]]:
    """Measure; yields what was found at each shape as soon as it is complete, ready for JSON."""
    total = len(shapes) * len(losses) * len(SYSTEMS) * (1 + budget.rounds)
    with tqdm(total=total, file=sys.stderr, desc="starting", unit="measurement") as bar:
        for N, V in shapes:
            bar.set_description(f"{N} x {V}, limits")
            inputs = Inputs.random(N, V, device)
            limits = measure.ceilings(inputs.pristine, budget)
            found: dict[str, Any] = {"N": N, "V": V, "logits_bytes": limits.size, **_numbers(limits)}
            found.update(rows=[], not_measured=[])
            for loss in losses:
                rows, not_measured = case(loss, inputs, budget, bar)
                found["rows"] += rows
                found["not_measured"] += not_measured
            yield found


def _numbers(limits: measure.Ceilings) -> dict[str, float]:
    return {
        "copy_ms": limits.copy_ms,
        "read_ms": limits.read_ms,
        "two_pass_ms": limits.two_pass_ms,
        "three_pass_ms": limits.three_pass_ms,
        "copy_bytes_per_s": 2 * limits.size / limits.copy_ms * 1e3,
        "read_bytes_per_s": limits.size / limits.read_ms * 1e3,
    }


def case(loss: Loss, inputs: Inputs, budget: Budget, bar: tqdm) -> tuple[list[dict], list[dict]]:
    """(a row for each system that ran, a reason for each that did not) for one loss at one shape."""
    torch.compiler.reset()
    N, V = inputs.logits.shape
    rows: dict[str, dict[str, Any]] = {}
    steps: dict[str, measure.Step] = {}
    not_measured = []
    for name, build in SYSTEMS.items():
        bar.set_description(f"{N} x {V}, {loss.name}, {name}")
        function = admit(name, build, loss, inputs, rows)
        if isinstance(function, NotOffered):
            not_measured.append({"loss": loss.name, "system": name, "reason": function.reason})
            tqdm.write(f"{loss.name}: {name} left out: {function.reason}", file=sys.stderr)
            bar.update(1 + budget.rounds)
        else:
            steps[name] = functools.partial(inputs.step, function)
            bar.update()
    bar.set_description(f"{N} x {V}, {loss.name}, timing")
    times = measure.interleaved(steps, budget, before_each=inputs.restore, after_each=bar.update)
    for name, round_ms in times.items():
        ms, spread = measure.median_and_spread(round_ms)
        rows[name].update(ms=ms, spread=spread, round_ms=round_ms)
    for row in rows.values():
        row["ratio"] = row["ms"] / rows[BASELINE]["ms"] if BASELINE in rows else None
    return list(rows.values()), not_measured


def method(budget: Budget) -> dict[str, Any]:
    """How the numbers are made, for the record."""
    return {**METHOD, **asdict(budget)}
