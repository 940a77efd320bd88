"""What the two operators mean, in float64 and by definition, and pointwise chains around them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.utils.checkpoint import CheckpointPolicy

from inductor_ce import ops

LABELS_OUTSIDE = (-100, -1)
WEIGHTED = ("dot", "mass", "expdot")
KEPT = ("keptdot", "keptmass", "expzdot", "keptexpdot")
SEEN = ("seendot", "seenmass")


def rows(n_labels: int, *others: str) -> str:
    """`which` for so many label tensors, and other rows."""
    return ",".join(["max", "sumexp", *["pick"] * n_labels, *others])


def weighted(n_weights: int) -> list[str]:
    """All the rows of so many weight tensors."""
    return [f"{name}:{j}" for j in range(n_weights) for name in WEIGHTED]


def kept(n_weights: int) -> list[str]:
    """All the rows of so many weight tensors that are of some columns alone."""
    return [f"{name}:{j}" for j in range(n_weights) for name in KEPT + SEEN]


def every_row(n_labels: int, n_weights: int) -> str:
    return rows(n_labels, "sum", "sumexpz", "argmax", *weighted(n_weights))


def stats(z: Tensor, labels: Sequence[Tensor], weights: Sequence[Tensor], which: str) -> Tensor:
    """row_stats of z, in float64."""
    x = z.detach().double()
    m = x.max(dim=1).values
    below = x - torch.where(m.isneginf(), 0.0, m)[:, None]
    exp = below.exp()
    value = {"max": m, "sumexp": exp.sum(1), "sum": below.sum(1)}
    value |= {"sumexpz": -torch.special.entr(exp).sum(1), "argmax": first_largest(x), "top": m}
    value |= {row: (below * order_of(row)).exp().sum(1) for row in which.split(",") if "^" in row}
    for j, q in enumerate(weights):
        q = q.double().expand_as(x)
        value |= {f"dot:{j}": (q * below).sum(1), f"mass:{j}": q.sum(1), f"expdot:{j}": (q * exp).sum(1)}
        kept = torch.where(below.isneginf(), 0.0, torch.stack([q * below, q, q * below * exp, q * exp]))
        value |= {f"{name}:{j}": each.sum(1) for name, each in zip(KEPT, kept, strict=True)}
        seen = torch.where(q.isnan(), 0.0, torch.stack([q * below, q]))
        value |= {f"{name}:{j}": each.sum(1) for name, each in zip(SEEN, seen, strict=True)}
    picked = iter([torch.where(hits(z, y), x, 0.0).sum(1) for y in labels])
    return torch.stack([next(picked) if row == "pick" else value[row] for row in which.split(",")])


def grad(
    z: Tensor,
    labels: Sequence[Tensor],
    weights: Sequence[Tensor],
    m: Tensor,
    coefficients: Tensor,
    which: str,
) -> Tensor:
    """row_grad of z, in float64."""
    exp = (z.detach().double() - m.double()[:, None]).exp()
    slope = {"sumexp": exp, "sum": torch.ones_like(exp), "sumexpz": exp - torch.special.entr(exp)}
    slope |= {row: order_of(row) * exp ** order_of(row) for row in which.split(",") if "^" in row}
    for j, q in enumerate(weights):
        slope |= {f"dot:{j}": q.double(), f"expdot:{j}": q.double() * exp}
        every, below = q.double().expand_as(exp), exp.log()
        kept = torch.stack([every, 0 * every, every * (1 + below) * exp, every * exp])
        kept = torch.where(below.isneginf(), 0.0, kept)
        slope |= {f"{name}:{j}": each for name, each in zip(KEPT, kept, strict=True) if name != "keptmass"}
        slope[f"seendot:{j}"] = torch.where(every.isnan(), 0.0, every)
    hit = iter([hits(z, y) for y in labels])
    dz = torch.zeros_like(exp)
    for row, c in zip(which.split(","), coefficients.double(), strict=True):
        if row in ("pick", *slope):
            dz = dz + c[:, None] * (next(hit) if row == "pick" else slope[row])
    return dz


def order_of(row: str) -> float:
    """k of sumexp^k"""
    return float(row.split("^")[1])


def first_largest(x: Tensor) -> Tensor:
    """The first column that nothing exceeds, NaN being the largest."""
    largest = x.isnan() | (x == x.max(dim=1, keepdim=True).values)
    columns = torch.arange(x.shape[1], device=x.device)
    return torch.where(largest, columns, x.shape[1]).amin(1).to(x.dtype)


def hits(z: Tensor, y: Tensor) -> Tensor:
    """[i = y], as a mask [N, V]."""
    return torch.arange(z.shape[1], device=z.device) == y.to(torch.int64)[:, None]


def random_labels(n: int, v: int, dtype: torch.dtype = torch.int64, device: str = "cpu") -> Tensor:
    """Labels with the first, the last and the impossible columns among them."""
    y = torch.randint(0, v, (n,))
    edges = torch.tensor([0, v - 1, *LABELS_OUTSIDE, v + 5])[:n]
    y[: len(edges)] = edges
    return y.to(device=device, dtype=dtype)


def random_weights(n: int, v: int, device: str = "cpu") -> tuple[Tensor, Tensor]:
    """Soft targets [N, V] in bfloat16, and costs [V]."""
    q = torch.randn(n, v, device=device).softmax(1).bfloat16()
    return q, torch.rand(v, device=device)


def loss(z: Tensor, y: Tensor, weight: Tensor) -> Tensor:
    """A loss with a use for every statistic, and an upstream gradient that differs from row to row."""
    m, d, picked, total = ops.row_stats(z, [y], [], rows(1, "sum")).unbind(0)
    lse = m + d.log()
    return (weight * (lse - picked) + 1e-3 * lse.square() - 1e-4 * (total + z.shape[1] * m)).sum()


def loss_reference(z: Tensor, y: Tensor, weight: Tensor) -> Tensor:
    """`loss` in plain torch."""
    lse = z.logsumexp(1)
    picked = torch.where(hits(z, y), z, 0.0).sum(1)
    return (weight * (lse - picked) + 1e-3 * lse.square() - 1e-4 * z.sum(1)).sum()


def loss_of_every_row(z: Tensor, y: Tensor, weight: Tensor, q: Tensor, cost: Tensor) -> Tensor:
    """`loss` with an entropy, soft targets q [N, V], expected costs [V], and a use for the argmax."""
    which = every_row(1, 2).replace(",mass:1", "")
    m, d, picked, total, t, first, dot, mass, _, dot_cost, exp_cost = ops.row_stats(
        z, [y], [q, cost], which
    ).unbind(0)
    entropy = d.log() - t / d
    soft = mass * d.log() - dot
    costs = exp_cost / d + 1e-4 * (dot_cost + cost.double().sum() * m)
    mistaken = torch.where(first == y, 1.0, 2.0)
    nll = d.log() + (m - picked)
    return (weight * (mistaken * nll + 0.3 * entropy + soft + costs) - 1e-4 * (total + z.shape[1] * m)).sum()


def loss_of_every_row_reference(z: Tensor, y: Tensor, weight: Tensor, q: Tensor, cost: Tensor) -> Tensor:
    """`loss_of_every_row` in plain torch."""
    lse, p, log_p = z.logsumexp(1), z.softmax(1), z.log_softmax(1)
    nll = lse - torch.where(hits(z, y), z, 0.0).sum(1)
    costs = (p * cost).sum(1) + 1e-4 * (z * cost).sum(1)
    mistaken = torch.where(first_largest(z.detach()) == y, 1.0, 2.0)
    per_row = mistaken * nll - 0.3 * (p * log_p).sum(1) - (q * log_p).sum(1) + costs
    return (weight * per_row - 1e-4 * z.sum(1)).sum()


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
