"""docs/integrations.md: each program runs as it stands there, as eager does, with what its table tells."""

from __future__ import annotations

import os
import re
from unittest import mock

import pytest
import torch

pytest.importorskip("transformers", reason="transformers is not installed: make integrations")
from documented import (
    DOCUMENT,
    EAGER,
    OURS,
    PLAIN,
    assert_documented,
    explained,
    rows_of_the_table,
    run,
)
from programs import PROGRAMS, of_trainer

TOLD = rows_of_the_table()
ON_RANKS = {"torchtitan", "torchtitan, chunked loss"}


def test_every_program_and_section_is_run():
    assert TOLD.keys() == PROGRAMS.keys() | ON_RANKS
    headings = set(re.findall(r"^## (.*)$", DOCUMENT.read_text(), re.M))
    assert headings == {program.heading for program in PROGRAMS.values()} | ON_RANKS


@pytest.mark.parametrize("name", PROGRAMS)
def test_program(name: str):
    program = PROGRAMS[name]
    eager, plain, ours = (
        run(program.heading, program.names(torch.float32), how) for how in (EAGER, PLAIN, OURS)
    )
    exact = run(program.heading, program.names(torch.float64), EAGER) if program.in_float64 else None
    strategies = explained(program.asked(ours.names), program.options)
    assert_documented(TOLD[name], eager, plain, ours, exact, strategies)
    for of_ours, of_eager in zip(ours.metrics, eager.metrics, strict=True):
        for key in ("eval_loss", "eval_accuracy", "eval_sum"):
            assert of_ours[key] == pytest.approx(of_eager[key], rel=1e-5)
    assert len(ours.metrics) == ("metrics" in name)


def test_names_of_backends_that_are_refused():
    """What the document says to type instead is what the programs above do."""
    accelerate = pytest.importorskip("accelerate", reason="accelerate is not installed: make integrations")
    with pytest.raises(ValueError, match="INDUCTOR_CE"):
        accelerate.Accelerator(cpu=True, dynamo_backend="inductor_ce")
    names = of_trainer(torch.float32, torch_compile=True, torch_compile_backend="inductor_ce")
    with mock.patch.dict(os.environ):
        arguments = names["TrainingArguments"](**names["arguments"])
        with pytest.raises(ValueError, match="INDUCTOR_CE"):
            names["Trainer"](names["model"], arguments, train_dataset=names["data"])
