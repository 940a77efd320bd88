"""The waist: the two operators that carry every loss.

All passes before this file emit these operators, all after it lower them.

    row_stats(z [N, V], labels, weights, which, *, site)                   -> [K, N]
    row_grad (z, labels, weights, m [N], coefficients [K, N], which, *, site) -> dz [N, V]

Beside them stand `row_grad_again`, the gradient for who sums it up in the same sweep, and `some_row_stats`
and `some_row_grad`, the same as those two for the rows that count in a piece of a head: see `counted.py`.

`which` names the K rows of the packed result, comma-separated, in this order:

    row       value                                     d(row)/d(z_i)
    max       m = max_i z_i                             0, see the note
    sumexp    d = sum_i exp(z_i - m)                    exp(z_i - m)
    pick      z_y, 0 where the label is outside [0, V)  [i = y]      one per label tensor
    sum       sum_i (z_i - m)                           1
    sumexpz   t = sum_i (z_i - m) exp(z_i - m)          (1 + z_i - m) exp(z_i - m)
    argmax    the first i with z_i = m                  0
    top       m, beside an argmax                       [i = argmax]
    sumexp^k  sum_i exp(k (z_i - m))                    k exp(k (z_i - m))           for each order k > 0

and then, for each weight tensor q_j, [V] or [N, V], at least one of

    dot:j     sum_i q_ji (z_i - m)                      q_ji
    mass:j    sum_i q_ji                                0
    expdot:j  sum_i q_ji exp(z_i - m)                   q_ji exp(z_i - m)

and of the columns alone that are above -inf, whatever their q_ji is

    keptdot:j     sum_i q_ji (z_i - m)                  q_ji
    keptmass:j    sum_i q_ji                            0
    expzdot:j     sum_i q_ji (z_i - m) exp(z_i - m)     q_ji (1 + z_i - m) exp(z_i - m)
    keptexpdot:j  sum_i q_ji exp(z_i - m)               q_ji exp(z_i - m)

or of those alone whose q_ji is not NaN, which is so how a weight says that a column does not count

    seendot:j     sum_i q_ji (z_i - m)                  q_ji
    seenmass:j    sum_i q_ji                            0

In a row of -inf, where m is -inf, differences are taken from 0 in place of m, in the gradient too: such a
row of a block, where that of another block is finite, has none. In `sumexpz` a logit of -inf
counts 0, as the limit is. In `argmax`, which is held as a floating number, NaN is the largest.

NOTE Why (max, sumexp) and not lse. lse = m + log d depends on m only through the shift, which cancels:
holding m constant, d(lse)/d(z_i) = exp(z_i - m) / d = p_i, the exact derivative. So `max` carries no
gradient, and a consumer must use it only in expressions that do not change with the shift (m + log d,
z_y - m, V m + sum, m + t / d, ...). In return losses are computed from differences, as log d + (m - z_y),
which do not lose the digits that lse - z_y loses where logits are large, the rows combine exactly over any
split of V (`combine.py`), and the gradient of a block needs nothing from the other blocks.

At last, for each tensor of several labels a row, y [N, K], which stand behind those of one,

    picks*K   z_y, 0 where the label is outside [0, V)  how often y has i                K rows

Labels may be any integer dtype. A label outside [0, V) belongs to no column: this is what a shard of V
needs, and what makes ignored rows free; callers that must refuse such labels do so themselves. Weights are
constants: no gradient flows to them.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..common.errors import DerivativeError
from .rows import Row, Rows
from .table import ARGMAX, MAXIMUM
from .terms import evaluated

# The site of a loss that nobody asks about.
NO_SITE = -1

# From here on float32 does not hold every integer, and `argmax` not every column.
MAX_COLUMNS = 2**24


def stats_dtype_of(dtype: torch.dtype) -> torch.dtype:
    """float64 for float64 logits, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def stats_dtype(z: Tensor) -> torch.dtype:
    """Of a column's terms, and of statistics unless they cancel."""
    return stats_dtype_of(z.dtype)


def packed_dtype_of(dtype: torch.dtype, rows: Rows) -> torch.dtype:
    """Of statistics: that of the terms, or float64 where they cancel."""
    return torch.float64 if rows.cancel else stats_dtype_of(dtype)


