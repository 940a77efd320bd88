"""The benchmark of the head, as far as a CPU can tell: inputs, reference, systems, bars, renderings."""

from __future__ import annotations

import copy
import json
import logging
import math
import sys
import types
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from harness import without_codegen
from torch import Tensor

from inductor_ce.bench import cli
from inductor_ce.bench.head import bars, check, command, inputs, reference, render, run, systems, trained
from inductor_ce.bench.head.inputs import SHAPES, Inputs, Shape
from inductor_ce.bench.head.systems import BUDGETS, SYSTEMS, Built, Case
from inductor_ce.bench.shared import body, measure
from inductor_ce.bench.shared.losses import IGNORED
from inductor_ce.bench.shared.options import NO_GPU
from inductor_ce.bench.shared.peers import NotOffered
from inductor_ce.common.options import option_names

TINY = Shape("tiny", 36, 1100, 24)
MB = 2**20

ERRORS = {"norm": 2e-3, "worst_row": 3e-3, "largest_row": 1e-3}
KINDS = [f"{gradient} {kind}" for gradient in ("dh", "dW") for kind in ERRORS]
ROW = {
    "system": "torch.compile",
    "budget": None,
    "extra_bytes": 5161 * MB,
    "beyond_gradients": 4000 * MB,
    "loss_error": 1.25e-6,
    "dh": ERRORS,
    "dW": ERRORS,
    "first_call_s": 2.5,
    "counted": {},
    "notes": [],
    "problems": [],
    "ms": 48.0,
    "spread": 0.015,
    "round_ms": [47.9, 48.0, 48.5],
    "host_ms": 2.0,
    "wall_ms": 48.5,
    "ratio": 1.0,
    "memory_ratio": 1.0,
    "error_ratio": dict.fromkeys(KINDS, 1.0),
}
FORWARD = {key: ROW[key] for key in ("system", "loss_error", "first_call_s", "counted", "notes", "problems")}
FORWARD |= {"extra_bytes": 500 * MB, "ms": 15.0, "spread": 0.01, "round_ms": [15.0], "of_product": 1.05}
FORWARD |= {"host_ms": 1.0, "wall_ms": 15.5}


def row_of_ours(name: str, ms: float, beyond: int, **changes) -> dict:
    about = {
        "budget": SYSTEMS[name].budget,
        "ms": ms,
        "ratio": ms / 48,
        "counted": {"sites": 1, "token_chunks": 1},
    }
    memory = {
        "extra_bytes": (beyond + 1161) * MB,
        "beyond_gradients": beyond * MB,
        "memory_ratio": beyond / 4000,
    }
    return {**ROW, "system": name, **about, **memory, **changes}


CASE = {
    "name": "gemma",
    "N": 8192,
    "V": 256000,
    "D": 2304,
    "bias": False,
    "activations": "random",
    "mode": "default",
    "ignored": None,
    "pattern": "",
    "behind": False,
    "about": {"loss": 12.9, "mean_max_probability": 0.0004, "ignored": 1 / 17},
    "logits_bytes": 4000 * MB,
    "gradient_bytes": 1161 * MB,
    "product_ms": 14.3,
    "products_ms": 43.2,
    "rows": [
        ROW,
        {
            **ROW,
            "system": "cce",
            "ms": 54.0,
            "ratio": 1.125,
            "extra_bytes": 1163 * MB,
            "beyond_gradients": 2 * MB,
        },
        {**ROW, "system": "cce_exact", "ms": 212.0, "ratio": 4.417, "notes": ["no cce_exact"]},
        row_of_ours("inductor_ce", 47.0, 1000),
        row_of_ours("inductor_ce@0.5", 46.5, 2000),
        row_of_ours("inductor_ce@0.125", 51.0, 500, error_ratio={**ROW["error_ratio"], "dW norm": 1.2}),
        row_of_ours("inductor_ce@cce+30%", 55.0, 340),
    ],
    "forward": [{**FORWARD, "system": "inductor_ce"}],
    "seconds": 93.0,
    "not_measured": [{"system": "auto_chunker", "reason": "this torch has no auto_chunker.enable"}],
}
RESULT = {
    "benchmark": "head",
    "environment": {
        "gpu": "A GPU",
        "torch": "2.11.0",
        "triton": "3.6.0",
        "commit": "0123456",
        "peers": {},
        "dirty": False,
        "date": "2026-11-24T14:25:00+00:00",
    },
    "method": {},
    "cases": [CASE],
    "bars": [],
}
RESULT["bars"] = bars.bars(RESULT)


