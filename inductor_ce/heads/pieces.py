"""Make the wide nodes of a head for some of its rows, or for some of its columns."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch.fx import Node
from torch.fx.node import map_arg

from .. import ops
from ..common.compat.graphs import IN_MEMORY
from ..graph.builder import Builder
from ..graph.shapes import equal, example_of, shape_of, tensor_of
from ..graph.walk import args_of
from ..ops.gemm import ALIGNED
from ..ops.products import ALIGN_ROWS, LOGITS, ONCE_MADE
from . import sizes
from .calls import (
    divergence_call,
    divergence_grad_call,
    grad_call,
    is_row_gradient,
    is_side_gradient,
    stats_call,
)
from .factors import has_16_bit_factors, in_16_bits
from .find import Head, NoHead, Product, source_of_exit
from .kinds import CAST, is_pointwise, vocab_axis
from .nodes import on
from .packing import Packing
from .ranges import Range
from .row_programs import OfRows

aten = torch.ops.aten

ROWS, COLUMNS = 0, 1


class Pieces:
    """The parts of one head, cut along rows or along columns.

    Args:
        build: makes nodes.
        head: the head.
        dim: ROWS or COLUMNS, along which it is cut.

    Attributes:
        packing: how rows that count come before others, where they do.
        weights: for rows and classes, as they are made for a piece; others are cut.

    Raises:
        NoHead: something that the head reads cannot be cut.
    """

    def __init__(self, build: Builder, head: Head, dim: int):
        self.build, self.head, self.dim = build, head, dim
        self.packing: Packing | None = None
        self.weights: dict[Node, Node] = {}
        self._in_16_bits = has_16_bit_factors(head.products)
        others = head.teacher.products if head.teacher else []
        self._is_narrow = dict.fromkeys(head.products, self._in_16_bits)
        self._is_narrow |= dict.fromkeys(others, bool(others) and has_16_bit_factors(others))
        self._factors = {
            p: (self._as_factor(p.hidden, narrow), self._as_factor(p.columns, narrow))
            for p, narrow in self._is_narrow.items()
        }
        hidden, _ = self._factors[head.products[0]]
        self.n = head.n if isinstance(head.n, int) else build(aten.sym_size.int, hidden, 0)
        self._before_statistics = head.before_statistics()
        self._whole: dict[tuple[Node, int], Node] = {}
        self._shared: dict[tuple[Node, Node], Node] = {}

    def factor(self, node: Node) -> Node:
        """What a product of the head reads, [1, A, B] or [A, B], as [A, B]."""
        return self._as_factor(node, self._in_16_bits)

    def _as_factor(self, node: Node, narrow: bool) -> Node:
        if narrow:
            node = in_16_bits(self.build, node)
        return node if len(shape_of(node)) == 2 else self.build(aten.squeeze.dim, node, 0)

    def cut(self, node: Node, piece: Range, dim: int | None = None) -> Node:
        """A piece of a matrix, or of a vector, along a dimension of its own."""
        if self.packing is not None:
            return self.packing.cut(node, piece, self.dim if dim is None else dim)
        return self.build(aten.slice.Tensor, node, self.dim if dim is None else dim, piece.start, piece.end)

    def counted(self, node: Node, piece: Range, dim: int = 0, otherwise: float = 0.0) -> Node:
        """The same, with another value in rows that do not count."""
        if self.packing is None:
            return self.cut(node, piece, dim)
        return self.packing.counted(node, piece, dim, otherwise)

    def rows(self, factor: Node, piece: Range, after: list[Node]) -> Node:
        """The rows of a piece of what products read, [N, D]."""
        if self.packing is None:
            return self.cut(factor, piece, 0)
        return self.packing.taken(factor, piece, after)

    def limit(self, piece: Range) -> dict[str, Any]:
        """What products are given to compute of a piece the rows that count."""
        return {} if self.packing is None else self.packing.limit(piece)

    def in_order(self, node: Node, dim: int) -> Node:
        """What pieces made one after another, along the dimension of rows, in the order of the rows."""
        return node if self.packing is None else self.packing.in_order(node, dim)

    def whole(self, parts: list[Node]) -> Node:
        """Statistics of all rows, of pieces of rows. Those of rows that do not count are finite."""
        made = self.in_order(self.build(aten.cat.default, parts, 1), 1)
        return made if self.packing is None else self.packing.all_counted(made, 1.0)

    # Forward

    def forward(self, piece: Range, after: list[Node]) -> dict[Node, Node]:
        """The piece of each wide node that lies before the statistics, once what is in `after` is made."""
        made = {product.node: self.product(product, piece, after) for product in self.head.products}
        for node in self._before_statistics:
            made[node] = self._made(node, made, piece)
        return made

    def waited(self, after: list[Node]) -> list[Node]:
        """What is there when all in `after` is.

        A later piece writes to the sums in `after`, and Inductor would count it a reader of what had waited
        for them itself: of several logits, which would then not be overwritten.
        """
        if not after:
            return []
        one = self.build(aten.full.default, [1], 0.0, dtype=torch.float32, **on(self.head.products[0].node))
        return [self.build(ONCE_MADE, one, torch.float32, after)]

    def product(self, product: Product, piece: Range, after: list[Node]) -> Node:
        """The piece of a product of the head, or of another of the same rows."""
        build, bias = self.build, product.bias
        hidden, columns, own = self.factors_of(product)
        if self.dim == ROWS:
            hidden = self.rows(hidden, piece, after)
        else:
            columns = self.cut(columns, piece)
            if bias is not None and equal(shape_of(bias)[0], self.head.v):
                bias = self.cut(bias, piece, 0)
        return build(LOGITS, hidden, columns, bias, after, *own, **self.limit(piece))

    def wide_gradients(
        self,
        made: dict[Node, Node],
        piece: Range,
        narrow: dict[Node, tuple[Node, ...]],
        op: Any = ops.ROW_GRAD,
    ) -> dict[Node, Node]:
        """The same of what depends on gradients that operators make, of whose `narrow_args` pieces are given.

        Those of one side are made by `op`.
        """
        made, of_sides = dict(made), dict[Node, Node]()
        if self.head.divergences:  # one loop makes, and adds, what several operators do
            op = ops.ROW_GRAD_AGAIN
        for node in self.head.wide:
            if node in made:
                continue
            if node.target == ops.ROW_GRAD:
                made[node] = self.grad(op, node, made[grad_call(node).z], piece, *narrow[node])
            elif is_side_gradient(node):
                grad, side = args_of(node)
                if grad not in of_sides:
                    of_sides[grad] = self._side_gradients(grad, made, piece, narrow[grad])
                made[node] = self.build(operator.getitem, of_sides[grad], side)
            else:
                made[node] = self._made(node, made, piece)
        return made

    def in_memory(self, dz: Node) -> Node:
        """The gradient of a piece, as the products read it: from memory, in rows that are aligned.

        One of the products reads it transposed. Inductor would give that one a copy.
        """
        if not is_row_gradient(dz) and self.head.v % ALIGNED:
            dz = self.build(ALIGN_ROWS, dz)
        dz.meta[IN_MEMORY] = True
        return dz

    def _made(self, node: Node, made: dict[Node, Node], piece: Range) -> Node:
        if not is_pointwise(node):
            return made[args_of(node)[0]]
        return self.pointwise(node, lambda s: made[s] if s in made else self.part(s, node, piece))

    def pointwise(self, node: Node, part: Callable[[Node], Node]) -> Node:
        """A pointwise node on the pieces that `part` gives of its sources, laid out as these are."""
        args, kwargs = map_arg((node.args, node.kwargs), part)
        kwargs = {name: value for name, value in kwargs.items() if name != "memory_format"}
        return self.build(node.target, *args, **kwargs)

    def part(self, source: Node, user: Node, piece: Range) -> Node:
        """What a wide node reads beside wide nodes, as the piece of a matrix that it reads there."""
        if tensor_of(source) is None or not shape_of(source):
            return source
        rows, columns = self._spread(source, user)
        whole = self._as_matrix(self._in_all_rows(source, user) if rows else source, rows, columns)
        if not (rows, columns)[self.dim]:
            return whole
        if self.packing is not None and not columns and example_of(source).is_floating_point():
            # NaN of a row that does not count would be one of the weight's gradient.
            whole = self.packing.all_counted(whole, 1.0, 0)
            whole.meta[IN_MEMORY] = True
        return self.cut(whole, piece)

    def _spread(self, source: Node, user: Node) -> tuple[bool, bool]:
        """Whether it differs from row to row, and from column to column."""
        shape, of_user = shape_of(source), shape_of(user)
        shape = (1,) * (len(of_user) - len(shape)) + tuple(shape)
        axis = vocab_axis(user)
        assert axis is not None, "wide nodes have the vocabulary axis"
        some = any(not equal(s, 1) for i, s in enumerate(shape) if i != axis)
        return some, not equal(shape[axis], 1)

    def _in_all_rows(self, source: Node, user: Node) -> Node:
        """What rows share, such as those of a sequence, once for each of them."""
        axis, of_user = vocab_axis(user), shape_of(user)
        shape = (1,) * (len(of_user) - len(shape_of(source))) + tuple(shape_of(source))
        if all(i == axis or equal(s, u) for i, (s, u) in enumerate(zip(shape, of_user, strict=True))):
            return source
        size = sizes.of_shape(source.graph, [1 if i == axis else u for i, u in enumerate(of_user)])
        if size is None or axis is None or not equal(shape[axis], 1):
            raise NoHead("the logits are combined with what differs between some of the rows only")
        if (source, user) not in self._shared:
            self._shared[source, user] = self.build(aten.expand.default, source, size)
        return self._shared[source, user]

    def _as_matrix(self, source: Node, rows: bool, columns: bool) -> Node:
        key = (source, 2 * rows + columns)
        if key not in self._whole:
            size = [self.n if rows else 1, self.head.v if columns else 1]
            self._whole[key] = self.build(aten.reshape.default, source, size)
        return self._whole[key]

    def stats(self, node: Node, z: Node, piece: Range, rows: ops.Rows | None = None) -> Node:
        """The statistics `node` of a piece; other rows of them, if given."""
        which = stats_call(node).which if rows is None else rows.encode()
        given = (z, *self._constants(node, piece), which)
        if self.packing is not None:
            return self.build(ops.SOME_ROW_STATS, *given, self.packing.left, piece.index)
        return self.build(ops.ROW_STATS, *given, **node.kwargs)

    def stats_and_gradient(
        self, piece: Range, after: list[Node], program: OfRows, chain: str
    ) -> tuple[dict[Node, Node], dict[Node, Node]]:
        """The only statistics of a piece, and what exits read, which is one gradient; each by its node."""
        (node,) = self.head.stats
        z = self.product(self.head.products[0], piece, after)
        given = [self.cut(x, piece) if shape_of(x) else x for x in program.given]
        text, more = program.program, []
        if self.packing is not None:
            given.append(self.cut(self.packing.counts, piece))
            text, more = text.where_given(), [self.packing.left, piece.index]
        op = ops.SOME_ROW_STATS_GRAD if more else ops.ROW_STATS_GRAD
        constants = *self._constants(node, piece), stats_call(node).which
        chained = {"chain": chain} if chain else {}
        both = self.build(op, z, *constants, given, text.encode(), *more, **chained)
        packed, dz = (self.build(operator.getitem, both, i) for i in range(2))
        return {node: packed}, {source_of_exit(exit_, self.head): dz for exit_ in self.head.exits}

    def factors_of(self, product: Product) -> tuple[Node, Node, list[torch.dtype]]:
        """(hidden states [N, D], columns [D, V], the dtype of their product if it is not that of both)"""
        own = [example_of(product.node).dtype] if self._is_narrow[product] else []
        return *self._factors[product], own

    def divergence(self, node: Node, made: dict[Node, Node], piece: Range, *rows: list[Node]) -> Node:
        """The `divergence` of a piece, of whose sides the maxima and the sums are given."""
        call = divergence_call(node)
        return self.build(ops.DIVERGENCE, self._sides(call.zs, made, piece), *rows, call.which)

    def _side_gradients(
        self, node: Node, made: dict[Node, Node], piece: Range, narrow: tuple[Node, ...]
    ) -> Node:
        call, (*ms, packed, upstream) = divergence_grad_call(node), narrow
        zs = self._sides(call.zs, made, piece)
        return self.build(ops.DIVERGENCE_GRAD, zs, ms, packed, upstream, call.which)

    def _sides(self, zs: list[Node], made: dict[Node, Node], piece: Range) -> list[Node]:
        """The logits of the sides, [n, V], those that are given cut."""
        return [made[z] if z in made else self.cut(z, piece, ROWS) for z in zs]

    def grad(self, op: Any, node: Node, z: Node, piece: Range, m: Node, coefficients: Node) -> Node:
        """The gradient `node` of a piece, by `op`, of its logits, maxima [n] and coefficients [K, n]."""
        labels, weights = self._constants(node, piece)
        given = (z, labels, weights, m, coefficients, grad_call(node).which)
        if self.packing is not None and op == ops.ROW_GRAD:
            return self.build(ops.SOME_ROW_GRAD, *given, self.packing.left, piece.index)
        return self.build(op, *given)

    def _constants(self, node: Node, piece: Range) -> tuple[list[Node], list[Node]]:
        """The labels and weights of `row_stats` or `row_grad`, for a piece."""
        labels, weights = args_of(node)[1:3]
        if self.dim == ROWS:
            own = [q if len(shape_of(q)) == 1 else self._weight(q, piece) for q in weights]
            return [self.counted(y, piece, 0, -1) for y in labels], own
        own = [self.cut(q, piece, len(shape_of(q)) - 1) for q in weights]
        return [self._shifted(y, piece) for y in labels], own

    def _weight(self, q: Node, piece: Range) -> Node:
        return self.weights[q] if q in self.weights else self.cut(q, piece, 0)

    def _shifted(self, label: Node, piece: Range) -> Node:
        """Labels relative to the first of the columns."""
        wide = self.build(CAST, label, torch.int64)
        return self.build(aten.sub.Tensor, wide, piece.start)
