"""Inputs that the graph edits once a loss has read them, as a running prior or a queue of keys.

The joint graph edits an input at the end of the forward. What is made of it before that, as a chain before
logits or the logits of a slab, must not be made again in the backward of the edited input, whoever would:
we, or the partitioner, which takes an input for what it was. So a loss reads a copy.
"""

from __future__ import annotations

import torch
from torch.fx import Graph, Node
from torch.utils.checkpoint import CheckpointPolicy

from .. import ops
from ..common.compat.graphs import is_tangent
from ..graph.builder import Builder
from ..graph.walk import args_of, reached, sources_of
from ..ops.as_read import AS_READ

READERS = (ops.ROW_STATS, ops.DIVERGENCE)


def copy_edited_inputs(graph: Graph) -> None:
    """Let all but the edit read a copy of each such input. A graph without a backward is left as it is."""
    edits = _edits(graph)
    inputs = graph.find_nodes(op="placeholder")
    if not edits or not any(map(is_tangent, inputs)):
        return
    written = set(edits.values())
    readers = [node for op in READERS for node in graph.find_nodes(op="call_function", target=op)]
    read = set(reached(readers, lambda node: [s for s in sources_of(node) if s not in written]))
    for source in (edited for edited in edits if edited in read):
        copy = Builder(graph, inputs[-1].next, source, key="val")(AS_READ, source)
        copy.meta["recompute"] = CheckpointPolicy.MUST_SAVE
        for user in [user for user in source.users if user is not copy and not _is_edit(user)]:
            user.replace_input_with(source, copy)


def _edits(graph: Graph) -> dict[Node, Node]:
    """By input that is edited, what is written to it."""
    copies = graph.find_nodes(op="call_function", target=torch.ops.aten.copy_.default)
    pairs = (args_of(node)[:2] for node in copies if _is_edit(node))
    return {source: new for source, new in pairs if isinstance(new, Node)}


def _is_edit(node: Node) -> bool:
    return node.target is torch.ops.aten.copy_.default and args_of(node)[0].op == "placeholder"
