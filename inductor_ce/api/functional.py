"""The functional forms: the same losses for those who want to call them, over the same operators."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import ops
from ..common.compat.dynamo import no_recompile_limit
from ..common.compat.graphs import has_tangent, is_in_forward_mode, is_transformed
from ..common.errors import DerivativeError, InputError
from ..distributed.shards import with_summed_gradient
from ..ops import lowering
from .arguments import check_beside, check_head, check_logits, check_options, check_shift, check_weights
from .backend import inductor_ce_backend
from .loss_formula import Choices, Number, Numbers, loss_and_lse

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup  # which not every build of torch has

# Where an eager call runs compiled code: the operators' own definitions make float32 copies of z.
COMPILED_ON = lowering.GPUS

TRANSFORMED = (
    "The functional forms of inductor_ce run under no transform of torch.func (grad, vmap, jvp, ...) and "
    "have no forward-mode derivative: use torch.nn.functional.cross_entropy there, or torch.autograd.grad."
)


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
    numbers = Numbers(z_loss_weight, num_label_tokens, vocab_start)
    check_logits(logits)
    check_beside({"logits": logits}, logits.shape[-1], target, ("weight", weight), mask)
    check_options(reduction, label_smoothing, softcap, numbers, group)
    check_weights("weight", weight)
    group = _shared(group)
    if group is None and weight is not None and weight.shape[0] != logits.shape[-1]:
        raise InputError(f"weight has {weight.shape[0]} classes and logits have {logits.shape[-1]}")
    choices = Choices(ignore_index, reduction, label_smoothing, softcap, *_named(group))
    loss, lse = _run(loss_and_lse, (logits, target, weight, mask), numbers, choices)
    return (loss, lse) if return_lse else loss


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    bias: Tensor | None = None,
    softcap: float | None = None,
    shift: bool | int = False,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss_weight: float | Tensor = 0.0,
    reduction: str = "mean",
    mask: Tensor | None = None,
    num_label_tokens: int | Tensor | None = None,
    class_weight: Tensor | None = None,
    return_lse: bool = False,
    group: ProcessGroup | None = None,
    vocab_start: int | Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """As `cross_entropy` of the logits `torch.nn.functional.linear(hidden, weight, bias)`.

    Compiled code, and eager calls on a GPU, which run compiled code too, hold the linear and the loss in one
    graph, as if written out there. Eager calls on a CPU compute one after the other, with all logits in
    memory: compiling them would take a C++ compiler, and seconds for each variant of a call. No call waits
    for the GPU. There is no second derivative.

    Args:
        hidden: hidden states [..., D], any floating dtype.
        weight: of the head, [V, D], the dtype of `hidden`; under autocast any, as for a linear layer.
        target: class indices [...], any integer dtype, or probabilities [..., V], as in `cross_entropy`.
        bias: of the head, [V], the dtype of `weight`.
        softcap: c, for c tanh(z / c) in place of the logits z; positive.
        shift: True or 1 for the causal shift, k for k positions: hidden[..., :-k, :] is paired with
            target[..., k:], and mask[..., k:], without a copy of the hidden states: the last k are computed
            and ignored, as rows with an ignored target are. At least one position must be left.
        ignore_index, label_smoothing, z_loss_weight, reduction, num_label_tokens: as in `cross_entropy`.
        mask: [...], of any dtype; targets where it is 0 are ignored.
        class_weight: the `weight` of `cross_entropy`, [V], of all V also where the head is a shard.
        return_lse: return (loss, lse), with lse = logsumexp of each row that has a target, ignored ones too;
            it has a gradient.
        group: the ranks over which V is sharded; `weight`, `bias`, and probabilities, are this rank's part,
            `hidden` and class indices the same on every rank. One all-gather of a few numbers a row in the
            forward; in the backward, one all-reduce of the gradient of `hidden`, if it needs one: it is
            whole, and the same, on every rank. So it must need one on every rank or on none. Each rank has
            the gradient of its own part of the head, for the same upstream gradient.
        vocab_start: where this rank's rows of the head start, as in `cross_entropy`.

    Returns:
        float32, or float64 for float64 logits: [...] for reduction "none", with `shift` [..., S - k] where
        S is the last dimension of the rows, else [].

    Raises:
        InputError: a shape, dtype, device or number that has no meaning.
    """
    numbers = Numbers(z_loss_weight, num_label_tokens, vocab_start)
    check_head(hidden, weight, bias)
    check_beside(
        {"hidden": hidden, "weight": weight}, weight.shape[0], target, ("class_weight", class_weight), mask
    )
    check_options(reduction, label_smoothing, softcap, numbers, group)
    check_weights("class_weight", class_weight)
    check_shift(shift, hidden)
    group = _shared(group)
    if group is None and class_weight is not None and class_weight.shape[0] != weight.shape[0]:
        raise InputError(f"class_weight has {class_weight.shape[0]} classes and weight has {weight.shape[0]}")
    choices = Choices(ignore_index, reduction, label_smoothing, softcap, *_named(group), int(shift))
    tensors = (hidden, weight, bias, target, class_weight, mask)
    loss, lse = _run(_linear_loss_and_lse, tensors, numbers, choices)
    return (loss, lse) if return_lse else loss


def _linear_loss_and_lse(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    class_weight: Tensor | None,
    mask: Tensor | None,
    numbers: Numbers,
    choices: Choices,
) -> tuple[Tensor, Tensor]:
    if choices.group_name is not None:
        hidden = with_summed_gradient(hidden, choices.group_name)
    return loss_and_lse(F.linear(hidden, weight, bias), target, class_weight, mask, numbers, choices)


def _shared(group: ProcessGroup | None) -> ProcessGroup | None:
    """None for a group of one, which has all of the vocabulary."""
    return None if group is None or group.size() == 1 else group


def _named(group: ProcessGroup | None) -> tuple[str | None, int]:
    return (None, 1) if group is None else (group.group_name, group.size())


# How it runs

Losses = Callable[..., tuple[Tensor, Tensor]]


def _run(
    losses: Losses, tensors: tuple[Tensor | None, ...], numbers: Numbers, choices: Choices
) -> tuple[Tensor, Tensor]:
    """`losses`, compiled where that is to be; the first tensor tells the device."""
    z = tensors[0]
    assert z is not None
    if torch.compiler.is_compiling():
        _have_lowerings()
    elif is_transformed() or any(t is not None and has_tangent(t) for t in tensors):
        raise DerivativeError(TRANSFORMED)
    if not torch.compiler.is_compiling() and z.device.type in COMPILED_ON:
        with no_recompile_limit():
            return _compiled(losses)(*tensors, _on_device(numbers, z), choices)
    return losses(*tensors, numbers, choices)


@functools.cache
def _compiled(losses: Losses) -> Losses:
    """What eager calls on a GPU run."""
    return torch.compile(losses, backend=inductor_ce_backend)


@torch.compiler.assume_constant_result
def _have_lowerings() -> bool:
    """While Dynamo reads a user's code, which need not have called `install`."""
    if is_transformed() or is_in_forward_mode():
        raise DerivativeError(TRANSFORMED)
    lowering.register()
    return True


def _on_device(numbers: Numbers, z: Tensor) -> Numbers:
    """Tensors [], for which nothing is compiled anew when a value changes, and nobody waits."""

    def held(number: Number | Tensor | None) -> Any:
        if number is None or isinstance(number, Tensor):
            return number
        dtype = torch.int64 if isinstance(number, int) else ops.stats_dtype(z)
        return torch.full((), number, dtype=dtype, device=z.device)

    return Numbers(*map(held, numbers))
