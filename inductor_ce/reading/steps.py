"""The table of steps: one row says how a step of the algebra is spelled, what reads it, and what it is.

To add a spelling, add its callable to the row of its step, or a row; the function of a new step goes to the
module of its subject. The row names the function and does not import it, for the functions ask this table
about the nodes round theirs; `recognise` looks all of them up when it is imported.
"""

from __future__ import annotations

import enum
import operator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from ..common.compat.graphs import get_data


class View(enum.Enum):
    """What a step that computes nothing does to the rows of its `input`; `views` reads it backwards."""

    SAME = enum.auto()  # a copy or a cast
    RESHAPE = enum.auto()
    ORDER = enum.auto()
    SLICE = enum.auto()


@dataclass(frozen=True, eq=False)
class Step:
    """A row: the callables `targets`, with these parameters, are the step `name`.

    Attributes:
        name: rows of one name are spellings of one step.
        function: what reads it, "module.function" in this room; "" where other steps look through it.
        parameters: their names by position; where it is `variadic`, the last one takes all the rest.
        targets: functions; methods by their names; attributes as (getattr, name).
        given: arguments that the spelling implies.
        view: what it does to the dimensions of its `input`, if it computes nothing.
        needs_value: it makes nothing of what has no value yet, as most nodes of a model have none.
        commutes: with picking one element of each row, where nothing better is known of it.
        edits: works in place.
        keeps_strides: its functional form has the strides of the tensor that it edits.
        picks: an element of each row may be taken by it without a tensor of labels.
        in_chain: soft-caps, scales, temperatures and casts before the logits are made of it.
        reads_shapes: never reads an element of its arguments.
        reads_first: reads elements of its first argument, of others the shape or dtype.
        is_loss: where it is refused the user is told, for it takes its own normaliser or is named a loss.
        normalises: a loss begins here, or has been taken.
        before_log: a logarithm after it may still be one of probabilities.
        takes_log: of its last argument.
        compares: what is equal but for rounding is not the same to it.
        stays: is neither made again elsewhere nor erased.
    """

    name: str
    function: str
    parameters: tuple[str, ...]
    variadic: bool
    targets: tuple[Any, ...]
    given: dict[str, Any]
    view: View | None
    needs_value: bool = False
    commutes: bool = False
    edits: bool = False
    keeps_strides: bool = False
    picks: bool = False
    in_chain: bool = False
    reads_shapes: bool = False
    reads_first: bool = False
    is_loss: bool = False
    normalises: bool = False
    before_log: bool = False
    takes_log: bool = False
    compares: bool = False
    stays: bool = False


def _row(
    name: str,
    function: str,
    parameters: str,
    *targets: Any,
    traits: str = "",
    view: View | None = None,
    given: dict[str, Any] | None = None,
) -> Step:
    """A row: its traits by their names. Raises TypeError for one that is none."""
    parts = tuple(parameters.split())
    return Step(
        name,
        function,
        tuple(part.lstrip("*") for part in parts),
        parts[-1].startswith("*"),
        targets,
        given or {},
        view,
        **dict.fromkeys(traits.split(), True),
    )


# Functions of each element that the algebra does not have.
_ELSEWHERE = (
    *(torch.abs, torch.exp2, torch.expm1, torch.log1p, torch.reciprocal, torch.relu),
    *(torch.rsqrt, torch.nan_to_num, torch.clamp_max, torch.erf, torch.sign, F.relu, F.logsigmoid),
    *("abs", "exp2", "expm1", "log1p", "reciprocal", "relu", "rsqrt", "nan_to_num"),
    *("clamp_max", "erf", "sign"),
)
_CROSS_ENTROPY = "input target weight size_average ignore_index reduce reduction label_smoothing"
_NLL_LOSS = "input target weight size_average ignore_index reduce reduction"
_RANDOM_LIKE = (torch.rand_like, torch.randn_like, torch.randint_like)

# fmt: off
_LOSSES = (
    _row("cross_entropy", "losses.cross_entropy", _CROSS_ENTROPY, F.cross_entropy, traits="is_loss"),
    _row("nll_loss", "losses.nll_loss", _NLL_LOSS, F.nll_loss, traits="is_loss"),
    _row("kl_div", "losses.kl_div", "input target size_average reduce reduction log_target", F.kl_div),
    _row("mse_loss", "", "input target size_average reduce reduction weight", F.mse_loss),
    _row("l1_loss", "", "input target size_average reduce reduction weight", F.l1_loss),
    _row("binary_cross_entropy", "", "input target weight size_average reduce reduction",
         F.binary_cross_entropy),
)

