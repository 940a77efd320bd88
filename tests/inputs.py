"""Random logits and labels, as most tests want them."""

from __future__ import annotations

import torch
from torch import Tensor


def logits(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Of a size at which the softmax is neither flat nor one column."""
    return (3 * torch.randn(shape)).to(dtype)


def labels(*shape: int, classes: int, ignore_index: int = -100, every: int = 3) -> Tensor:
    """The first of every so many is ignored; the first and the last class are among the rest."""
    y = torch.randint(0, classes, shape)
    flat = y.view(-1)
    flat[::every] = ignore_index
    flat[1:3] = torch.tensor([0, classes - 1])[: len(flat[1:3])]
    return y
