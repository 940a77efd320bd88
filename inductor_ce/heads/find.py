"""Find heads in a joint graph: the linear layer before `row_stats`, and all that is made of its logits.

    z = product(hidden, columns) -> views and pointwise nodes -> row_stats
    row_grad -> views and pointwise nodes -> the products that make gradients of it

A `divergence` reads the logits of several *sides*, each of a linear layer of its own. Together they are one
head: a piece has the same rows of all sides.

A node of a head whose size is that of the logits is *wide*. All wide nodes are [N, V] in the same order, with
whatever views between them, so that any of them can be made for a few rows or for a few columns.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch.fx import Graph, Node

from .. import ops
from ..graph.shapes import equal, hint, shape_of
from ..graph.walk import args_of
from ..ops.divergences import decode
from .calls import (
    divergence_call,
    grad_call,
    is_planned,
    is_side_gradient,
    stats_call,
)
from .kinds import (
    count_of,
    exit_kind,
    is_batched,
    is_of_size,
    is_ordered_view,
    is_pointwise,
    is_transposed,
    vocab_axis,
)
from .no_head import BATCHED, NO_PRODUCT, SIDE_WHOLE, escape, products_before, why_no_product

aten, prims = torch.ops.aten, torch.ops.prims


class NoHead(Exception):
    """Why the logits of a `row_stats` are no head's that can be divided, in words."""


class SideMoves(NoHead):
    """That a gradient is wanted of a side of a divergence whose logits are whole."""

    def __init__(self, why: str):
        super().__init__(f"{SIDE_WHOLE}{why}")


class Product(NamedTuple):
    """A linear layer.

    Attributes:
        node: mm, addmm, or bmm with a batch of one.
        hidden: [N, D] or [1, N, D].
        columns: the weight as [D, V] or [1, D, V].
        bias: [V], or None.
    """

    node: Node
    hidden: Node
    columns: Node
    bias: Node | None


class Teacher(NamedTuple):
    """What makes the weights for rows and classes of a head: see `teachers.py`.

    Attributes:
        products: linear layers whose results are wide.
        nodes: all that is made of these up to weights and sums, in the order of the graph.
        sums: those of them that are sums over the classes, of each row; also `row_stats`, [K, N].
        feeds: what some are made of, and is made of statistics, or of sums; late: those that are.
    """

    products: list[Product]
    nodes: list[Node]
    sums: set[Node]
    feeds: list[Node]
    late: set[Node]


