"""What is compared over a sharded vocabulary: plain torch.compile, loss_parallel, and inductor_ce."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

from torch.distributed.tensor.parallel import loss_parallel

from ..shared import compilers
from ..shared.compilers import DEFAULT, MODES, OURS
from .tasks import LossFunction

PLAIN = "torch.compile, gathering"
EAGER = "loss_parallel, eager"
BASELINE = "loss_parallel, compiled"


@dataclass(frozen=True)
class System:
    """How a loss runs: what makes it of the user's function, for a mode, and what stands round a step."""

    build: Callable[[LossFunction, str], LossFunction]
    context: Callable[[], AbstractContextManager] = nullcontext
    modes: tuple[str, ...] = MODES


def eager(function: LossFunction, mode: str) -> LossFunction:
    return function


def compiled(function: LossFunction, mode: str) -> LossFunction:
    return compilers.plain(function, mode=mode)


def ours(function: LossFunction, mode: str) -> LossFunction:
    return compilers.ours(function, mode=mode)


SYSTEMS = {
    PLAIN: System(compiled),
    EAGER: System(eager, loss_parallel, (DEFAULT,)),
    BASELINE: System(compiled, loss_parallel),
    OURS: System(ours),
}
