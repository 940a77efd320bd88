"""The loop over models and systems: each is compiled afresh in every round, after the first from caches."""

from __future__ import annotations

import functools
import gc
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ...api.counts import counted, forget_counts
from ..shared.alone import alone
from ..shared.compilers import BASELINE
from ..shared.measure import median_and_spread
from ..shared.peers import NotOffered
from .idle import profiled
from .models import Model, make
from .programs import PROGRAMS, Step
from .systems import System

T = TypeVar("T")

METHOD = {
    "step": "loss = program(model)(tokens); loss.backward(); the gradients are dropped",
    "programs": {name: " ".join((p.__doc__ or "").split()) for name, p in PROGRAMS.items()},
    "ms": "between CUDA events round a step, the host ahead by what it does while the GPU works",
    "host_ms": "of the host's clock for the calls of a step alone",
    "peak_bytes": "torch.cuda.max_memory_allocated over the steps, model and gradients included",
    "peers": "in a process of their own, after the others",
    "profile": "where asked for, of one step after all rounds, as idle.py says",
}


@dataclass(frozen=True)
class Length:
    """Rounds, and in each of them steps that are not counted and steps that are; a peer's limit in all.

    `profile` asks for one more step of each system but peers, to see where the GPU idles.
    """

    rounds: int
    warm_up: int = 3
    steps: int = 8
    peer_limit_s: float = 240.0
    profile: bool = False


@dataclass
class _Round:
    loss: float
    gradient_norm: float
    logits: str
    ms: float
    host_ms: float
    peak_bytes: int
    first_call_s: float
    counts: dict[str, int]


def table(models: Sequence[Model], systems: Sequence[System], length: Length) -> Iterator[dict[str, Any]]:
    """One case for each model: a row for each system, and why others did not run."""
    for model in models:
        made = make(model)
        concerned = [system for system in systems if system.concerns(model)]
        case = {"model": model.name, "B": model.B, "S": model.S, "V": model.V, "rows": [], "not_measured": []}
        case |= {"logits_bytes": model.logits_bytes, "ignored": model.ignored, "like": model.like}
        if isinstance(made, NotOffered):
            case["not_measured"] = [{"system": s.name, "reason": made.reason} for s in concerned]
        else:
            here = [s for s in concerned if not s.patch]
            rounds, refused = _rounds(model, *made, here, length)
            profiles = _profiles(model, *made, here, refused, length) if length.profile else {}
            for system in (s for s in concerned if s.patch):
                found = _peer(model, system, length)
                if isinstance(found, NotOffered):
                    refused[system.name] = found.reason
                else:
                    rounds[system.name] = found
            case["rows"] = [row | profiles.get(row["system"], {}) for row in _rows(rounds)]
            case["not_measured"] = [{"system": n, "reason": r} for n, r in refused.items()]
        del made
        yield case


def _peer(model: Model, system: System, length: Length) -> list[_Round] | NotOffered:
    refusal = system.refused(model)
    return refusal or alone(_rounds_of, model, system, length, limit_s=length.peer_limit_s)


def _rounds_of(model: Model, system: System, length: Length) -> list[_Round] | NotOffered:
    """Run in a process of its own."""
    made = make(model)
    if isinstance(made, NotOffered):
        return made
    rounds, refused = _rounds(model, *made, [system], length)
    return NotOffered(refused[system.name]) if refused else rounds[system.name]


def _rounds(
    model: Model, made: nn.Module, tokens: Tensor, systems: Sequence[System], length: Length
) -> tuple[dict[str, list[_Round]], dict[str, str]]:
    found: dict[str, list[_Round]] = {system.name: [] for system in systems}
    refused: dict[str, str] = {}
    work = functools.partial(_round, made=made, tokens=tokens, length=length)
    for i in range(length.rounds):
        for system in list(systems)[:: -1 if i % 2 else 1]:
            if system.name in refused:
                continue
            result = _attempt(model, made, system, work)
            if isinstance(result, NotOffered):
                refused[system.name] = result.reason
            else:
                found[system.name].append(result)
    return {name: rounds for name, rounds in found.items() if rounds}, refused