@pytest.fixture
def stopwatch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every step is called once and takes a millisecond; memory is not measured."""

    def time_ms(self, step):
        step()
        return 1.0

    monkeypatch.setattr(measure.Calls, "time_ms", time_ms)
    monkeypatch.setattr(measure, "peak_extra_bytes", lambda step: 2**20)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)


def by_autograd(given: Inputs) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    h, W = (x.detach().double().requires_grad_() for x in (given.h, given.W))
    z = h @ W.T
    z = z if given.cap is None else given.cap * torch.tanh(z / given.cap)
    loss = F.cross_entropy(z, given.y, ignore_index=IGNORED)
    return loss, *torch.autograd.grad(loss, (h, W))


@pytest.mark.parametrize("cap", [None, 0.5])
@pytest.mark.parametrize("slab", [1, 36 * 7, 2**27])
def test_reference_is_autograds(slab: int, cap: float | None):
    given = inputs.random(replace(TINY, cap=cap), "cpu")
    ref = reference.reference(given, slab)
    loss, dh, dW = by_autograd(given)
    assert ref.loss == pytest.approx(loss.item(), rel=1e-12)
    torch.testing.assert_close(ref.dh, dh, rtol=1e-10, atol=1e-14)
    torch.testing.assert_close(ref.dW, dW, rtol=1e-10, atol=1e-14)
    assert (given.y == IGNORED).sum() == 3


def test_errors_see_a_wrong_row():
    ref = torch.tensor([[3.0, 4.0], [0.3, 0.4], [0.0, 0.0]], dtype=torch.float64)
    g = ref.clone()
    assert reference.distance(g, ref) == reference.Errors(0.0, 0.0, 0.0)
    g[1] = 0
    found = reference.distance(g, ref)
    assert found.norm == pytest.approx(0.5 / math.sqrt(25.25))
    assert (found.worst_row, found.largest_row) == (pytest.approx(1.0), pytest.approx(0.1))
    g[2] = 1e-9
    assert reference.distance(g, ref).worst_row == math.inf
    g[0] = math.nan
    assert all(map(math.isnan, (reference.distance(g, ref).norm, reference.distance(g, ref).worst_row)))


def test_training_peaks_the_softmax_and_repeats():
    budget = trained.Training(steps=20, tokens=256, chunk=128)
    given, again = (inputs.from_training(TINY, "cpu", budget) for _ in range(2))
    flat = inputs.random(TINY, "cpu")
    assert given.about["mean_max_probability"] > 3 * flat.about["mean_max_probability"]
    assert given.about["loss"] < flat.about["loss"]
    assert given.about["training"]["steps_done"] == 20
    assert given.h.dtype == given.W.dtype == torch.bfloat16
    assert (given.h.shape, given.W.shape) == ((36, 24), (1100, 24))
    assert torch.equal(given.h, again.h)
    assert torch.equal(given.W, again.W)


def test_training_stops_in_time():
    steps = inputs.from_training(TINY, "cpu", trained.Training(tokens=64, seconds=0)).about["training"]
    assert steps["steps_done"] == 0


def assert_right(name: str, case: Case) -> None:
    given = inputs.random(case.shape, "cpu")
    built = SYSTEMS[name].build(case)
    if isinstance(built, NotOffered):
        pytest.skip(built.reason)
    loss, dh, dW = given.step(built.function)
    ref = reference.reference(given)
    assert not check.problems(loss.dtype, ref.loss_error(loss), ref.errors(dh, dW))


in_code = pytest.mark.with_all("its graphs, further below; code of heads in test_head_memory.py")


@pytest.mark.parametrize("name", [pytest.param("inductor_ce", marks=in_code), "linear_cross_entropy"])
def test_systems_agree_with_float64(name: str):
    assert_right(name, Case(TINY))


@pytest.mark.parametrize("name", ["torch.compile", "auto_chunker"])
def test_graphs_of_systems_agree_with_float64(name: str):
    with without_codegen():
        assert_right(name, Case(TINY))


@pytest.mark.skipif("strategy" not in option_names(), reason="inductor_ce has no strategies yet")
@pytest.mark.parametrize("name", [name for name in SYSTEMS if name.startswith("inductor_ce")])
def test_strategies_agree_with_float64(name: str):
    with without_codegen():
        assert_right(name, Case(TINY, {"cce": TINY.gradient_bytes + 10**4}))


def test_a_soft_cap_agrees_with_float64():
    shape = replace(TINY, cap=0.5)
    with without_codegen():
        assert_right("inductor_ce", Case(shape))
    given = inputs.random(shape, "cpu")
    uncapped = given.step(inputs.cross_entropy)[1]
    assert reference.distance(uncapped, reference.reference(given).dh).norm > 0.1


def test_an_option_is_asked_of_torch():
    assert systems.is_option("max_autotune", True)
    assert not systems.is_option("auto_chunker.no_such_option", 1)


def test_absent_peers_say_so():
    reasons = {name: SYSTEMS[name].build(Case(TINY)) for name in ("liger_kernel", "cce", "cce_exact")}
    for name, built in reasons.items():
        assert isinstance(built, (NotOffered, Built)), name


def test_quack_is_called_in_chunks(monkeypatch: pytest.MonkeyPatch):
    """A bias it has not; and its loggers have a key once it is found, and not before."""
    called: list[dict[str, object]] = []

    def chunked(h: Tensor, W: Tensor, y: Tensor, **options: object) -> Tensor:
        called.append(options)
        return F.cross_entropy(h @ W.t(), y)

    module = types.ModuleType("quack.linear_cross_entropy")
    module.chunked_linear_cross_entropy = chunked
    monkeypatch.delattr(logging.Logger, "__quack_semantic_key__", raising=False)
    assert isinstance(SYSTEMS["quack@2048"].build(Case(TINY)), NotOffered)
    assert not hasattr(logging.Logger, "__quack_semantic_key__")
    monkeypatch.setitem(sys.modules, "quack", types.ModuleType("quack"))
    monkeypatch.setitem(sys.modules, "quack.linear_cross_entropy", module)
    h, W, y = torch.randn(4, 8), torch.randn(9, 8), torch.arange(4)
    each = [("quack@2048", 2048, False), ("quack@4096", 4096, False), ("quack_scaled_exp", 2048, True)]
    for name, rows, scaled in each:
        built = SYSTEMS[name].build(Case(TINY))
        assert isinstance(built, Built)
        assert torch.equal(built.function(h, W, y), F.cross_entropy(h @ W.t(), y))
        expected = {"chunk_size": rows, "ignore_index": -100, "tuned": False, "use_scaled_exp": scaled}
        assert called.pop() == expected
        assert isinstance(SYSTEMS[name].build(Case(replace(TINY, bias=True))), NotOffered)
    assert logging.getLogger("one").__quack_semantic_key__() == "one"
    monkeypatch.delattr(logging.Logger, "__quack_semantic_key__")


def test_what_the_compiler_wrapped_is_the_reason():
    error = RuntimeError("backend raised:\nmore")
    error.inner_exception = ValueError("unknown option 'strategy'\nand more")
    assert NotOffered.because(error).reason == "failed: ValueError: unknown option 'strategy'"


def test_the_exact_variant_of_each_release(monkeypatch: pytest.MonkeyPatch):
    def old(e, c, targets, ignore_index, filter_eps="high", impl="cce"):
        return filter_eps, impl

    def new(e, c, targets, ignore_index, accum_c_fp32=False, impl="cce"):
        return impl

    monkeypatch.setattr(systems, "find", lambda module, name: old)
    built = SYSTEMS["cce_exact"].build(Case(TINY))
    assert built.function(1, 2, 3) == (None, "cce")
    assert "no cce_exact" in built.note
    monkeypatch.setattr(systems, "find", lambda module, name: new)
    built = SYSTEMS["cce_exact"].build(Case(TINY))
    assert (built.function(1, 2, 3), built.note) == ("cce_exact", "")


def test_the_budget_that_cce_gives(monkeypatch: pytest.MonkeyPatch):
    given = {}
    monkeypatch.setattr(systems, "ours", lambda case, **options: given.update(options) or Built(print))
    shape = SHAPES["gemma"]
    systems.ours_with_room_of_cce(Case(shape, {"cce": 2 * shape.gradient_bytes}))
    assert given["memory_budget"] == pytest.approx(1.6 * shape.gradient_bytes, abs=1)
    assert isinstance(systems.ours_with_room_of_cce(Case(shape)), NotOffered)


def test_shapes():
    assert SHAPES["gemma"].gradient_bytes == 2 * (8192 + 256000) * 2304
    assert SHAPES["qwen"].logits_bytes == 2 * 16384 * 151936
    assert [str(shape) for shape in SHAPES.values()] == [
        "8192 x 256000 x 2304",
        "8192 x 256000 x 2304, soft-cap 30",
        "8192 x 128256 x 4096",
        "16384 x 151936 x 896",
        "16384 x 30522 x 768",
    ]


def eager(case: Case) -> Built:
    return Built(case.shape.head, "in eager")


def fails(case: Case) -> Built:
    raise RuntimeError("no such kernel\nand more")


def halved(case: Case) -> Built:
    return Built(lambda h, W, y: 0.5 * case.shape.head(h, W, y))


def test_the_loop_on_a_cpu(stopwatch, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """Every part but the clock, with stand-ins: eager, one that fails, one that is wrong."""
    built = {"torch.compile": eager, "liger_kernel": fails, "inductor_ce": halved}
    stand_ins = {name: systems.System(name, SYSTEMS[name].kind, build) for name, build in built.items()}
    monkeypatch.setattr(run, "SYSTEMS", stand_ins)
    activations = {"random": inputs.random, "again": inputs.random}
    monkeypatch.setattr(run, "ACTIVATIONS", activations)
    asked = run.Asked([TINY], list(activations), list(stand_ins))
    cases = list(run.table(asked, measure.Calls(rounds=2), "cpu"))
    assert [case["activations"] for case in cases] == ["random", "again"]
    for case in cases:
        assert case.keys() == CASE.keys()
        rows = {row["system"]: row for row in case["rows"]}
        assert list(rows) == ["torch.compile", "inductor_ce"]
        assert all(row.keys() == ROW.keys() for row in rows.values())
        assert rows["torch.compile"]["problems"] == []
        assert rows["torch.compile"]["notes"] == ["in eager"]
        assert rows["torch.compile"]["error_ratio"] == dict.fromkeys(KINDS, 1.0)
        assert [problem.partition(":")[0] for problem in rows["inductor_ce"]["problems"]] == [
            "loss",
            "dh",
            "dW",
            "no loss was rewritten",
        ]
        assert [row["system"] for row in case["forward"]] == ["torch.compile", "inductor_ce"]
        assert all(row.keys() == FORWARD.keys() for row in case["forward"])
        reason = "failed: RuntimeError: no such kernel"
        assert [each["system"] for each in case["not_measured"]] == [
            "liger_kernel",
            "liger_kernel, forward alone",
        ]
        assert {each["reason"] for each in case["not_measured"]} == {reason}
        assert command.failed(case)
    result = {**RESULT, "cases": cases}
    json.dumps(result)
    render.table({**result, "bars": bars.bars(result)})
    render.plot(result, tmp_path / "head.png")


def test_the_host_is_timed_apart(monkeypatch: pytest.MonkeyPatch):
    """Of a step of 2 ms, whose work on the GPU takes 5 more; a first call is not counted."""
    now = [0.0]
    monkeypatch.setattr(measure.time, "perf_counter", lambda: now[0])

    def passes(seconds: float):
        now[0] += seconds

    calls: list[float] = []

    def step():
        calls.append(0.0)
        passes(0.002 if len(calls) > 1 else 1.0)

    ends = iter([0.0, 0.005] * 3)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: passes(next(ends)))
    assert measure.host_and_wall_ms(step, 3) == pytest.approx((2.0, 7.0))
    assert len(calls) == 4


def test_a_body_may_be_left_out():
    assert body._times == [body.TIMES]
    with body.without_work():
        assert body._times[-1] == 0
    assert body._times == [body.TIMES]


def test_older_records_have_no_host():
    case = copy.deepcopy(CASE)
    for row in case["rows"]:
        row.pop("host_ms")
    whats = {bar["what"] for bar in bars.bars({**RESULT, "cases": [case]})}
    assert "ms of the host beyond plain compile's" not in whats
    assert render.table({**RESULT, "cases": [case]})


def test_only_peers_may_fail():
    case = copy.deepcopy(CASE)
    assert not command.failed(case)
    case["not_measured"].append({"system": "liger_kernel, forward alone", "reason": "failed: …"})
    case["not_measured"].append({"system": "inductor_ce@cce+30%", "reason": "cce was not measured"})
    assert not command.failed(case)
    case["not_measured"].append({"system": "inductor_ce, forward alone", "reason": "failed: …"})
    assert command.failed(case)


def test_bars():
    found = {bar["what"]: bar for bar in RESULT["bars"]}
    met = {what: bar["met"] for what, bar in found.items()}
    assert [what for what, each in met.items() if not each] == [
        "error of plain compile's, dW norm, worst in inductor_ce@0.125"
    ]
    assert found["time of plain compile's"]["value"] == pytest.approx(47 / 48)
    assert found["memory of plain compile's"]["value"] == pytest.approx(0.25)
    assert found["inductor_ce@cce+30%: time of cce_exact's"]["value"] == pytest.approx(55 / 212)
    assert found["inductor_ce@cce+30%: memory of cce's"]["value"] == pytest.approx(1501 / 1163)
    assert found["forward alone: time of the product's"]["value"] == 1.05
    assert found["ms of the host beyond plain compile's"]["value"] == 0.0
    assert len(found) == 7 + len(KINDS)


def test_bars_without_peers_or_baseline():
    case = copy.deepcopy(CASE)
    case["rows"] = [{**case["rows"][3], "ratio": None, "memory_ratio": None, "error_ratio": None}]
    case["forward"] = []
    found = bars.bars({"cases": [case]})
    assert len(found) == 6
    assert {bar["met"] for bar in found} == {None}


def test_nan_misses_its_bar():
    case = copy.deepcopy(CASE)
    case["rows"][3]["error_ratio"]["dh norm"] = math.nan
    (found,) = [bar for bar in bars.bars({"cases": [case]}) if "dh norm" in bar["what"]]
    assert found["met"] is False
    assert found["what"].endswith("worst in inductor_ce")


def test_table():
    where, case, bar_table = (
        render.table(RESULT).split("\n\n")[0:1] + render.table(RESULT).split("\n\n")[1::2]
    )
    assert where == "A GPU, torch 2.11.0, triton 3.6.0, commit 0123456, 2026-11-24T14:25:00+00:00"
    lines = case.splitlines()
    assert lines[0].startswith("gemma, 8192 x 256000 x 2304, random: loss 12.900, ")
    assert lines[0].endswith("logits 4000 MB, gradients 1161 MB; product 14.30 ms, three 43.20 ms")
    assert lines[2].split()[:6] == ["torch.compile", "48.00", "1.5%", "1.000", "2.00", "48.50"]
    assert lines[2].split()[6:9] == ["5161", "4000", "1.000"]
    assert lines[5].endswith("token_chunks 1")
    assert bar_table.splitlines()[1].split()[:2] == ["met", "gemma,"]
    assert sum(line.startswith("MISSED") for line in bar_table.splitlines()) == 1
    assert "auto_chunker: this torch has no auto_chunker.enable" in render.table(RESULT)


def test_plot(tmp_path: Path):
    render.plot(RESULT, tmp_path / "head.png")
    assert (tmp_path / "head.png").read_bytes().startswith(b"\x89PNG")


def test_arguments():
    options = cli.parse(["head"])
    assert not options.merge
    assert command.asked(options) == run.Asked(list(SHAPES.values()), ["random", "trained"], set(SYSTEMS))
    asked = command.asked(
        cli.parse(["head", "--shapes", "qwen", "64x2048x32", "--activations", "random", "--systems", "cce"])
    )
    assert asked.shapes == [SHAPES["qwen"], Shape("64x2048x32", 64, 2048, 32)]
    assert (asked.activations, asked.systems) == (["random"], {"torch.compile", "cce"})
    assert len([name for name in SYSTEMS if SYSTEMS[name].budget]) == len(BUDGETS)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--shapes", "mistral"],
            "'mistral' is none of gemma, gemma2, llama, qwen, mlm, nor like 8192x128256x4096",
        ),
        (["--shapes", "1x2048x32"], "'1x2048x32' needs two of everything at least"),
        (["--systems", "quack"], "invalid choice: 'quack'"),
    ],
)
def test_bad_arguments(arguments: list[str], message: str, capsys: pytest.CaptureFixture):
    with pytest.raises(SystemExit) as stopped:
        cli.parse(["head", *arguments])
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def test_refuses_without_a_gpu(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert cli.main(["head"]) == 2
    assert capsys.readouterr().err == NO_GPU + "\n"


@pytest.mark.parametrize(("problem", "status"), [([], 0), (["dW: error nan, above 5e-02"], 1)])
def test_the_record_is_complete_after_every_case(
    problem: list[str], status: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    kept = []

    def table(asked, clock):
        for name in asked.activations:
            kept.extend(json.loads(path.read_text())["cases"] for path in tmp_path.glob("head-*.json"))
            yield {**CASE, "activations": name, "rows": [{**ROW, "problems": problem}]}

    monkeypatch.setattr(run, "table", table)
    options = cli.parse(["head", "--shapes", "gemma", "--out", str(tmp_path), "--commit", "given"])
    assert command.measured(options) == status
    assert [case["activations"] for cases in kept for case in cases] == ["random"]
    (path,) = tmp_path.glob("head-*.json")
    assert [case["activations"] for case in json.loads(path.read_text())["cases"]] == ["random", "trained"]
    assert path.with_suffix(".png").exists()


def test_merging(tmp_path: Path, capsys: pytest.CaptureFixture):
    other = {**RESULT, "cases": [{**CASE, "activations": "trained"}]}
    foreign = {**RESULT, "environment": {**RESULT["environment"], "gpu": "another GPU"}}
    paths = []
    for i, result in enumerate((RESULT, other, foreign)):
        paths.append(str(tmp_path / f"{i}.json"))
        Path(paths[-1]).write_text(json.dumps(result))
    out = tmp_path / "out"
    assert cli.main(["head", "--merge", *paths[:2], "--out", str(out)]) == 0
    result = json.loads((out / "head-a-gpu-20261124T142500Z-merged.json").read_text())
    assert [case["activations"] for case in result["cases"]] == ["random", "trained"]
    assert result["merged"] == ["0.json", "1.json"]
    assert len(result["bars"]) == 2 * len(RESULT["bars"])
    assert (out / "head-a-gpu-20261124T142500Z-merged.png").exists()
    assert cli.main(["head", "--merge", *paths, "--out", str(out)]) == 2
    assert "is of another gpu: another GPU, not A GPU" in capsys.readouterr().out
