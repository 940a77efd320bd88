"""Whether one kernel makes the statistics of a piece, and the gradient of its logits over these."""

from __future__ import annotations

from typing import NamedTuple

import torch

from ..graph.shapes import example_of
from ..ops.gemm import aligned_strides
from ..ops.one_read import is_offered
from .between import program_between
from .calls import stats_call
from .chained import chain_of
from .exits import sums_apart
from .facts import Facts
from .find import Head
from .row_programs import OfRows


class Once(NamedTuple):
    """What makes the only coefficients of the only statistics, and the chain before these, as text."""

    program: OfRows
    chain: str


def read_once(head: Head, facts: Facts) -> Once | None:
    """How a head's logits are read once; None where it is not known for each row and for each element.

    Args:
        head: the head.
        facts: about what lies between its statistics and its gradients.
    """
    gradients = [*head.grads, *head.divergence_grads]
    alone = len(head.stats) == len(gradients) == 1 and not head.divergences and head.teacher is None
    if not alone or not head.exits or sums_apart(head) or not _is_offered(head):
        return None
    chain = chain_of(head)
    if chain is None:
        return None
    found = program_between(head.stats[0], gradients[0], facts)
    return None if found is None else Once(found[0], chain)


def is_made_over(device: torch.device) -> bool:
    """Whether a kernel of such a device may write the gradient over the logits, behind a chain too."""
    return device.type == "cuda" and torch.version.hip is None


def _is_offered(head: Head) -> bool:
    """Whether there is a template for the logits and statistics of a head."""
    call = stats_call(head.stats[0])
    of_classes = all(example_of(q).dim() == 1 for q in call.weights)
    logits = example_of(head.product)
    row, _ = aligned_strides(head.v, logits.device)
    return len(head.products) == 1 and of_classes and is_offered(logits.dtype, row, call.rows)
