"""Loops over chunks that users write: never more in memory than their own loop run eagerly takes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from harness import Graphs, compile_without_codegen
from head_cases import counts
from pairwise import EVERYTHING, in_turns
from reference import assert_fair
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from torch.utils.checkpoint import checkpoint

import inductor_ce

N, V, D, K = 24, 64, 4, 3
Loop = Callable[[Tensor, Tensor, Tensor], Tensor]


def counted(y: Tensor) -> Tensor:
    return (y != -100).sum()


def one(h: Tensor, w: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(h, w).float(), y, reduction="sum")


def chunks(h: Tensor, w: Tensor, y: Tensor) -> Tensor:
    total = sum(one(a, w, b) for a, b in zip(h.chunk(K), y.chunk(K), strict=True))
    return total / counted(y)


def splits(h: Tensor, w: Tensor, y: Tensor) -> Tensor:
    """By hand, of chunks of which the last is shorter."""
    total = h.new_zeros((), dtype=torch.float32)
    size = len(h) // K + 1
    for a, b in zip(h.split(size), y.split(size), strict=True):
        z = (a @ w.t()).float()
        picked = z.gather(-1, b.clamp(min=0).unsqueeze(-1)).squeeze(-1)
        total = total + ((z.logsumexp(-1) - picked) * (b != -100)).sum()
    return total / counted(y)


def slices(h: Tensor, w: Tensor, y: Tensor) -> Tensor:
    total, size = h.new_zeros((), dtype=torch.float32), len(h) // K
    for i in range(0, len(h), size):
        total = total + one(h[i : i + size], w, y[i : i + size])
    return total / counted(y)


def logits_in_a_list(h: Tensor, w: Tensor, y: Tensor) -> Tensor:
    """The model returns a list of chunks of logits, and the loss goes over it."""
    logits = [F.linear(chunk, w) for chunk in h.chunk(K)]
    losses = [F.cross_entropy(z.float(), b, reduction="sum") for z, b in zip(logits, y.chunk(K), strict=True)]
    return torch.stack(losses).sum() / counted(y)


def checkpointed(h: Tensor, w: Tensor, y: Tensor) -> Tensor:
    total = h.new_zeros((), dtype=torch.float32)
    for a, b in zip(h.chunk(K), y.chunk(K), strict=True):
        total = total + checkpoint(one, a, w, b, use_reentrant=False)
    return total / counted(y)


def means(h: Tensor, w: Tensor, y: Tensor) -> Tensor:
    """Each chunk weighs its own mean: a mean of means, by the rows that count."""
    total = h.new_zeros((), dtype=torch.float32)
    for a, b in zip(h.chunk(K), y.chunk(K), strict=True):
        total = total + F.cross_entropy(F.linear(a, w).float(), b) * counted(b)
    return total / counted(y)


def per_token(h: Tensor, w: Tensor, y: Tensor) -> Tensor:
    losses = [
        F.cross_entropy(F.linear(a, w).float(), b, reduction="none")
        for a, b in zip(h.chunk(K), y.chunk(K), strict=True)
    ]
    return torch.cat(losses).sum() / counted(y)


LOOPS = {f.__name__: f for f in (chunks, splits, slices, logits_in_a_list, checkpointed, means, per_token)}


def inputs(dtype: torch.dtype, n: int = N, v: int = V, d: int = D) -> tuple[Tensor, Tensor, Tensor]:
    y = torch.randint(v, (n,))
    y[::5], y[1] = -100, v - 1
    made = torch.randn(n, d, dtype=dtype), torch.randn(v, d, dtype=dtype)
    return (*(t.requires_grad_() for t in made), y)  # type: ignore[return-value]


def measured(f: Loop, h: Tensor, w: Tensor, y: Tensor, upstream: float = 0.7) -> list[Tensor]:
    h.grad = w.grad = None
    loss = f(h, w, y)
    (upstream * loss).backward()
    return [loss.detach(), h.grad, w.grad]  # type: ignore[list-item]


def exactly(h: Tensor, w: Tensor, y: Tensor, upstream: float = 0.7) -> list[Tensor]:
    """In float64: the mean over the rows that count."""
    z = h.detach().double() @ w.detach().double().t()
    kept = (y != -100).double()
    share = (upstream * kept / kept.sum()).unsqueeze(-1)
    p = (z - z.amax(-1, keepdim=True)).exp()
    p = p / p.sum(-1, keepdim=True)
    hot = (torch.arange(z.shape[1]) == y.unsqueeze(-1)).double()
    loss = -((p * hot).sum(-1) + 1 - kept).log().sum() / kept.sum()
    dz = share * (p - hot)
    return [loss, dz @ w.detach().double(), dz.t() @ h.detach().double()]


def assert_right(f: Loop, compiled: Loop, given: tuple[Tensor, Tensor, Tensor]) -> None:
    ours, naive = measured(compiled, *given), measured(f, *given)
    for o, n, e in zip(ours, naive, exactly(*given), strict=True):
        assert_fair(o, n, e)


def sums_of_weight(graphs: Graphs) -> int:
    """How many gradients of the weight are begun."""
    empty = torch.ops.aten.empty.memory_format
    return sum(n.target is empty and n.args[0][0] == V for n in graphs.nodes)


def wide(graphs: Graphs) -> list[int]:
    """Rows of each tensor that has all classes."""
    found = [n.meta.get("val") for n in graphs.nodes if n.op == "call_function"]
    tensors = [t for t in found if isinstance(t, Tensor) and t.dim() == 2]
    return [t.shape[0] for t in tensors if t.shape[1] == V]


@pytest.mark.parametrize(("name", "dtype"), in_turns([*LOOPS], [torch.float32, torch.bfloat16]))
def test_one_gradient_of_the_weight(name: str, dtype: torch.dtype) -> None:
    """All chunks add to it, and no chunk's logits wait for the backward."""
    compiled, graphs = compile_without_codegen(LOOPS[name])
    assert_right(LOOPS[name], compiled, inputs(dtype))
    assert counts() == {"token_chunks": K}
    assert sums_of_weight(graphs) == 1
    assert max(wide(graphs)) <= N // K + 1
    _, backward = graphs.final
    assert not any(n.target in (torch.ops.inductor_ce.logits.default,) for n in backward.graph.nodes)


