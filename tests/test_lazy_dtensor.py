"""Lazy logits that are a DTensor, over gloo: each rank makes its own part, and nobody waits for another."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from harness import clean_slate, compile_lazily, misses, sites
from pairwise import EVERYTHING
from ranks import Outcomes, attempt, once, spawn
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode

import inductor_ce
from inductor_ce.api.lazy_logits import LazyLogits
from inductor_ce.common.errors import LazyLogitsError
from inductor_ce.rewriting.promises import LAZY

B, T, D = 4, 2, 3
WHOLE = Replicate()

Given = dict[str, Any]
Program = Callable[[Given], tuple[Tensor, Tensor]]


def cross_entropy(z: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(z.flatten(0, -2), y.flatten())


def product(x: Given) -> tuple[Tensor, Tensor]:
    z = F.linear(torch.tanh(x["h"]), x["W"])
    return cross_entropy(z, x["y"]), z


def of_an_input(x: Given) -> tuple[Tensor, Tensor]:
    z = x["h"] @ x["W"].t()
    return cross_entropy(z, x["y"]), z


def capped(x: Given) -> tuple[Tensor, Tensor]:
    z = F.linear(torch.tanh(x["h"]), x["W"], x["b"]) * x["scale"]
    z = 3 * torch.tanh(z.float() / 3)
    return cross_entropy(z, x["y"]), z


def flattened(x: Given) -> tuple[Tensor, Tensor]:
    z = F.linear(torch.tanh(x["h"]), x["W"])
    return cross_entropy(z, x["y"]), z.flatten(0, 1)


def frozen(x: Given) -> tuple[Tensor, Tensor]:
    with torch.no_grad():
        z = F.linear(torch.tanh(x["h"]), x["W"].detach())
    return cross_entropy(z, x["y"]) + 0 * x["h"].sum(), z


def whole_rows(x: Tensor) -> Tensor:
    return x.redistribute(placements=[WHOLE]) if isinstance(x, DTensor) else x


def gathered(x: Given) -> tuple[Tensor, Tensor]:
    """Sequence parallel: rows are brought together for the product."""
    h, y = whole_rows(x["h"]), whole_rows(x["y"])
    z = F.linear(h, x["W"])
    return cross_entropy(z, y), z


@dataclass(frozen=True)
class Layout:
    """Where the hidden states and the weight are on a mesh, and what is computed of them."""

    program: Program
    h: tuple[Placement, ...]
    W: tuple[Placement, ...]
    V: int = 23
    mesh: tuple[int, ...] = (2,)  # of the ranks

    def given(self) -> Given:
        """The same in every process."""
        generator = torch.Generator().manual_seed(0)
        sizes = {"h": (B, T, D), "W": (self.V, D), "b": (self.V,), "scale": ()}
        made = {name: torch.randn(s, generator=generator, dtype=torch.float64) for name, s in sizes.items()}
        return made | {"y": torch.randint(0, self.V, (B, T), generator=generator)}

    def spread(self, given: Given, mesh: DeviceMesh) -> Given:
        rows = [p if isinstance(p, Shard) else WHOLE for p in self.h]
        where = {"h": self.h, "W": self.W, "b": self.W, "y": rows, "scale": [WHOLE] * len(self.mesh)}
        return {
            n: distribute_tensor(x, mesh, where[n], src_data_rank=None).requires_grad_(n != "y")
            for n, x in given.items()
        }


LAYOUTS = {
    "classes": Layout(product, (WHOLE,), (Shard(0),)),
    "classes, fewer than ranks": Layout(product, (WHOLE,), (Shard(0),), V=5, mesh=(4,)),  # 2, 2, 1 and none
    "classes, of an input": Layout(of_an_input, (WHOLE,), (Shard(0),)),
    "classes, with a chain": Layout(capped, (WHOLE,), (Shard(0),)),
    "classes, flattened": Layout(flattened, (WHOLE,), (Shard(0),)),
    "classes, without a gradient": Layout(frozen, (WHOLE,), (Shard(0),)),
    "rows, gathered for the classes": Layout(gathered, (Shard(0),), (Shard(0),)),
    "rows, with a chain": Layout(capped, (Shard(0),), (WHOLE,)),
    "whole": Layout(product, (WHOLE,), (WHOLE,)),
    "rows and classes, with a chain": Layout(capped, (Shard(0), WHOLE), (WHOLE, Shard(0)), V=22, mesh=(2, 2)),
}
# What others have too: a product, of inputs that are leaves, and with a chain over classes alone.
ELSEWHERE = ("classes", "classes, of an input", "classes, with a chain")
ON_RANKS = [name for name in LAYOUTS if EVERYTHING or name not in ELSEWHERE]


def is_lazy(z: Tensor) -> bool:
    local = z._local_tensor
    return isinstance(local, LazyLogits) and not local.is_made


def gradients(x: Given) -> dict[str, Tensor]:
    found = {name: t.grad.full_tensor() for name, t in x.items() if t.grad is not None}
    for t in x.values():
        t.grad = None
    return found


def whole(x: Tensor) -> Tensor:
    return x.full_tensor() if isinstance(x, DTensor) else x


def upstream(z: Tensor) -> Tensor:
    return torch.linspace(-1, 2, z.numel(), dtype=torch.float64).reshape(z.shape)


def with_the_logits(loss: Tensor, z: Tensor) -> Tensor:
    """A loss of both, of which the logits have another gradient than from the first."""
    more = upstream(z).to(z.dtype)
    if isinstance(z, DTensor):
        more = distribute_tensor(more, z.device_mesh, z.placements, src_data_rank=None)
    return whole(loss) + whole((z * more).sum())


def read(layout: Layout, rank: int, mesh: DeviceMesh) -> dict[str, Any]:
    x = layout.spread(layout.given(), mesh)
    compiled, _ = compile_lazily(layout.program)
    loss, z = compiled(x)
    eager = layout.program(x)[1]
    seen: dict[str, Any] = {"sites": (sites(), misses()), "lazy": [is_lazy(z)], "loss": whole(loss).detach()}
    seen["same"] = [
        (a.shape, a.stride(), a.dtype, a.placements, a.requires_grad, a.is_leaf, a.to_local().shape)
        for a in (z.detach().requires_grad_() if z.is_leaf and z.requires_grad else z, eager)
    ]
    loss.full_tensor().backward()
    seen["alone"] = gradients(x)
    seen["lazy"].append(is_lazy(z))
    with CommDebugMode() as communicated:
        local = z.to_local()
        seen["lazy"].append(isinstance(local, LazyLogits) and not local.is_made)
        if rank == 1:
            seen["of one rank"] = local.detach() * 1
    seen["communicated"] = communicated.get_total_counts()
    dist.barrier()
    seen["own"] = eager.detach().to_local()
    seen["logits"] = z.detach().full_tensor()
    seen["lazy"].append(is_lazy(compiled(x)[1]))
    if eager.requires_grad:
        with_the_logits(*compiled(x)).backward()
        seen["both"] = gradients(x)
    return seen


# On ranks


def on_rank(rank: int, size: int) -> dict[str, Any]:
    mine = {name: LAYOUTS[name] for name in ON_RANKS if math.prod(LAYOUTS[name].mesh) == size}
    sizes = dict.fromkeys(layout.mesh for layout in mine.values())
    meshes = {mesh: init_device_mesh("cpu", mesh) for mesh in sizes}

    def job(layout: Layout) -> Any:
        with clean_slate():
            return attempt(read, layout, rank, meshes[layout.mesh])

    return {name: job(layout) for name, layout in mine.items()}


@once
def ranks(size: int) -> list[Outcomes]:
    return [Outcomes(found) for found in spawn(on_rank, size, size)]


@pytest.mark.parametrize("name", ON_RANKS)
def test_values_and_gradients(name: str) -> None:
    """Those of one process; and until somebody looks nothing is there."""
    layout = LAYOUTS[name]
    x = layout.given()
    for t in x.values():
        t.requires_grad_(t.is_floating_point())
    loss, z = layout.program(x)
    wanted = {n: t for n, t in x.items() if t.requires_grad}

    def exact(scalar: Tensor) -> dict[str, Tensor]:
        found = torch.autograd.grad(scalar, list(wanted.values()), allow_unused=True, retain_graph=True)
        return {n: g for n, g in zip(wanted, found, strict=True) if g is not None}

    close = {"rtol": 1e-5, "atol": 1e-6} if z.dtype == torch.float32 else {"rtol": 1e-10, "atol": 1e-10}
    for outcomes in ranks(math.prod(layout.mesh)):
        seen = outcomes[name]
        assert seen["sites"] == (1, 0)
        assert seen["lazy"] == [True] * 4
        assert seen["same"][0] == seen["same"][1]
        torch.testing.assert_close(seen["loss"], loss.detach(), **close)
        torch.testing.assert_close(seen["alone"], exact(loss), **close)
        torch.testing.assert_close(seen["logits"], z.detach(), **close)
        if z.requires_grad:
            torch.testing.assert_close(seen["both"], exact(with_the_logits(loss, z)), **close)


@pytest.mark.parametrize("name", ON_RANKS)
def test_one_rank_looks_alone(name: str) -> None:
    """It reads what eager has there, bit for bit, and asks no other."""
    for rank, outcomes in enumerate(ranks(math.prod(LAYOUTS[name].mesh))):
        seen = outcomes[name]
        assert seen["communicated"] == 0
        if rank == 1:
            torch.testing.assert_close(seen["of one rank"], seen["own"], rtol=0, atol=0)


# On one rank, which shards over itself


@pytest.fixture(scope="module")
def mesh(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DeviceMesh]:
    store = tmp_path_factory.mktemp("store") / "file"
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


# Never a wrong number


def step(x: Given, foreach: bool) -> None:
    x["W"].grad = torch.ones_like(x["W"])
    torch.optim.AdamW([x["W"]], lr=0.1, foreach=foreach).step()
    x["W"].grad = None


@torch.no_grad()
def in_place(x: Given) -> None:
    x["W"].add_(1)


@torch.no_grad()
def in_place_of_a_rank(x: Given) -> None:
    x["W"].to_local().add_(1)


@torch.no_grad()
def hidden_states(x: Given) -> None:
    x["h"].zero_()


def freed(x: Given) -> None:
    x["W"].to_local().untyped_storage().resize_(0)


CHANGES: dict[str, tuple[Callable[[Given], None], str]] = {
    "a step": (lambda x: step(x, foreach=False), r"\[23x3\] was changed in place since"),
    "a step of a list": (lambda x: step(x, foreach=True), r"\[23x3\] was changed in place since"),
    "in place": (in_place, r"\[23x3\] was changed in place since"),
    "in place, of a rank": (in_place_of_a_rank, r"\[23x3\] was changed in place since"),
    "hidden states": (hidden_states, "the hidden states was changed in place since"),
    "freed": (freed, r"\[23x3\] was freed since"),
}
LATE: list[Callable[[Tensor], Any]] = [
    *(lambda z: z.to_local() * 1, lambda z: z + 1, lambda z: z.detach().sum(), lambda z: z.clone().sum()),
    *(lambda z: z.to_local()[:, -1] * 1, lambda z: z.mul_(2), lambda z: z.detach().to_local().numpy()),
]


def test_what_is_no_longer_there(mesh: DeviceMesh) -> None:
    layout = LAYOUTS["classes, of an input"]
    compiled, _ = compile_lazily(layout.program)
    for (change, told), late in itertools.product(CHANGES.values(), LATE):
        x = layout.spread(layout.given(), mesh)
        _, z = compiled(x)
        assert is_lazy(z)
        change(x)
        with pytest.raises(LazyLogitsError, match=told):
            late(z)


# Edits


EDITS: dict[str, Callable[[Tensor], Any]] = {
    "the tensor": lambda z: z.mul_(3),
    "detached": lambda z: z.detach().mul_(3),
    "of a rank": lambda z: z.detach().to_local().mul_(3),
    "a view": lambda z: z.detach().view(B * T, -1).mul_(3),
    "a copy": lambda z: z.clone().mul_(3),
    "memory": lambda z: z.detach().to_local().numpy().fill(2),
}


def edited(f: Program, edit: Callable[[Tensor], Any], mesh: DeviceMesh) -> list[Tensor]:
    """What is read then of the logits, a name for them and a copy, and the gradients."""
    x = LAYOUTS["classes"].spread(LAYOUTS["classes"].given(), mesh)
    loss, z = f(x)
    alias, copy = z.detach(), z.clone()
    edit(z)
    read = [part.detach().to_local() * 1 for part in (z, alias, copy)]
    (with_the_logits(loss, z) + whole(z[:, 0].sin().sum())).backward()
    return [*read, *gradients(x).values()]


def test_edits(mesh: DeviceMesh) -> None:
    """Every name for the logits reads as edited, a copy as before, and gradients are those of the edits."""
    compiled, _ = compile_lazily(product)
    for name, edit in EDITS.items():
        ours, eager = (edited(f, edit, mesh) for f in (compiled, product))
        torch.testing.assert_close(
            ours, eager, rtol=1e-10, atol=1e-10, msg=lambda said, name=name: f"{name}: {said}"
        )


def test_into_another_compiled_function(mesh: DeviceMesh) -> None:
    layout = LAYOUTS["classes"]
    first, _ = compile_lazily(layout.program)
    second, graphs = compile_lazily(cross_entropy)
    x = layout.spread(layout.given(), mesh)
    results = []
    for f, g in [(first, second)] * 2 + [(layout.program, cross_entropy)]:
        loss, z = f(x)
        more = g(z, x["y"])
        (whole(loss) + 2 * whole(more)).backward()
        results.append([whole(more).detach(), *gradients(x).values()])
    torch.testing.assert_close(results[:2], [results[2]] * 2, rtol=1e-10, atol=1e-10)
    assert len(graphs.final) == 2  # forward and backward, once
    (site,) = inductor_ce.explain(cross_entropy, first(x)[1], x["y"]).sites
    assert site.sharded


# Why not


def hidden_too(x: Given) -> tuple[Tensor, ...]:
    """is returned too or is a view of an input"""
    h = torch.tanh(x["h"])
    z = F.linear(h, x["W"])
    return cross_entropy(z, x["y"]), z, h


def a_number_for_each_row(x: Given) -> tuple[Tensor, ...]:
    """takes a number for each row"""
    h = torch.tanh(x["h"])
    z = F.linear(h, x["W"]) / h.exp().sum(-1, keepdim=True)
    return cross_entropy(z, x["y"]), z


def a_bias_that_is_whole(x: Given) -> tuple[Tensor, ...]:
    """made of a DTensor [23] with placements (R): not each rank by itself"""
    z = F.linear(torch.tanh(x["h"]), x["W"]) + x["whole b"]
    return cross_entropy(z, x["y"]), z


def read_elsewhere(x: Given) -> tuple[Tensor, ...]:
    """also used by topk"""
    z = F.linear(torch.tanh(x["h"]), x["W"])
    return cross_entropy(z, x["y"]), z, z.topk(2).values


def explained(f: Program, mesh: DeviceMesh) -> str:
    layout = LAYOUTS["classes"]
    x = layout.spread(layout.given(), mesh)
    x["whole b"] = distribute_tensor(layout.given()["b"], mesh, [WHOLE], src_data_rank=None)
    inductor_ce.install(min_vocab=2)
    (site,) = inductor_ce.explain(f, x).sites
    return " ".join(str(site).split())


def test_told(mesh: DeviceMesh) -> None:
    assert LAZY in explained(product, mesh)


@pytest.mark.parametrize(
    "f", [hidden_too, a_number_for_each_row, a_bias_that_is_whole, read_elsewhere], ids=lambda f: f.__name__
)
def test_refusals(f: Program, mesh: DeviceMesh) -> None:
    told = explained(f, mesh)
    assert str(f.__doc__) in told
    assert LAZY not in told
