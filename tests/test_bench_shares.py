"""The benchmark of the head over ignored labels, as far as a CPU can tell."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from harness import without_codegen
from test_bench_head import CASE, KINDS, RESULT, ROW

from inductor_ce.bench import cli
from inductor_ce.bench.head import bars, command, inputs, reference, render, run
from inductor_ce.bench.head.cases import over_shares, title
from inductor_ce.bench.head.inputs import SHAPES, Shape
from inductor_ce.bench.head.systems import SYSTEMS, Case
from inductor_ce.bench.shared import measure, record
from inductor_ce.bench.shared.compilers import DEFAULT, GRAPHS
from inductor_ce.bench.shared.labels import PATTERNS, RUNS, SCATTERED, Labels, of_share
from inductor_ce.bench.shared.losses import IGNORED

TINY = Shape("tiny", 60, 1100, 24, bias=True, labels=Labels(0.85, SCATTERED))
N = 16384


@pytest.mark.parametrize("share", [0.5, 0.75, 0.85, 0.9])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_the_share_is_ignored(pattern: str, share: float):
    mask = Labels(share, pattern).mask(N)
    assert mask.double().mean() == pytest.approx(share, abs=1 / 2048)  # a run has whole labels
    assert torch.equal(mask, Labels(share, pattern).mask(N))


def test_runs_are_the_starts_of_sequences():
    mask = Labels(0.75, RUNS).mask(N).view(8, 2048)
    lengths = mask.sum(1)
    assert len(set(lengths.tolist())) == 8
    assert lengths.min() > 1000
    assert torch.equal(mask, torch.arange(2048) < lengths[:, None])
    assert torch.equal(Labels(0.5, RUNS).mask(10), torch.arange(10) < 5)


def test_scattered_labels_are_independent():
    """How often a label and the next are both ignored: by the square of the share."""
    mask = Labels(0.5, SCATTERED).mask(N)
    assert (mask[1:] & mask[:-1]).double().mean() == pytest.approx(0.25, abs=0.01)


def test_some_label_is_left():
    for N in (2, 5, 36, 4097):
        assert not any(Labels(0.999, pattern).mask(N).all() for pattern in PATTERNS)


def test_usual_labels():
    assert Labels().mask(35).nonzero()[:, 0].tolist() == [0, 17, 34]
    assert [str(each) for each in (Labels(), Labels(0.0), Labels(0.75, RUNS))] == [
        "every 17th ignored",
        "none ignored",
        "75 % ignored, runs",
    ]
    assert not of_share(0.0, PATTERNS)[0].mask(9).any()


def test_other_labels_of_the_same_inputs():
    given = inputs.random(TINY, "cpu")
    some = given.ignoring(Labels(0.5, RUNS)).ignoring(Labels(0.25, SCATTERED))
    assert (some.h is given.h, some.W is given.W) == (True, True)
    assert (some.y == IGNORED).sum() == 15
    assert some.about["ignored"] == 0.25
    left = some.y != IGNORED
    assert torch.equal(some.y[left], given.drawn[left])
    assert not (given.drawn == IGNORED).any()


@pytest.mark.parametrize("slab", [60 * 7, 2**27])
def test_reference_with_a_bias(slab: int):
    given = inputs.random(TINY, "cpu")
    ref = reference.reference(given, slab)
    h, W, b = (x.detach().double().requires_grad_() for x in given.leaves.values())
    loss = F.cross_entropy(F.linear(h, W, b), given.y, ignore_index=IGNORED)
    assert ref.loss == pytest.approx(loss.item(), rel=1e-12)
    for found, expected in zip(
        (ref.dh, ref.dW, ref.db[0]), torch.autograd.grad(loss, (h, W, b)), strict=True
    ):
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-14)


@pytest.fixture(scope="module")
def cases() -> list[dict]:
    """Both modes, without the clock: every step takes a millisecond."""
    asked = run.Asked(
        [TINY],
        ["random"],
        ["torch.compile", "inductor_ce"],
        [label for share in (0, 0.5) for label in of_share(share, PATTERNS)],
        [DEFAULT, GRAPHS],
    )
    with pytest.MonkeyPatch.context() as patch, without_codegen():
        patch.setattr(measure.Calls, "time_ms", lambda self, step: [step(), 1.0][1])
        patch.setattr(measure, "peak_extra_bytes", lambda step: 2**20)
        patch.setattr(torch.cuda, "synchronize", lambda: None)
        return list(run.table(asked, measure.Calls(rounds=1), "cpu"))


def test_a_case_for_each_mode_share_and_pattern(cases: list[dict]):
    expected = [(0.0, ""), (0.5, RUNS), (0.5, SCATTERED)]
    assert [(case["mode"], case["ignored"], case["pattern"]) for case in cases] == [
        (mode, *labels) for mode in (DEFAULT, GRAPHS) for labels in expected
    ]
    for case in cases:
        assert case.keys() == CASE.keys()
        assert [row["system"] for row in case["rows"]] == ["torch.compile", "inductor_ce"]
        assert [row["problems"] for row in case["rows"]] == [[], []]
        assert {"dh norm", "dW norm", "db norm"} < case["rows"][1]["error_ratio"].keys()
        assert case["not_measured"] == []
        in_pool = case["mode"] == GRAPHS
        assert all((row["extra_bytes"] is None) == in_pool for row in case["rows"])
        assert case["behind"] == (not in_pool)
        assert case["forward"] == []
        assert not command.failed(case)


def test_rendering(cases: list[dict], tmp_path: Path):
    result = {**RESULT, "cases": [*cases, CASE]}
    result["bars"] = bars.bars(result)
    json.dumps(result)
    text = render.table(result)
    assert "tiny, 60 x 1100 x 24, random, 50 % ignored, runs, reduce-overhead: loss" in text
    (table,) = (part for part in text.split("\n\n") if part.startswith("over shares"))
    lines = [line.split() for line in table.splitlines()]
    assert lines[1][-6:] == ["ignored", "1.00", "1.000", "1.00", "1.000", "1.000"]
    assert lines[2][-6:] == ["1.00", "1.000", "0.570", "1.00", "1.000", "1.000"]
    assert len(lines) == 7
    errors = [bar for bar in result["bars"] if bar["what"].startswith("error")]
    assert len(errors) == len(cases) + len(KINDS)  # the worst alone, where shares make many cases
    assert all(bar["met"] for bar in errors[: len(cases)])
    render.plot(result, tmp_path / "head.png")
    assert (tmp_path / "head.png").read_bytes().startswith(b"\x89PNG")


def case(ms: float, plain_ms: float = 48.0, **changes) -> dict:
    ours = {**ROW, "system": "inductor_ce", "ms": ms, "ratio": ms / plain_ms}
    about = {**CASE["about"], "ignored": changes["ignored"]}
    return {**CASE, "pattern": RUNS, "about": about, "rows": [{**ROW, "ms": plain_ms}, ours], **changes}


def found(result: dict) -> list[tuple]:
    return [
        (bar["case"], bar["what"], pytest.approx(bar["value"]), pytest.approx(bar["limit"]), bar["met"])
        for bar in bars.bars(result)
        if not bar["what"].startswith("error")
    ]


@pytest.mark.parametrize(("mode", "limit", "met"), [(DEFAULT, 0.30, False), (GRAPHS, 0.36, True)])
def test_bars_of_a_share(mode: str, limit: float, met: bool):
    whole = case(47.0, ignored=0.0, pattern="", mode=mode)
    part = case(14.6, ignored=0.75, mode=mode)
    where = "gemma, random, 75 % ignored, runs" + (", reduce-overhead" if mode == GRAPHS else "")
    of_all, of_plain = "time of that with none ignored", "time of plain compile's"
    assert found({"cases": [part, whole]}) == [
        (where, of_all, 14.6 / 47, 0.30, False),
        (where, of_plain, 14.6 / 48, limit, met),
    ]
    part = case(14.0, ignored=0.75, mode=mode)
    assert [line[-1] for line in found({"cases": [part, whole]})] == [True, True]
    assert found({"cases": [part]})[0][-1] is None
    other = case(1.0, ignored=0.0, pattern="", mode=({DEFAULT, GRAPHS} - {mode}).pop())
    assert found({"cases": [part, other]})[0][-1] is None


def test_bars_of_mlm():
    part = case(0.9, 2.5, ignored=0.85, name="mlm")
    assert found({"cases": [part]})[1][1:] == (
        "time of plain compile's",
        0.36,
        0.35,
        False,
    )


def test_bars_against_a_version_before(tmp_path: Path):
    before = {**RESULT, "cases": [CASE, case(46.0, ignored=0.0), case(30.0, ignored=0.5)]}
    (tmp_path / "before.json").write_text(json.dumps(before))
    told = bars.earlier(tmp_path / "before.json")
    assert [*told["ms"].values()] == [47.0, 46.0]
    result = {**RESULT, "before": told, "cases": [case(46.4, ignored=0.0), case(46.5, ignored=0.0)]}
    assert [line[1:] for line in found(result)] == [
        ("time of that before, before.json", 46.4 / 46, 1.01, True),
        ("time of that before, before.json", 46.5 / 46, 1.01, False),
    ]
    elsewhere = copy.deepcopy(result)
    elsewhere["environment"]["gpu"] = "another"
    assert [line[-1] for line in found(elsewhere)] == [None, None]


def test_a_record_keeps_what_was_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    result = {**copy.deepcopy(RESULT), "cases": [CASE]}
    result["environment"] |= {key: record.environment()[key] for key in ("gpu", "torch")}
    (tmp_path / "before.json").write_text(json.dumps(result))
    monkeypatch.setattr(run, "table", lambda asked, clock: iter([CASE]))
    options = cli.parse(["head", "--before", str(tmp_path / "before.json"), "--out", str(tmp_path)])
    command.measured(options)
    (path,) = tmp_path.glob("head-*.json")
    kept = json.loads(path.read_text())
    assert kept["before"]["ms"] == {"gemma, random": 47.0}
    assert [bar["value"] for bar in kept["bars"] if "before" in bar["what"]] == [1.0]


def test_records_of_before_have_no_labels():
    old = {key: value for key, value in CASE.items() if key not in ("mode", "ignored", "pattern", "bias")}
    assert title(old) == "gemma, random"
    assert len(bars.bars({"cases": [old]})) == 7 + len(KINDS)
    assert over_shares([old, old]) == []


def test_arguments():
    asked = command.asked(cli.parse(["head", "--ignored", "0", "0.5"]))
    assert [shape.name for shape in asked.shapes] == ["llama", "qwen"]
    assert asked.labels == [Labels(0.0), Labels(0.5, RUNS), Labels(0.5, SCATTERED)]
    assert (asked.activations, asked.modes) == (["random"], (DEFAULT, GRAPHS))
    assert asked.systems == {"torch.compile", "inductor_ce"}
    assert asked.total == 2 * 3 * 2 * 2
    asked = command.asked(
        cli.parse(["head", "--ignored", "0.9", "--patterns", RUNS, "--shapes", "mlm", "--modes", GRAPHS])
    )
    assert (asked.shapes, asked.labels) == ([SHAPES["mlm"]], [Labels(0.9, RUNS)])
    assert asked.modes == [GRAPHS]
    assert command.asked(cli.parse(["head"])).inputs_of(SHAPES["mlm"])[0] == (
        "random",
        Labels(0.85, SCATTERED),
    )


@pytest.mark.parametrize("share", ["1", "-0.1", "many"])
def test_no_share(share: str, capsys: pytest.CaptureFixture):
    with pytest.raises(SystemExit):
        cli.parse(["head", "--ignored", share])
    assert "--ignored" in capsys.readouterr().err


def test_peers_are_given_the_bias(monkeypatch: pytest.MonkeyPatch):
    def cce(e, c, targets, bias=None, ignore_index=None, impl=None):
        return bias

    monkeypatch.setattr("inductor_ce.bench.head.systems.find", lambda module, name: cce)
    built = SYSTEMS["cce"].build(Case(TINY))
    assert (built.function(1, 2, 3, 4), built.function(1, 2, 3)) == (4, None)


@pytest.mark.skipif(not hasattr(torch.nn, "LinearCrossEntropyOptions"), reason="no chunks of its own")
def test_torchs_own_with_a_bias():
    given = inputs.random(TINY, "cpu")
    found = given.step(SYSTEMS["linear_cross_entropy"].build(Case(TINY)).function)
    errors = reference.reference(given).errors(*found[1:])
    assert max(each.norm for each in errors.values()) < 2e-2


def test_short_steps_are_called_more_often(monkeypatch: pytest.MonkeyPatch):
    calls = []

    class Event:
        def __init__(self, **_: object) -> None: ...

        def record(self) -> None: ...

        def elapsed_time(self, other: Event) -> float:
            return calls[0]

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    for ms, expected in ((30.0, 3), (4.0, 3 + 11), (0.1, 3 + 101)):
        calls[:] = [ms]
        assert measure.Calls(rounds=1).time_ms(lambda: calls.append(0.0)) == ms
        assert len(calls) - 1 == expected
