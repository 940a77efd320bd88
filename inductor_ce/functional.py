"""The functional form: the same losses for those who want to call them, over the same operators."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from . import lowering, ops
from .backend import inductor_ce_backend
from .compat import no_recompile_limit
from .errors import InputError
from .shards import Shard, group_rank, whole_row_stats

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup  # which not every build of torch has

REDUCTIONS = ("none", "mean", "sum")

# Where an eager call runs compiled code: the operators' own definitions make float32 copies of z.
COMPILED_ON = lowering.GPUS

Number = int | float


def cross_entropy(
    logits: Tensor,
    target: Tensor,
    *,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    z_loss_weight: float | Tensor = 0.0,
    softcap: float | None = None,
    mask: Tensor | None = None,
    num_label_tokens: int | Tensor | None = None,
    group: ProcessGroup | None = None,
    vocab_start: int | Tensor | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """As `torch.nn.functional.cross_entropy`, with the classes on the last axis and the loss in float32.

    Call it in eager code or in code that is compiled; eager calls on a GPU run compiled code too. No call
    waits for the GPU. There is no second derivative.

    Args:
        logits: [..., V], any floating dtype. The gradient has its dtype.
        target: class indices [...], any integer dtype, or probabilities [..., V], any floating dtype, which
            get no gradient. The loss of an index outside [0, V) that is not `ignore_index` is NaN, and so
            is its gradient.
        weight: of the classes, [V], floating, of all V also where the logits are a shard. Weights that are
            negative, NaN or infinite raise where values can be looked at, in eager code on a CPU, and make
            the loss NaN elsewhere.
        ignore_index: the rows with this index are 0 and do not count in the mean.
        reduction: "none", "mean" or "sum". The mean is over the sum of the weights of the labels that
            count, as in torch; NaN where none does.
        label_smoothing: in [0, 1], over the classes of all shards.
        z_loss_weight: w of the term w lse² that each row that counts has besides. A number or a tensor [];
            it may change from call to call. A negative, NaN or infinite one is treated as in `weight`. Code
            compiled with CUDA graphs specialises on numbers: give it a tensor.
        softcap: c, for c tanh(z / c) in place of the logits z; positive.
        mask: [...], of any dtype; rows where it is 0 are ignored.
        num_label_tokens: the sum is divided by this in place of a mean; a number or a tensor [].
        group: the ranks over which V is sharded; `logits`, and probabilities, are this rank's columns. One
            all-gather of a few numbers a row in the forward, none in the backward. The loss is the same
            on every rank, and each gets the gradient of its own columns, for the same upstream gradient.
        vocab_start: where this rank's columns start, an int or a tensor []. By default shards are equal and
            in the order of the ranks. Give it on every rank or on none.
        return_lse: return (loss, lse), with lse [...] = logsumexp of each row, ignored rows too; it has a
            gradient.

    Returns:
        float32, or float64 for float64 logits: [...] for reduction "none", else [].

    Raises:
        InputError: a shape, dtype, device or number that has no meaning.
    """
    _check_tensors(logits, target, weight, mask)
    _check_options(reduction, label_smoothing, softcap, num_label_tokens, group, vocab_start)
    _check_weights("z_loss_weight", z_loss_weight)
    _check_weights("weight", weight)
    numbers = _Numbers(z_loss_weight, num_label_tokens, vocab_start)
    _check_numbers(numbers)
    if group is not None and group.size() == 1:
        group = None
    if group is None and weight is not None and weight.shape[0] != logits.shape[-1]:
        raise InputError(f"weight has {weight.shape[0]} classes and logits have {logits.shape[-1]}")
    choices = _Choices(
        ignore_index,
        reduction,
        label_smoothing,
        softcap,
        None if group is None else group.group_name,
        1 if group is None else group.size(),
    )
    if torch.compiler.is_compiling():
        _have_lowerings()
        loss, lse = _loss_and_lse(logits, target, weight, mask, numbers, choices)
    elif logits.device.type in COMPILED_ON:
        numbers = _on_device(numbers, logits)
        with no_recompile_limit():
            loss, lse = _compiled()(logits, target, weight, mask, numbers, choices)
    else:
        loss, lse = _loss_and_lse(logits, target, weight, mask, numbers, choices)
    return (loss, lse) if return_lse else loss


class _Numbers(NamedTuple):
    """What may change from call to call, as numbers or tensors []."""

    z_loss_weight: Number | Tensor
    num_label_tokens: Number | Tensor | None
    vocab_start: int | Tensor | None


class _Choices(NamedTuple):
    """What code is compiled for."""

    ignore_index: int
    reduction: str
    label_smoothing: float
    softcap: float | None
    group_name: str | None
    group_size: int


class _Rows(NamedTuple):
    """Of each row [N]: its loss, its lse, and its share in the mean."""

    loss: Tensor
    lse: Tensor
    share: Tensor


# How it runs


@functools.cache
def _compiled() -> Callable[..., tuple[Tensor, Tensor]]:
    """What eager calls on a GPU run."""
    return torch.compile(_loss_and_lse, backend=inductor_ce_backend)


@torch.compiler.assume_constant_result
def _have_lowerings() -> bool:
    """While Dynamo reads a user's code, which need not have called `install`."""
    lowering.register()
    return True


