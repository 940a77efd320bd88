"""Run by `test_launches.py` where `fake_driver.c` is CUDA's driver: a launch past Triton is Triton's own."""

from __future__ import annotations

import ctypes
import sys
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.backends.nvidia import driver

from inductor_ce.common.compat import launches
from inductor_ce.common.compat.launches import Launcher, Noted, Tiles, noting
from inductor_ce.ops.launch import Kernel

STREAM = 77
BYTES = {"i1": 1, "i32": 4, "i64": 8}


class Driver:
    """The fake one, as Triton's active driver of a GPU like Hopper."""

    def __init__(self, library: str):
        self._library = ctypes.CDLL(library, mode=ctypes.RTLD_GLOBAL)
        self._library.fake_length.restype = ctypes.c_size_t
        active = driver.CudaDriver()
        active.get_device_capability = lambda *_: (9, 0)
        active.get_current_device = lambda: torch.empty(0).get_device()
        active.set_current_device = lambda _: None
        active.get_current_stream = lambda _: STREAM
        triton.runtime.driver.set_active(active)
        launches.current_stream = active.get_current_stream
        self._build = driver.CudaLauncher.__init__
        driver.CudaLauncher.__init__ = lambda *given: self._load(*given)

    def _load(self, launcher: Any, source: Any, metadata: Any) -> None:
        """Say what the kernel that is loaded next has for parameters."""
        sizes = [size for kind in source.signature.values() for size in sizes_of(kind)]
        sizes += [8, 8]  # memory for a time
        self._library.fake_kernel(len(sizes), (ctypes.c_int * len(sizes))(*sizes))
        self._build(launcher, source, metadata)

    def launched(self) -> bytes:
        """What has been launched since the last call."""
        found = (ctypes.c_uint8 * self._library.fake_length())()
        self._library.fake_take(found)
        return bytes(found)


def sizes_of(kind: str) -> list[int]:
    """The bytes of the parameters that an argument of a kernel becomes."""
    if kind == "constexpr":
        return []
    if kind.startswith("tensordesc"):
        rank = kind[kind.index("[") :].count(",") + 1
        return [128] + [4] * rank + [8] * rank
    return [8 if kind.startswith("*") else BYTES[kind]]


@triton.jit(do_not_specialize=["left"], do_not_specialize_on_alignment=["y"])
def _numbers(x, y, left, n, many, one, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(x + i * one, mask=i < n, other=0) + left
    tl.store(y + i, value + (many >> 32), mask=i < n)


@triton.jit
def _of_tiles(out, a, limit, n, SIZE: tl.constexpr):
    for i in range(0, tl.minimum(tl.load(limit), n), SIZE):
        out.store([i, 0], a.load([i, 0]) + 1)


numbers, of_tiles = Kernel(_numbers), Kernel(_of_tiles)


def check_numbers(driver: Driver) -> None:
    """The same bytes by Triton, by what is kept, and by what is noted, for each other set of arguments."""
    x, y = torch.zeros(256, dtype=torch.int64), torch.zeros(256, dtype=torch.int64)
    for pointers, given in (
        ((x, y, 0), (256, 2**40, 1)),
        ((x[2:], y[1:], 16), (251, 2**40 + 1, 1)),
        ((x, y[1:], 3), (7, 2**33, 2)),
    ):
        seen = []
        for _ in range(3):
            with noting() as noted:
                numbers((2, 1, 1), pointers, *given, 64, num_warps=2)
            seen += [(driver.launched(), noted)]
        (by_triton, none), (by_us, (launch,)), (again, _) = seen
        assert none == [None]
        assert by_triton == by_us == again != b""
        assert replayed(driver, launch) == by_triton


def check_tiles(driver: Driver) -> None:
    """Of other tensors of the same shape, too."""
    limit = torch.zeros((), dtype=torch.int32)
    pairs = [(torch.zeros(128, 64), torch.zeros(128, 72)[:, :64]) for _ in range(2)]
    tiles = [Tiles(x, [16, 32]) for x in pairs[0]]
    known, first = by_triton(driver, pairs[0], tiles, limit)
    _, second = by_triton(driver, pairs[1], tiles, limit)
    assert len(first) == len(second)
    assert first != second
    for pair, wanted in [*zip(pairs, (first, second), strict=True)] * 2:
        with noting() as noted:
            known((3, 1, 1), [limit.data_ptr(), 128, 16], pair)
        assert driver.launched() == wanted
        assert replayed(driver, noted[0]) == wanted


def by_triton(
    driver: Driver, pair: tuple[Tensor, Tensor], tiles: list[Tiles], limit: Tensor
) -> tuple[Launcher, bytes]:
    launcher = of_tiles.first((3, 1, 1), [limit], [128, 16], {"num_warps": 2}, tiles, pair)
    assert launcher is not None
    return launcher, driver.launched()


def replayed(driver: Driver, launch: Noted | None) -> bytes:
    assert launch is not None
    launch.launcher.launch(*launch.launcher.arguments(launch.grid, launch.given, launch.tiled, STREAM))
    return driver.launched()


if __name__ == "__main__":
    fake = Driver(sys.argv[1])
    check_numbers(fake)
    check_tiles(fake)
    print("checked", triton.__version__)
