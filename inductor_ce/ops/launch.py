"""Launch a Triton kernel again without looking for what it was compiled to.

Triton finds out at every launch, argument by argument, which of a kernel's compilations fits, and that takes
the host longer than the launch. A head launches a few kernels for each of its pieces, with the same sizes in
every step; so what fits is kept here by the numbers that are given, and by dtype and alignment of tensors.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor

from ..common.compat.launches import Launcher

VECTOR = 16  # bytes to which Triton asks whether a pointer is aligned
MOST = 1024  # compilations that are kept of a kernel: sizes may be dynamic


class Kernel:
    """`kernel[grid](*arguments, **options)`, as of the Triton function that it stands for.

    Args:
        function: what `triton.jit` made. The first of its arguments is a tensor, or reads tiles of one.
    """

    def __init__(self, function: Any):
        self.function = function
        self._launchers: dict[Hashable, Launcher] = {}

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return functools.partial(self._launch, grid)

    def _launch(
        self, grid: tuple[int, ...], *arguments: Any, kind: Hashable | None = None, **options: int
    ) -> None:
        """Launch; `kind` is what a compilation depends on, from who knows it without looking."""
        if kind is None:
            kind = _kind(arguments, options)
        launcher = self._launchers.get(kind)
        if launcher is not None:
            launcher(grid + (1,) * (3 - len(grid)), arguments)  # type: ignore[arg-type]
            return
        compiled = self.function[grid](*arguments, **options)
        # An interpreter compiles nothing, and for HIP the size of a tensor's storage matters too.
        if compiled is not None and torch.version.hip is None and len(self._launchers) < MOST:
            self._launchers[kind] = Launcher(compiled, _tensor(arguments[0]).get_device())


def _kind(arguments: tuple[Any, ...], options: dict[str, int]) -> tuple[Any, ...]:
    """What a compilation depends on: Triton looks at nothing else of an argument."""
    kind: list[Any] = [_tensor(arguments[0]).get_device(), *options.items()]
    for argument in arguments:
        which = argument.__class__
        if which is int or which is bool or which is float:
            kind.append(argument)
        elif isinstance(argument, Tensor):
            kind.append(kind_of(argument))
        else:  # a TensorDescriptor, whose base is aligned
            shapes = argument.shape, argument.strides, argument.block_shape
            kind.append((argument.base.dtype, *map(tuple, shapes)))
    return tuple(kind)


def kind_of(x: Tensor) -> tuple[torch.dtype, bool]:
    """What a compilation depends on of a tensor."""
    return x.dtype, x.data_ptr() % VECTOR == 0


def cdiv(size: int, block: int) -> int:
    """How many blocks there are; Triton's own function takes a few microseconds."""
    return -(-size // block)


def _tensor(argument: Any) -> Tensor:
    return argument if isinstance(argument, Tensor) else argument.base
