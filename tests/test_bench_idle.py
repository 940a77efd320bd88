"""`bench train` with ignored labels, and where a GPU idles by a profile, as far as a CPU can tell."""

from dataclasses import replace
from typing import Any
from unittest import mock

import pytest
import torch
from harness import clean_slate
from test_bench_train import LENGTH, TINY, Tiny, V, without_a_gpu

from inductor_ce.bench import cli
from inductor_ce.bench.shared.losses import IGNORED
from inductor_ce.bench.train import command, render, run, systems
from inductor_ce.bench.train import idle as idle_module
from inductor_ce.bench.train.idle import idle
from inductor_ce.bench.train.models import MODELS
from inductor_ce.bench.train.programs import PROGRAMS

MAIN, AUTOGRAD = 7, 8  # threads


def kernel(start: float, end: float, name: str, correlation: int = 0, cat: str = "kernel") -> dict[str, Any]:
    args = {"correlation": correlation}
    return {"cat": cat, "name": name, "ts": start, "dur": end - start, "tid": "stream 7", "args": args}


def launch(at: float, correlation: int, thread: int = MAIN, cat: str = "cuda_runtime") -> dict[str, Any]:
    args = {"correlation": correlation}
    return {"cat": cat, "name": "launch", "ts": at, "dur": 1.0, "tid": thread, "args": args}


def op(start: float, end: float, name: str, thread: int = MAIN) -> dict[str, Any]:
    return {"cat": "cpu_op", "name": name, "ts": start, "dur": end - start, "tid": thread, "args": {}}


# A body; a gap of 30; the head, which begins with a product and idles for 10; its end; a tail.
TRACE = [
    {"ph": "M", "name": "process_name", "args": {"name": "python"}},
    op(0, 4, "aten::mm"),
    launch(1, 1),
    op(10, 20, "inductor_ce::logits"),
    op(11, 13, "inductor_ce::inner"),
    launch(15, 3, cat="cuda_driver"),
    launch(15, 6, thread=AUTOGRAD),
    launch(25, 5),
    kernel(9000, 9100, "gemm", 3),
    kernel(100, 1000, "gemm", 1),
    kernel(1010, 8970, "gemm", 5),
    kernel(8900, 8950, "Memcpy DtoD", cat="gpu_memcpy"),
    kernel(9110, 9200, "triton_tem_fused_row_stats_3"),
    kernel(9200, 9300, "gemm", 5),
    kernel(9300, 9400, "triton_tem_fused_mul_row_grad_4"),
    kernel(9450, 10100, "gemm", 6),
]


def test_where_a_gpu_idles():
    assert idle(TRACE) == {
        "idle_share": pytest.approx(100 / 10000),
        "gap_before_head_us": 30.0,
        "gap_in_head_us": 10.0,
        "head_us": 400.0,
        "first_of_head": "gemm",
    }


def test_a_gap_long_before_the_head_is_not_before_it():
    early = [event for event in TRACE if event["name"] != "Memcpy DtoD"]
    early = [event for event in early if event.get("args", {}).get("correlation") != 5]
    early.append(kernel(3900, 3950, "Memcpy DtoD", cat="gpu_memcpy"))
    assert idle(early)["gap_before_head_us"] == 9000 - 3950
    assert idle([*early, kernel(6000, 9000, "gemm")])["gap_before_head_us"] == 0.0


def test_a_trace_without_our_head():
    found = idle([event for event in TRACE if not event["name"].startswith(("inductor_ce", "triton"))])
    assert found["idle_share"] > 0
    assert {found[key] for key in found if key != "idle_share"} == {None}
    assert set(idle([]).values()) == {None}


def test_one_step_is_profiled():
    """Of two, the second; a CPU alone works on nothing that counts."""
    taken = []

    def step() -> None:
        taken.append(torch.ones(2).neg())

    with without_a_gpu(), mock.patch.object(idle_module, "idle", lambda events: events):
        events = idle_module.profiled(step)
    assert len(taken) == 2
    assert [event["cat"] for event in events if event["name"] == "aten::neg"] == ["cpu_op"]
    assert set(idle(events).values()) == {None}


