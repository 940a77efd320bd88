"""Linear layer and cross entropy, forward and backward: the loop over shapes, modes, inputs and systems."""

from __future__ import annotations

import functools
import gc
import sys
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from tqdm import tqdm

from ..shared import measure
from ..shared.body import last_end, without_work
from ..shared.compilers import BASELINE, DEFAULT, GRAPHS
from ..shared.labels import Labels
from ..shared.measure import Calls, Clock
from ..shared.peers import NotOffered
from .check import Ready, attempt, check, check_forward, ratios, ready
from .inputs import ACTIVATIONS, HeadFunction, Inputs, Shape
from .reference import Reference, reference
from .systems import FORWARD_ALONE, SYSTEMS, Case, System

METHOD = {
    "head": "F.cross_entropy(F.linear(h, W).float(), y), reduction mean; h and W in bf16; with b, if any,"
    " and logits z as c tanh(z / c), if they are capped",
    "labels": "int64, ignored as labels.py says; `ignored` is the share asked for, that of `about` exact",
    "mode": "of torch.compile; for CUDA graphs W and b are parameters of a module, which are not copied",
    "random": "logits of variance 1, labels uniform",
    "trained": "h, W and y of a model of synthetic bigrams that is trained first: see trained.py",
    "step": "loss, then torch.autograd.grad(loss, (h, W))",
    "behind": "whether the head stands behind work that keeps the GPU busy, as a body does, and that makes a "
    "copy of h; ms is counted from its end",
    "forward": "the loss alone, under no_grad",
    "compiled": "fullgraph, static shapes, caches empty at the start; once for all inputs of a shape, of CUDA"
    " graphs once for each, as these are recorded by what the call before was",
    "ms": "of the GPU, which has work when the host begins; median over the rounds of the median of a few "
    "calls; the systems take turns within a round",
    "host_ms, wall_ms": "of the host's clock for the call of a step, and until the GPU has done it too; the "
    "GPU is idle before, and what stands for a body makes its copy alone",
    "spread": "(slowest round - fastest round) / median",
    "extra_bytes": "peak of the memory allocated in a warm step less that before it, gradients included; "
    "not known of CUDA graphs, whose memory is a pool of their own",
    "beyond_gradients": "extra_bytes less dh, dW and db",
    "ratio, memory_ratio, error_ratio": f"of ms, beyond_gradients, errors to those of {BASELINE}",
    "errors": "against float64, as Errors in reference.py defines them",
    "seconds": "all that a case took, with training and the compilations that were left to it",
    "product_ms": "h @ W.T by cuBLAS into memory of its own; products_ms: with dz @ W and dz.T @ h",
}

HOST_CALLS = 5

Rows = dict[str, dict[str, Any]]


@dataclass
class Bench:
    """The systems at one shape and in one mode: each is built and compiled once, then measured on all inputs.

    `peaks` are the extra bytes of those measured, `not_measured` the reasons of the others.
    """

    shape: Shape
    mode: str
    systems: Sequence[System]
    clock: Calls
    bar: tqdm
    behind: bool = False
    steps: dict[str, Ready | NotOffered] = field(default_factory=dict)
    forwards: dict[str, Ready | NotOffered] = field(default_factory=dict)
    peaks: dict[str, int] = field(default_factory=dict)
    not_measured: list[dict[str, str]] = field(default_factory=list)

    def case(self, inputs: Inputs) -> dict[str, Any]:
        """What was found for one kind of activations and labels, for JSON."""
        self.not_measured = []
        found: dict[str, Any] = {
            "about": inputs.about,
            "behind": self.behind,
            "logits_bytes": self.shape.logits_bytes,
            "gradient_bytes": self.shape.gradient_bytes,
            **products(inputs, self.clock),
        }
        ref = reference(inputs)
        found["rows"] = self._rows(inputs, ref)
        found["forward"] = []
        if self.mode == DEFAULT and not self.behind:
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
                if row["extra_bytes"] is not None:
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
            case = Case(self.shape, self.peaks, self.mode, self.behind)
            known[system.name] = attempt(ready, system, case, call)
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
        clock = replace(self.clock, begun=last_end) if self.behind else self.clock
        for name, (ms, spread, round_ms) in measure.timed(steps, clock).items():
            with without_work():
                host_ms, wall_ms = measure.host_and_wall_ms(steps[name], HOST_CALLS)
            rows[name].update(ms=ms, spread=spread, round_ms=round_ms, host_ms=host_ms, wall_ms=wall_ms)


@dataclass(frozen=True)
class Asked:
    """What to measure: everything with everything. Where `labels` is None they are those of each shape."""

    shapes: Sequence[Shape]
    activations: Sequence[str]
    systems: Collection[str]
    labels: Sequence[Labels] | None = None
    modes: Sequence[str] = (DEFAULT,)

    def systems_in(self, mode: str) -> list[System]:
        return [each for name, each in SYSTEMS.items() if name in self.systems and mode in each.modes]

    def inputs_of(self, shape: Shape) -> list[tuple[str, Labels]]:
        """(activations, labels)"""
        return [(name, labels) for name in self.activations for labels in self.labels or [shape.labels]]

    @property
    def total(self) -> int:
        """Rows there may be."""
        systems = sum(len(self.systems_in(mode)) for mode in self.modes)
        return systems * sum(len(self.inputs_of(shape)) for shape in self.shapes)


def table(asked: Asked, clock: Calls, device: str = "cuda") -> Iterator[dict[str, Any]]:
    """Measure; yields what was found for a shape, mode and inputs as soon as it is complete."""
    with tqdm(total=asked.total, file=sys.stderr, desc="starting", unit="system") as bar:
        for shape in asked.shapes:
            drawn = functools.cache(functools.partial(_drawn, shape=shape, device=device))
            for mode in asked.modes:
                shares = asked.labels is not None or shape.labels.ignored is not None
                bench = None
                for name, labels in asked.inputs_of(shape):
                    if bench is None or mode == GRAPHS:
                        torch.compiler.reset()
                        systems = asked.systems_in(mode)
                        bench = Bench(shape, mode, systems, clock, bar, shares and mode == DEFAULT)
                    bar.set_description(f"{shape.name}, {name} activations")
                    start = time.perf_counter()
                    found = bench.case(drawn(name).ignoring(labels))
                    yield {
                        **{key: getattr(shape, key) for key in ("name", "N", "V", "D", "bias")},
                        "activations": name,
                        "mode": mode,
                        **asdict(labels),
                        **found,
                        "seconds": time.perf_counter() - start,
                    }
                    gc.collect()


def _drawn(activations: str, shape: Shape, device: str) -> Inputs:
    return ACTIVATIONS[activations](shape, device)


def products(inputs: Inputs, clock: Clock) -> dict[str, float]:
    """The time of the first bare product in ms, and of all three."""
    h, W = inputs.h.detach(), inputs.W.detach()
    z, dh, dW = h.new_empty(len(h), len(W)), torch.empty_like(h), torch.empty_like(W)

    def backward() -> None:
        torch.mm(z, W, out=dh)
        torch.mm(z.T, h, out=dW)

    times = measure.timed({"forward": lambda: torch.mm(h, W.T, out=z), "backward": backward}, clock)
    forward_ms, backward_ms = (ms for ms, _, _ in times.values())
    return {"product_ms": forward_ms, "products_ms": forward_ms + backward_ms}
