"""The proof that a gradient can be made in the forward.

The coefficients of `row_grad` are known before the backward, up to a scalar, if each is

    (a function of the statistics of its own row) x (one scalar that all rows share).

A `Fact` about a node says so, or that it is not known. Facts are found by going through the graph once. In
which rows' statistics an element depends is followed by a tensor of row numbers, on which the views of the
graph are done as they are on the values. That takes sizes which are numbers: where they are symbolic, facts
are those at one value of every symbol, and `proof.py` looks at more than one.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node
from torch.fx.node import map_arg

from ..common.compat.distributed import ALL_GATHER, WAIT
from ..graph.shapes import example_of, hint, tensor_of
from ..graph.walk import args_of, reached, sources_of
from .calls import narrow_args
from .facts import EARLY, NO_ROW, Fact, Factor, Facts, Unknown, apart, named
from .find import is_gradient
from .kinds import is_pointwise
from .other_sizes import SizeOf

aten, prims = torch.ops.aten, torch.ops.prims

OF_OTHERS = "the gradients are made of what another head makes of other logits"


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
        return Fact(is_zero=_is_zero(node) or (node.target in _KEEPS_ZERO and _are_zero(node, facts)))
    try:
        return _rule(node)(node, facts)
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


# Rules


def _rule(node: Node) -> Callable[[Node, Facts], Fact]:
    if node.target in _RULES:
        return _RULES[node.target]
    return _pointwise if is_pointwise(node) else _unknown


def has_rule(node: Node) -> bool:
    """Whether anything but that it is pointwise is known of what a node does."""
    return node.target in _RULES


def is_moved(node: Node) -> bool:
    """Whether a node brings values to other places, and makes none but 0."""
    return _RULES.get(node.target) in (_moved, _padded_fact, _unbound, _item)


def is_reduced(node: Node) -> bool:
    """Whether a node brings together values of one row, such as those of several ranks."""
    return _RULES.get(node.target) is _reduced


def _unknown(node: Node, facts: Facts) -> Fact:
    if str(node.target).startswith("inductor_ce."):
        raise Unknown(OF_OTHERS)
    raise Unknown(f"{_name(node)} may mix rows")


def _name(node: Node) -> str:
    return str(node.target).removeprefix("aten.").removeprefix("prims.").split(".")[0]


def _known(arg: Any, facts: Facts) -> Fact:
    fact = facts.get(arg, EARLY) if isinstance(arg, Node) else Fact(is_zero=arg == 0)
    if fact.why_not:
        raise Unknown(fact.why_not)
    return fact


def _pointwise(node: Node, facts: Facts) -> Fact:
    """Any function, of values without a factor."""
    known = [_known(source, facts) for source in node.all_input_nodes]
    factors = [fact.factor for fact in known if fact.factor]
    if factors:
        raise Unknown(f"{_name(node)} is not linear in {named(*factors)}")
    return Fact(rows=_merged(node, facts))


def _merged(node: Node, facts: Facts) -> Tensor | None:
    """The rows of a pointwise node."""
    known = [(source, _known(source, facts).rows) for source in node.all_input_nodes]
    given = [rows for _, rows in known if rows is not None]
    if not given:
        return None
    shape = facts.shape_of(node)
    given = [rows.expand(shape) for rows in given]
    own = tuple(slice(None if any(r.stride(d) for r in given) else 1) for d in range(len(shape)))
    merged = torch.full([], NO_ROW)
    for rows in (rows[own] for rows in given):
        if bool(((merged != rows) & (merged != NO_ROW) & (rows != NO_ROW)).any()):
            raise Unknown(f"{_name(node)} brings rows together")
        merged = torch.maximum(merged, rows)
    return merged.expand(shape)


def _times(power: int) -> Callable[[Node, Facts], Fact]:
    def rule(node: Node, facts: Facts) -> Fact:
        left, right = (_known(arg, facts) for arg in node.args[:2])
        if node.kwargs:
            raise Unknown(f"{_name(node)} is not linear in the upstream gradient")
        powers = dict(left.factor)
        for scalar, p in right.factor:
            powers[scalar] = powers.get(scalar, 0) + power * p
        # A power of 0 is kept: what has it is not to be had before the scalar is.
        factor = tuple(sorted(powers.items(), key=lambda item: item[0].name))
        _check_floating(node, factor)
        return Fact(factor, _merged(node, facts), left.is_zero)

    return rule


def _linear(node: Node, facts: Facts) -> Fact:
    """Pointwise and linear in all that has a factor: a sum, a cast, a sign."""
    known = [_known(arg, facts) for arg in node.args if isinstance(arg, (Node, int, float))]
    factor = _common(node, known)
    _check_floating(node, factor)
    return Fact(factor, _merged(node, facts))


def _check_floating(node: Node, factor: Factor) -> None:
    if factor and not example_of(node).is_floating_point():
        raise Unknown(f"{_name(node)} rounds what has an upstream gradient to an integer")


def _common(node: Node, known: list[Fact]) -> Factor:
    factors = {fact.factor for fact in known if not fact.is_zero}
    if len(factors) > 1:
        raise Unknown(apart(factors, f"{_name(node)} brings different upstream gradients together"))
    return factors.pop() if factors else ()


def _cast(node: Node, facts: Facts) -> Fact:
    fact = _known(node.args[0], facts)
    _check_floating(node, fact.factor)
    return Fact(fact.factor, _merged(node, facts), fact.is_zero)


def _where(node: Node, facts: Facts) -> Fact:
    condition, *choices = (_known(arg, facts) for arg in node.args)
    if condition.factor:
        raise Unknown(f"where depends on {named(condition.factor)}")
    return Fact(_common(node, choices), _merged(node, facts))


def _moved(node: Node, facts: Facts) -> Fact:
    """Views, and what puts values in places: done on row numbers as it is on values."""
    sources = [arg for arg in node.all_input_nodes if tensor_of(arg) is not None]
    known = [_known(source, facts) for source in sources]
    if all(fact.rows is None for fact in known):
        return Fact(_common(node, known))
    args, kwargs = map_arg((node.args, node.kwargs), lambda source: _row_numbers(source, facts))
    move: Any = _MOVES.get(node.target, node.target)
    rows = move(*args, **kwargs)
    return Fact(_common(node, known), rows)


def _row_numbers(node: Node, facts: Facts) -> Any:
    if tensor_of(node) is None:
        value = node.meta["val"]
        return facts.size_of(value) if isinstance(value, (int, torch.SymInt)) else value
    rows = _known(node, facts).rows
    return torch.tensor(NO_ROW).expand(facts.shape_of(node)) if rows is None else rows


def _padded(rows: Tensor, pad: list[int], value: float = 0) -> Tensor:
    return aten.constant_pad_nd.default(rows, pad, NO_ROW)


def _padded_fact(node: Node, facts: Facts) -> Fact:
    if len(node.args) > 2 and node.args[2] != 0 and _known(node.args[0], facts).factor:
        raise Unknown("constant_pad_nd is not linear in the upstream gradient")
    return _moved(node, facts)


def _unbound(node: Node, facts: Facts) -> Fact:
    return _known(node.args[0], facts)  # its parts are taken by getitem


def _item(node: Node, facts: Facts) -> Fact:
    source, index = args_of(node)
    fact = _known(source, facts)
    if _RULES.get(source.target) is not _unbound:
        raise Unknown(f"{_name(source)} may mix rows")
    if fact.rows is None:
        return Fact(fact.factor)
    args, kwargs = map_arg((source.args, source.kwargs), lambda node: _row_numbers(node, facts))
    split: Any = source.target
    return Fact(fact.factor, split(*args, **kwargs)[index])


def _looked_up(node: Node, facts: Facts) -> Fact:
    """What early indices pick of numbers of no rows, as the share of a document for each of its tokens."""
    fact = _known(node.all_input_nodes[0], facts)
    if fact.rows is not None or not all(facts.get(s, EARLY).is_early for s in node.all_input_nodes[1:]):
        return _unknown(node, facts)
    return fact


def _reduced(node: Node, facts: Facts) -> Fact:
    """A reduction over elements that depend on the same row, such as those of several ranks, or labels."""
    fact = _known(node.args[0], facts)
    is_linear = node.target == aten.sum.dim_IntList
    if is_linear and fact.factor:
        _check_floating(node, fact.factor)
    if is_linear and fact.rows is None:
        return Fact(fact.factor)
    dims, keepdim, *_ = (*args_of(node)[1:3], None, False) if len(node.args) < 3 else args_of(node)[1:3]
    dims = [dims] if isinstance(dims, int) else dims
    if fact.rows is None or not dims or (fact.factor and not is_linear):
        raise Unknown(f"{_name(node)} brings rows together")
    largest = fact.rows.amax(dims, keepdim=True)
    if bool(((fact.rows != largest) & (fact.rows != NO_ROW)).any()):
        raise Unknown(f"{_name(node)} brings rows together")
    return Fact(fact.factor, largest if keepdim else largest.amax(dims))


def _gathered(node: Node, facts: Facts) -> Fact:
    fact = _known(node.args[0], facts)
    if fact.factor or fact.rows is None or not of_own_rows(fact):
        raise Unknown("the ranks exchange what is no statistic of their own rows")
    return Fact(rows=torch.cat([fact.rows] * args_of(node)[1]))


def _waited(node: Node, facts: Facts) -> Fact:
    return _known(node.args[0], facts)


_MOVES: dict[Any, Any] = {
    aten.constant_pad_nd.default: _padded,
    aten._unsafe_view.default: aten.reshape.default,
    aten.view.default: aten.reshape.default,
}

_RULES: dict[Any, Callable[[Node, Facts], Fact]] = {
    **dict.fromkeys((aten.mul.Tensor, aten.mul.Scalar), _times(1)),
    **dict.fromkeys((aten.div.Tensor, aten.div.Scalar), _times(-1)),
    **dict.fromkeys((aten.add.Tensor, aten.sub.Tensor, aten.neg.default), _linear),
    **dict.fromkeys((prims.convert_element_type.default, aten._to_copy.default, aten.clone.default), _cast),
    **dict.fromkeys((aten.alias.default, aten.detach.default), _cast),
    aten.where.self: _where,
    **dict.fromkeys(
        (
            *(aten.view.default, aten.reshape.default, aten._unsafe_view.default, aten.expand.default),
            *(aten.permute.default, aten.transpose.int, aten.t.default, aten.unsqueeze.default),
            *(aten.squeeze.dim, aten.squeeze.dims, aten.squeeze.default, aten.select.int, aten.slice.Tensor),
            *(aten.cat.default, aten.stack.default, aten.slice_scatter.default, aten.select_scatter.default),
        ),
        _moved,
    ),
    aten.constant_pad_nd.default: _padded_fact,
    **dict.fromkeys((aten.unbind.int, aten.split_with_sizes.default), _unbound),
    operator.getitem: _item,
    **dict.fromkeys((aten.index.Tensor, aten.gather.default, aten.index_select.default), _looked_up),
    **dict.fromkeys((aten.sum.dim_IntList, aten.amax.default, aten.amin.default, aten.any.dim), _reduced),
    ALL_GATHER: _gathered,
    WAIT: _waited,
}


_KEEPS_ZERO = {target for target, rule in _RULES.items() if rule in (_moved, _cast)}


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
            if not of_own_rows(fact):
                return (), "a gradient depends on the statistics of other rows"
        if any(facts[part].factor for part in known):
            return (), "the maxima depend on the upstream gradient"
        factors.add(facts[coefficients].factor)
    if len(factors) > 1:
        return (), apart(factors, "the losses have upstream gradients of their own")
    return factors.pop() if factors else (), ""


def of_own_rows(fact: Fact) -> bool:
    """Whether each element along the last dimension depends on the row of its place alone."""
    if fact.rows is None:
        return True
    own = torch.arange(fact.rows.shape[-1])
    return bool(((fact.rows == own) | (fact.rows == NO_ROW)).all())


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
