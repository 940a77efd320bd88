"""What Dynamo has compiled, and how it is asked to compile anew."""

from __future__ import annotations

import contextlib
import copy
import itertools
from collections.abc import Callable, Iterator
from types import CodeType, ModuleType
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch

from .versions import of_supported_torch

with of_supported_torch():
    from torch._dynamo import config as dynamo_config
    from torch._dynamo.backends.debugging import aot_eager
    from torch._dynamo.eval_frame import skip_code
    from torch._dynamo.exc import RestartAnalysis
    from torch._dynamo.source import AttrSource
    from torch._dynamo.utils import counters
    from torch._functorch import config as functorch_config
    from torch._guards import TracingContext

__all__ = ["RestartAnalysis", "aot_eager", "counters"]


def input_source(node: torch.fx.Node) -> Any:
    """Where guards find what an input of a graph stands for, None where that is unknown."""
    return getattr(node, "_dynamo_source", None)


def attribute_source(node: torch.fx.Node, name: str) -> Any:
    """Where guards find an attribute of what an input of a graph stands for."""
    return AttrSource(node._dynamo_source, name)  # type: ignore[attr-defined]


def moved_facts(module: torch.fx.GraphModule, made: torch.fx.GraphModule) -> None:
    """What Dynamo and the caches know of a captured module, for a copy of it."""
    made.meta = module.meta
    for name in ("compile_subgraph_reason", "_param_name_to_source", "_backend_id"):
        if hasattr(module, name):
            setattr(made, name, getattr(module, name))


def is_captured(module: torch.nn.Module) -> bool:
    """Whether a graph is one that Dynamo gives to a backend."""
    return getattr(module, "compile_subgraph_reason", None) is not None


def is_to_be_saved() -> bool:
    """Whether what is compiled is saved with its program, so that it can be no function but torch's own."""
    return functorch_config.bundled_autograd_cache or dynamo_config.caching_precompile


def remakes_products() -> bool:
    """Whether the partitioner may make matrix products again in the backward."""
    return functorch_config.aggressive_recomputation or functorch_config.activation_memory_budget < 1


def returns_to_program(module: torch.nn.Module | None) -> bool:
    """Whether the outputs of a module's graph go to the user's program.

    Those of a body inside another graph do not, nor those of the parts that DDPOptimizer compiles apart.
    """
    reason = getattr(module, "compile_subgraph_reason", None)
    return reason is not None and "DDPOptimizer" not in reason.reason


def is_cut(module: torch.nn.Module | None) -> bool:
    """Whether Dynamo ends a captured graph where it could not go on, perhaps with another graph behind it."""
    reason = getattr(module, "compile_subgraph_reason", None)
    return reason is not None and reason.graph_break and returns_to_program(module)


class Break(NamedTuple):
    """What Dynamo says of a place where it could not go on; the frames there, the innermost last."""

    text: str
    frames: tuple[tuple[str, int], ...]


def break_of(module: torch.nn.Module) -> Break | None:
    """Why Dynamo ended a captured graph before its function did."""
    if not is_cut(module):
        return None
    reason: Any = module.compile_subgraph_reason
    return Break(reason.reason, tuple((frame.filename, frame.lineno) for frame in reason.user_stack))


@contextlib.contextmanager
def breaks_told() -> Iterator[list[str]]:
    """What Dynamo says of all such places, and of functions that it gave up, when the block is left."""
    kinds = "graph_break", "unimplemented"
    before = {kind: counters[kind].copy() for kind in kinds}
    told: list[str] = []
    yield told
    told += dict.fromkeys(text for kind in kinds for text in counters[kind] - before[kind])


_numbers: WeakKeyDictionary[TracingContext, Iterator[int]] = WeakKeyDictionary()


def numbers_of_compilation() -> Iterator[int]:
    """0, 1, 2, ..., each once in what Dynamo now compiles: a graph, and the graphs inside it.

    The same program gets the same numbers whenever it is compiled, as keys of caches must.
    """
    context = TracingContext.try_get()
    return itertools.count() if context is None else _numbers.setdefault(context, itertools.count())


def captured_copy(module: torch.fx.GraphModule) -> torch.fx.GraphModule:
    """A copy of what Dynamo captured, with its graphs, but with the same tensors."""
    made = copy.deepcopy(module, {id(t): t for t in (*module.parameters(), *module.buffers())})
    made.compile_subgraph_reason = getattr(module, "compile_subgraph_reason", None)  # type: ignore[assignment]
    return made


def leave_alone(module: ModuleType) -> None:
    """Let Dynamo compile no function of a module by itself; it may still inline what it traces a call of.

    It would where a program calls one between two compiled graphs, as DDP's forward does.
    """
    own = [value for value in vars(module).values() if getattr(value, "__module__", None) == module.__name__]
    methods = [each for value in own if isinstance(value, type) for each in vars(value).values()]
    for value in (*own, *methods):
        value = value.fget if isinstance(value, property) else getattr(value, "__func__", value)
        for code in _with_inner(getattr(value, "__code__", None)):
            skip_code(code)


def _with_inner(code: Any) -> Iterator[CodeType]:
    """The code of a function and of those that it defines."""
    if isinstance(code, CodeType):
        yield code
        for constant in code.co_consts:
            yield from _with_inner(constant)


def no_recompile_limit() -> contextlib.AbstractContextManager[None]:
    """Compile as often as is asked."""
    return dynamo_config.patch(recompile_limit=2**31, accumulated_recompile_limit=2**31)


def uncompiled(f: Callable[..., Any]) -> Callable[..., Any]:
    """What `torch.compile` or `Module.compile` was given, where `f` is the result."""
    if getattr(f, "_compiled_call_impl", None) is not None:
        return f._call_impl  # type: ignore[attr-defined]
    inner = getattr(f, "_orig_mod", getattr(f, "_torchdynamo_orig_callable", None))
    return f if inner is None else inner
