"""The proof about one head: its gradient can be made in the forward, up to one scalar.

Where sizes are symbolic it is made again at a few others than those of the example: what is true of rows
there by chance must not be taken for true.
"""

from __future__ import annotations

import torch
from torch.fx import Node

from .. import ops
from ..common.compat.graphs import is_tangent, unset_fake_temporarily
from ..graph.shapes import constant, hint, is_hinted
from .calls import grad_call, narrow_args, normalisers_of
from .facts import Fact, Factor, Facts
from .find import Head
from .other_sizes import SizeOf, UnknownSize, other_sizes
from .row_locality import factors_of_wide, facts_about, one_factor

ELSEWHERE = "at other sizes than the example's"
NOWHERE_ELSE = "no sizes but the example's were found at which to prove that rows are apart"


class Proof:
    """The coefficients of a head's `row_grad` nodes, as functions of the statistics of their rows.

    Attributes:
        facts: about the coefficients and what they are made of, at the sizes of the example.
        factor: the scalar that all gradients share.
        why_not: why there is no proof, or "".
    """

    def __init__(self, head: Head):
        self.facts = Facts()
        self.factor: Factor = ()
        self.why_not: str = "" if is_hinted(head.n) else "the number of rows depends on data"
        if not self.why_not:
            with unset_fake_temporarily():
                self.facts, self.factor, self.why_not = _proved(head, hint)
                self.why_not = self.why_not or self._why_not_elsewhere(head)

    def _why_not_elsewhere(self, head: Head) -> str:
        """Why the same is not proved at other sizes, or ""."""
        symbolic = symbolic_sizes(self.facts)
        if not symbolic:
            return ""
        tried = 0
        for size_of in other_sizes(symbolic):
            try:
                _, factor, why_not = _proved(head, size_of)
            except (RuntimeError, IndexError, UnknownSize):
                continue  # the graph has no such sizes: they break what no guard tells
            if not why_not and factor != self.factor:
                why_not = "the scalar that gradients share is another"
            if why_not:
                return f"{why_not}, {ELSEWHERE}"
            tried += 1
        return "" if tried else NOWHERE_ELSE


def _proved(head: Head, size_of: SizeOf) -> tuple[Facts, Factor, str]:
    """(facts, the scalar that all gradients share, why there is no proof or "") at some sizes."""
    calls = [grad_call(node) for node in head.grads]
    gradients = [*head.grads, *head.divergence_grads]
    coefficients = [part for node in gradients for part in narrow_args(node)]
    normalisers = [row for node in head.divergences for row in normalisers_of(node)]
    taught, feeds, sums = _of_teacher(head)
    given = [c for call in calls for c in (*call.labels, *call.weights)] + head.factors() + head.given
    constants = [c for c in given if c not in taught]
    targets = [*coefficients, *normalisers, *constants, *head.beside(), *feeds]
    statistics = [node for node in sums if node.target == ops.ROW_STATS]
    others = [node for node in sums if node.target != ops.ROW_STATS]
    made = [*head.stats, *head.divergences, *statistics]
    facts = facts_about(targets, made, is_tangent, size_of, others)
    factor, why_not = one_factor(facts, gradients)
    if not why_not and not all(_is_row_by_row(facts[node], size_of(head.n)) for node in normalisers):
        why_not = "a divergence is of normalisers that are not of its rows"
    if not why_not and not all(_is_row_by_row(facts[node], size_of(head.n)) for node in feeds):
        why_not = "the teacher's logits are combined with what is not of their own row"
    if not why_not and any(facts[node].rows is not None for node in constants):
        why_not = "what the gradient is made of beside the logits is made of their statistics"
    if not why_not and not all(facts[node].is_early for node in constants):
        why_not = "what the gradient is made of beside the logits is known in the backward only"
    if not why_not:
        why_not = factors_of_wide(head.wide, head.gradients(), facts, factor)
    return facts, factor, why_not


def _of_teacher(head: Head) -> tuple[set[Node], list[Node], list[Node]]:
    """(what is made of the teacher's logits, what it is made of beside them, its sums for each row)"""
    if head.teacher is None:
        return set(), [], []
    taught = {*head.teacher.nodes, *(product.node for product in head.teacher.products)}
    beside = [s for node in head.teacher.nodes for s in node.all_input_nodes if s not in taught]
    return taught, list(dict.fromkeys(beside)), [n for n in head.teacher.nodes if n in head.teacher.sums]


def _is_row_by_row(fact: Fact, n: int) -> bool:
    """Whether it can be made before any statistics, or is one of n numbers, each made of those of its row."""
    if fact.why_not or fact.factor:
        return False
    return fact.rows is None or (fact.rows.numel() == n and Fact(rows=fact.rows.reshape(-1)).is_of_own_rows)


def symbolic_sizes(facts: Facts) -> list[torch.SymInt]:
    """The sizes on which row numbers depend, without those that are numbers."""
    moved = [node for node, fact in facts.items() if fact.rows is not None]
    nodes = {*moved, *(source for node in moved for source in node.all_input_nodes)}
    values = [node.meta.get("val") for node in nodes]
    sizes = [size for value in values if isinstance(value, torch.Tensor) for size in value.shape]
    return [s for s in (*sizes, *values) if isinstance(s, torch.SymInt) and constant(s) is None]
