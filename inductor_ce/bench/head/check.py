"""Everything about a system but its time: compilation, errors against float64, memory."""

from __future__ import annotations

import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from tqdm import tqdm

from ...api.counts import auto_chunked_graphs, counted, forget_counts
from ..shared import measure
from ..shared.body import body
from ..shared.compilers import DEFAULT, GRAPHS, WARM_UP
from ..shared.measure import over
from ..shared.peers import NotOffered
from .inputs import HeadFunction, Inputs
from .reference import Errors, Reference
from .systems import AUTO_CHUNKER, Case, System

GRADIENTS = ("dh", "dW", "db")
LOSS_LIMIT, GRADIENT_LIMIT = 1e-3, 5e-2  # what is further off is wrong, not inexact


@dataclass(frozen=True)
class Ready:
    """A system that has run at one shape, what its first call told, and its mode."""

    function: HeadFunction
    about: dict[str, Any]
    mode: str = DEFAULT


def attempt(work: Callable[..., Any], *arguments: Any) -> Any:
    """What `work` returns, or why it did not: one system's failure leaves the others their numbers."""
    try:
        return work(*arguments)
    except Exception as error:
        tqdm.write(traceback.format_exc(), file=sys.stderr)
        return NotOffered.because(error)


def ready(system: System, case: Case, call: Callable[[HeadFunction], Any]) -> Ready | NotOffered:
    """Build a system and compile it by a first call of its function."""
    built = system.build(case)
    if isinstance(built, NotOffered):
        return built
    function = built.function
    if case.behind and system.kind == "peer" and system.name != AUTO_CHUNKER:
        function = _behind(function)
    forget_counts()
    chunked = auto_chunked_graphs()
    start = time.perf_counter()
    call(function)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    notes = [built.note] if built.note else []
    if system.name == AUTO_CHUNKER and chunked is not None and auto_chunked_graphs() == chunked:
        notes.append("did not fire")
    about = {
        "first_call_s": time.perf_counter() - start,
        "counted": counted(),
        "notes": notes,
    }
    for _ in range(WARM_UP - 1 if case.mode == GRAPHS else 0):
        call(function)
    return Ready(function, about, case.mode)


def _behind(function: HeadFunction) -> HeadFunction:
    return lambda h, *others: function(body(h), *others)


def check(system: System, ready: Ready, inputs: Inputs, ref: Reference) -> dict[str, Any]:
    """The row of a system, without its time."""
    poison_logits(inputs)
    loss, *gradients = inputs.step(ready.function)
    loss_error, errors = ref.loss_error(loss), ref.errors(*gradients)
    wrong = problems(loss.dtype, loss_error, errors)
    gradient_bytes = sum(g.numel() * g.element_size() for g in gradients)
    del loss, gradients
    extra_bytes = None
    if ready.mode != GRAPHS:  # whose memory is a pool of their own
        extra_bytes = measure.peak_extra_bytes(lambda: inputs.step(ready.function))
    return {
        "system": system.name,
        "budget": system.budget,
        "extra_bytes": extra_bytes,
        "beyond_gradients": None if extra_bytes is None else extra_bytes - gradient_bytes,
        "loss_error": loss_error,
        **{name: asdict(each) for name, each in errors.items()},
        **ready.about,
        "problems": wrong + unfused(system, ready),
    }


def check_forward(system: System, ready: Ready, inputs: Inputs, ref: Reference) -> dict[str, Any]:
    """The row of a system's forward alone, without its time."""
    poison_logits(inputs)
    loss = inputs.forward(ready.function)
    loss_error = ref.loss_error(loss)
    wrong = problems(loss.dtype, loss_error, {})
    del loss
    return {
        "system": system.name,
        "extra_bytes": measure.peak_extra_bytes(lambda: inputs.forward(ready.function)),
        "loss_error": loss_error,
        **ready.about,
        "problems": wrong + unfused(system, ready),
    }


def poison_logits(inputs: Inputs) -> None:
    measure.poison(inputs.h.detach().new_empty(()).expand(len(inputs.h), len(inputs.W)))


def problems(loss_dtype: torch.dtype, loss_error: float, errors: dict[str, Errors]) -> list[str]:
    """What is wrong with a result. NaN never passes; a loss may be rounded once to its dtype."""
    found = {"loss": (loss_error, max(LOSS_LIMIT, torch.finfo(loss_dtype).eps / 2))}
    found |= {name: (each.norm, GRADIENT_LIMIT) for name, each in errors.items()}
    return [
        f"{name}: error {error:.1e}, above {limit:.0e}"
        for name, (error, limit) in found.items()
        if not error <= limit
    ]


def unfused(system: System, ready: Ready) -> list[str]:
    fused = system.kind != "ours" or ready.about["counted"].get("sites")
    return [] if fused else ["no loss was rewritten"]


def ratios(row: dict[str, Any], baseline: dict[str, Any] | None) -> dict[str, Any]:
    """Time, memory beyond the gradients and errors of a row over the baseline's; None without one."""
    if baseline is None:
        return {"ratio": None, "memory_ratio": None, "error_ratio": None}
    return {
        "ratio": row["ms"] / baseline["ms"],
        "memory_ratio": over(row["beyond_gradients"], baseline["beyond_gradients"]),
        "error_ratio": {
            f"{gradient} {kind}": over(error, baseline[gradient][kind])
            for gradient in GRADIENTS
            if gradient in row
            for kind, error in row[gradient].items()
        },
    }
