"""The benchmark, as far as a CPU can tell: its losses, its command line, its records and its renderings."""

from __future__ import annotations

import ast
import copy
import json
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import inductor_ce
from inductor_ce.bench import cli, distil, divergences, recognise, rows
from inductor_ce.bench.ce import check, command, render, run, systems
from inductor_ce.bench.ce.inputs import Inputs
from inductor_ce.bench.shared import compilers, losses, measure, options, peers, record
from inductor_ce.bench.shared.against_plain import error, step_of
from inductor_ce.bench.shared.losses import IGNORED, LOSSES

ROW = {
    "loss": "plain",
    "system": "torch.compile",
    "extra_bytes": 64 * 2**20,
    "loss_error": 1.25e-7,
    "dz_error": 1.5e-3,
    "overwrites_logits": False,
    "first_call_s": 2.5,
    "sites": 0,
    "problems": [],
    "ms": 2.0,
    "spread": 0.015,
    "round_ms": [1.99, 2.0, 2.02],
    "ratio": 1.0,
}
RESULT = {
    "benchmark": "ce",
    "environment": {
        "cpu": "a CPU",
        "gpu": "A GPU",
        "torch": "2.11.0",
        "cuda": "13.0",
        "triton": "3.6.0",
        "python": "3.12.3",
        "inductor_ce": "0.1.0",
        "peers": {"liger_kernel": "0.8.5", "quack": None},
        "commit": "0123456",
        "dirty": True,
        "date": "2026-11-23T14:25:00+00:00",
    },
    "method": {},
    "shapes": [
        {
            "N": 64,
            "V": 1024,
            "logits_bytes": 64 * 2**20,
            "copy_ms": 0.5,
            "read_ms": 0.25,
            "two_pass_ms": 0.5,
            "three_pass_ms": 0.75,
            "copy_bytes_per_s": 4e12,
            "read_bytes_per_s": 4.2e12,
            "rows": [
                ROW,
                {**ROW, "system": "inductor_ce", "ms": 1.0, "ratio": 0.5, "sites": 1},
                {**ROW, "system": "liger_kernel", "overwrites_logits": True, "extra_bytes": 0},
                {**ROW, "loss": "smooth_z", "ratio": None, "problems": ["dz: error nan, above 4.1e-03"]},
            ],
            "not_measured": [
                {"loss": name, "system": "quack", "reason": "quack is not installed"}
                for name in ("plain", "smooth_z")
            ],
        }
    ],
}


