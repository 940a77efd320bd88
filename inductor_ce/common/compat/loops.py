"""What Inductor computes in one loop, and what it stores between two."""

from __future__ import annotations

import operator
from collections.abc import Container
from typing import Any

import torch

from .versions import of_supported_torch

with of_supported_torch():
    from torch._inductor import config as inductor_config
    from torch._inductor import ir
    from torch._inductor.virtualized import V as virtualized

aten = torch.ops.aten
SEEN_THROUGH = {
    aten.permute.default,
    aten.t.default,
    aten.view.default,
    aten.reshape.default,
    aten.transpose.int,
}
_EXACT = {"load", "constant", "index_expr", "to_dtype", "where"}
_EXACT |= {"add", "sub", "mul", "truediv", "neg", "abs", "maximum", "minimum"}
_EXACT |= {"eq", "ne", "lt", "le", "gt", "ge"}
LONG = 1000  # operations, and reads, of a loop that is not divided


def in_one_loop(firsts: Container[Any]) -> None:
    """Let one loop compute what these operators are lowered to, and the chains that follow, however long.

    Inductor would store a part of a long chain, fuse its loops after all, and then not see that the last may
    write over what the first reads. It holds for what is yet to be lowered of the graph at hand.
    """
    graph = virtualized.graph
    if "run_node" in vars(graph):
        return
    run_node = graph.run_node

    def run(node: Any) -> Any:
        if not _follows(node, firsts):
            return run_node(node)
        with inductor_config.patch(realize_opcount_threshold=LONG, realize_acc_reads_threshold=LONG):
            return run_node(node)

    vars(graph)["run_node"] = run


def _follows(node: Any, firsts: Container[Any]) -> bool:
    """Whether it is one of these, or a pointwise operation on what follows one and nothing else reads."""
    if node.target in firsts:
        return True
    before = (source for source in node.all_input_nodes if len(source.users) == 1)
    return _is_loop(node.target) and any(_follows(source, firsts) for source in before)


def result_node(node: Any, result: int | None) -> Any:
    """What stands for this one of several results of an operator in a graph, or for the only one."""
    if result is None:
        return node
    parts = (user for user in node.users if user.target is operator.getitem and user.args[1] == result)
    return next(parts, node)


def read_by_one_loop(result: int | None = None) -> bool:
    """Whether one pointwise operation alone reads the result, or this one, of what is being lowered.

    The scheduler then fuses it into a template, so that the result itself is nowhere in memory.
    """
    node = result_node(virtualized.graph.current_node, result)
    while len(node.users) == 1:
        (node,) = node.users
        if node.target not in SEEN_THROUGH:
            return _is_loop(node.target)
    return False


def is_added_to_others(ours: Container[Any], result: int | None = None) -> bool:
    """Whether the result of what is being lowered, or this one, is added to what is none of `ours`.

    One loop then makes the sum, and may write it over what it reads. A template's result would lie beside it.
    """
    node = result_node(virtualized.graph.current_node, result)
    while len(node.users) == 1:
        source, (node,) = node, node.users
        if node.target is aten.add.Tensor:
            return any(_is_another(other, source, ours) for other in node.args)
        if not _is_seen_through(node.target):
            return False
    return False


def _is_another(x: Any, source: Any, ours: Container[Any]) -> bool:
    while isinstance(x, torch.fx.Node) and x is not source and _is_seen_through(x.target):
        x = x.args[0]
    return isinstance(x, torch.fx.Node) and x is not source and x.target not in ours


def _is_seen_through(target: Any) -> bool:
    return target in SEEN_THROUGH or _is_cast(target)


def _is_cast(target: Any) -> bool:
    return target is torch.ops.prims.convert_element_type.default


def _is_loop(target: Any) -> bool:
    is_operator = isinstance(target, torch._ops.OpOverload)
    return _is_cast(target) or (is_operator and torch.Tag.pointwise in target.tags)


def buffer_of(value: Any) -> Any:
    """What an IR value is a view of; itself where it is none."""
    while isinstance(value, (ir.BaseView, ir.MutableBox)):
        value = value.unwrap_view() if isinstance(value, ir.BaseView) else value.data
    return value


def is_same_anew(x: Any) -> bool:
    """Whether x is not in memory, and all loops that compute it give it the same bits.

    The exponential of a vector may not be that of a number.
    """
    if ir.is_storage_and_layout(x):
        return False
    loop = ir.Pointwise.create(
        device=x.get_device(), dtype=x.get_dtype(), inner_fn=x.make_loader(), ranges=x.get_size()
    )
    return _EXACT.issuperset(buffer_of(loop).inner_fn_opcount().used_ops)


def as_stored(x: Any) -> None:
    """Let all that reads `x` read what is in memory, to the last bit.

    A loop that is fused with the one that makes a 16-bit value takes it as it was before it was rounded.
    """
    x.realize()
    buffer = buffer_of(x)
    if isinstance(buffer, ir.ComputedBuffer) and x.get_dtype().itemsize == 2:
        virtualized.graph.no_fuse_buffer_names.add(buffer.get_name())
