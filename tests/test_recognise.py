"""The spellings that are read: each in its normal form, over one `row_stats`, and equal to eager."""

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from harness import Graphs, Rewritten, compile_rewritten, misses, sites
from pairwise import EVERYTHING
from torch import Tensor, nn
from torch._dynamo.utils import counters

import inductor_ce
from inductor_ce import ops

B, S, V = 2, 5, 11
N = B * S

CE = "lse - pick(y)"
MEAN = f"mean[y != -100]({CE})"
LOGP = "pick(y) - lse"
SMOOTHED = "lse - 0.9*pick(y) - 0.1*sum/V"


def logits(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return (3 * torch.randn(shape or (N, V))).to(dtype).requires_grad_()


def labels(*shape: int, ignore: int | None = -100) -> Tensor:
    """Random labels with every third ignored, or none."""
    y = torch.randint(V, shape or (N,))
    if ignore is not None:
        y.view(-1)[1::3] = ignore
    return y


def step(f: Callable[..., Any], *args: Any) -> list[Tensor]:
    """The results of f and its gradients under a random upstream gradient, on copies of the arguments."""
    args = tuple(
        a.detach().clone().requires_grad_(a.requires_grad) if torch.is_tensor(a) else a for a in args
    )
    result = f(*args)
    results = list(result) if isinstance(result, (tuple, list)) else [result]
    wanted = [a for a in args if torch.is_tensor(a) and a.requires_grad]
    generator = torch.Generator().manual_seed(7)
    upstream = sum(
        (r * (torch.rand(r.shape, generator=generator) - 0.4)).double().sum()
        for r in results
        if r.requires_grad
    )
    gradients = torch.autograd.grad(upstream, wanted) if wanted else ()
    return [r.detach() for r in results] + list(gradients)


def check(
    f: Callable[..., Any], *args: Any, forms: str | list[str], row_stats: int = 1, **close: Any
) -> None:
    """f is rewritten under the given normal forms, and computes what eager computes."""
    ours = Rewritten()
    check_equal(ours, f, *args, **close)
    forms = [forms] if isinstance(forms, str) else forms
    assert [site.form for site in ours.report.sites] == forms
    assert (sites(), misses()) == (len(forms), 0)
    assert ours.count(ops.ROW_STATS) == row_stats
    if EVERYTHING:
        torch._dynamo.reset()
        counters.clear()
        check_graphs(f, *args, forms=forms, row_stats=row_stats, **close)


def check_graphs(
    f: Callable[..., Any], *args: Any, forms: str | list[str], row_stats: int = 1, **close: Any
) -> Graphs:
    """The same through all passes of Inductor, and with ALL=1 by `explain`."""
    inductor_ce.install(min_vocab=2)
    graphs = Graphs()
    check_equal(graphs, f, *args, **close)
    forms = [forms] if isinstance(forms, str) else forms
    report = explained(f, *args) if EVERYTHING else graphs.report
    assert [site.form for site in report.sites] == forms
    assert (sites(), misses()) == (len(forms), 0)
    assert graphs.count(ops.ROW_STATS) == row_stats
    return graphs


def check_equal(backend: Callable[..., Any], f: Callable[..., Any], *args: Any, **close: Any) -> None:
    actual = step(torch.compile(f, backend=backend, fullgraph=True), *args)
    torch.testing.assert_close(actual, step(f, *args), equal_nan=True, **close)


def explained(f: Callable[..., Any], *args: Any) -> inductor_ce.Report:
    copies = [a.detach().clone().requires_grad_(a.requires_grad) if torch.is_tensor(a) else a for a in args]
    return inductor_ce.explain(f, *copies)


# F.cross_entropy


@pytest.mark.in_turns
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("ignore_index", [-100, 0])
def test_cross_entropy_function(reduction: str, smoothing: float, ignore_index: int):
    def f(z, y):
        return F.cross_entropy(
            z, y, ignore_index=ignore_index, reduction=reduction, label_smoothing=smoothing
        )

    row = SMOOTHED if smoothing else CE
    form = f"{'' if reduction == 'none' else reduction}[y != {ignore_index}]({row})"
    check_graphs(f, logits(), labels(ignore=ignore_index), forms=form)


@pytest.mark.parametrize("ignore_index", [-1, V - 1, V + 5, 255])
def test_cross_entropy_ignoring_other_labels(ignore_index: int):
    def f(z, y):
        return F.cross_entropy(z, y, ignore_index=ignore_index)

    check(f, logits(), labels(ignore=ignore_index), forms=f"mean[y != {ignore_index}]({CE})")


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_cross_entropy_module(reduction: str):
    loss = nn.CrossEntropyLoss(ignore_index=-1, reduction=reduction, label_smoothing=0.25)
    form = f"{'' if reduction == 'none' else reduction}[y != -1](lse - 0.75*pick(y) - 0.25*sum/V)"
    check(lambda z, y: loss(z, y), logits(), labels(ignore=-1), forms=form)


SHAPES = {
    "rows": ((N, V), (N,)),
    "class axis 1": ((B, V, S), (B, S)),
    "image": ((B, V, 3, 4), (B, 3, 4)),
    "one row": ((V,), ()),
    "one token": ((1, V), (1,)),
}


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("shapes", SHAPES.values(), ids=SHAPES)
def test_cross_entropy_shapes(shapes: tuple[tuple[int, ...], tuple[int, ...]], reduction: str):
    def f(z, y):
        return F.cross_entropy(z, y, reduction=reduction, label_smoothing=0.1)

    z, y = shapes
    form = f"{'' if reduction == 'none' else reduction}[y != -100]({SMOOTHED})"
    y = torch.randint(V, y) if not y else labels(*y, ignore=-100 if len(y) > 1 else None)
    check(f, logits(*z), y, forms=form)


def test_no_rows_and_all_ignored():
    def f(z, y):
        return F.cross_entropy(z, y), F.cross_entropy(z, y, reduction="sum")

    forms = [f"{MEAN}; sum[y != -100]({CE})"]
    check(f, logits(), torch.full((N,), -100), forms=forms)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    check(f, logits(0, V), labels(0), forms=forms)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_nll_loss_of_log_softmax(reduction: str):
    def f(z, y):
        return F.nll_loss(F.log_softmax(z, dim=-1), y, reduction=reduction)

    check(f, logits(), labels(), forms=f"{'' if reduction == 'none' else reduction}[y != -100]({CE})")


def nll_modules(z, y):
    return nn.NLLLoss(ignore_index=-1)(nn.LogSoftmax(dim=1)(z), y.clamp(min=-1))


def nll_class_axis(z, y):
    return F.nll_loss(z.view(B, S, V).transpose(1, 2).log_softmax(1), y.view(B, S))


def nll_view_between(z, y):
    return F.nll_loss(F.log_softmax(z.view(B, S, V), dim=-1).view(-1, V), y)


def nll_dtype(z, y):
    return F.nll_loss(F.log_softmax(z, -1, dtype=torch.float32), y)


def nll_transposed_after(z, y):
    return F.nll_loss(z.view(B, S, V).log_softmax(-1).transpose(1, 2), y.view(B, S))


@pytest.mark.parametrize(
    "f", [nll_modules, nll_class_axis, nll_view_between, nll_dtype, nll_transposed_after]
)
def test_nll_loss_variants(f: Callable[..., Tensor]):
    check(f, logits(), labels(), forms=MEAN.replace("-100", "-1") if f is nll_modules else MEAN)


# log_softmax + gather

LOG_SOFTMAXES = {
    "F positional": lambda z: F.log_softmax(z, -1),
    "F by name": lambda z: F.log_softmax(z, dim=1),
    "F dtype": lambda z: F.log_softmax(z, dim=-1, dtype=torch.float32),
    "torch": lambda z: torch.log_softmax(z, 1),
    "special": lambda z: torch.special.log_softmax(z, dim=-1),
    "method": lambda z: z.log_softmax(-1),
    "method by name": lambda z: z.log_softmax(dim=1),
    "module": lambda z: nn.LogSoftmax(-1)(z),
    "minus logsumexp": lambda z: z - z.logsumexp(-1, keepdim=True),
    "minus logsumexp unsqueezed": lambda z: z - torch.logsumexp(z, dim=1).unsqueeze(-1),
    "minus logsumexp [:, None]": lambda z: z - z.logsumexp(dim=(1,))[:, None],
    "log of softmax": lambda z: z.softmax(-1).log(),
}

GATHERS = {
    "method": lambda p, y: p.gather(-1, y.unsqueeze(-1)).squeeze(-1),
    "method by name": lambda p, y: p.gather(dim=-1, index=y[..., None])[..., 0],
    "method positive dim": lambda p, y: p.gather(1, y.unsqueeze(1)).squeeze(1),
    "function": lambda p, y: torch.gather(p, 1, y.unsqueeze(-1)).squeeze(),
    "function by name": lambda p, y: torch.gather(p, dim=-1, index=y[:, None]).squeeze(-1),
    "function all by name": lambda p, y: torch.gather(input=p, dim=-1, index=y.view(-1, 1)).view(-1),
    "take_along_dim": lambda p, y: torch.take_along_dim(p, y[..., None], dim=-1)[..., 0],
    "take_along_dim method": lambda p, y: p.take_along_dim(y.unsqueeze(1), 1).squeeze(1),
    "index 0 of all rows": lambda p, y: p.gather(1, y[:, None])[:, 0],
    "reshaped": lambda p, y: p.gather(-1, y.reshape(-1, 1)).reshape(-1),
    "flattened": lambda p, y: p.gather(-1, y.reshape(-1, 1)).flatten(),
}


@pytest.mark.parametrize("log_softmax", LOG_SOFTMAXES.values(), ids=LOG_SOFTMAXES)
def test_log_softmax_spellings(log_softmax: Callable[..., Tensor]):
    def f(z, y):
        return -log_softmax(z).gather(-1, y.unsqueeze(-1)).squeeze(-1).mean()

    check(f, logits(), labels(ignore=None), forms=LOGP)


@pytest.mark.parametrize("gather", GATHERS.values(), ids=GATHERS)
def test_gather_spellings(gather: Callable[..., Tensor]):
    def f(z, y):
        return (gather(z.log_softmax(-1), y) * torch.arange(N)).sum()

    check(f, logits(), labels(ignore=None), forms=LOGP)


@pytest.mark.parametrize("gather", GATHERS.values(), ids=GATHERS)
def test_logsumexp_minus_gather(gather: Callable[..., Tensor]):
    def f(z, y):
        return ((torch.logsumexp(z, -1) - gather(z, y)) * torch.arange(N)).sum()

    check(f, logits(), labels(ignore=None), forms=CE)


def masked_mean(z, y):
    mask = y != -100
    logp = z.log_softmax(-1).gather(-1, y.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    return -(logp * mask).sum() / mask.sum().clamp(min=1)


def labels_where(z, y):
    safe = torch.where(y == -100, 0, y)
    logp = z.log_softmax(-1).gather(-1, safe[:, None])[..., 0]
    return -logp.masked_fill(y == -100, 0.0).sum()


def three_dimensions(z, y):
    logp = F.log_softmax(z.view(B, S, V), dim=-1)
    return logp.gather(2, y.clamp(min=0).view(B, S, 1)).squeeze(2)


def gather_cloned(z, y):
    logp = z.log_softmax(-1).clone()
    return logp.gather(-1, y.clamp(0).clone()[:, None]).squeeze(-1)


def gather_class_axis(z, y):
    logp = z.view(B, S, V).transpose(1, 2).log_softmax(1)
    return logp.gather(1, y.clamp(0).view(B, S).unsqueeze(1)).squeeze(1)


def policy_ratio(z, y):
    logp = z.log_softmax(-1).gather(-1, y.clamp(0)[:, None]).squeeze(-1)
    return -(torch.exp(logp - logp.detach()) * torch.arange(N)).mean()


def ratio_to_old(z, y):
    logp = -F.cross_entropy(z, y, reduction="none")
    old = torch.linspace(-4, -1, N)
    return -torch.min((logp - old).exp(), (logp - old).exp().clamp(0.8, 1.2)).mean()


@pytest.mark.parametrize(
    "f",
    [masked_mean, labels_where, three_dimensions, gather_cloned, gather_class_axis, policy_ratio],
)
def test_selected_log_probabilities(f: Callable[..., Tensor]):
    check(f, logits(), labels(), forms=LOGP)


@pytest.mark.parametrize(
    "reduce", [torch.sum, torch.mean, torch.logsumexp, torch.cumsum], ids=lambda f: f.__name__
)
def test_rows_reduced_by_the_user(reduce: Callable[..., Tensor]):
    """The last axis of per-token values is no vocabulary."""

    def f(z, y):
        return reduce(F.log_softmax(z, dim=-1).gather(2, y.unsqueeze(-1)).squeeze(-1), -1)

    check(f, logits(B, S, V), labels(B, S, ignore=None), forms=LOGP)


def test_cross_entropy_as_log_probability():
    check(ratio_to_old, logits(), labels(), forms=f"[y != -100]({CE})")


# Smoothing and z-loss


def smoothing_by_mean(z, y):
    logp = z.log_softmax(-1)
    nll = -logp.gather(-1, y[:, None]).squeeze(-1)
    return 0.9 * nll - 0.1 * logp.mean(-1)


def smoothing_by_mean_dim(z, y):
    logp = F.log_softmax(z, dim=1)
    nll = -logp.gather(dim=-1, index=y.unsqueeze(1))
    smooth = -logp.mean(dim=-1, keepdim=True)
    return (0.9 * nll + 0.1 * smooth).squeeze(1)


def smoothing_by_sum(z, y):
    logp = z.log_softmax(-1)
    nll = -torch.gather(logp, 1, y[:, None]).squeeze(1)
    return 0.9 * nll + (0.1 / 10) * -logp.sum(1)


@pytest.mark.parametrize(
    ("f", "form"),
    [
        (smoothing_by_mean, SMOOTHED),
        (smoothing_by_mean_dim, SMOOTHED),
        (smoothing_by_sum, "0.01*V*lse + 0.9*lse - 0.9*pick(y) - 0.01*sum"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_smoothing_by_hand(f: Callable[..., Tensor], form: str):
    check(f, logits(), labels(ignore=None), forms=form)


def test_smoothing_as_two_terms():
    """fairseq's: the nll and the smoothed loss are reduced apart."""

    def f(z, y):
        logp = z.log_softmax(-1)
        nll = -logp.gather(-1, y[:, None]).sum()
        return 0.9 * nll + 0.1 / V * -logp.sum(-1, keepdim=True).sum()

    graphs = check_graphs(f, logits(), labels(ignore=None), forms="pick(y) - lse; sum - V*lse")
    assert graphs.count(ops.ROW_GRAD) == 1


def z_loss(z, y):
    return F.cross_entropy(z, y) + 1e-4 * z.logsumexp(-1).pow(2).mean()


def z_loss_square(z, y):
    return F.cross_entropy(z, y) + 1e-4 * torch.logsumexp(z, dim=-1).square().mean()


def z_loss_three_dimensions(z, y):
    z = z.view(B, S, V)
    mask = (y != -100).view(B, S)
    z_term = (torch.logsumexp(z.float(), dim=-1) ** 2 * mask).sum() / mask.sum()
    return F.cross_entropy(z.reshape(-1, V), y.reshape(-1)) + 1e-4 * z_term


@pytest.mark.parametrize("f", [z_loss, z_loss_square, z_loss_three_dimensions])
def test_z_loss(f: Callable[..., Tensor]):
    """One sweep, also where the labels are reshaped only after the z-loss is computed."""
    form = f"lse; {MEAN}" if f is z_loss_three_dimensions else f"{MEAN}; lse"
    assert check_graphs(f, logits(), labels(), forms=form).count(ops.ROW_GRAD) == 1


def test_lse_used_twice():
    def f(z, y):
        lse = z.logsumexp(-1)
        return (lse - z.gather(-1, y[:, None]).squeeze(-1)).mean() + 1e-3 * (lse**2).mean()

    check(f, logits(), labels(ignore=None), forms="lse; lse - pick(y)")


# Written by hand


def by_hand(z, y):
    shifted = z - z.max(-1, keepdim=True).values
    return shifted.exp().sum(-1).log() - shifted.gather(-1, y[:, None]).squeeze(-1)


def by_hand_detached(z, y):
    shifted = z - z.max(dim=-1, keepdim=True)[0].detach()
    return torch.log(torch.exp(shifted).sum(dim=-1)) - shifted.gather(-1, y[:, None]).squeeze(-1)


def by_hand_of_detached(z, y):
    shifted = z - z.detach().amax(-1, keepdim=True)
    logp = shifted - shifted.exp().sum(-1, keepdim=True).log()
    return -logp.gather(-1, y[:, None]).squeeze(-1)


def by_hand_no_grad(z, y):
    with torch.no_grad():
        m = z.amax(-1, keepdim=True)
    shifted = z - m
    return shifted.exp().sum(-1).log() - shifted.gather(-1, y[:, None]).squeeze(-1)


def by_hand_added_back(z, y):
    m = torch.amax(z, dim=-1)
    lse = (z - m.unsqueeze(-1)).exp().sum(-1).log() + m
    return lse - z.gather(-1, y[:, None])[..., 0]


@pytest.mark.parametrize(
    "f",
    [
        by_hand,
        by_hand_detached,
        by_hand_of_detached,
        by_hand_no_grad,
        by_hand_added_back,
    ],
)
def test_exp_sum_log(f: Callable[..., Tensor]):
    check(f, logits(), labels(ignore=None), forms=CE)


def test_probability_of_the_label():
    def f(z, y):
        return -z.softmax(-1).gather(-1, y[:, None]).squeeze(-1).log().mean()

    check(f, logits(), labels(ignore=None), forms=LOGP)


# Views, casts, slices

VIEWS = {
    "view": lambda z, y: (z.view(-1, V), y.view(-1)),
    "view sizes": lambda z, y: (z.view(z.size(0) * z.size(1), z.size(2)), y.view(y.numel())),
    "view by shape": lambda z, y: (z.view(-1, z.shape[-1]), y.view(-1)),
    "reshape": lambda z, y: (z.reshape(-1, V), y.reshape(-1)),
    "reshape tuple": lambda z, y: (z.reshape((-1, V)), y.reshape((N,))),
    "torch.reshape": lambda z, y: (torch.reshape(z, (-1, V)), torch.reshape(y, (-1,))),
    "flatten": lambda z, y: (z.flatten(0, 1), y.flatten()),
    "flatten by name": lambda z, y: (torch.flatten(z, end_dim=-2), torch.flatten(y)),
    "transpose": lambda z, y: (z.transpose(1, 2), y),
    "transpose negative": lambda z, y: (torch.transpose(z, -1, -2), y),
    "permute": lambda z, y: (z.permute(0, 2, 1), y),
    "permute and copy": lambda z, y: (z.permute(0, 2, 1).contiguous(), y),
    "movedim": lambda z, y: (z.movedim(-1, 1), y),
    "time first": lambda z, y: (z.transpose(0, 1).reshape(-1, V), y.t().reshape(-1)),
    "unflatten": lambda z, y: (z.view(N, V).unflatten(0, (B, S)).flatten(0, 1), y.view(-1)),
    "mT": lambda z, y: (z.mT, y),
}


@pytest.mark.in_turns
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS)
def test_views(view: Callable[..., tuple[Tensor, Tensor]], reduction: str):
    def f(z, y):
        return F.cross_entropy(*view(z, y), reduction=reduction)

    check(
        f, logits(B, S, V), labels(B, S), forms=f"{'' if reduction == 'none' else reduction}[y != -100]({CE})"
    )


def test_views_share_their_statistics():
    def f(z, y):
        z2 = z.transpose(0, 1).reshape(-1, V)
        nll = F.cross_entropy(z2, y.t().reshape(-1), reduction="none").view(S, B)
        return nll.t() + 1e-2 * z.logsumexp(-1) ** 2

    check(f, logits(B, S, V), labels(B, S), forms=f"[y != -100]({CE}); lse")


CASTS = {
    "float": lambda z: z.float(),
    "to": lambda z: z.to(torch.float32),
    "to dtype by name": lambda z: z.to(dtype=torch.float32),
    "type": lambda z: z.type(torch.float32),
    "none": lambda z: z,
    "before the view": lambda z: z.float().view(-1, V),
    "after the view": lambda z: z.view(-1, V).float(),
    "to and copy": lambda z: z.to(torch.float32).contiguous(),
}


@pytest.mark.parametrize("cast", CASTS.values(), ids=CASTS)
def test_casts_of_bfloat16(cast: Callable[[Tensor], Tensor]):
    """The operators read the 16-bit logits themselves."""

    def f(z, y):
        return F.cross_entropy(cast(z), y).float()

    graphs = check_graphs(f, logits(dtype=torch.bfloat16), labels(), forms=MEAN, rtol=2e-2, atol=2e-3)
    (row_stats,) = (n for n in graphs.nodes if n.target == ops.ROW_STATS)
    assert row_stats.args[0].meta["val"].dtype == torch.bfloat16


def test_result_keeps_its_dtype():
    def f(z, y):
        picked = z.log_softmax(-1).gather(-1, y[:, None]).squeeze(-1)
        upcast = z.float().log_softmax(-1).gather(-1, y[:, None]).squeeze(-1)
        dtyped = F.log_softmax(z, -1, dtype=torch.float32).gather(-1, y[:, None]).squeeze(-1)
        return picked, upcast.to(z.dtype), dtyped

    z, y = logits(dtype=torch.bfloat16), labels(ignore=None)
    check(f, z, y, forms=LOGP, rtol=2e-2, atol=5e-2)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_other_dtypes(dtype: torch.dtype):
    def f(z, y):
        return F.cross_entropy(z, y, label_smoothing=0.1) + 1e-3 * (z.logsumexp(-1) ** 2).mean()

    close = {} if dtype == torch.float64 else {"rtol": 5e-3, "atol": 1e-3}
    check(f, logits(dtype=dtype), labels(), forms=f"mean[y != -100]({SMOOTHED}); lse", **close)


def test_int32_labels():
    def f(z, y):
        logp = z.log_softmax(-1).gather(-1, y.long()[:, None]).squeeze(-1)
        return F.cross_entropy(z, y.long(), reduction="none") + logp * 2

    check(f, logits(), labels(ignore=None).int(), forms=f"[y != -100]({CE}); 2*pick(y) - 2*lse")


SHIFTS = {
    "slices": lambda z, y: (z[:, :-1].reshape(-1, V), y[:, 1:].reshape(-1)),
    "ellipsis and contiguous": lambda z, y: (
        z[..., :-1, :].contiguous().view(-1, V),
        y[..., 1:].contiguous().view(-1),
    ),
    "all slices": lambda z, y: (z[:, :-1, :].flatten(0, 1), y[:, 1:].flatten()),
    "narrow": lambda z, y: (z.narrow(1, 0, S - 1).reshape(-1, V), y.narrow(1, 1, S - 1).reshape(-1)),
    "upcast": lambda z, y: (z.float()[..., :-1, :].contiguous().view(-1, V), y[..., 1:].reshape(-1)),
    "class axis": lambda z, y: (z[:, :-1].transpose(1, 2), y[:, 1:]),
}


@pytest.mark.in_turns
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("shift", SHIFTS.values(), ids=SHIFTS)
def test_causal_shift_of_logits(shift: Callable[..., tuple[Tensor, Tensor]], reduction: str):
    """The statistics are of the whole logits, which are not copied."""

    def f(z, y):
        return F.cross_entropy(*shift(z, y), reduction=reduction)

    form = f"{'' if reduction == 'none' else reduction}[y != -100]({CE})"
    graphs = check_graphs(f, logits(B, S, V), labels(B, S), forms=form)
    (row_stats,) = (n for n in graphs.nodes if n.target == ops.ROW_STATS)
    assert row_stats.args[0].meta["val"].shape == (N, V)


def shifted_by_pad(y):
    return F.pad(y, (0, 1), value=-100)[..., 1:].contiguous()


def shifted_by_roll(y):
    y = torch.roll(y, shifts=-1, dims=1)
    y[:, -1] = -100
    return y


def shifted_by_cat(y):
    return torch.cat([y[:, 1:], torch.full_like(y[:, :1], -100)], dim=1)


def shifted_by_full_like(y):
    shifted = torch.full_like(y, -100)
    shifted[:, :-1] = y[:, 1:]
    return shifted


@pytest.mark.parametrize("shift", [shifted_by_pad, shifted_by_roll, shifted_by_cat, shifted_by_full_like])
def test_causal_shift_of_labels(shift: Callable[[Tensor], Tensor]):
    def f(z, y):
        return F.cross_entropy(z.view(-1, V), shift(y).view(-1))

    check(f, logits(B, S, V), labels(B, S), forms=MEAN)


def test_gather_after_a_slice():
    def f(z, y):
        logp = z[:, :-1].log_softmax(-1)
        return logp.gather(-1, y[:, 1:, None]).squeeze(-1)

    check(f, logits(B, S, V), labels(B, S, ignore=None), forms=LOGP)


# What surrounds the loss


@pytest.mark.parametrize("divisor", ["count", "tensor", "int"])
def test_sum_over_a_count(divisor: str):
    def f(z, y):
        by = {"count": (y != -100).sum().clamp(min=1), "tensor": torch.tensor(7.0), "int": 7}[divisor]
        return F.cross_entropy(z, y, reduction="sum") / by

    check(f, logits(), labels(), forms=f"sum[y != -100]({CE})")


def test_weighted_rows():
    def f(z, y, w):
        nll = F.cross_entropy(z, y, reduction="none")
        return (nll * w).sum() / w.sum(), nll.view(B, S).mean(-1), (1 - (-nll).exp()) ** 2 * nll

    check(f, logits(), labels(), torch.rand(N), forms=f"[y != -100]({CE})")


@pytest.mark.parametrize("where", ["head", "head and loss"])
def test_autocast(where: str):
    def f(h, w, y):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            z = F.linear(h, w)
            if where == "head and loss":
                return F.cross_entropy(z, y)
        return F.cross_entropy(z.float(), y)

    h, w = torch.randn(N, 8, requires_grad=True), torch.randn(V, 8, requires_grad=True)
    graphs = check_graphs(f, h, w, labels(), forms=MEAN, rtol=2e-2, atol=1e-2)
    (row_stats,) = (n for n in graphs.nodes if n.target == ops.ROW_STATS)
    assert row_stats.args[0].meta["val"].dtype == torch.bfloat16


def test_under_autocast():
    """The mode of the caller, not of the code."""

    def f(z, y):
        return z.log_softmax(-1).gather(-1, y[:, None]).squeeze(-1)

    z, y = logits(dtype=torch.bfloat16), labels(ignore=None)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        check(f, z, y, forms=LOGP, rtol=2e-2, atol=5e-2)


def test_metrics_without_gradient_in_between():
    def f(z, y):
        logits = z.view(-1, V)
        with torch.no_grad():
            accuracy = (logits.argmax(-1) == y).float().mean()
        loss = F.cross_entropy(logits, y)
        with torch.no_grad():
            perplexity = loss.exp()
        return loss, accuracy, perplexity

    check(f, logits(B, S, V), labels(), forms=f"argmax; {MEAN}")


def test_loss_without_gradient():
    @torch.no_grad()
    def f(z, y):
        return F.cross_entropy(z, y), z.log_softmax(-1).gather(-1, y.clamp(0)[:, None]).squeeze(-1)

    check(f, logits().detach(), labels(), forms=f"{MEAN}; {LOGP.replace('y', 'y2')}")


def test_same_loss_with_and_without_gradient():
    """One sweep, whose result is detached for the one."""

    def f(z, y):
        with torch.no_grad():
            before = F.cross_entropy(z, y)
        return before, F.cross_entropy(z, y)

    check(f, logits(), labels(), forms=f"{MEAN}")


def test_detached_beside_the_loss():
    def f(z, y):
        metric = F.cross_entropy(z.detach(), y, reduction="none")
        return metric, F.cross_entropy(z, y)

    check(f, logits(), labels(), forms=f"[y != -100]({CE}); {MEAN}")


TEMPERATURES = {
    "method": lambda z: z.div_(0.7),
    "operator": lambda z: z.__itruediv__(0.7),
    "kept name": lambda z: (z.div_(0.7), z)[1],
    "slice filled": lambda z: (z.__setitem__((..., slice(-2, None)), -1e9), z)[1],
}


@pytest.mark.parametrize("edit", TEMPERATURES.values(), ids=TEMPERATURES)
def test_in_place_before_the_loss(edit: Callable[[Tensor], Tensor]):
    def f(h, w, y):
        return F.cross_entropy(edit(h @ w.t()), y)

    h, w = torch.randn(N, 8, requires_grad=True), torch.randn(V, 8, requires_grad=True)
    check(f, h, w, labels(ignore=-100) % (V - 2), forms=MEAN)


def test_in_place_after_the_loss():
    def f(h, w, y):
        z = h @ w.t()
        loss = F.cross_entropy(z.detach().clone(), y)
        z.mul_(2)
        return loss, z

    h, w = torch.randn(N, 8, requires_grad=True), torch.randn(V, 8, requires_grad=True)
    check(f, h, w, labels(), forms=MEAN)


def test_labels_edited_between_uses():
    """Each statistic reads the labels that its own loss read. Eager autograd would refuse the edits."""

    def f(z, y):
        y = y.clone()
        first = F.cross_entropy(z, y, reduction="none")
        y[y == -100] = 0
        logp = z.log_softmax(-1).gather(-1, y.unsqueeze(-1)).squeeze(-1)
        y.add_(1).remainder_(V)
        return first, logp, F.cross_entropy(z, y)

    z, y = logits().detach(), labels()
    compiled, graphs = compile_rewritten(f)
    torch.testing.assert_close(compiled(z, y), f(z, y))
    assert misses() == 0
    assert 1 <= graphs.count(ops.ROW_STATS) <= 3
    assert graphs.count(torch.ops.aten._log_softmax.default) == 0


def test_labels_edited_after_a_metric():
    def f(z, y):
        y = y.clone()
        with torch.no_grad():
            metric = F.cross_entropy(z, y, reduction="none")
        y[y == -100] = 0
        logp = z.log_softmax(-1).gather(-1, y.unsqueeze(-1)).squeeze(-1)
        return metric, logp

    check(f, logits(), labels(), forms=[f"[y != -100]({CE})", LOGP.replace("y", "y2")], row_stats=2)


def test_labels_edited_after_the_loss():
    def f(z, y):
        y = y.clone()
        loss = F.cross_entropy(z, y)
        y.fill_(3)
        return loss, y

    check(f, logits().detach(), labels(), forms=MEAN)


def test_labels_edited_after_the_normaliser_is_used():
    """No place sees the edited labels and serves the z-loss as well."""

    def f(z, y):
        y = y.clone()
        z_term = z.logsumexp(-1).square().mean()
        y[::2] = 3
        return z_term, F.cross_entropy(z, y.view(-1))

    check(f, logits(), labels(), forms=["lse", MEAN], row_stats=2)


def test_labels_copied_before_an_edit():
    def f(z, y):
        y = y.clone()
        kept = y.clone()
        y[::2] = 3
        z_term = z.logsumexp(-1).square().mean()
        return z_term, F.cross_entropy(z, kept.view(-1)), F.cross_entropy(z, y.view(-1))

    check(f, logits(), labels(), forms=f"lse; {MEAN}; {MEAN.replace('y', 'y2')}")


def test_labels_argument_edited():
    def f(z, y):
        y[y == 2] = -100
        return F.cross_entropy(z, y)

    check(f, logits(), labels(ignore=None), forms=MEAN)


# Several losses in one graph


def test_cross_entropy_beside_gather():
    def f(z, y):
        logp = z.log_softmax(-1).gather(-1, y[:, None]).squeeze(-1)
        return F.cross_entropy(z, y), logp, 1e-4 * z.logsumexp(-1).square().mean()

    graphs = check_graphs(f, logits(), labels(ignore=None), forms=f"{LOGP}; {MEAN}; lse")
    assert graphs.count(ops.ROW_GRAD) == 1


def test_two_label_tensors():
    def f(z, chosen, rejected):
        logp = z.log_softmax(-1)
        difference = logp.gather(-1, chosen[:, None]) - logp.gather(-1, rejected[:, None])
        return -F.logsigmoid(difference.squeeze(-1)).mean(), F.cross_entropy(z, chosen)

    expected = step(f, logits(), labels(ignore=None), labels(ignore=None))
    assert len(expected) == 3
    forms = f"pick(y) - pick(y2); {MEAN}"
    check(f, logits(), labels(ignore=None), labels(ignore=None), forms=forms)


def test_two_label_tensors_kept_apart():
    def f(z, chosen, rejected):
        logp = z.log_softmax(-1)
        a = logp.gather(-1, chosen[:, None]).squeeze(-1).view(B, S).sum(-1)
        b = logp.gather(-1, rejected[:, None]).squeeze(-1).view(B, S).sum(-1)
        return -F.logsigmoid(0.1 * (a - b)).mean()

    forms = "pick(y) - lse; pick(y2) - lse"
    check(f, logits(), labels(ignore=None), labels(ignore=None), forms=forms)


def test_several_heads():
    def f(h, w1, w2, y):
        main, extra = h @ w1.t(), h @ w2.t()
        return F.cross_entropy(main, y) + 0.3 * F.cross_entropy(extra[:-1], y[1:])

    h, w1, w2 = (torch.randn(n, 8, requires_grad=True) for n in (N, V, V))
    graphs = check_graphs(f, h, w1, w2, labels(), forms=[MEAN, MEAN], row_stats=2)
    assert graphs.count(ops.ROW_GRAD) == 2


def test_losses_of_a_module():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.head = nn.Linear(8, V)
            self.loss = nn.CrossEntropyLoss()

        def forward(self, h, y):
            return self.loss(self.head(h).flatten(0, 1), y.flatten())

    model = Model()
    check(model, torch.randn(B, S, 8, requires_grad=True), labels(B, S), forms=MEAN)


# Numbers that are hard


@pytest.mark.parametrize("value", [-torch.inf, torch.inf, torch.nan])
@pytest.mark.parametrize("spelling", ["cross_entropy", "logsumexp"])
def test_not_finite(value: float, spelling: str):
    """As eager does it, in rows that hold such a logit in one column or in all."""

    def f(z, y):
        if spelling == "cross_entropy":
            return F.cross_entropy(z, y, reduction="none")
        return z.logsumexp(-1) - z.gather(-1, y[:, None]).squeeze(-1)

    z, y = logits().detach(), labels(ignore=None)
    z[0, 3], z[1, y[1]], z[2] = value, value, value
    form = f"[y != -100]({CE})" if spelling == "cross_entropy" else CE
    check(f, z, y, forms=form)


def test_large_logits():
    def f(z, y):
        return F.cross_entropy(z * 1e4, y, reduction="none", label_smoothing=0.1)

    check(f, logits(), labels(), forms=f"[y != -100]({SMOOTHED})", rtol=1e-5, atol=1e-3)


# Sizes that change


@pytest.mark.parametrize("spelling", ["cross_entropy", "gather", "shift"])
def test_dynamic_shapes(spelling: str):
    def f(z, y):
        if spelling == "cross_entropy":
            return F.cross_entropy(z.view(-1, V), y.view(-1))
        if spelling == "shift":
            return F.cross_entropy(z[..., :-1, :].reshape(-1, V), y[..., 1:].reshape(-1))
        return z.log_softmax(-1).gather(-1, y[..., None]).squeeze(-1).sum(-1)

    compiled, graphs = compile_rewritten(f, dynamic=True)
    for b, s in itertools.product((2, 3), (5, 8, 13)):
        z, y = logits(b, s, V), labels(b, s, ignore=None)
        torch.testing.assert_close(step(compiled, z, y), step(f, z, y))
    assert (sites(), misses()) == (1, 0)
    assert graphs.count(ops.ROW_STATS) == 1


def test_marked_dynamic():
    def f(z, y):
        return F.cross_entropy(z, y, label_smoothing=0.1)

    compiled, graphs = compile_rewritten(f)
    for n in (6, 7, 12):
        z, y = logits(n, V), labels(n)
        torch._dynamo.mark_dynamic(z, 0)
        torch._dynamo.mark_dynamic(y, 0)
        torch.testing.assert_close(compiled(z, y), f(z, y))
    assert sites() == 1
    assert graphs.count(ops.ROW_STATS) == 1


def test_eight_lengths_compile_at_most_twice():
    def f(z, y):
        return F.cross_entropy(z[:, :-1].reshape(-1, V), y[:, 1:].reshape(-1))

    compiled, graphs = compile_rewritten(f)
    for s in (5, 7, 8, 11, 16, 17, 23, 32):
        z, y = logits(B, s, V), labels(B, s)
        torch.testing.assert_close(compiled(z, y), f(z, y))
    assert sites() <= 2
    assert graphs.count(ops.ROW_STATS) <= 2


def test_divisor_that_changes_does_not_recompile_each_time():
    def f(z, y, count):
        return F.cross_entropy(z, y, reduction="sum") / count

    compiled, _ = compile_rewritten(f)
    z, y = logits(), labels()
    for count in (3, 4, 5, 6, 7):
        torch.testing.assert_close(compiled(z, y, count), f(z, y, count))
    assert sites() <= 2


# Some rows of log-probabilities that were taken of all


def last_token(z, y):
    return -z.log_softmax(-1)[:, -1, :].gather(1, y[:, -1:]).mean()


def one_token_of_one_sequence(z, y):
    return -z.log_softmax(-1)[1, 2].gather(0, y[1, 2][None]).mean()


def continuation(z, y):
    logp = z.log_softmax(-1)[0, 3:]
    return -logp.gather(-1, y[0, 3:, None]).squeeze(-1).sum()


def selected(z, y):
    return -z.log_softmax(-1).select(1, 0).gather(1, y[:, :1]).squeeze(1).sum()


def few_rows(z, y):
    w = torch.arange(1.0, 3.0)
    logp = z.log_softmax(-1)[:, 1:3]
    return -(logp.gather(-1, y[:, 1:3, None]).squeeze(-1) * w).sum()


def entropy_of_the_last(z, y):
    logp = z.log_softmax(-1)[:, -1]
    return (logp.exp() * logp).sum(-1).mean() - logp.gather(-1, y[:, -1, None]).mean()


def at_most_a_hundred(z, y):
    return F.cross_entropy(z[:, -100:].flatten(0, 1), y[:, -100:].flatten())


def at_most_a_hundred_after_it(z, y):
    return -z.log_softmax(-1)[:, -100:-1].gather(-1, y[:, -100:-1, None]).mean()


@pytest.mark.parametrize("f", [at_most_a_hundred, at_most_a_hundred_after_it])
def test_a_range_that_begins_before_the_first_row(f):
    forms = MEAN if f is at_most_a_hundred else "pick(y) - lse"
    check(f, logits(B, S, V), labels(B, S, ignore=None), forms=forms)


def test_all_of_one_row():
    def f(z, y):
        return -z.log_softmax(-1)[:].gather(0, y)

    check(f, logits(V), labels(1, ignore=None), forms=CE)


def test_true_as_an_index_adds_a_dimension():
    def f(z, y):
        return -z.log_softmax(-1)[True].gather(2, y[None, :, None]).mean()

    z, y = logits(), labels(ignore=None)
    compiled, _ = compile_rewritten(f)
    torch.testing.assert_close(step(compiled, z, y), step(f, z, y))


@pytest.mark.parametrize(
    "f", [last_token, one_token_of_one_sequence, continuation, selected, few_rows, entropy_of_the_last]
)
def test_rows_chosen_after_the_normaliser(f):
    forms = "mean_p - lse; pick(y) - lse" if f is entropy_of_the_last else "pick(y) - lse"
    check(f, logits(B, S, V), labels(B, S, ignore=None), forms=forms)


def test_labels_on_the_host_that_index_logits_elsewhere() -> None:
    """From where torch takes an index, whatever has the logits."""

    def loss(z: Tensor) -> Tensor:
        rows = torch.arange(6, device="cpu")
        return (z.logsumexp(-1) - z[rows, rows]).mean()

    backend = Rewritten()
    torch.compile(loss, backend=backend, fullgraph=True)(torch.empty(6, 9, device="meta"))
    assert len(backend.report.sites) == 1
    (labels,) = (node.args[1][0] for node in backend.final[0].graph.nodes if node.target == ops.ROW_STATS)
    assert labels.meta["example_value"].device.type == "meta"


@pytest.mark.parametrize("function", [torch.abs, torch.relu, torch.erf])
def test_a_loss_of_a_function_of_log_probabilities(function: Callable[[Tensor], Tensor]):
    """They are logits in their own right to a loss that normalises them again."""

    def f(z: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(function(z.log_softmax(-1) + 1), y)

    check(f, logits(), labels(), forms=MEAN)


def test_a_divergence_of_itself_is_0():
    def f(z: Tensor, y: Tensor) -> Tensor:
        kl = F.kl_div(z.log_softmax(-1), z.softmax(-1), reduction="none").sum(-1)
        return kl.masked_fill(y == -100, 0).sum() + F.cross_entropy(z, y)

    z, y = logits(), labels()
    compiled, backend = compile_rewritten(f)
    torch.testing.assert_close(step(compiled, z, y), step(f, z, y), rtol=1e-4, atol=1e-5)
    assert not backend.report.misses