@pytest.fixture
def stopwatch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every step is called once and takes a millisecond; memory is not measured."""

    def bench(step, **_):
        step()
        return 1.0

    monkeypatch.setattr(measure, "do_bench", bench)
    monkeypatch.setattr(measure, "peak_extra_bytes", lambda step: 0)


def small_inputs() -> Inputs:
    return Inputs.random(36, 50, "cpu")


@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
def test_losses_agree_with_float64(loss: losses.Loss):
    inputs = small_inputs()
    value, dz = inputs.step(loss.function)
    loss_error, dz_error = losses.errors(loss, inputs.pristine, inputs.y, value, dz)
    assert loss_error < 1e-6
    assert dz_error < torch.finfo(torch.bfloat16).eps / 2
    assert not dz[inputs.y == IGNORED].any()


@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
def test_errors_see_a_wrong_row(loss: losses.Loss):
    inputs = small_inputs()
    value, dz = inputs.step(loss.function)
    dz[-1] *= 1.1
    loss_error, dz_error = losses.errors(loss, inputs.pristine, inputs.y, value * 1.01, dz)
    assert loss_error == pytest.approx(0.01, rel=1e-3)
    assert dz_error > 0.01


@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
def test_ours_rewrites_every_loss(loss: losses.Loss):
    z, y = torch.randn(34, 1024, dtype=torch.bfloat16), torch.randint(0, 1024, (34,))
    report = inductor_ce.explain(loss.function, z, y)
    assert report.sites
    assert not report.misses


def test_fresh_copies_share_no_code():
    function = LOSSES["plain"].function
    a, b = compilers.fresh(function), compilers.fresh(function)
    assert len({id(f.__code__) for f in (function, a, b)}) == 3
    inputs = small_inputs()
    assert torch.equal(a(inputs.logits, inputs.y), function(inputs.logits, inputs.y))


def test_rounds_are_interleaved(stopwatch):
    order: list[str] = []
    steps = {name: lambda name=name: order.append(name) for name in "abc"}
    ticks: list[int] = []
    times = measure.interleaved(
        steps,
        measure.Budget(rounds=2),
        before_each=lambda: order.append("|"),
        after_each=lambda: ticks.append(1),
    )
    assert "".join(order) == "|a|b|c|c|b|a"
    assert times == {"a": [1.0, 1.0], "b": [1.0, 1.0], "c": [1.0, 1.0]}
    assert len(ticks) == 6


def test_median_and_spread():
    assert measure.median_and_spread([1.0, 2.0, 4.0]) == (2.0, 1.5)


def test_the_loop_on_a_cpu(stopwatch, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture):
    """Every part but the clock, with stand-ins: one that writes over its input, one wrong, one that fails."""

    def in_place(loss):
        def function(z, y):
            return Overwriting.apply(z, loss.function, y)

        return function

    def fails(loss):
        raise RuntimeError("no such kernel\nand more")

    stand_ins = {
        "eager": systems.eager,
        "torch.compile": systems.eager,
        "inductor_ce": lambda loss: lambda z, y: 1.1 * loss.function(z, y),
        "liger_kernel": in_place,
        "quack": fails,
    }
    monkeypatch.setattr(run, "SYSTEMS", stand_ins)
    (found,) = run.table([(36, 50)], [LOSSES["plain"]], measure.Budget(rounds=2), device="cpu")
    rows = {row["system"]: row for row in found["rows"]}
    assert found.keys() == RESULT["shapes"][0].keys()
    assert all(row.keys() == ROW.keys() for row in rows.values())
    assert [name for name, row in rows.items() if row["problems"]] == ["inductor_ce"]
    assert any("loss: error 1.0e-01" in problem for problem in rows["inductor_ce"]["problems"])
    assert "no loss was rewritten" in rows["inductor_ce"]["problems"]
    assert [name for name, row in rows.items() if row["overwrites_logits"]] == ["liger_kernel"]
    reason = "failed: RuntimeError: no such kernel"
    assert found["not_measured"] == [{"loss": "plain", "system": "quack", "reason": reason}]
    assert f"plain: quack left out: {reason}" in capsys.readouterr().err
    assert command.failed(found)


class Overwriting(torch.autograd.Function):
    """A loss whose gradient is written over its input in the forward, behind autograd's back."""

    @staticmethod
    def forward(ctx, z, function, y):
        with torch.enable_grad():
            x = z.detach().clone().requires_grad_()
            loss = function(x, y)
        ctx.dz = z.detach()
        ctx.dz.data.copy_(*torch.autograd.grad(loss, x))
        return loss.detach()

    @staticmethod
    def backward(ctx, upstream):
        return ctx.dz, None, None


def test_nan_is_a_problem():
    value, dz = torch.tensor(1.0), torch.ones(2, dtype=torch.bfloat16)
    assert check.problems_of(value, float("nan"), dz, 0.0) == ["loss: error nan, above 1.0e-05"]
    assert check.problems_of(value, 1e-6, dz, 5e-3) == ["dz: error 5.0e-03, above 4.1e-03"]


def test_only_peers_may_be_missing():
    found = copy.deepcopy(RESULT["shapes"][0])
    found["rows"].pop()
    assert not command.failed(found)
    found["not_measured"].append({"loss": "plain", "system": "inductor_ce", "reason": "failed: …"})
    assert command.failed(found)


def test_an_absent_peer_says_so():
    assert peers.find("absent_peer.losses", "f") == peers.NotOffered("absent_peer is not installed")


def test_a_broken_peer_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "broken_peer.py").write_text("import missing_part")
    monkeypatch.syspath_prepend(tmp_path)
    reason = "broken_peer cannot be imported: ModuleNotFoundError: No module named 'missing_part'"
    assert peers.find("broken_peer", "f") == peers.NotOffered(reason)


