"""Lower the operators of the waist to Inductor's own loops, by the definitions in `operators.py`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ..common.compat.inductor import IRNode, call_lowering
from ..common.compat.loops import as_stored, is_same_anew
from . import chains, operators, row_program
from .rows import Row, Rows
from .table import ARGMAX, MAXIMUM
from .terms import evaluated

aten, prims = torch.ops.aten, torch.ops.prims


class _Columns:
    """What an expression of the table is over, for all rows of z."""

    def __init__(self, x: IRNode, m: IRNode, weights: list[IRNode]):
        self._weights = weights
        # In a row of -inf differences are from 0.
        self.gap = _minus_row(x, where(_is_minus_infinity(m), 0.0, m))
        self.exp = call_lowering(aten.exp.default, self.gap)

    def __call__(self, expression: str, row: Row, c: IRNode | None = None) -> IRNode:
        names = {"gap": self.gap, "exp": self.exp, "c": c}
        if row.order is not None:
            power = call_lowering(aten.exp.default, _mul(self.gap, row.order))
            names |= {"k": row.order, "power": power}
        if row.index is not None:
            names["q"] = _over_rows(self._weights[row.index], self.gap)
        functions = {"limit": self._limit, "seen": lambda x: where(is_nan(names["q"]), 0.0, x)}
        return evaluated(expression, names, _add, _mul, functions)

    def _limit(self, x: IRNode) -> IRNode:
        return where(_is_minus_infinity(self.gap), 0.0, x)


def row_stats(z: IRNode, labels: list[IRNode], weights: list[IRNode], rows: Rows) -> IRNode:
    """[K, N], one of `rows` each, as `operators.row_stats`."""
    n, v = z.get_size()
    if ARGMAX in rows or not is_same_anew(z):
        as_stored(z)  # what may be compared to the maximum, and what that is of: see _place_of_maximum
    x, packed = cast(z, stats_dtype(z)), operators.packed_dtype_of(z.get_dtype(), rows)
    m = call_lowering(aten.amax.default, x, [1]) if v else full([n], -torch.inf, x)
    columns = _Columns(x, m, weights)
    values = []
    for row in rows:
        if row.statistic.term is not None:
            values.append(row_sums(cast(columns(row.statistic.term, row), packed)))
        elif row.index is not None:
            values.append(_picked(x, labels[row.index]))
        elif row.statistic.held == MAXIMUM:
            values.append(m)
        else:
            values.append(_place_of_maximum(x, m) if v else full([n], 0.0, x))
    return _packed([cast(value, packed) for value in values])


def row_grad(
    z: IRNode, labels: list[IRNode], weights: list[IRNode], m: IRNode, coefficients: IRNode, rows: Rows
) -> IRNode:
    """[N, V], as `operators.row_grad`."""

    def coefficient(k: int) -> IRNode:
        return unsqueeze(call_lowering(aten.select.int, coefficients, 0, k), 1)

    def of(x: IRNode, column: IRNode, weights: list[IRNode]) -> IRNode:
        """What columns have, but of several labels."""
        columns = _Columns(cast(x, stats_dtype(z)), cast(m, stats_dtype(z)), weights)
        dz = _mul(coefficient(1), columns.exp)
        for k, j in rows.hits:
            hit = call_lowering(aten.eq.Tensor, column, unsqueeze(cast(labels[j], torch.int64), 1))
            dz = _add(dz, where(hit, coefficient(k), 0.0))
        for k, row in rows.slopes:
            dz = _add(dz, columns(row.slope, row, coefficient(k)))
        return dz

    v = z.get_size()[1]
    dz = made_contiguous(of(z, unsqueeze(_iota(v, z), 0), weights), z.get_dtype())
    given = [
        (_safe_labels(labels[j], v), call_lowering(aten.slice.Tensor, coefficients, 0, k, k + width))
        for k, j, width in rows.several
        if v
    ]
    for (index, _), _ in given:
        entries = of(_gathered(z, index), index, [_gathered(over_rows(q, z), index) for q in weights])
        for labelled, c in given:
            entries = _add(entries, _at_labels(index, labelled, c))
        dz = _with_entries(dz, index, cast(entries, z.get_dtype()))
    return dz


def _at_labels(index: IRNode, labelled: tuple[IRNode, IRNode], c: IRNode) -> IRNode:
    """The sum of what coefficients [K, N] say of labels [N, K], in the columns that `index` [N, J] names."""
    y, inside = labelled
    c = where(inside, call_lowering(aten.permute.default, c, [1, 0]), 0.0)
    hit = call_lowering(aten.eq.Tensor, unsqueeze(index, 2), unsqueeze(y, 1))
    return call_lowering(aten.sum.dim_IntList, where(hit, unsqueeze(c, 1), 0.0), [2])


def _with_entries(dz: IRNode, index: IRNode, entries: IRNode) -> IRNode:
    """dz with other entries [N, K] in the columns that `index` names. The same column has the same entry.

    As by `aten.scatter`, whose lowering looks at the node that is being lowered before it does this.
    """
    return call_lowering(aten.scatter_reduce.two, dz, 1, index, entries, None)


def _gathered(x: IRNode, index: IRNode) -> IRNode:
    return call_lowering(aten.gather.default, x, 1, index)


def made_contiguous(dz: IRNode, dtype: torch.dtype) -> IRNode:
    """dz in a dtype, contiguous, in memory of its own."""
    return call_lowering(aten.clone.default, cast(dz, dtype), memory_format=torch.contiguous_format)


def coefficients(program: str, packed: IRNode, given: list[IRNode]) -> IRNode:
    """[K, N] of statistics [K, N], as `row_program.coefficients`."""
    k, n = packed.get_size()
    statistics = [call_lowering(aten.select.int, packed, 0, i) for i in range(k)]
    made = row_program.decode(program).run(statistics, given, _call, _number_beside(packed))
    return stacked([call_lowering(aten.expand.default, cast(row, packed.get_dtype()), [n]) for row in made])


class Chained:
    """What a `Chain` makes of logits, and the gradient by these of that by it; the same without a chain.

    Args:
        z: logits [N, V].
        chain: as text.

    Attributes:
        x: what the statistics are of.
    """

    def __init__(self, z: IRNode, chain: str):
        self._chain, self._z = chains.decode(chain), z
        self.x = z
        if self._chain is not None:
            self._wide = cast(z, stats_dtype(z))
            self.x = self._chain.of(self._wide, _call, _number_beside(self._wide))

    def gradient(self, dx: IRNode) -> IRNode:
        if self._chain is None:
            return dx
        number = _number_beside(self._wide)
        return cast(self._chain.gradient(self._wide, dx, _call, number), self._z.get_dtype())


def _call(op: Any, args: tuple[Any, ...]) -> IRNode:
    return call_lowering(op, *args)


def _number_beside(x: IRNode) -> Callable[[row_program.Number], IRNode]:
    """As `row_program.number_beside`."""

    def made(number: row_program.Number) -> IRNode:
        dtype = torch.bool if isinstance(number, bool) else x.get_dtype()
        return call_lowering(aten.full.default, [], number, dtype=dtype, device=x.get_device())

    return made


def stats_dtype(z: IRNode) -> torch.dtype:
    return operators.stats_dtype_of(z.get_dtype())


def over_rows(q: IRNode, z: IRNode) -> IRNode:
    """A weight [V] or [N, V] as [N, V], without a copy."""
    return call_lowering(aten.expand.default, q, z.get_size()) if len(q.get_size()) == 1 else q


def _over_rows(q: IRNode, z: IRNode) -> IRNode:
    return over_rows(cast(q, stats_dtype(z)), z)


def _place_of_maximum(x: IRNode, m: IRNode) -> IRNode:
    """The first column of the largest value, and NaN is the largest; as a number of x's dtype.

    NOTE Not by argmax
    On a CPU, Inductor of torch 2.11 and 2.12 counts its columns in steps of a tile where anything in the loop
    is read across its rows: the weights, the logits, or what else the scheduler put there. What is compared
    with the maximum must be what the maximum was taken of, to the last bit. Both read x from memory: two
    loops that compute it may round it differently.
    """
    v = x.get_size()[1]
    is_largest = call_lowering(aten.eq.Tensor, x, unsqueeze(m, 1))
    is_largest = call_lowering(aten.bitwise_or.Tensor, is_largest, call_lowering(aten.isnan.default, x))
    column = cast(unsqueeze(_iota(v, x), 0), x.get_dtype())
    return call_lowering(aten.amin.default, where(is_largest, column, torch.inf), [1])


def _safe_labels(y: IRNode, n_columns: Any) -> tuple[IRNode, IRNode]:
    """(labels as int64 that are safe to index with, which of them name a column)"""
    inside = call_lowering(
        aten.bitwise_and.Tensor,
        call_lowering(aten.ge.Scalar, y, 0),
        call_lowering(aten.lt.Scalar, cast(y, torch.int64), n_columns),
    )
    return cast(where(inside, y, 0), torch.int64), inside


def _picked(x: IRNode, y: IRNode) -> IRNode:
    """z_y, 0 where the label is outside; [N] or [K, N]."""
    index, inside = _safe_labels(y, x.get_size()[1])
    if not x.get_size()[1]:
        picked = full(y.get_size(), 0.0, x)
    elif len(y.get_size()) == 2:
        picked = _gathered(x, index)
    else:
        picked = call_lowering(aten.squeeze.dim, _gathered(x, unsqueeze(index, 1)), 1)
    picked = where(inside, picked, 0.0)
    return picked if len(y.get_size()) == 1 else call_lowering(aten.permute.default, picked, [1, 0])


def stacked(values: list[IRNode]) -> IRNode:
    """[K, N] of K rows. Not by `cat`, whose lowering on a GPU looks at the node that is being lowered."""
    k = unsqueeze(_iota(len(values), values[0]), 1)
    packed = unsqueeze(values[-1], 0)
    for i, value in reversed(list(enumerate(values[:-1]))):
        packed = where(call_lowering(aten.eq.Scalar, k, i), unsqueeze(value, 0), packed)
    return packed


def _packed(values: list[IRNode]) -> IRNode:
    """[K, N] of rows [N], and of several [K', N] behind them."""
    single = [value for value in values if len(value.get_size()) == 1]
    packed = stacked(single)
    several, k = values[len(single) :], len(single)
    total = k + sum(value.get_size()[0] for value in several)
    if several:
        packed = _padded(packed, 0, total)
    for value in several:
        packed = _add(packed, _padded(value, k, total))
        k += value.get_size()[0]
    return packed


def _padded(rows: IRNode, at: int, total: int) -> IRNode:
    """Rows [K', N] from a place on, among others of 0, [K, N]."""
    after = total - at - rows.get_size()[0]
    return call_lowering(aten.constant_pad_nd.default, rows, [0, 0, at, after], 0.0)


def _iota(size: Any, like: IRNode) -> IRNode:
    kind = {"dtype": torch.int64, "device": like.get_device(), "requires_grad": False}
    return call_lowering(prims.iota.default, size, start=0, step=1, **kind)


def _is_minus_infinity(x: IRNode) -> IRNode:
    return call_lowering(aten.eq.Scalar, x, -torch.inf)


def is_nan(x: IRNode) -> IRNode:
    return call_lowering(aten.isnan.default, x)


def _minus_row(x: IRNode, row: IRNode) -> IRNode:
    return call_lowering(aten.sub.Tensor, x, unsqueeze(row, 1))


def row_sums(x: IRNode) -> IRNode:
    """[N] of [N, V]."""
    return call_lowering(aten.sum.dim_IntList, x, [1])


def _add(x: IRNode, y: IRNode | int) -> IRNode:
    if isinstance(y, int):
        return call_lowering(aten.add.Scalar, x, float(y))
    return call_lowering(aten.add.Tensor, x, y)


def _mul(x: IRNode, y: IRNode | float) -> IRNode:
    if isinstance(y, float):
        return call_lowering(aten.mul.Scalar, x, y)
    return call_lowering(aten.mul.Tensor, x, y)


def cast(x: IRNode, dtype: torch.dtype) -> IRNode:
    return call_lowering(prims.convert_element_type.default, x, dtype)


def where(condition: IRNode, yes: Any, no: Any) -> IRNode:
    return call_lowering(aten.where.self, condition, yes, no)


def unsqueeze(x: IRNode, dim: int) -> IRNode:
    return call_lowering(aten.unsqueeze.default, x, dim)


def full(size: list[Any], value: float, like: IRNode) -> IRNode:
    return call_lowering(aten.full.default, size, value, dtype=like.get_dtype(), device=like.get_device())
