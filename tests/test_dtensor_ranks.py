"""Losses over DTensor logits in real processes, over gloo or NCCL, against a dense float64 reference.

Traps 7 to 9, 25 and 27: labels on other ranks, smoothing over all classes, the gradient of every shard,
ignored classes, and means over ranks that have different numbers of rows that count. ALL=1 runs more jobs.
"""

from dataclasses import replace

import pytest
import torch
from dtensor_cases import CASES, Setup, check, everywhere, exact, rewritten, tensors
from pairwise import EVERYTHING
from ranks import mesh_there, on_devices, once, ranks_at_most
from reference import Terms

UNEVEN = Setup((2,), V=23)
EMPTY = rewritten(Setup((4,), V=5))  # blocks of 2, 2, 1 and 0 columns
GRID = Setup((2, 2), V=23)  # 2 and 4 rows that count
RAGGED = Setup((2, 2), N=7, V=23)  # 4 and 3 rows, of which torch 2.13 traces no mean
BFLOAT16, FLOAT16 = replace(UNEVEN, dtype=torch.bfloat16), replace(UNEVEN, dtype=torch.float16)
WHOLE, PLAIN = replace(UNEVEN, weights="whole"), replace(UNEVEN, weights="plain")
CHUNKS, SLABS = "token_chunks", "vocab_slabs"

# Of float64 over shards, what another job has as well: with special numbers, other placements, or in pieces.
# The terms of cross entropy are those of test_dtensor_product.py.
ELSEWHERE = ("plain", "smoothing", "rows, z-loss", "all, ignoring 0", "class weights", "soft targets")
ELSEWHERE += ("entropy", "divergence")
# On four ranks: of which one has no columns, or which share rows.
ELSEWHERE += ("accuracy", "special numbers, entropy", "divergence of rows, a mean")
# What passes make of such losses, these and the heads in pieces show; of the others the rewritten graph runs.
THROUGH_PASSES = ("all, ignoring the last", "confidence")
JOBS = {
    2: [
        *[(name, UNEVEN) for name in THROUGH_PASSES],
        *[(name, rewritten(UNEVEN)) for name in CASES if name not in ELSEWHERE + THROUGH_PASSES],
        ("soft targets", rewritten(WHOLE)),
        *[(name, rewritten(PLAIN)) for name in ("class weights", "divergence")],
        ("class weights", BFLOAT16),
        ("all, ignoring 0", rewritten(FLOAT16)),
        ("all, ignoring 0", rewritten(Setup((1, 1, 2)))),
    ],
    4: [
        *[(name, EMPTY) for name in ("all, ignoring the last", "accuracy", "special numbers, entropy")],
        ("rows, z-loss", rewritten(replace(RAGGED, dtype=torch.float32))),
        ("smoothing", rewritten(Setup((2, 2), rows=(False,)))),
        ("divergence of rows, a mean", rewritten(GRID)),
    ],
}
EVEN = {2: Setup((2,)), 4: Setup((2, 2))}
PIECES = {
    2: [
        *[("class weights", Setup((2,), strategy=strategy)) for strategy in (CHUNKS, SLABS)],
        *[(name, replace(UNEVEN, strategy=SLABS)) for name in ("soft targets", "entropy")],
    ],
    4: [("plain", Setup((2, 2), strategy=CHUNKS))],
}
if EVERYTHING:
    JOBS[2] += [
        *[(name, UNEVEN) for name in ELSEWHERE],
        *[(name, WHOLE) for name in ("divergence", "expectation")],
        ("soft targets", PLAIN),
        ("divergence", BFLOAT16),
        ("entropy", FLOAT16),
    ]
    JOBS[4] += [
        *[(name, EMPTY) for name in ("class weights", "entropy", "powers", "special numbers")],
        *[(name, GRID) for name in ("plain", "all, ignoring 0", "class weights", "labels outside")],
        *[(name, RAGGED) for name in ("rows, z-loss", "soft targets", "accuracy")],
        ("rows, z-loss", Setup((2, 2), dtype=torch.float32)),
        ("all, ignoring 0", Setup((2, 1, 2))),
    ]
    PIECES[2] += [
        *[(name, Setup((2,), strategy=CHUNKS)) for name in ("plain", "all, ignoring 0")],
        *[(name, Setup((2,), strategy=SLABS)) for name in ("plain", "all, ignoring 0")],
        ("plain", replace(UNEVEN, strategy=SLABS)),
    ]
    PIECES[4] += [
        ("class weights", Setup((2, 2), strategy=CHUNKS)),
        ("soft targets", replace(RAGGED, strategy=SLABS)),
        *[(name, Setup((2, 2), strategy=SLABS)) for name in ("plain", "class weights")],
        *[(name, replace(GRID, strategy=SLABS)) for name in ("soft targets", "entropy")],
    ]
