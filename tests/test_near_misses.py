"""What looks like a cross-entropy and is left as written: the reason, the user's line, eager's numbers."""

import inspect
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from harness import Graphs, Rewritten, compile_rewritten, compile_without_codegen, misses, sites
from pairwise import EVERYTHING
from test_recognise import explained, labels, logits, step
from torch import Tensor
from torch.testing._internal.two_tensor import TwoTensor

import inductor_ce
from inductor_ce import Reason

N, V = 10, 11
WEIGHT = torch.linspace(0.5, 2.0, V)


def marked_line(f: Callable[..., Any], mark: str = "# here") -> str:
    """ "file.py:NN" of the line of f that ends in the mark, and its text."""
    lines, first = inspect.getsourcelines(f)
    (place,) = (i for i, line in enumerate(lines) if line.rstrip().endswith(mark))
    return f"test_near_misses.py:{first + place}"


def check_left(f: Callable[..., Any], *args: Any, reason: Reason, fact: str = "", **install: Any) -> None:
    """f computes what eager computes, nothing is fused, and the one miss names the marked line."""
    ours = Rewritten(**install)
    check_right(f, *args, backend=ours)
    assert not ours.changed
    report = ours.report
    assert (sites(), report.sites) == (0, [])
    assert [miss.reason for miss in report.misses] == [reason]
    assert report.misses[0].location == marked_line(f)
    assert report.misses[0].code.endswith("# here")
    assert fact in report.misses[0].message
    assert report.misses[0].message.endswith(reason.value)
    assert misses() == 1


def check_right(f: Callable[..., Any], *args: Any, backend: Callable[..., Any] | None = None) -> None:
    """Fused or not, f computes what eager computes."""
    compiled = torch.compile(f, backend=backend) if backend else compile_without_codegen(f)[0]
    torch.testing.assert_close(step(compiled, *args), step(f, *args), equal_nan=True)


# Arguments of the losses of torch


def class_weights(z, q):
    weight = WEIGHT.clone().requires_grad_() * 2
    return F.cross_entropy(z, q, weight=weight)  # here


def test_class_weights_that_want_a_gradient():
    """torch itself takes them with probabilities alone."""
    q = torch.rand(N, V).softmax(-1)
    check_left(class_weights, logits(), q, reason=Reason.CLASS_WEIGHTS, fact="class weights")


def wanted(*shape: int) -> Tensor:
    """Probabilities of which a gradient is wanted."""
    return torch.rand(*shape).softmax(-1).requires_grad_()


def test_soft_targets_that_want_a_gradient():
    def f(z, q):
        return F.cross_entropy(z, q)  # here

    check_left(f, logits(), wanted(N, V), reason=Reason.SOFT_TARGETS, fact="holds class probabilities")


def test_soft_targets_by_hand_that_want_a_gradient():
    def f(z, q):
        logp = F.log_softmax(z, dim=-1)  # here
        return -(q * logp).sum(-1).mean()

    check_left(f, logits(), wanted(N, V), reason=Reason.SOFT_TARGETS, fact="[10, 11]")


def test_kl_div_to_what_wants_a_gradient():
    def f(z, q):
        logp = z.log_softmax(-1)  # here
        return F.kl_div(logp, q, reduction="batchmean")

    check_left(f, logits(), wanted(N, V), reason=Reason.SOFT_TARGETS, fact="of which a gradient is wanted")


def test_default_vocabulary_limit():
    inductor_ce.install()
    z = torch.randn(2, 1023), torch.randn(2, 1024)
    y = torch.tensor([3, 5])
    reports = [inductor_ce.explain(F.cross_entropy, each, y) for each in z]
    assert [len(r.sites) for r in reports] == [0, 1]


# Somebody else needs what the loss would not make


def used_elsewhere(z, y):
    logp = z.log_softmax(-1)
    picked = logp.gather(-1, y.unsqueeze(-1)).squeeze(-1)  # here
    return -picked.mean(), torch.sin(logp - picked[:, None]).sum()


def test_log_probabilities_beside_what_is_picked_of_them():
    fact = "is also used by sin at test_near_misses.py:"
    check_left(used_elsewhere, logits(), labels(ignore=None), reason=Reason.LOGITS_ESCAPE, fact=fact)


def test_only_log_probabilities():
    def f(z):
        return F.log_softmax(z, dim=-1)  # here

    check_left(f, logits(), reason=Reason.NOT_UNDERSTOOD, fact="no loss is taken from it here")


