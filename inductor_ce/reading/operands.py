"""The arguments of an elementwise operation, read together: which belong to the rows of the same logits?"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import sympy
from torch.fx import Node

from .. import algebra
from ..common.findings import Reason, Refusal
from ..graph.shapes import same_shape, shape_of, tensor_of
from . import spellings
from .context import Context
from .picks import fixed_pick
from .values import Columns, Logits, OnLogits, Outcome, RowValue, Value, VocabValue, is_shift

Number = int | float
Expr: TypeAlias = "algebra.Vocab | sympy.Expr"


@dataclass(frozen=True)
class Operands:
    """The arguments of an operation, over one arrangement of the rows of one tensor of logits."""

    frame: OnLogits | Columns
    exprs: tuple[Expr, ...]
    wide: frozenset[Node]
    more: tuple[tuple[Expr, ...], ...] = ()  # the same for further labels of a row


def operands(context: Context, *args: Any) -> Operands | Refusal | None:
    """Read the arguments of an elementwise operation together, if they belong together.

    An exponential of logits that nobody had read is recorded as what it is read as here.
    """
    known = _beside_others([context.known(a) for a in args])
    if any(getattr(value, "after", ()) for value in known):
        return None
    lead = _lead(args, known) or _logits_beside_columns(context, args, known)
    if lead is None:
        return _of_columns(context, args, known)
    leader, arg = lead
    if any(isinstance(v, RowValue) and v.is_of_several for v in known):
        return _of_many_rows(args, known, leader)
    frame = leader if isinstance(leader, VocabValue) else _frame(leader)
    like = arg if isinstance(leader, VocabValue) else None
    read = [_operand(context, a, value, leader, frame, like) for a, value in zip(args, known, strict=True)]
    found = [operand for operand in read if isinstance(operand, _Operand)]
    if len(found) < len(read):
        return next((operand for operand in read if isinstance(operand, Refusal)), None)
    exprs = tuple(operand.expr for operand in found)
    wide = frozenset().union(*(operand.wide for operand in found))
    # A maximum that only shifts has no gradient to lose: the others tell whether there is one.
    told = [operand.detached for operand in found if operand.detached is not None]
    result = frame if any(isinstance(e, algebra.Vocab) for e in exprs) else leader
    if result is None:
        return None
    for arg, operand in zip(args, found, strict=True):
        if operand.first_read is not None:
            context.reading.values.setdefault(arg, operand.first_read)
    return Operands(replace(result, detached=all(told) if told else leader.detached), exprs, wide)


def _beside_others(known: list[Value | None]) -> list[Value | None]:
    """Without what a function made of other logits: beside these it is a tensor from outside."""
    led = {v.logits for v in known if isinstance(v, (VocabValue, RowValue)) and not v.after}
    others = [led and getattr(v, "after", ()) and v.logits not in led for v in known]  # type: ignore[union-attr]
    return [None if other else v for v, other in zip(known, others, strict=True)]


def _of_many_rows(args: tuple[Any, ...], known: list[Value | None], leader: OnLogits) -> Operands | None:
    """Rows with several labels each, other rows and numbers."""
    rows = [v for v in known if isinstance(v, RowValue)]
    count, width = max(len(v.exprs) for v in rows), max(v.width for v in rows)
    if any((len(v.exprs), v.width) not in ((1, 1), (count, width)) for v in rows):
        return None
    columns: list[tuple[Expr, ...]] = []
    for k in range(count):
        exprs: list[Expr] = []
        for arg, value in zip(args, known, strict=True):
            if isinstance(arg, Number) and math.isfinite(arg):
                exprs.append(algebra.number(arg))
            elif isinstance(value, RowValue) and _mismatch(value, leader, None) is None:
                exprs.append(value.exprs[k % len(value.exprs)])
            else:
                return None
        columns.append(tuple(exprs))
    wide = frozenset().union(*(v.wide for v in rows))
    leader = replace(leader, width=width) if isinstance(leader, RowValue) else leader
    return Operands(leader, columns[0], wide, tuple(columns[1:]))


def _lead(args: tuple[Any, ...], known: list[Value | None]) -> tuple[VocabValue | RowValue, Node] | None:
    """The operand that says over which logits an operation is."""
    found = [(v, a) for v, a in zip(known, args, strict=True) if isinstance(v, (VocabValue, RowValue))]
    return max(found, key=_rank, default=None)


def _logits_beside_columns(
    context: Context, args: tuple[Any, ...], known: list[Value | None]
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
    logits = context.vocab(arg, axis)
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
    first_read: VocabValue | None = None


def _operand(
    context: Context,
    arg: Any,
    value: Value | None,
    leader: OnLogits,
    frame: VocabValue | None,
    like: Node | None,
) -> _Operand | Refusal | None:
    if isinstance(arg, Number):
        return _Operand(algebra.number(arg)) if math.isfinite(arg) else None
    if value is None and isinstance(leader, RowValue):
        value = _fixed_pick(context, arg, leader)
    mismatch = _mismatch(value, leader, frame) if isinstance(value, (RowValue, VocabValue)) else None
    if isinstance(value, RowValue) and mismatch is None:
        return _Operand(value.expr, value.wide, None if _is_held(value) else value.detached)
    if frame is None or not isinstance(arg, Node):
        return mismatch
    example, whole = tensor_of(arg), tensor_of(context.node if like is None else like)
    full = example is not None and whole is not None and same_shape(example.shape, whole.shape)
    if full and isinstance(value, Columns) and value.axis in (None, frame.axis):
        met = context.met(value, arg, frame)
        return None if met is None else _Operand(met)
    if full:
        candidates = [value] if isinstance(value, VocabValue) else _seen(context, arg, frame.axis)
        for seen in candidates:
            if context.grad_mode is False:
                seen = replace(seen, detached=True)
            if _mismatch(seen, leader, frame) is None:
                first_read = seen if arg in seen.wide else None  # an exponential that nobody had read
                return _Operand(seen.expr, seen.wide, seen.detached, first_read)
    brought = None if like is None else context.outside(arg, frame, like)
    if brought is None:
        return mismatch
    return brought if isinstance(brought, Refusal) else _Operand(plain(brought))


def _fixed_pick(context: Context, arg: Any, leader: RowValue) -> RowValue | None:
    """A column or the diagonal of logits, of which `leader` says where the vocabulary is."""
    spelled = spellings.read(arg) if isinstance(arg, Node) else None
    if spelled is None or not spelled[0].picks:
        return None
    step, args = spelled
    source = tensor_of(args.get("input"))
    if source is None or not context.reading.timeline.unchanged(arg, arg, context.position):
        return None
    there = Context(context.reading, arg)
    for axis in reversed(range(source.dim())):
        logits = there.vocab(args["input"], axis)
        if logits is not None and (logits.logits, logits.steps) == (leader.logits, leader.steps):
            return fixed_pick(there, step.name, args, logits)
    return None


def _seen(context: Context, arg: Node, axis: int) -> Iterator[VocabValue]:
    """What an unread argument may be: logits, or the exponential of logits that nobody has summed."""
    logits = context.vocab(arg, axis)
    if logits is not None:
        yield logits
    spelled = spellings.read(arg)
    if spelled is None or spelled[0].name != "exp" or not context.is_as_made(arg):
        return
    source = Context(context.reading, arg).vocab(spelled[1].get("input"), axis)
    exp = None if source is None else algebra.exp(source.expr)
    if source is not None and exp is not None:
        yield replace(source, expr=exp, wide=source.wide | {arg})


def plain(value: algebra.Vocab) -> Expr:
    """A value of which all columns are alike as a number of each row."""
    constant = value.get(algebra.ONE)
    return constant if value == algebra.as_vocab(constant) else value


def _mismatch(value: VocabValue | RowValue, leader: OnLogits, frame: VocabValue | None) -> Refusal | None:
    """None if broadcasting pairs each row with itself, and the gradient to the logits is the same."""
    if value.logits != leader.logits:
        return EDITED_BETWEEN if _is_edited(value.logits, leader.logits) else OTHER_LOGITS
    if value.steps != leader.steps:
        return OTHER_ROWS
    if value.detached != leader.detached and not _is_held(value) and not _is_held(leader):
        return ONE_SIDE_DETACHED
    axis = value.axis if isinstance(value, VocabValue) else value.kept
    same = axis == (leader.kept if isinstance(leader, RowValue) else frame.axis if frame else None)
    return None if same else OTHER_DIMENSIONS


def _is_held(value: OnLogits) -> bool:
    """Whether a value is a maximum that is a constant to every gradient, and so goes with every other."""
    return is_shift(value) and value.detached


def _is_edited(logits: Logits, others: Logits) -> bool:
    return logits.node is others.node and logits.version != others.version


EDITED_BETWEEN = Refusal(Reason.MUTATED, "The logits are changed in place between what {step} joins.")
OTHER_LOGITS = Refusal(Reason.NOT_UNDERSTOOD, "It joins values of different logits.")
OTHER_ROWS = Refusal(Reason.NOT_UNDERSTOOD, "It joins rows that are not in the same order.")
ONE_SIDE_DETACHED = Refusal(Reason.NOT_UNDERSTOOD, "Of what it joins, one side is detached from the logits.")
OTHER_DIMENSIONS = Refusal(Reason.NOT_UNDERSTOOD, "It joins rows that lie along different dimensions.")


def _of_columns(context: Context, args: tuple[Any, ...], known: list[Value | None]) -> Operands | None:
    """Operands that are all made of labels and numbers."""
    exprs: list[Expr] = []
    axes = set()
    whole = tensor_of(context.node)
    whole = tensor_of(args[0]) if whole is None else whole
    of_labels = [(a, v) for a, v in zip(args, known, strict=True) if isinstance(v, Columns)]
    placed = [(a, v.axis) for a, v in of_labels if v.axis is not None]
    like, axis = placed[0] if placed else (None, None)
    for arg, value in zip(args, known, strict=True):
        if isinstance(arg, Number) and math.isfinite(arg):
            exprs.append(algebra.number(arg))
        elif isinstance(value, Columns) and whole is not None and same_shape(shape_of(arg), whole.shape):
            exprs.append(value.expr)
            axes |= {value.axis}
        else:
            met = whole is not None and like is not None and axis is not None
            brought = context.loose_outside(arg, like, axis) if met else None  # type: ignore[arg-type]
            if brought is None:
                return None
            exprs.append(brought)
    axes -= {None}
    frame = Columns(algebra.LOGITS, next(iter(axes), None))
    return Operands(frame, tuple(map(algebra.as_vocab, exprs)), frozenset()) if len(axes) < 2 else None


def applied(
    context: Context, read: Operands | Refusal | None, function: Callable[..., Expr | None]
) -> Outcome:
    """The value of a node that is a function of its operands."""
    if not isinstance(read, Operands):
        return read
    exprs = [function(*column) for column in (read.exprs, *read.more)]
    if any(expr is None for expr in exprs):
        return None
    first, *more = exprs
    if isinstance(read.frame, Columns):
        return replace(read.frame, expr=algebra.as_vocab(first))
    if isinstance(read.frame, VocabValue):
        return replace(read.frame, expr=algebra.as_vocab(first), wide=read.wide | {context.node})
    return replace(read.frame, expr=first, wide=read.wide, more=tuple(more))  # type: ignore[arg-type]
