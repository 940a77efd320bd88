"""Compile the kernels that operators launch while Inductor is still at the code that calls them.

Triton compiles a kernel when it is first launched, and has a C compiler build what launches it; a head has
a dozen of them. Most of that time is spent in other processes. So what an operator would launch is found by
calling it with fake tensors, and compiled in threads; whoever launches a kernel for the first time waits.
"""

from __future__ import annotations

import importlib.util
import os
import threading
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from ..common.compat.graphs import FakeTensor, tree_leaves, tree_map
from ..common.compat.stand_ins import stand_ins
from ..common.failsafe import attempt

if importlib.util.find_spec("triton"):  # which torch's builds for GPUs bring
    from ..common.compat import launches

MOST_THREADS = 8
MANY = 2**30  # what a number on the host is taken to be

_pool: ThreadPoolExecutor | None = None
_asked: set[Hashable] = set()  # what the pool compiles
_lock = threading.Lock()  # of both, as one thread may launch while another compiles


def lowered(operator: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any]) -> None:
    """Compile what an operator launches that is being lowered for a GPU, if all sizes are known."""
    if torch.cuda.is_initialized() and torch.version.hip is None:
        attempt("kernels are compiled when they are launched", _rehearse, operator, args, kwargs)


def _rehearse(operator: Callable[..., Any], *given: Any) -> None:
    """Call `operator` of (args, kwargs), where tensors are fake: see `launch.py`."""
    examples = stand_ins(given)
    on_gpu = [x for x in tree_leaves(examples) if isinstance(x, FakeTensor) and x.is_cuda]
    if on_gpu:
        args, kwargs = tree_map(_with_numbers, examples)
        with on_gpu[0].fake_mode:
            operator(*args, **kwargs)


def _with_numbers(x: Any) -> Any:
    """A tensor on the host is there to be looked at."""
    is_read = isinstance(x, Tensor) and x.is_cpu
    return torch.full(x.shape, MANY, dtype=x.dtype, device="cpu") if is_read else x


def compile(
    function: Any, device: int, grid: launches.Grid, arguments: Sequence[Any], options: dict[str, int]
) -> None:
    """Let a thread compile a function of `triton.jit` for arguments whose tensors are placeholders."""
    global _pool
    which = function, device, launches.compiled_for(function, arguments), *options.items()
    with _lock:
        if which in _asked:
            return
        if _pool is None:
            _pool = ThreadPoolExecutor(min(MOST_THREADS, os.cpu_count() or 1))
        _pool.submit(launches.compile_ahead, function, device, grid, arguments, options)
        _asked.add(which)


def wait() -> None:
    """Until all has been compiled. What failed fails again when it is launched, and says so there.

    No thread is left, which a process that is forked would miss.
    """
    global _pool
    with _lock:
        pool, _pool = _pool, None
        _asked.clear()
    if pool is not None:
        pool.shutdown()
