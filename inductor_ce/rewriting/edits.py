"""Edits in place, of tensors of the graph's own that have classes, as functions: before all else is read.

    t = F.kl_div(log_p, q, reduction="none")        t   = F.kl_div(log_p, q, reduction="none")
    t.masked_fill_(padding, 0.0)               ->   t_1 = t.masked_fill(padding, 0.0)
    t.sum()                                         t_1.sum()

AOTAutograd would do the same later, so no number and no gradient changes.

Those of a linear layer's logits become functions in the graph that Dynamo captured, `make_layers_functional`,
so that what is returned can be lazy; in the copy that is fused, where nobody sees more than parts of them.

NOTE What is proved of a memory
All edits of a memory become functions, or none. It is made in the graph. Who reads it after an edit does so
by the tensor that is edited, or by what is made of that afterwards: a view from before would have to change
with it. Under no_grad an edit leaves a tensor the gradient that it had, so nothing there may
have one. The function gives the dtype and the strides of what is edited; of a part that is not contiguous,
and is not returned, contiguous ones.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch.fx import Graph, Node
from torch.fx.node import map_arg

from ..common.compat.graphs import is_function_transform, is_higher_order, is_plain_tensor, tree_leaves
from ..common.failsafe import attempt
from ..graph.builder import Builder, undone_on_error
from ..graph.shapes import Size, equal, example_of, hint, same_shape, shape_of, tensor_of
from ..graph.timeline import INFERENCE, Timeline, written_by
from ..reading import spellings
from .filled_columns import column_mask, is_number_of
from .linear_layers import linear_layer

LEFT = "edits in place stay as they are"

# What has a function of the name without its last underscore, which makes what the edit leaves.
_NAMES = (
    *("add", "sub", "subtract", "mul", "multiply", "div", "divide", "pow", "square", "sqrt", "rsqrt"),
    *("reciprocal", "neg", "negative", "abs", "exp", "exp2", "expm1", "log", "log2", "log10", "log1p"),
    *("clamp", "clamp_min", "clamp_max", "clip", "relu", "sigmoid", "tanh", "erf", "sign", "nan_to_num"),
    *("xlogy", "addcmul", "addcdiv", "lerp", "masked_fill", "index_fill", "scatter", "scatter_add"),
)
_OPERATORS = {
    operator.iadd: operator.add,
    operator.isub: operator.sub,
    operator.imul: operator.mul,
    operator.itruediv: operator.truediv,
    operator.ipow: operator.pow,
}
_FUNCTIONS: dict[Any, Any] = {
    **{f"{name}_": name for name in _NAMES},
    **{getattr(torch, f"{name}_"): getattr(torch, name) for name in _NAMES if hasattr(torch, f"{name}_")},
    **_OPERATORS,
    **{f"__{edit.__name__}__": function for edit, function in _OPERATORS.items()},
}
# The names of functions that autocast casts nothing for, on any device.
_AS_GIVEN = ("add", "sub", "mul", "div", "truediv", "neg", "tanh", "clamp", "masked_fill", "index_fill")
_FILLS = ("fill_", "zero_", operator.setitem)
_ASKED = (F.relu, F.leaky_relu, F.elu, F.threshold)  # with inplace=True
# What reads all classes of its input, on the dimension that it names, or on the last or the second.
_OVER_CLASSES = ("log_softmax", "softmax", "logsumexp", "exp", "cross_entropy", "nll_loss", "kl_div")
_EXPONENTIALS = ("exp_", torch.exp_)


def make_functional(graph: Graph, min_vocab: int) -> None:
    """Let edits of what has at least as many classes be functions, where that is the same."""
    edits = [node for node in graph.nodes if _may_have_function(node)]
    places = _places_of_classes(graph, min_vocab) if edits else []
    edits = [edit for edit in edits if _has_classes(_edited(edit), places)]
    for memory in _memories(graph, edits):
        if _has_classes(memory.names[0], places) and memory.may_be_functional():
            attempt(LEFT, _as_functions, graph, memory)
    left = set(graph.nodes)
    for edit in [edit for edit in edits if edit in left]:
        attempt(LEFT, _made_full, graph, edit)


def make_layers_functional(graph: Graph, min_vocab: int) -> None:
    """Let edits of a linear layer's logits be functions: where they are returned they can be lazy so."""
    edits = [node for node in graph.nodes if _may_have_function(node) and _is_wide(_edited(node), min_vocab)]
    for memory in _memories(graph, edits, of_layers=True):
        if memory.may_be_functional():
            attempt(LEFT, _as_functions, graph, memory)


