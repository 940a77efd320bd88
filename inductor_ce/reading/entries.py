"""Sums over the classes of what each entry makes by itself, where no statistics and no divergences are read.

From what sums them the nodes are read backwards, to log-probabilities and probabilities of some logits, and
to tensors that the user brings along, through which no gradient flows. Between these may be any functions
of `algebra.entries`.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch.fx import Node

from .. import algebra
from ..algebra import divergences as joint
from ..algebra import entries
from ..algebra.divergences import Joint
from ..algebra.entries import Term
from ..common.compat.graphs import clamps_pass_ends
from ..graph.shapes import example_of, same_shape, shape_of, tensor_of
from ..graph.timeline import INFERENCE
from ..graph.walk import reached
from . import spellings
from .constants import number_of
from .context import Context, kind_of
from .joint import MAX_DEPTH, JointReader
from .losses import modernised
from .moved import before_move, moved
from .own import compares_with_own
from .sides import Side, moves, place_in
from .values import VocabValue
from .views import cast_keeps

# Of leaves: those of sides, of tensors, of numbers.
KINDS = {"p": entries.OF_SIDES, "t": ("t",), "n": ("n",), "c": ("c",)}

LOSSES = ("mse_loss", "l1_loss", "binary_cross_entropy")  # of torch, of two tensors entry by entry


class EntryReader:
    """What nodes are that have the shape of `summand`.

    Attributes:
        axis: of the classes, once a side has been read.
        tensors: those that are brought along, as terms name them.
        numbers, constants: those of rows, likewise, of which gradients are wanted or are not.
    """

    def __init__(self, joint_reader: JointReader, summand: Node):
        self.joint, self.summand = joint_reader, summand
        self.axis: int | None = None
        self.tensors: list[Node] = []
        self.numbers: list[Node] = []
        self.constants: list[Node] = []
        self._known: dict[Node, Term | None] = {}
        self._wide: dict[Node, frozenset[Node]] = {}

    def of(self, arg: Any, depth: int = 0) -> Term | None:
        """What a number or a node is; None for what is not read."""
        constant = number_of(self.joint.reading, arg)
        if constant is not None:
            return constant
        if not isinstance(arg, Node) or tensor_of(arg) is None or depth > MAX_DEPTH:
            return None
        if arg not in self._known:
            self._known[arg] = None
            term = self._read(arg, depth)
            brought = None if term is not None and entries.sides_of(term) else self._brought(arg)
            if brought is not None or term is None or not entries.moves(term) or entries.is_long(term):
                self._wide.pop(arg, None)
                term = brought
            self._known[arg] = term
        return self._known[arg]

    def wide(self, *ends: Node) -> frozenset[Node]:
        """The nodes by which these are made of the logits."""

        def before(node: Node) -> list[Node]:
            return [each for each in self._wide.get(node, ()) if each is not node]

        made = [node for node in ends if node in self._wide]
        return frozenset(reached(made, before))

    def _read(self, node: Node, depth: int) -> Term | None:
        """What is made of sides, and is not edited."""
        reading = self.joint.reading
        timeline = reading.timeline
        if not same_shape(shape_of(node), shape_of(self.summand)):
            return None
        if not timeline.unchanged(node, node):
            return None
        value = self.joint.of(node)
        if value is None or value.axis is None or value.like is not None:
            term = self._by_step(node, depth)
            term = self._logit(node) if term is None else term
            return self._moved(node, depth) if term is None else term
        # A mixture is summed as it is spelled, where that is read: by probabilities, or by their logarithms.
        term = self._by_step(node, depth) if value.expr.has_mixture else None
        if term is None:
            self._wide[node] = value.wide
            term = self._of_joint(value.expr, value.axis)
        return term

    def _by_step(self, node: Node, depth: int) -> Term | None:
        """What a function makes of what it is given."""
        timeline = self.joint.reading.timeline
        spelled, mode = spellings.read(node), timeline.grad_mode(node)
        if spelled is None or mode == INFERENCE:
            return None
        step = _STEPS.get(spelled[0].name)
        term = None if step is None else step(self, node, spelled[0].name, spelled[1], depth + 1)
        if term is None or (spelled[0].name != "same" and self._is_narrow(node, term)):
            return None
        if term[0] != "z":  # type: ignore[index]
            self._wide[node] = frozenset([node, *(s for s in node.all_input_nodes if s in self._wide)])
        return term if mode is True else self.held(term)

    def _moved(self, node: Node, depth: int) -> Term | None:
        """Of entries of other rows, or of the same elsewhere, what is chosen or seen."""
        source, timeline = before_move(self.joint, node), self.joint.reading.timeline
        if source is None:
            return None
        there = EntryReader(self.joint, source)
        term = there.of(source, depth + 1)
        term, axis = moved(self.joint, node, source, term, there.axis)
        if term is None or self.axis not in (None, axis):
            return None
        self.axis = axis
        self._wide |= there._wide | {node: frozenset([node, source])}
        return term if timeline.grad_mode(node) is True else self.held(term)

    def _logit(self, node: Node) -> Term | None:
        """Logits themselves, of which a softmax is read as well."""
        axis, reading = self.axis, self.joint.reading
        axes = {value.axis for value in self._of_logits} if axis is None else {axis}
        for axis in axes:
            value = Context(reading, node).vocab(node, axis)
            if value is None or value.expr != algebra.LOGITS or value.after or value.logits.inference:
                continue
            if any(other.logits == value.logits for other in self._of_logits):
                self.axis = axis
                return "z", self.joint.side(Side(value.logits, value.steps, value.detached))
        return None

    @functools.cached_property
    def _of_logits(self) -> list[VocabValue]:
        """What is read as made of logits, and has their classes where it may be among what is summed."""
        rank = len(shape_of(self.summand))
        values = self.joint.reading.values.values()
        return [v for v in values if isinstance(v, VocabValue) and v.axis < rank]

    def _is_narrow(self, node: Node, term: Term) -> bool:
        """Whether it is rounded to float32 beside sides in float64, as truth values times numbers are."""
        logits = [self.joint.sides[s].logits.node for s in entries.sides_of(term)]
        wide = any(example_of(z).dtype == torch.float64 for z in logits)
        return wide and example_of(node).dtype not in (torch.float64, torch.bool)

    def _of_joint(self, value: Joint, axis: int) -> Term | None:
        if self.axis not in (None, axis):
            return None
        self.axis = axis
        made = [(c, self._product(entry)) for entry, c in value.terms]
        if not made or None in [term for _, term in made]:
            return None
        return entries.added(made)  # type: ignore[arg-type]

    def _product(self, entry: joint.Entry) -> Term | None:
        """r b, see `algebra.divergences`."""
        p: Term = 1.0 if entry.side is None else ("p", entry.side)
        log: Term = 1.0 if entry.log is None else entries.logarithm(entry.log)
        product: Term = ("mul", p, log) if p != 1 and log != 1 else log if p == 1 else p
        for place in entry.rows:
            row = self.joint.factors[place]
            term = self._brought(row.node)
            if term is None or row.how == "chosen":
                return None
            if row.how in ("mul", "div"):
                product = (row.how, product, self._as_number(term))
            else:
                choices = (0.0, product) if row.how == "where not" else (product, 0.0)
                product = ("where", term, *choices)
        return product

    def _brought(self, node: Node) -> Term | None:
        """A number of each row, or a tensor for each entry or class of which no gradient is wanted."""
        example, timeline = tensor_of(node), self.joint.reading.timeline
        like = tensor_of(self.summand)
        assert example is not None
        assert like is not None
        axis = len(like.shape) - 1 if self.axis is None else self.axis
        kind = kind_of(node, self.summand, axis)
        if kind is None or example.device != like.device:
            return None
        node = self.joint.reading.twins.of(node)
        moves = any(example_of(each).requires_grad for each in timeline.as_edited(node))
        if kind in ("row", "scalar") and example.is_floating_point():
            return ("n", place_in(self.numbers, node)) if moves else ("c", place_in(self.constants, node))
        return None if moves else ("t", place_in(self.tensors, node))

    def is_settled(self, readers: frozenset[Node]) -> bool:
        """Whether nothing edits what is brought along once it has been read."""
        timeline = self.joint.reading.timeline
        for node in (*self.tensors, *self.numbers, *self.constants):
            read = [user for user in node.users if user in readers]
            first = min(read, key=timeline.position.__getitem__, default=node)
            if not timeline.unchanged(node, first):
                return False
        return True

    def held(self, term: Term) -> Term:
        """The same where no gradient flows through it."""
        leaves: dict[Term, Term] = {}
        for side in entries.sides_of(term):
            held = self.joint.detached(side)
            leaves |= {(name, side): (name, held) for name in entries.OF_SIDES}
        for k in entries.places_of(term, "n"):
            leaves["n", k] = "c", place_in(self.constants, self.numbers[k])
        return entries.replaced(term, leaves)

    def _as_number(self, term: Term) -> Term:
        """A truth value as 0 or 1."""
        is_brought = isinstance(term, tuple) and term[0] == "t"
        if is_brought and example_of(self.tensors[term[1]]).dtype != torch.bool:  # type: ignore[index]
            return term
        return ("number", term) if is_brought or entries.is_true_or_false(term) else term

    # Steps

    def _numbers(self, args: dict[str, Any], depth: int, *names: str) -> list[Any] | None:
        """Of arguments what they are, as numbers."""
        terms = [self.of(args.get(name), depth) for name in names]
        return None if None in terms else [self._as_number(term) for term in terms]  # type: ignore[arg-type]

    def _compares_with_own(self, *terms: Term, bends: bool = False) -> bool:
        def of(kind: str, nodes: list[Any]) -> list[Any]:
            return [nodes[k] for k in {k for term in terms for k in entries.places_of(term, *KINDS[kind])}]

        held = of("t", self.tensors) + of("c", self.constants)
        sides, numbers = of("p", self.joint.sides), of("n", self.numbers)
        return compares_with_own(self.joint.reading, sides, held, numbers, bends=bends)

    def _function(self, node: Node, name: str, args: dict[str, Any], depth: int) -> Term | None:
        if args.get("alpha", 1) != 1 or args.get("rounding_mode") is not None:
            return None
        numbers = self._numbers(args, depth, *_OPERANDS[name])
        if numbers is None or (name == "xlogy" and any(isinstance(x, float) for x in numbers)):
            return None
        bends = name in ("maximum", "minimum")
        if (bends or name in _COMPARISONS) and self._compares_with_own(*numbers, bends=bends):
            return None
        return entries.exp(*numbers) if name == "exp" else ("sub" if name == "rsub" else name, *numbers)

    def _elsewhere(self, node: Node, name: str, args: dict[str, Any], depth: int) -> Term | None:
        """A function for which the table of steps has no row of its own."""
        numbers = self._numbers(args, depth, "input")
        if numbers is None or len(node.all_input_nodes) > 1:
            return None
        (x,) = numbers
        own = self._compares_with_own(x, bends=True)
        made: dict[str, Term | None] = {
            "abs": None if own else ("abs", x),
            "log1p": ("log1p", x),
            "reciprocal": ("div", 1.0, x),
            "relu": None if own else ("where", ("le", x, 0.0), 0.0, x),
            "log_sigmoid": ("neg", ("logaddexp", ("neg", x), 0.0)),
        }
        return made.get(getattr(node.target, "__name__", node.target))  # type: ignore[arg-type]

    def _log_to(self, node: Node, name: str, args: dict[str, Any], depth: int) -> Term | None:
        numbers = self._numbers(args, depth, "input")
        return None if numbers is None else ("div", ("log", *numbers), math.log(args["base"]))

    def _softplus(self, node: Node, name: str, args: dict[str, Any], depth: int) -> Term | None:
        numbers = self._numbers({"beta": 1, "threshold": 20, **args}, depth, "input", "beta", "threshold")
        if numbers is None or not all(isinstance(x, float) and x for x in numbers[1:]):
            return None
        return entries.softplus(*numbers)

    def _power(self, node: Node, name: str, args: dict[str, Any], depth: int) -> Term | None:
        numbers = self._numbers({"exponent": 2, **args}, depth, "input", "exponent")
        return None if numbers is None or isinstance(numbers[0], float) else ("pow", *numbers)

    def _clamp(self, node: Node, name: str, args: dict[str, Any], depth: int) -> Term | None:
        x = self._numbers(args, depth, "input")
        low, high = self._end(args.get("min"), -math.inf), self._end(args.get("max"), math.inf)
        if x is None or low is None or high is None or low > high:
            return None
        if self._compares_with_own(x[0], bends=True):
            return None
        return "clamp", x[0], low, high, float(clamps_pass_ends())

    def _end(self, end: Any, none: float) -> float | None:
        return none if end is None else number_of(self.joint.reading, end)

    def _where(self, node: Node, name: str, args: dict[str, Any], depth: int) -> Term | None:
        if name == "masked_fill":
            args = {"condition": args.get("mask"), "input": args.get("value"), "other": args.get("input")}
        condition = self._truths({"input": args.get("condition")}, depth, "input")
        numbers = self._numbers(args, depth, "input", "other")
        return None if condition is None or numbers is None else ("where", *condition, *numbers)

    def _truth(self, node: Node, name: str, args: dict[str, Any], depth: int) -> Term | None:
        terms = self._truths(args, depth, *(["input"] if name == "not" else _TWO))
        return None if terms is None else (name, *terms)

    def _truths(self, args: dict[str, Any], depth: int, *names: str) -> list[Any] | None:
        """Of arguments what they are, all truth values."""
        examples = [tensor_of(args.get(name)) for name in names]
        if any(example is None or example.dtype != torch.bool for example in examples):
            return None
        terms = [self.of(args.get(name), depth) for name in names]
        return None if None in terms else terms

    def _same(self, node: Node, name: str, args: dict[str, Any], depth: int) -> Term | None:
        a, b = tensor_of(args.get("input")), tensor_of(node)
        if a is None or b is None or a.device != b.device or not b.is_floating_point():
            return None
        if a.is_floating_point() and not cast_keeps(a.dtype, b.dtype):
            return None
        term = self.of(args.get("input"), depth)
        return None if term is None else self._as_number(term)

    def _detached(self, node: Node, name: str, args: dict[str, Any], depth: int) -> Term | None:
        term = self.of(args.get("input"), depth)
        return None if term is None else self.held(term)

    def _unreduced(self, node: Node, name: str, args: dict[str, Any], depth: int) -> Term | None:
        args = modernised(args)
        return self.loss(name, args, depth) if args.get("reduction", "mean") == "none" else None

    def loss(self, name: str, args: dict[str, Any], depth: int = 0) -> Term | None:
        """An entry of a loss of two tensors."""
        if name == "binary_cross_entropy":
            return self._binary(args, depth)
        x = self._numbers(args, depth, "input", "target")
        if x is None or args.get("weight") is not None:
            return None
        if name == "kl_div" and args.get("log_target"):
            return "mul", entries.exp(x[1]), ("sub", x[1], x[0])
        if name == "kl_div":
            return "sub", ("xlogy", x[1], x[1]), ("mul", x[1], x[0])
        gap = ("sub", *x)
        if name == "mse_loss":
            return "pow", gap, 2.0
        return None if self._compares_with_own(gap, bends=True) else ("abs", gap)

    def _binary(self, args: dict[str, Any], depth: int) -> Term | None:
        """An entry's binary cross entropy, with a target and a weight of which no gradient is wanted."""
        x = self._numbers({"weight": 1.0, **_given(args)}, depth, "input", "target", "weight")
        if x is None or any(moves(self.joint.sides[s]) for s in entries.sides_of(x[1])):
            return None
        if entries.leaves_of(x[1], "n"):
            return None
        own = entries.binary_cross_entropy(x[0], x[1], self.held(x[0]))
        return own if x[2] == 1 else ("mul", own, x[2])


