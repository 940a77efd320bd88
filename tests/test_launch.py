"""Kernels that are launched again: only what they were compiled for is taken from what is kept."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch

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
