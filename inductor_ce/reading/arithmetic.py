"""Steps of arithmetic between vocabulary values, row values and numbers over the same logits."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import sympy
import torch
from torch.fx import Node

from .. import algebra
from ..common.findings import Reason, Refusal
from ..graph.shapes import equal, same_shape, shape_of, tensor_of
from . import spellings
from .context import Context
from .left_out import is_zero, left_out
from .operands import Number, Operands, applied, operands, plain
from .targets import Function, mask_of
from .values import Columns, OnLogits, Outcome, RowValue, Value, VocabValue


def binary(combine: Callable[[Any, Any], Any], *names: str) -> Function:
    """The step of an operator between values over the same logits, or between a value and a number."""
    first, second = names or ("input", "other")

    def step(context: Context, args: dict[str, Any]) -> Outcome:
        for name, usual in (("alpha", 1), ("rounding_mode", None)):
            if args.get(name, usual) != usual:
                return Refusal(Reason.NOT_UNDERSTOOD, f"Its {name} is {args[name]!r}.")
        return applied(context, operands(context, args.get(first), args.get(second)), combine)

    return step


def unary(
    on_vocab: Callable[[algebra.Vocab], algebra.Vocab | None],
    on_row: Callable[[sympy.Expr], sympy.Expr | None] = lambda row: None,
) -> Function:
    """The step of a function, given as it is over the vocabulary and for a number of a row."""

    def function(expr: Any) -> Any:
        return on_vocab(expr) if isinstance(expr, algebra.Vocab) else on_row(expr)

    return lambda context, args: applied(context, operands(context, args.get("input")), function)


def plus(a: Any, b: Any) -> Any:
    return b + a if isinstance(b, algebra.Vocab) else a + b


def minus(a: Any, b: Any) -> Any:
    return plus(a, -b)


def times(a: Any, b: Any) -> Any:
    """a b; None for what is the user's own, or would not be the same where one is infinite or NaN."""
    if isinstance(a, sympy.Expr) and isinstance(b, sympy.Expr) and not (a.is_number or b.is_number):
        return None  # a product of two row values is the user's own, of size [N]
    if a == 0 or b == 0:
        return None  # not 0 where the other is NaN
    if _brings_back(a, b) or _brings_back(b, a):
        return None  # nor what was left out where the other is infinite
    product = b * a if isinstance(b, algebra.Vocab) else a * b
    return None if isinstance(product, algebra.Vocab) and product.degree > algebra.MAX_DEGREE else product


def _brings_back(a: Any, b: Any) -> bool:
    both = isinstance(a, algebra.Vocab) and isinstance(b, algebra.Vocab)
    return both and algebra.leaves_out(a) and algebra.is_weighed(b)


def over(a: Any, b: Any) -> Any:
    """a / b for a number b of each row."""
    if isinstance(b, algebra.Vocab):
        constant = b.get(algebra.ONE)
        b = constant if b == algebra.as_vocab(constant) else None
    return times(a, 1 / b) if b is not None and b != 0 else None


def times_log(a: Any, b: Any) -> Any:
    """a log b, of which b has the vocabulary axis."""
    logarithm = algebra.log(b) if isinstance(b, algebra.Vocab) else None
    return None if logarithm is None else times(a, logarithm)


def entropy_term(a: algebra.Vocab) -> Any:
    """-a log a"""
    product = times_log(a, a)
    return None if product is None else -product


def row_log(expr: sympy.Expr) -> sympy.Expr | None:
    """log where it undoes an exponential; any other logarithm of a row stays the user's own operation.

    Of exponentials that are weighed, as by a mask, log sum_i q_i exp(z_i) = lse + log sum_i q_i p_i.
    """
    if not expr.has(sympy.exp):
        return None
    weighed = [factor for factor in sympy.Mul.make_args(expr) if isinstance(factor, algebra.mean_p_of)]
    if len(weighed) != 1:
        return algebra.row_log(expr)
    logarithm = algebra.row_log(expr / weighed[0])
    return None if logarithm is None else logarithm + sympy.log(weighed[0])


