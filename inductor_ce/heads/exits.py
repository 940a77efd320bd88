"""All gradients that one head gives, as its pieces give their parts."""

from __future__ import annotations

from torch.fx import Node

from ..graph.shapes import example_of
from ..ops import ROW_GRAD_AGAIN
from ..ops.products import ONCE_MADE
from .find import Head, source_of_exit
from .gradients import Exit
from .kinds import BIAS, HIDDEN, ROW_SUMS, WEIGHT, WEIGHT_T
from .loops import shared_sums
from .pieces import Pieces
from .plan import Plan
from .ranges import Range
from .sums import Sum


def sums_apart(head: Head) -> list[Node]:
    """The exits that sum what no product reads."""
    sums = [node for node, kind in head.exits.items() if kind in (BIAS, ROW_SUMS)]
    read = {source_of_exit(node, head) for node in head.exits if node not in sums}
    return [node for node in sums if head.exits[node] == ROW_SUMS or source_of_exit(node, head) not in read]


class Exits:
    """The gradients of a head.

    Args:
        pieces: of the head.
        plan: which says what is kept in float32 though it is 16-bit.
    """

    def __init__(self, pieces: Pieces, plan: Plan):
        self._pieces = pieces
        apart = sums_apart(pieces.head)
        self._sums = [Sum(pieces, node) for node in apart]
        sums = shared_sums(pieces.head) if pieces.head.divergences else []
        first_of = {node: nodes[0] for nodes in sums for node in nodes}
        made: dict[Node, Exit] = {}
        for node in pieces.head.exits:
            if node not in apart:
                made[node] = Exit(pieces, node, plan, made.get(first_of.get(node, node)))
        self._others = [*made.values()]
        # Those of several sides that are summed up in one place.
        self._shared = {node: [made[other] for other in nodes] for nodes in sums for node in nodes}

    def __bool__(self) -> bool:
        return bool(self._sums or self._others)

    def of_each_kind(self) -> tuple[Exit | None, Exit | None, Exit | None]:
        """The gradients of hidden states, weight and bias, where there are no others."""
        kinds = (HIDDEN,), (WEIGHT, WEIGHT_T), (BIAS,)
        hidden, weight, bias = (
            next((each for each in self._others if each.kind in kind), None) for kind in kinds
        )
        return hidden, weight, bias

    def go_on(self, nodes: list[Node], out: Node) -> None:
        """Let one gradient, that of the only exit in `nodes`, add to a sum begun for another head."""
        self._only(nodes).goes_on(out)

    def leave(self, nodes: list[Node]) -> Node:
        """The sum of that gradient so far, for another head to go on with: it is none of this head then."""
        each = self._only(nodes)
        self._others.remove(each)
        assert each.out is not None
        return each.out

    def _only(self, nodes: list[Node]) -> Exit:
        (each,) = (each for each in self._others if each.node in nodes)
        return each

    def add(
        self,
        forward: dict[Node, Node],
        piece: Range,
        narrow: dict[Node, tuple[Node, ...]],
    ) -> list[Node]:
        """Give each gradient its part of a piece. Returns what is then made.

        Those that write the gradient of the logits come last: nobody reads it as it was before, so it need
        not be copied for them.

        Args:
            forward: the wide nodes that depend on no gradient, as this piece has them, or what exits read.
            piece: which rows or columns it is of.
            narrow: pieces of the `narrow_args` of each gradient that an operator makes.
        """
        after: list[Node] = []
        if self._sums:
            made = self._pieces.wide_gradients(forward, piece, narrow, ROW_GRAD_AGAIN)
            after += [each.add(made[each.source], piece) for each in self._sums]
            narrow = {node: (*rows, self._once_made(c, after)) for node, (*rows, c) in narrow.items()}
        is_made = all(each.source in forward for each in self._others)
        made = forward if is_made else self._pieces.wide_gradients(forward, piece, narrow)
        latest: dict[Node, Node] = {}
        others = sorted(self._others, key=lambda e: e.writes_gradient)
        # Where another loop reads it, which torch may move behind the write, it is left as it was.
        only = len({made[each.source] for each in others}) == 1
        for each in others:
            dz = made[each.source]
            if dz not in latest:
                latest[dz] = self._pieces.in_memory(dz)
            done, latest[dz] = each.add(latest[dz], piece, only and each is others[-1])
            after.append(done)
            for other in self._shared.get(each.node, ()):
                other.goes_on(done)
        return after

    def _once_made(self, coefficients: Node, after: list[Node]) -> Node:
        """Let the gradient wait for the sums: its chain would else be fused with them, and be in memory."""
        return self._pieces.build(ONCE_MADE, coefficients, example_of(coefficients).dtype, after)

    def finish(self, scale: Node | None, of_rows: bool = False) -> dict[Node, Node]:
        """What stands for each exit: the gradient of the whole, times a scalar."""
        whole = [each for each in self._others if each is self._shared.get(each.node, [each])[-1]]
        products = {each.node: each.finish(scale, of_rows) for each in whole}
        return products | {each.node: each.finish(scale, of_rows) for each in self._sums}
