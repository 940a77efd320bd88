"""Arrange: logits as [N, V], what is indexed by rows as [N], and [N] values as the user has his rows."""

from __future__ import annotations

import operator

import torch
import torch.nn.functional as F
from torch.fx import Node

from .. import ops
from ..common.compat.graphs import is_dtensor
from ..distributed.placements import padded
from ..graph.builder import Builder
from ..graph.shapes import Size, constant, same_shape, shape_of, tensor_of
from ..graph.timeline import Timeline
from ..reading import spellings
from ..reading.row_views import Index, Permute, Reshape, RowView, row_shape
from ..reading.values import Label, Logits, Outside, Reading
from .rematerialise import made_before

# The label of rows that a slice cut off. Any column will do: nothing is made of what is picked there.
ANY_LABEL = 0
# In the `meta` of what fills rows up that were cut off: nobody reads anything of these.
PADS_ROWS = "inductor_ce_pads_rows"


def flat_logits(build: Builder, reading: Reading, logits: Logits, place: int, vocab_size: int) -> Node:
    """The logits [N, V].

    Reshaped before the pointwise chain that leads to them, not after: the reshape of a result stands
    between a template and the derivative of the chain, which then is a second kernel in torch 2.11. Logits
    that a divergence reads too are what it reads: both gradients are added before the chain rounds them.
    """
    node, axis = logits.node, logits.axis
    rank = len(shape_of(node))
    if rank == 2 and axis == 1:
        return made_before(build, reading, node, place)
    links = [] if _is_side(node) else _chain(reading.timeline, node, place)
    flat = made_before(build, reading, links[0].all_input_nodes[0] if links else node, place)
    if axis != rank - 1:
        flat = build(torch.movedim, flat, axis, -1)
    if rank != 2:
        flat = build("reshape", flat, -1, vocab_size)
    for link in links:
        flat = build.again(link, flat)
    return flat


def _is_side(node: Node) -> bool:
    """Whether a divergence reads a tensor, or all of it as rows."""
    readers = [u for user in node.users for u in (user, *(user.users if user.target == "reshape" else ()))]
    return any(reader.target == ops.DIVERGENCE for reader in readers)


def _chain(timeline: Timeline, node: Node, place: int) -> list[Node]:
    """The elementwise nodes of one tensor and numbers that lead to `node`, first to last."""
    links: list[Node] = []
    read_at, mode = place, timeline.grad_mode(place)
    while (source := elementwise_source(node)) is not None:
        at = timeline.position[node]
        same_modes = timeline.grad_mode(at) == mode and timeline.same_autocast(at, place)
        as_made = timeline.unchanged(node, node, read_at)
        if not (same_modes and as_made and timeline.unchanged(source, at, place)):
            break
        links.insert(0, node)
        node, read_at = source, at
    return links


def elementwise_source(node: Node) -> Node | None:
    """The floating tensor of which a node is a function of each element, beside numbers, on its device."""
    step = spellings.step_of(node)
    if step is None or not step.in_chain or len(node.all_input_nodes) != 1:
        return None
    if any(isinstance(a, torch.memory_format) for a in (*node.args, *node.kwargs.values())):
        return None
    source = node.all_input_nodes[0]
    a, b = tensor_of(source), tensor_of(node)
    alike = a is not None and b is not None and a.device == b.device and a.is_floating_point()
    return source if alike and same_shape(shape_of(source), shape_of(node)) else None


def flat_labels(build: Builder, node: Node, label: Label, vocab_size: int) -> Node:
    """The labels [N], or [N, K], in the order of the logits' rows, ANY_LABEL in rows that were cut off."""
    steps, kept = _needed_steps(label.steps), label.kept
    classes = () if label.width == 1 else (label.width,)
    if label.column is not None:
        node, kept = build("select", node, kept, label.column), None
    if tensor_of(node).dtype not in (torch.int32, torch.int64):  # type: ignore[union-attr]
        node = build("long", node)  # the bounds of V must be representable
    if label.wraps == "modulo":
        node = build(torch.remainder, node, vocab_size)
    elif label.wraps:
        node = build(torch.where, build(torch.lt, node, 0), build(torch.add, node, vocab_size), node)
    if classes and kept != len(shape_of(node)) - 1:
        node = build(torch.movedim, node, kept, -1)
    elif steps and kept is not None and not classes:
        node = build("squeeze", node, kept)
    node = _undo(build, node, steps, classes)
    return node if len(shape_of(node)) == 1 + len(classes) else build("reshape", node, -1, *classes)


def fixed_labels(build: Builder, logits: Logits, column: int | None) -> Node:
    """Labels [N] that are `column` everywhere, or the number of the row if it is None."""
    if column is None:
        (count,) = row_sizes(build, logits.node, logits.axis)
        return build(torch.arange, count, device=tensor_of(logits.node).device)  # type: ignore[union-attr]
    of_rows = build("select", logits.node, logits.axis, 0)
    return build("reshape", build(torch.full_like, of_rows, column, dtype=torch.int64), -1)


