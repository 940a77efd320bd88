"""The steps of losses whose classes come in blocks, with statistics carried from one to the next.

m_new = torch.maximum(m, z.amax(-1))
s = s * torch.exp(m - m_new) + torch.exp(z - m_new[:, None]).sum(-1)
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any

from torch.fx import Graph, Node

from ..algebra import blocks
from ..algebra.blocks import Gather, Mass, Reference, Row, Sum
from ..graph.shapes import example_of, same_shape, shape_of, tensor_of
from ..graph.timeline import Timeline
from . import spellings
from .block_reader import Args, BlockReader, Blocks, Stack, Step, Wide, shape_written
from .label_ranges import Condition
from .steps import Step as Spelling
from .views import keeps_order


def may_have_blocks(graph: Graph) -> bool:
    """Whether anything in a graph brings numbers of rows together, as all of these losses do."""
    return any(_brings_together(node) for node in graph.nodes)


def _brings_together(node: Node) -> bool:
    step = spellings.step_of(node)
    if step is None or step.name not in ("maximum", "logaddexp", "logsumexp", "amax", "max"):
        return False
    if step.name in ("maximum", "logaddexp") or len(node.all_input_nodes) > 1:
        return True
    return any(spellings.is_step(source, how) for source in node.all_input_nodes for how in ("stack", "cat"))


def read_blocks(timeline: Timeline) -> Blocks:
    """What a graph, gone through once, makes of blocks of logits."""
    reader = BlockReader(timeline, STEPS)
    for node in timeline.nodes:
        reader.read(node)
    reader.read_exposed()
    return reader.found


def _on_last(node: Any, args: Args) -> bool:
    dim, rank = spellings.one_dim(args.get("dim")), len(shape_of(node))
    return isinstance(dim, int) and dim % rank == rank - 1


def _reduced(reader: BlockReader, node: Node, args: Args) -> Wide | None:
    """What has columns, if these are reduced."""
    source = args.get("input")
    if tensor_of(source) is None or reader.row(source) is not None or reader.stack(source) is not None:
        return None
    wide = reader.wide(source) if len(shape_of(source)) > 1 and _on_last(source, args) else None  # type: ignore[arg-type]
    return None if args.get("dtype") is not None else wide


def _stacked(reader: BlockReader, args: Args) -> Stack | None:
    """Numbers of each row, if these are reduced."""
    source, dim = args.get("input"), spellings.one_dim(args.get("dim"))
    stack = reader.stack(source)
    if stack is None or args.get("dtype") is not None:
        return None
    return stack if isinstance(dim, int) and dim % len(shape_of(source)) == stack.dim else None  # type: ignore[arg-type]


def _peak(reader: BlockReader, node: Node, step: Spelling, args: Args) -> Row | None:
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


def _largest(reader: BlockReader, node: Node, key: Hashable, of: frozenset[Node]) -> Sum:
    values = [node] if tensor_of(node) is not None else [u for u in node.users if u.args[1:] == (0,)]
    return reader.reference(values[0], key, of=of) if values else blocks.ZERO


def _greater(reader: BlockReader, node: Node, a: Any, b: Any) -> Row | None:
    pair = reader.pair(node, a, b)
    if pair is None:
        return None
    of = pair[0].blocks | pair[1].blocks
    return reader.reference(node, "rows", *pair, of=of) if of else None


def _exp(reader: BlockReader, node: Node, step: Spelling, args: Args) -> Row | Wide | None:
    source = args.get("input")
    row = reader.row(source)
    if row is not None:
        return blocks.exponential(row)
    wide = reader.logits.get(source) if isinstance(source, Node) else None
    if wide is None or wide.exp or wide.held:
        return None
    return Wide(wide.block, wide.shift, True)


def _log(reader: BlockReader, node: Node, step: Spelling, args: Args) -> Row | None:
    row = reader.row(args.get("input"))
    return None if row is None else blocks.logarithm(row)


def _sum(reader: BlockReader, node: Node, step: Spelling, args: Args) -> Row | None:
    stack = _stacked(reader, args)
    if stack is not None:
        return _all_of(stack.rows, blocks.add)
    wide = _reduced(reader, node, args)
    if wide is None or wide.held:
        return None
    if wide.exp:
        return Mass(((wide.block, wide.shift),))
    if wide.shift != blocks.ZERO:
        return None
    reader.take(args["input"], wide)
    return blocks.name(blocks.Total(wide.block))


def _all_of(rows: tuple[Row, ...], function: Callable[[Any, Any], Row | None]) -> Row | None:
    total: Row | None = rows[0]
    for row in rows[1:]:
        total = None if total is None else function(total, row)
    return total


def _logsumexp(reader: BlockReader, node: Node, step: Spelling, args: Args) -> Row | None:
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


def _logaddexp(reader: BlockReader, node: Node, step: Spelling, args: Args) -> Row | None:
    pair = reader.pair(node, args.get("input"), args.get("other"))
    return None if pair is None else _added(*pair)


def _plus(sign: int, reverse: bool = False) -> Step:
    def step(reader: BlockReader, node: Node, step: Spelling, args: Args) -> Row | Wide | None:
        a, b = args.get("input"), args.get("other")
        a, b = (b, a) if reverse else (a, b)
        one, other = reader.row(a), reader.row(b)
        if args.get("alpha", 1) != 1:
            return None
        if one is not None and other is not None:
            if not reader.alike(node, a, b) or _is_gathered(one) or _is_gathered(other):
                return None
            if sign < 0 and _is_settled(one) and _is_settled(other):
                return None
            return blocks.add(one, other, sign)
        return _moved(reader, node, a, b, sign)

    return step


def _is_settled(row: Row) -> bool:
    return isinstance(row, Sum) and row.is_settled


def _is_gathered(row: Row) -> bool:
    """Whether a row is a logit at an index of which nobody has asked in which block it is."""
    return isinstance(row, Sum) and any(isinstance(name, Gather) for name in row.names)


def _moved(reader: BlockReader, node: Node, a: Any, b: Any, sign: int) -> Wide | None:
    """Logits less a number of their rows."""
    row = reader.row(b)
    wide = reader.wide(a) if isinstance(a, Node) else None
    if not isinstance(row, Sum) or not row.blocks or wide is None or wide.exp:
        return None
    if not same_shape(shape_of(b), (*shape_of(a)[:-1], 1)) or not same_shape(shape_of(node), shape_of(a)):
        return None
    reader.take(a, wide)
    return Wide(wide.block, wide.shift.plus(row, sign), held=wide.held)


def _times(reader: BlockReader, node: Node, step: Spelling, args: Args) -> Row | None:
    a, b = args.get("input"), args.get("other")
    for given, mask in ((a, b), (b, a)):
        row = reader.row(given)
        if row is not None and isinstance(row, Sum) and row.only(Gather) and isinstance(mask, Node):
            return _masked(reader, node, given, mask, blocks.ZERO)
    pair = reader.pair(node, a, b)
    return None if pair is None else blocks.multiply(*pair)


def _neg(reader: BlockReader, node: Node, step: Spelling, args: Args) -> Row | None:
    row = reader.row(args.get("input"))
    return row.scaled(-1) if isinstance(row, Sum) else None


def _masked(reader: BlockReader, node: Node, given: Any, mask: Any, otherwise: Sum) -> Row | None:
    """What is gathered where a condition holds."""
    condition, row = reader.labels.condition(mask), reader.row(given)
    if condition is None or not isinstance(row, Sum) or condition.negated:
        return None
    if not same_shape(shape_of(mask), shape_written(node)):
        return None
    return _chosen(condition, row, otherwise)


def _chosen(condition: Condition, row: Sum, otherwise: Sum) -> Row | None:
    """What is gathered where one of the ranges of a condition has the label, the last that is known."""
    found = (blocks.chosen(y, span, row, otherwise) for y, span in reversed(condition.spans.items()))
    return next((each for each in found if each is not None), None)


def _where(reader: BlockReader, node: Node, step: Spelling, args: Args) -> Row | None:
    mask, a, b = args.get("condition"), args.get("input"), args.get("other")
    condition = reader.labels.condition(mask)
    if condition is None or not reader.alike(node, a, b):
        return None
    if condition.negated:
        return _inverted(reader, node, b, mask, a)
    otherwise = reader.row(b)
    return _masked(reader, node, a, mask, otherwise) if isinstance(otherwise, Sum) else None


def _inverted(reader: BlockReader, node: Node, given: Any, mask: Any, otherwise: Any) -> Row | None:
    """What is gathered where a condition does not hold."""
    condition, row, rest = reader.labels.condition(mask), reader.row(given), reader.row(otherwise)
    if condition is None or not isinstance(row, Sum) or not isinstance(rest, Sum):
        return None
    contrary = condition.inverted()
    if contrary.negated or not same_shape(shape_of(mask), shape_written(node)):
        return None
    return _chosen(contrary, row, rest)


def _filled(reader: BlockReader, node: Node, step: Spelling, args: Args) -> Row | None:
    """x.masked_fill(outside, 0), and x[outside] = 0"""
    mask = args.get("mask", args.get("index"))
    return _inverted(reader, node, args.get("input"), mask, args.get("value"))


def _gather(reader: BlockReader, node: Node, step: Spelling, args: Args) -> Row | None:
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


def _view(reader: BlockReader, node: Node, step: Spelling, args: Args) -> Row | Wide | None:
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


def _detached(reader: BlockReader, node: Node, step: Spelling, args: Args) -> Row | Wide | None:
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
    def step(reader: BlockReader, node: Node, step: Spelling, args: Args) -> Row | None:
        value = args.get("value") if number is None else number
        example = tensor_of(node)
        if example is None or not example.is_floating_point() or isinstance(value, bool):
            return None
        return Sum(number=value) if isinstance(value, (int, float)) else None

    return step


def _stack(reader: BlockReader, node: Node, step: Spelling, args: Args) -> Stack | None:
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
