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
import torch.distributed as dist
from harness import without_codegen
from ranks import spawn
from test_bench import RESULT as RESULT_OF_CE
from torch.distributed import _functional_collectives as functional

from inductor_ce.bench import cli
from inductor_ce.bench.shared import measure, options
from inductor_ce.bench.shared.compilers import DEFAULT, GRAPHS, OURS
from inductor_ce.bench.tp import bars, check, command, ranks, render, run, systems
from inductor_ce.bench.tp.run import Asked
from inductor_ce.bench.tp.systems import BASELINE, EAGER, ENGINE, LIGER, PLAIN, SYSTEMS, System
from inductor_ce.bench.tp.tasks import LinearAndLoss, LogitsGiven, RichLoss, SequenceAndLoss

N, V, WIDTH = 35, 1030, 16
TASKS = {
    "loss": LogitsGiven,
    "rich": RichLoss,
    "linear": functools.partial(LinearAndLoss, width=WIDTH),
    "sequence": functools.partial(SequenceAndLoss, width=WIDTH),
}

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
    "ahead": True,
    "share": 0.25,
    "wall_ms": 3.0,
    "wall_spread": 0.02,
    "host_ms": 2.75,
    "ratio": 1.0,
    "wall_ratio": 1.0,
    "host_ratio": 1.0,
    "memory_ratio": 1.0,
}
SHAPE = {
    "N": 64,
    "V": 1024,
    "ranks": 2,
    "logits_bytes": 64 * 2**20,
    "all_gather_ms": 0.013,
    "rows": [
        ROW,
        {
            **ROW,
            "system": OURS,
            "sites": 1,
            "ms": 0.5,
            "ratio": 0.25,
            "collective_ms": 0.1,
            "share": 0.2,
            "wall_ms": 2.7,
            "wall_ratio": 0.9,
            "host_ms": 4.0,
            "memory_ratio": 0.5,
            "ahead": True,
        },
        {**ROW, "system": PLAIN, "ratio": 4.0, "problems": ["logits: error nan, above 4.1e-03"]},
        {**ROW, "mode": GRAPHS, "system": OURS, "ratio": None, "extra_bytes": None, "ahead": False},
    ],
    "not_measured": [{"task": "loss", "mode": GRAPHS, "system": BASELINE, "reason": "failed on rank 1: no"}],
}
RESULT = {**RESULT_OF_CE, "benchmark": "tp", "shapes": [SHAPE]}
command.judge(RESULT)


# In the ranks


def every_part_but_the_clock(step: Any, count: int, products: int = 0) -> list[float]:
    for _ in range(count):
        step()
    return [2.0 if products else 3.0] * count


def without_a_clock() -> Any:
    """Steps are taken, in step, but neither timed nor weighed."""
    return mock.patch.multiple(
        ranks,
        step_ms=every_part_but_the_clock,
        collective_ms=lambda step, products: 0.25,
        host_ms=lambda step: 4.0,
        products_for=lambda host_ms: 7,
        are_ahead=lambda step, products: products == 7,
        FEWEST=1,
        MOST=1,
    )


def on_rank(rank: int, folder: str) -> dict[str, Any]:
    with without_a_clock(), without_codegen(), mock.patch.object(measure, "peak_extra_bytes", lambda _: rank):
        budget = ranks.InStep(rounds=1)
        asked = Asked([(N, V)], ["loss", "rich", "linear"], modes=[DEFAULT])
        (found,) = run.table(asked, budget, "cpu", TASKS)
        asked = Asked([(N, V)], ["sequence"], [OURS], [DEFAULT])
        (shared,) = run.table(asked, budget, "cpu", TASKS)
        found["rows"] += shared["rows"]
        with mock.patch.dict(run.SYSTEMS, stand_ins(rank), clear=True):
            (odd,) = run.table(Asked([(N, V)], ["loss"]), budget, "cpu", TASKS)
        told = ranks.slowest([1.0 + rank, 3.0 - rank])
        with mock.patch.dict("os.environ", RANK=str(rank)):
            given = cli.parse(["tp", "--quick", "--out", folder])
            status = command.measured(given, lambda asked, budget: [found | {"asked": asked.shapes}])
    return {"found": found, "odd": odd, "told": told, "status": status}


def stand_ins(rank: int) -> dict[str, System]:
    """A system whose gradient is wrong on the last rank, one that fails on it, and one that is eager."""

    def wrong(task: Any, mode: str) -> Any:
        function = task.function()
        return lambda held, y: (1 + 0.1 * rank) * function(held, y)

    def fails(task: Any, mode: str) -> Any:
        if rank == 1:
            raise RuntimeError("no such kernel\nand more")
        return task.function()

    def of_rows(task: Any, mode: str) -> Any:
        return systems.of_rows(task, rows_of_shards)

    context = SYSTEMS[EAGER].context
    made = {OURS: System(wrong, context), PLAIN: System(fails), EAGER: SYSTEMS[EAGER]}
    return {**made, LIGER: System(of_rows, modes=(DEFAULT,)), ENGINE: SYSTEMS[ENGINE]}


