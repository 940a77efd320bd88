"""Deferred layers on ranks: under FSDP2, whose gathered weight has to stay, and under tensor parallelism."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from defer_cases import Model, S, V, loss_of
from harness import compile_lazily
from head_cases import counts
from ranks import once, spawn
from reference import assert_fair
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

import inductor_ce
from inductor_ce.api.lazy_logits import LazyLogits
from inductor_ce.common.errors import LazyLogitsError

RANKS = 2
WAYS = ("kept", "freed", "deferred afterwards", "columns", "columns, gathered")


def given() -> tuple[Model, Tensor, Tensor]:
    torch.manual_seed(0)
    return Model(), torch.randint(V, (RANKS, S)), torch.randint(V, (RANKS, S))


def sharded(model: Model, way: str) -> None:
    mesh = init_device_mesh("cpu", (RANKS,))
    if way.startswith("columns"):
        gathered = {"output_layouts": Replicate(), "use_local_output": True}
        plan = ColwiseParallel(**(gathered if "gathered" in way else {"use_local_output": False}))
        inductor_ce.defer(parallelize_module(model.output, mesh, plan))
        return
    if way != "deferred afterwards":
        inductor_ce.defer(model.output)
    fully_shard(model.output, mesh=mesh, reshard_after_forward=way == "freed")
    fully_shard(model, mesh=mesh)
    inductor_ce.defer(model.output)


def whole(x: Tensor) -> Tensor:
    return (x.full_tensor() if isinstance(x, DTensor) else x).detach()


def on_rank(rank: int) -> dict[str, Any]:
    return {way: trained(rank, way) for way in WAYS}


def trained(rank: int, way: str) -> Any:
    """What the logits are, the strategies taken, the loss and the gradients of all ranks' rows."""
    torch._dynamo.reset()
    counts_before = counts()
    model, x, y = given()
    sharded(model, way)
    compiled, _ = compile_lazily(loss_of, strategy="token_chunks", memory_budget=0.35)
    mine = slice(None) if way.startswith("columns") else slice(rank, rank + 1)
    z = model(x[mine])
    kind, made = type(z).__name__, getattr(z, "is_made", None)
    try:
        loss = compiled(z, y[mine]) if way != "columns" else loss_of(z.full_tensor(), y)
    except LazyLogitsError as error:
        return str(error)
    loss.backward()
    total = loss.detach().clone()
    if mine != slice(None):
        dist.all_reduce(total, dist.ReduceOp.AVG if dist.get_backend() == "nccl" else dist.ReduceOp.SUM)
        total /= RANKS
    taken = {k: n - counts_before.get(k, 0) for k, n in counts().items() if n > counts_before.get(k, 0)}
    return kind, made, taken, total, [whole(p.grad) for p in model.parameters()]


@once
def everywhere() -> list[dict[str, Any]]:
    return spawn(on_rank, RANKS)


@pytest.mark.parametrize("way", [way for way in WAYS if way != "freed"])
def test_right_on_every_rank(way: str) -> None:
    model, x, y = given()
    naive = loss_of(model(x), y)
    naive_gradients = torch.autograd.grad(naive, list(model.parameters()))
    model.double()
    exact = loss_of(model(x), y.clone())
    exact_gradients = torch.autograd.grad(exact, list(model.parameters()))
    for rank in everywhere():
        kind, made, taken, loss, gradients = rank[way]
        assert kind == ("DTensor" if way.startswith("columns") and "gathered" not in way else kind)
        if way in ("kept", "deferred afterwards"):
            assert (kind, made, taken) == (LazyLogits.__name__, False, {"token_chunks": 1})
        assert_fair(loss, naive, exact)
        for ours, plain, right in zip(gradients, naive_gradients, exact_gradients, strict=True):
            assert_fair(ours, plain, right)


def test_a_weight_that_is_freed_is_told() -> None:
    for rank in everywhere():
        assert "the layer's weight was freed since" in rank["freed"]
