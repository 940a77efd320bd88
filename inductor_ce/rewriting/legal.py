"""Legality: which of the values that recognition read may be replaced, where, and why not the rest."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

import torch
from torch.fx import Node

from .. import algebra
from ..common.compat.graphs import (
    is_dtensor,
    is_function_transform,
    is_kept_dynamic,
    is_plain_tensor,
    set_grad_enabled,
)
from ..common.findings import Reason, Refusal
from ..common.options import Options
from ..distributed.placements import layout_fact
from ..graph.shapes import example_of, hint, shape_of, tensor_of
from ..graph.timeline import written_by
from ..reading import spellings
from ..reading.losses import class_dimension
from ..reading.values import Columns, Logits, LossValue, Reading, RowValue
from .beside import misplaced
from .compared import reads_as_written
from .escapes import escape, needed_nodes, tell_unread
from .groups import Group, expr_of, grouped, headline, value_of, wants_gradient
from .kept import for_whom, is_spared, is_target, may_keep
from .normalisers import best_of_teachers, is_normaliser_alone, picked_beside, read_fixed_picks

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

TRANSFORMED = Refusal(
    Reason.FUNCTION_TRANSFORM, "The graph runs under a transform of torch.func, such as vmap."
)
OWN_BACKWARD = Refusal(
    Reason.OWN_BACKWARD, "The loss is inside an autograd.Function, whose backward is its own."
)

MAXIMUM_KEPT = Refusal(
    Reason.NOT_UNDERSTOOD, "The maximum of a row is taken off and not added back: add it or detach it."
)
TIES_SHARE = Refusal(
    Reason.NOT_UNDERSTOOD,
    "All classes that have the maximum share the gradient of amax: take max(dim).values, whose first class "
    "has it.",
)
POWERS_CANCEL = Refusal(
    Reason.NOT_UNDERSTOOD,
    "Powers of the probabilities are summed beside the probabilities of a target, and gradients are wanted: "
    "where the prediction is near the target they cancel, which sums of a row do not survive.",
)
TAKEN_BACK = Refusal(
    Reason.NOT_UNDERSTOOD,
    "A class is left out of a sum over all by what takes it away again: where its logit is a mask's -1e9, or "
    "its probability is nearly 1, nothing would be left of the others. Multiply by a mask instead.",
)
LOGITS_EDITED = Refusal(
    Reason.MUTATED, "The logits are changed in place after this loss, whose backward reads them."
)
WEIGHTS_EDITED = Refusal(
    Reason.MUTATED,
    "What weighs the classes is changed in place after this loss, or one beside it, whose backward reads it.",
)
LABELS_EDITED = Refusal(
    Reason.MUTATED,
    "The labels are an argument that is changed in place after this loss, whose backward reads them.",
)
ALIAS_EDITED = Refusal(
    Reason.MUTATED, "The logits are changed in place through a transposed alias before this loss."
)


def judge(reading: Reading, options: Options) -> list[Group]:
    """Decide from graph structure, global shapes and options alone, so that all ranks decide alike."""
    groups: list[Group] = []
    everywhere = refusal_of_graph(reading)
    _tell_refused_losses(reading, options)
    read_fixed_picks(reading)
    ends = _ends(reading, options)
    losses = {logits: nodes for logits, nodes in ends.items() if _is_loss(reading, logits, nodes)}
    picked, best = (find(reading, losses, ends) for find in (picked_beside, best_of_teachers))
    for logits, nodes in (losses | picked | best).items():
        refusal = (
            few_classes(logits.node, logits.axis, options)
            or everywhere
            or refusal_of_logits(logits)
            or refusal_of_edit(reading, logits)
        )
        if refusal is not None:
            reading.miss(headline(reading, nodes), refusal)
            continue
        allowed = nodes if logits in best else _without_escapes(reading, nodes)
        if logits in picked or logits in best or _is_loss(reading, logits, allowed):
            groups += _not_refused(reading, grouped(reading, logits, allowed))
    replaced = {node for group in groups for node in group.nodes}
    tell_unread(reading, replaced, options.min_vocab, everywhere)
    return sorted(groups, key=lambda group: group.place)


def _tell_refused_losses(reading: Reading, options: Options) -> None:
    """Tell why losses of torch are left that say so themselves."""
    for node, refusal in reading.refusals.items():
        step, args = spellings.read(node)  # type: ignore[misc]
        if step.is_loss:
            z = args["input"]
            reading.miss(node, few_classes(z, class_dimension(z), options) or refusal)


def few_classes(node: Node, axis: int, options: Options) -> Refusal | None:
    """That a loss is over fewer classes than are worth it, which comes before all other reasons."""
    size, example = shape_of(node)[axis], tensor_of(node)
    assert example is not None
    known = isinstance(size, int) or is_dtensor(example) or is_plain_tensor(example)
    if not known or hint(size) >= options.min_vocab:
        return None
    fact = f"The vocabulary of {hint(size)} is below min_vocab={options.min_vocab}."
    return Refusal(Reason.SMALL_VOCAB, fact)


# What is a loss


def _ends(reading: Reading, options: Options) -> dict[Logits, list[Node]]:
    """For each logits the nodes where the algebra ends and the user's own rows begin."""
    ends: dict[Logits, list[Node]] = defaultdict(list)
    for node, value in reading.values.items():
        if isinstance(value, LossValue):
            is_end = not _needs_own_gradient(reading, node) and not _is_joined(reading, node)
        else:
            is_end = isinstance(value, RowValue) and _is_end(reading, node, value)
        if isinstance(value, (RowValue, LossValue)) and not is_end and _lacks_maximum(reading, node):
            fact, logits = _maximum_fact(reading, node), value.logits
            if fact is MAXIMUM_KEPT or not _is_told_beside_a_loss(reading, node, logits):
                reading.miss(node, few_classes(logits.node, logits.axis, options) or fact)
        if is_end:
            ends[value.logits].append(node)  # type: ignore[union-attr]
    return ends


