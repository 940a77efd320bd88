"""In-place edits seen through aliases, and modes that switch inside the graph: numbers are always eager's."""

import operator
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from harness import compile_rewritten, compile_without_codegen, misses, sites
from pairwise import in_turns
from torch import Tensor

import inductor_ce
from inductor_ce.common.compat import inductor

N, V = 6, 16


def inputs() -> tuple[Tensor, Tensor, Tensor]:
    return torch.randn(N, V, requires_grad=True), torch.arange(N), torch.rand(N)


def run(f: Callable[..., Any], z: Tensor, y: Tensor, w: Tensor) -> list[Tensor]:
    """Results of f and the gradient of their sum, if they have one."""
    outputs = f(z, y.clone(), w)
    outputs = list(outputs) if isinstance(outputs, tuple) else [outputs]
    wanted = [o.sum() for o in outputs if o.requires_grad]
    return outputs + ([*torch.autograd.grad(sum(wanted), z)] if wanted else [])


def check(f: Callable[..., Any], n_sites: int | None = None) -> None:
    args = inputs()
    compiled, _ = compile_rewritten(f)
    actual, expected = run(compiled, *args), run(f, *args)
    assert [a.requires_grad for a in actual] == [e.requires_grad for e in expected]
    torch.testing.assert_close(actual, expected)
    assert n_sites is None or sites() == n_sites


# A row value and a view of it, one of them edited for the other to see


def edited_flat_view(z, y, w):
    lp = z.log_softmax(-1).gather(-1, y[:, None])
    flat = lp.view(-1)
    flat *= w
    return -lp.mean()


def edited_squeeze(z, y, w):
    p = z.log_softmax(-1).gather(-1, y[:, None])
    n = p.squeeze(-1)
    n.mul_(2)
    return p.sum()


def edited_base_of_unsqueeze(z, y, w):
    nll = F.cross_entropy(z, y, reduction="none")
    column = nll.unsqueeze(0)
    nll.mul_(3)
    return column.sum()


def edited_result(z, y, w):
    nll = F.cross_entropy(z, y, reduction="none")
    nll *= w
    return nll.sum()


@pytest.mark.parametrize(
    "f", [edited_flat_view, edited_squeeze, edited_base_of_unsqueeze, edited_result], ids=lambda f: f.__name__
)
def test_edit_of_a_row_value_is_seen_by_its_views(f: Callable[..., Tensor]):
    check(f)


# The backward of a loss reads logits and labels after it


def logarithm_in_place(z, y, w):
    return F.nll_loss(z.softmax(-1).clone().add_(1e-3).log_(), y)


def clamped_in_place(z, y, w):
    return -z.softmax(-1).mul(0.5).clamp_(min=1e-2).gather(1, y[:, None]).log().mean()


def exponential_in_place(z, y, w):
    top = z.max(1, keepdim=True).values.detach()
    return (z - top).exp_().sum(1).log().mean() + (top[:, 0] - z.gather(1, y[:, None])[:, 0]).mean()


def one_edit_after_another(z, y, w):
    nll = (z.log_softmax(-1) * 1.0).neg_().clamp_(max=3.0).square_()
    return (nll.gather(1, y[:, None])[:, 0] * w).sum()


def edited_without_gradient(z, y, w):
    """The values are twice as large, and the gradient is not."""
    lp = z.log_softmax(-1) * 1.0
    with torch.no_grad():
        lp = lp.mul_(2)
    return -lp.gather(1, y[:, None]).mean()


def exponential_without_gradient(z, y, w):
    lp = z.log_softmax(-1) * 1.0
    with torch.no_grad():
        lp = lp.exp_()
    return -lp.gather(1, y[:, None]).mean()


@pytest.mark.parametrize(
    ("f", "n_sites"),
    [
        *((logarithm_in_place, 1), (clamped_in_place, 1), (exponential_in_place, 1)),
        *((one_edit_after_another, 1), (edited_without_gradient, 0), (exponential_without_gradient, 0)),
    ],
)
def test_log_probabilities_edited_in_place(f: Callable[..., Tensor], n_sites: int):
    check(f, n_sites)


