"""The operators of products: what is left out of a product, and added at last."""

from __future__ import annotations

import collections
import functools
from collections.abc import Callable

import interpreter
import pytest
import torch
from torch import Tensor

from inductor_ce.ops import counted, gemm, label_products, products

N, V, D = 7, 5, 3
OPS = torch.ops.inductor_ce


def labels_of(*rows: list[int]) -> list[Tensor]:
    return [torch.tensor(row) for row in rows]


LABELS = [
    labels_of([0, 4, 2, 2, 2, 1, 4]),
    labels_of([-100, 5, 0, 0, -1, 4, 2**40]),  # none of the columns
    labels_of([0, 1, 2, 3, 4, 0, 1], [4, 1, -1, 3, 0, 0, 0]),  # two, the same in some rows
    [torch.tensor([3, 0, 255, 4, 1, 2, 2], dtype=torch.uint8)],
]


def factors(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    return torch.randn(N, V).to(dtype), torch.randn(N, D).to(dtype)


def entries_by_hand(dz: Tensor, labels: list[Tensor]) -> tuple[Tensor, Tensor]:
    """(the entries, dz without them), entry by entry."""
    rest, entries = dz.clone(), torch.zeros(len(labels), len(dz), dtype=dz.dtype)
    for k, label in enumerate(labels):
        for i, column in enumerate(label.tolist()):
            if 0 <= column < dz.shape[1]:
                entries[k, i] = rest[i, column]
                rest[i, column] = 0
    return entries, rest


def product_but(
    out: Tensor,
    dz: Tensor,
    h: Tensor,
    labels: list[Tensor],
    columns: Tensor,
    accumulate: bool = False,
    restore: bool = True,
) -> tuple[Tensor, Tensor]:
    """(the entries [N, K], the rows in float32). What is kept of other rows is left as it was."""
    r, k = len(columns), len(labels)
    kept = torch.full((len(dz) + 2, r + k), 7.0, dtype=dz.dtype)
    OPS.product_but(out, kept, dz, h, labels, columns, 1, accumulate, restore)
    assert bool((kept[[0, -1]] == 7.0).all())
    return kept[1:-1, r : r + k], OPS.frequent_rows(kept[1:-1, :r], h, None, None)


@pytest.mark.in_turns
@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("way", ["loops", "kernels"], indirect=True)
@pytest.mark.parametrize("restore", [False, True])
@pytest.mark.parametrize("accumulate", [False, True])
@pytest.mark.parametrize("labels", LABELS)
def test_a_product_without_the_labels(labels: list[Tensor], accumulate: bool, restore: bool) -> None:
    dz, h = factors()
    before, columns = dz.clone(), torch.tensor([4, 0, -1])  # of which the last is none
    expected, rest = entries_by_hand(dz, labels)
    out = torch.ones(V, D, dtype=torch.float64)
    entries, often = product_but(out, dz, h, labels, columns, accumulate, restore)
    assert torch.equal(entries.T, expected)
    torch.testing.assert_close(out, accumulate + rest.T @ h)
    torch.testing.assert_close(often[:2].double(), (before.T @ h)[columns[:2]], rtol=1e-5, atol=1e-5)
    assert torch.equal(dz, before if restore else rest)


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("left", [0, 3, 64, 200])
def test_entries_of_rows_that_are_not_computed(left: int) -> None:
    """They are 0, whatever is there; and so many rows may be all, which only the device knows."""
    n, r = 70, 2
    dz, label = torch.randn(n, V), torch.randint(0, V, (n,))
    columns, expected = torch.tensor([4, -1]), torch.zeros(n, 2)
    dz[left:] = torch.nan
    expected[:left, 0], expected[:left, 1] = dz[:left, 4], dz[:left].gather(1, label[:left, None])[:, 0]
    (take_out,) = label_products.by_device(dz, label_products._take_out)
    for limit in (torch.tensor(left, dtype=torch.int32), left):
        kept, cut = torch.full((n, r + 1), 7.0), dz.clone()
        take_out(cut, label, columns, kept, r, limit)
        assert torch.equal(kept[:, [0, r]], expected)
        assert not cut[:left].gather(1, label[:left, None]).any()


@pytest.mark.parametrize("block", [64, 10**6])
@pytest.mark.parametrize("share", [0.0, 0.4, 1.0])
def test_rows_of_frequent_columns(share: float, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Taken in their order, a few at a time; of rows that do not count neither factor is looked at."""
    n, r, m = 200, 3, 5
    monkeypatch.setattr(counted, "TAKEN_BYTES", block * m * 2)
    counts, rows = torch.rand(n) < share, torch.randn(n, m).bfloat16()
    order, _, count = torch.ops.inductor_ce.row_order(counts)
    left = (count + counted.ALIGNED - 1) // counted.ALIGNED * counted.ALIGNED
    kept = torch.randn(n, r).bfloat16()
    kept[int(count) :] = 0  # of what is added to a multiple, whose gradient is 0
    kept[int(left) :] = torch.nan
    right = kept[: int(count)].double().T @ rows[order[: int(count)]].double()
    rows[~counts] = torch.nan
    made = OPS.frequent_rows(kept, rows, order, counts[order], left.int(), None)
    torch.testing.assert_close(made.double(), right, rtol=1e-5, atol=1e-4)


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("labels", LABELS)
def test_what_was_left_out_is_added(labels: list[Tensor]) -> None:
    dz, h = factors(torch.float32)
    out, (columns, runs) = torch.empty(V, D), OPS.most_frequent(labels, V, 1)
    entries, often = product_but(out, dz, h, labels, columns)
    right = dz.T @ h
    OPS.complete(out, runs, entries, h, often)
    torch.testing.assert_close(out, right)
    columns, runs = OPS.most_frequent(labels, V, V)
    there = columns[columns >= 0]
    out[there] = torch.nan
    OPS.complete(out, runs, 0 * entries, h, right[columns])
    torch.testing.assert_close(out, right)


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("labels", LABELS)
def test_what_was_left_out_of_two_products(labels: list[Tensor]) -> None:
    """Of one weight, whose rows have the same labels."""
    k, out = len(labels), torch.zeros(V, D)
    columns, runs = OPS.most_frequent(labels, V, 1)
    entries, h = torch.randn(k, 2 * N).t(), torch.randn(D, 2 * N).t()
    right = torch.zeros(V, D, dtype=torch.float64)
    for i in range(2 * N):
        for label, entry in zip(labels, entries[i].double(), strict=True):
            if 0 <= int(label[i % N]) < V:
                right[int(label[i % N])] += entry * h[i].double()
    often = torch.randn(D, 1).t()
    right[columns[columns >= 0]] = often.double()
    OPS.complete(out, runs, entries, h, often)
    torch.testing.assert_close(out.double(), right, rtol=1e-5, atol=1e-5)


@pytest.fixture(params=["loops", "kernels"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """By tensor operations, and by the kernels for a GPU, which Triton interprets."""
    if request.param == "kernels":
        for module in (products, label_products, gemm):
            monkeypatch.setattr(module, "by_device", interpreted)


def interpreted(like: Tensor, *functions: Callable[..., None]) -> tuple[Callable[..., None], ...]:
    def kernel(name: str, *arguments: Tensor) -> None:
        made_by = gemm._kernel(name).__module__
        for argument, made in zip(arguments, interpreter.call(made_by, name, *arguments), strict=True):
            if isinstance(argument, Tensor):
                argument.copy_(made)

    return tuple(functools.partial(kernel, function.__name__.lstrip("_")) for function in functions)


@pytest.mark.usefixtures("way")
def test_a_row_is_rounded_once() -> None:
    """1 + 256 halves of its last place, each of which alone would be lost."""
    out = torch.ones(3, 1, dtype=torch.bfloat16)
    n, half = 256, torch.finfo(torch.bfloat16).eps / 2
    label = torch.cat((torch.ones(n, dtype=torch.int64), torch.full((n + 1,), 2)))
    _, runs = OPS.most_frequent([label], 3, 1)
    entries, rows = torch.full((2 * n + 1, 1), half), torch.ones(2 * n + 1, 1).bfloat16()
    OPS.complete(out, runs, entries, rows, torch.full((1, 1), 7.0))
    assert out.flatten().tolist() == [1, 2, 7]


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_times_in_place(dtype: torch.dtype) -> None:
    x = torch.randn(70, 3).to(dtype)
    for factor in (1.0, 0.7, 0.0):
        made = x.clone()
        OPS.times_in_place(made, torch.tensor(factor))
        # Triton's interpreter cuts digits off where a GPU rounds.
        rtol = torch.finfo(dtype).eps
        torch.testing.assert_close(made, OPS.times(x, torch.tensor(factor)), rtol=rtol, atol=0)


POINTERS = {
    "take_out": {"dz": "*bf16", "label": "*i32", "columns": "*i64", "kept": "*bf16", "left": "*i32"},
    "sort_tiles": {"label": "*i64", "room": "*i32"},
    "merge_tiles": {"room": "*i32", "runs": "*i32"},
    "take_frequent": {"room": "*i32", "runs": "*i32", "columns": "*i64"},
    "put_back": {"dz": "*bf16", "label": "*i64", "kept": "*bf16"},
    "add_rows": {"out": "*bf16", "runs": "*i32", "entries": "*fp32", "rows": "*bf16", "often": "*fp32"},
    "scale": {"x": "*bf16", "factor": "*fp32"},
    "split": {"x": "*fp32", "terms": "*bf16"},
}
CONSTANTS = {
    "ON_DEVICE": True,
    "ROWS": 32,
    "COLUMNS": 128,
    "KEYS": 16,
    "WIDTH": 1024,
    "COUNT": 3,
    "BITS": 10,
    "TILE": 1024,
    "TILES": 16,
    "BLOCK": 2048,
    "BINS": 256,
}


@pytest.mark.parametrize("name", POINTERS)
def test_kernels_compile(name: str) -> None:
    """What an interpreter takes, a compiler need not."""
    kernel = gemm._kernel(f"_{name}").function
    constants = {n: value for n, value in CONSTANTS.items() if n in kernel.arg_names}
    assert interpreter.compiles(kernel, POINTERS[name], **constants)


@pytest.mark.usefixtures("way")
def test_most_frequent() -> None:
    labels = labels_of([3, 1, 3, -100, 1, V, 3], [4, 4, 3, 1, -1, 0, 2])
    # 3 four times, 1 three times, 4 twice, 0 and 2 once, five that are none
    columns, runs = OPS.most_frequent(labels, V, 4)
    assert columns.tolist() == [0, 1, 3, 4]
    assert runs[0].tolist() == [0, 1, 1, 1, 2, 3, 3, 3, 3, 4, 4, *[V] * 3]
    assert runs[1, :11].tolist() == [12, 1, 4, 10, 13, 0, 2, 6, 9, 7, 8]
    assert runs[2, :11].tolist() == [0, 1, -1, -1, -1, 2, -1, -1, -1, 3, -1]
    assert OPS.most_frequent(labels, V, 2)[0].tolist() == [1, 3]
    assert OPS.most_frequent(labels, V + 9, V + 3)[0].tolist() == [0, 1, 2, 3, 4, 5, -1, -1]
    assert OPS.most_frequent([labels[0][:0]], V, 2)[0].tolist() == [-1, -1]
    # Five are as frequent as 11 / 4, rounded, or more so
    assert OPS.most_frequent(labels_of([9, 9, 3, 3, 4, 4, 1, 1, 9, 2, 2]), 10, 4)[0].tolist() == [1, 2, 3, 9]


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize(
    ("n", "v", "power", "r"),
    [
        (4097, 5000, 3, 128),  # more tiles than are looked through at once
        (1024, 999, 1, 1),  # whole tiles, and many that are equally frequent
        (1500, 2**20, 8, 16),  # a few that are very frequent
        (700, 20, 3, 128),  # as many columns as classes
        (100, 4000, 1, 256),  # fewer classes than columns
    ],
)
def test_most_frequent_of_many(n: int, v: int, power: int, r: int) -> None:
    """Found by hand: over several tiles, of two labels of which some are none."""
    labels = [(torch.rand(2 * n) ** power * v * 1.1).long()[::2], (torch.rand(n) ** power * v).int()]
    columns, (key, place, column) = OPS.most_frequent(labels, v, r)
    every = [y if 0 <= y < v else v for label in labels for y in label.tolist()]
    count = collections.Counter(y for y in every if y < v)
    right = sorted(sorted(count, key=lambda y: (-count[y], y))[:r])
    assert columns.tolist() == right + [-1] * (min(r, v) - len(right))
    assert place.tolist() == sorted(range(2 * n), key=lambda q: (every[q], q))
    assert key.tolist() == sorted(every)
    first = {y: i for i, y in reversed([*enumerate(key.tolist())])}
    flags = [-1] * (2 * n)
    for i, y in enumerate(right):
        flags[first[y]] = i
    assert column.tolist() == flags


@pytest.mark.gpu
@pytest.mark.parametrize(("n", "v"), [(1000, 50257), (16384, 151936), (70000, 128256)])
def test_labels_on_a_gpu(n: int, v: int) -> None:
    """As on a CPU, and the same bits twice."""
    labels = [(torch.rand(n) ** 4 * v * 1.1).long(), (torch.rand(n) ** 20 * v).long()]
    entries, rows, often = torch.randn(n, 2), torch.randn(n, 1100).bfloat16(), torch.randn(128, 1100)
    made = []
    for device in ("cuda", "cuda", "cpu"):
        out = torch.ones(v, 1100, dtype=torch.bfloat16, device=device)
        columns, runs = OPS.most_frequent([label.to(device) for label in labels], v, 128)
        OPS.complete(out, runs, *(x.to(device) for x in (entries, rows, often)))
        made.append([x.cpu() for x in (columns, runs, out)])
    for once, again in zip(*made[:2], strict=True):
        assert torch.equal(once, again)
    for ours, right in zip(made[0][:2], made[2][:2], strict=True):
        assert torch.equal(ours, right)
    torch.testing.assert_close(made[0][2].float(), made[2][2].float(), rtol=2**-7, atol=1e-4)


@pytest.mark.usefixtures("way")
def test_no_rows() -> None:
    out = torch.ones(V, D)
    nothing = torch.empty(0, dtype=torch.int64)
    columns, runs = OPS.most_frequent([nothing], V, 1)
    entries, often = product_but(out, torch.empty(0, V), torch.empty(0, D), [nothing], columns, True)
    OPS.complete(out, runs, entries, torch.empty(0, D), often)
    assert bool((out == 1).all())


@pytest.mark.parametrize("labels", LABELS)
def test_operators_of_labels_are_registered_as_they_are(labels: list[Tensor]) -> None:
    dz, h = factors(torch.float32)
    out, kept, columns = torch.zeros(V, D), torch.zeros(N + 1, 2 + len(labels)), torch.tensor([4, 0])
    _, runs = OPS.most_frequent(labels, V, 2)
    for op, args in (
        (label_products.PRODUCT_BUT, (out, kept, dz, h, labels, columns, 1, True, True)),
        (label_products.COMPLETE, (out, runs, torch.randn(N, len(labels)), h, torch.zeros(2, D))),
        (label_products.MOST_FREQUENT, (labels, V, 2)),
    ):
        torch.library.opcheck(op, args)


def test_operators_are_registered_as_they_are() -> None:
    dz, h = factors(torch.float32)
    out = torch.zeros(V, D)
    for op, args in (
        (products.TIMES, (h, torch.tensor(0.7))),
        (products.TIMES_IN_PLACE, (h.clone(), torch.tensor(0.7))),
        (products.COLUMN_SUMS, (dz,)),
        (products.PRODUCT_INTO, (out, dz.T.contiguous(), h, 0, True)),
        (products.PRODUCT_INTO, (out, dz.T, h.bfloat16(), 0, True)),
        (products.LOGITS, (h, torch.randn(D, V), None, [dz])),
        (products.LOGITS, (h.bfloat16(), torch.randn(D, V).bfloat16(), torch.randn(V), [], torch.float32)),
        (products.ONCE_MADE, (dz, torch.bfloat16, [h])),
    ):
        torch.library.opcheck(op, args)


@pytest.mark.parametrize(("dtype", "sums"), [(torch.bfloat16, torch.float32), (torch.float64, torch.float64)])
def test_column_sums(dtype: torch.dtype, sums: torch.dtype) -> None:
    dz = torch.randn(1000, V).to(dtype)
    made = OPS.column_sums(dz)
    assert made.dtype == sums
    torch.testing.assert_close(made.double(), dz.double().sum(0), rtol=1e-5, atol=1e-4)


@pytest.mark.usefixtures("way")
def test_terms_add_up() -> None:
    """To every bit, at all magnitudes whose last bit bfloat16 has, and what is infinite spoils no other."""
    spread = torch.randn(N, V).float() * 2.0 ** torch.linspace(-100, 100, N * V).view(N, V)
    spread[0, :4] = torch.tensor([0.0, torch.inf, -torch.inf, torch.nan])
    x = torch.empty(N, 2 * V)[:, ::2].copy_(spread)
    terms = torch.empty(3 * N, V, dtype=torch.bfloat16)
    (split,) = gemm.by_device(x, gemm._split)
    split(x, terms)
    assert torch.equal(terms.view(3, N, V).double().sum(0).nan_to_num(7.0), spread.double().nan_to_num(7.0))
    assert not terms[N:].isnan().any()


@pytest.fixture
def wide_products(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Float32 products of bfloat16 factors, as on a GPU: the sizes M, K, N of all."""
    shapes = []

    def product(out: Tensor, a: Tensor, b: Tensor, accumulate: bool, **wide: torch.dtype) -> None:
        assert a.dtype == b.dtype == torch.bfloat16
        assert wide == ({} if out.dtype == a.dtype else {"out_dtype": torch.float32})
        shapes.append((*a.shape, b.shape[1]))
        out.copy_(a.float() @ b.float() + (out if accumulate else 0))

    monkeypatch.setattr(gemm, "has_wide_products", lambda device: True)
    monkeypatch.setattr(gemm, "_by_library", product)
    return shapes


@pytest.mark.parametrize("accumulate", [False, True])
@pytest.mark.parametrize("terms", [2, 3])
@pytest.mark.parametrize("of", ["rows", "columns"])
def test_float32_times_bfloat16(
    of: str,
    terms: int,
    accumulate: bool,
    wide_products: list[tuple[int, ...]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As exact as float32 factors, in blocks of columns, of which the last is smaller."""
    n, v, d = 6, 30, 4
    monkeypatch.setattr(gemm, "TERMS_BYTES", 2 * terms * n * 16)
    monkeypatch.setattr(gemm, "_how_many_terms", lambda: terms)
    dz, h, w = torch.randn(n, v), torch.randn(n, d).bfloat16(), torch.randn(v, d).bfloat16()
    a, b = (dz, w) if of == "rows" else (dz.t(), h)
    out = torch.randn(len(a) + 2, d)
    before = out.clone()
    OPS.product_into(out, a, b, 1, accumulate)
    right = a.double() @ b.double() + (before[1:-1] if accumulate else 0)
    torch.testing.assert_close(out[1:-1].double(), right, rtol=1e-6, atol=1e-5 if terms == 3 else 1e-3)
    assert torch.equal(out[[0, -1]], before[[0, -1]])
    sizes = {
        "rows": [(terms * n, 16, d), (terms * n, 14, d)],
        "columns": [(16, terms * n, d), (14, terms * n, d)],
    }
    assert wide_products == sizes[of]


def test_no_rows_or_columns_in_terms(wide_products: list[tuple[int, ...]]) -> None:
    for n, v in ((0, V), (N, 0)):
        dz, out = torch.empty(n, v), torch.ones(v, D)
        OPS.product_into(out, dz.t(), torch.ones(n, D).bfloat16(), 0, True)
        assert torch.equal(out, torch.ones(v, D))
        out = torch.ones(n, D)
        OPS.product_into(out, dz, torch.ones(v, D).bfloat16(), 0, False)
        assert not out.any()


@pytest.mark.parametrize("accumulate", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("m", "k", "n", "parts"),
    [
        (19, 16, 8, [(16, 16, 8), (3, 16, 8)]),
        (16, 16, 19, [(16, 16, 16), (16, 16, 3)]),
        (16, 19, 8, [(16, 16, 8), (16, 3, 8)]),
        (17, 18, 8, [(16, 16, 8), (16, 2, 8), (1, 16, 8), (1, 2, 8)]),
        (16, 24, 8, [(16, 24, 8)]),
        (3, 5, 7, [(3, 5, 7)]),
    ],
)
def test_what_is_beyond_a_multiple_is_apart(
    m: int,
    k: int,
    n: int,
    parts: list[tuple[int, ...]],
    dtype: torch.dtype,
    accumulate: bool,
    wide_products: list[tuple[int, ...]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It is the product, rounded once."""
    monkeypatch.setattr(gemm, "is_slow", lambda size, factor: size > 8 and size % 8 > 0)
    a, b, before = torch.randn(m, k).bfloat16(), torch.randn(k, n).bfloat16(), torch.randn(m, n).to(dtype)
    out = before.clone()
    OPS.product_into(out, a, b, 0, accumulate)
    right = a.double() @ b.double() + (before.double() if accumulate else 0)
    rounding = torch.finfo(dtype).eps / 2
    torch.testing.assert_close(out.double(), right, rtol=1.01 * rounding, atol=1e-5)
    assert wide_products == parts


def test_biased_logits_of_unaligned_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each part is one product, to which the library adds the bias."""
    sizes: list[tuple[int, ...]] = []

    def addmm(bias: Tensor, a: Tensor, b: Tensor, *, out: Tensor) -> None:
        sizes.append((*a.shape, *b.shape[1:], *bias.shape))
        out.copy_(a.float() @ b.float() + bias)

    monkeypatch.setattr(torch, "addmm", addmm)
    monkeypatch.setattr(gemm, "is_slow", lambda size, factor: size > 8 and size % 8 > 0)
    h, w, bias = torch.randn(6, 16).bfloat16(), torch.randn(16, 19).bfloat16(), torch.randn(19).bfloat16()
    z = OPS.logits(h, w, bias, [])
    right = h.double() @ w.double() + bias.double()
    torch.testing.assert_close(z.double(), right, rtol=1.01 * torch.finfo(z.dtype).eps / 2, atol=1e-5)
    assert sizes == [(6, 16, 16, 16), (6, 16, 3, 3)]
