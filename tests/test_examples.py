"""The examples that train, with a smaller model and without code generation."""

from __future__ import annotations

import contextlib
import functools
import importlib
import io
import json
import os
import re
import subprocess
import sys
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from harness import clean_slate, without_codegen
from pairwise import EVERYTHING
from ranks import ranks_at_most, spawn

import inductor_ce
from inductor_ce.common.strategies import TOKEN_CHUNKS
from inductor_ce.heads.extra_memory import HeadNumbers
from inductor_ce.heads.plan import plan

EXAMPLES = Path(__file__).parent.parent / "examples"
STEPS = 3
CHILD = """
import json, sys, time
given = dict(zip(sys.argv[1::2], sys.argv[2::2]))
if given["--label"] == "fails":
    sys.exit(3)
before = time.perf_counter()
held = b"x" * 2**26
start = time.perf_counter()
time.sleep(0.3)
found = {"drawn": (start, time.perf_counter()), "rest_bytes": 2**20, "memory": [], "before": before}
with open(given["--json"], "w") as file:
    json.dump(found, file)
"""

SIZES = {"B": 2, "S": 16, "D": 16, "V": 1027, "layers": 1, "heads": 2}


@pytest.fixture
def examples(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The modules `quickstart`, `train` and `sampling`."""
    pytest.importorskip("matplotlib")
    pytest.importorskip("tokenizers")
    monkeypatch.syspath_prepend(EXAMPLES)
    with clean_slate():
        yield Namespace(
            **{name: importlib.import_module(name) for name in ("quickstart", "train", "sampling")}
        )


def write_tokens(folder: Path, V: int = SIZES["V"]) -> Path:
    """A corpus of chance, where the examples look for theirs."""
    tokens = torch.randint(0, V, (500,), generator=torch.Generator().manual_seed(0))
    path = folder / f"tokens-py{sys.version_info.major}.{sys.version_info.minor}-{V}.pt"
    torch.save(tokens.to(torch.int32), path)
    return path


@pytest.mark.parametrize(("device", "element"), [("cpu", 4), ("cuda", 2)])
def test_the_head_of_the_quickstart_is_worth_dividing(device: str, element: int, examples: Any):
    sizes = examples.train.Sizes.for_device(device)
    head = HeadNumbers(n=sizes.B * sizes.S, v=sizes.V, d=sizes.D, element=element, weight_element=element)
    planned = plan(head)
    assert planned.strategy == TOKEN_CHUNKS
    assert planned.extra_bytes < 0.4 * sizes.logits_bytes(device)


def test_memory_is_seen_from_outside(tmp_path: Path, examples: Any, monkeypatch: pytest.MonkeyPatch):
    """What the process of a run holds in the steps that are drawn, less what it holds between steps."""
    (tmp_path / "child.py").write_text(CHILD)
    monkeypatch.setattr(examples.quickstart, "TRAIN", tmp_path / "child.py")
    arguments = Namespace(out=tmp_path, steps=STEPS, device="cpu", untied=False)
    result = examples.quickstart.run("plain", tmp_path, arguments)
    curve = examples.quickstart.curve(result)
    assert len(curve) > 10
    assert all(0 <= seconds <= result["drawn"][1] - result["drawn"][0] for seconds, _ in curve)
    assert min(size for _, size in curve) >= 2**26 - 2**20
    assert any(at < result["before"] and size < 2**26 for at, size in result["memory"])
    monkeypatch.setitem(examples.quickstart.RUNS, "fails", ["--run", "plain"])
    with pytest.raises(subprocess.CalledProcessError, match="status 3"):
        examples.quickstart.run("fails", tmp_path, arguments)


@pytest.mark.skipif(torch.cuda.is_available(), reason="the example takes a GPU where there is one")
def test_quickstart(tmp_path: Path, examples: Any, monkeypatch: pytest.MonkeyPatch, capsys: Any):
    """All of it in this process: the same losses, and what is told of them."""
    quickstart, train, sampling = examples.quickstart, examples.train, examples.sampling
    write_tokens(tmp_path)

    def run(name: str, tokens: Path, arguments: Namespace) -> dict:
        path = tmp_path / "run.json"
        given = [*quickstart.RUNS[name], "--tokens", tokens, "--json", path, "--steps", arguments.steps]
        monkeypatch.setattr(sys, "argv", ["train.py", *map(str, given)])
        with sampling.sampled(lambda: sampling.resident_bytes(os.getpid())) as memory:
            train.main()
        return json.loads(path.read_text()) | {"memory": memory}

    monkeypatch.setattr(train.Sizes, "for_device", lambda device: train.Sizes(**SIZES))
    monkeypatch.setattr(quickstart, "run", run)
    monkeypatch.setattr(
        sys, "argv", ["quickstart.py", "--steps", str(train.WARM_UP + 2), "--out", str(tmp_path)]
    )
    with without_codegen():
        quickstart.main()
    told = capsys.readouterr().out
    assert "1 loss fused, 0 left as written" in told
    rows = [line.split() for line in told.splitlines() if re.match(r"\d+ .*\d\.\d{6}$", line)]
    assert [int(step) for step, *_ in rows] == list(range(train.WARM_UP + 2))
    for _, *losses in rows:
        assert list(map(float, losses)) == pytest.approx([float(losses[0])] * 4, abs=1e-5)
    assert re.search(
        r"A step adds -?\d+ MB with plain torch.compile and -?\d+ MB with inductor_ce: -?\d+ MB less", told
    )
    for picture in ("memory.png", "loss.png"):
        assert (tmp_path / picture).read_bytes().startswith(b"\x89PNG")


EVEN = {**SIZES, "V": 1028}


def on_rank(rank: int, ranks: int, folder: str) -> str:
    """What the example prints on this rank, whose process group is there already."""
    sys.path.insert(0, str(EXAMPLES))
    example, train = (importlib.import_module(name) for name in ("tensor_parallel", "train"))
    small: Any = train.Sizes(**EVEN)
    in_chunks = functools.partial(inductor_ce.install, strategy=TOKEN_CHUNKS, memory_budget=0.5)
    with (
        mock.patch.dict(os.environ, LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE=str(ranks)),
        mock.patch.object(sys, "argv", ["tensor_parallel.py", "--steps", str(STEPS), "--out", folder]),
        mock.patch.object(train.Sizes, "for_device", lambda device: small),
        mock.patch.object(inductor_ce, "install", in_chunks),
        mock.patch.multiple(
            dist, init_process_group=lambda backend: None, destroy_process_group=lambda: None
        ),
        contextlib.redirect_stdout(io.StringIO()) as out,
        without_codegen(),
    ):
        example.main()
    return out.getvalue()


@pytest.mark.skipif(torch.cuda.is_available(), reason="the example takes GPUs where there are any")
def test_tensor_parallel(tmp_path: Path):
    """Ranks train to the losses of one, and of the head each computes its columns in chunks."""
    ranks = int(min(4 if EVERYTHING else 2, ranks_at_most("cpu")))
    write_tokens(tmp_path, EVEN["V"])
    first, *others = spawn(on_rank, ranks, ranks, str(tmp_path))
    assert others == [""] * (ranks - 1)
    assert "1 loss fused, 0 left as written" in first
    assert re.search(r"strategy +token_chunks in 2 pieces.*; vocabulary sharded", first)
    rows = re.findall(r"^(\d+) +(\d+\.\d+) +(\d+\.\d+)$", first, re.MULTILINE)
    assert [int(step) for step, *_ in rows] == list(range(STEPS))
    alone, together = ([float(row[column]) for row in rows] for column in (1, 2))
    assert together == pytest.approx(alone, abs=1e-5)
    assert len(set(alone)) == STEPS
