"""Divergences between several sets of logits: sides that all move, mixtures, what is saved, what is left."""

import math
import random
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from gallery import Run, check_numbers, in_double, run
from gpu_codegen import generate
from harness import (
    Graphs,
    Rewritten,
    compile_with_codegen,
    compile_without_codegen,
    misses,
    sites,
)
from pairwise import EVERYTHING, in_turns
from test_recognise import explained
from torch import Tensor
from torch.distributions import Categorical
from torch.distributions.kl import _kl_categorical_categorical as kl_divergence

import inductor_ce
from inductor_ce import ops
from inductor_ce.algebra import divergences as joint
from inductor_ce.common.errors import DerivativeError
from inductor_ce.graph.shapes import tensor_of
from inductor_ce.ops import lowering
from inductor_ce.ops.divergences import decode, divergence, divergence_grad, encode
from inductor_ce.reading import spellings

B, S, V, D = 2, 6, 40, 12
N = B * S
DTYPES = [torch.float32, torch.bfloat16, torch.float64, torch.float16]
MOVING = ["first", "second", "both"]


def sides(dtype: torch.dtype = torch.float32, moving: str = "both", *shape: int) -> tuple[Tensor, Tensor]:
    """Two sets of logits, of which the second is near the first."""
    scale = 1 if dtype == torch.float16 else 3  # where eager's probabilities are none of them 0
    z = scale * torch.randn(shape or (N, V))
    t = z + torch.randn(z.shape)
    return (
        z.to(dtype).requires_grad_(moving != "second"),
        t.to(dtype).requires_grad_(moving != "first"),
    )


