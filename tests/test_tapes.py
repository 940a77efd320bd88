"""What an operator has launched, launched again for tensors that are elsewhere."""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from inductor_ce.common import failsafe
from inductor_ce.common.compat.launches import Noted, note
from inductor_ce.ops import tapes
from inductor_ce.ops.tapes import Tape, Tapes

STREAM = 5


class Launcher:
    """A kernel of two pointers and a number, and of one tensor that is read in tiles."""

    pointers = (0, 1)

    def __init__(self) -> None:
        self.launched: list[tuple[Any, ...]] = []

    def launch(self, *arguments: Any) -> None:
        self.launched.append(arguments)

    @staticmethod
    def arguments(grid: Any, given: Sequence[int], tiled: Sequence[int], stream: int) -> tuple[Any, ...]:
        return grid, *given, *tiled, stream


class Graph:
    """A graph of launches, as a driver would have it."""

    made: ClassVar[list[Graph]] = []

    def __init__(self, launch: Callable[[int], None]):
        launch(-1)
        self.launched: list[int] = []
        self.made.append(self)

    def launch(self, stream: int) -> None:
        self.launched.append(stream)


class Calls:
    """An operator of x and y that makes z and memory for a time, and launches two kernels."""

    def __init__(self, also: Callable[[list[Tensor]], None] = lambda made: None):
        self.kernel, self.tapes, self.also = Launcher(), Tapes(), also
        self.done = 0

    def __call__(self, x: Tensor, y: Tensor, which: str = "") -> list[Tensor]:
        def do(made: list[Tensor]) -> None:
            z, memory = made
            self.done += 1
            for row in range(2):
                self.launch((7, 1, 1), [memory], [x[row], z, 16 + row])
            self.also(made)

        return self.tapes.run(which, [x, y], lambda: [torch.empty(3, 4), torch.empty(9)], do)

    def launch(self, grid: tuple[int, int, int], tiled: list[Tensor], given: list[Any]) -> None:
        """As a launcher does."""
        places = tuple(x.data_ptr() for x in tiled)
        numbers = tuple(x.data_ptr() if isinstance(x, Tensor) else x for x in given)
        note(Noted(self.kernel, grid, places, numbers))  # type: ignore[arg-type]
        self.kernel.launch(*self.kernel.arguments(grid, numbers, places, STREAM))

    @property
    def kinds(self) -> list[type]:
        return [type(known) for known in self.tapes.known.values()]


@pytest.fixture(autouse=True)
def device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tapes, "current_stream", lambda device: STREAM)
    monkeypatch.setattr(tapes, "LaunchGraph", Graph)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch.cuda, "device", lambda device: torch.no_grad())
    monkeypatch.setattr(Graph, "made", [])
    tapes._with_graphs.clear()


def rows(n: int = 4) -> tuple[Tensor, Tensor]:
    return torch.zeros(2, n), torch.zeros(5)


def right(x: Tensor, made: list[Tensor]) -> list[tuple[Any, ...]]:
    z, memory = made
    return [((7, 1, 1), x[i].data_ptr(), z.data_ptr(), 16 + i, memory.data_ptr(), STREAM) for i in range(2)]


def test_what_is_launched_again() -> None:
    """For the addresses of the tensors at hand, without the operator's own function."""
    calls = Calls()
    for i in range(5):
        x, y = rows()
        made = calls(x, y)
        assert calls.kernel.launched[-2:] == right(x, made)
        assert [(t.shape, t.dtype) for t in made] == [((3, 4), torch.float32), ((9,), torch.float32)]
        assert calls.done == min(i + 1, 2)
    assert calls.kinds == [Tape]


OTHERS = {
    "shape": (torch.zeros(2, 5), torch.zeros(5)),
    "strides": (torch.zeros(4, 2).t(), torch.zeros(5)),
    "dtype": (torch.zeros(2, 4), torch.zeros(5).int()),
    "alignment": (torch.zeros(9)[1:].view(2, 4), torch.zeros(5)),
}


@pytest.mark.parametrize("other", OTHERS)
def test_another_kind_has_its_own(other: str) -> None:
    calls = Calls()
    for given in (rows(), rows(), OTHERS[other], rows()):
        calls(*given)
    assert calls.done == 3
    assert calls.kinds == [Tape, int]


def test_another_call_has_its_own() -> None:
    calls = Calls()
    for which in ("one", "one", "two", "one"):
        calls(*rows(), which)
    assert calls.done == 3


def test_tensors_that_lie_apart_otherwise() -> None:
    """An address that both have may be meant as that of either."""
    calls, memory = Calls(), torch.zeros(100)
    one, another = memory[:8].view(2, 4), memory[4:9]
    for given in ((one, another), (one, another), (one, another), (one, memory[64:69]), rows()):
        made = calls(*given)
        assert calls.kernel.launched[-2:] == right(given[0], made)
    assert calls.done == 4