EDITS = [
    lambda z: z.div_(0.7),
    lambda z: operator.itruediv(z, 0.7),
    lambda z: operator.setitem(z, (..., 0), -9.0),
    lambda z: z.masked_fill_(torch.arange(V) == 3, -5.0),
    lambda z: z.tanh_(),
    lambda z: z.sub_(z.amax(-1, keepdim=True)),
]
LOGITS = [
    lambda z, w: z * 1.5,
    lambda z, w: (z * 1.5)[1:-1],
    lambda z, w: z @ torch.diag(w.repeat(3)[:V]),
]
LOSSES = [
    F.cross_entropy,
    lambda z, y: -z.log_softmax(-1).gather(-1, y[:, None]).mean(),
    lambda z, y: z.logsumexp(-1).mean() - z.gather(-1, y[:, None]).mean(),
]


@pytest.mark.parametrize(("make", "edit", "loss"), in_turns(LOGITS, EDITS, LOSSES))
def test_logits_that_are_edited_without_grad_keep_their_gradient(make, edit, loss):
    """That of what they were made of: an edit under no_grad is not recorded, and cuts nothing."""

    def f(z, y, w):
        z = make(z, w)
        with torch.no_grad():
            edited = edit(z)
        z = z if edited is None else edited
        return loss(z, y[: len(z)])

    check(f, n_sites=1)


def test_logits_edited_after_the_loss():
    def f(z, y, w):
        x = z * 1
        first = F.cross_entropy(x, y)
        x.mul_(2)
        return first + F.cross_entropy(x, y)

    check(f, n_sites=2)
    assert not misses()


def times_one(z: Tensor) -> Tensor:
    return z * 1


def times_ones(z: Tensor) -> Tensor:
    return z * torch.ones(V)


def plus_zeros(z: Tensor) -> Tensor:
    return torch.zeros(N, V) + z


@pytest.mark.parametrize("f", [times_one, times_ones, plus_zeros], ids=lambda f: f.__name__)
def test_steps_that_torch_drops_leave_their_input_to_the_backward(f: Callable[[Tensor], Tensor]):
    """Before the logits, where a chain is made again in the backward."""
    check(lambda z, y, w: F.cross_entropy(f(z), y), n_sites=1)


def test_logits_edited_after_the_loss_without_a_gradient():
    def f(z, y, w):
        x = z.detach() * 1
        first = F.cross_entropy(x, y)
        x.mul_(2)
        return first + F.cross_entropy(x, y)

    check(f, n_sites=2)


def test_labels_edited_after_the_loss():
    """Our backward reads them, which that of the user's spelling need not: it has a copy then."""

    def f(z, y, w):
        y = y.clone()
        q = F.one_hot(y, z.shape[-1]).float()
        y.fill_(0)
        return -(q * z.log_softmax(-1)).sum(-1).mean()

    check(f, n_sites=1)


def test_labels_that_are_an_argument_and_edited_after_the_loss():
    """AOTAutograd writes arguments at the end of its forward and its backward reads them: a loss to leave."""

    def f(z, y):
        loss = -(F.one_hot(y, z.shape[-1]) * z.log_softmax(-1)).sum(-1).mean()
        y[y < 5] = 0
        return loss

    compiled, _ = compile_without_codegen(f)
    compiled(torch.randn(N, V, requires_grad=True), torch.arange(N))
    assert (sites(), misses()) == (0, 1)


def test_labels_edited_after_a_loss_whose_eager_backward_reads_them():
    def f(z, y, w):
        loss = F.cross_entropy(z, y)
        y.fill_(0)
        return loss

    args = inputs()
    compiled, _ = compile_without_codegen(f)
    for g in (f, compiled):
        with pytest.raises(Exception, match="modified by an inplace operation"):
            run(g, *args)


# Modes


def metric_in_inference_mode(z, y, w):
    with torch.inference_mode():
        metric = F.cross_entropy(z, y).clone()
    return metric, F.cross_entropy(z, y)


def metric_without_grad(z, y, w):
    with torch.no_grad():
        metric = F.cross_entropy(z, y)
    return metric, F.cross_entropy(z, y)


@pytest.mark.parametrize("f", [metric_in_inference_mode, metric_without_grad], ids=lambda f: f.__name__)
def test_metric_beside_the_loss(f: Callable[..., Any]):
    z, y, w = inputs()
    compiled, _ = compile_rewritten(f)
    metric, loss = compiled(z, y, w)
    assert (metric.requires_grad, loss.requires_grad) == (False, True)
    torch.testing.assert_close(metric, f(z, y, w)[0])
    torch.testing.assert_close(torch.autograd.grad(loss, z), torch.autograd.grad(F.cross_entropy(z, y), z))


