"""Lower: the two operators of `operators.py`, and `times` of `products.py`, to Inductor IR.

On a GPU, Triton templates, which read the pointwise chain before the logits and write through the one
after the gradient. Elsewhere, `loops.py`.

NOTE Offsets
Every index into [N, V] is computed in 64 bits from a 64-bit row. It costs nothing that could be measured,
and it holds for whatever buffer the fused chains read, which need not be as large as z.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch

from ..common.compat import inductor, templates
from ..common.compat.inductor import IRNode
from ..common.compat.loops import in_one_loop, is_added_to_others, read_by_one_loop
from ..common.errors import ArtefactError
from ..common.failsafe import attempt
from ..common.sources import sources
from . import (
    ahead,
    as_read,
    chunks,
    counted,
    divergence_loops,
    group_rank,
    label_products,
    loops,
    one_read,
    one_read_lowering,
    operators,
    products,
    verified,
)
from .divergences import DIVERGENCE, DIVERGENCE_GRAD
from .gemm import aligned_strides
from .label_products import COMPLETE
from .products import ALIGN_ROWS, ONCE_MADE, TIMES, TIMES_IN_PLACE
from .rows import Rows
from .table import ARGMAX
from .with_templates import (
    GPUS,
    MATRIX_READERS,
    PIECES,
    Limit,
    before_rounding,
    columns_in_memory,
    distinct,
    is_made_for_each,
    lowered,
    readable_weights,
    template_named,
    triton_type,
)

GRADIENTS = (operators.ROW_GRAD, operators.ROW_GRAD_AGAIN)
DIRECT = (
    *(counted.row_order, counted.host_copy, counted.recorded, counted.take_rows, counted.product_to_rows),
    counted.frequent_rows,
    *(label_products.product_but, label_products.complete, label_products.most_frequent),
    *(products.logits, products.product_into, products.column_sums, products.once_made),
    *(products.times_in_place, chunks.chunks),
)
WITHOUT_KERNELS = (counted.host_copy, counted.recorded)
BY_NAME = (group_rank, verified)  # modules with operators that generated code calls through the dispatcher
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
STATS_OF_A_PIECE = (Stats(8, 8),)  # of few rows: with more programs at a time too many end late
STATS_OF_A_CHAIN = (Stats(4, 4),)  # timing would leave the chain out, which wants the smaller loop
STATS_OF_MORE = (Stats(4, 4), Stats(4, 2), Stats(2, 4), Stats(8, 2))  # more rows hold more registers
GRAD_OF_SOME = (Grad(8, 8192),)  # of rows that may not count: a program that has nothing to do costs time too
GRAD = (Grad(4, 4096), Grad(4, 2048), Grad(2, 2048), Grad(2, 1024))


@functools.cache
def register() -> None:
    """Give Inductor the lowerings of our operators, once."""
    ours = torch.ops.inductor_ce
    first = f"import inductor_ce.ops.lowering; inductor_ce.ops.lowering.load({sources()!r})"
    for direct in DIRECT:
        then = None if direct in WITHOUT_KERNELS else ahead.lowered
        inductor.call_directly(direct, first, ahead=direct is counted.host_copy, then=then)
    for lowering, op in (
        *((_times, TIMES), (_align_rows, ALIGN_ROWS), (_as_read, as_read.AS_READ)),
        *((_row_stats, ours.row_stats.default), (_row_stats, operators.SOME_ROW_STATS)),
        *((_row_grad, ours.row_grad.default), (_row_grad, operators.SOME_ROW_GRAD)),
        (_row_grad_again, operators.ROW_GRAD_AGAIN),
        *((_row_stats_grad, one_read.ROW_STATS_GRAD), (_row_stats_grad, one_read.SOME_ROW_STATS_GRAD)),
        (divergence_loops.divergence, DIVERGENCE),
        (divergence_loops.divergence_grad, DIVERGENCE_GRAD),
    ):
        inductor.lower_by(lowering, op, first)


def load(made_by: str) -> None:
    """Have the operators that generated code calls, in a process that may not compile.

    Raises:
        ArtefactError: other sources than ours have made the code.
    """
    if made_by != sources():
        raise ArtefactError(
            "This was compiled with another version of inductor_ce. Compile and save it again with this one."
        )
    register()


def _times(x: IRNode, factor: IRNode) -> IRNode:
    """In place where nobody else has x, and nothing that follows would take the product in."""
    dtype = torch.promote_types(x.get_dtype(), factor.get_dtype())
    on_gpu = x.get_device().type in GPUS and dtype != torch.float64
    if on_gpu and inductor.may_overwrite(x, (COMPLETE, ONCE_MADE, "output")):
        inductor.call_lowering(TIMES_IN_PLACE, x, factor)
        return x
    cast = torch.ops.prims.convert_element_type.default
    wide = inductor.call_lowering(cast, x, dtype)
    product = inductor.call_lowering(torch.ops.aten.mul.Tensor, wide, factor)
    return inductor.call_lowering(cast, product, x.get_dtype())


def _as_read(x: IRNode) -> IRNode:
    return inductor.call_lowering(torch.ops.aten.clone.default, x)


def _align_rows(dz: IRNode) -> IRNode:
    v = inductor.specialised(dz.get_size()[1])
    return inductor.laid_out(dz, aligned_strides(v, dz.get_device()))


def _row_stats(
    z: IRNode,
    labels: list[IRNode],
    weights: list[IRNode],
    which: str,
    left: IRNode | None = None,
    piece: int = -1,
    *,
    site: int = operators.NO_SITE,
) -> IRNode:
    """Of all rows, or of some."""
    rows = Rows.decode(which, len(labels), len(weights))
    template = functools.partial(_stats_template, Limit(left, piece))
    return lowered(template, loops.row_stats, z, labels, weights, rows)


def _row_grad(
    z: IRNode,
    labels: list[IRNode],
    weights: list[IRNode],
    m: IRNode,
    coefficients: IRNode,
    which: str,
    left: IRNode | None = None,
    piece: int = -1,
    *,
    site: int = operators.NO_SITE,
    result: int | None = None,
) -> IRNode:
    """Of all rows, or of some; `result` is which it is of the operator's results, if there are several."""
    rows = Rows.decode(which, len(labels), len(weights), of_gradient=True)
    is_one_loop = is_added_to_others(GRADIENTS, result) and not rows.several
    if left is None and (is_one_loop or any(map(is_made_for_each, weights))):
        dz = loops.row_grad(z, labels, weights, m, coefficients, rows)
        return dz if rows.several else _in_place_of(z, dz, result)
    template = functools.partial(_grad_template, Limit(left, piece), result)
    return lowered(template, loops.row_grad, z, labels, weights, m, coefficients, rows)


