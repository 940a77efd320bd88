"""What is compared: eager, plain torch.compile, torch.compile with inductor_ce, and peers."""

from __future__ import annotations

from collections.abc import Callable
from types import FunctionType
from typing import Any, TypeVar, cast

import torch

from ..api.backend import inductor_ce_backend
from .losses import Loss, LossFunction
from .peers import PEERS, NotOffered

F = TypeVar("F", bound=Callable[..., Any])

BASELINE = "torch.compile"
OURS = "inductor_ce"


def eager(loss: Loss) -> LossFunction:
    return loss.function


def compiled(loss: Loss) -> LossFunction:
    return torch.compile(fresh(loss.function), fullgraph=True, dynamic=False)


def ours(loss: Loss) -> LossFunction:
    return torch.compile(fresh(loss.function), backend=inductor_ce_backend, fullgraph=True, dynamic=False)


def fresh(function: F) -> F:
    """A copy with code of its own: Dynamo keeps what it compiled, for every backend, by the code object."""
    f = cast(FunctionType, function)
    copy = FunctionType(f.__code__.replace(), f.__globals__, f.__name__, f.__defaults__, f.__closure__)
    return cast(F, copy)


SYSTEMS: dict[str, Callable[[Loss], LossFunction | NotOffered]] = {
    "eager": eager,
    BASELINE: compiled,
    OURS: ours,
    **PEERS,
}
