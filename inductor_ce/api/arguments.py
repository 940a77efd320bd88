"""What the functional forms refuse: an argument that has no meaning raises an `InputError` that says why."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..common.errors import InputError
from .loss_formula import Numbers

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup  # which not every build of torch has

REDUCTIONS = ("none", "mean", "sum")


# Tensors


def check_logits(logits: Tensor) -> None:
    """Raises InputError for anything but floating [..., V]."""
    if not logits.is_floating_point() or logits.dim() == 0:
        raise InputError(f"logits must be floating point [..., V], got {_described(logits)}")


def check_head(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """Raises where `torch.nn.functional.linear` would."""
    if not hidden.is_floating_point() or hidden.dim() == 0:
        raise InputError(f"hidden must be floating point [..., D], got {_described(hidden)}")
    if not weight.is_floating_point() or weight.dim() != 2 or weight.shape[1] != hidden.shape[-1]:
        raise InputError(
            f"weight must be floating point [V, D] for hidden {list(hidden.shape)}, whose D is last, "
            f"got {_described(weight)}"
        )
    if bias is not None and (not bias.is_floating_point() or bias.shape != weight.shape[:1]):
        raise InputError(
            f"bias must be floating point [V] for weight {list(weight.shape)}, got {_described(bias)}"
        )
    named = {"weight": weight} | ({} if bias is None else {"bias": bias})
    for name, tensor in named.items():
        if tensor.device != hidden.device:
            raise InputError(f"{name} is on {tensor.device} and hidden on {hidden.device}")
        if _dtype_in_linear(tensor) != _dtype_in_linear(hidden):
            raise InputError(
                f"{name} is {tensor.dtype} and hidden {hidden.dtype}: give both the same dtype, "
                "or call under torch.autocast"
            )


def _dtype_in_linear(tensor: Tensor) -> torch.dtype:
    """The dtype that a linear layer computes in: autocast takes all but float64 to its own."""
    kind = tensor.device.type
    if tensor.dtype == torch.float64 or not _has_autocast(kind):
        return tensor.dtype
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else tensor.dtype


@torch.compiler.assume_constant_result  # Dynamo of torch 2.11 does not trace it
def _has_autocast(device: str) -> bool:
    return torch.amp.is_autocast_available(device)


def check_beside(
    of: dict[str, Tensor],
    classes: int,
    target: Tensor,
    named_weight: tuple[str, Tensor | None],
    mask: Tensor | None,
) -> None:
    """Raises for what does not stand beside the rows of the first tensor of `of`, over so many classes."""
    first, tensor = next(iter(of.items()))
    name, weight = named_weight
    shape = tensor.shape[:-1]
    if target.is_complex() or target.dtype == torch.bool:
        raise InputError(f"target must be class indices or probabilities, got {_described(target)}")
    if target.shape != ((*shape, classes) if target.is_floating_point() else shape):
        whose = " and ".join(f"{name} {list(x.shape)}" for name, x in of.items())
        raise InputError(
            f"target must be class indices {list(shape)} or probabilities {[*shape, classes]} for {whose}, "
            f"classes last, got {_described(target)}"
        )
    if weight is not None and (not weight.is_floating_point() or weight.dim() != 1):
        raise InputError(f"{name} must be floating point [V], got {_described(weight)}")
    if mask is not None and mask.shape != shape:
        raise InputError(f"mask must be {list(shape)}, as the rows of {first}, got {_described(mask)}")
    for name, beside in (("target", target), named_weight, ("mask", mask)):
        if beside is not None and beside.device != tensor.device:
            raise InputError(f"{name} is on {beside.device} and {first} on {tensor.device}")
        if beside is not None and beside.requires_grad:
            raise InputError(f"{name} requires a gradient and would get none; pass {name}.detach()")


# Numbers


def check_options(
    reduction: str,
    label_smoothing: float,
    softcap: float | None,
    numbers: Numbers,
    group: ProcessGroup | None,
) -> None:
    """Raises InputError for numbers and names without a meaning, alone or beside each other."""
    if reduction not in REDUCTIONS:
        raise InputError(f"reduction must be one of {', '.join(map(repr, REDUCTIONS))}, got {reduction!r}")
    if not 0 <= label_smoothing <= 1:
        raise InputError(f"label_smoothing must be in [0, 1], got {label_smoothing!r}")
    if softcap is not None and not 0 < softcap < math.inf:
        raise InputError(f"softcap must be positive and finite, got {softcap!r}")
    if numbers.num_label_tokens is not None and reduction == "none":
        raise InputError("num_label_tokens divides a sum: reduction must be 'sum' or 'mean', got 'none'")
    if numbers.vocab_start is not None and group is None:
        raise InputError("vocab_start is where a shard starts: it needs a group")
    for name, value in numbers._asdict().items():
        if isinstance(value, Tensor) and value.dim() > 0:
            raise InputError(f"{name} must be a number or a tensor [], got {_described(value)}")
    check_weights("z_loss_weight", numbers.z_loss_weight)


def check_weights(name: str, value: Any) -> None:
    """Raises for weights that are negative, NaN or infinite, where that can be told without waiting."""
    if isinstance(value, Tensor):
        if torch.compiler.is_compiling() or value.device.type != "cpu":
            return
        valid = bool((value >= 0).logical_and(value.isfinite()).all())
    else:
        valid = value is None or 0 <= value < math.inf
    if not valid:
        raise InputError(f"{name} must not be negative, NaN or infinite, got {value!r}")


def check_shift(shift: int, hidden: Tensor) -> None:
    """Raises InputError for a shift that leaves no position of hidden [..., S, D]."""
    rows = hidden.shape[-2] if hidden.dim() > 1 else 0
    if not isinstance(shift, int) or (shift and not 0 < shift < rows):
        raise InputError(
            f"shift must be False, True or an int in [0, {rows}), the rows of hidden {list(hidden.shape)}, "
            f"got {shift!r}"
        )


def _described(tensor: Tensor) -> str:
    return f"{tensor.dtype} {list(tensor.shape)}"
