"""Skip rows that do not count: which can be, and what is told of it."""

from __future__ import annotations

import importlib.util
from typing import Any, NamedTuple

import torch
from torch.fx import Node

from ..common.compat.distributed import ALL_REDUCE, WAIT
from ..common.compat.inductor import uses_cudagraphs
from ..graph.builder import Builder
from ..graph.shapes import equal, example_of, hint, shape_of, tensor_of
from ..graph.walk import args_of, reached, sources_of
from .calls import exchanges, ranks_are_alike, stats_call
from .counted_rows import AllCount, counted_rows
from .factors import has_16_bit_factors
from .find import Head, NoHead
from .kinds import VIEWS
from .packing import DEVICE, HOST, RECORDING, is_light
from .pieces import CAST
from .plan import LOOKED_WORK
from .proof import Proof
from .rolled import is_offered

if importlib.util.find_spec("triton"):  # which torch's builds for GPUs bring
    from ..ops import counted_kernels

aten = torch.ops.aten

_COMPARISONS = {
    **dict.fromkeys((aten.ne.Scalar, aten.ne.Tensor), ("!=", "==")),
    **dict.fromkeys((aten.eq.Scalar, aten.eq.Tensor), ("==", "!=")),
    **dict.fromkeys((aten.gt.Scalar, aten.gt.Tensor), (">", "<=")),
    **dict.fromkeys((aten.ge.Scalar, aten.ge.Tensor), (">=", "<")),
    **dict.fromkeys((aten.lt.Scalar, aten.lt.Tensor), ("<", ">=")),
    **dict.fromkeys((aten.le.Scalar, aten.le.Tensor), ("<=", ">")),
}
_SEEN_THROUGH = {
    *VIEWS,
    CAST,
    aten.clamp_min.default,
    aten.clamp.default,
    aten.slice.Tensor,
    aten.constant_pad_nd.default,
    aten.expand.default,
}


_PRODUCTS = (aten.mm.default, aten.addmm.default, aten.bmm.default, aten.baddbmm.default)

BODY = 2**40  # multiplications and additions of products: some milliseconds
NOT_ON_DEVICE = (
    "in CUDA graphs, or where little before the head keeps a GPU busy while the host looks, rows are left "
    "out of 16-bit products alone, on GPUs since Hopper"
)
NOT_WORTH_IT = (
    "where little before the head keeps a GPU busy while the host looks, leaving out rows of so small a head "
    "costs the host more than it saves"
)
OF_WEIGHTS = "a weight for each row and class would have to be copied"
OF_TEACHER = "targets are made of the teacher's logits of all rows"
OF_SIDES = "a divergence is made of all rows"
NOT_ALIKE = "ranks with different numbers of classes may not decide alike whether rows are left out"
IF_FINITE = ", of those whose logits may be infinite, or NaN, none"


class ToCompute(NamedTuple):
    """Which rows of a head are computed.

    Attributes:
        told: what is told of them, or why all are computed; "" for nothing to tell.
        rows: bool [N]; None for all.
        looks: who looks at how many they are, as `Packing` has it; all of them, where all are computed.
        is_rolled: whether all pieces are one operator, see `rolled.py`.
    """

    told: str
    rows: Node | None = None
    looks: str = HOST
    is_rolled: bool = False


ALL = ToCompute("")


def rows_to_compute(build: Builder, head: Head, proof: Proof, work: int, alone: bool = True) -> ToCompute:
    """Which rows are computed by pieces of which each is so much work, N V D.

    The head is `alone`, or one in a loop.
    """
    is_rolled = alone and is_offered(head, proof.facts) and _is_told_on_device(head, work)
    try:
        _check(head)
        counted = counted_rows(build, head, proof)
        looks = _who_looks(head, counted.rows, work, is_rolled)
    except (AllCount, NoHead) as why:
        return ToCompute(str(why), None, DEVICE if is_rolled else HOST, is_rolled)
    texts = dict.fromkeys(_text(node, is_true, head) for node, is_true in counted.conditions.items())
    told = f"rows that do not count are skipped: `{' and '.join(texts)}`"
    rows = _of_any_rank(build, head, counted.rows)
    return ToCompute(told + IF_FINITE * counted.if_finite, rows, looks, is_rolled)


def bytes_beside(computed: ToCompute) -> int:
    """Bytes that a product needs beside a piece where the host does not look."""
    return 0 if computed.looks == HOST else counted_kernels.PARTS_BYTES


