"""The lines of docs/integrations.md, run as they stand there: eagerly, by torch.compile, and with us."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from harness import clean_slate, without_codegen
from reference import assert_all_fair, assert_fair
from spared import users_record
from torch import Tensor
from torch._dynamo import utils as dynamo_utils
from torch._dynamo.utils import clear_compilation_metrics, counters, get_compilation_metrics
from torch.optim.optimizer import register_optimizer_step_post_hook

import inductor_ce
from inductor_ce.api import passes
from inductor_ce.common.strategies import STRATEGIES
from inductor_ce.heads import extra_memory, plan
from inductor_ce.heads.fuse import fuse_heads, sentence

DOCUMENT = Path(__file__).parent.parent.parent / "docs/integrations.md"
STEPS = 5

EAGER, PLAIN, OURS = "eager", "plain torch.compile", "inductor_ce"

# The programs are some hundredths of the size of real ones, and so is what is worth dividing.
SMALL_SIZES = {"SMALL": 1, "CHUNK_ROWS": 8, "LEAST_COLUMNS": 64}


def lines_of(heading: str) -> str:
    """The code under a heading of the document."""
    (section,) = re.findall(rf"^## {re.escape(heading)}\n(.*?)(?=^## |\Z)", DOCUMENT.read_text(), re.M | re.S)
    blocks = re.findall(r"^```python\n(.*?)^```$", section, re.M | re.S)
    assert blocks, heading
    return "\n".join(blocks)


def rows_of_the_table() -> dict[str, list[str]]:
    """What the document tells of each program."""
    rows = re.findall(r"^\| (\[.*) \|$", DOCUMENT.read_text(), re.M)
    cells = [row.split(" | ") for row in rows]
    return {re.sub(r"\[(.*?)\]\(.*?\)", r"\1", name): told for name, *told in cells}


@dataclass
class Run:
    """What became of a program.

    Attributes:
        names: the program's own, when it has ended.
        losses: after each step.
        gradients: of every parameter, at each step of its optimizer.
        graphs, breaks, recompilations: what Dynamo counted.
        strategies: how many heads have which.
        misses: how many losses were left as written.
        plans: of each head, as it was compiled.
        metrics: what trainers log when they evaluate.
    """

    names: dict[str, Any]
    losses: list[float] = field(default_factory=list)
    gradients: list[dict[str, Tensor]] = field(default_factory=list)
    graphs: int = 0
    breaks: int = 0
    recompilations: int = 0
    strategies: dict[str, int] = field(default_factory=dict)
    misses: int = 0
    plans: list[str] = field(default_factory=list)
    metrics: list[dict[str, float]] = field(default_factory=list)

    @property
    def counted(self) -> tuple[int, int, int]:
        return self.graphs, self.breaks, self.recompilations


@contextlib.contextmanager
def as_told(how: str) -> Iterator[None]:
    """Within, the document's lines run without us, or eagerly, unless it is `OURS`."""
    with contextlib.ExitStack() as stack:
        if how != OURS:
            stack.enter_context(mock.patch.object(inductor_ce, "install", lambda **options: None))
            stack.enter_context(mock.patch.object(inductor_ce, "defer", lambda module: module))
        if how == EAGER:
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        yield


