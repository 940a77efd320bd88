"""What is computed over a sharded vocabulary: a loss of given logits, or of hidden states and a head.

Letters: N rows, V vocabulary, D hidden size, z the logits [N, V], h the hidden states [N, D], W the head
[V, D], y the labels [N]. The vocabulary is sharded over all ranks, the rest is on each of them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, ClassVar

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard, distribute_tensor

from ..shared.losses import IGNORED, LOSSES, Loss, errors

IGNORED_EVERY = 17
D = 4096
PLAIN, RICH = LOSSES["plain"], LOSSES["smooth_z_cap"]

LossFunction = Callable[[Any, DTensor], Any]


def given_logits(held: Any) -> Any:
    return held.logits


def logits_of_hidden(held: Any) -> Any:
    return F.linear(held.h, held.W)


def logits_of_shared_hidden(held: Any) -> Any:
    """As ColwiseParallel does it for hidden states of which each rank has a part of the sequence."""
    return F.linear(held.h.redistribute(placements=[Replicate()]), held.W)


class Task(ABC):
    """A loss of logits, and the tensors these are of: whole on every rank to check it, and as DTensors.

    NOTE The DTensors are the parameters of a module: CUDA graphs read parameters where they lie, and copy
    other inputs first.

    Attributes:
        logits: of the module, as a user writes them.
        loss: what is computed of them and of the labels.
        roundings: how many times a gradient is rounded to its dtype on the way to it.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    roundings: ClassVar[int]
    loss: ClassVar[Loss] = PLAIN

    def __init__(
        self,
        mesh: DeviceMesh,
        logits: Callable[[Any], Any],
        y: Tensor,
        whole: dict[str, Tensor],
        placements: dict[str, Placement],
    ):
        self.mesh, self.logits, self.y, self.whole = mesh, logits, y, whole
        self.held: Any = nn.Module()
        for name, placement in placements.items():
            x = distribute_tensor(whole[name], mesh, [placement], src_data_rank=None)
            self.held.register_parameter(name, nn.Parameter(x))
        self.labels = DTensor.from_local(y, mesh, [Replicate()], run_check=False)

    def function(self, gathered: bool = False) -> LossFunction:
        """The loss of the module and the labels; `gathered` has each rank hold all logits first."""
        logits, loss = self.logits, self.loss.function

        def function(held: Any, y: DTensor) -> Any:
            z = logits(held)
            return loss(z.redistribute(placements=[Replicate()]) if gathered else z, y)

        return function

    def step(self, function: LossFunction, context: AbstractContextManager) -> dict[str, DTensor]:
        """The loss, and the gradients by name: one forward and backward, nothing added to an earlier one."""
        names, leaves = zip(*self.held.named_parameters(), strict=True)
        with context:
            loss = function(self.held, self.labels)
            gradients = torch.autograd.grad(loss, leaves)
        return {"loss": loss.detach(), **dict(zip(names, gradients, strict=True))}

    def columns(self, V: int) -> slice:
        """Those of this rank, by DTensor's rule."""
        block = -(-V // self.mesh.size())
        start = min(V, self.mesh.get_local_rank() * block)
        return slice(start, min(V, start + block))

    @abstractmethod
    def errors(self, found: dict[str, DTensor]) -> dict[str, float]:
        """The relative errors on this rank of what `step` gives, against float64. All ranks call."""


class LogitsGiven(Task):
    name, title = "loss", "logits given"
    roundings = 1

    def __init__(self, mesh: DeviceMesh, N: int, V: int, device: str):
        y = labels(N, V, device)
        z = 3 * torch.randn(N, V, dtype=torch.bfloat16, device=device)
        super().__init__(mesh, given_logits, y, {"logits": from_first(z)}, {"logits": Shard(1)})

    def errors(self, found: dict[str, DTensor]) -> dict[str, float]:
        z = self.whole["logits"]
        dz = found["logits"].redistribute(placements=[Shard(1)]).to_local()
        value = found["loss"].full_tensor()
        loss, gradient = errors(self.loss, z, self.y, value, dz, self.columns(z.shape[1]))
        return {"loss": loss, "logits": gradient}


class RichLoss(LogitsGiven):
    """Which loss_parallel has nothing for."""

    name, title = "rich", f"logits given, {RICH.title}"
    loss = RICH


class LinearAndLoss(Task):
    name, title = "linear", f"linear (D = {D}) and loss"
    roundings = 2
    form: ClassVar[Any] = staticmethod(logits_of_hidden)
    hidden: ClassVar[Placement] = Replicate()

    def __init__(self, mesh: DeviceMesh, N: int, V: int, device: str, width: int = D):
        y = labels(N, V, device)
        h = torch.randn(N, width, dtype=torch.bfloat16, device=device)
        W = 3 * width**-0.5 * torch.randn(V, width, dtype=torch.bfloat16, device=device)
        whole = {"h": from_first(h), "W": from_first(W)}
        super().__init__(mesh, self.form, y, whole, {"h": self.hidden, "W": Shard(0)})

    def errors(self, found: dict[str, DTensor]) -> dict[str, float]:
        h, W = self.whole["h"], self.whole["W"]
        loss, dh, dW = exact(h, W, self.y, self.columns(W.shape[0]))
        whole_dh: Any = found["h"].double()
        own_dW = found["W"].redistribute(placements=[Shard(0)])
        given = found["loss"].full_tensor(), whole_dh.full_tensor(), own_dW.to_local()
        return {
            name: relative(x, y) for name, x, y in zip(("loss", "h", "W"), given, (loss, dh, dW), strict=True)
        }


class SequenceAndLoss(LinearAndLoss):
    """The same of hidden states that ranks share."""

    name, title = "sequence", "the same of hidden states sharded by sequence"
    form = staticmethod(logits_of_shared_hidden)
    hidden = Shard(0)


TASKS: dict[str, Callable[[DeviceMesh, int, int, str], LogitsGiven | LinearAndLoss]] = {
    "loss": LogitsGiven,
    "rich": RichLoss,
    "linear": LinearAndLoss,
    "sequence": SequenceAndLoss,
}
TITLES = {task.name: task.title for task in (LogitsGiven, RichLoss, LinearAndLoss, SequenceAndLoss)}


def labels(N: int, V: int, device: str) -> Tensor:
    y = torch.randint(0, V, (N,), device=device)
    y[::IGNORED_EVERY] = IGNORED
    return from_first(y)


def from_first(x: Tensor) -> Tensor:
    """The tensor of the first rank, on every rank."""
    dist.broadcast(x, 0)
    return x


def exact(h: Tensor, W: Tensor, y: Tensor, columns: slice) -> tuple[Tensor, Tensor, Tensor]:
    """(loss, dh, dW of these columns) in float64 of logits that are rounded to the dtype of h."""
    head, valid = W.double(), (y != IGNORED).sum()
    loss, dh = head.new_zeros(()), torch.empty_like(h, dtype=torch.float64)
    dW = torch.zeros_like(head[columns])
    chunk = max(1, 2**25 // W.shape[0])
    for rows in (slice(i, i + chunk) for i in range(0, h.shape[0], chunk)):
        hidden = h[rows].double()
        z = (hidden @ head.T).to(h.dtype).double().requires_grad_()
        part = PLAIN.rows(z, y[rows]).sum() / valid
        (dz,) = torch.autograd.grad(part, z)
        loss += part.detach()
        dh[rows] = dz @ head
        dW += dz[:, columns].T @ hidden
    return loss, dh, dW


def relative(found: Tensor, expected: Tensor) -> float:
    """‖found - expected‖ / ‖expected‖; 0 where there is nothing to compare."""
    distance = torch.linalg.vector_norm(found.double() - expected)
    return (distance / torch.linalg.vector_norm(expected)).item() if expected.numel() else 0.0