def _who_looks(head: Head, counts: Node, work: int, is_rolled: bool = False) -> str:
    """Who looks at how many rows count.

    The device does where one operator launches all chunks. Of others the host may where it is told before a
    body begins that keeps the device busy meanwhile. Whether rows are left out at all is the same on all
    ranks that share the classes, whatever these have of their own.

    Raises:
        AllCount: the device would have to, and cannot, or it would not pay.
    """
    if example_of(head.product).device.type != "cuda":
        return HOST
    if is_rolled:
        return DEVICE
    in_graphs = uses_cudagraphs({})
    if not in_graphs and is_light(reached([counts], sources_of), head.n) and _has_body(head):
        return HOST
    is_of_ranks = bool(exchanges(head.stats))
    if _has_products_on_device(head):
        if not in_graphs and not is_of_ranks and work < LOOKED_WORK:
            raise AllCount(NOT_WORTH_IT)
        return RECORDING if in_graphs else DEVICE
    if is_of_ranks and not in_graphs:
        return HOST
    raise AllCount(NOT_ON_DEVICE)


def _is_told_on_device(head: Head, work: int) -> bool:
    """Whether one operator has products that read on the device how many rows there are, and it pays."""
    return work >= LOOKED_WORK and not uses_cudagraphs({}) and _has_products_on_device(head)


def _has_body(head: Head) -> bool:
    """Whether the graph has work before the head, for as long as a host takes to launch the head."""
    work = 0
    for node in reached([product.hidden for product in head.products], sources_of):
        if node.target in _PRODUCTS:
            work += hint(example_of(node).numel()) * hint(shape_of(args_of(node)[-1])[-2])
        elif _may_take_long(node):
            return True
    return work >= BODY


def _may_take_long(node: Node) -> bool:
    """Whether it is attention, a convolution, or an operator of another library."""
    namespace = getattr(node.target, "namespace", "aten")
    large = any(name in str(node.target) for name in ("attention", "convolution"))
    return node.op == "call_function" and (large or namespace not in ("aten", "prims"))


def _check(head: Head) -> None:
    """Raises AllCount where the rows of a piece cannot be those that count, or it would not pay."""
    if head.divergences:
        raise AllCount(OF_SIDES)
    if not ranks_are_alike(head.stats):
        raise AllCount(NOT_ALIKE)
    if any(len(shape_of(weight)) == 2 for node in head.stats for weight in stats_call(node).weights):
        raise AllCount(OF_TEACHER if head.teacher else OF_WEIGHTS)
    if any(_is_wide(source, head) for source in head.beside()):
        raise AllCount("what the logits are combined with, for each row and class, would have to be copied")


def _is_wide(source: Node, head: Head) -> bool:
    """Whether what is combined with logits differs from row to row and from class to class."""
    if tensor_of(source) is None or not shape_of(source):
        return False
    *rows, columns = shape_of(source)
    return equal(columns, head.v) and not all(equal(size, 1) for size in rows)


def _has_products_on_device(head: Head) -> bool:
    device = example_of(head.product).device
    if has_16_bit_factors(head.products) or not counted_kernels.reads_tiles(device):
        return False
    if any(shape_of(product.hidden)[-1] % 8 for product in head.products):
        return False
    columns = [example_of(product.columns) for product in head.products]
    if exchanges(head.stats):  # ranks decide alike, whatever classes they have
        return all(x.itemsize == 2 and x.stride(0) == 1 for x in columns)
    return all(map(counted_kernels.has_tiles, columns))


def _of_any_rank(build: Builder, head: Head, counts: Node) -> Node:
    """The rows that count on any of the ranks that share the classes, which must take rows in one order.

    They have the same labels, so that these are the same rows. It is not taken on trust.
    """
    gathers = exchanges(head.stats)
    if not gathers:
        return counts
    _, _, group = args_of(gathers[0])
    numbers = build(CAST, counts, torch.int32)
    most = build(WAIT, build(ALL_REDUCE, numbers, "max", group))
    return build(aten.ne.Scalar, most, 0)


# In words


def _text(node: Node, is_true: bool, head: Head) -> str:
    """A condition, of rows that count, as a user knows it."""
    if node.target in _COMPARISONS:
        left, right = (_name(arg, head) for arg in args_of(node))
        return f"{left} {_COMPARISONS[node.target][not is_true]} {right}"
    if node.target in (aten.logical_not.default, aten.bitwise_not.default):
        return _text(args_of(node)[0], not is_true, head)
    if node.target in VIEWS or node.target == aten.expand.default:
        return _text(args_of(node)[0], is_true, head)
    if example_of(node).dtype != torch.bool:
        return f"{_name(node, head)} != 0"
    return f"{'' if is_true else 'not '}{_name(node, head)}"


def _name(value: Any, head: Head) -> str:
    """y for a label, and mask for what else is in the graph."""
    if not isinstance(value, Node):
        return str(value)
    labels = {_source(label) for node in head.stats for label in stats_call(node).labels}
    if _source(value) in labels:
        return "y"
    return "mask" if tensor_of(value) is not None and example_of(value).dim() else value.name


def _source(node: Node) -> Node:
    while node.target in _SEEN_THROUGH:
        node = args_of(node)[0]
    return node
