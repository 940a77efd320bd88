"""What the systems get: logits and labels."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..shared.losses import IGNORED, LossFunction

IGNORED_EVERY = 17


@dataclass(frozen=True)
class Inputs:
    """`logits` [N, V] as the systems get them, `y` [N], and `pristine`: the logits as they were drawn."""

    logits: Tensor
    y: Tensor
    pristine: Tensor

    @classmethod
    def random(cls, N: int, V: int, device: str) -> Inputs:
        pristine = 3 * torch.randn(N, V, dtype=torch.bfloat16, device=device)
        y = torch.randint(0, V, (N,), device=device)
        y[::IGNORED_EVERY] = IGNORED
        return cls(pristine.clone().requires_grad_(), y, pristine)

    def restore(self) -> None:
        """Undo what a system that writes over its input has done."""
        with torch.no_grad():
            self.logits.copy_(self.pristine)

    def step(self, function: LossFunction) -> tuple[Tensor, Tensor]:
        """(loss, dz): one forward and backward. Nothing is added to an earlier gradient."""
        loss = function(self.logits, self.y)
        (dz,) = torch.autograd.grad(loss, self.logits)
        return loss.detach(), dz