_ALONG_THE_VOCABULARY = (
    _row("log_softmax", "reductions.log_softmax", "input dim dtype", torch.log_softmax,
         torch.special.log_softmax, "log_softmax", traits="normalises"),
    _row("log_softmax", "reductions.log_softmax", "input dim _stacklevel dtype", F.log_softmax,
         traits="normalises"),
    _row("softmax", "reductions.softmax", "input dim dtype", torch.softmax, torch.special.softmax,
         "softmax"),
    _row("softmax", "reductions.softmax", "input dim _stacklevel dtype", F.softmax),
    _row("logsumexp", "reductions.logsumexp", "input dim keepdim", torch.logsumexp,
         torch.special.logsumexp, "logsumexp", traits="normalises"),
    _row("sum", "reductions.sum", "input dim keepdim dtype", torch.sum, "sum", traits="before_log"),
    _row("mean", "reductions.mean", "input dim keepdim dtype", torch.mean, "mean", traits="before_log"),
    _row("norm", "reductions.norm", "input p dim keepdim out dtype", torch.norm, traits="needs_value"),
    _row("norm", "reductions.norm", "input p dim keepdim dtype", "norm", traits="needs_value"),
    _row("norm", "reductions.norm", "input p dim keepdim", torch.linalg.vector_norm, torch.linalg.norm,
         traits="needs_value"),
    _row("amax", "reductions.amax", "input dim keepdim", torch.amax, "amax"),
    _row("max", "", "input dim keepdim", torch.max, "max"),
    _row("argmax", "reductions.argmax", "input dim keepdim", torch.argmax, "argmax"),
    _row("einsum", "reductions.einsum", "equation *operands", torch.einsum),
    _row("matmul", "arithmetic.matmul", "input other", torch.matmul, operator.matmul, torch.mv, torch.mm,
         "matmul", "__matmul__", "mv", "mm", traits="needs_value"),
    _row("vecdot", "arithmetic.vecdot", "input other dim", torch.linalg.vecdot, traits="needs_value"),
)

_PICKS = (
    _row("gather", "picks.gather", "input dim index", torch.gather, "gather", traits="before_log"),
    _row("take_along", "picks.take_along", "input index dim", torch.take_along_dim, "take_along_dim"),
    _row("take", "picks.take", "input index", torch.take, "take"),
    _row("index_select", "picks.index_select", "input dim index", torch.index_select, "index_select"),
    _row("getitem", "reductions.getitem", "input index", operator.getitem, traits="picks", view=View.SLICE),
    _row("select", "indexing.select", "input dim index", torch.select, "select",
         traits="needs_value picks"),
    _row("diagonal", "picks.diagonal", "input offset", torch.diag, "diag", traits="picks"),
    _row("diagonal", "picks.diagonal", "input offset dim1 dim2", torch.diagonal, "diagonal",
         traits="picks"),
    _row("trace", "losses.trace", "input", torch.trace, "trace"),
)

