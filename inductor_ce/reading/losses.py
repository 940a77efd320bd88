"""The losses of torch.nn.functional: cross_entropy, nll_loss, kl_div."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import sympy
import torch
from torch.fx import Node

from .. import algebra
from ..common.compat.graphs import legacy_reduction
from ..common.findings import Reason, Refusal
from ..graph.shapes import shape_of, tensor_of
from .arithmetic import minus, times
from .context import Context, is_labels
from .operands import Operands, operands
from .picks import diagonal
from .values import Columns, LossValue, Outcome, Reduction, RowValue, Value, VocabValue

REDUCTIONS = ("none", "mean", "sum")


def modernised(args: dict[str, Any]) -> dict[str, Any]:
    """The arguments, the ignore_index specialised where Dynamo keeps it symbolic, as under dynamic=True.

    A symbolic smoothing is specialised by torch itself, which then begins anew. The arguments size_average
    and reduce, which torch has deprecated, are the reduction that they stand for.
    """
    if args.get("size_average") is not None or args.get("reduce") is not None:
        how = legacy_reduction(args.get("size_average"), args.get("reduce"), emit_warning=False)
        args = {**args, "size_average": None, "reduce": None, "reduction": how}
    index = args.get("ignore_index")
    value = index.meta.get("example_value") if isinstance(index, Node) else None
    return {**args, "ignore_index": int(value)} if isinstance(value, torch.SymInt) else args


def cross_entropy(context: Context, args: dict[str, Any]) -> Outcome:
    """As torch has it, over logits, or log-probabilities, that may have been seen before."""
    args = modernised(args)
    value = _class_axis(context, args)
    smoothing = args.get("label_smoothing", 0.0)
    refusal = _refused_arguments(args)
    if value is None or refusal is not None or tensor_of(args.get("target")) is None:
        return None if value is None else refusal
    if not isinstance(smoothing, (int, float)):
        return _not_understood("The label smoothing is not a number that is fixed in the graph.")
    if value.after or algebra.log_softmax(value.expr) is None:
        value = context.opaque(args["input"], value.axis)
    log_probs = algebra.log_softmax(value.expr)
    assert log_probs is not None
    if is_labels(args.get("target")):
        return _from_indices(context, args, value, log_probs, algebra.number(smoothing))
    return _from_probabilities(context, args, value, log_probs, algebra.number(smoothing))


def nll_loss(context: Context, args: dict[str, Any]) -> Outcome:
    """As torch has it, over log-probabilities."""
    args = modernised(args)
    known = context.known(args.get("input"))
    if not isinstance(known, VocabValue) or not is_labels(args.get("target")):
        return None
    value = _class_axis(context, args)
    refusal = _refused_arguments(args)
    if value is None or refusal is not None:
        return None if value is None else refusal
    if value.after:
        return _picked_afterwards(context, args, value) if args.get("weight") is None else None
    return _from_indices(context, args, value, value.expr, sympy.Integer(0))


def _picked_afterwards(context: Context, args: dict[str, Any], value: VocabValue) -> Value | None:
    """nll_loss of a function of log-probabilities."""
    y = context.label(value, args["target"])
    picked = algebra.at(value.expr, y)
    if picked is None:
        return None
    reduction = Reduction(args.get("reduction", "mean"), y, args.get("ignore_index", -100))
    after = (*value.after, torch.neg)
    return LossValue(value.logits, value.steps, picked, reduction, value.wide, value.detached, after)


def _class_axis(context: Context, args: dict[str, Any]) -> VocabValue | None:
    z = args.get("input")
    return None if tensor_of(z) is None else context.vocab(z, class_dimension(z))  # type: ignore[arg-type]


def class_dimension(z: Node) -> int:
    """Where the losses of torch have the classes."""
    return 0 if len(shape_of(z)) == 1 else 1


def _refused_arguments(args: dict[str, Any]) -> Refusal | None:
    """Which argument of a loss with a target is none that the algebra has."""
    if args.get("reduction", "mean") not in REDUCTIONS:
        return _not_understood(f"The reduction {args['reduction']!r} is none of torch's.")
    if not isinstance(args.get("ignore_index", -100), int):
        return _not_understood("The ignore_index is not a number that is fixed in the graph.")
    return None


def _not_understood(fact: str) -> Refusal:
    return Refusal(Reason.NOT_UNDERSTOOD, fact)


def _weights(context: Context, args: dict[str, Any], value: VocabValue) -> algebra.Vocab | Refusal | None:
    """The class weights as a vocabulary expression, 1 without any."""
    weight = args.get("weight")
    if weight is None:
        return algebra.as_vocab(sympy.Integer(1))
    weights = context.weights(weight, value, args["input"])
    if isinstance(weights, Refusal):
        return Refusal(Reason.CLASS_WEIGHTS, "A gradient is wanted of the class weights.")
    return weights


def _from_indices(
    context: Context, args: dict[str, Any], value: VocabValue, log_probs: algebra.Vocab, smoothing: sympy.Expr
) -> Outcome:
    """(1 - e) (-w_y log p_y) + e/V sum_i -w_i log p_i for each row, then the reduction."""
    weights = _weights(context, args, value)
    if weights is None or isinstance(weights, Refusal):
        return weights
    y = context.label(value, args["target"])
    weighted = log_probs * weights
    picked = algebra.at(weighted, y)
    uniform = algebra.total(weighted) if smoothing else sympy.Integer(0)
    if picked is None or uniform is None:
        return None
    expr = algebra.expand(-(1 - smoothing) * picked - smoothing * uniform / algebra.V)
    symbols = {q for b, _ in weights.terms for q in b.q}
    how, ignored = args.get("reduction", "mean"), args.get("ignore_index", -100)
    reduction = Reduction(how, y, ignored, next(iter(symbols), None))
    return LossValue(value.logits, value.steps, expr, reduction, value.wide, value.detached)


def _from_probabilities(
    context: Context, args: dict[str, Any], value: VocabValue, log_probs: algebra.Vocab, smoothing: sympy.Expr
) -> Outcome:
    """-sum_i w_i ((1 - e) q_i + e/V) log p_i for each row; the mean is over rows."""
    weights = _weights(context, args, value)
    if weights is None or isinstance(weights, Refusal):
        return weights
    target = _columns_of(context, args["target"], value, args["input"])
    if target is None:
        return _not_understood("The target holds class probabilities that are not read beside these logits.")
    if isinstance(target, Refusal):
        fact = "The target holds class probabilities of which a gradient is wanted."
        return Refusal(Reason.SOFT_TARGETS, fact)
    smoothed = target * (1 - smoothing) + smoothing / algebra.V
    expr = algebra.total(-(log_probs * weights * smoothed))
    if expr is None:
        return None
    reduction = Reduction(args.get("reduction", "mean"))
    return LossValue(value.logits, value.steps, expr, reduction, value.wide, value.detached)


def _columns_of(context: Context, arg: Any, value: VocabValue, like: Node) -> algebra.Vocab | Refusal | None:
    """A target of the shape of the logits: made of labels and numbers, or a tensor from outside."""
    known = context.known(arg)
    if isinstance(known, Columns) and known.axis in (None, value.axis):
        return context.met(known, arg, value)
    return context.outside(arg, value, like)


def kl_div(context: Context, args: dict[str, Any]) -> Outcome:
    """q log q - q input, or exp(q) (q - input) where the target is a logarithm."""
    args = modernised(args)
    how = args.get("reduction", "mean")
    if how not in (*REDUCTIONS, "batchmean"):
        return _not_understood(f"The reduction {how!r} is none of torch's.")
    source, target = args.get("input"), args.get("target")
    read = operands(context, source, target)
    if not isinstance(read, Operands):
        return read
    if not isinstance(read.frame, VocabValue):
        return None
    log_p, q = map(algebra.as_vocab, read.exprs)
    divergence = _divergence_from_log if args.get("log_target") else _divergence
    terms = divergence(context, read.frame, log_p, q, args)
    if terms is None or isinstance(terms, Refusal):
        return terms
    wide = read.wide | {context.node}
    if how == "none":
        return replace(read.frame, expr=terms, wide=wide)
    return reduced(replace(read.frame, expr=terms, wide=read.wide), "sum" if how == "sum" else how, source)


def _divergence(
    context: Context, frame: VocabValue, log_p: algebra.Vocab, q: algebra.Vocab, args: dict[str, Any]
) -> algebra.Vocab | Refusal | None:
    log_q = algebra.log(q)
    negentropy: algebra.Vocab | Refusal | None = None if log_q is None else times(q, log_q)
    if negentropy is None:
        negentropy = algebra.in_each_column(_xlogx, q, context.masks(frame))
    if negentropy is None:
        negentropy = context.outside(args["target"], frame, args["input"], made="xlogx")
    if negentropy is None or isinstance(negentropy, Refusal):
        return negentropy
    return minus(negentropy, q * log_p)


def _divergence_from_log(
    context: Context, frame: VocabValue, log_p: algebra.Vocab, log_q: algebra.Vocab, args: dict[str, Any]
) -> algebra.Vocab | Refusal | None:
    q: algebra.Vocab | Refusal | None = algebra.exp(log_q)
    if q is None:
        q = context.outside(args["target"], frame, args["input"], made="exp")
    return q if q is None or isinstance(q, Refusal) else times(q, log_q + (-log_p))


def _xlogx(number: sympy.Expr) -> sympy.Expr:
    value = float(number)
    return algebra.number(value * math.log(value)) if value > 0 else number * 0


def reduced(value: VocabValue, how: str, source: Any) -> LossValue | None:
    """The sum over all classes and rows, or a mean: over both, or over the first dimension of `source`."""
    expr = algebra.total(value.expr)
    if expr is None:
        return None
    if how == "mean":
        expr = algebra.expand(expr / algebra.V)
    batch = source if how == "batchmean" else None
    return LossValue(value.logits, value.steps, expr, Reduction(how, batch=batch), value.wide, value.detached)


def trace(context: Context, args: dict[str, Any]) -> Value | None:
    """The sum over the rows of what is picked on the diagonal."""
    rows = diagonal(context, args)
    if not isinstance(rows, RowValue) or rows.after:
        return None
    return LossValue(rows.logits, rows.steps, rows.expr, Reduction("sum"), rows.wide, rows.detached)


def over_all(how: str, context: Context, args: dict[str, Any]) -> Value | None:
    """x.sum() and x.mean() of a vocabulary value."""
    value = context.known(args.get("input"))
    whole = isinstance(value, VocabValue) and not value.after
    return reduced(value, how, args["input"]) if whole else None  # type: ignore[arg-type]
