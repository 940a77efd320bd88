"""The steps of losses whose ranks know themselves that each has a part of the classes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import sympy
import torch
from torch.fx import Node

from .. import algebra
from ..algebra import parts
from ..graph.shapes import decided_equal, decided_same_count, shape_of, tensor_of
from ..graph.timeline import Timeline
from . import spellings
from .part_reader import PartReader, Step
from .part_values import NotRead, Parts, Summed, Value
from .views import counted, keeps_order

_SAME = ("same", "reshape", "detach")
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def _unary(function: Callable[[Any], Any], on_row: Callable[[Any], Any]) -> Step:
    def step(reader: PartReader, node: Node, args: dict[str, Any]) -> Value | None:
        value = reader.value(args.get("input"))
        if value is None:
            return None
        expr = function(value.expr) if value.is_wide else on_row(value.expr)
        return None if expr is None else Value(expr, value.attached)

    return step


def _binary(function: Callable[[Any, Any], Any], reverse: bool = False) -> Step:
    return lambda reader, node, args: reader.joined(node, args, function, reverse)


def _plus(a: Any, b: Any) -> Any:
    wide = isinstance(a, algebra.Vocab) or isinstance(b, algebra.Vocab)
    return algebra.as_vocab(a) + b if wide else algebra.expand(a + b)


def _minus(a: Any, b: Any) -> Any:
    return _plus(a, -b)


def _times(a: Any, b: Any) -> Any:
    wide = isinstance(a, algebra.Vocab) or isinstance(b, algebra.Vocab)
    product = algebra.as_vocab(a) * b if wide else algebra.expand(a * b)
    return None if wide and product.degree > algebra.MAX_DEGREE else product


def _over(a: Any, b: Any) -> Any:
    return None if isinstance(b, algebra.Vocab) or b == 0 else _times(a, 1 / b)


def _on_last(reader: PartReader, args: dict[str, Any]) -> Value | None:
    """What is wide, if its last dimension is reduced."""
    source, dim = args.get("input"), spellings.one_dim(args.get("dim"))
    value = reader.value(source)
    if value is None or not value.is_wide or not isinstance(source, Node) or not isinstance(dim, int):
        return None
    if args.get("dtype") is not None:
        return None
    return value if dim % len(shape_of(source)) == len(shape_of(source)) - 1 else None


def _summed(reader: PartReader, node: Node, args: dict[str, Any]) -> Value | None:
    value = _on_last(reader, args)
    total = None if value is None else parts.total_here(value.expr)
    return None if total is None or value is None else Value(total, value.attached)


def _logsumexp(reader: PartReader, node: Node, args: dict[str, Any]) -> Value | None:
    value = _on_last(reader, args)
    exp = None if value is None else algebra.exp(value.expr)
    total = None if exp is None else parts.total_here(exp)
    log = None if total is None else algebra.row_log(total)
    return None if log is None or value is None else Value(log, value.attached)


def _mean(reader: PartReader, node: Node, args: dict[str, Any]) -> Value | None:
    value = _summed(reader, node, args)
    return None if value is None else Value(sympy.expand(value.expr / parts.V_HERE), value.attached)


def _peak(reader: PartReader, node: Node, args: dict[str, Any]) -> Value | None:
    value = _on_last(reader, args)
    if value is None or value.expr != algebra.LOGITS:
        return None
    if value.attached and reader.timeline.grad_mode(node) is True:
        raise NotRead(node, "A gradient flows through the maximum by {step}")
    return Value(parts.MAX_HERE)


def _maximum(reader: PartReader, node: Node, args: dict[str, Any]) -> Value | None:
    """max(dim), of which the values are asked for."""
    value = _peak(reader, node, args)
    if value is not None and tensor_of(node) is None:
        reader.firsts[node] = value
    return None


def _view(reader: PartReader, node: Node, args: dict[str, Any]) -> Value | None:
    source = args.get("input")
    value = reader.value(source)
    if value is None or not isinstance(source, Node) or tensor_of(node) is None:
        return None
    before, after = tensor_of(source).dtype, tensor_of(node).dtype  # type: ignore[union-attr]
    if after not in FLOATS or (value.is_wide and not _keeps(before, after, value)):
        return None
    sizes = shape_of(node)
    if value.is_wide and not (sizes and decided_equal(sizes[-1:], reader.sizes[-1:])):
        return None
    return value if decided_same_count(sizes, shape_of(source)) else None


def _keeps(before: torch.dtype, after: torch.dtype, value: Value) -> bool:
    """Whether a cast loses nothing, or is of what is no logit any more: a gradient, at its end."""
    return after.itemsize >= before.itemsize or value.expr != algebra.LOGITS


def _detached(reader: PartReader, node: Node, args: dict[str, Any]) -> Value | None:
    value = reader.value(args.get("input"))
    return None if value is None else Value(value.expr, None if value.attached is None else False)


def _picked(reader: PartReader, node: Node, source: Any, index: Any) -> Value | None:
    value = reader.value(source)
    if value is None or not value.is_wide:
        return None
    expr = parts.at_here(value.expr, reader.label(index, node))
    return None if expr is None else Value(expr, value.attached)


def _gather(reader: PartReader, node: Node, args: dict[str, Any]) -> Value | None:
    source, index, dim = args.get("input"), args.get("index"), args.get("dim")
    if not reader.is_wide(source) or not isinstance(index, Node):
        return None
    sizes = shape_of(source)  # type: ignore[arg-type]
    on_last = isinstance(dim, int) and dim % len(sizes) == len(sizes) - 1
    picks_one = on_last and decided_equal(shape_of(index), (*sizes[:-1], 1)) and reader.of_rows.has(index)
    return _picked(reader, node, source, index) if picks_one else None


def _getitem(reader: PartReader, node: Node, args: dict[str, Any]) -> Value | None:
    source, index = args.get("input"), args.get("index")
    if source in reader.firsts:
        if index != 0:
            return None if node.users else Value(sympy.Integer(0))
        return reader.firsts[source]
    if _label_of(reader, source, index) is not None:
        return _picked(reader, node, source, index[1])  # type: ignore[index]
    if _is_all(reader, source, index):
        return reader.value(source)
    return _view(reader, node, args) if _takes_all(reader, node, source, index) else None


def _takes_all(reader: PartReader, node: Node, source: Any, index: Any) -> bool:
    """Whether x[index] has all of x: of what is wide by the index alone, for ranks have other columns."""
    if not isinstance(source, Node) or tensor_of(source) is None or not keeps_order(node, source):
        return False
    pieces = index if isinstance(index, tuple) else (index,)
    return not reader.is_wide(source) or all(piece in (None, ..., slice(None)) for piece in pieces)


def _label_of(reader: PartReader, source: Any, index: Any) -> Node | None:
    """The labels of x[arange(N), y]."""
    if not reader.is_wide(source) or not isinstance(index, (tuple, list)) or len(index) != 2:
        return None
    rows, y = index
    sizes, count = shape_of(source), counted(rows)
    example = tensor_of(y)
    if len(sizes) != 2 or count is None or count[0] != -1 or example is None or example.dim() != 1:
        return None
    integers = not example.is_floating_point() and example.dtype != torch.bool
    return y if integers and decided_equal((count[1], *example.shape), (sizes[0], sizes[0])) else None


def _is_all(reader: PartReader, source: Any, index: Any) -> bool:
    """Whether x[arange(N), :] is all of what is wide."""
    if not reader.is_wide(source) or not isinstance(index, (tuple, list)) or len(index) != 2:
        return False
    sizes, count = shape_of(source), counted(index[0])
    rows = count is not None and count[0] == -1 and decided_equal([count[1]], sizes[:1])
    return len(sizes) == 2 and index[1] == slice(None) and rows


def _scattered(reader: PartReader, node: Node, args: dict[str, Any]) -> Value | None:
    """x.scatter_add(-1, y, row), and in place."""
    source, dim, index, given = (args.get(name) for name in ("input", "dim", "index", "src"))
    value, row = reader.value(source), reader.row(given)
    if value is None or not value.is_wide or row is None or not isinstance(index, Node):
        return None
    sizes = shape_of(source)  # type: ignore[arg-type]
    one = (*sizes[:-1], 1)
    alike = decided_equal(shape_of(index), one) and decided_equal(shape_of(given), one)  # type: ignore[arg-type]
    if not reader.of_rows.has(index):
        return None
    if not isinstance(dim, int) or dim % len(sizes) != len(sizes) - 1 or not alike:
        return None
    gain = algebra.indicator(reader.label(index, node)) * row
    return Value(value.expr + gain, reader.attachment(node, [source, given]))


def _setitem(reader: PartReader, node: Node, args: dict[str, Any]) -> Value | None:
    """x[mask] = 0 of rows, and x[arange(N), y] = row of what is wide."""
    source, index, given = args.get("input"), args.get("index"), args.get("value")
    value = reader.value(source)
    if value is None:
        return None
    if _is_all(reader, source, index):
        return reader.value(given)
    y = _label_of(reader, source, index)
    if y is not None:
        label, row = reader.label(y, node), reader.row(given)
        now = parts.at_here(value.expr, label)
        if row is None or now is None:
            return None
        gain = algebra.indicator(label) * sympy.expand(row - now)
        return Value(value.expr + gain, reader.attachment(node, [source, given]))
    return _filled(reader, node, {"input": source, "mask": index, "value": given})


def _filled(reader: PartReader, node: Node, args: dict[str, Any]) -> Value | None:
    """masked_fill(x, mask, 0) of rows that are not whole yet."""
    source, mask, number = args.get("input"), args.get("mask"), args.get("value")
    value, example = reader.value(source), tensor_of(mask)
    if value is None or value.is_wide or number != 0 or example is None or example.dtype != torch.bool:
        return None
    condition = reader.row(mask)
    if condition is None or not parts.is_here(value.expr):
        return None
    if not decided_equal(shape_of(mask), shape_of(source)):  # type: ignore[arg-type]
        return None
    return Value(sympy.expand(value.expr * (1 - condition)), value.attached)


def _where(reader: PartReader, node: Node, args: dict[str, Any]) -> Value | None:
    mask, a, b = args.get("condition"), args.get("input"), args.get("other")
    example = tensor_of(mask)
    for source, number, when in ((a, b, True), (b, a, False)):
        value = reader.value(source)
        zero = reader.row(number)
        if value is None or value.is_wide or zero != 0 or example is None or example.dtype != torch.bool:
            continue
        condition = reader.row(mask)
        if condition is None or not isinstance(mask, Node) or not parts.is_here(value.expr):
            return None
        if not decided_equal(shape_of(mask), shape_of(node)):
            return None
        return Value(sympy.expand(value.expr * (condition if when else 1 - condition)), value.attached)
    return None


def _zeros(reader: PartReader, node: Node, args: dict[str, Any]) -> Value | None:
    """Zeros like what rows have, not of a shape that is asked for, which may be that of the columns."""
    value = reader.value(args.get("input"))
    alike = node.target is torch.zeros_like and value is not None and not value.is_wide
    return Value(sympy.Integer(0)) if alike else None


STEPS: dict[str, Step] = {
    "amax": _peak,
    "max": _maximum,
    "exp": _unary(algebra.exp, lambda row: sympy.exp(row)),
    "log": _unary(algebra.log, algebra.row_log),
    "neg": _unary(lambda wide: -wide, lambda row: -row),
    "add": _binary(_plus),
    "sub": _binary(_minus),
    "rsub": _binary(_minus, reverse=True),
    "mul": _binary(_times),
    "div": _binary(_over),
    "sum": _summed,
    "logsumexp": _logsumexp,
    "mean": _mean,
    "gather": _gather,
    "scatter_add": _scattered,
    "getitem": _getitem,
    "same": _view,
    "reshape": _view,
    "detach": _detached,
    "zeros": _zeros,
    "masked_fill": _filled,
    "where": _where,
    "edit_masked_fill": _filled,
    "edit_setitem": _setitem,
    "edit_add": _binary(_plus),
    "edit_sub": _binary(_minus),
    "edit_mul": _binary(_times),
    "edit_div": _binary(_over),
}


def read_parts(
    timeline: Timeline,
    base: Node,
    sums: Mapping[Node, Summed],
    asked: Sequence[Node] = (),
    *,
    own_backward: bool = False,
    since: int | None = None,
) -> Parts | None:
    """Read a graph as a loss over the columns `base` of this rank.

    Args:
        timeline: of the graph.
        base: the logits, of which the last dimension are classes.
        sums: nodes that sum something over the ranks of a group, each with that.
        asked: nodes whose values at the end are wanted.
        own_backward: whether the graph holds a backward beside its forward, so that nothing has a gradient.
        since: the position from which the logits are what is read, by default behind `base`. Of what stands
            before it views of them are read, which see what was written.
    """
    reader = PartReader(timeline, base, sums, own_backward, STEPS)
    first = timeline.position[base] + 1
    reader.found.since = since = first if since is None else since
    try:
        for node in timeline.nodes[first:since]:
            if timeline.shares_storage(node, base) and any(map(partial(spellings.is_step, node), _SAME)):
                reader.read(node)
        for node in timeline.nodes[since:]:
            reader.read(node)
    except NotRead as why:
        reader.found.not_read = why
    reader.found.asked = [reader.value(node) for node in asked]
    return reader.found if reader.found.group is not None else None
