"""Kernels that are launched again: only what they were compiled for is taken from what is kept."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
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


@dataclass
class Tiles:
    """What Triton's TensorDescriptor has."""

    base: torch.Tensor
    shape: Sequence[int]
    strides: Sequence[int]
    block_shape: Sequence[int]


X = torch.zeros(64)
OTHERS = {
    "a number": ((5,), (X, 8, 2), {}),
    "dtype": ((5,), (X.double(), 7, 2), {}),
    "alignment": ((5,), (X[1:], 7, 2), {}),
    "options": ((5,), (X, 7, 2), {"num_warps": 1}),
}


def test_the_same_kind_is_compiled_once() -> None:
    function = Function()
    kernel = launch.Kernel(function)
    kernel[(5,)](X, 7, 2)
    kernel[(6, 2)](other := torch.ones(8), 7, 2)  # of which Triton asks neither size nor values
    ((_, grid, arguments),) = function.log
    assert len(function.launched) == 1
    assert grid == (6, 2, 1)
    assert arguments == (other, 7, 2)


@pytest.mark.parametrize("other", OTHERS)
def test_another_kind_is_not_taken(other: str) -> None:
    function = Function()
    kernel = launch.Kernel(function)
    kernel[(5,)](X, 7, 2)
    grid, arguments, options = OTHERS[other]
    for _ in range(2):
        kernel[grid](*arguments, **options)
    assert function.launched[1] == (grid, arguments, options)
    assert [made[1:] for made in function.log] == [((5, 1, 1), arguments)]


def tiles(x: torch.Tensor, *block: int) -> Tiles:
    return Tiles(x, x.shape, x.stride(), [*block])


def test_tiles_of_a_tensor() -> None:
    """As Triton does, by dtype and by how large the tiles are; and by how the tensor lies in memory."""
    kernel = launch.Kernel(function := Function())
    kernel[(5,)](tiles(X, 16), 7)
    kernel[(5,)](other := tiles(torch.ones(64), 16), 7)
    assert [arguments for *_, arguments in function.log] == [(other, 7)]
    for another in (tiles(X, 32), tiles(X.half(), 16), tiles(X[:32], 16), tiles(X[::2], 16), X):
        kernel[(5,)](another, 7)
    assert len(function.launched) == 6


def test_what_is_kept_has_an_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "MOST", 2)
    kernel = launch.Kernel(function := Function())
    for i in (0, 1, 2, 2, 0):
        kernel[(1,)](X, i)
    assert [arguments[1] for _, arguments, _ in function.launched] == [0, 1, 2, 2]


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

    def encode(tiles: Tiles, metadata: dict[str, int]) -> list[Any]:
        made.append(tiles.base)
        return [metadata["number"], *tiles.shape]

    made: list[torch.Tensor] = []
    monkeypatch.setattr(driver, "make_tensordesc_arg", encode)
    monkeypatch.setattr(launches, "_current_stream", lambda device: "stream")
    return made


@of_this_release
def test_tiles_are_encoded_once_for_where_they_are(encoded: list[torch.Tensor]) -> None:
    compiled = Compiled([], 2)
    launcher, other = launches.Launcher(compiled, 0), torch.ones(64)
    for x in (X, X, other, X):
        launcher((5, 1, 1), (tiles(X, 16), tiles(x, 16), 9))
    assert [args[: len(BEFORE)] for args in compiled.called] == [BEFORE] * 4
    assert [args[len(BEFORE) :] for args in compiled.called] == [(0, 64, 1, 64, 9)] * 4
    assert [x.data_ptr() for x in encoded] == [X.data_ptr(), X.data_ptr(), other.data_ptr()]


@of_this_release
def test_encodings_that_are_kept_have_an_end(
    encoded: list[torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launches, "MOST_TILES", 1)
    launcher, other = launches.Launcher(compiled := Compiled([], 1), 0), torch.ones(64)
    for x in (X, other, other, X):
        launcher((5, 1, 1), (tiles(x, 16), 9))
    assert len(compiled.called) == 4
    assert [x.data_ptr() for x in encoded] == [x.data_ptr() for x in (X, other, other)]


@of_this_release
@pytest.mark.usefixtures("encoded")
def test_what_reads_no_tiles() -> None:
    launches.Launcher(compiled := Compiled(log := [], 0), 0)((5, 1, 1), (X, 9))
    assert compiled.called == [(*BEFORE, X, 9)]
    assert not log


@of_this_release
@pytest.mark.usefixtures("encoded")
@pytest.mark.parametrize("why", ["release", "scratch", "hook", "other"])
def test_what_is_not_known_is_launched_as_triton_does(why: str, monkeypatch: pytest.MonkeyPatch) -> None:
    log: list[Any] = []
    compiled: Any = Compilation(log) if why == "other" else Compiled(log, 1, scratch=64 * (why == "scratch"))
    if why == "release":
        monkeypatch.setattr(launches, "SEEN", "0.")
    if why == "hook":
        monkeypatch.setattr(triton.knobs.runtime.launch_enter_hook, "calls", [print])
    given = tiles(X, 16), 9
    launches.Launcher(compiled, 0)((5, 1, 1), given)
    assert log == [(compiled, (5, 1, 1), given)]
