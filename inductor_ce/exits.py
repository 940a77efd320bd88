"""The gradients that a head gives, summed from its pieces or put together from them."""

from __future__ import annotations

import torch
from torch.fx import Node

from .heads import BIAS, HIDDEN, WEIGHT_T, source_of_exit
from .pieces import ROWS, Pieces, Range, empty, into
from .rows import shape_of
from .timeline import tensor_of

aten, prims = torch.ops.aten, torch.ops.prims

_VIEWS = {
    *(aten.permute.default, aten.t.default, aten.transpose.int, aten.view.default, aten.reshape.default),
    *(aten.unsqueeze.default, aten.squeeze.dim, aten.squeeze.dims),
}


class Exit:
    """One gradient, such as that of the weight: an accumulator, to which each piece gives its part.

    Cut along the dimension that a product sums over, it is a sum, else it is put together.

    Args:
        pieces: of the head.
        node: the product, or the sum, that made the gradient of the whole.
        wide_sum: whether to sum in float32 what is 16-bit.
    """

    def __init__(self, pieces: Pieces, node: Node, wide_sum: bool):
        self.pieces, self.build, self.node = pieces, pieces.build, node
        self.kind = pieces.head.exits[node]
        self.source = source_of_exit(node, pieces.head)
        self.is_summed = (pieces.dim == ROWS) != (self.kind == HIDDEN)
        self.dtype = result_dtype(node)
        self._wide = wide_sum and self.is_summed and self.dtype.itemsize < 4
        self._out: Node | None = None
        self._parts: list[Node] = []
        self._operand = None if self.kind == BIAS else self._other_factor()

    def _other_factor(self) -> Node:
        """What the gradient is multiplied with: [V, M] for that of the hidden states, [N, M] for the weight's."""
        left, right = self.node.args[:2]
        if self.kind == WEIGHT_T:
            return self._transposed(self.pieces.matrix(left))  # type: ignore[arg-type]
        return self.pieces.matrix(right)  # type: ignore[arg-type]

    def add(self, dz: Node, piece: Range, first: bool) -> Node:
        """Take in the gradient of a piece of the logits. Returns what is then made."""
        if self.kind == BIAS:
            return self._add_bias(dz)
        build, pieces = self.build, self.pieces
        assert self._operand is not None
        if self._out is None:
            self._out = self._empty()
        other = self._operand
        if self.kind == HIDDEN:
            left = dz
            other = other if pieces.dim == ROWS else pieces.cut(other, piece, 0)
        else:
            left = self._transposed(dz)
            other = pieces.cut(other, piece, 0) if pieces.dim == ROWS else other
        start = 0 if self.is_summed else piece.start
        self._out = into(build, self._out, left, other, start=start, accumulate=self.is_summed and not first)
        return self._out

    def _empty(self) -> Node:
        build, pieces, operand = self.build, self.pieces, self._operand
        example = tensor_of(operand)
        assert operand is not None and example is not None
        rows = pieces.n if self.kind == HIDDEN else pieces.head.v
        width = example.shape[1]
        if not isinstance(width, int):
            width = build(aten.sym_size.int, operand, 1)  # type: ignore[assignment]
        dtype = torch.float32 if self._wide else self.dtype
        return empty(build, [rows, width], dtype, example.device)

    def _add_bias(self, dz: Node) -> Node:
        part = self.build(aten.sum.dim_IntList, dz, [0], False, dtype=torch.float32)
        if self.is_summed and self._parts:
            part = self.build(aten.add.Tensor, self._parts.pop(), part)
        self._parts.append(part)
        return part

    def _transposed(self, node: Node) -> Node:
        return self.build(aten.permute.default, node, [1, 0])

    def finish(self, scale: Node | None) -> Node:
        """The gradient of the whole, times a scalar, as `node` was."""
        build = self.build
        if self.kind == BIAS:
            out = self._parts[0] if len(self._parts) == 1 else build(aten.cat.default, self._parts)
        else:
            out = self._out  # type: ignore[assignment]
        if scale is not None:
            out = build(aten.mul.Tensor, out, scale)
        if tensor_of(out).dtype != self.dtype:  # type: ignore[union-attr]
            out = build(prims.convert_element_type.default, out, self.dtype)
        if self.kind == WEIGHT_T:
            out = self._transposed(out)
        return self._in_shape(out)

    def _in_shape(self, out: Node) -> Node:
        wanted = shape_of(self.node)
        if len(wanted) == len(shape_of(out)):
            return out
        if self.kind == BIAS:
            size = [s if s == self.pieces.head.v else 1 for s in wanted]
            return self.build(aten.reshape.default, out, size)
        return self.build(aten.unsqueeze.default, out, 0)


def result_dtype(node: Node) -> torch.dtype:
    """The dtype in which a gradient is wanted: that of `node`, or float32 where all cast it to that."""
    own = tensor_of(node).dtype  # type: ignore[union-attr]
    users = list(node.users)
    while users:
        user = users.pop()
        if user.target in _VIEWS:
            users += user.users
        elif user.target != prims.convert_element_type.default or user.args[1] != torch.float32:
            return own
    return torch.float32 if own.itemsize < 4 and node.users else own


def replace(node: Node, new: Node) -> None:
    """Put a node in the place of another, whose dtype it need not have where views and casts read it."""
    node.replace_all_uses_with(new)
    example, was = tensor_of(new), tensor_of(node)
    if example is not None and was is not None and example.dtype != was.dtype:
        _retype(new, example.dtype)


def _retype(node: Node, dtype: torch.dtype) -> None:
    """Tell the views of a node that its dtype has changed."""
    for user in node.users:
        if user.target in _VIEWS:
            user.meta["val"] = user.meta["val"].to(dtype)
            _retype(user, dtype)
