"""What ranks exchange for losses by collectives of their own is alike where their sizes and numbers are not.

One that gathers statistics while another waits in a collective of the program would wait for ever.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from by_hand_cases import LOSSES, NEAR_MISSES, measured
from by_hand_forms import FORMS
from harness import Rewritten, clean_slate
from pairwise import EVERYTHING
from ranks import Outcomes, attempt, once, spawn
from releases import before
from torch.fx import Graph
from torch.testing._internal.distributed.fake_pg import FakeStore

from inductor_ce.common.compat.distributed import ALL_GATHER, ALL_REDUCE, calls
from inductor_ce.distributed.by_hand import stats_of_ranks
from inductor_ce.graph.functions import function_bodies

pytestmark = pytest.mark.skipif(before(2, 12), reason="torch compiles autograd functions wrongly by itself")

N = 12
ALL = {**LOSSES, **NEAR_MISSES, **FORMS}
# (columns, the first of them, whether sizes and numbers are symbolic)
OTHERS = [(1, 0, False), (1, 7, True), (N, 7, False), (40, 0, True)]
NAMES = [*ALL] if EVERYTHING else [*FORMS, "smoothed", "gathered_normalisers", "regions"]
FUSED = {
    *("room_for_columns", "kept_dimension", "padding_filled", "view_filled", "share_of_columns"),
    *("numbers_of_a_rank", "number_under_log", "log_of_more", "one_row_later"),
}


@pytest.fixture
def _one_of_two() -> Iterator[None]:
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    yield
    dist.destroy_process_group()


def exchanges(graph: Graph) -> Iterator[str]:
    """What a graph exchanges in its forward, in order."""
    bodies = {body.call: body.forward for body in function_bodies(graph)}
    for node in graph.nodes:
        if node.target is stats_of_ranks:
            yield "statistics"
        elif calls(node, ALL_REDUCE):
            yield str(node.args[1])
        elif calls(node, ALL_GATHER):
            yield "gather"
        elif node in bodies:
            yield from exchanges(bodies[node])


def exchanged(name: str, v: int, start: int, dynamic: bool) -> list[str]:
    z, y = torch.randn(N, v), torch.randint(40, (N,))
    with clean_slate():
        backend = Rewritten()
        torch.compile(ALL[name], backend=backend, dynamic=dynamic)(z.requires_grad_() * 1.0, y, start)
        return list(exchanges(backend.final[0].graph))


@pytest.mark.usefixtures("_one_of_two")
@pytest.mark.parametrize("name", NAMES)
def test_ranks_exchange_alike(name: str) -> None:
    found = exchanged(name, 39, 7, False)
    for other in OTHERS:
        assert exchanged(name, *other) == found, other
    assert name not in FUSED or found == ["statistics"]


# On real ranks, of each its columns and whether its sizes are symbolic

TWO, FOUR = ((39, False), (1, True)), ((12, False), (3, True), (24, False), (1, False))
RUN = {
    TWO: [*FORMS, "smoothed", "gathered_normalisers"],
    FOUR: ["one_hot", "view_filled", "share_of_columns"],
}


def on_rank(rank: int, ranks: tuple[tuple[int, bool], ...]) -> dict[str, Any]:
    return Outcomes({name: attempt(one, rank, name, ranks) for name in RUN[ranks]})


def one(rank: int, name: str, ranks: tuple[tuple[int, bool], ...]) -> dict[str, Any]:
    v, dynamic = ranks[rank]
    start, generator = sum(own for own, _ in ranks[:rank]), torch.Generator().manual_seed(0)
    z = torch.randn(N, 40, generator=generator)[:, start : start + v]
    y, upstream = torch.randint(40, (N,), generator=generator), torch.randn(N, generator=generator)
    y[:3] = torch.tensor([39, -100, 0])
    given = y, start, upstream
    with clean_slate():
        compiled = torch.compile(ALL[name], backend=Rewritten(), dynamic=dynamic)
        return {
            "ours": measured(compiled, z, *given),
            "eager": measured(ALL[name], z, *given),
            "exact": measured(ALL[name], z.double(), *given),
        }


@once
def ranks_of(ranks: tuple[tuple[int, bool], ...]) -> list[dict[str, Any]]:
    return spawn(on_rank, len(ranks), ranks)


@pytest.mark.parametrize(("ranks", "name"), [(ranks, name) for ranks in RUN for name in RUN[ranks]])
def test_ranks_with_other_sizes_make_one_loss(ranks: tuple[tuple[int, bool], ...], name: str) -> None:
    for of_rank in ranks_of(ranks):
        found = of_rank[name]
        assert len(found["ours"]) == len(found["exact"])
        for ours, eager, exact in zip(found["ours"], found["eager"], found["exact"], strict=True):
            assert ours.dtype == eager.dtype
            torch.testing.assert_close(ours.double(), exact.double(), rtol=1e-5, atol=2e-5)
