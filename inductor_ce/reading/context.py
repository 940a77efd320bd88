"""One node, and the questions that the step it is may ask about its arguments."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeGuard

import sympy
from torch.fx import Node

from .. import algebra
from ..common.findings import Reason, Refusal
from ..graph.builder import Builder
from ..graph.shapes import Size, equal, requires_grad, same_shape, shape_of, tensor_of, tied
from ..graph.timeline import INFERENCE, Mode, written_by
from . import spellings
from .row_views import RowView, arrangement, row_shape
from .values import Columns, Label, Logits, Outside, Reading, Value, VocabValue, detached
from .views import counted, keeps_order, step_back, viewed


def is_labels(node: Any) -> TypeGuard[Node]:
    """Whether an argument is a tensor of integers."""
    example = tensor_of(node)
    return example is not None and not example.is_floating_point() and not example.is_complex()


@dataclass(frozen=True)
class Context:
    """One node of the graph that is read."""

    reading: Reading
    node: Node

    @property
    def position(self) -> int:
        return self.reading.timeline.position[self.node]

    @property
    def grad_mode(self) -> Mode:
        return self.reading.timeline.grad_mode(self.position)

    def tied(self, a: Sequence[Size], b: Sequence[Size]) -> bool:
        """Whether two shapes are equal, if need be by a guard."""
        return tied(a, b) if self.reading.guards else same_shape(a, b)

    def known(self, arg: Any) -> Value | None:
        """The value of an argument as it reads here; None if its storage was changed in ways not followed."""
        if not isinstance(arg, Node):
            return None
        timeline, value = self.reading.timeline, self.reading.values.get(arg)
        edited = self.reading.edits.get(arg, {}).get(timeline.version(arg, self.position))
        if edited is not None:
            return edited
        if value is None or not timeline.unchanged(arg, arg, self.position):
            return None
        if isinstance(value, Columns):
            return value
        if value.logits.inference != (self.grad_mode == INFERENCE):
            return None
        return detached(value) if self.grad_mode is False else value

    def vocab(self, arg: Any, dim: Any) -> VocabValue | None:
        """`arg` with the vocabulary on `dim`: as known, or as logits, seen through views and casts."""
        axis = axis_of(arg, dim)
        return None if axis is None else self._seen(arg, axis)

    def take(self, arg: Any, dim: Any, function: Callable[[algebra.Vocab], Any]) -> VocabValue | None:
        """`arg` with the vocabulary on `dim`, such that the algebra has `function` of it.

        Where it has not, as for a temperature after the maximum was taken off, `arg` is logits in its own
        right from here on, and recorded so.
        """
        value = self.vocab(arg, dim)
        if value is None or (not value.after and function(value.expr) is not None):
            return value
        value = self.reading.values[arg] = self.opaque(arg, value.axis)
        return value

    def _seen(self, arg: Node, axis: int) -> VocabValue:
        value = self.known(arg)
        if isinstance(value, VocabValue) and value.axis == axis:
            return value
        here = self.opaque(arg, axis)
        if value is not None:
            return here
        through = self._through(arg, axis)
        if through is None:
            return here
        source, source_axis, steps = through
        inner = self._seen(source, source_axis)
        detached = inner.detached or self._is_detached(arg)
        return replace(inner, steps=inner.steps + steps, axis=axis, detached=detached)

    def _is_detached(self, arg: Node) -> bool:
        """Whether the node cuts the gradient between a tensor and the same tensor seen otherwise.

        An edit cuts none, even under no_grad: what it gives back is the tensor that it edits.
        """
        if any(written_by(arg)):
            return False
        step, timeline = spellings.step_of(arg), self.reading.timeline
        cut = step is not None and step.name == "detach"
        return cut or timeline.grad_mode(arg) is False

    def _through(self, arg: Node, axis: int) -> tuple[Node, int, tuple[RowView, ...]] | None:
        """(source, its axis, steps) where `arg` is a view or a cast of `source` and still reads so."""
        timeline = self.reading.timeline
        if (timeline.grad_mode(arg) == INFERENCE) != (self.grad_mode == INFERENCE):
            return None
        written = next(written_by(arg), None)
        if written is not None:  # z.div_(t) is z itself
            return (written, axis, ()) if timeline.shares_storage(arg, written) else None
        spelled = spellings.read(arg)
        if spelled is not None and spelled[0].name == "detach":  # an edit since may bring a gradient to one
            unchanged = timeline.unchanged(arg, arg, self.position)
            return (spelled[1]["input"], axis, ()) if unchanged else None
        source = viewed(arg)
        if source is None or not self.still_alike(arg, source):
            return None
        stepped = step_back(arg, source, axis)
        return None if stepped is None else (source, *stepped)

    def still_alike(self, arg: Node, source: Node) -> bool:
        """Whether a view or copy of `source` still holds what `source` holds."""
        timeline = self.reading.timeline
        if timeline.shares_storage(arg, source):
            return True
        return all(timeline.unchanged(each, arg, self.position) for each in (arg, source))

    def opaque(self, arg: Node, axis: int) -> VocabValue:
        """`arg` as logits in its own right, whatever it was made from."""
        version = self.reading.timeline.version(arg, self.position)
        logits = Logits(arg, axis, version, self.grad_mode == INFERENCE)
        return VocabValue(logits, (), axis, algebra.LOGITS)

    def is_as_made(self, arg: Node) -> bool:
        """Whether an argument still reads as when it was made."""
        return self.reading.timeline.unchanged(arg, arg, self.position)

    def counted(self, arg: Any) -> tuple[int, Size] | None:
        """(dimension from the end, length) of what holds 0, 1, 2, ... along one dimension, see `counted`."""
        found, node = counted(arg), arg
        while found is not None and isinstance(node, Node):
            spelled = spellings.read(node)
            if not self.is_as_made(node):
                return None
            node = None if spelled is None else spelled[1].get("input")
        return found

    def is_edited_view(self, source: Node) -> bool:
        """Whether this node is a view of `source` and either is written later, for the other to see."""
        timeline = self.reading.timeline
        edited = not timeline.unchanged(self.node, self.node)
        return edited and timeline.shares_storage(self.node, source)

    def add(self, build: Builder) -> None:
        """Let what was built beside this node be of the reading, which forgets it where nobody uses it."""
        for made in build.created:
            self.reading.added[made] = self.node
            self.reading.timeline.position[made] = self.position

    # Labels

    def loose_label(
        self,
        node: Node | None,
        kept: int | None = None,
        *,
        named: bool = True,
        wraps: str = "",
        column: int | None = None,
    ) -> sympy.Symbol:
        """A symbol for labels that have met no logits yet."""
        symbol = algebra.label(f"loose{len(self.reading.loose) + 1}", named)
        self.reading.loose[symbol] = Label(node, (), kept, self.position, wraps, column)
        return symbol

    def loose_outside(self, arg: Any, like: Node, axis: int, made: str = "") -> sympy.Symbol | None:
        """A symbol for numbers of rows that have met no logits yet, beside labels in columns of `like`."""
        kind = kind_of(arg, like, axis)
        if kind not in ("scalar", "row"):
            return None
        symbol = algebra.outside(f"loose{len(self.reading.loose) + 1}")
        self.reading.loose[symbol] = Outside(arg, kind, (), axis, like, self.position, made)
        return symbol

    def label(
        self,
        value: VocabValue,
        node: Node | None,
        kept: int | None = None,
        *,
        named: bool = True,
        wraps: str = "",
        column: int | None = None,
        width: int = 1,
    ) -> sympy.Symbol:
        """The symbol of labels of the rows of a value; the same labels, however viewed, share one."""
        known = self.reading.labels.setdefault(value.logits, {})
        mine = self._origin(node) if node is not None else None, column
        for symbol, label in known.items():
            there = Context(self.reading, self.reading.timeline.nodes[label.position])
            theirs = there._origin(label.node) if label.node is not None else None
            alike = mine == (theirs, label.column) and label.wraps == wraps
            alike = alike and arrangement(label.steps) == arrangement(value.steps)
            if alike and bool(symbol.is_nonnegative) == named:
                return symbol
        letter = "y" if node is not None else "i" if column is None else str(column)
        symbol = algebra.label(_new_name(known, letter if width == 1 else f"{letter}[{width}]"), named)
        known[symbol] = Label(node, value.steps, kept, self.position, wraps, column, width)
        return symbol

    def met(self, columns: Columns, arg: Node, value: VocabValue) -> algebra.Vocab | None:
        """What is made of labels and numbers, with its labels named as those of the rows of `value`."""
        names: dict[sympy.Symbol, sympy.Symbol] = {}
        for loose in columns.expr.symbols & self.reading.loose.keys():
            held = self.reading.loose[loose]
            there = Context(self.reading, self.reading.timeline.nodes[held.position])
            named = there._label_met(loose, held, columns, arg, value) if isinstance(held, Label) else None
            if isinstance(held, Outside):
                named = there._outside_met(held, arg, value)
            if named is None:
                return None
            names[loose] = named
        return columns.expr.renamed(names)

    def _label_met(
        self, loose: sympy.Symbol, label: Label, columns: Columns, arg: Node, value: VocabValue
    ) -> sympy.Symbol | None:
        if label.node is None:
            return self.label(value, None, column=label.column)
        sizes = row_shape(label.node, label.kept)
        if arrangement(value.steps) and not same_shape(sizes, row_shape(arg, columns.axis)):
            return None
        named = bool(loose.is_nonnegative)
        return self.label(value, label.node, label.kept, named=named, wraps=label.wraps)

    def _outside_met(self, held: Outside, arg: Node, value: VocabValue) -> sympy.Symbol | None:
        if held.axis != value.axis or not same_shape(shape_of(held.like), shape_of(arg)):
            return None
        return self._outside_symbol(held.node, held.kind, value, held.like, held.made)

    def _origin(self, node: Node) -> tuple[Node, int]:
        """The tensor that `node` is a reshape or an integer cast of, and its version here."""
        while (source := viewed(node)) is not None:
            if not keeps_order(node, source) or not self.still_alike(node, source):
                break
            node = source
        return node, self.reading.timeline.version(node, self.position)

    # Tensors from outside

    def outside(
        self, arg: Any, value: VocabValue, like: Node, made: str = ""
    ) -> algebra.Vocab | Refusal | None:
        """A tensor that is not made of these logits, where it broadcasts against a value shaped as `like`."""
        kind = kind_of(arg, like, value.axis)
        if kind is None:
            return None
        if kind in ("classes", "columns") and self._wants_gradient(arg):
            return _weighed_by(arg)
        if value.detached and self._wants_gradient(arg):
            return Refusal(Reason.NOT_UNDERSTOOD, f"{arg} has a gradient there, and the logits have none.")
        symbol = self._outside_symbol(arg, kind, value, like, made)
        return algebra.columns(symbol) if kind in ("classes", "columns") else algebra.as_vocab(symbol)

    def mask(self, arg: Node, value: VocabValue, like: Node, made: str) -> sympy.Symbol | None:
        """The symbol of truth values that say of each column whether it is kept, 1 where it is."""
        kind = kind_of(arg, like, value.axis)
        return self._outside_symbol(arg, kind, value, like, made) if kind in ("classes", "columns") else None

    def masks(self, value: VocabValue) -> frozenset[sympy.Symbol]:
        """The symbols that are 0 or 1 in each row."""
        known = self.reading.outside.get(value.logits, {})
        return frozenset(symbol for symbol, held in known.items() if held.is_mask)

    def weights(self, arg: Any, value: VocabValue, like: Node) -> algebra.Vocab | Refusal | None:
        """Class weights [V], whose axis is the vocabulary's wherever that is."""
        if tensor_of(arg) is None:
            return None
        if self._wants_gradient(arg):
            return _weighed_by(arg)
        return algebra.columns(self._outside_symbol(arg, "classes", value, like, ""))

    def _wants_gradient(self, arg: Node) -> bool:
        return self.grad_mode is True and requires_grad(arg)

    def _outside_symbol(self, arg: Node, kind: str, value: VocabValue, like: Node, made: str) -> sympy.Symbol:
        known, timeline = self.reading.outside.setdefault(value.logits, {}), self.reading.timeline
        for symbol, held in known.items():
            same = (held.node, held.kind, held.made, held.axis) == (arg, kind, made, value.axis)
            same = same and arrangement(held.steps) == arrangement(value.steps)
            if same and timeline.version(arg, held.position) == timeline.version(arg, self.position):
                return symbol
        is_mask = made.startswith("where") and kind in ("classes", "columns")
        letter = "k" if is_mask else {"classes": "w", "columns": "q"}.get(kind, "r")
        count = sum(str(symbol).startswith(letter) for symbol in known)
        name = letter if not count else f"{letter}{count + 1}"
        symbol = algebra.mask(name) if is_mask else algebra.outside(name)
        known[symbol] = Outside(arg, kind, value.steps, value.axis, like, self.position, made)
        return symbol


