"""What nodes are that several rows of logits make beside each other, read backwards from what sums them.

Log-probabilities and probabilities of one tensor of logits have been read; from there on a value is one of
`algebra.divergences`, over sides and over numbers of rows, which the reader numbers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import sympy
from torch.fx import Node

from .. import algebra
from ..algebra import divergences as joint
from ..algebra.divergences import Joint
from ..graph.shapes import Size, example_of, same_shape, shape_of, tensor_of
from ..graph.timeline import INFERENCE
from . import spellings
from .constants import number_of
from .context import Context, kind_of
from .losses import REDUCTIONS, modernised
from .sides import Side, piece_of, place_in
from .values import Reading, VocabValue
from .views import cast_keeps
from .zeroed import set_where_zero

# What takes more steps than this is no loss.
MAX_DEPTH = 40


@dataclass(frozen=True)
class RowFactor:
    """Numbers of rows. `how` is "mul", "div", or, of truth values, "where", "where not".

    Of truth values that choose rows, with which the others are gone, it is "chosen".
    """

    node: Node
    how: str


@dataclass(frozen=True)
class JointValue:
    """What a node of a shape is, with the classes on `axis`, and the nodes by which it was made.

    What is a number has no axis. Where rows have been chosen, `like` has the shape of all.
    """

    expr: Joint
    axis: int | None = None
    shape: tuple[Size, ...] = ()
    wide: frozenset[Node] = frozenset()
    like: Node | None = None


@dataclass
class JointReader:
    """Reads nodes as values over sides and factors, which it numbers as it meets them."""

    reading: Reading
    sides: list[Side] = field(default_factory=list)
    factors: list[RowFactor] = field(default_factory=list)
    known: dict[Node, JointValue | None] = field(default_factory=dict)

    def of(self, node: Any, depth: int = 0) -> JointValue | None:
        """What a node is; None for what is read as nothing that could be a part of a divergence."""
        if not isinstance(node, Node):
            return None
        if node not in self.known:
            self.known[node] = None
            self.known[node] = self._read(node, depth)
        return self.known[node]

    def _read(self, node: Node, depth: int) -> JointValue | None:
        example, timeline = tensor_of(node), self.reading.timeline
        if example is None or not example.is_floating_point() or depth > MAX_DEPTH:
            return None
        if not self._is_unedited(node):
            return None
        value = self._of_one(self.reading.values.get(node), tuple(example.shape))
        if value is not None:
            return value
        spelled = spellings.read(node)
        mode = timeline.grad_mode(node)
        if spelled is None or mode == INFERENCE or spelled[0].name not in _STEPS:
            return None
        value = _STEPS[spelled[0].name](self, node, spelled[1], depth + 1)
        if value is None or value.axis is None:
            return value
        if not same_shape(value.shape, example.shape):
            return None
        value = replace(value, wide=value.wide | {node})
        return value if mode is True else self.held(value)

    def _of_one(self, value: Any, shape: tuple[Size, ...]) -> JointValue | None:
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
        return JointValue(result, value.axis, shape, value.wide)

    def _terms(
        self, value: VocabValue, power: int, slope: sympy.Expr, rest: sympy.Expr
    ) -> list[Joint | None]:
        """slope p^power log p + rest p^power"""
        side = self.side(Side(value.logits, value.steps, value.detached))
        p = joint.probabilities(side) if power else joint.number(1)
        log_p = joint.times(p, joint.log_probabilities(side))
        made = [(slope, log_p), (rest, p)]
        return [joint.times(joint.number(float(c)), x) for c, x in made if c != 0 and x is not None]

    def side(self, side: Side) -> int:
        """The place of a side among those of which values are made."""
        return place_in(self.sides, side)

    def _set_where_zero(self, node: Node, depth: int) -> JointValue | None:
        """p (log p - log q) with its limits where p or q is 0."""
        zeroed = set_where_zero(self.reading.timeline, node)
        if zeroed is None:
            return None
        p, q, value = self.of(zeroed.p), self.of(zeroed.q), self._product(node, zeroed.factors, depth)
        log_p, log_q = (self._applied(x, joint.log) for x in (p, q))
        limit = self._combined(p, self._combined(log_p, log_q, joint.minus), joint.times)
        if value is None or limit is None or value.expr != limit.expr:
            return None
        return replace(value, wide=value.wide | limit.wide | zeroed.made)

    def detached(self, side: int) -> int:
        """The side of the same rows to which no gradient flows."""
        return self.side(replace(self.sides[side], detached=True))

    def held(self, value: JointValue) -> JointValue | None:
        """The same where no gradient flows through it, nor to what its rows are multiplied by."""
        places = {place for entry, _ in value.expr.terms for place in entry.rows}
        if any(example_of(self.factors[place].node).requires_grad for place in places):
            return None
        return replace(value, expr=value.expr.renamed({s: self.detached(s) for s in value.expr.sides}))

    # Operands

    def _operand(self, arg: Any, depth: int) -> JointValue | None:
        """A number, or a value."""
        constant = number_of(self.reading, arg)
        return self.of(arg, depth) if constant is None else JointValue(joint.number(constant))

    def _row(self, arg: Any, reader: Node, axis: int | None, how: str) -> int | None:
        """The place among the factors of a tensor with a number for each row of what its reader makes."""
        if axis is None or not isinstance(arg, Node) or kind_of(arg, reader, axis) not in ("row", "scalar"):
            return None
        return self._numbered(arg, how) if self._is_unedited(arg, reader) else None

    def _is_unedited(self, node: Node, since: Node | None = None) -> bool:
        """Whether a node reads everywhere as when it was made, or from where another has read it."""
        timeline = self.reading.timeline
        return timeline.unchanged(node, node if since is None else since)

    def _numbered(self, node: Node, how: str) -> int:
        return place_in(self.factors, RowFactor(self.reading.twins.of(node), how))

    # Steps

    def _combined(
        self, a: JointValue | None, b: JointValue | None, combine: Callable[[Joint, Joint], Joint | None]
    ) -> JointValue | None:
        """A function of two values of one shape, or of one and a number."""
        if a is None or b is None:
            return None
        wide, other = (b, a) if a.axis is None else (a, b)
        if other.axis is not None and not _are_alike(wide, other):
            return None
        expr = None if wide.axis is None else combine(a.expr, b.expr)
        return None if expr is None else replace(wide, expr=expr, wide=wide.wide | other.wide)

    def _applied(
        self, value: JointValue | None, function: Callable[[Joint], Joint | None]
    ) -> JointValue | None:
        expr = None if value is None or value.axis is None else function(value.expr)
        return None if expr is None else replace(value, expr=expr)  # type: ignore[type-var]

    def _sum(self, node: Node, args: dict[str, Any], depth: int) -> JointValue | None:
        if args.get("alpha", 1) != 1:
            return None
        a, b = (self._operand(args.get(name), depth) for name in ("input", "other"))
        return self._combined(a, b, Joint.__add__)

    def _difference(self, node: Node, args: dict[str, Any], depth: int) -> JointValue | None:
        if args.get("alpha", 1) != 1:
            return None
        a, b = (self._operand(args.get(name), depth) for name in ("input", "other"))
        return self._combined(a, b, joint.minus)

    def _difference_from(self, node: Node, args: dict[str, Any], depth: int) -> JointValue | None:
        swapped = {**args, "input": args.get("other"), "other": args.get("input")}
        return self._difference(node, swapped, depth)

    def _product(self, node: Node, args: dict[str, Any], depth: int) -> JointValue | None:
        a, b = (self._operand(args.get(name), depth) for name in ("input", "other"))
        if a is not None and b is not None:
            return self._combined(a, b, joint.times)
        value, arg = (b, args.get("input")) if a is None else (a, args.get("other"))
        return self._weighed(value, arg, node, "mul")

    def _quotient(self, node: Node, args: dict[str, Any], depth: int) -> JointValue | None:
        value, divisor = self._operand(args.get("input"), depth), number_of(self.reading, args.get("other"))
        if args.get("rounding_mode") is not None or divisor == 0:
            return None
        if divisor is None:
            return self._weighed(value, args.get("other"), node, "div")
        return self._applied(value, lambda x: joint.times(x, joint.number(1 / divisor)))

    def _weighed(self, value: JointValue | None, arg: Any, node: Node, how: str) -> JointValue | None:
        if value is None or value.like is not None:
            return None
        row = self._row(arg, node, value.axis, how)
        return None if row is None else self._applied(value, lambda x: x.weighed(row))

    def _where(self, node: Node, args: dict[str, Any], depth: int) -> JointValue | None:
        return self._kept(node, args.get("condition"), args.get("input"), args.get("other"), depth)

    def _masked_fill(self, node: Node, args: dict[str, Any], depth: int) -> JointValue | None:
        made = self._kept(node, args.get("mask"), args.get("value"), args.get("input"), depth)
        return self._set_where_zero(node, depth) if made is None else made

    def _kept(self, node: Node, mask: Any, yes: Any, no: Any, depth: int) -> JointValue | None:
        """A value in the rows where a mask is true, or is not, and 0 in the others."""
        example = tensor_of(mask)
        if example is None or str(example.dtype) != "torch.bool":
            return None
        for arg, other, how in ((yes, no, "where"), (no, yes, "where not")):
            if number_of(self.reading, other) == 0:
                return self._weighed(self.of(arg, depth), mask, node, how)
        return None

    def _element(self, node: Node, args: dict[str, Any], depth: int) -> JointValue | None:
        """A piece of the rows that torch.split or torch.chunk has cut, or rows that a mask chooses."""
        source, index = args.get("input"), args.get("index")
        if isinstance(index, Node):
            return self._chosen(node, source, index, depth)
        piece = piece_of(node)
        value = None if piece is None else self.of(piece.source, depth)
        if piece is None or value is None or value.axis is None or piece.dim == value.axis:
            return None
        cut = piece.cut(value.axis)
        names = {}
        for side in value.expr.sides:
            whole = self.sides[side]
            names[side] = self.side(replace(whole, steps=(*whole.steps, cut)))
        return JointValue(value.expr.renamed(names), value.axis, shape_of(node), value.wide | {args["input"]})

    def _chosen(self, node: Node, source: Any, mask: Node, depth: int) -> JointValue | None:
        """x[mask], with the classes on the last dimension."""
        value, example, made = self.of(source, depth), tensor_of(mask), tensor_of(node)
        if value is None or value.axis is None or value.like is not None or made is None:
            return None
        rows = value.shape[:-1]
        if value.axis != len(rows) or str(example.dtype) != "torch.bool":  # type: ignore[union-attr]
            return None
        if not same_shape(shape_of(mask), rows) or not self._is_unedited(mask, node):
            return None
        factor = self._numbered(mask, "chosen")
        expr = value.expr.weighed(factor)
        return replace(value, expr=expr, axis=1, shape=tuple(made.shape), like=source)

    def _same(self, node: Node, args: dict[str, Any], depth: int) -> JointValue | None:
        a, b = tensor_of(args.get("input")), tensor_of(node)
        keeps = a is not None and b is not None and cast_keeps(a.dtype, b.dtype) and a.device == b.device
        return self.of(args.get("input"), depth) if keeps else None

    def _detached(self, node: Node, args: dict[str, Any], depth: int) -> JointValue | None:
        value = self.of(args.get("input"), depth)
        return None if value is None else self.held(value)

    def _negative(self, node: Node, args: dict[str, Any], depth: int) -> JointValue | None:
        return self._applied(self.of(args.get("input"), depth), Joint.__neg__)

    def _exp(self, node: Node, args: dict[str, Any], depth: int) -> JointValue | None:
        return self._applied(self.of(args.get("input"), depth), joint.exp)

    def _log(self, node: Node, args: dict[str, Any], depth: int) -> JointValue | None:
        made = self._applied(self.of(args.get("input"), depth), joint.log)
        return self._log_of_ratio(args.get("input"), depth) if made is None else made

    def _log_of_ratio(self, ratio: Any, depth: int) -> JointValue | None:
        spelled = spellings.read(ratio) if isinstance(ratio, Node) else None
        if spelled is None or spelled[0].name != "div" or spelled[1].get("rounding_mode") is not None:
            return None
        if not self._is_unedited(ratio):
            return None
        p, q = (self._applied(self.of(spelled[1].get(n), depth), joint.log) for n in ("input", "other"))
        made = self._combined(p, q, joint.minus)
        return made if made is None else replace(made, wide=made.wide | {ratio})

    def _xlogy(self, node: Node, args: dict[str, Any], depth: int) -> JointValue | None:
        a, b = self._operand(args.get("input"), depth), self.of(args.get("other"), depth)
        return self._combined(a, self._applied(b, joint.log), joint.times)

    def _logaddexp(self, node: Node, args: dict[str, Any], depth: int) -> JointValue | None:
        a, b = (self.of(args.get(name), depth) for name in ("input", "other"))
        return self._combined(a, b, lambda *both: joint.log_sum(both))

    def _logsumexp(self, node: Node, args: dict[str, Any], depth: int) -> JointValue | None:
        return self._over_stack(node, args, depth, joint.log_sum)

    def _sum_of_stack(self, node: Node, args: dict[str, Any], depth: int) -> JointValue | None:
        return self._over_stack(node, args, depth, joint.added)

    def _mean_of_stack(self, node: Node, args: dict[str, Any], depth: int) -> JointValue | None:
        def mean(values: list[Joint]) -> Joint | None:
            return joint.times(joint.added(values), joint.number(1 / len(values)))

        return self._over_stack(node, args, depth, mean)

    def _over_stack(
        self, node: Node, args: dict[str, Any], depth: int, function: Callable[[list[Joint]], Joint | None]
    ) -> JointValue | None:
        """A reduction over what torch.stack has put beside each other."""
        stacked = args.get("input")
        spelled = spellings.read(stacked) if isinstance(stacked, Node) else None
        dim = spellings.one_dim(args.get("dim"))
        if spelled is None or spelled[0].name != "stack" or args.get("keepdim"):
            return None
        if not isinstance(dim, int):
            return None
        if not Context(self.reading, node).is_as_made(stacked):  # type: ignore[arg-type]
            return None
        rank, tensors = len(shape_of(stacked)), spelled[1].get("tensors")  # type: ignore[arg-type]
        if dim % rank != spelled[1].get("dim", 0) % rank or not isinstance(tensors, (list, tuple)):
            return None
        values = [self.of(each, depth) for each in tensors]
        read = [value for value in values if value is not None]
        if len(read) < len(values) or any(v.axis is None or not _are_alike(v, read[0]) for v in read):
            return None
        expr = function([value.expr for value in read])
        wide = frozenset({stacked}).union(*(value.wide for value in read))
        return None if expr is None else replace(read[0], expr=expr, wide=wide)  # type: ignore[arg-type]

    def _kl_div(self, node: Node, args: dict[str, Any], depth: int) -> JointValue | None:
        how = modernised(args).get("reduction", "mean")
        return self.divergence(node, args, depth) if how == "none" else None

    def divergence(self, node: Node, args: dict[str, Any], depth: int = 0) -> JointValue | None:
        """q (log q - input), and q the target or its exponential, as F.kl_div has it."""
        how = modernised(args).get("reduction", "mean")
        inputs = [args.get(name) for name in ("input", "target")]
        value, target = (self.of(arg, depth + 1) for arg in inputs)
        if how not in (*REDUCTIONS, "batchmean") or value is None or target is None:
            return None
        of_log = bool(args.get("log_target"))
        q = self._applied(target, joint.exp) if of_log else target
        log_q = target if of_log else self._applied(target, joint.log)
        gap = self._combined(log_q, value, joint.minus)
        made = self._combined(q, gap, joint.times)
        return made if made is None else replace(made, wide=made.wide | {node})


def _are_alike(a: JointValue, b: JointValue) -> bool:
    """Whether the entries of two values are of the same rows and classes."""
    return a.axis == b.axis and same_shape(a.shape, b.shape) and a.like is b.like


_Step = Callable[[JointReader, Node, dict[str, Any], int], JointValue | None]
_STEPS: dict[str, _Step] = {
    "add": JointReader._sum,
    "sub": JointReader._difference,
    "rsub": JointReader._difference_from,
    "mul": JointReader._product,
    "div": JointReader._quotient,
    "neg": JointReader._negative,
    "exp": JointReader._exp,
    "log": JointReader._log,
    "xlogy": JointReader._xlogy,
    "logaddexp": JointReader._logaddexp,
    "logsumexp": JointReader._logsumexp,
    "sum": JointReader._sum_of_stack,
    "mean": JointReader._mean_of_stack,
    "where": JointReader._where,
    "masked_fill": JointReader._masked_fill,
    "same": JointReader._same,
    "detach": JointReader._detached,
    "kl_div": JointReader._kl_div,
    "getitem": JointReader._element,
}
