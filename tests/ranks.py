"""Real processes that share a vocabulary, over gloo or NCCL."""

from __future__ import annotations

import contextlib
import functools
import multiprocessing
import os
import tempfile
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

# What takes long to import, once for all ranks. CUDA must not be looked at before a fork.
PRELOAD = ["torch", "torch._inductor.compile_fx", "torch.distributed.tensor", "inductor_ce.api.backend"]
START = "spawn" if torch.cuda.is_available() else "forkserver"
BACKENDS = {"cpu": "gloo", "cuda": "nccl"}

on_devices = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])


def _worker(
    rank: int,
    size: int,
    what: Callable[..., Any],
    args: tuple[Any, ...],
    folder: str,
    device: str,
    environment: dict[str, str],
) -> None:
    os.environ.clear()  # that of the fork server is older
    os.environ.update(environment)
    torch.set_num_threads(1)
    if device == "cuda":
        torch.cuda.set_device(rank)
    dist.init_process_group(
        BACKENDS[device],
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=size,
        timeout=timedelta(seconds=300),
    )
    torch.save(what(rank, *args), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@dataclass(frozen=True)
class Failed:
    """What a rank gives of a job that raised."""

    trace: str


class Outcomes(dict):
    """What a rank gives of its jobs; asking for one that failed there raises, and spares the others."""

    def __getitem__(self, job: Any) -> Any:
        outcome = super().__getitem__(job)
        assert not isinstance(outcome, Failed), f"on a rank:\n{outcome.trace}"
        return outcome


def attempt(run: Callable[..., Any], *args: Any) -> Any:
    """What run(*args) gives, or a `Failed`."""
    try:
        return run(*args)
    except Exception:
        return Failed(traceback.format_exc())


def once(f: Callable[..., Any]) -> Callable[..., Any]:
    """As `functools.cache`, for errors too: what failed is told to each test, and not tried again."""

    @functools.cache
    def outcome(*args: Any) -> tuple[Any, Exception | None]:
        try:
            return f(*args), None
        except Exception as error:
            return None, error

    @functools.wraps(f)
    def given(*args: Any) -> Any:
        value, error = outcome(*args)
        if error is not None:
            raise error
        return value

    return given


@contextlib.contextmanager
def tagged_caches(tag: str) -> Iterator[None]:
    """The caches of graphs, with nothing in them that was not stored under this tag."""
    with (
        torch.compiler.config.patch(cache_key_tag=tag),
        torch._inductor.config.patch(fx_graph_cache=True),
        torch._functorch.config.patch(enable_autograd_cache=True),
    ):
        yield


def spawn(what: Callable[..., Any], size: int, *args: Any, device: str = "cpu") -> list[Any]:
    """What each rank gives of `what(rank, *args)`, tensors on the CPU. Skips where there are fewer GPUs."""
    if device == "cuda" and torch.cuda.device_count() < size:
        pytest.skip(f"needs {size} GPUs, and there are {torch.cuda.device_count()}")
    multiprocessing.set_forkserver_preload(PRELOAD)
    with tempfile.TemporaryDirectory() as folder:
        given = (size, what, args, folder, device, dict(os.environ))
        mp.start_processes(_worker, given, nprocs=size, start_method=START)
        return [
            torch.load(Path(folder) / f"{rank}.pt", weights_only=False, map_location="cpu")
            for rank in range(size)
        ]
