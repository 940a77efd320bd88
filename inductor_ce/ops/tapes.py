"""Launch again, for tensors of the same kinds, what a call has launched, without calling it.

What a call launches, and does nothing beside, is the same wherever its tensors are: only their addresses
differ. It is noted once, and then launched without what had decided what to launch. Addresses seldom differ
from step to step: what is given to C for them is kept and, if they are met again, a CUDA graph of it.

NOTE CUDA graphs. A graph holds launches and no memory: what it reads and writes is allocated by each call,
and a graph is launched for the very addresses that it was recorded with. Where the caller records a graph
himself, his has the launches.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..common.compat.driver import LaunchGraph
from ..common.compat.graphs import TorchDispatchMode
from ..common.compat.launches import Grid, Launcher, Noted, current_stream, is_listened_to, noting
from ..common.failsafe import attempt
from .launch import VECTOR

MOST = 64  # kinds of a call that are known
MOST_PLACES = 8  # of its tensors, of each kind
MOST_GRAPHS = 64
TIMES_APART = 2  # before a graph is recorded

aten = torch.ops.aten
VIEWS = {
    *(aten.slice.Tensor, aten.select.int, aten.t.default, aten.permute.default, aten.transpose.int),
    *(aten.as_strided.default, aten.view.default, aten.expand.default, aten.alias.default),
    *(aten.view.dtype, aten.detach.default, aten.unsqueeze.default, aten.squeeze.dim),
}

Launch = tuple[Callable[..., None], tuple[Any, ...]]


class _Place(NamedTuple):
    """So many bytes behind where a tensor begins, by its number, or an address that is none's."""

    tensor: int | None
    offset: int

    def address(self, begins: Sequence[int]) -> int:
        return self.offset if self.tensor is None else begins[self.tensor] + self.offset


class _Again(NamedTuple):
    """A launch for tensors that are elsewhere."""

    launcher: Launcher
    grid: Grid
    tiled: tuple[_Place, ...]
    given: tuple[_Place, ...]

    def arguments(self, begins: Sequence[int], stream: int) -> Launch:
        tiled, given = ([x.address(begins) for x in places] for places in (self.tiled, self.given))
        return self.launcher.launch, self.launcher.arguments(self.grid, given, tiled, stream)


class _Bound:
    """Launches for tensors at some addresses, on a stream: one after another, then as a graph."""

    def __init__(self, launches: Sequence[_Again], begins: Sequence[int], device: int, stream: int):
        self._launches, self._begins, self._device, self._stream = launches, begins, device, stream
        self._known = self._bound_to(stream)
        self._left = TIMES_APART
        self.graph: LaunchGraph | None = None

    def __call__(self) -> None:
        if torch.cuda.is_current_stream_capturing():
            _launch_all(self._known)
        elif self.graph is not None:
            self.graph.launch(self._stream)
        else:
            _launch_all(self._known)
            self._left -= 1
            if self._left == 0 and len(_with_graphs) < MOST_GRAPHS:
                self.graph, _ = attempt("kernels are launched one by one", self._recorded)

    def _bound_to(self, stream: int) -> list[Launch]:
        return [launch.arguments(self._begins, stream) for launch in self._launches]

    def _recorded(self) -> LaunchGraph:
        with torch.cuda.device(self._device):
            made = LaunchGraph(lambda stream: _launch_all(self._bound_to(stream)))
        _with_graphs.add(self)
        return made


def _launch_all(launches: Sequence[Launch]) -> None:
    for launch, arguments in launches:
        launch(*arguments)


_with_graphs = weakref.WeakSet[_Bound]()


class Tape:
    """What a call has launched.

    Args:
        launches: all that it did.
        given: tensors that it was given.
        made: those that were made for it; it has read or written no others.

    Raises:
        KeyError: it has.
    """

    def __init__(self, launches: Sequence[Noted], given: Sequence[Tensor], made: Sequence[Tensor]):
        self._overlaps = _overlaps([*given, *made])
        ranges = [*map(_range, [*given, *made])]
        self.launches = [_again(launch, ranges) for launch in launches]
        self._kinds = [(x.shape, x.stride(), x.dtype, x.device) for x in made]
        self._known: dict[tuple[int, ...], _Bound] = {}

    def play(self, begins: Sequence[int], given: Sequence[Tensor]) -> list[Tensor] | None:
        """Launch it for other tensors, which begin there. What is made; None where they lie apart in another
        way, so that nothing is done."""
        made = [
            torch.empty_strided(size, stride, dtype=dtype, device=device)
            for size, stride, dtype, device in self._kinds
        ]
        device = given[0].get_device()
        begins = *begins, *(x.data_ptr() for x in made)
        which = (stream := current_stream(device), *begins)
        known = self._known.get(which)
        if known is None:
            if _overlaps([*given, *made]) != self._overlaps:
                return None
            known = _Bound(self.launches, begins, device, stream)
            _keep(self._known, which, known, MOST_PLACES)
        known()
        return made


