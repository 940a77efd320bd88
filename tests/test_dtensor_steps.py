"""Several steps of one compiled loss over DTensor logits, and two losses at once, in real processes."""

from __future__ import annotations

import math
from typing import Any

import dtensor_cases
import pytest
import torch
import torch.nn.functional as F
from dtensor_cases import Exchanged, Setup, distributed, replace, tensors
from harness import Rewritten, clean_slate, compile_without_codegen, sites
from pairwise import EVERYTHING
from ranks import mesh_there, on_devices, once, spawn
from reference import Terms, cross_entropy
from torch import Tensor
from torch._dynamo.utils import counters
from torch.distributed.tensor import DTensor, Replicate, Shard

SMOOTHED = Terms(smoothing=0.1)
SHAPES = {2: Setup((2,), V=23), 4: Setup((2, 2), V=23)}
LENGTHS = (8, 12, 16, 6)
DYNAMIC = (True, None) if EVERYTHING else (None,)  # which is symbolic too from the second length on
ONCE = (2, 4) if EVERYTHING else (2,)  # test_dtensor_ranks.py counts on four ranks


def head(h: Tensor, W: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(h, W), y, label_smoothing=0.1)


def two_heads(h: Tensor, W: Tensor, V: Tensor, y: Tensor) -> Tensor:
    return head(h, W, y) + 0.5 * head(h, V, y)


# In the ranks


def there(size: int, device: str) -> Setup:
    """The setup of so many ranks, with fewer where there are not as many."""
    return replace(SHAPES[size], device=device, mesh=mesh_there(SHAPES[size].mesh, device))


def on_rank(rank: int, size: int, device: str) -> dict[str, Any]:
    setup = there(size, device)
    results = {"once": one_step(setup)} if size in ONCE else {}
    if size == 2:
        lengths_of = {("lengths", dynamic): lengths(setup, dynamic) for dynamic in DYNAMIC}
        return results | lengths_of | {"replicated": one_step(setup, replicated=True)}
    return results | {"two losses": two_losses(setup)}


def one_step(setup: Setup, replicated: bool = False) -> dict[str, Any]:
    """A step, and what another one exchanges; `replicated`: with logits that every rank has whole."""
    with clean_slate():
        x = distributed(setup, tensors(setup, -100))
        if replicated:
            x["W"] = x["W"].detach().redistribute(placements=[Replicate()] * len(setup.mesh))
            compiled = torch.compile(head, backend=Rewritten())
        else:
            compiled, _ = compile_without_codegen(head)
        given = x["h"], x["W"], x["y"]
        result = {"steps": [step(compiled, *given)], "sites": sites()}
        return result | exchanged(compiled, *given) | {"compiled": counters["stats"]["unique_graphs"]}


def lengths(setup: Setup, dynamic: bool | None) -> dict[str, Any]:
    """One compiled function over batches of several lengths."""
    with clean_slate():
        compiled, _ = compile_without_codegen(head, dynamic=dynamic)
        given = [distributed(replace(setup, N=n), tensors(replace(setup, N=n), -100)) for n in LENGTHS]
        steps = [step(compiled, x["h"], x["W"], x["y"]) for x in given]
        return {"steps": steps, "compiled": counters["stats"]["unique_graphs"]}


def exchanged(compiled: Any, *given: DTensor) -> dict[str, Any]:
    with Exchanged() as forward:
        loss = compiled(*leaves_of(given))
    with Exchanged() as backward:
        loss.backward()
    return {"forward": forward.counts, "backward": backward.counts, "sizes": forward.sizes}


def leaves_of(given: tuple[DTensor, ...]) -> list[DTensor]:
    return [x.detach().requires_grad_(x.is_floating_point()) for x in given]


def step(compiled: Any, *given: DTensor) -> list[Tensor]:
    """The loss, and the gradients of what requires one, whole."""
    leaves = leaves_of(given)
    loss = compiled(*leaves)
    loss.backward()
    return [loss.detach().full_tensor(), *(x.grad.full_tensor() for x in leaves if x.requires_grad)]