def test_gradients_switched_on_inside():
    def f(z, y, w):
        metric = F.cross_entropy(z, y)
        with torch.enable_grad():
            return metric, F.cross_entropy(z, y)

    z, y, w = inputs()
    compiled, _ = compile_rewritten(f)
    with torch.no_grad():
        metric, loss = compiled(z, y, w)
    assert (metric.requires_grad, loss.requires_grad) == (False, True)


# Bits are not numbers, and sizes that must stay free


def test_view_as_another_dtype():
    def f(z, y, w):
        return F.cross_entropy(z.half().view(torch.bfloat16).float(), y, reduction="none")

    z, y, w = inputs()
    compiled, _ = compile_rewritten(f)
    torch.testing.assert_close(compiled(z, y, w), f(z, y, w), equal_nan=True)


def test_small_vocabulary_is_not_specialised():
    def f(z, y):
        return -z.log_softmax(-1).gather(-1, y[:, None]).mean()

    compiled, graphs = compile_rewritten(f, dynamic=True, min_vocab=1000)
    for v in (50, 60, 70, 80):
        compiled(torch.randn(N, v), torch.arange(N))
    assert len(graphs.final) == 1


def test_vocabulary_that_is_marked_dynamic():
    def f(z, y):
        return F.cross_entropy(z, y)

    z, y = torch.randn(N, V), torch.arange(N)
    torch._dynamo.mark_dynamic(z, 1)
    compiled, _ = compile_rewritten(f)
    torch.testing.assert_close(compiled(z, y), f(z, y))
    assert (sites(), misses()) == (0, 1)


def test_logarithm_of_a_negative_probability():
    def f(z, y, w):
        return torch.log(-z.softmax(-1)).gather(-1, y[:, None]).sum()

    z, y, w = inputs()
    compiled, _ = compile_rewritten(f)
    assert compiled(z, y, w).isnan()


def test_explaining_often_spoils_nothing():
    def f(z, y, w):
        return F.cross_entropy(z, y)

    args = inputs()
    inductor_ce.install(min_vocab=2)
    assert [len(inductor_ce.explain(f, *args).sites) for _ in range(20)] == [1] * 20
    compiled, _ = compile_rewritten(f)
    compiled(*args)
    assert sites() == 1


# What a step loses must not be lost sight of

rounds = pytest.mark.skipif(
    not inductor.HAS_PASS_LISTS, reason="before 2.13 Inductor itself drops these casts"
)


def checkpointed_edit(z, y, w):
    def body(x):
        x.mul_(2)
        return x.sum()

    x = z.detach() * 1
    lse = x.logsumexp(-1)
    s = torch.utils.checkpoint.checkpoint(body, x, use_reentrant=False)
    return lse - x.gather(-1, y[:, None]).squeeze(-1) + s * 0


def integer_log_probs(z, y, w):
    return z.log_softmax(-1).int().float().gather(-1, y[:, None]).sum()


def quantised_logits(z, y, w):
    return F.cross_entropy(z.to(torch.float8_e4m3fn).float(), y)


def halved_logits(z, y, w):
    return F.cross_entropy((z * 1e5).half().float(), y, reduction="none")


def rounded_log_probs(z, y, w):
    return z.log_softmax(-1).bfloat16().gather(-1, y[:, None]).float().squeeze(-1)


def rounded_rows(z, y, w):
    return z.log_softmax(-1).gather(-1, y[:, None]).half().float() * 3


def double_log_softmax(z, y, w):
    return F.log_softmax(100 * z, -1, dtype=torch.float64).gather(-1, y[:, None]).sum()


def sum_of_probabilities(z, y, w):
    return F.cross_entropy(z, y), z.softmax(-1).sum(-1)


def switched_off(z, y, w):
    return (z.log_softmax(-1).gather(-1, y[:, None]) * 0.0).sum() + F.cross_entropy(z, y)


def large_coefficient(z, y, w):
    return (z.logsumexp(-1) - z.gather(-1, y[:, None]).squeeze(-1)) * 1e20


def numpy_axes(z, y, w):
    return F.cross_entropy(z.view(2, 3, V).swapaxes(axis0=1, axis1=2), y.view(2, 3))


@pytest.mark.parametrize(
    "f",
    [
        checkpointed_edit,
        integer_log_probs,
        quantised_logits,
        halved_logits,
        pytest.param(rounded_log_probs, marks=rounds),
        pytest.param(rounded_rows, marks=rounds),
        double_log_softmax,
        sum_of_probabilities,
        switched_off,
        large_coefficient,
        numpy_axes,
    ],
    ids=lambda f: f.__name__,
)
def test_numbers_are_eagers(f: Callable[..., Any]):
    z, y, w = inputs()
    compiled, _ = compile_without_codegen(f)
    actual, expected = compiled(z, y, w), f(z, y, w)
    torch.testing.assert_close(actual, expected, equal_nan=True)


