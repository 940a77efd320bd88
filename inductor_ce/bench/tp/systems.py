"""What is compared over a sharded vocabulary: gathered logits, loss_parallel, peers, and inductor_ce."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor.parallel import loss_parallel

from ..shared import compilers
from ..shared.compilers import DEFAULT, MODES, OURS
from ..shared.losses import IGNORED
from ..shared.peers import NotOffered, find
from .tasks import LossFunction, Task

PLAIN = "torch.compile, gathering"
EAGER = "loss_parallel, eager"
BASELINE = "loss_parallel, compiled"
LIGER, ENGINE = "Liger, vocabulary parallel", "TransformerEngine, parallel"

RICH = "rich"  # the task that loss_parallel cannot do
OF_LOSS_PARALLEL = ("loss", "linear", "sequence")


@dataclass(frozen=True)
class System:
    """How a loss runs: what makes it of a task, for a mode, what stands round a step, and where it serves."""

    build: Callable[[Task, str], LossFunction | NotOffered]
    context: Callable[[], AbstractContextManager] = nullcontext
    modes: tuple[str, ...] = MODES
    tasks: tuple[str, ...] = (*OF_LOSS_PARALLEL, RICH)

    def serves(self, task: str, mode: str) -> bool:
        return task in self.tasks and mode in self.modes


def eager(task: Task, mode: str) -> LossFunction:
    return task.function()


def compiled(task: Task, mode: str) -> LossFunction:
    return compilers.plain(task.function(), mode=mode)


def gathering(task: Task, mode: str) -> LossFunction:
    return compilers.plain(task.function(gathered=True), mode=mode)


def ours(task: Task, mode: str) -> LossFunction:
    return compilers.ours(task.function(), mode=mode)


def liger(task: Task, mode: str) -> LossFunction | NotOffered:
    module = find("liger_kernel.transformers", "LigerVocabParallelCrossEntropy")
    if isinstance(module, NotOffered):
        return module
    loss, group = module(ignore_index=IGNORED), task.mesh.get_group()
    return of_rows(task, lambda z, y: loss(z[:, None], y[:, None], group))


def transformer_engine(task: Task, mode: str) -> LossFunction | NotOffered:
    """Of a copy of the logits, which its backward writes the gradient over."""
    loss = find("transformer_engine.pytorch", "parallel_cross_entropy")
    if isinstance(loss, NotOffered):
        return loss
    group = task.mesh.get_group()
    return of_rows(task, lambda z, y: loss(z.clone()[:, None], y[:, None], 0.0, False, group, IGNORED))


def of_rows(task: Task, rows: Callable[[Tensor, Tensor], Tensor]) -> LossFunction:
    """The mean over the rows that count, of the losses of rows that are given this rank's columns.

    NOTE A peer may take the gradient that comes to it as dense: it is a product with weights, not expanded.
    """

    def function(held: Any, y: DTensor) -> DTensor:
        counts = (task.y != IGNORED).float()
        losses = rows(held.logits.to_local(), task.y).flatten()
        mean = (losses * (counts / counts.sum())).sum()
        return DTensor.from_local(mean, task.mesh, [Replicate()], run_check=False)

    return function


SYSTEMS = {
    PLAIN: System(gathering),
    EAGER: System(eager, loss_parallel, (DEFAULT,), OF_LOSS_PARALLEL),
    BASELINE: System(compiled, loss_parallel, tasks=OF_LOSS_PARALLEL),
    LIGER: System(liger, modes=(DEFAULT,), tasks=("loss",)),
    ENGINE: System(transformer_engine, modes=(DEFAULT,), tasks=("loss",)),
    OURS: System(ours),
}


def baseline(task: str) -> str:
    """What the others are compared with."""
    return BASELINE if task in OF_LOSS_PARALLEL else PLAIN
