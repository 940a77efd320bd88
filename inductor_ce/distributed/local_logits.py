"""Logits of which each rank can make its own part, of its own parts of the hidden states and the weight.

Whoever reads logits that were returned lazily may be one rank alone, so that making them must not take a
collective. It takes none where every step is local: on each dimension of the mesh the result is whole and so
are all operands, or it is sharded, and an operand that has the dimension is sharded alike, any other whole.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..common.compat.graphs import is_dtensor, local_of
from ..graph.shapes import constant, equal
from .placements import described

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor  # which not every build of torch has

if torch.distributed.is_available():
    from torch.distributed import tensor as dt

# For each dimension of an operand the dimension of the result that it is; None for one that is summed over.
Dims = Sequence[int | None]


def beside(result: Tensor, operand: Tensor) -> Dims:
    """Those of an operand that is broadcast, which has one element where the result has more."""
    first = result.ndim - operand.ndim
    return [first + i if size == result.shape[first + i] else None for i, size in enumerate(operand.shape)]


def step_fact(result: Tensor, operands: Sequence[tuple[Tensor, Dims]]) -> str | None:
    """Why a rank cannot make its part of a DTensor of its parts of the operands; None where it can."""
    for operand, dims in operands:
        if not is_dtensor(operand):
            if operand.ndim or operand.requires_grad:
                return f"a DTensor and {described(operand)} are joined"
            continue
        if operand.device_mesh != result.device_mesh:  # type: ignore[attr-defined]
            return "they are made of DTensors on two meshes"
        for ours, theirs in zip(result.placements, operand.placements, strict=True):  # type: ignore[attr-defined]
            if theirs != _needed(ours, dims):
                return f"they are {described(result)}, made of {described(operand)}: not each rank by itself"
    return None


def _needed(result: Any, dims: Dims) -> Any:
    """The placement of an operand on a dimension of the mesh that goes with that of the result."""
    if type(result) is dt.Shard:
        return dt.Shard(dims.index(result.dim)) if result.dim in dims else dt.Replicate()
    return dt.Replicate() if type(result) is dt.Replicate else None


def placements_of_linear(hidden: Any, weight: Any, bias: Any = None) -> tuple[Any, ...] | None:
    """Those of F.linear of DTensors, where each rank makes its part by itself; else None."""
    if any(x.device_mesh != hidden.device_mesh for x in (weight, bias) if x is not None):
        return None
    last, found = hidden.ndim - 1, []
    for i, (of_hidden, of_weight) in enumerate(zip(hidden.placements, weight.placements, strict=True)):
        of_result = dt.Shard(last) if _kind(of_weight, 1) == "last" else of_hidden
        wanted = [_needed(of_result, (*range(last), None)), _needed(of_result, (last, None))]
        given = [of_hidden, of_weight]
        if bias is not None:
            wanted.append(_needed(of_result, (last,)))
            given.append(bias.placements[i])
        if wanted != given:
            return None
        found.append(of_result)
    return tuple(found)


def view_fact(source: Any, view: Any) -> str | None:
    """Why a view, with the same last dimension, is not a view of each rank's part; None where it is."""
    kinds = [[_kind(p, x.ndim) for p in x.placements] for x in (source, view)]
    return None if kinds[0] == kinds[1] else f"a view of {described(source)} is {described(view)}"


def _kind(placement: Any, rank: int) -> str:
    if type(placement) is not dt.Shard:
        return "whole" if type(placement) is dt.Replicate else "neither"
    return "last" if placement.dim == rank - 1 else "rows"


def local_part(x: DTensor, logits: DTensor) -> Tensor:
    """What this rank has of a tensor that the logits are made of, whose gradient comes from there alone.

    NOTE Why it is this that graphs return. A result that is a DTensor and has no gradient has a plain tensor
    of zeros for it, which AOTAutograd refuses; and that of this one is summed over the ranks, if it is, by
    the graph's own backward: the collectives of a rank do not depend on who looks.
    """
    return x.to_local(grad_placements=gradient_placements(x.placements, logits.placements))


def gradient_placements(x: Sequence[Any], logits: Sequence[Any]) -> tuple[Any, ...]:
    """Of the gradient of what has placements x: a sum over ranks where it is whole and the logits are not."""
    return tuple(
        dt.Partial() if type(ours) is dt.Shard and type(theirs) is dt.Replicate else theirs
        for ours, theirs in zip(logits, x, strict=True)
    )


@dataclass(frozen=True)
class LocalLogits:
    """How logits [..., V] that are a DTensor are put together of those of each rank.

    Attributes:
        mesh, placements: of the logits.
        shape: of the logits of all ranks; a number that is not known is that of each rank times `times`.
        times: for each dimension, over how many ranks it is sharded.
        gradients: for each part that is given as a DTensor, the placements of its gradient.
    """

    mesh: Any
    placements: tuple[Any, ...]
    shape: tuple[int | None, ...]
    times: tuple[int, ...]
    gradients: tuple[tuple[Any, ...] | None, ...]

    @staticmethod
    def of_linear(parts: Sequence[Any]) -> LocalLogits | None:
        """Those of F.linear(*parts), whose sizes are known; None where a rank cannot make its own."""
        hidden, weight, *_ = parts
        placements = placements_of_linear(*parts)
        if placements is None:
            return None
        mesh, shape = hidden.device_mesh, (*hidden.shape[:-1], weight.shape[0])
        gradients = tuple(gradient_placements(part.placements, placements) for part in parts)
        return LocalLogits(mesh, placements, shape, _times(mesh, placements, len(shape)), gradients)

    @staticmethod
    def of(logits: Any, parts: Sequence[Tensor]) -> LocalLogits | None:
        """Those of examples; None where the size of what is sharded can only be known at a run."""
        times = _times(logits.device_mesh, logits.placements, logits.ndim)
        sizes = zip(logits.shape, local_of(logits).shape, times, strict=True)
        if any(constant(size) is None and not equal(size, own * n) for size, own, n in sizes):
            return None
        gradients = tuple(
            gradient_placements(p.placements, logits.placements) if is_dtensor(p) else None for p in parts
        )
        shape = tuple(map(constant, logits.shape))
        return LocalLogits(logits.device_mesh, tuple(logits.placements), shape, times, gradients)

    def parts(self, parts: Sequence[Any]) -> list[Tensor]:
        """Those of this rank, by which gradients go to all."""
        return [
            part if placements is None else part.to_local(grad_placements=placements)
            for part, placements in zip(parts, self.gradients, strict=True)
        ]

    def whole(self, local: Tensor) -> DTensor:
        """The logits, of this rank's."""
        sizes = zip(self.shape, local.shape, self.times, strict=True)
        shape = torch.Size([own * n if size is None else size for size, own, n in sizes])
        stride = torch.empty(shape, device="meta").stride()
        return dt.DTensor.from_local(
            local, self.mesh, self.placements, run_check=False, shape=shape, stride=stride
        )


def _times(mesh: Any, placements: Sequence[Any], rank: int) -> tuple[int, ...]:
    """Over how many ranks each dimension is sharded."""
    times = [1] * rank
    for i, placement in enumerate(placements):
        if type(placement) is dt.Shard:
            times[placement.dim] *= mesh.size(i)
    return tuple(times)
