"""Sums, means and the largest of all logits beside a loss: by rows, so that the head is in pieces."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from harness import compile_without_codegen
from head_cases import counts
from reference import assert_fair
from torch import Tensor

B, S, D, V = 3, 16, 8, 96

Metric = Callable[[Tensor], Tensor]


def ce(z: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(z.reshape(-1, V).float() if z.dtype == torch.bfloat16 else z.reshape(-1, V), y)


METRICS: dict[str, Metric] = {
    "mean": lambda z: z.mean(),
    "sum": lambda z: torch.sum(z.float() if z.dtype == torch.bfloat16 else z),
    "mean of what is flat": lambda z: z.flatten().mean(),
    "mean of a view": lambda z: torch.mean(z.view(-1, V).float()).to(z.dtype),
    "nothing": lambda z: z.sum() * 0,
    "mean of some samples": lambda z: z[:2].mean(),
    "means of parts": lambda z: sum(i * part.mean() for i, part in enumerate(z.split([1, 2]), 1)),
    "sum of a range": lambda z: z.to(torch.promote_types(z.dtype, torch.float32))[:, 1:-1].sum().to(z.dtype),
    "mean of a range of a part": lambda z: z.chunk(2, dim=-2)[1][..., 1:, :].clone().mean(),
}
WITHOUT_GRADIENT: dict[str, Metric] = {
    "max": lambda z: z.detach().max(),
    "torch.max": lambda z: torch.max(z.detach().view(-1)),
    "amax": lambda z: z.detach().amax(),
    "NaN": lambda z: z.detach().isnan().any().to(z.dtype),
    "mean": lambda z: z.detach().mean(),
    "means of chosen and rejected": lambda z: z[:2].detach().mean() + z[2:].detach().mean(),
    "means of halves": lambda z: torch.stack([half.detach().float().mean() for half in z.chunk(2, 1)]).sum(),
    "max of a sample": lambda z: z.detach()[1].max(),
}


def check(f: Callable[..., tuple[Tensor, Tensor]], ours: tuple[Tensor, ...], dtype: torch.dtype) -> None:
    """Gradients as near to float64 as eager's, numbers up to some roundings of their terms, which cancel."""
    loss, metric, *gradients = zip(ours, measured(f, dtype), measured(f, torch.float64), strict=True)
    for o, naive, exact in gradients:
        assert o.dtype == naive.dtype
        assert_fair(o, naive, exact)
    h, w, y = given()
    of_terms = f(h.double().abs(), w.double().abs(), y)[1].abs()
    for o, naive, exact in (loss, metric):
        assert o.dtype == naive.dtype
        assert (o.double() - exact.double()).abs() <= 4 * torch.finfo(dtype).eps * (1 + of_terms)


def given() -> tuple[Tensor, ...]:
    torch.manual_seed(0)
    y = torch.randint(V, (B * S,))
    y[::5] = -100
    return torch.randn(B, S, D), torch.randn(V, D), y


def measured(f: Callable[..., tuple[Tensor, Tensor]], dtype: torch.dtype) -> tuple[Tensor, ...]:
    """The loss and the metric, and the gradients of the hidden states and the weight."""
    h, w, y = given()
    h, w = (x.to(dtype).requires_grad_() for x in (h, w))
    loss, metric = f(h, w, y)
    return loss.detach(), metric.detach(), *torch.autograd.grad(loss, (h, w))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", METRICS)