def _is_wide(node: Node, min_vocab: int) -> bool:
    shape = shape_of(node)
    return len(shape) > 1 and hint(shape[-1]) >= min_vocab


def _memories(graph: Graph, edits: list[Node], of_layers: bool = False) -> Iterator[Memory]:
    """What is edited, memory by memory; nothing under a transform of torch.func."""
    if not edits or any(is_function_transform(node.target) for node in graph.nodes):
        return
    timeline = Timeline(graph)
    position = dict(timeline.position)
    names = _names(timeline)
    for storage in dict.fromkeys(timeline.storage(_edited(edit)) for edit in edits):
        yield Memory(timeline, position, names[storage], of_layers)


def _made_full(graph: Graph, edit: Node) -> None:
    """Let a copy that is filled before anybody reads it be no copy: nothing of what is copied is needed."""
    copy, timeline = _edited(edit), Timeline(graph)
    if edit.target not in ("fill_", "zero_") or copy.target not in ("clone", torch.clone):
        return
    names = [n for n in timeline.nodes if tensor_of(n) is not None and timeline.shares_storage(n, copy)]
    alone = names[:2] == [copy, edit] and timeline.edits(copy)[0] is edit and len(copy.all_input_nodes) == 1
    first = min(copy.users, key=timeline.position.__getitem__)
    if not alone or example_of(copy).requires_grad or first is not edit:
        return
    build = Builder(graph, copy, like=copy)
    full = _function_of(build, edit, (copy.args[0], *edit.args[1:]), edit.kwargs)
    if not _is_alike(timeline, full, edit):
        build.undo()
        return
    for node in (edit, copy):
        node.replace_all_uses_with(full)
        graph.erase_node(node)


def _may_have_function(node: Node) -> bool:
    target: Any = node.target
    if node.op not in ("call_function", "call_method"):
        return False
    try:
        known = target in _FUNCTIONS or target in _FILLS or (target in _ASKED and "inplace" in node.kwargs)
    except TypeError:  # an unhashable callable is none of these
        return False
    return known and tensor_of(_edited(node)) is not None and any(written_by(node))


def _edited(edit: Node) -> Any:
    return edit.args[0] if edit.args else None


def _places_of_classes(graph: Graph, min_vocab: int) -> list[tuple[int, Size]]:
    """(which dimension, from the last, and its size) of what is normalised, or a loss."""
    places: list[tuple[int, Size]] = []
    for node in graph.nodes:
        place = _place_of_classes(node)
        if place is None or hint(place[1]) < min_vocab:
            continue
        if not any(place[0] == dim and equal(place[1], size) for dim, size in places):
            places.append(place)
    return places


def _place_of_classes(node: Node) -> tuple[int, Size] | None:
    if node.target in _EXPONENTIALS:
        example, dim = tensor_of(_edited(node)), -1
    else:
        spelled = spellings.read(node)
        if spelled is None or spelled[0].name not in _OVER_CLASSES:
            return None
        step, args = spelled
        example = tensor_of(args.get("input"))
        dim = 1 if step.is_loss else spellings.one_dim(args.get("dim", -1))
    rank = 0 if example is None else example.dim()
    if rank < 2 or not isinstance(dim, int) or not -rank <= dim < rank:
        return None
    return dim % rank - rank, example.shape[dim]  # type: ignore[union-attr]


def _has_classes(node: Node, places: list[tuple[int, Size]]) -> bool:
    example = tensor_of(node)
    if example is None or example.dim() < 2 or not example.is_floating_point():
        return False
    return any(-dim <= example.dim() and equal(example.shape[dim], size) for dim, size in places)


