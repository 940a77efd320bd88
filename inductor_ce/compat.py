"""Every private name of torch that inductor_ce uses, and what moves between its releases.

Nothing else in the package imports from `torch._inductor`. A difference between releases is met here, by
probing for the capability where one can, so that no other file knows which torch it runs on.
"""

from __future__ import annotations

import contextlib
import copy
import itertools
from collections.abc import Callable, Container, Sequence
from typing import Any, TypeGuard

import torch

from .errors import AFTER_LAST_TORCH, FIRST_TORCH, UnsupportedTorchError, unsupported

try:
    from torch._dispatch.python import enable_python_dispatcher
    from torch._dynamo import config as dynamo_config
    from torch._dynamo.utils import counters
    from torch._guards import TracingContext
    from torch._inductor import config as inductor_config
    from torch._inductor import custom_graph_pass, ir, list_mode_options, list_options, metrics
    from torch._inductor.compile_fx import compile_fx
    from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files
    from torch._inductor.decomposition import select_decomp_table as decompositions
    from torch._inductor.lowering import fallback_handler, lowerings, register_lowering
    from torch._inductor.select_algorithm import SymbolicGridFn, TritonTemplate, autotune_select_algorithm
    from torch._inductor.virtualized import V as inductor
    from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
    from torch.nn._reduction import legacy_get_string as legacy_reduction
    from torch.utils._pytree import tree_leaves
except ImportError as missing:
    raise UnsupportedTorchError(unsupported(torch.__version__)) from missing

__all__ = [
    "ALL_GATHER",
    "HAS_PASS_LISTS",
    "IN_MEMORY",
    "WAIT",
    "CustomGraphPass",
    "OpOverload",
    "SymbolicGridFn",
    "all_gather_blocks",
    "all_reduce_sum",
    "auto_chunked_graphs",
    "auto_functionalized",
    "autocast_switches",
    "call_in_place",
    "call_lowering",
    "captured_copy",
    "check_torch",
    "choose",
    "compile_fx",
    "contiguous_layout",
    "counters",
    "decompositions",
    "enable_python_dispatcher",
    "enter_inference_mode",
    "exit_inference_mode",
    "fake_mode_of",
    "get_data",
    "get_hash_for_files",
    "inductor_config",
    "is_buffer",
    "is_dtensor",
    "is_function_transform",
    "is_higher_order",
    "is_kept_dynamic",
    "is_plain_tensor",
    "is_tangent",
    "legacy_reduction",
    "list_mode_options",
    "list_options",
    "made_by",
    "may_overwrite",
    "no_recompile_limit",
    "rank_in_group",
    "readable",
    "register_lowering",
    "returns_to_program",
    "set_grad_enabled",
    "specialised",
    "template",
    "uncompiled",
    "unset_fake_temporarily",
]

# Lowering

Node = Any  # an Inductor IR value: what lowerings take and return

aten = torch.ops.aten
IN_MEMORY = "inductor_realize_to_strides"  # in an FX node's meta: no reader computes its value anew
OWNED = (ir.DonatedBuffer, ir.ExternKernelOut)  # storage that nobody else has
VIEWS = {aten.permute.default, aten.t.default, aten.view.default, aten.reshape.default, aten.transpose.int}


def call_lowering(op: Any, *args: Any, **kwargs: Any) -> Node:
    """The IR of `op(*args)`, by Inductor's own lowering of `op`."""
    return lowerings[op](*args, **kwargs)


def call_in_place(op: Any, *args: Any) -> None:
    """Let the graph call an operator that writes to its arguments and returns nothing."""
    fallback_handler(op, add_to_fallback_set=False)(*args)


def is_buffer(x: Node) -> bool:
    """Whether `x` is in memory, or a strided view of what is; else it is a chain yet to be computed."""
    return ir.is_storage_and_layout(x)


def readable(x: Node, *, absorb: bool = False, after: Sequence[Node] = ()) -> Node:
    """`x` as a buffer with strides, which a template can read.

    With `absorb`, a pointwise chain that ends in `x` gets a buffer with no other reader, and the scheduler
    is told to fuse it into the template that reads it. Left to itself it would not where the chain has
    another use, is written through a view, or is 16-bit and needs float32 within.

    The chain waits for the buffers `after`, though it does not read them. Two templates that absorb chains of
    the same tensor would else lose both, as the scheduler prefers one loop that writes both to memory.
    """
    if absorb and not is_buffer(x):
        x = call_lowering(aten.clone.default, x)
        x.realize()
        chain = x.get_operation_name()
        inductor.graph.invoke_quant_ops.add(chain)
        inductor.graph.additional_buffer_deps[chain].update(buffer.get_name() for buffer in after)
    x = ir.ExternKernel.realize_input(x)
    x.freeze_layout()
    return x


def auto_chunked_graphs() -> int | None:
    """How many graphs Inductor's auto_chunker has rewritten in this process; None where none are counted."""
    return getattr(metrics, "num_auto_chunking", None)


def specialised(size: Any) -> int:
    """A size as a number, which the compiled code may then depend on."""
    return inductor.graph.sizevars.guard_int(size)


