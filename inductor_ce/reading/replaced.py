"""Entries that `scatter` replaces: in each row that of a label by a number, as where a mask has the label.

The mask is added to the graph beside the step, and taken out again where nobody comes to use it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Node

from .. import algebra
from ..graph.builder import Builder
from ..graph.shapes import same_shape, shape_of
from . import arithmetic, targets
from .class_ranges import added, places
from .constants import number_of
from .context import Context, is_labels
from .values import Columns, Outcome, VocabValue


def scatter(context: Context, args: dict[str, Any]) -> Outcome:
    """Of targets and masks, or of what is made of logits, in which one element a row becomes a number."""
    source, index, dim = args.get("input"), args.get("index"), args.get("dim")
    value, number = context.known(source), number_of(context.reading, args.get("src", args.get("value")))
    if not isinstance(value, VocabValue) or not isinstance(source, Node):
        return targets.scatter(context, args)
    if number is None or "reduce" in args or not is_labels(index) or not isinstance(dim, int):
        return None
    shape = shape_of(source)
    rows = tuple(1 if i == value.axis else size for i, size in enumerate(shape))
    if dim % len(shape) != value.axis or not same_shape(rows, shape_of(index)):
        return None

    def has_label(build: Builder) -> Node:
        return build(torch.eq, places(build, source, value.axis), index)

    version = context.reading.timeline.version(index, context.position)
    mask = added(context, ("label", index, version, str(shape[value.axis]), value.axis), has_label)
    if not context.reading.apart:
        label = context.loose_label(index, value.axis, named=False)
        context.reading.values[mask] = Columns(algebra.indicator(label), value.axis)
    return arithmetic.masked_fill(context, {"input": source, "mask": mask, "value": number})