def test_logits_returned_is_no_miss():
    """They are in memory anyway."""

    def f(h, w, y):
        z = h @ w.t()
        return F.cross_entropy(z, y), z

    args = torch.randn(N, 4, requires_grad=True), torch.randn(V, 4, requires_grad=True), labels()
    check_right(f, *args)
    assert (sites(), misses()) == (1, 0)


# The normaliser and the pick see different values


def one_sided_scale(z, y):
    lse = (z / 0.7).logsumexp(-1)  # here
    return lse - z.gather(-1, y[:, None]).squeeze(-1)


def one_sided_dropout(z, y):
    lse = F.dropout(z, 0.0, training=True).logsumexp(-1)  # here
    return lse - z.gather(-1, y[:, None]).squeeze(-1)


def other_axis(z, y):
    logp = z.log_softmax(0)  # here
    return -logp.gather(1, y[:, None]).squeeze(1)


def other_axis_nll(z, y):
    logp = z.log_softmax(0)  # here
    return F.nll_loss(logp, y)


def few_rows(z, y):
    logp = z.log_softmax(-1)  # here
    return logp.gather(-1, y[:3, None]).squeeze(-1)


@pytest.mark.parametrize(
    "f",
    [
        *(one_sided_scale, one_sided_dropout),
        *(other_axis, other_axis_nll, few_rows),
    ],
)
def test_not_one_loss(f: Callable[..., Tensor]):
    check_left(f, logits(), labels(ignore=None), reason=Reason.NOT_UNDERSTOOD)


def logits_edited(z, y):
    z = z.clone()
    lse = z.logsumexp(-1)  # here
    z.mul_(2)
    return lse - z.gather(-1, y[:, None]).squeeze(-1)


def logits_edited_through_a_view(z, y):
    z = z.clone()
    lse = z.logsumexp(-1)  # here
    z.view(-1)[3] = 9
    return lse - z.gather(-1, y[:, None]).squeeze(-1)


def log_probabilities_edited(z, y):
    logp = z.log_softmax(-1).clone()  # here
    logp[:, 0] = 0
    return logp.gather(-1, y[:, None]).squeeze(-1)


def log_probabilities_scaled_by_another_name(z, y):
    logp = z.log_softmax(-1)  # here
    logp.view(-1).div_(2)
    return logp.gather(-1, y[:, None]).squeeze(-1)


@pytest.mark.parametrize(
    "f",
    [
        *(logits_edited, logits_edited_through_a_view),
        *(log_probabilities_edited, log_probabilities_scaled_by_another_name),
    ],
)
def test_edited_in_between(f: Callable[..., Tensor]):
    """Without gradient: eager autograd refuses most of these edits."""
    args = logits().detach(), labels(ignore=None) % (V - 1) + 1
    check_right(f, *args)
    (miss,) = explained(f, *args).misses
    assert miss.reason in (Reason.MUTATED, Reason.NOT_UNDERSTOOD)
    assert (sites(), miss.location) == (0, marked_line(f))


def test_value_of_an_edited_row():
    """The per-token losses are edited in place by the user: they are the user's."""

    def f(z, y):
        nll = F.cross_entropy(z, y, reduction="none")
        nll[::2] = 0
        return nll.mul_(2)

    check_right(f, logits(), labels())


def test_labels_gone_where_the_loss_is_used():
    """Read at one place, used at another: the statistics must be of the labels that were read."""

    def f(z, y):
        y = y.clone()
        picked = z.gather(-1, y[:, None]).squeeze(-1)
        y.zero_()
        return z.logsumexp(-1) - picked

    check_right(f, logits().detach(), labels(ignore=None))


# Right though it looks wrong


def one_sided_detach(z, y):
    """Its two statistics are replaced, each with the gradient that it had."""
    return z.detach().logsumexp(-1) - z.gather(-1, y[:, None]).squeeze(-1)


def one_sided_no_grad(z, y):
    with torch.no_grad():
        lse = z.logsumexp(-1)
    return lse - z.gather(-1, y[:, None]).squeeze(-1)


def detached_log_probabilities(z, y):
    logp = z.log_softmax(-1).detach()
    return logp.gather(-1, y[:, None]).squeeze(-1) * z.gather(-1, y[:, None]).squeeze(-1)


