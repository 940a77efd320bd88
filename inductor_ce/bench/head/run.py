"""Linear layer and cross entropy, forward and backward: the loop over shapes, activations and systems."""

from __future__ import annotations

import functools
import gc
import sys
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from tqdm import tqdm

from ..shared import measure
from ..shared.compilers import BASELINE
from ..shared.measure import Clock
from ..shared.peers import NotOffered
from .check import Ready, attempt, check, check_forward, ratios, ready
from .inputs import ACTIVATIONS, HeadFunction, Inputs, Shape
from .reference import Reference, reference
from .systems import FORWARD_ALONE, SYSTEMS, Case, System

METHOD = {
    "head": "F.cross_entropy(F.linear(h, W).float(), y), reduction mean; h and W in bf16",
    "labels": "every 17th ignored",
    "random": "logits of variance 1, labels uniform",
    "trained": "h, W and y of a model of synthetic bigrams that is trained first: see trained.py",
    "step": "loss, then torch.autograd.grad(loss, (h, W))",
    "forward": "the loss alone, under no_grad",
    "compiled": "fullgraph, static shapes, caches empty at the start; once for all activations of a shape",
    "ms": "median over the rounds of the median of a few calls; the systems take turns within a round",
    "spread": "(slowest round - fastest round) / median",
    "extra_bytes": "peak of the memory allocated in a warm step less that before it; dh and dW are in it",
    "beyond_gradients": "extra_bytes less dh and dW",
    "ratio, memory_ratio, error_ratio": f"of ms, beyond_gradients, errors to those of {BASELINE}",
    "errors": "against float64, as Errors in reference.py defines them",
    "seconds": "all that a case took, with training and the compilations that were left to it",
    "product_ms": "h @ W.T by cuBLAS into memory of its own; products_ms: with dz @ W and dz.T @ h",
}

Rows = dict[str, dict[str, Any]]


@dataclass
class Bench:
    """The systems at one shape: each is built and compiled once, then measured on every kind of activations.

    `peaks` are the extra bytes of those measured, `not_measured` the reasons of the others.
    """

    shape: Shape
    systems: Sequence[System]
    clock: Clock
    bar: tqdm
    steps: dict[str, Ready | NotOffered] = field(default_factory=dict)
    forwards: dict[str, Ready | NotOffered] = field(default_factory=dict)
    peaks: dict[str, int] = field(default_factory=dict)
    not_measured: list[dict[str, str]] = field(default_factory=list)

    def case(self, activations: str, inputs: Inputs) -> dict[str, Any]:
        """What was found for one kind of activations, for JSON."""
        self.not_measured = []
        found: dict[str, Any] = {
            **asdict(self.shape),
            "activations": activations,
            "about": inputs.about,
            "logits_bytes": self.shape.logits_bytes,
            "gradient_bytes": self.shape.gradient_bytes,
            **products(inputs, self.clock),
        }
        ref = reference(inputs)
        found["rows"] = self._rows(inputs, ref)
        found["forward"] = self._forward_rows(inputs, ref, found["product_ms"])
        return found | {"not_measured": self.not_measured}

    def _rows(self, inputs: Inputs, ref: Reference) -> list[dict[str, Any]]:
        rows: Rows = {}
        for system in self.systems:
            self.bar.set_description(f"{self.shape.name}, {system.name}")
            row = self._admit(system, self.steps, check, inputs.step, inputs, ref)
            if isinstance(row, NotOffered):
                self._leave_out(system.name, row)
            else:
                rows[system.name] = row
                self.peaks[system.name] = row["extra_bytes"]
            self.bar.update()
        self._time(rows, self.steps, inputs.step)
        return [row | ratios(row, rows.get(BASELINE)) for row in rows.values()]

    def _forward_rows(self, inputs: Inputs, ref: Reference, product_ms: float) -> list[dict[str, Any]]:
        rows: Rows = {}
        for system in (system for system in self.systems if system.name in FORWARD_ALONE):
            row = self._admit(system, self.forwards, check_forward, inputs.forward, inputs, ref)
            if isinstance(row, NotOffered):
                self._leave_out(f"{system.name}, forward alone", row)
            else:
                rows[system.name] = row
        self._time(rows, self.forwards, inputs.forward)
        return [row | {"of_product": row["ms"] / product_ms} for row in rows.values()]

    def _admit(
        self,
        system: System,
        known: dict[str, Ready | NotOffered],
        check: Callable[..., dict[str, Any]],
        call: Callable[[HeadFunction], Any],
        inputs: Inputs,
        ref: Reference,
    ) -> dict[str, Any] | NotOffered:
        """The row of a system, built where it is not `known`. A failure is reported, never raised."""
        if system.name not in known:
            known[system.name] = attempt(ready, system, Case(self.shape, self.peaks), call)
        built = known[system.name]
        if isinstance(built, NotOffered):
            return built
        return attempt(check, system, built, inputs, ref)

    def _leave_out(self, name: str, why: NotOffered) -> None:
        tqdm.write(f"{self.shape.name}: {name} left out: {why.reason}", file=sys.stderr)
        self.not_measured.append({"system": name, "reason": why.reason})

    def _time(
        self, rows: Rows, known: dict[str, Ready | NotOffered], call: Callable[[HeadFunction], Any]
    ) -> None:
        """Put times into `rows`."""
        self.bar.set_description(f"{self.shape.name}, timing")
        functions = {name: known[name] for name in rows}
        steps = {
            name: functools.partial(call, system.function)
            for name, system in functions.items()
            if isinstance(system, Ready)
        }
        for name, (ms, spread, round_ms) in timed(steps, self.clock).items():
            rows[name].update(ms=ms, spread=spread, round_ms=round_ms)


def table(
    shapes: Sequence[Shape],
    activations: Sequence[str],
    names: Collection[str],
    clock: Clock,
    device: str = "cuda",
) -> Iterator[dict[str, Any]]:
    """Measure; yields what was found for a shape and a kind of activations as soon as it is complete."""
    systems = [SYSTEMS[name] for name in SYSTEMS if name in names]
    total = len(shapes) * len(activations) * len(systems)
    with tqdm(total=total, file=sys.stderr, desc="starting", unit="system") as bar:
        for shape in shapes:
            torch.compiler.reset()
            bench = Bench(shape, systems, clock, bar)
            for name in activations:
                bar.set_description(f"{shape.name}, {name} activations")
                start = time.perf_counter()
                found = bench.case(name, ACTIVATIONS[name](shape, device))
                yield found | {"seconds": time.perf_counter() - start}
                gc.collect()


def products(inputs: Inputs, clock: Clock) -> dict[str, float]:
    """The time of the first bare product in ms, and of all three."""
    h, W = inputs.h.detach(), inputs.W.detach()
    z, dh, dW = h.new_empty(len(h), len(W)), torch.empty_like(h), torch.empty_like(W)

    def backward() -> None:
        torch.mm(z, W, out=dh)
        torch.mm(z.T, h, out=dW)

    times = timed({"forward": lambda: torch.mm(h, W.T, out=z), "backward": backward}, clock)
    forward_ms, backward_ms = (ms for ms, _, _ in times.values())
    return {"product_ms": forward_ms, "products_ms": forward_ms + backward_ms}


def timed(steps: Mapping[str, measure.Step], clock: Clock) -> dict[str, tuple[float, float, list[float]]]:
    """(median, spread, every round) of every step, in ms but for the spread."""
    times = measure.interleaved(steps, clock, before_each=measure.nothing, after_each=measure.nothing)
    return {name: (*measure.median_and_spread(rounds), rounds) for name, rounds in times.items()}
