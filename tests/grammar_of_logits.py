"""The grammar of generated losses, first half: from `logits` and `labels` to z [.., V] and y [..].

Every piece is source, and beside it stands what it means, or what it needs. `{V}` is the number of classes,
`{ignore}` the label that does not count.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

B, S = 3, 5
N = B * S


# Shapes


@dataclass(frozen=True)
class View:
    """Shape of the logits before; class axis and rank after. `packed` needs contiguous z and y."""

    logits: str
    axis: int
    rank: int
    packed: bool = False


VIEWS = {
    "": View("NV", -1, 2),
    "y = y.reshape(-1)": View("NV", -1, 2),
    "z, y = z.unsqueeze(0), y.unsqueeze(0)": View("NV", -1, 3),
    "pass  # [B, S, V]": View("BSV", -1, 3),
    "z, y = z.view(-1, {V}), y.view(-1)": View("BSV", -1, 2, packed=True),
    "z, y = z.view(y.numel(), -1), y.view(-1)": View("BSV", -1, 2, packed=True),
    "z, y = z.view(-1, z.size(-1)), y.view(-1)": View("BSV", -1, 2, packed=True),
    "z, y = z.reshape(-1, z.shape[-1]), y.reshape(-1)": View("BSV", -1, 2),
    "z, y = z.flatten(0, 1), y.flatten()": View("BSV", -1, 2),
    "z, y = torch.flatten(z, end_dim=-2), torch.flatten(y)": View("BSV", -1, 2),
    "z = z.transpose(1, 2)": View("BSV", 1, 3),
    "z = torch.transpose(z, -1, -2)": View("BSV", 1, 3),
    "z = z.permute(0, 2, 1)": View("BSV", 1, 3),
    "z = z.movedim(-1, 1)": View("BSV", 1, 3),
    "z = z.mT": View("BSV", 1, 3),
    "pass  # [B, V, S]": View("BVS", 1, 3),
    "z = z.transpose(1, 2).contiguous()": View("BVS", -1, 3),
    "z, y = z.permute(0, 2, 1).reshape(-1, {V}), y.reshape(-1)": View("BVS", -1, 2),
    "z, y = z.transpose(1, 2).flatten(0, 1), y.flatten()": View("BVS", -1, 2),
}

SLICES = {  # whether what they leave can be viewed
    "z, y = z[:, :-1], y[:, 1:]": False,
    "z, y = z[..., :-1, :], y[..., 1:]": False,
    "z, y = z[:, :-1, :].contiguous(), y[:, 1:].contiguous()": True,
    "z, y = z[..., :-1, :].contiguous(), y[..., 1:].contiguous()": True,
    "z, y = z.narrow(1, 0, z.size(1) - 1), y.narrow(1, 1, y.size(1) - 1)": False,
}

PADS = {
    "y = F.pad(y, (0, 1), value={ignore})[..., 1:]": False,
    "y = F.pad(y, (0, 1), value={ignore})[..., 1:].contiguous()": True,
    "y = torch.roll(y, shifts=-1, dims=1)\ny[:, -1] = {ignore}": True,
    "y = y.roll(-1, -1)\ny[..., -1:] = {ignore}": True,
    "y = torch.cat([y[:, 1:], torch.full_like(y[:, :1], {ignore})], dim=1)": True,
    "y = torch.cat((y[..., 1:], y.new_full(({B}, 1), {ignore})), -1)": True,
    "shifted = torch.full_like(y, {ignore})\nshifted[:, :-1] = y[:, 1:]\ny = shifted": True,
    "after = y.clone()\nafter[:, :-1] = y[:, 1:].clone()\nafter[:, -1].fill_({ignore})\ny = after": True,
}

LABELS = {
    "y = labels": torch.int64,
    "y = labels.long()": torch.int32,
    "y = labels.to(torch.int64)": torch.int32,
    "y = labels.to(dtype=torch.long)": torch.int64,
    "y = labels.type(torch.int64)": torch.int32,
}
INT32 = "y = labels  # int32"

CASTS = [
    "z = z.float()",
    "z = z.to(torch.float32)",
    "z = z.to(dtype=torch.float32)",
    "z = z.type(torch.float32)",
]


def _capped(cap: float) -> Callable[[Tensor], Tensor]:
    return lambda z: cap * torch.tanh(z / cap)


CHAINS = {
    "z = 15.0 * torch.tanh(z / 15.0)": _capped(15),
    "z = z / 30.0\nz = torch.tanh(z)\nz = z * 30.0": _capped(30),
    "z = (z / 4).tanh().mul(4)": _capped(4),
    "z = torch.sigmoid(z / 8.0) * 16.0": lambda z: torch.sigmoid(z / 8) * 16,
    "z = z / 0.75": lambda z: z / 0.75,
    "z = z.div(1.25)": lambda z: z / 1.25,
    "z = z * 0.5": lambda z: z * 0.5,
    "z = -0.5 * z": lambda z: -0.5 * z,
    "z = z / temperature": lambda z: z / 0.75,
    "z = z - 2.5": lambda z: z - 2.5,
    "z = z.clamp(-4, 4)": lambda z: z.clamp(-4, 4),
}
EDITS = {  # of a copy, which a cast from 16 bits is
    "z.div_(0.75)": lambda z: z / 0.75,
    "z *= 0.5": lambda z: z * 0.5,
    "z.div_(15.0)\nz.tanh_()\nz = z * 15.0": _capped(15),
}
BIASES = {  # while the classes are on the last axis
    "z = z + bias": lambda z, bias: z + bias,
    "z = torch.add(bias, z)": lambda z, bias: z + bias,
    "z = z.masked_fill(torch.arange({V}) >= {V} - 2, -1e4)": lambda z, bias: torch.cat(
        [z[..., :-2], torch.full_like(z[..., -2:], -1e4)], -1
    ),
    "z = torch.cat([z[..., :-1], bias[-1:].expand_as(z[..., :1])], dim=-1)": lambda z, bias: torch.cat(
        [z[..., :-1], bias[-1].expand(*z.shape[:-1], 1)], -1
    ),
    "z = torch.cat((torch.zeros_like(z[..., :2]), z[..., 2:]), -1)": lambda z, bias: torch.cat(
        [torch.zeros_like(z[..., :2]), z[..., 2:]], -1
    ),
}