def max_never_added_back(z, y):
    shifted = z - z.amax(-1, keepdim=True)
    return shifted.exp().sum(-1).log() - z.gather(-1, y[:, None]).squeeze(-1)


def max_added_twice(z, y):
    m = z.amax(-1)
    return z.logsumexp(-1) + m - z.gather(-1, y[:, None]).squeeze(-1)


def softmax_of_softmax(z, y):
    return F.cross_entropy(z.softmax(-1), y)


def log_softmax_twice(z, y):
    return F.cross_entropy(z.log_softmax(-1), y)


def gather_of_probabilities(z, y):
    return 1 - z.softmax(-1).gather(-1, y[:, None]).squeeze(-1)


def subtraction_with_alpha(z, y):
    return torch.sub(z.logsumexp(-1), z.gather(-1, y[:, None]).squeeze(-1), alpha=2)


def floor_division(z, y):
    logp = z.log_softmax(-1).gather(-1, y[:, None]).squeeze(-1)
    return torch.div(logp, 0.3, rounding_mode="floor")


def added_across_rows(z, y):
    """[N] and [N, 1]: every lse with every pick."""
    return z.logsumexp(-1) - z.gather(-1, y[:, None])


def rows_subtracted_from_the_square(z, y):
    """With N = V, z - lse without keepdim subtracts along the wrong axis."""
    z = z[:, :N]
    return (z - z.logsumexp(-1)).gather(-1, y[:, None] % N).squeeze(-1)


def transposed_square(z, y):
    z = z[:, :N].t()
    return F.cross_entropy(z, y % N) + F.cross_entropy(z.t(), y % N)


def labels_of_other_rows(z, y):
    logp = z.log_softmax(-1)
    return logp.gather(-1, y[:, None]) - logp.gather(-1, y.flip(0)[:, None])


def vocabulary_sliced(z, y):
    return F.cross_entropy(z[:, :8], y % 8) + z.logsumexp(-1).mean()


def few_rows_kept(z, y):
    return F.cross_entropy(z[-2:], y[-2:])


def strided_rows(z, y):
    return F.cross_entropy(z[::2], y[::2])


def permuted_rows(z, y):
    return F.cross_entropy(z[torch.arange(N - 1, -1, -1)], y.flip(0))


def expanded_rows(z, y):
    return F.cross_entropy(z[:1].expand(N, V), y, reduction="none")


def boolean_product(z, y):
    nll = F.cross_entropy(z, y, reduction="none")
    return nll * (y > 3), nll**2, nll / nll.detach().sum()


def two_slices(z, y):
    """One label tensor, read against different rows."""
    z, y = z.view(2, 5, V), y.view(2, 5)[:, :4].reshape(-1)
    first = F.cross_entropy(z[:, :-1].reshape(-1, V), y, reduction="none")
    return first, F.cross_entropy(z[:, 1:].reshape(-1, V), y, reduction="none")


def two_arrangements(z, y):
    """The same transpose, of rows in different shapes."""
    first = F.cross_entropy(z.view(2, 5, V).transpose(0, 1).reshape(-1, V), y, reduction="none")
    return first, F.cross_entropy(z.view(5, 2, V).transpose(0, 1).reshape(-1, V), y, reduction="none")


def two_orders(z, y):
    """Labels in the order of the rows, and in another."""
    logp = z.view(2, 5, V).log_softmax(-1)
    across = logp.gather(-1, y.view(5, 2).t().unsqueeze(-1)).squeeze(-1)
    return across, logp.gather(-1, y.view(2, 5, 1)).squeeze(-1)


def labels_expanded(z, y):
    return z.view(2, 5, V).log_softmax(-1).gather(-1, y[:5].view(1, 5, 1).expand(2, 5, 1)).squeeze(-1)


def classes_first(z, y):
    return F.cross_entropy(z.t()[None], y[None]), z.t().log_softmax(0).gather(0, y[None]).squeeze(0)


def kept_axis_reduced(z, y):
    picked = z.log_softmax(-1).gather(-1, y[:, None])
    return picked.sum(-1), picked.mean(1), picked.sum(0), picked[0], picked[:, -1], picked.logsumexp(-1)


def numbers_on_the_left(z, y):
    logp, lse = z.log_softmax(-1), z.logsumexp(-1)
    return (1 - logp).gather(-1, y[:, None]).squeeze(-1), 1 / lse - z.gather(-1, y[:, None]).squeeze(-1)


