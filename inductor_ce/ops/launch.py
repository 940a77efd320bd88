"""Launch a Triton kernel again without looking for what it was compiled to.

Triton finds out at every launch, argument by argument, which of a kernel's compilations fits, and that takes
the host longer than the launch. A head launches a few kernels for each of its pieces, with the same sizes in
every step; so what fits is kept here by the numbers that are given, and by dtype, alignment and device of
tensors. Of these a launch is given the address alone.

Given fake tensors, a kernel is compiled for what they stand for, and nothing is launched: see `ahead.py`.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..common.compat.graphs import FakeTensor
from ..common.compat.launches import Grid, Launcher, Placeholder, Tiles, note
from . import ahead

VECTOR = 16  # bytes to which Triton asks whether a pointer is aligned
MOST = 1024  # compilations that are kept of a kernel: sizes may be dynamic


class Kernel:
    """`kernel(grid, pointers, *numbers, **options)` launches the Triton function that it stands for.

    Its arguments are pointers first, which are tensors, or 32-bit numbers that stand in the place of one, and
    then numbers. Those in the place of a pointer may vary from step to step.

    Args:
        function: what `triton.jit` made.
    """

    def __init__(self, function: Any):
        self.function = function
        self._launchers: dict[Hashable, Launcher] = {}

    def __call__(self, grid: Grid, pointers: Sequence[Tensor | int], *numbers: int, **options: int) -> None:
        if isinstance(pointers[0], FakeTensor):
            self.first(grid, pointers, numbers, options)
            return
        kind: list[Hashable] = [numbers, *options.items()]
        given: list[int] = []
        for pointer in pointers:
            if pointer.__class__ is int:
                kind.append("1" if pointer == 1 else pointer % VECTOR == 0)  # all that Triton asks
                given.append(pointer)
            else:
                address = pointer.data_ptr()  # type: ignore[union-attr]
                kind += pointer.dtype, address % VECTOR == 0, pointer.get_device()  # type: ignore[union-attr]
                given.append(address)
        which = tuple(kind)
        launcher = self._launchers.get(which)
        if launcher is not None:
            given += numbers
            launcher(grid, given)
            return
        launcher = self.first(grid, pointers, numbers, options)
        if launcher is not None and len(self._launchers) < MOST:
            self._launchers[which] = launcher

    def first(
        self,
        grid: Grid,
        pointers: Sequence[Tensor | int],
        numbers: Sequence[int],
        options: dict[str, int],
        tiles: Sequence[Tiles] = (),
        tensors: Sequence[Tensor] = (),
    ) -> Launcher | None:
        """Launch as Triton does; what does it again where a compilation depends on the same, if anything.

        The first arguments of the function read `tiles` of `tensors`, if there are some.
        """
        like = (*tensors, *pointers)[0]
        device = like.get_device()  # type: ignore[union-attr]
        if isinstance(like, FakeTensor):
            read = [tile.of(_placeholder(x)) for tile, x in zip(tiles, tensors, strict=True)]
            given = (_placeholder(x) if isinstance(x, Tensor) else x for x in pointers)
            ahead.compile(self.function, device, grid, (*read, *given, *numbers), options)
            return None
        ahead.wait()
        note(None)
        read = [tile.of(x) for tile, x in zip(tiles, tensors, strict=True)]
        compiled = self.function[grid](*read, *pointers, *numbers, **options)
        # An interpreter compiles nothing, and for HIP the size of a tensor's storage matters too.
        if compiled is None or torch.version.hip is not None:
            return None
        return Launcher(compiled, device, tiles)


def is_aligned(x: Tensor) -> bool:
    """Whether x begins at a multiple of VECTOR bytes, as memory that is allocated does."""
    return address_of(x) % VECTOR == 0


def address_of(x: Tensor) -> int:
    """Of a fake tensor, that in memory which begins at 0."""
    return int(x.storage_offset()) * x.itemsize if isinstance(x, FakeTensor) else x.data_ptr()


def _placeholder(x: Tensor) -> Placeholder:
    return Placeholder(x.dtype, address_of(x))


def cdiv(size: int, block: int) -> int:
    """How many blocks there are; Triton's own function takes a few microseconds."""
    return -(-size // block)
