"""Numbers that a program makes tensors of, and calculates with, before they meet logits."""

from __future__ import annotations

import math
from typing import Any

from torch.fx import Node

from .. import algebra
from ..common.findings import name_of
from . import spellings
from .values import Columns, Reading

_FUNCTIONS = {"log": math.log, "log1p": math.log1p, "exp": math.exp, "sqrt": math.sqrt}


def number_of(reading: Reading, arg: Any) -> float | None:
    """A number, or that which a tensor made of numbers has everywhere."""
    if isinstance(arg, (int, float)):
        return float(arg) if math.isfinite(arg) else None
    if not isinstance(arg, Node):
        return None
    value = reading.values.get(arg)
    if isinstance(value, Columns):
        timeline = reading.timeline
        if not timeline.unchanged(arg, arg):
            return None
        constant = value.expr.get(algebra.ONE)
        alone = value.expr == algebra.as_vocab(constant) and constant.is_number
        return float(constant) if alone else None
    spelled, function = spellings.read(arg), _FUNCTIONS.get(name_of(arg), float)
    if spelled is None or (function is float and spelled[0].name != "same"):
        return None
    inner = number_of(reading, spelled[1].get("input"))
    try:
        return None if inner is None else function(inner)
    except (ValueError, OverflowError):
        return None
