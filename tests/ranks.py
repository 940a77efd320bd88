"""Real processes that share a vocabulary, over gloo."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def _worker(rank: int, size: int, what: Callable[..., Any], args: tuple[Any, ...], folder: str) -> None:
    torch.set_num_threads(1)
    store = f"file://{folder}/store"
    dist.init_process_group(
        "gloo", init_method=store, rank=rank, world_size=size, timeout=timedelta(seconds=300)
    )
    torch.save(what(rank, *args), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def spawn(what: Callable[..., Any], size: int, *args: Any) -> list[Any]:
    """What each rank gives of `what(rank, *args)`."""
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(_worker, (size, what, args, folder), nprocs=size)
        return [torch.load(Path(folder) / f"{rank}.pt", weights_only=False) for rank in range(size)]
