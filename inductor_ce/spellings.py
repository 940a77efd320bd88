"""How torch callables, functions and methods alike, name the steps of the algebra.

A row of the table says: these callables, with these parameters, are that step. What a step means is
told in `recognise.py`.
"""

from __future__ import annotations

import inspect
import operator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch.fx import Node

_REQUIRED = inspect.Parameter.empty
_ALIASES = {
    "axis": "dim",
    "axis0": "dim0",
    "axis1": "dim1",
    "keepdims": "keepdim",
    "self": "input",
    "x": "input",
}


@dataclass(frozen=True)
class Spelling:
    """One row: the step, and the parameters by position with the defaults that matter."""

    step: str
    parameters: tuple[str, ...]
    variadic: bool = False


TABLE: dict[Any, Spelling] = {}


def _spell(step: str, parameters: str, *targets: Any) -> None:
    names = tuple(parameters.split())
    variadic = names[-1].startswith("*")
    for target in targets:
        TABLE[target] = Spelling(step, tuple(n.lstrip("*") for n in names), variadic)


# A string is the name of a Tensor method.
_spell(
    "cross_entropy",
    "input target weight size_average ignore_index reduce reduction label_smoothing",
    F.cross_entropy,
)
_spell("nll_loss", "input target weight size_average ignore_index reduce reduction", F.nll_loss)
_spell("log_softmax", "input dim dtype", torch.log_softmax, torch.special.log_softmax, "log_softmax")
_spell("log_softmax", "input dim _stacklevel dtype", F.log_softmax)
_spell("softmax", "input dim dtype", torch.softmax, torch.special.softmax, "softmax")
_spell("softmax", "input dim _stacklevel dtype", F.softmax)
_spell("logsumexp", "input dim keepdim", torch.logsumexp, torch.special.logsumexp, "logsumexp")
_spell("gather", "input dim index", torch.gather, "gather")
_spell("gather", "input index dim", torch.take_along_dim, "take_along_dim")
_spell("sum", "input dim keepdim dtype", torch.sum, "sum")
_spell("mean", "input dim keepdim dtype", torch.mean, "mean")
_spell("amax", "input dim keepdim", torch.amax, "amax")
_spell("max", "input dim keepdim", torch.max, "max")
_spell("exp", "input", torch.exp, "exp")
_spell("log", "input", torch.log, "log")
_spell("neg", "input", torch.neg, operator.neg, "neg", "negative")
_spell("tanh", "input", torch.tanh, F.tanh, "tanh")
_spell("sigmoid", "input", torch.sigmoid, F.sigmoid, "sigmoid")
_spell("add", "input other alpha", torch.add, operator.add, "add")
_spell("sub", "input other alpha", torch.sub, operator.sub, "sub")
_spell("mul", "input other", torch.mul, operator.mul, "mul")
_spell("div", "input other rounding_mode", torch.div, operator.truediv, "div")

_spell("same", "input", "contiguous", "clone", "type_as", "to", "type")
_spell("same", "input", "float", "double", "half", "bfloat16", "long", "int")
_spell("same", "input", torch.clone)
_spell("detach", "input", "detach")
_spell(
    "reshape",
    "input *shape",
    torch.reshape,
    torch.flatten,
    torch.unflatten,
    torch.squeeze,
    torch.unsqueeze,
    *("view", "reshape", "flatten", "unflatten", "squeeze", "unsqueeze", "view_as", "reshape_as"),
)
_spell("permute", "input *dims", torch.permute, "permute")
_spell("transpose", "input dim0 dim1", torch.transpose, torch.swapaxes, "transpose", "swapaxes")
_spell("movedim", "input source destination", torch.movedim, "movedim")
_spell("getitem", "input index", operator.getitem)
_spell("narrow", "input dim start length", torch.narrow, "narrow")


# What a chain before the logits is made of: soft-cap, scale, temperature, casts.
ELEMENTWISE = {"add", "sub", "mul", "div", "neg", "tanh", "sigmoid", "exp", "same"}


def read(node: Node) -> tuple[str, dict[str, Any]] | None:
    """(step, arguments by name) of a node, None for a callable that the table does not have."""
    if node.op not in ("call_function", "call_method"):
        return None
    try:
        spelling = TABLE.get(node.target)
    except TypeError:  # an unhashable callable is none of ours
        return None
    if spelling is None:
        return None
    names, args = spelling.parameters, node.args
    if spelling.variadic:
        rest = args[len(names) - 1 :]
        flat = rest[0] if len(rest) == 1 and isinstance(rest[0], (list, tuple)) else rest
        args = (*args[: len(names) - 1], tuple(flat))
    given = dict(zip(names, args, strict=False))
    given.update({_ALIASES.get(name, name): value for name, value in node.kwargs.items()})
    return spelling.step, given