def _profiles(
    model: Model,
    made: nn.Module,
    tokens: Tensor,
    systems: Sequence[System],
    refused: dict[str, str],
    length: Length,
) -> dict[str, dict[str, Any]]:
    """What the profile of a step says, by system, after all is timed: it slows down what comes after it.

    What fails is put into `refused`.
    """
    found = {}
    work = functools.partial(_profile, made=made, tokens=tokens, length=length)
    for system in (system for system in systems if system.name not in refused):
        result = _attempt(model, made, system, work)
        if isinstance(result, NotOffered):
            refused[system.name] = f"profile {result.reason}"
        else:
            found[system.name] = {"profile": result}
    return found


def _attempt(model: Model, made: nn.Module, system: System, work: Callable[[Step], T]) -> T | NotOffered:
    """What `work` finds of the step of a system, which is compiled for it and then forgotten."""
    with system.of(model, made):
        try:
            with PROGRAMS[model.program](made, system.options is not None) as step:
                result: T | NotOffered = work(step)
        except Exception as error:  # a peer may raise anything; ours is told as a failure
            result = NotOffered.because(error)
    _forget(made)
    return result


def _profile(step: Step, made: nn.Module, tokens: Tensor, length: Length) -> dict[str, Any]:
    whole = functools.partial(_whole, step, made, tokens)
    for _ in range(length.warm_up):
        whole()
    return profiled(whole)


def _round(step: Step, made: nn.Module, tokens: Tensor, length: Length) -> _Round:
    forget_counts()
    start = time.perf_counter()
    loss, kind = step(tokens)
    loss.backward()
    torch.cuda.synchronize()
    first_call_s = time.perf_counter() - start
    value = loss.item()
    squares = [p.grad.double().square().sum() for p in made.parameters() if p.grad is not None]
    norm = torch.stack(squares).sum().sqrt().item()
    del loss, squares
    made.zero_grad(set_to_none=True)
    for _ in range(length.warm_up):
        _whole(step, made, tokens)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    timed = [_timed(step, made, tokens) for _ in range(length.steps)]
    ms, host_ms = (median_and_spread(column)[0] for column in zip(*timed, strict=True))
    peak = torch.cuda.max_memory_allocated()
    return _Round(value, norm, kind, ms, host_ms, peak, first_call_s, counted())


def _whole(step: Step, made: nn.Module, tokens: Tensor) -> None:
    loss, _ = step(tokens)
    loss.backward()
    made.zero_grad(set_to_none=True)


def _timed(step: Step, made: nn.Module, tokens: Tensor) -> tuple[float, float]:
    """(ms on the GPU, ms of the host)"""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    before = time.perf_counter()
    _whole(step, made, tokens)
    host_ms = 1e3 * (time.perf_counter() - before)
    end.record()
    end.synchronize()
    return start.elapsed_time(end), host_ms


def _forget(made: nn.Module) -> None:
    made.zero_grad(set_to_none=True)
    torch.compiler.reset()
    gc.collect()
    torch.cuda.empty_cache()


def _rows(rounds: dict[str, list[_Round]]) -> list[dict[str, Any]]:
    rows = []
    base = rounds.get(BASELINE)
    for name, found in rounds.items():
        ms, spread = median_and_spread([r.ms for r in found])
        row: dict[str, Any] = {
            "system": name,
            "ms": ms,
            "spread": spread,
            "host_ms": median_and_spread([r.host_ms for r in found])[0],
            "peak_bytes": max(r.peak_bytes for r in found),
            "loss": found[0].loss,
            "gradient_norm": found[0].gradient_norm,
            "logits": found[0].logits,
            "first_call_s": found[0].first_call_s,
            "counts": found[0].counts,
            "round_ms": [r.ms for r in found],
        }
        if base is not None:
            row["ratio"] = ms / median_and_spread([r.ms for r in base])[0]
            row["peak_ratio"] = row["peak_bytes"] / max(r.peak_bytes for r in base)
            row["loss_difference"] = abs(row["loss"] - base[0].loss)
            row["gradient_difference"] = abs(row["gradient_norm"] / base[0].gradient_norm - 1)
        rows.append(row)
    return rows
