"""Recognise: read a torch-level graph in the algebra.

Every node gets, where it has one, a value: a vocabulary expression, a row expression or a reduced loss
over the statistics of some logits. What a node *is* is decided here; whether it *may* be replaced is
decided afterwards, in `legal.py`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any, TypeGuard

import sympy
import torch
from torch.fx import Graph, Node

from . import algebra, spellings
from .reading import LossValue, Masked, Place, Reading, RowValue, Value, VocabValue, is_shift
from .rows import index_per_dimension, row_shape, same_shape, shape_of
from .shield import attempt
from .sites import Reason
from .timeline import Timeline, tensor_of
from .views import HALF, cast_keeps, step_back, viewed

Number = int | float

# Of z and p together in one term: the entropy has 2, and nothing that a reduction knows has more.
MAX_DEGREE = 2

Operand = VocabValue | RowValue | Number


def recognise(graph: Graph) -> Reading:
    """Read a graph. Nodes without an example tensor are passed over."""
    reading = Reading(Timeline(graph))
    for node in reading.timeline.nodes:
        spelled = spellings.read(node)
        if spelled is None:
            continue
        step, args = spelled
        if step not in _STEPS:
            continue
        value, _ = attempt("a step is not read", _STEPS[step], Place(reading, node), args)
        if value is not None:
            reading.values[node] = value
    return reading


# From logits to their log-probabilities and statistics


def _on_vocab(function: Callable[[algebra.Vocab], algebra.Vocab | None]) -> Callable[..., Value | None]:
    """The step of a function of the whole axis that keeps it, such as log_softmax."""

    def step(place: Place, args: dict[str, Any]) -> Value | None:
        value = place.vocab(args.get("input"), _one_dim(args.get("dim")))
        if value is None or value.rounded or not _dtype_keeps(args):
            return None
        expr = function(value.expr)
        return None if expr is None else _wider(place.node, value, expr)

    return step


def _over_vocab(
    function: Callable[[algebra.Vocab], sympy.Expr | None],
    see_through: Callable[[Place, Any], Any] = lambda place, operand: operand,
) -> Callable[..., Value | None]:
    """The step of a reduction over the vocabulary, of an operand that `see_through` may replace."""

    def step(place: Place, args: dict[str, Any]) -> Value | None:
        value = place.vocab(see_through(place, args.get("input")), _one_dim(args.get("dim")))
        if value is None or value.rounded or tensor_of(place.node) is None or not _dtype_keeps(args):
            return None
        expr = function(value.expr)
        kept = value.axis if args.get("keepdim") else None
        return None if expr is None else RowValue(value.logits, value.steps, kept, expr, value.wide)

    return step


def _undetached(place: Place, operand: Any) -> Any:
    """A maximum has no gradient to lose: that of detached logits is that of the logits."""
    spelled = spellings.read(operand) if isinstance(operand, Node) else None
    return spelled[1]["input"] if spelled is not None and spelled[0] == "detach" else operand


_PEAK = _over_vocab(algebra.peak, _undetached)


def _mean(value: algebra.Vocab) -> sympy.Expr | None:
    total = algebra.total(value)
    return None if total is None else algebra.expand(total / algebra.V)


def _one_dim(dim: Any) -> Any:
    return dim[0] if isinstance(dim, (tuple, list)) and len(dim) == 1 else dim


def _dtype_keeps(args: dict[str, Any]) -> bool:
    """Whether the argument `dtype=` casts the operand without loss, if it is given."""
    example, dtype = tensor_of(args.get("input")), args.get("dtype")
    return dtype is None or example is None or cast_keeps(example.dtype, dtype)


def _wider(node: Node, value: VocabValue, expr: algebra.Vocab) -> VocabValue:
    return replace(value, expr=expr, wide=value.wide | {node})


def _gather(place: Place, args: dict[str, Any]) -> Value | None:
    index = args.get("index")
    value = place.vocab(args.get("input"), args.get("dim"))
    if value is None or not _is_labels(index):
        return None
    shape = [*shape_of(args["input"])]
    shape[value.axis] = 1
    if not same_shape(shape, shape_of(index)):
        return None
    y = place.label(value.logits, value.steps, index, kept=value.axis)
    expr = algebra.at(value.expr, y)
    if expr is None:
        return None
    return RowValue(value.logits, value.steps, value.axis, expr, value.wide, value.rounded)


def _is_labels(node: Any) -> TypeGuard[Node]:
    example = tensor_of(node)
    return example is not None and not example.is_floating_point() and not example.is_complex()


# The losses of torch.nn.functional


def _cross_entropy(place: Place, args: dict[str, Any]) -> Value | None:
    value = _class_axis(place, args)
    smoothing = args.get("label_smoothing", 0.0)
    if value is None or not _losses_arguments(place, args):
        return None
    if not isinstance(smoothing, Number):
        place.miss(Reason.NOT_UNDERSTOOD, "The label smoothing is not a number that is fixed in the graph.")
        return None
    log_probs = algebra.log_softmax(value.expr)
    if log_probs is None:
        value = place.opaque(args["input"], value.axis)
        log_probs = algebra.log_softmax(algebra.LOGITS)
    return _negative_log_likelihood(place, args, value, log_probs, smoothing)


def _nll_loss(place: Place, args: dict[str, Any]) -> Value | None:
    known = place.known(args.get("input"))
    if not isinstance(known, VocabValue) or known.rounded:
        return None
    value = _class_axis(place, args)
    if value is None or not _losses_arguments(place, args):
        return None
    return _negative_log_likelihood(place, args, value, value.expr, 0.0)


def _class_axis(place: Place, args: dict[str, Any]) -> VocabValue | None:
    example = tensor_of(args.get("input"))
    return None if example is None else place.vocab(args["input"], 0 if example.dim() == 1 else 1)


def _losses_arguments(place: Place, args: dict[str, Any]) -> bool:
    """Whether the arguments are ones that the algebra has; a miss tells why not."""
    target, weight = args.get("target"), args.get("weight")
    if not _is_labels(target):
        place.miss(Reason.SOFT_TARGETS, "The target holds class probabilities, not class indices.")
    elif weight is not None:
        place.miss(Reason.CLASS_WEIGHTS, "The loss has class weights (weight=...).")
    elif args.get("size_average") is not None or args.get("reduce") is not None:
        place.miss(Reason.NOT_UNDERSTOOD, "The loss uses size_average or reduce, which torch has deprecated.")
    elif args.get("reduction", "mean") not in ("none", "mean", "sum"):
        place.miss(Reason.NOT_UNDERSTOOD, f"The reduction {args['reduction']!r} is none of torch's.")
    elif not isinstance(args.get("ignore_index", -100), int):
        place.miss(Reason.NOT_UNDERSTOOD, "The ignore_index is not a number that is fixed in the graph.")
    else:
        return True
    return False


def _negative_log_likelihood(
    place: Place, args: dict[str, Any], value: VocabValue, log_probs: algebra.Vocab | None, smoothing: Number
) -> Value | None:
    """(1 - e) (-log p_y) + e/V sum_i -log p_i for each row, then the reduction."""
    if log_probs is None:
        return None
    y = place.label(value.logits, value.steps, args["target"])
    picked, uniform = algebra.at(log_probs, y), algebra.total(log_probs) if smoothing else sympy.Integer(0)
    if picked is None or uniform is None:
        return None
    e = algebra.number(smoothing)
    expr = algebra.expand(-(1 - e) * picked - e * uniform / algebra.V)
    masked = Masked(y, args.get("ignore_index", -100), args.get("reduction", "mean"))
    return LossValue(value.logits, value.steps, expr, masked, value.wide)


# Arithmetic


def _unary(
    on_vocab: Callable[[algebra.Vocab], algebra.Vocab | None],
    on_row: Callable[[sympy.Expr], sympy.Expr | None],
) -> Callable[..., Value | None]:
    def step(place: Place, args: dict[str, Any]) -> Value | None:
        value = place.known(args.get("input"))
        if isinstance(value, LossValue) or value is None or value.rounded:
            return None
        if isinstance(value, RowValue):
            row = on_row(value.expr)
            return None if row is None else replace(value, expr=row)
        vocab = on_vocab(value.expr)
        return None if vocab is None else _wider(place.node, value, vocab)

    return step


def _row_log(expr: sympy.Expr) -> sympy.Expr | None:
    """log where it undoes an exponential; any other logarithm of a row stays the user's own operation."""
    undoes = expr.has(sympy.exp) and not expr.could_extract_minus_sign()
    return algebra.row_log(expr) if undoes else None