@rounds
def test_rounded_log_probs_are_read():
    check(rounded_log_probs, n_sites=1)


def test_image_logits_in_channels_last():
    def f(z, y):
        return F.cross_entropy(z.contiguous(memory_format=torch.channels_last) / 2, y)

    z, y = torch.randn(2, V, 3, 4, requires_grad=True), torch.randint(0, V, (2, 3, 4))
    compiled, _ = compile_rewritten(f)
    torch.testing.assert_close(compiled(z, y), f(z, y))
    assert sites() == 1


def test_device_of_the_result():
    def f(z, y):
        return z.log_softmax(-1).gather(-1, y[:, None]).squeeze(-1).to("meta")

    compiled, _ = compile_rewritten(f)
    assert compiled(torch.randn(N, V), torch.arange(N)).device.type == "meta"


@pytest.mark.parametrize("other", ["ignored otherwise", "gathered"])
def test_label_that_one_of_two_losses_does_not_know(other: str):
    """Ignored by one loss, impossible in the other: never a plausible number."""

    def f(z, y):
        loss = F.cross_entropy(z, y, ignore_index=-1)
        if other == "gathered":
            return loss - z.log_softmax(-1).gather(-1, y[:, None]).mean()
        return loss + F.cross_entropy(z, y, ignore_index=-100)

    y = torch.arange(N)
    y[2] = -1
    compiled, _ = compile_rewritten(f)
    assert compiled(torch.randn(N, V), y).isnan()


def test_a_function_of_each_probability_is_applied_to_those_picked():
    def f(z, y):
        return -(z.softmax(-1) + 1e-9).log().gather(-1, y[:, None]).mean()

    compiled, _ = compile_rewritten(f)
    z, y = 30 * torch.randn(N, V), torch.arange(N)
    torch.testing.assert_close(compiled(z, y), f(z, y))
    assert (sites(), misses()) == (1, 0)


def test_a_function_of_each_probability_that_is_summed_is_told():
    def f(z):
        p = z.softmax(-1)
        return -(p * (p.sin() + 1e-9).log()).sum(-1).mean()

    compiled, _ = compile_rewritten(f)
    compiled(torch.randn(N, V))
    assert (sites(), misses()) == (0, 1)


def entropy_of_log_probabilities(z, logp):
    return -(logp.exp() * logp).sum(-1)


def entropy_of_logits(z, logp):
    return torch.logsumexp(z, -1) - (F.softmax(z, -1) * z).sum(-1)


def entropy_of_both(z, logp):
    return -(F.softmax(z, -1) * logp).sum(-1)


@pytest.mark.parametrize("entropy", [entropy_of_log_probabilities, entropy_of_logits, entropy_of_both])
def test_a_metric_under_no_grad_of_what_has_a_gradient(entropy):
    """It needs none of all classes, and the loss keeps its gradient."""

    def f(z, y):
        logp = z.log_softmax(-1)
        with torch.no_grad():
            e = entropy(z, logp)
        return -(logp.gather(1, y[:, None]).squeeze(1) * torch.sigmoid(e)).mean(), e

    z, y = torch.randn(N, V, requires_grad=True), torch.randint(V, (N,))
    compiled, backend = compile_rewritten(f)
    (ours, e), (eager, own) = compiled(z, y), f(z, y)
    torch.testing.assert_close((ours, e), (eager, own))
    assert not e.requires_grad
    torch.testing.assert_close(*(torch.autograd.grad(loss, z) for loss in (ours, eager)))
    assert (sites(), misses()) == (1, 0)
    assert "mean_p" in backend.report.sites[0].form


@pytest.mark.parametrize(
    ("wide", "narrow"),
    [
        (torch.float32, torch.bfloat16),
        (torch.float64, torch.float32),
        (torch.float32, torch.int64),
        (torch.float64, torch.int32),
    ],
)
def test_numbers_of_rows_that_are_narrower_are_not_rounded(wide, narrow):
    """Their reciprocal is taken as eager divides by them, beside wider numbers; integers have none."""

    def f(z, y, r):
        return (z.log_softmax(-1) / r[:, None]).gather(1, y[:, None]).sum()

    z, y = torch.randn(N, V, dtype=wide), torch.randint(V, (N,))
    r = (3 * torch.rand(N) + 1).to(narrow)
    compiled, _ = compile_rewritten(f)
    near = 1e-6 if wide == torch.float32 else 1e-13
    torch.testing.assert_close(compiled(z, y, r), f(z, y, r), rtol=near, atol=0)
    assert sites() == 1