def contiguous_layout(like: Node, dtype: torch.dtype, size: Sequence[Any]) -> ir.Layout:
    return ir.FixedLayout(device=like.get_device_or_error(), dtype=dtype, size=list(size))


def may_overwrite(z: Node, products: Container[Any], fillers: Container[Any] = ()) -> bool:
    """Whether the operator being lowered may write its result over `z`, and gains by it.

    It may where it is the last to read `z` and autograd or Inductor owns the storage, which is then a
    donated activation, the output of a library's kernel, or that of one of `fillers`; not where the
    scheduler may yet fuse the producer of `z` into a template. It gains where matrix products read the
    result: a pointwise reader would be fused, and then nothing needs to be stored but what that one writes.
    """
    buffer = _buffer(z)
    if not isinstance(buffer, OWNED) and not made_by(z, fillers):
        return False
    known = inductor.graph.sizevars.statically_known_equals
    row_stride, column_stride = z.get_stride()
    whole = (
        list(buffer.get_size()) == list(z.get_size())
        and list(buffer.get_stride()) == [row_stride, column_stride]
        and known(buffer.get_layout().offset, 0)
    )
    apart = known(column_stride, 1) and inductor.graph.sizevars.statically_known_geq(
        row_stride, z.get_size()[1]
    )
    if not (whole and apart):
        return False
    current = inductor.graph.current_node
    later = set(itertools.dropwhile(lambda node: node is not current, current.graph.nodes)) - {current}
    read_later = any(
        not later.isdisjoint(node.users)
        for node, value in inductor.graph.env.items()
        if any(_buffer(leaf) is buffer for leaf in tree_leaves(value))
    )
    return not read_later and _only_read_by(products, current)


def made_by(z: Node, targets: Container[Any]) -> bool:
    """Whether one of these operators has filled the memory of `z`."""
    buffer = _buffer(z)
    return any(
        node.target in targets and _buffer(value) is buffer for node, value in inductor.graph.env.items()
    )


def _only_read_by(products: Container[Any], node: Node) -> bool:
    """Whether only these read the value of an FX node, be it through transpositions and views."""
    return all(
        user.target in products or (user.target in VIEWS and _only_read_by(products, user))
        for user in node.users
    )


def _buffer(value: Any) -> Any:
    """What an IR value is a view of; itself where it is none."""
    while isinstance(value, (ir.BaseView, ir.MutableBox)):
        value = value.unwrap_view() if isinstance(value, ir.BaseView) else value.data
    return value


# Templates


def template(name: str, source: str, grid: Callable[..., tuple[Any, Any, Any]]) -> TritonTemplate:
    """The template `name`, made by the first call: up to 2.13 a second one of a name is refused."""
    known = TritonTemplate.all_templates.get(name)
    return known or TritonTemplate(name=name, source=source, grid=SymbolicGridFn(grid))


def choose(
    source: TritonTemplate,
    inputs: Sequence[Node],
    layout: ir.Layout,
    call_sizes: Sequence[Any],
    configurations: Sequence[dict[str, Any]],
    over: Node | None = None,
) -> Node:
    """The output of `source` under the fastest of `configurations`, or the first where none can be timed.

    It is written over `over`, where that is given: a value that it `may_overwrite`.
    """
    if over is not None:
        # What has been lowered but not realised may read it: realise that first, as it was lowered first.
        inductor.graph.mark_buffer_mutated(over.get_name())
    choices: list[Any] = []
    for configuration in configurations:
        refused = source.maybe_append_choice(
            choices,
            input_nodes=tuple(inputs),
            layout=layout,
            call_sizes=list(call_sizes),
            **configuration,
        )
        if refused is not None:
            raise refused
    try:
        # NOTE return_multi_template
        # Deferred selection would time the fusions as well and may decide against one. Here a fusion always
        # saves a pass over [N, V].
        best = autotune_select_algorithm(
            source.name, choices, list(inputs), layout, return_multi_template=False
        )
    except torch.OutOfMemoryError:
        best = choices[0].output_node()
    node = best[0] if isinstance(best, tuple) else best  # (node, choice) from 2.12
    if over is None:
        return node
    _buffer(node).layout = ir.MutationLayoutSHOULDREMOVE(over)
    return ir.TensorBox(over)


# Passes

HAS_PASS_LISTS = hasattr(custom_graph_pass, "get_custom_graph_passes")


def check_torch(version: str = torch.__version__) -> None:
    """Raise UnsupportedTorchError, naming the supported versions, unless `version` is one of them."""
    major, minor = (int(part) for part in version.split(".")[:2])
    if not FIRST_TORCH <= (major, minor) < AFTER_LAST_TORCH:
        raise UnsupportedTorchError(unsupported(version))


def is_plain_tensor(example: torch.Tensor) -> bool:
    """Whether the example of a node stands for an ordinary tensor, not for a subclass such as DTensor."""
    return isinstance(example, FakeTensor)