def flat_outside(build: Builder, node: Node, outside: Outside, vocab_size: int) -> Node:
    """A tensor from outside: [N, V], [V], [N] or a number. Rows that were cut off hold 0."""
    if outside.kind == "scalar":
        return build("reshape", node, []) if shape_of(node) else node
    if outside.kind == "classes":
        return node if len(shape_of(node)) == 1 else build("reshape", node, -1)
    axis, steps = outside.axis, _needed_steps(outside.steps)
    assert axis is not None
    if outside.kind == "columns":
        rank = len(shape_of(node))
        axis -= len(shape_of(outside.like)) - rank
        if axis != rank - 1:
            node = build(torch.movedim, node, axis, -1)
        node = _undo(build, node, steps, (vocab_size,))
        return node if len(shape_of(node)) == 2 else build("reshape", node, -1, vocab_size)
    sizes = [1 if i == axis else size for i, size in enumerate(_sizes(build, outside.like))]
    if len(shape_of(node)) != len(sizes) or sizes != list(shape_of(node)):
        node = build("expand", node, *sizes)
    node = _undo(build, build("squeeze", node, axis), steps, ())
    return node if len(shape_of(node)) == 1 else build("reshape", node, -1)


def _sizes(build: Builder, node: Node) -> list[int | Node]:
    return [size_of(build, node, i) for i in range(len(shape_of(node)))]


def _needed_steps(steps: tuple[RowView, ...]) -> tuple[RowView, ...]:
    """Reshapes matter only where a transpose or a slice follows or comes before."""
    return steps if any(not isinstance(s, Reshape) for s in steps) else ()


def _undo(build: Builder, node: Node, steps: tuple[RowView, ...], classes: tuple[int, ...]) -> Node:
    """Rows as they were before `steps`; `classes` is the size of the axis that stands behind them, if any."""
    for step in reversed(steps):
        node = _undo_step(build, node, step, classes)
    return node


def _undo_step(build: Builder, node: Node, step: RowView, classes: tuple[int, ...]) -> Node:
    if isinstance(step, Reshape):
        return build("reshape", node, [*row_sizes(build, step.source, step.source_axis), *classes])
    if isinstance(step, Permute):
        order = [step.order.index(i) for i in range(len(step.order))]
        return build("permute", node, order + [len(order)] * len(classes))
    if isinstance(step, Index):
        node = build("unsqueeze", node, step.dim)
        outer = [0, 0] * (len(shape_of(node)) - 1 - step.dim)
        return _padded(build, node, [*outer, step.at, step.size - 1 - step.at])
    pads = [p for pair in zip(reversed(step.left), reversed(step.right), strict=True) for p in pair]
    return _padded(build, node, [0, 0] * len(classes) + pads)


def _padded(build: Builder, node: Node, pads: list[int]) -> Node:
    made = build(padded if is_dtensor(tensor_of(node)) else F.pad, node, pads, value=ANY_LABEL)
    made.meta[PADS_ROWS] = True
    return made


def arranged(build: Builder, flat: Node, logits: Logits, steps: tuple[RowView, ...]) -> Node:
    """[N], or [N, K], values of the rows of the logits, arranged as `steps` say."""
    node, behind = flat, list(shape_of(flat)[1:])
    sizes = row_shape(logits.node, logits.axis)
    if len(sizes) != 1 and not (steps and isinstance(steps[0], Reshape)):
        node = build("reshape", node, [*row_sizes(build, logits.node, logits.axis), *behind])
    for step, following in zip(steps, (*steps[1:], None), strict=False):
        if not (isinstance(step, Reshape) and isinstance(following, Reshape)):
            node = _do_step(build, node, step, behind)
    return node


def _do_step(build: Builder, node: Node, step: RowView, behind: list[Size]) -> Node:
    if isinstance(step, Reshape):
        if len(row_shape(step.result, step.result_axis)) == len(shape_of(node)) - len(behind) == 1:
            return node
        return build("reshape", node, [*row_sizes(build, step.result, step.result_axis), *behind])
    if isinstance(step, Permute):
        return build("permute", node, [*step.order, *range(len(step.order), len(step.order) + len(behind))])
    if isinstance(step, Index):
        return build("select", node, step.dim, step.at)
    cut = tuple(_range(left, right) for left, right in zip(step.left, step.right, strict=True))
    return build(operator.getitem, node, cut)


def _range(left: int, right: int) -> slice:
    return slice(left or None, -right if right else None)


def row_sizes(build: Builder, node: Node, axis: int | None) -> list[int | Node]:
    """The sizes of `node` without the vocabulary, as numbers where they are, else read off the tensor."""
    return [size_of(build, node, i) for i in range(len(shape_of(node))) if i != axis]


def size_of(build: Builder, node: Node, dim: int) -> int | Node:
    """A size as a number, or as a node where it is symbolic, read off a tensor that there is by then."""
    size = shape_of(node)[dim]
    if (number := constant(size)) is not None:
        return number
    if not build.comes_after(node):
        node, dim = build.of_size(size) or (node, dim)  # type: ignore[arg-type]
    return build("size", node, dim)


def first_size(build: Builder, node: Node) -> int | Node:
    """The size of the first dimension."""
    return size_of(build, node, 0)
