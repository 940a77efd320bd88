"""transformers' Trainer, with accelerate beneath: as with plain torch.compile, and no logits in training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from harness import sites
from torch import Tensor

pytest.importorskip("transformers", reason="transformers is not installed: make integrations")
pytest.importorskip("accelerate", reason="accelerate is not installed: make integrations")
import transformers
from small_models import S, batch_of, model_of

import inductor_ce

STEPS, ROWS = 3, 2
DATA = [{name: x[0] for name, x in batch_of(rows=1, seed=i).items()} for i in range(12)]


def trainer_of(folder: Path, model: Any = None, **arguments: Any) -> Any:
    given = {
        "max_steps": STEPS,
        "per_device_train_batch_size": ROWS,
        "per_device_eval_batch_size": ROWS,
        "logging_steps": 1,
        "report_to": [],
        "save_strategy": "no",
        "disable_tqdm": True,
        "use_cpu": True,
    }
    ours = {name: arguments.pop(name) for name in tuple(arguments) if name not in vars(ARGUMENTS)}
    return transformers.Trainer(
        model=model if model is not None else model_of("Llama", num_hidden_layers=1),
        args=transformers.TrainingArguments(output_dir=str(folder), **{**given, **arguments}),
        train_dataset=DATA,
        eval_dataset=DATA[:4],
        **ours,
    )


ARGUMENTS = transformers.TrainingArguments(output_dir=".", use_cpu=True, report_to=[])


def trained(folder: Path, **arguments: Any) -> tuple[list[float], dict[str, Tensor]]:
    """(the losses logged, the parameters in the end)."""
    torch._dynamo.reset()
    trainer = trainer_of(folder, torch_compile=True, **arguments)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return losses, {name: p.detach() for name, p in trainer.model.named_parameters()}


@pytest.mark.parametrize(
    ("arguments", "fused"),
    [
        pytest.param({}, 1, id="float32"),
        pytest.param({"bf16": True}, 1, id="bfloat16"),
        pytest.param({"gradient_accumulation_steps": 2}, 1, id="accumulation"),
        # Trainer takes this loss itself, of logits that a compiled model without labels returns.
        pytest.param({"label_smoothing_factor": 0.1}, 0, id="smoothing"),
    ],
)
def test_training(arguments: dict[str, Any], fused: int, tmp_path: Path, cheap: None, made: list[int]):
    plain, expected = trained(tmp_path, **arguments)
    assert sites() == 0
    inductor_ce.install()
    losses, parameters = trained(tmp_path, **arguments)
    assert sites() == fused
    assert made == []
    assert len(set(losses)) == STEPS
    assert losses == pytest.approx(plain, rel=1e-6)
    torch.testing.assert_close(parameters, expected, rtol=1e-5, atol=1e-6)


def accuracy(prediction: Any) -> dict[str, float]:
    guesses, labels = prediction.predictions, prediction.label_ids
    guesses = guesses if guesses.ndim == 2 else guesses.argmax(-1)
    return {"accuracy": float((guesses == labels)[labels != -100].mean()), "sum": float(guesses.sum())}


EVALUATIONS: dict[str, dict[str, Any]] = {
    "loss alone": {},
    "metrics": {"compute_metrics": accuracy},
    "metrics of guesses": {
        "compute_metrics": accuracy,
        "preprocess_logits_for_metrics": lambda logits, labels: logits.argmax(-1),
    },
}


def test_evaluation(tmp_path: Path, cheap: None, made: list[int]):
    """Of one compiled model: for the loss no logits are made, for metrics those of each batch."""
    found: dict[str, list[dict[str, float]]] = {name: [] for name in EVALUATIONS}
    rows: dict[str, list[int]] = {}
    for ours in (False, True):
        torch._dynamo.reset()
        if ours:
            inductor_ce.install()
        model = model_of("Llama", num_hidden_layers=1)
        model.compile()
        for name, given in EVALUATIONS.items():
            made.clear()
            metrics = trainer_of(tmp_path, model, **given).evaluate()
            rows[name] = list(made)
            kept = ("eval_loss", "eval_accuracy", "eval_sum")
            found[name].append({key: value for key, value in metrics.items() if key in kept})
    assert sites() == 1
    for plain, fused in found.values():
        assert fused == pytest.approx(plain, rel=1e-5)
    assert rows["loss alone"] == []
    assert rows["metrics"] == rows["metrics of guesses"] == [ROWS * S] * 2
    assert "eval_accuracy" in found["metrics"][1]
