"""How torch callables, functions and methods alike, name the steps of the algebra.

A row of the table says: these callables, with these parameters, are that step. What a step means is
told in `recognise.py`.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch.fx import Node

from ..common.compat.graphs import get_data

# Functions of each element that the algebra does not have.
ELSEWHERE = (
    *("abs", "exp2", "expm1", "log2", "log10", "log1p", "reciprocal", "relu", "rsqrt", "sqrt", "nan_to_num"),
    *("clamp_max", "erf", "sign"),
)
_ALIASES = {
    "axis": "dim",
    "axis0": "dim0",
    "axis1": "dim1",
    "keepdims": "keepdim",
    "self": "input",
    "x": "input",
    "fill_value": "value",
    "indices": "index",
    "diagonal": "offset",
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
_spell("take_along", "input index dim", torch.take_along_dim, "take_along_dim")
_spell("sum", "input dim keepdim dtype", torch.sum, "sum")
_spell("mean", "input dim keepdim dtype", torch.mean, "mean")
_spell("amax", "input dim keepdim", torch.amax, "amax")
_spell("max", "input dim keepdim", torch.max, "max")
_spell("argmax", "input dim keepdim", torch.argmax, "argmax")
_spell("kl_div", "input target size_average reduce reduction log_target", F.kl_div)
_spell("exp", "input", torch.exp, "exp")
_spell("log", "input", torch.log, "log")
_spell("neg", "input", torch.neg, operator.neg, "neg", "negative")
_spell("tanh", "input", torch.tanh, F.tanh, "tanh")
_spell("sigmoid", "input", torch.sigmoid, F.sigmoid, "sigmoid")
_spell("add", "input other alpha", torch.add, operator.add, "add")
_spell("sub", "input other alpha", torch.sub, torch.subtract, operator.sub, "sub", "subtract")
_spell("rsub", "input other alpha", torch.rsub, "__rsub__")
_spell("mul", "input other", torch.mul, torch.multiply, operator.mul, "mul", "multiply")
_spell("div", "input other rounding_mode", torch.div, torch.divide, operator.truediv, "div", "divide")
_spell("pow", "input exponent", torch.pow, operator.pow, "pow")
_spell("square", "input", torch.square, "square")
_spell("elementwise", "input", *(f for name in ELSEWHERE for f in (getattr(torch, name), name)))
_spell("xlogy", "input other", torch.xlogy, torch.special.xlogy, "xlogy")
_spell("entr", "input", torch.special.entr)
_spell("clamp", "input min max", torch.clamp, torch.clip, "clamp", "clip")
_spell("clamp", "input min", torch.clamp_min, "clamp_min")

_spell("same", "input", "contiguous", "clone", "type_as", "to", "type")
_spell("same", "input", "float", "double", "half", "bfloat16", "long", "int", "bool")
_spell("same", "input", torch.clone)
_spell("detach", "input", "detach", torch.detach, get_data)
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
_spell("transposed", "input", torch.t, "t")
_spell("movedim", "input source destination", torch.movedim, "movedim")
_spell("getitem", "input index", operator.getitem)
_spell("narrow", "input dim start length", torch.narrow, "narrow")
_spell("expand", "input *shape", "expand", "expand_as", torch.broadcast_to)
_spell("select", "input dim index", torch.select, "select")
_spell("diagonal", "input offset", torch.diag, "diag")
_spell("diagonal", "input offset dim1 dim2", torch.diagonal, "diagonal")
_spell("trace", "input", torch.trace, "trace")
_spell("unbind", "input dim", torch.unbind, "unbind")
_spell("split", "input size dim", torch.split, "split")
_spell("chunk", "input chunks dim", torch.chunk, "chunk")
_spell("broadcast_tensors", "*tensors", torch.broadcast_tensors)
_spell(
    "matmul",
    "input other",
    torch.matmul,
    operator.matmul,
    "matmul",
    "__matmul__",
    torch.mv,
    "mv",
    torch.mm,
    "mm",
)
_spell("vecdot", "input other dim", torch.linalg.vecdot)
_spell("einsum", "equation *operands", torch.einsum)
_spell("stack", "tensors dim", torch.stack)
_spell("cat", "tensors dim", torch.cat, torch.concat, torch.concatenate)

# Vocabulary values made of labels and numbers.
_spell("arange", "*numbers", torch.arange)
_spell("one_hot", "input num_classes", F.one_hot)
_spell("eq", "input other", torch.eq, operator.eq, "eq", "__eq__")
_spell("ne", "input other", torch.ne, torch.not_equal, operator.ne, "ne", "__ne__")
_spell("not", "input", torch.logical_not, torch.bitwise_not, operator.invert, "logical_not", "bitwise_not")
_spell("where", "condition input other", torch.where)
_spell("where", "input condition other", "where")
_spell("masked_fill", "input mask value", torch.masked_fill, "masked_fill")
_spell("zeros", "input", torch.zeros, torch.zeros_like, "new_zeros")
_spell("ones", "input", torch.ones, torch.ones_like, "new_ones")
_spell("full", "input value", torch.full, torch.full_like)
_spell("full", "input size value", "new_full")
_spell("scatter", "input dim index src", torch.scatter, "scatter")

# The same, in place.
_spell("edit_fill", "input value", "fill_")
_spell("edit_zero", "input", "zero_")
_spell("edit_scatter", "input dim index src", "scatter_")
_spell("edit_masked_fill", "input mask value", "masked_fill_")
_spell("edit_setitem", "input index value", operator.setitem)
_spell("edit_add", "input other alpha", "add_", operator.iadd)
_spell("edit_sub", "input other alpha", "sub_", operator.isub)
_spell("edit_mul", "input other", "mul_", operator.imul)
_spell("edit_div", "input other rounding_mode", "div_", operator.itruediv)


# What a chain before the logits is made of: soft-cap, scale, temperature, casts.
ELEMENTWISE = {"add", "sub", "mul", "div", "neg", "tanh", "sigmoid", "exp", "same"}


def is_arithmetic_edit(node: Node) -> bool:
    """Whether a node is x.add_(y) or the like, whose functional form keeps the strides of x."""
    spelled = read(node)
    return spelled is not None and spelled[0] in ("edit_add", "edit_sub", "edit_mul", "edit_div")


def read(node: Node) -> tuple[str, dict[str, Any]] | None:
    """(step, arguments by name) of a node, None for a callable that the table does not have."""
    if node.op not in ("call_function", "call_method"):
        return None
    if node.target is getattr and node.args[1:] == ("T",):
        return "transposed", {"input": node.args[0]}
    if node.target is getattr and node.args[1:] == ("mT",):
        return "transpose", {"input": node.args[0], "dim0": -2, "dim1": -1}
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
