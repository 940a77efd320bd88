"""Sums over the classes of several rows of logits beside each other, read where one row alone is not enough.

A divergence whose sides both carry gradients, or whose logarithm is of a mixture, has no value over one
tensor of logits. Where a sum, or a loss of torch, has none, it is read backwards here, from the sum to the
log-probabilities, of which the steps over one tensor have told.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import sympy
from torch.fx import Node

from .. import algebra
from ..algebra import divergences as joint
from ..algebra.divergences import Divergence, Joint
from ..common.findings import name_of
from ..graph.shapes import Size, same_shape, shape_of, tensor_of
from ..graph.timeline import INFERENCE
from . import spellings
from .context import Context, kind_of
from .losses import REDUCTIONS, modernised
from .row_views import RowView
from .values import Columns, Logits, LossValue, Reading, RowValue, VocabValue, row_expr
from .views import cast_keeps

# What takes more steps than this is no loss.
MAX_DEPTH = 40


@dataclass(frozen=True)
class Side:
    """Rows of logits, arranged by `steps`; no gradient flows to them where they are `detached`."""

    logits: Logits
    steps: tuple[RowView, ...]
    detached: bool


@dataclass(frozen=True)
class RowFactor:
    """Numbers of rows. `how` is "mul", "div", or, of truth values, "where", "where not"."""

    node: Node
    how: str


@dataclass(frozen=True)
class Term:
    """A divergence, and the numbers of each row that it is multiplied by."""

    divergence: Divergence
    factors: tuple[RowFactor, ...]


@dataclass(frozen=True)
class Between:
    """A node that is a sum over the classes of several sides, and over rows as it says itself.

    Attributes:
        node: the sum, or the loss.
        summand: a node with the shape of what is summed, `axis` that of the classes.
        sides: of which its terms are.
        terms: what is added up.
        wide: the nodes by which it was made.
    """

    node: Node
    summand: Node
    axis: int
    sides: tuple[Side, ...]
    terms: tuple[Term, ...]
    wide: frozenset[Node]


@dataclass(frozen=True)
class _Value:
    """What a node of a shape is, with the classes on `axis`, and the nodes by which it was made.

    What is a number has no axis.
    """

    expr: Joint
    axis: int | None = None
    shape: tuple[Size, ...] = ()
    wide: frozenset[Node] = frozenset()


def read_divergences(reading: Reading) -> Iterator[Between]:
    """Those of a graph that has been read."""
    reader = _Reader(reading)
    for node in reading.timeline.nodes:
        step = spellings.step_of(node)
        if step is not None and step.name in _ENDS and not is_loss_of_one(reading, node):
            found = reader.between(node, step.name)
            if found is not None:
                yield found


_ENDS = ("sum", "mean", "kl_div")


def is_loss_of_one(reading: Reading, node: Node) -> bool:
    """Whether a node is a loss over one tensor of logits."""
    value = reading.values.get(node)
    return isinstance(value, (RowValue, LossValue)) and algebra.is_normalised(row_expr(value))  # type: ignore[arg-type]


@dataclass
class _Reader:
    reading: Reading
    sides: list[Side] = field(default_factory=list)
    factors: list[RowFactor] = field(default_factory=list)
    known: dict[Node, _Value | None] = field(default_factory=dict)

    def between(self, node: Node, name: str) -> Between | None:
        args = spellings.arguments(node, spellings.step_of(node))  # type: ignore[arg-type]
        summand = args.get("input")
        if tensor_of(node) is None or not isinstance(summand, Node) or tensor_of(summand) is None:
            return None
        if self.reading.timeline.grad_mode(self.reading.timeline.position[node]) is not True:
            return None
        value = self._divergence(node, args) if name == "kl_div" else self.of(summand)
        if value is None or value.axis is None:
            return None
        if name == "kl_div" and args.get("reduction", "mean") == "none":
            return None  # what sums it is the end
        if name != "kl_div" and not _sums(args, value.axis, len(shape_of(summand))):
            return None
        used = sorted(value.expr.sides)
        names = {side: i for i, side in enumerate(used)}
        sides = tuple(self.sides[side] for side in used)
        wanted = [i for i, side in enumerate(sides) if _moves(side)]
        parts = joint.total(value.expr.renamed(names), len(sides), wanted)
        if len(sides) < 2 or len(sides) > joint.MOST_SIDES or not wanted or parts is None:
            return None
        terms = tuple(Term(d, tuple(self.factors[f] for f in rows)) for rows, d in parts.items())
        return Between(node, summand, value.axis, sides, terms, value.wide)

    def of(self, node: Any, depth: int = 0) -> _Value | None:
        """What a node is; None for what is read as nothing that could be a part of a divergence."""
        if not isinstance(node, Node):
            return None
        if node not in self.known:
            self.known[node] = None
            self.known[node] = self._read(node, depth)
        return self.known[node]

    def _read(self, node: Node, depth: int) -> _Value | None:
        example, timeline = tensor_of(node), self.reading.timeline
        if example is None or not example.is_floating_point() or depth > MAX_DEPTH:
            return None
        if not timeline.unchanged(node, node, len(timeline.nodes)):
            return None
        value = self._of_one(self.reading.values.get(node), tuple(example.shape))
        if value is not None:
            return value
        spelled = spellings.read(node)
        mode = timeline.grad_mode(timeline.position[node])
        if spelled is None or mode == INFERENCE or spelled[0].name not in _STEPS:
            return None
        value = _STEPS[spelled[0].name](self, node, spelled[1], depth + 1)
        if value is None or value.axis is None:
            return value
        if not same_shape(value.shape, example.shape):
            return None
        value = replace(value, wide=value.wide | {node})
        return value if mode is True else self._held(value)

    def _of_one(self, value: Any, shape: tuple[Size, ...]) -> _Value | None:
        """What is read as made of one tensor of logits, by its log-probabilities alone."""
        if not isinstance(value, VocabValue) or value.after or value.logits.inference:
            return None
        terms: list[Joint | None] = []
        for power in {b.p for b, _ in value.expr.terms}:
            slope = value.expr.get(algebra.Monomial(z=1, p=power))
            rest = value.expr.get(algebra.Monomial(p=power)).subs(algebra.LSE_EXTENDED, algebra.LSE)
            rest = algebra.expand(rest + slope * algebra.LSE)
            if power not in (0, 1) or not slope.is_number or not rest.is_number:
                return None
            terms += self._terms(value, power, slope, rest)
        known = {algebra.Monomial(z=z, p=p) for z in (0, 1) for p in (0, 1)}
        if not terms or not {b for b, _ in value.expr.terms} <= known:
            return None
        result = Joint(())
        for term in terms:
            if term is None:
                return None
            result = result + term
        return _Value(result, value.axis, shape, value.wide)

    def _terms(
        self, value: VocabValue, power: int, slope: sympy.Expr, rest: sympy.Expr
    ) -> list[Joint | None]:
        """slope p^power log p + rest p^power"""
        side = self._side(Side(value.logits, value.steps, value.detached))
        p = joint.probabilities(side) if power else joint.number(1)
        log_p = joint.times(p, joint.log_probabilities(side))
        made = [(slope, log_p), (rest, p)]
        return [joint.times(joint.number(float(c)), x) for c, x in made if c != 0 and x is not None]

    def _side(self, side: Side) -> int:
        if side not in self.sides:
            self.sides.append(side)
        return self.sides.index(side)

    def _held(self, value: _Value) -> _Value:
        """The same where no gradient flows through it."""
        names = {s: self._side(replace(self.sides[s], detached=True)) for s in value.expr.sides}
        return replace(value, expr=value.expr.renamed(names))

    # Operands

    def _operand(self, arg: Any, depth: int) -> _Value | None:
        """A number, or a value."""
        constant = self._number(arg)
        return self.of(arg, depth) if constant is None else _Value(joint.number(constant))

    def _number(self, arg: Any) -> float | None:
        """A number, or that which a tensor made of numbers has everywhere."""
        if isinstance(arg, (int, float)):
            return float(arg) if math.isfinite(arg) else None
        value = self.reading.values.get(arg) if isinstance(arg, Node) else None
        if isinstance(value, Columns) and Context(self.reading, arg).is_as_made(arg):
            constant = value.expr.get(algebra.ONE)
            alone = value.expr == algebra.as_vocab(constant) and constant.is_number
            return float(constant) if alone else None
        spelled = spellings.read(arg) if isinstance(arg, Node) else None
        function = _OF_NUMBERS.get(name_of(arg)) if spelled is not None else None
        if spelled is None or not (function or spelled[0].name == "same"):
            return None
        inner = self._number(spelled[1].get("input"))
        try:
            return None if inner is None else (function or float)(inner)
        except (ValueError, OverflowError):
            return None

    def _row(self, arg: Any, like: Node, axis: int | None, how: str) -> int | None:
        """The place among the factors of a tensor with a number for each row of what is like a node."""
        if axis is None or not isinstance(arg, Node) or kind_of(arg, like, axis) not in ("row", "scalar"):
            return None
        if not self.reading.timeline.unchanged(arg, arg, len(self.reading.timeline.nodes)):
            return None
        factor = RowFactor(arg, how)
        if factor not in self.factors:
            self.factors.append(factor)
        return self.factors.index(factor)

    # Steps

    def _combined(
        self, a: _Value | None, b: _Value | None, combine: Callable[[Joint, Joint], Joint | None]
    ) -> _Value | None:
        """A function of two values of one shape, or of one and a number."""
        if a is None or b is None:
            return None
        wide, other = (b, a) if a.axis is None else (a, b)
        if other.axis is not None and not (wide.axis == other.axis and same_shape(wide.shape, other.shape)):
            return None
        expr = None if wide.axis is None else combine(a.expr, b.expr)
        return None if expr is None else replace(wide, expr=expr, wide=wide.wide | other.wide)

    def _applied(self, value: _Value | None, function: Callable[[Joint], Joint | None]) -> _Value | None:
        expr = None if value is None or value.axis is None else function(value.expr)
        return None if expr is None else replace(value, expr=expr)  # type: ignore[type-var]

    def _sum(self, node: Node, args: dict[str, Any], depth: int) -> _Value | None:
        if args.get("alpha", 1) != 1:
            return None
        operands = (self._operand(args.get(name), depth) for name in ("input", "other"))
        return self._combined(*operands, Joint.__add__)  # type: ignore[arg-type]

    def _difference(self, node: Node, args: dict[str, Any], depth: int) -> _Value | None:
        if args.get("alpha", 1) != 1:
            return None
        operands = (self._operand(args.get(name), depth) for name in ("input", "other"))
        return self._combined(*operands, lambda a, b: a + -b)  # type: ignore[arg-type]

    def _difference_from(self, node: Node, args: dict[str, Any], depth: int) -> _Value | None:
        swapped = {**args, "input": args.get("other"), "other": args.get("input")}
        return self._difference(node, swapped, depth)

    def _product(self, node: Node, args: dict[str, Any], depth: int) -> _Value | None:
        a, b = (self._operand(args.get(name), depth) for name in ("input", "other"))
        if a is not None and b is not None:
            return self._combined(a, b, joint.times)
        value, arg = (b, args.get("input")) if a is None else (a, args.get("other"))
        return self._weighed(value, arg, node, "mul")

    def _quotient(self, node: Node, args: dict[str, Any], depth: int) -> _Value | None:
        value, divisor = self._operand(args.get("input"), depth), self._number(args.get("other"))
        if args.get("rounding_mode") is not None or divisor == 0:
            return None
        if divisor is None:
            return self._weighed(value, args.get("other"), node, "div")
        return self._applied(value, lambda x: joint.times(x, joint.number(1 / divisor)))

    def _weighed(self, value: _Value | None, arg: Any, node: Node, how: str) -> _Value | None:
        row = None if value is None else self._row(arg, node, value.axis, how)
        return None if row is None else self._applied(value, lambda x: x.weighed(row))

    def _where(self, node: Node, args: dict[str, Any], depth: int) -> _Value | None:
        return self._kept(node, args.get("condition"), args.get("input"), args.get("other"), depth)

    def _masked_fill(self, node: Node, args: dict[str, Any], depth: int) -> _Value | None:
        return self._kept(node, args.get("mask"), args.get("value"), args.get("input"), depth)

    def _kept(self, node: Node, mask: Any, yes: Any, no: Any, depth: int) -> _Value | None:
        """A value in the rows where a mask is true, or is not, and 0 in the others."""
        example = tensor_of(mask)
        if example is None or str(example.dtype) != "torch.bool":
            return None
        for arg, other, how in ((yes, no, "where"), (no, yes, "where not")):
            if self._number(other) == 0:
                return self._weighed(self.of(arg, depth), mask, node, how)
        return None

    def _same(self, node: Node, args: dict[str, Any], depth: int) -> _Value | None:
        a, b = tensor_of(args.get("input")), tensor_of(node)
        keeps = a is not None and b is not None and cast_keeps(a.dtype, b.dtype) and a.device == b.device
        return self.of(args.get("input"), depth) if keeps else None

    def _detached(self, node: Node, args: dict[str, Any], depth: int) -> _Value | None:
        value = self.of(args.get("input"), depth)
        return None if value is None else self._held(value)

    def _negative(self, node: Node, args: dict[str, Any], depth: int) -> _Value | None:
        return self._applied(self.of(args.get("input"), depth), Joint.__neg__)

    def _exp(self, node: Node, args: dict[str, Any], depth: int) -> _Value | None:
        return self._applied(self.of(args.get("input"), depth), joint.exp)

    def _log(self, node: Node, args: dict[str, Any], depth: int) -> _Value | None:
        return self._applied(self.of(args.get("input"), depth), joint.log)

    def _xlogy(self, node: Node, args: dict[str, Any], depth: int) -> _Value | None:
        a, b = self._operand(args.get("input"), depth), self.of(args.get("other"), depth)
        return self._combined(a, self._applied(b, joint.log), joint.times)

    def _logaddexp(self, node: Node, args: dict[str, Any], depth: int) -> _Value | None:
        a, b = (self.of(args.get(name), depth) for name in ("input", "other"))
        return self._combined(a, b, lambda *both: joint.log_sum(both))

    def _logsumexp(self, node: Node, args: dict[str, Any], depth: int) -> _Value | None:
        return self._over_stack(node, args, depth, joint.log_sum)

    def _sum_of_stack(self, node: Node, args: dict[str, Any], depth: int) -> _Value | None:
        return self._over_stack(node, args, depth, _added)

    def _mean_of_stack(self, node: Node, args: dict[str, Any], depth: int) -> _Value | None:
        def mean(values: list[Joint]) -> Joint | None:
            return joint.times(_added(values), joint.number(1 / len(values)))

        return self._over_stack(node, args, depth, mean)

    def _over_stack(
        self, node: Node, args: dict[str, Any], depth: int, function: Callable[[list[Joint]], Joint | None]
    ) -> _Value | None:
        """A reduction over what torch.stack has put beside each other."""
        stacked = args.get("input")
        spelled = spellings.read(stacked) if isinstance(stacked, Node) else None
        dim = _one(args.get("dim"))
        if spelled is None or spelled[0].name != "stack" or args.get("keepdim") or dim is None:
            return None
        if not Context(self.reading, node).is_as_made(stacked):  # type: ignore[arg-type]
            return None
        rank, tensors = len(shape_of(stacked)), spelled[1].get("tensors")  # type: ignore[arg-type]
        if dim % rank != spelled[1].get("dim", 0) % rank or not isinstance(tensors, (list, tuple)):
            return None
        values = [self.of(each, depth) for each in tensors]
        read = [value for value in values if value is not None]
        if len(read) < len(values) or len({value.axis for value in read}) != 1:
            return None
        expr = function([value.expr for value in read])
        wide = frozenset({stacked}).union(*(value.wide for value in read))
        return None if expr is None else replace(read[0], expr=expr, wide=wide)  # type: ignore[arg-type]

    def _kl_div(self, node: Node, args: dict[str, Any], depth: int) -> _Value | None:
        return self._divergence(node, args, depth) if args.get("reduction", "mean") == "none" else None

    def _divergence(self, node: Node, args: dict[str, Any], depth: int = 0) -> _Value | None:
        """q (log q - input), and q the target or its exponential, as F.kl_div has it."""
        how = modernised(args).get("reduction", "mean")
        inputs = [args.get(name) for name in ("input", "target")]
        value, target = (self.of(arg, depth + 1) for arg in inputs)
        if how not in (*REDUCTIONS, "batchmean") or value is None or target is None:
            return None
        of_log = bool(args.get("log_target"))
        q = self._applied(target, joint.exp) if of_log else target
        log_q = target if of_log else self._applied(target, joint.log)
        gap = self._combined(log_q, value, lambda a, b: a + -b)
        made = self._combined(q, gap, joint.times)
        return made if made is None else replace(made, wide=made.wide | {node})


def _added(values: list[Joint]) -> Joint:
    result = Joint(())
    for value in values:
        result = result + value
    return result


def _one(dim: Any) -> int | None:
    dim = dim[0] if isinstance(dim, (tuple, list)) and len(dim) == 1 else dim
    return dim if isinstance(dim, int) else None


def _sums(args: dict[str, Any], axis: int, rank: int) -> bool:
    """Whether a sum or mean is over the classes, and maybe over rows."""
    dim = args.get("dim")
    dims = range(rank) if dim is None else dim if isinstance(dim, (tuple, list)) else [dim]
    return all(isinstance(d, int) for d in dims) and axis in {d % rank for d in dims}


def _moves(side: Side) -> bool:
    """Whether a gradient is wanted of a side."""
    example = tensor_of(side.logits.node)
    return example is not None and example.requires_grad and not side.detached


_OF_NUMBERS = {"log": math.log, "log1p": math.log1p, "exp": math.exp, "neg": float.__neg__, "sqrt": math.sqrt}

_Step = Callable[[_Reader, Node, dict[str, Any], int], _Value | None]
_STEPS: dict[str, _Step] = {
    "add": _Reader._sum,
    "sub": _Reader._difference,
    "rsub": _Reader._difference_from,
    "mul": _Reader._product,
    "div": _Reader._quotient,
    "neg": _Reader._negative,
    "exp": _Reader._exp,
    "log": _Reader._log,
    "xlogy": _Reader._xlogy,
    "logaddexp": _Reader._logaddexp,
    "logsumexp": _Reader._logsumexp,
    "sum": _Reader._sum_of_stack,
    "mean": _Reader._mean_of_stack,
    "where": _Reader._where,
    "masked_fill": _Reader._masked_fill,
    "same": _Reader._same,
    "detach": _Reader._detached,
    "kl_div": _Reader._kl_div,
}
