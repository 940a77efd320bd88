"""Losses whose classes come in blocks, of which statistics are carried from one to the next.

    m_new = torch.maximum(m, z.amax(-1))
    s = s * torch.exp(m - m_new) + torch.exp(z - m_new[:, None]).sum(-1)

A graph is read in the order in which it runs, and every storage of numbers of rows has the value that was
written to it last, as in `part_reader`. The logits of a block are whatever such a step reads. What is found
are uses: places where something else reads what was made of blocks. In a use that may be replaced, nothing is
left that must cancel (`algebra.blocks`).
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field, replace
from typing import Any

from torch.fx import Graph, Node

from ..algebra import blocks
from ..algebra.blocks import Gather, Mass, Reference, Row, Sum
from ..common.compat.graphs import is_plain_tensor
from ..graph.shapes import constant, example_of, same_shape, shape_of, tensor_of
from ..graph.timeline import Timeline, written_by
from . import spellings
from .label_ranges import LabelRanges
from .steps import Step as Spelling
from .steps import View
from .views import keeps_order, viewed


@dataclass(frozen=True)
class Wide:
    """The logits of a block and a number for each row; `exp`: e to their power; `held`: have no gradient."""

    block: Node
    shift: Sum = blocks.ZERO
    exp: bool = False
    held: bool = False


@dataclass(frozen=True)
class Stack:
    """Several numbers of each row, along a dimension that is theirs."""

    rows: tuple[Row, ...]
    dim: int

    @property
    def blocks(self) -> frozenset[Node]:
        return frozenset().union(*(row.blocks for row in self.rows))

    @property
    def names(self) -> frozenset[Any]:
        return frozenset().union(*(row.names for row in self.rows))


@dataclass(frozen=True)
class Use:
    """A node that reads `source` and is no step; `row` is what it reads, None if it may not be replaced."""

    user: Node
    source: Node
    row: Sum | None
    blocks: frozenset[Node]


@dataclass
class Blocks:
    """What was read of a graph: its uses, and its steps with the blocks that they are of."""

    uses: list[Use] = field(default_factory=list)
    steps: dict[Node, frozenset[Node]] = field(default_factory=dict)


def may_have_blocks(graph: Graph) -> bool:
    """Whether anything in a graph brings numbers of rows together, as all of these losses do."""
    return any(_brings_together(node) for node in graph.nodes)


def _brings_together(node: Node) -> bool:
    step = spellings.step_of(node)
    if step is None or step.name not in ("maximum", "logaddexp", "logsumexp", "max"):
        return False
    if step.name == "max":
        return isinstance(spellings.arguments(node, step).get("dim"), Node)
    source = node.all_input_nodes[0] if node.all_input_nodes else None
    return step.name != "logsumexp" or (
        source is not None and (spellings.is_step(source, "stack") or spellings.is_step(source, "cat"))
    )


def read_blocks(timeline: Timeline) -> Blocks:
    reader = _Reader(timeline)
    for node in timeline.nodes:
        reader.read(node)
    reader.read_exposed()
    return reader.found


class _Reader:
    def __init__(self, timeline: Timeline):
        self.timeline, self.labels = timeline, LabelRanges(timeline)
        self.found = Blocks()
        self._rows: dict[Hashable, Row | Stack | None] = {}  # by storage; None: something else wrote there
        self._blocks_of: dict[Hashable, frozenset[Node]] = {}  # all that a storage has had
        self._whole: set[Node] = set()
        self.logits: dict[Node, Wide] = {}
        self.firsts: dict[Node, Row] = {}  # by max(dim), its values
        self._references: dict[Hashable, Reference] = {}
        self._attached: set[Reference] = set()  # of these, those that have a gradient
        self._outside = {timeline.storage(n) for n in timeline.nodes if n.op in ("placeholder", "get_attr")}

    # Values

    def row(self, given: Any) -> Row | None:
        """What has a number for each row, or the same for all."""
        if isinstance(given, (int, float)) and not isinstance(given, bool):
            return Sum(number=given)
        if not isinstance(given, Node) or given not in self._whole:
            return None
        value = self._rows.get(self.timeline.storage(given))
        return None if isinstance(value, Stack) else value

    def stack(self, given: Any) -> Stack | None:
        value = self._rows.get(self.timeline.storage(given)) if given in self._whole else None
        return value if isinstance(value, Stack) else None

    def wide(self, given: Any) -> Wide | None:
        """Logits of a block, which any tensor that has columns is for whoever reads it as such."""
        if given in self.logits:
            return self.logits[given]
        example = tensor_of(given)
        if example is None or not example.is_floating_point() or example.dim() < 2:
            return None
        if given in self._whole or (constant(example.shape[-1]) or 0) < 2 or not is_plain_tensor(example):
            return None
        copied = _copied_from(given)
        if copied is None:
            return Wide(given)
        inner = self.wide(copied)
        held = spellings.is_step(given, "detach")
        return None if inner is None else replace(inner, held=inner.held or held)

    def take(self, node: Node, wide: Wide) -> None:
        """Note that a step reads logits: that is what they are, and so are those that they are a copy of."""
        if node in self.logits:
            return
        self.logits[node] = wide
        copied = _copied_from(node)
        if copied is not None:
            self.found.steps[node] = frozenset({wide.block})
            self.take(copied, replace(wide, held=False))

    def reference(self, node: Node, *key: Hashable, of: frozenset[Node]) -> Sum:
        """A number that must cancel; one that has a gradient is not one that has none."""
        key = (example_of(node).requires_grad, *key)
        found = self._references.setdefault(key, Reference(len(self._references), of))
        if key[0]:
            self._attached.add(found)
        return blocks.name(found)

    def read(self, node: Node) -> None:
        if node.op in ("call_function", "call_method"):
            value = self._value_of(node)
            if value is not None and self._put(node, value):
                return
            if node in self.firsts:
                return
        self._use(node)

    def _put(self, node: Node, value: Row | Stack | Wide) -> bool:
        if tensor_of(node) is None and not any(written_by(node)):
            return False
        if isinstance(value, Wide):
            self.logits[node] = value
            self.found.steps[node] = frozenset({value.block})
            return not any(written_by(node))
        storages = {self.timeline.storage(written) for written in written_by(node)}
        if storages & self._outside or not storages <= self._rows.keys() or self._loses_gradient(node, value):
            return False
        if tensor_of(node) is not None:
            storages.add(self.timeline.storage(node))
            self._whole.add(node)
        for storage in storages:
            self._rows[storage] = value
            self._blocks_of[storage] = self._blocks_of.get(storage, frozenset()) | value.blocks
        self.found.steps[node] = value.blocks
        return True

    def _loses_gradient(self, node: Node, value: Row | Stack) -> bool:
        """Whether a node is made where no gradient is taken, of what has one."""
        example = tensor_of(node)
        if example is None or example.requires_grad:
            return False
        return any(self._has_gradient(each) for each in value.names)

    def _has_gradient(self, what: Any) -> bool:
        if isinstance(what, Reference):
            return what in self._attached
        return any(example_of(block).requires_grad for block in what.blocks)

    # Uses

    def _use(self, node: Node) -> None:
        step = spellings.step_of(node)
        if step is not None and step.reads_shapes:
            return
        written = {self.timeline.storage(n) for n in written_by(node)}
        for source in node.all_input_nodes:
            storage = self.timeline.storage(source)
            of = self._blocks_of.get(storage, frozenset())
            if source in self.firsts and node.users:
                self.found.uses.append(Use(node, source, None, self.firsts[source].blocks))
            if not of or source in self.logits:
                continue
            row = self.row(source)
            may = isinstance(row, Sum) and row.is_settled and storage not in written
            self.found.uses.append(Use(node, source, row if may and isinstance(row, Sum) else None, of))
        for storage in written & self._rows.keys():
            self._rows[storage] = None

    def read_exposed(self) -> None:
        """Who else reads what has columns."""
        for node, wide in self.logits.items():
            for user in node.users:
                if user not in self.found.steps and not _asks_no_element(user):
                    self.found.uses.append(Use(user, node, None, frozenset({wide.block})))

    # Steps

    def _value_of(self, node: Node) -> Row | Stack | Wide | None:
        spelled = spellings.read(node)
        if spelled is None:
            return self._copied(node)
        step, args = spelled
        function = STEPS.get(step.name)
        return None if function is None else function(self, node, step, args)

    def _copied(self, node: Node) -> Row | None:
        """x.copy_(y)"""
        if node.target != "copy_" or node.kwargs or len(node.args) != 2:
            return None
        target, source = node.args
        if self.row(target) is None or not same_shape(shape_of(target), shape_of(source)):  # type: ignore[arg-type]
            return None
        return self.row(source)

    def alike(self, node: Node, *given: Any) -> bool:
        """Whether each row of a result is made of that row of what is given, or of a number for all."""
        for each in given:
            row = self.row(each)
            if not isinstance(each, Node) or (isinstance(row, Sum) and not row.terms):
                continue
            if tensor_of(each) is None or not same_shape(shape_of(each), _shape_written(node)):
                return False
        return True


def _copied_from(node: Any) -> Node | None:
    """What a node is, to the bit: without its gradient, or cast to a type that loses nothing."""
    spelled = spellings.read(node) if isinstance(node, Node) else None
    if spelled is None or not (spelled[0].name == "detach" or spelled[0].view is View.SAME):
        return None
    source = spelled[1].get("input")
    return source if spelled[0].name == "detach" or viewed(node) is source else None


def _shape_written(node: Node) -> Any:
    return shape_of(node if tensor_of(node) is not None else node.all_input_nodes[0])


def _asks_no_element(node: Node) -> bool:
    step = spellings.step_of(node)
    if step is not None and step.reads_shapes:
        return True
    return step is not None and step.name in ("getitem", "select") and all(map(_asks_no_element, node.users))


Args = dict[str, Any]
Step = Callable[[_Reader, Node, Spelling, Args], Row | Stack | Wide | None]


def _on_last(node: Any, args: Args) -> bool:
    dim = args.get("dim")
    dim = dim[0] if isinstance(dim, (tuple, list)) and len(dim) == 1 else dim
    rank = len(shape_of(node))
    return isinstance(dim, int) and dim % rank == rank - 1


def _reduced(reader: _Reader, node: Node, args: Args) -> Wide | None:
    """What has columns, if these are reduced."""
    source = args.get("input")
    if tensor_of(source) is None or reader.row(source) is not None or reader.stack(source) is not None:
        return None
    wide = reader.wide(source) if len(shape_of(source)) > 1 and _on_last(source, args) else None  # type: ignore[arg-type]
    return None if args.get("dtype") is not None else wide


def _stacked(reader: _Reader, args: Args) -> Stack | None:
    """Numbers of each row, if these are reduced."""
    source, dim = args.get("input"), args.get("dim")
    stack = reader.stack(source)
    if stack is None or args.get("dtype") is not None:
        return None
    dim = dim[0] if isinstance(dim, (tuple, list)) and len(dim) == 1 else dim
    return stack if isinstance(dim, int) and dim % len(shape_of(source)) == stack.dim else None  # type: ignore[arg-type]


def _peak(reader: _Reader, node: Node, step: Spelling, args: Args) -> Row | None:
    """amax(dim), max(dim) and max(a, b)"""
    if step.name == "maximum" or isinstance(args.get("dim"), Node):
        return _greater(reader, node, args.get("input"), args.get("dim", args.get("other")))
    wide, stack = _reduced(reader, node, args), _stacked(reader, args)
    if wide is not None and not wide.exp:
        reader.take(args["input"], wide)
        of: frozenset[Node] = frozenset({wide.block})
        peak = _largest(reader, node, ("columns", wide), of)
    elif stack is not None:
        peak = _largest(reader, node, ("stack", stack.rows), stack.blocks)
    else:
        return None
    if tensor_of(node) is not None:
        return peak
    reader.firsts[node] = peak
    reader.found.steps[node] = peak.blocks
    return None


def _largest(reader: _Reader, node: Node, key: Hashable, of: frozenset[Node]) -> Sum:
    values = [node] if tensor_of(node) is not None else [u for u in node.users if u.args[1:] == (0,)]
    return reader.reference(values[0], key, of=of) if values else blocks.ZERO


def _greater(reader: _Reader, node: Node, a: Any, b: Any) -> Row | None:
    one, other = reader.row(a), reader.row(b)
    if one is None or other is None or not reader.alike(node, a, b):
        return None
    of = one.blocks | other.blocks
    return reader.reference(node, "rows", one, other, of=of) if of else None


def _exp(reader: _Reader, node: Node, step: Spelling, args: Args) -> Row | Wide | None:
    source = args.get("input")
    row = reader.row(source)
    if row is not None:
        return blocks.exponential(row)
    wide = reader.logits.get(source) if isinstance(source, Node) else None
    if wide is None or wide.exp or wide.held:
        return None
    return Wide(wide.block, wide.shift, True)


def _log(reader: _Reader, node: Node, step: Spelling, args: Args) -> Row | None:
    row = reader.row(args.get("input"))
    return None if row is None else blocks.logarithm(row)


def _sum(reader: _Reader, node: Node, step: Spelling, args: Args) -> Row | None:
    stack = _stacked(reader, args)
    if stack is not None:
        return _all_of(stack.rows, blocks.add)
    wide = _reduced(reader, node, args)
    return None if wide is None or not wide.exp else Mass(((wide.block, wide.shift),))


def _all_of(rows: tuple[Row, ...], function: Callable[[Any, Any], Row | None]) -> Row | None:
    total: Row | None = rows[0]
    for row in rows[1:]:
        total = None if total is None else function(total, row)
    return total


def _logsumexp(reader: _Reader, node: Node, step: Spelling, args: Args) -> Row | None:
    stack = _stacked(reader, args)
    if stack is not None:
        return _all_of(stack.rows, _added)
    wide = _reduced(reader, node, args)
    if wide is None or wide.exp or wide.held:
        return None
    reader.take(args["input"], wide)
    return wide.shift.plus(blocks.name(blocks.Lse(frozenset({wide.block}))))


def _added(a: Row, b: Row) -> Sum | None:
    """log(exp(a) + exp(b))"""
    one, other = blocks.exponential(a), blocks.exponential(b)
    total = None if one is None or other is None else blocks.add(one, other)
    return None if total is None else blocks.logarithm(total)


def _logaddexp(reader: _Reader, node: Node, step: Spelling, args: Args) -> Row | None:
    a, b = args.get("input"), args.get("other")
    one, other = reader.row(a), reader.row(b)
    if one is None or other is None or not reader.alike(node, a, b):
        return None
    return _added(one, other)


def _plus(sign: int, reverse: bool = False) -> Step:
    def step(reader: _Reader, node: Node, step: Spelling, args: Args) -> Row | Wide | None:
        a, b = args.get("input"), args.get("other")
        a, b = (b, a) if reverse else (a, b)
        one, other = reader.row(a), reader.row(b)
        if args.get("alpha", 1) != 1:
            return None
        if one is not None and other is not None:
            if not reader.alike(node, a, b) or (sign < 0 and _is_settled(one) and _is_settled(other)):
                return None
            return blocks.add(one, other, sign)
        return _moved(reader, node, a, b, sign)

    return step


def _is_settled(row: Row) -> bool:
    return isinstance(row, Sum) and row.is_settled


def _moved(reader: _Reader, node: Node, a: Any, b: Any, sign: int) -> Wide | None:
    """Logits less a number of their rows."""
    row = reader.row(b)
    wide = reader.wide(a) if isinstance(a, Node) else None
    if not isinstance(row, Sum) or not row.blocks or wide is None or wide.exp:
        return None
    if not same_shape(shape_of(b), (*shape_of(a)[:-1], 1)) or not same_shape(shape_of(node), shape_of(a)):
        return None
    reader.take(a, wide)
    return Wide(wide.block, wide.shift.plus(row, sign), held=wide.held)


def _times(reader: _Reader, node: Node, step: Spelling, args: Args) -> Row | None:
    a, b = args.get("input"), args.get("other")
    for given, mask in ((a, b), (b, a)):
        row = reader.row(given)
        if row is not None and isinstance(row, Sum) and row.only(Gather) and isinstance(mask, Node):
            return _masked(reader, node, given, mask, blocks.ZERO)
    one, other = reader.row(a), reader.row(b)
    if one is None or other is None or not reader.alike(node, a, b):
        return None
    return blocks.multiply(one, other)


def _neg(reader: _Reader, node: Node, step: Spelling, args: Args) -> Row | None:
    row = reader.row(args.get("input"))
    return row.scaled(-1) if isinstance(row, Sum) else None


def _masked(reader: _Reader, node: Node, given: Any, mask: Any, otherwise: Sum) -> Row | None:
    """What is gathered where a condition holds."""
    condition, row = reader.labels.condition(mask), reader.row(given)
    if condition is None or not isinstance(row, Sum) or condition.negated:
        return None
    if not same_shape(shape_of(mask), _shape_written(node)):
        return None
    for y, span in reversed(condition.spans.items()):
        picked = blocks.chosen(y, span, row, otherwise)
        if picked is not None:
            return picked
    return None


def _where(reader: _Reader, node: Node, step: Spelling, args: Args) -> Row | None:
    mask, a, b = args.get("condition"), args.get("input"), args.get("other")
    condition = reader.labels.condition(mask)
    if condition is None or not reader.alike(node, a, b):
        return None
    if condition.negated:
        return _inverted(reader, node, b, mask, a)
    otherwise = reader.row(b)
    return _masked(reader, node, a, mask, otherwise) if isinstance(otherwise, Sum) else None


def _inverted(reader: _Reader, node: Node, given: Any, mask: Any, otherwise: Any) -> Row | None:
    """What is gathered where a condition does not hold."""
    condition, row, rest = reader.labels.condition(mask), reader.row(given), reader.row(otherwise)
    if condition is None or not isinstance(row, Sum) or not isinstance(rest, Sum):
        return None
    contrary = condition.inverted()
    if contrary.negated or not same_shape(shape_of(mask), _shape_written(node)):
        return None
    found = [blocks.chosen(y, span, row, rest) for y, span in reversed(contrary.spans.items())]
    return next((each for each in found if each is not None), None)


def _filled(reader: _Reader, node: Node, step: Spelling, args: Args) -> Row | None:
    """x.masked_fill(outside, 0), and x[outside] = 0"""
    mask = args.get("mask", args.get("index"))
    return _inverted(reader, node, args.get("input"), mask, args.get("value"))


def _gather(reader: _Reader, node: Node, step: Spelling, args: Args) -> Row | None:
    source, index = args.get("input"), args.get("index")
    if tensor_of(source) is None or tensor_of(index) is None or not _on_last(source, args):
        return None
    wide = reader.wide(source)
    readings = reader.labels.readings(index)
    if wide is None or wide.exp or wide.held or not readings:
        return None
    if not same_shape(shape_of(index), (*shape_of(source)[:-1], 1)):  # type: ignore[arg-type]
        return None
    reader.take(source, wide)  # type: ignore[arg-type]
    return wide.shift.plus(blocks.name(Gather(wide.block, tuple(readings.items()))))


def _view(reader: _Reader, node: Node, step: Spelling, args: Args) -> Row | Wide | None:
    source = args.get("input")
    if isinstance(source, Node) and source in reader.firsts and step.name == "getitem":
        return reader.firsts[source] if args.get("index") == 0 else None
    row = reader.row(source)
    if row is None or not isinstance(source, Node) or tensor_of(node) is None:
        return None
    if not example_of(node).is_floating_point() or not keeps_order(node, source):
        return None
    return row if _rows_of(node) == _rows_of(source) or not row.blocks else None


def _rows_of(node: Node) -> tuple[Any, ...]:
    """The rows that numbers are of, whether or not a dimension of 1 stands for their columns."""
    sizes = shape_of(node)
    return sizes[:-1] if sizes[-1:] == (1,) else sizes


def _detached(reader: _Reader, node: Node, step: Spelling, args: Args) -> Row | Wide | None:
    source = args.get("input")
    row = reader.row(source)
    if not isinstance(row, Sum) or not isinstance(source, Node):
        return None
    if not row.terms or not example_of(source).requires_grad:
        return row
    if any(not isinstance(each, Reference) for each, _ in row.terms):
        return None
    return reader.reference(node, "held", row, of=row.blocks)


def _constant(number: float | None) -> Step:
    def step(reader: _Reader, node: Node, step: Spelling, args: Args) -> Row | None:
        value = args.get("value") if number is None else number
        example = tensor_of(node)
        if example is None or not example.is_floating_point() or isinstance(value, bool):
            return None
        return Sum(number=value) if isinstance(value, (int, float)) else None

    return step


def _stack(reader: _Reader, node: Node, step: Spelling, args: Args) -> Stack | None:
    """torch.stack of rows, and torch.cat of those that have a column."""
    tensors, dim = args.get("tensors"), args.get("dim", 0)
    if not isinstance(tensors, (list, tuple)) or not isinstance(dim, int) or tensor_of(node) is None:
        return None
    rows = [reader.row(each) for each in tensors]
    if len(rows) < 2 or None in rows or any(not isinstance(each, Node) for each in tensors):
        return None
    rank = len(shape_of(node))
    if any(not same_shape(shape_of(each), shape_of(tensors[0])) for each in tensors):
        return None
    if step.name == "cat" and (dim % rank != rank - 1 or shape_of(tensors[0])[-1] != 1):
        return None
    return Stack(tuple(row for row in rows if row is not None), dim % rank)


STEPS: dict[str, Step] = {
    "amax": _peak,
    "max": _peak,
    "maximum": _peak,
    "exp": _exp,
    "log": _log,
    "sum": _sum,
    "logsumexp": _logsumexp,
    "logaddexp": _logaddexp,
    "add": _plus(1),
    "sub": _plus(-1),
    "rsub": _plus(-1, reverse=True),
    "mul": _times,
    "neg": _neg,
    "where": _where,
    "masked_fill": _filled,
    "gather": _gather,
    "getitem": _view,
    "same": _view,
    "reshape": _view,
    "detach": _detached,
    "zeros": _constant(0.0),
    "full": _constant(None),
    "stack": _stack,
    "cat": _stack,
    "edit_add": _plus(1),
    "edit_sub": _plus(-1),
    "edit_mul": _times,
    "edit_masked_fill": _filled,
    "edit_setitem": _filled,
}