def test_in_the_loss(name: str, dtype: torch.dtype) -> None:
    def f(h: Tensor, w: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        z = 20 * torch.tanh(F.linear(h, w) / 20)
        metric = METRICS[name](z)
        return ce(z, y) + 0.01 * metric, metric.detach()

    compiled, _ = compile_without_codegen(f, strategy="token_chunks", memory_budget=0.3)
    ours = measured(compiled, dtype)
    assert counts() == {"token_chunks": 1}
    check(f, ours, dtype)


@pytest.mark.parametrize("name", WITHOUT_GRADIENT)
def test_logged(name: str) -> None:
    def f(h: Tensor, w: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        z = F.linear(h, w)
        return ce(z, y), WITHOUT_GRADIENT[name](z)

    compiled, _ = compile_without_codegen(f, memory_budget=0.3)
    ours = measured(compiled, torch.float32)
    assert counts()["token_chunks"] == 1
    check(f, ours, torch.float32)


def test_beside_a_scale_and_a_bias() -> None:
    def f(h: Tensor, w: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        z = w[0, 0].detach().exp() * F.linear(h, w) + w[:, 0].detach()
        return ce(z, y), z.detach().max()

    compiled, _ = compile_without_codegen(f, memory_budget=0.3)
    ours = measured(compiled, torch.float32)
    assert counts()["token_chunks"] == 1
    check(f, ours, torch.float32)


def test_nan_is_found() -> None:
    def f(h: Tensor, w: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        z = F.linear(h, w)
        return ce(z, y), torch.isnan(z).any()

    compiled, _ = compile_without_codegen(f, memory_budget=0.3)
    h, w, y = given()
    assert not compiled(h.requires_grad_(), w, y)[1]
    for row in (0, B * S - 1):
        bad = h.detach().clone()
        bad.view(-1, D)[row, 0] = math.nan
        assert compiled(bad.requires_grad_(), w, y)[1]


@pytest.mark.parametrize(
    "metric",
    [
        *(lambda z: z.max(), lambda z: z.sum(-1).max(), lambda z: z.sum((0, 1))[3], lambda z: z.std()),
        lambda z: z.sum(dtype=torch.float64).to(z.dtype),
        *(lambda z: z[:, -1].mean(), lambda z: z[..., 5:].mean(), lambda z: z.chunk(2, -1)[0].mean()),
        *(lambda z: z[[0, 2]].mean(), lambda z: z[:, ::2].mean(), lambda z: z[None].mean()),
        lambda z: z.max(0).values.mean(),
    ],
)
def test_others_are_what_they_were(metric: Metric) -> None:
    """A largest with a gradient, that of each of its ties; sums over some dimensions, or of the largest along
    one; a deviation; few rows, some classes, rows that are chosen."""

    def f(h: Tensor, w: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        z = F.linear(h, w)
        of_all = metric(z)
        return ce(z, y) + 0.01 * of_all, of_all.detach()

    compiled, _ = compile_without_codegen(f, memory_budget=0.3)
    ours = measured(compiled, torch.float32)
    check(f, ours, torch.float32)


def seen_before_the_edit(z: Tensor) -> Tensor:
    bad = z.isnan()
    z.nan_to_num_(0.0)
    return bad.any().to(z.dtype)


def flat_without_a_gradient(z: Tensor) -> Tensor:
    with torch.no_grad():
        flat = z.flatten()
    return flat.mean()


def part_without_a_gradient(z: Tensor) -> Tensor:
    with torch.no_grad():
        part = z[:2]
    return part.mean()


def part_before_the_edit(z: Tensor) -> Tensor:
    part = z[:2].clone()
    z.nan_to_num_(0.0)
    return part.isnan().any().to(z.dtype)


@pytest.mark.parametrize(
    "metric",
    [seen_before_the_edit, flat_without_a_gradient, part_without_a_gradient, part_before_the_edit],
)
def test_what_is_between_is_of_another_time(metric: Metric) -> None:
    """Logits are edited, or gradients are off, between what the sum is of and the sum."""

    def f(h: Tensor, w: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        z = F.linear(h, w)
        of_all = metric(z)
        return ce(z, y) + of_all, of_all.detach()

    compiled, _ = compile_without_codegen(f, memory_budget=0.3)
    h, w, y = given()
    h[1, 2, 3] = math.nan if metric in (seen_before_the_edit, part_before_the_edit) else 1.0
    w.requires_grad_()
    ours, theirs = (
        (*results, *torch.autograd.grad(results[0], w)) for results in (compiled(h, w, y), f(h, w, y))
    )
    torch.testing.assert_close(ours, theirs, equal_nan=True)


def test_a_sum_in_a_narrow_dtype() -> None:
    """Of logits that are rounded to it, not of rows that are."""

    def f(h: Tensor, w: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        z = F.linear(h, w)
        return ce(z, y), z.sum(dtype=torch.bfloat16)

    compiled, _ = compile_without_codegen(f)
    args = given()
    torch.testing.assert_close(compiled(*args), f(*args), rtol=1e-3, atol=0)


@pytest.mark.parametrize("gradients", [True, False])
def test_a_batch_of_no_rows(gradients: bool) -> None:
    def f(h: Tensor, w: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        z = F.linear(h, w)
        return F.cross_entropy(z, y, reduction="sum") + z.sum(), z.detach().mean()

    compiled, _ = compile_without_codegen(f)
    h, w = torch.randn(0, D).requires_grad_(gradients), torch.randn(V, D)
    for ours, theirs in zip(
        compiled(h, w, torch.empty(0).long()), f(h, w, torch.empty(0).long()), strict=True
    ):
        torch.testing.assert_close(ours, theirs, equal_nan=True)
