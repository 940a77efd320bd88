"""A head in chunks as one operator: what it makes, by its steps and by the kernels that it launches."""

from __future__ import annotations

from typing import Any

import interpreter
import kernel_reference as reference
import pytest
import torch
from pairwise import pairwise
from test_head import CASES, check, inputs
from test_one_read import of_cross_entropy, soft_cap
from torch import Tensor

from inductor_ce.common.strategies import TOKEN_CHUNKS
from inductor_ce.heads import rolled, skip
from inductor_ce.ops import chunks, one_read_kernel, one_read_lowering
from inductor_ce.ops.one_read import Given
from inductor_ce.ops.row_program import RowProgram, coefficients

OPS = torch.ops.inductor_ce
N, D, V, R = 70, 8, 40, 4
WHICH = reference.rows(1)
KERNELS, SUMS = "inductor_ce.ops.product_kernels", "inductor_ce.ops.sum_kernels"


# The operator


def made(ends: list[int], counts: Tensor | None, but: int, wants: str, biased: bool) -> None:
    """What it makes is what all rows at once make, in float64."""
    h, w, g = torch.randn(N, D), torch.randn(V, D), torch.randn(N)
    bias = torch.randn(V) if biased else None
    y, program = torch.randint(-1, V + 1, (N,)), of_cross_entropy(1)
    is_read = torch.ones(N, dtype=torch.bool) if counts is None else counts
    wanted_w, wanted_h = "w" in wants, "h" in wants
    of_rows = [y], [], [g], WHICH, (program if counts is None else program.where_given()).encode(), ends
    operands = counts, w if wanted_h else None, h if wanted_w else None, [y] * but, R, "b" in wants
    h[~is_read], g[~is_read] = torch.nan, torch.nan
    dtypes = {"hidden": h.dtype} if wanted_h else {}
    dtypes |= {"weight": w.dtype} if wanted_w else {}
    stats, *rest = OPS.chunks(h, w.t(), bias, *of_rows, *operands, **dtypes)

    h = torch.where(is_read[:, None], h, 0.0)
    z = h.double() @ w.t().double() + (0.0 if bias is None else bias.double())
    expected = reference.stats(z, [y], [], WHICH)
    c = coefficients(program, expected, [torch.where(is_read, g, 0.0).double()])
    dz = reference.grad(z, [y], [], expected[0], c, WHICH)
    torch.testing.assert_close(stats[:, is_read].double(), expected[:, is_read], rtol=1e-5, atol=1e-4)
    assert (stats[:, ~is_read] == 1).all()
    place = torch.arange(N) if counts is None else rest.pop()
    if "b" in wants:
        torch.testing.assert_close(rest.pop().double(), dz.sum(0), rtol=1e-4, atol=1e-4)
    if wanted_h:
        hidden = OPS.take_rows(rest.pop(0), place, is_read, [])
        torch.testing.assert_close(hidden.double(), dz @ w.double(), rtol=1e-4, atol=1e-4)
    if wanted_w:
        weight = rest.pop(0)
        if but:
            kept, often, runs = rest
            entries = OPS.take_rows(kept[:, R : R + but], place, is_read, [])
            OPS.complete(weight, runs, entries, h, often)
        torch.testing.assert_close(weight.double(), dz.t() @ h.double(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("share", [None, 0.0, 0.5, 1.0])
@pytest.mark.parametrize(
    ("ends", "but", "wants", "biased"),
    pairwise([[N], [64, N], [32, 64, N]], [0, 1], ["hwb", "hw", "h", "w", "b"], [False, True]),
)
def test_it_makes_what_all_rows_make(
    share: float | None, ends: list[int], but: int, wants: str, biased: bool
) -> None:
    counts = None if share is None else torch.rand(N) < share
    made(ends, counts, but * ("w" in wants), wants, biased)


def test_factors_that_do_not_fit() -> None:
    y, g, program = torch.zeros(N, dtype=torch.int64), torch.ones(N), of_cross_entropy(1).encode()
    given = [y], [], [g], WHICH, program, [N], None, None, None, [], 0, False
    with pytest.raises(RuntimeError, match="do not fit"):
        OPS.chunks(torch.randn(N, D, device="meta"), torch.randn(D + 1, V, device="meta"), None, *given)


# In graphs


@pytest.fixture
def everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also on a CPU, whose host always knows how many rows count."""
    monkeypatch.setattr(rolled, "DEVICES", ("cpu",))
    monkeypatch.setattr(skip, "_is_told_on_device", lambda head, work: True)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The chunks of each call."""
    done: list[Any] = []
    do = chunks._Body.do

    def counted(self: Any, made: list[Tensor]) -> None:
        done.append(self._how.ends)
        do(self, made)

    monkeypatch.setattr(chunks._Body, "do", counted)
    return done


ROLLED = ["plain", "smoothing", "z-loss", "soft-cap", "sum", "bias", "shift", "by hand"]


@pytest.mark.usefixtures("everywhere")
@pytest.mark.parametrize(
    ("name", "frozen", "dynamic"), pairwise(ROLLED, ["", "hidden", "weight"], [None, True])
)
def test_a_head_is_one_operator(name: str, frozen: str, dynamic: bool | None, calls: list[Any]) -> None:
    pieces = check(CASES[name], inputs(), TOKEN_CHUNKS, frozen=frozen, dynamic=dynamic)
    assert pieces > 1
    assert [len(ends) for ends in calls] == [pieces]


@pytest.mark.usefixtures("everywhere")
@pytest.mark.parametrize("name", ["plain", "smoothing"])
def test_in_16_bits(name: str, calls: list[Any]) -> None:
    check(CASES[name], inputs(d=64).to(torch.bfloat16), TOKEN_CHUNKS, in_16_bits=True)
    assert len(calls) == 1


@pytest.mark.usefixtures("everywhere")
@pytest.mark.parametrize("name", ["entropy bonus", "per token"])
def test_what_else_is_done_piece_by_piece(name: str, calls: list[Any]) -> None:
    """Where anything else reads the gradient of the logits, or two kernels are faster."""
    assert check(CASES[name], inputs(), TOKEN_CHUNKS) > 1
    assert not calls


# The kernels


def wanted(
    z: Tensor, rows: list[Tensor], kinds: list[Tensor], texts: tuple[str, str, str], limited: bool
) -> Any:
    labels, weights, given = rows[:1], rows[1:], kinds
    steps = tuple(tuple(x.stride(0) if x.dim() else 0 for x in some) for some in (labels, weights, given))
    read = tuple(Given.of(k, x.dtype, x.dim() > 0) for k, x in enumerate(given))
    return one_read_kernel.Wanted(*texts, read, z.shape[1], z.itemsize, z.stride(0), steps)


def in_place(
    z: Tensor,
    rows: list[Tensor],
    given: list[Tensor],
    which: str,
    program: RowProgram,
    chain: str = "",
    left: int | None = None,
) -> tuple[Tensor, Tensor]:
    """The statistics and the gradient by the kernel of the operator; NaN where nothing is written."""
    (n, v), row = z.shape, -(-z.shape[1] // 8) * 8
    memory = torch.full((n, row), 7.0, dtype=z.dtype)
    dz = memory.narrow(1, 0, v).copy_(z)
    kernel = one_read_kernel.RowKernel(
        wanted(dz, rows, given, (which, program.encode(), chain), left is not None)
    )
    packed = torch.full((which.count(",") + 1, n + 3), torch.nan)
    words = torch.zeros(n, kernel.words, dtype=torch.int64)
    limit = torch.tensor(n if left is None else left, dtype=torch.int32)
    arguments: list[Any] = [dz, packed[:, 1:-2], words, *rows, *given, limit, n, packed.stride(0)]
    interpreter.run(kernel.source, one_read_kernel.NAME, kernel.grid(n), arguments, dz, arguments[1])
    assert packed[:, [0, -2, -1]].isnan().all()
    return packed[:, 1:-2], dz


@pytest.fixture(params=[1, 0], ids=["in time", "all by help"])
def delay(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    once = one_read_lowering.ONCE._replace(block=256, delay=request.param, spin=1)
    monkeypatch.setattr(one_read_lowering, "ONCE", once)


@pytest.mark.usefixtures("delay")
@pytest.mark.parametrize(
    ("v", "weighted", "capped"), pairwise([1, 7, 256, 600, 1301], [False, True], [False, True])
)
def test_the_gradient_lies_over_the_logits(v: int, weighted: bool, capped: bool) -> None:
    z, y, g = 3 * torch.randn(3, v), torch.randint(-1, v, (6,))[::2], torch.rand(3)
    q, others = [torch.rand(v)] * weighted, ["sum", *["dot:0"] * weighted]
    which, program = reference.rows(1, *others), of_cross_entropy(1, *[0.1] * len(others))
    chained = soft_cap() if capped else None
    packed, dz = in_place(z, [y, *q], [g], which, program, chained.chain.encode() if chained else "")
    x = chained.before(z.double()) if chained else z.double()
    expected = reference.stats(x, [y], q, which)
    torch.testing.assert_close(packed.double(), expected, rtol=1e-5, atol=1e-3)
    right = reference.grad(x, [y], q, expected[0], coefficients(program, expected, [g.double()]), which)
    if chained:
        of = z.double().requires_grad_()
        (right,) = torch.autograd.grad(chained.before(of), of, right)
    torch.testing.assert_close(dz.double(), right, rtol=1e-4, atol=1e-5)


@pytest.mark.usefixtures("delay")
@pytest.mark.parametrize("left", [-64, 0, 2, 64])
def test_rows_that_are_not_computed_are_left(left: int) -> None:
    z, y, g = 3 * torch.randn(3, 600).bfloat16(), torch.randint(-1, 600, (3,)), torch.tensor(0.5)
    packed, dz = in_place(z, [y], [g], WHICH, of_cross_entropy(1), left=left)
    all_rows = in_place(z, [y], [g], WHICH, of_cross_entropy(1))
    n = min(max(left, 0), 3)
    assert torch.equal(packed[:, :n], all_rows[0][:, :n])
    assert torch.equal(dz[:n], all_rows[1][:n])
    assert packed[:, n:].isnan().all()
    assert torch.equal(dz[n:], z[n:])


@pytest.mark.parametrize("on_device", [True, False])
@pytest.mark.parametrize("p", [1, 70])
@pytest.mark.parametrize("count", [0, 1, 64, 5000])
def test_rows_left_of_each_piece(count: int, p: int, on_device: bool) -> None:
    left, given = torch.full((p,), -7, dtype=torch.int32), torch.tensor([count], dtype=torch.int32)
    left, *_ = interpreter.call(KERNELS, "fill_left", left, given if on_device else count, 96, 64)
    assert left.tolist() == [-(-(count - 96 * i) // 64) * 64 for i in range(p)]


@pytest.mark.parametrize("ordered", [False, True])
@pytest.mark.parametrize("dtype", [torch.bool, torch.int32, torch.uint8, torch.float32, torch.bfloat16])
def test_numbers_in_order(dtype: torch.dtype, ordered: bool) -> None:
    n = 1500
    x, counts = torch.randint(0, 2, (2 * n,)).to(dtype)[::2], torch.rand(n) < 0.5
    order = torch.randperm(n) if ordered else None
    out = torch.full((n,), 7, dtype=torch.int64 if dtype in (torch.int32, torch.uint8) else dtype)
    otherwise = -1 if out.dtype == torch.int64 else 0
    wanted, made = out.clone(), interpreter.call(KERNELS, "fill_numbers", out, x, order, counts, otherwise)[0]
    chunks.make_numbers(wanted, x, order, counts, otherwise)
    assert torch.equal(made, wanted)
    moved = slice(None) if order is None else order
    assert torch.equal(made[counts[moved]], x[moved][counts[moved]].to(out.dtype))


def test_statistics_in_the_order_of_the_rows() -> None:
    k, n = 3, 1300
    packed, counts, place = torch.randn(k, n), torch.rand(n) < 0.5, torch.randperm(n)
    packed[:, place[~counts]] = torch.nan
    out = torch.full((k, n), 7.0)
    made, *_ = interpreter.call(KERNELS, "fill_statistics", out, packed, place, counts)
    assert torch.equal(made, torch.where(counts, packed[:, place], 1.0))


def test_memory_is_cleared() -> None:
    x = torch.full((3, 700), 7, dtype=torch.int64)
    made, *_ = interpreter.call(KERNELS, "clear", x[1:])
    assert not made.any()
    assert (x[0] == 7).all()


@pytest.mark.in_turns
@pytest.mark.parametrize(("r", "m"), [(128, 130), (3, 8), (140, 72)])
@pytest.mark.parametrize("left", [0, 64, 192, 1000])
@pytest.mark.parametrize("on_device", [True, False])
@pytest.mark.parametrize("ordered", [True, False])
def test_frequent_rows(left: int, r: int, m: int, on_device: bool, ordered: bool) -> None:
    """Of rows that do not count neither factor is looked at, nor of those that are not computed."""
    n = 300
    kept, rows = torch.randn(n, r + 5).half()[:, :r], torch.randn(n, m).half()
    order, counted = torch.randperm(n), torch.rand(n) < 0.7
    if not ordered:
        order, counted = torch.arange(n), torch.ones(n, dtype=torch.bool)
    is_read = counted & (torch.arange(n) < left)
    kept[~is_read], rows[order[~is_read]] = torch.nan, torch.nan
    limit: Any = torch.tensor(left, dtype=torch.int32) if on_device else min(left, n)
    made = torch.full((r, m), 7.0)
    which = (order, counted) if ordered else (None, None)
    made, *_ = interpreter.call(SUMS, "frequent_rows", made, kept, rows, *which, limit)
    right = kept[is_read].double().t() @ rows[order[is_read]].double()
    torch.testing.assert_close(made.double(), right, rtol=1e-5, atol=1e-4)