@pytest.mark.parametrize("name", ["chunks", "checkpointed"])
def test_a_frozen_weight(name: str) -> None:
    """There is nothing to add up, and still no chunk's logits wait for the backward."""
    compiled, graphs = compile_without_codegen(LOOPS[name])
    h, w, y = inputs(torch.float32)
    found = []
    for f in (compiled, LOOPS[name]):
        h.grad = None
        f(h, w.detach(), y).backward()
        found.append(h.grad)
    torch.testing.assert_close(*found)
    assert counts() == {"token_chunks": K}
    assert max(wide(graphs)) <= N // K + 1
    forward, backward = graphs.final
    kept = [n.meta["val"] for n in forward.graph.output_node().all_input_nodes]
    assert not [t for t in kept if isinstance(t, Tensor) and t.dim() == 2 and t.shape[1] == V]
    assert not [n for n in backward.graph.nodes if n.target == torch.ops.inductor_ce.logits.default]


def test_chunks_are_divided_where_that_is_asked() -> None:
    compiled, graphs = compile_without_codegen(chunks, strategy="token_chunks", memory_budget=1 / 6)
    assert_right(chunks, compiled, inputs(torch.float32))
    assert sums_of_weight(graphs) == 1
    assert max(wide(graphs)) == N // 6


@pytest.mark.parametrize("strategy", ["materialise", "vocab_slabs"])
def test_another_strategy_is_asked_for(strategy: str) -> None:
    compiled, _ = compile_without_codegen(chunks, strategy=strategy)
    assert_right(chunks, compiled, inputs(torch.float32))
    assert counts() == {strategy: K}