@dataclass
class Head:
    """A head.

    Attributes:
        products: what the logits are made of: one, or more, such as those of an adapter; the widest first.
        wide: all wide nodes but the products, in the order of the graph; `row_grad` too.
        stats: the `row_stats` nodes.
        exits: what reads wide nodes to make gradients, and what each makes.
        teacher: what makes weights of it, if that is to be made of the same rows as the logits.
        divergences: the `divergence` nodes.
        given: what these read, [N, V], and is not made in pieces with it: tensors, and the logits of other
            sides that are no head's; why_given: why not.
    """

    products: list[Product]
    wide: list[Node] = field(default_factory=list)
    stats: list[Node] = field(default_factory=list)
    exits: dict[Node, str] = field(default_factory=dict)
    teacher: Teacher | None = None
    divergences: list[Node] = field(default_factory=list)
    given: list[Node] = field(default_factory=list)
    why_given: str = ""

    @property
    def product(self) -> Node:
        return self.products[0].node

    @property
    def roots(self) -> set[Node]:
        return {product.node for product in self.products}

    @property
    def n(self) -> Any:
        return shape_of(self.product)[-2]

    @property
    def v(self) -> Any:
        return shape_of(self.product)[-1]

    @property
    def d(self) -> Any:
        return shape_of(self.products[0].columns)[-2]

    @property
    def grads(self) -> list[Node]:
        return [node for node in self.wide if node.target == ops.ROW_GRAD]

    @property
    def divergence_grads(self) -> list[Node]:
        """Those whose gradients of some sides are wide nodes."""
        return list(dict.fromkeys(args_of(node)[0] for node in self.wide if is_side_gradient(node)))

    @property
    def chained(self) -> bool:
        """Whether anything but views lies between the product and the statistics."""
        return any(is_pointwise(node) for node in self.wide)

    def labels(self) -> list[Node]:
        """The labels that gradients of the logits are made of, each once."""
        return list(dict.fromkeys(label for node in self.grads for label in grad_call(node).labels))

    def few_labels(self) -> list[Node]:
        """The same, but none where rows have many."""
        return [] if any(len(shape_of(label)) > 1 for label in self.labels()) else self.labels()

    def beside(self) -> list[Node]:
        """What is combined with wide nodes, in pointwise nodes."""
        wide = {*self.roots, *self.wide}
        readers = [node for node in self.wide if not is_gradient(node)]
        return [s for node in readers for s in node.all_input_nodes if s not in wide]

    def factors(self) -> list[Node]:
        """What gradients are multiplied with in products."""
        wide = {*self.roots, *self.wide}
        return [s for node in self.exits for s in node.all_input_nodes if _untransposed(s) not in wide]

    def before_statistics(self) -> list[Node]:
        """The wide nodes that the statistics are made of, and others that depend on no `row_grad`."""
        gradients = self.gradients()
        return [node for node in self.wide if node not in gradients]

    def gradients(self) -> set[Node]:
        """The wide nodes that depend on a `row_grad`, or a `divergence_grad`."""
        found: set[Node] = set()
        for node in self.wide:
            if is_gradient(node) or not found.isdisjoint(node.all_input_nodes):
                found.add(node)
        return found


def is_gradient(node: Node) -> bool:
    """Whether a wide node is what an operator makes of statistics and coefficients."""
    return node.target == ops.ROW_GRAD or is_side_gradient(node)


def find_heads(graph: Graph) -> Iterator[tuple[Head | None, list[Node], str]]:
    """(the head or None, its `row_stats` nodes, why it cannot be divided or ""), where none is planned."""
    seen: set[Node] = set()
    for stats in graph.find_nodes(op="call_function", target=ops.ROW_STATS):
        if stats in seen or is_planned(stats):
            continue
        try:
            head = _head_of(stats)
        except NoHead as why:
            yield None, [stats], str(why)
            continue
        seen.update(head.stats)
        yield head, head.stats, ""


def _head_of(stats: Node) -> Head:
    roots = products_before(stats_call(stats).z)
    if not roots:
        raise NoHead(why_no_product(stats))
    head = Head(_products(roots))
    if not isinstance(head.v, int):
        raise NoHead("the number of classes is symbolic")
    if not all(equal(shape_of(node)[-1], head.v) for node in head.roots):
        raise NoHead("the logits are made of several products, of which one has other classes")
    try:
        _gather(head)
    except NoHead as why:
        if not head.divergences or isinstance(why, SideMoves):
            raise
        head = Head(_products(roots), why_given=str(why))
        _gather(head)
    return head


def _products(roots: set[Node]) -> list[Product]:
    """The widest first, and else in the order of the graph."""
    order = [node for root in [*roots][:1] for node in root.graph.nodes if node in roots]
    return sorted(map(product_of, order), key=lambda p: -hint(shape_of(p.columns)[-2]))


def product_of(node: Node) -> Product:
    """The linear layer that a product is. Raises NoHead for several in a batch, or another addend."""
    if is_batched(node):
        raise NoHead(BATCHED)
    *added, hidden, columns = args_of(node)
    bias = added[0] if added else None
    if bias is not None and (len(shape_of(bias)) != 1 or node.kwargs):
        raise NoHead("the linear layer adds more than a bias")
    return Product(node, hidden, columns, bias)


