"""The gradient of logits that are whole, made with their statistics: one kernel reads them once for both.

A gradient that a backward makes is linear in what comes from above. If that is one scalar, the forward can
make the gradient for 1, and the backward multiply it: by a kernel that reads the scalar on the GPU, and
nothing else where it is 1, as it is for a loss that is not scaled. Where it is not, the gradient is read,
rounded and written once more, so that all is more passes than with a gradient made in the backward. The
gradient, [N, V], is in memory from the forward on.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable

import torch
from torch.fx import Node

from .. import ops
from ..common.compat.graphs import is_tangent
from ..graph.builder import Builder
from ..graph.shapes import example_of, shape_of
from ..graph.walk import reached
from ..ops.one_read import is_offered
from ..ops.products import TIMES
from . import sizes
from .between import Early, program_between, scalar_of
from .calls import stats_call
from .chained import Around, chain_around
from .find import Head, NoHead, Product
from .gradients import scaled
from .kinds import PERMUTATIONS, is_ordered_view, is_pointwise, unviewed
from .plan import OUT_OF_RANGE
from .proof import Proof

aten = torch.ops.aten

_NO_MEMORY = {aten.slice.Tensor, aten.select.int, aten.expand.default, *PERMUTATIONS}


def with_statistics(build: Builder, stats: Node, is_wanted: bool) -> dict[Node, Node]:
    """What stands for a `row_stats`, and for the `row_grad` of its logits.

    Args:
        build: makes the nodes.
        stats: of logits that are whole.
        is_wanted: whether the forward is to make what is multiplied in the backward.

    Raises:
        NoHead: the gradient is made apart; why.
    """
    call = stats_call(stats)
    grad = _only_gradient(unviewed(call.z), stats)
    if "recompute" in stats.meta:
        raise NoHead("a checkpoint makes the logits again in the backward, and holds nothing of their size")
    around = chain_around(stats, grad)
    if around is None or around.root.target in _NO_MEMORY:
        raise NoHead(
            "the logits are not in memory as they are, but behind a chain of tensors or within others"
        )
    if around.chain:
        _only_gradient(around.root, stats)
    v, dtype = shape_of(call.z)[1], example_of(around.root).dtype
    if not isinstance(v, int) or not is_offered(dtype, v, call.rows):
        raise NoHead("one kernel for both is not faster than two")
    proof = Proof(Head([Product(call.z, call.z, call.z, None)], wide=[grad], stats=[stats]))
    if proof.why_not:
        raise NoHead(proof.why_not)
    scale = scalar_of(build, proof.factor)
    if scale is not None and not is_wanted:
        raise NoHead("what it is multiplied with is known in the backward")
    if scale is not None and dtype == torch.float16:
        raise NoHead(OUT_OF_RANGE)
    packed, dz = _both(build, stats, grad, around, proof)
    if scale is not None and all(is_tangent(node) for node, _ in proof.factor):
        dz = build(TIMES, dz, scale)
    elif scale is not None:
        dz = scaled(build, dz, scale, of_rows=True)
    return {stats: packed} | {node: _in_shape(build, dz, node) for node in around.gradients}


def _in_shape(build: Builder, dz: Node, node: Node) -> Node:
    """The gradient, [N, V], as a node has it."""
    if len(shape_of(node)) == 2:
        return dz
    size = sizes.of_shape(node.graph, shape_of(node))
    if size is None:
        raise NoHead("the gradient has sizes that depend on data")
    return build(aten.reshape.default, dz, size)


def _only_gradient(base: Node, stats: Node) -> Node:
    """The `row_grad` of the only loss of the logits, which others may read for something else."""

    def readers(node: Node) -> Iterable[Node]:
        return node.users if node is base or is_ordered_view(node) or is_pointwise(node) else ()

    found = [node for node in reached([base], readers) if node.target in (ops.ROW_STATS, ops.ROW_GRAD)]
    others = [node for node in found if node is not stats]
    if not others:
        raise NoHead("no gradient is wanted")
    if len(others) > 1 or others[0].target != ops.ROW_GRAD:
        raise NoHead("several losses read the logits, each of which would hold a gradient")
    return others[0]


def _both(build: Builder, stats: Node, grad: Node, around: Around, proof: Proof) -> tuple[Node, Node]:
    """The statistics, and the gradient for a factor of 1."""
    call = stats_call(stats)
    found = program_between(stats, grad, proof.facts)
    if found is None:
        raise NoHead("what is made of the statistics is not a program of each row")
    program, nodes = found
    program = Early(build, nodes, proof.facts).given(program)
    text = program.program.encode()
    z, chained = call.z, {}
    if around.chain:
        z = build(aten.reshape.default, around.root, [-1, shape_of(call.z)[1]])
        chained = {"chain": around.chain}
    given = call.labels, call.weights, call.which, list(program.given), text
    both = build(ops.ROW_STATS_GRAD, z, *given, **chained)
    return build(operator.getitem, both, 0), build(operator.getitem, both, 1)
