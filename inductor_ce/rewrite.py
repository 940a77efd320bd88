"""Rewrite: replace the nodes of a group by one `row_stats` and torch operations of size [N]."""

from __future__ import annotations

import operator
from typing import Any

import sympy
import torch
import torch.nn.functional as F
from torch.fx import Graph, Node

from . import algebra, ops, spellings
from .compat import enable_python_dispatcher, fake_mode_of
from .legal import Group, row_expr
from .reading import Label, LossValue, Masked, Reading, RowValue
from .rows import Permute, Reshape, Step, constant, row_shape, same_shape, shape_of
from .timeline import Timeline, tensor_of, written_by
from .views import viewed

# Integers up to here are exact in float64, and small enough for any scalar argument.
EXACT = 2**53

# The label of rows that a slice cut off. Any column will do: nothing is made of what is picked there.
ANY_LABEL = 0


class Builder:
    """Appends nodes with example values at one place of a graph, and can take them all back."""

    def __init__(self, graph: Graph, before: Node, like: Node):
        self._graph, self._before, self._like = graph, before, like
        self._fake_mode = fake_mode_of(tensor_of(like))
        self.created: list[Node] = []

    def __call__(self, target: Any, *args: Any, **kwargs: Any) -> Node:
        """Call a function, or the Tensor method whose name is given."""
        with self._graph.inserting_before(self._before):
            op = "call_method" if isinstance(target, str) else "call_function"
            node = self._graph.create_node(op, target, args, kwargs)
        self.created.append(node)
        if "stack_trace" in self._like.meta:
            node.meta["stack_trace"] = self._like.meta["stack_trace"]
        node.meta["example_value"] = self._example(target, args, kwargs)
        return node

    def _example(self, target: Any, args: Any, kwargs: Any) -> Any:
        real_args, real_kwargs = torch.fx.node.map_arg(
            (args, kwargs), lambda n: n.meta.get("example_value", n.meta.get("val"))
        )
        if isinstance(target, str):
            receiver, *real_args = real_args
            target = getattr(receiver, target)
        with self._fake_mode, enable_python_dispatcher(), torch.no_grad():
            return target(*real_args, **real_kwargs)

    def undo(self) -> None:
        for node in reversed(self.created):
            self._graph.erase_node(node)
        self.created.clear()


def rewrite(graph: Graph, reading: Reading, group: Group) -> None:
    """Use statistics in place of the nodes of `group`. On an exception the graph is as it was."""
    build = Builder(graph, reading.timeline.nodes[group.place], like=group.nodes[0])
    try:
        stats = _Statistics(build, reading, group)
        results = [(node, _result(build, stats, node, reading.values[node])) for node in group.nodes]
    except Exception:
        build.undo()
        raise
    for node, result in results:
        node.replace_all_uses_with(result)


def sweep(graph: Graph, reading: Reading) -> None:
    """Erase the steps of losses and chains that nobody uses any more; once, after all rewrites."""
    for node in reversed(reading.timeline.nodes):
        if not node.users and spellings.read(node) is not None and not any(written_by(node)):
            graph.erase_node(node)


# Statistics as nodes of size [N]


class _Statistics:
    """The one `row_stats` of a group, and its rows as the algebra names them after `algebra.shifted`."""

    def __init__(self, build: Builder, reading: Reading, group: Group):
        exprs = [row_expr(reading, node) for node in group.nodes]
        self.build = build
        self.logits = group.logits
        self.vocab_size = group.vocab_size
        place = group.place
        self.named = {y: _before(build, at.node, reading, place) for y, at in group.labels.items()}
        self.labels = {y: _flat_labels(build, self.named[y], label) for y, label in group.labels.items()}
        picked = [y for y in self.labels if any(y in algebra.labels_of(e) for e in exprs)]
        with_sum = any(e.has(algebra.SUM) for e in exprs)
        which = ",".join([ops.MAX, ops.SUMEXP] + [ops.PICK] * len(picked) + [ops.SUM] * with_sum)
        z = _flat_logits(build, reading.timeline, group)
        packed = build(ops.ROW_STATS, z, [self.labels[y] for y in picked], which)
        rows = build(torch.unbind, packed, 0)
        self._row = [build(operator.getitem, rows, k) for k in range(which.count(",") + 1)]
        self._picked = {y: self._row[2 + j] for j, y in enumerate(picked)}
        self._checked: dict[tuple[sympy.Symbol, int | None], Node] = {}
        self._known: dict[sympy.Expr, Node] = {algebra.MAX: self._row[0], algebra.SUM_SHIFTED: self._row[-1]}

    def __getitem__(self, symbol: sympy.Expr) -> Node:
        if symbol not in self._known:
            self._known[symbol] = self._made(symbol)
        return self._known[symbol]

    def _made(self, symbol: sympy.Expr) -> Node:
        build, m = self.build, self._row[0]
        if symbol == algebra.LOG_SUMEXP:
            return build(torch.log, self._row[1])
        if symbol == algebra.LOG_SUMEXP_EXTENDED:
            # d is NaN in a row that holds +inf, whose logsumexp is +inf and has torch's gradient for d = 1.
            return build(torch.log, build(torch.where, build(torch.eq, m, torch.inf), 1.0, self._row[1]))
        return build(torch.sub, self._picked[symbol.args[0]], m)

    def checked(self, y: sympy.Symbol, ignored: int | None) -> Node:
        """1, but NaN for a label that is neither in [0, V) nor ignored: nothing plausible is made of it."""
        if (y, ignored) not in self._checked:
            build, label = self.build, self.labels[y]
            known = build(
                torch.logical_and, build(torch.ge, label, 0), build(torch.lt, label, self.vocab_size)
            )
            if ignored is not None:
                known = build(torch.logical_or, known, build(torch.eq, label, ignored))
            self._checked[y, ignored] = build(torch.where, known, 1.0, torch.nan)
        return self._checked[y, ignored]


