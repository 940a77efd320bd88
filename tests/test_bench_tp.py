"""The benchmark over ranks, as far as CPUs can tell: every system is built and checked, nothing is timed."""

from __future__ import annotations

import copy
import functools
import json
import runpy
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from harness import without_codegen
from ranks import spawn
from releases import before
from test_bench import RESULT as RESULT_OF_CE

from inductor_ce.bench import cli
from inductor_ce.bench.shared import measure, options
from inductor_ce.bench.shared.compilers import DEFAULT, GRAPHS, OURS
from inductor_ce.bench.tp import check, command, ranks, render, run
from inductor_ce.bench.tp.systems import BASELINE, EAGER, PLAIN, SYSTEMS, System
from inductor_ce.bench.tp.tasks import LinearAndLoss, LogitsGiven

N, V, WIDTH = 35, 1030, 16
TASKS = {"loss": LogitsGiven, "linear": functools.partial(LinearAndLoss, width=WIDTH)}

ROW = {
    "task": "loss",
    "mode": DEFAULT,
    "system": BASELINE,
    "extra_bytes": 64 * 2**20,
    "collective_ms": 0.5,
    "errors": {"loss": 1.25e-7, "logits": 1.5e-3},
    "placements": {"loss": "R", "logits": "S(1)"},
    "first_call_s": 2.5,
    "sites": 0,
    "problems": [],
    "ms": 2.0,
    "spread": 0.015,
    "round_ms": [1.99, 2.0, 2.02],
    "ratio": 1.0,
}
SHAPE = {
    "N": 64,
    "V": 1024,
    "ranks": 2,
    "logits_bytes": 64 * 2**20,
    "all_gather_ms": 0.013,
    "rows": [
        ROW,
        {**ROW, "system": OURS, "ms": 1.0, "ratio": 0.5, "sites": 1, "collective_ms": 0.1},
        {**ROW, "system": PLAIN, "ratio": 4.0, "problems": ["logits: error nan, above 4.1e-03"]},
        {**ROW, "mode": GRAPHS, "system": OURS, "ratio": None, "extra_bytes": None},
    ],
    "not_measured": [{"task": "loss", "mode": GRAPHS, "system": BASELINE, "reason": "failed on rank 1: no"}],
}
RESULT = {**RESULT_OF_CE, "benchmark": "tp", "shapes": [SHAPE]}


# In the ranks


def every_part_but_the_clock(step: Any, count: int) -> list[float]:
    for _ in range(count):
        step()
    return [1.0] * count


def without_a_clock() -> Any:
    """Steps are taken, in step, but neither timed nor weighed."""
    return mock.patch.multiple(
        ranks, step_ms=every_part_but_the_clock, collective_ms=lambda step: 0.25, FEWEST=1, MOST=1
    )


def on_rank(rank: int, folder: str) -> dict[str, Any]:
    with without_a_clock(), without_codegen(), mock.patch.object(measure, "peak_extra_bytes", lambda _: rank):
        budget = ranks.InStep(rounds=1)
        (found,) = run.table([(N, V)], budget, "cpu", TASKS, [DEFAULT])
        with mock.patch.dict(run.SYSTEMS, stand_ins(rank), clear=True):
            (odd,) = run.table([(N, V)], budget, "cpu", {"loss": LogitsGiven}, [DEFAULT, GRAPHS])
        told = ranks.slowest([1.0 + rank, 3.0 - rank])
        with mock.patch.dict("os.environ", RANK=str(rank)):
            given = cli.parse(["tp", "--quick", "--out", folder])
            status = command.measured(given, lambda shapes, budget: [found | {"asked": shapes}])
    return {"found": found, "odd": odd, "told": told, "status": status}


def stand_ins(rank: int) -> dict[str, System]:
    """A system whose gradient is wrong on the last rank, one that fails on it, and one that is eager."""

    def wrong(function: Any, mode: str) -> Any:
        return lambda held, y: (1 + 0.1 * rank) * function(held, y)

    def fails(function: Any, mode: str) -> Any:
        if rank == 1:
            raise RuntimeError("no such kernel\nand more")
        return function

    context = SYSTEMS[EAGER].context
    return {OURS: System(wrong, context), PLAIN: System(fails), EAGER: SYSTEMS[EAGER]}


