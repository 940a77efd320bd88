"""The gradients that a head gives, summed from its pieces or put together from them."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch.fx import Node

from ..graph.builder import Builder
from ..graph.shapes import example_of, shape_of
from ..graph.walk import args_of
from ..ops.counted import PRODUCT_TO_ROWS
from ..ops.products import COLUMN_SUMS, ONCE_MADE, TIMES
from .find import source_of_exit
from .kinds import BIAS, HIDDEN, VIEWS, WEIGHT, WEIGHT_T
from .narrow_sums import NarrowSum
from .nodes import empty, in_place, into, on
from .pieces import CAST, ROWS, Pieces
from .plan import Plan
from .ranges import Range

aten = torch.ops.aten


class Exit:
    """One gradient, such as that of the weight: an accumulator, to which each piece gives its part.

    Cut along the dimension that a product sums over, it is a sum, else it is put together.

    Args:
        pieces: of the head.
        node: the product, or the sum, that made the gradient of the whole.
        plan: which says what is kept in float32 though it is 16-bit.
        first: the gradient with which it is summed up, of another side of the head, if any.
    """

    def __init__(self, pieces: Pieces, node: Node, plan: Plan, first: Exit | None = None):
        self.pieces, self.build, self.node = pieces, pieces.build, node
        self.kind = pieces.head.exits[node]
        self.source = source_of_exit(node, pieces.head)
        self.is_summed = (pieces.dim == ROWS) != (self.kind == HIDDEN)
        self.dtype = result_dtype(node)
        self._wide = self.dtype.itemsize < 4 and (plan.wide_sum if self.is_summed else plan.wide_hidden)
        self._is_packed = pieces.packing is not None and not self.is_summed
        self._out: Node | None = None
        self._parts: list[Node] = []
        self.operand = None if self.kind == BIAS else self._other_factor()
        self._beside = None
        if plan.pieces > 1:
            self._beside = self._narrow_sum() if first is None else first._beside

    def _narrow_sum(self) -> NarrowSum | None:
        """What stands beside the weight's gradient where it is summed in 16 bits."""
        if not self.is_summed or self._wide or self.dtype.itemsize >= 4 or not self.pieces.head.few_labels():
            return None
        if self.kind not in (WEIGHT, WEIGHT_T):
            return None
        return NarrowSum(self.pieces)

    def _other_factor(self) -> Node:
        """What the gradient is multiplied with: [V, M] for the hidden states', [N, M] for the weight's."""
        left, right = args_of(self.node)[:2]
        if self.kind == WEIGHT_T:
            return self._transposed(self.pieces.factor(left))
        return self.pieces.factor(right)

    @property
    def sum_dtype(self) -> torch.dtype:
        """That in which pieces are put together."""
        return torch.float32 if self._wide else self.dtype

    @property
    def beside(self) -> tuple[list[Node], int]:
        """(the labels whose entries are left out of the sum, if any are, how many rows are made beside it)"""
        return ([], 0) if self._beside is None else (self._beside.head_labels, self._beside.often)

    def is_made(self, out: Node, *beside: Node) -> None:
        """All pieces have been added, and what is left out is `beside`: see `NarrowSum.is_made`."""
        if self.kind == BIAS:
            self._parts = [out]
            return
        self._out = out
        if self._beside is not None:
            assert self.operand is not None
            self._beside.is_made(self.node, self.operand, *beside)

    def goes_on(self, out: Node) -> None:
        """Add to a sum that was begun for another head, or side."""
        self._out = out

    @property
    def out(self) -> Node | None:
        """What is made so far."""
        return self._out

    @property
    def writes_gradient(self) -> bool:
        """Whether `add` writes what it is given, for a time."""
        return self._beside is not None

    def add(self, dz: Node, piece: Range, last: bool) -> tuple[Node, Node]:
        """Take in the gradient of a piece of the logits. Returns what is then made, and that gradient.

        Args:
            dz: the gradient.
            piece: which one.
            last: whether nobody reads dz thereafter.
        """
        if self.kind == BIAS:
            return self._add_bias(dz, piece), dz
        assert self.operand is not None
        other = self.operand
        out = self._empty(other) if self._out is None else self._out
        if self._beside is not None:
            begun = self._out is not None
            self._out, dz = self._beside.add(self.node, other, out, dz, piece, begun, last)
            return self._out, dz
        left = dz if self.kind == HIDDEN else self._transposed(dz)
        if self.is_summed:
            other = self.pieces.rows(other, piece, [])
            limit = self.pieces.limit(piece)
            self._out = into(self.build, out, left, other, accumulate=self._out is not None, **limit)
        elif self._is_packed:
            self._out = self._to_rows(out, left, other, piece)
        else:
            self._out = into(self.build, out, left, other, start=piece.start)
        return self._out, dz

    def _empty(self, operand: Node) -> Node:
        rows = self.pieces.n if self.kind == HIDDEN else self.pieces.head.v
        return empty(self.build, [rows, self._width(operand)], self.sum_dtype, example_of(operand).device)

    def _to_rows(self, out: Node, dz: Node, other: Node, piece: Range) -> Node:
        """The product of a piece goes to the rows of `out` that are the piece's, in the order of pieces."""
        limit = self.pieces.limit(piece)
        made = in_place(self.build, PRODUCT_TO_ROWS, {"out": out}, a=dz, b=other, start=piece.start, **limit)
        return self.build(operator.getitem, made, 1)

    def _width(self, operand: Node) -> Any:
        width = shape_of(operand)[1]
        return width if isinstance(width, int) else self.build(aten.sym_size.int, operand, 1)

    def _add_bias(self, dz: Node, piece: Range) -> Node:
        part = self.build(COLUMN_SUMS, dz, **self.pieces.limit(piece))
        if self.is_summed and self._parts:
            part = self.build(aten.add.Tensor, self._parts.pop(), part)
        self._parts.append(part)
        return part

    def _transposed(self, node: Node) -> Node:
        return self.build(aten.permute.default, node, [1, 0])

    def finish(self, scale: Node | None, of_rows: bool = False) -> Node:
        """The gradient of the whole, times a scalar, as `node` was: see `scaled`."""
        build = self.build
        out = self._out
        if self.kind == BIAS:
            out = self._parts[0] if len(self._parts) == 1 else build(aten.cat.default, self._parts)
        assert out is not None

        def times_scale(x: Node) -> Node:
            if scale is None:
                return x
            if x is self._out and not of_rows:
                return build(TIMES, x, scale)
            return scaled(build, x, scale, of_rows)

        out = times_scale(out)
        if self._is_packed:
            assert self.pieces.packing is not None
            out = self.pieces.packing.put_back(out, self.dtype)
        if self._beside is not None:
            out = self._beside.complete(out, times_scale)
        if self._must_be_copied(out, scale):
            out = build(ONCE_MADE, out, self.dtype, [])
        elif example_of(out).dtype != self.dtype:
            out = build(CAST, out, self.dtype)
        if self.kind == WEIGHT_T:
            out = self._transposed(out)
        return self._in_shape(out)

    def _must_be_copied(self, out: Node, scale: Node | None) -> bool:
        """Whether it was written in place in this graph and anything but operators would read it."""
        if self.kind == BIAS or self._is_packed or (scale is not None and self._beside is None):
            return False
        return example_of(out).dtype != self.dtype or _is_read_by_loops(self.node)

    def _in_shape(self, out: Node) -> Node:
        wanted = shape_of(self.node)
        if len(wanted) == len(shape_of(out)):
            return out
        if self.kind == BIAS:
            size = [s if s == self.pieces.head.v else 1 for s in wanted]
            return self.build(aten.reshape.default, out, size)
        return self.build(aten.unsqueeze.default, out, 0)