def _gather(head: Head) -> None:
    """Fill in what is made of the logits. Raises NoHead where something else reads them.

    What a divergence reads beside them is looked at as well, unless `why_given` says why it is given.
    """
    order = {node: i for i, node in enumerate(head.product.graph.nodes)}
    wide = head.roots
    stack = [product.node for product in head.products]
    while stack:
        node = stack.pop()
        for user in node.users:
            if user in wide or user in head.exits:
                continue
            if user.target == ops.ROW_STATS and _reads_as_logits_only(user, node):
                if user not in head.stats:
                    head.stats.append(user)
            elif user.target in (ops.DIVERGENCE, ops.DIVERGENCE_GRAD) and _reads_as_side_only(user, node):
                more = _of_sides(user, head)
                wide.update(more)
                stack += more
            elif kind := exit_kind(user, node):
                head.exits[user] = kind
            elif is_transposed(user) and all(exit_kind(u, user) for u in user.users):
                head.exits |= {u: exit_kind(u, user) for u in user.users}
            elif _stays_wide(user, head, wide):
                wide.add(user)
                stack.append(user)
            else:
                raise NoHead(escape(user))
    head.wide = sorted(wide - head.roots, key=order.__getitem__)
    head.stats.sort(key=order.__getitem__)
    gradients = head.gradients()
    for reader in head.exits:
        if not any(_untransposed(source) in gradients for source in reader.all_input_nodes):
            raise NoHead(escape(reader))


def _of_sides(user: Node, head: Head) -> list[Node]:
    """Of what a divergence reads, the products that are new to a head; or what its gradient makes."""
    if user.target == ops.DIVERGENCE_GRAD:
        return [*user.users]
    if user in head.divergences:
        return []
    head.divergences.append(user)
    zs, ms, _, which = divergence_call(user)
    found: set[Node] = set()
    for u, z in enumerate(zs):
        roots = products_before(z)
        if u >= len(ms):  # what is brought along, unless it is made of the logits themselves
            head.given += [] if roots and roots <= head.roots | found else [z]
            continue
        if roots and (not head.why_given or roots <= head.roots):
            found |= roots - head.roots
            continue
        head.why_given = head.why_given or NO_PRODUCT
        if u in decode(which).wanted:
            raise SideMoves(head.why_given)
        head.given.append(z)
    products = _products(found)
    head.products += products
    if not all(equal(shape_of(node)[-1], head.v) for node in found):
        raise NoHead("they are made of several products, of which one has other classes")
    return [product.node for product in products]


def _stays_wide(user: Node, head: Head, wide: set[Node]) -> bool:
    """Whether a node is [N, V] in the order of the logits."""
    if user.target == ops.ROW_GRAD:
        return all(_reads_as_logits_only(user, node) for node in wide if node in user.all_input_nodes)
    if not is_ordered_view(user) and not is_pointwise(user):
        return False
    axis = vocab_axis(user)
    has_classes = axis is not None and equal(shape_of(user)[axis], head.v)
    return has_classes and is_of_size(user, count_of(head.product))


def _reads_as_logits_only(user: Node, node: Node) -> bool:
    """Whether `row_stats` or `row_grad` reads a node as its logits, and not among its weights."""
    z, labels, weights, *rest = args_of(user)
    return z is node and node not in (*labels, *weights, *rest)


def _reads_as_side_only(user: Node, node: Node) -> bool:
    """Whether a divergence, or its gradient, reads a node as the logits of a side."""
    zs, *rest = args_of(user)
    return node in zs and not any(node is arg or (isinstance(arg, list) and node in arg) for arg in rest)


def _untransposed(node: Node) -> Node:
    return args_of(node)[0] if is_transposed(node) else node


def source_of_exit(node: Node, head: Head) -> Node:
    """The wide node that an exit reads."""
    wide = set(head.wide)
    return next(s for source in node.all_input_nodes if (s := _untransposed(source)) in wide)
