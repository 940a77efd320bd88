"""The proof that a gradient can be made in the forward.

The coefficients of `row_grad` are known before the backward, up to a scalar, if each is

    (a function of the statistics of its own row) x (one scalar that all rows share).

A `Fact` about a node says so, or that it is not known. Facts are found by going through the graph once, by
the rules of `row_rules`. On which rows' statistics an element depends is followed by a tensor of row numbers,
to which the views of the graph are done as they are to the values. That takes sizes which are numbers: where
they are symbolic, facts are those at one value of every symbol, and `proof.py` looks at more than one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import torch
from torch.fx import Node

from ..graph.shapes import hint, tensor_of
from ..graph.walk import args_of, reached, sources_of
from .calls import narrow_args
from .facts import EARLY, Fact, Factor, Facts, Unknown, apart
from .find import is_gradient
from .other_sizes import SizeOf
from .row_rules import OF_OTHERS, keeps_zero, rule_of

aten, prims = torch.ops.aten, torch.ops.prims


def facts_about(
    targets: Iterable[Node],
    stats: Iterable[Node],
    is_late: Callable[[Node], bool],
    size_of: SizeOf = hint,
    of_rows: Iterable[Node] = (),
) -> Facts:
    """Facts about `targets` and all that they are made of.

    Args:
        targets: nodes.
        stats: nodes [K, N] with statistics of each row, all of the same rows.
        is_late: whether an input of the graph is known in the backward only.
        size_of: the sizes, as numbers.
        of_rows: others that are known to hold a number for each of these rows, in their order.
    """
    facts = Facts(size_of)
    for node in of_rows:
        shape = facts.shape_of(node)
        facts[node] = Fact(rows=torch.arange(math.prod(shape)).reshape(shape))
    for node in stats:
        k, n = facts.shape_of(node)
        facts[node] = Fact(rows=torch.arange(n).expand(k, n))
    for node in _ancestors(targets, set(facts)):
        facts[node] = _fact(node, facts, is_late)
    return facts


def _ancestors(targets: Iterable[Node], known: set[Node]) -> list[Node]:
    """`targets` and what they are made of, in the order of the graph."""
    found = set(reached(targets, lambda node: set(sources_of(node)) - known)) - known
    return [node for node in next(iter(found)).graph.nodes if node in found] if found else []


def _fact(node: Node, facts: Facts, is_late: Callable[[Node], bool]) -> Fact:
    if node.op != "call_function":
        late = node.op == "placeholder" and is_late(node)
        return _scalar_or(node, "the upstream gradient differs from row to row") if late else EARLY
    sources = [facts.get(source, EARLY) for source in node.all_input_nodes]
    if all(fact.is_early for fact in sources):
        return Fact(is_zero=_is_zero(node) or (keeps_zero(node) and _are_zero(node, facts)))
    try:
        return rule_of(node)(node, facts)
    except Unknown as why:
        unknown = [fact.why_not for fact in sources if fact.why_not] or [str(why)]
        return _scalar_or(node, OF_OTHERS if OF_OTHERS in (*unknown, str(why)) else unknown[0])


def _scalar_or(node: Node, why_not: str) -> Fact:
    """A number is a factor whatever it is made of."""
    example = tensor_of(node)
    if example is not None and isinstance(math.prod(example.shape), int) and math.prod(example.shape) == 1:
        return Fact(((node, 1),))
    return Fact(why_not=why_not)


def _is_zero(node: Node) -> bool:
    if node.target in (aten.full.default, aten.full_like.default):
        return bool(args_of(node)[1] == 0)
    if node.target == aten.scalar_tensor.default:
        return bool(args_of(node)[0] == 0)
    return node.target in (aten.zeros.default, aten.zeros_like.default)


def _are_zero(node: Node, facts: Facts) -> bool:
    """Whether the tensors that a node is made of are 0, at whatever sizes it is given."""
    return all(facts.get(s, EARLY).is_zero for s in node.all_input_nodes if tensor_of(s) is not None)


def one_factor(facts: dict[Node, Fact], gradients: Iterable[Node]) -> tuple[Factor, str]:
    """(the scalar that all gradients share, "") or ((), why there is none).

    Args:
        facts: about the maxima and the coefficients of all `gradients`, and what those of several sides read.
        gradients: `row_grad` and `divergence_grad` nodes.
    """
    factors = set()
    for node in gradients:
        *known, coefficients = narrow_args(node)
        for part in (*known, coefficients):
            fact = facts[part]
            if fact.why_not:
                return (), fact.why_not
            if not fact.is_of_own_rows:
                return (), "a gradient depends on the statistics of other rows"
        if any(facts[part].factor for part in known):
            return (), "the maxima depend on the upstream gradient"
        factors.add(facts[coefficients].factor)
    if len(factors) > 1:
        return (), apart(factors, "the losses have upstream gradients of their own")
    return factors.pop() if factors else (), ""


def factors_of_wide(wide: Iterable[Node], gradients: set[Node], facts: Facts, factor: Factor) -> str:
    """Add facts about the wide nodes of a head, all in its order of rows. Returns why it cannot be done.

    Args:
        wide: in the order of the graph.
        gradients: those of them that depend on a `row_grad`.
        facts: about all else that they read.
        factor: that every gradient that an operator makes has.
    """
    for node in wide:
        if node not in gradients:
            if not all(facts.get(source, EARLY).is_early for source in node.all_input_nodes):
                return "the logits are combined with what is made of them"
            facts[node] = EARLY
        elif is_gradient(node):
            facts[node] = Fact(factor)
        else:
            others = [facts.get(source, EARLY) for source in node.all_input_nodes]
            if any(fact.rows is not None for fact in others):
                return "the gradient of the logits is combined with statistics"
            facts[node] = _fact(node, facts, lambda _: True)
        if facts[node].why_not:
            return facts[node].why_not
        if node in gradients and facts[node].factor != factor:
            return "the gradient of the logits has upstream gradients of its own"
    return ""
