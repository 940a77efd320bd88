"""Cross entropy over given logits, forward and backward: the loop over shapes, losses and systems."""

from __future__ import annotations

import functools
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from ..common.compat.dynamo import counters
from . import measure
from .losses import IGNORED, Loss, LossFunction, errors
from .measure import Budget
from .peers import NotOffered
from .systems import BASELINE, OURS, SYSTEMS

SHAPES = ((8192, 128256), (8192, 32000), (4096, 256000))
IGNORED_EVERY = 17

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


@dataclass(frozen=True)
class Inputs:
    """`logits` [N, V] as the systems get them, `y` [N], and `pristine`: the logits as they were drawn."""

    logits: Tensor
    y: Tensor
    pristine: Tensor

    @classmethod
    def random(cls, N: int, V: int, device: str) -> Inputs:
        pristine = 3 * torch.randn(N, V, dtype=torch.bfloat16, device=device)
        y = torch.randint(0, V, (N,), device=device)
        y[::IGNORED_EVERY] = IGNORED
        return cls(pristine.clone().requires_grad_(), y, pristine)

    def restore(self) -> None:
        """Undo what a system that writes over its input has done."""
        with torch.no_grad():
            self.logits.copy_(self.pristine)

    def step(self, function: LossFunction) -> tuple[Tensor, Tensor]:
        """(loss, dz): one forward and backward. Nothing is added to an earlier gradient."""
        loss = function(self.logits, self.y)
        (dz,) = torch.autograd.grad(loss, self.logits)
        return loss.detach(), dz


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


def admit(
    name: str,
    build: Callable[[Loss], LossFunction | NotOffered],
    loss: Loss,
    inputs: Inputs,
    rows: dict[str, dict[str, Any]],
) -> LossFunction | NotOffered:
    """Build a system, run and check it. Its row goes into `rows`; a failure is reported, never raised."""
    try:
        function = build(loss)
        if not isinstance(function, NotOffered):
            rows[name] = {"loss": loss.name, "system": name, **check(name, function, loss, inputs)}
        return function
    except Exception as error:  # whatever one system raises, the others are still worth their numbers
        tqdm.write(traceback.format_exc(), file=sys.stderr)
        return NotOffered.because(error)


def check(name: str, function: LossFunction, loss: Loss, inputs: Inputs) -> dict[str, Any]:
    """Everything about a system but its time: compilation, errors against float64, memory."""
    counters.clear()
    inputs.restore()
    start = time.perf_counter()
    inputs.step(function)[0].item()
    first_call_s = time.perf_counter() - start
    sites = counters["inductor_ce"]["sites"]

    inputs.restore()
    measure.poison(inputs.pristine)
    value, dz = inputs.step(function)
    loss_error, dz_error = errors(loss, inputs.pristine, inputs.y, value, dz)
    overwrites = not torch.equal(inputs.logits, inputs.pristine)
    problems = _problems(value, loss_error, dz, dz_error)
    if name == OURS and not sites:
        problems.append("no loss was rewritten")
    del value, dz

    inputs.restore()
    return {
        "extra_bytes": measure.peak_extra_bytes(lambda: inputs.step(function)),
        "loss_error": loss_error,
        "dz_error": dz_error,
        "overwrites_logits": overwrites,
        "first_call_s": first_call_s,
        "sites": sites,
        "problems": problems,
    }


def _problems(value: Tensor, loss_error: float, dz: Tensor, dz_error: float) -> list[str]:
    """What is wrong with a result. NaN never passes.

    The limit for dz is that of one rounding to its dtype and a twentieth; the loss, a float32 sum of N rows,
    gets 1e-5.
    """
    limits = {
        "loss": (loss_error, max(1e-5, torch.finfo(value.dtype).eps)),
        "dz": (dz_error, 1.05 * torch.finfo(dz.dtype).eps / 2),
    }
    return [
        f"{name}: error {error:.1e}, above {limit:.1e}"
        for name, (error, limit) in limits.items()
        if not error <= limit
    ]


def method(budget: Budget) -> dict[str, Any]:
    """How the numbers are made, for the record."""
    return {**METHOD, **asdict(budget)}
