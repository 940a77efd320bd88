"""The proof that a gradient can be made in the forward: what it grants, what it refuses, in which words.

Whatever it says, the gradients are then compared with float64: a proof of what is not so would show.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import compress
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from harness import compile_without_codegen
from pairwise import EVERYTHING
from reference import assert_fair
from torch import Tensor
from torch._dynamo.utils import counters

from inductor_ce.graph import shapes
from inductor_ce.heads import fuse, proof

B, S, D, V = 3, 4, 8, 37
N = B * S

Loss = Callable[[Tensor, Tensor], Any]


@pytest.fixture
def proofs(monkeypatch: pytest.MonkeyPatch) -> list[fuse.Proof]:
    """The proofs of the heads that are compiled, in their order."""
    made: list[fuse.Proof] = []

    class Recorded(fuse.Proof):
        def __init__(self, head: Any):
            super().__init__(head)
            made.append(self)

    monkeypatch.setattr(fuse, "Proof", Recorded)
    return made


def check(
    loss: Loss,
    strategy: str,
    upstream: float | None = None,
    dynamic: bool | None = None,
    budget: float = 0.9,
) -> None:
    """The loss of the logits h W' is computed by `strategy`, though chunks are asked for, and is right."""
    hidden, weight, y = torch.randn(N, D), torch.randn(V, D), torch.randint(0, V, (N,))
    given = torch.randn(2, N)

    def gradients(f: Callable[..., Any], dtype: torch.dtype) -> list[Tensor]:
        leaves = [t.to(dtype).requires_grad_() for t in (hidden, weight)]
        made = f(*leaves, y)
        values = [made] if isinstance(made, Tensor) else list(made)
        tangents = [t[: v.numel()].view(v.shape).to(dtype) for t, v in zip(given, values, strict=False)]
        if upstream is not None:
            tangents = [torch.full_like(t, upstream) for t in tangents]
        moves = [v.requires_grad for v in values]
        wanted, given_to = (list(compress(made, moves)) for made in (values, tangents))
        return [*(v.detach() for v in values), *torch.autograd.grad(wanted, leaves, given_to)]

    def whole(hidden: Tensor, weight: Tensor, y: Tensor) -> Any:
        return loss(hidden @ weight.t(), y)

    compiled, _ = compile_without_codegen(
        whole, strategy="token_chunks", memory_budget=budget, dynamic=dynamic
    )
    results = (
        gradients(compiled, torch.float32),
        gradients(whole, torch.float32),
        gradients(whole, torch.float64),
    )
    assert counters["inductor_ce"][strategy] >= 1
    for ours, naive, exact in zip(*results, strict=True):
        assert_fair(ours, naive, exact)


