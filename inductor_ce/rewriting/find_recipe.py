"""Find the recipe of logits in a graph: from the logits back to the hidden states and the inputs."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.fx import Node
from torch.fx.node import map_arg

from ..common.compat.graphs import enter_autocast, exit_autocast, is_dtensor, is_plain_tensor, local_of
from ..distributed.local_logits import Dims, LocalLogits, beside, local_part, step_fact, view_fact
from ..graph.builder import Builder
from ..graph.shapes import constant, equal, example_of, same_shape, shape_of, tensor_of
from ..graph.timeline import Timeline, written_by
from ..reading import spellings
from ..reading.steps import Step, View
from .linear_layers import linear_layer
from .recipes import Instruction, Of, Recipe


class NoRecipe(Exception):
    """Why logits cannot be made again, in words."""


@dataclass
class Found:
    """The recipe of a node of a graph, and the nodes that are its parts.

    The first are hidden states as the node's rows are arranged: the same tensor, or views of it that `build`
    has added to the graph. Of a DTensor the recipe makes what each rank has, as `spread` puts it together.
    """

    recipe: Recipe
    parts: list[Node]
    product: Node
    spread: LocalLogits | None = None


# Views of rows, which leave the classes last. Of the first two the sizes are given.
_SIZED = {"view", "reshape"}
_OF_ROWS = _SIZED | {"flatten", "squeeze", "unsqueeze", "getitem", "narrow", "select"}

_CUTS: set[View | None] = {View.RESHAPE, View.SLICE}

_MOST_STEPS = 16


@dataclass
class _Search:
    """One search through a graph, from the logits back to the hidden states and the inputs."""

    timeline: Timeline
    build: Builder
    parts: list[Node] = field(default_factory=list)
    steps: list[Instruction] = field(default_factory=list)
    known: dict[Node, Any] = field(default_factory=dict)  # a node -> a part or the number of a step
    switches: set[Any] = field(default_factory=set)
    product: Node | None = None
    hidden: Node | None = None
    classes: int = 0

    def unchanged(self, node: Node, since: Node) -> bool:
        """Whether a tensor is at the end of the graph what it is just after the node `since`."""
        return self.timeline.unchanged(node, since, len(self.timeline.nodes))


def recipe_of(timeline: Timeline, node: Node, build: Builder) -> Found:
    """How the tensor [..., V] of a node is made again. `build` adds the views of hidden states that it needs.

    Raises NoRecipe.
    """
    search = _Search(timeline, build)
    size = constant(shape_of(node)[-1])
    if size is None:
        raise NoRecipe("their number of classes is symbolic")
    search.classes = size
    hidden = _rows(search, node)
    assert search.hidden is not None
    assert search.product is not None
    parts = [hidden, *(p for p in search.parts if p is not search.hidden)]
    number = {search.hidden: 0} | {p: i for i, p in enumerate(parts) if i}

    def placed(value: Any) -> Any:
        if isinstance(value, Of):
            return Of(len(parts) + value.index)
        if isinstance(value, Node):
            return Of(number[value])
        if isinstance(value, (tuple, list)):
            return tuple(placed(v) for v in value)
        return value

    steps = tuple(
        Instruction(step.target, placed(step.args), tuple((k, placed(v)) for k, v in step.kwargs))
        for step in search.steps
    )
    if len(search.switches) > 1:
        raise NoRecipe("autocast begins or ends between the steps by which they are made")
    (autocast,) = search.switches
    example = tensor_of(node)
    assert example is not None
    names = ("the hidden states", *(_name(p) for p in parts[1:]))
    own = constant(local_of(example).shape[-1])
    if own is None:
        raise NoRecipe("their number of classes is symbolic")
    recipe = Recipe(names, steps, own, example.dtype, example.requires_grad, autocast)
    if not is_dtensor(example):
        return Found(recipe, parts, search.product)
    parts = [_own_part(search, p, node) for p in parts]
    spread = LocalLogits.of(example, list(map(example_of, parts)))
    if spread is None:
        raise NoRecipe("their number of rows is symbolic, and sharded")
    return Found(recipe, parts, search.product, spread)


def _own_part(search: _Search, part: Node, logits: Node) -> Node:
    """What a rank has of a part that is a DTensor and no input."""
    if part.op in ("placeholder", "get_attr") or not is_dtensor(tensor_of(part)):
        return part
    *nodes, output = search.timeline.nodes
    outside = [n for n in nodes if n.op in ("placeholder", "get_attr")] + output.all_input_nodes
    if any(search.timeline.shares_storage(part, n) for n in outside):
        raise NoRecipe(f"{part.name}, of which they are made, is returned too or is a view of an input")
    return search.build(local_part, part, logits)


def _name(part: Node) -> str:
    """What a user calls an input, "head.weight", with its shape."""
    source = getattr(part, "_dynamo_source", None)
    name = getattr(source, "name", part.name)
    text = name() if callable(name) else name
    path = re.findall(r"_(?:modules|parameters|buffers)\['([^']+)'\]", text)
    shape = "x".join(map(str, shape_of(part)))
    return f"{'.'.join(path) or text} [{shape}]"


# The rows: what has the vocabulary on its last dimension


def _rows(search: _Search, node: Node) -> Node:
    """Take in the steps that make `node`. Returns the hidden states, arranged as its rows are."""
    if len(search.steps) > _MOST_STEPS:
        raise NoRecipe("too many steps make them")
    example = tensor_of(node)
    if example is None or not _is_known(example):
        raise NoRecipe("they are no plain tensor")
    if not search.unchanged(node, node):
        raise NoRecipe("they are changed in place")
    spelled = spellings.read(node)
    product = _product(search, node, spelled)
    if product is not None:
        return product
    if spelled is None or any(written_by(node)):
        raise NoRecipe(f"they are made by {_called(node)}")
    step, args = spelled
    source = args.get("input")
    if _called(node) in _OF_ROWS and isinstance(source, Node):
        return _rearranged(search, node, source)
    if step.name == "detach" and isinstance(source, Node):
        hidden = _rows(search, source)
        _add(search, Instruction("detach", (Of(len(search.steps) - 1),)))
        return hidden
    if step.view is View.SAME and isinstance(source, Node):
        return _cast(search, node, source)
    if _is_elementwise(step):
        return _elementwise(search, node)
    raise NoRecipe(f"they are made by {_called(node)}")


def _is_known(example: torch.Tensor) -> bool:
    return is_plain_tensor(example) or is_dtensor(example)


def _refuse(fact: str | None) -> None:
    if fact is not None:
        raise NoRecipe(fact)


def _called(node: Node) -> str:
    return getattr(node.target, "__name__", str(node.target))


def _add(search: _Search, step: Instruction, like: Node | None = None) -> None:
    """Take in a step, of a node `like` which autocast may do otherwise."""
    if like is not None:
        search.switches.add(_autocast_at(search, like))
    search.steps.append(step)


def _autocast_at(search: _Search, node: Node) -> tuple[str, torch.dtype, bool]:
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


def _cast(search: _Search, node: Node, source: Node) -> Node:
    hidden = _rows(search, source)
    before, after = tensor_of(source), tensor_of(node)
    assert before is not None
    assert after is not None
    if before.device != after.device:
        raise NoRecipe("they are moved to another device")
    if before.dtype != after.dtype:
        _add(search, Instruction("to", (Of(len(search.steps) - 1), after.dtype)))
    return hidden


def _rearranged(search: _Search, node: Node, source: Node) -> Node:
    """A view of rows, done to the hidden states instead."""
    before, after = shape_of(source), shape_of(node)
    if not before or not after or not (equal(before[-1], after[-1]) and equal(after[-1], search.classes)):
        raise NoRecipe(f"{_called(node)} cuts or moves the classes")
    if any(tensor_of(a) is not None for a in node.all_input_nodes if a is not source):
        raise NoRecipe(f"{_called(node)} chooses rows by a tensor")
    hidden = _rows(search, source)
    width = constant(shape_of(hidden)[-1])
    if width is None:
        raise NoRecipe("the hidden size is symbolic")
    arguments = tuple(node.args[1:])
    if _called(node) in _SIZED:
        arguments = with_width(arguments, search.classes, width)
    moved = search.build(node.target, hidden, *arguments, **node.kwargs)
    example = example_of(moved)
    if not same_shape(example.shape[:-1], after[:-1]) or not equal(example.shape[-1], width):
        raise NoRecipe(f"{_called(node)} cuts or moves the classes")
    for of, view in ((source, node), (hidden, moved)):
        if is_dtensor(example):
            _refuse(view_fact(example_of(of), example_of(view)))
    return moved


def with_width(sizes: tuple[Any, ...], classes: int | None, width: Any) -> tuple[Any, ...]:
    """The sizes of logits as those of hidden states: V, which comes last, is D."""
    *first, last = sizes
    if isinstance(last, (tuple, list)):
        last = with_width(tuple(last), classes, width)
    else:
        size = last.meta.get("example_value") if isinstance(last, Node) else last
        last = width if size == classes else last
    return (*first, last)


def is_sized_view(node: Node) -> bool:
    """Whether a node is a view whose sizes are given, or a flattening."""
    return _called(node) in _SIZED or _called(node) == "flatten"


def _is_elementwise(step: Step) -> bool:
    """Whether a step is a function of each element."""
    return step.view is None and (step.in_chain or step.commutes)


def _elementwise(search: _Search, node: Node) -> Node:
    """A function of each element, of logits beside numbers and what all rows share."""
    wide = [a for a in node.all_input_nodes if _is_wide(search, a, node)]
    if len(wide) != 1:
        raise NoRecipe(f"{_called(node)} joins them with other rows")
    (source,) = wide
    hidden = _rows(search, source)
    logits = Of(len(search.steps) - 1)

    def argument(a: Node) -> Any:
        return logits if a is source else _shared(search, a)

    result = example_of(node)
    _refuse_collectives(result, [(x, beside(result, x)) for x in map(example_of, node.all_input_nodes)])
    args, kwargs = map_arg((node.args, node.kwargs), argument)
    _add(search, Instruction(node.target, tuple(args), tuple(sorted(kwargs.items()))), like=node)
    return hidden


def _refuse_collectives(result: torch.Tensor, operands: list[tuple[torch.Tensor, Dims]]) -> None:
    if is_dtensor(result):
        _refuse(step_fact(result, operands))


def _is_wide(search: _Search, source: Node, node: Node) -> bool:
    """Whether a source has rows; raises NoRecipe where some of it differs from row to row, but not all."""
    shape = tensor_of(source)
    if shape is None:
        raise NoRecipe(f"{_called(node)} reads what is no tensor")
    sizes = tuple(shape.shape)
    if len(sizes) == len(shape_of(node)) and same_shape(sizes, shape_of(node)):
        return math.prod(sizes[:-1]) != 1 or not _is_shared(sizes, search.classes)
    if not _is_shared(sizes, search.classes):
        raise NoRecipe(f"{_called(node)} takes a number for each row")
    return False


def _is_shared(sizes: tuple[Any, ...], classes: int) -> bool:
    """Whether a tensor of these sizes is the same for all rows: one number, or one a class."""
    if not sizes:
        return True
    return all(equal(s, 1) for s in sizes[:-1]) and (equal(sizes[-1], 1) or equal(sizes[-1], classes))


# Products


def _product(search: _Search, node: Node, spelled: Any) -> Node | None:
    """The hidden states of a linear layer, whose step is taken in; None for any other node."""
    layer = linear_layer(node, spelled)
    if layer is None:
        return None
    hidden = layer.hidden
    if not same_shape(shape_of(hidden)[:-1], shape_of(node)[:-1]):
        raise NoRecipe("their linear layer moves the rows")
    example = tensor_of(hidden)
    if example is None or not _is_known(example):
        raise NoRecipe("they are no plain tensor")
    if not search.unchanged(hidden, node):
        raise NoRecipe("the hidden states are changed in place")
    _refuse_collectives(example_of(node), layer.operands(example_of(node)))
    search.product, search.hidden = node, hidden
    made = tuple(
        hidden if a is hidden else _shared(search, a) if isinstance(a, Node) else a for a in layer.args
    )
    _add(search, Instruction(layer.target, made), like=node)
    return hidden


def is_form(node: Node, classes: int) -> bool:
    """Whether a node may be what a step of a recipe makes: all or some rows of logits in some form."""
    example, spelled = tensor_of(node), spellings.read(node)
    if example is None or spelled is None or not example.is_floating_point() or not example.dim():
        return False
    step, _ = spelled
    copied = step.view is View.SAME or step.name == "detach"
    known = copied or _called(node) in _OF_ROWS or _is_elementwise(step)
    return known and equal(example.shape[-1], classes)


def _shared(search: _Search, node: Node) -> Any:
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


def _repeated(search: _Search, node: Node, source: Any) -> Any:
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
        raise NoRecipe(f"{_called(node)} cuts or joins a DTensor")
    of = _shared(search, source)
    args, kwargs = map_arg((node.args, node.kwargs), lambda a: of)
    _add(search, Instruction(node.target, tuple(args), tuple(sorted(kwargs.items()))), like=node)
    search.known[node] = Of(len(search.steps) - 1)
    return search.known[node]
