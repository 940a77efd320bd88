"""Lower: the two operators of `ops.py` to Inductor IR.

On a GPU, Triton templates, which read the pointwise chain before the logits and write through the one
after the gradient. Elsewhere, Inductor's own loops, by the definitions in `ops.py`.

NOTE Offsets
Every index into [N, V] is computed in 64 bits from a 64-bit row. It costs nothing that could be measured,
and it holds for whatever buffer the fused chains read, which need not be as large as z.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch

from . import compat, ops
from .compat import Node, call_lowering
from .shield import attempt

aten, prims = torch.ops.aten, torch.ops.prims

TEMPLATES = Path(__file__).parent / "templates"
GPUS = ("cuda",)  # HIP calls itself cuda
LANE = 8  # columns of one thread in one vector: 16 bytes of a 16-bit dtype


class Stats(NamedTuple):
    """A configuration of row_stats: warps, and how many vectors a thread has in flight."""

    warps: int
    unroll: int


class Grad(NamedTuple):
    """A configuration of row_grad: warps, and columns a program."""

    warps: int
    block: int


# The first of each is the one to take where nothing can be timed.
STATS = (Stats(4, 8), Stats(2, 8), Stats(4, 4), Stats(4, 16))
STATS_OF_A_CHAIN = (Stats(4, 4),)  # timing would leave the chain out, which wants the smaller loop
GRAD = (Grad(4, 4096), Grad(4, 2048), Grad(2, 2048), Grad(2, 1024))


@functools.cache
def register() -> None:
    """Give Inductor the lowerings of both operators, once."""
    compat.register_lowering(torch.ops.inductor_ce.row_stats.default, type_promotion_kind=None)(_row_stats)
    compat.register_lowering(torch.ops.inductor_ce.row_grad.default, type_promotion_kind=None)(_row_grad)


def _row_stats(z: Node, labels: list[Node], which: str) -> Node:
    rows = ops.parse(which, len(labels))
    return _lowered(z, _stats_template, _stats_loops, z, labels, rows)


def _row_grad(z: Node, labels: list[Node], m: Node, coefficients: Node, which: str) -> Node:
    rows = ops.parse(which, len(labels))
    return _lowered(z, _grad_template, _grad_loops, z, labels, m, coefficients, rows)


def _lowered(z: Node, template: Callable[..., Node], loops: Callable[..., Node], *args: Any) -> Node:
    """By the template on a GPU, and by Inductor's loops elsewhere or if the template cannot be had."""
    result = None
    if z.get_device().type in GPUS and not _is_empty(z):
        result, _ = attempt("the loss runs on Inductor's own loops, more slowly", template, *args)
    return loops(*args) if result is None else result


def _is_empty(z: Node) -> bool:
    """Nothing to read. A symbolic N is taken to be positive; where it is 0 the template's grid is empty."""
    return any(size == 0 for size in z.get_size())


def _stats_dtype(z: Node) -> torch.dtype:
    return torch.float64 if z.get_dtype() == torch.float64 else torch.float32


# Templates


def stats_configurations(
    v: int, dtype: torch.dtype, n_labels: int, with_sum: bool, chained: bool = False
) -> list[dict[str, Any]]:
    """What to try for row_stats at V = v, without repetition."""
    k = 2 + n_labels + with_sum
    configurations = [
        {
            **_tile(v, tried, dtype),
            "V": v,
            "K_PAD": 1 << (k - 1).bit_length(),
            "LABELS": n_labels,
            "SUM": int(with_sum),
            "ACC_TYPE": _acc_type(dtype),
            "num_stages": 1,
        }
        for tried in (STATS_OF_A_CHAIN if chained else STATS)
    ]
    return _distinct(configurations)


