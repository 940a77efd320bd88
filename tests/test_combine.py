"""The law: the statistics of blocks of columns, combined in any grouping, are those of the row."""

from __future__ import annotations

import functools
import random

import kernel_reference
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from inductor_ce import ops
from inductor_ce.ops.combine import chosen, combined, own_rows
from inductor_ce.ops.table import OPTIONAL, WEIGHED

laws = settings(deadline=None, derandomize=True, max_examples=60)

N, INF = 6, float("inf")
WANTED = ops.Rows.of(
    2,
    *map(ops.Row, OPTIONAL),
    *(ops.Row(ops.POWER, order=order) for order in (0.5, 2.0)),
    *(ops.Row(statistic, j) for j in range(2) for statistic in WEIGHED),
)
WITHOUT_MASSES = ops.Rows.of(2, ops.Row(ops.SUM), ops.Row(ops.DOT, 0), ops.Row(ops.EXPDOT, 1))


class Case:
    """Logits with what is hard in them, labels, weights, and the ends of the blocks."""

    def __init__(self, seed: int, wanted: ops.Rows = WANTED):
        self.wanted, self.rows = wanted, wanted.closed()
        self.shuffle = random.Random(seed)
        torch.manual_seed(seed)
        v = self.shuffle.randrange(1, 20)
        z = self.shuffle.choice([1.0, 30.0, 1e3]) * torch.randn(N, v)
        z[torch.rand(N, v) < self.shuffle.choice([0.0, 0.4])] = -INF
        z[0] = -INF
        z[1, : v // 2] = -INF
        z[2, self.shuffle.randrange(v)] = torch.nan
        z[3, self.shuffle.randrange(v)] = z[3].max()  # a tie, or the maximum itself
        z[4] = z[4].nan_to_num(neginf=0.0)
        z[4, -1] = -INF
        self.z, self.labels = z, [torch.randint(-1, v + 2, (N,)) for _ in range(2)]
        self.weights = [torch.rand(v), torch.rand(N, v)]
        self.ends = sorted(self.shuffle.choices(range(v + 1), k=self.shuffle.randrange(6)))

    @property
    def blocks(self) -> list[tuple[Tensor, Tensor]]:
        """(statistics [K, N], count [N]) of each block, some of them empty."""
        v = self.z.shape[1]
        return [self.block(i, j) for i, j in zip([0, *self.ends], [*self.ends, v], strict=True)]

    def block(self, start: int, end: int) -> tuple[Tensor, Tensor]:
        weights = [q[..., start:end] for q in self.weights]
        labels = [y - start for y in self.labels]
        packed = ops.row_stats(self.z[:, start:end], labels, weights, self.rows.encode()).double()
        return own_rows(packed, self.rows.law(), start), torch.full(
            (N,), float(end - start), dtype=torch.float64
        )

    def combine(self, *blocks: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        packed, counts = (torch.stack(of_all) for of_all in zip(*blocks, strict=True))
        return combined(self.rows.law(), packed, counts), counts.sum(0)

    def check(self, packed: Tensor) -> None:
        """Against the statistics of the whole rows, in float64; by the definitions where they are finite."""
        whole = ops.row_stats(self.z.double(), self.labels, self.weights, self.rows.encode())
        largest = self.z.abs().nan_to_num(neginf=0.0, posinf=0.0).amax(1).double()
        for row, actual, expected in zip(self.rows, packed, whole, strict=True):
            scale = self.z.shape[1] * (largest if "gap" in (row.statistic.term or "") else 1) + 1
            same = (actual == expected) | ((actual - expected).abs() <= 1e-5 * scale)
            if row.statistic == ops.KEPT_MASS:
                same |= whole[1].isnan()  # which columns are above -inf, NaN does not tell
            assert (same | (actual.isnan() & expected.isnan())).all(), (str(row), actual, expected)


@laws
@given(st.integers(0, 2**31))
def test_blocks_make_the_row(seed: int) -> None:
    case = Case(seed)
    case.check(case.combine(*case.blocks)[0])


@laws
@given(st.integers(0, 2**31))
def test_blocks_in_any_order_and_grouping_make_the_row(seed: int) -> None:
    case = Case(seed)
    blocks = case.blocks
    while len(blocks) > 1:
        case.shuffle.shuffle(blocks)
        taken = [blocks.pop() for _ in range(case.shuffle.randrange(2, len(blocks) + 1))]
        blocks.append(case.combine(*taken))
    case.check(blocks[0][0])


@laws
@given(st.integers(0, 2**31))
def test_combine_is_associative(seed: int) -> None:
    case = Case(seed)
    blocks = case.blocks
    left = functools.reduce(case.combine, blocks)
    right = functools.reduce(lambda right, block: case.combine(block, right), reversed(blocks))
    torch.testing.assert_close(left, right, rtol=1e-5, atol=1e-3, equal_nan=True)


@laws
@given(st.integers(0, 2**31))
def test_the_empty_block_is_the_identity(seed: int) -> None:
    case = Case(seed)
    whole, end = case.block(0, case.z.shape[1]), case.z.shape[1]
    for combined_ in (case.combine(whole, case.block(end, end)), case.combine(case.block(0, 0), whole)):
        torch.testing.assert_close(combined_, whole, rtol=0, atol=0, equal_nan=True)


def test_a_block_of_the_lowest_numbers() -> None:
    """As a mask has them: its exponentials are 1 beside its own maximum, and nothing beside the row's."""
    torch.manual_seed(0)
    z, q, lowest = torch.randn(N, 40), 3 * torch.rand(40), torch.finfo(torch.float32).min
    z[:, 20:] = lowest
    which = "max,sumexp,sumexpz,expdot:0,expzdot:0,keptexpdot:0"
    parts = [ops.row_stats(z[:, i], [], [q[i]], which) for i in (slice(20), slice(20, 40))]
    actual = combined(ops.Rows.decode(which, 0, 1).law(), torch.stack(parts), torch.full((2, 1), 20.0))
    torch.testing.assert_close(actual, parts[0])


@laws
@given(st.integers(0, 2**31))
def test_known_masses_stand_for_rows(seed: int) -> None:
    """Of weights [V] whose sums every rank knows, none are exchanged."""
    case = Case(seed, WITHOUT_MASSES)
    with_masses, counts = (torch.stack(of_all) for of_all in zip(*case.blocks, strict=True))
    bounds = zip([0, *case.ends], [*case.ends, case.z.shape[1]], strict=True)
    masses = torch.tensor([[case.weights[0][i:j].double().sum()] for i, j in bounds])
    alone = case.rows.closed(known=[0])
    assert alone == case.rows  # what is there stays
    without = torch.stack([chosen(block, case.rows, WITHOUT_MASSES) for block in with_masses])
    assert WITHOUT_MASSES.closed(known=[0]) == WITHOUT_MASSES
    actual = combined(WITHOUT_MASSES.law({0}), without, counts, {0: masses})
    expected = chosen(combined(case.rows.law(), with_masses, counts), case.rows, WITHOUT_MASSES)
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-3, equal_nan=True)


def test_the_reference_agrees() -> None:
    """The statistics of whole rows, by their definitions, where there is no NaN."""
    torch.manual_seed(0)
    z, labels, weights = torch.randn(N, 9).double(), [torch.arange(N)] * 2, [torch.rand(9), torch.rand(N, 9)]
    which = WANTED.encode()
    torch.testing.assert_close(
        ops.row_stats(z, labels, weights, which), kernel_reference.stats(z, labels, weights, which)
    )


def test_every_statistic_is_tested() -> None:
    told = {row.statistic for row in WANTED}
    assert {ops.MAX, ops.SUMEXP, ops.PICK, ops.POWER, *OPTIONAL, *WEIGHED} == told


@pytest.mark.parametrize("which", ["max,sumexp", "max,sumexp,pick,pick,sum,argmax,dot:0,mass:1"])
def test_rows_are_what_they_say(which: str) -> None:
    rows = ops.Rows.decode(which, which.count("pick"), which.count(":"))
    assert (rows.encode(), len(rows), repr(rows)) == (which, which.count(",") + 1, repr(which))
    assert len({rows, ops.Rows(rows.rows)}) == 1
