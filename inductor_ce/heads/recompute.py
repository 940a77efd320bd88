"""The joint pass: what the partitioner must know about the chains before the logits and their weights.

`row_stats` and `row_grad` are opaque to AOTAutograd's min-cut partitioner, which therefore saves what they
read. Where a pointwise chain (cast, scale, soft-cap, bias) leads to the logits, that would be one more
[N, V] tensor, in float32 more often than not. Tagged for recomputation, the chain is rebuilt in the
backward, where the gradient's kernel absorbs it, and only the raw logits are saved. The same holds for
weights of rows and classes, as of a teacher's logits.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Graph, Node
from torch.utils.checkpoint import CheckpointPolicy

from .. import ops
from ..graph.shapes import hint, shape_of, tensor_of
from ..graph.walk import args_of
from .kinds import VIEWS, is_pointwise

aten = torch.ops.aten

_LINKS = {
    *VIEWS,
    aten.slice.Tensor,
    aten.expand.default,
    aten.select_scatter.default,
    aten.slice_scatter.default,
}
_NEUTRAL: dict[Any, int] = {aten.add.Tensor: 0, aten.sub.Tensor: 0, aten.mul.Tensor: 1, aten.div.Tensor: 1}


def recompute_chains(graph: Graph) -> None:
    """Tag the pointwise chains before all logits of a joint graph, and before weights of rows and classes.

    What multiplies by one is left out of them.
    """
    returned = set(graph.output_node().all_input_nodes)
    ends = [end for node in graph.find_nodes(op="call_function", target=ops.ROW_STATS) for end in _ends(node)]
    for node in graph.find_nodes(op="call_function", target=ops.DIVERGENCE):
        ends += node.args[0]
    for link in dict.fromkeys(link for end in ends for link in _chain(end, returned)):
        operand = _unchanged(link)
        if operand is not None:
            link.replace_all_uses_with(operand)
            graph.erase_node(link)
        elif not _may_be_dropped(link):
            link.meta["recompute"] = CheckpointPolicy.MUST_RECOMPUTE
            link.meta.setdefault("ac_graph_id", 0)


def _ends(node: Node) -> list[Node]:
    """What a `row_stats` reads of rows and classes."""
    z, _, weights, *_ = args_of(node)
    return [z, *(q for q in weights if len(shape_of(q)) == 2)]


def _may_be_dropped(link: Node) -> bool:
    """Whether Inductor may take a link for its operand: it adds a zero, or multiplies by a one.

    It would give the operand the tag: a matrix product would be made again, and an input, which nobody can
    make again, would be lost to the backward. Scalars are dropped from torch 2.14, constant tensors in all.
    """
    neutral = _NEUTRAL.get(link.target)
    return neutral is not None and any(_is_all(operand, neutral) for operand in link.args)


def _unchanged(link: Node) -> Node | None:
    """The operand that a link makes again, as a temperature of 1 does: what else it reads is one."""
    if _NEUTRAL.get(link.target) != 1 or link.kwargs:
        return None
    a, b = link.args
    pairs = [(a, b), (b, a)] if link.target is aten.mul.Tensor else [(a, b)]
    own = tensor_of(link)
    for operand, one in pairs:
        example = tensor_of(operand)
        if example is not None and _is_all(one, 1) and _is_alike(example, own):
            return operand  # type: ignore[return-value]
    return None


def _is_alike(a: torch.Tensor, b: torch.Tensor | None) -> bool:
    kinds = [(x.dtype, x.shape, x.stride(), x.device) for x in (a, b) if x is not None]
    return len(kinds) == 2 and kinds[0] == kinds[1]


def _is_all(operand: Any, number: int) -> bool:
    """Whether an operand is this number everywhere: a scalar, or a constant made in the graph."""
    if not isinstance(operand, Node):
        return bool(operand == number)
    if operand.target is aten.full.default:
        return bool(operand.args[1] == number)
    return operand.target in _LINKS and _is_all(operand.args[0], number)


def _chain(logits: Node, returned: set[Node]) -> list[Node]:
    """The nodes between the logits as they are in memory and the logits as the loss reads them."""
    links: list[Node] = []
    node = logits
    while node not in returned and _is_link(node):
        large = _large_inputs(node)
        if len(large) != 1:
            links += _branches(node, returned)
            break
        links.append(node)
        (node,) = large
    return links if any(is_pointwise(link) for link in links) else []


def _branches(node: Node, returned: set[Node]) -> list[Node]:
    """The links above a node with several large inputs, if one tensor that must be kept is at their root.

    The graph's own inputs, such as a mask, are in memory in any case. Where more is at the root, the one
    result is less to keep than what it is made of.
    """
    links: list[Node] = []
    roots: set[Node] = set()
    stack = [node]
    while stack:
        node = stack.pop()
        if node in returned or not _is_link(node):
            roots.add(node)
        elif node not in links:
            links.append(node)
            stack += _large_inputs(node)
    made = [root for root in roots if root.all_input_nodes]
    return links if len(made) <= 1 else []


def _is_link(node: Node) -> bool:
    if node.target == aten.scatter.value:  # over a constant, which Inductor makes pointwise
        return args_of(node)[0].target == aten.full.default
    return node.op == "call_function" and (node.target in _LINKS or is_pointwise(node))


def _large_inputs(node: Node) -> list[Node]:
    """The inputs that are as large as the result."""
    size = tensor_of(node).numel()  # type: ignore[union-attr]
    return [source for source in node.all_input_nodes if _is_large(source, size)]


def _is_large(node: Node, size: int | torch.SymInt) -> bool:
    """Whether a tensor has a good part of `size` elements: a slice or a pad still counts, a row does not."""
    while node.target is aten.expand.default:
        node = node.args[0]  # type: ignore[assignment]
    example = tensor_of(node)
    return example is not None and bool(4 * hint(example.numel()) >= hint(size))