def filled_log_probabilities(z, y, rows):
    return z.log_softmax(-1).masked_fill(rows[:, None], 0.1).gather(1, y[:, None]).sum()


def filled_sums(z, y, rows):
    return (z.softmax(-1) * z.log_softmax(-1)).masked_fill(rows[:, None], 0.1).sum(-1)


def filled_squares(z, y, rows):
    return z.softmax(-1).masked_fill(rows[:, None], 0.1).square().sum(-1)


@pytest.mark.parametrize("f", [filled_log_probabilities, filled_sums, filled_squares])
def test_numbers_that_rows_are_filled_with_are_not_rounded(f):
    """Nor is what a filled row had, which may be NaN."""
    z, y, rows = torch.randn(N, V, dtype=torch.float64), torch.randint(V, (N,)), torch.arange(N) % 2 == 0
    z[2] = torch.nan
    z.requires_grad_()
    compiled, _ = compile_rewritten(f)
    ours, eager = compiled(z, y, rows), f(z, y, rows)
    torch.testing.assert_close(ours, eager, rtol=1e-13, atol=1e-15)
    gradients = [torch.autograd.grad(x.sum(), z)[0][rows.logical_not()] for x in (ours, eager)]
    torch.testing.assert_close(*gradients, rtol=1e-12, atol=1e-13)
    assert sites() == 1


def test_vocabulary_that_changed():
    """Dynamo guesses that it is dynamic; nobody insists on it, and it is specialised."""
    compiled, _ = compile_rewritten(lambda z, y: F.cross_entropy(z, y))
    for v in (10, 11):
        z, y = torch.randn(N, v), torch.arange(N)
        torch.testing.assert_close(compiled(z, y), F.cross_entropy(z, y))
    assert (sites(), misses()) == (2, 0)


# What random spellings found


def test_edit_through_a_detached_alias_of_the_rows():
    def f(z, y, w):
        rows = F.cross_entropy(z, y, reduction="none")
        rows.detach().zero_()
        return rows * w

    check(f)


def test_detached_alias_of_rows_that_are_edited_later():
    def f(z, y, w):
        rows = -z.log_softmax(1).gather(1, y[:, None])
        kept = rows.detach().squeeze(1)
        rows.zero_()
        return kept * w, rows

    check(f)


def test_edit_of_logits_on_another_dimension_before_the_loss():
    def f(z, y, w):
        z = (z.view(2, 3, V) * 2).transpose(1, 2)
        z.masked_fill_(z > 1, 0.0)
        return F.cross_entropy(z, y.view(2, 3))

    check(f, n_sites=0)


def test_rows_times_zero_stay_rows():
    def f(z, y, w):
        rows = z.logsumexp(1) - z.gather(1, y[:, None]).squeeze(1)
        return (rows * 0.0 + w).sum() + rows.sum()

    check(f, n_sites=1)


@pytest.mark.parametrize("how", ["nll_loss", "kl_div", "sum", "einsum"])
def test_a_maximum_that_does_not_cancel_has_its_gradient(how):
    def f(z, y, w):
        logp = z - z.amax(1, keepdim=True) - z.exp().sum(1, keepdim=True).log()
        q = F.one_hot(y, V).to(z.dtype)
        if how == "nll_loss":
            return F.nll_loss(logp, y)
        if how == "kl_div":
            return F.kl_div(logp, q, reduction="batchmean")
        return -(logp * q).sum() if how == "sum" else -torch.einsum("nv,nv->", logp, q)

    check(f, n_sites=0)


@pytest.mark.parametrize("is_read", [False, True])
def test_the_largest_probability_is_no_loss_where_it_is_returned(is_read):
    def f(z, y, w):
        confidence = z.softmax(-1).amax(-1)
        return F.cross_entropy(z, y), confidence.mean() if is_read else confidence

    check(f, n_sites=1)
    assert misses() == is_read


@pytest.mark.parametrize("label", [-1, 0, V - 1, V])
def test_take_along_dim_counts_round(label):
    def f(z, y, w):
        return torch.take_along_dim(z.log_softmax(1), torch.full_like(y, label)[:, None], 1)

    check(f, n_sites=1)
