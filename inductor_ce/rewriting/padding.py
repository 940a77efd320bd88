"""Which columns a slice keeps of logits that are padded to more classes than there are."""

from __future__ import annotations

import operator

from torch.fx import Node

from ..graph.shapes import constant, shape_of, tensor_of
from ..reading.row_views import index_per_dimension, range_of


def classes_of(node: Node) -> int | None:
    """V of a tensor [..., V] with rows, of any dtype; None where it is symbolic."""
    example = tensor_of(node)
    return constant(example.shape[-1]) if example is not None and example.dim() > 1 else None


def columns_kept(node: Node) -> slice | None:
    """The columns that a slice of logits keeps, where it drops some; of the rows it may drop any."""
    source = node.args[0] if node.args else None
    if not isinstance(source, Node) or tensor_of(source) is None or tensor_of(node) is None:
        return None  # a piece of several, as split gives them
    before, after = classes_of(source), classes_of(node)
    items = items_of(node)
    if before is None or after is None or before <= after or not items:
        return None
    bounds = range_of(items[-1], before)
    return slice(*bounds) if bounds is not None and bounds[1] - bounds[0] == after else None


def items_of(node: Node) -> list[slice]:
    """A slice for each dimension of what x[...] or x.narrow(...) cuts; empty for anything else."""
    source = node.args[0]
    assert isinstance(source, Node)
    rank = len(shape_of(source))
    if getattr(node.target, "__name__", node.target) == "narrow" and len(node.args) == 4:
        dim, start, length = node.args[1:]
        if not all(isinstance(x, int) for x in (dim, start, length)):
            return []
        cut = slice(start, start + length if start + length else None)  # type: ignore[operator]
        return [cut if d == dim % rank else slice(None) for d in range(rank)]  # type: ignore[operator]
    if node.target is not operator.getitem:
        return []
    items = index_per_dimension(node.args[1], rank) or []
    return items if all(isinstance(item, slice) for item in items) else []