def _names(timeline: Timeline) -> dict[Any, list[Node]]:
    """The nodes that each memory is seen by, in order: what has several tensors sees that of each."""
    found: dict[Any, list[Node]] = {}
    for node in timeline.nodes:
        if tensor_of(node) is not None:
            found.setdefault(timeline.storage(node), []).append(node)
            continue
        value = node.meta.get("example_value")
        for each in tree_leaves(value) if isinstance(value, (list, tuple)) else ():
            if isinstance(each, torch.Tensor):
                found.setdefault(timeline.storage_of(each, node), []).append(node)
    return found


@dataclass
class Memory:
    """Some memory, and the nodes that see it, in order.

    Attributes:
        position: of the nodes of the graph, and of those that replace them.
        of_layers: whether a linear layer makes it, or none does that is seen but in parts.
    """

    timeline: Timeline
    position: dict[Node, int]
    names: list[Node]
    of_layers: bool = False

    def __post_init__(self) -> None:
        self.edits = self.timeline.edits(self.names[0])
        self.of = {name: name for name in self.names}  # the tensor that an edit gives back
        for edit in self.edits:
            self.of[edit] = self.of.get(_edited(edit), edit)

    def may_be_functional(self) -> bool:
        """Whether all edits may be functions, as far as can be known without these."""
        return self._is_own() and all(
            _may_have_function(edit)
            and _edited(edit) in self.names
            and self._keeps_gradient(edit)
            and self._is_seen_alone(edit)
            for edit in self.edits
        )

    def _is_own(self) -> bool:
        """Whether the memory is made by the first that sees it, and that is no linear layer."""
        first, examples = self.names[0], map(tensor_of, self.names)
        if first.op not in ("call_function", "call_method") or is_higher_order(first.target):
            return False
        if any(written_by(first)) or not all(e is None or is_plain_tensor(e) for e in examples):
            return False
        if self.of_layers:
            return _is_of_layer(first)
        return linear_layer(first, spellings.read(first)) is None or self._is_seen_in_parts(first)

    def _is_seen_in_parts(self, first: Node) -> bool:
        """Whether the first that sees the memory is read for views of parts of it alone."""
        views = [tensor_of(user) for user in first.users if user in self.names and user not in self.edits]
        whole = hint(example_of(first).numel())
        are_parts = all(view is not None and hint(view.numel()) < whole for view in views)
        return are_parts and len(views) == len(first.users)

    def _keeps_gradient(self, edit: Node) -> bool:
        """Whether what is edited has, where it is edited, the gradient that a function gives."""
        modes = [self.timeline.grad_mode(node) for node in (self.names[0], edit)]
        if INFERENCE in modes:
            return False
        examples = map(tensor_of, self.names)
        return modes[1] is True or not any(e is not None and e.requires_grad for e in examples)

    def _is_seen_alone(self, edit: Node) -> bool:
        """Whether none who reads the memory after an edit does so by another tensor from before that."""
        at, edited = self.position[edit], self.of[edit]
        others = [name for name in self.names if self.of[name] is not edited and self.position[name] < at]
        return all(self.position[user] <= at for name in others for user in name.users)


def _is_of_layer(node: Node) -> bool:
    """Whether a linear layer makes a tensor, or one of its sizes of which it is made."""
    while tensor_of(node) is not None and linear_layer(node, spellings.read(node)) is None:
        sources = (a for a in node.all_input_nodes if tensor_of(a) is not None)
        alike = [a for a in sources if same_shape(shape_of(a), shape_of(node))]
        if len(alike) != 1:
            return False
        node = alike[0]
    return tensor_of(node) is not None


class _NoFunctionError(Exception):
    """An edit for which there is no function."""


