"""What the two operators mean, in float64 and by definition, and pointwise chains around them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.checkpoint import CheckpointPolicy

from inductor_ce import ops

LABELS_OUTSIDE = (-100, -1)


def stats(z: Tensor, labels: list[Tensor], with_sum: bool) -> Tensor:
    """row_stats of z, in float64."""
    x = z.detach().double()
    m = x.max(dim=1).values
    shift = torch.where(m.isinf() & (m < 0), torch.zeros_like(m), m)
    below = x - shift[:, None]
    rows = [m, below.exp().sum(1)]
    rows += [torch.where(hits(z, y), x, 0.0).sum(1) for y in labels]
    return torch.stack(rows + [below.sum(1)] * with_sum)


def grad(z: Tensor, labels: list[Tensor], m: Tensor, coefficients: Tensor, with_sum: bool) -> Tensor:
    """row_grad of z, in float64."""
    c = coefficients.double()[:, :, None]
    dz = c[1] * (z.detach().double() - m.double()[:, None]).exp()
    for j, y in enumerate(labels):
        dz = dz + c[2 + j] * hits(z, y)
    return dz + c[-1] if with_sum else dz


def hits(z: Tensor, y: Tensor) -> Tensor:
    """[i = y], as a mask [N, V]."""
    return torch.arange(z.shape[1], device=z.device) == y.to(torch.int64)[:, None]


def random_labels(n: int, v: int, dtype: torch.dtype = torch.int64, device: str = "cpu") -> Tensor:
    """Labels with the first, the last and the impossible columns among them."""
    y = torch.randint(0, v, (n,))
    edges = torch.tensor([0, v - 1, *LABELS_OUTSIDE, v + 5])[:n]
    y[: len(edges)] = edges
    return y.to(device=device, dtype=dtype)


def loss(z: Tensor, y: Tensor, weight: Tensor) -> Tensor:
    """A loss with a use for every statistic, and an upstream gradient that differs from row to row."""
    m, d, picked, total = ops.row_stats(z, [y], "max,sumexp,pick,sum").unbind(0)
    lse = m + d.log()
    return (weight * (lse - picked) + 1e-3 * lse.square() - 1e-4 * (total + z.shape[1] * m)).sum()


def loss_reference(z: Tensor, y: Tensor, weight: Tensor) -> Tensor:
    """`loss` in plain torch."""
    lse = z.logsumexp(1)
    picked = torch.where(hits(z, y), z, 0.0).sum(1)
    return (weight * (lse - picked) + 1e-3 * lse.square() - 1e-4 * z.sum(1)).sum()


def soft_cap(x: Tensor, bias: Tensor) -> Tensor:
    return 30 * torch.tanh(x.float() / 30)


def soft_cap_16_bit(x: Tensor, bias: Tensor) -> Tensor:
    return 30 * torch.tanh(x / 30)


def negative_scale(x: Tensor, bias: Tensor) -> Tensor:
    return x.float() * -1.7


def add_bias(x: Tensor, bias: Tensor) -> Tensor:
    return x.float() + bias


def scale_rows(x: Tensor, bias: Tensor) -> Tensor:
    return x.float() * bias[: x.shape[0], None]


CHAINS: list[Callable[[Tensor, Tensor], Tensor]] = [
    soft_cap,
    soft_cap_16_bit,
    negative_scale,
    add_bias,
    scale_rows,
]


def recompute_chain(graph: torch.fx.Graph) -> None:
    """Tag what lies between the raw logits and the operators, as the joint pass does."""
    operators = {torch.ops.inductor_ce.row_stats.default, torch.ops.inductor_ce.row_grad.default}
    pending = [node.args[0] for node in graph.nodes if node.target in operators]
    while pending:
        node = pending.pop()
        if node.op == "call_function" and node.target is not torch.ops.aten.mm.default:
            node.meta["recompute"] = CheckpointPolicy.MUST_RECOMPUTE
            node.meta["ac_graph_id"] = 0
            pending += node.all_input_nodes
