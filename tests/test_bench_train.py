"""`bench train` without a GPU: its loop over stand-ins, its table and its picture."""

import contextlib
import gc
import json
import math
import os
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from harness import clean_slate, sites, without_codegen
from torch import Tensor, nn
from torch._inductor import config as inductor_config

import inductor_ce
from inductor_ce.bench import cli
from inductor_ce.bench.shared.alone import alone
from inductor_ce.bench.shared.peers import NotOffered
from inductor_ce.bench.train import command, models, render, run, systems
from inductor_ce.bench.train.programs import PROGRAMS

V = 2048
TINY = models.Model("Tiny", B=2, S=8, V=V, configuration="None", sizes={}, liger="none_of_liger")
LENGTH = run.Length(rounds=1, warm_up=1, steps=2)


class Tiny(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(V, 16), nn.Linear(16, V, bias=False)

    def forward(self, input_ids: Tensor, labels: Tensor) -> Any:
        logits = self.head(torch.tanh(self.embed(input_ids)))
        loss = F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten())
        return SimpleNamespace(loss=loss, logits=logits)


class Event:
    def __init__(self, **_: Any) -> None: ...

    def record(self) -> None: ...

    def synchronize(self) -> None: ...

    def elapsed_time(self, other: "Event") -> float:
        return 2.0


@contextlib.contextmanager
def without_a_gpu() -> Iterator[None]:
    names = ("synchronize", "reset_peak_memory_stats", "empty_cache")
    patches = {name: lambda *a: None for name in names}
    patched = mock.patch.multiple(torch.cuda, Event=Event, max_memory_allocated=lambda: 2**30, **patches)
    uncollected = mock.patch.object(
        gc, "collect", lambda *_: 0
    )  # of all that other tests left, 1 s each time
    with patched, uncollected, without_codegen():
        yield


def case(model: nn.Module) -> dict[str, Any]:
    made = model, torch.randint(V, (2, 8))
    with without_a_gpu(), mock.patch.object(run, "make", lambda model: made):
        (found,) = run.table([TINY], list(systems.SYSTEMS.values()), LENGTH)
    return found


@pytest.fixture(scope="module")
def measured() -> SimpleNamespace:
    """What is found of a model, the model, and the pass that is installed afterwards."""
    with clean_slate():
        model = Tiny()
        return SimpleNamespace(found=case(model), model=model, left=inductor_config.pre_grad_custom_pass)


def test_every_system_is_compared_with_plain(measured: SimpleNamespace):
    found = measured.found
    rows = {row["system"]: row for row in found["rows"]}
    plain, ours, nan = "torch.compile", "inductor_ce", 'inductor_ce, returned_logits="nan"'
    assert list(rows) == [plain, ours, nan]
    assert [rows[name]["logits"] for name in rows] == ["Tensor", "LazyLogits", "Tensor"]
    assert [rows[name]["counts"].get("sites", 0) for name in rows] == [0, 1, 1]
    assert all(row["loss_difference"] < 1e-5 and row["gradient_difference"] < 1e-5 for row in rows.values())
    assert [row["ratio"] for row in rows.values()] == [1.0, 1.0, 1.0]
    assert [each["system"] for each in found["not_measured"]] == ["liger_kernel"]
    assert measured.left is None
    assert not [p for p in measured.model.parameters() if p.grad is not None]