def _is_end(reading: Reading, node: Node, value: RowValue) -> bool:
    if _needs_own_gradient(reading, node):
        return False
    return any(
        _is_strange(reading, node, user, value.logits) or _is_label_of(reading, node, user)
        for user in node.users
    )


def _is_joined(reading: Reading, node: Node) -> bool:
    """Whether nothing but what joins it to the losses of other rows uses a loss."""
    return bool(node.users) and all(user in reading.joined for user in node.users)


def _needs_own_gradient(reading: Reading, node: Node) -> bool:
    """Whether the user's nodes have a gradient, be it of 0 as a sum of probabilities has, and ours none."""
    is_number = expr_of(reading, node).is_number
    return _keeps_maximum(reading, node) or (is_number and example_of(node).requires_grad)


def _keeps_maximum(reading: Reading, node: Node) -> bool:
    """Whether a row's maximum does not cancel, and a gradient of which we have none flows through it.

    The user's own nodes are as good as ours then, and have that gradient.
    """
    return algebra.lacks_gradient(expr_of(reading, node))


def _lacks_maximum(reading: Reading, node: Node) -> bool:
    """Whether a node that keeps its maximum is where a loss ends."""
    is_loss = _keeps_maximum(reading, node) and algebra.is_normalised(expr_of(reading, node))
    return is_loss and any(user not in reading.values for user in node.users)


def _maximum_fact(reading: Reading, node: Node) -> Refusal:
    """Why a maximum is kept: it is missing from the normaliser, or is itself what the loss is of."""
    moved = algebra.shifted(expr_of(reading, node))
    return MAXIMUM_KEPT if moved.has(algebra.MAX) else TIES_SHARE