def is_dtensor(example: object) -> TypeGuard[Any]:
    """Whether the example of a node stands for a DTensor."""
    return torch.distributed.is_available() and isinstance(example, DTensor)


def fake_mode_of(example: torch.Tensor | None) -> FakeTensorMode:
    """The mode in which the example of a node was made."""
    local = example._local_tensor if is_dtensor(example) else example
    assert isinstance(local, FakeTensor)
    return local.fake_mode


# Graphs

# The nodes by which a graph switches modes.
set_grad_enabled = torch._C._set_grad_enabled
enter_inference_mode = torch.autograd.grad_mode._enter_inference_mode
exit_inference_mode = torch.autograd.grad_mode._exit_inference_mode
autocast_switches = {torch.amp.autocast_mode._enter_autocast, torch.amp.autocast_mode._exit_autocast}
OpOverload = torch._ops.OpOverload
get_data = torch._C._autograd._get_data_attr  # type: ignore[attr-defined]  # x.data


auto_functionalized = torch.ops.higher_order.auto_functionalized_v2


def is_tangent(node: torch.fx.Node) -> bool:
    """Whether an input of a joint graph is an upstream gradient."""
    return node.op == "placeholder" and str(node.target).startswith("tangents")


def is_higher_order(target: Any) -> bool:
    """Whether a node calls an operator that is given graphs, or a user's Triton kernel."""
    return isinstance(target, torch._ops.HigherOrderOperator)


def is_kept_dynamic(size: torch.SymInt) -> bool:
    """Whether the user insists on this size being dynamic, by `mark_dynamic` on an input."""
    context = TracingContext.try_get()
    if context is None:
        return False
    symbols = size.node.shape_env.source_to_var
    return any(
        not getattr(constraint, "warn_only", True)
        and symbols.get(f"{_source_name(symbolic)}.size()[{dim}]") == size.node.expr
        for symbolic in context.tensor_to_context.values()
        for dim, constraint in enumerate(getattr(symbolic, "constraint_sizes", None) or ())
    )


def _source_name(symbolic: Any) -> str:
    """How guards call the tensor: a method of its source in some releases, a property in others."""
    name = symbolic.tensor_source.name
    return name() if callable(name) else name


def is_function_transform(target: Any) -> bool:
    """Whether a node belongs to torch.func (vmap, grad, ...), under whose levels other nodes run."""
    return "functorch" in (getattr(target, "__module__", None) or "")


def returns_to_program(module: torch.nn.Module | None) -> bool:
    """Whether the outputs of a module's graph go to the user's program.

    Those of a body inside another graph do not, nor those of the parts that DDPOptimizer compiles apart.
    """
    reason = getattr(module, "compile_subgraph_reason", None)
    return reason is not None and "DDPOptimizer" not in reason.reason


def captured_copy(module: torch.fx.GraphModule) -> torch.fx.GraphModule:
    """A copy of what Dynamo captured, with its graphs, but with the same tensors."""
    made = copy.deepcopy(module, {id(t): t for t in (*module.parameters(), *module.buffers())})
    made.compile_subgraph_reason = getattr(module, "compile_subgraph_reason", None)  # type: ignore[assignment]
    return made


def no_recompile_limit() -> contextlib.AbstractContextManager[None]:
    """Compile as often as is asked."""
    return dynamo_config.patch(recompile_limit=2**31, accumulated_recompile_limit=2**31)


def uncompiled(f: Callable[..., Any]) -> Callable[..., Any]:
    """What `torch.compile` or `Module.compile` was given, where `f` is the result."""
    if getattr(f, "_compiled_call_impl", None) is not None:
        return f._call_impl  # type: ignore[attr-defined]
    inner = getattr(f, "_orig_mod", getattr(f, "_torchdynamo_orig_callable", None))
    return f if inner is None else inner


# Process groups

ALL_GATHER: Any
WAIT: Any

if torch.distributed.is_available():
    from torch.distributed import _functional_collectives, distributed_c10d
    from torch.distributed.tensor import DTensor

    ALL_GATHER = torch.ops._c10d_functional.all_gather_into_tensor.default
    WAIT = torch.ops._c10d_functional.wait_tensor.default
else:
    ALL_GATHER = WAIT = None


def all_gather_blocks(x: torch.Tensor, group_name: Any) -> torch.Tensor:
    """[P * K, ...] of the [K, ...] that each of the P ranks of a group gives, without a gradient."""
    # Renamed in 2.13, where the old name warns.
    new = getattr(_functional_collectives, "all_gather_single", None)
    return (new or _functional_collectives.all_gather_tensor)(x, 0, group_name)


def all_reduce_sum(x: torch.Tensor, group_name: Any) -> torch.Tensor:
    """The sum of the tensors that the ranks of a group give, which is there when it is returned."""
    summed = _functional_collectives.all_reduce(x, "sum", group_name)
    is_pending = isinstance(summed, _functional_collectives.AsyncCollectiveTensor)
    return summed.wait() if is_pending else summed


def rank_in_group(group_name: Any) -> int:
    """The rank of this process in a group."""
    return distributed_c10d._resolve_process_group(group_name).rank()
