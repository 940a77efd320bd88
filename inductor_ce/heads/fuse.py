"""The joint pass over heads: find them, plan them, rearrange them."""

from __future__ import annotations

from dataclasses import dataclass
from dataclasses import replace as replace_fields

import torch
from torch.fx import Graph, Node
from torch.fx.node import map_arg

from .. import ops
from ..common.compat.distributed import WAIT
from ..common.compat.graphs import AS_TRACED, is_tangent
from ..common.failsafe import attempt
from ..common.findings import user_line
from ..common.options import FORWARD, Options
from ..common.strategies import FORWARD_ONLY, MATERIALISE, TOKEN_CHUNKS, VOCAB_SLABS
from ..graph.builder import Builder, undone_on_error
from ..graph.shapes import bytes_of, example_of, expected, hint, shape_of, tensor_of
from ..graph.walk import args_of, reached, sources_of
from ..ops.group_rank import GROUP_RANK
from ..ops.products import COLUMN_SUMS
from . import find, plan, sizes
from .agreed import agree
from .calls import exchanges, forget_sites, narrow_args, ranks_are_alike, stats_call
from .edited_inputs import copy_edited_inputs
from .extra_memory import MIB, HeadNumbers
from .factors import has_16_bit_factors
from .find import NoHead
from .gradients import replace, result_dtype
from .kinds import BIAS, HIDDEN, ROW_SUMS, WEIGHT, WEIGHT_T
from .loops import Loop, find_loops, leave_to_last, shared_sums, weight_exits
from .packing import counted_first
from .pieces import CAST
from .plan import Plan
from .proof import Proof
from .read_once import is_made_over, read_once
from .sides import moving, numbers_of_sides, told_of_sides
from .skip import ToCompute, bytes_beside, rows_to_compute
from .teachers import TAUGHT, WHOLE, taught_bytes, teacher_of
from .token_chunks import token_chunks
from .vocab_slabs import vocab_slabs
from .whole_logits import with_statistics

aten = torch.ops.aten

BY_ROWS = (TOKEN_CHUNKS, FORWARD_ONLY)
TOGETHER = "their gradient is made with the statistics"
APART = "their gradient is not made with the statistics: "


@dataclass(frozen=True)
class Planned:
    """What became of one `row_stats`: the id of its site, the user's line, and the plan for its head."""

    site: int
    location: str
    plan: Plan


def plan_line(planned: Planned) -> str:
    """One line for the log."""
    return f"{planned.location}: {sentence(planned.plan)}"


def sentence(plan: Plan) -> str:
    """The strategy, what it takes, and why."""
    pieces = f" in {plan.pieces} pieces" if plan.pieces > 1 else ""
    return f"{plan.strategy}{pieces}, {plan.extra_bytes / MIB:.1f} MiB beyond the gradients: {plan.reason}"


def fuse_heads(graph: Graph, options: Options, why_whole: str = "") -> list[Planned]:
    """Rearrange every head of a joint graph as its plan says. Returns one `Planned` for each `row_stats`.

    All heads stay whole where `why_whole` says why.

    Operators carry no site then: what is computed twice is to be found to be one.
    """
    attempt("what a loss reads may be edited before the backward", copy_edited_inputs, graph)
    done: list[Planned] = []
    if graph.find_nodes(op="call_function", target=ops.ROW_STATS):
        sizes.from_inputs(graph)
        _ask_for_ranks_by_inputs(graph)
    heads = list(find.find_heads(graph))
    tellers = [[(stats_call(node).site, user_line(node)[0]) for node in stats] for _, stats, _ in heads]
    looped = {} if why_whole else _fuse_loops(graph, [head for head, *_ in heads if head], options)
    plans: list[Plan] = []
    taught: dict[Node, Plan] = {}
    for head, stats, why_not in heads:
        made = looped.get(id(head))
        if head is not None and made is None and not why_whole:
            made, _ = attempt("a head is left as it was", _fuse, graph, head, options)
        if head is not None and head.teacher is not None and made is not None and made.strategy in BY_ROWS:
            taught |= dict.fromkeys(head.teacher.sums, made)
        why = why_not or why_whole or "it failed, see the log"
        made = made or taught.get(stats[0])
        plans.append(made or Plan(MATERIALISE, 1, False, bytes_of(stats_call(stats[0]).z), why))
    for i, (_, stats, _) in enumerate(heads):
        if plans[i].strategy == MATERIALISE and stats[0] not in taught and not why_whole:
            plans[i] = _whole_with_gradient(graph, stats, plans[i], options.gradient)
    for plan_, (_, stats, _), told in zip(plans, heads, tellers, strict=True):
        done += [Planned(*site_and_line, taught.get(stats[0], plan_)) for site_and_line in told]
    forget_sites(graph)
    return done


