"""Rows that torch leaves apart: a pick by fewer labels than there are rows is one of the first rows."""

from __future__ import annotations

import uuid
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from gallery import check_numbers, run
from harness import Rewritten
from kernels import compiled_together
from torch import Tensor
from torch._dynamo.utils import counters

import inductor_ce
from inductor_ce.common.findings import Reason

V = 40


def gathered(z: Tensor, y: Tensor) -> Tensor:
    return -F.log_softmax(z, -1).gather(-1, y.unsqueeze(-1)).squeeze(-1).mean()


def by_range(z: Tensor, y: Tensor) -> Tensor:
    return -F.log_softmax(z, -1)[torch.arange(len(y)), y].mean()


def of_sequences(z: Tensor, y: Tensor) -> Tensor:
    """As preferences are learnt: of each token its label, 0 where there is none."""
    kept = y != -100
    own = y.masked_fill(~kept, 0)
    picked = torch.gather(z.log_softmax(-1), 2, own.unsqueeze(2)).squeeze(2)
    return (picked * kept).sum(-1).mean()


def given(*rows: int, labelled: tuple[int, ...] | None = None) -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    return torch.randn(*rows, V).requires_grad_(), torch.randint(V, labelled or rows)


SIZES = {f: [(8,), (12,), (20,), (5,)] for f in (gathered, by_range)}
SIZES[of_sequences] = [(4, 8), (6, 8), (6, 11), (3, 7)]


@pytest.mark.parametrize("f", SIZES, ids=lambda f: f.__name__)
def test_other_sizes_are_fused_and_compiled_no_more_often(f: Callable[..., Tensor]) -> None:
    backend = Rewritten()
    compiled = torch.compile(f, backend=backend, fullgraph=True)
    for rows in SIZES[f]:
        args = given(*rows)
        check_numbers(run(compiled, args), f, args)
    assert not backend.report.misses
    assert len(backend.report.sites) == counters["stats"]["unique_graphs"] == len(SIZES[f][0]) + 1


@pytest.mark.parametrize(("f", "left"), [(gathered, [Reason.NOT_UNDERSTOOD]), (by_range, [])])
def test_fewer_labels_than_rows(f: Callable[..., Tensor], left: list[Reason]) -> None:
    """The guard does not hold; what is compiled then leaves the loss as written, or is of the first rows."""
    backend = Rewritten()
    compiled = torch.compile(f, backend=backend, fullgraph=True)
    for args in (given(8), given(12), given(12, labelled=(7,)), given(9), given(9, labelled=(4,))):
        check_numbers(run(compiled, args), f, args)
    assert counters["stats"]["unique_graphs"] == 3
    assert len(backend.report.sites) == 3 - len(left)
    assert [miss.reason for miss in backend.report.misses] == left


def test_sizes_with_bounds_of_their_own() -> None:
    args = given(8)
    for x in args:
        torch._dynamo.mark_dynamic(x, 0, min=2, max=64)
    with inductor_ce.install(min_vocab=2):
        assert len(inductor_ce.explain(gathered, *args).sites) == 1


def test_a_cache_keeps_the_guard(monkeypatch: pytest.MonkeyPatch) -> None:
    """No pass runs where a cache has what is compiled; the guard of the passes is there all the same."""
    monkeypatch.setenv("TORCH_COMPILE_CACHE_KEY_TAG", uuid.uuid4().hex)  # nothing was stored under it yet
    caches = (
        torch._inductor.config.patch(fx_graph_cache=True),
        torch._functorch.config.patch(enable_autograd_cache=True),
    )
    hits = []
    for _ in range(2):
        torch._dynamo.reset()
        counters.clear()
        with inductor_ce.install(min_vocab=2), compiled_together(), caches[0], caches[1]:
            compiled = torch.compile(gathered, dynamic=True)
            for args in (given(8), given(12), given(12, labelled=(5,))):
                check_numbers(run(compiled, args), gathered, args)
        assert counters["inductor_ce"]["misses"] == 1
        hits.append(counters["aot_autograd"]["autograd_cache_hit"])
    assert hits[0] == 0 < hits[1]


class Picks(torch.nn.Module):
    def forward(self, z: Tensor, y: Tensor) -> Tensor:
        return gathered(z, y)


def test_no_guard_where_nobody_asks_for_it() -> None:
    """An exported program takes any sizes that it was exported for, and AOTInductor's has no guards."""
    z, y = given(8)
    dims: Any = ({0: torch.export.Dim("n")}, {0: torch.export.Dim("labels")})
    program = torch.export.export(Picks(), (z, y), dynamic_shapes=dims)
    backend = Rewritten()
    backend(program.module(), [z, y])
    assert not backend.report.sites
    assert [miss.reason for miss in backend.report.misses] == [Reason.NOT_UNDERSTOOD]
