"""Kinds of nodes of a joint graph, and what they do to rows and classes."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch.fx import Node

from ..common.compat.graphs import OpOverload
from ..graph.shapes import equal, shape_of, tensor_of
from ..graph.walk import args_of

aten, prims = torch.ops.aten, torch.ops.prims

ORDERED_VIEWS = {
    *(aten.view.default, aten.reshape.default, aten._unsafe_view.default, aten.alias.default),
    *(aten.unsqueeze.default, aten.squeeze.dim, aten.squeeze.dims, aten.squeeze.default),
}
PERMUTATIONS = {aten.permute.default, aten.transpose.int, aten.t.default}
VIEWS = ORDERED_VIEWS | PERMUTATIONS
CAST = prims.convert_element_type.default
COPIES = {CAST, aten._to_copy.default, aten.clone.default, aten.detach.default}
SUMS = {aten.sum.default, aten.sum.dim_IntList}
PRODUCTS = {aten.mm.default, aten.addmm.default, aten.bmm.default, aten.baddbmm.default}

# What a product, or a sum, makes of the gradient of the logits.
HIDDEN, WEIGHT, WEIGHT_T, BIAS, ROW_SUMS = "hidden", "weight", "weight_t", "bias", "row sums"


def vocab_axis(node: Node) -> int | None:
    """The last dimension that is not of size 1."""
    return next((i for i, s in reversed(list(enumerate(shape_of(node)))) if not equal(s, 1)), None)


def is_pointwise(node: Node) -> bool:
    """Whether each element of a node is made of those in its place: arithmetic, casts, copies."""
    if node.op != "call_function":
        return False
    if node.target in COPIES:
        return True
    return isinstance(node.target, OpOverload) and torch.Tag.pointwise in node.target.tags


def is_ordered_view(node: Node) -> bool:
    """Whether a node has all elements of its source in their order."""
    if node.op != "call_function":
        return False
    if node.target in ORDERED_VIEWS:
        return True
    if node.target == aten.expand.default:
        return is_of_size(args_of(node)[0], count_of(node))
    return node.target in PERMUTATIONS and _moves_ones_only(node)


def unviewed(node: Node) -> Node:
    """What a node is a view of, with all elements in their order."""
    while is_ordered_view(node):
        node = args_of(node)[0]
    return node


def _moves_ones_only(node: Node) -> bool:
    kept = [dim for dim in permutation(node) if not equal(shape_of(args_of(node)[0])[dim], 1)]
    return kept == sorted(kept)


def permutation(node: Node) -> list[int]:
    """Which dimension of the source each dimension of a permutation is."""
    rank = len(shape_of(node))
    order = list(range(rank))
    if node.target == aten.permute.default:
        return [dim % rank for dim in args_of(node)[1]]
    one, other = (0, 1) if node.target == aten.t.default else args_of(node)[1:]
    if rank >= 2:
        order[one], order[other] = order[other], order[one]
    return order


def is_transposed(node: Node) -> bool:
    """[V, N] or [1, V, N] of [N, V] or [1, N, V]."""
    if node.target not in PERMUTATIONS:
        return False
    order = permutation(node)
    return order in ([1, 0], [0, 2, 1])


def is_batched(product: Node) -> bool:
    """Whether it is more than one product."""
    return len(shape_of(product)) == 3 and not equal(shape_of(product)[0], 1)


def summed_dims(node: Node) -> tuple[set[int], bool]:
    """(the dimensions that a sum sums over, whether it keeps them)"""
    source, *given = args_of(node)
    dims, keepdim = (*given, None, False)[:2]
    rank = len(shape_of(source))
    return {dim % rank for dim in dims or range(rank)}, bool(keepdim)


def count_of(node: Node) -> Any:
    return math.prod(shape_of(node))


def is_of_size(node: Node, size: Any) -> bool:
    return tensor_of(node) is not None and equal(count_of(node), size)


def exit_kind(user: Node, source: Node) -> str:
    """What a node makes of the gradient of the logits, or of its transpose; "" for any other node."""
    if user.target in (aten.mm.default, aten.bmm.default):
        left, right = user.args
        if left is right or is_batched(user):
            return ""
        if is_transposed(source):
            return WEIGHT if left is source else ""
        return HIDDEN if left is source else WEIGHT_T
    if user.target in SUMS and not user.kwargs and not is_transposed(source):
        axis, (dims, _) = vocab_axis(source), summed_dims(user)
        if axis in dims:
            return ROW_SUMS
        rows = {i for i, s in enumerate(shape_of(source)) if i != axis and not equal(s, 1)}
        return BIAS if rows <= dims else ""
    return ""