def _check(
    z: Tensor, labels: list[Tensor], weights: list[Tensor], which: str, of_gradient: bool = False
) -> Rows:
    if z.dim() != 2 or not z.is_floating_point():
        raise ValueError(f"z must be floating point [N, V], got {z.dtype} {tuple(z.shape)}")
    for q in weights:
        if q.dim() not in (1, 2) or q.is_complex():
            raise ValueError(f"weights must be real [V] or [N, V], got {q.dtype} {tuple(q.shape)}")
        torch._check(q.shape[-1] == z.shape[1], lambda: "weights and z differ in V")
        if q.dim() == 2:
            torch._check(q.shape[0] == z.shape[0], lambda: "weights and z differ in N")
    rows = Rows.decode(which, len(labels), len(weights), of_gradient)
    _check_labels(z, labels, {j: [width] for _, j, width in rows.several})
    if ARGMAX in rows and stats_dtype(z) == torch.float32:
        torch._check(z.shape[1] <= MAX_COLUMNS, lambda: f"argmax over more than {MAX_COLUMNS} columns")
    return rows


def _check_labels(z: Tensor, labels: list[Tensor], several: dict[int, list[int]]) -> None:
    for j, y in enumerate(labels):
        if not y.dim() or list(y.shape[1:]) != several.get(j, []) or y.is_floating_point() or y.is_complex():
            shape = ", ".join(map(str, ["N", *several.get(j, [])]))
            raise ValueError(f"labels must be integers [{shape}], got {y.dtype} {tuple(y.shape)}")
        torch._check(y.shape[0] == z.shape[0], lambda: "labels and z differ in N")


def _check_grad(
    z: Tensor, labels: list[Tensor], weights: list[Tensor], m: Tensor, coefficients: Tensor, which: str
) -> Rows:
    rows = _check(z, labels, weights, which, of_gradient=True)
    if m.dim() != 1 or coefficients.dim() != 2 or coefficients.shape[0] != len(rows):
        raise ValueError(
            f"m must be [N] and coefficients [{len(rows)}, N] for which={which!r}, "
            f"got {tuple(m.shape)} and {tuple(coefficients.shape)}"
        )
    for n in (m.shape[0], coefficients.shape[1]):
        torch._check(n == z.shape[0], lambda: "m or coefficients and z differ in N")
    return rows


def _safe_labels(y: Tensor, n_columns: int) -> tuple[Tensor, Tensor]:
    """(labels as int64 that are safe to index with, which of them name a column)."""
    y = y.to(torch.int64)  # a narrow integer cannot be compared with V
    inside = (y >= 0) & (y < n_columns)
    return torch.where(inside, y, 0), inside


class _Columns:
    """What an expression of the table is over, for all rows of z."""

    def __init__(self, x: Tensor, m: Tensor, weights: Sequence[Tensor]):
        self._weights = weights
        # In a row of -inf differences are from 0, so that it has d = 0 and lse = -inf.
        self.gap = x - torch.where(m == -torch.inf, 0.0, m).unsqueeze(-1)
        self.exp = self.gap.exp()

    def __call__(self, expression: str, row: Row, c: Tensor | None = None) -> Tensor:
        names: dict[str, Any] = {"gap": self.gap, "exp": self.exp, "c": c}
        if row.order is not None:
            names |= {"k": row.order, "power": (row.order * self.gap).exp()}
        if row.index is not None:
            names["q"] = self._weights[row.index].to(self.gap.dtype)
        functions = {"limit": self._limit, "seen": lambda x: torch.where(names["q"].isnan(), 0.0, x)}
        return evaluated(expression, names, operator.add, operator.mul, functions)

    def _limit(self, x: Tensor) -> Tensor:
        return torch.where(self.gap == -torch.inf, 0.0, x)


def _picked(x: Tensor, y: Tensor) -> Tensor:
    """z_y, 0 where the label is outside; [N] or [K, N]."""
    if not x.shape[1]:
        return x.new_zeros(y.shape[::-1])
    index, inside = _safe_labels(y, x.shape[1])
    several = index if index.dim() == 2 else index.unsqueeze(-1)
    return torch.where(inside, x.gather(-1, several).view(y.shape), 0.0).t()