def temperature_of_each_row(z, y):
    t = torch.linspace(1, 2, N)[:, None]
    return (z / t).logsumexp(-1) - z.gather(-1, y[:, None]).squeeze(-1) / t.squeeze(1)


def labels_from_the_logits(z, y):
    top = z.max(-1)
    return top.values - z.gather(-1, top.indices[:, None]).squeeze(-1), F.cross_entropy(z, top.indices)


def exp_without_shift(z, y):
    """Eager overflows: so must this, fused or not."""
    return (z * 50).exp().sum(-1).log() - (z * 50).gather(-1, y[:, None]).squeeze(-1)


def labels_narrowed(z, y):
    """A cast of labels that changes them."""
    narrowed = y.to(torch.bool).to(torch.int64)
    return F.cross_entropy(z, y), F.cross_entropy(z, narrowed), F.cross_entropy(z, (y + 256).byte().long())


def rows_counted_from_an_edited_arange(z, y):
    """What counts rows or classes, edited in place before it is used."""
    rows, classes = torch.arange(N), torch.arange(V)
    rows.add_(1).remainder_(N)
    classes.add_(1)
    hits = (classes == y[:, None]).float()
    return z.log_softmax(-1)[rows, y], (z.log_softmax(-1) * hits).sum(-1)


def another_offset_in_a_flat_index(z, y):
    return z.log_softmax(-1).view(-1)[torch.arange(N) * V + y + 1]


def fewer_rows_in_a_flat_index(z, y):
    return z.log_softmax(-1).view(-1)[torch.arange(N - 1) * V + y[1:]]


def edited_flat_index(z, y):
    index = torch.arange(N) * V + y
    index.add_(1)
    labels = y.clone()
    other = torch.arange(N) * V + labels
    labels.zero_()
    return z.log_softmax(-1).view(-1)[index % (N * V)], z.log_softmax(-1).view(-1)[other]


def masked_labels_in_a_flat_index(z, y):
    """A label that is no class reads another row, times 0."""
    y = torch.where(y == 3, -V, y)
    picked = z.log_softmax(-1).view(-1)[(torch.arange(N) * V).add(y)]
    return picked * (y >= 0)


def one_row_after_the_other(z, y):
    rows = zip(z.unbind(0), y.unbind(0), strict=True)
    return torch.stack([r.log_softmax(-1).gather(-1, label[None])[0] for r, label in rows])


def focal(z, y):
    p = z.softmax(-1).gather(-1, y[:, None]).squeeze(-1)
    return (1 - p) ** 2 * F.cross_entropy(z, y, reduction="none")


def probability_of_large_logits(z, y):
    return (z * 1e4).softmax(-1).gather(-1, y[:, None]).squeeze(-1)


def entropy_bonus(z, y):
    p, logp = z.softmax(-1), z.log_softmax(-1)
    return F.nll_loss(logp, y) + 0.1 * (p * logp).sum(-1).mean()


def logits_edited_before(z, y):
    z = z * 1
    z.view(-1).mul_(2)
    F.relu(z, inplace=True)
    return F.cross_entropy(z, y)


NEARLY = [
    *(max_never_added_back, max_added_twice, softmax_of_softmax, log_softmax_twice),
    *(gather_of_probabilities, subtraction_with_alpha, floor_division, added_across_rows),
    *(rows_subtracted_from_the_square, transposed_square, labels_of_other_rows, vocabulary_sliced),
    *(rows_counted_from_an_edited_arange, another_offset_in_a_flat_index, fewer_rows_in_a_flat_index),
    *(edited_flat_index, masked_labels_in_a_flat_index),
    *(few_rows_kept, strided_rows, permuted_rows, expanded_rows, boolean_product, two_slices),
    *(two_arrangements, two_orders, labels_expanded, classes_first, kept_axis_reduced),
    *(numbers_on_the_left, temperature_of_each_row, labels_from_the_logits, one_row_after_the_other),
    *(focal, probability_of_large_logits, entropy_bonus, logits_edited_before, labels_narrowed),
    exp_without_shift,
]


@pytest.mark.parametrize("f", NEARLY, ids=lambda f: f.__name__)
def test_numbers_are_eagers(f: Callable[..., Tensor]):
    """One in three through all passes, with ALL=1 all of them."""
    whole = EVERYTHING or NEARLY.index(f) % 3 == 0
    backend = None if whole else Rewritten()
    check_right(f, logits(), labels(ignore=None), backend=backend)