# In the test's process


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("results")


@pytest.fixture(scope="module")
def of_ranks(folder: Path) -> list[dict[str, Any]]:
    return spawn(on_rank, 2, str(folder))


def test_every_system_runs_and_is_right(of_ranks: list[dict[str, Any]]):
    found = of_ranks[0]["found"]
    assert found == of_ranks[1]["found"]
    assert found["not_measured"] == []
    assert [(row["task"], row["system"]) for row in found["rows"]] == [
        (task, system) for task in TASKS for system in SYSTEMS
    ]
    assert [row["problems"] for row in found["rows"]] == [[]] * len(found["rows"])
    assert not command.failed(found)


def test_only_ours_is_rewritten(of_ranks: list[dict[str, Any]]):
    for row in of_ranks[0]["found"]["rows"]:
        assert row["sites"] == (row["system"] == OURS)


def test_what_is_recorded(of_ranks: list[dict[str, Any]]):
    """The largest over the ranks, and the fields that the rendering reads."""
    found = of_ranks[0]["found"]
    assert found.keys() == SHAPE.keys()
    assert all(row.keys() == ROW.keys() for row in found["rows"])
    assert {row["extra_bytes"] for row in found["rows"]} == {1}
    assert {row["ms"] for row in found["rows"]} == {1.0}
    assert of_ranks[0]["told"] == of_ranks[1]["told"] == [2.0, 3.0]


def test_gradients_stay_shards(of_ranks: list[dict[str, Any]]):
    """But for plain compile, which up to torch 2.13 gathers logits: every rank has the whole gradient."""
    for row in of_ranks[0]["found"]["rows"]:
        name, sharded = ("logits", "S(1)") if row["task"] == "loss" else ("W", "S(0)")
        if row["system"] != PLAIN:
            assert row["placements"][name] == sharded
        elif before(2, 14):
            assert row["placements"][name] == "R"


def test_what_one_rank_sees_all_record(of_ranks: list[dict[str, Any]]):
    """A failure on the second rank alone, and errors of its shard alone; the others go on."""
    odd = of_ranks[0]["odd"]
    assert odd == of_ranks[1]["odd"]
    reason = "failed on rank 1: RuntimeError: no such kernel"
    assert odd["not_measured"] == [
        {"task": "loss", "mode": mode, "system": PLAIN, "reason": reason} for mode in (DEFAULT, GRAPHS)
    ]
    ran = [(row["mode"], row["system"]) for row in odd["rows"]]
    assert ran == [(DEFAULT, OURS), (DEFAULT, EAGER), (GRAPHS, OURS)]
    row, eager, graphs = odd["rows"]
    assert row["errors"]["loss"] == pytest.approx(0.1, rel=1e-3)
    assert row["errors"]["logits"] == pytest.approx(0.1, rel=0.05)
    assert [problem.split(":")[0] for problem in row["problems"]] == [
        "loss",
        "logits",
        "no loss was rewritten",
    ]
    assert (eager["problems"], eager["ratio"]) == ([], None)
    assert graphs["extra_bytes"] is None
    assert command.failed(odd)


def test_the_first_rank_writes(of_ranks: list[dict[str, Any]], folder: Path):
    (path,) = folder.glob("tp-*.json")
    (shape,) = json.loads(path.read_text())["shapes"]
    assert shape["asked"] == [list(run.SHAPES[0])]
    assert path.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    assert [rank["status"] for rank in of_ranks] == [0, 0]


def test_only_ours_must_work():
    assert not command.failed(SHAPE)
    wrong, absent = copy.deepcopy(SHAPE), copy.deepcopy(SHAPE)
    wrong["rows"][1]["problems"].append("loss: error nan, above 1.0e-05")
    absent["not_measured"][0]["system"] = OURS
    assert command.failed(wrong)
    assert command.failed(absent)


