"""defer: linear layers whose logits are made when somebody looks, for programs that compile their loss alone.

NOTE How. The class of the module becomes one of ours, derived from its own, as torch.nn.utils.parametrize and
FSDP2 do; nothing else of it changes: parameters and their names, hooks, plans of tensor parallelism, ties.
Outside compiled code its forward returns lazy logits. Lazy logits cannot be made inside a graph: where the
module is traced it does what it did, and the graph's nodes name our class as the module they are of, which is
how `rewriting.promises` knows that their result is to be lazy. What is pickled is the module as it was.
"""

from __future__ import annotations

import copy
import functools
from dataclasses import replace
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..common.compat.graphs import is_capturing, is_dtensor, is_transformed
from ..common.errors import InputError
from ..distributed.local_logits import LocalLogits
from ..rewriting.promises import DEFERS
from ..rewriting.recipes import Instruction, Of, Recipe
from .deferral import keep_for_python
from .lazy_logits import LazyLogits
from .lazy_source import Source

M = TypeVar("M", bound=nn.Module)


def defer(module: M) -> M:
    """Let a linear layer return lazy logits; what compiled loss they are given to then has its head.

        model.output = inductor_ce.defer(model.output)    # the same module
        loss = torch.compile(loss_of_logits)

    The logits, of the shape, dtype and device that the layer gives, are made when they are read; the layer's
    input [..., D] and its weight are kept until then, and must not be changed before. Where they enter a
    function compiled under `install()`, the linear layer is compiled with what is done there, so that the
    logits of a loss are never all in memory. Under FSDP2 the gathered weight has to stay until the
    backward: `fully_shard(..., reshard_after_forward=False)` for what holds the layer.

    Args:
        module: a `torch.nn.Linear`, or of a class derived from it that has its `forward`.

    Returns:
        `module`.

    Raises:
        InputError: a module whose result is more, or something else, than F.linear(input, weight, bias).
    """
    kind: Any = type(module)
    if not isinstance(module, nn.Linear) or kind.forward not in (nn.Linear.forward, Deferring.forward):
        raise InputError(
            f"defer takes a torch.nn.Linear, or what is derived from it with its forward, not {kind.__name__}"
        )
    if not isinstance(module, Deferring):
        module.__class__ = _deferring(kind)
    keep_for_python()
    return module


def restore(module: M) -> M:
    """Take `defer` back. Returns `module`, whether it was deferred or not."""
    if isinstance(module, Deferring):
        kind: type = type(module)
        module.__class__ = _restored(kind)
    return module


class Deferring(nn.Linear):
    """What the class of a deferred layer does otherwise."""

    def forward(self, input: Tensor) -> Tensor:
        if torch.compiler.is_compiling() or is_capturing() or torch.jit.is_tracing() or is_transformed():
            return super().forward(input)
        made = _lazy(input, self.weight, self.bias)
        return super().forward(input) if made is None else made

    def __reduce_ex__(self, protocol: Any) -> Any:
        of: type = type(self)
        reduced: Any = super().__reduce_ex__(1)  # from protocol 2 on, an object is of the class that it names
        make, args, *state = reduced
        return make, tuple(_restored(of) if each is of else each for each in args), *state

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        inherited = getattr(super(), "__deepcopy__", None)  # as FSDP2 has, to refuse
        if inherited is not None:
            return inherited(memo)
        made = memo[id(self)] = self.__new__(type(self))
        made.__setstate__(copy.deepcopy(self.__dict__, memo))
        return made


@functools.cache
def _deferring(kind: type) -> type:
    """A class derived from that of a module, whose logits are lazy."""
    facts = {"__module__": kind.__module__, "__qualname__": kind.__qualname__, DEFERS: True}
    return type(kind.__name__, (Deferring, kind), facts)


@functools.cache
def _restored(kind: type) -> type:
    """The class that a module has without us, whatever has been derived from ours since."""
    if Deferring in kind.__bases__:
        return kind.__bases__[1]
    bases = tuple(_restored(base) if _defers(base) else base for base in kind.__bases__)
    facts = {k: v for k, v in vars(kind).items() if k not in ("__dict__", "__weakref__")}
    return type(kind.__name__, bases, facts)


def _defers(kind: type) -> bool:
    return getattr(kind, DEFERS, False)


# The logits of an eager call


def _lazy(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor | None:
    """F.linear(hidden, weight, bias) as lazy logits; None where only the product itself will do."""
    parts = [hidden, weight, *([] if bias is None else [bias])]
    if not hidden.is_floating_point() or not hidden.ndim:
        return None
    recipe = _recipe(parts)
    if recipe is None:
        return None
    if all(type(part) in (Tensor, nn.Parameter) for part in parts):
        return LazyLogits.returned(Source(recipe, parts))
    spread = LocalLogits.of_linear(parts) if all(map(is_dtensor, parts)) else None
    if spread is None:
        return None
    local = spread.parts(parts)
    recipe = replace(recipe, classes=local[1].shape[0])
    return spread.whole(LazyLogits.returned(Source(recipe, local, watched=parts)))


def _recipe(parts: list[Tensor]) -> Recipe | None:
    hidden, weight, *_ = parts
    device = hidden.device.type
    autocast = (device, torch.get_autocast_dtype(device), torch.is_autocast_enabled(device))
    dtypes = {part.dtype for part in parts}
    casts = autocast[2] and torch.float64 not in dtypes
    alike = len({part.device for part in parts}) == 1 and hidden.shape[-1] == weight.shape[-1]
    if not alike or (len(dtypes) > 1 and not casts):
        return None  # F.linear has something to say to this
    dtype = autocast[1] if casts else hidden.dtype
    names = ("the hidden states", "the layer's weight", "the layer's bias")[: len(parts)]
    steps = (Instruction(F.linear, tuple(Of(i) for i in range(len(parts)))),)
    wants = any(part.requires_grad for part in parts)
    return Recipe(names, steps, weight.shape[0], dtype, wants, autocast)