def _flat_logits(build: Builder, timeline: Timeline, group: Group) -> Node:
    """The logits [N, V].

    Reshaped before the pointwise chain that leads to them, not after: the reshape of a result stands
    between a template and the derivative of the chain, which then is a second kernel in torch 2.11.
    """
    node, axis = group.logits.node, group.logits.axis
    rank = len(shape_of(node))
    if rank == 2 and axis == 1:
        return node
    links = _chain(timeline, node, group.place)
    flat = links[0].all_input_nodes[0] if links else node
    if axis != rank - 1:
        flat = build(torch.movedim, flat, axis, -1)
    if rank != 2:
        flat = build("reshape", flat, -1, group.vocab_size)
    for link in links:
        flat = _again(build, link, flat)
    return flat


def _again(build: Builder, node: Node, source: Node) -> Node:
    """The operation of `node`, which reads one tensor, on another one."""
    args, kwargs = torch.fx.node.map_arg((node.args, node.kwargs), lambda _: source)
    return build(node.target, *args, **kwargs)


def _chain(timeline: Timeline, node: Node, place: int) -> list[Node]:
    """The elementwise nodes of one tensor and numbers that lead to `node`, first to last."""
    links: list[Node] = []
    read_at, mode = place, timeline.grad_mode(place)
    while (source := _elementwise_source(node)) is not None:
        at = timeline.position[node]
        same_modes = timeline.grad_mode(at) == mode and timeline.same_autocast(at, place)
        as_made = timeline.unchanged(node, node, read_at)
        if not (same_modes and as_made and timeline.unchanged(source, at, place)):
            break
        links.insert(0, node)
        node, read_at = source, at
    return links


def _elementwise_source(node: Node) -> Node | None:
    spelled = spellings.read(node)
    if spelled is None or spelled[0] not in spellings.ELEMENTWISE or len(node.all_input_nodes) != 1:
        return None
    if any(isinstance(a, torch.memory_format) for a in (*node.args, *node.kwargs.values())):
        return None
    source = node.all_input_nodes[0]
    a, b = tensor_of(source), tensor_of(node)
    alike = a is not None and b is not None and a.device == b.device and a.is_floating_point()
    return source if alike and same_shape(shape_of(source), shape_of(node)) else None


def _before(build: Builder, node: Node, reading: Reading, place: int) -> Node:
    """`node`, made again from what it is a view of if it comes only after `place`."""
    if reading.timeline.position[node] < place:
        return node
    source = viewed(node)
    assert source is not None, f"{node} is no view"
    return _again(build, node, _before(build, source, reading, place))


def _flat_labels(build: Builder, node: Node, label: Label) -> Node:
    """The labels [N] in the order of the rows of the logits, ANY_LABEL in rows that were cut off."""
    steps = _needed_steps(label.steps)
    if tensor_of(node).dtype not in (torch.int32, torch.int64):  # type: ignore[union-attr]
        node = build("long", node)  # the bounds of V must be representable
    if steps and label.kept is not None:
        node = build("squeeze", node, label.kept)
    for step in reversed(steps):
        node = _undo_step(build, node, step)
    return node if len(shape_of(node)) == 1 else build("reshape", node, -1)


def _needed_steps(steps: tuple[Step, ...]) -> tuple[Step, ...]:
    """Reshapes matter only where a transpose or a slice follows or comes before."""
    return steps if any(not isinstance(s, Reshape) for s in steps) else ()


def _undo_step(build: Builder, node: Node, step: Step) -> Node:
    if isinstance(step, Reshape):
        return build("reshape", node, _row_sizes(build, step.source, step.source_axis))
    if isinstance(step, Permute):
        return build("permute", node, [step.order.index(i) for i in range(len(step.order))])
    pads = [p for pair in zip(reversed(step.left), reversed(step.right), strict=True) for p in pair]
    return build(F.pad, node, pads, value=ANY_LABEL)


