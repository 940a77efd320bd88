"""CUDA's driver: a graph of launches.

torch's own graphs are of whatever a program does on a GPU: its memory and its random numbers take part in
them, those of other threads too. What is recorded here are kernels alone.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable
from typing import Any

_APART = 1  # CU_STREAM_NON_BLOCKING: the stream waits for no other
_THIS_THREAD = 1  # CU_STREAM_CAPTURE_MODE_THREAD_LOCAL: nothing that other threads do is refused


class LaunchGraph:
    """What a function launches on a stream, launched at once by `graph.launch(stream)`.

    Args:
        launch: the function; it is given the stream, and may do nothing else on the GPU, which is the current
            one of this thread.

    Raises:
        RuntimeError: the driver refuses something.
    """

    def __init__(self, launch: Callable[[int], None]):
        self._executable = ctypes.c_void_p()
        driver, stream, graph = _driver(), ctypes.c_void_p(), ctypes.c_void_p()
        _check(driver.cuStreamCreate(ctypes.byref(stream), _APART))
        try:
            _check(driver.cuStreamBeginCapture_v2(stream, _THIS_THREAD))
            try:
                launch(int(stream.value or 0))
            finally:
                code = driver.cuStreamEndCapture(stream, ctypes.byref(graph))
            _check(code)
            flags = ctypes.c_ulonglong(0)
            _check(driver.cuGraphInstantiateWithFlags(ctypes.byref(self._executable), graph, flags))
        finally:
            if graph.value:
                driver.cuGraphDestroy(graph)
            driver.cuStreamDestroy_v2(stream)

    def launch(self, stream: int) -> None:
        _check(_driver().cuGraphLaunch(self._executable, ctypes.c_void_p(stream)))

    def __del__(self) -> None:
        if self._executable.value:
            _driver().cuGraphExecDestroy(self._executable)  # the driver waits until it has run


@functools.cache
def _driver() -> Any:
    return ctypes.CDLL("libcuda.so.1")


def _check(code: int) -> None:
    if code:
        raise RuntimeError(f"CUDA's driver refuses with {code}")