def _row_stats_grad(
    z: IRNode,
    labels: list[IRNode],
    weights: list[IRNode],
    which: str,
    given: list[IRNode],
    program: str,
    left: IRNode | None = None,
    piece: int = -1,
    *,
    chain: str = "",
) -> tuple[IRNode, IRNode]:
    """By one template, or by what makes statistics and what makes gradients."""
    rows = Rows.decode(which, len(labels), len(weights))
    added = is_added_to_others(GRADIENTS, one_read.GRADIENT)
    if one_read_lowering.is_known(z, weights, rows, given) and not added:
        args = Limit(left, piece), z, labels, weights, rows, given, program, chain
        both, _ = attempt("the logits are read twice, more slowly", one_read_lowering.by_template, *args)
        if both is not None:
            return both
    of = loops.Chained(z, chain)
    packed = _row_stats(of.x, labels, weights, which, left, piece)
    m = inductor.call_lowering(torch.ops.aten.select.int, packed, 0, 0)
    coefficients = loops.coefficients(program, packed, given)
    gradient = functools.partial(_row_grad, left=left, piece=piece, result=one_read.GRADIENT)
    dz = of.gradient(gradient(of.x, labels, weights, m, coefficients, which))
    return packed, _align_rows(dz) if chain else dz


def _row_grad_again(
    z: IRNode, labels: list[IRNode], weights: list[IRNode], m: IRNode, coefficients: IRNode, which: str
) -> IRNode:
    rows = Rows.decode(which, len(labels), len(weights), of_gradient=True)
    return loops.row_grad(z, labels, weights, m, coefficients, rows)


def _in_place_of(z: IRNode, dz: IRNode, result: int | None) -> IRNode:
    """The result of a loop, laid out as z where it may then be written over it, as Inductor decides."""
    may = inductor.may_overwrite(z, MATRIX_READERS, PIECES, result)
    return inductor.laid_out(dz, z.get_stride()) if may else dz


# Templates