def _is_told_beside_a_loss(reading: Reading, node: Node, logits: Logits) -> bool:
    """Whether a number of each row, as the largest probability, is returned beside a loss of these logits."""
    others = (reading.on_logits(other) for other in reading.values if other is not node)
    is_beside = any(isinstance(other, LossValue) and other.logits == logits for other in others)
    return is_beside and all(user.op == "output" for user in node.users)


def _is_label_of(reading: Reading, node: Node, user: Node) -> bool:
    value = reading.values.get(user)
    return isinstance(value, (RowValue, LossValue)) and node in reading.brought(value)


def _is_strange(reading: Reading, node: Node, user: Node, logits: Logits) -> bool:
    """Whether a user is not of these logits, nor joins rows of them to others, and takes digits of ours."""
    value = reading.values.get(user)
    return (
        value is None or isinstance(value, Columns) or (value.logits != logits and user not in reading.joined)
    ) and not reads_as_written(reading, user, node, logits)


def _is_loss(reading: Reading, logits: Logits, nodes: list[Node]) -> bool:
    """A loss weighs the normaliser of a row against some of its logits, or has it alone."""
    exprs = [expr_of(reading, node) for node in nodes]
    if not any(map(algebra.is_normalised, exprs)):
        return False
    return any(map(algebra.weighs_logits, exprs)) or is_normaliser_alone(reading, logits, nodes)


# May it be replaced


def refusal_of_graph(reading: Reading) -> Refusal | None:
    """Why no loss of a graph may be replaced, if that is so."""
    if any(is_function_transform(node.target) for node in reading.timeline.nodes):
        return TRANSFORMED
    return OWN_BACKWARD if is_function_body(reading.timeline.nodes) else None


def refusal_of_logits(logits: Logits) -> Refusal | None:
    """Why no loss over these logits may be replaced, by their layout, dtype or size."""
    example = tensor_of(logits.node)
    assert example is not None
    if is_dtensor(example):
        fact = layout_fact(example, logits.axis)
        if fact is not None:
            return Refusal(Reason.PLACEMENTS, fact)
    elif not is_plain_tensor(example):
        fact = f"The logits are a {type(example).__name__}, not a plain tensor."
        return Refusal(Reason.UNSUPPORTED_TENSOR, fact)
    if example.dtype not in DTYPES:
        return Refusal(Reason.UNSUPPORTED_DTYPE, f"The logits are {example.dtype}.")
    size = shape_of(logits.node)[logits.axis]
    if not isinstance(size, int) and is_kept_dynamic(size):
        return Refusal(Reason.DYNAMIC_VOCAB, "The vocabulary dimension is marked dynamic.")
    return None


def _without_escapes(reading: Reading, nodes: list[Node]) -> list[Node]:
    """Leave out the nodes whose log-probabilities [N, V] something else needs, unless these are kept beside.

    Where there is no backward the statistics would be one more sweep.
    """

    def kept(node: Node, wide: list[Node]) -> str:
        return for_whom(reading, node, wide, needed) if is_spared(reading, node, wide, needed) else ""

    allowed = list(nodes)
    while True:
        needed, may = needed_nodes(reading, set(allowed)), may_keep(reading, allowed)
        escaped = {n: w for n in allowed if (w := sorted(value_of(reading, n).wide & needed, key=str))}
        found = {n: kept(n, wide) if may else "" for n, wide in escaped.items()}
        if all(found.values()):
            for n, fact in found.items():
                reading.kept[n] = fact, frozenset(escaped[n])
            return allowed
        escaped = {n: wide for n, wide in escaped.items() if not found[n]}
        allowed = [n for n in allowed if n not in escaped]
        node, wide = next(iter(escaped.items()))
        if not is_target(reading, node, wide):
            reading.miss(node, escape(reading, wide, needed))
        reading.refused |= escaped.keys()


