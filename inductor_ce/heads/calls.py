"""What nodes of a joint graph are given: their arguments by name, and the tensors that they stand for."""

from __future__ import annotations

import operator
from typing import NamedTuple

import torch
from torch.fx import Graph, Node

from .. import ops
from ..common.compat.distributed import ALL_GATHER
from ..graph.shapes import equal, shape_of
from ..graph.walk import args_of, reached, sources_of
from ..ops.group_rank import GROUP_RANK

aten = torch.ops.aten


class StatsCall(NamedTuple):
    """The arguments of `row_stats`."""

    z: Node
    labels: list[Node]
    weights: list[Node]
    which: str
    site: int = ops.NO_SITE

    @property
    def rows(self) -> ops.Rows:
        return ops.Rows.decode(self.which, len(self.labels), len(self.weights))


class GradCall(NamedTuple):
    """The arguments of `row_grad`."""

    z: Node
    labels: list[Node]
    weights: list[Node]
    m: Node
    coefficients: Node
    which: str
    site: int = ops.NO_SITE


class DivergenceCall(NamedTuple):
    """The arguments of `divergence`."""

    zs: list[Node]
    ms: list[Node]
    ds: list[Node]
    which: str


class DivergenceGradCall(NamedTuple):
    """The arguments of `divergence_grad`."""

    zs: list[Node]
    ms: list[Node]
    packed: Node
    upstream: Node
    which: str


def stats_call(node: Node) -> StatsCall:
    return StatsCall(*args_of(node), **node.kwargs)  # type: ignore[arg-type]


def grad_call(node: Node) -> GradCall:
    return GradCall(*args_of(node), **node.kwargs)  # type: ignore[arg-type]


def divergence_call(node: Node) -> DivergenceCall:
    return DivergenceCall(*args_of(node))


def divergence_grad_call(node: Node) -> DivergenceGradCall:
    return DivergenceGradCall(*args_of(node))


def normalisers_of(node: Node) -> list[Node]:
    """What a `divergence` reads of each row."""
    call = divergence_call(node)
    return [*call.ms, *call.ds]


def narrow_args(node: Node) -> list[Node]:
    """What a gradient is made of that has a number for each row, that which is linear in it last."""
    if node.target == ops.ROW_GRAD:
        return [grad_call(node).m, grad_call(node).coefficients]
    call = divergence_grad_call(node)
    return [*call.ms, call.packed, _unscattered(call.upstream)]


def _unscattered(node: Node) -> Node:
    """What was put in a place from which it is taken, as the derivative of a choice is."""
    if node.target == aten.select.int:
        scattered, *place = args_of(node)
        if scattered.target == aten.select_scatter.default and [*args_of(scattered)[2:]] == place:
            return args_of(scattered)[1]
    return node


def is_side_gradient(node: Node) -> bool:
    """Whether a node is what a `divergence_grad` makes for one side."""
    return node.target == operator.getitem and args_of(node)[0].target == ops.DIVERGENCE_GRAD


def is_row_gradient(node: Node) -> bool:
    """Whether a node is what one of the operators makes of one set of logits, which may lie over these."""
    if node.target == operator.getitem:
        return args_of(node)[0].target in (ops.ROW_STATS_GRAD, ops.SOME_ROW_STATS_GRAD)
    return node.target in (ops.ROW_GRAD, ops.SOME_ROW_GRAD)


def exchanges(stats: list[Node]) -> list[Node]:
    """The nodes by which ranks exchange statistics, which are several rows of as many.

    What else ranks gather of a loss, such as the losses of all of them for a log, is none.
    """
    n = shape_of(stats[0])[-1]
    gathers = (node for node in reached(stats, lambda node: node.users) if node.target == ALL_GATHER)
    shapes = ((node, shape_of(args_of(node)[0])) for node in gathers)
    return [node for node, shape in shapes if len(shape) == 2 and shape[0] != 1 and equal(shape[1], n)]


def ranks_are_alike(stats: list[Node]) -> bool:
    """Whether all ranks that exchange these statistics, if any, are known to have as many columns.

    Then they have the same graph. It is the rank by which a label is moved to these columns that tells.
    """

    def sources(node: Node) -> list[Node]:
        return stats_call(node).labels if node in stats else sources_of(node)

    for gather in exchanges(stats):
        _, _, group = args_of(gather)
        ranks = [args_of(node) for node in reached([gather], sources) if node.target == GROUP_RANK]
        alike = [is_equal for _, of, is_equal in ranks if of == group]
        if not alike or not all(alike):
            return False
    return True


_PIECES = {
    *(aten.view.default, aten.reshape.default, aten.unsqueeze.default, aten.permute.default),
    *(aten.slice.Tensor, aten.select.int, aten.split.Tensor, aten.split_with_sizes.default, operator.getitem),
    *(aten.clone.default, aten.detach.default, aten.alias.default, aten._unsafe_view.default),
}


def is_divergence(node: Node) -> bool:
    """Whether a node is a divergence, or a piece or view of what one reads."""

    def readers(node: Node) -> list[Node]:
        return list(node.users) if node.target in _PIECES else []

    return any(reader.target == ops.DIVERGENCE for reader in reached([node], readers))


PLANNED = "inductor_ce_planned"  # in the meta of a `row_stats`: its head has been planned


def is_planned(node: Node) -> bool:
    return PLANNED in node.meta


def forget_sites(graph: Graph) -> None:
    """Let operators carry no site, and be known to have a plan, if the pass comes again."""
    for target in (ops.ROW_STATS, ops.ROW_GRAD):
        for node in graph.find_nodes(op="call_function", target=target):
            node.kwargs = {}
            node.meta[PLANNED] = True
