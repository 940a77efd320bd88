"""The losses that are timed: in plain PyTorch as users write them, and row by row for float64.

Letters: N rows, V vocabulary, z the logits [N, V], y the labels [N], IGNORED where a row has none.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORED = -100
SMOOTHING = 0.1
Z_LOSS = 1e-4
SOFT_CAP = 30.0
ENTROPY = 1e-2

LossFunction = Callable[[Tensor, Tensor], Tensor]


def jsd_of_entries(log_p: Tensor, log_q: Tensor, beta: float) -> Tensor:
    """What sums up to beta KL(q || m) + (1 - beta) KL(p || m), with m = beta q + (1 - beta) p: TRL's GKD.

    Args:
        log_p, log_q: log-probabilities of a student and its teacher, [..., V].
        beta: of the teacher in the mixture, which a logsumexp makes.
    """
    weight = torch.tensor(beta, dtype=log_p.dtype, device=log_p.device)
    log_m = torch.logsumexp(torch.stack([log_p + torch.log1p(-weight), log_q + torch.log(weight)]), dim=0)
    to_teacher = F.kl_div(log_m, log_q, reduction="none", log_target=True)
    to_student = F.kl_div(log_m, log_p, reduction="none", log_target=True)
    return weight * to_teacher + (1 - weight) * to_student


def cross_entropy(logits: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(logits.float(), y)


def smoothed_with_z_loss(logits: Tensor, y: Tensor) -> Tensor:
    x = logits.float()
    valid = y != IGNORED
    z_loss = torch.where(valid, torch.logsumexp(x, dim=-1) ** 2, 0.0).sum() / valid.sum()
    return F.cross_entropy(x, y, label_smoothing=SMOOTHING) + Z_LOSS * z_loss


def smoothed_with_z_loss_and_soft_cap(logits: Tensor, y: Tensor) -> Tensor:
    x = logits.float()
    x = SOFT_CAP * torch.tanh(x / SOFT_CAP)
    valid = y != IGNORED
    z_loss = torch.where(valid, torch.logsumexp(x, dim=-1) ** 2, 0.0).sum() / valid.sum()
    return F.cross_entropy(x, y, label_smoothing=SMOOTHING) + Z_LOSS * z_loss


def with_entropy_bonus(logits: Tensor, y: Tensor) -> Tensor:
    """The mean over the rows that count, as in reinforcement learning."""
    valid = y != IGNORED
    logp = F.log_softmax(logits.float(), dim=-1)
    picked = logp.gather(-1, torch.where(valid, y, 0).unsqueeze(-1)).squeeze(-1)
    entropy = -(logp.exp() * logp).sum(-1)
    return -torch.where(valid, picked + ENTROPY * entropy, 0.0).sum() / valid.sum()


@dataclass(frozen=True)
class Loss:
    """A loss with its parameters, from which peers and the float64 reference are set up; 0 is without."""

    name: str
    title: str
    function: LossFunction
    smoothing: float = 0.0
    z_loss: float = 0.0
    soft_cap: float = 0.0
    entropy: float = 0.0

    @property
    def is_plain(self) -> bool:
        return not (self.smoothing or self.z_loss or self.soft_cap or self.entropy)

    def rows(self, z: Tensor, y: Tensor) -> Tensor:
        """The loss of each row [N], by its formula; 0 where the row is ignored. The loss is their mean."""
        x = self.soft_cap * torch.tanh(z / self.soft_cap) if self.soft_cap else z
        valid = y != IGNORED
        lse = torch.logsumexp(x, dim=1)
        picked = x.gather(1, torch.where(valid, y, 0)[:, None])[:, 0]
        target = (1 - self.smoothing) * picked + self.smoothing * x.mean(dim=1)
        row = lse - target + self.z_loss * lse**2
        if self.entropy:
            row = row - self.entropy * (lse - (torch.softmax(x, dim=1) * x).sum(dim=1))
        return torch.where(valid, row, 0.0)


LOSSES = {
    loss.name: loss
    for loss in (
        Loss("plain", "cross entropy", cross_entropy),
        Loss(
            "smooth_z",
            "smoothing 0.1, z-loss 1e-4",
            smoothed_with_z_loss,
            smoothing=SMOOTHING,
            z_loss=Z_LOSS,
        ),
        Loss(
            "smooth_z_cap",
            "smoothing 0.1, z-loss 1e-4, soft-cap 30",
            smoothed_with_z_loss_and_soft_cap,
            smoothing=SMOOTHING,
            z_loss=Z_LOSS,
            soft_cap=SOFT_CAP,
        ),
        Loss("entropy", "log-probabilities, entropy bonus 1e-2", with_entropy_bonus, entropy=ENTROPY),
    )
}


def errors(
    loss: Loss, z: Tensor, y: Tensor, value: Tensor, dz: Tensor, columns: slice = slice(None)
) -> tuple[float, float]:
    """The relative errors of a mean loss and of its gradient, ‖dz − ref‖ / ‖ref‖, against float64.

    Every row is compared, a few at a time, so that the float64 copies stay small. `dz` may hold some of the
    columns.
    """
    valid = (y != IGNORED).sum()
    total = torch.zeros((), dtype=torch.float64, device=z.device)
    distance, norm = total.clone(), total.clone()
    chunk = max(1, 2**25 // z.shape[1])
    for rows in (slice(i, i + chunk) for i in range(0, z.shape[0], chunk)):
        x = z[rows].detach().double().requires_grad_()
        part = loss.rows(x, y[rows]).sum() / valid
        expected = torch.autograd.grad(part, x)[0][:, columns]
        total += part.detach()
        distance += (dz[rows].double() - expected).square().sum()
        norm += expected.square().sum()
    return ((value.double() - total).abs() / total.abs()).item(), (distance / norm).sqrt().item()
