"""Losses over DTensor logits in real processes, over gloo, against a dense float64 reference.

Traps 7 to 9, 25 and 27: labels on other ranks, smoothing over all classes, the gradient of every shard,
ignored classes, and means over ranks that have different numbers of rows that count.
"""

import functools
from dataclasses import replace

import pytest
import torch
from dtensor_cases import CASES, Setup, check, on_rank
from ranks import spawn

UNEVEN = Setup((2,), V=23)
EMPTY = Setup((4,), V=5)  # blocks of 2, 2, 1 and 0 columns
GRID = Setup((2, 2), V=23)  # 2 and 4 rows that count
RAGGED = Setup((2, 2), N=7, V=23)  # 4 and 3 rows, of which torch 2.13 traces no mean
JOBS = {
    2: [
        *[(name, UNEVEN) for name in CASES],
        *[(name, replace(UNEVEN, weights="whole")) for name in ("soft targets", "divergence", "expectation")],
        *[
            (name, replace(UNEVEN, weights="plain"))
            for name in ("class weights", "soft targets", "divergence")
        ],
        *[(name, replace(UNEVEN, dtype=torch.bfloat16)) for name in ("class weights", "divergence")],
    ],
    4: [
        *[
            (name, EMPTY)
            for name in ("all, ignoring the last", "class weights", "entropy", "accuracy", "special numbers")
        ],
        *[(name, GRID) for name in ("plain", "all, ignoring 0", "class weights")],
        *[(name, RAGGED) for name in ("rows, z-loss", "soft targets", "accuracy")],
        ("all, ignoring 0", Setup((2, 1, 2))),
        ("smoothing", Setup((2, 2), rows=(False,))),
        ("divergence of rows, a mean", GRID),
        ("labels outside", GRID),
        ("rows, z-loss", Setup((2, 2), dtype=torch.float32)),
    ],
}
EVERY_JOB = [(size, *job) for size, jobs in JOBS.items() for job in jobs]


@functools.cache
def results(size: int):
    return spawn(on_rank, size, JOBS[size])


def name_of(value: object) -> str:
    if not isinstance(value, Setup):
        return str(value)
    sizes = f"{'x'.join(map(str, value.mesh))} {value.N}x{value.V}"
    return f"{sizes} {value.weights} {str(value.dtype).removeprefix('torch.')}"


@pytest.mark.parametrize(("size", "name", "setup"), EVERY_JOB, ids=name_of)
def test_every_rank_equals_dense(size: int, name: str, setup: Setup):
    check(results(size), name, setup)


@pytest.mark.parametrize(("size", "name", "setup"), EVERY_JOB, ids=name_of)
def test_one_all_gather_and_none_in_the_backward(size: int, name: str, setup: Setup):
    for rank in results(size):
        forward, backward = rank[name, setup]["collectives"]
        assert forward.pop("all_gather_into_tensor") == 1
        assert forward.keys() <= {"all_reduce"}
        own_terms = name.startswith("divergence")  # of the target alone, over its sharded classes
        assert forward.get("all_reduce", 0) <= (len(setup.mesh) > 1) * 3 + own_terms
        assert backward == {}


@pytest.mark.parametrize(("size", "name", "setup"), EVERY_JOB, ids=name_of)
def test_gradients_stay_where_the_tensors_are(size: int, name: str, setup: Setup):
    for rank in results(size):
        result = rank[name, setup]
        assert result["dW placements"][-1] == "S(0)"
        assert result["dh placements"][-1] == "P(sum)"
        assert result["loss placements"][-1] == "R"
