"""Work that stands for the body of a model: a GPU is busy with it while the host comes to the head.

In a training step labels are there when the step begins, and hidden states when the body has ended. Whoever
looks at labels before the head has that long. A head that is measured alone would have no time.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor

SIZE, TIMES = 8192, 6  # products of matrices: about 10 ms on an H100

_ends: list[torch.cuda.Event] = []
_times = [TIMES]  # the work of a call, in products


def occupy(products: int) -> None:
    """Give the GPU so many products of matrices to do, and return."""
    factor = torch.ones(SIZE, SIZE, dtype=torch.bfloat16, device="cuda")
    for _ in range(products):
        torch.mm(factor, factor)


@torch.library.custom_op("inductor_ce_bench::body", mutates_args=())
def body(x: Tensor) -> Tensor:
    """A copy of x, behind the work. The time when it ends is that of `last_end`."""
    if x.is_cuda:
        occupy(_times[-1])
    made = x.clone()
    if x.is_cuda:
        _ends[:] = [torch.cuda.Event(enable_timing=True)]
        _ends[0].record()
    return made


@body.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


body.register_autograd(lambda ctx, upstream: upstream)


@contextlib.contextmanager
def without_work() -> Iterator[None]:
    """No body, though compiled functions call it: x is copied alone."""
    _times.append(0)
    try:
        yield
    finally:
        _times.pop()


def last_end() -> torch.cuda.Event:
    """Recorded when the work of the last call was behind."""
    (end,) = _ends
    return end