def _binary(
    combine: Callable[[Any, Any], Any],
) -> Callable[..., Value | None]:
    """The step of an operator between values over the same logits, or between a value and a number."""

    def step(place: Place, args: dict[str, Any]) -> Value | None:
        if args.get("alpha", 1) != 1 or args.get("rounding_mode") is not None:
            return None
        operands = _same_rows(place, args.get("input"), args.get("other"))
        if operands is None:
            return None
        values = [v for v in operands if not isinstance(v, Number)]
        expr = combine(*(algebra.number(v) if isinstance(v, Number) else v.expr for v in operands))
        if expr is None:
            return None
        shaped = next((v for v in values if isinstance(v, VocabValue)), values[0])
        wide = frozenset().union(*(v.wide for v in values))
        if isinstance(shaped, VocabValue):
            return replace(shaped, expr=algebra.as_vocab(expr), wide=wide | {place.node})
        return replace(shaped, expr=expr, wide=wide)

    return step


def _same_rows(place: Place, left: Any, right: Any) -> list[Operand] | None:
    """The operands as values over one arrangement of the same rows, or as numbers; None if they are not."""
    known = [place.known(a) for a in (left, right)]
    operands: list[Operand | None] = []
    for arg, value, other in zip((left, right), known, reversed(known), strict=True):
        if isinstance(arg, Number) and math.isfinite(arg):
            operands.append(arg)
        elif isinstance(value, (VocabValue, RowValue)):
            operands.append(value)
        elif isinstance(other, (VocabValue, RowValue)):
            axis = other.axis if isinstance(other, VocabValue) else other.kept
            operands.append(place.vocab(arg, axis))
    found = [v for v in operands if v is not None]
    values = [v for v in found if not isinstance(v, Number)]
    if any(v.rounded for v in values):
        return None
    return found if len(found) == 2 and values and _agree(place, values) else None


