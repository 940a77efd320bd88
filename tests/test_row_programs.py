"""What lies between the statistics and the coefficients of a row, read as a program of that row."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from harness import compile_without_codegen
from head_cases import counts
from torch import Tensor

from inductor_ce import ops
from inductor_ce.ops import row_program

B, T, D, V = 3, 16, 8, 64
Loss = Callable[[Tensor, Tensor], Tensor]


def given(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    h = torch.randn(B, T, D, dtype=dtype).requires_grad_()
    w = torch.randn(V, D, dtype=dtype).requires_grad_()
    y = torch.randint(0, V, (B, T))
    y[:, ::5] = -100
    return h, w, y


def mean(z: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(z.flatten(0, 1), y.flatten())


def smoothed_with_z_loss(z: Tensor, y: Tensor) -> Tensor:
    z_loss = 1e-2 * z.logsumexp(-1).square().mean()
    return F.cross_entropy(z.flatten(0, 1), y.flatten(), label_smoothing=0.1) + z_loss


def picked(z: Tensor, y: Tensor) -> Tensor:
    return z.log_softmax(-1).gather(-1, y.clamp(min=0)[..., None])[..., 0]


def clipped(z: Tensor, y: Tensor) -> Tensor:
    """As policies are trained: a ratio that is clipped, advantages, a mask."""
    log_p = picked(z, y)
    ratio, advantage = (
        (log_p - log_p.detach() + 0.05 * torch.sin(y.to(z.dtype))).exp(),
        torch.cos(y.to(z.dtype)),
    )
    surrogate = torch.min(ratio * advantage, ratio.clamp(0.98, 1.02) * advantage)
    kept = (y >= 0).to(z.dtype)
    return -(surrogate * kept).sum() / kept.sum()


def focal(z: Tensor, y: Tensor) -> Tensor:
    log_p = picked(z, y)
    return -((1 - log_p.exp()) * log_p * (y >= 0)).mean()


def weighed(z: Tensor, y: Tensor) -> Tensor:
    weights = torch.linspace(0.5, 2, y.numel(), dtype=z.dtype).view_as(y)
    losses = F.cross_entropy(z.flatten(0, 1), y.flatten(), reduction="none").view_as(y)
    return (losses * weights).sum() / weights.sum()


def as_truth(z: Tensor, y: Tensor) -> Tensor:
    """A number as a truth value: 1, whatever it is."""
    log_p = picked(z, y)
    return (log_p * log_p.bool()).mean()


def masked_truth(z: Tensor, y: Tensor) -> Tensor:
    """Literals that are truth values, and labels that stand for some."""
    log_p = picked(z, y)
    is_likely = (log_p > -4) | torch.logical_and(log_p < -5, y)
    return torch.where(is_likely.masked_fill(y < 0, False), log_p, 0.3 * log_p).mean()


def alike_literals(z: Tensor, y: Tensor) -> Tensor:
    """True and 1.0 are equal in Python; the sum of truth values is another than that of numbers."""
    log_p = picked(z, y)
    likely, possible = log_p > -4, log_p > -5
    either = torch.where(likely, True, False) | torch.where(possible, True, False)
    count = torch.where(likely, 1.0, 0.0) + torch.where(possible, 1.0, 0.0)
    return (torch.where(either, log_p, 0.5 * log_p) * count).mean()


def literals_of_16_bits(z: Tensor, y: Tensor) -> Tensor:
    """0.1 is 0.10009765625 in bfloat16, and 2.7 is 2 in integers."""
    log_p = picked(z, y)
    tenth = torch.full((), 0.1, dtype=torch.bfloat16)
    return (log_p * tenth).exp().mean() + (log_p * torch.full((), 2.7, dtype=torch.int64)).exp().mean()


OF_NUMBERS = mean, smoothed_with_z_loss, clipped, focal, weighed
OF_TRUTHS = as_truth, masked_truth, alike_literals, literals_of_16_bits
READ = {f.__name__: f for f in OF_NUMBERS + OF_TRUTHS}


def made(loss: Loss, dtype: torch.dtype, **options: object) -> tuple[list[Tensor], list[Tensor], object]:
    h, w, y = given(dtype)
    compiled, graphs = compile_without_codegen(
        lambda h, w, y: loss(h @ w.t(), y), strategy="token_chunks", memory_budget=0.8, **options
    )
    ours = torch.autograd.grad(compiled(h, w, y), (h, w))
    h, w = (x.detach().double().requires_grad_() for x in (h, w))
    exact = torch.autograd.grad(loss(h @ w.t(), y), (h, w))
    return list(ours), list(exact), graphs


@pytest.mark.parametrize("name", READ)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_it_is_read(name: str, dtype: torch.dtype) -> None:
    ours, exact, graphs = made(READ[name], dtype)
    assert counts() == {"token_chunks": 1}
    both = [ops.ROW_STATS_GRAD, ops.SOME_ROW_STATS_GRAD]
    is_read = dtype == torch.float32  # the words of the template are of 32 bits
    assert (sum(map(graphs.count, both)) > 1) == is_read
    assert (graphs.count(ops.ROW_STATS) + graphs.count(ops.SOME_ROW_STATS) > 1) != is_read
    for own, right in zip(ours, exact, strict=True):
        torch.testing.assert_close(own.double(), right, rtol=1e-4, atol=1e-6)


def test_numbers_of_16_bits_are_read() -> None:
    """A normaliser, and a loss for each row, that 16 bits round: the gradients are no worse than eager's."""

    def loss(z: Tensor, y: Tensor) -> Tensor:
        losses = F.cross_entropy(z.flatten(0, 1), y.flatten(), reduction="none")
        return losses.mean() + 1e-2 * z.logsumexp(-1).square().mean()

    h, w, y = (x.detach() for x in given(torch.float32))
    h, w = h.bfloat16().requires_grad_(), w.bfloat16().requires_grad_()
    compiled, graphs = compile_without_codegen(
        lambda h, w, y: loss(h @ w.t(), y), strategy="token_chunks", memory_budget=0.9
    )
    ours = torch.autograd.grad(compiled(h, w, y), (h, w))
    assert graphs.count(ops.ROW_STATS_GRAD) + graphs.count(ops.SOME_ROW_STATS_GRAD) > 1
    eager = torch.autograd.grad(loss(h @ w.t(), y), (h, w))
    h, w = (x.detach().double().requires_grad_() for x in (h, w))
    exact = torch.autograd.grad(loss(h @ w.t(), y), (h, w))
    for own, naive, right in zip(ours, eager, exact, strict=True):
        assert (own.double() - right).norm() <= 1.05 * (naive.double() - right).norm()


