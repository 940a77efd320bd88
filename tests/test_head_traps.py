"""Traps that others fell into, of heads that are divided, by their numbers."""

from __future__ import annotations

import head_cases as cases
import pytest
import torch
import torch.nn.functional as F
from harness import compile_without_codegen, sites
from head_cases import CASES, D, V, assert_all_fair, counts, exactly, inputs, measure
from torch import Tensor
from torch._dynamo.utils import counters

by_dividing = pytest.mark.parametrize("strategy", ["token_chunks", "vocab_slabs"])
BUDGET = 0.5


@pytest.mark.in_turns
@by_dividing
@pytest.mark.parametrize("as_tensor", [False, True])
def test_trap_17_a_divisor_does_not_recompile(as_tensor: bool, strategy: str) -> None:
    """A Python int divisor (`num_items_in_batch`) specialises and recompiles every step."""

    def loss(h: Tensor, w: Tensor, b: Tensor, y: Tensor, items: int | Tensor) -> Tensor:
        return F.cross_entropy(*cases.rows(F.linear(h, w, b), y), reduction="sum") / items

    run, _ = compile_without_codegen(loss, strategy=strategy, memory_budget=0.5)
    given = inputs()
    for divisor in (7, 11, 13, 64, 5, 1009):
        items = torch.tensor(divisor) if as_tensor else divisor
        ours = measure(lambda *a, items=items: run(*a, items), given)
        eager = measure(lambda *a, items=items: loss(*a, items), given)
        torch.testing.assert_close(ours, eager)
    graphs = counters["stats"]["unique_graphs"]
    assert graphs <= (1 if as_tensor else 2)
    assert counts() == {strategy: graphs}


LENGTHS = [33, 31, 64, 127, 11, 13, 10, 35]  # in few chunks, of two rows at least


@pytest.mark.in_turns
@by_dividing
@pytest.mark.parametrize("dynamic", [None, True])
def test_trap_20_any_number_of_rows(dynamic: bool | None, strategy: str) -> None:
    """A ragged last chunk breaks symbolic divisibility: N odd, prime, dynamic."""
    case, budget = CASES["bias"], BUDGET + (2 * D / V / 2 if strategy == "token_chunks" else 0)
    run, _ = compile_without_codegen(case.loss, strategy=strategy, memory_budget=budget, dynamic=dynamic)
    for n in LENGTHS:
        given = inputs(n)
        assert_all_fair(measure(run, given), measure(case.loss, given), exactly(case, given))
    graphs = counters["stats"]["unique_graphs"]
    assert graphs <= (1 if dynamic else 2)
    assert sites() == graphs
    assert counts() == {strategy: graphs}


@by_dividing
def test_trap_20_fewer_rows_than_chunks(strategy: str) -> None:
    """A graph for many rows is not used for fewer than it has chunks, nor, as torch takes a size of 1 for one
    that never changes, for one row a chunk; it may be compiled anew."""
    run, _ = compile_without_codegen(cases.biased, strategy=strategy, memory_budget=BUDGET, dynamic=True)
    for n in (33, 7, 4, 2):
        given = inputs(n)
        torch.testing.assert_close(measure(run, given), measure(cases.biased, given))
    assert set(counts()) == {strategy}


@by_dividing
def test_trap_20_any_batch_and_length(strategy: str) -> None:
    """A ragged last chunk breaks symbolic divisibility: a causal shift with both sizes dynamic."""
    case = CASES["shift"]
    run, _ = compile_without_codegen(case.loss, strategy=strategy, memory_budget=BUDGET, dynamic=True)
    for shape in ((3, 5), (2, 7), (5, 11), (7, 4)):
        given = inputs(*shape)
        assert_all_fair(measure(run, given), measure(case.loss, given), exactly(case, given))
    assert counts() == {strategy: 1} == {strategy: counters["stats"]["unique_graphs"]}


def test_trap_20_forward_only_of_any_number_of_rows() -> None:
    case = CASES["bias"]
    run, _ = compile_without_codegen(case.loss, strategy="token_chunks", memory_budget=BUDGET, dynamic=True)
    with torch.no_grad():
        for n in LENGTHS:
            given = inputs(n, ignored=False)
            cases.assert_fair(run(*given), case.loss(*given), case.exact(*given))
    assert counts() == {"forward_only": 1}


@pytest.mark.in_turns
@by_dividing
@pytest.mark.parametrize("ignore_index", [-100, -1, 0, V - 1, V + 5])
def test_trap_25_any_ignore_index(ignore_index: int, strategy: str) -> None:
    """Positive ignore_index, = 0, V-1: in whatever chunk, or slab, it is."""

    def loss(h: Tensor, w: Tensor, b: Tensor, y: Tensor) -> Tensor:
        z, y = cases.rows(F.linear(h, w, b), y)
        return F.cross_entropy(z, y, ignore_index=ignore_index, label_smoothing=0.1)

    given = inputs(ignored=False)
    given.y.view(-1)[::3] = ignore_index
    run, _ = compile_without_codegen(loss, strategy=strategy, memory_budget=0.35)
    exact = cases.textbook(cases.Terms("mean", ignore_index, 0.1), biased=True)
    assert_all_fair(measure(run, given), measure(loss, given), measure(exact, given.to(torch.float64)))
    assert counts() == {strategy: 1}


@by_dividing
def test_trap_26_a_label_out_of_range(strategy: str) -> None:
    """Out-of-range label answers plausibly: NaN for that row, and for that row alone."""
    given = inputs(ignored=False)
    run, _ = compile_without_codegen(cases.per_token, strategy=strategy, memory_budget=BUDGET)
    for outside in (V, -1, 2**31):
        wrong = given._replace(y=given.y.clone())
        wrong.y.view(-1)[5] = outside
        losses = run(*wrong)
        rest = torch.arange(len(losses)) != 5
        assert losses[5].isnan(), outside
        torch.testing.assert_close(losses[rest], cases.per_token(*given)[rest])
