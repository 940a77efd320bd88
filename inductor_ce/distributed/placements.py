"""Placements: logits that are a DTensor, whose vocabulary may be sharded over one dimension of a mesh.

The statistics of whole rows are those of this rank's columns, combined over that dimension of the mesh
(`shards.py`). All else of a loss is of size [N], and stays torch operations on DTensors. What is asked here
of placements and global shapes has the same answer on every rank.

NOTE What a shard is. DTensor gives each rank ceil(V / P) columns, the last that have any the rest, others
none. Where a rank's start is only follows from its number, which must not be a constant of a graph that is
cached for all ranks.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .. import ops
from ..common.compat.graphs import is_dtensor
from ..graph.shapes import equal
from ..ops.combine import chosen
from ..ops.group_rank import group_rank
from .shards import Shard, whole_row_stats

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor  # which not every build of torch has

if torch.distributed.is_available():
    from torch.distributed import tensor as dt


# What may be asked of placements


def vocab_dim(z: Any, axis: int) -> int | None:
    """The dimension of the mesh over which `axis` of a DTensor is sharded, None for none."""
    return next((i for i, dim in enumerate(_sharded(z)) if dim == axis), None)


def _sharded(x: DTensor) -> list[int | None]:
    """For each dimension of the mesh, that of the tensor which it shards, if any."""
    return [p.dim % x.ndim if type(p) is dt.Shard else None for p in x.placements]


def layout_fact(z: DTensor, axis: int) -> str | None:
    """Why statistics cannot be taken of logits with the vocabulary on `axis`; None where they can."""
    strange = [p for p in z.placements if type(p) not in (dt.Shard, dt.Replicate)]
    if strange:
        return f"The logits are {described(z)}, of which a rank does not hold a block: {strange[0]}."
    sharded = _sharded(z)
    if sharded.count(axis) > 1:
        return f"The logits are {described(z)}, whose vocabulary {sharded.count(axis)} mesh dimensions shard."
    if z.ndim == 2:
        return None
    first = 1 if axis == 0 else 0
    if {*sharded} - {None, axis, first}:
        return f"The logits are {described(z)}, whose rows are sharded on a dimension other than the first."
    ranks = math.prod(z.device_mesh.size(i) for i, dim in enumerate(sharded) if dim == first)
    size = z.shape[first]
    if isinstance(size, int) and size % ranks:
        return f"The logits are {described(z)}: {size} rows of the first dimension over {ranks} ranks."
    return None


def beside(z: DTensor, axis: int, x: DTensor, first: int | None, classes: int | None) -> list[Any]:
    """The placements of a DTensor that lies on the ranks as logits with the vocabulary on `axis` do.

    Args:
        z, axis: the logits.
        x: the DTensor, on the same mesh.
        first: its dimension that corresponds to the first of the rows, None if it has no rows.
        classes: its dimension that corresponds to the vocabulary, None if it has none. Where the logits are
            sharded on it, x may be so too, or not.
    """
    vocab, wanted = vocab_dim(z, axis), []
    for i, (placement, of_logits, dim) in enumerate(zip(x.placements, _sharded(z), _sharded(x), strict=True)):
        if i == vocab:
            wanted.append(placement if dim is not None and dim == classes else dt.Replicate())
        else:
            wanted.append(dt.Replicate() if of_logits is None or first is None else dt.Shard(first))
    return wanted


def beside_fact(
    z: DTensor, axis: int, name: str, x: Tensor, first: int | None, classes: int | None, moved: bool = False
) -> str | None:
    """Why a tensor cannot be brought to lie on the ranks as logits with the vocabulary on `axis` do.

    NOTE What may be moved. A DTensor that lies otherwise is the same numbers, of which a rank that has all
    takes its own, and others are gathered where they are no more than a number for each row or class. What a
    plain tensor holds is only known where no rows are sharded: torch takes it for the whole in one context,
    and for this rank's part in another.

    Args:
        z, axis, x, first, classes: as for `beside`; x may be a plain tensor.
        name: what the tensor is to be called.
        moved: whether the correspondence of the first rows does not hold, as after a transpose.
    """
    vocab = vocab_dim(z, axis)
    rows = [i for i, dim in enumerate(_sharded(z)) if dim is not None and i != vocab and first is not None]
    fact = f"{name} are {described(x)}, and the logits {described(z)}"
    if rows and moved:
        return f"{fact}, whose rows are sharded, and transposed or cut."
    if not is_dtensor(x):
        return f"{fact}, whose rows are sharded." if rows else None
    if x.device_mesh != z.device_mesh:
        return f"{fact}, on another mesh."
    wanted = beside(z, axis, x, first, classes)
    if list(x.placements) == wanted or _may_move(z, axis, x, first, classes, rows, wanted):
        return None
    return f"{fact}, sharded otherwise."


def _may_move(
    z: DTensor,
    axis: int,
    x: DTensor,
    first: int | None,
    classes: int | None,
    rows: list[int],
    wanted: list[Any],
) -> bool:
    """Whether a DTensor can be brought to the placements `wanted`, and gives each rank the rows it has."""
    if not are_blocks(x.placements):
        return False
    pairs = zip(x.placements, wanted, strict=True)
    is_wide = first is not None and classes is not None
    if is_wide and any(have != want and type(have) is dt.Shard for have, want in pairs):
        return False
    if not rows:
        return True
    assert first is not None
    if first < 0:
        return False
    size, ranks = x.shape[first], math.prod(z.device_mesh.size(i) for i in rows)
    of_logits = z.shape[1 if axis == 0 else 0]
    return equal(size, of_logits) or (isinstance(size, int) and size % ranks == 0)


def numbered(placements: Sequence[Any]) -> list[int]:
    """Placements as numbers that a graph can hold: the dimension that is sharded, -1 for none."""
    return [p.dim if type(p) is dt.Shard else -1 for p in placements]


def are_blocks(placements: Sequence[Any]) -> bool:
    """Whether each rank has a block of neighbours, or all."""
    return all(type(p) in (dt.Shard, dt.Replicate) for p in placements)


def read_as_ours(x: DTensor, how: str, z: DTensor, axis: int) -> bool:
    """Whether what torch makes of a reduced loss has on each rank the part of it that we make.

    Args:
        x: what torch makes.
        how: the reduction.
        z, axis: the logits.
    """
    if not any(p.is_partial() for p in x.placements):
        return True
    vocab, everywhere = vocab_dim(z, axis), how == "mean"
    ours = [
        dt.Replicate() if everywhere or dim is None or i == vocab else dt.Partial()
        for i, dim in enumerate(_sharded(z))
    ]
    return list(x.placements) == ours


def described(x: Tensor) -> str:
    """A tensor by its global shape and placements."""
    if not is_dtensor(x):
        return f"a plain tensor {list(x.shape)}"
    return f"a DTensor {list(x.shape)} with placements ({', '.join(map(str, x.placements))})"


# What graphs hold


def whole_rows(
    z: DTensor, labels: list[DTensor], weights: list[DTensor], which: str, *, site: int = ops.NO_SITE
) -> list[DTensor]:
    """As `ops.row_stats` for logits [N, V] that are a DTensor, unbound.

    Args:
        z: [N, V], V sharded over at most one dimension of the mesh.
        labels: [N] or [N, K], on the ranks as the rows of z are.
        weights: [V] or [N, V]; their rows as those of z, their columns as those of z or on every rank.
        which, site: as for `ops.row_stats`.

    Returns:
        Of each row [N] or [K, N], on every rank of the dimension that shards V, over the others as z.
    """
    rows = ops.Rows.decode(which, len(labels), len(weights))
    vocab = vocab_dim(z, 1)
    placements = [dt.Replicate() if i == vocab else p for i, p in enumerate(z.placements)]
    local, ys, qs = z.to_local(), [y.to_local() for y in labels], [q.to_local() for q in weights]
    if vocab is None:
        packed = ops.row_stats(local, ys, qs, which, site=site)
    else:
        packed = _over_ranks(z, local, ys, weights, qs, rows, vocab, site)
    made = [_of_rows(row, z, placements) for row in packed[: rows.first_of_several].unbind(0)]
    return made + [_of_rows(packed[k : k + width], z, placements) for k, _, width in rows.several]


def _of_rows(part: Tensor, z: DTensor, placements: list[Any]) -> DTensor:
    """What a rank has of [N] or [K, N], by the placements of the rows of z."""
    if part.dim() == 2:
        placements = [dt.Shard(1) if p == dt.Shard(0) else p for p in placements]
    shape = torch.Size([*part.shape[:-1], z.shape[0]])
    stride = (z.shape[0], 1)[-part.dim() :]
    return dt.DTensor.from_local(part, z.device_mesh, placements, run_check=False, shape=shape, stride=stride)


def _over_ranks(
    z: DTensor,
    local: Tensor,
    ys: list[Tensor],
    weights: list[DTensor],
    qs: list[Tensor],
    rows: ops.Rows,
    vocab: int,
    site: int,
) -> Tensor:
    group, size = z.device_mesh.get_group(vocab), z.device_mesh.size(vocab)
    total = z.shape[1]
    block = -(-total // size)
    start = group_rank(local, group.group_name, total % size == 0) * block
    counts = (total - block * torch.arange(size, device=local.device)).clamp(0, block)
    shard = Shard(group.group_name, size, start, equal=False, counts=counts)
    masses, own = {}, []
    for j, (weight, q) in enumerate(zip(weights, qs, strict=True)):
        if vocab_dim(weight, weight.ndim - 1) is None:
            if weight.ndim == 1:
                masses[j] = _masses(q, size, block)
            q = q.index_select(-1, start + torch.arange(local.shape[1], device=local.device))
        own.append(q)
    gathered = rows.closed(masses)
    packed, _ = whole_row_stats(local, [y - start for y in ys], own, gathered.encode(), shard, masses, site)
    return chosen(packed, gathered, rows)


def _masses(q: Tensor, size: int, block: int) -> Tensor:
    """The sums of weights [V] over the columns of each of `size` ranks."""
    q = q.to(torch.promote_types(q.dtype, torch.float32))
    padded = torch.nn.functional.pad(q, [0, size * block - q.shape[0]])
    return padded.view(size, block).sum(-1)


def on_every_rank(x: Tensor, z: DTensor) -> DTensor:
    """A plain tensor that is the same on all ranks, as a DTensor on the mesh of z."""
    placements = [dt.Replicate()] * z.device_mesh.ndim
    return dt.DTensor.from_local(x, z.device_mesh, placements, run_check=False)


def placed(x: DTensor, where: list[int]) -> DTensor:
    """x with the placements that `numbered` has made numbers of."""
    return x.redistribute(placements=[dt.Replicate() if dim < 0 else dt.Shard(dim) for dim in where])


def padded(x: DTensor, pads: list[int], value: int) -> DTensor:
    """As `torch.nn.functional.pad`, by each rank for itself where it has whole what is padded.

    NOTE torch 2.11 brings all of x to all ranks for it.
    """
    grown = {x.ndim - 1 - i // 2 for i, pad in enumerate(pads) if pad}
    if grown & {*_sharded(x)}:
        return torch.nn.functional.pad(x, pads, value=value)  # type: ignore[return-value]
    local = torch.nn.functional.pad(x.to_local(), pads, value=value)
    shape = torch.Size([size + sum(pads[2 * (x.ndim - 1 - i) :][:2]) for i, size in enumerate(x.shape)])
    stride = torch.empty(shape, device="meta").stride()
    return dt.DTensor.from_local(
        local, x.device_mesh, x.placements, run_check=False, shape=shape, stride=stride
    )


def rows_of(z: DTensor, number: int) -> DTensor:
    """Labels [N] that are a number everywhere, on the ranks as the rows of logits z [N, V] are."""
    vocab, local = vocab_dim(z, 1), z.to_local()
    placements = [dt.Replicate() if i == vocab else p for i, p in enumerate(z.placements)]
    labels = torch.full(local.shape[:1], number, dtype=torch.int64, device=local.device)
    return dt.DTensor.from_local(
        labels, z.device_mesh, placements, run_check=False, shape=z.shape[:1], stride=(1,)
    )


def whole(x: DTensor) -> DTensor:
    """Sums over the vocabulary of which each rank has a part, on every rank."""
    placements = [dt.Replicate() if p.is_partial() else p for p in x.placements]
    return x.redistribute(placements=placements)


def total(x: DTensor) -> DTensor:
    """The sum over rows, a part of it on each rank."""
    return _of_ranks(x.to_local().sum(), x)


def mean(x: DTensor, counted: DTensor) -> DTensor:
    """sum(x) / sum(counted) over the rows of all ranks, on every rank.

    NOTE Both sums are reduced, at once. A mean of the ranks' means is another number where ranks hold
    different numbers of rows that count.
    """
    counted = counted.redistribute(placements=x.placements)
    local, count = x.to_local().sum(), counted.to_local().sum()
    if not all(p.is_replicate() for p in x.placements):
        dtype = torch.promote_types(x.dtype, torch.float32)
        parts = _of_ranks(torch.stack([local.to(dtype), count.to(dtype)]), x)
        everywhere = [dt.Replicate()] * x.device_mesh.ndim
        local, count = parts.redistribute(placements=everywhere).to_local().unbind()
    return on_every_rank((local / count.detach()).to(x.dtype), x)


def _of_ranks(part: Tensor, rows: DTensor) -> DTensor:
    """What each rank has of a sum over `rows`."""
    placements = [p if p.is_replicate() else dt.Partial() for p in rows.placements]
    return dt.DTensor.from_local(part, rows.device_mesh, placements, run_check=False)
