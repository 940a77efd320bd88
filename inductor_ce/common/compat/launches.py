"""Launch what Triton has compiled without what Triton looks up at every launch.

Triton's own `compiled[grid](...)` asks for the device, the stream and who listens, and encodes anew what
reads tiles of a tensor; that takes the host longer than the launch. For the releases in SEEN what is left to
do is known. Others launch as Triton does.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton import MockTensor, knobs
from triton.tools.tensor_descriptor import TensorDescriptor

SEEN = "3.6.", "3.7.", "3.8.", "3.9."
MOST_TILES = 256  # encodings that are kept of the tiles of one argument

Grid = tuple[int, int, int]


class Placeholder(MockTensor):
    """What a kernel is compiled for in the place of a tensor.

    Args:
        dtype: of the tensor.
        address: where it may be; Triton asks how that is aligned.
    """

    def __init__(self, dtype: torch.dtype, address: int = 0):
        super().__init__(dtype)
        self.data_ptr = lambda: address


class Tiles:
    """What reads tiles of a tensor, without the tensor: of others of its shape and strides it is the same.

    Args:
        x: any of them.
        block: the shape of a tile.

    Raises:
        AssertionError: no tiles of x can be read, as Triton checks it.
    """

    def __init__(self, x: Tensor, block: list[int]):
        anywhere = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="meta")
        self._dtype = x.dtype
        self._known = {**vars(TensorDescriptor.from_tensor(anywhere, block)), "base": None}

    def of(self, x: Tensor | Placeholder) -> TensorDescriptor:
        made = object.__new__(TensorDescriptor)
        made.__dict__.update(self._known)
        made.base = x
        return made

    def at(self, address: int) -> TensorDescriptor:
        return self.of(Placeholder(self._dtype, address))


class _Direct(NamedTuple):
    """How a compilation is launched.

    Attributes:
        launch: the function in C.
        encode: what it is given of the tiles of a tensor, one for each of the first arguments.
        before: its arguments between the stream and those of the kernel.
        together: whether those of the kernel are one argument.
    """

    launch: Callable[..., None]
    encode: Sequence[Callable[[Any], list[Any]]]
    before: tuple[Any, ...]
    together: bool


class Noted(NamedTuple):
    """A launch that has been done.

    Attributes:
        launcher: by what.
        grid: of how many programs.
        tiled: where the tensors are of which tiles are read.
        given: the other arguments, tensors as where they are.
    """

    launcher: Launcher
    grid: Grid
    tiled: tuple[int, ...]
    given: tuple[int, ...]


class Launcher:
    """`launcher(grid, given, tensors)` launches a compilation on the current stream.

    `tensors` are those of which tiles are read by the first arguments, and `given` are all other arguments,
    numbers or tensors, or the addresses of these.

    Args:
        compiled: what Triton made.
        device: the number of the GPU that it was made for.
        tiles: what reads tiles of `tensors`.
    """

    def __init__(self, compiled: Any, device: int, tiles: Sequence[Tiles] = ()):
        self._compiled, self._device, self._tiles = compiled, device, tiles
        self._encoded: list[dict[int, list[Any]]] = [{} for _ in tiles]
        self._direct = _direct(compiled, len(tiles))

    def __call__(self, grid: Grid, given: Sequence[Any], tensors: Sequence[Tensor] = ()) -> None:
        direct = self._direct
        if direct is None or is_listened_to():
            note(None)
            tiles = (tile.of(x) for tile, x in zip(self._tiles, tensors, strict=True))
            self._compiled[grid](*tiles, *given)
            return
        tiled = tuple(x.data_ptr() for x in tensors)
        if is_noting():
            note(Noted(self, grid, tiled, tuple(given)))
        direct.launch(*self.arguments(grid, given, tiled, current_stream(self._device)))

    @property
    def launch(self) -> Callable[..., None]:
        """What `arguments` are for, in C."""
        assert self._direct is not None
        return self._direct.launch

    def arguments(
        self, grid: Grid, given: Sequence[Any], tiled: Sequence[int], stream: int
    ) -> tuple[Any, ...]:
        """Those of `launch`, for tensors that are at `tiled`."""
        assert self._direct is not None
        encoded: list[Any] = []
        for i, address in enumerate(tiled):
            found = self._encoded[i].get(address)
            encoded += self._encode(i, address) if found is None else found
        own = *encoded, *given
        return *grid, stream, *self._direct.before, *([own] if self._direct.together else own)

    def _encode(self, i: int, address: int) -> list[Any]:
        assert self._direct is not None
        made = self._direct.encode[i](self._tiles[i].at(address))
        if len(self._encoded[i]) < MOST_TILES:
            self._encoded[i][address] = made
        return made

    @functools.cached_property
    def pointers(self) -> tuple[int, ...]:
        """Which of the arguments that are given, beside tensors in tiles, are tensors."""
        types = [*self._compiled.src.signature.values()][len(self._tiles) :]
        return tuple(i for i, name in enumerate(types) if name.startswith("*"))


def compiled_for(function: Any, arguments: Sequence[Any]) -> tuple[Any, ...]:
    """What of some arguments a compilation depends on, as Triton has it: of numbers whether they are 1, or
    multiples of 16, or need 64 bits, of placeholders dtype and alignment, unless the function says not."""
    kind: list[Any] = []
    for parameter, x in zip(function.params, arguments, strict=True):
        is_number_asked = not parameter.do_not_specialize
        is_alignment_asked = is_number_asked and not parameter.do_not_specialize_on_alignment
        if isinstance(x, TensorDescriptor):
            kind.append((x.base.dtype, *x.block_shape))
        elif isinstance(x, Placeholder):
            kind.append((x.dtype, is_alignment_asked and x.data_ptr() % 16 == 0))
        elif parameter.is_constexpr or (is_number_asked and x == 1):
            kind.append(x)
        else:
            kind.append((is_alignment_asked and x % 16 == 0, x.bit_length() > 31))
    return tuple(kind)


def compile_ahead(
    function: Any, device: int, grid: Grid, arguments: Sequence[Any], options: dict[str, int]
) -> None:
    """Have a function of `triton.jit` compiled, and what launches it built, as a launch will ask for it.

    Both are kept where Triton looks for them. A thread other than that which launches may do it.
    """
    torch.cuda.set_device(device)
    with _beginning:
        function.device_caches[device]  # two at once would make two, and forget what is put into one of them
    compiled = function.warmup(*arguments, grid=grid, **options)
    triton.runtime.driver.active.launcher_cls(compiled.src, compiled.metadata)


@contextlib.contextmanager
def noting() -> Iterator[list[Noted | None]]:
    """What this thread launches within; None stands for what another call may launch in another way."""
    before, _of_thread.noted = getattr(_of_thread, "noted", None), []
    try:
        yield _of_thread.noted
    finally:
        _of_thread.noted = before


def is_noting() -> bool:
    return getattr(_of_thread, "noted", None) is not None


def note(launch: Noted | None) -> None:
    if is_noting():
        _of_thread.noted.append(launch)


_of_thread = threading.local()
_beginning = threading.Lock()
current_stream: Any = getattr(torch._C, "_cuda_getCurrentRawStream", None)  # builds for CPUs have none


def is_listened_to() -> bool:
    """Whether somebody, such as a profiler, is to be told of launches."""
    return bool(knobs.runtime.launch_enter_hook.calls or knobs.runtime.launch_exit_hook.calls)


def _direct(compiled: Any, tiles: int) -> _Direct | None:
    """None where it is not known."""
    driver, run = sys.modules.get("triton.backends.nvidia.driver"), getattr(compiled, "run", None)
    if driver is None or not triton.__version__.startswith(SEEN) or current_stream is None:
        return None
    if not isinstance(run, driver.CudaLauncher) or _has_more_arguments(run):
        return None
    launch, encode = run.launch, []
    if inspect.isfunction(launch):  # which encodes tiles, and calls the function in C
        inside = inspect.getclosurevars(launch).nonlocals
        launch, kinds = inside["launcher"], inside["tensordesc_meta"] or ()
        tiled = inside.get("tensordesc_indices", inside.get("relevant_paths"))
        if {*tiled} != {*range(len(kinds))}:  # those are not the first arguments
            return None
        encode = [_encoder(driver.make_tensordesc_arg, kind) for kind in kinds]
    if len(encode) != tiles:
        return None
    return _Direct(launch, encode, _before(compiled, run), _is_together(run))


def _is_together(run: Any) -> bool:
    """Whether one function in C launches any kernel, which is so since 3.7."""
    return hasattr(run, "arg_annotations")


def _before(compiled: Any, run: Any) -> tuple[Any, ...]:
    function = compiled.function, run.launch_cooperative_grid, run.launch_pdl
    nobody, no_scratch = (None,) * 3, (None,) * 2
    if _is_together(run):
        kinds = run.arg_annotations, run.kernel_signature
        return *function, compiled.packed_metadata, *nobody, *no_scratch, *kinds
    return *function, *no_scratch, compiled.packed_metadata, *nobody


def _has_more_arguments(run: Any) -> bool:
    """Whether a kernel is given memory, or what instruments it, at each launch."""
    return bool(run.global_scratch_size or run.profile_scratch_size or getattr(run, "gsan_enabled", False))


def _encoder(function: Callable[..., list[Any]], kind: Any) -> Callable[[Any], list[Any]]:
    unused = (None,) * (len(inspect.signature(function).parameters) - 2)  # since 3.8 there is a third
    return lambda tile: function(tile, kind, *unused)