def stats_configurations(
    v: int, dtype: torch.dtype, rows: Rows, chained: bool = False, piece: bool = False
) -> list[dict[str, Any]]:
    """What to try for row_stats at V = v, without repetition."""
    usual = STATS_OF_A_PIECE if piece else STATS
    configurations = [
        {
            **_tile(v, tried, dtype),
            "V": v,
            "K_PAD": 1 << (len(rows) - 1).bit_length(),
            "ROWS": rows,
            "ACC_TYPE": triton_type(operators.stats_dtype_of(dtype)),
            "SUM_TYPE": triton_type(operators.packed_dtype_of(dtype, rows)),
            "num_stages": 1,
        }
        for tried in (STATS_OF_A_CHAIN if chained else STATS_OF_MORE if rows.has_more else usual)
    ]
    return distinct(configurations)


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
    v: int, dtype: torch.dtype, rows: Rows, over: bool = False, some: bool = False, row: int | None = None
) -> list[dict[str, Any]]:
    """What to try for row_grad at V = v, of rows that have more in memory if `row` says so; each once."""
    w = v if row is None else row
    largest = 1 << (w.bit_length() - 1)
    configurations = [
        {
            "BLOCK": min(tried.block, largest),
            "num_warps": max(1, min(tried.warps, largest // (32 * LANE))),
            "ALIGN": min(16, w & -w, largest),
            "V": v,
            "W": w,
            "ROWS": rows,
            "OVER": int(over),
            "ACC_TYPE": triton_type(operators.stats_dtype_of(dtype)),
            "num_stages": 1,
        }
        for tried in (GRAD_OF_SOME if some else GRAD)
    ]
    return distinct(configurations)


def _one_program_a_row(n: Any, v: Any, meta: dict[str, Any]) -> tuple[Any, int, int]:
    return n, 1, 1


def _one_program_a_block(n: Any, v: Any, meta: dict[str, Any], *, cdiv: Any) -> tuple[Any, int, int]:
    # NOTE N is never in a second grid dimension, which ends at 65535.
    return n * cdiv(meta["W"], meta["BLOCK"]), 1, 1


def _stats_template(
    limit: Limit, z: IRNode, labels: list[IRNode], weights: list[IRNode], rows: Rows
) -> IRNode:
    n, v = z.get_size()[0], inductor.specialised(z.get_size()[1])
    chained = not all(map(inductor.is_buffer, [z, *weights]))
    if any(map(is_made_for_each, weights)):
        in_one_loop([operators.ROW_GRAD])
    q = readable_weights(weights, z, inductor.names_read(z))
    others = [*map(inductor.readable, labels), *q, *q, *limit.inputs()]
    piece = inductor.made_by(z, PIECES)
    z = inductor.readable(before_rounding(z), absorb=True)
    return templates.choose(
        template_named("row_stats", _one_program_a_row),
        inputs=[z] * (4 if ARGMAX in rows else 3) + others,
        layout=inductor.contiguous_layout(z, operators.packed_dtype_of(z.get_dtype(), rows), [len(rows), n]),
        call_sizes=[n, v],
        configurations=_tried(stats_configurations(v, z.get_dtype(), rows, chained, piece), piece),
        PIECE=limit.piece,
    )


def _grad_template(
    limit: Limit,
    result: int | None,
    z: IRNode,
    labels: list[IRNode],
    weights: list[IRNode],
    m: IRNode,
    coefficients: IRNode,
    rows: Rows,
) -> IRNode:
    n, v = z.get_size()[0], inductor.specialised(z.get_size()[1])
    numbers = [*map(inductor.readable, (m, coefficients))]
    known = {x.get_name() for x in numbers}
    others = [*numbers, *map(inductor.readable, labels), *readable_weights(weights, z, known)]
    others += limit.inputs()
    # NOTE after
    # Where statistics and gradient are made in one graph, the gradient's chain waits for the coefficients,
    # which are made of the statistics. The template that absorbs it waits for them in any case.
    dtype = z.get_dtype()
    in_memory = inductor.is_buffer(z)
    unrounded = not in_memory and read_by_one_loop(result)
    z = inductor.readable(before_rounding(z), absorb=True, after=known)
    over = inductor.may_overwrite(z, MATRIX_READERS, PIECES, result) and not any(
        inductor.reads(other, z) for other in others
    )
    row = columns_in_memory(z) if over and in_memory and not weights else v
    configurations = grad_configurations(v, dtype, rows, over, limit.left is not None, row)
    dz = templates.choose(
        template_named("row_grad", _one_program_a_block),
        inputs=[z, *others],
        layout=inductor.contiguous_layout(z, z.get_dtype() if unrounded else dtype, [n, v]),
        call_sizes=[n, v],
        configurations=_tried(configurations, inductor.made_by(z, PIECES)),
        over=z if over else None,
        PIECE=limit.piece,
    )
    return loops.cast(dz, dtype) if unrounded else dz


def _tried(configurations: list[dict[str, Any]], piece: bool) -> list[dict[str, Any]]:
    """All, but the first alone for a piece of the logits: each of many would be timed anew."""
    return configurations[:1] if piece else configurations
