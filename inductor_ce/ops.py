"""The waist: the two operators that carry every loss.

All passes before this file emit these operators, all after it lower them.

    row_stats(z [N, V], labels, which)                    -> [K, N]
    row_grad (z, labels, m [N], coefficients [K, N], which) -> dz [N, V]

`which` names the K rows of the packed result, comma-separated, in this order:

    row       value                                     d(row)/d(z_i)
    max       m = max_i z_i                             0, see the note
    sumexp    d = sum_i exp(z_i - m)                    exp(z_i - m)
    pick      z_y, 0 where the label is outside [0, V)  [i = y]      one per label tensor
    sum       sum_i (z_i - m)                           1

In a row of -inf, where m is -inf, differences are taken from 0 in place of m.

NOTE Why (max, sumexp) and not lse. lse = m + log d depends on m only through the shift, which cancels:
holding m constant, d(lse)/d(z_i) = exp(z_i - m) / d = p_i, the exact derivative. So `max` carries no
gradient, and a consumer must use it only in expressions that do not change with the shift (m + log d,
z_y - m, V m + sum, ...). In return losses are computed from differences, as log d + (m - z_y), which
do not lose the digits that lse - z_y loses where logits are large, the rows combine exactly over any
split of V (`algebra.py`), and the gradient of a block needs nothing from the other blocks.

Labels may be any integer dtype. A label outside [0, V) belongs to no column: this is what a shard of V
needs, and what makes ignored rows free; callers that must refuse such labels do so themselves.
"""

from __future__ import annotations

import torch
from torch import Tensor

MAX, SUMEXP, PICK, SUM = "max", "sumexp", "pick", "sum"


def parse(which: str, n_labels: int) -> list[str]:
    """The row names in `which`, checked. Raises ValueError for an unknown, misplaced or missing row."""
    rows = which.split(",")
    expected = [MAX, SUMEXP] + [PICK] * n_labels + [SUM] * (SUM in rows)
    if rows != expected:
        raise ValueError(
            f"which={which!r} with {n_labels} label tensor(s); expected "
            f"'max,sumexp' + ',pick' per label tensor [+ ',sum']"
        )
    return rows


def stats_dtype(z: Tensor) -> torch.dtype:
    """float64 for float64 logits, else float32."""
    return torch.float64 if z.dtype == torch.float64 else torch.float32


def _check(z: Tensor, labels: list[Tensor], which: str) -> list[str]:
    if z.dim() != 2 or not z.is_floating_point():
        raise ValueError(f"z must be floating point [N, V], got {z.dtype} {tuple(z.shape)}")
    for y in labels:
        if y.dim() != 1 or y.is_floating_point() or y.is_complex():
            raise ValueError(f"labels must be integers [N], got {y.dtype} {tuple(y.shape)}")
        torch._check(y.shape[0] == z.shape[0], lambda: "labels and z differ in N")
    return parse(which, len(labels))


def _check_grad(z: Tensor, labels: list[Tensor], m: Tensor, coefficients: Tensor, which: str) -> list[str]:
    rows = _check(z, labels, which)
    if m.dim() != 1 or coefficients.dim() != 2 or coefficients.shape[0] != len(rows):
        raise ValueError(
            f"m must be [N] and coefficients [{len(rows)}, N] for which={which!r}, "
            f"got {tuple(m.shape)} and {tuple(coefficients.shape)}"
        )
    for n in (m.shape[0], coefficients.shape[1]):
        torch._check(n == z.shape[0], lambda: "m or coefficients and z differ in N")
    return rows


def _columns(y: Tensor, n_columns: int) -> tuple[Tensor, Tensor]:
    """(labels as int64 that are safe to index with, which of them name a column)."""
    y = y.to(torch.int64)  # a narrow integer cannot be compared with V
    inside = (y >= 0) & (y < n_columns)
    return torch.where(inside, y, 0), inside


def _shifted(z: Tensor, m: Tensor) -> Tensor:
    """z - m, but z in a row of -inf, so that such a row has d = 0 and lse = -inf."""
    return z - torch.where(m == -torch.inf, 0.0, m).unsqueeze(-1)


