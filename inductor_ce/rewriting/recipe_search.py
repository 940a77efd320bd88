"""What a search for the recipe of logits has found so far, and the steps that it takes in."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch.fx import Node
from torch.fx.node import map_arg

from ..common.compat.graphs import enter_autocast, exit_autocast, is_dtensor, is_plain_tensor
from ..common.findings import name_of
from ..distributed.local_logits import Dims, step_fact
from ..graph.builder import Builder
from ..graph.shapes import example_of, same_shape, shape_of, tensor_of
from ..graph.timeline import Timeline
from ..reading import spellings
from ..reading.steps import View
from .linear_layers import LinearLayer, linear_layer
from .recipes import Instruction, Of

_CUTS: set[View | None] = {View.RESHAPE, View.SLICE}


class NoRecipe(Exception):
    """Why logits cannot be made again, in words."""


Rows = tuple[Node, Of]  # the hidden states, arranged as some rows are, and which step makes these


@dataclass
class Search:
    """One search through a graph, from the logits back to the hidden states and the inputs."""

    timeline: Timeline
    build: Builder
    parts: list[Node] = field(default_factory=list)
    steps: list[Instruction] = field(default_factory=list)
    known: dict[Node, Any] = field(default_factory=dict)  # a node -> a part or the number of a step
    rows: dict[Node, Rows] = field(default_factory=dict)  # what was taken in, and where it is
    switches: set[Any] = field(default_factory=set)
    product: Node | None = None
    hidden: Node | None = None

    def unchanged(self, node: Node, since: Node) -> bool:
        """Whether a tensor is at the end of the graph what it is just after the node `since`."""
        return self.timeline.unchanged(node, since)


def refuse(fact: str | None) -> None:
    """Raises NoRecipe with a fact, if there is one."""
    if fact is not None:
        raise NoRecipe(fact)


def refuse_collectives(result: torch.Tensor, operands: list[tuple[torch.Tensor, Dims]]) -> None:
    if is_dtensor(result):
        refuse(step_fact(result, operands))


def add(search: Search, step: Instruction, like: Node | None = None) -> Of:
    """Take in a step, of a node `like` which autocast may do otherwise."""
    if like is not None:
        search.switches.add(_autocast_at(search, like))
    search.steps.append(step)
    return Of(len(search.steps) - 1)


def _autocast_at(search: Search, node: Node) -> tuple[str, torch.dtype, bool]:
    """(device type, dtype, whether it is on) of autocast where a node runs."""
    example = tensor_of(node)
    assert example is not None
    device = example.device.type
    state = (device, torch.get_autocast_dtype(device), torch.is_autocast_enabled(device))
    entered = []
    for other in search.timeline.nodes[: search.timeline.position[node]]:
        if other.target is enter_autocast:
            entered.append(other.args)
        elif other.target is exit_autocast:
            entered.pop()
    for kind, dtype, enabled, *_ in (args for args in entered if args[0] == device):
        state = (kind, dtype or state[1], bool(enabled))
    return state


def cast(search: Search, node: Node, source: Node, of: Any) -> Any:
    """The step of a cast on one device; `of` itself, if the dtype stays. Raises NoRecipe."""
    before, after = tensor_of(source), tensor_of(node)
    assert before is not None
    assert after is not None
    if before.device != after.device:
        raise NoRecipe("they are moved to another device")
    return of if before.dtype == after.dtype else add(search, Instruction("to", (of, after.dtype)))


def is_known(example: torch.Tensor) -> bool:
    return is_plain_tensor(example) or is_dtensor(example)


# What the hidden states become, and what all rows share


def product(search: Search, node: Node, layer: LinearLayer) -> Rows:
    """A linear layer, of the hidden states or of what an adapter makes of them."""
    if not same_shape(shape_of(layer.hidden)[:-1], shape_of(node)[:-1]):
        raise NoRecipe("their linear layer moves the rows")
    if search.hidden is None:
        example = tensor_of(layer.hidden)
        if example is None or not is_known(example):
            raise NoRecipe("they are no plain tensor")
        search.product, search.hidden = node, layer.hidden
    of = _of_hidden(search, layer.hidden, node)
    return search.hidden, _layer(search, node, layer, of)


def _layer(search: Search, node: Node, layer: LinearLayer, of: Any) -> Of:
    """The step of a linear layer of rows that are made by `of`."""
    refuse_collectives(example_of(node), layer.operands(example_of(node)))
    made = tuple(
        of if a is layer.hidden else shared(search, a) if isinstance(a, Node) else a for a in layer.args
    )
    return add(search, Instruction(layer.target, made), like=node)


def _of_hidden(search: Search, node: Node, reader: Node) -> Any:
    """The hidden states, or what layers and casts make of them."""
    if not search.unchanged(node, reader if node is search.hidden else node):
        raise NoRecipe("the hidden states are changed in place")
    if node is search.hidden:
        return node
    spelled = spellings.read(node)
    layer = linear_layer(node, spelled)
    if layer is not None:
        return _layer(search, node, layer, _of_hidden(search, layer.hidden, node))
    source = None if spelled is None else spelled[1].get("input")
    if spelled is None or spelled[0].view is not View.SAME or not isinstance(source, Node):
        raise NoRecipe(f"{name_of(node)} joins them with other rows")
    return cast(search, node, source, _of_hidden(search, source, node))


def shared(search: Search, node: Node) -> Any:
    """What all rows share: an input of the graph, or made of inputs by steps that cost nothing to repeat."""
    if node in search.known:
        return search.known[node]
    if not search.unchanged(node, node):
        raise NoRecipe(f"{node.name} is changed in place")
    spelled = spellings.read(node)
    source = spelled[1].get("input") if spelled is not None else None
    if node.op not in ("placeholder", "get_attr") and _is_view(spelled):
        made = _repeated(search, node, source)
        if made is not None:
            return made
    search.parts.append(node)
    search.known[node] = node
    return node


def _is_view(spelled: Any) -> bool:
    return spelled is not None and (spelled[0].view is not None or spelled[0].name == "detach")


def _repeated(search: Search, node: Node, source: Any) -> Any:
    """A cast or view of an input, or what has no gradient of it, as a step; None for what is of another."""
    root = source
    while isinstance(root, Node) and root.op not in ("placeholder", "get_attr"):
        spelled = spellings.read(root)
        if spelled is None or not _is_view(spelled):
            return None
        root = spelled[1].get("input")
    others = [a for a in node.all_input_nodes if a is not source]
    if not isinstance(root, Node) or others or not isinstance(source, Node):
        return None
    step = spellings.step_of(node)
    if is_dtensor(tensor_of(node)) and step is not None and step.view in _CUTS:
        raise NoRecipe(f"{name_of(node)} cuts or joins a DTensor")
    of = shared(search, source)
    args, kwargs = map_arg((node.args, node.kwargs), lambda a: of)
    add(search, Instruction(node.target, tuple(args), tuple(sorted(kwargs.items()))), like=node)
    search.known[node] = Of(len(search.steps) - 1)
    return search.known[node]
