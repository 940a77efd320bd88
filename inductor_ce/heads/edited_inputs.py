"""Inputs that the graph edits once a loss has read them, as a running prior or a queue of keys.

The joint graph edits an input at the end of the forward. What is made of it before that, as a chain before
logits, the logits of a slab, or weights of rows, must not be made again in the backward of the edited input,
whoever would: we, or the partitioner, which takes an input for what it was. So a loss's graph reads a copy.

NOTE What is not copied. What the backward reads of products is saved, but for those that make logits, which
slabs make again. So of a teacher that follows behind the loss there are copies of the last layers alone.
"""

from __future__ import annotations

import torch
from torch.fx import Graph, Node
from torch.utils.checkpoint import CheckpointPolicy

from .. import ops
from ..common.compat.dynamo import remakes_products
from ..common.compat.graphs import is_tangent
from ..graph.builder import Builder
from ..graph.walk import args_of, reached, sources_of
from ..ops.as_read import AS_READ
from .kinds import PRODUCTS

_REMADE = (CheckpointPolicy.MUST_RECOMPUTE, CheckpointPolicy.PREFER_RECOMPUTE)
READERS = (ops.ROW_STATS, ops.DIVERGENCE)


def copy_edited_inputs(graph: Graph) -> None:
    """Let all but the edit read a copy of each such input. A graph without a backward is left as it is."""
    edits = _edits(graph)
    inputs = graph.find_nodes(op="placeholder")
    tangents = list(filter(is_tangent, inputs))
    readers = [node for op in READERS for node in graph.find_nodes(op="call_function", target=op)]
    if not edits or not tangents or not readers:
        return
    read = _made_again(readers, tangents, set(edits.values()))
    for source in (edited for edited in edits if edited in read):
        copy = Builder(graph, inputs[-1].next, source, key="val")(AS_READ, source)
        copy.meta["recompute"] = CheckpointPolicy.MUST_SAVE
        for user in [user for user in source.users if user is not copy and not _is_edit(user)]:
            user.replace_input_with(source, copy)


def _made_again(readers: list[Node], tangents: list[Node], written: set[Node]) -> set[Node]:
    """What the backward reads of the forward, and what that may be made again of."""
    late = {node for node in reached(tangents, lambda node: node.users) if node.op != "output"}
    of_logits = set(reached(readers, lambda node: [] if node.target in PRODUCTS else sources_of(node)))
    expanded = of_logits | late

    def sources(node: Node) -> list[Node]:
        is_saved = node.target in PRODUCTS and node not in expanded and not _is_remade(node)
        return [] if is_saved else [source for source in sources_of(node) if source not in written]

    return set(reached(late, sources))


def _is_remade(product: Node) -> bool:
    """Whether torch may make a product again in the backward, as it is told to."""
    return remakes_products() or product.meta.get("recompute") in _REMADE


def _edits(graph: Graph) -> dict[Node, Node]:
    """By input that is edited, what is written to it."""
    copies = graph.find_nodes(op="call_function", target=torch.ops.aten.copy_.default)
    pairs = (args_of(node)[:2] for node in copies if _is_edit(node))
    return {source: new for source, new in pairs if isinstance(new, Node)}


def _is_edit(node: Node) -> bool:
    return node.target is torch.ops.aten.copy_.default and args_of(node)[0].op == "placeholder"
