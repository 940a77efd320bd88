"""Steps along the whole vocabulary: log-probabilities, and what reduces them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import sympy
from torch.fx import Node

from .. import algebra
from ..algebra import symbols
from ..common.findings import Reason, Refusal
from ..graph.shapes import example_of, same_shape, shape_of, tensor_of
from . import indexing, losses, spellings
from .arithmetic import product_of, summed
from .class_ranges import of_range
from .context import Context, axis_of
from .operands import operands
from .targets import Function
from .values import Outcome, VocabValue
from .views import broadcast_operand, cast_keeps

CANCELLING = Refusal(
    Reason.NOT_UNDERSTOOD,
    "It sums differences between powers of probabilities and a target, which are small where these are near "
    "each other: the sums of the parts are not.",
)
LEFT_OUT_OF_SEVERAL = Refusal(
    Reason.NOT_UNDERSTOOD,
    "It sums several numbers beside the log-probabilities over the classes whose logits are finite, which "
    "may cancel: leave out what is constant, such as the entropy of the target.",
)


def _on_vocab(function: Callable[[algebra.Vocab], algebra.Vocab | None]) -> Function:
    """The step of a function of the whole axis that keeps it, such as log_softmax."""

    def step(context: Context, args: dict[str, Any]) -> Outcome:
        dim = _default_dim(args) if args.get("dim") is None else spellings.one_dim(args["dim"])
        value = context.take(args.get("input"), dim, function)
        if value is None or value.after or not _dtype_keeps(args):
            return None if value is None or value.after else _refused_cast(args)
        expr = function(value.expr)
        return None if expr is None else replace(value, expr=expr, wide=value.wide | {context.node})

    return step


def _default_dim(args: dict[str, Any]) -> int | None:
    """The dimension of softmax where none is given, as torch guesses it, with a warning."""
    example = tensor_of(args.get("input"))
    return None if example is None else 0 if example.dim() in (0, 1, 3) else 1


def _over_vocab(
    function: Callable[[algebra.Vocab], sympy.Expr | None],
    over_all: Function = lambda context, args: None,
    reads_logits: bool = True,
) -> Function:
    """The step of a reduction over the vocabulary; over everything, where no dimension is given."""

    def step(context: Context, args: dict[str, Any]) -> Outcome:
        if tensor_of(context.node) is None:
            return None
        if not _dtype_keeps(args):
            return _refused_cast(args)
        dim = spellings.one_dim(args.get("dim"))
        if dim is None:
            return over_all(context, args)
        if reads_logits:
            value = context.take(args.get("input"), dim, function)
        else:
            value = context.vocab(args.get("input"), dim)
        if value is None or value.after:
            return None
        expr = function(value.expr)
        kept = value.axis if args.get("keepdim") else None
        if expr is None:
            return None if reads_logits else _why_no_sum(value.expr)
        return value.reduced_to(expr, kept)

    return step


def _over_classes(how: str, function: Callable[[algebra.Vocab], sympy.Expr | None]) -> Function:
    """The step of a sum, or a mean, over all classes or a range of them; or over everything."""
    over_all = _over_vocab(function, partial(losses.over_all, how), reads_logits=False)

    def step(context: Context, args: dict[str, Any]) -> Outcome:
        some = of_range(context, args.get("input"), how)
        if some is None or not _dtype_keeps(args):
            return over_all(context, args)
        if args.get("dim") is None:
            return losses.reduced(some, how, None)
        dim = axis_of(args["input"], spellings.one_dim(args["dim"]))
        expr = function(some.expr) if dim == some.axis else None
        return None if expr is None else some.reduced_to(expr, dim if args.get("keepdim") else None)

    return step


def _why_no_sum(value: algebra.Vocab) -> Refusal | None:
    if algebra.leaves_out_of_several(value):
        return LEFT_OUT_OF_SEVERAL
    return CANCELLING if algebra.cancels(value) else None


def _mean(value: algebra.Vocab) -> sympy.Expr | None:
    total = algebra.total(value)
    return None if total is None else algebra.expand(total / algebra.V)


def _dtype_keeps(args: dict[str, Any]) -> bool:
    """Whether the argument `dtype=` casts the operand without loss, if it is given."""
    example, dtype = tensor_of(args.get("input")), args.get("dtype")
    return dtype is None or example is None or cast_keeps(example.dtype, dtype)


log_softmax = _on_vocab(algebra.log_softmax)
softmax = _on_vocab(algebra.softmax)
logsumexp = _over_vocab(algebra.logsumexp)
sum = _over_classes("sum", algebra.total)
mean = _over_classes("mean", _mean)
# NOTE Ties. Of columns that share the maximum amax gives each a share of its gradient, max(dim) the first
# all of it.
amax = _over_vocab(algebra.peak, reads_logits=False)
maximum = _over_vocab(partial(algebra.peak, maximum=symbols.TOP), reads_logits=False)
argmax = _over_vocab(algebra.argmax, reads_logits=False)
_norm = _over_vocab(algebra.norm, reads_logits=False)


def norm(context: Context, args: dict[str, Any]) -> Outcome:
    """The square root of a sum of squares."""
    order = args.get("p", args.get("ord"))
    return _norm(context, args) if order in (None, "fro", 2) and args.get("out") is None else None


def _refused_cast(args: dict[str, Any]) -> Refusal:
    source = example_of(args["input"]).dtype
    return Refusal(Reason.NOT_UNDERSTOOD, f"Its argument dtype casts {source} to {args['dtype']}.")


def getitem(context: Context, args: dict[str, Any]) -> Outcome:
    """An element of what `max(dim)` returns, or an index into a tensor."""
    source, index = args.get("input"), args.get("index")
    spelled = spellings.read(source) if isinstance(source, Node) else None
    if isinstance(source, Node) and spelled is not None and spelled[0].name == "max":
        part = (maximum, argmax)[index](context, spelled[1])  # type: ignore[index]
        if part is not None:
            context.reading.looked_through.add(source)
        return part
    operand = broadcast_operand(context.node)
    if operand is not None:
        return context.known(operand) if same_shape(shape_of(operand), shape_of(context.node)) else None
    return indexing.getitem(context, args)


def einsum(context: Context, args: dict[str, Any]) -> Outcome:
    """A product, its sum over the vocabulary, or over everything: nv,nv->nv, nv,nv->n and nv,nv->."""
    inputs, _, output = _named_dims(str(args["equation"]), args["operands"]).partition("->")
    subscripts = inputs.split(",")
    if len(subscripts) != 2 or subscripts[0] != subscripts[1]:
        fact = f"Its equation {args['equation']!r} has not two operands alike, as 'nv,nv->n' has."
        return Refusal(Reason.NOT_UNDERSTOOD, fact)
    value = product_of(operands(context, *args["operands"]))
    if not isinstance(value, VocabValue):
        return value
    if not output:
        return losses.reduced(value, "sum", None)
    if output == subscripts[0]:
        return replace(value, wide=value.wide | {context.node})
    return summed(value) if output == subscripts[0].replace(subscripts[0][value.axis], "") else None


def _named_dims(equation: str, operands: Any) -> str:
    """An equation of einsum without spaces, the dimensions of its ellipsis named by capitals."""
    equation = equation.replace(" ", "")
    ranks = [len(shape_of(o)) for o in operands if tensor_of(o) is not None]
    letters = [len(part.replace("...", "")) for part in equation.partition("->")[0].split(",")]
    hidden = max((rank - named for rank, named in zip(ranks, letters, strict=False)), default=0)
    free = [c for c in "ABCDEFGHIJKLMNOPQRSTUVWXYZ" if c not in equation]
    return equation.replace("...", "".join(free[:hidden]))