def anything_else(calls: Calls, what: str) -> Callable[[list[Tensor]], None]:
    others = torch.zeros(2)
    return {
        "a library": lambda made: made[1].zero_(),
        "memory": lambda made: made[1].new_empty(3),
        "other tensors": lambda made: calls.launch((1, 1, 1), [], [others, others, 1]),
        "a compilation": lambda made: note(None),
    }[what]


@pytest.mark.parametrize("what", ["a library", "memory", "other tensors", "a compilation"])
def test_what_does_anything_else_is_called(what: str) -> None:
    calls = Calls()
    calls.also = anything_else(calls, what)
    for _ in range(4):
        calls(*rows())
    assert calls.done == 4
    assert Tape not in calls.kinds


def test_a_tensor_without_elements_is_nowhere() -> None:
    calls = Calls()
    calls.also = lambda made: calls.launch((1, 1, 1), [], [made[1][:0], made[1], 2])
    for _ in range(3):
        made = calls(*rows())
    assert calls.done == 2
    assert calls.kernel.launched[-1] == ((1, 1, 1), 0, made[1].data_ptr(), 2, STREAM)


def test_who_listens_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """A hook of Triton's sees launches that go through Triton."""
    calls = Calls()
    for _ in range(3):
        calls(*rows())
    monkeypatch.setattr(tapes, "is_listened_to", lambda: True)
    calls(*rows())
    assert calls.done == 3


def stay(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is made anew is where it was."""
    kept: dict[Any, Tensor] = {}
    empty = torch.empty_strided

    def again(*size: Any, **how: Any) -> Tensor:
        return kept.setdefault((*map(tuple, size),), empty(*size, **how))

    monkeypatch.setattr(torch, "empty_strided", again)


def test_a_graph_of_the_same_addresses(monkeypatch: pytest.MonkeyPatch) -> None:
    """One by one at first, then as a graph; other addresses have another."""
    stay(monkeypatch)
    calls, given = Calls(), rows()
    calls(*given)
    calls(*given)
    for _ in range(tapes.TIMES_APART + 3):
        calls(*given)
    (graph,) = Graph.made
    assert graph.launched == [STREAM] * 3
    assert [launched[-1] for launched in calls.kernel.launched[-2:]] == [-1, -1]  # as it was recorded
    assert [x[:-1] for x in calls.kernel.launched[-2:]] == [x[:-1] for x in calls.kernel.launched[-4:-2]]
    made = calls(*(other := rows()))
    assert calls.kernel.launched[-2:] == right(other[0], made)
    calls(*other)
    assert len(Graph.made) == 2


def test_who_records_a_graph_has_the_launches(monkeypatch: pytest.MonkeyPatch) -> None:
    stay(monkeypatch)
    calls, given = Calls(), rows()
    for _ in range(8):
        calls(*given)
    (graph,) = Graph.made
    before = len(graph.launched)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    made = calls(*given)
    assert calls.kernel.launched[-2:] == right(given[0], made)
    assert len(graph.launched) == before


def test_graphs_are_few(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of what is forgotten do not count."""
    stay(monkeypatch)
    monkeypatch.setattr(tapes, "MOST_GRAPHS", 1)
    monkeypatch.setattr(tapes, "MOST_PLACES", 1)
    calls, some = Calls(), [rows() for _ in range(3)]
    for given in some:
        for _ in range(6):
            calls(*given)
            gc.collect()
    assert len(Graph.made) == 3
    assert len(tapes._with_graphs) == 1
    other = Calls()
    for _ in range(8):
        other(*some[0])
    assert len(Graph.made) == 3


@pytest.mark.fails_inside
def test_a_driver_that_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    """What it refuses is launched one by one, and not asked for again."""
    stay(monkeypatch)
    monkeypatch.setattr(failsafe, "_warned", True)
    asked: list[Any] = []

    def refuse(launch: Callable[[int], None]) -> Graph:
        asked.append(launch)
        raise RuntimeError

    monkeypatch.setattr(tapes, "LaunchGraph", refuse)
    calls, given = Calls(), rows()
    for _ in range(8):
        made = calls(*given)
        assert calls.kernel.launched[-2:] == right(given[0], made)
    assert len(asked) == 1


def test_what_is_kept_has_an_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tapes, "MOST", 2)
    calls = Calls()
    for n in (4, 5, 6):
        for _ in range(2):
            calls(*rows(n))
    assert calls.kinds == [Tape, Tape]
    calls(*rows(4))
    assert calls.done == 7
