"""The proof about one head: its gradient can be made in the forward, up to one scalar."""

from __future__ import annotations

from torch.fx import Node

from ..common.compat.graphs import is_tangent, unset_fake_temporarily
from ..graph.shapes import is_hinted
from .calls import grad_call
from .find import Head
from .row_locality import Fact, Factor, factors_of_wide, facts_about, one_factor


class Proof:
    """The coefficients of a head's `row_grad` nodes, as functions of the statistics of their rows.

    Attributes:
        facts: about the coefficients and what they are made of.
        factor: the scalar that all gradients share.
        why_not: why there is no proof, or "".
    """

    def __init__(self, head: Head):
        with unset_fake_temporarily():
            self._prove(head)

    def _prove(self, head: Head) -> None:
        self.facts: dict[Node, Fact] = {}
        self.factor: Factor = ()
        self.why_not: str = "" if is_hinted(head.n) else "the number of rows depends on data"
        if self.why_not:
            return
        calls = [grad_call(node) for node in head.grads]
        coefficients = [part for call in calls for part in (call.m, call.coefficients)]
        constants = [c for call in calls for c in (*call.labels, *call.weights)] + head.factors()
        self.facts = facts_about([*coefficients, *constants, *head.beside()], head.stats, is_tangent)
        self.factor, self.why_not = one_factor(self.facts, head.grads)
        if not self.why_not and not all(self.facts[node].is_early for node in constants):
            self.why_not = "what the gradient is made of beside the logits is known in the backward only"
        if not self.why_not:
            self.why_not = factors_of_wide(head.wide, head.gradients(), self.facts, self.factor)
