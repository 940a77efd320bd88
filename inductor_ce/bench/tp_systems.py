"""What is compared over a sharded vocabulary: plain torch.compile, loss_parallel, and inductor_ce."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch.distributed.tensor.parallel import loss_parallel

from ..api.backend import inductor_ce_backend
from .systems import fresh
from .tp_tasks import LossFunction

PLAIN = "torch.compile, gathering"
EAGER = "loss_parallel, eager"
BASELINE = "loss_parallel, compiled"
OURS = "inductor_ce"

DEFAULT, GRAPHS = "default", "reduce-overhead"
MODES = (DEFAULT, GRAPHS)


@dataclass(frozen=True)
class System:
    """How a loss runs: what makes it of the user's function, for a mode, and what stands round a step."""

    build: Callable[[LossFunction, str], LossFunction]
    context: Callable[[], AbstractContextManager] = nullcontext
    modes: tuple[str, ...] = MODES


def eager(function: LossFunction, mode: str) -> LossFunction:
    return function


def compiled(function: LossFunction, mode: str) -> LossFunction:
    return torch.compile(fresh(function), fullgraph=True, dynamic=False, mode=mode)


def ours(function: LossFunction, mode: str) -> LossFunction:
    backend = inductor_ce_backend
    return torch.compile(fresh(function), backend=backend, fullgraph=True, dynamic=False, mode=mode)


SYSTEMS = {
    PLAIN: System(compiled),
    EAGER: System(eager, loss_parallel, (DEFAULT,)),
    BASELINE: System(compiled, loss_parallel),
    OURS: System(ours),
}
