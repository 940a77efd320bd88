"""Inductor: its configuration, its passes, and what lowerings are given."""

from __future__ import annotations

import functools
import itertools
import weakref
from collections.abc import Callable, Container, Iterable, Sequence
from typing import Any

import torch

from .loops import SEEN_THROUGH, buffer_of, result_node
from .versions import of_supported_torch

with of_supported_torch():
    import torch._inductor.compile_fx as compile_fx_module
    from torch._inductor import config as inductor_config
    from torch._inductor import custom_graph_pass, ir, list_mode_options, list_options, metrics
    from torch._inductor.compile_fx import compile_fx
    from torch._inductor.custom_graph_pass import CustomGraphPass
    from torch._inductor.decomposition import select_decomp_table as decompositions
    from torch._inductor.lowering import fallback_handler, lowerings, register_lowering
    from torch._inductor.select_algorithm import extern_kernels
    from torch._inductor.virtualized import V as virtualized
    from torch._library.custom_ops import CustomOpDef
    from torch.utils._pytree import tree_leaves

__all__ = [
    "CustomGraphPass",
    "compile_fx",
    "decompositions",
    "inductor_config",
    "list_mode_options",
    "list_options",
    "register_lowering",
]

# Compilation


def current_compile_fx() -> Callable[..., Any]:
    """What torch.compile's own backend calls, which looks it up by name at each call."""
    return compile_fx_module.compile_fx


def set_compile_fx(function: Callable[..., Any]) -> None:
    compile_fx_module.compile_fx = function


def uses_cudagraphs(patches: dict[str, Any]) -> bool:
    """Whether what is compiled under these patches of the configuration may run as CUDA graphs."""
    return bool(patches.get("triton.cudagraphs", inductor_config.triton.cudagraphs))


def is_ahead_of_time() -> bool:
    """Whether AOTInductor compiles, for a program that may have no Python."""
    return bool(virtualized.aot_compilation)


# Lowering

IRNode = Any  # an Inductor IR value: what lowerings take and return

aten = torch.ops.aten
_LARGE = (ir.ExternKernel, ir.TemplateBuffer)
OWNED = (ir.DonatedBuffer, ir.ExternKernelOut)  # storage that nobody else has


def call_lowering(op: Any, *args: Any, **kwargs: Any) -> IRNode:
    """The IR of `op(*args)`, by Inductor's own lowering of `op`."""
    return lowerings[op](*args, **kwargs)


def lower_by(lowering: Callable[..., IRNode], op: Any, first: str) -> None:
    """Let Inductor lower an operator by a function, in code that begins with the line `first`.

    What a graph was compiled to may be loaded by a process that has not compiled anything.
    """

    @functools.wraps(lowering)
    def beginning_with(*args: Any, **kwargs: Any) -> IRNode:
        _begin_with(first)
        return lowering(*args, **kwargs)

    register_lowering(op, type_promotion_kind=None)(beginning_with)


_begun = weakref.WeakSet[Any]()  # graphs whose code begins with our line


def _begin_with(line: str) -> None:
    """Let the Python that is made of the graph that is being lowered begin with a line."""
    graph = virtualized.graph
    while hasattr(graph, "parent"):  # of a body inside another graph
        graph = graph.parent
    if not graph.cpp_wrapper and graph not in _begun:
        _begun.add(graph)
        _when_lowered(graph, lambda: graph.wrapper_code.add_import_once(line))


def _when_lowered(graph: Any, do: Callable[[], None]) -> None:
    """Do something when all of a graph has been lowered, and nothing of it has been ordered or fused."""
    make = graph.init_wrapper_code

    def make_and_do(*args: Any, **kwargs: Any) -> None:
        make(*args, **kwargs)
        do()

    vars(graph)["init_wrapper_code"] = make_and_do


