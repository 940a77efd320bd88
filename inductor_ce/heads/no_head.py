"""Why logits have no head that can be divided, in words, and the products that they are looked for at."""

from __future__ import annotations

import operator

import torch
from torch.fx import Node

from .. import ops
from ..graph.shapes import constant, equal, shape_of
from ..graph.walk import args_of, reached
from .calls import is_divergence, stats_call
from .kinds import (
    PERMUTATIONS,
    PRODUCTS,
    VIEWS,
    count_of,
    is_batched,
    is_of_size,
    is_ordered_view,
    is_pointwise,
    is_transposed,
)

aten = torch.ops.aten
_CUTS = (aten.slice.Tensor, aten.select.int, operator.getitem)
_SPLITS = (aten.split.Tensor, aten.split_with_sizes.default, aten.unbind.int)

BOTH_WAYS = (
    "the rows and the columns of one product are both normalised, and a piece of it has parts of one or of "
    "the other only; of two products, one for each direction, each would be a head"
)
BATCHED = (
    "the logits are a batched product, each of whose matrices has a weight of its own; "
    "of a loop over them, each step would be a head"
)
SIDE_WHOLE = "the logits of another side of a divergence are whole: "
NO_PRODUCT = "no linear layer makes them row by row"
DIVIDED = (
    "each row that a linear layer makes is divided into several rows of logits; "
    "of layers for each, each would be a head"
)
RANGE = (
    "the logits are a range of a linear layer's columns, of which others are read as well; "
    "of layers for each range, each would be a head"
)
ROWS = (
    "the logits are a part of a linear layer's rows, and the other parts are not put together with it; "
    "of hidden states that are cut instead, it would be a head"
)
SYMBOLIC_ROWS = (
    "the logits are a part of a linear layer's rows, and parts are put together only where it is a number "
    "how many rows each leaves out, as under dynamic=False; of hidden states that are cut instead, it would "
    "be a head"
)
CONVOLUTION = (
    "a convolution makes the logits; one of size 1 is F.linear(hidden, weight.flatten(1)) "
    "of hidden states whose channels are last, which would be a head"
)
JOINED = (
    "the logits are put together of what several products make, which are not of one linear layer, or are "
    "read elsewhere too; of each, a loss would be a head"
)
TRANSPOSED = "the logits are the transpose of a product; its factors the other way round, it would be a head"


def products_before(node: Node) -> set[Node]:
    """The products at the root of views and pointwise nodes."""
    found: set[Node] = set()
    stack, seen = [node], {node}
    size = count_of(node)
    while stack:
        node = stack.pop()
        if node.target in PRODUCTS:
            found.add(node)
        elif is_ordered_view(node) or is_pointwise(node):
            sources = [s for s in node.all_input_nodes if s not in seen and is_of_size(s, size)]
            stack += sources
            seen.update(sources)
    return found


def why_no_product(stats: Node) -> str:
    """Why there is none at the root of views and pointwise nodes."""

    def before(node: Node) -> list[Node]:
        return node.all_input_nodes if node.target in VIEWS or is_pointwise(node) else []

    size = count_of(stats_call(stats).z)
    found = [*reached([stats_call(stats).z], lambda node: [s for s in before(node) if is_of_size(s, size)])]
    products = {node for node in found if node.target in PRODUCTS}
    if any(node.target is aten.convolution.default for node in found):
        return CONVOLUTION
    if not products:
        cuts = [reason for node in found if (reason := _cut_of_product(node))]
        joined = [JOINED for node in found if _is_joined_of_products(node)]
        return next(iter(cuts + joined), "no linear layer in the graph makes the logits")
    if any(map(is_batched, products)):
        return BATCHED
    if any(node.target in PERMUTATIONS and not is_transposed(node) for node in found):
        return "rows or classes change places between a product and the logits"
    others = stats.graph.find_nodes(op="call_function", target=ops.ROW_STATS)
    straight = any(products_before(stats_call(other).z) == products for other in others)
    return BOTH_WAYS if straight else TRANSPOSED


def _is_joined_of_products(node: Node) -> bool:
    """Whether a node puts rows together that products make, views and pointwise nodes between."""
    return node.target is aten.cat.default and all(map(products_before, node.all_input_nodes))


def _cut_of_product(node: Node) -> str:
    """Of which cut of what a product makes a node is, views and pointwise nodes between; "" where of none."""
    if node.target not in _CUTS:
        return ""
    source = args_of(node)[0]
    while source.target in (*_SPLITS, *_CUTS):
        source = args_of(source)[0]
    products = products_before(source) if isinstance(source.meta.get("val"), torch.Tensor) else set()
    if not products:
        return ""
    classes = shape_of(node)[-1]
    if not equal(shape_of(source)[-1], classes):
        return RANGE
    if not all(equal(shape_of(each)[-1], classes) for each in products):
        return DIVIDED
    return ROWS if all(constant(size) is not None for size in shape_of(source)) else SYMBOLIC_ROWS


def escape(user: Node) -> str:
    """Why logits that `user` reads are whole."""
    if user.op == "output":
        return "the logits are returned"
    if is_divergence(user):
        return "a divergence reads the logits, or pieces of them, beside others"
    if any(node.target == ops.ROW_STATS for node in reached([user], _read_by)):
        if is_transposed(user):
            return BOTH_WAYS
        if is_ordered_view(user):
            return DIVIDED
    name = getattr(user.target, "__name__", str(user.target)).split(".")[0]
    return f"the logits, or their gradient, are read by {name} as well"


def _read_by(node: Node) -> list[Node]:
    return list(node.users) if node.target in VIEWS or is_pointwise(node) else []