def test_prompts_are_ignored():
    given = []

    class Model(torch.nn.Module):
        def forward(self, input_ids: torch.Tensor, labels: torch.Tensor) -> Any:
            given.append(labels)
            return mock.Mock(loss=labels.sum())

    tokens = torch.randint(V, (3, 64))
    with mock.patch.object(torch, "compile", lambda model: model), PROGRAMS["sft"](Model(), False) as step:
        step(tokens)
    (labels,) = given
    lengths = (labels == IGNORED).sum(1)
    assert lengths.sum() == 3 * 48
    assert len(set(lengths.tolist())) == 3
    for row, length, token in zip(labels, lengths, tokens, strict=True):
        assert torch.equal(row[length:], token[length:])


@pytest.fixture(scope="module")
def cases() -> list[dict[str, Any]]:
    """A tiny model with all labels, and with those of prompts ignored; the profile says what TRACE does."""
    both = [TINY, replace(TINY, name="SFT", program="sft", ignored=0.75, like=TINY.name, liger="")]
    those = [systems.SYSTEMS[name] for name in ("torch.compile", "inductor_ce")]
    made = Tiny(), torch.randint(V, (2, 8))
    stand_ins = mock.patch.multiple(run, make=lambda model: made, profiled=lambda step: step() or idle(TRACE))
    with clean_slate(), without_a_gpu(), stand_ins:
        return [*run.table(both, those, replace(LENGTH, profile=True))]


def test_a_step_with_prompts(cases: list[dict[str, Any]]):
    whole, some = cases
    assert (some["ignored"], some["like"]) == (0.75, "Tiny")
    assert [row["system"] for row in some["rows"]] == ["torch.compile", "inductor_ce"]
    assert some["rows"][1]["counts"]["sites"] == 1
    assert some["rows"][1]["logits"] == "LazyLogits"
    assert all(row["loss_difference"] < 1e-5 and row["gradient_difference"] < 1e-5 for row in some["rows"])
    assert some["rows"][0]["loss"] != whole["rows"][0]["loss"]
    assert all(row["profile"] == idle(TRACE) for case in cases for row in case["rows"])
    assert not any(map(command.failed, cases))


def test_what_is_saved_is_told(cases: list[dict[str, Any]]):
    environment = dict.fromkeys(("gpu", "torch", "triton", "commit", "dirty", "date"), "")
    text = render.table({"environment": environment, "cases": cases})
    lines = [line for line in text.splitlines() if line.startswith("inductor_ce")]
    assert (
        "inductor_ce: 0.0 ms less than where no label is ignored; 75 % of the head there are 0.3 ms" in lines
    )
    assert lines[-1] == (
        "inductor_ce, profiled: the GPU idles 1.00 % of a step; 30 us at most before the head, "
        "10 us within it; it takes 0.4 ms and begins with gemm"
    )


def test_a_profile_that_fails_is_told():
    def fails(step: Any) -> None:
        raise RuntimeError("no profiler")

    made = Tiny(), torch.randint(V, (2, 8))
    with clean_slate(), without_a_gpu(), mock.patch.multiple(run, make=lambda model: made, profiled=fails):
        (found,) = run.table([TINY], [systems.SYSTEMS["torch.compile"]], replace(LENGTH, profile=True))
    assert found["not_measured"][0]["reason"] == "profile failed: RuntimeError: no profiler"
    assert len(found["rows"]) == 1
    assert command.failed(found)


def test_arguments():
    assert MODELS["sft"].like == MODELS["qwen"].name
    assert "sft" in cli.parse(["train"]).models
    assert (cli.parse(["train"]).profile, cli.parse(["train", "--profile"]).profile) == (False, True)