@torch.library.custom_op("inductor_ce::row_stats", mutates_args=())
def row_stats(
    z: Tensor, labels: list[Tensor], weights: list[Tensor], which: str, *, site: int = NO_SITE
) -> Tensor:
    """Row statistics of `z` over its last axis, packed.

    As `torch.logsumexp` beside a gather and sums, in one sweep.

    Args:
        z: logits [N, V], any floating dtype; statistics are computed in float32 (float64 for float64).
        labels: integer tensors [N], one per `pick` row, and then [N, K], one per `picks*K`.
        weights: real tensors [V] or [N, V], any dtype, for the rows `dot:j`, `mass:j`, `expdot:j` and such.
        which: the rows wanted, see the table above.
        site: an id of the loss, which the gradient carries too. Results do not depend on it.

    Returns:
        [K, N] float32, or float64 for float64 logits and beside `sumexp^k`. A row of z that is all -inf gives
        m = -inf, d = 0; a NaN or +inf in it gives d = NaN.

    Raises:
        ValueError: wrong rank or dtype, unknown rows.
    """
    return _statistics(z, labels, weights, which)


def _statistics(z: Tensor, labels: list[Tensor], weights: list[Tensor], which: str) -> Tensor:
    rows = _check(z, labels, weights, which)
    n, v = z.shape
    x = z.to(stats_dtype(z))
    packed = packed_dtype_of(z.dtype, rows)
    m = x.amax(-1) if v else x.new_full((n,), -torch.inf)
    columns = _Columns(x, m, weights)
    values = []
    for row in rows:
        if row.statistic.term is not None:
            values.append(columns(row.statistic.term, row).expand(n, v).sum(-1, dtype=packed))
        elif row.index is not None:
            values.append(_picked(x, labels[row.index]))
        elif row.statistic.held == MAXIMUM:
            values.append(m)
        else:
            values.append(x.argmax(-1).to(x.dtype) if v else torch.zeros_like(m))
    return torch.cat([value.to(packed) if value.dim() == 2 else value.to(packed)[None] for value in values])


@torch.library.custom_op("inductor_ce::some_row_stats", mutates_args=())
def some_row_stats(
    z: Tensor, labels: list[Tensor], weights: list[Tensor], which: str, left: Tensor, piece: int
) -> Tensor:
    """As `row_stats`; rows from left[piece] on need not be computed, and hold anything."""
    return _statistics(z, labels, weights, which)


@row_stats.register_fake
@some_row_stats.register_fake
def _(z: Tensor, labels: list[Tensor], weights: list[Tensor], which: str, *_: Any, **__: Any) -> Tensor:
    rows = _check(z, labels, weights, which)
    return z.new_empty((len(rows), z.shape[0]), dtype=packed_dtype_of(z.dtype, rows))


@torch.library.custom_op("inductor_ce::row_grad", mutates_args=())
def row_grad(
    z: Tensor,
    labels: list[Tensor],
    weights: list[Tensor],
    m: Tensor,
    coefficients: Tensor,
    which: str,
    *,
    site: int = NO_SITE,
) -> Tensor:
    """The gradient of `row_stats` with respect to z.

    dz_i = exp(z_i - m) (a + e (1 + z_i - m) + sum_j f_j q_ji) + sum_j b_j [i = y_j] + c + sum_j g_j q_ji
    + sum_k k h_k exp(k (z_i - m)),
    with a, b_j, c, e, f_j, g_j, h_k the rows of `coefficients` (the gradients that reach `sumexp`, each
    `pick`, `sum`, `sumexpz`, each `expdot`, each `dot`, each `sumexp^k`); those for `max`, `argmax` and
    `mass` are not read. Of several labels a row each has its b_j.

    Args:
        z: logits [N, V].
        labels, weights: as for `row_stats`.
        m: row maxima [N], the first row of the statistics.
        coefficients: [K, N], dtype of the statistics, any strides.
        which, site: as for `row_stats`.

    Returns:
        [N, V], dtype of z, of terms in float32 (float64 for float64), times coefficients in the dtype of
        the statistics, and rounded once.
    """
    return _gradient(z, labels, weights, m, coefficients, which)


