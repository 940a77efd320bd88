"""Row expressions over statistics that ranks share, where each rank has plain tensors of its own columns."""

from __future__ import annotations

import functools
import operator
from typing import Any

import sympy
import torch
from torch.fx import Node

from .. import algebra
from ..algebra import parts, symbols
from ..common.compat.distributed import group_size
from ..distributed.by_hand import stats_of_ranks
from ..graph.builder import Builder
from ..graph.shapes import example_of, shape_of, tensor_of, value_of
from ..reading.part_values import Parts

SUM_SHIFTED = sympy.Symbol("sum_here_shifted", real=True)


class PartRows:
    """Nodes for row expressions, over the statistics of one tensor of logits."""

    def __init__(self, build: Builder, found: Parts, logits: Node, site: int, outer: dict[Node, Any]):
        self.build, self.found, self.outer = build, found, outer
        self.scalars = {s: outer.get(n, n) for s, n in found.scalars.items() if n in outer or not outer}
        self.v = int(shape_of(logits)[-1])  # what was compiled is for as many columns
        self.z = logits if len(shape_of(logits)) == 2 else build("reshape", logits, [-1, self.v])
        self.conditions = {y: self._condition(picked.condition) for y, picked in found.picked.items()}
        self.columns = {y: self._column(y) for y in found.picked}
        labels = {y: self._label(y) for y in found.picked}
        group = found.group
        made = build(stats_of_ranks, self.z, [*labels.values()], group, group_size(group), site=site)
        packed, hits = (build(operator.getitem, made, k) for k in range(2))
        rows = [build(torch.select, packed, 0, k) for k in range(2 + len(labels))]
        self.m, self.d = rows[:2]
        self.picks = dict(zip(labels, rows[2:], strict=True))
        self.hits = {y: build(torch.select, hits, 0, k) for k, y in enumerate(labels)}
        self.bad = {y: self._is_out_of_range(y) for y in labels}

    def _flat(self, node: Node) -> Node:
        node = self.outer.get(node, node)
        return node if len(shape_of(node)) == 1 else self.build("reshape", node, -1)

    def _column(self, y: sympy.Symbol) -> Node:
        node, _ = self.found.labels[self.found.picked[y].y]
        label = self.build("long", self._flat(node))
        from_end = self.build(torch.add, label, self.v)
        return self.build(torch.where, self.build(torch.lt, label, 0), from_end, label)

    def _label(self, y: sympy.Symbol) -> Node:
        column, condition = self.columns[y], self.conditions[y]
        return column if condition is None else self.build(torch.where, condition, column, -1)

    def _condition(self, condition: sympy.Expr) -> Node | None:
        if condition == 1:
            return None
        (mask,) = [m for m in self.found.masks if condition in (m, 1 - m)] or [None]
        if mask is not None:
            node = self._flat(self.found.masks[mask])
            return node if condition == mask else self.build(torch.logical_not, node)
        return self.build(torch.ne, self._emit(condition), 0.0)

    def _is_out_of_range(self, y: sympy.Symbol) -> Node:
        column, condition = self.columns[y], self.conditions[y]
        below, above = self.build(torch.lt, column, 0), self.build(torch.ge, column, self.v)
        outside = self.build(torch.logical_or, below, above)
        return outside if condition is None else self.build(torch.logical_and, outside, condition)

    def result(self, expr: sympy.Expr, like: Node, meant: sympy.Expr | None = None) -> Node:
        """A row expression in the place of a node, NaN in rows whose label is no column.

        With the gradient of another one, if that is `meant`.
        """
        build = self.build
        made = self._row(expr)
        if meant is not None and not self._have_one_gradient(expr, meant):
            surrogate = self._row(meant)
            made = build(torch.add, surrogate, build("detach", build(torch.sub, made, surrogate)))
        for y in expr.atoms(algebra.pick):
            made = build(torch.add, made, build(torch.where, self.bad[y.args[0]], torch.nan, 0.0))
        example = example_of(like)
        if len(example.shape) != 1:
            made = build("reshape", made, list(shape_of(like)))
        return made if example_of(made).dtype == example.dtype else build("to", made, example.dtype)

    def _have_one_gradient(self, expr: sympy.Expr, meant: sympy.Expr) -> bool:
        """Whether two expressions differ by what has none."""
        gap = algebra.expand((expr - meant).subs(self.found.numbers).subs(parts.V_HERE, self.v))
        return not gap.has(algebra.LSE, parts.SUM_HERE) and not gap.atoms(algebra.pick)

    def _row(self, expr: sympy.Expr) -> Any:
        """An expression, of which the maximum vanishes before it is rounded, where one rank has the label."""
        moved = algebra.shifted(expr.subs({**self._constants(), parts.V_HERE: self.v}))
        moved = algebra.expand(moved.subs(parts.SUM_HERE, self.v * algebra.MAX + SUM_SHIFTED))
        made = self._emit(sympy.collect(moved, [algebra.MAX, symbols.MAX_SHIFTED]))
        if tensor_of(made) is not None:
            return made
        return self.build(torch.add, self.build(torch.mul, self.d, 0.0), made)  # as of a rank's own 0

    def _constants(self) -> dict[sympy.Symbol, sympy.Expr]:
        """The numbers that need no node. For one that has none here, what was compiled is of its value."""
        numbers, scalars = self.found.numbers, self.found.scalars
        values = {s: algebra.number(value_of(scalars[s])) for s in scalars.keys() - self.scalars.keys()}
        return {s: values.get(s, n) for s, n in numbers.items() if s not in self.scalars}

    def _emit(self, expr: sympy.Expr) -> Any:
        build = self.build
        if expr.is_number:
            return int(expr) if expr.is_Integer else float(expr)
        if expr.free_symbols <= self.scalars.keys():
            return self._number(expr)
        if expr.is_Add or expr.is_Mul:
            numbers = [a for a in expr.args if a.free_symbols <= self.scalars.keys()]
            terms = sorted((a for a in expr.args if a not in numbers), key=str)
            combine = torch.add if expr.is_Add else torch.mul
            made = functools.reduce(lambda a, b: build(combine, a, b), map(self._emit, terms))
            return build(combine, made, self._emit(expr.func(*numbers))) if numbers else made
        if isinstance(expr, (sympy.exp, sympy.log)):
            return build(getattr(torch, expr.func.__name__), self._emit(expr.args[0]))
        if expr.is_Pow:
            return build(torch.pow, self._emit(expr.base), self._emit(expr.exp))
        return self._symbol(expr)

    def _number(self, expr: sympy.Expr) -> Any:
        """An expression of numbers that are no constants."""
        if expr in self.scalars:
            return self.scalars[expr]
        if expr.is_Add or expr.is_Mul:
            combine = operator.add if expr.is_Add else operator.mul
            return functools.reduce(lambda a, b: self.build(combine, a, b), map(self._emit, expr.args))
        if expr.is_Pow and expr.exp.is_Integer:
            power = self.build(operator.pow, self._emit(expr.base), abs(int(expr.exp)))
            return power if expr.exp > 0 else self.build(operator.truediv, 1, power)
        values = {s: algebra.number(value_of(node)) for s, node in self.scalars.items()}
        return self._emit(expr.subs(values))

    def _symbol(self, key: sympy.Expr) -> Any:
        build = self.build
        if key == algebra.MAX:
            return self.m
        if key == algebra.LOG_SUMEXP:
            return build(torch.log, self.d)
        if key == symbols.MAX_SHIFTED:
            return build(torch.sub, self.m, self.m)
        if key == SUM_SHIFTED:
            m = build("unsqueeze", build("detach", self.m), -1)
            return build(torch.sum, build(torch.sub, self.z, m), -1)
        if key.func == algebra.hit:
            return self.hits[key.args[0]]
        if key.func == algebra.pick_shifted:
            y = key.args[0]
            gap = build(torch.sub, self.picks[y], build(torch.mul, self.hits[y], self.m))
            return build(torch.where, build(torch.eq, self.hits[y], 0), 0.0, gap)
        if key in self.found.masks:
            return build("to", self._flat(self.found.masks[key]), example_of(self.m).dtype)
        return self._flat(self.found.others[key])
