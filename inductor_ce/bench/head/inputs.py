"""Shapes of heads, and what the systems get: hidden states, weight and labels, random or trained.

Letters: N rows, V vocabulary, D hidden size; h the hidden states [N, D], W the weight [V, D], y the labels.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..shared.losses import IGNORED
from . import trained

IGNORED_EVERY = 17

HeadFunction = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Shape:
    """A head of N rows: its weight is [V, D]."""

    name: str
    N: int
    V: int
    D: int

    def __str__(self) -> str:
        return f"{self.N} x {self.V} x {self.D}"

    @property
    def logits_bytes(self) -> int:
        """One bf16 tensor of logits [N, V]."""
        return 2 * self.N * self.V

    @property
    def gradient_bytes(self) -> int:
        """dh and dW in bf16, which no system can do without."""
        return 2 * (self.N + self.V) * self.D


SHAPES = {
    shape.name: shape
    for shape in (
        Shape("gemma", 8192, 256000, 2304),
        Shape("llama", 8192, 128256, 4096),
        Shape("qwen", 16384, 151936, 896),
    )
}


def cross_entropy(h: Tensor, W: Tensor, y: Tensor) -> Tensor:
    """The head as users write it: the linear layer in bf16, the mean loss in float32."""
    return F.cross_entropy(F.linear(h, W).float(), y, ignore_index=IGNORED)


@dataclass(frozen=True)
class Inputs:
    """h and W, of which gradients are wanted, and y; `about` says for the record what they are."""

    h: Tensor
    W: Tensor
    y: Tensor
    about: dict[str, Any]

    @classmethod
    def of(cls, h: Tensor, W: Tensor, y: Tensor, **about: Any) -> Inputs:
        """From bf16 tensors and labels, every 17th of which is then ignored."""
        y[::IGNORED_EVERY] = IGNORED
        loss, max_probability = peak_of(h, W, y)
        about |= {"loss": loss, "mean_max_probability": max_probability}
        return cls(h.requires_grad_(), W.requires_grad_(), y, about)

    def step(self, function: HeadFunction) -> tuple[Tensor, Tensor, Tensor]:
        """(loss, dh, dW): one forward and backward. Nothing is added to an earlier gradient."""
        loss = function(self.h, self.W, self.y)
        dh, dW = torch.autograd.grad(loss, (self.h, self.W))
        return loss.detach(), dh, dW

    def forward(self, function: HeadFunction) -> Tensor:
        """The loss alone; no gradient is wanted."""
        with torch.no_grad():
            return function(self.h, self.W, self.y)


def random(shape: Shape, device: str) -> Inputs:
    """Logits of variance 1, and labels that have nothing to do with them."""
    h = torch.randn(shape.N, shape.D, device=device).bfloat16()
    W = (torch.randn(shape.V, shape.D, device=device) * shape.D**-0.5).bfloat16()
    y = torch.randint(0, shape.V, (shape.N,), device=device)
    return Inputs.of(h, W, y)


def from_training(shape: Shape, device: str, budget: trained.Training = trained.TRAINING) -> Inputs:
    """What a small model ends with: peaked probabilities, and labels that they were trained for."""
    h, W, y, about = trained.train(shape.N, shape.V, shape.D, device, budget)
    return Inputs.of(h, W, y, **about)


ACTIVATIONS: dict[str, Callable[[Shape, str], Inputs]] = {"random": random, "trained": from_training}


def peak_of(h: Tensor, W: Tensor, y: Tensor) -> tuple[float, float]:
    """(the mean loss, the mean over the rows of the largest probability), a few rows at a time."""
    loss, largest = 0.0, 0.0
    chunk = max(1, 2**28 // W.shape[0])
    with torch.no_grad():
        for rows in (slice(i, i + chunk) for i in range(0, h.shape[0], chunk)):
            z = F.linear(h[rows], W).float()
            loss += F.cross_entropy(z, y[rows], ignore_index=IGNORED, reduction="sum").item()
            largest += (z.amax(dim=1) - z.logsumexp(dim=1)).exp().sum().item()
    return loss / int((y != IGNORED).sum()), largest / h.shape[0]