def _gradient(
    z: Tensor, labels: list[Tensor], weights: list[Tensor], m: Tensor, coefficients: Tensor, which: str
) -> Tensor:
    rows = _check_grad(z, labels, weights, m, coefficients, which)
    x = z.to(stats_dtype(z))
    columns = _Columns(x, m.to(x.dtype), weights)
    dz = coefficients[1].unsqueeze(-1) * columns.exp
    for k, j in rows.hits:
        index, inside = _safe_labels(labels[j], z.shape[1])
        b = torch.where(inside, coefficients[k], 0.0)
        if z.shape[1]:
            dz = dz.scatter_add(-1, index.unsqueeze(-1), b.unsqueeze(-1))
    for k, j, width in rows.several:
        index, inside = _safe_labels(labels[j], z.shape[1])
        b = torch.where(inside, coefficients[k : k + width].t(), 0.0)
        if z.shape[1]:
            dz = dz.scatter_add(-1, index, b)
    for k, row in rows.slopes:
        dz = dz + columns(row.slope, row, coefficients[k].unsqueeze(-1))
    return dz.to(z.dtype).contiguous()


@torch.library.custom_op("inductor_ce::row_grad_again", mutates_args=())
def row_grad_again(
    z: Tensor, labels: list[Tensor], weights: list[Tensor], m: Tensor, coefficients: Tensor, which: str
) -> Tensor:
    """As `row_grad`, for who reads it to sum it up: made again there, and nowhere in memory."""
    return _gradient(z, labels, weights, m, coefficients, which)


@torch.library.custom_op("inductor_ce::some_row_grad", mutates_args=())
def some_row_grad(
    z: Tensor,
    labels: list[Tensor],
    weights: list[Tensor],
    m: Tensor,
    coefficients: Tensor,
    which: str,
    left: Tensor,
    piece: int,
) -> Tensor:
    """As `row_grad`; rows from left[piece] on need not be computed, and hold anything."""
    return _gradient(z, labels, weights, m, coefficients, which)


@row_grad.register_fake
@row_grad_again.register_fake
@some_row_grad.register_fake
def _(
    z: Tensor,
    labels: list[Tensor],
    weights: list[Tensor],
    m: Tensor,
    coefficients: Tensor,
    which: str,
    *_: Any,
    **__: Any,
) -> Tensor:
    _check_grad(z, labels, weights, m, coefficients, which)
    return z.new_empty(z.shape)


def _told_columns(rows: Rows, packed: Tensor) -> list[Tensor]:
    """The columns [N] that alone have the gradient of some rows of `packed`: more labels for `row_grad`."""
    return [packed[k] for _, k in rows.told]


def _save_for_grad(ctx, inputs, keyword_only_inputs, output) -> None:
    z, labels, weights, ctx.which = inputs
    ctx.site = keyword_only_inputs["site"]
    told = _told_columns(Rows.decode(ctx.which, len(labels), len(weights)), output)
    ctx.n_told, ctx.n_labels = len(told), len(labels)
    ctx.save_for_backward(z, output[0], *told, *labels, *weights)


def _row_stats_backward(ctx, upstream: Tensor):
    z, m, *rest = ctx.saved_tensors
    told, rest = [column.to(torch.int64) for column in rest[: ctx.n_told]], rest[ctx.n_told :]
    labels, weights = rest[: ctx.n_labels], rest[ctx.n_labels :]
    dz = row_grad(z, labels + told, weights, m, upstream, ctx.which, site=ctx.site)
    return dz, [None] * len(labels), [None] * len(weights), None


row_stats.register_autograd(_row_stats_backward, setup_context=_save_for_grad)


def _no_second_derivative(ctx, *upstream):
    raise DerivativeError(
        "A cross entropy of inductor_ce has no second derivative: use torch.nn.functional.cross_entropy "
        "where the gradient of a gradient is wanted."
    )


def _no_batches(info, in_dims, *args, **kwargs):
    raise DerivativeError(
        "A cross entropy of inductor_ce cannot run under torch.vmap: give it all batches as rows, or use "
        "torch.nn.functional.cross_entropy there."
    )


row_grad.register_autograd(_no_second_derivative)
row_stats.register_vmap(_no_batches)
row_grad.register_vmap(_no_batches)

# The form in which graphs hold the operators.
ROW_STATS = torch.ops.inductor_ce.row_stats.default
ROW_GRAD = torch.ops.inductor_ce.row_grad.default
ROW_GRAD_AGAIN = torch.ops.inductor_ce.row_grad_again.default
SOME_ROW_STATS = torch.ops.inductor_ce.some_row_stats.default
SOME_ROW_GRAD = torch.ops.inductor_ce.some_row_grad.default
