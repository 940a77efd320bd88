"""Steps of arithmetic between vocabulary values, row values and numbers over the same logits."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import sympy
import torch
from torch.fx import Node

from . import algebra, spellings
from .columns import mask_of
from .movement import diagonal_of
from .place import Place
from .reading import Columns, OnLogits, RowValue, Value, VocabValue, is_shift
from .rows import equal, same_shape, shape_of
from .timeline import tensor_of

Number = int | float
Step = Callable[[Place, dict[str, Any]], Value | None]
Expr: TypeAlias = "algebra.Vocab | sympy.Expr"


@dataclass(frozen=True)
class Operands:
    """The arguments of an operation, over one arrangement of the rows of one tensor of logits."""

    frame: OnLogits | Columns
    exprs: tuple[Expr, ...]
    wide: frozenset[Node]
    more: tuple[tuple[Expr, ...], ...] = ()  # the same for further labels of a row


def operands(place: Place, *args: Any) -> Operands | None:
    """Read the arguments of an elementwise operation together; None where they do not belong together."""
    known = [place.known(a) for a in args]
    if any(getattr(value, "after", ()) for value in known):
        return None
    lead = _lead(args, known) or _logits_beside_columns(place, args, known)
    if lead is None:
        return _of_columns(place, args, known)
    leader, arg = lead
    if any(isinstance(v, RowValue) and v.more for v in known):
        return _of_many_rows(args, known, leader)
    frame = leader if isinstance(leader, VocabValue) else _frame(leader)
    like = arg if isinstance(leader, VocabValue) else None
    read = [_operand(place, a, value, leader, frame, like) for a, value in zip(args, known, strict=True)]
    if None in read:
        return None
    exprs = tuple(operand.expr for operand in read)  # type: ignore[union-attr]
    wide = frozenset().union(*(operand.wide for operand in read))  # type: ignore[union-attr]
    # A maximum that only shifts has no gradient to lose: the others tell whether there is one.
    told = [o.detached for o in read if o.detached is not None]  # type: ignore[union-attr]
    result = frame if any(isinstance(e, algebra.Vocab) for e in exprs) else leader
    if result is None:
        return None
    return Operands(replace(result, detached=all(told) if told else leader.detached), exprs, wide)


def _of_many_rows(args: tuple[Any, ...], known: list[Value | None], leader: OnLogits) -> Operands | None:
    """Rows with several labels each, other rows and numbers."""
    count = max(len(v.exprs) for v in known if isinstance(v, RowValue))
    columns: list[tuple[Expr, ...]] = []
    for k in range(count):
        exprs: list[Expr] = []
        for arg, value in zip(args, known, strict=True):
            if isinstance(arg, Number) and math.isfinite(arg):
                exprs.append(algebra.number(arg))
            elif isinstance(value, RowValue) and _goes_with(value, leader, None):
                exprs.append(value.exprs[k % len(value.exprs)])
            else:
                return None
        columns.append(tuple(exprs))
    wide = frozenset().union(*(v.wide for v in known if isinstance(v, RowValue)))
    return Operands(leader, columns[0], wide, tuple(columns[1:]))


def _lead(args: tuple[Any, ...], known: list[Value | None]) -> tuple[VocabValue | RowValue, Node] | None:
    """The operand that says over which logits an operation is."""
    found = [(v, a) for v, a in zip(known, args, strict=True) if isinstance(v, (VocabValue, RowValue))]
    return max(found, key=_rank, default=None)


def _logits_beside_columns(
    place: Place, args: tuple[Any, ...], known: list[Value | None]
) -> tuple[VocabValue, Node] | None:
    """z in z [i = y]: what has a label in its column has the vocabulary there."""
    axes = {value.axis for value in known if isinstance(value, Columns)} - {None}
    unread = [a for a, value in zip(args, known, strict=True) if isinstance(a, Node) and value is None]
    if len(axes) != 1 or len(unread) != 1:
        return None
    (axis,), (arg,) = axes, unread
    labelled = next(a for a, v in zip(args, known, strict=True) if isinstance(v, Columns) and v.axis == axis)
    example = tensor_of(arg)
    if example is None or not same_shape(example.shape, shape_of(labelled)):
        return None
    logits = place.vocab(arg, axis)
    return None if logits is None else (logits, arg)


def _rank(candidate: tuple[VocabValue | RowValue, Node]) -> tuple[bool, bool, bool]:
    value, _ = candidate
    example = tensor_of(value.logits.node)
    wanted = example is not None and example.requires_grad and not value.detached
    return wanted, isinstance(value, VocabValue), not is_shift(value)


def _frame(value: RowValue) -> VocabValue | None:
    """Where a vocabulary value would have its axis that broadcasts against a row value."""
    if value.kept is None:
        return None
    return VocabValue(value.logits, value.steps, value.kept, algebra.LOGITS, detached=value.detached)


@dataclass(frozen=True)
class _Operand:
    """One argument: its expression, the wide nodes it came by, whether it is detached, if it can tell."""

    expr: Expr
    wide: frozenset[Node] = frozenset()
    detached: bool | None = None


def _operand(
    place: Place, arg: Any, value: Value | None, leader: OnLogits, frame: VocabValue | None, like: Node | None
) -> _Operand | None:
    if isinstance(arg, Number):
        return _Operand(algebra.number(arg)) if math.isfinite(arg) else None
    if value is None and isinstance(leader, RowValue):
        value = _diagonal(place, arg, leader)
    if isinstance(value, RowValue) and _goes_with(value, leader, frame):
        return _Operand(value.expr, value.wide, None if is_shift(value) else value.detached)
    if frame is None or not isinstance(arg, Node):
        return None
    example, whole = tensor_of(arg), tensor_of(place.node if like is None else like)
    full = example is not None and whole is not None and same_shape(example.shape, whole.shape)
    if full and isinstance(value, Columns) and value.axis in (None, frame.axis):
        met = place.met(value, arg, frame)
        return None if met is None else _Operand(met)
    if full:
        candidates = [value] if isinstance(value, VocabValue) else _seen(place, arg, frame.axis)
        for seen in candidates:
            if _goes_with(seen, leader, frame):
                if arg in seen.wide:  # an exponential that nobody had read
                    place.reading.values.setdefault(arg, seen)
                return _Operand(seen.expr, seen.wide, seen.detached)
    brought = None if like is None else place.outside(arg, frame, like)
    return None if brought is None else _Operand(_plain(brought))


def _diagonal(place: Place, arg: Any, leader: RowValue) -> RowValue | None:
    """The diagonal of logits, of which `leader` says on which axis the vocabulary is."""
    spelled = spellings.read(arg) if isinstance(arg, Node) else None
    unchanged = isinstance(arg, Node) and place.reading.timeline.unchanged(arg, arg, place.position)
    if spelled is None or spelled[0] != "diagonal" or not unchanged:
        return None
    there = Place(place.reading, arg)
    for axis in (1, 0):
        logits = there.vocab(spelled[1].get("input"), axis)
        if logits is not None and logits.logits == leader.logits:
            return diagonal_of(there, spelled[1], logits)
    return None


def _seen(place: Place, arg: Node, axis: int) -> Iterator[VocabValue]:
    """What an unread argument may be: logits, or the exponential of logits that nobody has summed."""
    logits = place.vocab(arg, axis)
    if logits is not None:
        yield logits
    spelled = spellings.read(arg)
    if (
        spelled is None
        or spelled[0] != "exp"
        or not place.reading.timeline.unchanged(arg, arg, place.position)
    ):
        return
    source = Place(place.reading, arg).vocab(spelled[1].get("input"), axis)
    exp = None if source is None else algebra.exp(source.expr)
    if source is not None and exp is not None:
        yield replace(source, expr=exp, wide=source.wide | {arg})


def _plain(value: algebra.Vocab) -> Expr:
    constant = value.get(algebra.ONE)
    return constant if value == algebra.as_vocab(constant) else value


def _goes_with(value: VocabValue | RowValue, leader: OnLogits, frame: VocabValue | None) -> bool:
    """Whether broadcasting pairs each row with itself, and the gradient to the logits is the same."""
    if (value.logits, value.steps) != (leader.logits, leader.steps):
        return False
    if value.detached != leader.detached and not is_shift(value) and not is_shift(leader):
        return False
    axis = value.axis if isinstance(value, VocabValue) else value.kept
    return axis == (leader.kept if isinstance(leader, RowValue) else frame.axis if frame else None)


def _of_columns(place: Place, args: tuple[Any, ...], known: list[Value | None]) -> Operands | None:
    """Operands that are all made of labels and numbers."""
    exprs: list[Expr] = []
    axes = set()
    whole = tensor_of(place.node)
    whole = tensor_of(args[0]) if whole is None else whole
    placed = [
        (a, v.axis) for a, v in zip(args, known, strict=True) if isinstance(v, Columns) and v.axis is not None
    ]
    like, axis = placed[0] if placed else (None, None)
    for arg, value in zip(args, known, strict=True):
        if isinstance(arg, Number) and math.isfinite(arg):
            exprs.append(algebra.number(arg))
        elif isinstance(value, Columns) and whole is not None and same_shape(shape_of(arg), whole.shape):
            exprs.append(value.expr)
            axes |= {value.axis}
        else:
            met = whole is not None and like is not None and axis is not None
            brought = place.loose_outside(arg, like, axis) if met else None  # type: ignore[arg-type]
            if brought is None:
                return None
            exprs.append(brought)
    axes -= {None}
    frame = Columns(algebra.LOGITS, next(iter(axes), None))
    return Operands(frame, tuple(map(algebra.as_vocab, exprs)), frozenset()) if len(axes) < 2 else None


def applied(place: Place, read: Operands | None, function: Callable[..., Expr | None]) -> Value | None:
    """The value of a node that is a function of its operands."""
    if read is None:
        return None
    exprs = [function(*column) for column in (read.exprs, *read.more)]
    if any(expr is None for expr in exprs):
        return None
    first, *more = exprs
    if isinstance(read.frame, Columns):
        return replace(read.frame, expr=algebra.as_vocab(first))
    if isinstance(read.frame, VocabValue):
        return replace(read.frame, expr=algebra.as_vocab(first), wide=read.wide | {place.node})
    return replace(read.frame, expr=first, wide=read.wide, more=tuple(more))  # type: ignore[arg-type]


def binary(combine: Callable[[Any, Any], Any], *names: str) -> Step:
    """The step of an operator between values over the same logits, or between a value and a number."""
    first, second = names or ("input", "other")

    def step(place: Place, args: dict[str, Any]) -> Value | None:
        if args.get("alpha", 1) != 1 or args.get("rounding_mode") is not None:
            return None
        return applied(place, operands(place, args.get(first), args.get(second)), combine)

    return step


def unary(
    on_vocab: Callable[[algebra.Vocab], algebra.Vocab | None],
    on_row: Callable[[sympy.Expr], sympy.Expr | None] = lambda row: None,
) -> Step:
    def function(expr: Any) -> Any:
        return on_vocab(expr) if isinstance(expr, algebra.Vocab) else on_row(expr)

    return lambda place, args: applied(place, operands(place, args.get("input")), function)


def plus(a: Any, b: Any) -> Any:
    return b + a if isinstance(b, algebra.Vocab) else a + b


def minus(a: Any, b: Any) -> Any:
    return plus(a, -b)


def times(a: Any, b: Any) -> Any:
    if isinstance(a, sympy.Expr) and isinstance(b, sympy.Expr) and not (a.is_number or b.is_number):
        return None  # a product of two row values is the user's own, of size [N]
    product = b * a if isinstance(b, algebra.Vocab) else a * b
    return None if isinstance(product, algebra.Vocab) and product.degree > algebra.MAX_DEGREE else product


def over(a: Any, b: Any) -> Any:
    if isinstance(b, algebra.Vocab):
        constant = b.get(algebra.ONE)
        b = constant if b == algebra.as_vocab(constant) else None
    return times(a, 1 / b) if b is not None and b != 0 else None


def xlogy(a: Any, b: Any) -> Any:
    logarithm = algebra.log(b) if isinstance(b, algebra.Vocab) else None
    return None if logarithm is None else times(a, logarithm)


def entropy_term(a: algebra.Vocab) -> Any:
    product = xlogy(a, a)
    return None if product is None else -product


def row_log(expr: sympy.Expr) -> sympy.Expr | None:
    """log where it undoes an exponential; any other logarithm of a row stays the user's own operation."""
    return algebra.row_log(expr) if expr.has(sympy.exp) else None