def test_arguments():
    given = cli.parse(["ce"])
    assert options.shapes(given, run.SHAPES) == [(8192, 128256), (8192, 32000), (4096, 256000)]
    assert given.losses == list(LOSSES)
    assert given.out == Path(cli.__file__).parent / "results"
    given = cli.parse(["ce", "--quick", "--losses", "plain", "--out", "elsewhere"])
    assert options.shapes(given, run.SHAPES) == [(8192, 128256)]
    assert (given.losses, given.out) == (["plain"], Path("elsewhere"))
    given = cli.parse(["ce", "--quick", "--shapes", "16x32", "8x8"])
    assert options.shapes(given, run.SHAPES) == [(16, 32), (8, 8)]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "the following arguments are required: command"),
        (["ce", "--shapes", "16by32"], "'16by32' is not like 8192x128256"),
        (["ce", "--shapes", "0x32"], "'0x32' needs two rows and two columns at least"),
        (["ce", "--losses", "focal"], "invalid choice: 'focal'"),
    ],
)
def test_bad_arguments(arguments: list[str], message: str, capsys: pytest.CaptureFixture):
    with pytest.raises(SystemExit) as stopped:
        cli.parse(arguments)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_help(name: str, capsys: pytest.CaptureFixture):
    with pytest.raises(SystemExit) as stopped:
        cli.parse([name, "--help"])
    assert stopped.value.code == 0
    assert "--out" in capsys.readouterr().out


