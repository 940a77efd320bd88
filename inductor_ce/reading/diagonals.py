"""What is picked on a diagonal: of logits, of a pair of ranges, of columns that an index has picked."""

from __future__ import annotations

from typing import Any

from torch.fx import Node

from ..graph.shapes import Size, constant, equal, same_shape, shape_of, tensor_of
from . import spellings
from .chosen import is_mask
from .context import Context, is_labels
from .row_views import arrangement, row_shape
from .values import VocabValue


def is_main(args: dict[str, Any]) -> bool:
    """Whether a diagonal is the main one of a matrix."""
    return not args.get("offset") and args.get("dim1", 0) in (0, -2) and args.get("dim2", 1) in (1, -1)


def is_of_all_rows(shape: tuple[Size, ...], value: VocabValue) -> bool:
    """Whether a diagonal of values of this shape has an element of each row."""
    if len(shape) != 2 or len(shape_of(value.logits.node)) != 2 or arrangement(value.steps):
        return False
    rows, columns = constant(shape[1 - value.axis]), constant(shape[value.axis])
    return equal(*shape) or (rows is not None and columns is not None and rows <= columns)


def is_range_twice(index: Any, shape: tuple[Size, ...]) -> bool:
    """Whether x[index] is x[range(N), range(N)] of all N rows."""
    rows = constant(shape[0]) if len(shape) == 2 else None
    return isinstance(index, tuple) and rows is not None and index == (range(rows),) * 2


def of_picks(context: Context, source: Any) -> tuple[VocabValue, Node] | None:
    """(x, y) of x[:, y], or x[y] with the classes in front, whose diagonal is what y picks of x.

    So x may be logits, which are read as such for the first time.
    """
    spelled = spellings.read(source) if isinstance(source, Node) and context.is_as_made(source) else None
    if spelled is None or spelled[0].name not in ("getitem", "index_select"):
        return None
    step, args = spelled
    y = args.get("index")
    if tensor_of(args.get("input")) is None or len(shape_of(args["input"])) != 2:
        return None
    if step.name == "index_select":
        axis = args["dim"] % 2
    elif isinstance(y, tuple) and len(y) == 2 and y[0] == slice(None):
        axis, y = 1, y[1]
    else:
        axis = 0
    if not is_labels(y) or is_mask(y):
        return None
    value = Context(context.reading, source).vocab(args["input"], axis)
    if value is None:
        return None
    rows_alike = same_shape(shape_of(y), row_shape(args["input"], axis))
    unchanged = context.reading.timeline.unchanged(y, source, context.position)
    return (value, y) if rows_alike and unchanged else None
