"""Verify: each rewritten loss beside the original, which is used where the two differ.

With the option `verify` the user's own nodes stay in the graph, and two operators stand between them, ours
and the rest of the program:

    verified(fused, original, key, index)   one of the two values, compared when it first runs
    tapped(z, key, path)                    z as one of the paths reads it; its backward sees that path's dz

On the first backward both paths get the whole upstream gradient; their dz are compared and the original's is
taken. From then on the upstream gradient goes where the values come from.

NOTE Why heads stay whole
The original reads all logits, and what it reads is what ours reads. A head in pieces would need a product of
its own, and gradients to compare of what that is made of, not of the logits. So what is compared is
recognition, rewriting and the operators; the pieces of heads are held by tests alone.

NOTE Why operators with a memory
What differs is known only when the program runs, and a graph cannot be compiled anew from within. The memory
is of one process, by a key that is part of the graph, so that a graph from a cache is verified afresh too.
"""

from __future__ import annotations

import itertools
import logging
from collections import defaultdict
from dataclasses import dataclass, field

import torch
from torch import Tensor

log = logging.getLogger("inductor_ce")

FUSED, ORIGINAL = "fused", "original"

# (relative, absolute) differences that rounding may make: the original may have been computed in 16 bits.
_TOLERANCES = {torch.float16: (2e-2, 2e-2), torch.bfloat16: (5e-2, 5e-2), torch.float64: (1e-8, 1e-8)}
_TOLERANCE = (1e-3, 1e-4)

# The share of rows whose maximum may be elsewhere: where logits tie after rounding, either is right.
_TIES = 0.01


@dataclass
class _Verdict:
    """What is known of one group of losses: which values agree, whether dz does, and the dz seen so far."""

    values: dict[int, bool] = field(default_factory=dict)
    gradient: bool | None = None
    tapped: bool = False
    seen: dict[str, Tensor] = field(default_factory=dict)

    def trusts(self, index: int) -> bool:
        return self.values.get(index, True) and self.gradient is not False


_verdicts: defaultdict[str, _Verdict] = defaultdict(_Verdict)
_numbers = itertools.count()


def new_key(location: str) -> str:
    """A name for a group of losses, of which a user can tell the line."""
    return f"{location} #{next(_numbers)}"


@torch.library.custom_op("inductor_ce::verified", mutates_args=())
def verified(fused: Tensor, original: Tensor, key: str, index: int) -> Tensor:
    """`fused`, or `original` where the two were found to differ."""
    verdict = _verdicts[key]
    if index not in verdict.values:
        verdict.values[index] = _agree(fused, original)
        if not verdict.values[index]:
            _tell(key, "value", fused, original)
    return (fused if verdict.trusts(index) else original).clone()


@verified.register_fake
def _(fused: Tensor, original: Tensor, key: str, index: int) -> Tensor:
    return torch.empty_like(fused)


@torch.library.custom_op("inductor_ce::verified_grad", mutates_args=())
def verified_grad(upstream: Tensor, key: str, index: int) -> tuple[Tensor, Tensor]:
    """The upstream gradients of both paths."""
    verdict = _verdicts[key]
    if verdict.tapped and verdict.gradient is None:
        return upstream.clone(), upstream.clone()
    chosen, other = upstream.clone(), torch.zeros_like(upstream)
    return (chosen, other) if verdict.trusts(index) else (other, chosen)


@verified_grad.register_fake
def _(upstream: Tensor, key: str, index: int) -> tuple[Tensor, Tensor]:
    return torch.empty_like(upstream), torch.empty_like(upstream)


@torch.library.custom_op("inductor_ce::tapped", mutates_args=())
def tapped(z: Tensor, key: str, path: str) -> Tensor:
    """The logits as `path` reads them."""
    _verdicts[key].tapped = True
    return z.clone()


@tapped.register_fake
def _(z: Tensor, key: str, path: str) -> Tensor:
    return torch.empty_like(z)


@torch.library.custom_op("inductor_ce::tapped_grad", mutates_args=())
def tapped_grad(dz: Tensor, key: str, path: str) -> Tensor:
    """dz of one path; on the first backward 0 for the fused one."""
    verdict = _verdicts[key]
    if verdict.gradient is not None:
        return dz.clone()
    verdict.seen[path] = dz
    if len(verdict.seen) == 2:
        verdict.gradient = _near(verdict.seen[FUSED], verdict.seen[ORIGINAL])
        if not verdict.gradient:
            _tell(key, "gradient", verdict.seen[FUSED], verdict.seen[ORIGINAL])
        verdict.seen.clear()
    return dz.clone() if path == ORIGINAL else torch.zeros_like(dz)


@tapped_grad.register_fake
def _(dz: Tensor, key: str, path: str) -> Tensor:
    return torch.empty_like(dz)


def _keep_last_two(ctx, inputs, output) -> None:
    ctx.told = inputs[-2:]


def _verified_backward(ctx, upstream: Tensor):
    return (*verified_grad(upstream, *ctx.told), None, None)


def _tapped_backward(ctx, upstream: Tensor):
    return tapped_grad(upstream, *ctx.told), None, None


verified.register_autograd(_verified_backward, setup_context=_keep_last_two)
tapped.register_autograd(_tapped_backward, setup_context=_keep_last_two)

VERIFIED = torch.ops.inductor_ce.verified.default
TAPPED = torch.ops.inductor_ce.tapped.default


def _agree(fused: Tensor, original: Tensor) -> bool:
    if not original.is_floating_point():
        return bool((fused != original).float().mean() <= _TIES) if original.numel() else True
    relative, absolute = _tolerance(original)
    return torch.allclose(fused.double(), original.double(), relative, absolute, equal_nan=True)


def _near(fused: Tensor, original: Tensor) -> bool:
    """Whether the norm of the difference is small, NaN being where NaN is."""
    relative, absolute = _tolerance(original)
    a, b = fused.double().flatten(), original.double().flatten()
    if not torch.equal(a.isnan(), b.isnan()):
        return False
    distance = torch.linalg.vector_norm((a - b).nan_to_num())
    return bool(distance <= 10 * relative * torch.linalg.vector_norm(b.nan_to_num()) + absolute * 1e-4)


def _tolerance(original: Tensor) -> tuple[float, float]:
    return _TOLERANCES.get(original.dtype, _TOLERANCE)


def _tell(key: str, what: str, fused: Tensor, original: Tensor) -> None:
    difference = (fused.double().flatten() - original.double().flatten()).abs().nan_to_num(float("inf")).max()
    log.error(
        "%s: the %s of the fused loss differs from the original's by up to %.3g; the original is used. "
        "Please report it with this line of your code.",
        key,
        what,
        difference,
    )