def scaled(build: Builder, x: Node, scale: Node, of_rows: bool) -> Node:
    """x times a scalar.

    NOTE 0 stays 0. A scalar that depends on the rows, `of_rows`, may be the inverse of the number of rows
    that were chosen. Where none is, 0 is what the choice gives each row, and not 0 times infinity.
    """
    made = build(aten.mul.Tensor, x, scale)
    if not of_rows:
        return made
    zero = build(aten.full.default, [], 0.0, dtype=example_of(made).dtype, **on(made))
    return build(aten.where.self, build(aten.eq.Scalar, x, 0), zero, made)


def _is_read_by_loops(node: Node) -> bool:
    """Whether anything but the output reads a node, be it through views."""
    return any(
        _is_read_by_loops(user) if user.target in VIEWS else user.op != "output" for user in node.users
    )


def result_dtype(node: Node) -> torch.dtype:
    """The dtype in which a gradient is wanted: that of `node`, or float32 where all cast it to that."""
    own = example_of(node).dtype
    users = list(node.users)
    while users:
        user = users.pop()
        if user.target in VIEWS:
            users += user.users
        elif user.target != CAST or args_of(user)[1] != torch.float32:
            return own
    return torch.float32 if own.itemsize < 4 and node.users else own


def replace(node: Node, new: Node) -> None:
    """Put a node in the place of another, whose dtype it need not have where views and casts read it."""
    node.replace_all_uses_with(new)
    dtype = example_of(new).dtype
    if dtype != example_of(node).dtype:
        _retype(new, dtype)


def _retype(node: Node, dtype: torch.dtype) -> None:
    """Tell the views of a node that its dtype has changed."""
    for user in node.users:
        if user.target in VIEWS:
            user.meta["val"] = user.meta["val"].to(dtype)
            _retype(user, dtype)
