"""Entries of log-probabilities that a mask leaves out of a sum over the classes.

A mask is a product of masks: tensors that the user brings along, such as those of the actions that are
allowed or of a teacher's infinities, and where the logits themselves are above -inf.

NOTE Infinities of the other sign. isinf leaves +inf out as well, but a row that holds it is NaN elsewhere.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import sympy
import torch
from torch.fx import Node

from .. import algebra
from ..common.compat.graphs import is_dtensor
from ..graph.shapes import same_shape, shape_of, tensor_of
from . import spellings
from .constants import number_of
from .context import Context
from .targets import everywhere
from .values import Columns, Outcome, Reading, VocabValue

Masks = tuple[sympy.Symbol, ...]
# How masks are joined, and what is so where they are finite, by name: (where the mask is true, it is wanted).
_JOINED = {"and": True, "or": False}
_FINITE = {"isinf": False, "isneginf": False, "isfinite": True, "eq": False, "ne": True, "gt": True}


def left_out(context: Context, mask: Any, yes: Any, no: Any) -> Outcome:
    """What is made of log-probabilities in the columns where a mask is true, or is not, and 0 elsewhere."""
    if is_zero(context, yes) == is_zero(context, no):
        return None
    wanted = is_zero(context, no)
    arg = yes if wanted else no
    value, example = context.known(arg), tensor_of(context.node)
    if not isinstance(value, VocabValue) or value.after or not is_normalised(value.expr):
        return None
    if example is None or not same_shape(example.shape, shape_of(arg)) or not _is_mask(mask):
        return None
    masks = _masks(context, mask, wanted, value, arg)
    if masks is None:
        return None
    kept = algebra.kept(value.expr, algebra.Vocab.of({algebra.Monomial(q=masks): sympy.Integer(1)}))
    if kept is None or kept.degree > algebra.MAX_DEGREE:
        return None
    return replace(value, expr=kept, wide=value.wide | {context.node})


def is_zero(context: Context, arg: Any) -> bool:
    """Whether an argument is 0 everywhere."""
    value = everywhere(arg) or context.known(arg)
    return isinstance(value, Columns) and value.expr == algebra.as_vocab(sympy.Integer(0))


def is_normalised(value: algebra.Vocab) -> bool:
    """Whether a value is made of log-probabilities, or of probabilities."""
    return any(b.p or algebra.is_normalised(c) for b, c in value.terms)


def _is_mask(arg: Any) -> bool:
    example = tensor_of(arg)
    return example is not None and example.dtype == torch.bool


def _masks(context: Context, mask: Node, wanted: bool, value: VocabValue, like: Node) -> Masks | None:
    """The masks whose product is 1 where `mask` is `wanted`, in a tensor of the shape of `like`."""
    spelled = spellings.read(mask) if context.is_as_made(mask) else None
    name, args = ("", {}) if spelled is None else (spelled[0].name, spelled[1])
    if name == "not" and _is_mask(args["input"]):
        return _masks(context, args["input"], not wanted, value, like)
    if _JOINED.get(name) == wanted and _is_mask(args["input"]) and _is_mask(args["other"]):
        parts = [_masks(context, args[part], wanted, value, like) for part in ("input", "other")]
        return None if None in parts else tuple(sorted({*parts[0], *parts[1]}, key=str))  # type: ignore[misc]
    is_finite = _FINITE.get(name) == wanted and args.get("other", -math.inf) == -math.inf
    if is_finite and _is_of_logits(Context(context.reading, mask), args["input"], value):
        return (algebra.FINITE,)
    symbol = context.mask(mask, value, like, "where" if wanted else "where not")
    return None if symbol is None else (symbol,)


def _is_of_logits(there: Context, arg: Any, value: VocabValue) -> bool:
    """Whether an argument of a mask is the logits of a value, arranged as it is, or before a temperature."""
    example = tensor_of(arg)
    if example is None or example.dim() <= value.axis or is_dtensor(example):
        return False
    seen = there.vocab(arg, value.axis)
    if seen is None or seen.expr != algebra.LOGITS or seen.after:
        return False
    places, logits = [(value.logits, value.steps)], value
    while (before := _before_temperature(there.reading, logits)) is not None:
        logits = replace(before, steps=before.steps + logits.steps)
        places.append((logits.logits, logits.steps))
    return (seen.logits, seen.steps) in places


def _before_temperature(reading: Reading, value: VocabValue) -> VocabValue | None:
    """What the logits of a value are made of by a positive number that makes infinite no other than is."""
    node, timeline = value.logits.node, reading.timeline
    spelled = spellings.read(node)
    if spelled is None or not timeline.unchanged(node, node):
        return None
    step, args = spelled
    a, b = args.get("input"), args.get("other")
    if step.name == "mul" and number_of(reading, a) is not None:
        a, b = b, a
    number = number_of(reading, b)
    if number is None or number <= 0 or args.get("rounding_mode") is not None or not isinstance(a, Node):
        return None
    shrinks = (step.name == "mul" and number <= 1) or (step.name == "div" and number >= 1)
    return Context(reading, node).vocab(a, value.logits.axis) if shrinks else None
