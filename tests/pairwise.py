"""Matrices of options: few combinations in which every two choices meet, or with ALL=1 the whole product."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Sequence
from typing import Any

EVERYTHING = bool(os.environ.get("ALL"))

Combination = tuple[Any, ...]  # a choice of each factor, in their order


def pairwise(
    *factors: Sequence[Any], valid: Callable[..., bool] = lambda *choices: True
) -> list[Combination]:
    """The combinations to test: all that are valid with ALL=1, else a covering of every two choices.

    Always the same ones: the greedy choice takes the first of equals, and asks no random numbers.
    """
    product = [choices for choices in itertools.product(*factors) if valid(*choices)]
    return product if EVERYTHING else covering(product)


def in_turns(*factors: Sequence[Any]) -> list[Combination]:
    """Combinations in which every choice occurs, the factors' choices in turns; with ALL=1 the product."""
    if EVERYTHING:
        return list(itertools.product(*factors))
    longest = max(map(len, factors))
    return [tuple(choices[i % len(choices)] for choices in factors) for i in range(longest)]


def covering(product: Sequence[Combination], strength: int = 2) -> list[Combination]:
    """Combinations in which all parts of all of `product` occur, always the one that brings the most.

    Those of which the others have all parts are left out again.
    """
    parts = {index: parts_of(combination, strength) for index, combination in enumerate(product)}
    missing = set().union(*parts.values())
    chosen: dict[int, set[tuple[tuple[int, str], ...]]] = {}
    while missing:
        best = max(parts, key=lambda index: len(parts[index] & missing))
        chosen[best] = parts.pop(best)
        missing -= chosen[best]
    for index in list(chosen):
        own = chosen.pop(index)
        if not own <= set().union(*chosen.values()):
            chosen[index] = own
    return [product[index] for index in sorted(chosen)]


def parts_of(combination: Combination, strength: int = 2) -> set[tuple[tuple[int, str], ...]]:
    """The choices of every `strength` factors."""
    named = [(place, getattr(choice, "__name__", repr(choice))) for place, choice in enumerate(combination)]
    return set(itertools.combinations(named, min(strength, len(named))))
