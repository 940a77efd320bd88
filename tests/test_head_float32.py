"""A head in float32 over bfloat16 hidden states and weight: its products have the factors as they were."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from harness import compile_without_codegen
from head_cases import Inputs, assert_all_fair, counts, inputs, logits, measure, rows
from torch import Tensor
from torch.fx import Graph

from inductor_ce.heads import factors
from inductor_ce.ops.products import LOGITS, PRODUCT_INTO

N, V, D = 48, 40, 8


@pytest.fixture(autouse=True)
def _wide_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU. The operators themselves cast where there are none."""
    monkeypatch.setattr(factors, "has_wide_products", lambda device: True)


def plain(h: Tensor, w: Tensor, b: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(*rows(F.linear(h.float(), w.float()), y))


def biased_and_capped(h: Tensor, w: Tensor, b: Tensor, y: Tensor) -> Tensor:
    z = F.linear(h.float(), w.float(), b.float())
    return F.cross_entropy(*rows(5 * torch.tanh(z / 5), y), label_smoothing=0.1)


def rows_first(h: Tensor, w: Tensor, b: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(h.float().reshape(-1, D) @ w.t().float(), y.flatten(), reduction="sum")


LOSSES = {"plain": plain, "bias and soft-cap": biased_and_capped, "rows first": rows_first}


def exact(name: str, h: Tensor, w: Tensor, b: Tensor, y: Tensor) -> Tensor:
    z = logits(h, w, b if name == "bias and soft-cap" else None)
    y = y.flatten()
    counted = y != -100
    z, y = z.reshape(-1, V)[counted], y[counted]
    z = 5 * torch.tanh(z / 5) if name == "bias and soft-cap" else z
    lse = z.exp().sum(-1).log()
    loss = lse - z[torch.arange(len(y)), y]
    if name == "bias and soft-cap":
        loss = 0.9 * loss + 0.1 * (lse - z.mean(-1))
    return loss.sum() if name == "rows first" else loss.mean()


def products_of(graph: Graph, target: object) -> list[tuple[torch.dtype, ...]]:
    """The dtypes of the factors of each product."""
    return [
        tuple(s.meta["val"].dtype for s in node.all_input_nodes[-2:])
        for node in graph.find_nodes(op="call_function", target=target)
    ]


@pytest.mark.in_turns
@pytest.mark.parametrize("strategy", ["token_chunks", "vocab_slabs"])
@pytest.mark.parametrize("name", LOSSES)
def test_as_fair_as_float32(name: str, strategy: str) -> None:
    given = inputs(N, v=V, d=D).to(torch.bfloat16)
    compiled, graphs = compile_without_codegen(LOSSES[name], strategy=strategy, memory_budget=0.4)
    ours = measure(compiled, given, torch.tensor(0.7))
    assert counts() == {strategy: 1}
    in_double = Inputs(*(t.double() for t in given[:3]), given.y)
    right = measure(lambda *args: exact(name, *args), in_double, torch.tensor(0.7, dtype=torch.float64))
    assert_all_fair(ours, measure(LOSSES[name], given, torch.tensor(0.7)), right)
    made = [node for gm in graphs.final for node in gm.graph.find_nodes(op="call_function", target=LOGITS)]
    assert len(made) >= 2
    for node in made:
        assert [s.meta["val"].dtype for s in node.args[:2]] == [torch.bfloat16] * 2
        assert node.meta["val"].dtype == torch.float32
    assert not [node for gm in graphs.final for node in gm.graph.nodes if _is_copy_of_weight(node)]


def _is_copy_of_weight(node: torch.fx.Node) -> bool:
    """In float32. That of its gradient is no cast to float32."""
    is_cast = node.target in (torch.ops.prims.convert_element_type.default, torch.ops.aten._to_copy.default)
    if not is_cast or node.meta["val"].dtype != torch.float32:
        return False
    return tuple(node.meta["val"].shape) in {(V, D), (D, V)}


def test_without_a_gradient() -> None:
    given = inputs(N, v=V, d=D).to(torch.bfloat16)
    compiled, graphs = compile_without_codegen(plain, strategy="token_chunks", memory_budget=0.4)
    with torch.no_grad():
        ours, naive = compiled(*given), plain(*given)
    assert counts() == {"forward_only": 1}
    torch.testing.assert_close(ours, naive)
    assert not [node for gm in graphs.final for node in gm.graph.nodes if _is_copy_of_weight(node)]


def half(h: Tensor, w: Tensor, b: Tensor, y: Tensor) -> Tensor:
    return plain(h.half(), w.half(), b, y)


def weight_in_float32(h: Tensor, w: Tensor, b: Tensor, y: Tensor) -> Tensor:
    return plain(h, w.float() + 0.001, b, y)


def scaled_after(h: Tensor, w: Tensor, b: Tensor, y: Tensor) -> Tensor:
    return plain(h.float() * 0.3, w, b, y)


@pytest.mark.parametrize("loss", [half, weight_in_float32, scaled_after])
def test_factors_that_are_not_bfloat16_stay(loss) -> None:
    given = inputs(N, v=V, d=D).to(torch.bfloat16)
    compiled, graphs = compile_without_codegen(loss, strategy="token_chunks", memory_budget=0.4)
    ours = measure(compiled, given)
    naive = measure(loss, given)
    for o, n in zip(ours.gradients, naive.gradients, strict=True):
        torch.testing.assert_close(o, n)
    for gm in graphs.final:
        for target in (LOGITS, PRODUCT_INTO):
            for node in gm.graph.find_nodes(op="call_function", target=target):
                dtypes = {s.meta["val"].dtype for s in node.args[:2]}
                assert dtypes == {torch.float32}
