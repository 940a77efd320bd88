"""What the programs of docs/integrations.md have beside their lines: models, data, optimizers."""

from __future__ import annotations

import functools
import importlib
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from documented import STEPS
from small_models import B, V, batch_of, model_of
from torch import Tensor, nn

Names = dict[str, Any]


@dataclass(frozen=True)
class Program:
    """A program.

    Attributes:
        heading: where its lines stand.
        names: what it has beside them, for a dtype of its parameters.
        asked: the call that `explain` is asked about, of the names that a run leaves.
        in_float64: whether the program runs in it.
        options: of `explain`.
    """

    heading: str
    names: Callable[[torch.dtype], Names]
    asked: Callable[[Names], Callable[[], Any]]
    in_float64: bool = True
    options: dict[str, Any] = field(default_factory=dict)


def needed(name: str) -> Any:
    if importlib.util.find_spec(name.partition(".")[0]) is None:
        pytest.skip(f"{name} is not installed")
    return importlib.import_module(name)


def llama(dtype: torch.dtype, **changes: Any) -> Any:
    return model_of("Llama", dtype, num_hidden_layers=1, **changes)


def trained_by_sgd(model: nn.Module, **others: Any) -> Names:
    return {"model": model, "optimizer": torch.optim.SGD(model.parameters(), lr=0.1), **others}


BATCHES = [batch_of(seed=step) for step in range(STEPS)]
PAIRS = [(batch["input_ids"], batch["labels"]) for batch in BATCHES]
ROWS = [{name: x[0] for name, x in batch_of(rows=1, seed=i).items()} for i in range(4 * STEPS)]


# Loops


class GPT(nn.Module):
    """Logits and loss, as nanoGPT returns them."""

    def __init__(self) -> None:
        super().__init__()
        self.body = llama(torch.float32).model
        self.lm_head = nn.Linear(32, V, bias=False)
        self.body.embed_tokens.weight = self.lm_head.weight

    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        logits = self.lm_head(self.body(x).last_hidden_state)
        return logits, F.cross_entropy(logits.view(-1, logits.size(-1)), y.view(-1), ignore_index=-1)


class PaddedGPT(GPT):
    """A padded vocabulary and a soft-cap, as nanochat has them."""

    def __init__(self) -> None:
        super().__init__()
        self.lm_head = nn.Linear(32, V + 57, bias=False)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        logits = self.lm_head(self.body(x).last_hidden_state)[..., :V]
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        logits = 15 * torch.tanh(logits / 15)
        return F.cross_entropy(logits.view(-1, logits.size(-1)), y.view(-1), ignore_index=-1)


def gpt(dtype: torch.dtype, kind: type[GPT]) -> Names:
    torch.manual_seed(0)
    x = [(x, x) for x, _ in PAIRS]
    return trained_by_sgd(kind().to(dtype), batches=x)


def of_transformers(dtype: torch.dtype) -> Names:
    return trained_by_sgd(llama(dtype), batches=BATCHES)


def of_accelerate(dtype: torch.dtype) -> Names:
    accelerate = needed("accelerate")
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    made = trained_by_sgd(llama(dtype), batches=BATCHES, Accelerator=accelerate.Accelerator)
    return {**made, "arguments": {"cpu": True}}


def of_peft(dtype: torch.dtype, **adapters: Any) -> Names:
    peft = needed("peft")
    model = llama(dtype)
    torch.manual_seed(0)
    adapters = {"r": 2, "lora_dropout": 0.0, "init_lora_weights": False, **adapters}
    names = {"get_peft_model": peft.get_peft_model, "LoraConfig": peft.LoraConfig, "adapters": adapters}
    return {"model": model, "batches": BATCHES, **names}


def distilled(model: Any, teacher: Any, batch: dict[str, Tensor]) -> Tensor:
    out = model(**batch)
    with torch.no_grad():
        told = teacher(input_ids=batch["input_ids"]).logits
    log_p, q = (out.logits.flatten(0, 1) / 2).log_softmax(-1), (told.flatten(0, 1) / 2).softmax(-1)
    return out.loss + 4 * F.kl_div(log_p, q, reduction="batchmean")


def of_distillation(dtype: torch.dtype) -> Names:
    teacher = llama(dtype, attention_bias=True).eval()
    return trained_by_sgd(llama(dtype), batches=BATCHES, teacher=teacher, distilled=distilled)


def of_litgpt(dtype: torch.dtype) -> Names:
    litgpt = needed("litgpt")
    torch.manual_seed(0)
    sizes = {"n_layer": 1, "n_head": 2, "n_embd": 32, "intermediate_size": 48, "block_size": 64}
    model = litgpt.GPT(litgpt.Config(padded_vocab_size=V, vocab_size=V, **sizes)).to(dtype)
    loss = needed("litgpt.utils").chunked_cross_entropy
    batches = [(b["input_ids"], b["labels"]) for b in (batch_of(rows=12, seed=i) for i in range(STEPS))]
    return trained_by_sgd(model, batches=batches, chunked_cross_entropy=loss)  # in chunks of 128 rows