def _arranged(build: Builder, flat: Node, logits: Node, axis: int, steps: tuple[Step, ...]) -> Node:
    """[N] values of the rows of the logits, arranged as `steps` say."""
    node = flat
    sizes = row_shape(logits, axis)
    if len(sizes) != 1 and not (steps and isinstance(steps[0], Reshape)):
        node = build("reshape", node, _row_sizes(build, logits, axis))
    for step, following in zip(steps, (*steps[1:], None), strict=False):
        if not (isinstance(step, Reshape) and isinstance(following, Reshape)):
            node = _do_step(build, node, step)
    return node


def _do_step(build: Builder, node: Node, step: Step) -> Node:
    if isinstance(step, Reshape):
        if len(row_shape(step.result, step.result_axis)) == len(shape_of(node)) == 1:
            return node
        return build("reshape", node, _row_sizes(build, step.result, step.result_axis))
    if isinstance(step, Permute):
        return build("permute", node, step.order)
    cut = tuple(_range(left, right) for left, right in zip(step.left, step.right, strict=True))
    return build(operator.getitem, node, cut)


def _range(left: int, right: int) -> slice:
    return slice(left or None, -right if right else None)


def _row_sizes(build: Builder, node: Node, axis: int) -> list[int | Node]:
    """The sizes of `node` without the vocabulary, as numbers where they are, else read off the tensor."""
    return [_size(build, node, i) for i in range(len(shape_of(node))) if i != axis]


def _size(build: Builder, node: Node, dim: int) -> int | Node:
    number = constant(shape_of(node)[dim])
    return build("size", node, dim) if number is None else number


# The values themselves


def _result(build: Builder, stats: _Statistics, node: Node, value: Any) -> Node:
    flat = _Emitter(build, stats).row(value.expr)
    ignored = value.masked.ignore_index if isinstance(value, LossValue) else None
    for y in algebra.labels_of(value.expr):
        flat = build(torch.mul, flat, stats.checked(y, ignored))
    result = _arranged(build, flat, stats.logits.node, stats.logits.axis, value.steps)
    if isinstance(value, LossValue):
        result = _reduced(build, result, stats.named[value.masked.y], value.masked)
    elif isinstance(value, RowValue) and value.kept is not None:
        result = build("unsqueeze", result, value.kept)
    rounded = value.rounded if isinstance(value, RowValue) else None
    for dtype in (rounded, tensor_of(node).dtype):  # type: ignore[union-attr]
        if dtype is not None and tensor_of(result).dtype != dtype:  # type: ignore[union-attr]
            result = build("to", result, dtype)
    return result


def _reduced(build: Builder, per_row: Node, label: Node, masked: Masked) -> Node:
    """As torch.nn.functional.cross_entropy reduces: 0 for ignored rows, which do not count in the mean."""
    if not same_shape(shape_of(label), shape_of(per_row)):
        label = build("reshape_as", label, per_row)
    valid = build(torch.ne, label, masked.ignore_index)
    kept = build(torch.where, valid, per_row, 0.0)
    if masked.reduction == "none":
        return kept
    total = build(torch.sum, kept)
    return total if masked.reduction == "sum" else build(torch.div, total, build(torch.sum, valid))


class _Emitter:
    """Writes a row expression as torch operations."""

    def __init__(self, build: Builder, stats: _Statistics):
        self.build, self.stats = build, stats

    def row(self, expr: sympy.Expr) -> Node:
        value = self._emit(algebra.shifted(expr).subs(algebra.V, self.stats.vocab_size))
        return (
            value if isinstance(value, Node) else self.build(torch.full_like, self.stats[algebra.MAX], value)
        )

    def _emit(self, expr: sympy.Expr) -> Any:
        if expr.is_number:
            return int(expr) if expr.is_Integer and abs(expr) < EXACT else float(expr)
        if expr.is_Add:
            return self._folded(expr.args, self._add)
        if expr.is_Mul:
            return self._folded(expr.args, lambda a, b: self.build(torch.mul, a, b))
        if expr.is_Pow:
            return self.build(torch.pow, self._emit(expr.base), self._emit(expr.exp))
        if isinstance(expr, (sympy.exp, sympy.log)):
            return self.build(getattr(torch, expr.func.__name__), self._emit(expr.args[0]))
        return self.stats[expr]

    def _folded(self, args: tuple[sympy.Expr, ...], combine: Any) -> Any:
        """Numbers last, so that an operation has a tensor first; what is added before what is taken off."""
        terms = sorted(args, key=lambda a: (bool(a.is_number), a.could_extract_minus_sign(), str(a)))
        result = self._emit(terms[0])
        for term in terms[1:]:
            negative = combine == self._add and term.could_extract_minus_sign()
            result = (
                self.build(torch.sub, result, self._emit(-term))
                if negative
                else combine(result, self._emit(term))
            )
        return result

    def _add(self, a: Any, b: Any) -> Node:
        return self.build(torch.add, a, b)