EVERY_PIECE = [(size, *job) for size, jobs in PIECES.items() for job in jobs]
EVERY_JOB = [(size, *job) for size, jobs in JOBS.items() for job in jobs]
SEQUENCES = {2: replace(UNEVEN, sequence_parallel=True), 4: replace(GRID, sequence_parallel=True)}
IN_CODE = ("plain", "all, ignoring 0", "class weights", "soft targets", "entropy", "accuracy")


@once
def results(size: int, device: str):
    in_chunks = replace(EVEN[size], strategy=CHUNKS)
    jobs = [*JOBS[size], *PIECES[size], ("plain", SEQUENCES[size]), ("plain", in_chunks)]
    return everywhere(list(dict.fromkeys(jobs)), size, device)


def name_of(value: object) -> str:
    if not isinstance(value, Setup):
        return str(value)
    sizes = f"{'x'.join(map(str, value.mesh))} {value.N}x{value.V}"
    pieces = "" if value.strategy == "auto" else f" {value.strategy}"
    return f"{sizes} {value.weights} {str(value.dtype).removeprefix('torch.')}{pieces}"


every_job = pytest.mark.parametrize(("size", "name", "setup"), EVERY_JOB, ids=name_of)


@on_devices
@every_job
def test_every_rank_equals_dense(size: int, name: str, setup: Setup, device: str):
    check(results(size, device), name, setup)


@on_devices
@pytest.mark.parametrize(("size", "name", "setup"), EVERY_PIECE, ids=name_of)
def test_heads_in_pieces(size: int, name: str, setup: Setup, device: str):
    """Ranks exchange the statistics of each chunk alone, and of slabs together."""
    chunks = {2: 3, 4: 2}[size]  # 3 are asked for, of 8 and of 4 rows
    check(results(size, device), name, setup)
    for rank in results(size, device):
        forward, backward = rank[name, setup]["collectives"]
        assert forward["all_gather_into_tensor"] == (chunks if setup.strategy == "token_chunks" else 1)
        assert backward == {}


