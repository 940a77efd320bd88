"""Products of which the device alone knows how many rows count, in Triton. Imported where there is Triton.

A library's product has its sizes from the host, which may not look while a CUDA graph is recorded, or runs.
Here `left`, an int32 on the device, ends the rows, or the sum over rows, and there is no work beyond. It is
a multiple of ROWS, or more than all rows. Factors are 16-bit and are read as Hopper and later GPUs read
tiles; sums are float32.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..common.compat.graphs import FakeTensor
from ..common.compat.launches import Grid, Launcher, Tiles
from .launch import MOST, Kernel, cdiv, is_aligned

ROWS = 64  # rows that are summed at once
GROUP = 16  # rows of tiles that are gone through column by column: those of a chunk of 2048 rows
WIDE: dict[str, Any] = {"M": 128, "N": 256, "K": ROWS, "GROUP": GROUP, "num_warps": 8, "num_stages": 3}
TALL: dict[str, Any] = {"M": 256, "N": 128, "K": ROWS, "GROUP": GROUP, "num_warps": 8, "num_stages": 3}
NARROW: dict[str, Any] = {"M": 128, "N": 128, "K": ROWS, "GROUP": GROUP, "num_warps": 4, "num_stages": 4}
RATES = ((WIDE, 1.0), (TALL, 0.98), (NARROW, 0.93))  # elements in the same time, of the widest
LONG = 8192  # terms of a sum that is worth dividing
MOST_PARTS = 144  # of sums: as many as there are processors, and some
ROWS_ADDED = 16


def has_tiles(x: Tensor) -> bool:
    """Whether a factor can be read in tiles: 16 bits, and of it or its transpose aligned rows, each apart.

    Of an empty one there are none.
    """
    (n, k), (row, column) = x.shape, x.stride()
    has_rows = column == 1 and row % 8 == 0 and row >= k
    has_columns = row == 1 and column % 8 == 0 and column >= n
    return x.itemsize == 2 and x.numel() > 0 and (has_rows or has_columns)


@functools.cache
def reads_tiles(device: torch.device) -> bool:
    """Whether a GPU reads tiles by itself, as Hopper and later ones do."""
    is_gpu = device.type == "cuda" and torch.version.hip is None
    return is_gpu and torch.cuda.get_device_capability(device) >= (9, 0)


def has_product(out: Tensor, a: Tensor, b: Tensor) -> bool:
    """Whether there is one here that makes `out`, where that is aligned, of these factors."""
    (row, column), aligned = out.stride(), 16 // out.itemsize
    fits = out.itemsize in (2, 4) and column == 1 and row % aligned == 0
    return fits and has_tiles(a) and has_tiles(b) and reads_tiles(out.device)


def product_of_rows(
    out: Tensor,
    a: Tensor,
    b: Tensor,
    left: Tensor | int,
    bias: Tensor | None = None,
    room: Tensor | None = None,
) -> bool:
    """Row i of `out` [n, M] becomes a [n, K] b [K, M], plus bias [M], for i < left. Some more are written.

    The bias is contiguous. Whether it has been done: there is not a product for all factors. Parts of sums
    go to `room`, PARTS_BYTES that are nobody's, if that is given.
    """
    return _product(out, a, b, left, bias, accumulate=False, over=False, room=room)


def product_over_rows(out: Tensor, a: Tensor, b: Tensor, left: Tensor, accumulate: bool) -> bool:
    """`out` [M, N] becomes, or gains, a [M, n] b [n, N], summed over the first `left` of n. Done, or not."""
    return _product(out, a, b, left, None, accumulate, over=True)


PARTS_BYTES = MOST_PARTS * WIDE["M"] * WIDE["N"] * 4  # of the parts of sums, at most


def bytes_of_parts(dtype: torch.dtype) -> int:
    """Of a product in a dtype, at most."""
    tile = NARROW if dtype.itemsize > 2 else WIDE
    return MOST_PARTS * tile["M"] * tile["N"] * 4


@dataclass(slots=True)
class _How:
    """How a product of factors of some shapes is made.

    Attributes:
        grid: how many programs make it.
        tiles: of `out`, a and b.
        numbers: the last arguments of `_multiply`.
        options: with which it is compiled.
        parts: the shape of the parts of sums, where they are divided.
        added: the grid of `_add_parts`, and the last of its arguments.
        launch: `_multiply`, when it has been compiled.
    """

    grid: Grid
    tiles: tuple[Tiles, Tiles, Tiles]
    numbers: tuple[int, ...]
    options: dict[str, int]
    parts: tuple[int, int, int] | None
    added: tuple[Grid, tuple[int, ...]]
    launch: Launcher | None = None


_known: dict[tuple[Any, ...], _How | None] = {}  # of MOST at most


def _product(
    out: Tensor,
    a: Tensor,
    b: Tensor,
    left: Tensor | int,
    bias: Tensor | None,
    accumulate: bool,
    over: bool,
    room: Tensor | None = None,
) -> bool:
    uses = left.__class__ is not int, None if bias is None else bias.dtype, accumulate, over
    which = (out.get_device(), *((x.shape, x.stride(), x.dtype) for x in (out, a, b)), uses)
    if which in _known:
        how = _known[which]
    else:
        how = _how(out, a, b, *uses) if has_product(out, a, b) else None
        if len(_known) < MOST:
            _known[which] = how
    if how is None or not is_aligned(out):
        return False
    a, b = _aligned(a), _aligned(b)
    parts = None if how.parts is None else room
    if how.parts is not None and room is None:
        parts = out.new_empty(how.parts, dtype=torch.float32)
    beside = 0 if bias is None else bias, 0 if parts is None else parts, left
    launch = None if isinstance(out, FakeTensor) else how.launch
    if launch is not None:
        launch(how.grid, (*map(_address, beside), *how.numbers), (out, a, b))
    else:
        launch = _multiply.first(how.grid, beside, how.numbers, how.options, how.tiles, (out, a, b))
        how.launch = launch or how.launch
    if parts is not None:
        grid, numbers = how.added
        _add_parts(grid, (out, parts, left), *numbers)
    return True


def _address(x: Tensor | int) -> int:
    return x if isinstance(x, int) else x.data_ptr()


def _aligned(x: Tensor) -> Tensor:
    """The same from an aligned address on. A clone would have its rows next to each other."""
    return x if is_aligned(x) else x.new_empty_strided(x.shape, x.stride()).copy_(x)


def _how(
    out: Tensor, a: Tensor, b: Tensor, on_device: bool, bias: torch.dtype | None, accumulate: bool, over: bool
) -> _How:
    (m, k), n = a.shape, b.shape[1]
    has_bias = bias is not None
    divided = not over and not has_bias and k >= LONG and on_device
    most = MOST_PARTS if divided else 0
    tile, programs = _tile(m, n, out.itemsize, _processors(out.device), most)
    height, width = tile["M"], tile["N"]
    a_tiles, a_is_transposed = _tiles(a, height, tile["K"])
    b_tiles, b_is_transposed = _tiles(b, tile["K"], width)
    flags = on_device, a_is_transposed, b_is_transposed, has_bias, accumulate, over, divided
    sizes = m, n, k, most
    return _How(
        (programs, 1, 1),
        (Tiles(out, [height, width // 2 if accumulate else width]), a_tiles, b_tiles),
        (*sizes, *flags, *(tile[size] for size in ("M", "N", "K", "GROUP"))),
        {name: tile[name] for name in ("num_warps", "num_stages")},
        (most, height, width) if divided else None,
        (
            (most // 2, height // ROWS_ADDED, 1),
            (m, n, most, out.stride(0), programs, height, width, ROWS_ADDED, tile["GROUP"]),
        ),
    )


@functools.lru_cache(1024)
def _tile(m: int, n: int, itemsize: int, processors: int, parts: int) -> tuple[dict[str, Any], int]:
    """(what takes least time, how many programs make it)

    Every processor makes one tile after another, and the last ones may be few. Their sums may be made in so
    many parts.
    """

    def tiles(tile: dict[str, Any]) -> int:
        return cdiv(m, tile["M"]) * cdiv(n, tile["N"])

    def time(rated: tuple[dict[str, Any], float]) -> float:
        tile, rate = rated
        rounds, rest = divmod(tiles(tile), processors)
        among = max(min(processors, parts) // max(rest, 1), 1)
        return (rounds + (rest > 0) / among) * tile["M"] * tile["N"] / rate

    best = NARROW if itemsize > 2 else min(RATES, key=time)[0]
    return best, processors if parts else min(tiles(best), processors)


@functools.cache
def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def _tiles(x: Tensor, height: int, width: int) -> tuple[Tiles, bool]:
    """(what reads tiles of x, or of its transpose; whether of its transpose)"""
    if x.stride(1) == 1:
        return Tiles(x, [height, width]), False
    return Tiles(x.t(), [width, height]), True


@triton.jit
def _tile_of(pid, rows, columns, GROUP: tl.constexpr):
    # Programs that run at once read few tiles of either factor.
    group = pid // (GROUP * columns)
    first = group * GROUP
    size = tl.minimum(rows - first, GROUP)
    inside = pid % (GROUP * columns)
    return first + inside % size, inside // size


@Kernel
@triton.jit(do_not_specialize=["left"], do_not_specialize_on_alignment=["bias"])
def _multiply(
    out,
    a,
    b,
    bias,
    parts,
    left,
    m,
    n,
    k,
    most,
    ON_DEVICE: tl.constexpr,
    A_T: tl.constexpr,
    B_T: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    ACCUMULATE: tl.constexpr,
    OVER: tl.constexpr,
    DIVIDED: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
    GROUP: tl.constexpr,
):
    limit = left
    if ON_DEVICE:
        limit = tl.maximum(tl.load(left), 0)
    if OVER:
        k = tl.minimum(limit, k)
    else:
        m = tl.minimum(limit, m)
    tiles = tl.cdiv(m, M)
    columns = tl.cdiv(n, N)
    count = tiles * columns
    if ACCUMULATE:
        count = tl.where(k > 0, count, 0)
    whole, rest, among = count, 0, 1
    if DIVIDED:
        whole, rest, among = _divided(count, tl.num_programs(0), most)
    # Flattened, a tile's first factors are on their way while the last one is stored.
    for pid in tl.range(tl.program_id(0), whole + rest * among, tl.num_programs(0), flatten=True):
        tile, part = pid, pid - whole
        first, end = 0, k
        if DIVIDED:
            share = tl.where(part < 0, k, tl.cdiv(tl.cdiv(k, K), among) * K)
            tile = tl.where(part < 0, tile, whole + part % tl.maximum(rest, 1))
            first = tl.where(part < 0, 0, part // tl.maximum(rest, 1) * share)
            end = tl.minimum(first + share, k)
        i_tile, j_tile = _tile_of(tile, tiles, columns, GROUP)
        total = tl.zeros([M, N], tl.float32)
        for start in range(first, end, K):
            if A_T:
                left_tile = a.load([start, i_tile * M]).T
            else:
                left_tile = a.load([i_tile * M, start])
            if B_T:
                right_tile = b.load([j_tile * N, start]).T
            else:
                right_tile = b.load([start, j_tile * N])
            total = tl.dot(left_tile, right_tile, total)
        if HAS_BIAS:
            j = j_tile * N + tl.arange(0, N)
            total += tl.load(bias + j, mask=j < n, other=0.0)[None, :].to(tl.float32)
        if ACCUMULATE:
            # For what is there to be read, and for the sum to be stored, there is room by halves alone.
            one, two = tl.split(tl.permute(tl.reshape(total, [M, 2, N // 2]), [0, 2, 1]))
            _add_to(out, one, i_tile * M, j_tile * N)
            _add_to(out, two, i_tile * M, j_tile * N + N // 2)
        elif DIVIDED and (part >= 0) & (among > 1):
            place = (tl.arange(0, M) * N)[:, None] + tl.arange(0, N)[None, :]
            tl.store(parts + part * M * N + place, total)
        else:
            out.store([i_tile * M, j_tile * N], total.to(out.dtype))


@triton.jit
def _add_to(out, x, i, j):
    x += out.load([i, j]).to(tl.float32)
    out.store([i, j], x.to(out.dtype))


@triton.jit
def _divided(tiles, programs, most):
    """(tiles that are made whole, the rest, into how many parts the sum of each of these is divided)

    Each program makes as many whole tiles as any other, and one part at most. There are `most` of these.
    """
    rest = tiles % programs
    return tiles - rest, rest, tl.maximum(tl.minimum(programs, most) // tl.maximum(rest, 1), 1)


@Kernel
@triton.jit(do_not_specialize_on_alignment=["left"])
def _add_parts(
    out,
    parts,
    left,
    m,
    n,
    most,
    row,
    programs,
    M: tl.constexpr,
    N: tl.constexpr,
    ROWS: tl.constexpr,
    GROUP: tl.constexpr,
):
    """A tile of `out` becomes the sum of its parts, in their order, where `_multiply` has divided it."""
    m = tl.minimum(tl.maximum(tl.load(left), 0), m)
    tiles = tl.cdiv(m, M)
    whole, rest, among = _divided(tiles * tl.cdiv(n, N), programs, most)
    tile = tl.program_id(0)
    if (tile < rest) & (among > 1):
        i_tile, j_tile = _tile_of(whole + tile, tiles, tl.cdiv(n, N), GROUP)
        i, j = tl.program_id(1) * ROWS + tl.arange(0, ROWS), tl.arange(0, N)
        place = parts + i[:, None] * N + j[None, :]
        total = tl.zeros([ROWS, N], tl.float32)
        for part in range(tile, rest * among, rest):
            total += tl.load(place + part * M * N)
        rows, columns = (i_tile * M + i)[:, None], (j_tile * N + j)[None, :]
        place = out + rows.to(tl.int64) * row + columns
        tl.store(place, total.to(out.dtype.element_ty), mask=(rows < m) & (columns < n))