def run(heading: str, names: dict[str, Any], how: str) -> Run:
    """Run the lines under a heading, with what else the program has as `names`."""
    found = Run({"inductor_ce": inductor_ce, "torch": torch, **names})
    parameters: list[Tensor] = []

    def record(optimizer: Any, *_: Any) -> None:
        optimizer = getattr(optimizer, "optimizer", optimizer)  # accelerate's has another within
        parameters[:] = [p for group in optimizer.param_groups for p in group["params"]]
        gradients = {str(i): p.grad for i, p in enumerate(parameters) if p.grad is not None}
        found.gradients.append({i: whole(g).detach().clone() for i, g in gradients.items()})
        if isinstance(found.names.get("loss"), Tensor):
            found.losses.append(whole(found.names["loss"]).item())

    def planned(*given: Any) -> Any:
        plans = fuse_heads(*given)
        found.plans += [sentence(each.plan) for each in plans]
        return plans

    with (
        clean_slate(),
        scaled(),
        without_codegen(),
        as_told(how),
        mock.patch.object(
            dynamo_utils, "record_compilation_metrics", users_record
        ),  # which other tests do without
        mock.patch.object(passes, "fuse_heads", planned),
        mock.patch.dict(os.environ),  # where Trainer tells accelerate to compile
    ):
        clear_compilation_metrics()
        handle = register_optimizer_step_post_hook(record)
        try:
            exec(compile(lines_of(heading), str(DOCUMENT), "exec"), found.names)
        finally:
            handle.remove()
            inductor_ce.uninstall()
        if hasattr(state := getattr(found.names.get("trainer"), "state", None), "log_history"):
            found.losses = [entry["loss"] for entry in state.log_history if "loss" in entry]
            found.metrics = [entry for entry in state.log_history if "eval_loss" in entry]
        found.graphs = counters["stats"]["unique_graphs"]
        found.breaks = sum(counters["graph_break"].values())
        found.recompilations = sum(bool(m.recompile_reason) for m in get_compilation_metrics())
        counted = counters["inductor_ce"]
        found.misses = counted["misses"]
        found.strategies = {k: n for k, n in counted.items() if k in STRATEGIES}
    return found


def explained(call: Callable[[], Any], options: dict[str, Any]) -> list[str]:
    """What `explain` tells of each loss: its strategy, or its reason."""
    with clean_slate(), scaled():
        inductor_ce.install(**options)
        report = inductor_ce.explain(call)
        return [site.plan or site.strategy for site in report.sites] + [m.message for m in report.misses]


def assert_right(found: Run, naive: Run, exact: Run | None) -> None:
    """Losses and gradients of every step are as near to float64's as eager's are, or near eager's."""
    assert len(found.gradients) == len(naive.gradients) == STEPS
    assert not all(torch.equal(naive.gradients[0][name], g) for name, g in naive.gradients[1].items())
    if exact is None:
        assert found.losses == pytest.approx(naive.losses, rel=1e-5, abs=1e-7)
        for ours, theirs in zip(found.gradients, naive.gradients, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
        return
    assert len(found.losses) == len(naive.losses)
    assert_fair(*(torch.tensor(each.losses) for each in (found, naive, exact)))
    for of_step in zip(found.gradients, naive.gradients, exact.gradients, strict=True):
        assert_all_fair(*of_step)


def assert_as_told(told: list[str], eager: Run, plain: Run, ours: Run) -> None:
    """The table has the strategies that were counted, and as many graphs as there are without us."""
    strategies, _, why = told[0].partition(": ")
    assert {f"`{each}`" for each in ours.strategies} == set(strategies.split(", "))
    assert all(plan.endswith(why) for plan in ours.plans)
    assert " / ".join(map(str, ours.counted)) == told[1]
    assert ours.counted == plain.counted
    assert (plain.strategies, eager.counted) == ({}, (0, 0, 0))


def assert_explained(told: list[str], strategies: list[str]) -> None:
    """`explain` tells of every loss the strategy that stands first in the table."""
    strategy = re.match("`(.*?)`", told[0])[1]  # type: ignore[index]
    assert strategies
    assert all(re.match(strategy, each) for each in strategies)


def whole(x: Any) -> Tensor:
    return x.full_tensor() if hasattr(x, "full_tensor") else x


@contextlib.contextmanager
def scaled() -> Iterator[None]:
    with mock.patch.multiple(plan, **SMALL_SIZES), mock.patch.object(extra_memory, "LITTLE", 0):
        yield


def assert_documented(
    told: list[str], eager: Run, plain: Run, ours: Run, exact: Run | None, strategies: list[str]
) -> None:
    """All of this of one program: its row of the table, how it ran, and what `explain` tells."""
    assert_right(ours, eager, exact)
    assert_as_told(told, eager, plain, ours)
    assert_explained(told, strategies)