@on_devices
@pytest.mark.parametrize("size", list(EVEN))
def test_rows_that_count(size: int, device: str):
    """The ranks that share rows compute the same ones, on which they agree by one small exchange."""
    setup = replace(EVEN[size], strategy=CHUNKS)
    by_rows = tensors(setup, -100)["y"].chunk(size // 2)
    for i, rank in enumerate(results(size, device)):
        check(results(size, device), "plain", setup)
        own = by_rows[i * len(by_rows) // len(results(size, device))]
        pieces = own.split(-(-len(own) // 3))
        left = [int((own != -100).sum()) - len(pieces[0]) * k for k in range(len(pieces))]
        computed = [len(piece) if more > 0 else 0 for piece, more in zip(pieces, left, strict=True)]
        assert (0 in computed) == bool((own == -100).any())
        assert rank["plain", setup]["rows"] == [n for n in computed for _ in ("logits", "dW")]
        mean = len(setup.mesh) - 1
        assert rank["plain", setup]["collectives"][0]["all_reduce"] == 1 + mean


@on_devices
def test_ranks_without_columns_exchange_as_often_as_the_others(device: str):
    """What a rank makes of its graph must not tell how often it exchanges statistics."""
    if ranks_at_most(device) < 4:
        pytest.skip("on two ranks, both have columns")
    setup = replace(EMPTY, strategy="token_chunks", rewritten=False)
    for rank in everywhere([("plain", setup)], 4, device):
        result = rank["plain", setup]
        assert result["collectives"][0]["all_gather_into_tensor"] == 1
        torch.testing.assert_close(result["loss"], exact("plain", EMPTY)["loss"])
        assert result["strategies"].keys() <= {"vocab_slabs"}


@on_devices
@every_job
def test_one_all_gather_and_none_in_the_backward(size: int, name: str, setup: Setup, device: str):
    for rank in results(size, device):
        forward, backward = rank[name, setup]["collectives"]
        assert forward.pop("all_gather_into_tensor") == 1
        assert forward.keys() <= {"all_reduce"}
        own_terms = name.startswith("divergence")  # of the target alone, over its sharded classes
        assert forward.get("all_reduce", 0) <= (len(setup.mesh) > 1) * 3 + own_terms
        assert backward == {}


@on_devices
@every_job
def test_gradients_stay_where_the_tensors_are(size: int, name: str, setup: Setup, device: str):
    for rank in results(size, device):
        result = rank[name, setup]
        assert result["dW placements"][-1] == "S(0)"
        assert result["dh placements"][-1] == "P(sum)"
        assert result["loss placements"][-1] == "R"


@on_devices
@pytest.mark.parametrize("size", list(SEQUENCES))
def test_sequence_parallel_hidden_states(size: int, device: str):
    """They are gathered for the product, and their gradient goes back to its ranks in one collective."""
    check(results(size, device), "plain", SEQUENCES[size])
    for rank in results(size, device):
        result = rank["plain", SEQUENCES[size]]
        means = {"all_reduce": 1} if size == 4 else {}
        alone = mesh_there(SEQUENCES[size].mesh, device)[-1] == 1
        gathers, back = (1, {}) if alone else (2, {"reduce_scatter_tensor": 1})
        assert result["collectives"] == ({"all_gather_into_tensor": gathers} | means, back)
        assert set(result["dh placements"]) == {"S(0)"}


@on_devices
@pytest.mark.parametrize("setup", [UNEVEN, EMPTY], ids=name_of)
def test_trap_9_every_rank_has_the_gradient_of_its_columns(setup: Setup, device: str):
    """Ranks that do not own the label get zero gradient."""
    name, size = "all, ignoring the last", setup.mesh[0]
    ranks = len(results(size, device))
    block = -(-setup.V // ranks)
    for i, rank in enumerate(results(size, device)):
        own = exact(name, setup)["dz"][:, i * block : (i + 1) * block]
        torch.testing.assert_close(rank[name, setup]["dz shard"], own, rtol=1e-10, atol=1e-10)


@on_devices
def test_trap_27_the_mean_over_a_mesh_is_no_mean_of_means(device: str):
    """Half of the ranks have 2 rows that count, the other half 4."""
    rows, y = exact(Terms("none"), GRID)["loss"], tensors(GRID, -100)["y"]
    means = [half[counts].mean() for half, counts in zip(rows.chunk(2), (y != -100).chunk(2), strict=True)]
    right = exact("plain", GRID)["loss"]
    assert (sum(means) / 2 - right).abs() > 0.01 * right
    for rank in results(4, device):
        torch.testing.assert_close(rank["plain", SEQUENCES[4]]["loss"], right, rtol=1e-10, atol=0)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("setup", [UNEVEN, GRID], ids=name_of)
def test_generated_code_on_every_rank_equals_dense(setup: Setup, dtype: torch.dtype):
    jobs = [(name, replace(setup, dtype=dtype, code=True)) for name in IN_CODE]
    ranks = everywhere(jobs, 2 * len(setup.mesh), "cuda")
    for job in jobs:
        check(ranks, *job)
