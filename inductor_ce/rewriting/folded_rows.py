"""Rows of a tensor that is cut, before a linear layer of whose weight no gradient is wanted.

    linear(h[:, :-1], W)  =  linear(h[:, :-1].contiguous(), W)

Of such a weight torch makes a batch of copies, one for each sequence, lest it copy the hidden states, and
then the logits are no linear layer's that a head is found with. With hidden states that are contiguous it
is one product of all rows. Frozen layers of adapted models, teachers and reference models are such.
"""

from __future__ import annotations

from torch.fx import Graph

from .. import ops
from ..graph.builder import Builder
from ..graph.shapes import Size, equal, example_of, shape_of, tensor_of
from .linear_layers import plain_layer
from .rewrite import is_contiguous


def fold_rows(graph: Graph) -> None:
    """Make hidden states contiguous before the frozen layers of as many classes as fused losses have."""
    classes = _classes_of_losses(graph)
    for node in [*graph.nodes] if classes else ():
        layer = plain_layer(node)
        if layer is None or not any(equal(shape_of(node)[-1], size) for size in classes):
            continue
        stays = example_of(layer.weight).requires_grad or is_contiguous(layer.hidden)
        if len(shape_of(layer.hidden)) > 2 and not stays:
            made = Builder(graph, node, like=node)("contiguous", layer.hidden)
            node.replace_input_with(layer.hidden, made)


def _classes_of_losses(graph: Graph) -> list[Size]:
    found: list[Size] = []
    for op in (ops.ROW_STATS, ops.DIVERGENCE):
        for loss in graph.find_nodes(op="call_function", target=op):
            shapes = [shape_of(s) for s in loss.all_input_nodes if tensor_of(s) is not None]
            sizes = [shape[-1] for shape in shapes if len(shape) > 1]
            found += [size for size in sizes if not any(equal(size, other) for other in found)]
    return found
