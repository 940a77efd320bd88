"""Token chunks as one operator: see `ops/chunks.py`."""

from __future__ import annotations

import importlib.util
import operator
from typing import Any

import torch
from torch.fx import Node

from ..graph.shapes import example_of
from ..graph.walk import args_of
from ..ops.chunks import CHUNKS
from .exits import Exits
from .facts import Facts
from .find import Head
from .gradients import Exit
from .kinds import BIAS, HIDDEN, WEIGHT, WEIGHT_T
from .pieces import Pieces
from .ranges import Range
from .read_once import read_once
from .row_programs import OfRows

DEVICES = ("cuda",)


def is_offered(head: Head, facts: Facts) -> bool:
    """Whether there is such an operator for a head of which the device looks at how many rows are computed.

    There is where one kernel makes a chunk's statistics and gradient, and where that gradient is read for
    hidden states, weight and bias alone, and for one of each.
    """
    device, kinds = example_of(head.product).device, [_KINDS.get(kind) for kind in head.exits.values()]
    if device.type not in DEVICES or torch.version.hip or not importlib.util.find_spec("triton"):
        return False
    if None in kinds or len(set(kinds)) < len(kinds):
        return False
    once = read_once(head, facts)
    return once is not None and all(example_of(x).device == device for x in once.program.given)


_KINDS = {HIDDEN: HIDDEN, WEIGHT: WEIGHT, WEIGHT_T: WEIGHT, BIAS: BIAS}


def by_one_operator(
    pieces: Pieces, chunks: list[Range], exits: Exits, program: OfRows, chain: str
) -> tuple[dict[Node, list[Node]], list[Node]]:
    """(the only statistics, by their node, what is made by then) of a head for which it `is_offered`.

    The program is given nodes as the forward has them.
    """
    found = hidden, weight, bias = exits.of_each_kind()
    build, node = pieces.build, _call(pieces, chunks, program, chain, found)
    made = [build(operator.getitem, node, i) for i in range(len(node.meta["val"]))]
    stats, *others = made
    if pieces.packing is not None:
        pieces.packing.place = others.pop()
    if bias is not None:
        bias.is_made(others.pop())
    if hidden is not None:
        hidden.is_made(others.pop(0))
    if weight is not None:
        weight.is_made(*others)
    return {pieces.head.stats[0]: [stats]}, made


def _call(
    pieces: Pieces,
    chunks: list[Range],
    program: OfRows,
    chain: str,
    gradients: tuple[Exit | None, Exit | None, Exit | None],
) -> Node:
    (product,), (stats,), packing = pieces.head.products, pieces.head.stats, pieces.packing
    hidden, weight, bias = gradients
    a, b, own = pieces.factors_of(product)
    _, labels, weights, which = args_of(stats)[:4]
    text = program.program if packing is None else program.program.where_given()
    of_loss = labels, weights, [*program.given], which, text.encode(), [piece.end for piece in chunks]
    counts = None if packing is None else packing.counts
    operands = (None if each is None else each.operand for each in (hidden, weight))
    but, often = ([], 0) if weight is None else weight.beside
    named: dict[str, Any] = {"chain": chain} if chain else {}
    named |= dict(zip(["logits"], own, strict=False))
    named |= {} if hidden is None else {"hidden": hidden.sum_dtype}
    named |= {} if weight is None else {"weight": weight.sum_dtype}
    last = but, often, bias is not None
    return pieces.build(CHUNKS, a, b, product.bias, *of_loss, counts, *operands, *last, **named)
