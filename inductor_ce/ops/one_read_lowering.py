"""Lower `row_stats_grad` to its template, where a GPU has one."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from ..common.compat import inductor, templates
from ..common.compat.inductor import IRNode
from . import chains
from .one_read import GRADIENT, VECTOR_BYTES, Given, OneRead, is_offered
from .row_program import decode
from .rows import Rows
from .with_templates import (
    MATRIX_READERS,
    PIECES,
    Limit,
    columns_in_memory,
    has_templates,
    is_made_for_each,
    readable_weights,
    template_named,
    triton_type,
)

READERS = {*MATRIX_READERS, "output"}  # who, if nobody else, lets the gradient lie over the logits
WARP = 32
WORD_BYTES = 8


class Once(NamedTuple):
    """A configuration: warps, columns of a block, blocks between sums and gradient, and looks before help."""

    warps: int
    block: int
    delay: int
    spin: int


ONCE = Once(2, 2048, 640, 1024)


def is_known(z: IRNode, weights: list[IRNode], rows: Rows, given: list[IRNode]) -> bool:
    """Whether the template can make it: see what is published in `templates/row_stats_grad.py.jinja`."""
    if not has_templates(z, weights) or torch.version.hip is not None or not inductor.is_buffer(z):
        return False  # Inductor lets no template absorb a chain that writes more than one result
    if any(x.get_device() != z.get_device() for x in given):
        return False  # torch takes a number of the CPU beside tensors of a GPU, a template does not
    made = any(is_made_for_each(q) or inductor.is_constant(q) for q in weights)
    return is_offered(z.get_dtype(), _columns(z, weights, _may_overwrite(z)), rows) and not made


def _may_overwrite(z: IRNode) -> bool:
    return inductor.may_overwrite(z, READERS, PIECES, result=GRADIENT)


def _columns(z: IRNode, weights: list[IRNode], over: bool) -> int:
    """How many columns of a row are read, and written: those in memory, where the gradient lies over them.

    A weight of the classes has none beyond V.
    """
    return columns_in_memory(z) if over and not weights else inductor.specialised(z.get_size()[1])


def configuration(v: int, w: int, itemsize: int, rows: Rows) -> dict[str, Any]:
    """What the template is given at V = v, of rows of w logits of so many bytes each."""
    largest = 1 << (w.bit_length() - 1)
    block = min(ONCE.block, largest)
    align = min(16, w & -w, largest)
    columns = min(VECTOR_BYTES // itemsize, align, block)
    warps = max(1, min(ONCE.warps, block // (WARP * columns)))
    lanes = min(warps * WARP, block // columns)
    blocks = -(-w // block)
    words = max(blocks + rows.labels, warps * WARP)  # each thread has one: all find out alike
    return {
        "BLOCK": block,
        "REPS": block // (lanes * columns),
        "LANES": lanes,
        "COLS": columns,
        "num_warps": warps,
        "ALIGN": align,
        "V": v,
        "W": w,
        "T": 1 << (words - 1).bit_length(),
        "DELAY": max(ONCE.delay, blocks + blocks // 2) if ONCE.delay else 0,
        "SPIN": ONCE.spin,
        "ACC_TYPE": triton_type(torch.float32),
        "num_stages": 1,
    }


def _one_program_a_block_and_some(n: Any, v: Any, meta: dict[str, Any], *, cdiv: Any) -> tuple[Any, int, int]:
    return n * cdiv(meta["W"], meta["BLOCK"]) + meta["DELAY"], 1, 1


def by_template(
    limit: Limit,
    z: IRNode,
    labels: list[IRNode],
    weights: list[IRNode],
    rows: Rows,
    given: list[IRNode],
    program: str,
    chain: str,
) -> tuple[IRNode, IRNode]:
    """The statistics [K, N] and the gradient [N, V], which may lie over the logits."""
    n, v = z.get_size()[0], inductor.specialised(z.get_size()[1])
    numbers = (Given.of(k, x.get_dtype(), len(x.get_size()) > 0) for k, x in enumerate(given))
    narrow = z.get_dtype().itemsize == 2
    one = OneRead(rows, decode(program), tuple(numbers), chains.decode(chain), narrow)
    own = [*map(inductor.readable, labels)]
    q = readable_weights(weights, z, inductor.names_read(z))
    weighed = [q[j] for j in one.weights_read]
    others = [*own, *weighed, *map(inductor.readable, given), *limit.inputs()]
    z = inductor.readable(z)
    over = _may_overwrite(z) and not any(inductor.reads(other, z) for other in others)
    stats = inductor.empty(z, torch.float32, [len(rows), n])
    chosen = configuration(v, _columns(z, weights, over), z.get_dtype().itemsize, rows)
    words = one.words_of_row(-(-chosen["W"] // chosen["BLOCK"]))
    dz = templates.choose(
        template_named("row_stats_grad", _one_program_a_block_and_some),
        inputs=[z, z, z, inductor.readable(stats), *[z] * len(one.logits_again), *others],
        layout=inductor.contiguous_layout(z, z.get_dtype(), [n, v]),
        call_sizes=[n, v],
        configurations=[chosen],
        over=z if over else None,
        written=[inductor.readable(stats)],
        zeroed_bytes=n * words * WORD_BYTES,
        ROWS=rows,
        ONE=one,
        WORDS=words,
        OVER=int(over),
        PIECE=limit.piece,
    )
    return stats, dz