def _agree(place: Place, values: list[VocabValue | RowValue]) -> bool:
    """Whether broadcasting pairs each row with itself."""
    first = values[0]
    axes = {v.axis if isinstance(v, VocabValue) else v.kept for v in values}
    if len(axes) > 1 or any((v.logits, v.steps) != (first.logits, first.steps) for v in values):
        return False
    shape = tensor_of(place.node)
    return shape is not None and (None not in axes or all(isinstance(v, RowValue) for v in values))


def _plus(a: Any, b: Any) -> Any:
    return b + a if isinstance(b, algebra.Vocab) else a + b


def _minus(a: Any, b: Any) -> Any:
    return _plus(a, -b)


def _times(a: Any, b: Any) -> Any:
    if isinstance(a, sympy.Expr) and isinstance(b, sympy.Expr) and not (a.is_number or b.is_number):
        return None  # a product of two row values is the user's own, of size [N]
    product = b * a if isinstance(b, algebra.Vocab) else a * b
    return None if isinstance(product, algebra.Vocab) and product.degree > MAX_DEGREE else product


def _over(a: Any, b: Any) -> Any:
    return _times(a, 1 / b) if isinstance(b, sympy.Expr) and b != 0 else None


# Views, casts and copies of values


def _view(place: Place, args: dict[str, Any]) -> Value | None:
    source = args.get("input")
    value = place.known(source)
    if value is None or not isinstance(source, Node):
        return None
    if isinstance(value, VocabValue) and _is_rounding(place.node, source):
        return replace(value, rounded=tensor_of(place.node).dtype, wide=value.wide | {place.node})  # type: ignore
    if viewed(place.node) is not source:
        return None
    if isinstance(value, RowValue):
        return None if place.is_edited_view(source) else _view_of_rows(place.node, source, value)
    if not isinstance(value, VocabValue):
        return None
    for axis in range(len(shape_of(place.node))):
        back = step_back(place.node, source, axis)
        if back is not None and back[0] == value.axis:
            moved = replace(value, axis=axis, steps=value.steps + back[1])
            return replace(moved, wide=value.wide | {place.node})
    return None


