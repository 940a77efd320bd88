"""Sums of several probabilities, entry by entry, and what one class of a row is of such a sum.

Between the parts that are picked and a pick may be functions of each entry, sums over the parts of a batch,
views, rows or classes put beside others, and what is added at some classes of each row, as the attention that
a pointer network gives to the words of its source.
"""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.fx import Node
from torch.fx.node import map_arg

from ..graph.builder import Builder
from ..graph.shapes import equal, example_of, hint, same_shape, shape_of, tensor_of
from ..graph.timeline import INFERENCE
from ..reading import spellings
from ..reading.context import is_labels
from ..reading.steps import View
from ..reading.values import Reading, VocabValue
from ..reading.views import broadcast_operand
from .arrange import size_of

# Functions of each entry, of their arguments with these names.
OF_EACH = (
    *("add", "sub", "rsub", "mul", "div", "neg", "log", "log_to", "exp", "sqrt", "pow", "square", "clamp"),
    *("same", "logaddexp", "where", "masked_fill"),
)
OVER_OTHERS = ("sum", "mean", "logsumexp")
MAX_DEPTH = 12


@dataclass
class Mixture:
    """What a pick is taken of: the nodes between it and the parts that are picked.

    Attributes:
        inner: those that are not made any more where all that is picked of them is.
        parts: what has a value of its own, of which a pick is a loss.
        leaves: these, and others of which entries are picked as they are.
    """

    reading: Reading
    inner: set[Node] = field(default_factory=set)
    parts: set[Node] = field(default_factory=set)
    leaves: set[Node] = field(default_factory=set)

    def covers(self, node: Node, axis: int, depth: int = 0) -> bool:
        """Whether a node is made, entry by entry, of parts and of numbers of rows."""
        if tensor_of(node) is None or self.reading.timeline.edits(node) or depth > MAX_DEPTH:
            return False
        value, kind = self.reading.values.get(node), self._kind(node, axis)
        if isinstance(value, VocabValue) and value.axis == axis and not value.after:
            self.parts.add(node)
            return self._is_leaf(node)
        if kind == "":
            return not example_of(node).requires_grad and self._is_leaf(node)
        self.inner.add(node)
        args = spellings.read(node)[1]  # type: ignore[index]
        position, depth = self.position(node), depth + 1
        if kind == "row":
            return self._stays(_row(node, axis), position)  # type: ignore[arg-type]
        if kind == "reshape":
            return self.covers(args["input"], len(shape_of(args["input"])) - 1, depth)
        if kind == "each":
            return all(self._is_operand(each, node, axis, depth) for each in node.all_input_nodes)
        if kind == "others":
            return self.covers(args["input"], axis + 1, depth)
        if kind == "stack":
            return all(self.covers(each, axis - 1, depth) for each in args["tensors"])
        if kind == "copies":
            kept = self._stays(args["index"], position) and self._stays(args["src"], position)
            return kept and self.covers(args["input"], axis, depth)
        if kind == "rows":
            return all(self.covers(each, axis, depth) for each in args["tensors"])
        if kind == "cat":
            return all(self._is_beside(each, node, axis, depth) for each in args["tensors"])
        return kind == "zeros"

    def position(self, node: Node) -> int:
        return self.reading.timeline.position[node]

    def _kind(self, node: Node, axis: int) -> str:
        """How a node is made of others, "" where it is not read."""
        spelled, timeline = spellings.read(node), self.reading.timeline
        if spelled is None or timeline.grad_mode(node) == INFERENCE:
            return ""
        (step, args), shape = spelled, shape_of(node)
        source: Any = args.get("input")
        dim, rank = spellings.one_dim(args.get("dim", 0)), len(shape)
        if _row(node, axis) is not None:
            return "row"
        if step.view is View.RESHAPE:
            flat = axis == rank - 1 and equal(shape[axis], shape_of(source)[-1])
            return "reshape" if flat else ""
        if step.name in OF_EACH:
            return "each"
        if step.name == "scatter_add":
            return "copies" if _copies(args, shape) and axis == rank - 1 else ""
        if step.name == "zeros":
            return "zeros"
        if not isinstance(dim, int):
            return ""
        if step.name in OVER_OTHERS and args.get("dim") is not None and not args.get("keepdim"):
            return "others" if dim % (rank + 1) <= axis else ""
        if step.name == "stack":
            return "stack" if dim % rank < axis else ""
        if step.name == "cat":
            return "cat" if dim % rank == axis else "rows"
        return ""

    def _is_operand(self, node: Node, reader: Node, axis: int, depth: int) -> bool:
        """Whether it has the shape of what it is an argument of, or broadcasts to it along the classes."""
        if tensor_of(node) is None:
            return False
        own, shape, position = shape_of(node), shape_of(reader), self.position(reader)
        if same_shape(own, shape):
            return self.covers(node, axis, depth)
        alone = not own or (len(own) == len(shape) and equal(own[axis], 1) and not equal(shape[axis], 1))
        return alone and self._stays(node, position)

    def _is_beside(self, node: Node, cat: Node, axis: int, depth: int) -> bool:
        """Whether it is covered, or has few of the classes."""
        size, whole = hint(shape_of(node)[axis]), hint(shape_of(cat)[axis])
        if 0 < 2 * size <= whole:
            return self._is_leaf(node)
        return size > 0 and self.covers(node, axis, depth)

    def _is_leaf(self, node: Node) -> bool:
        self.leaves.add(node)
        return self._stays(node, self.position(node) + 1)

    def _stays(self, node: Node, since: int) -> bool:
        """Whether it is at all picks what it is at a position."""
        return self.reading.timeline.unchanged(node, since)

    def is_closed(self, picks: set[Node]) -> bool:
        """Whether nothing but picks reads what stands between them and the parts."""
        return all(user in self.inner or user in picks for node in self.inner for user in node.users)

    def pick(self, build: Builder, node: Node, index: Node, axis: int) -> Node:
        """torch.gather(node, axis, index), of what the node is made of."""
        if node in self.leaves:
            return build(torch.gather, node, axis, index)
        picked = self._pick(build, node, index, axis)
        dtype = example_of(node).dtype
        return picked if example_of(picked).dtype == dtype else build("to", picked, dtype)

    def _pick(self, build: Builder, node: Node, index: Node, axis: int) -> Node:
        kind, shape = self._kind(node, axis), shape_of(node)
        args = spellings.read(node)[1]  # type: ignore[index]
        of = functools.partial(self.pick, build)
        source: Any = args.get("input")
        if kind == "row":
            return _row(node, axis)  # type: ignore[return-value]
        if kind == "reshape":
            last = len(shape_of(source)) - 1
            sizes = [*(size_of(build, source, i) for i in range(last)), size_of(build, index, axis)]
            picked = of(source, build("reshape", index, sizes), last)
            return build("reshape", picked, [size_of(build, index, i) for i in range(len(shape))])
        if kind == "each":
            whole = {each: same_shape(shape_of(each), shape) for each in node.all_input_nodes}
            sources = {each: of(each, index, axis) if own else each for each, own in whole.items()}
            args, kwargs = map_arg((node.args, node.kwargs), sources.__getitem__)
            return build(node.target, *args, **kwargs)
        if kind == "others":
            dim = spellings.one_dim(args["dim"]) % len(shape_of(source))
            sizes = [-1] * len(shape_of(source))
            sizes[dim] = size_of(build, source, dim)
            wider = build("expand", build("unsqueeze", index, dim), *sizes)
            return build.again(node, {source: of(source, wider, axis + 1)})
        if kind == "stack":
            dim = args.get("dim", 0) % len(shape)
            own = [build("select", index, dim, k) for k in range(len(args["tensors"]))]
            made = [of(*each, axis - 1) for each in zip(args["tensors"], own, strict=True)]
            return build(torch.stack, made, dim)
        if kind == "copies":
            picked, v = of(source, index, axis), size_of(build, node, axis)
            return build(torch.add, picked, _copied(build, args["index"], args["src"], index, v))
        if kind == "rows":
            parts, dim = args["tensors"], args.get("dim", 0) % len(shape)
            cut = build(torch.split, index, [size_of(build, part, dim) for part in parts], dim)
            pieces = [build(operator.getitem, cut, k) for k in range(len(parts))]
            return build(torch.cat, [of(*each, axis) for each in zip(parts, pieces, strict=True)], dim)
        if kind == "cat":
            return self._of_ranges(build, args["tensors"], index, axis)
        return build(torch.zeros_like, index, dtype=example_of(node).dtype)

    def _of_ranges(self, build: Builder, parts: Sequence[Node], index: Node, axis: int) -> Node:
        """Of the tensor that has the class, whose own classes begin behind those of all before it.

        A label outside is outside the first or the last.
        """
        picked: Node = index
        start: Any = 0
        for k, part in enumerate(parts):
            own = build(torch.sub, index, start) if k else index
            reached = build(torch.ge, own, 0)
            local = build(torch.where, reached, own, 0) if k else own
            size = size_of(build, part, axis)
            if k < len(parts) - 1:
                local = build(torch.where, build(torch.lt, own, size), local, 0)
                start = build(operator.add, start, size) if isinstance(size, Node) else start + size
            here = self.pick(build, part, local, axis)
            picked = build(torch.where, reached, here, picked) if k else here
        return picked


