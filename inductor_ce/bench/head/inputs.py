"""Shapes of heads, and what the systems get: hidden states, weight and labels, random or trained.

Letters: N rows, V vocabulary, D hidden size; h the hidden states [N, D], W the weight [V, D], y the labels,
b the bias [V], of some shapes; of some the logits z are capped, c tanh(z / c).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..shared.labels import SCATTERED, USUAL, Labels
from ..shared.losses import IGNORED
from . import trained

HeadFunction = Callable[..., Tensor]  # of h, W, y, and b where there is one


@dataclass(frozen=True)
class Shape:
    """A head of N rows: its weight is [V, D]. `labels` are those that it has where none are asked for."""

    name: str
    N: int
    V: int
    D: int
    bias: bool = False
    labels: Labels = USUAL
    cap: float | None = None

    def __str__(self) -> str:
        return f"{self.N} x {self.V} x {self.D}" + (f", soft-cap {self.cap:g}" if self.cap else "")

    @property
    def logits_bytes(self) -> int:
        """One bf16 tensor of logits [N, V]."""
        return 2 * self.N * self.V

    @property
    def gradient_bytes(self) -> int:
        """dh, dW and db in bf16, which no system can do without."""
        return 2 * ((self.N + self.V) * self.D + self.bias * self.V)

    @property
    def head(self) -> HeadFunction:
        """The head as users write it."""
        cap = self.cap
        return lambda h, W, y, b=None: cross_entropy(h, W, y, b, cap)


MLM = "mlm"
SHAPES = {
    shape.name: shape
    for shape in (
        Shape("gemma", 8192, 256000, 2304),
        Shape("gemma2", 8192, 256000, 2304, cap=30.0),
        Shape("llama", 8192, 128256, 4096),
        Shape("qwen", 16384, 151936, 896),
        Shape(MLM, 16384, 30522, 768, bias=True, labels=Labels(0.85, SCATTERED)),
    )
}


def cross_entropy(
    h: Tensor, W: Tensor, y: Tensor, b: Tensor | None = None, cap: float | None = None
) -> Tensor:
    """The linear layer in bf16, the mean loss in float32."""
    return F.cross_entropy(capped(F.linear(h, W, b).float(), cap), y, ignore_index=IGNORED)


def capped(z: Tensor, cap: float | None) -> Tensor:
    return z if cap is None else cap * torch.tanh(z / cap)


@dataclass(frozen=True)
class Inputs:
    """h and W, and b if there is one, of which gradients are wanted, and y.

    Attributes:
        about: what they are, for the record.
        drawn: the labels before some were ignored.
        cap: what the logits are capped at, if anything.
    """

    h: Tensor
    W: Tensor
    y: Tensor
    about: dict[str, Any] = field(default_factory=dict)
    b: Tensor | None = None
    drawn: Tensor | None = None
    cap: float | None = None

    @classmethod
    def of(cls, shape: Shape, h: Tensor, W: Tensor, y: Tensor, **about: Any) -> Inputs:
        """From bf16 tensors and all labels, with those ignored that usually are for the shape."""
        b = None
        if shape.bias:
            b = nn.Parameter(0.1 * torch.randn(shape.V, device=h.device).bfloat16())
        found = cls(h.requires_grad_(), nn.Parameter(W), y, about, b, y, shape.cap)
        return found.ignoring(shape.labels)

    def ignoring(self, labels: Labels) -> Inputs:
        """The same, with these labels ignored and no others."""
        assert self.drawn is not None
        mask = labels.mask(len(self.drawn))
        y = self.drawn.masked_fill(mask.to(self.drawn.device), IGNORED)
        found = replace(self, y=y)
        loss, max_probability = peak_of(found)
        about = self.about | {"loss": loss, "mean_max_probability": max_probability}
        return replace(found, about=about | {"ignored": mask.double().mean().item()})

    @property
    def leaves(self) -> dict[str, Tensor]:
        """What gradients are wanted of, by the names of these."""
        return {"dh": self.h, "dW": self.W} | ({} if self.b is None else {"db": self.b})

    @property
    def given(self) -> tuple[Tensor, ...]:
        return (self.h, self.W, self.y) if self.b is None else (self.h, self.W, self.y, self.b)

    def step(self, function: HeadFunction) -> tuple[Tensor, ...]:
        """(loss, dh, dW, and db if there is a bias): one forward and backward.

        Nothing is added to an earlier gradient.
        """
        loss = function(*self.given)
        return loss.detach(), *torch.autograd.grad(loss, [*self.leaves.values()])

    def forward(self, function: HeadFunction) -> Tensor:
        """The loss alone; no gradient is wanted."""
        with torch.no_grad():
            return function(*self.given)


def random(shape: Shape, device: str) -> Inputs:
    """Logits of variance 1, and labels that have nothing to do with them."""
    h = torch.randn(shape.N, shape.D, device=device).bfloat16()
    W = (torch.randn(shape.V, shape.D, device=device) * shape.D**-0.5).bfloat16()
    y = torch.randint(0, shape.V, (shape.N,), device=device)
    return Inputs.of(shape, h, W, y)


def from_training(shape: Shape, device: str, budget: trained.Training = trained.TRAINING) -> Inputs:
    """What a small model ends with: peaked probabilities, and labels that they were trained for."""
    h, W, y, about = trained.train(shape.N, shape.V, shape.D, device, budget)
    return Inputs.of(shape, h, W, y, **about)


ACTIVATIONS: dict[str, Callable[[Shape, str], Inputs]] = {"random": random, "trained": from_training}


def peak_of(inputs: Inputs) -> tuple[float, float]:
    """(the mean loss, the mean over the rows of the largest probability), a few rows at a time."""
    h, W, y, b = inputs.h, inputs.W, inputs.y, inputs.b
    loss, largest = 0.0, 0.0
    chunk = max(1, 2**28 // W.shape[0])
    with torch.no_grad():
        for rows in (slice(i, i + chunk) for i in range(0, h.shape[0], chunk)):
            z = capped(F.linear(h[rows], W, b).float(), inputs.cap)
            loss += F.cross_entropy(z, y[rows], ignore_index=IGNORED, reduction="sum").item()
            largest += (z.amax(dim=1) - z.logsumexp(dim=1)).exp().sum().item()
    return loss / int((y != IGNORED).sum()), largest / h.shape[0]
