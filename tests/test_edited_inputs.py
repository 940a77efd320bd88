"""Buffers that a step reads for its loss and edits behind it: the backward must not read what they became.

torch.compile by itself does, where it makes anew in the backward what was made of them (torch 2.13), so the
reference is eager.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from harness import compile_with_codegen, compile_without_codegen
from torch import Tensor

from inductor_ce import ops
from inductor_ce.ops.as_read import AS_READ

N, V, D = 64, 96, 16

Step = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]


def prior(h: Tensor, w: Tensor, buffer: Tensor, y: Tensor, t: Tensor) -> Tensor:
    """Logits adjusted by a prior that is a running mean."""
    per = F.cross_entropy(h @ w.t() + buffer[:, 0].exp().log(), y, reduction="none")
    buffer[:, 0].mul_(0.5).add_(0.5)
    return per


def cloned(h: Tensor, w: Tensor, buffer: Tensor, y: Tensor, t: Tensor) -> Tensor:
    """A queue of keys as MoCo has it, into which the step's own go."""
    per = F.cross_entropy((h * t) @ buffer.clone().detach().t() * 2, y, reduction="none")
    buffer[:N].copy_(h.detach())
    return per


def temperature(h: Tensor, w: Tensor, buffer: Tensor, y: Tensor, t: Tensor) -> Tensor:
    """Frozen features and keys: eager keeps the logits, slabs would make them again."""
    per = F.cross_entropy((h.detach() @ buffer.t()) * t.exp(), y, reduction="none")
    buffer[:N].copy_(h.detach())
    return per + 0 * h.sum()


def teacher(h: Tensor, w: Tensor, buffer: Tensor, y: Tensor, t: Tensor) -> Tensor:
    target = (h.detach() @ buffer.t()).softmax(-1)
    per = -(target * (h @ w.t()).log_softmax(-1)).sum(-1)
    buffer.lerp_(w.detach(), 0.5)
    return per


def edited_first(h: Tensor, w: Tensor, buffer: Tensor, y: Tensor, t: Tensor) -> Tensor:
    buffer.mul_(0.5)
    return F.cross_entropy(h @ buffer.t(), y, reduction="none")


def divergence(h: Tensor, w: Tensor, buffer: Tensor, y: Tensor, t: Tensor) -> Tensor:
    """The entropy of what is biased, with an epsilon."""
    p = (h @ w.t() + buffer[:, 0]).softmax(-1)
    per = -(p * (p + 1e-6).log()).sum(-1)
    buffer[:, 0].mul_(-2)
    return per


def class_weights(h: Tensor, w: Tensor, buffer: Tensor, y: Tensor, t: Tensor) -> Tensor:
    """Of counts of labels so far."""
    per = F.cross_entropy(h @ w.t(), y, weight=buffer[:, 0].exp() + 1, reduction="none")
    buffer[:, 0].index_add_(0, y, torch.ones_like(h[:, 0]))
    return per


def running_mean(h: Tensor, w: Tensor, buffer: Tensor, y: Tensor, t: Tensor) -> Tensor:
    """A loss that is divided by the mean of earlier ones, and that weighs rows by it."""
    per = F.cross_entropy(h @ w.t(), y, reduction="none")
    mean = buffer[0, 0].exp()
    result = per / (mean + 1) + per * torch.sigmoid(per.detach() - mean)
    buffer[0, 0].lerp_(per.detach().mean(), 0.5)
    return result


def measured(step: Step, dtype: torch.dtype, mean: bool) -> list[Tensor]:
    """The loss, its gradients, and the buffer; upstream gradients differ from row to row but for a mean."""
    torch.manual_seed(0)
    h, w, buffer = (torch.randn(rows, D).to(dtype) for rows in (N, V, V))
    y, t, weights = torch.randint(V, (N,)), torch.tensor(0.1, dtype=dtype), torch.rand(N).to(dtype)
    leaves = [x.requires_grad_() for x in (h, w, t)]
    per = step(h, w, buffer, y, t)
    loss = per if mean else (per * weights).sum()
    gradients = torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True)
    return [loss.detach(), *gradients, buffer]


STEPS = [prior, cloned, temperature, teacher, edited_first, divergence, class_weights, running_mean]


@pytest.mark.parametrize("mean", [False, True])
@pytest.mark.parametrize("strategy", ["materialise", "token_chunks", "vocab_slabs"])
@pytest.mark.parametrize("step", STEPS)
def test_the_backward_has_what_the_loss_has_read(step: Step, strategy: str, mean: bool) -> None:
    def run(*args: Tensor) -> Tensor:
        per = step(*args)
        return per.mean() if mean else per

    compiled, graphs = compile_without_codegen(run, strategy=strategy, memory_budget=0.3)
    ours = measured(compiled, torch.float32, mean)
    assert graphs.pieces or graphs.count(ops.DIVERGENCE)
    assert graphs.count(AS_READ) == (step is not edited_first)
    for got, expected in zip(ours, measured(run, torch.float64, mean), strict=True):
        torch.testing.assert_close(got.double(), expected, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("strategy", ["materialise", "vocab_slabs"])
def test_so_it_is_in_inductors_code(strategy: str) -> None:
    compiled, _ = compile_with_codegen(prior, strategy=strategy, memory_budget=0.3)
    for got, expected in zip(
        measured(compiled, torch.float32, False), measured(prior, torch.float64, False), strict=True
    ):
        torch.testing.assert_close(got.double(), expected, rtol=2e-5, atol=2e-5)


def test_what_is_edited_and_not_read_is_not_copied() -> None:
    def run(h: Tensor, w: Tensor, seen: Tensor, y: Tensor) -> Tensor:
        seen.add_(len(y))
        return F.cross_entropy(h @ w.t(), y)

    compiled, graphs = compile_without_codegen(run)
    h, w = torch.randn(N, D, requires_grad=True), torch.randn(V, D, requires_grad=True)
    compiled(h, w, torch.zeros(()), torch.randint(V, (N,))).backward()
    assert graphs.pieces
    assert not graphs.count(AS_READ)


def test_of_a_teacher_that_follows_the_last_layers_are_copied() -> None:
    """The products before them are saved, not made again."""

    def run(h: Tensor, w: Tensor, first: Tensor, last: Tensor) -> Tensor:
        target = ((h @ first).tanh() @ last.t()).softmax(-1)
        loss = -(target * (h @ w.t()).log_softmax(-1)).sum(-1).mean()
        first.mul_(0.5)
        last.lerp_(w.detach(), 0.5)
        return loss

    def given(dtype: torch.dtype) -> list[Tensor]:
        torch.manual_seed(0)
        h, w, first, last = (torch.randn(rows, D).to(dtype) for rows in (N, V, D, V))
        return [h, w.requires_grad_(), first, last]

    compiled, graphs = compile_without_codegen(run, strategy="vocab_slabs", memory_budget=0.3)
    ours, exact = given(torch.float32), given(torch.float64)
    compiled(*ours).backward()
    run(*exact).backward()
    torch.testing.assert_close(ours[1].grad.double(), exact[1].grad, rtol=2e-5, atol=2e-5)
    (copy,) = (node for node in graphs.nodes if node.target == AS_READ)
    assert copy.meta["val"].shape == (V, D)