def _ask_for_ranks_by_inputs(graph: Graph) -> None:
    """`group_rank` is given a tensor for its device alone; it need not be the logits."""
    inputs = [node for node in graph.find_nodes(op="placeholder") if tensor_of(node) is not None]
    for node in graph.find_nodes(op="call_function", target=GROUP_RANK):
        like, *rest = args_of(node)
        device = example_of(like).device
        alike = next((source for source in inputs if example_of(source).device == device), like)
        node.args = (alike, *rest)
        node.meta.pop(AS_TRACED, None)


def _fuse(graph: Graph, head: find.Head, options: Options, why_whole: str = "") -> Plan:
    """Rearrange one head; with its teacher, if that can be and nothing has told `why_whole`."""
    proof, why_whole = (Proof(head), why_whole) if why_whole else proved(head)
    if _has_early_ones(head):
        return plan.plan(numbers_of(head, proof, "a gradient of the logits is made in the forward as well"))

    # Without a gradient nothing but a divergence is made of what must be of a chunk's own rows.
    alone = proof.why_not if head.divergences and not head.gradients() else ""

    numbers = numbers_of(head, proof, alone, not head.divergences)
    asked = options.strategy, options.memory_budget
    agree(head.n, numbers, *asked)
    wanted = plan.plan(numbers, *asked)
    if wanted.strategy == MATERIALISE:
        return _kept_whole(graph, head, wanted)
    build = Builder(graph, graph.output_node(), head.stats[0], key="val")
    try:
        with undone_on_error([build]):
            computed = rows_to_compute(build, head, proof, plan.work_of_piece(numbers, wanted.pieces))
            if computed.rows is None:
                wanted = plan.plan(replace_fields(numbers, skips=False), *asked)
            if wanted.strategy in (MATERIALISE, VOCAB_SLABS):
                build.undo()
            if wanted.strategy == MATERIALISE:
                return _kept_whole(graph, head, wanted)
            if wanted.strategy == VOCAB_SLABS:
                made = vocab_slabs(build, head, wanted)
            else:
                wanted = _telling(wanted, computed, head, why_whole)
                made = token_chunks(build, head, proof, wanted, None, computed)
            order = _ordered(graph, made)
    except NoHead as why:
        if head.teacher is not None:
            head.teacher = None
            return _fuse(graph, head, options, f"{WHOLE}{why}")
        return plan.plan(numbers_of(head, proof, str(why)))
    shared = shared_sums(head) if head.divergences else []
    _put(graph, made, order)
    for gradients in shared:
        leave_to_last(graph, gradients)
    graph.eliminate_dead_code()
    return wanted


def proved(head: find.Head) -> tuple[Proof, str]:
    """(the proof about a head, with its teacher if that can be, else why it cannot or "")"""
    head.teacher, why_whole = teacher_of(head)
    proof = Proof(head)
    if head.teacher is not None and proof.why_not:
        head.teacher, why_whole = None, f"{WHOLE}{proof.why_not}"
        proof = Proof(head)
    return proof, why_whole


def _telling(plan: Plan, computed: ToCompute, head: find.Head, why_whole: str) -> Plan:
    told = [plan.reason, TAUGHT if head.teacher else why_whole, told_of_sides(head)]
    reason = "; ".join(filter(None, told))
    extra = plan.extra_bytes + bytes_beside(computed)
    skips = computed.rows is not None
    return replace_fields(plan, extra_bytes=extra, reason=reason, rows=computed.told, skips=skips)