def _row(node: Node, axis: int) -> Node | None:
    """What a node broadcasts along the classes."""
    operand = broadcast_operand(node)
    if operand is None and spellings.is_step(node, "expand"):
        operand = node.all_input_nodes[0]
    if operand is None or len(shape_of(operand)) != len(shape_of(node)):
        return None
    pairs = zip(shape_of(operand), shape_of(node), strict=True)
    fits = all(equal(a, 1) or equal(a, b) for a, b in pairs)
    return operand if fits and equal(shape_of(operand)[axis], 1) else None


def _copies(args: dict[str, Any], shape: tuple[Any, ...]) -> bool:
    """Whether something is added at some of the last dimension's classes, as many in each row."""
    index, dim = args.get("index"), args.get("dim")
    src: Any = args.get("src")
    if not is_labels(index) or tensor_of(src) is None or dim not in (-1, len(shape) - 1):
        return False
    return same_shape(shape_of(index), shape_of(src)) and same_shape(shape_of(index)[:-1], shape[:-1])


def _copied(build: Builder, classes: Node, src: Node, index: Node, v: Any) -> Node:
    """What `scatter_add` adds at the picked classes; NaN where one of a row's is outside."""
    held, added = build("unsqueeze", classes, -1), build("unsqueeze", src, -1)
    hit = build(torch.eq, held, build("unsqueeze", index, -2))
    outside = build(torch.logical_or, build(torch.lt, held, 0), build(torch.ge, held, v))
    found = build(torch.where, outside, math.nan, build(torch.where, hit, added, 0.0))
    return build(torch.sum, found, -2)