def _run_before_the_rest(graph: Any, op: ir.FallbackKernel) -> None:
    """Let what the library or a template runs, and is not lowered yet, wait for `op`.

    Inductor orders operations by the memory that they hold, whatever the order of the graph.
    """
    done = len(graph.operations)

    def order() -> None:
        waiting: set[str] = set()
        for later in graph.operations[done:]:
            if waiting.isdisjoint(later.get_read_names()):
                if not isinstance(later, _LARGE):
                    continue
                graph.additional_buffer_deps[later.get_operation_name()].add(op.get_name())
            waiting.update(buffer.get_name() for buffer in later.get_outputs())

    _when_lowered(graph, order)


def call_directly(
    op: CustomOpDef, first: str, *, ahead: bool = False, then: Callable[..., None] | None = None
) -> None:
    """Let generated code call the Python function of an operator, and not by way of torch's dispatcher.

    That takes the host longer than launching the operator's kernels. Autograd, and all else that a dispatcher
    looks after, has been dealt with when code is generated. The code begins with the line `first`. It runs
    the operator `ahead` of all large operations that follow in the graph. `then` is called with the function
    and the arguments, as a tuple and a dict, when these have been lowered.
    """
    overload, name = op._opoverload, op._qualname.replace("::", "_")
    call = fallback_handler(overload, add_to_fallback_set=False)

    def lowering(*args: Any, **kwargs: Any) -> Any:
        graph = virtualized.graph
        known = len(graph.operations)
        result = call(*args, **kwargs)
        for made in graph.operations[known:]:
            if isinstance(made, ir.FallbackKernel) and not graph.cpp_wrapper:
                made.python_kernel_name = f"extern_kernels.{name}"
            if isinstance(made, ir.FallbackKernel) and ahead:
                _run_before_the_rest(graph, made)
        if then is not None:
            then(op._init_fn, args, kwargs)
        return result

    setattr(extern_kernels, name, op._init_fn)  # as torch does with those of its own
    lower_by(lowering, overload, first)


def is_buffer(x: IRNode) -> bool:
    """Whether `x` is in memory, or a strided view of what is; else it is a chain yet to be computed."""
    return ir.is_storage_and_layout(x)


def is_constant(x: IRNode) -> bool:
    """Whether `x` is made of nothing in memory, as zeros are."""
    return not is_buffer(x) and not x.get_read_names()


def readable(x: IRNode, *, absorb: bool = False, after: Iterable[str] = ()) -> IRNode:
    """`x` as a buffer with strides, which a template can read.

    With `absorb`, a pointwise chain that ends in `x` gets a buffer with no other reader, and the scheduler
    is told to fuse it into the template that reads it. Left to itself it would not where the chain has
    another use, is written through a view, or is 16-bit and needs float32 within.

    The chain waits for the buffers named in `after`, though it does not read them. Two templates that absorb
    chains of the same tensor would else lose both, as the scheduler prefers one loop that writes both to
    memory; and a chain would be lost to what makes sums that it reads.
    """
    if absorb and not is_buffer(x):
        x = call_lowering(aten.clone.default, x)
        x.realize()
        chain = x.get_operation_name()
        virtualized.graph.invoke_quant_ops.add(chain)
        virtualized.graph.additional_buffer_deps[chain].update(after)
    x = ir.ExternKernel.realize_input(x)
    x.freeze_layout()
    return x


def names_read(x: IRNode) -> set[str]:
    """Names of the buffers that are read for `x`: itself, or those that the chain to be computed reads."""
    return {x.get_name()} if is_buffer(x) else set(x.get_read_names())


def reads(x: IRNode, z: IRNode) -> bool:
    """Whether the buffer `x` is `z`, or is made in a loop that reads it."""
    buffer = buffer_of(x)
    known = buffer.get_read_names() if isinstance(buffer, ir.ComputedBuffer) else ()
    return z.get_name() in (x.get_name(), *known)


