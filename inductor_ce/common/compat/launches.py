"""Launch what Triton has compiled without what Triton looks up at every launch.

Triton's own `compiled[grid](...)` asks for the device, the stream and who listens, and encodes anew what
reads tiles of a tensor; that takes the host longer than the launch. For the releases in SEEN what is left to
do is known. Others launch as Triton does.
"""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import triton
from triton import knobs

SEEN = "3.6."
MOST_TILES = 256  # encodings that are kept of one compilation

Grid = tuple[int, int, int]


class _Direct(NamedTuple):
    """How a compilation is launched.

    Attributes:
        launch: the function in C.
        encode: what it is given of the tiles of a tensor, one for each of the first arguments.
        before: its arguments between the stream and those of the kernel.
    """

    launch: Callable[..., None]
    encode: Sequence[Callable[[Any], list[Any]]]
    before: tuple[Any, ...]


class Launcher:
    """`launcher(grid, arguments)` launches a compilation on the current stream.

    Args:
        compiled: what Triton made.
        device: the number of the GPU that it was made for.
    """

    def __init__(self, compiled: Any, device: int):
        self._compiled, self._device = compiled, device
        self._encoded: dict[tuple[int, int], list[Any]] = {}
        self._direct = _direct(compiled)

    def __call__(self, grid: Grid, arguments: tuple[Any, ...]) -> None:
        direct = self._direct
        if direct is None or _is_listened_to():
            self._compiled[grid](*arguments)
            return
        given: Any = arguments
        if direct.encode:
            given = self._with_tiles(direct.encode, arguments)
        direct.launch(*grid, _current_stream(self._device), *direct.before, *given)

    def _with_tiles(
        self, encode: Sequence[Callable[[Any], list[Any]]], arguments: tuple[Any, ...]
    ) -> list[Any]:
        """The arguments, of which the first are tiles and become what they are encoded to."""
        given: list[Any] = []
        for i, encode_one in enumerate(encode):
            where = i, arguments[i].base.data_ptr()
            encoded = self._encoded.get(where)
            if encoded is None:
                encoded = encode_one(arguments[i])
                if len(self._encoded) < MOST_TILES:
                    self._encoded[where] = encoded
            given += encoded
        given += arguments[len(encode) :]
        return given


_current_stream: Any = getattr(torch._C, "_cuda_getCurrentRawStream", None)  # builds for CPUs have none


def _is_listened_to() -> bool:
    """Whether somebody, such as a profiler, is to be told of launches."""
    return bool(knobs.runtime.launch_enter_hook.calls or knobs.runtime.launch_exit_hook.calls)


def _direct(compiled: Any) -> _Direct | None:
    """None where it is not known."""
    driver, run = sys.modules.get("triton.backends.nvidia.driver"), getattr(compiled, "run", None)
    if driver is None or not triton.__version__.startswith(SEEN) or _current_stream is None:
        return None
    if not isinstance(run, driver.CudaLauncher) or run.global_scratch_size or run.profile_scratch_size:
        return None
    launch, encode = run.launch, []
    if inspect.isfunction(launch):  # which encodes tiles, and calls the function in C
        inside = inspect.getclosurevars(launch).nonlocals
        launch, kinds = inside["launcher"], inside["tensordesc_meta"]
        if inside["tensordesc_indices"] != {*range(len(kinds))}:  # those are not the first arguments
            return None
        encode = [functools.partial(driver.make_tensordesc_arg, metadata=kind) for kind in kinds]
    flags, nobody = (run.launch_cooperative_grid, run.launch_pdl), (None, None, None)
    before = compiled.function, *flags, None, None, compiled.packed_metadata, *nobody
    return _Direct(launch, encode, before)