add = binary(plus)
sub = binary(minus)
reversed_sub = binary(minus, "other", "input")
mul = binary(times)
div = binary(over)
negative = unary(lambda value: -value, lambda row: -row)
xlogy = binary(times_log)
entropy_terms = unary(entropy_term)


def logarithm(context: Context, args: dict[str, Any]) -> Outcome:
    """The natural logarithm, or that to another base."""
    unit = 1 / sympy.log(args["base"]) if "base" in args else sympy.Integer(1)

    def scaled(logarithm: Any) -> Any:
        return None if logarithm is None else logarithm * unit

    return unary(lambda value: scaled(algebra.log(value)), lambda row: scaled(row_log(row)))(context, args)


# What may stand between an exponential and the sum that makes it that of logits.
_SUMMED = ("mul", "masked_fill", "where", "scatter")


def exponential(context: Context, args: dict[str, Any]) -> Outcome:
    """exp of what is known; of logits, if it is summed over one dimension."""
    value = unary(algebra.exp)(context, args)
    if value is not None and not isinstance(value, Refusal):
        return value
    source = args.get("input")
    axis = next(_summed_dims(context.node), None)
    if axis is None or not isinstance(source, Node) or isinstance(context.known(source), (RowValue, Columns)):
        return None
    logits = context.take(source, axis, algebra.exp)
    if logits is None:
        return None
    exp = algebra.exp(logits.expr)
    return None if exp is None else replace(logits, expr=exp, wide=logits.wide | {context.node})


def _summed_dims(node: Node) -> Iterator[int]:
    """The dimensions over which somebody sums this node, its product, or what a mask leaves of it.

    The last two if no other reads its source, or the logarithm of the sum is taken.
    """
    yield from _dims_of_sums(node)
    alone = all(len(source.users) == 1 for source in node.all_input_nodes)
    for user in node.users:
        if any(spellings.is_step(user, name) for name in _SUMMED) and (alone or spellings.has_log(user)):
            yield from _dims_of_sums(user)


def _dims_of_sums(node: Node) -> Iterator[int]:
    for user in node.users:
        spelled = spellings.read(user)
        if spelled is not None and spelled[0].name == "sum" and spelled[1].get("input") is node:
            dim = spellings.one_dim(spelled[1].get("dim"))
            if isinstance(dim, int):
                yield dim


def power(context: Context, args: dict[str, Any]) -> Outcome:
    """A power of a vocabulary value; a row's is the user's own."""
    exponent = args.get("exponent", 2)
    if not isinstance(exponent, Number) or not math.isfinite(exponent):
        return None
    whole = exponent == int(exponent)
    order = int(exponent) if whole else algebra.number(exponent)

    def on_row(row: sympy.Expr) -> sympy.Expr | None:
        return algebra.expand(row**order) if whole and isinstance(row, sympy.exp) else None

    return unary(lambda value: algebra.power(value, order), on_row)(context, args)


def elementwise(context: Context, args: dict[str, Any]) -> Value | None:
    """A function of each element that the algebra does not have: it may still be done after picking."""
    source, *others = context.node.all_input_nodes
    value, example, result = context.known(source), tensor_of(source), tensor_of(context.node)
    if not isinstance(value, VocabValue) or others or example is None or result is None:
        return None
    if not result.is_floating_point() or not same_shape(example.shape, result.shape):
        return None
    return replace(value, after=(*value.after, context.node), wide=value.wide | {context.node})


def or_afterwards(step: Function) -> Function:
    """A step, or else the same done to what is picked."""

    def first_now(context: Context, args: dict[str, Any]) -> Outcome:
        outcome = step(context, args)
        if outcome is not None and not isinstance(outcome, Refusal):
            return outcome
        afterwards = elementwise(context, args)
        return outcome if afterwards is None else afterwards

    return first_now


def product_of(read: Operands | Refusal | None) -> VocabValue | Refusal | None:
    """The product of two operands that has the vocabulary axis."""
    if not isinstance(read, Operands):
        return read
    if not isinstance(read.frame, VocabValue):
        return None
    product = times(*map(algebra.as_vocab, read.exprs))
    return None if product is None else replace(read.frame, expr=product, wide=read.wide)


