"""Find the recipe of logits in a graph: from the logits back to the hidden states and the inputs."""

from __future__ import annotations

import math
import operator
import re
from dataclasses import dataclass
from typing import Any

from torch.fx import Node
from torch.fx.node import map_arg

from ..common.compat.graphs import is_dtensor, local_of
from ..common.findings import name_of
from ..distributed.local_logits import LocalLogits, beside, local_part, view_fact
from ..graph.builder import Builder
from ..graph.shapes import constant, elements_of, equal, example_of, same_shape, shape_of, tensor_of
from ..graph.timeline import Timeline, written_by
from ..reading import spellings
from ..reading.steps import Step, View
from .linear_layers import LinearLayer, linear_layer
from .padding import columns_kept
from .recipe_search import (
    NoRecipe,
    Rows,
    Search,
    add,
    cast,
    is_known,
    product,
    refuse,
    refuse_collectives,
    shared,
)
from .recipes import Instruction, Of, Recipe


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

# What gives some classes a number, as those that are banned.
CHOICES = ("masked_fill", "where")

# What does the same with a number and with a tensor [] that has it.
_OF_TWO = ("add", "sub", "mul", "div")

_MOST_STEPS = 16


def recipe_of(timeline: Timeline, node: Node, build: Builder) -> Found:
    """How the tensor [..., V] of a node is made again. `build` adds the views of hidden states that it needs.

    Raises NoRecipe.
    """
    search = Search(timeline, build)
    _classes(node)
    hidden, _ = _rows(search, node)
    assert search.hidden is not None
    assert search.product is not None
    parts = [hidden, *(p for p in search.parts if p is not search.hidden)]
    recipe, example = _recipe(search, parts, node), example_of(node)
    if not is_dtensor(example):
        return Found(recipe, parts, search.product)
    parts = [_own_part(search, p, node) for p in parts]
    spread = LocalLogits.of(example, list(map(example_of, parts)))
    if spread is None:
        raise NoRecipe("their number of rows is symbolic, and sharded")
    return Found(recipe, parts, search.product, spread)


def _recipe(search: Search, parts: list[Node], node: Node) -> Recipe:
    """What has been found, as data: of each rank, where the logits `node` are a DTensor."""
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
    (autocast,), example = search.switches, example_of(node)
    names = ("the hidden states", *(_name(p) for p in parts[1:]))
    own = constant(local_of(example).shape[-1])
    if own is None:
        raise NoRecipe("their number of classes is symbolic")
    return Recipe(names, steps, own, example.dtype, example.requires_grad, autocast)


def _own_part(search: Search, part: Node, logits: Node) -> Node:
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


def _classes(node: Node) -> int:
    size = constant(shape_of(node)[-1])
    if size is None:
        raise NoRecipe("their number of classes is symbolic")
    return size


# The rows: what has the vocabulary on its last dimension


def _rows(search: Search, node: Node) -> Rows:
    """Take in the steps that make `node`, each once."""
    if node not in search.rows:
        search.rows[node] = _taken_in(search, node)
    return search.rows[node]


def _taken_in(search: Search, node: Node) -> Rows:
    if len(search.steps) > _MOST_STEPS:
        raise NoRecipe("too many steps make them")
    example = tensor_of(node)
    if example is None or not is_known(example):
        raise NoRecipe("they are no plain tensor")
    if not search.unchanged(node, node):
        raise NoRecipe("they are changed in place")
    spelled = spellings.read(node)
    layer = linear_layer(node, spelled)
    if layer is not None:
        return product(search, node, layer)
    if spelled is None or any(written_by(node)):
        raise NoRecipe(f"they are made by {name_of(node)}")
    step, args = spelled
    source = args.get("input")
    if isinstance(source, Node) and (kept := columns_kept(node)) is not None:
        return _cut(search, node, source, kept)
    if name_of(node) in _OF_ROWS and isinstance(source, Node):
        return _rearranged(search, node, source)
    if step.name == "detach" and isinstance(source, Node):
        hidden, of = _rows(search, source)
        return hidden, add(search, Instruction("detach", (of,)))
    if step.view is View.SAME and isinstance(source, Node):
        hidden, of = _rows(search, source)
        return hidden, cast(search, node, source, of)
    if is_elementwise(step):
        return _elementwise(search, node)
    raise NoRecipe(f"they are made by {name_of(node)}")


def _rearranged(search: Search, node: Node, source: Node) -> Rows:
    """A view of rows, done to the hidden states instead."""
    before, after = shape_of(source), shape_of(node)
    if not before or not after or not equal(before[-1], after[-1]):
        raise NoRecipe(f"{name_of(node)} cuts or moves the classes")
    if any(tensor_of(a) is not None for a in node.all_input_nodes if a is not source):
        raise NoRecipe(f"{name_of(node)} chooses rows by a tensor")
    hidden, of_rows = _rows(search, source)
    width = constant(shape_of(hidden)[-1])
    if width is None:
        raise NoRecipe("the hidden size is symbolic")
    arguments = tuple(node.args[1:])
    if name_of(node) in _SIZED:
        arguments = with_width(arguments, _classes(node), width)
    moved = search.build(node.target, hidden, *arguments, **node.kwargs)
    example = example_of(moved)
    if not same_shape(example.shape[:-1], after[:-1]) or not equal(example.shape[-1], width):
        raise NoRecipe(f"{name_of(node)} cuts or moves the classes")
    for of, view in ((source, node), (hidden, moved)):
        if is_dtensor(example):
            refuse(view_fact(example_of(of), example_of(view)))
    return moved, of_rows


