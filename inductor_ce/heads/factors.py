"""Float32 factors of a head's products that are bfloat16 numbers: they are multiplied as these.

Recipes for reinforcement learning write `F.linear(hidden.float(), weight.float())`, so that logits are not
rounded. Libraries make the same float32 product of the 16-bit factors an order of magnitude faster.
"""

from __future__ import annotations

import torch
from torch.fx import Node

from ..graph.builder import Builder
from ..graph.shapes import example_of
from ..graph.walk import args_of
from ..ops.gemm import has_wide_products
from .find import Product
from .kinds import CAST, VIEWS


def has_16_bit_factors(products: list[Product]) -> bool:
    """Whether logits are float32 products of numbers that are bfloat16, where libraries have that."""
    z = example_of(products[0].node)
    if z.dtype != torch.float32 or not has_wide_products(z.device):
        return False
    factors = [factor for product in products for factor in (product.hidden, product.columns)]
    return all(_cast_before(factor)[0] is not None for factor in factors)


def in_16_bits(build: Builder, node: Node) -> Node:
    """The node, or what it was before it was cast to float32, if that is bfloat16."""
    cast, views = _cast_before(node)
    if cast is None:
        return node
    made = args_of(cast)[0]
    for view in reversed(views):
        made = build(view.target, made, *view.args[1:], **view.kwargs)
    return made


def _cast_before(node: Node) -> tuple[Node | None, list[Node]]:
    """(the cast of bfloat16 to float32 or None, the views of it that make the node, the last first)"""
    views = []
    while node.target in VIEWS:
        views.append(node)
        node = args_of(node)[0]
    if node.target != CAST or example_of(node).dtype != torch.float32:
        return None, []
    return (node, views) if example_of(args_of(node)[0]).dtype == torch.bfloat16 else (None, [])
