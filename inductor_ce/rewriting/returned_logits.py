"""Logits that are returned: who has them in memory, and, with the option, NaN in their place.

What holds all logits of a loss, in whatever shape, order or floating dtype, is a copy here. Where one is
returned, the linear layer cannot be fused with the loss: all logits must be there. Who never reads them says
so by the option, and is given NaN of the same shape, dtype and device, one element expanded.
"""

from __future__ import annotations

import math

import torch
from torch.fx import Graph, Node

from ..common.compat.dynamo import returns_to_program
from ..common.compat.graphs import is_plain_tensor
from ..common.findings import name_of, where_is
from ..common.options import NAN, Options
from ..graph.builder import Builder
from ..graph.shapes import tensor_of
from ..graph.timeline import written_by
from ..graph.walk import reached
from ..reading import spellings
from ..reading.steps import View
from ..reading.values import Reading
from ..reading.views import keeps_order
from .escapes import is_of_each, read_by
from .groups import Group
from .layouts import other_readers, reads_elements
from .promises import FACT, INSIDE

RETURNED = "The logits are returned, so all of them are in memory"
REMEDY = '; the option returned_logits="nan" returns NaN in their place.'
DROPPED = "The logits that are returned are dropped: NaN is returned in their place."
VERIFIED = (
    "The option verify computes the original too, which has all logits in memory; the head stays whole, and "
    "what it would be in pieces is not compared."
)

NOT_PLAIN = "they are no plain tensor"
ARGUMENT = "they are an argument of the graph"
ALIASED = "a tensor that shares their memory is an argument or is returned too"


def settle_logits(
    graph: Graph, reading: Reading, groups: list[Group], options: Options, gone: dict[Node, Node]
) -> list[str]:
    """Drop the returned logits of rewritten groups where that is asked for and may be.

    Logits that are no more have in `gone` what stands for them.

    Returns:
        For each group a sentence on what keeps its logits in memory, or that they were dropped; "" where
        nothing but the loss needs them.
    """
    roots = [_root(gone.get(group.logits.node, group.logits.node)) for group in groups]
    sentences = {
        root: _told(root) or _settle(graph, reading, _copies(root), options) for root in dict.fromkeys(roots)
    }
    return [sentences[root] for root in roots]


def _told(root: Node) -> str:
    """What became of returned logits before this graph was rewritten."""
    return next((node.meta[FACT] for node in _copies(root) if FACT in node.meta), "")


def _settle(graph: Graph, reading: Reading, copies: list[Node], options: Options) -> str:
    if options.verify:
        return VERIFIED
    returned = [node for node in copies if any(user.op == "output" for user in node.users)]
    reader = _reader(copies)
    if _is_argument(copies[0]) and not (returned and options.returned_logits == NAN):
        return ""  # there is no linear layer
    if not returned:
        return f"The logits are also used by {reader}, so all of them are in memory." if reader else ""
    if options.returned_logits != NAN:
        if reader is not None:
            return f"{RETURNED}; they are also used by {reader}."
        return RETURNED + (REMEDY if _are_plain(copies) else ".")
    refusal = _refusal(graph, reading, copies) if reader is None else f"they are also used by {reader}"
    if refusal is not None:
        return f'{RETURNED}: returned_logits="nan" does not apply, because {refusal}.'
    for node in returned:
        _return_nan(graph, node)
    return DROPPED


def _root(node: Node) -> Node:
    """What a tensor is a copy of."""
    while (source := _copied(node)) is not None:
        node = source
    return node


def _copied(node: Node) -> Node | None:
    """The source of a node that holds all elements of it, floating as they were."""
    spelled = spellings.read(node)
    if spelled is None or not (spelled[0].view or spelled[0].name == "detach"):
        return None
    source = spelled[1].get("input")
    floating = [x is not None and x.is_floating_point() for x in (tensor_of(node), tensor_of(source))]
    if not isinstance(source, Node) or not all(floating):
        return None
    return source if spelled[0].view is not View.SLICE or keeps_order(node, source) else None


def _copies(root: Node) -> list[Node]:
    """The root and all copies of it, each behind its source."""
    found = [root]
    for node in found:
        found += [user for user in node.users if _copied(user) is node and user not in found]
    return found


def _reader(copies: list[Node]) -> str | None:
    """Who else reads the logits, in words; None for nobody but losses."""
    others = (user for user in other_readers(copies) if not (_is_for_losses(user) or _is_unread(user)))
    return next((f"{name_of(user)} {where_is(user)}" for user in others), None)


def _is_unread(node: Node) -> bool:
    """Whether only the shape of a node is asked for, and of what is made of it."""
    made = reached([node], lambda each: [user for user in each.users if each in read_by(user)])
    return all(spellings.is_repeatable(each) and not any(written_by(each)) for each in made)


def _is_for_losses(node: Node) -> bool:
    """Whether losses alone read what a node makes of each element, as of logits at a temperature."""
    stack, seen, is_read = [node], {node}, False
    while stack:
        source = stack.pop()
        for user in source.users:
            if not reads_elements(user):
                is_read = True
            elif user.op == "output" or not is_of_each(user, source):
                return False
            elif user not in seen:
                seen.add(user)
                stack.append(user)
    return is_read


def _are_plain(nodes: list[Node]) -> bool:
    return all(is_plain_tensor(tensor_of(node)) for node in nodes)  # type: ignore[arg-type]


def _refusal(graph: Graph, reading: Reading, copies: list[Node]) -> str | None:
    if not _are_plain(copies):
        return NOT_PLAIN
    if not returns_to_program(graph.owning_module):
        return INSIDE
    if _is_argument(copies[0]):
        return ARGUMENT
    elsewhere = (n for n in graph.nodes if n not in copies and _is_seen_outside(n))
    if any(reading.timeline.shares_storage(n, node) for n in elsewhere for node in copies):
        return ALIASED
    return None


def _is_argument(node: Node) -> bool:
    return node.op in ("placeholder", "get_attr")


def _is_seen_outside(node: Node) -> bool:
    return _is_argument(node) or any(user.op == "output" for user in node.users)


def _return_nan(graph: Graph, node: Node) -> None:
    """One element, expanded. The loss has the gradient of the logits; this has none."""
    output = graph.output_node()
    build = Builder(graph, output, like=node)
    example = tensor_of(node)
    assert example is not None
    nan = build(torch.full, (), math.nan, dtype=example.dtype, device=example.device)
    output.replace_input_with(node, build("expand_as", nan, node))
