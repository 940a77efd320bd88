"""What a spelling means: inputs for it, and its value by its formula in float64."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import grammar as g
import grammar_of_logits as before
import torch
from compose import Spelling
from reference import log_sum_exp
from torch import Tensor


@dataclass(frozen=True)
class Inputs:
    logits: Tensor
    labels: Tensor
    weights: Tensor
    bias: Tensor
    temperature: Tensor

    @property
    def others(self) -> tuple[Tensor, ...]:
        """All but the logits; labels afresh, since a loss may write on them."""
        return self.labels.clone(), self.weights, self.bias, self.temperature

    def in_double(self) -> Inputs:
        wide = (x.double() for x in (self.weights, self.bias, self.temperature))
        return Inputs(self.logits.double(), self.labels, *wide)


def make_inputs(s: Spelling, seed: int) -> Inputs:
    """Every sequence has a label that counts."""
    random = torch.Generator().manual_seed(seed)
    sizes = {"NV": (before.N, s.V), "BSV": (before.B, before.S, s.V), "BVS": (before.B, s.V, before.S)}[
        s.viewed.logits
    ]
    logits = 2 * torch.randn(sizes, generator=random)
    labels = torch.randint(s.V - 2 * ("masked_fill" in s.chain), (before.B, before.S), generator=random)
    if s.ignored != "none":
        labels[torch.rand(before.B, before.S, generator=random) < 0.3] = s.ignore
        labels[:, 2] = 1 + labels[:, 2] % 3 if s.V > 4 else 1
    weights = torch.rand(before.B, before.S, generator=random) + 0.1
    rows = _labels_of_rows(s, labels)
    weights = weights[:, : rows.shape[1]] * (rows != s.ignore)
    if s.viewed.rank == 2 or s.view.startswith("z, y = z.unsqueeze"):
        weights = weights.reshape(-1)
    if s.viewed.logits == "NV":
        labels = labels.reshape(-1)
    kind = torch.int32 if s.labels == before.INT32 else before.LABELS[s.labels]
    bias = torch.randn(s.V, generator=random).to(s.dtype)
    return Inputs(logits.to(s.dtype), labels.to(kind), weights, bias, torch.tensor(0.75))


def _labels_of_rows(s: Spelling, labels: Tensor) -> Tensor:
    """[B, S], or [B, S - 1] where the logits are cut."""
    labels = labels.reshape(before.B, before.S).long()
    if not s.shift:
        return labels
    last = [] if s.shift in before.SLICES else [torch.full_like(labels[:, :1], s.ignore)]
    return torch.cat([labels[:, 1:], *last], 1)


def exact(s: Spelling, logits: Tensor, labels: Tensor, weights: Tensor, bias: Tensor) -> Tensor:
    """The loss by its formula in float64."""
    z = logits.double().transpose(1, 2) if s.viewed.logits == "BVS" else logits.double()
    z, y = z.reshape(before.B, before.S, s.V), _labels_of_rows(s, labels)
    z = z[:, : y.shape[1]]
    if s.chain in before.BIASES:
        z = before.BIASES[s.chain](z, bias.double())
    elif s.chain:
        z = {**before.CHAINS, **before.EDITS}[s.chain](z)
    counts = (y != s.ignore).double() if s.ignored != "none" else torch.ones(y.shape).double()
    share = weights.double().reshape(y.shape) if s.ignored == "weights" else counts
    lse = log_sum_exp(z)
    rows = _exact_rows(s, z, y.where(counts > 0, 0), lse)
    rows = rows + {**g.Z_ROWS, **g.Z_ROWS_OF_LSE}.get(s.z_loss, 0.0) * lse.square()
    of_rows = {**g.POWER_ROWS, **g.LEFT_OUT_ROWS}
    if s.z_loss in of_rows:
        rows = rows + of_rows[s.z_loss](z - lse.unsqueeze(-1))
    loss = _reduced(s, rows * share, share)
    if s.z_loss in g.Z_ALL:
        loss = loss + g.Z_ALL[s.z_loss] * lse.square().mean()
    if s.z_loss in g.Z_COUNTED:
        loss = loss + g.Z_COUNTED[s.z_loss] * (lse.square() * counts).sum() / counts.sum()
    return g.RESULTS[s.result](loss)


def _exact_rows(s: Spelling, z: Tensor, y: Tensor, lse: Tensor) -> Tensor:
    """sum_i -q_i log p_i, and sum_i q_i log q_i where it is a divergence."""
    q = (torch.arange(s.V) == y.unsqueeze(-1)).double()
    if s.smoothing:
        q = _target(s)(q)
    rows = -(q * (z - lse.unsqueeze(-1))).sum(-1)
    return rows + (q * q.log()).sum(-1) if s.smoothing in g.KL else rows


def _target(s: Spelling) -> Callable[[Tensor], Tensor]:
    if s.smoothing.startswith(","):
        return g._uniform
    return {**g.SMOOTH_WIDE, **g.SMOOTH_NARROW, **g.KL}[s.smoothing][0]


def _reduced(s: Spelling, rows: Tensor, share: Tensor) -> Tensor:
    how = {**g.CROSS_ENTROPIES, **g.NLLS}.get(s.pick)
    if how is not None:
        return rows.sum() / (share.sum() if how == "mean" else 1)
    return {**g.REDUCTIONS, **g.COUNTED, **g.WEIGHED}[s.reduction](rows, share)


def coarsest(s: Spelling) -> torch.dtype:
    """The dtype with the fewest digits that rows are rounded to on the way."""
    if g.ROUNDED in s.normaliser:
        return torch.bfloat16
    return torch.float32 if s.cast else s.dtype