def test_refuses_without_a_gpu(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert cli.main(["ce"]) == 2
    assert capsys.readouterr().err == options.NO_GPU + "\n"


def test_names_the_extra_that_is_missing(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delattr(inductor_ce, "bench")
    for name in [name for name in sys.modules if name.startswith("inductor_ce.bench")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "tqdm", None)
    with pytest.raises(SystemExit, match=r"needs tqdm: pip install 'inductor-ce\[bench\]'"):
        runpy.run_module("inductor_ce.bench", run_name="__main__")


def test_table():
    heading, shape = render.table(RESULT).split("\n\n")
    assert heading == (
        "A GPU, torch 2.11.0, triton 3.6.0, commit 0123456, with changes, 2026-11-23T14:25:00+00:00"
    )
    lines = shape.splitlines()
    assert lines[0] == (
        "64 x 1024: logits 64 MB; 2 passes 0.500 ms, 3 passes 0.750 ms (copy 4.00 TB/s, read 4.20 TB/s)"
    )
    assert lines[1].split("  ")[0] == "loss"
    assert lines[2].split()[:6] == ["plain", "torch.compile", "2.000", "1.5%", "1.000", "64"]
    assert lines[2].split()[6:] == ["1.2e-07", "1.5e-03", "2.5"]
    assert lines[3].split()[1:5] == ["inductor_ce", "1.000", "1.5%", "0.500"]
    assert lines[4].endswith("writes over the logits")
    assert lines[5].endswith("dz: error nan, above 4.1e-03")
    assert lines[6:] == ["quack (plain, smooth_z): quack is not installed"]


def test_plot(tmp_path: Path):
    render.plot(RESULT, tmp_path / "ce.png")
    assert (tmp_path / "ce.png").read_bytes().startswith(b"\x89PNG")


def test_record(tmp_path: Path):
    here = record.environment("given")
    assert here.keys() == RESULT["environment"].keys()
    assert here["torch"] == torch.__version__
    path = record.json_path(RESULT, tmp_path / "new")
    assert path == tmp_path / "new/ce-a-gpu-20261123T142500Z.json"
    record.write(RESULT, path)
    assert json.loads(path.read_text()) == RESULT


def test_method_is_recorded():
    method = run.method(measure.Budget(rounds=7))
    assert {"step", "ms", "ratio", "extra_bytes", "errors", "rounds", "warmup_ms", "rep_ms"} <= method.keys()
    json.dumps(method)


def test_commit_outside_a_repository(tmp_path: Path):
    (tmp_path / "__init__.py").touch()
    assert record.git_state(tmp_path) == (None, None)


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("name", distil.LOSSES)
def test_distillation_is_compared_with_its_formula(name: str, frozen: bool):
    given = distil.drawn(distil.shape("300x200x16x16"), frozen, "cpu", name)
    right, found = distil.exactly(name, given), step_of(distil.LOSSES[name], given, given.leaves)()
    wanted = {"loss", "dh"} | ({"dW"} if not frozen else set()) | ({"dt"} if name == distil.R_DROP else set())
    assert found.keys() == right.keys() == wanted
    assert all(error(found[part], right[part]) < 1e-2 for part in right)
    other = next(each for each in distil.LOSSES if each != name)
    assert error(found["dh"], distil.exactly(other, given)["dh"]) > 0.1


@pytest.mark.parametrize(("name", "moving"), divergences.CASES)
def test_divergences_are_compared_with_their_formulas(name: str, moving: str):
    z, t = divergences.drawn(300, 200, moving, "cpu")
    leaves = {"dz": z} | ({"dt": t} if moving == divergences.BOTH else {})
    right, found = divergences.exactly(name, z, t), step_of(divergences.LOSSES[name], (z, t), leaves)()
    assert found.keys() == right.keys() == {"loss", *leaves}
    assert all(error(found[part], right[part]) < 1e-2 for part in right)
    other = "JSD" if name == "symmetric KL" else "symmetric KL"
    assert error(found["dz"], divergences.exactly(other, z, t)["dz"]) > 0.1


@pytest.mark.parametrize("name", rows.LOSSES)
def test_rows_are_compared_with_their_definitions(name: str):
    (z, *given), loss = rows.drawn(70, 200, "cpu"), rows.LOSSES[name]
    given = [z.float(), *given]
    others = [each for each in rows.LOSSES.values() if each is not loss and each.which == loss.which]
    for way in (rows.by_one, rows.by_two):
        errors = rows.errors_of(rows.bound(way, loss, 200), loss, *given)
        assert errors["statistics"] < 1e-5
        assert errors["gradient"] < 1e-2
        for other in others:
            assert (
                rows.errors_of(rows.bound(way, other, 200), loss, *given)["gradient"]
                > 4 * errors["gradient"]
                > 0
            )


@pytest.mark.parametrize("name", rows.LOSSES)
def test_the_gradient_of_rows_is_that_of_the_loss(name: str):
    z, y, g = rows.drawn(70, 200, "cpu")
    z = z.double().requires_grad_()
    x = rows.SOFT_CAP * torch.tanh(z / rows.SOFT_CAP) if "soft-cap" in name else z
    smoothing = rows.SMOOTHING if "smoothing" in name else 0.0
    lse, picked = torch.logsumexp(x, 1), x.gather(1, y.clamp(min=0)[:, None])[:, 0] * (y >= 0)
    losses = lse - (1 - smoothing) * picked - smoothing * x.mean(1)
    losses = losses + rows.Z_LOSS * lse**2 * ("z-loss" in name)
    (wanted,) = torch.autograd.grad((losses * g).sum(), z)
    _, dz = rows.exactly(rows.LOSSES[name], z.detach(), y, g)
    torch.testing.assert_close(dz, wanted)


def test_rows_need_a_gpu(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert cli.main(["rows", "--shapes", "64x1024"]) == 2


def test_divergences_need_a_gpu(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert cli.main(["divergences", "--shapes", "64x1024"]) == 2
    with pytest.raises(SystemExit):
        cli.main(["divergences", "--shapes", "64"])


def test_distillation_needs_a_gpu(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert cli.main(["distil", "--shapes", "64x1024x16x16"]) == 2
    with pytest.raises(SystemExit):
        cli.main(["distil", "--shapes", "64x1024"])


def test_distillation_in_words():
    rows = [
        {"system": "torch.compile", "ms": 20.0, "beyond_gradients": 100 << 20, "errors": {"loss": 1e-3}},
        {"system": "inductor_ce", "ms": 10.0, "beyond_gradients": 25 << 20, "errors": {"loss": 1e-3}},
    ]
    rows[1] |= {"ratio": 0.5, "memory_ratio": 0.25}
    case = {"N": 4, "V": 5, "D": 6, "T": 7, "divergence": "forward", "weight": "frozen", "rows": rows}
    assert distil.table({"cases": [case]}) == (
        "4x5x6x7 forward, frozen weight: 10.00 ms of 20.00, 0.50x; 25 MB of 100, 0.25x; worst error 1.00x"
    )


def test_recognition_is_timed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(recognise, "ROUNDS", 1)
    monkeypatch.setattr(recognise, "IMPORTS", 1)
    monkeypatch.setattr(recognise, "NODES", 200)
    assert cli.main(["recognise", "--out", str(tmp_path)]) == 0
    (path,) = tmp_path.glob("recognise-*.json")
    found = json.loads(path.read_text())["found"]
    assert (found["without a loss"]["sites"], found["with a loss"]["sites"]) == (0, 1)
    assert found["with a loss"]["nodes"] > found["without a loss"]["nodes"] > 100
    assert "1 fused:" in capsys.readouterr().out


def test_importing_the_package_imports_nothing_heavy():
    """Neither torch, nor a module of its own."""
    code = "import sys; known = set(sys.modules); import inductor_ce; print(set(sys.modules) - known)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    found = {name for name in ast.literal_eval(out) if name.partition(".")[0] not in sys.stdlib_module_names}
    assert found == {"inductor_ce"}
