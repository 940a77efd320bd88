"""Kernels that are launched again: only what they were compiled for is taken from what is kept."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import triton
from triton.backends.nvidia import driver

from inductor_ce.common.compat import launches
from inductor_ce.ops import launch


class Compilation:
    def __init__(self, log: list[Any]):
        self._log = log

    def __getitem__(self, grid: tuple[int, int, int]) -> Any:
        return lambda *arguments: self._log.append((self, grid, arguments))


class Function:
    """What `triton.jit` makes, as far as launching goes."""

    def __init__(self) -> None:
        self.launched: list[Any] = []
        self.log: list[Any] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def launch(*arguments: Any, **options: int) -> Compilation:
            self.launched.append((grid, arguments, options))
            return Compilation(self.log)

        return launch


X, Y = torch.zeros(64), torch.zeros(8, 64)
OTHERS = {
    "a number": ((X,), (8, 2), {}),
    "a number for a pointer": ((5,), (7, 2), {}),
    "dtype": ((X.double(),), (7, 2), {}),
    "alignment": ((X[1:],), (7, 2), {}),
    "options": ((X,), (7, 2), {"num_warps": 1}),
}


def test_the_same_kind_is_compiled_once() -> None:
    function = Function()
    kernel = launch.Kernel(function)
    kernel((5, 1, 1), (X,), 7, 2)
    kernel((6, 2, 1), (other := torch.ones(8),), 7, 2)  # of which Triton asks neither size nor values
    ((_, grid, arguments),) = function.log
    assert len(function.launched) == 1
    assert grid == (6, 2, 1)
    assert arguments == (other.data_ptr(), 7, 2)


@pytest.mark.parametrize("other", OTHERS)
def test_another_kind_is_not_taken(other: str) -> None:
    function = Function()
    kernel = launch.Kernel(function)
    kernel((5, 1, 1), (X, X), 7, 2)
    pointers, numbers, options = OTHERS[other]
    for _ in range(2):
        kernel((5, 1, 1), (X, *pointers), *numbers, **options)
    assert function.launched[1] == ((5, 1, 1), (X, *pointers, *numbers), options)
    (pointer,) = (x if isinstance(x, int) else x.data_ptr() for x in pointers)
    assert [made[1:] for made in function.log] == [((5, 1, 1), (X.data_ptr(), pointer, *numbers))]


def test_numbers_that_vary_are_found_by_what_triton_asks() -> None:
    """In the place of a pointer: whether it is 1, or a multiple of 16."""
    kernel = launch.Kernel(function := Function())
    for number in (16, 64, 0, 3, 5, 1, 17, 1, 32):
        kernel((1, 1, 1), (X, number), 2)
    assert [arguments[1] for _, arguments, _ in function.launched] == [16, 3, 1]
    assert [arguments[1] for *_, arguments in function.log] == [64, 0, 5, 17, 1, 32]


def test_what_is_kept_has_an_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "MOST", 2)
    kernel = launch.Kernel(function := Function())
    for i in (0, 1, 2, 2, 0):
        kernel((1, 1, 1), (X,), i)
    assert [arguments[1] for _, arguments, _ in function.launched] == [0, 1, 2, 2]


def test_tiles_of_a_tensor() -> None:
    """What is launched again reads tiles of another tensor of the same kind."""
    kernel = launch.Kernel(function := Function())
    tiles = launches.Tiles(Y, [4, 16])
    launcher = kernel.first((5, 1, 1), (X,), (7,), {}, [tiles], [Y])
    assert launcher is not None
    launcher((6, 1, 1), (3, 7), [other := torch.ones(8, 64)])
    ((_, (read, *given), options), (_, grid, (again, *rest))) = *function.launched, *function.log
    assert (read.base, [*read.shape], read.block_shape, given, options) == (Y, [8, 64], [4, 16], [X, 7], {})
    assert (again.base, [*again.shape], rest, grid) == (other, [8, 64], [3, 7], (6, 1, 1))


# Past Triton's own way

of_this_release = pytest.mark.skipif(
    not triton.__version__.startswith(launches.SEEN), reason="launches as Triton does"
)


class InC:
    """The function in C, with what it is called with."""

    def __init__(self) -> None:
        self.called: list[tuple[Any, ...]] = []

    def __call__(self, *arguments: Any) -> None:
        self.called.append(arguments)


class Compiled(Compilation):
    """A compilation for NVIDIA's GPUs whose first arguments are tiles, or none."""

    function, packed_metadata = 7, ("metadata",)

    def __init__(self, log: list[Any], tiles: int, scratch: int = 0):
        super().__init__(log)
        launch = InC()
        self.called = launch.called
        signature = {i: "tensordesc<fp16[16]>" if i < tiles else "i32" for i in range(tiles + 1)}
        meta = [{"number": i} for i in range(tiles)]
        run = self.run = object.__new__(driver.CudaLauncher)
        run.launch = driver.wrap_handle_tensordesc(launch, signature, meta)
        run.global_scratch_size, run.profile_scratch_size = scratch, 0
        run.launch_cooperative_grid, run.launch_pdl = False, True


