"""Tensors that have a number for each row, by how they are made: what every rank finds alike.

Where a rank has one column, [N, 1] is a number for each row, or what a rank with more columns has as [N, V].
The shape does not tell, and ranks that read the same program otherwise would wait for each other's
collectives. So such a shape counts where the tensor is a view of one without that dimension, a reduction
that keeps it, or made of such tensors by operations on each number.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch.fx import Node

from ..graph.shapes import Size, constant, decided_same_count, shape_of, tensor_of
from . import spellings
from .views import keeps_order

_EACH = {
    *("add", "sub", "rsub", "mul", "div", "neg", "exp", "log", "where", "masked_fill", "clamp", "same"),
    *("eq", "ne", "lt", "le", "gt", "ge", "not", "and", "or", "detach", "minimum", "maximum", "elementwise"),
    *("edit_add", "edit_sub", "edit_mul", "edit_div", "edit_masked_fill", "edit_fill", "edit_zero"),
}
_OVER_CLASSES = {"sum", "mean", "amax", "max", "logsumexp", "argmax"}


class RowNumbers:
    """Which tensors have a number for each row of logits with the shape `sizes`.

    Args:
        sizes: of the logits, whose last dimension are the classes.
        is_row: whether a node is known to have one.
    """

    def __init__(self, sizes: Sequence[Size], is_row: Callable[[Node], bool]):
        self._rows, self._is_row = sizes[:-1], is_row
        self._known: dict[Node, bool] = {}

    def has(self, node: object) -> bool:
        """Whether a node has one, in the order of the rows."""
        if not isinstance(node, Node) or tensor_of(node) is None:
            return False
        if node not in self._known:
            sizes = shape_of(node)
            as_many = bool(sizes) and decided_same_count(sizes, self._rows)
            self._known[node] = as_many and (constant(sizes[-1]) != 1 or self._is_made_so(node))
        return self._known[node]

    def _is_made_so(self, node: Node) -> bool:
        if self._is_row(node):
            return True
        spelled = spellings.read(node)
        if spelled is None:
            return False
        step, args = spelled
        source = args.get("input")
        if step.name in _EACH:
            return all(self.has(n) or _is_one(n) for n in node.all_input_nodes)
        if step.name in _OVER_CLASSES:
            dim = spellings.one_dim(args.get("dim"))
            return args.get("keepdim") is True and dim in (-1, len(shape_of(node)) - 1)
        if step.view is not None and isinstance(source, Node) and tensor_of(source) is not None:
            return keeps_order(node, source) and self.has(source)
        return step.name == "gather" and self.has(args.get("index"))


def _is_one(node: Node) -> bool:
    """Whether a node is a single number."""
    example = tensor_of(node)
    return example is None or example.dim() == 0
