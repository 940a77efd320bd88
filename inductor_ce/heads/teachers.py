"""The teacher of a head: another linear layer, which makes a weight for each of its rows and classes.

    q = softmax(product(hidden, columns) / T)         a weight [N, V] of the student's `row_stats`

What is made of the teacher's logits for a row needs that row alone, so it can be made for the rows of a piece
when the student's logits of the piece are, and none of it is ever in memory for all rows. No gradient is
wanted of it: of the weights of `row_stats` there is none.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch.fx import Node

from .. import ops
from ..graph.shapes import equal, example_of, shape_of, tensor_of
from ..graph.walk import args_of, reached
from .calls import grad_call, stats_call
from .cut_rows import CUT, PAD, SUMS, uncut
from .find import Head, NoHead, Teacher, product_of
from .kinds import PRODUCTS, is_of_size, is_ordered_view, is_pointwise, summed_dims, vocab_axis

WHOLE = "the teacher's logits are whole: "
TAUGHT = "the teacher's logits, and what is made of them, are those of the same rows"


def taught_bytes(head: Head) -> int:
    """Bytes of the teacher's logits for each of the student's, which are there at once.

    What is made of them for rows and classes is nowhere in memory: kernels make it as they read it.
    """
    if head.teacher is None:
        return 0
    return sum(example_of(product.node).element_size() for product in head.teacher.products)


def teacher_of(head: Head) -> tuple[Teacher | None, str]:
    """(the teacher or None, why what makes the weights cannot be divided by rows or "")."""
    sources = reached(weights_of(head), lambda node: _sources_by_row(node, head))
    roots = {node for node in sources if node.target in PRODUCTS and _is_wide(node, head)} - head.roots
    if not roots:
        return None, _why_no_roots(head)
    try:
        return _followed(head, roots), ""
    except NoHead as why:
        return None, f"{WHOLE}{why}"


def _why_no_roots(head: Head) -> str:
    """Why no product with a row for each of the student's makes the weights; "" where none at all does."""

    def before(node: Node) -> list[Node]:
        wide = [s for s in node.all_input_nodes if tensor_of(s) is not None and len(shape_of(s)) > 1]
        return [] if node.target in PRODUCTS else [s for s in wide if equal(shape_of(s)[-1], head.v)]

    found = list(reached(weights_of(head), before))
    if not any(node.target in PRODUCTS and node not in head.roots for node in found):
        return ""
    mixed = (n for n in found if n.target not in PRODUCTS and not _keeps_rows(n) and n.target not in SUMS)
    return f"{WHOLE}{_name(next(mixed, found[0]))} may bring rows to other places"


def weights_of(head: Head) -> list[Node]:
    """The weights for rows and classes, each once."""
    given = [stats_call(node).weights for node in head.stats]
    given += [grad_call(node).weights for node in head.grads]
    return list(dict.fromkeys(q for weights in given for q in weights if len(shape_of(q)) == 2))


def _sources_by_row(node: Node, head: Head) -> list[Node]:
    """What a node is made of where each row of it is made of the same row."""
    if node.target in PRODUCTS:
        return []
    if node.target == PAD:  # to where rows are cut off, whatever is between: it is looked at from there
        before = reached([node], lambda n: [] if n.target in (CUT, *PRODUCTS) else n.all_input_nodes)
        return [args_of(n)[0] for n in before if n.target == CUT and _is_wide(args_of(n)[0], head)]
    if not (_keeps_rows(node) or is_sum_over_classes(node, head)):
        return []
    return [s for s in node.all_input_nodes if _is_wide(s, head) or _is_narrow(s, head)]


def _followed(head: Head, roots: set[Node]) -> Teacher:
    """All that is made of the products up to weights, and to numbers for each row.

    Raises:
        NoHead: something else reads it, or its rows are mixed.
    """
    wide, sums, left = set(roots), set[Node](), set[Node]()
    stack = [*roots]
    while stack:
        node = stack.pop()
        for user in node.users:
            if user in wide | sums | left or _reads_as_weight(user, node, head):
                continue
            if user.target == CUT:
                found, padded = uncut(user, head.v)
                left |= found
                stack += padded
            elif is_sum_over_classes(user, head) or _is_statistics(user, node):
                sums.add(user)
            elif _keeps_rows(user) and _is_wide(user, head) and user not in head.wide:
                wide.add(user)
                stack.append(user)
            else:
                raise NoHead(_read_by(user, head))
    after = set(reached([*head.stats, *sums], lambda node: node.users))
    known = wide | sums | left | _between(head, wide - roots, sums, after)
    order = [node for node in head.product.graph.nodes if node in known - roots]
    feeds = list(dict.fromkeys(s for node in order for s in node.all_input_nodes if s in after - known))
    late = set(reached(feeds, lambda node: node.users)) & known
    if not late.isdisjoint(weights_of(head)) or not after.isdisjoint([*head.beside(), *head.labels()]):
        raise NoHead("what the student's logits are made of is made of them")
    return Teacher([product_of(root) for root in roots], order, sums, feeds, late)


def _between(head: Head, wide: set[Node], sums: set[Node], after: set[Node]) -> set[Node]:
    """Numbers for each row of which wide nodes are made, and that are made of sums alone, as logsumexp is."""
    late = set(reached(head.stats, lambda node: node.users))

    def before(node: Node) -> Iterator[Node]:
        for source in node.all_input_nodes:
            if source in after - late - wide - sums and _keeps_rows(source) and _is_narrow(source, head):
                yield source

    return set(reached([s for node in wide for s in before(node)], before))


def is_sum_over_classes(node: Node, head: Head) -> bool:
    """Whether a node brings together the classes of each row, as a maximum does."""
    if node.target not in SUMS or not _is_wide(source := args_of(node)[0], head):
        return False
    return summed_dims(node)[0] == {vocab_axis(source)}


def _is_statistics(user: Node, node: Node) -> bool:
    """Whether it is `row_stats` of the teacher's logits, for what the loss has of them."""
    if user.target != ops.ROW_STATS:
        return False
    z, labels, *_ = args_of(user)
    return z is node and node not in labels


def _keeps_rows(node: Node) -> bool:
    return is_ordered_view(node) or is_pointwise(node)


def _is_wide(node: Node, head: Head) -> bool:
    """Whether it is [N, V] in the order of the logits, with whatever 1s."""
    if tensor_of(node) is None or not is_of_size(node, head.n * head.v):
        return False
    axis = vocab_axis(node)
    return axis is not None and equal(shape_of(node)[axis], head.v)


def _is_narrow(node: Node, head: Head) -> bool:
    return is_of_size(node, head.n)


def _reads_as_weight(user: Node, node: Node, head: Head) -> bool:
    """Whether `row_stats` or `row_grad` of the head reads a node among its weights alone."""
    if user not in head.stats and user not in head.grads:
        return False
    z, labels, _, *rest = args_of(user)
    return node not in (z, *labels, *rest)


def _read_by(user: Node, head: Head) -> str:
    if user.op == "output":
        return "they are returned"
    if user in head.wide:
        return "they are combined with the student's"
    return f"they are read by {_name(user)} as well"


def _name(node: Node) -> str:
    return getattr(node.target, "__name__", str(node.target)).split(".")[0]