@pytest.mark.in_turns
@pytest.mark.parametrize("value", [-torch.inf, torch.nan])
@pytest.mark.parametrize(
    "f", [F.cross_entropy, gather_of_probabilities, log_softmax_twice, focal], ids=lambda f: f.__name__
)
def test_gradients_where_logits_are_not_finite(f: Callable[..., Tensor], value: float):
    z = logits().detach()
    z[:, 3], z[1] = value if value < 0 else z[:, 3], value
    check_right(f, z.requires_grad_(), labels(ignore=None))


def test_two_backwards():
    z = logits()
    loss = compile_without_codegen(F.cross_entropy)[0](z, labels())
    first, second = (torch.autograd.grad(loss, z, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)


def test_softmax_before_the_loss_is_its_logits():
    check_right(softmax_of_softmax, logits(), labels())
    assert (sites(), misses()) == (1, 0)


def test_out_of_range_label_is_never_a_plausible_number():
    """Eager raises on the CPU; compiled, the row is NaN."""

    def f(z, y):
        return F.cross_entropy(z, y, reduction="none"), z.logsumexp(-1) - z.gather(-1, y[:, None]).squeeze(-1)

    compiled, _ = compile_rewritten(f)
    z, y = logits(), labels(ignore=None)
    y[2], y[5] = V, -1
    for result in compiled(z, y):
        assert result.isnan().tolist() == [i in (2, 5) for i in range(N)]


# Other machinery round the loss


def test_vmap():
    def f(z, y):
        return torch.vmap(lambda z, y: F.cross_entropy(z, y))(z.view(2, 5, V), y.view(2, 5))

    check_right(f, logits(), labels(ignore=None))


def test_vmap_of_gather():
    def f(z, y):
        return torch.vmap(lambda z, y: -z.log_softmax(-1).gather(-1, y[None])[0])(z, y)

    check_right(f, logits(), labels(ignore=None))


def test_function_transform():
    def f(z, y):
        return torch.func.grad(lambda z: F.cross_entropy(z, y))(z)

    z, y = logits().detach(), labels()
    check_right(f, z, y)


def test_function_transform_is_a_miss():
    def f(z, y):
        return torch.func.grad(lambda z: F.cross_entropy(z, y))(z)

    inductor_ce.install(min_vocab=2)
    (miss,) = explained(f, logits().detach(), labels()).misses
    assert miss.reason == Reason.FUNCTION_TRANSFORM


class Loss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, z, y):
        ctx.save_for_backward(z, y)
        return F.cross_entropy(z, y)

    @staticmethod
    def backward(ctx, upstream):
        z, y = ctx.saved_tensors
        return upstream * (z.softmax(-1) - F.one_hot(y, V)) / len(y), None


def test_autograd_function():
    """Its backward is the user's own, and stays."""
    check_right(Loss.apply, logits(), labels(ignore=None))
    assert sites() == 0
    (miss,) = explained(Loss.apply, logits(), labels(ignore=None)).misses
    assert miss.reason == Reason.OWN_BACKWARD


def test_checkpoint():
    def f(z, y):
        return torch.utils.checkpoint.checkpoint(F.cross_entropy, z * 2, y, use_reentrant=False)

    check_right(f, logits(), labels())
    assert sites() == 1


def test_tensor_subclass():
    def f(z, y):
        return F.cross_entropy(z, y)  # here

    z, y = logits().detach(), labels()
    compiled, _ = compile_without_codegen(f)
    both = TwoTensor(z, z + 1)
    torch.testing.assert_close(compiled(both, y), f(both, y))
    assert (sites(), misses()) == (0, 1)
    (miss,) = inductor_ce.explain(f, both, y).misses
    assert (miss.reason, miss.location) == (Reason.UNSUPPORTED_TENSOR, marked_line(f))


def test_graph_break_between():
    def f(z, y):
        logp = z.log_softmax(-1)  # here
        torch._dynamo.graph_break()
        return logp.gather(-1, y[:, None]).squeeze(-1)

    check_right(f, logits(), labels(ignore=None))
    assert sites() == 0
    miss = explained(f, logits(), labels(ignore=None)).misses[0]
    assert (miss.reason, miss.location) == (Reason.NOT_UNDERSTOOD, marked_line(f))