class Student(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.lm_head = nn.Embedding(V, 16), nn.Linear(16, V, bias=False)

    def forward(self, input_ids: Tensor, use_cache: bool) -> Any:
        return SimpleNamespace(logits=self.lm_head(torch.tanh(self.embed(input_ids))))


@pytest.mark.parametrize("program", ["distilled", "gkd"])
def test_a_student_and_its_teacher_are_compiled_apart(program: str):
    """Neither's logits are made: both heads are in the graph of the loss."""
    model, tokens, found = Student(), torch.randint(V, (2, 8)), []
    for ours in (False, True):
        torch._dynamo.reset()
        with contextlib.ExitStack() as stack:
            stack.enter_context(without_codegen())
            if ours:
                stack.enter_context(inductor_ce.install())
            step = stack.enter_context(PROGRAMS[program](model, ours))
            loss, kind = step(tokens)
            loss.backward()
        found.append((loss.detach(), *(p.grad for p in model.parameters())))
        model.zero_grad()
        assert kind == ("LazyLogits" if ours else "Tensor")
        assert sites() == ours
    for theirs, made in zip(*found, strict=True):
        assert theirs.count_nonzero() > 0
        torch.testing.assert_close(made, theirs)
    assert type(model.lm_head).forward is model.lm_head.forward.__func__


def test_what_fails_is_told():
    class Broken(Tiny):
        def forward(self, input_ids: Tensor, labels: Tensor) -> Any:
            raise RuntimeError("out of luck")

    found = case(Broken())
    assert found["rows"] == []
    assert {each["reason"] for each in found["not_measured"]} >= {"failed: RuntimeError: out of luck"}
    assert command.failed(found)


def interrupt(signal: int) -> None:
    os.kill(os.getpid(), signal)


@pytest.mark.parametrize(
    ("what", "args", "reason"),
    [
        (math.log, (0,), "failed: ValueError: "),
        (interrupt, (9,), "failed: its process ended with exit code -9"),
        (time.sleep, (600,), "failed: not done after 1 s"),
    ],
)
def test_a_peer_harms_nobody(what: Any, args: tuple[Any, ...], reason: str):
    found = alone(what, *args, limit_s=1 if what is time.sleep else 60, start="fork")
    assert isinstance(found, NotOffered)
    assert found.reason.startswith(reason)


def test_a_peer_gives_its_figures():
    """From its own process; `fork` takes the stand-ins for CUDA along."""
    peer = systems.System("a peer", patch="its patch")
    given = Tiny(), torch.randint(V, (2, 8))
    patches = mock.patch.multiple(run, make=lambda model: given, alone=partial(alone, start="fork"))
    no_patch = {"find": lambda *a: None, "_patched": lambda *a: contextlib.nullcontext()}
    with without_a_gpu(), patches, mock.patch.multiple(systems, **no_patch):
        (found,) = run.table([TINY], [systems.System("torch.compile"), peer], LENGTH)
    if "Autograd-and-Fork" in str(found["not_measured"]):
        pytest.skip("a CUDA build of torch does not fork once it has been through a backward")
    assert found["not_measured"] == []
    plain, its = found["rows"]
    assert (plain["system"], its["system"]) == ("torch.compile", "a peer")
    assert its["loss_difference"] < 1e-6


def test_without_transformers():
    with mock.patch.object(models, "find", lambda module, name: NotOffered(f"{module} is not installed")):
        found = next(run.table([TINY], [systems.System("torch.compile")], LENGTH))
    assert found["not_measured"] == [{"system": "torch.compile", "reason": "transformers is not installed"}]


def test_table_and_picture(tmp_path: Path, measured: SimpleNamespace):
    where = {
        "gpu": "A GPU",
        "torch": "2.13",
        "triton": "3.6",
        "commit": "abc",
        "dirty": False,
        "date": "2026-11-28",
    }
    result = {"environment": where, "cases": [measured.found]}
    lines = render.table(result).splitlines()
    assert lines[2] == "Tiny: 2 x 8 tokens, V = 2048, logits 0 MB"
    assert lines[4].split()[:5] == ["torch.compile", "2.0", "0.0%", "1.000", lines[4].split()[4]]
    render.plot(result, tmp_path / "train.png")
    assert (tmp_path / "train.png").read_bytes().startswith(b"\x89PNG")


def test_merging(tmp_path: Path):
    where = {"gpu": "A GPU", "torch": "2.13", "triton": "3.6", "commit": "abc", "peers": {}, "dirty": False}
    where["date"] = "2026-11-28T10:00:00"
    for i, name in enumerate(("one", "two")):
        case = {"model": name, "B": 2, "S": 8, "V": V, "logits_bytes": 1, "rows": [], "not_measured": []}
        record = {
            "benchmark": "train",
            "environment": where,
            "cases": [case],
        }
        (tmp_path / f"{i}.json").write_text(json.dumps(record))
    paths = [str(tmp_path / f"{i}.json") for i in range(2)]
    assert cli.main(["train", "--merge", *paths, "--out", str(tmp_path)]) == 0
    (path,) = tmp_path.glob("train-*-merged.json")
    assert [case["model"] for case in json.loads(path.read_text())["cases"]] == ["one", "two"]


def test_there_must_be_a_gpu(capsys: pytest.CaptureFixture[str]):
    with mock.patch("torch.cuda.is_available", lambda: False):
        assert cli.main(["train"]) == 2
    assert "nothing was measured" in capsys.readouterr().err