def second_head(setup: Setup) -> Tensor:
    return torch.randn(29, dtensor_cases.D, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def two_losses(setup: Setup) -> dict[str, Any]:
    """Each over its own dimension of the mesh."""
    mesh = setup.device_mesh()
    x = tensors(setup, -100) | {"V": second_head(setup)}
    places = {"W": [Replicate(), Shard(0)], "V": [Shard(0), Replicate()]}
    with clean_slate():
        given = [
            dtensor_cases.distribute_tensor(
                x[name], mesh, places.get(name, [Replicate()] * 2), src_data_rank=None
            )
            for name in ("h", "W", "V", "y")
        ]
        compiled = torch.compile(two_heads, backend=Rewritten())
        return {"steps": [step(compiled, *given)], "sites": sites()}


# In the test's process


@once
def results(size: int, device: str) -> list[dict[Any, dict[str, Any]]]:
    return spawn(on_rank, math.prod(there(size, device).mesh), size, device, device=device)


def dense(n: int, setup: Setup) -> list[Tensor]:
    """Loss, dh and dW in float64 in one process."""
    x = tensors(replace(setup, N=n), -100)
    h, W = x["h"].requires_grad_(), x["W"].requires_grad_()
    loss = cross_entropy(F.linear(h, W), x["y"], SMOOTHED)
    loss.backward()
    return [loss.detach(), h.grad, W.grad]


def assert_steps(steps: list[list[Tensor]], expected: list[list[Tensor]]) -> None:
    torch.testing.assert_close(steps, expected, rtol=1e-10, atol=1e-10)


@on_devices
@pytest.mark.parametrize("dynamic", DYNAMIC)
def test_trap_20_one_compilation_for_all_lengths(dynamic: bool | None, device: str):
    """Left to itself, torch.compile takes the first length for a constant, and none after the second."""
    for rank in results(2, device):
        assert rank["lengths", dynamic]["compiled"] == (1 if dynamic else 2)
        assert_steps(rank["lengths", dynamic]["steps"], [dense(n, SHAPES[2]) for n in LENGTHS])


@on_devices
@pytest.mark.parametrize("size", ONCE)
def test_what_compiled_code_exchanges(size: int, device: str):
    """Counted while it runs: four statistics a row, and the mean's two sums where ranks share the rows."""
    rows_of_a_rank = 8 if size == 2 else 4
    for rank in results(size, device):
        means = {"all_reduce": 1} if size == 4 else {}
        assert rank["once"]["forward"] == {"all_gather_into_tensor": 1} | means
        assert rank["once"]["sizes"][0] == there(size, device).mesh[-1] * 4 * rows_of_a_rank
        assert rank["once"]["backward"] == {}
        assert (rank["once"]["sites"], rank["once"]["compiled"]) == (1, 1)


@on_devices
def test_trap_9_replicated_logits_exchange_nothing(device: str):
    """Gathered logits taken for shards: the loss is larger by log P."""
    for rank in results(2, device):
        assert rank["replicated"]["sites"] == 1
        assert (rank["replicated"]["forward"], rank["replicated"]["backward"]) == ({}, {})
        assert_steps(rank["replicated"]["steps"], [dense(8, SHAPES[2])])


@on_devices
def test_two_losses_over_different_dimensions_of_a_mesh(device: str):
    x = tensors(SHAPES[4], -100)
    leaves = [t.requires_grad_() for t in (x["h"], x["W"], second_head(SHAPES[4]))]
    h, W, V = leaves
    y = x["y"]
    loss = cross_entropy(F.linear(h, W), y, SMOOTHED) + 0.5 * cross_entropy(F.linear(h, V), y, SMOOTHED)
    loss.backward()
    for rank in results(4, device):
        assert rank["two losses"]["sites"] == 2
        assert_steps(rank["two losses"]["steps"], [[loss.detach(), *(t.grad for t in leaves)]])