def test_losses_of_other_kinds_are_no_misses():
    def f(z, y):
        q = F.one_hot(y, V).float()
        return F.binary_cross_entropy_with_logits(z, q) + F.mse_loss(z.sigmoid(), q) + z.softmax(-1).max()

    check_right(f, logits(), labels(ignore=None))
    assert (sites(), misses()) == (0, 0)


def test_miss_beside_a_site():
    def f(z, y):
        good = F.cross_entropy(z, y)
        return good + F.cross_entropy(z, z.softmax(-1))  # here

    check_right(f, logits(), labels())
    assert (sites(), misses()) == (1, 1)
    assert explained(f, logits(), labels()).misses[0].location == marked_line(f)


# on_miss


def test_miss_is_ignored_by_default():
    compiled, _ = compile_rewritten(used_elsewhere)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        compiled(logits(), labels(ignore=None))
    assert not [w for w in caught if "left as written" in str(w.message)]
    assert misses() == 1


def test_miss_warns():
    compiled, _ = compile_rewritten(used_elsewhere, on_miss="warn")
    z, y = logits(), labels(ignore=None)
    line = marked_line(used_elsewhere)
    where = f"{line}: left as written \\[LOGITS_ESCAPE\\] The log_softmax of all classes"
    with pytest.warns(UserWarning, match=where):
        result = compiled(z, y)
    torch.testing.assert_close(result, used_elsewhere(z, y))


def test_miss_raises():
    inductor_ce.install(min_vocab=2, on_miss="raise")
    with pytest.raises(Exception, match=r"left as written \[LOGITS_ESCAPE\]") as caught:
        torch.compile(used_elsewhere, backend=Graphs())(logits(), labels(ignore=None))
    inner = getattr(caught.value, "inner_exception", caught.value)
    assert isinstance(inner, inductor_ce.MissError)
    assert marked_line(used_elsewhere) in str(inner)


def test_nothing_to_miss_raises_nothing():
    inductor_ce.install(min_vocab=2, on_miss="raise")
    torch.compile(lambda z, y: F.cross_entropy(z, y), backend=Graphs())(logits(), labels(ignore=None))
    assert sites() == 1


# Reasons that are of the kind


def told(f, *args):
    with inductor_ce.install(min_vocab=2):
        return explained(f, *args).misses


def energies_added(z):
    first, second = z[:, :20].logsumexp(-1), z[:, 20:].logsumexp(-1)
    return torch.logaddexp(first, second).mean() + z.sigmoid().sum()


def stacked_energies(z):
    energies = torch.stack([z.logsumexp(-1), (2 * z).logsumexp(-1)])
    return energies.logsumexp(0).mean() + z.sigmoid().sum()


def squared_energy(z):
    return z.logsumexp(-1).square().mean() + z.sigmoid().sum()


@pytest.mark.parametrize("f", [energies_added, stacked_energies, squared_energy])
def test_a_sum_of_normalisers_is_no_mixture(f):
    """Their logits have another reader, which is why they are left."""
    misses = told(f, torch.randn(8, 48, requires_grad=True))
    assert {miss.reason for miss in misses} == {Reason.NORMALISER}
    assert all("for sum at" in miss.message for miss in misses)


def test_a_normaliser_that_nothing_else_hinders_is_fused():
    assert not told(lambda z: z.logsumexp(-1).square().mean(), torch.randn(8, 48, requires_grad=True))


def unlike_sides(z, t):
    p, q = z.log_softmax(-1), t.log_softmax(-1)
    return torch.logaddexp(p, q).sin().sum()


def test_a_mixture_is_told_as_one():
    z = torch.randn(8, 48, requires_grad=True)
    assert {miss.reason for miss in told(unlike_sides, z, torch.randn(8, 48))} == {Reason.MIXTURE}


@pytest.mark.parametrize(
    ("f", "fact"),
    [
        (lambda z, q: (q * z.log_softmax(-1).clamp(min=-10)).cumsum(-1).sum(), "more than picked entries"),
        (lambda z, q: (z.softmax(-1).mean(0).log() * q[0]).sum(), "adds up rows, class by class"),
    ],
)
def test_each_entry_is_needed(f, fact):
    (miss,) = told(f, torch.randn(8, 48, requires_grad=True), torch.rand(8, 48))
    assert miss.reason is Reason.EACH_ENTRY
    assert fact in miss.message
