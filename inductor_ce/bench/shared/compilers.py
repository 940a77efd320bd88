"""Plain torch.compile, which all are compared with, and torch.compile with inductor_ce."""

from __future__ import annotations

from collections.abc import Callable
from types import FunctionType
from typing import Any, TypeVar, cast

import torch

from ...api.backend import inductor_ce_backend

F = TypeVar("F", bound=Callable[..., Any])

BASELINE = "torch.compile"
OURS = "inductor_ce"

DEFAULT, GRAPHS = "default", "reduce-overhead"  # modes of torch.compile: the other has CUDA graphs
MODES = (DEFAULT, GRAPHS)
WARM_UP = 3  # calls until CUDA graphs are recorded and replayed


def plain(function: F, **how: Any) -> F:
    """Compiled by itself for its shapes, in one graph. `how` goes to torch.compile."""
    return cast(F, torch.compile(fresh(function), fullgraph=True, dynamic=False, **how))


def ours(function: F, **how: Any) -> F:
    """The same with inductor_ce."""
    return plain(function, backend=inductor_ce_backend, **how)


def fresh(function: F) -> F:
    """A copy with code of its own: Dynamo keeps what it compiled, for every backend, by the code object."""
    f = cast(FunctionType, function)
    copy = FunctionType(f.__code__.replace(), f.__globals__, f.__name__, f.__defaults__, f.__closure__)
    return cast(F, copy)
