"""Normalisers alone: logsumexp(z), or a sum of exponentials, that meets none of its own logits.

An energy, the denominator of a loss whose numerator is another tensor, the logit of the label computed apart
from the head. The statistics are those of any loss, and so is the gradient. But where anything else reads the
logits as well, they are in memory, and so may be their gradient; and an outer sum, as in a forward algorithm,
plain Inductor never has in memory. Both are better left. Logits picked from the same product are no such
reader: they are picked again from it, so that it need not be in memory for them. Nor is the best class of a
teacher's logits, whose head makes it with the weights.
"""

from __future__ import annotations

from collections import defaultdict

from torch.fx import Node

from .. import algebra
from ..common.compat.graphs import is_plain_tensor
from ..common.findings import Reason, Refusal
from ..graph.shapes import equal, example_of, same_shape, shape_of, tensor_of
from ..graph.walk import reached
from ..reading import spellings
from ..reading.context import Context
from ..reading.picks import fixed_pick
from ..reading.values import Logits, LossValue, Reading, RowValue, detached, is_shift, row_expr
from .escapes import GLUE, is_of_each, is_of_losses, needed_nodes, read_by
from .groups import expr_of, value_of
from .linear_layers import linear_layer, logit_classes

# What a loss takes of logits beside their normaliser. Where one of these reads them, that is no other reader.
OF_LOSSES = ("gather", "take_along", "take", "index_select", "getitem", "select", "diagonal", "amax", "max")


def is_normaliser_alone(reading: Reading, logits: Logits, nodes: list[Node]) -> bool:
    """Whether `nodes` have a normaliser of rows of logits that nothing else reads; if not, it is told why."""
    if not any(algebra.is_normalised(expr_of(reading, node)) for node in nodes):
        return False
    rank = len(shape_of(logits.node))
    if rank < 2 or _is_outer(logits.node):
        return False
    if logits.axis != rank - 1 and not (rank == 2 and _product(logits.node) is not None):
        where = f"dimension {logits.axis} of {list(shape_of(logits.node))}"
        fact = f"Nothing but a normaliser is taken along {where}, so that rows would have to be copied."
        _tell(reading, logits, Refusal(Reason.NORMALISER, fact))
        return False
    made = reading.on_logits(logits.node)
    if (made is not None and made.logits != logits) or is_of_losses(reading, logits.node):
        return False  # of what other losses give
    root = _root(logits.node)
    if any(spellings.is_step(root, name) for name in ("log_softmax", "softmax")):
        return False  # of probabilities, which are in memory
    reader = _other_reader(reading, root, needed_beside(reading, set(nodes)))
    if reader is not None and not any(spellings.is_step(reader, name) for name in OF_LOSSES):
        why = "for they are returned" if reader.op == "output" else "for {culprit}"
        fact = f"The logits of this normaliser are in memory anyway, {why}."
        _tell(reading, logits, Refusal(Reason.NORMALISER, fact, reader))
    return reader is None


def needed_beside(reading: Reading, nodes: set[Node]) -> set[Node]:
    """What stays alive once `nodes`, and all that has a normaliser, are computed otherwise."""
    rows = {n: v for n, v in reading.values.items() if isinstance(v, (RowValue, LossValue))}
    return needed_nodes(reading, nodes | {n for n, v in rows.items() if algebra.is_normalised(row_expr(v))})


def is_read_by_others(reading: Reading, node: Node, needed: set[Node]) -> bool:
    """Whether something that is needed reads logits, or what they are made of, but for normalisers."""
    return _other_reader(reading, _root(node), needed) is not None


def is_of_product(node: Node) -> bool:
    """Whether a linear layer makes a tensor, element by element."""
    return _product(node) is not None


def read_fixed_picks(reading: Reading) -> None:
    """Read the diagonal, or columns, of logits that nobody normalised, where others of their product are."""
    axes: dict[Node, set[tuple[int, Node]]] = defaultdict(set)
    for value in list(reading.values.values()):
        if isinstance(value, (RowValue, LossValue)) and algebra.is_normalised(row_expr(value)):
            product = _product(value.logits.node)
            if product is not None:
                axes[product].add((value.logits.axis, value.logits.node))
    for node in reading.timeline.nodes if axes else ():
        spelled = spellings.read(node)
        if node in reading.values or spelled is None or not spelled[0].picks:
            continue
        source = spelled[1].get("input")
        if not isinstance(source, Node) or tensor_of(source) is None:
            continue
        for axis in {axis for axis, z in axes.get(_product(source), ()) if _are_alike(z, source, axis)}:  # type: ignore[arg-type]
            context = Context(reading, node)
            logits = context.vocab(source, axis)
            picked = None if logits is None else fixed_pick(context, spelled[0].name, spelled[1], logits)
            if picked is not None:
                reading.values[node] = detached(picked) if context.grad_mode is False else picked


def _are_alike(z: Node, source: Node, axis: int) -> bool:
    """Whether the classes of logits are on an axis of another tensor that is made of the same product."""
    a, b = shape_of(z), shape_of(source)
    return len(a) == len(b) and equal(a[axis], b[axis])


