"""Which rows count: those whose statistics, or whose gradient, anything can see.

A row that a loss leaves out, because its label is ignored or a mask says so, need not be computed if nobody
can see it:

    its statistics    what is made of them, up to where rows are brought together or leave the graph, is the
                      same whatever they are, as `where` has chosen something else there
    its gradient      its coefficients are 0 whatever the statistics and the upstream gradient are

Both are found by going through the graph, and are told, for each value, by a `Where`.

NOTE 0 times NaN. A mask that multiplies a loss leaves NaN where a row's logits have one. So a row of weight 0
is seen unless it is known that its logits are finite, and what is made of them: see `finite_rows.py`. A
gradient that `where` has made 0 is taken to stay 0 when statistics multiply it: a row that is not chosen
gives nothing to any gradient, though its logits be NaN. What is known before the backward and is infinite, or
NaN, makes a row count, and so does what is divided by a 0, as a mean over a mask that is 0 everywhere.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch.fx import Node

from ..common.compat.graphs import is_tangent, unset_fake_temporarily
from ..graph.builder import Builder
from ..graph.shapes import example_of, shape_of, tensor_of
from ..graph.walk import args_of, reached
from .calls import grad_call
from .facts import EARLY, Fact, Facts
from .find import Head
from .finite_rows import PRODUCTS, SUMS, NotFinite
from .kinds import CAST, COPIES, is_pointwise
from .nodes import on
from .other_sizes import UnknownSize, other_sizes
from .proof import Proof, symbolic_sizes
from .row_locality import facts_about
from .row_numbers import RowNumbers
from .row_rules import has_rule, is_moved, is_reduced
from .where import Places, Where

aten = torch.ops.aten

_ANDS = (aten.logical_and.default, aten.bitwise_and.Tensor)
_QUOTIENTS = (aten.div.Tensor, aten.div.Scalar)

MULTIPLIED = (
    "a mask, or weights, multiply what may be infinite, or NaN, in rows of weight 0, which are seen then; "
    "torch.where(mask, loss, 0) would leave them out"
)


class AllCount(Exception):
    """Every row counts: why, in words, or ""."""


class Counted(NamedTuple):
    """Which rows count.

    Attributes:
        rows: bool [N].
        conditions: what leaves rows out, and whether it is true of the others, or not 0.
        if_finite: whether rows are left out only if their logits are known to be finite.
    """

    rows: Node
    conditions: dict[Node, bool]
    if_finite: bool


def counted_rows(build: Builder, head: Head, proof: Proof) -> Counted:
    """Which rows count, found by the device.

    Args:
        build: makes nodes.
        head: the head.
        proof: about it.

    Raises:
        AllCount: every row counts, as far as can be shown.
    """
    places = Places(build, example_of(head.product).device)
    seen = _Seen(places, head)
    parts = seen.rows()
    where_live = _Live(places, proof.facts)
    for grad in head.grads:
        live = where_live.of(grad_call(grad).coefficients)
        parts.append(build(aten.any.dim, live, 0) if isinstance(live, Node) else live)
    counts = places.any(parts)
    if not isinstance(counts, Node):
        raise AllCount("")
    return Counted(counts, seen.conditions, seen.if_finite)


class _Seen:
    """Where values depend on the statistics of their rows.

    Attributes:
        conditions, if_finite: as those of `Counted`.
    """

    def __init__(self, places: Places, head: Head):
        self.conditions: dict[Node, bool] = {}
        self.if_finite = False
        self._told: dict[Node, tuple[Node, bool]] = {}  # what leaves rows out, by where it does
        self._places, self._head = places, head
        nodes = _made_of_statistics(head)
        with unset_fake_temporarily():
            self._facts = facts_about(nodes, head.stats, is_tangent)
        self._not_finite = NotFinite(places, head, self._facts)
        self._seen: dict[Node, Where] = dict.fromkeys(head.stats, True)
        self._ends: list[Node] = []
        self._weighs: set[Node] = set()  # products with weights that may hide rows
        for node in nodes:
            fact = self._facts[node]
            if fact.rows is None or fact.why_not:
                self._ends += [source for source in node.all_input_nodes if source in self._seen]
            else:
                self._seen[node] = self._of(node)

    def rows(self) -> list[Where]:
        """Which rows those see who bring rows together."""
        returned = [node for node in self._seen if any(user.op == "output" for user in node.users)]
        ends = [end for end in dict.fromkeys([*self._ends, *returned]) if self._seen[end] is not False]
        for end in ends:
            if self._seen[end] is True:
                raise AllCount(MULTIPLIED if self._is_multiplied(end) else "")
        used = set(self._before(ends))
        for node, told in self._told.items():
            if node in used:
                self.conditions.setdefault(*told)
        self.if_finite = not used.isdisjoint(self._weighs)
        build = self._places.build
        if self._have_all_rows(ends):
            return [build(aten.reshape.default, self._seen[end], [-1]) for end in ends]
        return [self._put_to_rows(end) for end in ends]

    def _put_to_rows(self, end: Node) -> Node:
        """Which rows are seen through a value that has some of them, or has them in another order."""
        build, places = self._places.build, self._places
        rows = build(aten.reshape.default, RowNumbers(places, self._head, self._facts).of(end), [-1])
        seen = build(CAST, build(aten.reshape.default, self._seen[end], [-1]), torch.int32)
        n = places.shape(self._head.stats[0])[1:]
        none = build(aten.full.default, n, 0, dtype=torch.int32, **on(rows))
        return places.not_zero(build(aten.index_put.default, none, [rows], seen, True))

    def _of(self, node: Node) -> Where:
        """Where a node that is of its own row depends on statistics."""
        sources = self._sources(node)
        if node.target == aten.where.self and self._is_early(args_of(node)[0]):
            condition, *choices = args_of(node)
            return self._chosen(node, condition, *(self._seen.get(choice, False) for choice in choices))
        if node.target in _ANDS and len(sources) == 1:
            (other,) = (source for source in node.all_input_nodes if source is not sources[0])
            return self._chosen(node, other, self._seen[sources[0]], False)
        if node.target in PRODUCTS and len(set(args_of(node)) - set(sources)) == 1 and not node.kwargs:
            return self._weighed(node, *sources)
        if all(self._seen[source] is True for source in sources):
            return True
        if is_moved(node):
            return self._places.moved(node, self._seen)
        if is_reduced(node) and not self._weighs & set(self._before(sources)):
            return self._places.reduced(node, self._seen[sources[0]])
        if not is_pointwise(node):
            return True
        return self._places.over_any(node, [self._seen[source] for source in sources])

    def _sources(self, node: Node) -> list[Node]:
        return [source for source in node.all_input_nodes if source in self._seen]

    def _before(self, nodes: list[Node]) -> list[Node]:
        """What nodes are made of in whose place something is seen, if not in all, and themselves."""
        return list(reached(nodes, lambda node: [] if self._seen[node] is True else self._sources(node)))

    def _is_early(self, node: Any) -> bool:
        return node not in self._seen and self._facts.get(node, EARLY).is_early

    def _chosen(self, node: Node, condition: Node, yes: Where, no: Where) -> Where:
        if (yes is False) != (no is False):
            self._told[node] = condition, yes is not False
        return self._places.chosen(node, condition, yes, no)

    def _weighed(self, node: Node, source: Node) -> Where:
        """Where a product with what is known beforehand depends on statistics."""
        (weight,) = (arg for arg in args_of(node) if arg is not source)
        seen = self._seen[source]
        if seen is False or not self._may_leave_out(weight):
            return self._places.over(node, seen)
        not_finite = self._not_finite.of(source)
        if not_finite is not True:
            self._weighs.add(node)
            self._told[node] = weight, True
            is_seen = self._places.any([self._places.not_zero(weight), not_finite])
            seen = self._places.all([seen, is_seen])
        return self._places.over(node, seen)

    def _may_leave_out(self, weight: Any) -> bool:
        """Whether it may be 0 for some rows: a choice between other numbers is not."""
        if not isinstance(weight, Node) or not _has_rows(weight) or not self._is_early(weight):
            return False
        return weight.target != aten.where.self or _has_zero(weight)

    def _is_multiplied(self, end: Node) -> bool:
        """Whether what is known beforehand, for each row, multiplies what `end` is made of."""
        before = reached([end], self._sources)
        factors = [s for node in before if node.target in PRODUCTS for s in node.all_input_nodes]
        return any(map(self._may_leave_out, factors))

    def _have_all_rows(self, ends: list[Node]) -> bool:
        """Whether each has the rows of the head, once and in their order, whatever the sizes are."""
        with unset_fake_temporarily():
            if not all(self._has_all_rows(self._facts, end) for end in ends):
                return False
            symbolic = symbolic_sizes(self._facts)
            proved = not symbolic
            for size_of in other_sizes(symbolic) if symbolic else ():
                try:
                    facts = facts_about(ends, self._head.stats, is_tangent, size_of)
                except (RuntimeError, IndexError, UnknownSize):
                    continue  # the graph has no such sizes
                if not all(self._has_all_rows(facts, end) for end in ends):
                    return False
                proved = True
            return proved

    def _has_all_rows(self, facts: Facts, node: Node) -> bool:
        rows, own = facts[node].rows, facts[self._head.stats[0]].rows
        assert own is not None
        return rows is not None and torch.equal(rows.flatten(), own[0])


def _has_rows(factor: Node) -> bool:
    return tensor_of(factor) is not None and bool(shape_of(factor))


def _has_zero(choice: Node) -> bool:
    """Whether a `where` has anything to choose but numbers other than 0."""
    numbers = [
        args_of(c)[-1]
        for c in args_of(choice)[1:]
        if c.target in (aten.scalar_tensor.default, aten.full.default)
    ]
    return len(numbers) < 2 or 0 in numbers


def _made_of_statistics(head: Head) -> list[Node]:
    """What is made of statistics, up to what brings rows together, that too, in the order of the graph.

    Not what only `row_grad` reads: its rows are those of `_Live`.
    """
    wide = {*head.roots, *head.wide}

    def users(node: Node) -> list[Node]:
        follows = node in head.stats or is_pointwise(node) or has_rule(node)
        return [user for user in node.users if user not in wide and user.op != "output"] if follows else []

    found = set(reached(head.stats, users)) - set(head.stats)
    return [node for node in head.product.graph.nodes if node in found]


class _Live:
    """Where values may be other than 0, whatever statistics and upstream gradients are.

    Args:
        places: makes what tells it.
        facts: about the values.
    """

    def __init__(self, places: Places, facts: dict[Node, Fact]):
        self._places, self._facts = places, facts
        self._known: dict[Node, Where] = {}
        self._infinite: dict[Node, Where] = {}

    def of(self, node: Any) -> Where:
        if not isinstance(node, Node):
            return bool(node != 0)
        if node not in self._known:
            self._known[node] = self._found(node)
        return self._known[node]

    def _found(self, node: Node) -> Where:
        fact = self._facts.get(node, EARLY)
        if fact.is_zero:
            return False
        if fact.why_not or fact.is_factor(node) or tensor_of(node) is None:
            return True
        if fact.is_early and node.target != aten.where.self and shape_of(node):
            return self._places.not_zero(node)
        if node.target == aten.where.self:
            return self._of_choice(node)
        if node.target in PRODUCTS and not node.kwargs:
            return self._of_product(node)
        if node.target in _QUOTIENTS and not node.kwargs:
            return self._of_quotient(node)
        if node.target in SUMS or node.target in COPIES or node.target == aten.alias.default:
            parts = [self.of(arg) for arg in node.args if isinstance(arg, (Node, int, float))]
            return self._places.over_any(node, parts)
        if is_moved(node) and not fact.is_early:
            return self._places.moved(node, {source: self.of(source) for source in node.all_input_nodes})
        if is_reduced(node) and not fact.is_early:
            return self._places.reduced(node, self.of(args_of(node)[0]))
        return True

    def _of_choice(self, node: Node) -> Where:
        condition, *choices = args_of(node)
        yes, no = map(self.of, choices)
        return self._places.chosen(node, condition if self._is_early(condition) else None, yes, no)

    def _of_product(self, node: Node) -> Where:
        places, factors = self._places, args_of(node)
        live = [*map(self.of, factors)]  # what is infinite is other than 0
        infinite = [
            self._is_infinite(factor)
            for factor, other in zip(factors, reversed(live), strict=True)
            if other is not True
        ]
        return places.over_any(node, [places.all(live), *infinite])

    def _of_quotient(self, node: Node) -> Where:
        dividend, divisor = args_of(node)
        not_divisor = [self._places.not_divisor(divisor)] if self._is_early(divisor) else []
        return self._places.over_any(node, [self.of(dividend), *not_divisor])

    def _is_infinite(self, value: Any) -> Where:
        """Where a value is infinite, or NaN, by what is known before the backward."""
        if self._is_early(value):
            return self._places.not_finite(value)
        if value not in self._infinite:
            self._infinite[value] = self._found_infinite(value)
        return self._infinite[value]

    def _found_infinite(self, node: Node) -> Where:
        fact = self._facts.get(node, EARLY)
        if fact.why_not or fact.is_factor(node) or tensor_of(node) is None:
            return False
        if node.target == aten.where.self:
            condition, *choices = args_of(node)
            yes, no = map(self._is_infinite, choices)
            return self._places.chosen(node, condition if self._is_early(condition) else None, yes, no)
        if is_moved(node):
            return self._places.moved(node, {s: self._is_infinite(s) for s in node.all_input_nodes})
        if is_reduced(node):
            return self._places.reduced(node, self._is_infinite(args_of(node)[0]))
        if node.kwargs or node.target not in (*PRODUCTS, *_QUOTIENTS, *SUMS, *COPIES, aten.alias.default):
            return False
        parts = [self._is_infinite(arg) for arg in node.args if isinstance(arg, (Node, int, float))]
        if node.target in _QUOTIENTS and self._is_early(args_of(node)[1]):
            parts.append(self._places.not_divisor(args_of(node)[1]))
        return self._places.over_any(node, parts)

    def _is_early(self, value: Any) -> bool:
        return not isinstance(value, Node) or self._facts.get(value, EARLY).is_early
