"""What ranks gather from each other: for each row a number of every rank, before it is brought together.

    torch.logsumexp(torch.stack(gathered), 0)      gathered: logsumexp over the columns of each rank

The numbers of all ranks lie one rank after another, and those of one rank may be taken out of them. They are
followed by storage, as `part_reader` does with its own, up to a sum, a maximum or a logsumexp over the ranks.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any, Protocol

import sympy
import torch
from torch.fx import Node

from .. import algebra
from ..common.compat.distributed import ALL_GATHER, WAIT, calls
from ..graph.shapes import Size, decided_equal, decided_same_count, number_of, shape_of
from ..graph.timeline import Timeline, written_by
from . import spellings
from .part_values import Value
from .steps import View
from .views import viewed


@dataclass(frozen=True)
class Gathered:
    """What each rank has of `expr`, for the ranks `first` up to `last` of a group of so many."""

    expr: sympy.Expr
    group: Any
    ranks: int
    first: int
    last: int


class OfThisRank(Protocol):
    """What is read of this rank alone: see `part_reader`."""

    timeline: Timeline
    sizes: Any

    def value(self, node: Any) -> Value | None: ...
    def refuse_edit_of_others(self, node: Node, target: Node) -> None: ...
    def over_ranks(self, expr: sympy.Expr, attached: bool | None, how: Any, group: Any) -> Value | None: ...


def _multiple(bound: Any, each: Size, most: int) -> int | None:
    """How many times `each` a bound of a slice is, of at most so many; None where it is another number."""
    if bound is None:
        return most
    given = bound if isinstance(bound, int) else number_of(bound)
    if not isinstance(given, (int, torch.SymInt)):
        return None
    counts = (k for k in range(-most, most + 1) if k >= 0 or isinstance(given, int))
    found = next((k for k in counts if decided_equal([given], [k * each])), None)
    return found + most if found is not None and found < 0 else found


class GatheredReader:
    """What storages hold of several ranks.

    Args:
        reader: of what they hold of this one.
    """

    def __init__(self, reader: OfThisRank):
        self._reader = reader
        self._held: dict[Node, Gathered] = {}
        self._storages: set[Hashable] = set()

    def has(self, node: Node) -> bool:
        """Whether a node holds such numbers, as a view of a node that does may."""
        return self._reader.timeline.storage(node) in self._storages

    def get(self, node: Any) -> Gathered | None:
        """What a node holds, of which it is the whole: rows of so many ranks, one after another."""
        return self._held.get(node)

    def _is_of(self, node: Node, ranks: int) -> bool:
        return decided_same_count(shape_of(node), (ranks, *self._reader.sizes[:-1]))

    def takes(self, node: Node) -> bool:
        """Whether a node holds such numbers, or makes room for them. It is noted then."""
        made = self._made(node)
        if made is None:
            return self._makes_room(node)
        for target in written_by(node):
            self._reader.refuse_edit_of_others(node, target)
        for holder in (*written_by(node), node):
            self._held[holder] = made
            self._storages.add(self._reader.timeline.storage(holder))
        return True

    def _makes_room(self, node: Node) -> bool:
        """Whether it asks a number of rows for its shape, to be written later."""
        step = spellings.step_of(node)
        rows = [value for source in node.all_input_nodes if (value := self._reader.value(source)) is not None]
        return step is not None and step.reads_shapes and any(not value.is_wide for value in rows)

    def _made(self, node: Node) -> Gathered | None:
        if calls(node, ALL_GATHER):
            return self._of_all(node)
        if calls(node, WAIT):
            return self.get(node.args[0])
        if node.op == "call_method" and node.target == "copy_" and not node.kwargs and len(node.args) == 2:
            return self._copied(*node.args)
        spelled = spellings.read(node)
        if spelled is None:
            return None
        step, args = spelled
        if step.view is View.RESHAPE:
            return self.get(viewed(node))
        function = {"getitem": self._part, "stack": self._joined, "cat": self._joined}.get(step.name)
        return None if function is None else function(node, args)

    def _copied(self, target: Any, source: Any) -> Gathered | None:
        """x.copy_(y), into room that was made for it."""
        held = self.get(source)
        if held is None or self.has(target) or not decided_equal(shape_of(target), shape_of(source)):
            return None
        return held if self._is_of(target, held.last - held.first) else None

    def _of_all(self, node: Node) -> Gathered | None:
        source, ranks, group = node.args[:3]
        value = self._reader.value(source)
        if value is None or value.is_wide or value.attached or not isinstance(ranks, int):
            return None  # with a gradient it would have that of every rank
        found = Gathered(value.expr, group, ranks, 0, ranks)
        rows = shape_of(source)  # type: ignore[arg-type]
        as_many = decided_same_count(rows, self._reader.sizes[:-1])
        return found if len(rows) > 0 and as_many and self._is_of(node, ranks) else None

    def _part(self, node: Node, args: dict[str, Any]) -> Gathered | None:
        """x[i] and x[i * N : (i + 1) * N]"""
        held, index = self.get(args.get("input")), args.get("index")
        if held is None:
            return None
        sizes, ranks = shape_of(args["input"]), held.last - held.first
        first = sizes[0] if sizes else 0
        each = first // ranks
        if not decided_equal([each * ranks], [first]) or decided_equal([each], [0]):
            return None
        if isinstance(index, int) and decided_equal([each], [1]) and -ranks <= index < ranks:
            index = slice(index % ranks, index % ranks + 1)
        if not isinstance(index, slice) or index.step not in (None, 1):
            return None
        start, end = (_multiple(bound, each, ranks) for bound in (index.start or 0, index.stop))
        if start is None or end is None or end <= start:
            return None
        return dataclasses.replace(held, first=held.first + start, last=held.first + end)

    def _joined(self, node: Node, args: dict[str, Any]) -> Gathered | None:
        """Parts put together again, in the order of the ranks."""
        tensors, dim = args.get("tensors"), args.get("dim", 0)
        parts = [self.get(x) for x in tensors] if isinstance(tensors, (list, tuple)) else []
        if not parts or dim != 0 or not shape_of(node):
            return None
        known = [part for part in parts if part is not None]
        first = known[0] if known else None
        alike = all((p.expr, p.group) == (known[0].expr, known[0].group) for p in known)
        if first is None or len(known) != len(parts) or not alike:
            return None
        if any(a.last != b.first for a, b in itertools.pairwise(known)):
            return None
        return dataclasses.replace(first, last=known[-1].last)

    # Brought together

    def reduced(self, node: Node) -> Value | None:
        """A number for each row, of those that all ranks have."""
        spelled = spellings.read(node)
        if spelled is None or spelled[0].name not in ("logsumexp", "sum", "amax"):
            return None
        step, args = spelled
        held, dim = self.get(args.get("input")), spellings.one_dim(args.get("dim"))
        if held is None or (held.first, held.last) != (0, held.ranks) or args.get("dtype") is not None:
            return None
        if dim != 0 or not decided_equal(shape_of(args["input"])[:1], [held.ranks]):
            return None
        over_ranks = self._reader.over_ranks
        if step.name != "logsumexp":
            return over_ranks(held.expr, None, {"sum": "sum", "amax": "max"}[step.name], held.group)
        total = over_ranks(sympy.exp(held.expr), None, "sum", held.group)
        log = None if total is None else algebra.row_log(total.expr)
        return None if total is None or log is None else dataclasses.replace(total, expr=log)