def rows_of_shards(z: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """The losses of rows as a peer gives them, which has V / 2 columns on each rank."""
    start = dist.get_rank() * (V // 2)
    top = functional.all_reduce(z.detach().float().amax(-1), "max", dist.group.WORLD)
    own = (y >= start) & (y < start + V // 2)
    picked = z.float().gather(1, torch.where(own, y - start, 0)[:, None])[:, 0].where(own, 0.0)
    parts = torch.stack([(z.float() - top[:, None]).exp().sum(-1), picked])
    total = parts + (functional.all_reduce(parts.detach(), "sum", dist.group.WORLD) - parts.detach())
    return torch.where(y == -100, 0.0, total[0].log() + top - total[1])


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
    absent = {LIGER: "liger_kernel is not installed", ENGINE: "transformer_engine is not installed"}
    assert found["not_measured"] == [
        {"task": "loss", "mode": DEFAULT, "system": name, "reason": why} for name, why in absent.items()
    ]
    assert [(row["task"], row["system"]) for row in found["rows"]] == [
        ("loss", PLAIN),
        ("loss", EAGER),
        ("loss", BASELINE),
        ("loss", OURS),
        ("rich", PLAIN),
        ("rich", OURS),
        *(("linear", name) for name in (PLAIN, EAGER, BASELINE, OURS)),
        *(("sequence", name) for name in (BASELINE, OURS)),
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
    times = (
        "ms",
        "wall_ms",
        "host_ms",
        "share",
        "ratio",
        "wall_ratio",
        "host_ratio",
        "memory_ratio",
        "ahead",
    )
    told = {tuple(row[key] for key in times) for row in found["rows"]}
    assert told == {(2.0, 3.0, 4.0, 0.125, 1.0, 1.0, 1.0, 1.0, True)}
    assert of_ranks[0]["told"] == of_ranks[1]["told"] == [2.0, 3.0]


def test_gradients_stay_shards(of_ranks: list[dict[str, Any]]):
    for row in of_ranks[0]["found"]["rows"]:
        name, sharded = ("logits", "S(1)") if row["task"] in ("loss", "rich") else ("W", "S(0)")
        assert row["placements"][name] == sharded
        if row["task"] == "sequence":
            assert row["placements"]["h"] == "S(0)"


def test_what_one_rank_sees_all_record(of_ranks: list[dict[str, Any]]):
    """A failure on the second rank alone, and errors of its shard alone; the others go on."""
    odd = of_ranks[0]["odd"]
    assert odd == of_ranks[1]["odd"]
    reason, absent = "failed on rank 1: RuntimeError: no such kernel", "transformer_engine is not installed"
    assert odd["not_measured"] == [
        {"task": "loss", "mode": mode, "system": system, "reason": why}
        for mode, system, why in (
            (DEFAULT, PLAIN, reason),
            (DEFAULT, ENGINE, absent),
            (GRAPHS, PLAIN, reason),
        )
    ]
    ran = [(row["mode"], row["system"]) for row in odd["rows"]]
    assert ran == [(DEFAULT, OURS), (DEFAULT, EAGER), (DEFAULT, LIGER), (GRAPHS, OURS)]
    row, eager, of_rows, graphs = odd["rows"]
    assert row["errors"]["loss"] == pytest.approx(0.1, rel=1e-3)
    assert row["errors"]["logits"] == pytest.approx(0.1, rel=0.05)
    assert [problem.split(":")[0] for problem in row["problems"]] == [
        "loss",
        "logits",
        "no loss was rewritten",
    ]
    assert (eager["problems"], eager["ratio"]) == ([], None)
    assert (of_rows["problems"], of_rows["placements"]["logits"]) == ([], "S(1)")
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


def test_what_is_asked():
    asked = command.asked(cli.parse(["tp"]))
    assert (list(asked.tasks), list(asked.modes), set(asked.systems)) == (
        [*TASKS],
        [DEFAULT, GRAPHS],
        {*SYSTEMS},
    )
    assert asked.total == 2 * (6 + 2 + 4 + 4 + 3 + 2 + 3 + 3)
    assert command.asked(cli.parse(["tp", "--quick"])).modes == [DEFAULT]
    given = ["tp", "--quick", "--tasks", "rich", "loss", "--modes", GRAPHS, "--systems", OURS]
    asked = command.asked(cli.parse(given))
    assert (asked.tasks, asked.modes) == (["rich", "loss"], [GRAPHS])
    assert [[*asked.systems_of(task, GRAPHS)] for task in asked.tasks] == [[PLAIN, OURS], [BASELINE, OURS]]


def test_hosts_have_work_enough_before_them(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(ranks, "_product_ms", lambda: 1.6)
    assert 1.6 * ranks.products_for(14.0) >= 2 * 14 + 5 > 1.6 * (ranks.products_for(14.0) - 1)


def test_table():
    heading, shape, limits = render.table(RESULT).split("\n\n")
    assert heading.startswith("A GPU, torch 2.11.0, triton 3.6.0, commit 0123456, with changes")
    lines = shape.splitlines()
    assert lines[0] == (
        "64 x 1024 over 2 ranks: logits 64 MB in all; all-gather of statistics 0.013 ms by itself"
    )
    words = [[cell.strip() for cell in line.split("  ") if cell.strip()] for line in lines[1:6]]
    assert words[0] == [word for word in render.HEADER if word]
    assert words[1][:9] == ["loss", DEFAULT, BASELINE, "2.000", "1.5%", "1.000", "0.500", "25%", "3.000"]
    assert words[1][9:15] == ["2.0%", "1.000", "2.75", "1.000", "64", "1.000"]
    assert words[1][15:] == ["loss 1.2e-07, logits 1.5e-03", "2.5"]
    assert words[2][2:8] == [OURS, "0.500", "1.5%", "0.250", "0.100", "20%"]
    assert words[3][-1] == "logits: error nan, above 4.1e-03"
    assert words[4][:6] == ["loss", GRAPHS, OURS, "2.000", "1.5%", "0.500"]
    assert words[4][-1] == "the host was not ahead"
    assert lines[6:] == [f"{BASELINE} (loss, {GRAPHS}): failed on rank 1: no"]
    told = [[cell.strip() for cell in line.split("  ") if cell.strip()] for line in limits.splitlines()]
    case = "64 x 1024, loss, default (on 2 ranks; limits are of 4)"
    assert told[1:3] == [
        ["met", case, "GPU time of loss_parallel's", "0.25", "0.27"],
        ["MISSED", case, "ms of the host beyond loss_parallel's", "1.25", "1"],
    ]
    assert [line[0] for line in told[3:]] == ["not measured", "not measured"]


def test_bars():
    """Every bar of the two tasks that have some; the GPU's time counts where hosts were ahead."""
    beside = {**ROW, "host_ms": 3.0}
    ours = {**ROW, "system": OURS, "ratio": 0.9, "wall_ratio": 1.01, "memory_ratio": 0.3, "host_ms": 4.0}
    both = [{**row, "task": "linear"} for row in (beside, ours)]
    found = bars.bars({"shapes": [{**SHAPE, "ranks": 4, "rows": both}]})
    assert {bar["case"] for bar in found} == {"64 x 1024, linear, default"}
    assert [(bar["value"], bar["met"]) for bar in found] == [
        (0.9, True),
        (0.3, True),
        (1.01, False),
        (1.0, True),
    ]
    both[0]["ahead"] = False
    late, *others = bars.bars({"shapes": [{**SHAPE, "ranks": 4, "rows": both}]})
    assert (late["value"], late["met"]) == (None, None)
    assert others == found[1:]


def test_records_are_put_together(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """As a table of several calls is, those of one shape at one place."""
    paths = [tmp_path / f"{name}.json" for name in "abc"]
    for path, V in zip(paths, (1024, 2048, 1024), strict=True):
        path.write_text(json.dumps({**RESULT, "shapes": [{**SHAPE, "V": V}]}))
    assert cli.main(["tp", "--merge", *map(str, paths), "--out", str(tmp_path)]) == 0
    (merged,) = tmp_path.glob("tp-*-merged.json")
    result = json.loads(merged.read_text())
    assert [shape["V"] for shape in result["shapes"]] == [1024, 2048]
    assert [len(shape["rows"]) for shape in result["shapes"]] == [2 * len(SHAPE["rows"]), len(SHAPE["rows"])]
    assert len(result["bars"]) == 2 * len(RESULT["bars"])
    assert "64 x 2048 over 2 ranks" in capsys.readouterr().out


def test_plot(tmp_path: Path):
    render.plot(RESULT, tmp_path / "tp.png")
    assert (tmp_path / "tp.png").read_bytes().startswith(b"\x89PNG")


def test_method_is_recorded():
    method = run.method(ranks.InStep(rounds=7))
    assert {
        "step",
        "ms",
        "ahead",
        "wall_ms",
        "host_ms",
        "share",
        "collective_ms",
        "errors",
        "rounds",
    } <= method.keys()
    json.dumps(method)
