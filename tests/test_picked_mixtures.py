"""Labels picked after probabilities are added or averaged, as of ensembles and mixtures of softmaxes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from gallery import run
from harness import compile_without_codegen, counters
from test_divergences import rewritten
from torch import Tensor

from inductor_ce import ops

N, K, V = 6, 3, 20


def given() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Logits of several mixtures, numbers of rows, and labels."""
    zs, gates = torch.randn(N, K, V).double().requires_grad_(), torch.randn(N, K).double().requires_grad_()
    return zs, gates, torch.randint(V, (N,)), torch.rand(N, V).double()


def averaged(z: Tensor) -> Tensor:
    return (z[:, 0].softmax(-1) + F.softmax(z[:, 1], -1)) / 2


def ensemble(z: Tensor, gates: Tensor, y: Tensor, q: Tensor) -> Tensor:
    return F.nll_loss(averaged(z).log(), y)


def ignoring(z: Tensor, gates: Tensor, y: Tensor, q: Tensor) -> Tensor:
    return F.nll_loss(torch.log(averaged(z)), torch.where(y < 5, -1, y), ignore_index=-1, reduction="none")


def gathered_then_log(z: Tensor, gates: Tensor, y: Tensor, q: Tensor) -> Tensor:
    return -(averaged(z).gather(1, y[:, None]) + 1e-9).log().sum()


def indexed(z: Tensor, gates: Tensor, y: Tensor, q: Tensor) -> Tensor:
    return -averaged(z).clamp(min=1e-8)[torch.arange(N), y - V * (y > 9)].log()


def of_logarithms(z: Tensor, gates: Tensor, y: Tensor, q: Tensor) -> Tensor:
    both = torch.logaddexp(z[:, 0].log_softmax(-1), z[:, 1].log_softmax(-1))
    return both.view(2, -1, V).gather(2, y.view(2, -1, 1)).mean()


def pointer(z: Tensor, gates: Tensor, y: Tensor, q: Tensor) -> Tensor:
    generates = torch.sigmoid(gates[:, :1])
    p = generates * z[:, 0].softmax(-1) + (1 - generates) * z[:, 1].softmax(-1)
    return -p.gather(1, torch.stack([y, y.flip(0)], 1)).log().mean()


def stacked(z: Tensor, gates: Tensor, y: Tensor, q: Tensor) -> Tensor:
    return F.nll_loss(torch.stack([z[:, 0].softmax(-1), z[:, 1].softmax(-1)]).mean(0).log(), y)


def mixture_of_softmaxes(z: Tensor, gates: Tensor, y: Tensor, q: Tensor) -> Tensor:
    p = (z.softmax(-1) * gates.softmax(-1).unsqueeze(2).expand_as(z)).sum(1)
    return F.nll_loss((p + 1e-8).log().view(-1, V), y.view(-1), reduction="sum")


FUNCTIONS = [
    *(ensemble, ignoring, gathered_then_log, indexed, of_logarithms, pointer, stacked, mixture_of_softmaxes),
]


@pytest.mark.parametrize("f", FUNCTIONS)
def test_numbers(f: Callable[..., Tensor]) -> None:
    ours = rewritten(f, given())
    assert ours.count(ops.ROW_STATS) == 2 - (f is mixture_of_softmaxes)


def test_no_row_counts() -> None:
    def f(z: Tensor, y: Tensor) -> Tensor:
        return F.nll_loss(averaged(z).log(), y)

    z, y = torch.randn(N, K, V, requires_grad=True), torch.full((N,), -100)
    compiled, _ = compile_without_codegen(f)
    assert compiled(z, y).isnan()
    assert counters["inductor_ce"]["sites"] == 2


def read_whole(z: Tensor, gates: Tensor, y: Tensor, q: Tensor) -> Tensor:
    p = averaged(z)
    return F.nll_loss(p.log(), y) + p.square().sum()


def copied(z: Tensor, gates: Tensor, y: Tensor, q: Tensor) -> Tensor:
    """What is scattered to the classes is needed of all."""
    p = 0.5 * z[:, 0].softmax(-1)
    p = p.scatter_add(1, y[:, None].repeat(1, K), gates.softmax(-1) / 2)
    return -p.gather(1, y[:, None]).log().mean()


def edited(z: Tensor, gates: Tensor, y: Tensor, q: Tensor) -> Tensor:
    p = averaged(z)
    p[:, 3] = 0.5
    return -p.gather(1, y[:, None]).log().mean()


def weighed_by_what_learns(z: Tensor, gates: Tensor, y: Tensor, q: Tensor) -> Tensor:
    p = averaged(z) * z[:, 2].sigmoid()
    return -p.gather(1, y[:, None]).log().mean()


def of_some_rows(z: Tensor, gates: Tensor, y: Tensor, q: Tensor) -> Tensor:
    return -averaged(z).gather(1, y[:4, None]).log().mean()


def weighed_classes(z: Tensor, gates: Tensor, y: Tensor, q: Tensor) -> Tensor:
    return F.nll_loss(averaged(z).log(), y, weight=q[0])


LEFT = [read_whole, copied, edited, weighed_by_what_learns, of_some_rows, weighed_classes]


@pytest.mark.parametrize("f", LEFT)
def test_what_is_left(f: Callable[..., Any]) -> None:
    """Right all the same."""
    ours = rewritten(f, given())
    assert ours.count(torch.gather) == 0


def test_heads_in_pieces() -> None:
    """Two heads, neither of whose logits are ever all in memory."""

    def f(h: Tensor, a: Tensor, b: Tensor, y: Tensor) -> Tensor:
        return F.nll_loss(((F.linear(h, a).softmax(-1) + F.linear(h, b).softmax(-1)) / 2).log(), y)

    h, a, b = (torch.randn(n, 8).double().requires_grad_() for n in (N, V, V))
    args = h, a, b, torch.randint(V, (N,))
    compiled, graphs = compile_without_codegen(f, strategy="token_chunks", memory_budget=0.5)
    ours, exact = run(compiled, args), run(f, args)
    for mine, true in zip(ours.results + ours.gradients, exact.results + exact.gradients, strict=True):
        torch.testing.assert_close(mine, true, rtol=1e-12, atol=1e-14)
    assert counters["inductor_ce"]["sites"] == 2
    assert graphs.pieces > 2