_ARITHMETIC = (
    _row("exp", "arithmetic.exponential", "input", torch.exp, "exp", traits="commutes in_chain"),
    _row("log", "arithmetic.logarithm", "input", torch.log, "log",
         traits="needs_value commutes normalises takes_log"),
    _row("log_to", "arithmetic.logarithm", "input", torch.log2, "log2", given={"base": 2},
         traits="needs_value commutes normalises takes_log"),
    _row("log_to", "arithmetic.logarithm", "input", torch.log10, "log10", given={"base": 10},
         traits="needs_value commutes normalises takes_log"),
    _row("neg", "arithmetic.negative", "input", torch.neg, operator.neg, "neg", "negative",
         traits="needs_value commutes in_chain before_log"),
    _row("tanh", "", "input", torch.tanh, F.tanh, "tanh", traits="in_chain"),
    _row("sigmoid", "", "input", torch.sigmoid, F.sigmoid, "sigmoid", traits="in_chain"),
    _row("add", "arithmetic.add", "input other alpha", torch.add, operator.add, "add",
         traits="needs_value commutes in_chain before_log"),
    _row("sub", "arithmetic.sub", "input other alpha", torch.sub, torch.subtract, operator.sub, "sub",
         "subtract", traits="needs_value commutes in_chain before_log"),
    _row("rsub", "arithmetic.reversed_sub", "input other alpha", torch.rsub, "__rsub__",
         traits="needs_value commutes"),
    _row("mul", "arithmetic.mul", "input other", torch.mul, torch.multiply, operator.mul, "mul",
         "multiply", traits="needs_value commutes in_chain before_log"),
    _row("div", "arithmetic.div", "input other rounding_mode", torch.div, torch.divide, operator.truediv,
         "div", "divide", traits="needs_value commutes in_chain before_log"),
    _row("floor_div", "", "input other", torch.floor_divide, operator.floordiv, "floor_divide",
         "__floordiv__"),
    _row("minimum", "", "input other", torch.minimum, "minimum"),
    _row("maximum", "", "input other", torch.maximum, "maximum"),
    _row("logaddexp", "", "input other", torch.logaddexp, "logaddexp"),
    _row("pow", "arithmetic.power", "input exponent", torch.pow, operator.pow, "pow",
         traits="needs_value commutes before_log"),
    _row("square", "arithmetic.power", "input", torch.square, "square",
         traits="needs_value commutes before_log"),
    _row("sqrt", "arithmetic.power", "input", torch.sqrt, "sqrt", given={"exponent": 0.5},
         traits="needs_value commutes"),
    _row("elementwise", "arithmetic.elementwise", "input",
         *_ELSEWHERE, traits="needs_value"),
    _row("softplus", "arithmetic.elementwise", "input beta threshold", F.softplus, traits="needs_value"),
    _row("xlogy", "arithmetic.xlogy", "input other", torch.xlogy, torch.special.xlogy, "xlogy",
         traits="takes_log"),
    _row("entr", "arithmetic.entropy_terms", "input", torch.special.entr,
         traits="needs_value takes_log"),
    _row("clamp", "arithmetic.clamp", "input min max", torch.clamp, torch.clip, torch.clamp_min, "clamp",
         "clip", "clamp_min", traits="needs_value commutes before_log"),
    _row("where", "arithmetic.where", "condition input other", torch.where, traits="needs_value"),
    _row("where", "arithmetic.where", "input condition other", "where", traits="needs_value"),
    _row("masked_fill", "arithmetic.masked_fill", "input mask value", torch.masked_fill, "masked_fill",
         traits="needs_value"),
)

_VIEWS = (
    _row("same", "indexing.view", "input", "contiguous", "clone", "type", torch.clone, "float", "double",
         "half", "bfloat16", "long", "int", "bool", traits="needs_value in_chain", view=View.SAME),
    _row("same", "indexing.view", "input", "to", "type_as", traits="needs_value in_chain reads_first",
         view=View.SAME),
    _row("detach", "indexing.detach", "input", "detach", torch.detach, get_data, traits="needs_value"),
    _row("reshape", "indexing.view", "input *shape", torch.reshape, torch.flatten, torch.unflatten,
         torch.squeeze, torch.unsqueeze, "view", "reshape", "flatten", "unflatten", "squeeze", "unsqueeze",
         traits="needs_value", view=View.RESHAPE),
    _row("reshape", "indexing.view", "input *shape", "view_as", "reshape_as",
         traits="needs_value reads_first", view=View.RESHAPE),
    _row("permute", "indexing.reorder", "input *dims", torch.permute, "permute", traits="needs_value",
         view=View.ORDER),
    _row("transpose", "indexing.reorder", "input dim0 dim1", torch.transpose, torch.swapaxes, "transpose",
         "swapaxes", traits="needs_value", view=View.ORDER),
    _row("transpose", "indexing.reorder", "input", (getattr, "mT"), torch.ops.aten.mT,
         traits="needs_value", view=View.ORDER, given={"dim0": -2, "dim1": -1}),
    _row("transposed", "indexing.reorder", "input", torch.t, "t", (getattr, "T"), torch.ops.aten.numpy_T,
         traits="needs_value", view=View.ORDER),
    _row("movedim", "indexing.reorder", "input source destination", torch.movedim, "movedim",
         traits="needs_value", view=View.ORDER),
    _row("narrow", "indexing.reorder", "input dim start length", torch.narrow, "narrow",
         traits="needs_value", view=View.SLICE),
    _row("expand", "", "input *shape", "expand", "repeat", torch.broadcast_to),
    _row("expand", "", "input *shape", "expand_as", traits="reads_first"),
    _row("broadcast_tensors", "", "*tensors", torch.broadcast_tensors, traits="reads_shapes"),
    _row("unbind", "", "input dim", torch.unbind, "unbind"),
    _row("split", "", "input size dim", torch.split, "split", traits="before_log"),
    _row("chunk", "", "input chunks dim", torch.chunk, "chunk", traits="before_log"),
    _row("stack", "joining.stack", "tensors dim", torch.stack, traits="needs_value"),
    _row("cat", "joining.cat", "tensors dim", torch.cat, torch.concat, torch.concatenate,
         traits="needs_value"),
    _row("shape", "", "input", "size", "dim", "numel", torch.numel, "new_empty", torch.empty_like,
         torch.ops.aten.sym_size.int, *_RANDOM_LIKE, traits="reads_shapes stays"),
)