def of_torchtune(dtype: torch.dtype) -> Names:
    needed("torchtune")
    made = needed("torchtune.models.llama3").llama3
    torch.manual_seed(0)
    sizes = {"num_layers": 1, "num_heads": 2, "num_kv_heads": 1, "embed_dim": 32, "max_seq_len": 64}
    return trained_by_sgd(made(vocab_size=V, intermediate_dim=48, **sizes).to(dtype), batches=PAIRS)


def of_timm(dtype: torch.dtype) -> Names:
    try:
        timm = needed("timm")
    except (ImportError, RuntimeError) as error:  # without the torchvision of this build of torch
        pytest.skip(f"timm: {error}")
    torch.manual_seed(0)
    sizes = {"img_size": 16, "patch_size": 8, "embed_dim": 32, "depth": 1, "num_heads": 2}
    model = timm.models.VisionTransformer(num_classes=V, **sizes).to(dtype)
    images = [(torch.randn(24, 3, 16, 16).to(dtype), torch.randint(V, (24,))) for _ in range(STEPS)]
    return trained_by_sgd(
        model, batches=images, loss_function=needed("timm.loss").LabelSmoothingCrossEntropy(0.1)
    )


def of_sentence_transformers(dtype: torch.dtype) -> Names:
    sentences = needed("sentence_transformers")
    pooling = needed("sentence_transformers.sentence_transformer.modules").Pooling(32)
    losses = needed("sentence_transformers.sentence_transformer.losses")

    class Body(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model_of("Bert", dtype, num_hidden_layers=1).bert

        def forward(self, features: Names, **_: Any) -> Names:
            return {**features, "token_embeddings": self.model(**features).last_hidden_state}

    def features(seed: int) -> dict[str, Tensor]:
        x = batch_of(rows=24, seed=seed)["input_ids"]
        return {"input_ids": x, "attention_mask": torch.ones_like(x)}

    model = sentences.SentenceTransformer(modules=[Body(), pooling], device="cpu")
    batches = [[features(i), features(100 + i)] for i in range(STEPS)]
    loss = losses.MultipleNegativesRankingLoss
    return trained_by_sgd(model, batches=batches, MultipleNegativesRankingLoss=loss)


# Trainers


ARGUMENTS = {
    "max_steps": STEPS,
    "per_device_train_batch_size": B,
    "per_device_eval_batch_size": B,
    "learning_rate": 0.1,
    "lr_scheduler_type": "constant",
    "optim": "sgd",
    "logging_steps": 1,
    "report_to": [],
    "save_strategy": "no",
    "disable_tqdm": True,
    "use_cpu": True,
    "log_level": "error",
}


def arguments(**others: Any) -> Names:
    return {**ARGUMENTS, "output_dir": tempfile.gettempdir(), **others}


def accuracy(prediction: Any) -> dict[str, float]:
    guesses, labels = prediction.predictions.argmax(-1), prediction.label_ids
    return {"accuracy": float((guesses == labels)[labels != -100].mean()), "sum": float(guesses.sum())}


def of_trainer(dtype: torch.dtype, **others: Any) -> Names:
    needed("accelerate")
    if dtype == torch.float64:
        others.pop("bf16", None)
    names = {"Trainer": transformers.Trainer, "TrainingArguments": transformers.TrainingArguments}
    return {
        **names,
        "model": llama(dtype),
        "data": ROWS,
        "accuracy": accuracy,
        "arguments": arguments(**others),
    }


def shifted(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())


def of_lightning(dtype: torch.dtype) -> Names:
    lightning = needed("lightning")
    quiet = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")
    trainer = lightning.Trainer(max_steps=STEPS, accelerator="cpu", **dict.fromkeys(quiet, False))
    batches = torch.utils.data.DataLoader(ROWS, batch_size=B)  # type: ignore[arg-type]
    names = {"lightning": lightning, "trainer": trainer, "loss_function": shifted, "batches": batches}
    return trained_by_sgd(llama(dtype), **names)


def tokenizer() -> Any:
    """Of words w4, w5, ..., each its own number."""
    tokenizers = needed("tokenizers")
    words = ["<pad>", "<s>", "</s>", "<unk>", *(f"w{i}" for i in range(4, V))]
    numbers = {word: i for i, word in enumerate(words)}
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(numbers, unk_token="<unk>"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=made, **special)


def text(words: int, seed: int) -> str:
    numbers = torch.randint(4, V, (words,), generator=torch.Generator().manual_seed(seed))
    return " ".join(f"w{int(i)}" for i in numbers)


def _rewarded(completions: list[str], **_: Any) -> list[float]:
    return [float(len(c) + i) for i, c in enumerate(completions)]


def of_trl(dtype: torch.dtype, kind: str) -> Names:
    trl, datasets = needed("trl"), needed("datasets")
    datasets.disable_progress_bars()
    columns = {"SFT": ("completion",), "DPO": ("chosen", "rejected"), "GRPO": ()}[kind]
    rows = [
        {"prompt": text(4, i), **{name: text(8, 100 * k + i) for k, name in enumerate(columns, 1)}}
        for i in range(4 * STEPS)
    ]
    others: Names = {"processing_class": tokenizer()}
    if kind == "DPO":
        others["ref_model"] = llama(dtype, attention_bias=True)
    if kind == "GRPO":
        others["reward_funcs"] = _rewarded
    given = {"num_generations": 2, "max_completion_length": 6} if kind == "GRPO" else {}
    return {
        "make_trainer": getattr(trl, f"{kind}Trainer"),
        "make_config": getattr(trl, f"{kind}Config"),
        "model": llama(dtype),
        "data": datasets.Dataset.from_list(rows),
        "arguments": arguments(bf16=False, gradient_checkpointing=False, **given),
        "others": others,
    }


# What is explained


def model_of_batch(names: Names) -> Callable[[], Any]:
    return lambda: names["model"](**BATCHES[0])


def model_of_pair(names: Names) -> Callable[[], Any]:
    return lambda: names["model"](*names["batches"][0])


def loss_of_pair(names: Names) -> Callable[[], Any]:
    x, y = names["batches"][0]
    return lambda: names["loss_function"](names["model"](x).flatten(0, 1), y.flatten())


def shifted_loss_of_pair(names: Names) -> Callable[[], Any]:
    x, y = PAIRS[0]
    return lambda: shifted(names["model"](x).logits, y)


def step_of_trainer(names: Names) -> Callable[[], Any]:
    trainer = names["trainer"]
    batch = next(iter(trainer.get_train_dataloader()))
    return lambda: trainer.compute_loss(trainer.model, dict(batch))


def step_of_grpo(names: Names) -> Callable[[], Any]:
    trainer = names["trainer"]
    batch = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
    return lambda: trainer.compute_loss(trainer.model, batch)


def _partial(f: Callable[..., Names], **given: Any) -> Callable[[torch.dtype], Names]:
    return functools.partial(f, **given)


PROGRAMS = {
    "nanoGPT": Program("nanoGPT", _partial(gpt, kind=GPT), model_of_pair),
    "nanochat": Program("nanochat", _partial(gpt, kind=PaddedGPT), model_of_pair),
    "transformers": Program("transformers", of_transformers, model_of_batch),
    "Trainer": Program("Trainer", of_trainer, step_of_trainer),
    "Trainer, bf16": Program("Trainer", _partial(of_trainer, bf16=True), step_of_trainer),
    "Trainer, accumulation": Program(
        "Trainer", _partial(of_trainer, gradient_accumulation_steps=2), step_of_trainer
    ),
    "Trainer with metrics": Program("Trainer with metrics", of_trainer, step_of_trainer),
    "Trainer with label smoothing": Program("Trainer with label smoothing", of_trainer, step_of_trainer),
    "accelerate": Program("accelerate", of_accelerate, model_of_batch),
    "PEFT, body": Program("PEFT", _partial(of_peft, target_modules=["q_proj", "v_proj"]), model_of_batch),
    "PEFT, `modules_to_save`": Program(
        "PEFT", _partial(of_peft, target_modules=["q_proj"], modules_to_save=["lm_head"]), model_of_batch
    ),
    "PEFT, head": Program("PEFT", _partial(of_peft, target_modules=["q_proj", "lm_head"]), model_of_batch),
    "Distillation": Program(
        "Distillation",
        of_distillation,
        lambda names: lambda: distilled(names["model"], names["teacher"], BATCHES[0]),
    ),
    "TRL SFT": Program("TRL", _partial(of_trl, kind="SFT"), step_of_trainer, in_float64=False),
    "TRL DPO": Program("TRL", _partial(of_trl, kind="DPO"), step_of_trainer, in_float64=False),
    "TRL GRPO": Program("TRL", _partial(of_trl, kind="GRPO"), step_of_grpo, in_float64=False),
    "Lightning": Program(
        "Lightning",
        of_lightning,
        shifted_loss_of_pair,
    ),
    "litgpt": Program("litgpt", of_litgpt, loss_of_pair),
    "torchtune": Program("torchtune", of_torchtune, loss_of_pair),
    "timm": Program(
        "timm", of_timm, lambda names: lambda: names["loss_function"](names["model"](names["x"]), names["y"])
    ),
    "sentence-transformers": Program(
        "sentence-transformers",
        of_sentence_transformers,
        lambda names: lambda: names["loss_function"](names["features"], None),
        options={"min_vocab": 4},
    ),
}
