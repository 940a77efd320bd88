"""Products of two matrices whose rows are the classes, turned: a b^T, normalised along the first dimension.

They are the transpose of b a^T, whose classes are its columns: that is a head, and the logits of all rows
need not be in memory. A product that is normalised along both dimensions is left.
"""

from __future__ import annotations

import itertools
from collections import defaultdict

import torch
import torch.nn.functional as F
from torch.fx import Graph, Node

from .. import algebra
from ..common.failsafe import attempt
from ..common.options import Options
from ..graph.builder import Builder, undone_on_error
from ..graph.shapes import example_of, hint, shape_of, tensor_of
from ..graph.timeline import INFERENCE, written_by
from ..reading import spellings
from ..reading.values import LossValue, Reading, RowValue, row_expr
from .escapes import is_of_each
from .linear_layers import plain_layer
from .normalisers import is_read_by_others, needed_beside

LEFT = "the transpose of a product is left as it was"


def turn_products(graph: Graph, reading: Reading, options: Options) -> bool:
    """Turn those of a graph that may be. Returns whether there are any."""
    axes: dict[Node, set[int]] = defaultdict(set)
    logits = set()
    for value in reading.values.values():
        if isinstance(value, (RowValue, LossValue)) and algebra.is_normalised(row_expr(value)):
            product, axis = _product(value.logits.node, value.logits.axis)
            axes[product].add(axis)
            logits.add(value.logits.node)
    found = [z for z, along in axes.items() if along == {0} and _may_be(reading, z, options)]
    return bool([z for z in found if attempt(LEFT, _turn, graph, z, logits)[1] is None])


def _may_be(reading: Reading, z: Node, options: Options) -> bool:
    if len(shape_of(z)) != 2 or hint(shape_of(z)[0]) < options.min_vocab:
        return False
    layer, timeline = plain_layer(z), reading.timeline
    if layer is None or layer.target is torch.addmm or layer.args[2:] not in ((), (None,)):
        return False
    if not all(isinstance(a, Node) and len(shape_of(a)) == 2 for a in layer.args[:2]):
        return False
    if timeline.grad_mode(z) == INFERENCE:
        return False
    unedited = timeline.unchanged(z, z)
    return unedited and not is_read_by_others(reading, z, needed_beside(reading, set()))


def _turn(graph: Graph, z: Node, logits: set[Node]) -> None:
    """Scales and the like between the product and logits are made before it is transposed."""
    layer = plain_layer(z)
    assert layer is not None
    hidden, weight = layer.args[:2]
    chain = [z]
    while chain[-1] not in logits and (user := _scaled(chain[-1])) is not None:
        chain.append(user)
    last = chain[-1]
    build = Builder(graph, last, like=z)
    with undone_on_error([build]):
        columns = weight if layer.target is F.linear else _transposed(build, weight)
        made = build(torch.matmul, columns, _transposed(build, hidden))
        for source, node in itertools.pairwise(chain):
            made = build.again(node, {source: made})
        result = build("t", made)
        build.tell_gradients(example_of(z).requires_grad)
    last.replace_all_uses_with(result)
    for node in reversed(chain):
        graph.erase_node(node)


def _scaled(node: Node) -> Node | None:
    """What alone reads a node, if it is made of that and of numbers."""
    user = next(iter(node.users))
    step = spellings.step_of(user)
    alone = len(node.users) == 1 and user.all_input_nodes == [node] and not any(written_by(user))
    return user if alone and step is not None and step.in_chain else None


def _product(node: Node, axis: int) -> tuple[Node, int]:
    """What a matrix is made of, element by element, and the dimension there that is `axis` here."""
    while plain_layer(node) is None:
        tensors = [a for a in node.all_input_nodes if tensor_of(a) is not None]
        wide = [a for a in tensors if len(shape_of(a)) == 2 and is_of_each(node, a)]
        moves = [a for a in wide if example_of(a).requires_grad] if len(wide) > 1 else wide
        step = spellings.step_of(node)
        turns = _source(node) is not None
        if len(moves) != 1 or (step is not None and step.view is not None and not turns):
            break
        axis = 1 - axis if turns else axis
        (node,) = moves
    return node, axis


def _source(node: Node) -> Node | None:
    """The matrix of which a matrix is the transpose."""
    spelled = spellings.read(node)
    if spelled is None or spelled[0].name not in ("transpose", "transposed"):
        return None
    dims = {spelled[1].get("dim0", 0) % 2, spelled[1].get("dim1", 1) % 2}
    source: Node = spelled[1]["input"]
    return source if len(shape_of(source)) == 2 and dims == {0, 1} else None


def _transposed(build: Builder, node: Node) -> Node:
    return _source(node) or build("t", node)