def _whole_with_gradient(graph: Graph, stats: list[Node], plan: Plan, gradient: str) -> Plan:
    """Make the gradient of whole logits with their statistics, where that can be and is wanted or is free."""
    told, _ = attempt("a gradient is made in the backward", _with_statistics, graph, stats[0], gradient)
    return plan if not told else replace_fields(plan, reason=f"{plan.reason}; {told}")


def _with_statistics(graph: Graph, stats: Node, gradient: str) -> str:
    """What is told of it."""
    is_wanted = gradient == FORWARD
    if not is_wanted and any(map(is_tangent, graph.find_nodes(op="placeholder"))):
        return ""
    build = Builder(graph, graph.output_node(), stats, key="val")
    try:
        with undone_on_error([build]):
            made = with_statistics(build, stats, is_wanted)
            order = _ordered(graph, made)
    except NoHead as why:
        return f"{APART}{why}" if is_wanted else ""
    _put(graph, made, order)
    graph.eliminate_dead_code()
    return TOGETHER


def _kept_whole(graph: Graph, head: find.Head, wanted: Plan) -> Plan:
    _sum_biases(graph, head)
    _sum_unrounded(graph, head)
    return wanted


def _fuse_loops(graph: Graph, heads: list[find.Head], options: Options) -> dict[int, Plan]:
    """The plans of the heads, by their ids, that are done one after another."""
    done: dict[int, Plan] = {}
    for loop in find_loops(heads):
        plans, _ = attempt("a loop over chunks is done head by head", _fuse_loop, graph, loop, options)
        done |= zip(map(id, loop), plans or (), strict=plans is not None)
    return done


def _fuse_loop(graph: Graph, loop: list[find.Head], options: Options) -> list[Plan] | None:
    """The plans of heads that are done one after another, None where they cannot be."""
    proofs, why_whole = zip(*map(proved, loop), strict=True)
    if len({proof.factor for proof in proofs}) > 1 or any(map(_has_early_ones, loop)):
        return None
    numbers = [numbers_of(head, proof) for head, proof in zip(loop, proofs, strict=True)]
    plans = plan.plan_loop(numbers, options.strategy, options.memory_budget)
    if plans is None:
        return None
    build = Builder(graph, graph.output_node(), loop[0].stats[0], key="val")
    made: dict[Node, Node] = {}
    state = Loop(len(loop))
    try:
        with undone_on_error([build]):
            for i, (head, proof) in enumerate(zip(loop, proofs, strict=True)):
                work = plan.work_of_piece(numbers[i], plans[i].pieces)
                computed = rows_to_compute(build, head, proof, work, alone=False)
                plans[i] = _telling(plans[i], computed, head, why_whole[i])
                made |= token_chunks(build, head, proof, plans[i], state, computed)
            order = _ordered(graph, made)
    except NoHead:
        return None
    _put(graph, made, order)
    leave_to_last(graph, [node for head in loop for node in weight_exits(head)])
    graph.eliminate_dead_code()
    return plans


def _put(graph: Graph, made: dict[Node, Node], order: list[Node]) -> None:
    """Put what is made in its place, and all nodes in an order."""
    for node, new in made.items():
        replace(node, new)
        if node.target == WAIT:  # which no elimination of dead code removes
            order.remove(node)
            graph.erase_node(node)
    for node in counted_first(order):
        graph.output_node().prepend(node)


def _sum_biases(graph: Graph, head: find.Head) -> None:
    """Let the operator make the bias's gradient of a head that stays whole.

    A gradient of the logits that operators alone read may be written over the logits.
    """
    for node in [node for node, kind in head.exits.items() if kind == BIAS and head.v]:
        build = Builder(graph, node, node, key="val")
        rows = build(aten.reshape.default, args_of(node)[0], [-1, head.v])
        sums = build(CAST, build(COLUMN_SUMS, rows), example_of(node).dtype)
        node.replace_all_uses_with(build(aten.reshape.default, sums, list(shape_of(node))))
        graph.erase_node(node)