BEFORE = (5, 1, 1, "stream", 7, False, True, None, None, ("metadata",), None, None, None)


@pytest.fixture
def encoded(monkeypatch: pytest.MonkeyPatch) -> list[torch.Tensor]:
    """What is encoded, as it is."""

    def encode(tiles: Any, metadata: dict[str, int]) -> list[Any]:
        made.append(tiles.base)
        return [metadata["number"], *tiles.shape]

    made: list[torch.Tensor] = []
    monkeypatch.setattr(driver, "make_tensordesc_arg", encode)
    monkeypatch.setattr(launches, "current_stream", lambda device: "stream")
    return made


TILES = launches.Tiles(Y, [4, 16])


@of_this_release
def test_tiles_are_encoded_once_for_where_they_are(encoded: list[torch.Tensor]) -> None:
    compiled = Compiled([], 2)
    launcher, other = launches.Launcher(compiled, 0, [TILES, TILES]), torch.ones(8, 64)
    for x in (Y, Y, other, Y):
        launcher((5, 1, 1), (9,), (Y, x))
    assert [args[: len(BEFORE)] for args in compiled.called] == [BEFORE] * 4
    assert [args[len(BEFORE) :] for args in compiled.called] == [(0, 8, 64, 1, 8, 64, 9)] * 4
    assert [x.data_ptr() for x in encoded] == [Y.data_ptr(), Y.data_ptr(), other.data_ptr()]


@of_this_release
def test_encodings_that_are_kept_have_an_end(
    encoded: list[torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launches, "MOST_TILES", 1)
    launcher, other = launches.Launcher(compiled := Compiled([], 1), 0, [TILES]), torch.ones(8, 64)
    for x in (Y, other, other, Y):
        launcher((5, 1, 1), (9,), [x])
    assert len(compiled.called) == 4
    assert [x.data_ptr() for x in encoded] == [x.data_ptr() for x in (Y, other, other)]


@of_this_release
@pytest.mark.usefixtures("encoded")
def test_what_reads_no_tiles() -> None:
    launches.Launcher(compiled := Compiled(log := [], 0), 0)((5, 1, 1), (X, 9))
    assert compiled.called == [(*BEFORE, X, 9)]
    assert not log


@of_this_release
@pytest.mark.usefixtures("encoded")
@pytest.mark.parametrize("why", ["release", "scratch", "hook", "other", "more tiles"])
def test_what_is_not_known_is_launched_as_triton_does(why: str, monkeypatch: pytest.MonkeyPatch) -> None:
    log: list[Any] = []
    compiled: Any = Compilation(log) if why == "other" else Compiled(log, 1, scratch=64 * (why == "scratch"))
    if why == "more tiles":
        compiled = Compiled(log, 2)
    if why == "release":
        monkeypatch.setattr(launches, "SEEN", "0.")
    if why == "hook":
        monkeypatch.setattr(triton.knobs.runtime.launch_enter_hook, "calls", [print])
    launches.Launcher(compiled, 0, [TILES])((5, 1, 1), (9,), [Y])
    ((made, grid, (tiles, *rest)),) = log
    assert (made, grid, tiles.base, rest) == (compiled, (5, 1, 1), Y, [9])
