"""Rows that do not count: which they are, that they are skipped, and what is left is right.

The reference is eager, in float64. How many rows are computed is counted where products ask for it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from harness import compile_with_codegen, compile_without_codegen
from head_cases import counts
from pairwise import EVERYTHING, in_turns
from reference import assert_fair
from torch import Tensor
from torch._dynamo.utils import counters

import inductor_ce
from inductor_ce.heads import counted_rows, skip
from inductor_ce.ops import counted, products

N, V, D = 300, 50, 6
FOUR = 0.32  # the budget for four chunks
TWO = 0.75  # for two, of some losses three
Loss = Callable[..., Tensor]


class Computed:
    """How many rows products computed, of how many, by the call."""

    def __init__(self) -> None:
        self.calls: list[tuple[int, int]] = []

    def of_logits(self, n: int = N) -> int:
        """Rows of the logits, of which each product has as many: those of one product in `each`."""
        computed, all_rows = (sum(numbers) for numbers in zip(*self.calls, strict=True))
        return round(computed * n / all_rows)


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> Iterator[Computed]:
    made = Computed()

    def rows_of_piece(left: Tensor | None, host: Tensor | None, piece: int, most: int) -> int | None:
        n = counted.rows_of_piece(left, host, piece, most)
        assert n is not None
        made.calls.append((n, most))
        return n

    monkeypatch.setattr(products, "rows_of_piece", rows_of_piece)
    return made


def given(n: int = N, share: float = 0.3) -> dict[str, Tensor]:
    """The arguments of losses, by their names."""
    mask = torch.rand(n) < share
    y = torch.randint(0, V, (n,))
    return {
        "h": torch.randn(n, D),
        "w": torch.randn(V, D),
        "b": torch.randn(V),
        "y": y,
        "ignored": torch.where(mask, y, -100),
        "mask": mask,
        "weights": torch.where(mask, torch.rand(n), 0),
        "s": torch.tensor(0.7),
        "scales": torch.rand(n) + 0.5,
        "classes": torch.rand(V),
        "biases": torch.randn(n, V),
    }


def z_of(h: Tensor, w: Tensor) -> Tensor:
    return h @ w.t()


def nll(z: Tensor, y: Tensor) -> Tensor:
    """By hand, of all rows."""
    return z.logsumexp(-1) - z.gather(-1, y[..., None]).squeeze(-1)


def measured(f: Loss, names: list[str], of: dict[str, Tensor], wanted: str, dtype: torch.dtype | None = None):
    """The loss, and the gradients of what is wanted."""
    made = [of[name].detach().clone() for name in names]
    if dtype is not None:
        made = [x.to(dtype) if x.is_floating_point() else x for x in made]
    leaves = [x.requires_grad_() for name, x in zip(names, made, strict=True) if name in wanted.split()]
    value = f(*made)
    if leaves:
        value.sum().backward()
    return [value.detach(), *(leaf.grad for leaf in leaves)]


def names_of(f: Loss) -> list[str]:
    return list(f.__code__.co_varnames[: f.__code__.co_argcount])


def check(
    f: Loss,
    of: dict[str, Tensor],
    wanted: str = "h w",
    *,
    budget: float | None = FOUR,
    dtype: torch.dtype = torch.float32,
    expected: str = "token_chunks",
    compiled: Callable[..., Any] = compile_without_codegen,
    **options: Any,
) -> None:
    """The loss and its gradients are those of float64."""
    torch._dynamo.reset()
    counters.clear()
    names = names_of(f)
    run, _ = compiled(f, strategy="token_chunks", memory_budget=budget, **options)
    ours = measured(run, names, of, wanted, dtype)
    assert set(counts()) == {expected}
    exact = measured(f, names, {name: _rounded(x, dtype) for name, x in of.items()}, wanted, torch.float64)
    if dtype == torch.bfloat16:
        for made, naive, right in zip(ours, measured(f, names, of, wanted, dtype), exact, strict=True):
            assert_fair(made, naive, right)
    else:
        assert_right(ours, exact, 1e-5 if dtype == torch.float32 else 1e-12)


def _rounded(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x.to(dtype) if x.is_floating_point() else x


def assert_right(ours: list[Tensor], exact: list[Tensor], tolerance: float = 1e-5) -> None:
    for made, right in zip(ours, exact, strict=True):
        torch.testing.assert_close(made.double(), right, rtol=tolerance, atol=tolerance, equal_nan=True)


def skips(f: Loss, wanted: str = "h w", **options: Any) -> Loss:
    """A parameter of tests: (the loss, what gradients are wanted, options)."""
    return pytest.param(f, wanted, options, id=f.__name__)  # type: ignore[return-value]


# Losses of which the rows in `mask` count, and no others


def mean(h, w, ignored):
    return F.cross_entropy(z_of(h, w), ignored)


def total(h, w, b, ignored):
    return F.cross_entropy(F.linear(h, w, b), ignored, reduction="sum")


def smoothed(h, w, b, ignored):
    return F.cross_entropy(F.linear(h, w, b), ignored, label_smoothing=0.1)


def class_weights(h, w, classes, ignored):
    return F.cross_entropy(z_of(h, w), ignored, weight=classes)


def soft_capped(h, w, b, ignored):
    return F.cross_entropy(3 * torch.tanh(F.linear(h, w, b) / 3), ignored)


def learnt_scale(h, w, s, ignored):
    return F.cross_entropy(z_of(h, w) * s, ignored)


def scales_of_rows(h, w, scales, ignored):
    return F.cross_entropy(z_of(h, w) * scales[:, None], ignored)


def each_row(h, w, ignored):
    return F.cross_entropy(z_of(h, w), ignored, reduction="none").sum()


def each_row_weighed(h, w, ignored, weights):
    return (F.cross_entropy(z_of(h, w), ignored, reduction="none") * weights).sum()


def each_row_weighed_by_what_learns(h, w, ignored, scales):
    return (F.cross_entropy(z_of(h, w), ignored, reduction="none") * scales).sum()


def functional(h, w, ignored):
    return inductor_ce.cross_entropy(z_of(h, w), ignored)


def linear(h, w, ignored):
    return inductor_ce.linear_cross_entropy(h, w, ignored)


def adapted(h, w, b, ignored):
    """Beside the weight, of rank 1."""
    added = (h @ b[:D, None]) @ b[None, :]
    return F.cross_entropy(z_of(h, w) + added, ignored)


def chosen(h, w, y, mask):
    return torch.where(mask, nll(z_of(h, w), y), 0).sum() / mask.sum()


def chosen_the_other_way(h, w, y, mask):
    return torch.where(~mask, 0, nll(z_of(h, w), y)).sum()


def filled(h, w, y, mask):
    return nll(z_of(h, w), y).masked_fill(~mask, 0).sum()


def chosen_by_weights(h, w, y, weights):
    return torch.where(weights != 0, nll(z_of(h, w), y) * weights, 0).sum() / weights.sum()


def chosen_twice(h, w, y, mask, scales):
    """The second condition holds for all rows."""
    return torch.where(mask & (scales > 0), torch.where(scales < 9, nll(z_of(h, w), y), 0), 0).sum()


def integers(h, w, y, mask):
    return torch.where(mask.long() == 1, nll(z_of(h, w), y), 0).sum()


def masked_z_loss(h, w, ignored):
    z = z_of(h, w)
    return F.cross_entropy(z, ignored) + 0.01 * torch.where(ignored != -100, z.logsumexp(-1) ** 2, 0).sum()


def masked_accuracy(h, w, ignored):
    z = z_of(h, w)
    hits = (z.argmax(-1) == ignored) & (ignored != -100)
    return F.cross_entropy(z, ignored) + hits.float().sum()


def sequences(h, w, ignored):
    """The mean over sequences of their means."""
    losses = F.cross_entropy(z_of(h, w), ignored, reduction="none").view(5, -1)
    return (losses.sum(1) / (ignored != -100).view(5, -1).sum(1)).mean()


def mask_of_sequences(h, w, y, mask):
    """Logits, and the mask, as [B, S, ...]."""
    losses = nll(z_of(h.view(5, -1, D), w), y.view(5, -1))
    return torch.where(mask.view(5, -1), losses, 0).sum() / mask.sum()


def shifted(h, w, ignored):
    """Logits of all positions, of which the last has no label."""
    z = z_of(h.view(5, -1, D), w)[:, :-1]
    return F.cross_entropy(z.transpose(1, 2), ignored.view(5, -1)[:, 1:])


def shifted_accuracy(h, w, ignored):
    """Of logits that are cut off, which nobody sees a gradient of."""
    z, y = z_of(h.view(5, -1, D), w)[:, :-1], ignored.view(5, -1)[:, 1:]
    with torch.no_grad():
        hits = ((z.argmax(-1) == y) & (y != -100)).sum()
    return F.cross_entropy(z.reshape(-1, V), y.reshape(-1)) + hits


def shifted_losses(h, w, ignored):
    """The loss of each token, of whose sequence the first are not seen."""
    losses = F.cross_entropy(z_of(h, w), ignored, reduction="none").view(5, -1)
    return losses[:, 7:].sum() / 9 + losses[:, -1].sum() / 7


def multiplied(h, w, y, mask):
    return (nll(z_of(h, w), y) * mask).sum() / mask.sum()


def multiplied_twice(h, w, y, mask, weights):
    return ((nll(z_of(h, w), y) - 3) * weights * mask).sum() / mask.sum()


def multiplied_before(h, w, y, mask):
    return ((nll(z_of(h, w), y) * mask) * (1 / mask.sum())).view(2, -1).sum(1).mean()


def multiplied_by_sequences(h, w, y, mask):
    losses, mask = (x.view(5, -1) for x in (nll(z_of(h, w), y), mask))
    return ((losses * mask).sum(1) / mask.sum(1)).mean()


def multiplied_by_classes(h, w, y, mask):
    return F.cross_entropy(z_of(h, w), y, weight=mask[:V].to(h.dtype))


def hits_multiplied(h, w, y, mask):
    z = z_of(h, w)
    return (nll(z, y) * mask).sum() + ((z.argmax(-1) == y).float() * mask).sum()


SKIPPING = [
    *map(skips, (shifted, shifted_losses, multiplied, multiplied_twice, hits_multiplied)),
    *map(skips, (mean, each_row, each_row_weighed, chosen, chosen_the_other_way, filled, chosen_by_weights)),
    *map(skips, (functional, linear, adapted)),
    *map(skips, (class_weights, chosen_twice, integers, masked_z_loss, masked_accuracy, sequences)),
    *(skips(f, "h w b") for f in (total, smoothed, soft_capped)),
    skips(mask_of_sequences),
    skips(learnt_scale, "h w s"),
    skips(scales_of_rows, "h w scales"),
    skips(each_row_weighed_by_what_learns, "h w scales"),
]


@pytest.mark.parametrize(("f", "wanted", "options"), SKIPPING)
def test_rows_are_skipped(f: Loss, wanted: str, options: dict[str, Any], computed: Computed) -> None:
    of = given()
    check(f, of, wanted, budget=TWO, **options)
    assert 0.2 * N < int(of["mask"].sum()) <= 0.4 * N
    assert computed.of_logits() <= of["mask"].sum() + counted.ALIGNED
    assert counters["inductor_ce"]["skips_rows"] == 1


def test_rows_are_skipped_beside_the_accuracy_of_what_is_cut_off(computed: Computed) -> None:
    of = given()
    check(shifted_accuracy, of, budget=TWO)
    assert computed.of_logits() <= of["mask"].sum() + counted.ALIGNED
    assert counters["inductor_ce"]["skips_rows"] > 0


# Losses of which all rows count, as others can be seen


def with_a_bias_of_their_own(h, w, ignored, biases):
    return F.cross_entropy(z_of(h, w) + biases, ignored)


def exponentials_multiplied(h, w, y, mask):
    return (nll(z_of(h, w), y).mul(-1).exp() * mask).sum() / mask.sum()


def z_loss_of_all(h, w, ignored):
    z = z_of(h, w)
    return F.cross_entropy(z, ignored) + 0.01 * (z.logsumexp(-1) ** 2).mean()


def entropy_of_all(h, w, ignored):
    z = z_of(h, w)
    log_p = z.log_softmax(-1)
    return F.cross_entropy(z, ignored) + (log_p.exp() * log_p).sum(-1).mean()


def accuracy_of_all(h, w, ignored):
    z = z_of(h, w)
    return F.cross_entropy(z, ignored) + (z.argmax(-1) == ignored).float().mean()


def weights_that_learn(h, w, y, weights):
    return (nll(z_of(h, w), y) * weights).sum()


def one_row_is_read(h, w, ignored):
    z = z_of(h, w)
    return F.cross_entropy(z, ignored) + z.logsumexp(-1)[0].detach()


@pytest.mark.parametrize(
    ("f", "wanted"),
    [
        *((f, "h w") for f in (exponentials_multiplied, z_loss_of_all, entropy_of_all)),
        *((f, "h w") for f in (accuracy_of_all, one_row_is_read, with_a_bias_of_their_own)),
        (weights_that_learn, "h w weights"),
    ],
)
def test_all_rows_count(f: Loss, wanted: str, computed: Computed) -> None:
    check(f, given(), wanted)
    assert computed.of_logits() == N


def test_weights_that_are_hardly_anything_count(computed: Computed) -> None:
    of = given()
    of["weights"] = of["weights"].clamp(min=1e-30)
    check(chosen_by_weights, of)
    assert computed.of_logits() == N


def test_statistics_that_are_returned_count(computed: Computed) -> None:
    def f(h: Tensor, w: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        z = z_of(h, w)
        return F.cross_entropy(z, y), z.logsumexp(-1)

    of = given()
    names = [of["h"].requires_grad_(), of["w"], of["ignored"]]
    run, _ = compile_without_codegen(f, strategy="token_chunks", memory_budget=FOUR)
    ours, exact = run(*names), f(*names)
    torch.testing.assert_close(ours, exact)
    assert computed.of_logits() == N


def several(h, w, y, mask, weights):
    z = z_of(h, w)
    return torch.where(mask, nll(z, y), 0).sum() + F.cross_entropy(z, torch.where(weights > 2, y, -100))


def test_a_row_counts_if_any_loss_counts_it(computed: Computed) -> None:
    of = given()
    of["weights"] = torch.where(torch.rand(N) < 0.3, 3.0, 0.0)
    check(several, of)
    either = of["mask"] | (of["weights"] > 2)
    assert either.sum() <= computed.of_logits() <= either.sum() + counted.ALIGNED


# Numbers


@pytest.mark.parametrize(("n", "budget"), in_turns([257, 65, 64, 3, 1], [0.3, 0.4, 1.3]))
def test_chunks(n: int, budget: float) -> None:
    check(total, given(n), "h w b", budget=budget)


@pytest.mark.in_turns
@pytest.mark.parametrize("share", [0, 1, 1 / N])
@pytest.mark.parametrize("f", [mean, total, chosen], ids=lambda f: f.__name__)
def test_none_and_all(f: Loss, share: float, computed: Computed) -> None:
    of = given(share=share)
    if 0 < share < 1:
        of["mask"] = torch.arange(N) == N - 1
        of["ignored"] = torch.where(of["mask"], of["y"], -100)
    check(f, of, "h w b" if f is total else "h w")
    assert computed.of_logits() == {0: 0, 1: N}.get(share, 64)


@pytest.mark.in_turns
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("share", [0, 0.3])
def test_dtypes(share: float, dtype: torch.dtype) -> None:
    check(total, given(share=share), "h w b", dtype=dtype, budget=0.4)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int16, torch.uint8])
def test_dtypes_of_labels(dtype: torch.dtype) -> None:
    def f(h: Tensor, w: Tensor, y: Tensor, mask: Tensor) -> Tensor:
        return torch.where(mask, nll(z_of(h, w), y.long()), 0).sum()

    of = given()
    check(f, of | {"y": of["y"].to(dtype)})


@pytest.mark.parametrize(("f", "names"), [(total, "h w b ignored"), (each_row, "h w ignored")])
def test_without_a_gradient(f: Loss, names: str, computed: Computed) -> None:
    of = given()
    check(f, of, "", expected="forward_only")
    assert computed.of_logits() <= of["mask"].sum() + counted.ALIGNED
    assert names_of(f) == names.split()


def test_ignored_labels_that_are_a_class(computed: Computed) -> None:
    def f(h: Tensor, w: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(z_of(h, w), y, ignore_index=7)

    of = given()
    check(f, of | {"y": torch.where(of["mask"], of["y"], 7)})
    assert computed.of_logits() <= of["mask"].sum() + counted.ALIGNED


@pytest.mark.parametrize(
    "compiled",
    [compile_without_codegen, *[compile_with_codegen] * EVERYTHING],
)
def test_divisors_that_are_inputs(compiled: Callable[..., Any]) -> None:
    """A Python number, which becomes a symbol."""

    def f(h: Tensor, w: Tensor, y: Tensor, items: int) -> Tensor:
        return F.cross_entropy(z_of(h, w), y, reduction="sum") / items

    of = given()
    run, _ = compiled(f, strategy="token_chunks", memory_budget=FOUR)
    w = of["w"].requires_grad_()
    for items in (7, 11, 13):
        made, right = (torch.autograd.grad(g(of["h"], w, of["ignored"], items), w) for g in (run, f))
        torch.testing.assert_close(made, right)
    assert counts() == {"token_chunks": counters["stats"]["unique_graphs"]} == {"token_chunks": 2}


def test_any_number_of_rows(computed: Computed) -> None:
    run, _ = compile_without_codegen(total, strategy="token_chunks", memory_budget=FOUR, dynamic=True)
    for n in (300, 131, 64, 33, 9):
        of = given(n)
        computed.calls.clear()
        ours = measured(run, names_of(total), of, "h w b")
        assert_right(ours, measured(total, names_of(total), of, "h w b", torch.float64))
        assert computed.of_logits(n) <= of["mask"].sum() + counted.ALIGNED
    assert counts() == {"token_chunks": 1}


def test_labels_that_are_edited_between_reads() -> None:
    def f(h: Tensor, w: Tensor, y: Tensor) -> Tensor:
        z = z_of(h, w)
        y = y.clone()
        first = F.cross_entropy(z, y, reduction="sum")
        y[::2] = -100
        return first + F.cross_entropy(z, y, reduction="sum")

    of = given()
    check(f, of | {"y": of["ignored"]}, "", expected="forward_only")


def test_a_loop_over_chunks(computed: Computed) -> None:
    def f(h: Tensor, w: Tensor, ignored: Tensor) -> Tensor:
        parts = zip(h.chunk(3), ignored.chunk(3), strict=True)
        return sum(F.cross_entropy(z_of(each, w), y, reduction="sum") for each, y in parts)

    of = given()
    check(f, of, budget=None)
    assert counts() == {"token_chunks": 3}
    assert computed.of_logits() < N


@pytest.mark.parametrize(
    "f",
    [total, *[mask_of_sequences] * EVERYTHING],
    ids=lambda f: f.__name__,
)
def test_generated_code(f: Loss, computed: Computed) -> None:
    of = given()
    check(f, of, "h w b" if f is total else "h w", budget=TWO, compiled=compile_with_codegen)
    assert computed.of_logits() <= of["mask"].sum() + counted.ALIGNED


# What is not finite


def test_what_is_chosen_keeps_other_rows_out() -> None:
    """Of a row that does not count nothing is read: its gradient is 0, where eager has NaN."""
    of = given()
    of["h"][~of["mask"]] = torch.nan
    run, _ = compile_without_codegen(mean, strategy="token_chunks", memory_budget=FOUR)
    value, dh, dw = measured(run, names_of(mean), of, "h w")
    kept = {name: x[of["mask"]] if len(x) == N else x for name, x in of.items() if x.dim()}
    exact = measured(mean, names_of(mean), kept, "h w", torch.float64)
    assert_right([value, dh[of["mask"]], dw], exact)
    assert not dh[~of["mask"]].any()


def test_scales_of_other_rows_are_not_read() -> None:
    """Where a piece is filled up to a multiple of rows, with some that do not count."""
    of = given()
    of["scales"][~of["mask"]] = torch.nan
    run, _ = compile_without_codegen(scales_of_rows, strategy="token_chunks", memory_budget=FOUR)
    _, dh, dw, ds = measured(run, names_of(scales_of_rows), of, "h w scales")
    kept = {name: x[of["mask"]] if len(x) == N else x for name, x in of.items() if x.dim()}
    exact = measured(scales_of_rows, names_of(scales_of_rows), kept, "h w scales", torch.float64)
    assert_right([dh[of["mask"]], dw, ds[of["mask"]]], exact[1:])
    assert not dh[~of["mask"]].any()
    assert not ds[~of["mask"]].any()


def test_rows_of_which_no_class_is_allowed() -> None:
    def f(h: Tensor, w: Tensor, allowed: Tensor, ignored: Tensor) -> Tensor:
        return F.cross_entropy(z_of(h, w).masked_fill(~allowed, -torch.inf), ignored)

    of = given()
    allowed = of["mask"][:, None] & ((torch.rand(N, V) < 0.5) | (of["y"][:, None] == torch.arange(V)))
    check(f, of | {"allowed": allowed})


@pytest.mark.in_turns
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("f", [multiplied, multiplied_twice, hits_multiplied])
def test_a_mask_that_multiplies_lets_nan_through(f: Loss, bad: float, computed: Computed) -> None:
    """Of rows of weight 0 those alone are computed whose logits are not known to be finite."""
    of = given()
    of["h"][(~of["mask"]).nonzero()[3]] = bad
    check(f, of)
    assert measured(f, names_of(f), of, "")[0].isnan()
    assert computed.of_logits() < N


@pytest.mark.parametrize("f", [multiplied, multiplied_before, multiplied_by_classes])
def test_a_mask_of_zeros_over_its_sum_is_nan(f: Loss) -> None:
    """0 times 1 / 0 for each row, as in eager: not a gradient of 0 beside a loss that is NaN."""
    of = given(share=0)
    check(f, of)
    assert measured(f, names_of(f), of, "h")[1].isnan().all()


def test_one_sequence_of_zeros_over_its_sum_is_nan() -> None:
    of = given()
    of["mask"][: N // 5] = False
    check(multiplied_by_sequences, of)
    assert (
        measured(multiplied_by_sequences, ["h", "w", "y", "mask"], of, "h")[1].isnan().any(1).sum() == N // 5
    )


@pytest.mark.parametrize(("size", "weight"), [(3e38, 1.0), (1e10, 1e30), (1e10, 1.0)])
def test_what_is_too_large_is_not_left_out(size: float, weight: float) -> None:
    """Infinite in float32, of logits or of a loss times its weight, and 0 times that NaN, as in eager."""
    of = given()
    of["weights"] = torch.where(of["mask"], 1.0, weight)
    of["h"][(~of["mask"]).nonzero()[3]] = size
    names = names_of(multiplied_twice)
    run, _ = compile_without_codegen(multiplied_twice, strategy="token_chunks", memory_budget=FOUR)
    ours = measured(run, names, of, "h w", torch.float32)
    eager = measured(multiplied_twice, names, of, "h w", torch.float32)
    assert eager[0].isnan() == (size * weight > 1e38)
    assert [x.isnan().any() for x in ours] == [x.isnan().any() for x in eager]


# What is told


@pytest.mark.parametrize(
    ("f", "told"),
    [
        (mean, "rows that do not count are skipped: `y != -100`"),
        (filled, "rows that do not count are skipped: `mask`"),
        (chosen_by_weights, "rows that do not count are skipped: `mask != 0`" + skip.IF_FINITE),
        (shifted, "rows that do not count are skipped: `y != -100`"),
        (multiplied, "rows that do not count are skipped: `mask`" + skip.IF_FINITE),
        (exponentials_multiplied, counted_rows.MULTIPLIED),
        (z_loss_of_all, ""),
    ],
    ids=lambda f: getattr(f, "__name__", ""),
)
def test_it_is_told(f: Loss, told: str) -> None:
    of = given()
    given_ = [of[name].requires_grad_(name in ("h", "w")) for name in names_of(f)]
    inductor_ce.install(min_vocab=2, strategy="token_chunks", memory_budget=FOUR)
    sites = inductor_ce.explain(f, *given_).sites
    assert {site.rows for site in sites} == {told}


# The operators


@pytest.mark.parametrize("counts_", ["", "0", "1", "0110", "1" * 70 + "0" * 3, "01" * 3000])
def test_row_order(counts_: str) -> None:
    counts_of_rows = torch.tensor([c == "1" for c in counts_], dtype=torch.bool)
    order, place, count = torch.ops.inductor_ce.row_order(counts_of_rows)
    wanted = [i for i, c in enumerate(counts_) if c == "1"] + [i for i, c in enumerate(counts_) if c == "0"]
    assert order.tolist() == wanted
    assert place[order].tolist() == list(range(len(wanted)))
    assert count.tolist() == [counts_.count("1")]
    assert (order.dtype, place.dtype, count.dtype) == (torch.int64, torch.int64, torch.int32)


LEFT = torch.tensor([192, 64, -64], dtype=torch.int32)  # of three pieces of 128 rows


@pytest.mark.parametrize(("piece", "n"), [(0, 128), (1, 64), (2, 0)])
def test_operators_of_some_rows(piece: int, n: int) -> None:
    ops, most = torch.ops.inductor_ce, 128
    h, w, rows = torch.randn(300, D), torch.randn(D, V), torch.randperm(300)[:most]
    counted_ = torch.rand(most) < 0.9
    limit = LEFT, None, piece
    taken = ops.take_rows(h, rows, counted_, [], *limit)
    a = torch.where(counted_[:, None], h[rows], 0)
    torch.testing.assert_close(taken[:n], a[:n])
    z = ops.logits(a, w, None, [], None, *limit)
    torch.testing.assert_close(z[:n], (a @ w)[:n])
    dz = torch.randn(most, V)
    dz[n:] = torch.nan
    dh = torch.zeros(300, D)
    ops.product_to_rows(dh, dz, w.t(), 100, *limit)
    right = torch.zeros(300, D)
    right[100 : 100 + n] = dz[:n] @ w.t()
    torch.testing.assert_close(dh, right)
    for accumulate in (False, True):
        dw = torch.ones(V, D)
        ops.product_into(dw, dz.t(), a, 0, accumulate, *limit)
        torch.testing.assert_close(dw, accumulate + dz[:n].t() @ a[:n])
    torch.testing.assert_close(ops.column_sums(dz, *limit), dz[:n].sum(0))
