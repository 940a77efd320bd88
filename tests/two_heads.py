"""What losses between two linear layers are given: of a student and its teacher, or of two that learn."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

N, V, D, E = 60, 100, 4, 5  # E: the hidden size of the other side

Loss = Callable[..., Tensor]


class Given(NamedTuple):
    """Hidden states and weight of one side, of another, which has a bias, and which rows count."""

    h: Tensor
    W: Tensor
    t: Tensor
    U: Tensor
    b: Tensor
    mask: Tensor

    def to(self, dtype: torch.dtype) -> Given:
        return Given(*(x.to(dtype) for x in self[:5]), self.mask)


def given(n: int = N) -> Given:
    made = torch.randn(n, D), torch.randn(V, D), torch.randn(n, E), torch.randn(V, E), torch.randn(V)
    return Given(*made, torch.arange(n) % 3 != 0)


def frozen(t: Tensor, U: Tensor, b: Tensor | None = None) -> Tensor:
    with torch.no_grad():
        return F.linear(t, U, b)