def picked_beside(
    reading: Reading, losses: dict[Logits, list[Node]], ends: dict[Logits, list[Node]]
) -> dict[Logits, list[Node]]:
    """The nodes that pick logits made of a product of which there is a loss, if nothing else reads that."""
    needed = needed_nodes(reading, {node for nodes in losses.values() for node in nodes})
    products = {root for logits in losses for root in _products(logits.node)}
    roots = {root for root in products if _other_reader(reading, root, needed) is None}
    return {
        logits: nodes
        for logits, nodes in ends.items()
        if logits not in losses
        and _product(logits.node) in roots
        and all(_is_picked(reading, node) for node in nodes)
    }


def best_of_teachers(
    reading: Reading, losses: dict[Logits, list[Node]], ends: dict[Logits, list[Node]]
) -> dict[Logits, list[Node]]:
    """The nodes that have the best class of logits, and nothing else of them, where a loss has a weight for
    each row and class made of the same product: so that a teacher's best class is made with its weights."""
    others = {z: nodes for z, nodes in ends.items() if z not in losses}
    found = {z: nodes for z, nodes in others.items() if _are_best(reading, z, nodes)}
    if not found:
        return {}
    values = [value_of(reading, node) for nodes in losses.values() for node in nodes]
    brought = {node for value in values for node in reading.brought(value) if logit_classes(node) is not None}
    taught = set(reached(brought, _before))
    return {z: nodes for z, nodes in found.items() if not taught.isdisjoint(_layers(z.node))}


def _are_best(reading: Reading, logits: Logits, nodes: list[Node]) -> bool:
    is_plain = is_plain_tensor(example_of(logits.node))
    return is_plain and all(expr_of(reading, node) == algebra.ARGMAX for node in nodes)


def _layers(node: Node) -> list[Node]:
    """The linear layers of which a tensor with classes is made."""
    return [each for each in reached([node], _before) if linear_layer(each, spellings.read(each)) is not None]


def _before(node: Node) -> list[Node]:
    """What with classes a node is made of, up to linear layers."""
    if linear_layer(node, spellings.read(node)) is not None:
        return []
    return [source for source in node.all_input_nodes if logit_classes(source) is not None]


def _products(node: Node) -> set[Node]:
    """The linear layers whose results are put side by side, and then a tensor is made of, likewise."""
    root = _root(node)
    if any(spellings.is_step(root, name) for name in GLUE):
        return {product for part in root.all_input_nodes for product in _products(part)}
    return {root} if linear_layer(root, spellings.read(root)) is not None else set()


def _product(node: Node) -> Node | None:
    """The linear layer whose result a tensor is made of, element by element."""
    root = _root(node)
    return root if linear_layer(root, spellings.read(root)) is not None else None


def _is_picked(reading: Reading, node: Node) -> bool:
    """Whether a node has logits that labels pick, and nothing else of them."""
    value = reading.on_logits(node)
    if not isinstance(value, RowValue):
        return False
    expr = expr_of(reading, node)
    return bool(algebra.picks_of(expr)) and not algebra.is_normalised(expr)


def _tell(reading: Reading, logits: Logits, refusal: Refusal) -> None:
    for node, value in reading.values.items():
        if isinstance(value, RowValue) and value.logits == logits:
            reading.refusals.setdefault(node, refusal)


def _root(node: Node) -> Node:
    """What a tensor is made of by views and functions of each element, one of which has a gradient."""
    while True:
        sources = [a for a in node.all_input_nodes if _has_gradient(a) and is_of_each(node, a)]
        if len(sources) != 1:
            return node
        (node,) = sources


def _has_gradient(node: Node) -> bool:
    example = tensor_of(node)
    return example is not None and example.requires_grad and example.dim() > 1


def _other_reader(reading: Reading, node: Node, needed: set[Node]) -> Node | None:
    """What stays alive and reads a tensor, or what is made of its elements, but for other normalisers."""
    for user in node.users:
        if user not in needed or node not in read_by(user):
            continue
        value = reading.on_logits(user)
        if isinstance(value, (RowValue, LossValue)) and algebra.is_normalised(expr_of(reading, user)):
            continue
        if _is_picked(reading, user) and _product(node) is not None:
            continue
        if _is_maximum_beside(reading, user) or _is_pick_of_losses(user, needed):
            continue
        if not is_of_each(user, node):
            return user
        further = _other_reader(reading, user, needed)
        if further is not None:
            return further
    return None


def _is_pick_of_losses(node: Node, needed: set[Node]) -> bool:
    """Whether a node picks logits, and nothing but losses that are computed otherwise reads them."""
    step = spellings.step_of(node)
    return step is not None and step.picks and bool(node.users) and needed.isdisjoint(node.users)


def _is_maximum_beside(reading: Reading, node: Node) -> bool:
    """Whether a node is the maximum of rows that have a normaliser, with which it is made."""
    value = reading.on_logits(node)
    if value is None or not is_shift(value):
        return False
    beside = (v for v in reading.values.values() if isinstance(v, RowValue) and v.logits == value.logits)
    return any(algebra.is_normalised(row_expr(each)) for each in beside)


def _is_outer(node: Node) -> bool:
    """Whether a node broadcasts its sources against each other: it has more elements than any of them."""
    step = spellings.step_of(node)
    while step is not None and (step.view is not None or len(node.all_input_nodes) == 1):
        source = node.all_input_nodes[0]
        if tensor_of(source) is None:
            return False
        node, step = source, spellings.step_of(source)
    if step is None or not step.in_chain:
        return False
    tensors = [a for a in node.all_input_nodes if tensor_of(a) is not None]
    return not any(same_shape(shape_of(a), shape_of(node)) for a in tensors)
