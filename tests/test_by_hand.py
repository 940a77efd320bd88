"""Losses that ranks make together by collectives of their own: real ranks, against all columns in float64."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import sympy
import torch
import torch.distributed as dist
from by_hand_cases import LOSSES, NEAR_MISSES, SMOOTHING, measured
from harness import Graphs, Rewritten, clean_slate, compile_lazily, misses, sites
from pairwise import EVERYTHING
from ranks import Outcomes, attempt, once, spawn
from reference import assert_fair
from releases import before
from torch import Tensor

import inductor_ce
from inductor_ce import algebra
from inductor_ce.algebra import parts
from inductor_ce.common.compat.distributed import calls
from inductor_ce.common.findings import Reason
from inductor_ce.distributed.by_hand import stats_of_ranks

# It keeps every step of such a function beside its result, and loses gradients: with any backend.
pytestmark = pytest.mark.skipif(before(2, 12), reason="torch compiles autograd functions wrongly by itself")

N, V = 12, 40
GATHER = torch.ops._c10d_functional.all_gather_into_tensor.default
REDUCE = torch.ops._c10d_functional.all_reduce.default
ROWS, SQUARE = (N,), (3, 4)
MASKED = (
    "whole_loss",
    "scaled_backward",
    "log_probability",
    "regions",
    "regions_of_copies",
    "out_of_place",
)  # finite in eager where a rank has -inf
WITHOUT_GRADIENT = ("without_gradient", "gathered_normalisers", "gathered_in_one_tensor")
# On two ranks by all passes, to show a backward without collectives.
COMPILED = ("whole_loss", "regions")
# ranks, shape of the rows, dtype: the losses that are made so
CASES = {
    (2, ROWS, torch.float32): [*LOSSES, *NEAR_MISSES],
    (2, SQUARE, torch.bfloat16): ["whole_loss", "smoothed", "log_probability", "gathered_in_one_tensor"],
    (4, ROWS, torch.float32): ["whole_loss", "regions", "regions_in_place", "gathered_normalisers"],
}


def given(name: str, rows: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """The same in every process: logits, labels and upstream gradients of all columns."""
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(*rows, V, generator=generator).mul(3).to(dtype)
    z.view(-1, V)[1] += 1000
    y = torch.randint(V, rows, generator=generator)
    y.view(-1)[:5] = torch.tensor([0, V - 1, -100, 9, 20])
    if name in MASKED:  # all that the first rank has of a row
        z.view(-1, V)[4, :7] = -torch.inf
    return z, y, torch.randn(*rows, generator=generator)


def columns(rank: int, size: int) -> tuple[int, int]:
    """(first, last + 1) of a rank: they have not as many."""
    bounds = [0, 7, 40] if size == 2 else [0, 7, 20, 21, 40]
    return bounds[rank], bounds[rank + 1]


def on_rank(rank: int, rows: tuple[int, ...], dtype: torch.dtype) -> dict[str, Any]:
    """By the name of each loss what is made of it, and of what; or its error."""
    losses, names = {**LOSSES, **NEAR_MISSES}, CASES[dist.get_world_size(), rows, dtype]
    return Outcomes({name: attempt(one, rank, name, losses[name], rows, dtype) for name in names})


def one(rank: int, name: str, loss: Any, rows: tuple[int, ...], dtype: torch.dtype) -> dict[str, Any]:
    z, y, upstream = given(name, rows, dtype)
    start, end = columns(rank, dist.get_world_size())
    own = z[..., start:end].contiguous()
    through_passes = name in COMPILED and ((rows == ROWS and dist.get_world_size() == 2) or EVERYTHING)
    with clean_slate(), inductor_ce.install(min_vocab=2) if through_passes else nullcontext():
        backend = Graphs() if through_passes else Rewritten()
        ours = measured(torch.compile(loss, backend=backend, dynamic=False), own, y, start, upstream)
        nodes = [
            node for gm in (backend.final if through_passes else backend.final[:1]) for node in gm.graph.nodes
        ]
        fused = sum(node.target is stats_of_ranks for node in nodes)
        gathers = fused + sum(calls(node, GATHER) for node in nodes)
        counts = gathers, sum(calls(node, REDUCE) for node in nodes), len(backend.report.sites)
        misses = [miss.reason.name for miss in backend.report.misses]
        facts = [miss.message for miss in backend.report.misses if miss.reason is Reason.BY_HAND]
    return {
        "ours": ours,
        "eager": measured(loss, own, y, start, upstream),
        "counts": counts,
        "fused": fused,
        "misses": misses,
        "facts": facts,
    }


@once
def ranks_of(size: int, rows: tuple[int, ...], dtype: torch.dtype) -> list[dict[str, Any]]:
    return spawn(on_rank, size, rows, dtype)


def exact(name: str, rows: tuple[int, ...], dtype: torch.dtype, start: int, end: int) -> list[Tensor]:
    """The same of all columns in float64, and the gradient of some of them."""
    z, y, upstream = given(name, rows, dtype)
    x = z.double().requires_grad_()
    flat, labels = x.view(-1, V), y.view(-1)
    lse = flat.logsumexp(-1)
    there = labels >= 0
    picked = torch.where(there, flat.gather(1, labels.clamp(min=0)[:, None])[:, 0], lse.new_zeros(()))
    peak = flat.detach().amax(-1)
    none = torch.where(there, 0.0, peak)  # a label that nobody has leaves the maximum in the loss
    if name.startswith(("regions", "gathered")):
        none = torch.zeros_like(none)
    if name == "log_probability":
        loss = torch.where(there, lse - picked, 0.0)
    else:
        loss = lse - picked - none
    if name == "smoothed":
        loss = (1 - SMOOTHING) * loss - SMOOTHING * (flat[:, start:end] - lse[:, None]).mean(-1)
    (loss * (2 if name == "scaled_backward" else 1)).backward(upstream.double().view(-1))
    assert x.grad is not None
    own = x.grad.view_as(z)[..., start:end]
    return [loss.detach().view(rows), own]


@pytest.mark.parametrize(
    ("case", "name"), [(case, name) for case, names in CASES.items() for name in names if name in LOSSES]
)
def test_every_rank_equals_all_columns(case: tuple[int, tuple[int, ...], torch.dtype], name: str) -> None:
    """In the place of three all-reduces there is one all-gather, and none in the backward."""
    size, rows, dtype = case
    for rank, of_rank in enumerate(ranks_of(*case)):
        found = of_rank[name]
        assert found["misses"] == []
        assert found["counts"] == (1, 0, 1)
        reference = exact(name, rows, dtype, *columns(rank, size))
        assert len(found["ours"]) == (1 if name in WITHOUT_GRADIENT else 2)
        for ours, eager, wanted in zip(found["ours"], found["eager"], reference, strict=False):
            assert_fair(ours, eager, wanted)
        assert ours.dtype == eager.dtype


@pytest.mark.parametrize("name", [name for name in NEAR_MISSES if name != "scaled_by_rank"])
def test_what_looks_alike_is_left(name: str) -> None:
    for found in (of_rank[name] for of_rank in ranks_of(2, ROWS, torch.float32)):
        assert found["fused"] == 0  # a normaliser of one rank's own columns may be fused, as any is
        for ours, eager in zip(found["ours"], found["eager"], strict=True):
            torch.testing.assert_close(ours, eager)


FACTS = {
    "overwritten": "The logits, or another tensor that was given, are edited in place by sub_ at ",
    "entropy": "What has a number for each class is read by ",
    "probabilities_kept": "What has a number for each class is read by ",
    "gradient_lost": "Gradients are on, and none goes through the sum over ranks by all_reduce at ",
}


@pytest.mark.parametrize("name", FACTS)
def test_what_is_left_is_told(name: str) -> None:
    for of_rank in ranks_of(2, ROWS, torch.float32):
        (fact,) = of_rank[name]["facts"]
        assert fact.startswith(FACTS[name])
        assert "by_hand_cases.py:" in fact
        assert "so the loss is left as it was. docs/tensor_parallel.md says which" in fact


def test_logits_that_a_rank_scales_are_its_own() -> None:
    """The normaliser is one all-gather then, and what is picked stays a sum over ranks."""
    for of_rank in ranks_of(2, ROWS, torch.float32):
        found = of_rank["scaled_by_rank"]
        gathers, _, sites = found["counts"]
        assert (gathers, sites) == (1, 1)
        for ours, eager in zip(found["ours"], found["eager"], strict=True):
            torch.testing.assert_close(ours, eager, rtol=1e-5, atol=1e-4)


HERE, Y = algebra.label("here1"), algebra.label("y", named=False)
Z, M = parts.pick_here(HERE), algebra.outside("m1")
LSE, MAX = algebra.LSE, algebra.MAX_HELD
N1 = sympy.Symbol("n1", real=True, positive=True)
SUMS = [
    (parts.MASS_HERE * sympy.exp(LSE - MAX), sympy.exp(LSE - MAX), None),
    (parts.MASS_HERE, sympy.Integer(1), None),
    ((1 - M) * (Z - MAX), algebra.pick(Y) - MAX * algebra.hit(Y), 1 - M),
    (-M * Z, -algebra.pick(Y), M),
]
NO_SUMS = {
    "a number": N1 * parts.MASS_HERE,
    "a number beside": (1 - M) * (Z - N1),
    "a number that is ours": 2 * M * Z,
    "a normaliser of one rank": sympy.log(parts.MASS_HERE) + LSE,
    "another's tensor": (1 - M) * (Z - algebra.outside("r1")),
    "something of all ranks": Z * (1 - M) - MAX,
    "two labels": Z + parts.pick_here(algebra.label("here2")),
    "a square": M * Z**2,
}


@pytest.mark.parametrize(("expr", "whole", "condition"), SUMS)
def test_sums_over_ranks(expr: sympy.Expr, whole: sympy.Expr, condition: sympy.Expr | None) -> None:
    found = parts.summed_over_ranks(expr, {M}, "y")
    assert found is not None
    assert found[0] == whole
    assert found[1] == ({} if condition is None else {Y: parts.Picked(HERE, condition)})


@pytest.mark.parametrize("what", NO_SUMS)
def test_what_is_no_sum_over_ranks(what: str) -> None:
    assert parts.summed_over_ranks(NO_SUMS[what], {M}, "y") is None


D = 8
LENGTHS = (12, 7, 9)


def head_on_rank(rank: int) -> dict[str, Any]:
    """The same behind a linear layer whose classes are spread, with what is told of the plan."""
    names = "whole_loss", "regions_in_place", "without_gradient"
    return Outcomes({name: attempt(head, rank, name) for name in names})


def head(rank: int, name: str) -> dict[str, Any]:
    start, end = columns(rank, dist.get_world_size())
    generator = torch.Generator().manual_seed(1)
    h, w = (torch.randn(n, D, generator=generator) for n in (N, V))
    w, (_, y, upstream) = w[start:end].contiguous(), given("smoothed", (N,), torch.float32)

    def loss(h: Tensor, w: Tensor, y: Tensor) -> Tensor:
        return LOSSES[name](h @ w.T, y, start)

    def run(f: Any) -> list[Tensor]:
        leaves = [x.detach().clone().requires_grad_() for x in (h, w)]
        value = f(*leaves, y)
        if value.requires_grad:
            value.backward(upstream)
        return [value.detach(), *(x.grad for x in leaves if x.grad is not None)]

    with clean_slate(), inductor_ce.install(min_vocab=2, memory_budget=0.3):
        backend = Graphs()
        ours = run(torch.compile(loss, backend=backend, dynamic=False))
        (site,) = inductor_ce.explain(loss, *(x.clone().requires_grad_() for x in (h, w)), y).sites
    return {
        "ours": ours,
        "eager": run(loss),
        "gathers": backend.count(GATHER),
        "pieces": backend.pieces,
        "plan": site.plan,
    }


def test_a_head_is_in_pieces() -> None:
    """Of vocabulary, or forward only: nobody knows that the ranks would exchange pieces of rows alike."""
    for of_rank in spawn(head_on_rank, 2):
        for found in map(of_rank.__getitem__, of_rank):
            assert found["gathers"] == 1
            for ours, eager in zip(found["ours"], found["eager"], strict=True):
                torch.testing.assert_close(ours, eager, rtol=1e-5, atol=1e-5)
            assert found["pieces"] > 1
        assert "vocab_slabs in 4 pieces" in of_rank["whole_loss"]["plan"]
        assert "forward_only" in of_rank["without_gradient"]["plan"]


def apart_on_rank(rank: int) -> dict[str, Any]:
    """Losses over batches of several lengths, whose logits are those of a deferred layer."""
    return Outcomes({name: attempt(apart, rank, LOSSES[name]) for name in COMPILED})


def apart(rank: int, loss: Any) -> dict[str, Any]:
    start, end = columns(rank, dist.get_world_size())
    generator = torch.Generator().manual_seed(1)
    h, w = (torch.randn(n, D, generator=generator) for n in (N, V))
    _, y, upstream = given("smoothed", ROWS, torch.float32)
    layer = torch.nn.Linear(D, end - start, bias=False)
    layer.weight.data = w[start:end].contiguous()

    def steps(f: Any) -> list[Tensor]:
        found = []
        for n in LENGTHS:
            leaf = h[:n].clone().requires_grad_()
            layer.zero_grad()
            value = f(layer(leaf), y[:n].clone(), start)
            value.backward(upstream[:n])
            found += [value.detach(), leaf.grad, layer.weight.grad]
        return found

    eager = steps(loss)
    with clean_slate():
        compiled, graphs = compile_lazily(loss, strategy="vocab_slabs", memory_budget=0.3)
        inductor_ce.defer(layer)
        ours = steps(compiled)
        return {
            "ours": ours,
            "eager": eager,
            "counts": (sites(), misses(), graphs.count(GATHER), graphs.count(REDUCE)),
        }


def test_a_loss_alone_of_several_lengths() -> None:
    """One graph for the first length and one for all others, each with the head of a deferred layer."""
    for of_rank in spawn(apart_on_rank, 2):
        for found in map(of_rank.__getitem__, COMPILED):
            assert found["counts"] == (2, 0, 2, 0)
            for ours, eager in zip(found["ours"], found["eager"], strict=True):
                torch.testing.assert_close(ours, eager, rtol=1e-5, atol=1e-5)