def refusal_of_edit(reading: Reading, logits: Logits) -> Refusal | None:
    """Made functional, an edit through a transposed alias may leave other strides than the logits had.

    Nothing tells a kernel that reads them as [N, V], where the user's own operations do not care.
    """
    timeline = reading.timeline
    if not logits.version or len(shape_of(logits.node)) == 2:
        return None
    aliases = [
        alias
        for node in timeline.nodes
        for alias in written_by(node)
        if timeline.shares_storage(alias, logits.node) and not spellings.is_arithmetic_edit(node)
    ]
    strides = [tensor_of(alias).stride() for alias in aliases]  # type: ignore[union-attr]
    if all(list(stride) == sorted(stride, reverse=True) for stride in strides):
        return None
    return ALIAS_EDITED


def _not_refused(reading: Reading, groups: list[Group]) -> list[Group]:
    """The groups that nothing forbids that stands beside the logits or comes after the loss."""
    allowed = []
    for group in groups:
        refusal = _refusal_of_group(reading, group)
        if refusal is None:
            allowed.append(group)
        else:
            reading.miss(headline(reading, group.nodes), refusal)
            reading.taken_back.update(group.nodes if refusal is TAKEN_BACK else ())
    return allowed


def _refusal_of_group(reading: Reading, group: Group) -> Refusal | None:
    if _is_edited_later(reading, group, group.logits.node):
        return LOGITS_EDITED
    weights = [held.node for held in group.outside.values() if held.kind in ("classes", "columns")]
    if any(_is_edited_later(reading, group, weight) for weight in weights):
        return WEIGHTS_EDITED
    if _powers_cancel(reading, group):
        return POWERS_CANCEL
    of_entries = any(value_of(reading, node).wide & reading.taken_back for node in group.nodes)
    if of_entries or any(algebra.takes_back(e) for node in group.nodes for e in group.exprs_of(node)):
        return TAKEN_BACK
    return LABELS_EDITED if _are_labels_edited_later(reading, group) else misplaced(reading, group)


def _powers_cancel(reading: Reading, group: Group) -> bool:
    """Whether a gradient may be the small difference of large ones, as that of the Brier score is.

    Torch takes the difference of what reaches each probability, before it is summed with all others.
    """
    if not wants_gradient(group.logits):
        return False
    exprs = [expr for node, expr in group.exprs.items() if not value_of(reading, node).detached]
    return algebra.powers_cancel(*exprs)


def _is_edited_later(reading: Reading, group: Group, node: Node) -> bool:
    """Whether a tensor is written after the loss, while its backward has to read it."""
    timeline = reading.timeline
    if not group.attached or not wants_gradient(group.logits):
        return False
    return not timeline.unchanged(node, group.place)


def _are_labels_edited_later(reading: Reading, group: Group) -> bool:
    """Whether labels that are an argument of the graph are written after the loss.

    AOTAutograd writes arguments at the end of the forward, and its backward may read them after that.
    """
    timeline = reading.timeline
    arguments = [node for node in timeline.nodes if node.op == "placeholder"]
    return group.attached and any(
        held.node is not None
        and not timeline.unchanged(held.node, group.place)
        and any(timeline.shares_storage(held.node, argument) for argument in arguments)
        for held in group.labels.values()
    )


def is_function_body(nodes: Iterable[Node]) -> bool:
    """Whether a graph is the forward of an autograd.Function, as Dynamo captures it.

    Such a body switches gradients off before anything else, on again at its end, and returns a pair: its
    outputs, and what its backward is given.
    """
    first = next((node for node in nodes if node.op != "placeholder"), None)
    if first is None or first.target is not set_grad_enabled:
        return False
    *_, last, output = nodes
    switched = last is not first and last.target is set_grad_enabled
    returned = output.args[0] if output.args else None
    pair = isinstance(returned, tuple) and len(returned) == 2 and isinstance(returned[1], (tuple, list))
    return switched and pair and (first.args, last.args) == ((False,), (True,))
