"""A loss under plain torch.compile and under inductor_ce: time, memory, and errors against float64."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from . import record
from .compilers import BASELINE, OURS, ours, plain
from .measure import Calls, fresh_caches, over, peak_extra_bytes, timed
from .options import has_gpu

COMPILERS = {BASELINE: plain, OURS: ours}
ROUNDS, QUICK_ROUNDS = 5, 2


def run(
    kind: str,
    method: dict[str, str],
    options: argparse.Namespace,
    cases: Callable[[Calls], Iterable[dict[str, Any]]],
    table: Callable[[dict[str, Any]], str],
) -> int:
    """Measure one case after another, keep the JSON after each, print the table. 2 where there is no GPU."""
    if not has_gpu():
        return 2
    torch.manual_seed(options.seed)
    result = record.new(kind, method, options.commit, cases=[])
    path = record.json_path(result, options.out)
    with fresh_caches():
        for case in cases(Calls(rounds=QUICK_ROUNDS if options.quick else ROUNDS)):
            result["cases"].append(case)
            record.write(result, path)
    print(table(result), path, sep="\n")
    return 0


def compared(
    loss: Callable[..., Tensor],
    given: Iterable[Any],
    leaves: Mapping[str, Tensor],
    right: Mapping[str, Tensor],
    clock: Calls,
) -> list[dict[str, Any]]:
    """Of each system a row of a record.

    Args:
        loss: the function, a scalar of what is given.
        given: its arguments.
        leaves: those whose gradients are wanted, each by the name of its gradient.
        right: the loss and these in float64, by name.
        clock: how often to measure.
    """
    steps = {system: step_of(compiler(loss), given, leaves) for system, compiler in COMPILERS.items()}
    rows: dict[str, dict[str, Any]] = {}
    for system, step in steps.items():
        errors = {part: error(step()[part], right[part]) for part in right}
        beyond = peak_extra_bytes(step) - sum(leaf.nbytes for leaf in leaves.values())
        rows[system] = {"system": system, "errors": errors, "beyond_gradients": beyond}
    for system, (ms, spread, _) in timed(steps, clock).items():
        base = rows[BASELINE]
        rows[system] |= {"ms": ms, "spread": spread, "ratio": over(ms, base.get("ms", ms))}
        rows[system]["memory_ratio"] = over(rows[system]["beyond_gradients"], base["beyond_gradients"])
    return [*rows.values()]


def step_of(
    function: Callable[..., Tensor], given: Iterable[Any], leaves: Mapping[str, Tensor]
) -> Callable[[], dict[str, Tensor]]:
    """What gives the loss and the gradients by their names."""

    def step() -> dict[str, Tensor]:
        loss = function(*given)
        gradients = torch.autograd.grad(loss, [*leaves.values()])
        return {"loss": loss.detach(), **dict(zip(leaves, gradients, strict=True))}

    return step


def error(found: Tensor, right: Tensor) -> float:
    """The norm of what is off, over the norm of what is right."""
    return float(torch.linalg.vector_norm(found.double() - right) / torch.linalg.vector_norm(right))


def in_words(rows: list[dict[str, Any]]) -> str:
    """The rows of a case to read."""
    base, own = (next(row for row in rows if row["system"] == system) for system in (BASELINE, OURS))
    worst = max(over(own["errors"][part], base["errors"][part]) or 0.0 for part in own["errors"])
    told = f"{own['beyond_gradients'] / 2**20:.0f} MB of {base['beyond_gradients'] / 2**20:.0f}"
    if own["memory_ratio"] is not None:
        told += f", {own['memory_ratio']:.2f}x"
    return f"{own['ms']:.2f} ms of {base['ms']:.2f}, {own['ratio']:.2f}x; {told}; worst error {worst:.2f}x"
