"""Losses over DTensor logits whose rows are shared by ranks, and whose vocabulary is whole or on other ranks.

torch up to 2.13 has a mean of the ranks' means there, and gathers all logits from 2.14; ours is that of all
rows, of two numbers a rank. Labels may be anywhere on the mesh.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from dtensor_cases import Name, Setup, check, distributed, everywhere, exact, rewritten, tensors
from harness import Rewritten, clean_slate, misses, sites
from pairwise import EVERYTHING
from ranks import Outcomes, attempt, mesh_there, on_devices, once, spawn
from reference import Terms
from torch import Tensor
from torch.distributed.tensor import Replicate

ROWS = {2: Setup((2,), whole=True), 4: Setup((2, 2), whole=True)}  # 2 and 4 rows that count; 0, 2, 2 and 2
NONE = {size: replace(setup, counting="one has none") for size, setup in ROWS.items()}
REPLICAS = Setup((2, 2), whole=True, rows=(True, False))
RAGGED = Setup((2,), N=7, whole=True)
SHARDED = {2: Setup((2,)), 4: Setup((2, 2))}  # with the vocabulary on the last dimension of the mesh

MEANS = [Terms(), Terms("mean", 0, 0.2, 0.01), "class weights"]
ROWWISE: list[Name] = [Terms("sum", smoothing=0.1), "rows, z-loss", "entropy", "divergence", "accuracy"]
ROWWISE += ["soft targets", "expectation", "fixed column", "labels outside", "special numbers, smoothing"]
ROWWISE += ["many labels"]
CHUNKS, SLABS = "token_chunks", "vocab_slabs"

# Each loss over rows that ranks share, and each placement of rows and labels under one of the losses. One of
# each kind, and heads in pieces, go through all passes; of the others the rewritten graph runs.
JOBS: dict[int, list[tuple[Name, Setup]]] = {
    2: [
        (Terms(), ROWS[2]),
        *[(name, rewritten(ROWS[2])) for name in (*ROWWISE, "causal shift")],
        (MEANS[1], NONE[2]),
        ("class weights", rewritten(NONE[2])),
        (Terms(), rewritten(replace(NONE[2], dtype=torch.bfloat16))),
        (Terms("none"), rewritten(RAGGED)),
        ("class weights", replace(ROWS[2], strategy=CHUNKS)),
        (Terms(), replace(NONE[2], strategy=CHUNKS)),
        (MEANS[1], replace(ROWS[2], strategy=SLABS)),
        (Terms(), rewritten(replace(ROWS[2], labels="whole"))),
        (Terms("none"), rewritten(replace(SHARDED[2], labels="over the last"))),
        (Terms(), replace(SHARDED[2], labels="over the last", strategy=CHUNKS)),
    ],
    4: [
        (Terms(), ROWS[4]),
        (Terms(), rewritten(NONE[4])),
        ("class weights", rewritten(ROWS[4])),
        (Terms(), rewritten(REPLICAS)),
        (Terms("none"), rewritten(ROWS[4])),
        (Terms(), rewritten(replace(SHARDED[4], labels="whole"))),
        (MEANS[1], replace(SHARDED[4], counting="one has none")),
    ],
}
if EVERYTHING:
    JOBS[2] += [
        *[(name, ROWS[2]) for name in MEANS[1:]],
        (Terms(), NONE[2]),
        (Terms(), replace(NONE[2], dtype=torch.float32)),
        (Terms("sum"), RAGGED),
        (Terms(), replace(ROWS[2], strategy=CHUNKS)),
        (Terms("none"), replace(ROWS[2], strategy=SLABS)),
        (Terms("none"), replace(ROWS[2], labels="whole")),
        (Terms(), replace(SHARDED[2], labels="over the last")),
    ]
    JOBS[4] += [
        (MEANS[1], ROWS[4]),
        *[(name, REPLICAS) for name in MEANS[1:]],
        (Terms(), replace(REPLICAS, strategy=CHUNKS)),
        (MEANS[1], NONE[4]),
        (Terms(), replace(ROWS[4], labels="whole")),
        (Terms(), replace(SHARDED[4], labels="over the last")),
    ]
EVERY_JOB = [(size, *job) for size, jobs in JOBS.items() for job in jobs]


def name_of(value: object) -> str:
    if isinstance(value, Terms):
        return f"{value.reduction} {value.smoothing}"
    if not isinstance(value, Setup):
        return str(value)
    rows = "x".join("rows" if p.is_shard() else "all" for p in value.over_rows())
    names = (rows, value.labels, value.counting, value.strategy, str(value.dtype), str(value.whole))
    return " ".join(names)


every_job = pytest.mark.parametrize(("size", "name", "setup"), EVERY_JOB, ids=name_of)


@once
def results(size: int, device: str) -> list[dict[Any, dict[str, Any]]]:
    return everywhere(JOBS[size], size, device)


# What torch says of a program that it does not trace itself.
UNTRACED = "Redistribution from one partial type (P(sum)) to another (P(avg)) is unsupported."


def of_job(rank: dict[Any, dict[str, Any]], name: Name, setup: Setup) -> dict[str, Any]:
    """What a rank gives of a job; skips where torch itself does not trace the program."""
    try:
        return rank[name, setup]
    except AssertionError as error:
        if UNTRACED in str(error) and name in MEANS[1:]:
            pytest.skip("torch 2.11 traces no mean with smoothing over shared rows")
        raise


@on_devices
@every_job
def test_every_rank_has_the_loss_of_all_rows(size: int, name: Name, setup: Setup, device: str):
    for rank in results(size, device):
        of_job(rank, name, setup)
    check(results(size, device), name, setup)


@on_devices
@every_job
def test_what_is_exchanged(size: int, name: Name, setup: Setup, device: str):
    """Two numbers for a mean over each dimension that shares rows, one for a sum that a user divides, and
    nothing in the backward; of a sharded vocabulary its statistics, and labels that others have."""
    for rank in results(size, device):
        result = of_job(rank, name, setup)
        forward, backward = result["collectives"]
        if name == Terms("none") and result["loss placements"] != tuple(map(str, setup.over_rows())):
            backward.pop("all_gather_into_tensor")  # from 2.14 torch has such rows where the labels are
        assert backward == {}
        if setup.whole:
            mesh = mesh_there(setup.mesh, device)
            sharing = sum(p.is_shard() for p, n in zip(setup.over_rows(), mesh, strict=True) if n > 1)
            means = sharing * (name in MEANS or name in ("soft targets", "causal shift"))
            counts = result["exchanged"].count(1)
            assert forward == ({"all_reduce": means + counts} if means else {})
            assert sorted(result["exchanged"]) == [1] * counts + [2] * means
            assert counts <= 2 * sharing * (name == MEANS[1])
        else:
            assert max(result["exchanged"]) <= 4 * setup.N * size  # of statistics, and no logits
            others_have = setup.labels == "over the last" and mesh_there(setup.mesh, device)[-1] > 1
            chunks = 3 if setup.strategy == CHUNKS else 1
            assert forward["all_gather_into_tensor"] == chunks + others_have


@on_devices
@every_job
def test_gradients_stay_where_the_tensors_are(size: int, name: Name, setup: Setup, device: str):
    for rank in results(size, device):
        result = of_job(rank, name, setup)
        rows = tuple(map(str, setup.over_rows()))
        shared = [p == "S(0)" for p in rows]
        assert [p == "S(0)" for p in result["dh placements"]] == shared
        assert [p == "P(sum)" for p in result["dW placements"]] == shared
        if result["loss"].ndim and setup.labels == "as the rows":
            assert result["loss placements"] == rows


@on_devices
@pytest.mark.parametrize("size", list(ROWS))
def test_trap_27_the_mean_is_no_mean_of_means(size: int, device: str):
    """Ranks have 2 and 4 rows that count, or none: as a mean of means that would be NaN."""
    rows, y = exact(Terms("none"), ROWS[size])["loss"], tensors(ROWS[size], -100)["y"]
    parts = zip(rows.chunk(size), (y != -100).chunk(size), strict=True)
    mean_of_means = torch.stack([part[counts].mean() for part, counts in parts]).mean()
    right = exact(Terms(), ROWS[size])["loss"]
    assert not (mean_of_means - right).abs() <= 0.01 * right
    for rank in results(size, device):
        torch.testing.assert_close(rank[Terms(), ROWS[size]]["loss"], right, rtol=1e-10, atol=0)
        assert set(rank[Terms(), ROWS[size]]["loss placements"]) == {"R"}


# What is read of a rank's part of a loss


def _mean(z: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(z, y)


def _multiple(z: Tensor, y: Tensor) -> Tensor:
    return 3 * F.cross_entropy(z, y)


# What of a loss a program reads; and the loss, where that is a rank's part of a mean, if torch has one.
READERS: dict[str, tuple[Callable[..., Tensor], Callable[..., Tensor] | None]] = {
    "a mean's part": (lambda z, y: _mean(z, y).to_local() + 1, _mean),
    "a part of a multiple": (lambda z, y: _multiple(z, y).to_local() + 1, _multiple),
    "a sum's part": (lambda z, y: F.cross_entropy(z, y, reduction="sum").to_local(), None),
    "rows": (lambda z, y: F.cross_entropy(z, y, reduction="none").to_local().sum(), None),
    "the mean": (lambda z, y: _mean(z, y).full_tensor(), None),
    "redistributed": (lambda z, y: _mean(z, y).redistribute(placements=[Replicate()]).to_local(), None),
}
OF_ALL_ROWS = {"the mean": 1, "redistributed": 1, "a part of a multiple": 3}  # times the mean


def read(name: str, setup: Setup) -> dict[str, Any]:
    """A program that reads its part, as torch has it and as we do, with the gradient of the rank's logits."""
    f, loss_of = READERS[name]
    given = []
    for ours in (False, True):
        with clean_slate():
            x = distributed(setup, tensors(setup, -100))
            z = (x["h"] @ x["W"].t()).detach().requires_grad_()
            loss = (torch.compile(f, backend=Rewritten()) if ours else f)(z, x["y"])
            loss.backward(torch.full_like(loss, 0.37))
            counts = {"sites": sites(), "misses": misses(), "parts": False}
            if loss_of is not None:
                with torch.no_grad():
                    counts["parts"] = any(p.is_partial() for p in loss_of(z, x["y"]).placements)
            given.append({"loss": loss.detach(), "dz": z.grad.to_local()})
    return {"torch": given[0], "ours": given[1], **counts}


def readers_on_rank(rank: int, setup: Setup) -> dict[Any, dict[str, Any]]:
    return {name: attempt(read, name, setup) for name in READERS}


@once
def what_is_read(device: str) -> list[dict[Any, dict[str, Any]]]:
    return [
        Outcomes(found) for found in spawn(readers_on_rank, 2, replace(ROWS[2], device=device), device=device)
    ]


@on_devices
@pytest.mark.parametrize("name", READERS)
def test_parts_that_a_program_reads(name: str, device: str):
    """A part is what it was; what all ranks read is the loss of all rows."""
    for rank in what_is_read(device):
        result = rank[name]
        parts = result["parts"]
        assert (result["sites"], result["misses"]) == (not parts, parts)
        right = result["torch"]
        if name in OF_ALL_ROWS and not parts:
            more = name == "a part of a multiple"
            right["loss"] = OF_ALL_ROWS[name] * exact(Terms(), ROWS[2])["loss"] + more
        torch.testing.assert_close(result["ours"], right, rtol=1e-10, atol=1e-10)
