"""Programs that return their logits: those of which they are promised, and those that keep them, and why."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from inductor_ce.api.lazy_logits import LazyLogits

B, T, D, V = 2, 6, 8, 64


class Model(nn.Module):
    def __init__(self, bias: bool = False) -> None:
        super().__init__()
        self.embed = nn.Embedding(V, D)
        self.head = nn.Linear(D, V, bias=bias)
        self.scale = nn.Parameter(torch.tensor(1.5))

    def hidden(self, x: Tensor) -> Tensor:
        return torch.tanh(self.embed(x))


def batch(length: int = T) -> tuple[Tensor, Tensor]:
    y = torch.randint(0, V, (B, length))
    y[0, 1] = -100
    return torch.randint(0, V, (B, length)), y


def ce(z: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(z.reshape(-1, V), y.reshape(-1))


# What is returned lazily: (loss, results)

Program = Callable[[Model, Tensor, Tensor], tuple[Tensor, ...]]
PROMISED: dict[str, Program] = {}
KEPT: dict[str, Program] = {}


def promised(f: Program) -> Program:
    PROMISED[f.__name__] = f
    return f


@promised
def raw(m: Model, x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
    z = m.head(m.hidden(x))
    return ce(z, y), z


@promised
def cast(m: Model, x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
    z = m.head(m.hidden(x)).float()
    return ce(z, y), z


@promised
def cast_from_bfloat16(m: Model, x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
    z = F.linear(m.hidden(x).bfloat16(), m.head.weight.bfloat16())
    return ce(z.float(), y), z, z.float()


@promised
def edited(m: Model, x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
    z = m.head(m.hidden(x))
    z.mul_(2)
    return ce(z, y), z


@promised
def edited_under_autocast_to_bfloat16(m: Model, x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
    with torch.autocast("cpu", torch.bfloat16):
        z = m.head(m.hidden(x))
        z /= 0.5
        z.mul_(0.5).clamp_(max=60.0)
        z[..., 3] = -64.0
    return ce(z.float(), y), z


@promised
def edited_beside_others(m: Model, x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
    """Numbers, and parts of what is split, are edited too."""
    z = m.head(m.hidden(x))
    z.add_(1.0).div_(2.0)
    a, _ = torch.zeros(2, 2 * V).split(V, 1)
    a.add_(1.0)
    total = torch.zeros(())
    total += ce(z, y)
    return total.div_(2.0) + a.sum() * 0, z


@promised
def capped_in_place(m: Model, x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
    z = m.head(m.hidden(x)).float()
    z /= 3.0
    z = torch.tanh(z) * 3.0
    z += 1.0
    return ce(z, y), z


@promised
def banned_classes(m: Model, x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
    """As Chameleon bans the tokens of images."""
    z = m.head(m.hidden(x))
    z[:, :, [2, 5]] = torch.finfo(z.dtype).min
    z[..., torch.tensor([7])] = -1e4
    z[..., 60:] = -3.0
    return ce(z, y), z


@promised
def banned_by_a_mask(m: Model, x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
    banned = torch.arange(V) > 60
    z = m.head(m.hidden(x)).masked_fill(banned, -1e4)
    return ce(z, y), torch.where(banned[None, None], 5.0, z.float())


@promised
def padded_and_scaled(m: Model, x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
    z = m.head(m.hidden(x))
    z /= 0.7
    z = z[..., :61] + torch.arange(61)
    return F.cross_entropy(z.reshape(-1, 61), y.reshape(-1).clamp(max=59)), z


@promised
def padded(m: Model, x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
    z = m.head(m.hidden(x)).view(-1, V)[:, 2:61].float() / 2
    return F.cross_entropy(z, y.reshape(-1).clamp(max=58)), z.view(B, -1, 59)


@promised
def capped(m: Model, x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
    z = m.head(m.hidden(x))
    z = 5.0 * torch.tanh(z / 5.0)
    return ce(z, y), z


@promised
def scaled(m: Model, x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
    z = m.head(m.hidden(x)) * m.scale
    return ce(z, y), z


@promised
def shifted(m: Model, x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
    z = m.head(m.hidden(x)) + m.embed.weight[:, 0]
    return ce(z, y), z


def adapter(m: Model, h: Tensor) -> Tensor:
    """[..., V], by way of three numbers."""
    return F.linear(F.linear(h, m.head.weight[:3]), m.embed.weight[:, :3])


@promised
def adapted(m: Model, x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
    h = m.hidden(x)
    z = m.head(h) + 0.5 * adapter(m, h)
    return ce(z, y), z


@promised
def adapted_first(m: Model, x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
    h = m.hidden(x)
    z = adapter(m, h).mul(0.25) + m.head(h)
    return ce(z, y), z


@promised
def viewed(m: Model, x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
    z = m.head(m.hidden(x)).view(-1, V)
    return ce(z, y), z


@promised
def last(m: Model, x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
    z = m.head(m.hidden(x))
    return ce(z, y), z[:, -1]


@promised
def last_alone(m: Model, x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
    """Of no other place is there a loss either."""
    z = m.head(m.hidden(x))[:, -1]
    return ce(z, y[:, -1]), z


@promised
def last_two_alone(m: Model, x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
    z = m.head(m.hidden(x))[:, -2:]
    return ce(z, y[:, -2:]), z


@promised
def shifted_by_slices(m: Model, x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
    z = m.head(m.hidden(x))
    return ce(z[..., :-1, :].contiguous(), y[..., 1:].contiguous()), z


@promised
def detached(m: Model, x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
    z = m.head(m.hidden(x))
    return ce(z, y), z.detach()


@promised
def frozen_head(m: Model, x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
    z = F.linear(m.hidden(x), m.head.weight.detach(), m.head.weight.detach()[:, 0])
    return ce(z, y), z


@promised
def without_gradient(m: Model, x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
    h = m.hidden(x)
    with torch.no_grad():
        z = m.head(h)
        loss = ce(z, y)
    return loss, z, h


@promised
def with_accuracy(m: Model, x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
    z = m.head(m.hidden(x))
    with torch.no_grad():
        correct = (z.argmax(-1) == y).float().mean()
    return ce(z, y), z, correct


@promised
def with_an_entropy_of_statistics(m: Model, x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
    z = m.head(m.hidden(x))
    return ce(z, y) + 1e-2 * z.logsumexp(-1).square().mean(), z


@promised
def tied(m: Model, x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
    z = F.linear(m.hidden(x), m.embed.weight)
    return ce(z, y), z


@promised
def product_with_a_transpose(m: Model, x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
    z = m.hidden(x) @ m.head.weight.t()
    return ce(z, y), z


@promised
def product_and_bias(m: Model, x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
    z = torch.addmm(m.embed.weight[:, 0], m.hidden(x).view(-1, D), m.head.weight.T)
    return ce(z, y), z


@promised
def with_a_bias(m: Model, x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
    z = F.linear(m.hidden(x), m.head.weight, m.embed.weight[:, 1])
    return ce(z, y), z


@promised
def two_heads(m: Model, x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
    h = m.hidden(x)
    z, w = m.head(h), F.linear(h, m.embed.weight)
    return ce(z, y) + ce(w, y), z, w


@promised
def twice_and_with_its_hidden_states(m: Model, x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
    h = m.hidden(x)
    z = m.head(h)
    return ce(z, y), z, h, z


@promised
def classes_first(m: Model, x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
    z = m.head(m.hidden(x))
    return F.cross_entropy(z.transpose(1, 2), y), z


@promised
def shape_read(m: Model, x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
    z = m.head(m.hidden(x))
    return ce(z, y) + torch.zeros_like(z).sum(), z


def lazies(results: Any) -> list[LazyLogits]:
    return [r for r in results if isinstance(r, LazyLogits)]


def wide(results: Any) -> int:
    """How many results have at least half of the classes."""
    return sum(r.dim() > 1 and r.shape[-1] >= V // 2 for r in results)


def gradients(m: nn.Module, scalar: Tensor) -> tuple[Tensor, ...]:
    """Of all parameters, zeros where there is none."""
    named = list(m.parameters())
    return torch.autograd.grad(scalar, named, retain_graph=True, allow_unused=True, materialize_grads=True)


def total(results: Any) -> Tensor:
    parts = [r.float().sin().mean() for r in results if r.requires_grad]
    return torch.stack(parts).sum() if parts else torch.zeros(()).requires_grad_()


# What is kept, for the reason that its docstring says


def kept(f: Program) -> Program:
    KEPT[f.__name__] = f
    return f


@kept
def read_by_topk(m: Model, x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
    """also used by topk"""
    z = m.head(m.hidden(x))
    return ce(z, y), z, z.topk(3).values


@kept
def read_by_a_loss_that_is_not_fused(m: Model, x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
    """also used by mean"""
    z = m.head(m.hidden(x))
    return ce(z, y) + z.sigmoid().pow(2).mean(-2).sum(), z


@kept
def transposed(m: Model, x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
    """also used by transpose"""
    z = m.head(m.hidden(x))
    return ce(z, y), z.transpose(0, 1), z


@kept
def columns(m: Model, x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
    """also used by getitem"""
    z = m.head(m.hidden(x))
    return ce(z, y), z, z[..., :3]


@kept
def edited_without_a_gradient(m: Model, x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
    """also used by mul_"""
    z = m.head(m.hidden(x))
    with torch.no_grad():
        z.mul_(2)
    return ce(z, y), z


@kept
def filled_and_seen_from_before(m: Model, x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
    """changed in place"""
    z = m.head(m.hidden(x))
    seen = z.view(-1, V)
    z[..., 7] = -1e4
    return ce(seen, y), z


@kept
def filled_for_some_rows(m: Model, x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
    """also used by setitem"""
    z = m.head(m.hidden(x))
    z[:, 1:, 7] = -1e4
    return ce(z, y), z


@kept
def cut_and_shifted(m: Model, x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
    """cuts the classes, and rows"""
    z = m.head(m.hidden(x))[:, :-1, :63]
    return F.cross_entropy(z.reshape(-1, 63), y[:, 1:].reshape(-1) % 63), z


@kept
def edited_hidden_states(m: Model, x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
    """the hidden states are changed in place"""
    with torch.no_grad():
        h = m.hidden(x)
        z = m.head(h)
        loss = ce(z, y)
        h.zero_()
    return loss, z


@kept
def temperature_of_each_row(m: Model, x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
    """takes a number for each row"""
    h = m.hidden(x)
    z = m.head(h) / h.exp().sum(-1, keepdim=True)
    return ce(z, y), z


@kept
def rows_by_a_tensor(m: Model, x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
    """chooses rows by a tensor"""
    z = m.head(m.hidden(x))
    return ce(z, y), z[torch.arange(B), y[:, 0].clamp(0, T - 1)]


@kept
def adapted_behind_dropout(m: Model, x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
    """dropout"""
    h = m.hidden(x)
    z = m.head(h) + adapter(m, F.dropout(h, 0.5, training=False))
    return ce(z, y), z


@kept
def adapted_of_others(m: Model, x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
    """joins them with other rows"""
    z = m.head(m.hidden(x)) + adapter(m, m.embed(x))
    return ce(z, y), z


@kept
def adapted_of_what_was_edited(m: Model, x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
    """joins them with other rows"""
    h = m.hidden(x)
    u = F.linear(h, m.head.weight[:3])
    u.mul_(2.0)
    z = m.head(h) + F.linear(u, m.embed.weight[:, :3])
    return ce(z, y), z
