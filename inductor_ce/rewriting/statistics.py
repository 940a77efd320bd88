"""The one `row_stats` of a group, and its rows as the algebra names them after `algebra.shifted`."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import sympy
import torch
from torch.fx import Node

from .. import algebra, ops
from ..graph.builder import Builder
from ..graph.shapes import example_of, is_promoted, shape_of, tensor_of
from ..ops.verified import FUSED, TAPPED
from ..reading.values import Label, Outside, Reading
from .arrange import flat_labels, flat_outside
from .groups import Group
from .layouts import layout_of
from .made_of_rows import LOG_SUMEXP_WIDE, OF_ROWS, finite, with_infinities
from .rematerialise import made_before
from .weighed import (
    WEIGHED,
    Product,
    by_masks,
    has_masks,
    is_of_masks,
    rows_of,
    sumexpdot,
    weight_of,
    with_sums,
)

# Integers up to here are exact in float64, and small enough for any scalar argument.
EXACT = 2**53

_MADE: dict[str, Callable[[Builder, Node], Node]] = {
    "": lambda build, node: node,
    "exp": lambda build, node: build(torch.exp, node),
    "xlogx": lambda build, node: build(torch.xlogy, node, node),
    "where": lambda build, node: node,
    "where not": lambda build, node: build(torch.logical_not, node),
}


def _only_losses_read(reading: Reading, group: Group) -> bool:
    """Whether the gradient of the logits is that of the group alone, and dz is in memory as they are."""
    node, timeline = group.logits.node, reading.timeline
    last = group.logits.axis == len(shape_of(node)) - 1
    if not (group.attached and last and timeline.unchanged(node, node)):
        return False
    stack, seen = [user for user in node.users if user in timeline.position], set(group.nodes)
    while stack:
        user = stack.pop()
        if user not in seen:
            if not user.users:
                return False
            seen.add(user)
            stack += user.users
    return True


def _any_has(exprs: list[sympy.Expr], symbol: sympy.Symbol) -> bool:
    return any(expr.has(symbol) for expr in exprs)


def _power(log_sumexp: sympy.Expr) -> ops.Row:
    """The row whose logarithm is log_sumexp(k)."""
    return ops.Row(ops.POWER, order=float(log_sumexp.args[0]))


def _rows_for(moved: list[sympy.Expr], picks: list[ops.Row], sums: list[ops.Row]) -> ops.Rows:
    """All rows that shifted expressions are made of, with those of their labels and of what is weighed."""
    several = [row for row in picks if row.statistic == ops.PICKS]
    asked = {s for symbol, made in OF_ROWS.items() for s in made.needs if _any_has(moved, symbol)}
    others = [ops.Row(s) for s in asked if s not in (ops.MAX, ops.SUMEXP)]
    powers = {f: _power(f) for expr in moved for f in expr.atoms(algebra.log_sumexp_of)}
    return ops.Rows.of(len(picks) - len(several), *others, *powers.values(), *sums, *several)


def _pick_row(index: int, width: int) -> ops.Row:
    return ops.Row(ops.PICK, index) if width == 1 else ops.Row(ops.PICKS, index, width=width)


def _is_mask(node: Node) -> bool:
    return tensor_of(node).dtype == torch.bool  # type: ignore[union-attr]


class Statistics:
    """Nodes for the symbols of row expressions, made when they are asked for."""

    def __init__(
        self, build: Builder, reading: Reading, group: Group, site: int, verify_key: str | None = None
    ):
        self.build, self.logits, self.vocab_size = build, group.logits.node, group.vocab_size
        self.reading, self.place, self.outside = reading, group.place, group.outside
        self.layout = layout_of(build, reading, group)
        self.named, self.labels = self._labels_of(group)
        self._flat: dict[sympy.Symbol, Node] = {}
        self._known: dict[Any, Node] = {}
        exprs = [expr for node in group.nodes for expr in group.exprs_of(node)]
        moved = [algebra.shifted(expr) for expr in exprs]
        picked = [y for y in self.labels if any(y in algebra.picks_of(e) for e in exprs)]
        picked.sort(key=lambda y: group.labels[y].width > 1)
        picks = {y: _pick_row(j, group.labels[y].width) for j, y in enumerate(picked)}
        self._in_rows = {y: build("t", self.labels[y]) for y in self.labels if group.labels[y].width > 1}
        weights, sums = self._weights(moved)
        self.rows = _rows_for(moved, list(picks.values()), list(sums))
        z = self.layout.logits()
        is_users = not group.distributed and group.logits.node not in reading.added
        self.is_tapped = verify_key is not None and is_users and _only_losses_read(reading, group)
        if self.is_tapped:
            z = build(TAPPED, z, verify_key, FUSED)
        made = self.layout.statistics(z, [self.labels[y] for y in picked], weights, self.rows, site)
        self._rows = dict(zip(self.rows, made, strict=True))
        functions = {algebra.pick(y): row for y, row in picks.items()}
        functions |= {function: row for row, function in sums.items()}
        self._of_function = {function: self._rows[row] for function, row in functions.items()}

    def _labels_of(self, group: Group) -> tuple[dict[sympy.Symbol, Node], dict[sympy.Symbol, Node]]:
        """(the labels that are tensors, as the user has them, all labels as the operators take them)"""
        named = {
            y: self._kept(label.node, self._brought(label))
            for y, label in group.labels.items()
            if label.node is not None
        }
        return named, {
            y: flat_labels(self.build, named[y], label, self.vocab_size)
            if y in named
            else self.layout.fixed_labels(label.column)
            for y, label in group.labels.items()
        }

    def _brought(self, held: Label | Outside) -> Node:
        assert held.node is not None
        return self.layout.brought(made_before(self.build, self.reading, held.node, self.place), held)

    def _kept(self, label: Node, made: Node) -> Node:
        """Labels, copied where the user writes over them later: the backward reads them again."""
        timeline = self.reading.timeline
        return made if timeline.unchanged(label, self.place) else self.build("clone", made)

    def _weights(self, exprs: list[sympy.Expr]) -> tuple[list[Node], dict[ops.Row, Any]]:
        """The tensors that are summed against z or p, and the rows that hold these sums."""
        weights: list[Node] = []
        rows: dict[ops.Row, Any] = {}
        functions = {f for e in exprs for f in e.atoms(sympy.Function)}
        products = {f.args for f in functions if f.func in WEIGHED}
        functions |= {algebra.mass(*product) for product in products if is_of_masks(product)}
        for product in sorted(products, key=str):
            weight = self.product(product)
            kinds = rows_of(product, of_rows=len(shape_of(weight)) > 1)
            wanted = [(statistic, make(*product)) for statistic, make in kinds if make(*product) in functions]
            rows |= {ops.Row(statistic, len(weights)): function for statistic, function in wanted}
            weights += [weight] if wanted else []
            bare = algebra.dot_shifted(*product)
            if has_masks(product) and bare in functions:
                rows[ops.Row(ops.SEEN_DOT, len(weights))] = bare
                weights.append(self.product(product, left_out=torch.nan))
        return weights, rows

    def product(self, product: Product, left_out: float = 0.0) -> Node:
        """The product of tensors from outside, [V] or [N, V], and a number where masks leave a column out."""
        if product == (algebra.FINITE,):
            return self.build("new_ones", self.logits, [self.vocab_size], dtype=torch.bool)
        return weight_of(self.build, product, self.flat, left_out)

    def flat(self, symbol: sympy.Symbol) -> Node:
        """A tensor from outside as [N, V], [V], [N] or a number."""
        if symbol not in self._flat:
            held: Outside = self.outside[symbol]
            node = flat_outside(self.build, self._brought(held), held, self.vocab_size)
            self._flat[symbol] = _MADE[held.made](self.build, node)
        return self._flat[symbol]

    def __getitem__(self, key: sympy.Expr) -> Node:
        if key not in self._known:
            self._known[key] = self._made(key)
        return self._known[key]

    def _made(self, key: sympy.Expr) -> Node:
        if key in OF_ROWS:
            made = OF_ROWS[key]
            return made.by(self.build, *(self._rows[ops.Row(statistic)] for statistic in made.needs))
        if key in self.outside:
            node = self.flat(key)  # as torch has it beside them: what is made of it alone is not rounded
            return self._in_stats_dtype(node) if is_promoted(node, self[algebra.MAX]) else node
        return self._made_of_function(key)

    def _made_of_function(self, key: sympy.Expr) -> Node:
        build, m = self.build, self[algebra.MAX]
        if key.func == algebra.pick_shifted:
            (y,) = key.args
            gap = build(torch.sub, self._of_function[algebra.pick(y)], m)
            return gap if y.is_nonnegative else build(torch.where, self.inside(y), gap, 0.0)
        if key.func == finite:
            return build(torch.where, build(torch.isfinite, m), self[key.args[0]], 0.0)
        if key.func == algebra.same:
            one, other = map(self._label, key.args)
            return build(torch.where, build(torch.eq, one, other), 1.0, 0.0)
        if key.func == algebra.hit:
            return build(torch.where, self.inside(key.args[0]), 1.0, 0.0)
        if key.func in (algebra.mean_p_of, algebra.mean_pz_shifted):
            return build(torch.div, self._of_function[key], self._rows[ops.Row(ops.SUMEXP)])
        if key.func == sumexpdot:
            return self._of_function[algebra.mean_p_of(*key.args)]
        if key.func == algebra.log_sumexp_of:
            return build(torch.log, self._rows[_power(key)])
        if key.func == algebra.entry:
            return self.entry(*key.args)
        if key not in self._of_function and key.func == algebra.mass:
            return self.layout.whole(build(torch.sum, self.product(key.args), -1))
        return self._of_function[key]

    def _label(self, y: sympy.Symbol) -> Node:
        """Labels that stand beside rows, [N], or [K, N]."""
        return self._in_rows.get(y, self.labels[y])

    def inside(self, y: sympy.Symbol) -> Node:
        """Whether labels name a column."""
        key = ("inside", y)
        if key not in self._known:
            build, label = self.build, self._label(y)
            above = build(torch.ge, label, 0)
            self._known[key] = build(torch.logical_and, above, build(torch.lt, label, self.vocab_size))
        return self._known[key]

    def entry(self, q: sympy.Symbol, y: sympy.Symbol) -> Node:
        """q_y, and that of any class where y names none."""
        build, weight = self.build, self.flat(q)
        safe, several = build(torch.where, self.inside(y), self._label(y), 0), y in self._in_rows
        if len(shape_of(weight)) == 1 and not several:
            return build(torch.index_select, weight, 0, safe)
        index = build("long", safe)
        if len(shape_of(weight)) == 1:
            return build(torch.take, weight, index)
        index = build("t", index) if several else build("unsqueeze", index, 1)
        made = build(torch.gather, weight, 1, index)
        return build("t", made) if several else build("squeeze", made, 1)

    def checked(self, y: sympy.Symbol, ignored: int | None) -> Node:
        """1, but NaN for a label that is neither in [0, V) nor ignored: nothing plausible is made of it."""
        key = ("checked", y, ignored)
        if key not in self._known:
            build, known = self.build, self.inside(y)
            if ignored is not None:
                known = build(torch.logical_or, known, build(torch.eq, self._label(y), ignored))
            self._known[key] = build(torch.where, known, 1.0, torch.nan)
        return self._known[key]

    # Row expressions

    def row(self, expr: sympy.Expr, width: int = 1) -> Node:
        """A row expression as torch operations, [N], or [K, N] of several labels."""
        moved = with_sums(with_infinities(algebra.shifted(expr))).subs(algebra.V, self.vocab_size)
        parts = {masks: self._emit_with_masses(part) for masks, part in by_masks(moved).items()}
        parts |= {masks: self._unless_nothing(masks, part) for masks, part in parts.items() if masks}
        value = functools.reduce(self._add, parts.values())
        if not isinstance(value, Node) or not shape_of(value):
            value = self.build(torch.add, self.build(torch.zeros_like, self[algebra.MAX]), value)
        return value if width == len(shape_of(value)) == 1 else self.build("expand", value, width, -1)

    def _unless_nothing(self, masks: Product, value: Any) -> Node:
        """What is summed over the columns that masks keep, 0 in a row of which they keep none."""
        is_finite = algebra.FINITE in masks
        count = self._rows[ops.Row(ops.SUMEXP)] if is_finite else self[algebra.mass(*masks)]
        return self.build(torch.where, self.build(torch.eq, count, 0), 0.0, value)

    def _emit_with_masses(self, expr: sympy.Expr) -> Any:
        """As `_emit`, with what is summed of tensors from outside in one sum over the classes.

        NOTE Divergences cancel
        KL(q | p) = sum_i q_i log q_i + mass(q) log d - dot(q) is small where its terms are near log V. Column
        by column the first two cancel before they are rounded as sums: sum_i q_i (log q_i + log d), held
        constant and summed in float64. The gradient flows through mass(q) (log d - the log d held constant),
        which also gives back what that lost when it was rounded.
        """
        masses = [t for t in expr.as_ordered_terms() if self._weighs_rows_of_columns(t)]
        if len(masses) < 2:
            return self._emit(expr)
        column_terms, corrections = [], []
        for term in masses:
            (mass,) = term.atoms(algebra.mass)
            factor = self._emit((term / mass).subs(algebra.LOG_SUMEXP, LOG_SUMEXP_WIDE))
            product = self._in_stats_dtype(self.product(mass.args))
            if isinstance(factor, Node):
                factor = self._in_stats_dtype(factor) if _is_mask(factor) else factor
                held = self._in_stats_dtype(self.build("detach", factor))
                corrections.append(self._mul(self[mass], self.build(torch.sub, factor, held)))
                factor = self.build("unsqueeze", held, -1) if shape_of(factor) else held
            column_terms.append(self._mul(product, factor))
        terms = functools.reduce(self._add, column_terms)
        total = self.layout.whole(self.build(torch.sum, terms, -1, dtype=torch.float64))
        rest = expr - sympy.Add(*masses)
        others = [self._emit(rest)] if rest != 0 else []
        return functools.reduce(self._add, [total, *corrections, *others])

    def _weighs_rows_of_columns(self, term: sympy.Expr) -> bool:
        """Whether a term is a row factor times the sum over the classes of one product [N, V]."""
        masses = term.atoms(algebra.mass)
        if len(masses) != 1 or term.atoms(algebra.entry):
            return False
        (mass,) = masses
        if algebra.FINITE in mass.args:
            return False  # which columns these are, the logits tell
        return not (term / mass).has(mass) and len(shape_of(self.product(mass.args))) == 2

    def _in_stats_dtype(self, node: Node) -> Node:
        dtype = tensor_of(self[algebra.MAX]).dtype  # type: ignore[union-attr]
        return node if tensor_of(node).dtype == dtype else self.build("to", node, dtype)  # type: ignore[union-attr]

    def _mask_in(self, factor: sympy.Expr) -> sympy.Symbol | None:
        """The mask that a factor is, or is a power of, which is the mask itself."""
        mask, power = factor.as_base_exp()
        is_mask = mask in self.outside and self.outside[mask].is_mask
        return mask if is_mask and power.is_Integer and power.is_positive else None

    def _zero(self) -> Any:
        """0 beside a number, in the dtype of statistics: of two numbers torch makes float32."""
        wide = example_of(self[algebra.MAX]).dtype == torch.float64
        return self.build("new_zeros", self[algebra.MAX], []) if wide else 0.0

    def _emit(self, expr: sympy.Expr) -> Any:
        if expr.is_number:
            return int(expr) if expr.is_Integer and abs(expr) < EXACT else float(expr)
        if expr.is_Add:
            return self._folded(expr.args, self._add)
        if expr.is_Mul:
            masks = {a: mask for a in expr.args if (mask := self._mask_in(a)) is not None}
            rest = self._folded([a for a in expr.args if a not in masks] or [sympy.Integer(1)], self._mul)
            for mask in masks.values():
                other = 0.0 if isinstance(rest, Node) else self._zero()
                rest = self.build(torch.where, self[mask], rest, other)
            return rest
        if expr.is_Pow:
            mask = self._mask_in(expr)
            if mask is not None:
                return self[mask]
            return self.build(torch.pow, self._emit(expr.base), self._emit(expr.exp))
        if isinstance(expr, (sympy.exp, sympy.log)):
            return self.build(getattr(torch, expr.func.__name__), self._emit(expr.args[0]))
        return self[expr]

    def _folded(self, args: Sequence[sympy.Expr], combine: Any) -> Any:
        """Numbers last, so that an operation has a tensor first; what is added before what is taken off."""
        terms = sorted(args, key=lambda a: (bool(a.is_number), a.could_extract_minus_sign(), str(a)))
        result = self._emit(terms[0])
        for term in terms[1:]:
            if combine == self._add and term.could_extract_minus_sign():
                result = self.build(torch.sub, result, self._emit(-term))
            else:
                result = combine(result, self._emit(term))
        return result

    def _mul(self, a: Any, b: Any) -> Node:
        return self.build(torch.mul, a, b)

    def _add(self, a: Any, b: Any) -> Node:
        return self.build(torch.add, a, b)
