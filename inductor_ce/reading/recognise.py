"""Recognise: read a torch-level graph in the algebra.

Every node gets, where it has one, a value: a vocabulary expression, a row expression or a reduced loss
over the statistics of some logits. What a node *is* is decided here; whether it *may* be replaced is
decided afterwards, in `legal.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import sympy
from torch.fx import Graph, Node

from .. import algebra
from ..common.failsafe import attempt
from ..graph.shapes import same_shape, shape_of, tensor_of
from ..graph.timeline import Timeline
from . import arithmetic, indexing, joining, losses, spellings, targets
from .arithmetic import one_dim, product_of, summed
from .context import Context
from .operands import operands
from .targets import Step
from .values import Columns, Reading, Value, detached
from .views import broadcast_operand, cast_keeps


def recognise(graph: Graph) -> Reading:
    """Read a graph. Nodes without an example tensor are passed over."""
    reading = Reading(Timeline(graph))
    for node in reading.timeline.nodes:
        spelled = spellings.read(node)
        if spelled is None or spelled[0] not in _STEPS:
            continue
        step, args = spelled
        if step in _OF_VALUES and not any(map(reading.has_value, node.all_input_nodes)):
            continue
        context = Context(reading, node)
        value, _ = attempt("a step is not read", _STEPS[step], context, args)
        if value is None:
            continue
        if not isinstance(value, Columns) and (value.detached or context.grad_mode is False):
            value = detached(value)
        reading.values[node] = value
    return reading


# From logits to their log-probabilities and statistics


def _on_vocab(function: Callable[[algebra.Vocab], algebra.Vocab | None]) -> Step:
    """The step of a function of the whole axis that keeps it, such as log_softmax."""

    def step(context: Context, args: dict[str, Any]) -> Value | None:
        dim = _default_dim(args) if args.get("dim") is None else one_dim(args["dim"])
        value = context.readable(args.get("input"), dim, function)
        if value is None or value.after or not _dtype_keeps(args):
            return None
        expr = function(value.expr)
        return None if expr is None else replace(value, expr=expr, wide=value.wide | {context.node})

    return step


def _default_dim(args: dict[str, Any]) -> int | None:
    """The dimension of softmax where none is given, as torch guesses it, with a warning."""
    example = tensor_of(args.get("input"))
    return None if example is None else 0 if example.dim() in (0, 1, 3) else 1


def _over_vocab(
    function: Callable[[algebra.Vocab], sympy.Expr | None],
    over_all: Step = lambda context, args: None,
    reads_logits: bool = True,
) -> Step:
    """The step of a reduction over the vocabulary; over everything, where no dimension is given."""

    def step(context: Context, args: dict[str, Any]) -> Value | None:
        if tensor_of(context.node) is None or not _dtype_keeps(args):
            return None
        dim = one_dim(args.get("dim"))
        if dim is None:
            return over_all(context, args)
        if reads_logits:
            value = context.readable(args.get("input"), dim, function)
        else:
            value = context.vocab(args.get("input"), dim)
        if value is None or value.after:
            return None
        expr = function(value.expr)
        kept = value.axis if args.get("keepdim") else None
        if expr is None:
            return None
        return value.reduced_to(expr, kept)

    return step


_PEAK = _over_vocab(algebra.peak, reads_logits=False)
_ARGMAX = _over_vocab(algebra.argmax, reads_logits=False)


def _mean(value: algebra.Vocab) -> sympy.Expr | None:
    total = algebra.total(value)
    return None if total is None else algebra.expand(total / algebra.V)


def _dtype_keeps(args: dict[str, Any]) -> bool:
    """Whether the argument `dtype=` casts the operand without loss, if it is given."""
    example, dtype = tensor_of(args.get("input")), args.get("dtype")
    return dtype is None or example is None or cast_keeps(example.dtype, dtype)


def _getitem(context: Context, args: dict[str, Any]) -> Value | None:
    """An element of what `max(dim)` returns, or an index into a tensor."""
    source, index = args.get("input"), args.get("index")
    spelled = spellings.read(source) if isinstance(source, Node) else None
    if isinstance(source, Node) and spelled is not None and spelled[0] == "max":
        context.reading.parted.add(source)
        return (_PEAK, _ARGMAX)[index](context, spelled[1])  # type: ignore[index]
    operand = broadcast_operand(context.node)
    if operand is not None:
        return context.known(operand) if same_shape(shape_of(operand), shape_of(context.node)) else None
    return indexing.getitem(context, args)


def _einsum(context: Context, args: dict[str, Any]) -> Value | None:
    """A sum over the vocabulary, and over everything, of a product: nv,nv->n and nv,nv->."""
    inputs, _, output = _named_dims(str(args["equation"]), args["operands"]).partition("->")
    subscripts = inputs.split(",")
    if len(subscripts) != 2 or subscripts[0] != subscripts[1]:
        return None
    value = product_of(operands(context, *args["operands"]))
    if value is None:
        return None
    if not output:
        return losses.reduced(value, "sum", None)
    return summed(value) if output == subscripts[0].replace(subscripts[0][value.axis], "") else None


def _named_dims(equation: str, operands: Any) -> str:
    """An equation of einsum without spaces, the dimensions of its ellipsis named by capitals."""
    equation = equation.replace(" ", "")
    ranks = [len(shape_of(o)) for o in operands if tensor_of(o) is not None]
    letters = [len(part.replace("...", "")) for part in equation.partition("->")[0].split(",")]
    hidden = max((rank - named for rank, named in zip(ranks, letters, strict=False)), default=0)
    free = [c for c in "ABCDEFGHIJKLMNOPQRSTUVWXYZ" if c not in equation]
    return equation.replace("...", "".join(free[:hidden]))


_STEPS: dict[str, Step] = {
    "cross_entropy": losses.cross_entropy,
    "nll_loss": losses.nll_loss,
    "kl_div": losses.kl_div,
    "log_softmax": _on_vocab(algebra.log_softmax),
    "softmax": _on_vocab(algebra.softmax),
    "logsumexp": _over_vocab(algebra.logsumexp),
    "sum": _over_vocab(algebra.total, partial(losses.over_all, "sum"), reads_logits=False),
    "mean": _over_vocab(_mean, partial(losses.over_all, "mean"), reads_logits=False),
    "einsum": _einsum,
    "amax": _PEAK,
    "argmax": _ARGMAX,
    "gather": indexing.gather,
    "take_along": indexing.take_along,
    "select": partial(indexing.pick_without_label, "select"),
    "diagonal": partial(indexing.pick_without_label, "diagonal"),
    "trace": losses.trace,
    "matmul": arithmetic.matmul,
    "vecdot": arithmetic.vecdot,
    "elementwise": arithmetic.elementwise,
    "exp": arithmetic.exponential,
    "log": arithmetic.unary(algebra.log, arithmetic.row_log),
    "neg": arithmetic.unary(lambda v: -v, lambda row: -row),
    "add": arithmetic.binary(arithmetic.plus),
    "sub": arithmetic.binary(arithmetic.minus),
    "rsub": arithmetic.reversed_sub,
    "mul": arithmetic.binary(arithmetic.times),
    "div": arithmetic.binary(arithmetic.over),
    "pow": arithmetic.power,
    "square": arithmetic.power,
    "xlogy": arithmetic.binary(arithmetic.xlogy),
    "entr": arithmetic.unary(arithmetic.entropy_term),
    "clamp": arithmetic.clamp,
    "where": arithmetic.where,
    "masked_fill": arithmetic.masked_fill,
    "same": indexing.view,
    "detach": indexing.detach,
    "reshape": indexing.view,
    "permute": indexing.reorder,
    "transpose": indexing.reorder,
    "transposed": indexing.reorder,
    "movedim": indexing.reorder,
    "getitem": _getitem,
    "narrow": indexing.reorder,
    "stack": joining.stack,
    "cat": joining.cat,
    "one_hot": targets.one_hot,
    "eq": targets.equals,
    "ne": targets.differs,
    "not": targets.negation,
    "zeros": targets.filled(0),
    "ones": targets.filled(1),
    "full": targets.full,
    "scatter": targets.scatter,
    "edit_fill": targets.edit(targets.full),
    "edit_zero": targets.edit(targets.filled(0)),
    "edit_scatter": targets.edit(targets.scatter),
    "edit_setitem": targets.edit(targets.setitem),
    "edit_masked_fill": targets.edit(arithmetic.masked_fill),
    "edit_add": targets.edit(arithmetic.binary(arithmetic.plus)),
    "edit_sub": targets.edit(arithmetic.binary(arithmetic.minus)),
    "edit_mul": targets.edit(arithmetic.binary(arithmetic.times)),
    "edit_div": targets.edit(arithmetic.binary(arithmetic.over)),
}

# Steps that make nothing of what has no value yet, most of the nodes of a model.
_OF_VALUES = frozenset(
    {
        *("log", "neg", "add", "sub", "rsub", "mul", "div", "pow", "square", "entr", "clamp", "masked_fill"),
        *(
            "where",
            "same",
            "detach",
            "reshape",
            "permute",
            "transpose",
            "transposed",
            "movedim",
            "narrow",
            "not",
        ),
        *("select", "diagonal", "trace", "matmul", "vecdot", "elementwise", "stack", "cat"),
    }
)

# What commutes with picking one element of each row, if nothing better is known of it.
for _name in ("exp", "log", "neg", "add", "sub", "rsub", "mul", "div", "pow", "square", "clamp"):
    _STEPS[_name] = arithmetic.or_afterwards(_STEPS[_name])