def _weighed_by(arg: Node) -> Refusal:
    shape = list(shape_of(arg))
    fact = f"The classes are weighed by {{culprit}} {shape}, of which a gradient is wanted."
    return Refusal(Reason.CLASS_WEIGHTS if len(shape) == 1 else Reason.SOFT_TARGETS, fact, arg)


def _new_name(known: dict[sympy.Symbol, Label], letter: str) -> str:
    """The letter, with a number behind it where there are labels of other names: y, y2, y3."""
    taken = {str(symbol) for symbol in known}
    return letter if letter not in taken else f"{letter}{len(taken) + 1}"


def axis_of(arg: Any, dim: Any) -> int | None:
    """`dim` of a floating tensor, counted from the front; None where it is no such dimension."""
    example = tensor_of(arg)
    if example is None or not isinstance(dim, int) or not example.dim() or not example.is_floating_point():
        return None
    return dim % example.dim() if -example.dim() <= dim < example.dim() else None


def kind_of(arg: Any, like: Node, axis: int) -> str | None:
    """How a tensor broadcasts against one of the shape of `like`, see `Outside`."""
    if tensor_of(arg) is None or tensor_of(arg).is_complex():  # type: ignore[union-attr]
        return None
    own, full = shape_of(arg), shape_of(like)
    if len(own) > len(full):
        return None
    sizes = (1,) * (len(full) - len(own)) + own
    rows = [(a, b) for i, (a, b) in enumerate(zip(sizes, full, strict=True)) if i != axis]
    if not all(equal(a, 1) or equal(a, b) for a, b in rows):
        return None
    alone, whole = all(equal(a, 1) for a, _ in rows), all(equal(a, b) for a, b in rows)
    if equal(sizes[axis], 1) and not equal(full[axis], 1):
        return "scalar" if alone else "row"
    if not equal(sizes[axis], full[axis]):
        return None
    return "columns" if whole else "classes" if alone else None
