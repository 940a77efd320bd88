"""Lazy logits that are made, once, by everything that needs all of them."""

from __future__ import annotations

import copy
import io
import pickle
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from lazy_cases import B, Case, T, V, assert_same, outcome, rows_made
from torch import Tensor, nn
from torch.distributed import _functional_collectives as funcol

Y = torch.arange(B * T)


def saved_and_loaded(z: Tensor) -> Tensor:
    file = io.BytesIO()
    torch.save({"logits": z}, file)
    file.seek(0)
    return torch.load(file)["logits"]


READERS: dict[str, Callable[[Tensor], Any]] = {
    "arithmetic": lambda z: (z + 1, 2 * z, z @ torch.ones(V, dtype=z.dtype), -z, z > 0),
    "the other operand": lambda z: (
        torch.ones_like(z).detach() - z,
        torch.maximum(torch.zeros(V).double(), z),
    ),
    "sum": lambda z: z.sum(),
    "mean over time": lambda z: torch.mean(z, dim=1),
    "numpy": lambda z: z.detach().numpy().tolist(),
    "asarray": lambda z: np.asarray(z.detach()).tolist(),
    "numpy function": lambda z: float(np.sum(z.detach().numpy())),
    "tolist": lambda z: z.tolist(),
    "item": lambda z: z[0, 0, 0].item(),
    "float": lambda z: float(z.sum()),
    "pickle": lambda z: pickle.loads(pickle.dumps(z.detach())),
    "pickle with a gradient": lambda z: pickle.loads(pickle.dumps(z)).shape,
    "deepcopy": lambda z: copy.deepcopy(z),
    "deepcopy of a leaf": lambda z: copy.deepcopy(z.detach()),
    "copy": lambda z: copy.copy(z.detach()),
    "save": lambda z: saved_and_loaded(z.detach()),
    "dlpack": lambda z: torch.from_dlpack(z.detach()),
    "dlpack with a gradient": lambda z: torch.from_dlpack(z),
    "dlpack of numpy": lambda z: np.from_dlpack(z.detach()).tolist(),
    "cat": lambda z: torch.cat([z, torch.ones(B, 1, V).double()], 1),
    "stack": lambda z: torch.stack([z, z]),
    "cross_entropy": lambda z: F.cross_entropy(z.view(-1, V), Y),
    "module": lambda z: nn.CrossEntropyLoss()(z.flatten(0, 1), Y),
    "einsum": lambda z: torch.einsum("btv,btv->b", z, z),
    "where": lambda z: torch.where(z > 0, z, torch.zeros((), dtype=z.dtype)),
    "columns": lambda z: z[..., :3],
    "equal": lambda z: (torch.equal(z, z), bool((z == z).all()), z.allclose(z)),
    "in": lambda z: 5e5 in z,
    "storage": lambda z: (z.untyped_storage().nbytes(), z.detach().storage().tolist()),
    "pointer": lambda z: z.data_ptr() != 0,
    "sort": lambda z: torch.sort(z, dim=-1),
    "nonzero": lambda z: (z > 1).nonzero(),
    "functional transform of what has a gradient": lambda z: torch.func.vmap(lambda row: row.sin().sum())(z),
    "functional transform": lambda z: torch.func.vmap(lambda row: row.sum())(z.detach()),
    "gradient of a function": lambda z: torch.func.grad(lambda x: (x * z.detach()).sum())(
        torch.ones(V).double()
    ),
}


@pytest.mark.parametrize("name", READERS)
def test_readers(name: str) -> None:
    case, read = Case(), READERS[name]
    theirs = outcome(read, case.eager)
    assert_same(outcome(read, case.z), theirs)


def test_made_once(monkeypatch: pytest.MonkeyPatch) -> None:
    made, case = rows_made(monkeypatch), Case()
    for z in (case.z, case.eager):
        (z.sum() + (z * z).mean() + z[:, -1].sum() + z.float().sum()).backward()
    assert case.z.is_made
    assert made == [B * T]
    case.same_gradients()


def test_to_dlpack_never_reads_what_is_not_there() -> None:
    """It asks nobody: C++ finds no memory."""
    with pytest.raises(RuntimeError):
        torch.utils.dlpack.to_dlpack(Case().z.detach())


# Collectives


@pytest.fixture
def one_rank(tmp_path: Path) -> Iterator[None]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def gathered(z: Tensor) -> Tensor:
    (result,) = [torch.empty_like(z).contiguous()]
    dist.all_gather([result], z.detach())
    return result


COLLECTIVES: dict[str, Callable[[Tensor], Any]] = {
    "all_gather": gathered,
    "all_reduce": lambda z: [x := z.detach(), dist.all_reduce(x)][0],
    "broadcast": lambda z: [x := z.detach(), dist.broadcast(x, 0)][0],
    "functional": lambda z: funcol.all_gather_tensor(z.detach(), 0, dist.group.WORLD) + 0,
    "with a gradient": lambda z: funcol.all_reduce(z, "sum", dist.group.WORLD) + 0,
}


@pytest.mark.usefixtures("one_rank")
@pytest.mark.parametrize("name", COLLECTIVES)
def test_collectives(name: str) -> None:
    case = Case()
    torch.testing.assert_close(COLLECTIVES[name](case.z) * 1, COLLECTIVES[name](case.eager))


def test_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    made, z = rows_made(monkeypatch), Case().z
    start, found = threading.Barrier(4), []

    def read() -> None:
        start.wait()
        found.append(z.made())

    threads = [threading.Thread(target=read) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert made == [B * T]
    assert all(each is found[0] for each in found)
