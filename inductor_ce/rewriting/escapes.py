"""What stays in the graph, and what is told of it: log-probabilities that escape, losses not read."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch.fx import Node

from .. import algebra
from ..common.findings import Reason, Refusal, name_of, where_is
from ..graph.shapes import elements_of, example_of, hint, same_shape, shape_of, tensor_of
from ..graph.timeline import written_by
from ..reading import spellings
from ..reading.aten import is_backward
from ..reading.operands import EDITED_BETWEEN
from ..reading.values import LossValue, OnLogits, Reading, RowValue, VocabValue, row_expr
from ..reading.views import broadcast_operand
from .linear_layers import linear_layer

# Steps whose results are no functions of each element of what they are made of, and those that have the
# elements of several tensors.
WHOLE = ("matmul", "einsum", "log_softmax", "softmax")
GLUE = ("cat", "stack")

# In the meta of log-probabilities that are kept beside a divergence, and of its normalisers: for whom.
KEPT = "inductor_ce_kept"
PRODUCTS = ("matmul", "einsum")


def needed_nodes(reading: Reading, replaced: set[Node], as_read: set[Node] | None = None) -> set[Node]:
    """The nodes that stay alive once `replaced` are computed otherwise: those `as_read`, all unless they are
    given, of what the user brings along for them."""
    needed: set[Node] = set()
    wanted = {node for end in (replaced if as_read is None else as_read) for node in _brought(reading, end)}
    for node in reversed(reading.timeline.nodes):
        is_read = node in reading.values or node in reading.looked_through
        if node in reading.originals:
            continue
        if node not in replaced and (not is_read or node in wanted):
            needed.add(node)
            wanted.update(read_by(node))
    return needed


def read_by(node: Node) -> Sequence[Node]:
    """The nodes whose elements, not only their shape or dtype, a node reads."""
    operand = broadcast_operand(node)
    if operand is not None:
        return [operand]
    step = spellings.step_of(node)
    if step is None:
        return node.all_input_nodes
    if step.reads_shapes:
        return []
    return [node.args[0]] if step.reads_first and isinstance(node.args[0], Node) else node.all_input_nodes


def is_of_each(node: Node, source: Node) -> bool:
    """Whether a node has the elements of a source, in some order, or a function of each."""
    spelled, example = spellings.read(node), tensor_of(node)
    if example is None or any(written_by(node)) or linear_layer(node, spelled) is not None:
        return False
    if spelled is not None and (spelled[0].view is not None or spelled[0].name in (*WHOLE, *GLUE)):
        return spelled[0].name not in WHOLE
    return same_shape(example.shape, shape_of(source))


def is_of_losses(reading: Reading, node: Node) -> bool:
    """Whether the elements of a tensor, or of its largest part, are made of what losses have of each row."""
    frontier, seen = [node], {node}
    while frontier:
        made = frontier.pop()
        value = reading.on_logits(made)
        if isinstance(value, (RowValue, LossValue)) and algebra.is_normalised(row_expr(value)):
            return True
        sources = [a for a in made.all_input_nodes if tensor_of(a) is not None and is_of_each(made, a)]
        if any(spellings.is_step(made, name) for name in GLUE):
            sources = sorted(sources, key=elements_of)[-1:]
        frontier += [a for a in sources if a not in seen]
        seen.update(sources)
    return False


def escape(reading: Reading, wide: Sequence[Node], needed: set[Node]) -> Refusal:
    """Why losses whose log-probabilities `wide` somebody else needs are left as they were."""
    backward = next((user for node in wide for user in readers_of_copies(node) if is_backward(user)), None)
    if backward is None:
        return Refusal(Reason.LOGITS_ESCAPE, _escape_fact(reading, wide[0], needed))
    fact = f"Its backward is in the graph too, as make_fx of a whole step writes it out: {name_of(backward)}."
    return Refusal(Reason.BACKWARD_IN_GRAPH, fact)


def readers_of_copies(node: Node) -> Iterator[Node]:
    """Who reads a node, or what it is without its gradient."""
    for user in node.users:
        yield user
        if spellings.is_step(user, "detach"):
            yield from readers_of_copies(user)


def _escape_fact(reading: Reading, wide: Node, needed: set[Node]) -> str:
    """Who else needs the log-probabilities `wide`."""
    what = f"The {name_of(wide)} of all classes [{'x'.join(map(str, shape_of(wide)))}]"
    user: Node | None = wide
    while user is not None and (user is wide or _is_followed(reading, user)):
        readers = [u for u in user.users if u in needed and user in read_by(u)]
        user = min(readers, key=_is_without_gradient, default=None)
    if user is None:
        return f"{what} is needed elsewhere."
    if user.op == "output":
        return f"{what} is returned, so it is in memory anyway."
    return f"{what} is also used by {name_of(user)} {where_is(user)}."


def _is_without_gradient(node: Node) -> bool:
    """Whether no gradient comes back from a node, which then is not why something is left."""
    example = tensor_of(node)
    return example is None or not example.requires_grad


def _is_followed(reading: Reading, node: Node) -> bool:
    return isinstance(reading.values.get(node), VocabValue) and not _waits(reading, node)


def _waits(reading: Reading, node: Node) -> bool:
    """Whether a node is a function that the algebra does not have, to be applied to what is picked."""
    value = reading.values.get(node)
    return isinstance(value, VocabValue) and bool(value.after)


def tell_unread(reading: Reading, replaced: set[Node], min_vocab: int, everywhere: Refusal | None) -> None:
    """Tell of log-probabilities over a vocabulary that end in something the algebra does not have.

    `everywhere` is the reason that stands for all of the graph, if there is one.
    """
    needed = needed_nodes(reading, replaced)
    fused = {reading.on_logits(node).logits for node in replaced}  # type: ignore[union-attr]
    brought = {n for node in replaced for n in _brought(reading, node)}
    kept = {n for node, (_, wide) in reading.kept.items() if node in replaced for n in wide}
    for node in reading.timeline.nodes:
        value = reading.on_logits(node)
        if value is None or node not in needed or node in kept or KEPT in node.meta:
            continue
        size = hint(shape_of(value.logits.node)[value.logits.axis])
        if size < min_vocab or not _normalises(reading, node, value):
            continue
        if isinstance(value, RowValue) and value.logits in fused:
            continue  # the statistic of a loss that is fused, needed for something else as well
        of_rows = isinstance(reading.on_logits(value.logits.node), RowValue)
        if of_rows or is_of_losses(reading, value.logits.node):
            continue  # rows of other logits, over which the user normalises
        if brought & {node, *_readers(reading, node, value)}:
            continue  # what another loss is weighed by
        if not _is_told(reading, node, value):
            reading.miss(node, everywhere or _why_unread(reading, node, value))


def _brought(reading: Reading, node: Node) -> set[Node]:
    value = reading.values.get(node)
    return reading.brought(value) if isinstance(value, (RowValue, LossValue)) else set()


def _normalises(reading: Reading, node: Node, value: OnLogits) -> bool:
    """Whether a loss seems to begin or to have been taken here: a normaliser, or probabilities with a log."""
    if isinstance(value, LossValue) or _waits(reading, node):
        return False
    step = spellings.step_of(node)
    if step is None:
        return False
    is_softmax = step.name == "softmax" or (step.name == "div" and _divides_exponentials(reading, node))
    return _has_log(node) if is_softmax else step.normalises


def _divides_exponentials(reading: Reading, node: Node) -> bool:
    """Whether probabilities are made of exponentials by their sum."""
    values = [reading.values.get(each) for each in (node, *node.all_input_nodes[:1])]
    of_each = [value.expr.terms for value in values if isinstance(value, VocabValue)]
    has_lse = [any(b.p and c.has(algebra.LSE) for b, c in terms) for terms in of_each]
    return has_lse == [False, True]


def _has_log(node: Node) -> bool:
    """Whether a logarithm is taken of what a node is summed into, or of its product with a matrix."""
    frontier, weighed = [node], [node]
    for made in frontier:
        users = [(user, step) for user in made.users if (step := spellings.step_of(user)) is not None]
        frontier += [user for user, step in users if step.view is not None and user not in frontier]
        weighed += [u for u, step in users if step.name in PRODUCTS and u.all_input_nodes[0] is made]
    return any(map(spellings.has_log, weighed))


def _readers(reading: Reading, node: Node, value: OnLogits) -> Iterator[Node]:
    """The users of a node, and those of what is read as being of the same logits, nearest first."""
    frontier, seen = [node], {node}
    while frontier:
        head = frontier.pop(0)
        fresh = [user for user in head.users if user not in seen and head in read_by(user)]
        yield from fresh
        seen.update(fresh)
        frontier += [user for user in fresh if _stays(reading, user, value)]


def _stays(reading: Reading, user: Node, value: OnLogits) -> bool:
    """Whether a user is read as being of the same logits."""
    its_own = reading.on_logits(user)
    return its_own is not None and its_own.logits == value.logits


def _is_told(reading: Reading, node: Node, value: OnLogits) -> bool:
    return any(user in reading.refused for user in _readers(reading, node, value))


def _why_unread(reading: Reading, node: Node, value: OnLogits) -> Refusal:
    """What the step says after which the reading broke off, or its name."""
    if node in reading.between:
        end, why = reading.between[node]
        return Refusal(why.reason, why.sentence(end))
    mixed = _mixed_by(node, value)
    if mixed is not None:
        fact = "the log of a mixture of probabilities, such as that of a Jensen-Shannon divergence, is taken"
        return Refusal(Reason.MIXTURE, f"{_goes_into(node, mixed)[:-1]}, where {fact}.")
    for user in _readers(reading, node, value):
        refusal = reading.refusals.get(user)
        if refusal is not None and not (refusal.culprit and _is_made_of(refusal.culprit, node)):
            return _told_at(node, user, refusal)
        if user.op == "output":
            fact = f"The result of {name_of(node)} is returned; no loss is taken from it here."
            return Refusal(Reason.NOT_UNDERSTOOD, fact)
        if not _stays(reading, user, value) or _waits(reading, user):
            own = reading.refusals.get(node)
            if own is not None:
                return Refusal(own.reason, own.sentence(node))
            return _break(reading, node, value, user)
    return Refusal(Reason.NOT_UNDERSTOOD, f"The result of {name_of(node)} is not used.")


def _mixed_by(node: Node, value: OnLogits) -> Node | None:
    """What takes the log of a mixture of probabilities, of which those of `node` are some.

    What is smaller than the logits are normalisers, of which a sum is no mixture.
    """
    entries = elements_of(value.logits.node)
    frontier, seen = [node], {node}
    while frontier:
        source = frontier.pop(0)
        for user in source.users:
            step = spellings.step_of(user)
            if name_of(user) == "logaddexp" or _is_over_stack(user, source):
                if elements_of(source) >= entries:
                    return user
                continue
            shifts = step is not None and step.name in ("add", "sub", "stack", "to", "detach")
            if shifts and user not in seen:
                seen.add(user)
                frontier.append(user)
    return None


def _is_over_stack(node: Node, source: Node) -> bool:
    """Whether it is a logsumexp over what `source` has stacked."""
    if not spellings.is_step(node, "logsumexp") or not spellings.is_step(source, "stack"):
        return False
    dims = [spellings.arguments_of(n).get("dim", 0) for n in (node, source)]
    rank = len(shape_of(source))
    return all(isinstance(dim, int) for dim in dims) and dims[0] % rank == dims[1] % rank


def _told_at(node: Node, user: Node, refusal: Refusal) -> Refusal:
    """The refusal of `user` as one of the loss that begins at `node`."""
    fact = refusal.sentence(user)
    if refusal.reason is Reason.NOT_UNDERSTOOD:
        fact = f"{_goes_into(node, user)} {fact}"
    return Refusal(refusal.reason, fact)


def _goes_into(node: Node, user: Node) -> str:
    return f"The result of {name_of(node)} goes into {name_of(user)} {where_is(user)}."


def _break(reading: Reading, node: Node, value: OnLogits, user: Node) -> Refusal:
    """What can be said of `user`, which is not read as being of the same logits and does not say why."""
    other = reading.on_logits(user)
    picks = any(spellings.is_step(user, name) for name in ("nll_loss", "gather"))
    if picks and other is not None and other.logits.node is node:
        theirs = f"{name_of(user)} {where_is(user)} takes classes on dimension {other.logits.axis}"
        fact = f"The {name_of(node)} is over dimension {value.logits.axis}, and {theirs}."
        return Refusal(Reason.NOT_UNDERSTOOD, fact)
    beside = [reading.on_logits(a) for a in user.all_input_nodes]
    same = [v.logits.version for v in beside if v is not None and v.logits.node is value.logits.node]
    if len(set(same)) > 1:
        return Refusal(EDITED_BETWEEN.reason, EDITED_BETWEEN.sentence(user))
    others = {v.logits.node for v in beside if v is not None} - {value.logits.node}
    moves = all(example_of(z).requires_grad for z in (value.logits.node, *others))
    each = _needs_each(reading, value, user)
    if each:
        return Refusal(Reason.EACH_ENTRY, f"{_goes_into(node, user)[:-1]}, {each}.")
    if others and moves and spellings.is_step(user, "sub"):
        fact = "there it meets what is made of other logits, of which a gradient is wanted as well"
        return Refusal(Reason.SOFT_TARGETS, f"{_goes_into(node, user)[:-1]}; {fact}.")
    return Refusal(Reason.NOT_UNDERSTOOD, _goes_into(node, user))


def _needs_each(reading: Reading, value: OnLogits, user: Node) -> str:
    """Why a step needs each entry of log-probabilities by itself, "" where it does not."""
    if not isinstance(value, VocabValue):
        return ""
    if _waits(reading, user) or any(_waits(reading, a) for a in user.all_input_nodes):
        return "of which more than picked entries are needed"
    spelled = spellings.read(user)
    if spelled is not None and spelled[0].name in PRODUCTS:
        return "which weighs the classes by a matrix"
    if spelled is None or spelled[0].name not in ("sum", "mean"):
        return ""
    dim, source = spelled[1].get("dim"), reading.on_logits(spelled[1].get("input"))
    dims = [d for d in (dim if isinstance(dim, (tuple, list)) else [dim]) if isinstance(d, int)]
    if not isinstance(source, VocabValue) or not dims:
        return ""
    rank = len(shape_of(spelled[1]["input"]))
    over_rows = source.axis not in {d % rank for d in dims}
    return "which adds up rows, class by class" if over_rows else ""


def _is_made_of(node: Node, source: Node) -> bool:
    """Whether a node is computed from what `source` is computed from, the log-probabilities' own logits."""
    frontier, seen = [node], {node, *source.all_input_nodes}
    while frontier:
        for argument in frontier.pop().all_input_nodes:
            if argument is source or argument in source.all_input_nodes:
                return True
            if argument not in seen:
                seen.add(argument)
                frontier.append(argument)
    return False
