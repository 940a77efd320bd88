"""The rules by which facts about a node come of those about its sources: see `row_locality.py`."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node
from torch.fx.node import map_arg

from ..common.compat.distributed import ALL_GATHER, WAIT
from ..graph.shapes import example_of, tensor_of
from ..graph.walk import args_of
from .facts import EARLY, NO_ROW, Fact, Factor, Facts, Unknown, apart, named
from .kinds import is_pointwise

aten, prims = torch.ops.aten, torch.ops.prims

OF_OTHERS = "the gradients are made of what another head makes of other logits"


def rule_of(node: Node) -> Callable[[Node, Facts], Fact]:
    """The rule of a node that is made of what is not early. It raises Unknown where it knows nothing."""
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


def keeps_zero(node: Node) -> bool:
    """Whether a node makes 0 of 0: a view, a copy, a cast."""
    return _RULES.get(node.target) in (_moved, _cast)


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
    if fact.factor or fact.rows is None or not fact.is_of_own_rows:
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
