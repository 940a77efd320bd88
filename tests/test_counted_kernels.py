"""The kernels of rows that count: interpreted, and compiled for an H200."""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from typing import Any
from unittest import mock

import interpreter
import kernel_reference as reference
import pytest
import torch
import triton
from gpu_codegen import generate, interpret
from pairwise import EVERYTHING
from torch import Tensor

from inductor_ce import ops
from inductor_ce.ops import (
    counted,
    counted_kernels,
    gemm,
    lowering,
    operators,
    product_kernels,
    products,
    sum_kernels,
)

KERNELS = "inductor_ce.ops.product_kernels"
SUMS = "inductor_ce.ops.sum_kernels"
SHARED = 227 * 1024  # bytes of shared memory that a program of an H200 may have


@pytest.fixture(scope="module", autouse=True)
def registered() -> None:
    lowering.register()


# What a CUDA graph is recorded with


def seen_and_recorded(left: list[int], later: list[int], n: int, patch: pytest.MonkeyPatch) -> Tensor:
    """`left` of a call, then of a recording."""
    patch.setattr(counted, "host_copy", Tensor.clone)
    patch.setattr(counted, "_seen", {})
    seen, recorded = (torch.tensor(x, dtype=torch.int32) for x in (left, later))
    assert torch.equal(counted.recorded(seen, n, 0), seen)
    patch.setattr(counted, "is_being_recorded", lambda x: True)
    return counted.recorded(recorded, n, 0)


