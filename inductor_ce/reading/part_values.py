"""What is known of a loss whose ranks know themselves that each has a part of the classes."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import sympy
from torch.fx import Node

from .. import algebra
from ..algebra import parts
from ..algebra.parts import Picked
from ..common.findings import Reason, Refusal


class NotRead(Exception):
    """This is no such loss, for a fact about a node."""

    def __init__(self, node: Node, fact: str):
        super().__init__(fact)
        self.node, self.refusal = node, Refusal(Reason.BY_HAND, f"{fact}, so the loss is left as it was.")


@dataclass(frozen=True)
class Value:
    """What a storage holds: a number for each row and column of this rank, or for each row.

    `attached` tells whether a gradient flows to the logits, None where there is nothing for one to flow by.
    """

    expr: algebra.Vocab | sympy.Expr
    attached: bool | None = None

    @property
    def is_wide(self) -> bool:
        return isinstance(self.expr, algebra.Vocab)


class Summed(NamedTuple):
    """What a function sums over the ranks of a group, and hands the gradient of the sum to as it is.

    `in_place` tells whether it is the sum thereafter.
    """

    source: Node
    group: Any
    in_place: bool


@dataclass(frozen=True)
class Use:
    """A node that reads `source`, which holds `value`, and is no step of the loss."""

    user: Node
    source: Node
    value: Value


@dataclass
class Parts:
    """What was read of one tensor of logits.

    Attributes:
        logits: this rank's columns, which are the last dimension.
        group: the name of the process group that shares the rows.
        uses: of what is made of them.
        steps: the nodes that nobody needs when the uses have what they read from elsewhere.
        labels: where each symbol's are, and the step that reads them.
        masks, others: what else has a symbol.
        numbers: those of the program that are not masks'. NOTE A rank may have numbers of its own, and all
            must read alike, or one of them would wait in a collective for the others. So what is read depends
            on no number, but for whether a backward is the gradient of its forward.
        scalars: the nodes of those that are no constants, as sizes that are symbolic.
        picked: the labels of whole rows.
        asked: the values of the nodes that were asked for.
        since: the position from which the logits are what was read.
        not_read: why it is no such loss after all, where ranks have exchanged something of it by then.
    """

    logits: Node
    group: Any = None
    uses: list[Use] = field(default_factory=list)
    steps: set[Node] = field(default_factory=set)
    labels: dict[sympy.Symbol, tuple[Node, Node]] = field(default_factory=dict)
    masks: dict[sympy.Symbol, Node] = field(default_factory=dict)
    others: dict[sympy.Symbol, Node] = field(default_factory=dict)
    numbers: dict[sympy.Symbol, sympy.Expr] = field(default_factory=dict)
    scalars: dict[sympy.Symbol, Node] = field(default_factory=dict)
    picked: dict[sympy.Symbol, Picked] = field(default_factory=dict)
    asked: list[Value | None] = field(default_factory=list)
    since: int = 0
    not_read: NotRead | None = None

    @property
    def whole(self) -> list[Use]:
        """The uses of what is made of statistics of whole rows."""
        return [use for use in self.uses if parts.is_of_ranks(use.value.expr)]