def exponential(place: Place, args: dict[str, Any]) -> Value | None:
    """exp of what is known; of logits, if it is summed over one dimension."""
    value = unary(algebra.exp)(place, args)
    if value is not None:
        return value
    source = args.get("input")
    axis = next(_summed_dims(place.node), None)
    if axis is None or not isinstance(source, Node) or isinstance(place.known(source), (RowValue, Columns)):
        return None
    logits = place.readable(source, axis, algebra.exp)
    if logits is None:
        return None
    exp = algebra.exp(logits.expr)
    return None if exp is None else replace(logits, expr=exp, wide=logits.wide | {place.node})


def _summed_dims(node: Node) -> Iterator[int]:
    """The dimensions over which somebody sums this node."""
    for user in node.users:
        spelled = spellings.read(user)
        if spelled is not None and spelled[0] == "sum" and spelled[1].get("input") is node:
            dim = spelled[1].get("dim")
            dim = dim[0] if isinstance(dim, (tuple, list)) and len(dim) == 1 else dim
            if isinstance(dim, int):
                yield dim


def power(place: Place, args: dict[str, Any]) -> Value | None:
    """A whole power of a vocabulary value; a row's is the user's own."""
    exponent = args.get("exponent", 2)
    if isinstance(exponent, float) and exponent.is_integer():
        exponent = int(exponent)
    if not isinstance(exponent, int):
        return None

    def on_row(row: sympy.Expr) -> sympy.Expr | None:
        return algebra.expand(row**exponent) if isinstance(row, sympy.exp) else None

    return unary(lambda value: algebra.power(value, exponent), on_row)(place, args)