def _as_functions(graph: Graph, memory: Memory) -> None:
    """Replace all edits of some memory. Where one cannot be, nothing is changed."""
    made: list[tuple[Node, Node]] = []
    now: dict[Node, Node] = {}  # what a tensor is behind the last edit
    builds: list[Builder] = []
    try:
        with undone_on_error(builds):
            for edit in memory.edits:
                builds.append(Builder(graph, edit, like=edit))
                args = map_arg((edit.args, edit.kwargs), lambda n: now.get(memory.of.get(n, n), n))
                result = _function_of(builds[-1], edit, *args, memory.of_layers)
                if not _is_alike(memory.timeline, result, edit):
                    raise _NoFunctionError
                if edit.target not in ("fill_", "zero_"):
                    on = memory.timeline.grad_mode(edit) is True
                    builds[-1].tell_gradients(on)
                now[memory.of[edit]] = result
                made.append((edit, result))
    except _NoFunctionError:
        return
    for edit, result in reversed(made):
        _replace(memory, edit, result)
        graph.erase_node(edit)


def _replace(memory: Memory, edit: Node, result: Node) -> None:
    """Let all who read what is edited, after that, read what the function makes."""
    position = memory.position
    position[result] = position[edit]
    for name in [name for name in memory.names if memory.of[name] is memory.of[edit]]:
        name.replace_all_uses_with(result, delete_user_cb=lambda u: position.get(u, -1) > position[edit])


def _function_of(
    build: Builder, edit: Node, args: tuple[Any, ...], kwargs: dict[str, Any], columns: bool = False
) -> Node:
    """What an edit leaves; with `columns`, also of one that fills some of the last dimension."""
    if edit.target in ("fill_", "zero_") and example_of(args[0]).requires_grad:
        raise _NoFunctionError  # what is filled keeps a gradient, of 0
    if edit.target == "zero_":
        return build(torch.zeros_like, args[0])
    if edit.target == "fill_" and all(isinstance(v, (int, float)) for v in (*args[1:], *kwargs.values())):
        return build(torch.full_like, args[0], *args[1:], *kwargs.values())
    if edit.target is operator.setitem:
        x, index, value = args
        return _filled(build, x, index, value, columns)
    if edit.target in _ASKED:
        return build(edit.target, *args, **{**kwargs, "inplace": False})
    if edit.target not in _FUNCTIONS:
        raise _NoFunctionError
    return build(_FUNCTIONS[edit.target], *args, **kwargs)


def _filled(build: Builder, x: Node, index: Any, value: Any, columns: bool) -> Node:
    """x[mask] = number, of a mask of the first dimensions; or of columns."""
    if columns and is_number_of(value, example_of(x).dtype):
        of_columns = column_mask(build, index, example_of(x))
        if of_columns is not None:
            return build("masked_fill", x, of_columns, value)
    mask = index[0] if isinstance(index, tuple) and len(index) == 1 else index
    example, shape = tensor_of(mask), shape_of(x)
    is_mask = example is not None and example.dtype == torch.bool and example.dim() > 0
    if not is_mask or not is_number_of(value, example_of(x).dtype):
        raise _NoFunctionError
    own = shape_of(mask)
    if not same_shape(own, shape[: len(own)]):
        raise _NoFunctionError
    for _ in shape[len(own) :]:
        mask = build("unsqueeze", mask, -1)
    return build("masked_fill", x, mask, value)


def _is_as_given(edit: Node) -> bool:
    """Whether the function of an edit computes in the dtype that it is given, under any autocast."""
    made: Any = _FUNCTIONS.get(edit.target)
    return edit.target in _FILLS or getattr(made, "__name__", made) in _AS_GIVEN


def _is_alike(timeline: Timeline, result: Node, edit: Node) -> bool:
    """Whether a function makes what an edit leaves, which asks autocast for nothing."""
    a, b = example_of(result), example_of(_edited(edit))
    if a.dtype != b.dtype or a.device != b.device or not same_shape(a.shape, b.shape):
        return False
    examples = [example_of(n) for n in edit.all_input_nodes if tensor_of(n) is not None]
    is_cast = any(e.is_floating_point() and e.dtype != torch.float32 for e in examples)
    if is_cast and not _is_as_given(edit) and timeline.has_autocast(edit):
        return False
    if all(map(equal, a.stride(), b.stride())):
        return True
    is_part = not b.is_contiguous() and a.is_contiguous() and b._is_view()
    return is_part and not any(user.op == "output" for user in (*edit.users, *_edited(edit).users))
