"""The proof about one head: its gradient can be made in the forward, up to one scalar.

Where sizes are symbolic it is made again at a few others than those of the example: what is true of rows
there by chance must not be taken for true.
"""

from __future__ import annotations

import torch

from ..common.compat.graphs import is_tangent, unset_fake_temporarily
from ..graph.shapes import constant, hint, is_hinted
from .calls import grad_call
from .facts import Factor, Facts
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
    coefficients = [part for call in calls for part in (call.m, call.coefficients)]
    constants = [c for call in calls for c in (*call.labels, *call.weights)] + head.factors()
    facts = facts_about([*coefficients, *constants, *head.beside()], head.stats, is_tangent, size_of)
    factor, why_not = one_factor(facts, head.grads)
    if not why_not and any(facts[node].rows is not None for node in constants):
        why_not = "what the gradient is made of beside the logits is made of their statistics"
    if not why_not and not all(facts[node].is_early for node in constants):
        why_not = "what the gradient is made of beside the logits is known in the backward only"
    if not why_not:
        why_not = factors_of_wide(head.wide, head.gradients(), facts, factor)
    return facts, factor, why_not


def symbolic_sizes(facts: Facts) -> list[torch.SymInt]:
    """The sizes on which row numbers depend, without those that are numbers."""
    moved = [node for node, fact in facts.items() if fact.rows is not None]
    nodes = {*moved, *(source for node in moved for source in node.all_input_nodes)}
    values = [node.meta.get("val") for node in nodes]
    sizes = [size for value in values if isinstance(value, torch.Tensor) for size in value.shape]
    return [s for s in (*sizes, *values) if isinstance(s, torch.SymInt) and constant(s) is None]
