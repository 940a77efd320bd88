"""Heads whose logits are made of several products: an adapter beside the head's weight."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from harness import compile_without_codegen
from head_cases import counts
from pairwise import in_turns
from reference import assert_fair
from torch import Tensor
from torch.fx import Graph

from inductor_ce.ops.products import LOGITS

N, V, D, R = 48, 40, 8, 3


class Given(NamedTuple):
    """Hidden states [N, D], weight [V, D], and the adapter's [R, D] and [V, R]; labels, one ignored."""

    h: Tensor
    w: Tensor
    a: Tensor
    b: Tensor
    y: Tensor


def given(dtype: torch.dtype, adapter: torch.dtype | None = None) -> Given:
    h, w, a, b = (torch.randn(size).to(dtype) for size in ((N, D), (V, D), (R, D), (V, R)))
    y = torch.randint(V, (N,))
    y[0] = -100
    return Given(h, w, a.to(adapter or dtype), b.to(adapter or dtype), y)


def adapted(h: Tensor, w: Tensor, a: Tensor, b: Tensor, y: Tensor) -> Tensor:
    z = F.linear(h, w) + 2.0 * F.linear(F.linear(h, a), b)
    return F.cross_entropy(z.float(), y)


def as_peft(h: Tensor, w: Tensor, a: Tensor, b: Tensor, y: Tensor) -> Tensor:
    """Adapters in float32 beside a layer in bfloat16, and a soft-cap."""
    z = F.linear(h, w)
    z = (z + F.linear(F.linear(h.to(a.dtype), a), b) * 0.5).to(h.dtype).float()
    return F.cross_entropy(5 * torch.tanh(z / 5), y, reduction="sum")


def exact_adapted(h: Tensor, w: Tensor, a: Tensor, b: Tensor, y: Tensor) -> Tensor:
    return _mean(h @ w.T + 2 * (h @ a.T) @ b.T, y)


def exact_peft(h: Tensor, w: Tensor, a: Tensor, b: Tensor, y: Tensor) -> Tensor:
    z = h @ w.T + 0.5 * (h @ a.T) @ b.T
    return _mean(5 * torch.tanh(z / 5), y) * (y != -100).sum()


def _mean(z: Tensor, y: Tensor) -> Tensor:
    z, y = z[y != -100], y[y != -100]
    return (z.exp().sum(-1).log() - z[torch.arange(len(y)), y]).mean()


def measured(loss: Callable[..., Tensor], given: Given, frozen: str = "") -> list[Tensor | None]:
    leaves = [t.detach().clone().requires_grad_(n not in f"{frozen}y") for n, t in given._asdict().items()]
    value = loss(*leaves)
    (0.7 * value).backward()
    return [value.detach(), *(leaf.grad for leaf in leaves[:-1])]


def assert_all_fair(
    loss: Callable[..., Tensor], exact: Callable[..., Tensor], made: list, of: Given, frozen: str
):
    in_double = Given(*(t.double() for t in of[:-1]), of.y)
    for ours, naive, right in zip(
        made, measured(loss, of, frozen), measured(exact, in_double, frozen), strict=True
    ):
        assert (ours is None) == (naive is None)
        if ours is not None:
            assert_fair(ours, naive, right)


def pieces_of(graph: Graph) -> list[tuple[int, ...]]:
    return [tuple(n.meta["val"].shape) for n in graph.find_nodes(op="call_function", target=LOGITS)]


@pytest.mark.parametrize(
    ("dtype", "frozen", "strategy"),
    in_turns(
        [torch.float32, torch.bfloat16], ["", "w", "wh"], ["token_chunks", "vocab_slabs", "materialise"]
    ),
)
def test_an_adapter_beside_the_weight(dtype: torch.dtype, frozen: str, strategy: str) -> None:
    budget = None if strategy == "materialise" else 0.8 if dtype == torch.float32 else 2.4
    compiled, graphs = compile_without_codegen(adapted, strategy=strategy, memory_budget=budget)
    of = given(dtype)
    made = measured(compiled, of, frozen)
    assert counts() == {strategy: 1}
    assert_all_fair(adapted, exact_adapted, made, of, frozen)
    pieces = pieces_of(graphs.final[0].graph)
    if strategy != "materialise":
        assert len(pieces) == 2 * graphs.pieces >= 4
        assert all(rows * columns < N * V for rows, columns in pieces)


@pytest.mark.parametrize("strategy", ["token_chunks", "vocab_slabs"])
def test_an_adapter_in_float32(strategy: str) -> None:
    compiled, _ = compile_without_codegen(as_peft, strategy=strategy, memory_budget=2.4)
    of = given(torch.bfloat16, torch.float32)
    made = measured(compiled, of, "w")
    assert counts() == {strategy: 1}
    assert_all_fair(as_peft, exact_peft, made, of, "w")


def test_without_a_gradient() -> None:
    compiled, graphs = compile_without_codegen(adapted, strategy="token_chunks", memory_budget=0.8)
    of = given(torch.float32)
    with torch.no_grad():
        torch.testing.assert_close(compiled(*of), adapted(*of))
    assert counts() == {"forward_only": 1}
    assert len(pieces_of(graphs.final[0].graph)) >= 4


def test_rows_that_are_symbolic() -> None:
    compiled, _ = compile_without_codegen(adapted, dynamic=True, strategy="token_chunks", memory_budget=0.8)
    for n in (N, 37, 25):  # at least two rows a chunk: a tensor of one row is a graph of its own
        of = given(torch.float32)
        of = of._replace(h=of.h[:n], y=of.y[:n])
        made = measured(compiled, of)
        for ours, naive in zip(made, measured(adapted, of), strict=True):
            torch.testing.assert_close(ours, naive)
    assert counts() == {"token_chunks": 1}


def read_apart(h: Tensor, w: Tensor, a: Tensor, b: Tensor, y: Tensor) -> Tensor:
    """What the adapter adds is penalised by itself: its product is read by more than the logits."""
    added = F.linear(F.linear(h, a), b)
    return F.cross_entropy(F.linear(h, w) + added, y) + added.square().mean()


def test_a_product_that_is_read_apart() -> None:
    compiled, _ = compile_without_codegen(read_apart, strategy="token_chunks", memory_budget=0.8)
    of = given(torch.float32)
    made = measured(compiled, of)
    assert counts() == {"materialise": 1}
    for ours, naive in zip(made, measured(read_apart, of), strict=True):
        torch.testing.assert_close(ours, naive)