def test_what_needs_no_statistics_is_given_once() -> None:
    """Of a mean the share of each row alone: its negative, and what is made of it, are steps."""
    *_, graphs = made(smoothed_with_z_loss, torch.float32)
    nodes = [n for n in graphs.nodes if n.target in (ops.ROW_STATS_GRAD, ops.SOME_ROW_STATS_GRAD)]
    programs = {n.args[5] for n in nodes}
    assert len(programs) == 1, "all pieces have one program"
    program = row_program.decode(programs.pop())
    assert program.n_given == len(nodes[0].args[4]) <= 3
    assert {step.name for step in program.steps} >= {"log", "div", "neg"}


def of_two(z: Tensor, y: Tensor) -> Tensor:
    """A part of the rows has a loss of its own, whose coefficients are put together from both."""
    log_p = picked(z, y)
    return -log_p[:, :3].mean() - 2 * log_p[:, 3:].square().mean()


def powers(z: Tensor, y: Tensor) -> Tensor:
    """Statistics in float64."""
    return (z.softmax(-1) ** 2).sum(-1).mean() - picked(z, y).mean()


def clipped_with_entropy(z: Tensor, y: Tensor) -> Tensor:
    """A sum beside the normaliser that two kernels make faster."""
    entropy = -(z.softmax(-1) * z.log_softmax(-1)).sum(-1)
    kept = (y >= 0).to(z.dtype)
    return clipped(z, y) - 0.01 * (entropy * kept).sum() / kept.sum()


def of_two_sums(z: Tensor, y: Tensor) -> Tensor:
    """Which two kernels make in one sweep."""
    p = z.softmax(-1)
    return F.cross_entropy(z.flatten(0, 1), y.flatten(), label_smoothing=0.1) + (p * p.log()).sum(-1).mean()


def against_float64(z: Tensor, y: Tensor) -> Tensor:
    """A comparison in float64, which the template has not."""
    log_p = picked(z, y)
    return torch.where(log_p > -4 - 1e-9 * y.double(), log_p, 0.3 * log_p).mean()


