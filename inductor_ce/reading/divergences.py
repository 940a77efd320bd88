"""Sums over the classes of several rows of logits beside each other, read where one row alone is not enough.

A divergence whose sides both carry gradients, or whose logarithm is of a mixture, has no value over one
tensor of logits. Where a sum, or a loss of torch, has none, what it sums is read as a joint value.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.fx import Node

from .. import algebra
from ..algebra import divergences as joint
from ..algebra import entries
from ..algebra.divergences import Divergence
from ..algebra.entries import Entries
from ..graph.shapes import Size, equal, example_of, requires_grad, same_shape, shape_of, tensor_of
from ..graph.timeline import INFERENCE
from ..graph.walk import reached
from . import spellings
from .context import kind_of
from .entries import KINDS, LOSSES, EntryReader
from .joint import JointReader, RowFactor
from .losses import modernised
from .own import sums_entries
from .sides import Side, moves, of_wholes
from .tails import Summed, added_up
from .values import LossValue, Reading, RowValue, VocabValue, row_expr

_ENDS = ("sum", "mean", "kl_div", *LOSSES)

PRODUCTS = ("matmul", "einsum", "vecdot")  # steps that may be linear layers


@dataclass(frozen=True)
class Term:
    """A divergence, or a sum of entries, and the numbers of each row that it is multiplied by."""

    divergence: Divergence | Entries
    factors: tuple[RowFactor, ...]


@dataclass(frozen=True)
class Between:
    """A node that is a sum over the classes of several sides, and over rows as `end` says.

    Attributes:
        node, end, summand, axis, wide: as of `Summed`.
        sides: of which its terms are.
        terms: what is added up; none where that is not a sum of logarithms under probabilities.
        tensors: what is brought along for each entry, row or class.
        numbers, constants: those of rows of which gradients are wanted, or are not.
        is_of_one: whether it is a loss of one side too, whose weights the others make; see `_is_of_given`.
    """

    node: Node
    end: Node
    summand: Node
    axis: int
    sides: tuple[Side, ...]
    terms: tuple[Term, ...]
    wide: frozenset[Node]
    tensors: tuple[Node, ...] = ()
    numbers: tuple[Node, ...] = ()
    constants: tuple[Node, ...] = ()
    is_of_one: bool = False


def read_divergences(reading: Reading) -> Iterator[Between]:
    """Those of a graph that has been read."""
    reader = JointReader(reading)
    found, others, taught = [], [], []
    for node in reading.timeline.nodes:
        step = spellings.step_of(node)
        if step is None or step.name not in _ENDS:
            continue
        of_one = is_loss_of_one(reading, node)
        is_learnt = of_one and _learns(reading, node)
        if is_learnt and algebra.powers_cancel(row_expr(reading.values[node])):  # type: ignore[arg-type]
            others.append(node)
        if is_learnt and not _is_of_given(reading, node):
            continue
        summed = _summed(reader, node, step.name)
        if is_learnt:
            taught += [node if summed is None else summed]
            continue
        # As a loss of one side reads it, the logarithm of a mixture is a weight of all classes.
        if summed is not None and (not of_one or summed.expr.has_mixture):
            found.append(summed)
        elif not of_one:
            others.append(node)
    between = {summed.node: _between(reader, summed) for summed in added_up(reading, found)}
    for each in taught:
        of_both = _of_others_too(reader, each) if isinstance(each, Node) else _between(reader, each)
        if of_both is not None and of_both.terms:
            between[of_both.node] = replace(of_both, is_of_one=True)
    others += [node for node, each in between.items() if each is None or not each.terms]
    places = _places_of_classes(reading) if others else []
    for node in others:
        if _may_be_of(node, places) and (summed_up := _of_entries(reader, node)) is not None:
            between[node] = summed_up
    for node in sorted(between, key=reading.timeline.position.__getitem__):
        if (each := between[node]) is not None:
            yield each


def _places_of_classes(reading: Reading) -> list[tuple[int, Size]]:
    """Of what is made of logits (the dimension of the classes, from the end; how many these are)."""
    vocab = {node: value for node, value in reading.values.items() if isinstance(value, VocabValue)}
    shapes = ((shape_of(node), value.axis) for node, value in vocab.items())
    places = ((axis - len(shape), shape[axis]) for shape, axis in shapes)
    return [*{str(place): place for place in places}.values()]


def _may_be_of(node: Node, places: list[tuple[int, Size]]) -> bool:
    """Whether what a node sums may be entries of that: the streams of a model are not walked for nothing."""
    summand = spellings.arguments_of(node).get("input")
    if not isinstance(summand, Node) or tensor_of(summand) is None:
        return False
    shape = shape_of(summand)
    return any(len(shape) >= -axis and equal(shape[axis], size) for axis, size in places)


def is_loss_of_one(reading: Reading, node: Node) -> bool:
    """Whether a node is a loss over one tensor of logits."""
    value = reading.values.get(node)
    return isinstance(value, (RowValue, LossValue)) and algebra.is_normalised(row_expr(value))


def _learns(reading: Reading, node: Node) -> bool:
    """Whether a gradient flows through a loss of one tensor of logits."""
    value = reading.on_logits(node)
    return value is not None and reading.timeline.grad_mode(node) is True and requires_grad(value.logits.node)


def _is_of_given(reading: Reading, node: Node) -> bool:
    """Whether the logits of a loss of one side are given to the graph, or made of such by steps alone.

    NOTE Teachers. A loss that is weighed by a softmax in the same graph is a loss of one side, whose weights
    would be made in memory, and read by each of its sums. As a divergence, or a sum of entries, it reads the
    teacher's logits. With a linear layer before the logits the weights are made for each piece of the head.
    """
    logits = reading.on_logits(node).logits  # type: ignore[union-attr]
    v = shape_of(logits.node)[logits.axis]

    def of_classes(made: Node) -> Iterator[Node]:
        """What has the classes, and is an operand."""
        for each in made.all_input_nodes:
            example = tensor_of(each)
            if example is not None and any(equal(size, v) for size in example.shape):
                yield each

    made = [each for each in reached([logits.node], of_classes) if each.op != "placeholder"]
    steps = [spellings.step_of(each) for each in made]
    return all(step is not None and step.name not in PRODUCTS for step in steps)


def _summed(reader: JointReader, node: Node, name: str) -> Summed | None:
    args = spellings.arguments_of(node)
    summand, timeline = args.get("input"), reader.reading.timeline
    if tensor_of(node) is None or not isinstance(summand, Node) or tensor_of(summand) is None:
        return None
    mode = timeline.grad_mode(node)
    if mode == INFERENCE:
        return None
    is_loss = name == "kl_div"
    if is_loss and modernised(args).get("reduction", "mean") == "none":
        return None  # what sums it is the end
    value = reader.divergence(node, args) if is_loss else reader.of(summand)
    if value is None or value.axis is None:
        return None
    held = value if mode is True else reader.held(value)
    if held is None:
        return None
    value, axis = held, value.axis
    assert axis is not None
    if not is_loss and not _sums(args, axis, len(shape_of(summand))):
        return None
    if value.like is not None:
        if is_loss or args.get("dim") is not None:
            return None
        summand, axis = value.like, len(shape_of(value.like)) - 1
    logits = frozenset(reader.sides[side].logits.node for side in value.expr.sides)
    return Summed(node, node, summand, axis, value.expr, value.wide | {node}, logits)


def _between(reader: JointReader, summed: Summed) -> Between | None:
    """None for what is over one side alone."""
    used = sorted(summed.expr.sides)
    sides = of_wholes([reader.sides[side] for side in used], reader.reading)
    wanted = [i for i, side in enumerate(sides) if moves(side)]
    if not 2 <= len(sides) <= joint.MOST_SIDES:
        return None
    expr = summed.expr.renamed({side: i for i, side in enumerate(used)})
    parts = joint.total(expr, [(side.logits, side.steps) for side in sides], wanted) or {}
    terms = tuple(Term(d, tuple(reader.factors[f] for f in rows)) for rows, d in parts.items())
    return Between(summed.node, summed.end, summed.summand, summed.axis, sides, terms, summed.wide)


def _of_entries(reader: JointReader, node: Node) -> Between | None:
    """What a node is if it sums what each entry makes by itself."""
    spelled = spellings.read(node)
    if spelled is None or spelled[0].name not in _ENDS:
        return None
    (step, args), timeline = spelled, reader.reading.timeline
    summand, mode = args.get("input"), timeline.grad_mode(node)
    if not isinstance(summand, Node) or None in (tensor_of(node), tensor_of(summand)) or mode == INFERENCE:
        return None
    entry = EntryReader(reader, summand)
    is_loss = step.name in ("kl_div", *LOSSES)
    if is_loss:
        args = modernised(args)
        how, target = args.get("reduction", "mean"), args.get("target")
        alike = tensor_of(target) is not None and same_shape(shape_of(target), shape_of(summand))  # type: ignore[arg-type]
        if how not in ("mean", "sum", "batchmean") or not alike:
            return None
        term = entry.loss(step.name, args)
        wide = entry.wide(summand, target)  # type: ignore[arg-type]
    else:
        term, wide = entry.of(summand), entry.wide(summand)
    axis = entry.axis
    if term is None or axis is None or not entries.is_own(term) or not _is_normalised(reader, entry, term):
        return None
    if not is_loss and not (_sums(args, axis, len(shape_of(summand))) and _sums_as_made(args)):
        return None
    if not entry.is_settled(wide | {node}):
        return None
    if mode is not True:
        term = entry.held(term)
    return _summed_up(reader, entry, node, term, wide | {node})


def _of_others_too(reader: JointReader, node: Node) -> Between | None:
    """What a node is if it sums entries of several tensors of logits."""
    summed_up = _of_entries(reader, node)
    several = summed_up is not None and len({side.logits for side in summed_up.sides}) > 1
    return summed_up if several else None


def _is_normalised(reader: JointReader, entry: EntryReader, term: entries.Term) -> bool:
    """Whether there is a softmax, or that by which one is divided is among the numbers of the row."""
    numbers = [entry.numbers[k] for k in entries.places_of(term, "n")]
    return entries.has_softmax(term) or any(is_loss_of_one(reader.reading, number) for number in numbers)


def _summed_up(
    reader: JointReader, entry: EntryReader, node: Node, term: entries.Term, wide: frozenset[Node]
) -> Between | None:
    used, axis = {kind: entries.places_of(term, *names) for kind, names in KINDS.items()}, entry.axis
    assert axis is not None
    tensors = tuple(entry.tensors[k] for k in used["t"])
    numbers = tuple(entry.numbers[k] for k in used["n"])
    constants = tuple(entry.constants[k] for k in used["c"])
    sides = of_wholes([reader.sides[side] for side in used["p"]], reader.reading)
    if len(sides) > joint.MOST_SIDES or any(kind_of(t, entry.summand, axis) is None for t in tensors):
        return None
    if sums_entries(reader.reading, [reader.sides[side] for side in used["p"]], numbers, wide):
        return None
    wanted = tuple(i for i, side in enumerate(sides) if moves(side))
    leaves: dict[entries.Term, entries.Term] = {}
    for kind, places in used.items():
        leaves |= {(name, k): (name, i) for name in KINDS[kind] for i, k in enumerate(places)}
    made = Entries(entries.replaced(term, leaves), len(sides), len(tensors), wanted)
    terms = (Term(made, ()),)
    return Between(node, node, entry.summand, axis, sides, terms, wide, tensors, numbers, constants)


def _sums_as_made(args: dict[str, Any]) -> bool:
    """Whether no wider dtype is asked for than that of the entries, as those of a sum are not wide then."""
    return args.get("dtype") in (None, torch.float32, example_of(args["input"]).dtype)


def _sums(args: dict[str, Any], axis: int, rank: int) -> bool:
    """Whether a sum or mean is over the classes, and maybe over rows."""
    dim = args.get("dim")
    dims = range(rank) if dim is None else dim if isinstance(dim, (tuple, list)) else [dim]
    return all(isinstance(d, int) for d in dims) and axis in {d % rank for d in dims}