def nll(z: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(z, y, reduction="none")


def lse(z: Tensor) -> Tensor:
    return z.logsumexp(-1)


def other(y: Tensor) -> Tensor:
    """A loss that has nothing to do with the logits, on the labels alone."""
    return y.float().cos().mean()


# Proved

WEIGHTS = torch.linspace(-1, 2, N)
COSTS = torch.linspace(0.1, 2, V)


def shifted_by_slices(z: Tensor, y: Tensor) -> Tensor:
    z, y = z.view(B, S, V), y.view(B, S)
    return F.cross_entropy(z[:, :-1].reshape(-1, V), y[:, 1:].reshape(-1))


def shifted_statistics(z: Tensor, y: Tensor) -> Tensor:
    log_p = z.view(B, S, V).log_softmax(-1)[:, :-1]
    return -log_p.gather(-1, y.view(B, S)[:, 1:, None]).mean()


def mean_of_the_counted(z: Tensor, y: Tensor) -> Tensor:
    counts = y > 5
    return (nll(z, y) * counts).sum() / counts.sum().clamp(min=1)


def focal(z: Tensor, y: Tensor) -> Tensor:
    losses = nll(z, y)
    return ((1 - (-losses).exp()) ** 2 * losses).mean()


def focal_relative_to_the_batch(z: Tensor, y: Tensor) -> Tensor:
    """A row's weight is its loss over the mean of them, held constant: a row statistic times a scalar."""
    losses = nll(z, y)
    return (losses * (losses / losses.mean()).detach()).sum()


def mean_of_each_document(z: Tensor, y: Tensor) -> Tensor:
    """Documents one behind another in the rows, and a padding of weight 0."""
    document = torch.tensor([0, 0, 0, 1, 2, 2, 2, 2, 2, 4, 4, 0])
    counts = (torch.arange(N) < N - 1).to(z.dtype)
    tokens = counts.new_zeros(5).index_add(0, document, counts)
    sums = nll(z, y).new_zeros(5).scatter_add(0, document, nll(z, y) * counts)
    return (sums / tokens.clamp(min=1)).sum() / (tokens > 0).sum()


def one_preference(z: Tensor, y: Tensor) -> Tensor:
    """As DPO of a single pair: its one number scales the gradients of both."""
    chosen, rejected = (-nll(z, y)).view(2, N // 2).sum(-1)
    return -F.logsigmoid(0.1 * (chosen - rejected))


PROVED: dict[str, Loss] = {
    "mean": lambda z, y: F.cross_entropy(z, y),
    "sum": lambda z, y: F.cross_entropy(z, y, reduction="sum"),
    "mean of the losses": lambda z, y: nll(z, y).mean(),
    "z-loss": lambda z, y: F.cross_entropy(z, y) + 1e-2 * lse(z).square().mean(),
    "smoothing": lambda z, y: F.cross_entropy(z, y, label_smoothing=0.1),
    "ignored rows": lambda z, y: F.cross_entropy(z, y.masked_fill(y < 9, -100)),
    "mean of the counted": mean_of_the_counted,
    "weights": lambda z, y: (nll(z, y) * WEIGHTS).sum() / WEIGHTS.sum(),
    "costs": lambda z, y: F.cross_entropy(z, y, weight=COSTS.to(z.dtype)),
    "means of sequences": lambda z, y: nll(z, y).view(B, S).mean(1).mean(),
    "weights of sequences": lambda z, y: (nll(z, y).view(B, S) * WEIGHTS[:B, None]).sum(),
    "shift by slices": shifted_by_slices,
    "shift of statistics": shifted_statistics,
    "rows turned round and back": lambda z, y: nll(z, y).view(B, S).t().contiguous().t().flatten().mean(),
    "half of the rows": lambda z, y: nll(z, y)[: N // 2].mean(),
    "a part of the rows twice": lambda z, y: nll(z, y).sum() + nll(z, y)[: N // 3].sum(),
    "entropy": lambda z, y: F.cross_entropy(z, y) + 0.1 * (z.softmax(-1) * z.log_softmax(-1)).sum(-1).mean(),
    "squared": lambda z, y: F.cross_entropy(z, y) ** 2,
    "exponential": lambda z, y: F.cross_entropy(z, y).exp(),
    "times another loss": lambda z, y: F.cross_entropy(z, y) * other(y),
    "plus another loss": lambda z, y: F.cross_entropy(z, y) + other(y),
    "scaled": lambda z, y: F.cross_entropy(z, y) * 65536.0 / 4,
    "negative": lambda z, y: -F.cross_entropy(z, y),
    "not at all": lambda z, y: 0 * F.cross_entropy(z, y),
    "over the mean of the normalisers": lambda z, y: F.cross_entropy(z, y) / lse(z).detach().mean(),
    "focal": focal,
    "squares of the losses": lambda z, y: nll(z, y).square().mean(),
    "cosines of the normalisers": lambda z, y: (lse(z).cos() + nll(z, y)).sum(),
    "focal relative to the batch": focal_relative_to_the_batch,
    "means of documents": mean_of_each_document,
    "one preference": one_preference,
    "the largest loss as a unit": lambda z, y: (nll(z, y) / nll(z, y).detach().amax()).sum(),
}


@pytest.mark.parametrize("name", PROVED)
def test_proved(name: str, proofs: list[fuse.Proof]) -> None:
    check(PROVED[name], "token_chunks")
    (found,) = proofs
    assert found.why_not == ""


@pytest.mark.parametrize("upstream", [0.0, 65536.0, *[1.0, -3.0] * EVERYTHING])
def test_one_scalar_is_the_upstream_gradient(upstream: float, proofs: list[fuse.Proof]) -> None:
    """As GradScaler gives one."""
    check(PROVED["mean"], "token_chunks", upstream=upstream)
    assert [(node.op, power) for node, power in proofs[0].factor] == [("placeholder", 1)]


def test_a_number_of_the_batch_is_one_scalar_more(proofs: list[fuse.Proof]) -> None:
    check(PROVED["focal relative to the batch"], "token_chunks")
    ((_, first), (_, second)) = proofs[0].factor
    assert sorted((first, second)) == [-1, 1]


@pytest.mark.parametrize("name", ["shift of statistics", "weights of sequences"])
def test_proved_with_symbolic_sizes(name: str, proofs: list[fuse.Proof]) -> None:
    check(PROVED[name], "token_chunks", dynamic=True)
    assert proofs[0].why_not == ""


# Refused


def preferences(z: Tensor, y: Tensor) -> Tensor:
    """As DPO: sums over sequences, and one number for each pair of them."""
    sums = (-nll(z, y)).view(4, N // 4).sum(-1)
    return -F.logsigmoid(0.1 * (sums[:2] - sums[2:])).mean()


def preferences_of_documents(z: Tensor, y: Tensor) -> Tensor:
    """As `preferences`, the sums of sequences that lie one behind another."""
    sequence = torch.arange(N) // 3
    sums = nll(z, y).new_zeros(4).index_add(0, sequence, -nll(z, y))
    return -F.logsigmoid(0.1 * (sums[:2] - sums[2:])).mean()


def two_losses(z: Tensor, y: Tensor) -> Tensor:
    """Each squared, so that each has an upstream gradient of its own."""
    return F.cross_entropy(z, y) ** 2 + lse(z).mean() ** 2


def relative_to_the_batch(z: Tensor, y: Tensor) -> Tensor:
    losses = nll(z, y)
    return (losses * (losses / losses.mean())).sum()


def times_its_neighbour(z: Tensor, y: Tensor) -> Tensor:
    losses = nll(z, y)
    return (losses * losses.detach().roll(1)).sum()


def times_its_mirror(z: Tensor, y: Tensor) -> Tensor:
    losses = nll(z, y)
    return (losses * losses.detach().flip(0)).sum()


def moved_by_slices(z: Tensor, y: Tensor) -> Tensor:
    losses = nll(z, y)
    return (losses * torch.cat([losses[3:], losses[:3]]).detach()).sum()


def rows_turned(z: Tensor, y: Tensor) -> Tensor:
    losses = nll(z, y)
    return (losses * losses.detach().view(B, S).t().reshape(-1)).sum()


def two_temperatures(z: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Both returned, so that the program may ask for the gradient of any sum of them."""
    return F.cross_entropy(z, y), F.cross_entropy(z * 0.5, y)


def part_returned(z: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """A part of the loss is returned too, with its gradient."""
    ce = F.cross_entropy(z, y)
    return ce + 1e-2 * lse(z).square().mean(), ce


def below_the_mean(z: Tensor, y: Tensor) -> Tensor:
    """The hardest rows are dropped."""
    rows = nll(z, y)
    return (rows * (rows.detach() <= rows.detach().mean())).mean()


MIX = "may mix rows"
TOGETHER = "brings rows together"
DIFFERENT = "sub brings different upstream gradients together"

DETACH = "; detach those results that are for the log alone"

REFUSED: dict[str, tuple[Loss, str]] = {
    "given per row": (nll, "the upstream gradient differs from row to row"),
    "two temperatures": (two_temperatures, f"the losses have upstream gradients of their own{DETACH}"),
    "a part returned": (part_returned, f"add brings different upstream gradients together{DETACH}"),
    "two losses": (two_losses, "add brings different upstream gradients together"),
    "relative to the batch": (relative_to_the_batch, "add brings different upstream gradients together"),
    "moved": (times_its_neighbour, f"index {MIX}"),
    "mirrored": (times_its_mirror, f"rev {MIX}"),
    "moved by slices": (moved_by_slices, f"div {TOGETHER}"),
    "turned": (rows_turned, f"div {TOGETHER}"),
    "running sum": (lambda z, y: (nll(z, y) * nll(z, y).detach().cumsum(0)).sum(), f"cumsum {MIX}"),
    "order": (lambda z, y: (nll(z, y) * nll(z, y).detach().sort().values).sum(), f"sort {MIX}"),
    "softmax over rows": (lambda z, y: (nll(z, y) * nll(z, y).detach().softmax(0)).sum(), DIFFERENT),
    "normaliser of all rows": (lambda z, y: nll(z, y).logsumexp(0), DIFFERENT),
    "variance over rows": (lambda z, y: nll(z, y).var(), DIFFERENT),
    "above the mean": (lambda z, y: (nll(z, y) - nll(z, y).detach().mean()).relu().sum(), DIFFERENT),
    "sums per sequence": (preferences, f"sum {TOGETHER}"),
    "sums per document": (preferences_of_documents, f"index_put {MIX}"),
    "median": (lambda z, y: nll(z, y).median(), "eq is not linear in what is made of all rows"),
    "below the mean": (below_the_mean, "le is not linear in what is made of all rows"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name: str, proofs: list[fuse.Proof]) -> None:
    loss, words = REFUSED[name]
    check(loss, "vocab_slabs")
    (found,) = proofs
    assert found.why_not == words


def test_detached_as_the_reason_says(proofs: list[fuse.Proof]) -> None:
    def part_detached(z: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        loss, part = part_returned(z, y)
        return loss, part.detach()

    check(part_detached, "token_chunks")
    assert proofs[0].why_not == ""


def test_refused_is_what_the_log_says(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("DEBUG", logger="inductor_ce"):
        check(two_temperatures, "vocab_slabs", budget=0.6)
    assert "vocab_slabs in 4 pieces" in caplog.text
    assert "the losses have upstream gradients of their own" in caplog.text


def test_no_row_above_a_threshold() -> None:
    """The loss is NaN; the gradient is 0 in eager, as no row has one."""

    def hardest(hidden: Tensor, weight: Tensor, y: Tensor) -> Tensor:
        losses = nll(hidden @ weight.t(), y)
        hard = losses.detach() > 1e9
        return torch.where(hard, losses, 0.0).sum() / hard.sum()

    hidden, weight = torch.randn(N, D, requires_grad=True), torch.randn(V, D)
    compiled, _ = compile_without_codegen(hardest, strategy="token_chunks", memory_budget=0.9)
    loss = compiled(hidden, weight, torch.zeros(N, dtype=torch.long))
    (gradient,) = torch.autograd.grad(loss, hidden)
    assert loss.isnan()
    assert gradient.eq(0).all()


def test_rows_that_coincide_at_the_hint_only() -> None:
    """Cut at 8 and put together again, 8 rows are as they were, and others are not: sizes are guarded."""

    def loss(hidden: Tensor, weight: Tensor, y: Tensor) -> Tensor:
        losses = nll(hidden @ weight.t(), y)
        return (losses * torch.cat([losses[8:], losses[:8]]).detach()).sum()

    compiled, _ = compile_without_codegen(loss, strategy="token_chunks", memory_budget=0.9, dynamic=True)
    weight = torch.randn(V, D, requires_grad=True)
    for n in (8, 12, 7):
        hidden, y = torch.randn(n, D, requires_grad=True), torch.randint(0, V, (n,))
        ours = torch.autograd.grad(compiled(hidden, weight, y), (hidden, weight))
        torch.testing.assert_close(ours, torch.autograd.grad(loss(hidden, weight, y), (hidden, weight)))
    assert counters["inductor_ce"]["vocab_slabs"] == 1
    assert counters["inductor_ce"]["token_chunks"] == 2


def part_from_the_start(losses: Tensor, start: int) -> Tensor:
    return losses[:6] * losses.detach().narrow(0, start, 6)


def padded_in_front(losses: Tensor, start: int) -> Tensor:
    return losses * F.pad(losses.detach(), [start, 0])[: losses.shape[0]]


@pytest.mark.parametrize("weighed", [part_from_the_start, padded_in_front])
def test_rows_that_are_their_own_at_the_example_only(
    weighed: Callable[[Tensor, int], Tensor], proofs: list[fuse.Proof]
) -> None:
    """The start is a difference of two sizes, 0 at the example, which no guard tells."""

    def loss(hidden: Tensor, weight: Tensor, y: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return weighed(nll(hidden @ weight.t(), y), a.shape[0] - b.shape[0] - 1).sum()

    compiled, _ = compile_without_codegen(loss, strategy="token_chunks", memory_budget=0.9, dynamic=True)
    hidden, weight = torch.randn(N, D, requires_grad=True), torch.randn(V, D, requires_grad=True)
    y = torch.randint(0, V, (N,))
    for a, b in ((4, 3), (9, 5)):
        given = hidden, weight, y, torch.ones(a, 1), torch.ones(b, 1)
        ours = torch.autograd.grad(compiled(*given), (hidden, weight))
        torch.testing.assert_close(ours, torch.autograd.grad(loss(*given), (hidden, weight)))
    (found,) = proofs
    assert found.why_not == "div brings rows together, at other sizes than the example's"
    assert counters["inductor_ce"]["vocab_slabs"] == 1


def test_rows_that_guards_keep_apart(proofs: list[fuse.Proof]) -> None:
    """Turned as a matrix of one row, which a guard tells: another is compiled for."""

    def loss(hidden: Tensor, weight: Tensor, y: Tensor, a: Tensor, b: Tensor) -> Tensor:
        losses = nll(hidden @ weight.t(), y)
        return (losses * losses.detach().view(a.shape[0] - b.shape[0], -1).t().reshape(-1)).sum()

    compiled, _ = compile_without_codegen(loss, strategy="token_chunks", memory_budget=0.9, dynamic=True)
    hidden, weight = torch.randn(N, D, requires_grad=True), torch.randn(V, D, requires_grad=True)
    y = torch.randint(0, V, (N,))
    for a, b in ((4, 3), (9, 5)):
        given = hidden, weight, y, torch.ones(a, 1), torch.ones(b, 1)
        ours = torch.autograd.grad(compiled(*given), (hidden, weight))
        torch.testing.assert_close(ours, torch.autograd.grad(loss(*given), (hidden, weight)))
    assert [found.why_not for found in proofs] == ["", "div brings rows together"]


def test_sizes_that_are_numbers_are_looked_at_once(
    monkeypatch: pytest.MonkeyPatch, proofs: list[fuse.Proof]
) -> None:
    proved: list[Any] = []

    def counted(head: Any, size_of: Any) -> Any:
        proved.append(size_of)
        return prove(head, size_of)

    prove = proof._proved
    monkeypatch.setattr(proof, "_proved", counted)
    check(PROVED["mean"], "token_chunks")
    assert proved == [shapes.hint]
    torch._dynamo.reset()
    check(PROVED["mean"], "token_chunks", dynamic=True)
    assert len(proved) > 2
    assert [found.why_not for found in proofs] == ["", ""]


def test_no_other_sizes_no_proof(monkeypatch: pytest.MonkeyPatch, proofs: list[fuse.Proof]) -> None:
    monkeypatch.setattr(proof, "other_sizes", lambda sizes: [])
    check(PROVED["mean"], "vocab_slabs", dynamic=True)
    assert proofs[0].why_not == proof.NOWHERE_ELSE
