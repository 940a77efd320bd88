"""Losses of rows whose ranks know themselves that each has a part of the classes.

A program of tensor parallelism by hand takes the maximum of its own columns and of all ranks, sums the
exponentials and the logit at the label likewise, and makes the loss of these. It is read in the order in
which it runs, and every storage has the value that was written to it last: such programs work in place.

What is found are uses: places where something else reads what was made of statistics of whole rows.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Hashable, Mapping
from typing import Any

import sympy
import torch
from torch.fx import Node

from .. import algebra
from ..algebra import parts
from ..algebra.parts import Picked
from ..common.compat.distributed import ALL_REDUCE, WAIT, calls
from ..graph.shapes import decided_equal, number_of, shape_of, tensor_of
from ..graph.timeline import Timeline, written_by
from . import spellings
from .gathered import GatheredReader
from .part_values import NotRead, Parts, Summed, Use, Value
from .row_numbers import RowNumbers
from .views import keeps_order, viewed

Step = Callable[["PartReader", Node, dict[str, Any]], Value | None]


def _is_view(node: Node) -> bool:
    """Whether a node is a view, copy or cast of its source, all of it in the same order."""
    spelled = spellings.read(node)
    source = None if spelled is None or spelled[0].view is None else spelled[1].get("input")
    return isinstance(source, Node) and tensor_of(source) is not None and keeps_order(node, source)


def _is_idle_size(node: Node) -> bool:
    """Whether a node is a size, or one of its numbers, that nobody reads, as Dynamo leaves it."""
    size = node.args[0] if node.target is operator.getitem else node
    if not isinstance(size, Node) or (size.op, size.target) != ("call_method", "size"):
        return False
    return all(user.target is operator.getitem and not user.users for user in size.users)


class PartReader:
    """What storages hold while a graph runs, from its logits on.

    Args:
        timeline: of the graph.
        base: the logits.
        sums, own_backward: as for `read_parts`.
        steps: what reads a step, by its name in the table of steps.
    """

    def __init__(
        self,
        timeline: Timeline,
        base: Node,
        sums: Mapping[Node, Summed],
        own_backward: bool,
        steps: Mapping[str, Step],
    ):
        self.timeline, self.sums, self.steps = timeline, sums, steps
        self.found = Parts(base)
        self.sizes = shape_of(base)
        example = tensor_of(base)
        assert example is not None
        self.exprs: dict[Hashable, algebra.Vocab | sympy.Expr] = {}  # by storage
        self.attached: dict[Node, bool | None] = {}
        self.pending: dict[Node, Value] = {}  # by the node of a collective that has not been waited for
        self.firsts: dict[Node, Value] = {}  # by the node of what has several results, of the first of them
        self.strange: set[Node] = set()  # other views of what has a value
        self.behind: set[Node] = set()  # what uses are read for
        self.of_rows = RowNumbers(self.sizes, self._is_row)
        self.gathered = GatheredReader(self)
        self._put(base, Value(algebra.LOGITS, None if own_backward else example.requires_grad or None))

    # Values

    def _put(self, node: Node, value: Value) -> None:
        self.exprs[self.timeline.storage(node)] = value.expr
        self.attached[node] = value.attached

    def value(self, node: Any) -> Value | None:
        """What a node holds now: as what was written last to its storage, of which it is the whole."""
        if not isinstance(node, Node) or node not in self.attached or node in self.strange:
            return None
        expr = self.exprs.get(self.timeline.storage(node))
        return None if expr is None else Value(expr, self.attached[node])

    def read(self, node: Node) -> None:
        """Take in the next node of the graph: what it makes, or else whom it needs. Raises NotRead."""
        if node.op in ("call_function", "call_method"):
            value = self._value_of(node) or self.gathered.reduced(node)
            if value is not None:
                self._put_result(node, value)
                return
            if (
                node in self.pending
                or node in self.firsts
                or self.gathered.takes(node)
                or _is_idle_size(node)
            ):
                self.found.steps.add(node)
                return
        self._use(node)

    def _put_result(self, node: Node, value: Value) -> None:
        on = self.timeline.grad_mode(node) is True
        if value.attached and not on:
            value = Value(value.expr, False)
        written = [*written_by(node)]
        for target in written:
            self.refuse_edit_of_others(node, target)
            for alias in self.attached:
                if self.timeline.shares_storage(alias, target):
                    self.attached[alias] = value.attached
            self.exprs[self.timeline.storage(target)] = value.expr
        if tensor_of(node) is not None:
            self._put(node, value)
        self.found.steps.add(node)

    def refuse_edit_of_others(self, node: Node, target: Node) -> None:
        arguments = (n for n in self.timeline.nodes if n.op == "placeholder")
        if any(self.timeline.shares_storage(target, n) for n in (*arguments, self.found.logits)):
            raise NotRead(node, "The logits, or another tensor that was given, are edited in place by {step}")

    def _use(self, node: Node) -> None:
        for source in node.all_input_nodes:
            value = self.value(source)
            if source in self.behind or (value is not None and not value.is_wide):
                self.behind.add(node)
            if value is None:
                if source in self.pending or source in self.firsts or self.gathered.has(source):
                    raise NotRead(node, "What ranks exchange is read by {step}")
                continue
            if value.is_wide and value.expr != algebra.LOGITS:
                raise NotRead(node, "What has a number for each class is read by {step}")
            if any(self.timeline.shares_storage(source, written) for written in written_by(node)):
                raise NotRead(node, "What the loss is made of is edited by {step}")
            example = tensor_of(node)
            if example is not None and self.timeline.shares_storage(source, node):
                if not value.is_wide and not self.timeline.unchanged(source, node):
                    raise NotRead(node, "What the loss is made of is edited behind {step}")
                self.strange.add(node)
            if not value.is_wide:
                self.found.uses.append(Use(node, source, value))

    # Steps

    def _value_of(self, node: Node) -> Value | None:
        if calls(node, ALL_REDUCE):
            return self._collective(node)
        if calls(node, WAIT):
            return self.pending.get(node.args[0])  # type: ignore[arg-type]
        if node in self.sums:
            source, group, in_place = self.sums[node]
            value = self._over_ranks(self.value(source), "sum", group)
            if value is not None:
                self.firsts[node] = value
            if value is not None and in_place:
                self.refuse_edit_of_others(node, source)
                self.exprs[self.timeline.storage(source)] = value.expr
            return None
        if node.op == "call_method" and node.target in ("scatter_add", "scatter_add_"):
            given = dict(zip(("input", "dim", "index", "src"), node.args, strict=False))
            return None if node.kwargs else self.steps["scatter_add"](self, node, given)
        spelled = spellings.read(node)
        if spelled is None:
            return self._copied(node)
        step, args = spelled
        function = self.steps.get(step.name)
        return None if function is None else function(self, node, args)

    def _copied(self, node: Node) -> Value | None:
        """x.copy_(y), as a collective in place ends."""
        if node.op != "call_method" or node.target != "copy_" or node.kwargs or len(node.args) != 2:
            return None
        target, source = node.args
        alike = isinstance(target, Node) and decided_equal(shape_of(target), shape_of(source))  # type: ignore
        return self.value(source) if alike else None

    def _collective(self, node: Node) -> Value | None:
        source, how, group = node.args[:3]
        value = self.value(source)
        if value is not None and value.attached and how == "sum":
            raise NotRead(node, "Gradients are on, and none goes through the sum over ranks by {step}")
        reduced = self._over_ranks(value, how, group)
        if reduced is not None:
            self.pending[node] = reduced
        return None

    def _over_ranks(self, value: Value | None, how: Any, group: Any) -> Value | None:
        if value is None or value.is_wide:
            return None
        assert isinstance(value.expr, sympy.Expr)
        return self.over_ranks(value.expr, value.attached, how, group)

    def over_ranks(self, expr: sympy.Expr, attached: bool | None, how: Any, group: Any) -> Value | None:
        """What all ranks of a group have of a row expression, summed, or the largest."""
        found = self.found
        if how == "max":
            if expr != parts.MAX_HERE or attached:
                return None
            result: tuple[sympy.Expr, dict[sympy.Symbol, Picked]] | None = (algebra.MAX_HELD, {})
        elif how == "sum":
            name = f"y{len(found.picked) + 1}" if found.picked else "y"
            result = parts.summed_over_ranks(expr, {*found.masks}, name)
        else:
            result = None
        if result is None:
            return None
        if found.group not in (None, group):
            raise NotRead(found.logits, "Ranks of two groups exchange parts of {step}")
        found.group = group
        total, picked = result
        found.picked |= picked
        return Value(total, None if how == "max" else attached)

    # Numbers of rows

    def _is_row(self, node: Node) -> bool:
        value = self.value(node)
        return value is not None and not value.is_wide

    def row(self, node: Any) -> sympy.Expr | None:
        """What has a number for each row, and any number."""
        if isinstance(node, (int, float)) and not isinstance(node, bool):
            return algebra.number(node) if math.isfinite(node) else None
        value = self.value(node)
        if value is not None:
            return None if value.is_wide else value.expr
        if number_of(node) is not None:
            return self._number(node)
        if not isinstance(node, Node) or node in self.behind or not self.of_rows.has(node):
            return None
        if not self.timeline.unchanged(node, node):
            return None
        return self._of_masks(node) or self._named(node)

    def _of_masks(self, node: Node) -> sympy.Expr | None:
        """A number made of masks."""
        spelled, example = spellings.read(node), tensor_of(node)
        made = None if spelled is None else self._made_of_masks(node, *spelled)
        if made is None and example is not None and example.dtype == torch.bool:
            return self._symbol(self.found.masks, "m", node)
        return made

    def _made_of_masks(self, node: Node, step: Any, args: dict[str, Any]) -> sympy.Expr | None:
        if step.name == "where":
            condition, a, b = (self.row(args.get(name)) for name in ("condition", "input", "other"))
            if condition is None or a is None or b is None or 0 not in (a, b):
                return None
            return sympy.expand(condition * a + (1 - condition) * b)
        a = self.row(args.get("input"))
        if a is None:
            return None
        if _is_view(node):
            return a if a.free_symbols & {*self.found.masks} or a.is_number else None
        if step.name in ("not", "neg"):
            return 1 - a if step.name == "not" else -a
        other, tensors = args.get("other"), [n for n in node.all_input_nodes if tensor_of(n) is not None]
        b = (self._number(other) if step.name == "mul" else None) or self.row(other)
        if step.name not in ("sub", "rsub", "mul", "add") or len(tensors) != 1 or b is None:
            return None
        if args.get("alpha", 1) != 1:
            return None
        return {"add": a + b, "mul": a * b, "sub": a - b, "rsub": b - a}[step.name]

    def _named(self, node: Node) -> sympy.Expr | None:
        example = tensor_of(node)
        assert example is not None
        if not example.is_floating_point():
            return None
        while _is_view(node) and (source := viewed(node)) is not None:
            node = source
        return self._symbol(self.found.others, "r", node)

    @staticmethod
    def _symbol(known: dict[sympy.Symbol, Node], letter: str, node: Node) -> sympy.Symbol:
        for symbol, held in known.items():
            if held is node:
                return symbol
        symbol = algebra.outside(f"{letter}{len(known) + 1}")
        known[symbol] = node
        return symbol

    def label(self, node: Node, at: Node) -> sympy.Symbol:
        """The symbol of labels of this rank, as the step `at` reads them."""
        while _is_view(node) and not spellings.is_step(node, "same"):
            node = spellings.read(node)[1]["input"]  # type: ignore[index]
        position = self.timeline.position
        for symbol, (held, there) in self.found.labels.items():
            if held is node and self.timeline.unchanged(node, position[there], position[at]):
                return symbol
        symbol = algebra.label(f"here{len(self.found.labels) + 1}")
        self.found.labels[symbol] = node, at
        return symbol

    # Operations

    def joined(
        self, node: Node, args: dict[str, Any], function: Callable[[Any, Any], Any], reverse: bool = False
    ) -> Value | None:
        """An operation between what is wide, rows and numbers."""
        if args.get("alpha", 1) != 1 or args.get("rounding_mode") is not None:
            return None
        given = [args.get("input"), args.get("other")]
        if not any(self.value(x) is not None for x in given):
            return None
        attached = self.attachment(node, given)
        exprs: list[Any] = []
        for arg in given:
            value = self.value(arg)
            if value is not None and value.is_wide:
                exprs.append(value.expr)
                continue
            number = self._number(arg)
            row = self.row(arg) if number is None else number
            if row is None or not self._broadcasts(arg, node, any(self.is_wide(x) for x in given)):
                return None
            exprs.append(row)
        if reverse:
            exprs.reverse()
        expr = function(*exprs)
        return None if expr is None else Value(expr, attached)

    def _number(self, given: Any) -> sympy.Expr | None:
        """The symbol of a number, or of a node that is one."""
        numbers = self.found.numbers
        value = given if isinstance(given, (int, float)) else number_of(given)
        if value is None or (isinstance(value, (int, float)) and not math.isfinite(value)):
            return None
        symbol = sympy.Symbol(f"n{len(numbers) + 1}", real=True)
        numbers[symbol] = algebra.number(value) if isinstance(value, (int, float)) else value.node.expr
        if isinstance(given, Node):
            self.found.scalars[symbol] = given
        return symbol

    def is_wide(self, node: Any) -> bool:
        value = self.value(node)
        return value is not None and value.is_wide

    def _broadcasts(self, arg: Any, node: Node, wide: bool) -> bool:
        """Whether a row's number meets that row."""
        if tensor_of(arg) is None:
            return True
        sizes, result = shape_of(arg), shape_of(node)
        return decided_equal(sizes, (*result[:-1], 1) if wide else result)

    def attachment(self, node: Node, given: list[Any]) -> bool | None:
        found = {v.attached for x in given if (v := self.value(x)) is not None} - {None}
        if len(found) > 1:
            raise NotRead(node, "A gradient flows through some of what is joined by {step}")
        return next(iter(found), None)