def laid_out(x: IRNode, strides: Sequence[int]) -> IRNode:
    """`x` in memory, with these strides if what makes it can still be told so."""
    x.realize()
    if not isinstance(x.get_layout(), ir.FlexibleLayout):
        return x
    return ir.ExternKernel.require_exact_strides(x, strides)


def auto_chunked_graphs() -> int | None:
    """How many graphs Inductor's auto_chunker has rewritten in this process; None where none are counted."""
    return getattr(metrics, "num_auto_chunking", None)


def specialised(size: Any) -> int:
    """A size as a number, which the compiled code may then depend on."""
    return virtualized.graph.sizevars.guard_int(size)


def empty(like: IRNode, dtype: torch.dtype, size: Sequence[Any]) -> IRNode:
    """Memory that a template writes, as one of its inputs."""
    x = call_lowering(aten.empty.memory_format, size, dtype=dtype, device=like.get_device())
    x.realize()
    return x


def contiguous_layout(like: IRNode, dtype: torch.dtype, size: Sequence[Any]) -> ir.Layout:
    return ir.FixedLayout(device=like.get_device_or_error(), dtype=dtype, size=list(size))


def may_overwrite(
    z: IRNode, products: Container[Any], fillers: Container[Any] = (), result: int | None = None
) -> bool:
    """Whether the operator being lowered may write its result, or this one, over `z`, and gains by it.

    It may where it is the last to read `z` and autograd or Inductor owns the storage, which is then a
    donated activation, the output of a library's kernel, or that of one of `fillers`; not where the
    scheduler may yet fuse the producer of `z` into a template. It gains where matrix products read the
    result: a pointwise reader would be fused, and then nothing needs to be stored but what that one writes.
    """
    buffer = buffer_of(z)
    if not isinstance(buffer, OWNED) and not made_by(z, fillers):
        return False
    known = virtualized.graph.sizevars.statically_known_equals
    row_stride, column_stride = z.get_stride()
    whole = (
        list(buffer.get_size()) == list(z.get_size())
        and list(buffer.get_stride()) == [row_stride, column_stride]
        and known(buffer.get_layout().offset, 0)
    )
    apart = known(column_stride, 1) and virtualized.graph.sizevars.statically_known_geq(
        row_stride, z.get_size()[1]
    )
    if not (whole and apart):
        return False
    current = virtualized.graph.current_node
    later = set(itertools.dropwhile(lambda node: node is not current, current.graph.nodes)) - {current}
    read_later = any(
        not later.isdisjoint(node.users)
        for node, value in virtualized.graph.env.items()
        if any(buffer_of(leaf) is buffer for leaf in tree_leaves(value))
    )
    return not read_later and _only_read_by(products, result_node(current, result))


def made_by(z: IRNode, targets: Container[Any]) -> bool:
    """Whether one of these operators has filled the memory of `z`."""
    buffer = buffer_of(z)
    made = virtualized.graph.env.items()
    return any(node.target in targets and buffer_of(value) is buffer for node, value in made)


def _only_read_by(products: Container[Any], node: IRNode) -> bool:
    """Whether only these read the value of an FX node, be it through transpositions and views."""
    return all(
        user.target in products or (user.target in SEEN_THROUGH and _only_read_by(products, user))
        for user in node.users
    )


# Passes

LOSS_PASSES, HEAD_PASSES = "use_pre_grad_passes", "use_joint_graph_passes"  # without which ours do not run


def is_on(switch: str, patches: dict[str, Any]) -> bool:
    """Whether a switch of Inductor's configuration is on under patches of it; mode="lite" has both off."""
    return patches.get(switch, getattr(inductor_config, switch))


def patches_of(f: Any) -> dict[str, Any]:
    """Under which patches of Inductor's configuration `f` was compiled; none where it was not."""
    configuration = getattr(f, "get_compiler_config", lambda: None)()
    return configuration or {}


HAS_PASS_LISTS = hasattr(custom_graph_pass, "get_custom_graph_passes")
