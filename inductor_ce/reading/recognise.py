"""Recognise: read a torch-level graph in the algebra.

Every node gets, where it has one, a value: a vocabulary expression, a row expression or a reduced loss
over the statistics of some logits. What a node *is* is decided here; whether it *may* be replaced is
decided afterwards, in `rewriting.legal`.
"""

from __future__ import annotations

from torch.fx import Graph, Node

from .. import algebra
from ..common.compat.inductor import is_ahead_of_time
from ..common.failsafe import attempt
from ..common.findings import Refusal
from ..graph.exported import has_guards
from ..graph.timeline import Timeline
from ..ops.verified import VERIFIED
from . import arithmetic, indexing, joining, losses, picks, reductions, replaced, spellings, targets
from .arithmetic import or_afterwards
from .context import Context
from .steps import STEPS, Step
from .targets import Function, edit
from .values import Columns, Outcome, Reading, VocabValue, detached


def recognise(graph: Graph, apart: bool = False) -> Reading:
    """Read a graph. Nodes without an example tensor are passed over.

    With `apart`, targets and masks that are 0 at a label alone are tensors that are brought along.
    """
    reading = Reading(Timeline(graph), has_guards(graph) and not is_ahead_of_time(), apart)
    reading.originals = _originals(graph, reading.timeline.nodes)
    for node in reading.timeline.nodes:
        step = spellings.step_of(node)
        if step is None or step not in FUNCTIONS or node in reading.originals:
            continue
        if step.needs_value and not any(map(reading.has_value, node.all_input_nodes)):
            continue
        _read(reading, node, step)
    return reading


def _originals(graph: Graph, nodes: list[Node]) -> set[Node]:
    """The nodes that are there to be compared with what stands in their place."""
    found: set[Node] = set()
    compared = {node.args[1] for node in graph.find_nodes(op="call_function", target=VERIFIED)}
    for node in reversed(nodes) if compared else ():
        others = (user for user in node.users if user not in found)
        is_one = all(user.target is VERIFIED and user.args[0] is not node for user in others)
        if node.users and is_one and node.op != "placeholder":
            found.add(node)
    return found


def _read(reading: Reading, node: Node, step: Step) -> None:
    context = Context(reading, node)
    value, _ = attempt("a step is not read", FUNCTIONS[step], context, spellings.arguments(node, step))
    if value is None or (reading.apart and _is_0_at_a_label(value)):
        return
    if isinstance(value, Refusal):
        reading.refusals[node] = value
        return
    if isinstance(value, Columns) and context.grad_mode is not True and reading.has_gradient(value):
        return
    if isinstance(value, VocabValue) and algebra.takes_entry_back(value.expr):
        reading.taken_back.add(node)
    if not isinstance(value, Columns) and (value.detached or context.grad_mode is False):
        value = detached(value)
    reading.values[node] = value


def _is_0_at_a_label(value: Outcome) -> bool:
    return isinstance(value, Columns) and algebra.is_0_at_a_label(value.expr)


_MODULES = {
    m.__name__.rpartition(".")[2]: m
    for m in (arithmetic, indexing, joining, losses, picks, reductions, replaced, targets)
}


def _function(step: Step) -> Function:
    """What reads a step, which its row names."""
    module, _, name = step.function.partition(".")
    function: Function = getattr(_MODULES[module], name)
    function = or_afterwards(function) if step.commutes else function
    return edit(function) if step.edits else function


FUNCTIONS = {step: _function(step) for step in STEPS if step.function}