def _is_rounding(node: Node, source: Node) -> bool:
    """Whether log-probabilities are cast down before they are picked, to be picked as they were rounded."""
    a, b = tensor_of(source), tensor_of(node)
    if a is None or b is None or a.device != b.device or spellings.read(node)[0] != "same":  # type: ignore[index]
        return False
    return a.dtype == torch.float32 and b.dtype in HALF


def _view_of_rows(node: Node, source: Node, value: RowValue) -> RowValue | None:
    """Casts, and views that only drop or add the axis where the vocabulary was."""
    rows, result = row_shape(source, value.kept), shape_of(node)
    if same_shape(rows, result):
        return replace(value, kept=None)
    for axis in reversed(range(len(result))):
        if len(result) == len(rows) + 1 and result[axis] == 1 and same_shape(rows, row_shape(node, axis)):
            return replace(value, kept=axis)
    return None


def _detach(place: Place, args: dict[str, Any]) -> Value | None:
    """A maximum that only shifts has no gradient to lose; anything else is a stranger once detached."""
    value = place.known(args.get("input"))
    return value if value is not None and is_shift(value) else None


def _rows_order_kept(place: Place, args: dict[str, Any]) -> Value | None:
    """Transposes move rows about: statistics follow them no further, log-probabilities do."""
    return None if isinstance(place.known(args.get("input")), RowValue) else _view(place, args)


def _getitem(place: Place, args: dict[str, Any]) -> Value | None:
    source, index = args.get("input"), args.get("index")
    spelled = spellings.read(source) if isinstance(source, Node) else None
    if spelled is not None and spelled[0] == "max" and index == 0:
        return _PEAK(place, spelled[1])
    value = place.known(source)
    if isinstance(value, RowValue) and not _only_kept_axis(index, value, len(shape_of(args["input"]))):
        return None
    return _view(place, args)


def _only_kept_axis(index: Any, value: RowValue, rank: int) -> bool:
    """Whether x[index] only drops the axis of size 1, as x[..., 0] does, or adds it, as x[..., None] does."""
    if isinstance(index, tuple) and None in index:
        return all(i is None or i is Ellipsis or i == slice(None) for i in index)
    pieces = index_per_dimension(index, rank)
    return pieces is not None and all(
        p == slice(None) or (axis == value.kept and isinstance(p, int)) for axis, p in enumerate(pieces)
    )


_STEPS: dict[str, Callable[[Place, dict[str, Any]], Value | None]] = {
    "cross_entropy": _cross_entropy,
    "nll_loss": _nll_loss,
    "log_softmax": _on_vocab(algebra.log_softmax),
    "softmax": _on_vocab(algebra.softmax),
    "logsumexp": _over_vocab(algebra.logsumexp),
    "sum": _over_vocab(algebra.total),
    "mean": _over_vocab(_mean),
    "amax": _PEAK,
    "gather": _gather,
    "exp": _unary(algebra.exp, lambda row: None),
    "log": _unary(algebra.log, _row_log),
    "neg": _unary(lambda v: -v, lambda row: -row),
    "add": _binary(_plus),
    "sub": _binary(_minus),
    "mul": _binary(_times),
    "div": _binary(_over),
    "same": _view,
    "detach": _detach,
    "reshape": _view,
    "permute": _rows_order_kept,
    "transpose": _rows_order_kept,
    "movedim": _rows_order_kept,
    "getitem": _getitem,
    "narrow": _rows_order_kept,
}