def _on_device(numbers: _Numbers, logits: Tensor) -> _Numbers:
    """Tensors [], for which nothing is compiled anew when a value changes, and nobody waits."""

    def held(number: Number | Tensor | None) -> Any:
        if number is None or isinstance(number, Tensor):
            return number
        dtype = torch.int64 if isinstance(number, int) else ops.stats_dtype(logits)
        return torch.full((), number, dtype=dtype, device=logits.device)

    return _Numbers(*map(held, numbers))


# What is computed


def _loss_and_lse(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    mask: Tensor | None,
    numbers: _Numbers,
    choices: _Choices,
) -> tuple[Tensor, Tensor]:
    shape = logits.shape[:-1]
    z = logits.reshape(math.prod(shape), logits.shape[-1])
    if choices.softcap is not None:
        z = choices.softcap * torch.tanh(z.to(ops.stats_dtype(z)) / choices.softcap)
    if weight is not None:
        weight = _valid_or_nan(weight.to(ops.stats_dtype(z)))
    counts = z.new_ones(z.shape[0], dtype=torch.bool) if mask is None else mask.reshape(z.shape[0]) != 0
    shard = _shard(z, numbers, choices)
    if target.is_floating_point():
        rows = _of_probabilities(z, target.reshape(z.shape), weight, choices.label_smoothing, shard)
    else:
        y = target.reshape(z.shape[0]).long()
        counts = counts & (y != choices.ignore_index)
        rows = _of_labels(z, y, counts, weight, choices.label_smoothing, shard)
    w = _valid_or_nan(z.new_ones((), dtype=rows.lse.dtype) * numbers.z_loss_weight)
    loss = torch.where(counts, rows.loss + torch.where(w == 0, 0.0, w * rows.lse.square()), 0.0)
    if choices.reduction == "none":
        return loss.reshape(shape), rows.lse.reshape(shape)
    total = loss.sum()
    if numbers.num_label_tokens is not None:
        total = total / numbers.num_label_tokens
    elif choices.reduction == "mean":
        total = total / torch.where(counts, rows.share, 0.0).sum()
    return total, rows.lse.reshape(shape)


def _shard(z: Tensor, numbers: _Numbers, choices: _Choices) -> Shard | None:
    if choices.group_name is None:
        return None
    if numbers.vocab_start is None:
        start = group_rank(z, choices.group_name) * z.shape[1]
    else:
        start = z.new_ones((), dtype=torch.int64) * numbers.vocab_start
    return Shard(choices.group_name, choices.group_size, start, numbers.vocab_start is None)


def _of_labels(
    z: Tensor, y: Tensor, counts: Tensor, weight: Tensor | None, smoothing: float, shard: Shard | None
) -> _Rows:
    label = y if shard is None else y - shard.start
    weights = [] if weight is None or not smoothing else [_columns_of(weight, z, shard)]
    rows, total = _statistics(z, [label], weights, bool(smoothing) and weight is None, shard)
    log_d = rows[ops.SUMEXP].log()
    loss = log_d + (rows[ops.MAX] - rows[ops.PICK])
    known = (y >= 0) & (y < total)
    share = torch.ones_like(loss)
    if weight is not None:
        share = weight.index_select(0, torch.where(known, y, 0))
        loss = share * loss
    if smoothing:
        loss = (1 - smoothing) * loss + smoothing * _to_all(rows, log_d, total, 0)
    loss = loss * torch.where(counts & ~known, torch.nan, 1.0)
    return _Rows(loss, rows[ops.MAX] + log_d, share)


def _of_probabilities(
    z: Tensor, q: Tensor, weight: Tensor | None, smoothing: float, shard: Shard | None
) -> _Rows:
    weights = [q]
    if weight is not None:
        own = _columns_of(weight, z, shard)
        weights = [q.to(own.dtype) * own] + [own] * bool(smoothing)
    rows, total = _statistics(z, [], weights, bool(smoothing) and weight is None, shard)
    log_d = rows[ops.SUMEXP].log()
    loss = _to_weighted(rows, log_d, 0)
    if smoothing:
        loss = (1 - smoothing) * loss + smoothing * _to_all(rows, log_d, total, 1)
    return _Rows(loss, rows[ops.MAX] + log_d, torch.ones_like(loss))


def _to_weighted(rows: dict[str, Tensor], log_d: Tensor, j: int) -> Tensor:
    """sum_i q_ji (lse - z_i)"""
    return rows[f"{ops.MASS}:{j}"] * log_d - rows[f"{ops.DOT}:{j}"]