def logs(z: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    return F.log_softmax(z, -1), F.log_softmax(t, -1)


# Spellings


def by_kl_div(z, t):
    return F.kl_div(F.log_softmax(z, -1), F.softmax(t, -1), reduction="batchmean")


def by_log_target(z, t):
    return F.kl_div(*logs(z, t), reduction="none", log_target=True).sum(-1)


def mean_of_all(z, t):
    return F.kl_div(*logs(z, t), log_target=True)


def r_drop(z, t):
    (p, q), (a, b) = (F.softmax(x, -1) for x in (z, t)), logs(z, t)
    return (F.kl_div(a, q, reduction="none").sum() + F.kl_div(b, p, reduction="none").sum()) / 2


def symmetric(z, t):
    a, b = logs(z, t)
    return ((a.exp() - b.exp()) * (a - b)).sum(-1)


def by_hand(z, t):
    p, q = z.softmax(-1), t.softmax(-1)
    return (p * (p.log() - q.log())).sum(-1)


def of_ratio(z, t):
    p, q = z.softmax(-1), t.softmax(-1)
    m = (p + q) / 2
    return (p * torch.log(p / m) + q * (q.log() - ((p + q) / 2).log())).sum(-1) + (p * (p / q).log()).sum(-1)


def cooled_in_place(z, t):
    a, b = F.log_softmax((z * 1).div_(0.7), -1), F.log_softmax((t * 1).mul_(2), -1)
    return (a.exp() * (a - b)).sum(-1)


def by_normalisers(z, t):
    a, b = (x - x.logsumexp(-1, keepdim=True) for x in (z, t))
    return torch.sum(torch.exp(b) * (b - a), dim=-1).mean()


def crossed(z, t):
    return -(t.softmax(-1) * z.log_softmax(-1)).sum(-1).mean()


def jensen_shannon(z, t):
    a, b = logs(z, t)
    m = torch.logaddexp(a, b) - math.log(2)
    return 0.5 * (a.exp() * (a - m) + b.exp() * (b - m)).sum(-1)


def of_mean_probabilities(z, t):
    p, q = F.softmax(z, -1), F.softmax(t, -1)
    m = (0.5 * (p + q)).log()
    return 0.5 * (F.kl_div(m, p, reduction="batchmean") + F.kl_div(m, q, reduction="batchmean"))


def of_stacked_probabilities(z, t):
    p = torch.stack([F.softmax(z, -1), F.softmax(t, -1)])
    m = p.mean(0).log()
    return F.kl_div(m, F.log_softmax(z, -1), reduction="sum", log_target=True)


def generalised(z, t, beta=0.3):
    a, b = logs(z / 0.9, t / 0.9)
    w = torch.tensor(beta, dtype=a.dtype)
    m = torch.logsumexp(torch.stack([a + torch.log1p(-w), b + torch.log(w)]), dim=0)
    to_teacher, to_student = (F.kl_div(m, x, reduction="none", log_target=True) for x in (b, a))
    return (w * to_teacher + (1 - w) * to_student).sum() / z.shape[0]


def skewed(z, t):
    p, q = F.softmax(z, -1), F.softmax(t, -1)
    return (q * (q.log() - (0.1 * q + 0.9 * p).log())).sum(-1).mean()


def to_own_copy(z, t):
    a, b = F.log_softmax(z, -1), F.log_softmax(z.detach() + t, -1)
    c = F.log_softmax(z.detach(), -1)
    return ((a.exp() * (a - b)) + c.exp() * (c - b)).sum(-1).mean()


def held_side(z, t):
    a, b = F.log_softmax(z, -1), F.log_softmax(t, -1)
    held = torch.logaddexp(a, b).detach() - math.log(2)
    return (a.exp() * (a - held) + b.exp() * (b - held)).sum(-1).mean()


def held_mixture(z, t):
    """The gradient is another than that through the mixture, which has not the weights of the divergence."""
    a, b = logs(z, t)
    held = torch.logaddexp(a, b + 1).detach()
    return (b.exp() * (b - held) + a.exp() * (a - b)).sum(-1).mean()


def mixture_without_gradient(z, t):
    a, b = logs(z, t)
    with torch.no_grad():
        m = torch.logaddexp(a, b + 1)
    return (b.exp() * (b - m) + a.exp() * (a - b)).sum(-1).mean()


def of_categoricals(z, t):
    p, q = (Categorical(logits=x, validate_args=False) for x in (z, t))
    return kl_divergence(p, q)


def mixture_with_a_held_side(z, t):
    """The mixture moves with one side alone, and is weighed by the other."""
    a, b = logs(z, t)
    m = torch.logaddexp(a, b.detach())
    return (b.exp() * (b - m)).sum(-1).mean()


SPELLINGS = [
    *(by_kl_div, by_log_target, mean_of_all, r_drop, symmetric, by_hand, by_normalisers, crossed, of_ratio),
    *(cooled_in_place, held_mixture, mixture_without_gradient),
    *(mixture_with_a_held_side, of_categoricals),
    *(jensen_shannon, of_mean_probabilities, of_stacked_probabilities, generalised, skewed, to_own_copy),
    held_side,
]
# With one side alone, these are losses of one tensor of logits, or sums of such.
OF_ONE_SIDE = {by_kl_div, by_log_target, mean_of_all, r_drop, symmetric, by_hand, by_normalisers, crossed}
OF_ONE_SIDE |= {to_own_copy, held_side, cooled_in_place, held_mixture, mixture_without_gradient}


def rewritten(f: Callable[..., Any], args: tuple[Any, ...], **options: Any) -> Rewritten:
    """f with its losses replaced, right in values and gradients."""
    backend = Rewritten(**options)
    check(run(torch.compile(f, backend=backend, fullgraph=True), args), f, args)
    return backend


def check(ours: Run, f: Callable[..., Any], args: tuple[Any, ...]) -> None:
    """As `check_numbers`; in float64, where eager is what ours is compared with, nearly equal."""
    if args[0].dtype != torch.float64:
        return check_numbers(ours, f, args)
    exact = run(f, args)
    for mine, true in zip(ours.results + ours.gradients, exact.results + exact.gradients, strict=True):
        torch.testing.assert_close(mine, true, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize(("f", "dtype"), in_turns(SPELLINGS, DTYPES))
def test_both_sides_move(f, dtype):
    ours = rewritten(f, sides(dtype))
    assert ours.count(ops.DIVERGENCE) >= 1
    assert not ours.report.misses


@pytest.mark.parametrize(("f", "moving", "dtype"), in_turns(SPELLINGS, MOVING[:2], DTYPES[::-1]))
def test_one_side_moves(f, moving, dtype):
    ours = rewritten(f, sides(dtype, moving))
    assert ours.report.sites
    assert ours.count(ops.DIVERGENCE) or f in OF_ONE_SIDE or moving == "second"


@pytest.mark.parametrize("f", [jensen_shannon, generalised, r_drop, skewed, of_categoricals])
def test_through_all_passes(f):
    args = sides()
    compiled, graphs = compile_without_codegen(f)
    check_numbers(run(compiled, args), f, args)
    assert graphs.count(ops.DIVERGENCE) == graphs.count(ops.DIVERGENCE_GRAD) >= 1
    assert misses() == 0


@pytest.mark.parametrize("f", [generalised, *[of_categoricals] * EVERYTHING])
def test_generated_code(f):
    args = sides(torch.bfloat16)
    compiled, _ = compile_with_codegen(f)
    check_numbers(run(compiled, args), f, args)
    assert sites() == 1


def test_generated_code_of_columns_that_are_minus_infinity():
    z, t = (x.detach() for x in sides())
    padded = tuple(F.pad(x, (0, 8), value=-math.inf).requires_grad_() for x in (z, t))
    ours = run(compile_with_codegen(skewed)[0], padded)
    exact = run(skewed, (z.double().requires_grad_(), t.double().requires_grad_()))
    torch.testing.assert_close(ours.results[0].double(), exact.results[0], rtol=1e-5, atol=1e-6)
    for mine, true in zip(ours.gradients, exact.gradients, strict=True):
        torch.testing.assert_close(mine[:, :V].double(), true, rtol=1e-4, atol=1e-6)
        assert bool((mine[:, V:] == 0).all())


# Rows, and how they are reduced


def masked(z, t, mask):
    a, b = logs(z / 0.7, t / 0.7)
    m = torch.logaddexp(a, b) - math.log(2)
    each = F.kl_div(m, a, reduction="none", log_target=True) + F.kl_div(
        m, b, reduction="none", log_target=True
    )
    return (each * mask[..., None]).sum() / mask.sum()


def chosen(z, t, mask):
    a, b = logs(z, t)
    return torch.where(mask[..., None], a.exp() * (a - b), 0.0).sum((-2, -1)).mean()


def filled(z, t, mask):
    each = F.kl_div(*logs(z, t), reduction="none", log_target=True).masked_fill(~mask.unsqueeze(-1), 0)
    return each.sum(-1).sum() / mask.sum()


def masked_rows(z, t, mask):
    rows = F.kl_div(F.log_softmax(z, -1), F.softmax(t, -1), reduction="none").sum(-1)
    return (rows * mask).sum() / mask.sum().clamp(min=1)


def weighed_twice(z, t, mask):
    a, b = logs(z, t)
    each = a.exp() * (a - b) * mask[..., None].float() / 3 + b.exp() * (b - a) / (2 + mask[..., None].float())
    return each.mean()


def by_label(z, t, mask):
    labels = torch.where(mask, 3, -100)
    a, b = logs(z, t)
    kept = (labels != -100).unsqueeze(-1).to(a.dtype)
    m = torch.logsumexp(torch.stack((a + math.log(0.2), b + math.log(0.8)), dim=-1), dim=-1)
    return (kept * (a.exp() * (a - m))).mean(dim=-1, keepdim=True).sum(1)


@pytest.mark.parametrize("f", [masked, chosen, filled, masked_rows, weighed_twice, by_label])
def test_rows(f):
    mask = torch.rand(B, S) > 0.3
    ours = rewritten(f, (*sides(torch.float32, "both", B, S, V), mask))
    assert ours.count(ops.DIVERGENCE) == (2 if f is weighed_twice else 1)


def chosen_rows(z, t, mask):
    """TRL's own: rows that count are chosen before all is summed."""
    a, b = logs(z, t)
    w = torch.tensor(0.3, dtype=a.dtype, device=a.device)
    m = torch.logsumexp(torch.stack([a + torch.log1p(-w), b + torch.log(w)]), dim=0)
    to_teacher, to_student = (F.kl_div(m, x, reduction="none", log_target=True) for x in (b, a))
    jsd = (w * to_teacher + (1 - w) * to_student)[mask]
    return jsd.sum() / mask.sum(), jsd.mean()


def test_rows_that_are_chosen():
    args = (*sides(torch.float32, "both", B, S, V), torch.rand(B, S) > 0.3)
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        assert rewritten(chosen_rows, args).count(ops.DIVERGENCE) == 2
        compiled, graphs = compile_without_codegen(chosen_rows)
        check(run(compiled, args), chosen_rows, args)
        assert graphs.count(ops.DIVERGENCE) == 1  # the two are alike


def test_rows_that_are_chosen_break_the_graph():
    args = (*sides(torch.float32, "both", B, S, V), torch.rand(B, S) > 0.3)
    compiled, graphs = compile_without_codegen(chosen_rows)
    check(run(compiled, args), chosen_rows, args)
    assert graphs.count(ops.DIVERGENCE) == 0


def of_classes_first(z, t):
    a, b = F.log_softmax(z, 1), F.log_softmax(t, 1)
    return (a.exp() * (a - b)).sum(1).mean()


def shifted(z, t):
    a, b = F.log_softmax(z[:, :-1], -1), F.log_softmax(t[:, :-1], -1)
    return F.kl_div(a, b, reduction="none", log_target=True).sum(-1)


def flattened_after(z, t):
    a, b = (F.log_softmax(x.float(), -1).view(-1, x.shape[-1]) for x in (z, t))
    return F.kl_div(a, b, reduction="batchmean", log_target=True)


def of_one_row(z, t):
    a, b = F.log_softmax(z[0, 0], -1), F.log_softmax(t[0, 0], -1)
    return (b.exp() * (b - a)).sum()


@pytest.mark.parametrize("f", [of_classes_first, shifted, flattened_after, of_one_row])
def test_arrangements(f):
    shape = (B, V, S) if f is of_classes_first else (B, S, V)
    ours = rewritten(f, sides(torch.float32, "both", *shape))
    assert ours.count(ops.DIVERGENCE) == 1


def added_as_scalars(z, t):
    p, q = F.softmax(z, -1), F.softmax(t, -1)
    m = (0.5 * (p + q)).log()
    to_p, to_q = (F.kl_div(m, x, reduction="batchmean") for x in (p, q))
    return -(sum([to_p, 2 * to_q]) / 3 - to_q * 0 + 0)


def added_as_rows(z, t):
    a, b = logs(z, t)
    return (a.exp() * (a - b)).sum(-1) - (b.exp() * (b - a)).sum(-1) / 2


def added_to_another(z, t):
    a, b = logs(z, t)
    forward, backward = ((p.exp() * (p - q)).sum(-1) for p, q in ((a, b), (b, a)))
    return forward + backward, forward.mean()


def added_of_other_sums(z, t):
    a, b = logs(z, t)
    return F.kl_div(a, b, log_target=True) + F.kl_div(b, a, reduction="sum", log_target=True)


@pytest.mark.parametrize(
    ("f", "count"),
    [
        (r_drop, 1),
        (of_mean_probabilities, 1),
        (added_as_rows, 1),
        (added_to_another, 2),
        (added_of_other_sums, 2),
    ],
)
def test_what_is_added_up_is_one(f, count):
    """Where nothing else reads the parts: they are one sweep then."""
    ours = rewritten(f, sides())
    assert ours.count(ops.DIVERGENCE) == count


def test_what_is_added_up_with_numbers():
    ours = rewritten(added_as_scalars, sides(torch.float64))
    assert ours.count(ops.DIVERGENCE) >= 1


def halves(z, y):
    first, second = z.chunk(2)
    return F.cross_entropy(z, y) + r_drop(first, second)


def halves_after(z, y):
    log_p, p = z.log_softmax(-1), z.softmax(-1)
    (a, b), (pa, pb) = torch.split(log_p, N // 2), torch.split(p, N // 2)
    return F.nll_loss(log_p, y) + F.kl_div(a, pb, reduction="sum") + F.kl_div(b, pa, reduction="sum")


def halves_with_losses(z, y):
    first, second = z.chunk(2)
    return (
        F.cross_entropy(first, y[: N // 2])
        + F.cross_entropy(second, y[N // 2 :])
        + symmetric(first, second).mean()
    )


def thirds(z, y):
    pieces = torch.chunk(z, 3)
    views = [F.log_softmax(x, -1) for x in pieces]
    m = torch.logsumexp(torch.stack(views), 0) - math.log(3)
    loss = sum((a.exp() * (a - m)).sum(-1).mean() for a in views) / 3
    return loss + F.cross_entropy(pieces[0], y[: N // 3])


@pytest.mark.parametrize("f", [halves, halves_after, halves_with_losses, thirds])
def test_pieces_of_one_tensor(f):
    """No row is swept twice for its normalisers, those of a cross entropy among them."""
    z, _ = sides()
    ours = rewritten(f, (z, torch.randint(V, (N,))))
    assert ours.count(ops.ROW_STATS) == {thirds: 3, halves_with_losses: 2}.get(f, 1)


def standardised(z, t):
    a, b = ((x - x.mean(-1, keepdim=True)) / (x.std(-1, keepdim=True) + 1e-7) for x in (z.float(), t.float()))
    return F.kl_div(F.log_softmax(a / 2, -1), F.softmax(b / 2, -1), reduction="none").sum(-1)


def without_a_class(z, t):
    hidden = 1000.0 * F.one_hot(torch.arange(N) % V, V)
    a, b = (x.float() / 4 - hidden for x in (z, t))
    return F.kl_div(F.log_softmax(a, -1), F.softmax(b, -1), reduction="batchmean")


def masked_forward(z, t):
    products = t.softmax(-1, dtype=torch.float32) * z.log_softmax(-1, dtype=torch.float32)
    return -products.masked_fill(torch.isinf(t) | (t > 3), 0).sum(-1).mean()


def masked_reverse(z, t):
    p, a, b = z.float().softmax(-1), z.float().log_softmax(-1), t.float().log_softmax(-1)
    return (p * (a - b)).masked_fill(torch.isinf(t), 0).sum(-1).mean()


def of_teacher_with_an_epsilon(z, t):
    q = t.float().softmax(-1)
    return (q * ((q + 1e-6).log() - z.float().log_softmax(-1))).sum(-1)


OF_GIVEN = [standardised, without_a_class, masked_forward, masked_reverse, of_teacher_with_an_epsilon]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("f", OF_GIVEN)
def test_a_teacher_of_given_logits_is_a_side(f, dtype):
    """However the logits are made of what is given, nothing of the teacher's is a weight in memory."""
    args = sides(dtype, "first")
    args[1].data[::3, :4] = -20
    ours = rewritten(f, args)
    assert ours.count(ops.DIVERGENCE) == 1
    assert [site.which for site in ours.report.sites] == ["max,sumexp"]
    assert "targets constant" in ours.report.sites[0].form
    compiled, graphs = compile_without_codegen(f)
    check_numbers(run(compiled, args), f, args)
    assert not [n for n in graphs.nodes if n.target == torch.ops.aten.exp.default and is_wide(n)]


def by_einsum(h, w):
    return torch.einsum("nd,vd->nv", h, w)


@pytest.mark.parametrize("product", [F.linear, lambda h, w: h @ w.t(), by_einsum])
def test_of_a_linear_layer_the_teacher_is_a_weight(product):
    """So the student's head is in pieces, for each of which the weights are made."""

    def f(h, w, t):
        z = product(h, w)
        return without_a_class(z, t)

    h, w = torch.randn(N, D, requires_grad=True), torch.randn(V, D, requires_grad=True)
    ours = rewritten(f, (h, w, torch.randn(N, V)))
    assert ours.count(ops.DIVERGENCE) == 0
    assert len(ours.report.sites) == 1


def test_a_weight_of_the_same_logits_is_no_other_side():
    """Of one set of logits, its own probabilities are statistics, detached or not."""

    def f(z, t):
        log_p = z.log_softmax(-1)
        kept = (log_p.detach().exp() * log_p).masked_fill(t > 1, 0)
        return -kept.sum(-1).mean()

    ours = rewritten(f, sides(torch.float32, "first"))
    assert ours.count(ops.DIVERGENCE) == 0


def test_a_cross_entropy_has_the_normalisers_of_a_divergence():
    def loss(z, t, y):
        return F.cross_entropy(z, y) + F.cross_entropy(t, y, label_smoothing=0.1) + r_drop(z, t)

    ours = rewritten(loss, (*sides(), torch.randint(V, (N,))))
    assert ours.count(ops.ROW_STATS) == 2
    assert [site.which for site in ours.report.sites] == ["max,sumexp,pick", "max,sumexp,pick,sum"]


def test_other_numbers_of_rows_are_compiled_once():
    compiled, graphs = compile_without_codegen(jensen_shannon, dynamic=True)
    for n in (N, N + 3, N - 2):
        args = sides(torch.float32, "both", n, V)
        with torch._dynamo.config.patch(error_on_recompile=n != N):
            check(run(compiled, args), jensen_shannon, args)
    assert graphs.count(ops.DIVERGENCE) == 1


# What is in memory


def behind_a_chain(z, t):
    return generalised(z.float() / 0.7, 30 * torch.tanh(t.float() / 30))


@pytest.mark.parametrize(
    ("f", "moving"), [(behind_a_chain, "first"), (behind_a_chain, "both"), (r_drop, "both"), (skewed, "both")]
)
def test_nothing_as_large_as_the_logits_is_saved(f, moving):
    """Between forward and backward there are the logits, which are there anyway, and numbers of rows."""
    compiled, graphs = compile_without_codegen(f)
    run(compiled, sides(torch.bfloat16, moving))
    forward, backward = graphs.final
    saved = [node.meta["val"] for node in backward.graph.nodes if node.op == "placeholder"]
    large = [value for value in saved if value.numel() > 16 * N]
    assert [(value.shape, value.dtype) for value in large] == [((N, V), torch.bfloat16)] * 2
    wide = [node for node in forward.graph.nodes if is_wide(node)]
    returned = forward.graph.output_node().args[0]
    assert {node.op for node in wide if node in returned} == {"placeholder"}
    assert all(reaches_divergence(node) for node in wide)


def test_a_chain_before_rows_that_are_cut_off_is_not_saved():
    def f(z, t):
        a, b = (F.log_softmax((x.float() / 0.7)[:, :-1], -1) for x in (z, t))
        return ((a.exp() - b.exp()) * (a - b)).sum(-1)

    compiled, graphs = compile_without_codegen(f)
    run(compiled, sides(torch.bfloat16, "both", B, S, V))
    saved = [node.meta["val"] for node in graphs.final[1].graph.nodes if node.op == "placeholder"]
    large = [(tuple(value.shape), value.dtype) for value in saved if value.numel() > 16 * N]
    assert large == [((B, S, V), torch.bfloat16)] * 2


def is_wide(node: torch.fx.Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, Tensor) and value.numel() == N * V


def reaches_divergence(node: torch.fx.Node) -> bool:
    """Whether only views, chains and the operators read a node."""
    allowed = (ops.DIVERGENCE, ops.ROW_STATS)
    readers = [user for user in node.users if user.op != "output"]
    return all(r.target in allowed or (is_wide(r) and reaches_divergence(r)) for r in readers)


def code_for_a_gpu(moving: str, which: str) -> list[Any]:
    lowering.register()

    def f(z, t):
        rows = [ops.row_stats(x.detach(), [], [], "max,sumexp") for x in (z, t)]
        return divergence([z, t], [row[0] for row in rows], [row[1] for row in rows], which)[0]

    z, t = (torch.empty(4096, 32000, dtype=torch.bfloat16, device="meta") for _ in range(2))
    return generate(f, z.requires_grad_(), t.requires_grad_(moving == "both"))


def encoded(value: joint.Joint, moving: str = "both") -> str:
    (made,) = joint.total(value, [0, 1], [0] if moving == "first" else [0, 1]).values()
    return encode(made)


P, Q = joint.probabilities(0), joint.probabilities(1)
LOG_P, LOG_Q = joint.log_probabilities(0), joint.log_probabilities(1)


def times(a: joint.Joint, b: joint.Joint) -> joint.Joint:
    product = joint.times(a, b)
    assert product is not None
    return product


def mixture(w: float) -> joint.Joint:
    made = joint.log_sum([LOG_P + joint.number(math.log(w)), LOG_Q + joint.number(math.log(1 - w))])
    assert made is not None
    return made


KULLBACK_LEIBLER = times(P, LOG_P + -LOG_Q)
JENSEN_SHANNON = times(P, LOG_P + -mixture(0.5)) + times(Q, LOG_Q + -mixture(0.5))
SKEWED = times(Q, LOG_Q + -mixture(0.9))


@pytest.mark.parametrize(
    ("value", "moving", "of_sums", "of_gradients"),
    [
        (JENSEN_SHANNON, "first", (2, 1), (2, 1)),
        (JENSEN_SHANNON, "both", (2, 1), (2, 1)),
        (KULLBACK_LEIBLER, "first", (1, 0), (1, 0)),
        (KULLBACK_LEIBLER, "both", (1, 0), (2, 0)),
        (SKEWED, "both", (2, 1), (2, 1)),
    ],
)
def test_one_kernel_makes_all_sums_and_one_all_gradients(value, moving, of_sums, of_gradients):
    """For an entry each has one exponential a side and one logarithm a mixture, if not less."""
    forward, backward = code_for_a_gpu(moving, encoded(value, moving))
    (sums,) = [text for name, text in forward.kernels.items() if "_red_" in name]
    assert transcendental(loop_of(sums)) == of_sums
    assert not [shape for shape in forward.allocations if 32000 in shape]
    (gradients,) = [text for text in backward.kernels.values() if "xnumel = 4096\n" not in text]
    assert transcendental(gradients) == of_gradients
    large = [shape for shape in backward.allocations if 32000 in shape]
    assert len(large) == (2 if moving == "both" else 1)


def loop_of(kernel: str) -> str:
    return kernel[kernel.index("for r0_offset") :]


def transcendental(kernel: str) -> tuple[int, int]:
    return len(re.findall(r"\bexp\(", kernel)), len(re.findall(r"\blog\(", kernel))


# Infinities


def test_columns_that_are_minus_infinity_on_both_sides_count_nothing():
    """Eager makes NaN of 0 times infinity; ours is the limit: the loss of the other columns."""
    z, t = (x.detach() for x in sides())
    padded = [F.pad(x, (0, 7), value=-math.inf).requires_grad_() for x in (z, t)]
    for f in (symmetric, jensen_shannon, skewed, generalised, r_drop):
        assert not bool(run(f, tuple(padded)).results[0].isfinite().any())
        ours = run(torch.compile(f, backend=Rewritten()), tuple(padded))
        expected = run(f, (z.double().requires_grad_(), t.double().requires_grad_()))
        for mine, true in zip(ours.results, expected.results, strict=True):
            torch.testing.assert_close(mine.double(), true, rtol=1e-5, atol=1e-6)
        for mine, true in zip(ours.gradients, expected.gradients, strict=True):
            torch.testing.assert_close(mine[:, :V].double(), true, rtol=1e-4, atol=1e-6)
            assert bool((mine[:, V:] == 0).all())


def test_a_column_that_one_side_has_not():
    """KL(p | q) is infinite where q is 0 and p is not, KL(q | p) is not, and a mixture has both."""
    z, t = sides()
    with torch.no_grad():
        t[0, 3] = -math.inf
    ours = run(torch.compile(by_log_target, backend=Rewritten()), (t, z))
    assert ours.results[0][0] == math.inf
    assert bool(ours.results[0][1:].isfinite().all())
    for f in (by_log_target, jensen_shannon, skewed):
        finite = run(torch.compile(f, backend=Rewritten()), (z, t))
        assert all(bool(x.isfinite().all()) for x in finite.results + finite.gradients)
        other = z.detach().clone()[0], t.detach().clone()[0]
        p, q = (x.double().softmax(-1) for x in other)
        m = {jensen_shannon: 0.5 * (p + q), skewed: 0.1 * q + 0.9 * p}.get(f, p)
        true = torch.special.xlogy(q, q / m).sum()
        if f is jensen_shannon:
            true = 0.5 * (true + torch.special.xlogy(p, p / m).sum())
        first = finite.results[0] if finite.results[0].dim() == 0 else finite.results[0][0]
        if f is not skewed:  # whose result is the mean
            torch.testing.assert_close(first.double(), true, rtol=1e-5, atol=1e-6)


def test_a_row_that_eager_makes_nan_is_nan():
    for bad in (-math.inf, math.nan):
        z, t = sides()
        with torch.no_grad():
            z[2] = bad
        ours = run(torch.compile(jensen_shannon, backend=Rewritten()), (z, t))
        eager = run(jensen_shannon, (z, t))
        for mine, theirs in zip(ours.results + ours.gradients, eager.results + eager.gradients, strict=True):
            assert torch.equal(mine.isnan(), theirs.isnan())
            torch.testing.assert_close(mine, theirs, equal_nan=True, rtol=1e-4, atol=1e-5)


def test_probabilities_below_the_smallest_number():
    """Where both sides underflow the log of their mixture is -inf, and nothing weighs it."""
    z, t = (x.detach() for x in sides())
    z[:, ::3] -= 200
    t[:, ::3] -= 150
    z[:, 1::3] -= 95
    for f in (jensen_shannon, skewed, generalised):
        ours = run(torch.compile(f, backend=Rewritten()), (z.requires_grad_(), t.requires_grad_()))
        doubled = (z.detach().double().requires_grad_(), t.detach().double().requires_grad_())
        exact = run(f, doubled)
        for mine, true in zip(ours.results + ours.gradients, exact.results + exact.gradients, strict=True):
            torch.testing.assert_close(mine.double(), true, rtol=1e-5, atol=1e-6)


# Entries that are set where a probability is 0


def test_categoricals_of_which_one_has_not_a_class():
    """Infinite where q alone is 0, nothing where both are; the gradients are the limits of eager's."""
    z, t = (x.detach() for x in sides())
    padded = [F.pad(x, (0, 4), value=-math.inf).requires_grad_() for x in (z, t)]
    exact = run(of_categoricals, (z.double().requires_grad_(), t.double().requires_grad_()))
    ours = run(torch.compile(of_categoricals, backend=Rewritten()), tuple(padded))
    torch.testing.assert_close(ours.results[0].double(), exact.results[0], rtol=1e-5, atol=1e-6)
    for mine, true in zip(ours.gradients, exact.gradients, strict=True):
        torch.testing.assert_close(mine[:, :V].double(), true, rtol=1e-4, atol=1e-6)
        assert bool((mine[:, V:] == 0).all())
    t[0, 3] = -math.inf
    ours = run(torch.compile(of_categoricals, backend=Rewritten()), (z.requires_grad_(), t.requires_grad_()))
    assert ours.results[0].isinf().tolist() == [True] + [False] * (N - 1)
    back = run(torch.compile(of_categoricals, backend=Rewritten()), (t, z))
    true = of_categoricals(t.double(), z.double())
    torch.testing.assert_close(back.results[0].double(), true, rtol=1e-5, atol=1e-6)


def test_categoricals_that_underflow_are_finite():
    """Eager in float32 says inf of what has a number, which float64 still knows.

    Differences of 150 are rounded by some 1e-5.
    """
    z, t = (x.detach() for x in sides())
    t[:, ::3] -= 150
    ours = run(torch.compile(of_categoricals, backend=Rewritten()), (z.requires_grad_(), t.requires_grad_()))
    exact = run(of_categoricals, (z.detach().double().requires_grad_(), t.detach().double().requires_grad_()))
    assert bool(of_categoricals(z, t).isinf().any())
    for mine, true in zip(ours.results + ours.gradients, exact.results + exact.gradients, strict=True):
        torch.testing.assert_close(mine.double(), true, rtol=1e-5, atol=5e-5)


def test_categoricals_leave_nothing_behind():
    """Neither the product that is edited, nor its edits."""
    backend = rewritten(of_categoricals, sides())
    nodes = [node for module in backend.final for node in module.graph.nodes]
    assert not [node for node in nodes if spellings.is_step(node, "edit_setitem")]
    entries = [n for n in nodes if (z := tensor_of(n)) is not None and z.shape == (N, V)]
    assert all(n.op == "placeholder" or spellings.is_step(n, "detach") for n in entries), entries


def set_in_other_order(z, t):
    a, b = logs(z, t)
    terms = a.exp() * (a - b)
    terms[a.exp() == 0] = 0
    terms[b.exp() == 0] = math.inf
    return terms.sum(-1)


def set_where_the_same_is_zero(z, t):
    a, b = logs(z, t)
    terms = a.exp() * (a - b)
    terms[a.exp() == 0] = math.inf
    terms[a.exp() == 0] = 0
    return terms.sum(-1)


def set_and_looked_at_between(z, t):
    a, b = logs(z, t)
    terms = a.exp() * (a - b)
    terms[b.exp() == 0] = math.inf
    worst = terms.detach().amax()
    terms[a.exp() == 0] = 0
    return terms.sum(-1) / worst


def set_of_something_else(z, t):
    a, b = logs(z, t)
    terms = b.exp() * (a - b)
    terms[b.exp() == 0] = math.inf
    terms[a.exp() == 0] = 0
    return terms.sum(-1)


def set_after_it_was_summed(z, t):
    a, b = logs(z, t)
    terms = a.exp() * (a - b)
    sums = terms.detach().sum(-1) + terms.clone().sum(-1)
    terms[b.exp() == 0] = math.inf
    terms[a.exp() == 0] = 0
    return sums, terms.amax()


@pytest.mark.parametrize("f", [set_and_looked_at_between, set_after_it_was_summed])
def test_what_is_read_before_it_is_set(f):
    args = sides()
    backend = Rewritten()
    check(run(torch.compile(f, backend=backend, fullgraph=True), args), f, args)
    assert backend.count(ops.DIVERGENCE) == 1


# Left as written


def kept_log_probabilities(z, t):
    a, b = logs(z, t)
    return (a.exp() * (a - b)).sum(-1).mean(), (a.cumsum(-1) * b).sum(-1).relu().sum()


def kept_beside_their_own(z, t):
    a, b = logs(z, t)
    rows = (a.exp() * (a - b)).sum(-1, keepdim=True)
    return rows.mean(), (a - rows).cumsum(-1).sum(-1).relu().sum()


def test_log_probabilities_are_kept():
    backend = rewritten(kept_log_probabilities, sides())
    assert backend.count(ops.DIVERGENCE) == 1
    assert "log_softmax of all classes" in backend.report.sites[0].kept


def outside_its_mixture(z, t):
    a = (z + t).log_softmax(-1)
    log_m = torch.logaddexp(z.log_softmax(-1), t.log_softmax(-1)) - math.log(2)
    return (a.exp() * (a - log_m)).sum(-1).mean()


def of_other_rows(z, t):
    a, b = logs(z, t[:1])
    return (a.exp() * (a - b)).sum(-1).mean()


def edited_after(z, t):
    a, b = logs(z * 1, t)
    loss = (a.exp() * (a - b)).sum(-1).mean()
    return loss, t.detach().mul_(2)


def test_outside_a_mixture_each_entry_is_summed():
    """Of probabilities that underflow the mixture's logarithm is that of the logits, and finite."""
    z, t = sides(torch.float64)
    far = torch.zeros(V)
    far[::3] = -900
    lowered = tuple((x.detach() + far).requires_grad_() for x in (z, t))
    for args in ((z, t), lowered):
        assert rewritten(outside_its_mixture, args).count(ops.DIVERGENCE) == 1


@pytest.mark.parametrize(
    "f",
    [
        *(kept_beside_their_own, of_other_rows),
        *(edited_after, set_in_other_order, set_where_the_same_is_zero, set_of_something_else),
    ],
)
def test_what_is_none_is_left(f):
    args = sides()
    backend = Rewritten()
    compiled = torch.compile(f, backend=backend, fullgraph=True)
    check(run(compiled, args), f, args)
    assert backend.count(ops.DIVERGENCE) == 0
    assert backend.report.misses


def test_why_it_is_left():
    z, t = sides()
    (few,) = inductor_ce.explain(symmetric, z, t).small
    assert "below min_vocab" in few.message
    with inductor_ce.install(min_vocab=2):
        told = explained(kept_beside_their_own, z, t).misses[0].message
    assert "is also used by" in told
    assert "sum(-1).relu()" in told


def test_a_head_of_a_divergence_is_whole():
    h, W, t = torch.randn(N, D, requires_grad=True), torch.randn(V, D, requires_grad=True), sides()[1]

    def loss(h, W, t):
        return symmetric(F.linear(h, W), t).mean()

    with inductor_ce.install(min_vocab=2):
        (site,) = explained(loss, h, W, t).sites
    assert site.strategy == "materialise"
    assert "another side of a divergence are whole: no linear layer makes them row by row" in site.plan


def test_no_gradient_is_wanted():
    """Of some this is said by one tensor of logits; those from a mixture are between two."""
    z, t = (x.detach() for x in sides())
    for f, count in ((jensen_shannon, 1), (symmetric, 0)):
        compiled, graphs = compile_without_codegen(f)
        torch.testing.assert_close(compiled(z, t), f(z, t))
        assert graphs.count(ops.DIVERGENCE) == count
    assert sites() == 2
    assert misses() == 0


def test_a_metric_beside_a_loss():
    """What is told without a gradient is made of the logits that the loss has."""

    def f(z, t):
        with torch.no_grad():
            told = jensen_shannon(z, t)
        return jensen_shannon(z, t).mean(), told

    args = sides()
    ours = rewritten(f, args)
    assert ours.count(ops.DIVERGENCE) == 2


# Derivatives that there are not


def test_no_second_derivative():
    z, t = sides()
    out = torch.compile(symmetric, backend=Rewritten())(z, t)
    (dz,) = torch.autograd.grad(out.sum(), z, create_graph=True)
    with pytest.raises(DerivativeError, match="no second derivative"):
        torch.autograd.grad(dz.square().sum(), z)


def test_not_under_vmap():
    z, t = (x.detach() for x in sides())
    ms, ds = normalisers([z, t])

    def f(z):
        return divergence([z, t], ms, ds, encoded(KULLBACK_LEIBLER))

    with pytest.raises(DerivativeError, match=r"torch\.vmap"):
        torch.vmap(f)(torch.stack([z, z]))


# The operators


def normalisers(zs: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    wide = [z.detach().to(torch.float64 if z.dtype == torch.float64 else torch.float32) for z in zs]
    ms = [z.amax(-1) for z in wide]
    return ms, [(z - m[:, None]).exp().sum(-1) for z, m in zip(wide, ms, strict=True)]


@pytest.mark.parametrize("value", [KULLBACK_LEIBLER, JENSEN_SHANNON, SKEWED])
def test_operators_as_torch_sees_them(value):
    zs = [z.double().detach().requires_grad_() for z in sides()]
    torch.library.opcheck(divergence, (zs, *normalisers(zs), encoded(value)))
    packed = divergence(zs, *normalisers(zs), encoded(value)).detach()
    plain = [z.detach() for z in zs]
    torch.library.opcheck(divergence_grad, (plain, normalisers(zs)[0], packed, packed[0], encoded(value)))


def test_sides_of_other_numbers():
    zs = [x.detach() for x in sides()]
    with pytest.raises(ValueError, match="1 sets of logits for 2 sides"):
        divergence(zs[:1], *normalisers(zs[:1]), encoded(SKEWED))
    other = [zs[0], zs[1][:, :-1]]
    with pytest.raises(ValueError, match=r"\[N, V\]"):
        divergence(other, *normalisers(other), encoded(SKEWED))


# At random: any numbers, on any sides


def random_loss(seed: int) -> tuple[Callable[..., Tensor], int]:
    """(a sum of probabilities times logarithms, of how many sides), in a spelling made at random."""
    rng = random.Random(seed)
    count = rng.choice([2, 2, 3])
    mixed = [[rng.choice([0.1, 0.25, 1.0]) for _ in range(count)] for _ in range(rng.choice([0, 1, 2]))]
    numbers = [[rng.choice([0, 0, 1, -1, 0.3]) for _ in range(count + len(mixed))] for _ in range(count)]
    numbers[0][1:] = [1] * (count + len(mixed) - 1)  # of all
    detached = [[rng.random() < 0.3 for _ in range(count)] for _ in mixed]
    spelled, in_logs, reduced = rng.random() < 0.5, rng.random() < 0.5, rng.choice(["rows", "mean", "mask"])

    def loss(*zs: Tensor) -> Tensor:
        a = [F.log_softmax(z, -1) for z in zs]
        p = [x.exp() for x in a] if in_logs else [F.softmax(z, -1) for z in zs]
        m = [
            mixed_log(*held_in_part(a, p, held), w, in_logs) for w, held in zip(mixed, detached, strict=True)
        ]
        total: Any = 0
        for u, row in enumerate(numbers):
            terms = [c * x for c, x in zip(row, [*a, *m], strict=True) if c]
            if terms and spelled:
                total = total + p[u] * sum(terms)
            elif terms:
                total = total + sum(p[u] * term for term in terms)
        if reduced == "mean":
            return total.mean()
        rows = total.sum(-1)
        return rows if reduced == "rows" else rows * (torch.arange(len(rows)) % 3 > 0)

    return loss, count


def held_in_part(a: list[Tensor], p: list[Tensor], held: list[bool]) -> list[list[Tensor]]:
    return [[x.detach() if h else x for x, h in zip(xs, held, strict=True)] for xs in (a, p)]


def mixed_log(a: list[Tensor], p: list[Tensor], weights: list[float], in_logs: bool) -> Tensor:
    pairs = zip(a if in_logs else p, weights, strict=True)
    if in_logs:
        return torch.logsumexp(torch.stack([x + math.log(w) for x, w in pairs]), 0)
    return sum(w * x for x, w in pairs).log()  # type: ignore[union-attr]


@pytest.mark.parametrize("seed", range(24 if EVERYTHING else 16))
def test_at_random(seed):
    loss, count = random_loss(seed)
    moving = random.Random(-seed).choices([True, False], k=count - 1)
    args = tuple((2 * torch.randn(N, V).double()).requires_grad_(m) for m in [True, *moving])
    ours = rewritten(loss, args)
    assert not ours.report.misses


# The algebra


def test_laws_of_joint_values():
    """What is written is what a calculation with numbers gives."""
    p, q = torch.randn(V).double().softmax(-1), torch.randn(V).double().softmax(-1)

    def number(value: joint.Joint) -> Tensor:
        result = torch.zeros(V).double()
        for entry, c in value.terms:
            term = torch.full((V,), c).double()
            term = term if entry.side is None else term * (p, q)[entry.side]
            mixed = sum(w * (p, q)[s] for s, w in entry.log or ())
            result += term if entry.log is None else term * torch.as_tensor(mixed).log()
        return result

    m = 0.3 * p + 0.7 * q
    close = torch.testing.assert_close
    close(number(mixture(0.3)), m.log())
    close(number(joint.exp(mixture(0.3) + joint.number(0.5))), m * math.exp(0.5))  # type: ignore[arg-type]
    close(number(times(P + -Q, LOG_P + -LOG_Q)), (p - q) * (p.log() - q.log()))
    close(number(joint.log(P + P + Q)), (2 * p + q).log())  # type: ignore[arg-type]
    assert joint.times(P, Q) is None
    assert joint.times(LOG_P, LOG_Q) is None
    assert joint.log(P + joint.number(1e-8)) is None
    assert joint.log(P + -Q) is None
    assert joint.exp(LOG_P + LOG_Q) is None
    assert joint.log_sum([LOG_P, LOG_P + LOG_Q]) is None


def test_one_thing_has_one_form():
    assert joint.Joint(()) == LOG_P + -LOG_P
    assert mixture(0.5) + joint.number(math.log(2)) == joint.log_sum([LOG_P, LOG_Q])
    half = joint.times(joint.number(0.5), P + Q)
    assert half is not None
    assert joint.log(half) == mixture(0.5)
    (jensen_shannon,) = joint.total(JENSEN_SHANNON, [0, 1], [0, 1]).values()
    assert not jensen_shannon.shares(0)
    (skewed,) = joint.total(SKEWED, [0, 1], [0, 1]).values()
    assert skewed.shares(0) == skewed.shares(1) == [0]
    assert joint.render(jensen_shannon) == "sum p*(log p - log m) + q*(log q - log m), m = 0.5*p + 0.5*q"
    assert decode(encode(skewed)) == skewed


def test_installed_it_is_fused_by_a_plain_compile():
    args = sides()
    with inductor_ce.install(min_vocab=2):
        graphs = Graphs()
        check(run(torch.compile(symmetric, backend=graphs), args), symmetric, args)
        assert graphs.count(ops.DIVERGENCE) == 1


def capped_and_labelled(z: Tensor, t: Tensor, y: Tensor) -> Tensor:
    """Logits [B, S, V] behind a soft-cap, for a divergence and a cross entropy."""
    z, t = (20 * torch.tanh(x.float() / 20) for x in (z, t))
    p, q = logs(z, t)
    return (p.exp() * (p - q)).sum(-1).mean() + F.cross_entropy(z.flatten(0, 1), y.flatten())


def scaled_to_one(z: Tensor, t: Tensor, y: Tensor) -> Tensor:
    """Targets that learn, over their own sum, whose gradient cancels most of theirs."""
    q = torch.sigmoid(t.float())
    return -(q / q.sum(-1, keepdim=True) * z.float().log_softmax(-1)).sum(-1).mean()


@pytest.mark.parametrize(("f", "chains"), [(capped_and_labelled, 2), (scaled_to_one, 1)])
def test_a_divergence_and_a_loss_read_the_same_logits(f: Callable[..., Tensor], chains: int):
    """What leads to them is done once, and its gradient is rounded once."""
    given = [x.detach() for x in sides(torch.bfloat16, "both", B, S, V)]
    y = torch.randint(V, (B, S))

    def gradients(f: Callable[..., Tensor], dtype: torch.dtype) -> list[Tensor]:
        leaves = [x.to(dtype).requires_grad_() for x in given]
        return [g.double() for g in torch.autograd.grad(f(*leaves, y), leaves)]

    backend = Rewritten()
    ours = gradients(torch.compile(f, backend=backend), torch.bfloat16)
    made = [n for n in backend.final[0].graph.nodes if n.target in (torch.tanh, torch.sigmoid)]
    assert len(made) == chains
    with in_double():
        exact = gradients(f, torch.float64)
    for our, naive, true in zip(ours, gradients(f, torch.bfloat16), exact, strict=True):
        assert (our - true).norm() <= 1.1 * (naive - true).norm()
