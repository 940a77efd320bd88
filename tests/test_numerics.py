"""Losses as users spell them: fused, and as right as the spelling itself is in the same dtype.

Of a matrix the means go through all passes, and the rest are rewritten alone; with ALL=1 all go through all.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import reference
import torch
import torch.nn.functional as F
from harness import Graphs, Rewritten, compile_without_codegen, sites
from inputs import logits
from pairwise import EVERYTHING, pairwise
from reference import Terms, assert_as_fair, measure
from torch import Tensor, nn

from inductor_ce import ops

B, S, V = 3, 5, 37
N = B * S
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
REDUCTIONS = ["none", "mean", "sum"]

aten, prims = torch.ops.aten, torch.ops.prims
SAME_VALUES = {
    *(aten.view.default, aten.reshape.default, aten.permute.default, aten.transpose.int, aten.t.default),
    *(aten.squeeze.dim, aten.unsqueeze.default, aten.slice.Tensor, prims.convert_element_type.default),
}


def labels(*shape: int, ignore_index: int = -100, every: int = 3) -> Tensor:
    """Random labels; each `every`th is ignored."""
    y = torch.randint(0, V, shape)
    y.view(-1)[::every] = ignore_index
    return y


def wide(graphs: Graphs, size: int = N * V, allowed: frozenset = frozenset()) -> list[str]:
    """What the graphs compute that is as large as the logits, but for their gradient, views and casts."""
    return [
        str(node)
        for node in graphs.nodes
        if node.op == "call_function"
        and node.target not in {*SAME_VALUES, ops.ROW_GRAD, *allowed}
        and isinstance(node.meta.get("val"), Tensor)
        and node.meta["val"].numel() >= size
    ]


def check(
    spelling: Callable[[Tensor, Tensor], Tensor],
    rows: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]],
    z: Tensor,
    y: Tensor,
    terms: Terms,
    *,
    size: int = N * V,
    allowed: frozenset = frozenset(),
    whole: bool = True,
) -> None:
    """The spelling is fused, and fair to `reference.cross_entropy` of its rows, (z [N, V], y [N])."""
    naive_value = spelling(z, y)
    upstream = torch.randn(naive_value.shape, dtype=naive_value.dtype)
    naive = measure(spelling, z, y, upstream=upstream)
    exact = measure(lambda z: reference.cross_entropy(*rows(z, y), terms), z.double(), upstream=upstream)
    if whole or EVERYTHING:
        compiled, graphs = compile_without_codegen(spelling)
        ours = measure(compiled, z, y, upstream=upstream)
        assert graphs.count(ops.ROW_STATS) == 1
        assert graphs.count(ops.ROW_GRAD) == 1
        assert wide(graphs, size, allowed) == []
    else:
        rewritten = Rewritten()
        ours = measure(torch.compile(spelling, backend=rewritten), z, y, upstream=upstream)
        assert rewritten.count(ops.ROW_STATS) == 1
    assert sites() == 1
    assert_as_fair(ours, naive, exact)


def reduced(rows: Tensor, counts: Tensor, terms: Terms) -> Tensor:
    """As many users write it: mask, then divide."""
    rows = rows.masked_fill(~counts, 0.0)
    if terms.reduction == "none":
        return rows
    return rows.sum() / counts.sum() if terms.reduction == "mean" else rows.sum()


def with_z_loss(loss: Tensor, z: Tensor, y: Tensor, terms: Terms) -> Tensor:
    if not terms.z_weight:
        return loss
    return loss + terms.z_weight * reduced(z.logsumexp(-1).square(), y != terms.ignore_index, terms)


# The spellings, over z [..., V] and y [...]


def cross_entropy(z: Tensor, y: Tensor, t: Terms) -> Tensor:
    loss = F.cross_entropy(
        z, y, ignore_index=t.ignore_index, reduction=t.reduction, label_smoothing=t.smoothing
    )
    return with_z_loss(loss, z, y, t)


def nll_of_log_softmax(z: Tensor, y: Tensor, t: Terms) -> Tensor:
    loss = F.nll_loss(F.log_softmax(z, dim=-1), y, ignore_index=t.ignore_index, reduction=t.reduction)
    return with_z_loss(loss, z, y, t)


def gather_of_log_softmax(z: Tensor, y: Tensor, t: Terms) -> Tensor:
    log_probs, counts = z.log_softmax(-1), y != t.ignore_index
    picked = log_probs.gather(-1, y.masked_fill(~counts, 0).unsqueeze(-1)).squeeze(-1)
    rows = -picked
    if t.smoothing:
        rows = (1 - t.smoothing) * rows - t.smoothing * log_probs.mean(-1)
    return with_z_loss(reduced(rows, counts, t), z, y, t)


def logsumexp_minus_gather(z: Tensor, y: Tensor, t: Terms) -> Tensor:
    lse, counts = torch.logsumexp(z, dim=-1), y != t.ignore_index
    picked = torch.gather(z, -1, torch.where(counts, y, 0)[..., None])[..., 0]
    rows = lse - picked
    if t.smoothing:
        rows = rows * (1 - t.smoothing) + t.smoothing * (lse - z.mean(-1))
    return with_z_loss(reduced(rows, counts, t), z, y, t)


def by_hand(z: Tensor, y: Tensor, t: Terms) -> Tensor:
    counts = y != t.ignore_index
    shifted = z - z.max(dim=-1, keepdim=True).values
    log_probs = shifted - shifted.exp().sum(-1, keepdim=True).log()
    rows = -log_probs.gather(-1, y.masked_fill(~counts, 0)[..., None]).squeeze(-1)
    if t.smoothing:
        rows = (1 - t.smoothing) * rows - t.smoothing * log_probs.sum(-1) / V
    return with_z_loss(reduced(rows, counts, t), z, y, t)


SPELLINGS = [cross_entropy, nll_of_log_softmax, gather_of_log_softmax, logsumexp_minus_gather, by_hand]


def as_they_are(z: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    return z, y


def flat(z: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    return z.reshape(-1, V), y.reshape(-1)


PLAIN, SMOOTHED, Z_LOSS, BOTH = (0.0, 0.0), (0.1, 0.0), (0.0, 1e-2), (0.1, 1e-2)


@pytest.mark.parametrize(
    ("dtype", "extra", "reduction", "ignore_index"),
    pairwise(
        *(DTYPES, (PLAIN, SMOOTHED, Z_LOSS, BOTH), REDUCTIONS, (-100, -1, 0, V - 1, V + 5)),
        valid=lambda dtype, extra, *_: dtype in DTYPES[:2] or extra == BOTH,
    ),
)
def test_cross_entropy(
    dtype: torch.dtype, extra: tuple[float, float], reduction: str, ignore_index: int
) -> None:
    terms = Terms(reduction, ignore_index, *extra)
    z, y = logits(N, V, dtype=dtype), labels(N, ignore_index=ignore_index)
    check(lambda z, y: cross_entropy(z, y, terms), as_they_are, z, y, terms, whole=reduction == "mean")


@pytest.mark.parametrize(
    ("spelling", "dtype", "reduction", "extra"),
    pairwise(
        *(SPELLINGS[1:], (*DTYPES[:2], DTYPES[3]), REDUCTIONS, (PLAIN, BOTH)),
        valid=lambda spelling, dtype, reduction, extra: dtype != DTYPES[3] or reduction == "mean",
    ),
)
def test_spelling(
    spelling: Callable[[Tensor, Tensor, Terms], Tensor],
    dtype: torch.dtype,
    reduction: str,
    extra: tuple[float, float],
) -> None:
    if spelling is nll_of_log_softmax:
        extra = (0.0, extra[1])
    terms = Terms(reduction, 0, *extra)
    z, y = logits(N, V, dtype=dtype), labels(N, ignore_index=0)
    check(lambda z, y: spelling(z, y, terms), as_they_are, z, y, terms, whole=reduction == "mean")


@pytest.mark.in_turns
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("spelling", SPELLINGS[2:])
def test_spelling_in_three_dimensions(
    spelling: Callable[[Tensor, Tensor, Terms], Tensor], reduction: str
) -> None:
    terms = Terms(reduction, -1, *BOTH)
    z, y = logits(B, S, V), labels(B, S, ignore_index=-1)
    check(lambda z, y: spelling(z, y, terms), flat, z, y, terms, whole=reduction == "mean")


def test_module() -> None:
    terms = Terms(ignore_index=V - 1, smoothing=0.1)
    criterion = nn.CrossEntropyLoss(ignore_index=V - 1, label_smoothing=0.1)
    z, y = logits(N, V), labels(N, ignore_index=V - 1)
    check(criterion, as_they_are, z, y, terms)


# How logits [B, S, V] and labels [B, S] come to be rows


def viewed(z: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    return z.view(-1, z.size(-1)), y.view(-1)


def flattened_after_cast(z: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    return z.float().flatten(0, 1), y.flatten()


def shifted_by_slices(z: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    return z[..., :-1, :].contiguous().view(-1, V), y[..., 1:].contiguous().view(-1)


def shifted_by_slices_without_copies(z: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    return z[:, :-1].reshape(-1, V), y[:, 1:].reshape(-1)


def shifted_by_padding(z: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    return z.view(-1, V), F.pad(y, (0, 1), value=-100)[..., 1:].reshape(-1)


def shifted_by_roll(z: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    y = y.roll(-1, dims=1)
    y[:, -1] = -100
    return z.reshape(-1, V), y.reshape(-1)


ARRANGEMENTS = [
    viewed,
    flattened_after_cast,
    shifted_by_slices,
    shifted_by_slices_without_copies,
    shifted_by_padding,
    shifted_by_roll,
]


@pytest.mark.parametrize(
    ("arrangement", "dtype", "reduction"), pairwise(ARRANGEMENTS, DTYPES[:2], REDUCTIONS)
)
def test_arrangement(
    arrangement: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]], dtype: torch.dtype, reduction: str
) -> None:
    terms = Terms(reduction, smoothing=0.1)
    z, y = logits(B, S, V, dtype=dtype), labels(B, S)
    size = B * (S - 1) * V if "slices" in arrangement.__name__ else N * V
    check(
        lambda z, y: cross_entropy(*arrangement(z, y), terms),
        lambda z, y: tuple(t.double() if t.is_floating_point() else t for t in arrangement(z.double(), y)),
        z,
        y,
        terms,
        size=size,
        whole=reduction == "mean",
    )


@pytest.mark.parametrize("spelling", [gather_of_log_softmax, logsumexp_minus_gather])
def test_shift_of_gathered_losses(spelling: Callable[[Tensor, Tensor, Terms], Tensor]) -> None:
    terms = Terms("none", smoothing=0.1)
    z, y = logits(B, S, V), labels(B, S)
    check(
        lambda z, y: spelling(z[:, :-1], y[:, 1:], terms),
        shifted_by_slices,
        z,
        y,
        terms,
        size=B * (S - 1) * V,
    )


@pytest.mark.parametrize(
    ("dtype", "reduction", "contiguous"), pairwise(DTYPES[:2], REDUCTIONS, (True, False))
)
def test_classes_in_the_middle(dtype: torch.dtype, reduction: str, contiguous: bool) -> None:
    """[B, V, S]: rows are copied into place where they are not in place already."""
    terms = Terms(reduction, smoothing=0.1)
    z, y = logits(B, S, V, dtype=dtype), labels(B, S)
    z = z.transpose(1, 2).contiguous() if contiguous else z.transpose(1, 2)
    check(
        lambda z, y: cross_entropy(z, y, terms),
        lambda z, y: flat(z.transpose(1, 2), y),
        z,
        y,
        terms,
        allowed=frozenset({aten.clone.default}),
    )


@pytest.mark.in_turns
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("dtype", DTYPES[:2])
def test_one_row_without_a_batch(dtype: torch.dtype, reduction: str) -> None:
    terms = Terms(reduction, smoothing=0.1)
    z, y = logits(V, dtype=dtype), torch.tensor(5)
    check(
        lambda z, y: cross_entropy(z, y, terms),
        lambda z, y: (z[None], y[None]),
        z,
        y,
        terms,
        size=V,
    )


# Casts on the way, edits of the labels


def cast_before(z: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(z.to(torch.float32), y, reduction="none")


def cast_within(z: Tensor, y: Tensor) -> Tensor:
    return F.nll_loss(F.log_softmax(z, dim=1, dtype=torch.float32), y, reduction="none")


def cast_back(z: Tensor, y: Tensor) -> Tensor:
    counts = y != -100
    picked = z.float().log_softmax(-1).gather(-1, (y * counts)[:, None]).squeeze(-1)
    return (-picked * counts).to(z.dtype)


def cast_back_before_the_pick(z: Tensor, y: Tensor) -> Tensor:
    counts = y != -100
    log_probs = F.log_softmax(z.float(), dim=-1).to(z.dtype)
    return -log_probs.gather(-1, (y * counts)[:, None])[:, 0] * counts


def to_double(z: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(z.double(), y, reduction="none")


@pytest.mark.in_turns
@pytest.mark.parametrize("dtype", DTYPES[:3])
@pytest.mark.parametrize(
    "spelling", [cast_before, cast_within, cast_back, cast_back_before_the_pick, to_double]
)
def test_cast(spelling: Callable[[Tensor, Tensor], Tensor], dtype: torch.dtype) -> None:
    z, y = logits(N, V, dtype=dtype), labels(N)
    casts = frozenset({aten._to_copy.default})
    check(spelling, as_they_are, z, y, Terms("none"), allowed=casts)


def test_labels_edited_in_place() -> None:
    """The mask reads the labels before the edit, the pick reads them after it."""

    def spelling(z: Tensor, y: Tensor) -> Tensor:
        y = y.clone()
        counts = y != -100
        y[y == -100] = 0
        rows = -z.log_softmax(-1).gather(-1, y.unsqueeze(-1)).squeeze(-1)
        return (rows * counts).sum() / counts.sum()

    check(spelling, as_they_are, logits(N, V), labels(N), Terms())


@pytest.mark.in_turns
@pytest.mark.parametrize("spelling", SPELLINGS)
@pytest.mark.parametrize("scale", [1e3, 1e-3])
def test_large_and_small_logits(spelling: Callable[[Tensor, Tensor, Terms], Tensor], scale: float) -> None:
    terms = Terms("none")
    z, y = scale * logits(N, V), labels(N)
    check(lambda z, y: spelling(z, y, terms), as_they_are, z, y, terms)


@pytest.mark.parametrize("offset", [1e4, -1e4])
def test_logits_far_from_zero(offset: float) -> None:
    """Where lse - pick(y) would lose its digits."""
    terms = Terms("none", smoothing=0.1)
    z, y = logits(N, V) + offset, labels(N)
    check(lambda z, y: cross_entropy(z, y, terms), as_they_are, z, y, terms)


@pytest.mark.parametrize("spelling", SPELLINGS[:4])
def test_certain_rows(spelling: Callable[[Tensor, Tensor, Terms], Tensor]) -> None:
    """Losses near zero, and probabilities near one."""
    terms = Terms("none")
    z, y = logits(N, V), torch.randint(0, V, (N,))
    z[torch.arange(N), y] += torch.linspace(10, 40, N)
    check(lambda z, y: spelling(z, y, terms), as_they_are, z, y, terms)


def test_wide_vocabulary() -> None:
    """Sums over a hundred thousand classes, label smoothing included."""
    classes, terms = 100_003, Terms("none", smoothing=0.1)
    z, y = 3 * torch.randn(2, classes) + 20, torch.tensor([0, classes - 1])
    check(lambda z, y: cross_entropy(z, y, terms), as_they_are, z, y, terms, size=2 * classes)


@pytest.mark.parametrize("spelling", SPELLINGS[2:])
def test_int32_labels(spelling: Callable[[Tensor, Tensor, Terms], Tensor]) -> None:
    """gather takes them; F.cross_entropy takes int64 alone under torch.compile."""
    terms = Terms("none", ignore_index=0)
    z, y = logits(N, V), labels(N, ignore_index=0).int()
    check(lambda z, y: spelling(z, y, terms), as_they_are, z, y, terms)