def _given(args: dict[str, Any]) -> dict[str, Any]:
    return {name: arg for name, arg in args.items() if arg is not None}


_ONE, _TWO = ("input",), ("input", "other")
_COMPARISONS = ("gt", "ge", "lt", "le", "eq", "ne")
_OPERANDS = {
    **dict.fromkeys(("neg", "exp", "log", "sqrt", "sigmoid", "tanh"), _ONE),
    **dict.fromkeys(
        ("add", "sub", "mul", "div", "xlogy", "maximum", "minimum", "logaddexp", *_COMPARISONS), _TWO
    ),
    "rsub": ("other", "input"),
}
_Step = Callable[[EntryReader, Node, str, dict[str, Any], int], Term | None]
_STEPS: dict[str, _Step] = {
    **dict.fromkeys(_OPERANDS, EntryReader._function),
    **dict.fromkeys(("pow", "square"), EntryReader._power),
    **dict.fromkeys(("where", "masked_fill"), EntryReader._where),
    **dict.fromkeys(("and", "or", "not"), EntryReader._truth),
    **dict.fromkeys(("kl_div", *LOSSES), EntryReader._unreduced),
    "elementwise": EntryReader._elsewhere,
    "log_to": EntryReader._log_to,
    "softplus": EntryReader._softplus,
    "clamp": EntryReader._clamp,
    "same": EntryReader._same,
    "detach": EntryReader._detached,
}