def reversed_sub(place: Place, args: dict[str, Any]) -> Value | None:
    return binary(minus, "other", "input")(place, args)


def elementwise(place: Place, args: dict[str, Any]) -> Value | None:
    """A function of each element that the algebra does not have: it may still be done after picking."""
    source, *others = place.node.all_input_nodes
    value, example, result = place.known(source), tensor_of(source), tensor_of(place.node)
    if not isinstance(value, VocabValue) or others or example is None or result is None:
        return None
    if not result.is_floating_point() or not same_shape(example.shape, result.shape):
        return None
    return replace(value, after=(*value.after, place.node), wide=value.wide | {place.node})


def or_afterwards(step: Step) -> Step:
    """A step, or else the same done to what is picked."""

    def first_now(place: Place, args: dict[str, Any]) -> Value | None:
        value = step(place, args)
        return elementwise(place, args) if value is None else value

    return first_now


def matmul(place: Place, args: dict[str, Any]) -> Value | None:
    """p @ w with w [V] or [V, 1]: the sum over the vocabulary of a product."""
    left, right = args.get("input"), args.get("other")
    value, weights = place.known(left), tensor_of(right)
    if not isinstance(value, VocabValue) or value.after or weights is None or not isinstance(left, Node):
        return None
    column = weights.dim() == 2 and equal(weights.shape[1], 1)
    if value.axis != len(shape_of(left)) - 1 or not (weights.dim() == 1 or column):
        return None
    weighed = place.weights(right, value, left)
    product = None if weighed is None else times(value.expr, weighed)
    total = None if product is None else algebra.total(product)
    if total is None:
        return None
    kept = value.axis if column else None
    return RowValue(value.logits, value.steps, kept, total, value.wide, detached=value.detached)


