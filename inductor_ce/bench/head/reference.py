"""The loss and its gradients in float64, and how far a system's are from them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ..shared.losses import IGNORED
from .inputs import Inputs, capped

SLAB = 2**27  # elements of one float64 slab of logits [N, slab]: 1 GB


@dataclass(frozen=True)
class Errors:
    """The distance of a gradient from float64's, in three ways, of which NaN is the worst.

    Attributes:
        norm: norm(g - ref) / norm(ref), of the whole matrix.
        worst_row: the largest of norm(g - ref) / norm(ref) of one row; rows whose ref is 0 must be 0.
        largest_row: the largest norm(g - ref) of a row, over the largest norm(ref) of a row.
    """

    norm: float
    worst_row: float
    largest_row: float


@dataclass(frozen=True)
class Reference:
    """What float64 gives, from the bf16 inputs as they are. dW is kept whole: 4.7 GB at the largest shape.

    db is [1, V], a matrix of one row, or None where there is no bias.
    """

    loss: float
    dh: Tensor
    dW: Tensor
    db: Tensor | None = None

    def loss_error(self, loss: Tensor) -> float:
        return abs(loss.double().item() - self.loss) / abs(self.loss)

    def errors(self, dh: Tensor, dW: Tensor, db: Tensor | None = None) -> dict[str, Errors]:
        found = {"dh": distance(dh, self.dh), "dW": distance(dW, self.dW)}
        if db is not None and self.db is not None:
            found["db"] = distance(db[None], self.db)
        return found


def reference(inputs: Inputs, slab: int = SLAB) -> Reference:
    """By the formula of the gradient, a slab of the vocabulary at a time; never [N, V]."""
    h, W, y = inputs.h.detach().double(), inputs.W.detach(), inputs.y
    b = W.new_zeros(len(W)) if inputs.b is None else inputs.b.detach()
    width = max(1, slab // len(h))
    lse, picked = _statistics(h, W, b, y, width, inputs.cap)
    valid = y != IGNORED
    weight = valid.double() / valid.sum()
    dh, dW = torch.zeros_like(h), torch.empty(W.shape, dtype=torch.float64, device=W.device)
    db = dW.new_empty(1, len(W))
    for start, rows, bias, inside in _slabs(W, b, y, width):
        z = (h @ rows.T).add_(bias)
        x = capped(z, inputs.cap)
        dz = (x - lse[:, None]).exp_()
        dz[inside, y[inside] - start] -= 1
        dz *= weight[:, None]
        if inputs.cap is not None:
            dz *= 1 - (x / inputs.cap).square_()
        del z, x
        dh.addmm_(dz, rows)
        torch.mm(dz.T, h, out=dW[start : start + len(rows)])
        torch.sum(dz, dim=0, out=db[0, start : start + len(rows)])
        del dz
    loss = ((lse - picked) * weight).sum().item()
    return Reference(loss, dh, dW, None if inputs.b is None else db)


def _statistics(
    h: Tensor, W: Tensor, b: Tensor, y: Tensor, width: int, cap: float | None
) -> tuple[Tensor, Tensor]:
    """(lse, the label's logit, 0 where there is none) of every row of z, in float64."""
    lse = h.new_full((len(h),), -torch.inf)
    picked = h.new_zeros(len(h))
    for start, rows, bias, inside in _slabs(W, b, y, width):
        z = capped((h @ rows.T).add_(bias), cap)
        picked[inside] = z[inside, y[inside] - start]
        lse = torch.logaddexp(lse, z.logsumexp(dim=1))
        del z
    return lse, picked


def _slabs(W: Tensor, b: Tensor, y: Tensor, width: int) -> Iterator[tuple[int, Tensor, Tensor, Tensor]]:
    """(first column, rows of W and b in float64, the rows of z whose label is among them) of every slab."""
    for start in range(0, len(W), width):
        slab = slice(start, start + width)
        rows = W[slab].double()
        inside = ((y >= start) & (y < start + len(rows))).nonzero()[:, 0]
        yield start, rows, b[slab].double(), inside


def distance(g: Tensor, ref: Tensor) -> Errors:
    """Of a matrix from its float64 reference, a few rows at a time."""
    chunk = max(1, 2**25 // g.shape[1])
    parts = [
        _row_norms(g[rows], ref[rows]) for rows in (slice(i, i + chunk) for i in range(0, len(g), chunk))
    ]
    off, size = (torch.cat(column) for column in zip(*parts, strict=True))
    relative = torch.where(off == 0, 0, off / size)
    return Errors(
        norm=(off.norm() / size.norm()).item(),
        worst_row=relative.max().item(),
        largest_row=(off.max() / size.max()).item(),
    )


def _row_norms(g: Tensor, ref: Tensor) -> tuple[Tensor, Tensor]:
    return torch.linalg.vector_norm(g.double() - ref, dim=1), torch.linalg.vector_norm(ref, dim=1)