@torch.library.custom_op("inductor_ce::row_stats", mutates_args=())
def row_stats(z: Tensor, labels: list[Tensor], which: str) -> Tensor:
    """Row statistics of `z` over its last axis, packed.

    As `torch.logsumexp` beside a gather and a sum, in one sweep.

    Args:
        z: logits [N, V], any floating dtype; statistics are computed in float32 (float64 for float64).
        labels: integer tensors [N], one per `pick` row.
        which: the rows wanted, see the table above.

    Returns:
        [K, N] float32, or float64 for float64 logits. A row of z that is all -inf gives m = -inf, d = 0;
        a NaN or +inf in it gives d = NaN.

    Raises:
        ValueError: wrong rank or dtype, unknown rows.
    """
    rows = _check(z, labels, which)
    n, v = z.shape
    x = z.to(stats_dtype(z))
    if v == 0:
        m = x.new_full((n,), -torch.inf)
    else:
        m = x.amax(-1)
    shifted = _shifted(x, m)
    values = [m, shifted.exp().sum(-1)]
    for y in labels:
        index, inside = _columns(y, v)
        picked = x.gather(-1, index.unsqueeze(-1)).squeeze(-1) if v else m
        values.append(torch.where(inside, picked, 0.0))
    if SUM in rows:
        values.append(shifted.sum(-1))
    return torch.stack(values)


@row_stats.register_fake
def _(z: Tensor, labels: list[Tensor], which: str) -> Tensor:
    rows = _check(z, labels, which)
    return z.new_empty((len(rows), z.shape[0]), dtype=stats_dtype(z))


@torch.library.custom_op("inductor_ce::row_grad", mutates_args=())
def row_grad(z: Tensor, labels: list[Tensor], m: Tensor, coefficients: Tensor, which: str) -> Tensor:
    """The gradient of `row_stats` with respect to z.

    dz_i = a exp(z_i - m) + sum_j b_j [i = y_j] + c, with a, b_j, c the rows of `coefficients` (the
    gradients that reach `sumexp`, each `pick`, `sum`); its first row, for `max`, is not read.

    Args:
        z: logits [N, V].
        labels: as for `row_stats`.
        m: row maxima [N], the first row of the statistics.
        coefficients: [K, N], dtype of the statistics, any strides.
        which: as for `row_stats`.

    Returns:
        [N, V], dtype of z, computed in the dtype of the statistics and rounded once.
    """
    rows = _check_grad(z, labels, m, coefficients, which)
    coefficient = dict(zip(rows, coefficients.unbind(0), strict=True))
    x = z.to(stats_dtype(z))
    dz = coefficient[SUMEXP].unsqueeze(-1) * torch.exp(x - m.unsqueeze(-1))
    for j, y in enumerate(labels):
        index, inside = _columns(y, z.shape[1])
        b = torch.where(inside, coefficients[2 + j], 0.0)
        if z.shape[1]:
            dz = dz.scatter_add(-1, index.unsqueeze(-1), b.unsqueeze(-1))
    if SUM in rows:
        dz = dz + coefficient[SUM].unsqueeze(-1)
    return dz.to(z.dtype).contiguous()


@row_grad.register_fake
def _(z: Tensor, labels: list[Tensor], m: Tensor, coefficients: Tensor, which: str) -> Tensor:
    _check_grad(z, labels, m, coefficients, which)
    return z.new_empty(z.shape)


def _save_for_grad(ctx, inputs, output) -> None:
    z, labels, ctx.which = inputs
    ctx.save_for_backward(z, output[0], *labels)


def _row_stats_backward(ctx, upstream: Tensor):
    z, m, *labels = ctx.saved_tensors
    return row_grad(z, labels, m, upstream, ctx.which), [None] * len(labels), None


row_stats.register_autograd(_row_stats_backward, setup_context=_save_for_grad)

# The form in which graphs hold the operators.
ROW_STATS = torch.ops.inductor_ce.row_stats.default
ROW_GRAD = torch.ops.inductor_ce.row_grad.default
