"""Losses of a head as users write them, each with its formula in float64; nothing of inductor_ce is used.

A loss is f(hidden [B, S, D], weight [V, D], bias [V], y [B, S]), whatever it makes of the bias.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import reference
import torch
import torch.nn.functional as F
from reference import Terms, assert_fair, log_sum_exp
from torch import Tensor
from torch._dynamo.utils import counters

B, S, D, V = 4, 8, 8, 64
N = B * S

# Which budget, as a fraction of float32 logits, makes how many pieces: of N rows, or of V columns.
BUDGETS = {2: 0.5, 3: 0.35, 5: 0.22, 16: 0.0625}

Loss = Callable[..., Tensor]


class Inputs(NamedTuple):
    """The arguments of a loss. The labels have the first class, the last and -100 among them."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor
    y: Tensor

    def to(self, dtype: torch.dtype) -> Inputs:
        return Inputs(*(t.to(dtype) for t in self[:3]), self.y)

    def leaves(self, frozen: str = "") -> Inputs:
        """Copies that want gradients, but for what is named in `frozen`."""
        made = [getattr(self, name).detach().clone() for name in self._fields]
        wanted = [name not in (*frozen.split(), "y") for name in self._fields]
        return Inputs(*(t.requires_grad_(w) for t, w in zip(made, wanted, strict=True)))


def inputs(*shape: int, v: int = V, d: int = D, ignored: bool = True, device: str = "cpu") -> Inputs:
    shape = shape or (B, S)
    y = torch.randint(0, v, shape)
    edges = torch.tensor([0, -100 if ignored else v - 1, v - 1])[: y.numel()]
    y.view(-1)[: len(edges)] = edges
    made = torch.randn(*shape, d), torch.randn(v, d), torch.randn(v), y
    return Inputs(*(t.to(device) for t in made))


class Made(NamedTuple):
    """A loss and its gradients, None where none is wanted or there is none."""

    value: Tensor
    gradients: tuple[Tensor | None, ...]


def measure(f: Loss, given: Inputs, upstream: Tensor | None = None, frozen: str = "") -> Made:
    """The loss, and its gradients with respect to hidden, weight and bias, for an upstream gradient."""
    leaves = given.leaves(frozen)
    value = f(*leaves)
    tangent = torch.ones_like(value) if upstream is None else upstream.to(value.dtype).view(value.shape)
    value.backward(tangent)
    return Made(value.detach(), tuple(leaf.grad for leaf in leaves[:3]))


def assert_all_fair(ours: Made, naive: Made, exact: Made) -> None:
    assert_fair(ours.value, naive.value, exact.value)
    for o, n, e in zip(ours.gradients, naive.gradients, exact.gradients, strict=True):
        assert (o is None) == (n is None)
        if o is not None:
            assert n is not None
            assert e is not None
            assert_fair(o, n, e)


def counts() -> dict[str, int]:
    """How often each strategy was taken."""
    counted = {k: v for k, v in counters["inductor_ce"].items() if k not in ("sites", "misses", "skips_rows")}
    return {k: v for k, v in counted.items() if v}


# The losses


@dataclass(frozen=True)
class Case:
    """A loss.

    Attributes:
        loss: as a user writes it.
        exact: its formula, in float64.
        per_row: whether its upstream gradients are not one scalar's, so that chunks are refused.
    """

    loss: Loss
    exact: Loss
    per_row: bool = False

    def strategy(self, wanted: str) -> str:
        return "vocab_slabs" if self.per_row and wanted == "token_chunks" else wanted