def vecdot(place: Place, args: dict[str, Any]) -> Value | None:
    """The sum of a product over one dimension."""
    read, dim = operands(place, args.get("input"), args.get("other")), args.get("dim", -1)
    if read is None or not isinstance(read.frame, VocabValue) or tensor_of(place.node) is None:
        return None
    frame, rank = read.frame, len(shape_of(place.node)) + 1
    product = times(*map(algebra.as_vocab, read.exprs))
    total = None if product is None or dim % rank != frame.axis else algebra.total(product)
    if total is None:
        return None
    return RowValue(frame.logits, frame.steps, None, total, read.wide, detached=frame.detached)


def clamp(place: Place, args: dict[str, Any]) -> Value | None:
    """A bound that no finite number passes, as torch.distributions sets to log-probabilities."""
    example, bound = tensor_of(args.get("input")), args.get("min")
    if example is None or args.get("max") is not None or not isinstance(bound, Number):
        return None
    if not example.is_floating_point() or bound > torch.finfo(example.dtype).min:
        return None
    return unary(lambda value: value)(place, args)


def where(place: Place, args: dict[str, Any]) -> Value | None:
    return _chosen(place, args.get("condition"), args.get("input"), args.get("other"))


def masked_fill(place: Place, args: dict[str, Any]) -> Value | None:
    return _chosen(place, args.get("mask"), args.get("value"), args.get("input"))


def _chosen(place: Place, mask: Any, yes: Any, no: Any) -> Value | None:
    """One of two values in the column of a label, the other elsewhere."""
    if mask_of(place, mask) is None:
        return _chosen_by_row(place, mask, yes, no)
    read = operands(place, mask, yes, no)
    return applied(place, read, lambda *exprs: algebra.select(*map(algebra.as_vocab, exprs)))


def _chosen_by_row(place: Place, mask: Any, yes: Any, no: Any) -> Value | None:
    """One of two vocabulary values for all of a row."""
    example, read = tensor_of(mask), operands(place, yes, no)
    if (
        example is None
        or example.dtype != torch.bool
        or read is None
        or not isinstance(read.frame, VocabValue)
    ):
        return None
    result = algebra.as_vocab(sympy.Integer(0))
    for expr, made in zip(map(algebra.as_vocab, read.exprs), ("where", "where not"), strict=True):
        if expr.terms:
            chosen = place.outside(mask, read.frame, place.node, made=made)
            if chosen is None or _plain(chosen) is chosen:
                return None  # no mask of rows
            result = result + expr * chosen
    return applied(place, read, lambda *exprs: result)
