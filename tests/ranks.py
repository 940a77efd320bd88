"""Real processes that share a vocabulary, over gloo or NCCL."""

from __future__ import annotations

import contextlib
import functools
import io
import math
import multiprocessing
import os
import pickle
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing import connection, forkserver
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from harness import clean_slate
from kernels import backwards_at_once

# CUDA must not be looked at before a fork.
START = "spawn" if torch.cuda.is_available() else "forkserver"
BACKENDS = {"cpu": "gloo", "cuda": "nccl"}

on_devices = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])


def ranks_at_most(device: str) -> float:
    """How many ranks there can be: one on each GPU, and on CPUs as many as wanted, or as RANKS says."""
    return torch.cuda.device_count() if device == "cuda" else float(os.environ.get("RANKS", "inf"))


def mesh_there(mesh: tuple[int, ...], device: str) -> tuple[int, ...]:
    """A mesh of four ranks as it can be on a device: where there are not as many, it has half of them.

    A mesh of several dimensions keeps those that come first, which share rows: the last has one rank then.
    """
    if math.prod(mesh) <= 2 or math.prod(mesh) <= ranks_at_most(device):
        return mesh
    return (*mesh[:-1], mesh[-1] // 2)


def _worker(pipe: connection.Connection, rank: int, size: int, folder: str, device: str) -> None:
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
    with contextlib.suppress(EOFError):
        while True:
            pipe.send(_outcome(rank, pipe.recv_bytes()))
    dist.destroy_process_group()


def _outcome(rank: int, asked: bytes) -> tuple[bytes, str]:
    """(what this rank gives, saved; the trace of an error that it raised instead)."""
    try:
        environment, path, call = pickle.loads(asked)
        os.environ.clear()
        os.environ.update(environment)
        sys.path[:] = path
        what, args = pickle.loads(call)  # which imports modules on that path
        with clean_slate():
            saved = io.BytesIO()
            torch.save(what(rank, *args), saved)
        return saved.getvalue(), ""
    except Exception:
        return b"", traceback.format_exc()


def _start_fork_server() -> None:
    """With all that ranks import, and warm: see `warm_ranks`. Python 3.11 gives it no path."""
    multiprocessing.set_forkserver_preload(["warm_ranks"])
    with mock.patch.dict(os.environ, PYTHONPATH=os.pathsep.join(filter(None, sys.path))):
        forkserver.ensure_running()


class Group:
    """Processes that share a process group, and live on between what they are asked to do."""

    def __init__(self, size: int, device: str) -> None:
        if START == "forkserver":
            _start_fork_server()
        context = multiprocessing.get_context(START)
        self.folder = tempfile.TemporaryDirectory()
        self.pipes, self.processes = [], []
        for rank in range(size):
            ours, theirs = context.Pipe()
            given = (theirs, rank, size, self.folder.name, device)
            process = context.Process(target=_worker, args=given, daemon=True)
            process.start()
            theirs.close()
            self.pipes.append(ours)
            self.processes.append(process)

    def run(self, what: Callable[..., Any], *args: Any) -> list[Any]:
        """What each rank gives. The first that raises or dies ends the wait: others may wait for it."""
        asked = pickle.dumps((dict(os.environ), sys.path, pickle.dumps((what, args))))
        for pipe in self.pipes:
            pipe.send_bytes(asked)
        given: dict[int, Any] = {}
        while len(given) < len(self.pipes):
            waiting = [pipe for rank, pipe in enumerate(self.pipes) if rank not in given]
            for pipe in connection.wait(waiting):
                rank = self.pipes.index(pipe)
                try:
                    saved, trace = pipe.recv()
                except EOFError:
                    self.processes[rank].join()
                    trace = f"it ended, with exit code {self.processes[rank].exitcode}"
                assert not trace, f"on rank {rank}:\n{trace}"
                given[rank] = torch.load(io.BytesIO(saved), weights_only=False, map_location="cpu")
        return [given[rank] for rank in range(len(self.pipes))]

    def close(self, kill: bool = False) -> None:
        for pipe in self.pipes:
            pipe.close()
        for process in self.processes:
            if kill:
                process.kill()
            process.join()
        self.folder.cleanup()


_groups: dict[tuple[int, str], Group] = {}


def close_groups() -> None:
    while _groups:
        _groups.popitem()[1].close()


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
        backwards_at_once(),
    ):
        yield


def spawn(
    what: Callable[..., Any], size: int, *args: Any, device: str = "cpu", new: bool = False
) -> list[Any]:
    """What each rank gives of `what(rank, *args)`, tensors on the CPU. Skips where there are not as many.

    Ranks are those that were asked before, unless one of them failed or the call wants `new` ones.
    """
    if size > ranks_at_most(device):
        pytest.skip(f"needs {size} ranks, and there can be {ranks_at_most(device)}")
    group = _groups.pop((size, device), None)
    if group is None or new:
        if group is not None:
            group.close()
        group = Group(size, device)
    try:
        outcomes = group.run(what, *args)
    except BaseException:
        group.close(kill=True)
        raise
    if any(map(_has_failed, outcomes)):  # maybe on some ranks alone, and others still wait for them
        group.close(kill=True)
    else:
        _groups[size, device] = group
    return outcomes


def _has_failed(outcome: Any) -> bool:
    return isinstance(outcome, dict) and any(isinstance(job, Failed) for job in outcome.values())
