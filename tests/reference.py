"""What the losses are: textbook formulas in float64, and the tolerance that is fair.

Nothing here shares code with inductor_ce, nor with torch's own cross entropy.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor


@dataclass(frozen=True)
class Terms:
    """Which loss: as the arguments of F.cross_entropy, and the weight of a z-loss over the same rows."""

    reduction: str = "mean"
    ignore_index: int = -100
    smoothing: float = 0.0
    z_weight: float = 0.0


def log_sum_exp(z: Tensor) -> Tensor:
    m = z.detach().amax(-1, keepdim=True)
    return (z - m).exp().sum(-1).log() + m.squeeze(-1)


def cross_entropy(z: Tensor, y: Tensor, terms: Terms = Terms()) -> Tensor:
    """-sum_i q_i log p_i + w lse², q the smoothed one-hot target, over the rows of z [N, V] that count."""
    z, classes = z.double(), z.shape[-1]
    one_hot = (torch.arange(classes, device=z.device) == y.long()[:, None]).double()
    q = (1 - terms.smoothing) * one_hot + terms.smoothing / classes
    lse = log_sum_exp(z)
    log_p = z - lse[:, None]
    rows = -(q * log_p).sum(-1) + terms.z_weight * lse.square()
    counts = y != terms.ignore_index
    rows = torch.where(counts, rows, 0.0)
    if terms.reduction == "none":
        return rows
    return rows.sum() / (counts.sum() if terms.reduction == "mean" else 1)


class Measured(NamedTuple):
    """A loss and its gradient with respect to the logits."""

    value: Tensor
    gradient: Tensor


def measure(f: Callable[..., Tensor], z: Tensor, *args: Any, upstream: Tensor | None = None) -> Measured:
    """f(z, *args) and its gradient for an upstream gradient, 1 unless given. z stays as it is."""
    leaf = z.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    value = f(leaf, *args)
    upstream = torch.ones_like(value) if upstream is None else upstream.to(value.dtype).reshape(value.shape)
    (gradient,) = torch.autograd.grad(value, leaf, upstream)
    return Measured(value.detach(), gradient)


ULPS = 4


def assert_fair(ours: Tensor, naive: Tensor, exact: Tensor) -> None:
    """Our error against float64 is at most that of the naive computation in the same dtype, plus a little.

    Compared over the whole tensor and over its worst row, where the last dimension is a row. A naive NaN
    allows for nothing.
    """
    assert ours.dtype == naive.dtype
    assert ours.shape == naive.shape
    exact = exact.double().reshape(ours.shape)
    limits = torch.finfo(ours.dtype)
    for norm in (torch.linalg.vector_norm, _worst_row):
        error, accepted = norm(ours.double() - exact), norm(naive.double() - exact).nan_to_num()
        rounding = ULPS * (
            limits.eps * norm(exact) + limits.smallest_normal * limits.eps * ours.numel() ** 0.5
        )
        assert error <= 1.1 * accepted + rounding, (
            f"{norm.__name__}: error {error:.3g}, naive {accepted:.3g}, rounding {rounding:.3g}"
        )


def _worst_row(x: Tensor) -> Tensor:
    return torch.linalg.vector_norm(x, dim=-1).max() if x.dim() and x.numel() else x.abs().sum()


def assert_as_fair(ours: Measured, naive: Measured, exact: Measured) -> None:
    """`assert_fair` of the value and of the gradient."""
    assert_fair(ours.value, naive.value, exact.value)
    assert_fair(ours.gradient, naive.gradient, exact.gradient)


def assert_all_fair(ours: dict[str, Tensor], naive: dict[str, Tensor], exact: dict[str, Tensor]) -> None:
    """Each gradient is as near to float64's as eager's is, but for the rounding of the largest.

    That of a bias which a softmax cancels is nothing but rounding.
    """
    assert ours.keys() == naive.keys()
    largest = max(torch.linalg.vector_norm(g) for g in exact.values())
    for name, gradient in ours.items():
        error, accepted = (
            torch.linalg.vector_norm(g.double() - exact[name]) for g in (gradient, naive[name])
        )
        rounding = ULPS * torch.finfo(gradient.dtype).eps * largest
        assert error <= 1.1 * accepted + rounding, f"{name}: {error:.3g}, {accepted:.3g}, {rounding:.3g}"