def _cut(search: Search, node: Node, source: Node, kept: slice) -> Rows:
    """Columns that are cut off, as those of a padded vocabulary, of all rows."""
    if is_dtensor(example_of(source)) or not same_shape(shape_of(source)[:-1], shape_of(node)[:-1]):
        raise NoRecipe(f"{name_of(node)} cuts the classes, and rows or a DTensor")
    hidden, of = _rows(search, source)
    return hidden, add(search, Instruction(operator.getitem, (of, (..., kept))))


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
    return name_of(node) in _SIZED or name_of(node) == "flatten"


def is_elementwise(step: Step) -> bool:
    """Whether a step is a function of each element."""
    return step.view is None and (step.in_chain or step.commutes or step.name in CHOICES)


def is_of_each(step: Step) -> bool:
    """Whether a step is a cast, or a function of each element."""
    return step.view is View.SAME or is_elementwise(step)


def _elementwise(search: Search, node: Node) -> Rows:
    """A function of each element, of logits beside numbers and what all rows share.

    Also of logits that are made of the same hidden states in two ways, as those of an adapter are.
    """
    given = {a: _given(a, node) for a in node.all_input_nodes}
    wide = [a for a in given if given[a] is a and _is_wide(a, node)]
    made = {a: _rows(search, a) for a in sorted(wide, key=lambda a: _is_adapted(a, wide))}
    if len({hidden for hidden, _ in made.values()}) != 1:
        raise NoRecipe(f"{name_of(node)} joins them with other rows")

    def argument(a: Node) -> Any:
        return made[a][1] if a in made else shared(search, given[a])

    result = example_of(node)
    refuse_collectives(result, [(x, beside(result, x)) for x in map(example_of, given.values())])
    args, kwargs = map_arg((node.args, node.kwargs), argument)
    (hidden, _), *_ = made.values()
    step = Instruction(node.target, tuple(args), tuple(sorted(kwargs.items())))
    return hidden, add(search, step, like=node)


def _given(source: Node, node: Node) -> Node:
    """A source, or the tensor [] that has the float that it is, where arithmetic may read that.

    Of a float that changes from call to call Dynamo is given a tensor on the CPU, and makes the number of it.
    """
    read, step = source.args[0] if source.target == "item" else None, spellings.step_of(node)
    if not isinstance(read, Node) or read.op != "placeholder" or step is None or step.name not in _OF_TWO:
        return source
    return read if example_of(read).is_floating_point() else source


def _is_adapted(source: Node, beside: list[Node]) -> bool:
    """Whether the hidden states of a linear layer before `source` are made by another one."""
    if len(beside) == 1:
        return False
    for _ in range(_MOST_STEPS):
        spelled = spellings.read(source)
        layer = linear_layer(source, spelled)
        if layer is not None:
            return _layer_before(layer.hidden) is not None
        inputs = [a for a in source.all_input_nodes if len(shape_of(a)) == len(shape_of(source))]
        if not inputs:
            return False
        source = max(inputs, key=elements_of)
    return False


def _layer_before(node: Node) -> LinearLayer | None:
    """The linear layer that makes a tensor, up to casts and the like."""
    while True:
        spelled = spellings.read(node)
        layer = linear_layer(node, spelled)
        source = None if spelled is None or spelled[0].view is not View.SAME else spelled[1].get("input")
        if layer is not None or not isinstance(source, Node):
            return layer
        node = source


def _is_wide(source: Node, node: Node) -> bool:
    """Whether a source has rows; raises NoRecipe where some of it differs from row to row, but not all."""
    shape = tensor_of(source)
    if shape is None:
        raise NoRecipe(f"{name_of(node)} reads what is no tensor")
    sizes = tuple(shape.shape)
    if len(sizes) == len(shape_of(node)) and same_shape(sizes, shape_of(node)):
        return math.prod(sizes[:-1]) != 1 or not _is_shared(sizes, _classes(node))
    if not _is_shared(sizes, _classes(node)):
        raise NoRecipe(f"{name_of(node)} takes a number for each row")
    return False


def _is_shared(sizes: tuple[Any, ...], classes: int) -> bool:
    """Whether a tensor of these sizes is the same for all rows: one number, or one a class."""
    if not sizes:
        return True
    return all(equal(s, 1) for s in sizes[:-1]) and (equal(sizes[-1], 1) or equal(sizes[-1], classes))


def is_form(node: Node, classes: int) -> bool:
    """Whether a node may be what a step of a recipe makes: all or some rows of logits in some form."""
    example, spelled = tensor_of(node), spellings.read(node)
    if example is None or spelled is None or not example.is_floating_point() or not example.dim():
        return False
    step, _ = spelled
    known = step.name == "detach" or name_of(node) in _OF_ROWS or is_of_each(step)
    return known and equal(example.shape[-1], classes)
