"""Where values that are made of statistics may be other than finite.

A mask that multiplies a loss hides a row whose loss is finite, and NaN shows through it. That a row's logits
are finite is seen without making any of them:

    |z_i| <= D max_d |h_d| max |W| + max |b|,    far within the range of their dtype

What follows is finite if it is a sum, or a product with numbers of moderate size. Of anything else nothing is
known.
"""

from __future__ import annotations

import torch
from torch.fx import Node

from ..graph.shapes import example_of, shape_of, tensor_of
from ..graph.walk import args_of
from ..ops import SUMEXP
from .calls import stats_call
from .facts import EARLY, Facts
from .find import Head, Product
from .kinds import CAST, COPIES, is_pointwise
from .row_rules import is_moved, is_reduced
from .where import Places, Where

aten = torch.ops.aten

LOGITS_BELOW = 2.0**40
FACTORS_BELOW = 2.0**20
MOST_FACTORS = 3  # beyond a sum over all classes, within float32

SUMS = (aten.add.Tensor, aten.sub.Tensor, aten.neg.default)
PRODUCTS = (aten.mul.Tensor, aten.mul.Scalar)


class NotFinite:
    """Where values may be other than finite.

    Args:
        places: makes what tells it.
        head: whose statistics they are made of.
        facts: about the values.
    """

    def __init__(self, places: Places, head: Head, facts: Facts):
        self._places, self._head, self._facts = places, head, facts
        self._known: dict[Node, Where] = {}
        self._factors: dict[Node, int] = {}
        self._rows: Where | None = None

    def of(self, node: Node) -> Where:
        """Of a value that is of its own row."""
        if node not in self._known:
            self._factors[node] = 0
            self._known[node] = self._found(node)
        return self._known[node]

    def _found(self, node: Node) -> Where:
        if node in self._head.stats:
            return self._places.over(node, self._of_logits())
        if tensor_of(node) is not None and not example_of(node).is_floating_point():
            return False
        sources = [source for source in node.all_input_nodes if not self._is_early(source)]
        parts = {source: self.of(source) for source in sources}
        self._factors[node] = max((self._factors[source] for source in sources), default=0)
        if is_moved(node):
            return self._places.moved(node, parts)
        if is_reduced(node):  # over no more than the classes
            return self._places.reduced(node, parts[sources[0]])
        if node.target == aten.log.default:
            return parts[sources[0]] if self._is_at_least_1(sources[0]) else True
        if node.target in PRODUCTS and len(set(args_of(node)) - set(sources)) == 1 and not node.kwargs:
            return self._of_product(node, parts)
        if node.target in SUMS or (node.target == CAST and example_of(node).itemsize >= 4):
            return self._places.over_any(node, parts.values())
        if node.target == aten.where.self:
            return self._of_choice(node)
        return True

    def _is_early(self, node: Node) -> bool:
        return node not in self._head.stats and self._facts.get(node, EARLY).is_early

    def _is_at_least_1(self, node: Node) -> bool:
        """Whether a node is a sum of exponentials, or 1, as a logsumexp has it for a row of +inf."""
        if node.target == aten.where.self:
            return all(map(self._is_at_least_1, args_of(node)[1:]))
        return _is_1(node) or self._is_sumexp(node)

    def _is_sumexp(self, node: Node) -> bool:
        """Whether a node is the row of `row_stats` that is a sum of exponentials, the largest of them 1."""
        if node.target == aten.squeeze.dim:
            node = args_of(node)[0]
        if len(args_of(node)) == 2:
            source, index = args_of(node)
            parts = (aten.unbind.int, aten.split_with_sizes.default)
            source = args_of(source)[0] if source.target in parts else source
        elif node.target == aten.select.int and args_of(node)[1] == 0:
            source, _, index = args_of(node)
        else:
            return False
        return source in self._head.stats and list(stats_call(source).rows)[index].statistic == SUMEXP

    def _of_product(self, node: Node, parts: dict[Node, Where]) -> Where:
        ((source, part),) = parts.items()
        (other,) = (arg for arg in args_of(node) if arg is not source)
        self._factors[node] += 1
        if self._factors[node] > MOST_FACTORS:
            return True
        return self._places.over_any(node, [part, self._places.not_below(other, FACTORS_BELOW)])

    def _of_choice(self, node: Node) -> Where:
        condition, *choices = args_of(node)
        yes, no = (False if self._is_early(choice) else self.of(choice) for choice in choices)
        return self._places.chosen(node, condition if self._is_early(condition) else None, yes, no)

    # Logits

    def _of_logits(self) -> Where:
        """The rows with logits that may be other than finite, [N]."""
        if self._rows is None:
            chain = [node for node in self._head.before_statistics() if is_pointwise(node)]
            plain = all(node.target in COPIES for node in chain)
            self._rows = self._beyond() if plain else True
        return self._rows

    def _beyond(self) -> Where:
        build = self._places.build
        total, *others = map(self._bound, self._head.products)
        for other in others:
            total = build(aten.add.Tensor, total, other)
        ranges = [torch.finfo(example_of(node).dtype).max / 4 for node in self._head.roots]
        return self._places.not_below(total, min(LOGITS_BELOW, *ranges))

    def _bound(self, product: Product) -> Node:
        """What no logit of a product is larger than, [N]."""
        build = self._places.build
        rows = build(aten.reshape.default, self._largest(product.hidden, [-1]), [-1])
        columns = self._largest(product.columns, [0, 1] if len(shape_of(product.columns)) == 2 else [0, 1, 2])
        made = build(aten.mul.Tensor, rows, columns)
        made = build(aten.mul.Tensor, made, self._places.shape(product.columns)[-2])
        if product.bias is None:
            return made
        return build(aten.add.Tensor, made, self._largest(product.bias, [0]))

    def _largest(self, x: Node, dims: list[int]) -> Node:
        build = self._places.build
        return build(CAST, build(aten.amax.default, build(aten.abs.default, x), dims), torch.float32)


def _is_1(node: Node) -> bool:
    return node.target in (aten.scalar_tensor.default, aten.full.default) and args_of(node)[-1] == 1
