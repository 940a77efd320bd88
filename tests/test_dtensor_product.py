"""Cross entropy over DTensor logits: options, labels, vocabularies and meshes, every two of their choices.

ALL=1 runs all combinations of all.
"""

from __future__ import annotations

import itertools

import pytest
from dtensor_cases import Setup, check, everywhere, rewritten
from pairwise import Combination, pairwise, parts_of
from ranks import on_devices, once
from reference import Terms

IGNORED = {"-100": lambda V: -100, "0": lambda V: 0, "V - 1": lambda V: V - 1, "V + 5": lambda V: V + 5}
FACTORS = {  # in the order of which the fewest combinations are chosen
    "ignored": tuple(IGNORED),
    "V": (24, 23),
    "mesh": ((2,), (2, 2)),
    "reduction": ("none", "mean", "sum"),
    "smoothing": (0.0, 0.1),
    "z-loss": (0.0, 1e-4),
}
PRODUCT: list[Combination] = list(itertools.product(*FACTORS.values()))
CHOSEN = pairwise(*FACTORS.values())


def job(combination: Combination) -> tuple[Terms, Setup]:
    ignored, V, mesh, reduction, smoothing, z_weight = combination
    setup = Setup(mesh, V=V)
    if reduction != "mean" or len(mesh) == 1:  # of others eager torch reduces a number in its backward
        setup = rewritten(setup)
    return Terms(reduction, IGNORED[ignored](V), smoothing, z_weight), setup


@once
def results(mesh: tuple[int, ...], device: str):
    jobs = [(terms, setup) for terms, setup in map(job, CHOSEN) if setup.mesh == mesh]
    return everywhere(jobs, 2 * len(mesh), device)


def test_every_two_choices_meet():
    assert set().union(*map(parts_of, CHOSEN)) == set().union(*map(parts_of, PRODUCT))
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
