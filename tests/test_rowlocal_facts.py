"""What is known about a node: on which rows it depends, and which scalars are its factors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.fx.experimental.proxy_tensor import make_fx

from inductor_ce import ops
from inductor_ce.common.compat.graphs import is_tangent
from inductor_ce.heads.facts import Fact
from inductor_ce.heads.row_locality import facts_about, one_factor

N, V = 12, 37


def fact_of(f: Callable[[Tensor, Tensor, Tensor], Tensor]) -> tuple[Fact, dict[Node, Fact]]:
    """About f(statistics [2, N], an upstream gradient [], something early [N]), and what it is made of."""

    def whole(z: Tensor, tangents: Tensor, w: Tensor) -> Tensor:  # as AOTAutograd calls it
        return f(ops.row_stats(z, [], [], "max,sumexp"), tangents, w)

    args = torch.randn(N, V), torch.tensor(1.0), torch.randn(N)
    traced: GraphModule = make_fx(whole, tracing_mode="fake")(*args)
    stats = traced.graph.find_nodes(op="call_function", target=ops.ROW_STATS)
    (result,) = traced.graph.output_node().all_input_nodes
    facts = facts_about([result], stats, is_tangent)
    return facts[result], facts


def rows_of(f: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Any:
    fact, _ = fact_of(f)
    assert fact.why_not == ""
    return None if fact.rows is None else fact.rows.tolist()


OWN = list(range(N))

ROWS: dict[str, tuple[Callable[[Tensor, Tensor, Tensor], Tensor], Any]] = {
    "statistics": (lambda s, t, w: s[0], OWN),
    "early": (lambda s, t, w: w.cumsum(0).flip(0) * 2, None),
    "the gradient": (lambda s, t, w: t * w, None),
    "a function of its own": (lambda s, t, w: (s[1].log() + s[0] * w).tanh(), OWN),
    "sliced": (lambda s, t, w: s[0][3:5], [3, 4]),
    "put elsewhere": (lambda s, t, w: torch.cat([w[:2], s[0][:2]]), [-1, -1, 0, 1]),
    "padded": (lambda s, t, w: F.pad(s[0][:2], [1, 1]), [-1, 0, 1, -1]),
    "turned": (lambda s, t, w: s[0].view(2, 6).t().reshape(-1)[:4], [0, 6, 1, 7]),
    "scattered": (lambda s, t, w: torch.slice_scatter(w, s[0][:3], 0, 2, 5), [-1, -1, 0, 1, 2] + 7 * [-1]),
    "both statistics": (lambda s, t, w: s.sum(0), OWN),
    "the larger": (lambda s, t, w: s.amax(0, keepdim=True), [OWN]),
    "any of both": (lambda s, t, w: (s > 0).any(0), OWN),
    "selected": (lambda s, t, w: s.unbind(0)[1].select(0, 4).view(1), [4]),
    "split": (lambda s, t, w: s.split([1, 1])[1].squeeze(0), OWN),
    "split along the rows": (lambda s, t, w: s.split([5, 4, 3], 1)[2][0], OWN[9:]),
    "chosen": (lambda s, t, w: torch.where(w > 0, s[0], 0.0), OWN),
    "expanded": (lambda s, t, w: s[0][1:2].expand(3), [1, 1, 1]),
}


@pytest.mark.parametrize("name", ROWS)
def test_rows(name: str) -> None:
    f, expected = ROWS[name]
    assert rows_of(f) == expected


FACTORS: dict[str, tuple[Callable[[Tensor, Tensor, Tensor], Tensor], dict[str, int]]] = {
    "once": (lambda s, t, w: -(t * w), {"tangents_1": 1}),
    "twice": (lambda s, t, w: t * s[0] * t.expand(N), {"tangents_1": 2}),
    "not at all": (lambda s, t, w: (t * s[0]) / t, {"tangents_1": 0}),
    "inverted": (lambda s, t, w: s[0] / t, {"tangents_1": -1}),
    "summed": (lambda s, t, w: t * s[0] + t * w, {"tangents_1": 1}),
    "of each row, summed": (lambda s, t, w: (t * s).sum(0), {"tangents_1": 1}),
    "early, summed": (lambda s, t, w: (t * w).view(6, 2).sum(1), {"tangents_1": 1}),
    "with zeros": (lambda s, t, w: t * s[0] + torch.zeros(N), {"tangents_1": 1}),
    "chosen": (lambda s, t, w: torch.where(w > 0, t * s[0], torch.zeros(())), {"tangents_1": 1}),
    "looked up": (lambda s, t, w: s[0] * (t * w.exp())[w.argsort()], {"tangents_1": 1}),
    "gathered": (lambda s, t, w: s[0] * (t * w).gather(0, w.argsort()), {"tangents_1": 1}),
    "selected": (lambda s, t, w: s[0] * (t / w).index_select(0, w.argsort()), {"tangents_1": 1}),
    "beside zeros": (lambda s, t, w: torch.cat([t * s[0], torch.zeros(2)]), {"tangents_1": 1}),
    "cast": (lambda s, t, w: (t * s[0]).double().view(3, 4), {"tangents_1": 1}),
    "a mean of all": (lambda s, t, w: s[0] * s[0].mean() * t, {"tangents_1": 1, "mean": 1}),
}


@pytest.mark.parametrize("name", FACTORS)
def test_factor(name: str) -> None:
    f, expected = FACTORS[name]
    fact, _ = fact_of(f)
    assert fact.why_not == ""
    assert {node.name: power for node, power in fact.factor} == expected


UNKNOWN: dict[str, tuple[Callable[[Tensor, Tensor, Tensor], Tensor], str]] = {
    "a square": (lambda s, t, w: (t * s[0]).square(), "pow is not linear in the upstream gradient"),
    "a power": (lambda s, t, w: (t * s[0]).exp(), "exp is not linear in the upstream gradient"),
    "one more": (lambda s, t, w: t * s[0] + 1.0, "add brings different upstream gradients together"),
    "with and without": (lambda s, t, w: t * w + s[0], "add brings different upstream gradients together"),
    "compared": (lambda s, t, w: (t * s[0] > 0) * w, "gt is not linear in the upstream gradient"),
    "a condition": (lambda s, t, w: torch.where(t > 0, s[0], w), "where depends on the upstream gradient"),
    "beside ones": (
        lambda s, t, w: torch.cat([t * s[0], w]),
        "cat brings different upstream gradients together",
    ),
    "padded": (
        lambda s, t, w: F.pad(t * s[0], [1, 1], value=1.0),
        "constant_pad_nd is not linear in the upstream gradient",
    ),
    "two rows": (lambda s, t, w: s[0][1:] - s[0][:-1], "sub brings rows together"),
    "sums of two": (lambda s, t, w: s[0].view(6, 2).sum(1), "sum brings rows together"),
    "sums of two, with a factor": (lambda s, t, w: (t * s[0]).view(6, 2).sum(1), "sum brings rows together"),
    "the larger, with a factor": (lambda s, t, w: (t * s).amax(0), "amax brings rows together"),
    "any of two": (lambda s, t, w: (s[0] > 0).view(6, 2).any(1), "any brings rows together"),
    "indexed": (lambda s, t, w: s[0][w.argsort()], "index may mix rows"),
    "indexed by statistics": (lambda s, t, w: (t * w)[s[0].long()], "index may mix rows"),
    "gathered of statistics": (lambda s, t, w: s[0].gather(0, w.argsort()), "gather may mix rows"),
    "gathered by statistics": (lambda s, t, w: (t * w).gather(0, s[0].long()), "gather may mix rows"),
    "sorted": (lambda s, t, w: s[0].sort()[0], "sort may mix rows"),
    "a product": (lambda s, t, w: s[0].view(6, 2) @ w.view(2, 6), "mm may mix rows"),
}


@pytest.mark.parametrize("name", UNKNOWN)
def test_unknown(name: str) -> None:
    f, words = UNKNOWN[name]
    fact, _ = fact_of(f)
    assert fact.why_not == words
    assert not fact.is_early


def test_rows_must_be_their_own() -> None:
    """Rows of which each is known, but that of another, are no proof."""

    def coefficients(s: Tensor, t: Tensor, w: Tensor) -> Tensor:
        return torch.stack([s[0] * t, torch.cat([s[1][1:], s[1][:1]]) * t])

    fact, facts = fact_of(coefficients)
    assert fact.why_not == ""
    last = next(n for n, f in facts.items() if f is fact)
    stats = next(iter(facts))
    graph = last.graph
    z, y = graph.placeholder("z"), graph.placeholder("y")
    grad = graph.call_function(ops.ROW_GRAD, (z, [y], [], last, last, "max,sumexp,pick"))
    assert one_factor(facts, [grad])[1] == "a gradient depends on the statistics of other rows"
    own = graph.call_function(ops.ROW_GRAD, (z, [y], [], stats, last, "max,sumexp,pick"))
    assert one_factor({**facts, last: Fact(fact.factor)}, [own]) == (fact.factor, "")
    assert one_factor({**facts, last: Fact(fact.factor)}, [grad])[1] == (
        "the maxima depend on the upstream gradient"
    )