def summed(value: VocabValue, kept: int | None = None) -> RowValue | None:
    """The sum over the vocabulary."""
    total = algebra.total(value.expr)
    return None if total is None else value.reduced_to(total, kept)


def matmul(context: Context, args: dict[str, Any]) -> Outcome:
    """p @ w with w [V] or [V, 1]: the sum over the vocabulary of a product."""
    left, right = args.get("input"), args.get("other")
    value, weights = context.known(left), tensor_of(right)
    if not isinstance(value, VocabValue) or value.after or weights is None or not isinstance(left, Node):
        return None
    column = weights.dim() == 2 and equal(weights.shape[1], 1)
    if value.axis != len(shape_of(left)) - 1 or not (weights.dim() == 1 or column):
        return None
    weighed = context.weights(right, value, left)
    if weighed is None or isinstance(weighed, Refusal):
        return weighed
    product = times(value.expr, weighed)
    return None if product is None else summed(replace(value, expr=product), value.axis if column else None)


def vecdot(context: Context, args: dict[str, Any]) -> Outcome:
    """The sum of a product over one dimension."""
    value, dim = product_of(operands(context, args.get("input"), args.get("other"))), args.get("dim", -1)
    if not isinstance(value, VocabValue):
        return value
    if tensor_of(context.node) is None:
        return None
    return summed(value) if dim % (len(shape_of(context.node)) + 1) == value.axis else None


def clamp(context: Context, args: dict[str, Any]) -> Outcome:
    """A bound that no finite number passes, as torch.distributions sets to log-probabilities."""
    example, bound = tensor_of(args.get("input")), args.get("min")
    if example is None or args.get("max") is not None or not isinstance(bound, Number):
        return None
    if not example.is_floating_point() or bound > torch.finfo(example.dtype).min:
        return None
    return unary(lambda value: value)(context, args)


def where(context: Context, args: dict[str, Any]) -> Outcome:
    return _chosen(context, args.get("condition"), args.get("input"), args.get("other"))


def masked_fill(context: Context, args: dict[str, Any]) -> Outcome:
    return _chosen(context, args.get("mask"), args.get("value"), args.get("input"))


def _chosen(context: Context, mask: Any, yes: Any, no: Any) -> Outcome:
    """One of two values in the column of a label, the other elsewhere."""
    if mask_of(context, mask) is None or (context.reading.apart and is_zero(context, yes)):
        kept = left_out(context, mask, yes, no)
        if kept is not None:
            return kept
    if mask_of(context, mask) is None:
        return _chosen_by_row(context, mask, yes, no)
    read = operands(context, mask, yes, no)
    return applied(context, read, lambda *exprs: algebra.select(*map(algebra.as_vocab, exprs)))


def _chosen_by_row(context: Context, mask: Any, yes: Any, no: Any) -> Outcome:
    """One of two values with the vocabulary axis for all of a row."""
    example, read = tensor_of(mask), operands(context, yes, no)
    if example is None or example.dtype != torch.bool or tensor_of(context.node) is None:
        return None
    if not isinstance(read, Operands) or not isinstance(read.frame, (VocabValue, Columns)):
        return read if isinstance(read, Refusal) else None
    result = algebra.as_vocab(sympy.Integer(0))
    for expr, made in zip(map(algebra.as_vocab, read.exprs), ("where", "where not"), strict=True):
        if expr.terms:
            chosen = _row_mask(context, mask, read.frame, made)
            if chosen is None or isinstance(chosen, Refusal):
                return chosen
            result = result + expr * chosen
    return applied(context, read, lambda *exprs: result)


def _row_mask(
    context: Context, mask: Any, frame: OnLogits | Columns, made: str
) -> sympy.Expr | Refusal | None:
    """A mask of rows as a number for each."""
    if isinstance(frame, Columns):
        return None if frame.axis is None else context.loose_outside(mask, context.node, frame.axis, made)
    if not isinstance(frame, VocabValue):
        return None
    chosen = context.outside(mask, frame, context.node, made=made)
    if chosen is None or isinstance(chosen, Refusal):
        return chosen
    number = plain(chosen)
    return number if isinstance(number, sympy.Expr) else None
