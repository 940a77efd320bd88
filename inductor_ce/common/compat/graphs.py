"""What the nodes of a graph are, and what their examples are."""

from __future__ import annotations

import contextlib
import functools
from dataclasses import dataclass
from typing import Any, TypeGuard

import torch

from .versions import of_supported_torch

with of_supported_torch():
    from torch._dispatch.python import enable_python_dispatcher
    from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack as without_transforms
    from torch._guards import CompileContext, TracingContext
    from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
    from torch.nn._reduction import legacy_get_string as legacy_reduction
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves, tree_map

if torch.distributed.is_available():
    from torch.distributed.tensor import DTensor

__all__ = [
    "FakeTensor",
    "FakeTensorMode",
    "TorchDispatchMode",
    "enable_python_dispatcher",
    "legacy_reduction",
    "tree_leaves",
    "tree_map",
    "unset_fake_temporarily",
    "without_transforms",
]
AS_TRACED = "eager_input_vals"  # in an FX node's meta: its arguments, to whose strides Inductor brings them
IN_MEMORY = "inductor_realize_to_strides"  # in an FX node's meta: no reader computes its value anew


def is_plain_tensor(example: torch.Tensor) -> bool:
    """Whether the example of a node stands for an ordinary tensor, not for a subclass such as DTensor."""
    return isinstance(example, FakeTensor)


def is_dtensor(example: object) -> TypeGuard[Any]:
    """Whether the example of a node stands for a DTensor."""
    return torch.distributed.is_available() and isinstance(example, DTensor)


def local_of(tensor: torch.Tensor) -> torch.Tensor:
    """This rank's part of a DTensor, without a gradient; any other tensor itself."""
    return tensor._local_tensor if is_dtensor(tensor) else tensor


def reads_local(node: torch.fx.Node) -> bool:
    """Whether a node gives the part of a DTensor that this rank has: `to_local`, of which some releases make
    a function of their own."""
    if node.target is getattr:
        return node.args[1] == "_local_tensor"
    name = node.target if node.op == "call_method" else getattr(node.target, "__name__", "")
    return name in ("to_local", "prim_to_local")


def set_local(tensor: Any, local: torch.Tensor) -> None:
    """Let a DTensor have another tensor of the same elements in place of this rank's part."""
    tensor._local_tensor = local


def fake_mode_of(example: torch.Tensor | None) -> FakeTensorMode:
    """The mode in which the example of a node was made."""
    local = None if example is None else local_of(example)
    assert isinstance(local, FakeTensor)
    return local.fake_mode


@dataclass(frozen=True)
class Layout:
    """All of an example that has memory of its own."""

    shape: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device

    @classmethod
    def of(cls, example: torch.Tensor) -> Layout:
        return cls(example.shape, example.stride(), example.dtype, example.device)

    def example(self, mode: FakeTensorMode) -> torch.Tensor:
        with unset_fake_temporarily():
            empty = torch.empty_strided(self.shape, self.stride, dtype=self.dtype, device="meta")
        return FakeTensor(mode, empty, self.device)


def fresh_like(example: torch.Tensor) -> torch.Tensor:
    """An example of the same sizes, strides, dtype and device, in memory of its own."""
    return Layout.of(example).example(fake_mode_of(example))


# Graphs

# The nodes by which a graph switches modes.
set_grad_enabled = torch._C._set_grad_enabled
enter_inference_mode = torch.autograd.grad_mode._enter_inference_mode
exit_inference_mode = torch.autograd.grad_mode._exit_inference_mode
enter_autocast = torch.amp.autocast_mode._enter_autocast
exit_autocast = torch.amp.autocast_mode._exit_autocast
autocast_switches = {enter_autocast, exit_autocast}
OpOverload = torch._ops.OpOverload
without_torch_function = torch._C.DisableTorchFunctionSubclass
get_data = torch._C._autograd._get_data_attr  # type: ignore[attr-defined]  # x.data


autograd_function_apply = torch.ops.higher_order.autograd_function_apply
auto_functionalized = torch.ops.higher_order.auto_functionalized_v2


def without_saved_tensors_hooks() -> contextlib.AbstractContextManager[Any]:
    """Within, autograd saves tensors as they are."""
    if not torch._C._autograd._saved_tensors_hooks_is_enabled():  # type: ignore[attr-defined]
        return contextlib.nullcontext()
    return torch.autograd.graph.saved_tensors_hooks(lambda saved: saved, lambda saved: saved)


def refuse_memory(tensor: torch.Tensor) -> None:
    """Let C++ that asks for the memory of a tensor which has none raise an error."""
    torch._C._set_throw_on_mutable_data_ptr(tensor)


def is_fake(tensor: torch.Tensor) -> bool:
    return isinstance(tensor, FakeTensor)


def is_capturing() -> bool:
    """Whether Dynamo is at work in this thread, and may ask what a tensor is without wanting its elements."""
    return TracingContext.try_get() is not None


def is_compiling() -> bool:
    """Whether Dynamo is at work in this thread, the making of guards included."""
    return CompileContext.try_get() is not None


def is_transformed() -> bool:
    """Whether torch.func.vmap, grad or the like are at work in this thread."""
    return torch._C._functorch.peek_interpreter_stack() is not None


def has_tangent(tensor: torch.Tensor) -> bool:
    """Whether forward-mode differentiation carries a tangent with a tensor."""
    return is_in_forward_mode() and torch.autograd.forward_ad.unpack_dual(tensor).tangent is not None


def is_in_forward_mode() -> bool:
    """Whether a level of forward-mode differentiation is open."""
    return torch.autograd.forward_ad._current_level >= 0


def is_tangent(node: torch.fx.Node) -> bool:
    """Whether an input of a joint graph is an upstream gradient."""
    return node.op == "placeholder" and str(node.target).startswith("tangents")


@functools.cache
def clamps_pass_ends() -> bool:
    """Whether a gradient flows through what is clamped where it is at an end: up to torch 2.13 it does."""
    with unset_fake_temporarily(), torch.inference_mode(False), torch.enable_grad():
        x = torch.zeros(1, device="cpu", requires_grad=True)
        (gradient,) = torch.autograd.grad(x.clamp(min=0.0).sum(), x)
        return bool(gradient)


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


# Where AOTAutograd says which dimensions of a result are symbolic: it depends on the release.
_DYNAMIC = ("_dynamo_weak_dynamic_indices", "_dynamo_propagated_dynamic_indices")


def keep_dynamic(of: torch.Tensor, made: torch.Tensor, dims: int) -> None:
    """Let what is compiled for `made` take for dynamic those of the first dimensions that `of` has so."""
    for name in _DYNAMIC:
        marked = {dim for dim in getattr(of, name, ()) if dim < dims}
        if marked:
            setattr(made, name, marked | getattr(made, name, set()))


def _source_name(symbolic: Any) -> str:
    """How guards call the tensor: a method of its source in some releases, a property in others."""
    name = symbolic.tensor_source.name
    return name() if callable(name) else name


def is_function_transform(target: Any) -> bool:
    """Whether a node belongs to torch.func (vmap, grad, ...), under whose levels other nodes run."""
    return "functorch" in (getattr(target, "__module__", None) or "")
