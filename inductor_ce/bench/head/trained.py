"""A small model of synthetic bigrams, trained until its probabilities are peaked as a language model's are.

NOTE why not random activations alone
Random logits give every token a probability of about 1/V. Systems that skip small probabilities then skip the
whole gradient, and errors of a probability near 1 are never seen.
"""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

CONTEXTS = 4096  # what the model can tell apart of the token before
SUCCESSORS = 16  # likely next tokens of a context, each half as likely as the one before
LIKELY = 0.8  # how often the next token is one of them; else it is drawn by frequency
WIDTH = 1024


@dataclass(frozen=True)
class Training:
    """How long to train: `steps` steps of `tokens` tokens, but no longer than `seconds`."""

    steps: int = 300
    tokens: int = 4096
    chunk: int = 2048
    seconds: float = 60.0
    seed: int = 0


TRAINING = Training()


class Bigrams:
    """Pairs (context, next token) over a vocabulary of V whose frequencies follow Zipf's law."""

    def __init__(self, V: int, device: str, seed: int):
        self.generator = torch.Generator(device).manual_seed(seed)
        self.device = device
        self.cumulative = torch.arange(1, V + 1, device=device, dtype=torch.float64).reciprocal().cumsum(0)
        self.successors = self._by_frequency(CONTEXTS * SUCCESSORS).view(CONTEXTS, SUCCESSORS)

    def draw(self, count: int) -> tuple[Tensor, Tensor]:
        """(contexts [count], tokens [count])."""
        context = self._by_frequency(count) % CONTEXTS
        halvings = self._uniform(count).log2().neg().long().clamp(max=SUCCESSORS - 1)
        likely = self._uniform(count) < LIKELY
        return context, torch.where(likely, self.successors[context, halvings], self._by_frequency(count))

    def _by_frequency(self, count: int) -> Tensor:
        V = len(self.cumulative)
        return torch.searchsorted(self.cumulative, self._uniform(count) * self.cumulative[-1]).clamp(
            max=V - 1
        )

    def _uniform(self, count: int) -> Tensor:
        """In (0, 1]."""
        return 1 - torch.rand(count, generator=self.generator, device=self.device, dtype=torch.float64)


class Model(nn.Module):
    """An embedding of the context and a small MLP; the head's weight [V, D] beside them."""

    def __init__(self, V: int, D: int):
        super().__init__()
        self.embedding = nn.Embedding(CONTEXTS, D)
        self.up, self.down = nn.Linear(D, WIDTH), nn.Linear(WIDTH, D)
        self.weight = nn.Parameter(torch.randn(V, D) * D**-0.5)

    def forward(self, context: Tensor) -> Tensor:
        """The hidden states [N, D], of mean square 1."""
        x = self.embedding(context)
        x = x + self.down(F.gelu(self.up(x)))
        return F.rms_norm(x, x.shape[-1:])


def train(
    N: int, V: int, D: int, device: str, budget: Training
) -> tuple[Tensor, Tensor, Tensor, dict[str, Any]]:
    """(h [N, D] and W [V, D] in bf16, y [N], what to say of them) of a model trained from its seed."""
    bigrams = Bigrams(V, device, budget.seed)
    with torch.random.fork_rng(), torch.device(device):
        torch.manual_seed(budget.seed)
        model = Model(V, D)
    steps, seconds = _descend(model, bigrams, budget, D)
    with torch.no_grad():
        context, y = bigrams.draw(N)
        h, W = model(context).bfloat16(), model.weight.bfloat16()
    return h, W, y, {"training": asdict(budget) | {"steps_done": steps, "seconds_taken": seconds}}


def _descend(model: Model, bigrams: Bigrams, budget: Training, D: int) -> tuple[int, float]:
    """(steps taken, seconds). A step of Adam moves a logit by the sum over D of its rate: hence 1/D."""
    body = [p for p in model.parameters() if p is not model.weight]
    rates = [{"params": body, "lr": 2e-3}, {"params": [model.weight], "lr": 1 / D}]
    fused = model.weight.is_cuda or None
    optimizer = torch.optim.Adam(rates, betas=(0.9, 0.95), fused=fused)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, budget.steps)
    start = time.perf_counter()
    for step in range(budget.steps):
        if time.perf_counter() - start > budget.seconds:
            return step, time.perf_counter() - start
        _backward(model, *bigrams.draw(budget.tokens), budget.chunk)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if model.weight.is_cuda:
            torch.cuda.synchronize()
    return budget.steps, time.perf_counter() - start


def _backward(model: Model, context: Tensor, y: Tensor, chunk: int) -> None:
    """The gradient of the mean loss, `chunk` rows of logits at a time."""
    hidden = model(context)
    h = hidden.detach().requires_grad_()
    for rows, labels in zip(h.split(chunk), y.split(chunk), strict=True):
        with torch.autocast(h.device.type, torch.bfloat16):
            z = F.linear(rows, model.weight)
        (F.cross_entropy(z.float(), labels, reduction="sum") / len(y)).backward()
    hidden.backward(h.grad)
