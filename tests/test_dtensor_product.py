"""Cross entropy over DTensor logits: options, labels, vocabularies and meshes in every combination of three.

CROSS_PRODUCT=all runs all combinations of all.
"""

from __future__ import annotations

import functools
import itertools
import os

import pytest
from dtensor_cases import Setup, check, everywhere
from ranks import on_devices
from reference import Terms

pytestmark = pytest.mark.xdist_group("dtensor product")

IGNORED = {"-100": lambda V: -100, "0": lambda V: 0, "V - 1": lambda V: V - 1, "V + 5": lambda V: V + 5}
FACTORS = {
    "smoothing": (0.0, 0.1),
    "z-loss": (0.0, 1e-4),
    "ignored": tuple(IGNORED),
    "reduction": ("none", "mean", "sum"),
    "V": (24, 23),
    "mesh": ((2,), (2, 2)),
}
Combination = tuple  # a choice of each factor, in their order
PRODUCT: list[Combination] = list(itertools.product(*FACTORS.values()))
STRENGTH = 3


def parts(combination: Combination) -> set[tuple]:
    """The choices of every STRENGTH factors."""
    return set(itertools.combinations(enumerate(combination), STRENGTH))


def covering(product: list[Combination]) -> list[Combination]:
    """Combinations in which all parts of all of them occur, always the one that brings the most."""
    missing = set().union(*map(parts, product))
    chosen = []
    while missing:
        chosen.append(max(product, key=lambda combination: len(parts(combination) & missing)))
        missing -= parts(chosen[-1])
    return chosen


CHOSEN = PRODUCT if os.environ.get("CROSS_PRODUCT") == "all" else covering(PRODUCT)


def job(combination: Combination) -> tuple[Terms, Setup]:
    smoothing, z_weight, ignored, reduction, V, mesh = combination
    return Terms(reduction, IGNORED[ignored](V), smoothing, z_weight), Setup(mesh, V=V)


@functools.cache
def results(mesh: tuple[int, ...], device: str):
    jobs = [job(combination) for combination in CHOSEN if combination[-1] == mesh]
    return everywhere(jobs, 2 * len(mesh), device)


def test_every_three_choices_meet():
    assert set().union(*map(parts, CHOSEN)) == set().union(*map(parts, PRODUCT))
    assert len(PRODUCT) == 192


@on_devices
@pytest.mark.parametrize("combination", CHOSEN, ids=str)
def test_every_rank_equals_dense(combination: Combination, device: str):
    terms, setup = job(combination)
    ranks = results(setup.mesh, device)
    check(ranks, terms, setup)
    for rank in ranks:
        forward, backward = rank[terms, setup]["collectives"]
        assert forward["all_gather_into_tensor"] == 1
        assert backward == {}