def _sum_unrounded(graph: Graph, head: find.Head) -> None:
    """Let sums over the logits of a head that stays whole, as of a learnt scale, read no gradient in 16 bits.

    Plain Inductor sums what it has not rounded yet, and so do pieces.
    """
    gradients = head.gradients()
    for node in [node for node, kind in head.exits.items() if kind == ROW_SUMS]:
        source = find.source_of_exit(node, head)
        before = set(reached([source], lambda n: [s for s in n.all_input_nodes if s in gradients]))
        if any(example_of(wide).itemsize < 4 for wide in before):
            made = _made_again(Builder(graph, node, node, key="val"), [w for w in head.wide if w in before])
            node.replace_input_with(source, made[source])
            graph.eliminate_dead_code()


def _made_again(build: Builder, wide: list[Node]) -> dict[Node, Node]:
    """What wide nodes behind a `row_grad` are, made for who sums it up."""
    made: dict[Node, Node] = {}
    for node in wide:
        args, kwargs = map_arg((node.args, node.kwargs), lambda source: made.get(source, source))
        again = node.target == ops.ROW_GRAD
        made[node] = build(ops.ROW_GRAD_AGAIN, *args) if again else build(node.target, *args, **kwargs)
    return made


def _ordered(graph: Graph, made: dict[Node, Node]) -> list[Node]:
    """All nodes but the output, each behind what it is made of once `made` is in place.

    Raises NoHead where there is no such order.
    """
    order: list[Node] = []
    placed: set[Node] = set()
    waiting: set[Node] = set()
    for node in graph.nodes:
        stack = [node]
        while stack:
            top = stack[-1]
            sources = (made.get(source, source) for source in top.all_input_nodes)
            missing = [source for source in sources if source not in placed]
            if missing:
                if top in waiting:
                    raise NoHead("what the loss reads beside the logits is made of their statistics")
                waiting.add(top)
                stack += reversed(missing)
                continue
            stack.pop()
            if top not in placed:
                placed.add(top)
                order.append(top)
    return [node for node in order if node.op != "output"]


def numbers_of(head: find.Head, proof: Proof, escapes: str = "", skips: bool = False) -> HeadNumbers:
    """What the plan is made from."""
    kinds = set(head.exits.values())
    weights = [result_dtype(node) for node, kind in head.exits.items() if kind in (WEIGHT, WEIGHT_T)]
    z = example_of(head.product)
    return HeadNumbers(
        n=expected(head.n),
        v=head.v,
        d=hint(head.d),
        element=z.element_size(),
        weight_element=min((dtype.itemsize for dtype in weights), default=4),
        backward=bool(head.gradients()),
        wants_hidden=HIDDEN in kinds,
        wants_weight=bool(weights),
        labelled=bool(head.few_labels()),
        chained=head.chained or len(moving(head)) > 1,
        once=head.chained and is_made_over(z.device) and _is_read_once(head, proof),
        added=_added(head),
        **(numbers_of_sides(head) if head.divergences else {}),
        taught=taught_bytes(head),
        in_terms=has_16_bit_factors(head.products),
        skips=skips,
        float16=torch.float16 in {example_of(node).dtype for node in (*head.roots, *head.wide, *head.exits)},
        escapes=escapes,
        varies=proof.why_not,
        sharded=bool(exchanges(head.stats)),
        uneven=not ranks_are_alike(head.stats),
    )


def _is_read_once(head: find.Head, proof: Proof) -> bool:
    return not proof.why_not and read_once(head, proof.facts) is not None


def _added(head: find.Head) -> int:
    """Bytes of a logit of all products but the first, and of its gradient."""
    own = sum(example_of(product.node).element_size() for product in head.products[1:])
    if head.divergences:
        return own + sum(example_of(dz).element_size() for dz in moving(head)[1:])
    return own * (2 if head.grads else 1)


def _has_early_ones(head: find.Head) -> bool:
    """Whether of the gradients of the logits some depend on an upstream gradient, and some do not."""
    gradients = [*head.grads, *head.divergence_grads]
    late = {any(map(is_tangent, reached(narrow_args(node)[-1:], sources_of))) for node in gradients}
    return len(late) > 1