class Tapes:
    """`tapes.run(which, given, make, do)` is `made = make(); do(made)`, and returns `made`.

    What `make` returns, and what `do` launches, is determined by `which` and by what the tensors in `given`
    are, and not by what is in them. They are called at least twice for each kind of these, and always where
    `do` does anything else, or reads or writes other tensors.
    """

    def __init__(self) -> None:
        self.known: dict[Hashable, Tape | int] = {}

    def run(
        self,
        which: Hashable,
        given: Sequence[Tensor],
        make: Callable[[], list[Tensor]],
        do: Callable[[list[Tensor]], None],
    ) -> list[Tensor]:
        begins = [x.data_ptr() for x in given]
        kind = which, *((x.shape, x.stride(), x.dtype, x.get_device()) for x in given)
        kind = *kind, *(begin % VECTOR for begin in begins)
        known = self.known.get(kind, _NEW)
        if isinstance(known, Tape) and not is_listened_to():
            played = known.play(begins, given)
            if played is not None:
                return played
        made = make()
        if known == _CALLED:
            self.known[kind] = _noted(given, made, do) or _NEVER
            return made
        if known == _NEW:
            _keep(self.known, kind, _CALLED, MOST)
        do(made)
        return made


_NEW, _CALLED, _NEVER = range(3)  # the first call compiles


def _keep(known: dict[Any, Any], which: Hashable, value: Any, most: int) -> None:
    """Keep something, and no more than so many: what has been kept longest goes."""
    if len(known) >= most:
        del known[next(iter(known))]
    known[which] = value


def _noted(given: Sequence[Tensor], made: list[Tensor], do: Callable[[list[Tensor]], None]) -> Tape | None:
    """Do it. None where it does not always launch the same, or does anything else."""
    with noting() as launches, _Others() as others:
        do(made)
    done = [launch for launch in launches if launch is not None]
    if others.seen or len(done) < len(launches):
        return None
    try:
        return Tape(done, given, made)
    except KeyError:
        return None


class _Others(TorchDispatchMode):
    """Within, whether torch is asked for anything but views."""

    seen = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen = self.seen or func not in VIEWS
        return func(*args, **(kwargs or {}))


def _again(launch: Noted, ranges: Sequence[range]) -> _Again:
    pointers = {*launch.launcher.pointers}
    given = (_place(x, ranges) if i in pointers else _Place(None, x) for i, x in enumerate(launch.given))
    tiled = (_place(x, ranges) for x in launch.tiled)
    return _Again(launch.launcher, launch.grid, tuple(tiled), tuple(given))


def _place(address: int, ranges: Sequence[range]) -> _Place:
    if not address:  # of what has no elements
        return _Place(None, 0)
    for i, bytes_of in enumerate(ranges):
        if address in bytes_of:
            return _Place(i, address - bytes_of.start)
    raise KeyError(address)


def _range(x: Tensor) -> range:
    """The addresses of its bytes."""
    begin = x.data_ptr()
    if not x.numel():
        return range(begin, begin)
    last = sum((size - 1) * step for size, step in zip(x.shape, x.stride(), strict=True))
    return range(begin, begin + (last + 1) * x.itemsize)


def _overlaps(tensors: Sequence[Tensor]) -> list[tuple[int, int, int]]:
    """(one, another, how far they lie apart) of those that share bytes: by address either may be meant."""
    ranges = [*map(_range, tensors)]
    return [
        (i, j, b.start - a.start)
        for i, a in enumerate(ranges)
        for j, b in enumerate(ranges[:i])
        if max(a.start, b.start) < min(a.stop, b.stop)
    ]