def test_rows_that_are_symbolic() -> None:
    compiled, graphs = compile_without_codegen(chunks, dynamic=True)
    for n in (N, 33, 30):
        assert_right(chunks, compiled, inputs(torch.float32, n=n))
    assert sums_of_weight(graphs) == len(graphs.final) // 2


def test_a_tied_weight() -> None:
    """What else is added to the gradient stays."""

    def tied(x: Tensor, w: Tensor, y: Tensor) -> Tensor:
        return chunks(F.embedding(x, w).tanh(), w, y)

    x, (_, w, y) = torch.randint(V, (N,)), inputs(torch.float32)
    compiled, graphs = compile_without_codegen(tied)
    found = []
    for f in (compiled, tied):
        w.grad = None
        f(x, w, y).backward()
        found.append(w.grad)
    torch.testing.assert_close(*found)
    assert sums_of_weight(graphs) == 1


def test_explain_tells_of_the_loop() -> None:
    with inductor_ce.install(min_vocab=2):
        report = inductor_ce.explain(checkpointed, *inputs(torch.float32))
    assert {site.strategy for site in report.sites} == {"token_chunks"}
    assert all(f"one of {K} chunks in a loop" in site.plan for site in report.sites)


# Near misses


def of_their_own(h: Tensor, w: Tensor, y: Tensor) -> Any:
    """Each loss is returned, and has an upstream gradient of its own."""
    return tuple(one(a, w, b) for a, b in zip(h.chunk(K), y.chunk(K), strict=True))


def test_upstream_gradients_of_their_own() -> None:
    given = inputs(torch.float32)
    compiled, _ = compile_without_codegen(of_their_own)
    found = []
    for f in (compiled, of_their_own):
        given[0].grad = given[1].grad = None
        sum(i * loss for i, loss in enumerate(f(*given), 1)).backward()
        found.append([given[0].grad, given[1].grad])
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs)
    assert counts() == {"materialise": K}


def two_weights(h: Tensor, w: Tensor, y: Tensor) -> Tensor:
    """The second is made of the first: their gradients are added, after one of them was scaled."""
    return one(h, w, y) + one(h, w * 2.0, y)


def test_a_weight_that_is_scaled() -> None:
    given = inputs(torch.float32)
    compiled, _ = compile_without_codegen(two_weights)
    for ours, theirs in zip(measured(compiled, *given), measured(two_weights, *given), strict=True):
        torch.testing.assert_close(ours, theirs)


# What is measured


def peak(f: Loop, given: tuple[Tensor, Tensor, Tensor]) -> int:
    """The most that a step holds at once, in bytes, beyond its arguments."""
    for _ in range(2):
        measured(f, *given)
    given[0].grad = given[1].grad = None
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        measured(f, *given)
    live = most = 0
    for event in seen.profiler.kineto_results.events():
        if event.name() == "[memory]":
            live += event.nbytes()
            most = max(most, live)
    return most


MEASURED = ["chunks", "slices", "logits_in_a_list", "checkpointed"] if EVERYTHING else ["checkpointed"]


@pytest.mark.parametrize("name", MEASURED)
def test_no_more_than_the_loop_takes_eagerly(name: str) -> None:
    """Compiled without us, all chunks of a loop with checkpoints are in memory, nearly twice of what eager
    holds, for which that is compiled with ALL=1 alone; with us they are not."""
    given = inputs(torch.float32, n=768, v=1024, d=64)
    loop = LOOPS[name]
    others = [peak(loop, given)]
    if EVERYTHING:
        others.append(peak(torch.compile(loop), given))
        torch._dynamo.reset()
    inductor_ce.install(min_vocab=2)
    ours = peak(torch.compile(loop), given)
    assert counts() == {"token_chunks": K}
    assert ours <= min(others)
