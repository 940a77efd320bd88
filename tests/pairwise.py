"""Matrices of options: few combinations in which every two choices meet, or with ALL=1 the whole product."""

from __future__ import annotations

import itertools
import os
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import pytest

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


def left_to_others(items: Sequence[pytest.Item]) -> set[pytest.Item]:
    """Those marked `with_all`, and of those marked `in_turns` the ones all of whose choices others have; none
    with ALL=1.

    The choices are those of each `parametrize` of a test. What needs a GPU is not counted, nor left out.
    """
    if EVERYTHING:
        return set()
    left = {item for item in items if item.get_closest_marker("with_all")}
    matrices: dict[str, list[pytest.Item]] = {}
    for item in items:
        if item.get_closest_marker("in_turns") and "gpu" not in item.keywords and item not in left:
            matrices.setdefault(item.nodeid.split("[")[0], []).append(item)
    for matrix in matrices.values():
        left |= {*matrix} - {*taking_turns(matrix)}
    return left


def taking_turns(matrix: Sequence[pytest.Item]) -> list[pytest.Item]:
    """Those with the most choices that are missing yet, and of them with the choices that are the rarest."""
    left = {item: choices_of(item) for item in matrix}
    missing, used = set().union(*left.values()), Counter()
    chosen = []
    while missing:
        best = max(left, key=lambda item: (len(left[item] & missing), -sum(used[c] for c in left[item])))
        chosen.append(best)
        choices = left.pop(best)
        missing -= choices
        used.update(choices)
    return chosen


def choices_of(item: pytest.Item) -> set[tuple[str, str]]:
    """The names of each `parametrize` of a test, with what they are for it."""
    chosen = set()
    for mark in item.iter_markers("parametrize"):
        names = mark.args[0] if isinstance(mark.args[0], str) else ",".join(mark.args[0])
        values = [item.callspec.params[name.strip()] for name in names.split(",")]
        chosen.add((names, repr([getattr(value, "__name__", value) for value in values])))
    return chosen