def sum_of_truths(z: Tensor, y: Tensor) -> Tensor:
    """Of two that are true Triton would make 0."""
    log_p = picked(z, y)
    return torch.where((log_p > -4) + (y > 5), log_p, 0.3 * log_p).mean()


def exp_of_truth(z: Tensor, y: Tensor) -> Tensor:
    """Triton has none."""
    log_p = picked(z, y)
    return (log_p * (log_p > -4).exp()).mean()


def one_more(z: Tensor, y: Tensor) -> Tensor:
    """So many numbers that they are none of each row."""
    log_p = picked(z, y)
    return torch.cat([log_p.new_zeros(1), log_p.flatten()])[1:].square().mean()


OF_TWO_KERNELS = of_two, powers, clipped_with_entropy, of_two_sums
BEYOND_TRITON = against_float64, sum_of_truths, exp_of_truth, one_more
UNREAD = {f.__name__: f for f in OF_TWO_KERNELS + BEYOND_TRITON}


@pytest.mark.parametrize("name", UNREAD)
def test_what_is_not_read_is_made_of_two(name: str) -> None:
    ours, exact, graphs = made(UNREAD[name], torch.float32)
    assert counts() == {"token_chunks": 1}
    assert graphs.count(ops.ROW_STATS_GRAD) == graphs.count(ops.SOME_ROW_STATS_GRAD) == 0
    for own, right in zip(ours, exact, strict=True):
        torch.testing.assert_close(own.double(), right, rtol=1e-4, atol=1e-6)


def test_symbolic_sizes() -> None:
    compiled, graphs = compile_without_codegen(
        lambda h, w, y: mean(h @ w.t(), y), strategy="token_chunks", memory_budget=0.8, dynamic=True
    )
    h, w, y = given(torch.float32)
    for n in (T, T - 3, T - 7):
        ours = torch.autograd.grad(compiled(h[:, :n], w, y[:, :n]), (h, w))
        expected = torch.autograd.grad(mean(h[:, :n] @ w.t(), y[:, :n]), (h, w))
        for own, right in zip(ours, expected, strict=True):
            torch.testing.assert_close(own, right, rtol=1e-4, atol=1e-6)
    assert graphs.count(ops.ROW_STATS_GRAD) + graphs.count(ops.SOME_ROW_STATS_GRAD) > 1


def test_a_product_of_one_batch() -> None:
    """Its second dimension is that of the rows, of which no more is to be known than that they are there."""
    compiled, graphs = compile_without_codegen(
        lambda h, w, y: mean(torch.bmm(h.reshape(1, -1, D), w.t()[None]).view(*y.shape, V), y),
        strategy="token_chunks",
        memory_budget=0.8,
        dynamic=True,
    )
    h, w, y = given(torch.float32)
    for n in (T, T - 3, T - 7):
        h, y = (x[:, :n].detach().clone() for x in (h, y))
        h.requires_grad_()
        ours = torch.autograd.grad(compiled(h, w, y), (h, w))
        for own, right in zip(ours, torch.autograd.grad(mean(h @ w.t(), y), (h, w)), strict=True):
            torch.testing.assert_close(own, right, rtol=1e-4, atol=1e-6)
    assert counts() == {"token_chunks": 1}, "compiled again for other rows"
    assert graphs.count(ops.ROW_STATS_GRAD) + graphs.count(ops.SOME_ROW_STATS_GRAD) > 1


def by_a_size(z: Tensor, y: Tensor) -> Tensor:
    return (picked(z, y) / y.numel()).exp().mean()


def up_to_a_size(z: Tensor, y: Tensor) -> Tensor:
    return picked(z, y).clamp(min=-0.3 * y.shape[1], max=y.shape[1]).exp().mean()


@pytest.mark.parametrize("loss", [by_a_size, up_to_a_size])
def test_symbolic_sizes_between(loss: Loss) -> None:
    """A size is no tensor: the head is in pieces all the same."""
    compiled, graphs = compile_without_codegen(
        lambda h, w, y: loss(h @ w.t(), y), strategy="token_chunks", memory_budget=0.8, dynamic=True
    )
    h, w, y = given(torch.float32)
    ours = torch.autograd.grad(compiled(h, w, y), (h, w))
    assert graphs.pieces > 1
    for own, right in zip(ours, torch.autograd.grad(loss(h @ w.t(), y), (h, w)), strict=True):
        torch.testing.assert_close(own, right, rtol=1e-4, atol=1e-6)
