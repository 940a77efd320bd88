"""What is compared: eager, plain torch.compile, torch.compile with inductor_ce, and peers."""

from __future__ import annotations

import functools
from collections.abc import Callable

from ..shared import compilers, peers
from ..shared.compilers import BASELINE, OURS
from ..shared.losses import IGNORED, Loss, LossFunction
from ..shared.peers import NotOffered, find


def eager(loss: Loss) -> LossFunction:
    return loss.function


def compiled(loss: Loss) -> LossFunction:
    return compilers.plain(loss.function)


def ours(loss: Loss) -> LossFunction:
    return compilers.ours(loss.function)


def ours_in_forward(loss: Loss) -> LossFunction:
    """The same with the gradient made in the forward, where that is faster, and the backward's to scale."""
    return compilers.ours(loss.function, options={"gradient": "forward"})


def liger_kernel(loss: Loss) -> LossFunction | NotOffered:
    """Liger's loss over logits. It writes the gradient over the logits."""
    module = find("liger_kernel.transformers", "LigerCrossEntropyLoss")
    if isinstance(module, NotOffered):
        return module
    if loss.entropy:
        return NotOffered("Liger's loss over logits has no entropy")
    return module(
        ignore_index=IGNORED,
        label_smoothing=loss.smoothing,
        lse_square_scale=loss.z_loss,
        softcap=loss.soft_cap or None,
    )


def quack(loss: Loss) -> LossFunction | NotOffered:
    function = peers.quack("cross_entropy", "cross_entropy")
    if isinstance(function, NotOffered):
        return function
    if not loss.is_plain:
        return NotOffered("quack has no smoothing, z-loss, soft-cap or entropy")
    return functools.partial(function, ignore_index=IGNORED, reduction="mean")


OURS_IN_FORWARD = f'{OURS}, gradient="forward"'
PEERS = {"liger_kernel": liger_kernel, "quack": quack}
SYSTEMS: dict[str, Callable[[Loss], LossFunction | NotOffered]] = {
    "eager": eager,
    BASELINE: compiled,
    OURS: ours,
    OURS_IN_FORWARD: ours_in_forward,
    **PEERS,
}