def rows(z: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    return z.reshape(-1, z.shape[-1]), y.reshape(-1)


def logits(h: Tensor, w: Tensor, b: Tensor | None = None) -> Tensor:
    """In float64."""
    z = torch.einsum("...d,vd->...v", h.double(), w.double())
    return z if b is None else z + b.double()


PLAIN = Terms()


def textbook(terms: Terms = PLAIN, biased: bool = False) -> Loss:
    def exact(h: Tensor, w: Tensor, b: Tensor, y: Tensor) -> Tensor:
        return reference.cross_entropy(*rows(logits(h, w, b if biased else None), y), terms)

    return exact


def plain(h: Tensor, w: Tensor, b: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(*rows(F.linear(h, w), y))


def smoothed(h: Tensor, w: Tensor, b: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(*rows(F.linear(h, w), y), label_smoothing=0.1)


def z_loss(h: Tensor, w: Tensor, b: Tensor, y: Tensor) -> Tensor:
    z, y = rows(h @ w.t(), y)
    counts = y != -100
    return F.cross_entropy(z, y) + 1e-2 * (z.logsumexp(-1).square() * counts).sum() / counts.sum()


def soft_capped(h: Tensor, w: Tensor, b: Tensor, y: Tensor) -> Tensor:
    z = F.linear(h, w)
    return F.cross_entropy(
        *rows(3 * torch.tanh(z.float().to(torch.promote_types(z.dtype, torch.float32)) / 3), y)
    )


def biased(h: Tensor, w: Tensor, b: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(*rows(F.linear(h, w, b), y))


def learnt_scale(h: Tensor, w: Tensor, b: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(*rows(F.linear(h, w) * b.mean().exp(), y))


def class_weights(h: Tensor, w: Tensor, b: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(*rows(F.linear(h, w), y), weight=b.detach().abs())


def soft_targets(h: Tensor, w: Tensor, b: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(h.flatten(0, -2) @ w.t(), teacher(h, w))


def entropy_bonus(h: Tensor, w: Tensor, b: Tensor, y: Tensor) -> Tensor:
    z, y = rows(h @ w.t(), y)
    log_p = z.log_softmax(-1)
    return F.nll_loss(log_p, y) + 0.1 * (log_p.exp() * log_p).sum(-1).mean()


def shifted(h: Tensor, w: Tensor, b: Tensor, y: Tensor) -> Tensor:
    z = F.linear(h, w)
    return F.cross_entropy(*rows(z[..., :-1, :].contiguous(), y[..., 1:].contiguous()))


def summed(h: Tensor, w: Tensor, b: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(*rows(F.linear(h, w, b), y), reduction="sum")


def per_token(h: Tensor, w: Tensor, b: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(*rows(F.linear(h, w, b), y), reduction="none")


def weighted_tokens(h: Tensor, w: Tensor, b: Tensor, y: Tensor) -> Tensor:
    losses = per_token(h, w, b, y)
    return (losses * token_weights(losses)).sum() / y.numel()


def by_hand(h: Tensor, w: Tensor, b: Tensor, y: Tensor) -> Tensor:
    z, y = rows(torch.matmul(h, w.transpose(0, 1)), y)
    kept = y != -100
    losses = z.logsumexp(-1) - z.gather(-1, y.masked_fill(~kept, 0)[:, None]).squeeze(-1)
    return (losses * kept).sum() / kept.sum()


def teacher(h: Tensor, w: Tensor) -> Tensor:
    """Probabilities [N, V] from the hidden states alone."""
    x = h.detach().double().flatten(0, -2).sum(-1, keepdim=True)
    return (x * torch.linspace(-1, 1, w.shape[0], device=h.device)).softmax(-1).to(h.dtype)


def token_weights(losses: Tensor) -> Tensor:
    return torch.arange(len(losses), device=losses.device).to(losses.dtype).cos()


def exact_class_weights(h: Tensor, w: Tensor, b: Tensor, y: Tensor) -> Tensor:
    z, y = rows(logits(h, w), y)
    weights = torch.where(y == -100, 0.0, b.detach().abs().double()[y.clamp(min=0)])
    return (reference.cross_entropy(z, y, Terms("none")) * weights).sum() / weights.sum()


def exact_soft_targets(h: Tensor, w: Tensor, b: Tensor, y: Tensor) -> Tensor:
    z = logits(h, w).flatten(0, -2)
    return -(teacher(h, w) * (z - log_sum_exp(z)[:, None])).sum(-1).mean()


def exact_entropy_bonus(h: Tensor, w: Tensor, b: Tensor, y: Tensor) -> Tensor:
    z, y = rows(logits(h, w), y)
    log_p = z - log_sum_exp(z)[:, None]
    return reference.cross_entropy(z, y) + 0.1 * (log_p.exp() * log_p).sum(-1).mean()


CASES: dict[str, Case] = {
    "plain": Case(plain, textbook()),
    "smoothing": Case(smoothed, textbook(Terms(smoothing=0.1))),
    "z-loss": Case(z_loss, textbook(Terms(z_weight=1e-2))),
    "soft-cap": Case(
        soft_capped,
        lambda h, w, b, y: reference.cross_entropy(*rows(3 * torch.tanh(logits(h, w) / 3), y)),
    ),
    "bias": Case(biased, textbook(biased=True)),
    "learnt scale": Case(
        learnt_scale,
        lambda h, w, b, y: reference.cross_entropy(*rows(logits(h, w) * b.double().mean().exp(), y)),
    ),
    "class weights": Case(class_weights, exact_class_weights),
    "soft targets": Case(soft_targets, exact_soft_targets),
    "entropy bonus": Case(entropy_bonus, exact_entropy_bonus),
    "shift": Case(
        shifted,
        lambda h, w, b, y: reference.cross_entropy(*rows(logits(h, w)[..., :-1, :], y[..., 1:])),
    ),
    "sum": Case(summed, textbook(Terms("sum"), biased=True)),
    "per token": Case(per_token, textbook(Terms("none"), biased=True), per_row=True),
    "weighted tokens": Case(
        weighted_tokens,
        lambda h, w, b, y: (
            ((losses := textbook(Terms("none"), biased=True)(h, w, b, y)) * token_weights(losses)).sum()
            / y.numel()
        ),
    ),
    "by hand": Case(by_hand, textbook()),
}


def exactly(case: Case, given: Inputs, upstream: Tensor | None = None, frozen: str = "") -> Made:
    return measure(case.exact, given.to(torch.float64), upstream, frozen)
