"""Everything about a system but its time: compilation, errors against float64, memory."""

from __future__ import annotations

import sys
import time
import traceback
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from ...api.counts import counted, forget_counts
from ..shared import measure
from ..shared.losses import Loss, LossFunction, errors
from ..shared.peers import NotOffered
from .inputs import Inputs
from .systems import OURS, OURS_IN_FORWARD


def admit(
    name: str,
    build: Callable[[Loss], LossFunction | NotOffered],
    loss: Loss,
    inputs: Inputs,
    rows: dict[str, dict[str, Any]],
) -> LossFunction | NotOffered:
    """Build a system, run and check it. Its row goes into `rows`; a failure is reported, never raised."""
    try:
        function = build(loss)
        if not isinstance(function, NotOffered):
            rows[name] = {"loss": loss.name, "system": name, **check(name, function, loss, inputs)}
        return function
    except Exception as error:  # whatever one system raises, the others are still worth their numbers
        tqdm.write(traceback.format_exc(), file=sys.stderr)
        return NotOffered.because(error)


def check(name: str, function: LossFunction, loss: Loss, inputs: Inputs) -> dict[str, Any]:
    """Everything about a system but its time: compilation, errors against float64, memory."""
    forget_counts()
    inputs.restore()
    start = time.perf_counter()
    inputs.step(function)[0].item()
    first_call_s = time.perf_counter() - start
    sites = counted().get("sites", 0)

    inputs.restore()
    measure.poison(inputs.pristine)
    value, dz = inputs.step(function)
    loss_error, dz_error = errors(loss, inputs.pristine, inputs.y, value, dz)
    overwrites = not torch.equal(inputs.logits, inputs.pristine)
    problems = problems_of(value, loss_error, dz, dz_error)
    if name in (OURS, OURS_IN_FORWARD) and not sites:
        problems.append("no loss was rewritten")
    del value, dz

    inputs.restore()
    return {
        "extra_bytes": measure.peak_extra_bytes(lambda: inputs.step(function)),
        "loss_error": loss_error,
        "dz_error": dz_error,
        "overwrites_logits": overwrites,
        "first_call_s": first_call_s,
        "sites": sites,
        "problems": problems,
    }


def problems_of(value: Tensor, loss_error: float, dz: Tensor, dz_error: float) -> list[str]:
    """What is wrong with a result. NaN never passes.

    The limit for dz is that of one rounding to its dtype and a twentieth; the loss, a float32 sum of N rows,
    gets 1e-5.
    """
    limits = {
        "loss": (loss_error, max(1e-5, torch.finfo(value.dtype).eps)),
        "dz": (dz_error, 1.05 * torch.finfo(dz.dtype).eps / 2),
    }
    return [
        f"{name}: error {error:.1e}, above {limit:.1e}"
        for name, (error, limit) in limits.items()
        if not error <= limit
    ]