@pytest.mark.parametrize("all_rows", [4096, 3968])
def test_a_graph_computes_all_rows_where_nearly_all_counted(
    all_rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    left = seen_and_recorded([all_rows, all_rows - 2048], [64, -1984], 4096, monkeypatch)
    assert left.tolist() == [counted.ALL] * 2
    assert [counted.rows_of_piece(left, None, piece, 2048) for piece in range(2)] == [2048, 2048]


def test_a_graph_leaves_out_rows_where_many_did_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    left = seen_and_recorded([3904, 1856], [4096, 2048], 4096, monkeypatch)
    assert left.tolist() == [4096, 2048]


@pytest.mark.parametrize("which", [(4096, 1, 2), (4097, 0, 2), (4096, 0, 1)])
def test_a_graph_is_told_of_its_own_head(
    which: tuple[int, int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen_and_recorded([4096, 2048], [4096, 2048], 4096, monkeypatch)
    n, head, pieces = which
    left = torch.arange(pieces, dtype=torch.int32)
    assert torch.equal(counted.recorded(left, n, head), left)


def test_products_are_loaded_once_before_a_recording(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(counted, "host_copy", Tensor.clone)
    monkeypatch.setattr(counted, "_seen", {})
    monkeypatch.setattr(counted, "_loaded", set())
    a, b, out = torch.randn(64, 8), torch.randn(8, 16), torch.randn(64, 16)
    left = torch.tensor([64], dtype=torch.int32)
    before = counted.recorded(left, 64, 0)
    assert [counted.is_to_load(x, out, a, b) for x in (None, left, before, before)] == [
        False,
        False,
        True,
        False,
    ]
    monkeypatch.setattr(counted, "is_being_recorded", lambda x: True)
    assert not counted.is_to_load(counted.recorded(left, 64, 0), out.t(), b.t(), a.t())


def test_a_graph_of_which_nothing_has_come(monkeypatch: pytest.MonkeyPatch) -> None:
    left = seen_and_recorded([counted.PENDING] * 2, [4096, 2048], 4096, monkeypatch)
    assert left.tolist() == [4096, 2048]


# Interpreted


@pytest.mark.parametrize("n", [1, 70, 2048, 5000])
@pytest.mark.parametrize("share", [0, 0.5, 1])
def test_order(share: float, n: int) -> None:
    counts = torch.rand(n) < share
    made = [torch.full((n,), -7), torch.full((n,), -7), torch.zeros(1, dtype=torch.int32)]
    _, *made = interpreter.call(KERNELS, "fill_order", counts, *made)
    for ours, right in zip(made, torch.ops.inductor_ce.row_order(counts), strict=True):
        assert torch.equal(ours, right)


def test_order_of_strided_counts() -> None:
    counts = (torch.rand(90) < 0.5)[::3]
    made = [torch.full((30,), -7), torch.full((30,), -7), torch.zeros(1, dtype=torch.int32)]
    _, *made = interpreter.call(KERNELS, "fill_order", counts, *made)
    assert torch.equal(made[0], torch.ops.inductor_ce.row_order(counts)[0])


@pytest.mark.parametrize("on_device", [True, False])
@pytest.mark.parametrize("left", [0, 3, 5])
def test_rows(left: int, on_device: bool) -> None:
    """NaN of rows that are not counted is not taken, and rows beyond are not written."""
    x, rows = torch.randn(1030, 9).t(), torch.tensor([8, 2, 0, 5, 1])
    counted_ = torch.tensor([True, False, True, True, False])
    x[2] = torch.nan
    taken = torch.full((5, 1030), 7.0)
    limit: Any = torch.tensor(left, dtype=torch.int32) if on_device else left
    *_, taken = interpreter.call(KERNELS, "fill_rows", x, rows, counted_, limit, taken)
    right = torch.where(counted_[:, None], x[rows], 0.0)
    assert torch.equal(taken[:left], right[:left])
    assert (taken[left:] == 7).all()


def logits_of(n: int, v: int) -> tuple[Tensor, Tensor]:
    return 3 * torch.randn(n, v), torch.randint(-1, v, (n,))


WHICH = "max,sumexp,pick"


@pytest.mark.in_turns
@pytest.mark.parametrize("v", [7, 5000])
@pytest.mark.parametrize(("piece", "n"), [(0, 3), (1, 2), (2, 0)])
def test_statistics_of_some_rows(piece: int, n: int, v: int) -> None:
    z, y = logits_of(3, v)
    left = torch.tensor([5, 2, -1], dtype=torch.int32)

    def f(z: Tensor, y: Tensor, left: Tensor) -> Tensor:
        return operators.some_row_stats(z, [y], [], WHICH, left, piece)

    (wrapper,) = generate(f, *(t.to("meta") for t in (z, y, left)))
    out = torch.full((3, 3), 7.0)
    interpret(wrapper, [z, y, left], out)
    right = reference.stats(z, [y], [], WHICH)
    torch.testing.assert_close(out[:, :n].double(), right[:, :n], rtol=1e-5, atol=1e-4)
    assert (out[:, n:] == 7).all()


@pytest.mark.in_turns
@pytest.mark.parametrize("v", [7, 5000])
@pytest.mark.parametrize(("piece", "n"), [(0, 20), (1, 13), (2, 1), (3, 0)])
def test_gradient_of_some_rows(piece: int, n: int, v: int) -> None:
    """More rows than a program has at once, and as many programs as rows need not be."""
    z, y = logits_of(20, v)
    left, c = torch.tensor([33, 13, 1, -20], dtype=torch.int32), torch.randn(3, 20)
    m = z.amax(-1)

    def f(z: Tensor, y: Tensor, m: Tensor, c: Tensor, left: Tensor) -> Tensor:
        return operators.some_row_grad(z, [y], [], m, c, WHICH, left, piece)

    (wrapper,) = generate(f, *(t.to("meta") for t in (z, y, m, c, left)))
    out = torch.full((20, v), 7.0)
    interpret(wrapper, [z, y, m, c, left], out)
    right = ops.row_grad(z.double(), [y], [], m.double(), c.double(), WHICH)
    torch.testing.assert_close(out[:n].double(), right[:n], rtol=1e-5, atol=1e-5)
    assert (out[n:] == 7).all()


# Products, in Triton

WIDE, TALL, NARROW = counted_kernels.WIDE, counted_kernels.TALL, counted_kernels.NARROW
LEFT = [0, 64, 192, 300]  # of 256 rows: the last is more than there are


def on_three_processors(name: str, *arguments: Any) -> None:
    """A function of `counted_kernels`, in the process that interprets."""
    ways = {"_processors": lambda device: 3, "reads_tiles": lambda device: True}
    with mock.patch.multiple(counted_kernels, **ways):
        assert getattr(counted_kernels, name)(*arguments) is not False


def interpreted(name: str, *arguments: Any) -> list[Any]:
    return interpreter.call(__name__, "on_three_processors", name, *arguments)[1:]


@pytest.mark.in_turns
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("left", LEFT)
def test_product_of_rows(left: int, biased: bool) -> None:
    a, w = torch.randn(256, 72).half(), torch.randn(200, 72).half()
    bias, out = torch.randn(200).half(), torch.full((256, 200), 7.0).half()
    limit = torch.tensor(left, dtype=torch.int32)
    made, *_ = interpreted("product_of_rows", out, a, w.t(), limit, bias if biased else None)
    right = a.double() @ w.t().double() + biased * bias.double()
    torch.testing.assert_close(made[:left].double(), right[:left], rtol=2e-3, atol=2e-2)
    assert (made[-(-left // 128) * 128 :] == 7).all()


BIASES: dict[str, Callable[[int], Tensor]] = {
    "a column": lambda v: torch.randn(v, 3).half()[:, 1],
    "one for all": lambda v: torch.randn(1).half(),
    "one that is expanded": lambda v: torch.randn(1).half().expand(v),
}


@pytest.mark.parametrize("name", BIASES)
@pytest.mark.parametrize(("by", "v"), [("the host", 200), ("the device", 200), ("a library", 203)])
def test_a_bias_of_any_stride(name: str, by: str, v: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a library's product of unaligned columns each part is one of its own."""

    def product(out: Tensor, *arguments: Any) -> bool:
        if by != "a library":
            out.copy_(interpreted("product_of_rows", out, *arguments)[0])
        return by != "a library"

    monkeypatch.setattr(counted_kernels, "product_of_rows", product)
    monkeypatch.setattr(gemm, "is_slow", lambda size, factor: size > 8)
    monkeypatch.setattr(products, "rows_of_piece", lambda *given: None if by == "the device" else 128)
    a, w, bias = torch.randn(128, 72).half(), torch.randn(v, 72).half(), BIASES[name](v)
    left = torch.tensor([128], dtype=torch.int32) if by == "the device" else None
    z = torch.ops.inductor_ce.logits(a, w.t(), bias, [], None, left)
    right = a.double() @ w.t().double() + bias.double()
    torch.testing.assert_close(z.double(), right, rtol=2e-3, atol=2e-2)


@pytest.mark.parametrize("d", [72, 68])
def test_factors_of_which_no_tiles_are_read(d: int) -> None:
    """Of all rows a library makes the products, though fewer are asked for."""
    a, w = torch.randn(64, d).half(), torch.randn(40, d).half()
    left = torch.tensor([3], dtype=torch.int32)
    with (
        mock.patch.object(products, "rows_of_piece", lambda *given: None),
        mock.patch.object(counted, "rows_of_piece", lambda *given: None),
    ):
        z = torch.ops.inductor_ce.logits(a, w.t(), None, [], None, left)
        out = torch.zeros(64, d).half()
        torch.ops.inductor_ce.product_to_rows(out, z, w, 0, left, None, 0)
    torch.testing.assert_close(z, a @ w.t())
    torch.testing.assert_close(out, z @ w)


FACTORS = torch.randn(16, 304).half()


def test_factors_from_any_address_on() -> None:
    """What is copied to an aligned address can be read in tiles as before."""
    for x in (FACTORS[:, 4:104], FACTORS[:, 4:104].t(), FACTORS[1:, :104]):
        assert counted_kernels.has_tiles(x)
        made = counted_kernels._aligned(x)
        assert torch.equal(made, x)
        assert made.data_ptr() % 16 == 0
        counted_kernels._tiles(made, 64, 64)
    for x in (FACTORS[0].expand(16, -1), FACTORS.t()[:, :1].expand(-1, 16), FACTORS.float()):
        assert not counted_kernels.has_tiles(x)


def test_factors_without_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton has no tiles of nothing."""
    monkeypatch.setattr(counted_kernels, "_known", {})
    monkeypatch.setattr(counted_kernels, "reads_tiles", lambda device: True)
    for module in (counted, products):
        monkeypatch.setattr(module, "rows_of_piece", lambda *given: None)
    a, w, out = torch.randn(0, 72).half(), torch.randn(40, 72).half(), torch.full((40, 72), 7.0).half()
    left = torch.tensor([0], dtype=torch.int32)
    z = torch.ops.inductor_ce.logits(a, w.t(), None, [], None, left)
    assert z.shape == (0, 40)
    torch.ops.inductor_ce.product_into(out, z.t(), a, 0, False, left, None, 0)
    assert not out.any()


def divided(parts: Tensor, *arguments: Any) -> None:
    new_empty = Tensor.new_empty

    def given(x: Tensor, size: Any, **how: Any) -> Tensor:
        return parts if size == parts.shape else new_empty(x, size, **how)

    with (
        mock.patch.dict(counted_kernels._known, clear=True),
        mock.patch.multiple(counted_kernels, LONG=64, RATES=[(WIDE, 1.0)], MOST_PARTS=len(parts)),
        mock.patch.object(Tensor, "new_empty", given),
    ):
        on_three_processors("product_of_rows", *arguments)


@pytest.mark.parametrize("most", [2, 3, 4])
@pytest.mark.parametrize("terms", [72, 304])
@pytest.mark.parametrize("left", [0, 64, 192, 320, 448, 700])  # one to four tiles, for three processors
def test_sums_of_few_tiles_are_divided(left: int, terms: int, most: int) -> None:
    """Of one tile there are parts, alone or after three whole ones; the last part may have no terms."""
    a, w = torch.randn(512, terms).half(), torch.randn(terms, 200).half()
    out, limit = torch.full((512, 200), 7.0).half(), torch.tensor(left, dtype=torch.int32)
    before = torch.full((most, 128, 256), torch.nan)
    parts, made, *_ = interpreter.call(__name__, "divided", before, out, a, w, limit)
    right = a.double() @ w.double()
    torch.testing.assert_close(made[:left].double(), right[:left], rtol=2e-3, atol=2e-2)
    assert (made[-(-left // 128) * 128 :] == 7).all()
    is_divided = min(left, 512) / 128 in (0.5, 3.5, 4)
    assert [bool(part.isnan().any()) for part in parts] == [
        not is_divided or i >= min(most, 3) for i in range(most)
    ]


@pytest.mark.in_turns
@pytest.mark.parametrize("accumulate", [False, True])
@pytest.mark.parametrize("left", LEFT)
def test_product_over_rows(left: int, accumulate: bool) -> None:
    """Rows beyond hold anything."""
    dz, h = torch.randn(256, 200).half(), torch.randn(256, 72).half()
    dz[left:], h[left:] = torch.nan, torch.nan
    out, limit = torch.ones(200, 72), torch.tensor(left, dtype=torch.int32)
    made, *_ = interpreted("product_over_rows", out, dz.t(), h, limit, accumulate)
    right = accumulate + dz[:left].double().t() @ h[:left].double()
    torch.testing.assert_close(made.double(), right, rtol=1e-3, atol=1e-3)


def by_small_tiles(tile: dict[str, Any], processors: int, parts: int, name: str, *arguments: Any) -> None:
    ways = {"_processors": lambda device: processors, "reads_tiles": lambda device: True, "ROWS_ADDED": 8}
    tiles = {"RATES": [(tile, 1.0)], "NARROW": tile, "MOST_PARTS": parts, "LONG": 64}
    counted_kernels._tile.cache_clear()
    with (
        mock.patch.dict(counted_kernels._known, clear=True),
        mock.patch.multiple(counted_kernels, **ways, **tiles),
    ):
        assert getattr(counted_kernels, name)(*arguments)
    counted_kernels._tile.cache_clear()


def any_factor(choice: random.Random, n: int, k: int) -> Tensor:
    """[n, k], or its transpose, whose rows are followed by NaN in memory."""
    is_transposed = choice.random() < 0.5
    if is_transposed:
        n, k = k, n
    x = torch.full((n, -(-k // 8) * 8 + choice.choice((0, 8))), torch.nan).half()[:, :k]
    x.copy_(torch.randn(n, k))
    return x.t() if is_transposed else x


@pytest.mark.parametrize("seed", range(24))
def test_products_of_any_sizes(seed: int) -> None:
    """By any number of processors, and in any number of parts, as no GPU has them."""
    choice = random.Random(seed)
    torch.manual_seed(seed)
    tile = {"M": choice.choice((16, 32)), "N": choice.choice((16, 32)), "K": choice.choice((16, 32))}
    tile |= {"GROUP": choice.choice((1, 2)), "num_warps": 4, "num_stages": 2}
    m, n, k, limit = (choice.choice((size, choice.randint(1, 140))) for size in (140, 90, 90, 140))
    a, b, is_over = any_factor(choice, m, k), any_factor(choice, k, n), choice.random() < 0.2
    out = torch.full((m, -(-n // 8) * 8), 3.0, dtype=choice.choice((torch.half, torch.float)))[:, :n]
    accumulate, rows = is_over and choice.random() < 0.5, min(limit, m)
    if is_over:
        rows, limit = m, -(-limit // tile["K"]) * tile["K"]
        a[:, limit:], b[limit:] = torch.nan, torch.nan
    given = torch.tensor(limit, dtype=torch.int32), *([accumulate] if is_over else [])
    how = tile, choice.choice((3, 5, 13)), choice.choice((3, 8, 13))
    name = "product_over_rows" if is_over else "product_of_rows"
    made = interpreter.call(__name__, "by_small_tiles", *how, name, out, a, b, *given)[len(how) + 1]
    terms = min(limit, k) if is_over else k
    right = a[:, :terms].double() @ b[:terms].double() + 3 * accumulate
    torch.testing.assert_close(made[:rows].double(), right[:rows], rtol=2e-3, atol=2e-2)
    assert is_over or (made[-(-rows // tile["M"]) * tile["M"] :] == 3).all()


@pytest.mark.parametrize("left", [0, 3, 300])
def test_sums_of_rows(left: int) -> None:
    dz, limit = torch.randn(200, 70), torch.tensor(left, dtype=torch.int32)
    for end in (limit, left):
        parts, *_ = interpreter.call(SUMS, "sums_over_rows", torch.full((4, 70), 7.0), dz, end)
        torch.testing.assert_close(parts.sum(0), dz[:left].sum(0), rtol=1e-5, atol=1e-5)


# Compiled


@pytest.mark.parametrize(
    ("kernel", "types", "constants"),
    [
        (
            product_kernels._fill_order,
            {"counts": "*i1", "order": "*i64", "place": "*i64", "count": "*i32"},
            {"BLOCK": product_kernels.COUNTED_AT_ONCE},
        ),
        *(
            (
                product_kernels._fill_rows,
                {"x": "*bf16", "rows": "*i64", "counted": "*i1", "taken": "*bf16"} | left,
                {"ON_DEVICE": int(bool(left)), "WIDTH": 1024},
            )
            for left in ({"left": "*i32"}, {})
        ),
        *(
            (
                sum_kernels._sum_rows,
                {"parts": "*fp32", "dz": "*bf16"} | left,
                {"ON_DEVICE": int(bool(left)), "PARTS": 4, "COLUMNS": 64, "ROWS": 128},
            )
            for left in ({"left": "*i32"}, {})
        ),
        (
            counted_kernels._add_parts,
            {"out": "*bf16", "parts": "*fp32", "left": "*i32"},
            {"M": 128, "N": 256, "ROWS": 16, "GROUP": 16},
        ),
    ],
)
def test_kernels_compile(kernel: Any, types: dict[str, str], constants: dict[str, int]) -> None:
    assert interpreter.compiles(kernel, types, **constants)


def shared_memory(tile: dict[str, Any], a_t: bool, b_t: bool, out: str, **uses: bool) -> int:
    """Bytes that a program of `_multiply` has, compiled for an H200."""
    kernel = counted_kernels._multiply.function
    m, n, k = tile["M"], tile["N"], tile["K"]
    types = {
        "out": f"tensordesc<{out}[{m},{n // 2 if uses.get('ACCUMULATE') else n}]>",
        "a": f"tensordesc<bf16[{k},{m}]>" if a_t else f"tensordesc<bf16[{m},{k}]>",
        "b": f"tensordesc<bf16[{n},{k}]>" if b_t else f"tensordesc<bf16[{k},{n}]>",
        "bias": "*bf16",
        "parts": "*fp32",
        "left": "*i32",
    }
    constants: dict[str, Any] = {"A_T": a_t, "B_T": b_t, "GROUP": tile["GROUP"], "M": m, "N": n, "K": k}
    if not uses.get("ON_DEVICE", True):
        types["left"] = "i32"
    flags = dict.fromkeys(("HAS_BIAS", "ACCUMULATE", "OVER", "DIVIDED"), False)
    constants |= flags | {"ON_DEVICE": True} | uses
    signature = {n: types.get(n, "constexpr" if n in constants else "i32") for n in kernel.arg_names}
    source = triton.compiler.ASTSource(
        kernel,
        signature,
        constexprs={(kernel.arg_names.index(name),): value for name, value in constants.items()},
    )
    made = triton.compile(
        source,
        target=triton.backends.compiler.GPUTarget("cuda", 90, 32),
        options={"num_warps": tile["num_warps"], "num_stages": tile["num_stages"]},
    )
    assert "cubin" in made.asm
    return made.metadata.shared


USES = {
    "logits": (False, True, "bf16", {}),
    "logits with a bias": (False, True, "bf16", {"HAS_BIAS": True}),
    "logits where the host knows": (False, True, "bf16", {"HAS_BIAS": True, "ON_DEVICE": False}),
    "logits of a transposed weight": (False, False, "bf16", {"HAS_BIAS": True}),
    "dh": (False, False, "bf16", {}),
    "dh in parts": (False, False, "bf16", {"DIVIDED": True}),
    "dW": (True, False, "bf16", {"OVER": True}),
    "dW gains": (True, False, "bf16", {"OVER": True, "ACCUMULATE": True}),
    "dW in float32": (True, False, "fp32", {"OVER": True}),
    "dW gains in float32": (True, False, "fp32", {"OVER": True, "ACCUMULATE": True}),
    "dh in float32": (False, False, "fp32", {}),
}


IN_16_BITS = [WIDE, TALL, NARROW]  # in turns, or with ALL=1 each of each
TILES = {
    use: [NARROW] if out == "fp32" else IN_16_BITS if EVERYTHING else [IN_16_BITS[i % 3]]
    for i, (use, (_, _, out, _)) in enumerate(USES.items())
}


@pytest.mark.parametrize("use", USES)
def test_tiles_fit(use: str) -> None:
    a_t, b_t, out, uses = USES[use]
    for tile in TILES[use]:
        assert shared_memory(tile, a_t, b_t, out, **uses) <= SHARED


# rows, columns, tile: 132 processors make the last of 144 wide tiles while 120 wait, but of 256 while 8 wait
CHOSEN = [
    (2048, 4096, WIDE),
    (2048, 128256, WIDE),
    (151936, 896, TALL),
    (2048, 896, NARROW),
    (2048, 2304, NARROW),
    (2048, 3072, NARROW),
]


@pytest.mark.parametrize(("m", "n", "tile"), CHOSEN)
def test_tiles_by_how_many_processors_are_left_idle(m: int, n: int, tile: dict[str, int]) -> None:
    tiles = -(-m // tile["M"]) * -(-n // tile["N"])
    assert counted_kernels._tile(m, n, 2, 132, 0) == (tile, min(tiles, 132))
    assert counted_kernels._tile(m, n, 4, 132, 0)[0] == NARROW


@pytest.mark.parametrize(
    ("m", "n", "tile"),
    [
        (2048, 2304, WIDE),  # a round, and twelve tiles that eleven make each
        (2048, 4096, WIDE),  # 132 tiles, and 124 that nobody divides
        (2048, 1536, NARROW),  # 96 wide tiles, or 132 of half the size and 60 in two parts
        (2048, 896, WIDE),  # 64 tiles in two parts
    ],
)
def test_where_sums_are_divided_few_processors_are_idle(m: int, n: int, tile: dict[str, int]) -> None:
    assert counted_kernels._tile(m, n, 2, 132, counted_kernels.MOST_PARTS) == (tile, 132)


def test_tiles_divide_what_is_computed() -> None:
    """Rows of a sum are a multiple of what a program reads at once."""
    assert counted.ALIGNED % counted_kernels.ROWS == 0
    assert WIDE["K"] == NARROW["K"] == counted_kernels.ROWS


def test_a_symbolic_stride_is_multiplied_as_a_whole() -> None:
    """`2 * s0 - 3 * (s0 // 4)` is no row of what has `s0 - 3 * (s0 // 4)` in each."""

    def f(x: Tensor, y: Tensor, m: Tensor, c: Tensor) -> Tensor:
        n = x.shape[0] - 3 * (x.shape[0] // 4)
        coefficients = c[:n].t().contiguous()
        return operators.row_grad(x[:n], [y[:n]], [], m[:n], coefficients, "max,sumexp,pick")

    sizes = torch.empty(65, 2000), torch.empty(65, dtype=torch.int64), torch.empty(65), torch.empty(65, 3)
    (wrapper,) = generate(f, *sizes, dynamic=True)
    code = "".join(wrapper.kernels.values())
    loads = re.findall(r"tl\.load\(coefficients \+ (\d) \* (.*s0.*) \+ i_row", code)
    assert [row for row, _ in loads] == ["1", "2"]
    for row, stride in loads:
        names = re.findall(r"\bk?s\d+", stride)
        for n in (64, 65, 66, 67):
            values = dict.fromkeys(names, n)
            assert eval(f"{row} * {stride}", values) == int(row) * (n - 3 * (n // 4))
