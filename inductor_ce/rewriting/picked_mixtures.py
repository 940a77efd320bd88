"""Labels picked after probabilities are added or averaged: a pick of a sum is the sum of picks.

An ensemble, a mixture of softmaxes, or a pointer network takes log(softmax(a) + softmax(b)), and of it one
class a row. Where picks are all that reads the mixture, they are taken of its parts, which are losses.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch.fx import Graph, Node

from .. import algebra
from ..common.failsafe import attempt
from ..common.options import Options
from ..graph.builder import Builder
from ..graph.shapes import equal, example_of, hint, same_shape, shape_of, tensor_of
from ..graph.timeline import INFERENCE
from ..reading import spellings
from ..reading.arithmetic import one_dim
from ..reading.context import Context, is_labels
from ..reading.indexing import label_axis
from ..reading.losses import REDUCTIONS, modernised
from ..reading.steps import View
from ..reading.values import LossValue, Reading, RowValue, VocabValue, row_expr
from ..reading.views import broadcast_operand
from .arrange import size_of
from .rewrite import beside_original

LEFT = "a mixture is picked from as it was written"

# Functions of each entry, of their arguments with these names.
OF_EACH = (
    *("add", "sub", "rsub", "mul", "div", "neg", "log", "log_to", "exp", "sqrt", "pow", "square", "clamp"),
    *("same", "logaddexp", "where", "masked_fill"),
)
OVER_OTHERS = ("sum", "mean", "logsumexp")
MAX_DEPTH = 12


@dataclass
class Mixture:
    """What a pick is taken of: the nodes between it and the parts that are picked, each at its depth."""

    reading: Reading
    inner: set[Node] = field(default_factory=set)
    parts: set[Node] = field(default_factory=set)

    def covers(self, node: Node, axis: int, depth: int = 0) -> bool:
        """Whether a node is a function of each entry of parts that are read, and of numbers of rows."""
        example, timeline = tensor_of(node), self.reading.timeline
        if example is None or depth > MAX_DEPTH or not timeline.unchanged(node, node, len(timeline.nodes)):
            return False
        value = self.reading.values.get(node)
        if isinstance(value, VocabValue) and value.axis == axis and not value.after:
            self.parts.add(node)
            return True
        spelled = spellings.read(node)
        if spelled is None or timeline.grad_mode(timeline.position[node]) == INFERENCE:
            return self._is_given(node)
        step, args = spelled
        shape, row = shape_of(node), _row(node, axis)
        if row is not None:
            self.inner.add(node)
            return True
        if step.view is View.RESHAPE:
            source = args["input"]
            last = len(shape_of(source)) - 1
            self.inner.add(node)
            flat = axis == len(shape) - 1 and equal(shape[axis], shape_of(source)[last])
            return flat and self.covers(source, last, depth + 1)
        if step.name in OF_EACH:
            self.inner.add(node)
            return all(self._is_operand(each, shape, axis, depth + 1) for each in node.all_input_nodes)
        dim = one_dim(args.get("dim"))
        if step.name in OVER_OTHERS and isinstance(dim, int) and not args.get("keepdim"):
            source = args["input"]
            dim %= len(shape_of(source))
            self.inner.add(node)
            return dim <= axis and self.covers(source, axis + 1, depth + 1)
        if step.name == "stack" and isinstance(args.get("dim", 0), int):
            dim = args.get("dim", 0) % len(shape)
            tensors = args["tensors"]
            self.inner.add(node)
            return dim < axis and all(self.covers(each, axis - 1, depth + 1) for each in tensors)
        return self._is_given(node)

    def _is_operand(self, node: Node, shape: tuple[Any, ...], axis: int, depth: int) -> bool:
        """Whether it has the shape of what it is an argument of, or broadcasts to it along the classes."""
        if tensor_of(node) is None:
            return False
        own = shape_of(node)
        if same_shape(own, shape):
            return self.covers(node, axis, depth)
        return not own or (len(own) == len(shape) and equal(own[axis], 1) and not equal(shape[axis], 1))

    def _is_given(self, node: Node) -> bool:
        """Whether it is a tensor of which no gradient is wanted, of which entries may be picked as well."""
        return not example_of(node).requires_grad

    def is_closed(self, picks: set[Node]) -> bool:
        """Whether nothing but picks reads what stands between them and the parts."""
        return all(user in self.inner or user in picks for node in self.inner for user in node.users)


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


def pick_parts(graph: Graph, reading: Reading, options: Options) -> bool:
    """Pick of the parts of mixtures, where that may be. Returns whether there are any."""
    done = False
    for node in list(reading.timeline.nodes):
        source = _picked(reading, node)
        if source is None or not _may_be(reading, node, source, options):
            continue
        done |= attempt(LEFT, _rewrite, graph, reading, node, source, options.verify)[1] is None
    return done


def _picked(reading: Reading, node: Node) -> Node | None:
    """What one class of each row is picked of, if that has no value."""
    spelled = spellings.read(node)
    if spelled is None or spelled[0].name not in ("gather", "nll_loss", "getitem"):
        return None
    (step, args), known = spelled, reading.on_logits(node)
    source: Any = args.get("input")
    is_read = isinstance(known, (RowValue, LossValue)) and algebra.is_normalised(row_expr(known))
    if tensor_of(source) is None or is_read:
        return None
    if isinstance(reading.values.get(source), VocabValue) or len(shape_of(source)) < 2:
        return None
    axis = _axis(reading, node, source)
    if axis is None:
        return None
    y = args.get("target")
    if step.name == "nll_loss":
        args = modernised(args)
        if args.get("weight") is not None or args.get("reduction", "mean") not in REDUCTIONS:
            return None
    else:
        y = args.get("index") if step.name == "gather" else args["index"][axis]
    if not is_labels(y):
        return None
    rows = tuple(s for i, s in enumerate(shape_of(source)) if i != axis)
    labelled = tuple(s for i, s in enumerate(shape_of(y)) if i != axis or step.name != "gather")
    return source if same_shape(labelled, rows) else None


def _axis(reading: Reading, node: Node, source: Node) -> int | None:
    """The dimension of the classes."""
    step, args = spellings.read(node)  # type: ignore[misc]
    if step.name == "nll_loss":
        return 1
    if step.name == "getitem":
        index = args.get("index")
        axis = label_axis(Context(reading, node), source, index) if isinstance(index, tuple) else None
        return axis if axis == len(shape_of(source)) - 1 == 1 else None
    dim = args.get("dim")
    return dim % len(shape_of(source)) if isinstance(dim, int) else None


def _may_be(reading: Reading, node: Node, source: Node, options: Options) -> bool:
    axis, timeline = _axis(reading, node, source), reading.timeline
    assert axis is not None
    mixture = Mixture(reading)
    if hint(shape_of(source)[axis]) < options.min_vocab or not mixture.covers(source, axis):
        return False
    modes = {timeline.grad_mode(timeline.position[each]) for each in (node, *mixture.inner)}
    position = timeline.position
    same_autocast = all(timeline.same_autocast(position[n], position[node]) for n in mixture.inner)
    picks = {user for user in source.users if _picked(reading, user) is source}
    return (
        len(modes) == 1
        and same_autocast
        and bool(mixture.parts)
        and source in mixture.inner
        and mixture.is_closed(picks)
    )


def _rewrite(graph: Graph, reading: Reading, node: Node, source: Node, verify: bool) -> None:
    step, args = spellings.read(node)  # type: ignore[misc]
    axis = _axis(reading, node, source)
    assert axis is not None
    build = Builder(graph, node, like=node)
    try:
        if step.name == "gather":
            result = _pick(build, reading, source, args["index"], axis)
        elif step.name == "getitem":
            y = build("to", args["index"][axis], torch.int64)  # counts from the end where it is negative
            y = build(
                torch.where, build(torch.lt, y, 0), build(torch.add, y, size_of(build, source, axis)), y
            )
            result = build("squeeze", _pick(build, reading, source, build("unsqueeze", y, 1), 1), 1)
        else:
            result = _nll_loss(build, reading, source, modernised(args))
        build.tell_gradients(reading.timeline.grad_mode(reading.timeline.position[node]) is True)
    except Exception:
        build.undo()
        raise
    if verify:
        beside_original(graph, node, result)
        return
    node.replace_all_uses_with(result)
    unused = [node]
    while unused:
        gone = unused.pop()
        if not gone.users and (gone is node or spellings.is_repeatable(gone)):
            unused += gone.all_input_nodes
            graph.erase_node(gone)


def _nll_loss(build: Builder, reading: Reading, source: Node, args: dict[str, Any]) -> Node:
    """As torch has it: rows whose label is ignored are 0, and are not counted."""
    y, how = args["target"], args.get("reduction", "mean")
    counts = build(torch.ne, y, args.get("ignore_index", -100))
    index = build("unsqueeze", build("to", build(torch.where, counts, y, 0), torch.int64), 1)
    picked = build("squeeze", _pick(build, reading, source, index, 1), 1)
    rows = build(torch.where, counts, build(torch.neg, picked), 0.0)
    if how == "none":
        return rows
    total = build(torch.sum, rows)
    return total if how == "sum" else build(torch.div, total, build(torch.sum, counts))


def _pick(build: Builder, reading: Reading, node: Node, index: Node, axis: int) -> Node:
    """torch.gather(node, axis, index), of the parts that a node is made of."""
    value = reading.values.get(node)
    spelled = spellings.read(node)
    if spelled is None or (isinstance(value, VocabValue) and value.axis == axis):
        return build(torch.gather, node, axis, index)
    (step, args), shape, row = spelled, shape_of(node), _row(node, axis)
    if row is not None:
        return row
    if step.view is View.RESHAPE:
        source = args["input"]
        last = len(shape_of(source)) - 1
        sizes = [*(size_of(build, source, i) for i in range(last)), shape_of(index)[-1]]
        picked = _pick(build, reading, source, build("reshape", index, sizes), last)
        return build("reshape", picked, [size_of(build, index, i) for i in range(len(shape))])
    if step.name in OF_EACH:
        sources = {}
        for each in node.all_input_nodes:
            whole = same_shape(shape_of(each), shape)
            sources[each] = _pick(build, reading, each, index, axis) if whole else each
        return build.again(node, sources)
    if step.name in OVER_OTHERS:
        source, dim = args["input"], one_dim(args["dim"])
        assert isinstance(dim, int)
        dim %= len(shape_of(source))
        sizes = [-1] * len(shape_of(source))
        sizes[dim] = size_of(build, source, dim)
        wider = build("expand", build("unsqueeze", index, dim), *sizes)
        return build.again(node, {source: _pick(build, reading, source, wider, axis + 1)})
    if step.name == "stack":
        dim = args.get("dim", 0) % len(shape)
        narrower = build("select", index, dim, 0)
        parts = {each: _pick(build, reading, each, narrower, axis - 1) for each in args["tensors"]}
        return build.again(node, parts)
    return build(torch.gather, node, axis, index)
