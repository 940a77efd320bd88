"""What lowerings to templates share: which inputs a template reads, and when there can be one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ..common.compat import inductor, templates
from ..common.compat.inductor import IRNode
from ..common.failsafe import attempt
from . import loops
from .counted import PRODUCT_TO_ROWS
from .gemm import aligned_strides
from .label_products import PRODUCT_BUT
from .products import COLUMN_SUMS, LOGITS, PRODUCT_INTO

TEMPLATES = Path(__file__).parent / "templates"
GPUS = ("cuda",)  # HIP calls itself cuda
MATRIX_READERS = {
    *(torch.ops.aten.mm.default, torch.ops.aten.addmm.default, torch.ops.aten.bmm.default),
    *(torch.ops.aten.baddbmm.default, PRODUCT_INTO, PRODUCT_TO_ROWS, PRODUCT_BUT, COLUMN_SUMS),
}
PIECES = (LOGITS,)


class Limit(NamedTuple):
    """Where the rows of a piece end that are computed: at left[piece], or nowhere. See `counted.py`."""

    left: IRNode | None
    piece: int

    def inputs(self) -> list[IRNode]:
        return [] if self.left is None else [inductor.readable(self.left)]


def template_named(name: str, grid: Any) -> Any:
    """The template of a file, behind the law."""
    return templates.template(f"inductor_ce_{name}", template_text(name), grid)


def template_text(name: str) -> str:
    return "".join((TEMPLATES / f"{file}.py.jinja").read_text() for file in ("law", name))


def lowered(
    template: Callable[..., IRNode],
    by_loops: Callable[..., IRNode],
    z: IRNode,
    labels: list[IRNode],
    weights: list[IRNode],
    *others: Any,
) -> IRNode:
    """By the template on a GPU, and by Inductor's loops elsewhere or if the template cannot be had."""
    args = (z, labels, weights, *others)
    result = None
    if has_templates(z, weights):
        result, _ = attempt("the loss runs on Inductor's own loops, more slowly", template, *args)
    return by_loops(*args) if result is None else result


def has_templates(z: IRNode, weights: list[IRNode]) -> bool:
    """Whether a template may read these: on a GPU, and where there is something to read."""
    # A constant that a template absorbs would not have the shape of its tile.
    constant = any(map(inductor.is_constant, [z, *(q for q in weights if len(q.get_size()) == 2)]))
    return z.get_device().type in GPUS and not _is_empty(z) and not constant


def is_made_for_each(q: IRNode) -> bool:
    """Whether a chain that is yet to be computed makes a weight for each row and class of something."""
    return len(q.get_size()) == 2 and not inductor.is_buffer(q) and not inductor.is_constant(q)


def columns_in_memory(z: IRNode) -> int:
    """How many elements a row of [N, V] has to itself: V, or in what `logits` made the next multiple of 8."""
    v = inductor.specialised(z.get_size()[1])
    row, _ = aligned_strides(v, z.get_device_or_error())
    return row if inductor.made_by(z, PIECES) and z.get_stride()[0] == row else v


def _is_empty(z: IRNode) -> bool:
    """Nothing to read. A symbolic N is taken to be positive; where it is 0 the template's grid is empty."""
    return any(size == 0 for size in z.get_size())


def before_rounding(z: IRNode) -> IRNode:
    """A chain of 16-bit operations that ends in z, or a weight, in the float32 in which Inductor computes it.

    NOTE Where 16-bit chains are rounded. Inductor computes a chain of 16-bit operations in float32, and what
    it fuses into a loop is not rounded in between. A template would round at its borders, a prologue to the
    dtype of the buffer that it stands for, an epilogue first to that of the template's result. So both are
    float32 where there is a chain; only what is stored at the end is rounded.
    """
    return z if inductor.is_buffer(z) else loops.cast(z, loops.stats_dtype(z))


def readable_weights(weights: list[IRNode], z: IRNode, after: set[str]) -> list[IRNode]:
    """Each as [N, V], a chain that makes it for rows and classes absorbed.

    One that is [V] is in memory, and read with a stride of 0: there is little of it.
    """
    return [
        inductor.readable(before_rounding(q), absorb=True, after=after)
        if is_made_for_each(q)
        else inductor.readable(loops.over_rows(q, z))
        for q in weights
    ]


def distinct(configurations: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [c for i, c in enumerate(configurations) if c not in configurations[:i]]


def triton_type(dtype: torch.dtype) -> str:
    return f"tl.{str(dtype).removeprefix('torch.')}"