def _to_all(rows: dict[str, Tensor], log_d: Tensor, total: int | Tensor, j: int) -> Tensor:
    """The mean over the V classes of lse - z_i, weighted by q_j where there are class weights."""
    if ops.SUM in rows:
        return log_d - rows[ops.SUM] / total
    return _to_weighted(rows, log_d, j) / total


def _statistics(
    z: Tensor, labels: list[Tensor], weights: list[Tensor], with_sum: bool, shard: Shard | None
) -> tuple[dict[str, Tensor], int | Tensor]:
    """Statistics of whole rows by name, and V of them, [N] where they are sharded."""
    names = [ops.MAX, ops.SUMEXP] + [ops.PICK] * len(labels) + [ops.SUM] * with_sum
    names += [f"{row}:{j}" for j in range(len(weights)) for row in (ops.DOT, ops.MASS)]
    which = ",".join(names)
    total: int | Tensor = z.shape[1]
    if shard is None:
        packed = ops.row_stats(z, labels, weights, which)
    else:
        packed, total = whole_row_stats(z, labels, weights, which, shard)
    return dict(zip(names, packed.unbind(0), strict=True)), total


def _columns_of(weight: Tensor, z: Tensor, shard: Shard | None) -> Tensor:
    """The weights of the classes in `z`."""
    if shard is None:
        return weight
    return weight.index_select(0, shard.start + torch.arange(z.shape[1], device=z.device))


# Checks


def _valid_or_nan(weights: Tensor) -> Tensor:
    """All NaN if one of them is negative, NaN or infinite."""
    return torch.where(((weights >= 0) & weights.isfinite()).all(), weights, torch.nan)


def _check_tensors(logits: Tensor, target: Tensor, weight: Tensor | None, mask: Tensor | None) -> None:
    if not logits.is_floating_point() or logits.dim() == 0:
        raise InputError(f"logits must be floating point [..., V], got {_described(logits)}")
    shape = logits.shape[:-1]
    if target.is_complex() or target.dtype == torch.bool:
        raise InputError(f"target must be class indices or probabilities, got {_described(target)}")
    if target.shape != (logits.shape if target.is_floating_point() else shape):
        raise InputError(
            f"target must be class indices {list(shape)} or probabilities {list(logits.shape)} for logits "
            f"{list(logits.shape)}, classes last, got {_described(target)}"
        )
    if weight is not None and (not weight.is_floating_point() or weight.dim() != 1):
        raise InputError(f"weight must be floating point [V], got {_described(weight)}")
    if mask is not None and mask.shape != shape:
        raise InputError(f"mask must be {list(shape)}, as the rows of the logits, got {_described(mask)}")
    for name, tensor in (("target", target), ("weight", weight), ("mask", mask)):
        if tensor is not None and tensor.device != logits.device:
            raise InputError(f"{name} is on {tensor.device} and logits on {logits.device}")
        if tensor is not None and tensor.requires_grad:
            raise InputError(f"{name} requires a gradient and would get none; pass {name}.detach()")


def _check_options(
    reduction: str,
    label_smoothing: float,
    softcap: float | None,
    num_label_tokens: int | Tensor | None,
    group: ProcessGroup | None,
    vocab_start: int | Tensor | None,
) -> None:
    if reduction not in REDUCTIONS:
        raise InputError(f"reduction must be one of {', '.join(map(repr, REDUCTIONS))}, got {reduction!r}")
    if not 0 <= label_smoothing <= 1:
        raise InputError(f"label_smoothing must be in [0, 1], got {label_smoothing!r}")
    if softcap is not None and not 0 < softcap < math.inf:
        raise InputError(f"softcap must be positive and finite, got {softcap!r}")
    if num_label_tokens is not None and reduction == "none":
        raise InputError("num_label_tokens divides a sum: reduction must be 'sum' or 'mean', got 'none'")
    if vocab_start is not None and group is None:
        raise InputError("vocab_start is where a shard starts: it needs a group")


def _check_numbers(numbers: _Numbers) -> None:
    for name, value in numbers._asdict().items():
        if isinstance(value, Tensor) and value.dim() > 0:
            raise InputError(f"{name} must be a number or a tensor [], got {_described(value)}")


def _check_weights(name: str, value: Any) -> None:
    """Raises for weights that are negative, NaN or infinite, where that can be told without waiting."""
    if isinstance(value, Tensor):
        if torch.compiler.is_compiling() or value.device.type != "cpu":
            return
        valid = bool((value >= 0).logical_and(value.isfinite()).all())
    else:
        valid = value is None or 0 <= value < math.inf
    if not valid:
        raise InputError(f"{name} must not be negative, NaN or infinite, got {value!r}")


def _described(tensor: Tensor) -> str:
    return f"{tensor.dtype} {list(tensor.shape)}"
