"""Lower divergences, and sums of entries, to Inductor's own loops, by the definitions in `divergences.py`."""

from __future__ import annotations

import math
from typing import Any

import torch

from ..common.compat.inductor import IRNode, call_lowering
from . import divergences
from .arithmetic import Normalised, Operands
from .loops import cast, full, is_nan, made_contiguous, row_sums, stacked, unsqueeze, where

aten = torch.ops.aten


def divergence(zs: list[IRNode], ms: list[IRNode], ds: list[IRNode], which: str) -> IRNode:
    """[1 + K + C + 2 S + R, N], as `divergences.divergence`."""
    of_rows = ds[len(ms) :]
    wide, m_wide, rows = (_wide(each, zs, of_rows) for each in (zs, ms, ds))
    do = _Loops()
    sides = [
        Normalised(z, m, do.once(do.log(d)), do.once(call_lowering(aten.reciprocal.default, d)))
        for z, m, d in zip(wide, m_wide, rows, strict=False)
    ]
    given = Operands(sides, wide[len(ms) :], rows[len(ms) :])
    return stacked(divergences.sums(do, divergences.decode(which), given))


def divergence_grad(
    zs: list[IRNode], ms: list[IRNode], packed: IRNode, upstream: IRNode, which: str
) -> list[IRNode]:
    """S x [N, V], as `divergences.divergence_grad`."""
    decoded = divergences.decode(which)
    z, m, (up,) = (_wide(each, zs, [packed]) for each in (zs, ms, [upstream]))
    rows = [call_lowering(aten.select.int, packed, 0, k) for k in range(packed.get_size()[0])]
    made = divergences.gradients(_Loops(), decoded, z, m, rows, up)
    return [made_contiguous(dz, zs[u].get_dtype()) for u, dz in zip(decoded.wanted, made, strict=True)]


def _wide(values: list[IRNode], zs: list[IRNode], rows: list[IRNode]) -> list[IRNode]:
    dtype = divergences.computed_in([x.get_dtype() for x in (*zs, *rows)])
    return [value if value.get_dtype() == torch.bool else cast(value, dtype) for value in values]


_TENSOR = ("add", "sub", "mul", "div", "gt", "ge", "lt", "le", "eq", "ne")
_DEFAULT = ("neg", "exp", "log", "log1p", "sqrt", "abs", "sign", "sigmoid", "tanh", "maximum", "minimum")
_OF_ENTRIES = {name: getattr(aten, name).Tensor for name in _TENSOR}
_OF_ENTRIES |= {name: getattr(aten, name).default for name in _DEFAULT}
_OF_ENTRIES |= {name: getattr(aten, f"logical_{name}").default for name in ("and", "or", "not")}
_OF_ENTRIES |= {"pow": aten.pow.Tensor_Scalar, "where": aten.where.self}


class _Loops:
    """Arithmetic of what a loop computes for an entry."""

    def add(self, a: IRNode, b: IRNode | float) -> IRNode:
        return call_lowering(aten.add.Tensor, a, b)

    def sub(self, a: IRNode, b: IRNode) -> IRNode:
        return call_lowering(aten.sub.Tensor, a, b)

    def mul(self, a: IRNode, b: IRNode | float) -> IRNode:
        return call_lowering(aten.mul.Tensor, a, b)

    def div(self, a: IRNode, b: IRNode) -> IRNode:
        return call_lowering(aten.div.Tensor, a, b)

    def exp(self, a: IRNode) -> IRNode:
        return call_lowering(aten.exp.default, a)

    def log(self, a: IRNode) -> IRNode:
        return call_lowering(aten.log.default, a)

    def call(self, name: str, *args: Any, like: IRNode) -> IRNode:
        if name == "number":
            return cast(args[0], like.get_dtype())
        if name == "xlogy":
            x, y = args
            product = self.mul(x, self.log(y))
            return where(is_nan(y), torch.nan, where(call_lowering(aten.eq.Scalar, x, 0), 0.0, product))
        if name == "logaddexp":
            a, b = args
            gap = call_lowering(aten.abs.default, self.sub(a, b))
            larger = self.call("maximum", a, b, like=like)
            joined = self.add(larger, call_lowering(aten.log1p.default, self.exp(self.mul(gap, -1.0))))
            return where(call_lowering(aten.eq.Tensor, a, b), self.add(larger, math.log(2)), joined)
        if name == "clamp":
            at_least = self.call("maximum", *args[:2], like=like)
            return self.call("minimum", at_least, args[2], like=like)
        if name == "where" and all(isinstance(arg, float) for arg in args[1:]):
            return where(args[0], full(args[0].get_size(), args[1], like), args[2])
        if name == "pow" and not isinstance(args[1], float):
            return call_lowering(aten.pow.Tensor_Tensor, *args)
        return call_lowering(_OF_ENTRIES[name], *args)

    def unless_zero(self, p: IRNode, x: IRNode) -> IRNode:
        return where(call_lowering(aten.eq.Scalar, p, 0), 0.0, x)

    def once(self, row: IRNode) -> IRNode:
        row.realize()
        return row

    def over_classes(self, row: IRNode) -> IRNode:
        return unsqueeze(row, 1)

    def as_entries(self, row: IRNode, like: IRNode) -> IRNode:
        return call_lowering(aten.expand.default, unsqueeze(row, 1), like.get_size())

    def total(self, a: IRNode) -> IRNode:
        return row_sums(a)