# Vocabulary values made of labels and numbers.
_TARGETS = (
    _row("arange", "", "*numbers", torch.arange),
    _row("one_hot", "targets.one_hot", "input num_classes", F.one_hot),
    _row("eq", "targets.equals", "input other", torch.eq, operator.eq, "eq", "__eq__", traits="compares"),
    _row("ne", "targets.differs", "input other", torch.ne, torch.not_equal, operator.ne, "ne", "__ne__",
         traits="compares"),
    _row("not", "targets.negation", "input", torch.logical_not, torch.bitwise_not, operator.invert,
         "logical_not", "bitwise_not", "__invert__", traits="needs_value"),
    _row("and", "", "input other", torch.logical_and, torch.bitwise_and, operator.and_, "logical_and",
         "bitwise_and", "__and__"),
    _row("or", "", "input other", torch.logical_or, torch.bitwise_or, operator.or_, "logical_or",
         "bitwise_or", "__or__"),
    _row("isinf", "", "input", torch.isinf, "isinf"),
    _row("isneginf", "", "input", torch.isneginf, "isneginf"),
    _row("isfinite", "", "input", torch.isfinite, "isfinite"),
    _row("gt", "", "input other", torch.gt, torch.greater, operator.gt, "gt", "greater", "__gt__",
         traits="compares"),
    _row("ge", "", "input other", torch.ge, torch.greater_equal, operator.ge, "ge", "greater_equal", "__ge__",
         traits="compares"),
    _row("lt", "", "input other", torch.lt, torch.less, operator.lt, "lt", "less", "__lt__",
         traits="compares"),
    _row("le", "", "input other", torch.le, torch.less_equal, operator.le, "le", "less_equal", "__le__",
         traits="compares"),
    _row("zeros", "targets.zeros", "input", torch.zeros, torch.zeros_like, "new_zeros",
         traits="reads_shapes"),
    _row("ones", "targets.ones", "input", torch.ones, torch.ones_like, "new_ones", traits="reads_shapes"),
    _row("full", "targets.full", "input value", torch.full, torch.full_like, traits="reads_shapes"),
    _row("full", "targets.full", "value", torch.tensor, traits="reads_shapes"),
    _row("full", "targets.full", "input size value", "new_full", traits="reads_shapes"),
    _row("scatter", "replaced.scatter", "input dim index src", torch.scatter, "scatter"),
    _row("scatter_add", "", "input dim index src", torch.scatter_add, "scatter_add", traits="before_log"),
)

_EDITS = (
    _row("edit_fill", "targets.full", "input value", "fill_", traits="edits"),
    _row("edit_zero", "targets.zeros", "input", "zero_", traits="edits"),
    _row("edit_scatter", "replaced.scatter", "input dim index src", "scatter_", traits="edits"),
    _row("edit_scatter_add", "", "input dim index src", "scatter_add_", traits="edits before_log"),
    _row("edit_setitem", "targets.setitem", "input index value", operator.setitem, traits="edits"),
    _row("edit_masked_fill", "arithmetic.masked_fill", "input mask value", "masked_fill_", traits="edits"),
    _row("edit_add", "arithmetic.add", "input other alpha", "add_", operator.iadd,
         traits="edits keeps_strides"),
    _row("edit_sub", "arithmetic.sub", "input other alpha", "sub_", operator.isub,
         traits="edits keeps_strides"),
    _row("edit_mul", "arithmetic.mul", "input other", "mul_", operator.imul, traits="edits keeps_strides"),
    _row("edit_div", "arithmetic.div", "input other rounding_mode", "div_", operator.itruediv,
         traits="edits keeps_strides"),
)
# fmt: on

STEPS = (*_LOSSES, *_ALONG_THE_VOCABULARY, *_PICKS, *_ARITHMETIC, *_VIEWS, *_TARGETS, *_EDITS)
