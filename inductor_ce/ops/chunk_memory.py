"""What `chunks` is given, and the memory of what it makes."""

from __future__ import annotations

import importlib.util
import math
from typing import NamedTuple

import torch
from torch import Tensor

from ..common.compat.graphs import FakeTensor
from .gemm import ALIGNED, aligned_strides
from .operators import packed_dtype_of
from .rows import Rows

if importlib.util.find_spec("triton"):  # which torch's builds for GPUs bring
    from . import counted_kernels, label_kernels, one_read_kernel, sum_kernels

WORD = 2  # float32 numbers in whose place a word of a kernel is
APART = 256  # bytes to which what is needed for a time is aligned

Piece = tuple[int, int, int]  # its number, and its rows from one up to another
Sizes = dict[str, tuple[tuple[int, ...], torch.dtype]]


class How(NamedTuple):
    """What `chunks` is given that is no tensor."""

    which: str
    program: str
    chain: str
    ends: tuple[int, ...]
    often: int
    sums: bool
    logits: torch.dtype | None
    hidden: torch.dtype | None
    weight: torch.dtype | None

    @property
    def pieces(self) -> list[Piece]:
        starts = 0, *self.ends[:-1]
        return [(i, *each) for i, each in enumerate(zip(starts, self.ends, strict=True))]

    @property
    def longest(self) -> int:
        return max(end - start for _, start, end in self.pieces)


class Read(NamedTuple):
    """The tensors that `chunks` is given."""

    a: Tensor
    b: Tensor
    bias: Tensor | None
    labels: list[Tensor]
    weights: list[Tensor]
    given: list[Tensor]
    counts: Tensor | None
    rows: Tensor | None
    beside: Tensor | None
    but: list[Tensor]

    def tensors(self) -> list[Tensor]:
        return [x for each in self for x in (each if isinstance(each, list) else [each]) if x is not None]

    def sources(self) -> list[Tensor]:
        """The hidden states that products read, each once."""
        if self.beside is None or _is_same(self.a, self.beside):
            return [self.a]
        return [self.a, self.beside]

    def kinds(self, how: How) -> Rows:
        return Rows.decode(how.which, len(self.labels), len(self.weights))

    def stats_dtype(self, how: How) -> torch.dtype:
        return packed_dtype_of(how.logits or self.a.dtype, self.kinds(how))

    def empty(self, how: How) -> list[Tensor]:
        """What `chunks` returns, before it is made."""
        a, (n, v), new = self.a, (self.a.shape[0], self.b.shape[1]), self.a.new_empty
        made = [new((len(self.kinds(how)), n), dtype=self.stats_dtype(how))]
        if self.rows is not None:
            made.append(new((n, self.rows.shape[1]), dtype=how.hidden))
        if self.beside is not None:
            made.append(new((v, self.beside.shape[1]), dtype=how.weight))
            if k := len(self.but):
                made.append(new((n, width_of_kept(how.often, k)), dtype=how.logits or a.dtype))
                made.append(new((how.often, self.beside.shape[1]), dtype=torch.float32))
                made.append(new((3, k * n), dtype=torch.int32))
        if how.sums:
            made.append(new((v,), dtype=self.stats_dtype(how)))
        if self.counts is not None:
            made.append(new((n,), dtype=torch.int64))
        return made

    def scratch(self, how: How, words: int) -> Sizes:
        """Size and dtype of all that is needed for a time; by the kernel so many words for each row."""
        n, v, dtype = self.a.shape[0], self.b.shape[1], how.logits or self.a.dtype
        row, _ = aligned_strides(v, self.a.device)
        sizes: Sizes = {"z": ((how.longest, row), dtype), "room": ((self._room(how, words),), torch.float32)}
        if how.sums and self.a.is_cuda and dtype.itemsize < 4:
            sizes["sums"] = ((sum_kernels.PARTS, v), torch.float32)
        if self.but:
            sizes["columns"] = ((how.often,), torch.int64)
        sizes["left"] = ((len(how.ends),), torch.int32)
        if self.counts is None:
            return sizes
        sizes |= {"order": ((n,), torch.int64), "count": ((1,), torch.int32), "counted": ((n,), torch.bool)}
        sizes["stats"] = ((len(self.kinds(how)), n), self.stats_dtype(how))
        for name, some in (("labels", self.labels), ("but", self.but), ("all but", self.but)):
            sizes |= {f"{name} {k}": ((n,), torch.int64) for k in range(len(some))}
        sizes |= {f"given {k}": ((n,), x.dtype) for k, x in enumerate(self.given) if x.dim()}
        for k, x in enumerate(self.sources()):
            sizes[f"taken {k}"] = ((how.longest, x.shape[1]), x.dtype)
        return sizes

    def _room(self, how: How, words: int) -> int:
        """Numbers in float32 of what kernels need: of several, one after another, the largest."""
        if not self.a.is_cuda:
            return 0
        needed = [how.longest * words * WORD]
        if self.but:
            needed.append(label_kernels.room_of_runs(how.often, self.but))
        if self.rows is not None:
            needed.append(counted_kernels.bytes_of_parts(how.hidden or self.a.dtype) // 4)
        if self.but and self.beside is not None:
            needed.append(sum_kernels.room_of_frequent_rows(len(self.a), how.often, self.beside.shape[1]))
        return max(needed)

    def kernel(self, how: How) -> one_read_kernel.RowKernel:
        """What makes statistics and gradient of a chunk."""
        packed = self.counts is not None
        given = [*self.given, self.counts] if self.counts is not None else self.given
        steps = [[1 if packed else x.stride(0) for x in self.labels], [x.stride(0) for x in self.weights]]
        steps.append([0 if not x.dim() else 1 if packed else x.stride(0) for x in given])
        kinds = tuple((x.dtype, x.dim() > 0) for x in given)
        like = self.b.shape[1], how.logits or self.a.dtype, self.a.device
        texts = how.which, how.program, how.chain
        return one_read_kernel.kernel_for(like, tuple(map(tuple, steps)), kinds, texts)


def _bytes(size: tuple[int, ...], dtype: torch.dtype) -> int:
    return -(-math.prod(size) * dtype.itemsize // APART) * APART


def width_of_kept(columns: int, labels: int) -> int:
    """W: there is room for so many entries, and each row begins where libraries are fast."""
    return -(-(columns + labels) // ALIGNED) * ALIGNED


def _is_same(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are one, by where they are."""
    if isinstance(a, FakeTensor) or isinstance(b, FakeTensor):
        return False
    return (a.data_ptr(), a.shape, a.stride(), a.dtype) == (b.data_ptr(), b.shape, b.stride(), b.dtype)


def bytes_of(sizes: Sizes) -> int:
    return sum(_bytes(*size) for size in sizes.values())


def divided(memory: Tensor, sizes: Sizes) -> dict[str, Tensor]:
    """Parts of memory, one after another."""
    parts, start = {}, 0
    for name, (size, dtype) in sizes.items():
        own = memory.narrow(0, start, math.prod(size) * dtype.itemsize)
        parts[name] = own.view(dtype).view(size)
        start += _bytes(size, dtype)
    return parts