def _tile(v: int, tried: Stats, dtype: torch.dtype) -> dict[str, int]:
    """The tile U x L of a configuration, shrunk until it fits in a row."""
    unroll = tried.unroll // 2 if dtype == torch.float64 else tried.unroll
    lanes = tried.warps * 32 * LANE
    while unroll * lanes > v:
        if unroll > 1:
            unroll //= 2
        else:
            lanes //= 2
    return {"U": unroll, "L": lanes, "num_warps": max(1, min(tried.warps, lanes // (32 * LANE)))}


def grad_configurations(
    v: int, dtype: torch.dtype, n_labels: int, with_sum: bool, over: bool = False
) -> list[dict[str, Any]]:
    """What to try for row_grad at V = v, without repetition."""
    largest = 1 << (v.bit_length() - 1)
    configurations = [
        {
            "BLOCK": min(tried.block, largest),
            "num_warps": max(1, min(tried.warps, largest // (32 * LANE))),
            "ALIGN": min(16, v & -v, largest),
            "V": v,
            "LABELS": n_labels,
            "SUM": int(with_sum),
            "OVER": int(over),
            "ACC_TYPE": _acc_type(dtype),
            "num_stages": 1,
        }
        for tried in GRAD
    ]
    return _distinct(configurations)


def _distinct(configurations: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [c for i, c in enumerate(configurations) if c not in configurations[:i]]


def _acc_type(dtype: torch.dtype) -> str:
    return "tl.float64" if dtype == torch.float64 else "tl.float32"


def _one_program_a_row(n: Any, v: Any, meta: dict[str, Any]) -> tuple[Any, int, int]:
    return n, 1, 1


def _one_program_a_block(n: Any, v: Any, meta: dict[str, Any], *, cdiv: Any) -> tuple[Any, int, int]:
    # NOTE N is never in a second grid dimension, which ends at 65535.
    return n * cdiv(v, meta["BLOCK"]), 1, 1


def _template(name: str, grid: Any) -> Any:
    return compat.template(f"inductor_ce_{name}", (TEMPLATES / f"{name}.py.jinja").read_text(), grid)


def _stats_template(z: Node, labels: list[Node], rows: list[str]) -> Node:
    n, v = z.get_size()[0], compat.specialised(z.get_size()[1])
    chained = not compat.is_buffer(z)
    z = compat.readable(z, absorb=True)
    return compat.choose(
        _template("row_stats", _one_program_a_row),
        inputs=[z, z, z, *map(compat.readable, labels)],
        layout=compat.contiguous_layout(z, _stats_dtype(z), [len(rows), n]),
        call_sizes=[n, v],
        configurations=stats_configurations(v, z.get_dtype(), len(labels), ops.SUM in rows, chained),
    )


def _grad_template(z: Node, labels: list[Node], m: Node, coefficients: Node, rows: list[str]) -> Node:
    n, v = z.get_size()[0], compat.specialised(z.get_size()[1])
    z = compat.readable(z, absorb=True)
    over = compat.may_overwrite(z)
    return compat.choose(
        _template("row_grad", _one_program_a_block),
        inputs=[z, *map(compat.readable, (m, coefficients, *labels))],
        layout=compat.contiguous_layout(z, z.get_dtype(), [n, v]),
        call_sizes=[n, v],
        configurations=grad_configurations(v, z.get_dtype(), len(labels), ops.SUM in rows, over),
        over=z if over else None,
    )


# Loops


def _stats_loops(z: Node, labels: list[Node], rows: list[str]) -> Node:
    n, v = z.get_size()
    x = _cast(z, _stats_dtype(z))
    if v == 0:
        m = _full([n], -torch.inf, x)
    else:
        m = call_lowering(aten.amax.default, x, [1])
    shifted = _minus_row(x, _where(call_lowering(aten.eq.Scalar, m, -torch.inf), 0.0, m))
    d = call_lowering(aten.sum.dim_IntList, call_lowering(aten.exp.default, shifted), [1])
    values = [m, d]
    for y in labels:
        inside = _inside(y, v)
        index = _cast(_where(inside, y, 0), torch.int64)
        picked = _squeeze(call_lowering(aten.gather.default, x, 1, _unsqueeze(index, 1))) if v else m
        values.append(_where(inside, picked, 0.0))
    if ops.SUM in rows:
        values.append(call_lowering(aten.sum.dim_IntList, shifted, [1]))
    return _stack(values)


def _grad_loops(z: Node, labels: list[Node], m: Node, coefficients: Node, rows: list[str]) -> Node:
    def coefficient(k: int) -> Node:
        return _unsqueeze(call_lowering(aten.select.int, coefficients, 0, k), 1)

    x = _cast(z, _stats_dtype(z))
    dz = call_lowering(aten.mul.Tensor, coefficient(1), call_lowering(aten.exp.default, _minus_row(x, m)))
    column = _iota(z.get_size()[1], z)
    for j, y in enumerate(labels):
        hit = call_lowering(aten.eq.Tensor, _unsqueeze(column, 0), _unsqueeze(_cast(y, torch.int64), 1))
        dz = call_lowering(aten.add.Tensor, dz, _where(hit, coefficient(2 + j), 0.0))
    if ops.SUM in rows:
        dz = call_lowering(aten.add.Tensor, dz, coefficient(2 + len(labels)))
    return call_lowering(aten.clone.default, _cast(dz, z.get_dtype()), memory_format=torch.contiguous_format)


def _stack(values: list[Node]) -> Node:
    """[K, N] of K rows. Not by `cat`, whose lowering on a GPU looks at the node that is being lowered."""
    k = _unsqueeze(_iota(len(values), values[0]), 1)
    packed = _unsqueeze(values[-1], 0)
    for i, value in reversed(list(enumerate(values[:-1]))):
        packed = _where(call_lowering(aten.eq.Scalar, k, i), _unsqueeze(value, 0), packed)
    return packed


def _iota(size: Any, like: Node) -> Node:
    return call_lowering(
        prims.iota.default,
        size,
        start=0,
        step=1,
        dtype=torch.int64,
        device=like.get_device(),
        requires_grad=False,
    )


def _inside(y: Node, v: Any) -> Node:
    return call_lowering(
        aten.bitwise_and.Tensor,
        call_lowering(aten.ge.Scalar, y, 0),
        call_lowering(aten.lt.Scalar, _cast(y, torch.int64), v),
    )


def _minus_row(x: Node, row: Node) -> Node:
    return call_lowering(aten.sub.Tensor, x, _unsqueeze(row, 1))


def _cast(x: Node, dtype: torch.dtype) -> Node:
    return call_lowering(prims.convert_element_type.default, x, dtype)


def _where(condition: Node, yes: Any, no: Any) -> Node:
    return call_lowering(aten.where.self, condition, yes, no)


def _unsqueeze(x: Node, dim: int) -> Node:
    return call_lowering(aten.unsqueeze.default, x, dim)


def _squeeze(x: Node) -> Node:
    return call_lowering(aten.squeeze.dim, x, 1)


def _full(size: list[Any], value: float, like: Node) -> Node:
    return call_lowering(aten.full.default, size, value, dtype=like.get_dtype(), device=like.get_device())
