"""What is known about the nodes of a joint graph, each told by a `Fact`: see `row_locality.py`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.fx import Node

from ..common.compat.graphs import is_tangent
from ..graph.shapes import hint, shape_of
from ..graph.walk import reached
from .other_sizes import SizeOf

Factor = tuple[tuple[Node, int], ...]  # scalars with their powers, sorted

NO_ROW = -1


@dataclass(frozen=True)
class Fact:
    """What is known about a node: that it is a scalar factor times something that can be made early.

    Attributes:
        factor: of scalars that the backward knows, or that depend on all rows.
        rows: [shape of the node], the row whose statistics each element depends on, -1 for none; or None
            where no element depends on any.
        is_zero: whether it is 0, which is any factor's.
        why_not: or why nothing of this kind is known.
    """

    factor: Factor = ()
    rows: Tensor | None = None
    is_zero: bool = False
    why_not: str = ""

    @property
    def is_early(self) -> bool:
        """Whether it can be made before any statistics."""
        return self.rows is None and not self.factor and not self.why_not

    @property
    def is_of_own_rows(self) -> bool:
        """Whether each element along the last dimension depends on the row of its place alone, or on none."""
        if self.rows is None:
            return True
        own = torch.arange(self.rows.shape[-1])
        return bool(((self.rows == own) | (self.rows == NO_ROW)).all())

    def is_factor(self, node: Node) -> bool:
        """Whether `node`, which it is about, is a factor itself."""
        return self.factor == ((node, 1),)


EARLY = Fact()


class Facts(dict[Node, Fact]):
    """Facts by node, at sizes that are numbers by `size_of`."""

    def __init__(self, size_of: SizeOf = hint):
        self.size_of = size_of

    def shape_of(self, node: Node) -> list[int]:
        return [self.size_of(size) for size in shape_of(node)]


class Unknown(Exception):
    """Why nothing is known about a node, in words."""


def named(*factors: Factor) -> str:
    """What factors are: upstream gradients, or no more than numbers that depend on all rows."""
    late = any(map(is_tangent, _made_of(factors)))
    return "the upstream gradient" if late else "what is made of all rows"


def _made_of(factors: Iterable[Factor]) -> Iterator[Node]:
    return reached([node for factor in factors for node, _ in factor], lambda node: node.all_input_nodes)


def apart(factors: Iterable[Factor], why: str) -> str:
    """Why factors are no single one, with the remedy where they are upstream gradients of several results."""
    several = sum(map(is_tangent, _made_of(factors))) > 1
    return f"{why}; detach those results that are for the log alone" if several else why
