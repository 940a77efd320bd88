"""A scale that is learnt, in a head whose classes are DTensor shards: real ranks against dense."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from harness import clean_slate, compile_without_codegen
from head_cases import counts
from ranks import spawn
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

N, V, D = 12, 32, 8
STRATEGIES = ["token_chunks", "vocab_slabs"]


def given() -> dict[str, Tensor]:
    """The same in every process."""
    generator = torch.Generator().manual_seed(0)

    def randn(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, dtype=torch.float64)

    h, w, s, t = randn(N, D), randn(V, D), randn(), randn(N, 1).exp()
    return {"h": h, "w": w, "s": s, "t": t, "y": torch.randint(V, (N,), generator=generator)}


def loss(h: Tensor, w: Tensor, s: Tensor, t: Tensor, y: Tensor) -> Tensor:
    """A scale for all rows, and a temperature for each."""
    return F.cross_entropy(F.linear(h, w) * s.exp() / t, y)


def on_rank(rank: int, strategies: list[str]) -> dict[str, Any]:
    """By strategy: the counts, the loss and the gradients, whole."""
    mesh = init_device_mesh("cpu", (2,))
    found = {}
    for strategy in strategies:
        with clean_slate():
            leaves = {
                name: distribute_tensor(x, mesh, [Shard(0) if name == "w" else Replicate()]).requires_grad_(
                    name != "y"
                )
                for name, x in given().items()
            }
            compiled, _ = compile_without_codegen(loss, strategy=strategy, memory_budget=0.6)
            value = compiled(**leaves)
            value.backward()
            gradients = [x.grad.full_tensor() for x in leaves.values() if x.grad is not None]
            found[strategy] = counts(), [value.full_tensor().detach(), *gradients]
    return found


def test_every_rank_equals_dense() -> None:
    leaves = {name: x.requires_grad_(name != "y") for name, x in given().items()}
    value = loss(**leaves)
    value.backward()
    dense = [value.detach(), *(x.grad for x in leaves.values() if x.grad is not None)]
    assert len(dense) == 5
    for rank in spawn(on_rank, 2, STRATEGIES, device="cpu"):
        for strategy in STRATEGIES:
            counted, made = rank[strategy]
            assert counted == {strategy: 1}
            torch.testing.assert_close(made, dense)
