"""Rewrite: replace the nodes of a group by one `row_stats` and torch operations of size [N]."""

from __future__ import annotations

import operator
from typing import Any

import sympy
import torch
import torch.nn.functional as F
from torch.fx import Graph, Node

from . import algebra, ops
from .compat import fake_mode_of
from .legal import Group, row_expr
from .reading import Label, LossValue, Masked, Reading, RowValue
from .rows import Permute, Reshape, Step, constant, row_shape, same_shape, shape_of
from .timeline import tensor_of

# Fills the rows that a slice cut off: a label that names no column.
NO_LABEL = -1


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
        with self._fake_mode, torch.no_grad():
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
    """Erase what the algebra has read and nobody uses any more. To be called once, after all rewrites."""
    for node in reversed(reading.timeline.nodes):
        if node in reading.values and not node.users:
            graph.erase_node(node)


# ---- statistics as nodes of size [N]


class _Statistics:
    """The one `row_stats` of a group, and its rows as the algebra names them after `algebra.shifted`."""

    def __init__(self, build: Builder, reading: Reading, group: Group):
        exprs = [row_expr(reading, node) for node in group.nodes]
        self.build = build
        self.logits = group.logits
        self.vocab_size = group.vocab_size
        self.labels = {y: _flat_labels(build, label) for y, label in group.labels.items()}
        picked = [y for y in self.labels if any(y in algebra.labels_of(e) for e in exprs)]
        with_sum = any(e.has(algebra.SUM) for e in exprs)
        which = ",".join([ops.MAX, ops.SUMEXP] + [ops.PICK] * len(picked) + [ops.SUM] * with_sum)
        z = _flat_logits(build, group.logits.node, group.logits.axis, group.vocab_size)
        packed = build(ops.ROW_STATS, z, [self.labels[y] for y in picked], which)
        rows = build(torch.unbind, packed, 0)
        self._row = [build(operator.getitem, rows, k) for k in range(which.count(",") + 1)]
        self._picked = {y: self._row[2 + j] for j, y in enumerate(picked)}
        self._known: dict[sympy.Expr, Node] = {algebra.MAX: self._row[0]}

    def __getitem__(self, symbol: sympy.Expr) -> Node:
        if symbol not in self._known:
            self._known[symbol] = self._made(symbol)
        return self._known[symbol]

    def _made(self, symbol: sympy.Expr) -> Node:
        build, m = self.build, self._row[0]
        if symbol == algebra.LOG_SUMEXP:
            return build(torch.log, self._row[1])
        if symbol == algebra.LOG_SUMEXP_EXTENDED:
            # d is NaN in a row that holds +inf, whose logsumexp is +inf.
            return build(torch.where, build(torch.eq, m, torch.inf), 0.0, self[algebra.LOG_SUMEXP])
        if symbol == algebra.SUM_SHIFTED:
            return build(torch.sub, self._row[-1], build(torch.mul, m, self.vocab_size))
        return self._pick_shifted(symbol.args[0])

    def _pick_shifted(self, y: sympy.Symbol) -> Node:
        """z_y - m, and NaN for a label outside [0, V): never a plausible number."""
        build, label = self.build, self.labels[y]
        inside = build(torch.logical_and, build(torch.ge, label, 0), build(torch.lt, label, self.vocab_size))
        return build(torch.where, inside, build(torch.sub, self._picked[y], self._row[0]), torch.nan)


def _flat_logits(build: Builder, node: Node, axis: int, vocab_size: int) -> Node:
    rank = len(shape_of(node))
    if axis != rank - 1:
        node = build(torch.movedim, node, axis, -1)
    return node if rank == 2 else build("reshape", node, -1, vocab_size)


def _flat_labels(build: Builder, label: Label) -> Node:
    """The labels [N] in the order of the rows of the logits, NO_LABEL in rows that were cut off."""
    node, steps = label.node, _needed_steps(label.steps)
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
    return build(F.pad, node, pads, value=NO_LABEL)


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


# ---- the values themselves


def _result(build: Builder, stats: _Statistics, node: Node, value: Any) -> Node:
    flat = _Emitter(build, stats).row(value.expr)
    result = _arranged(build, flat, stats.logits.node, stats.logits.axis, value.steps)
    if isinstance(value, LossValue):
        result = _reduced(build, result, value.masked)
    elif isinstance(value, RowValue) and value.kept is not None:
        result = build("unsqueeze", result, value.kept)
    dtype = tensor_of(node).dtype  # type: ignore[union-attr]
    return result if tensor_of(result).dtype == dtype else build("to", result, dtype)  # type: ignore[union-attr]


def _reduced(build: Builder, per_row: Node, masked: Masked) -> Node:
    """As torch.nn.functional.cross_entropy reduces: 0 for ignored rows, which do not count in the mean."""
    label = masked.label.node
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
        assert isinstance(value, Node), f"{expr} reads no statistic"
        return value

    def _emit(self, expr: sympy.Expr) -> Any:
        if expr.is_number:
            return int(expr) if expr.is_Integer else float(expr)
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
        """Numbers last, so that every operation has a tensor first."""
        terms = sorted(args, key=lambda a: (bool(a.is_number), str(a)))
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