def test_nan_is_the_largest_error():
    assert check._largest(iter([0.1, float("nan"), 0.2])) != check._largest(iter([0.1, 0.2]))


def test_collectives_are_the_kernels_of_nccl():
    kernels = [
        ("ncclDevKernel_AllGather_RING_LL(ncclDevKernelArgsStorage<4096ul>)", 700.0),
        ("ncclKernel_AllReduce_RING_LL_Sum_float", 300.0),
        ("nccl:_all_gather_base", 700.0),
        ("triton_red_fused_0", 9000.0),
    ]
    assert ranks.in_collectives_ms(kernels) == 1.0


TORCHRUN = {"RANK": "0", "WORLD_SIZE": "4", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "4", "MASTER_ADDR": "here"}


@pytest.mark.parametrize(
    ("gpus", "environment", "what"),
    [
        (0, TORCHRUN, "no GPU: torch.cuda sees none here"),
        (4, {}, f"no ranks: this process was not started by torchrun; try {ranks.COMMAND}"),
        (4, {**TORCHRUN, "WORLD_SIZE": "1"}, "one rank alone: the vocabulary is sharded over two at least"),
        (2, TORCHRUN, "4 ranks on a machine with 2 GPUs: each needs one of its own"),
        (4, TORCHRUN, None),
    ],
)
def test_what_is_missing(
    gpus: int, environment: dict[str, str], what: str | None, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    found = ranks.missing(environment)
    assert found is None if what is None else found is not None and found.startswith(what)


def test_refuses_without_a_gpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["bench", "tp", "--out", str(tmp_path)])
    with pytest.raises(SystemExit) as stopped:
        runpy.run_module("inductor_ce.bench", run_name="__main__")
    assert stopped.value.code == 2
    assert capsys.readouterr().err.strip().endswith("no GPU: torch.cuda sees none here")
    assert not list(tmp_path.iterdir())


def test_arguments():
    assert options.shapes(cli.parse(["tp"]), run.SHAPES) == [(8192, 128256), (4096, 256000)]
    assert options.shapes(cli.parse(["tp", "--quick"]), run.SHAPES) == [(8192, 128256)]
    assert options.shapes(cli.parse(["tp", "--shapes", "16x32"]), run.SHAPES) == [(16, 32)]


def test_table():
    heading, shape = render.table(RESULT).split("\n\n")
    assert heading.startswith("A GPU, torch 2.11.0, triton 3.6.0, commit 0123456, with changes")
    lines = shape.splitlines()
    assert lines[0] == (
        "64 x 1024 over 2 ranks: logits 64 MB in all; all-gather of statistics 0.013 ms by itself"
    )
    cells = [line.split("  ") for line in lines[1:6]]
    words = [[cell.strip() for cell in line if cell.strip()] for line in cells]
    assert words[0][:4] == ["task", "mode", "system", "ms"]
    assert words[1][:9] == ["loss", DEFAULT, BASELINE, "2.000", "1.5%", "1.000", "0.500", "25%", "64"]
    assert words[1][9:] == ["loss 1.2e-07, logits 1.5e-03", "2.5"]
    assert words[2][2:8] == [OURS, "1.000", "1.5%", "0.500", "0.100", "10%"]
    assert words[3][-1] == "logits: error nan, above 4.1e-03"
    assert words[4][:6] == ["loss", GRAPHS, OURS, "2.000", "1.5%", "0.500"]
    assert lines[6:] == [f"{BASELINE} (loss, {GRAPHS}): failed on rank 1: no"]


def test_plot(tmp_path: Path):
    render.plot(RESULT, tmp_path / "tp.png")
    assert (tmp_path / "tp.png").read_bytes().startswith(b"\x89PNG")


def test_method_is_recorded():
    method = run.method(ranks.InStep(rounds=7))
    assert {"step", "ms", "ratio", "collective_ms", "extra_bytes", "errors", "rounds"} <= method.keys()
    json.dumps(method)
