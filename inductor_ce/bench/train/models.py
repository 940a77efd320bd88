"""The models: those of transformers, from their configurations, with random weights in bfloat16."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..shared.peers import NotOffered, find
from .programs import PROMPTS, HeadAlone


@dataclass(frozen=True)
class Model:
    """A model and its batch.

    Attributes:
        name: of the model.
        B, S: sequences, and tokens of each.
        V: vocabulary.
        configuration: the class of transformers' configuration, "" for a head alone.
        sizes: what it is given.
        liger: the function by which Liger patches the model's class, "" where the program is not the one that
            it patches.
        program: how its step is written, one of `PROGRAMS`.
        element: bytes of a logit.
        ignored: the share of the labels that the program ignores.
        like: the name of the model whose step is the same but for that.
    """

    name: str
    B: int
    S: int
    V: int
    configuration: str
    sizes: dict[str, Any]
    liger: str = ""
    program: str = "returned"
    element: int = 2
    ignored: float = 0.0
    like: str = ""

    @property
    def logits_bytes(self) -> int:
        return self.B * self.S * self.V * self.element


GEMMA = Model(
    "Gemma 2, 8 layers",
    B=4,
    S=2048,
    V=256000,
    configuration="Gemma2Config",
    sizes={
        "num_hidden_layers": 8,
        "hidden_size": 2304,
        "intermediate_size": 9216,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "attn_implementation": "eager",  # which has the soft-cap of attention
    },
    liger="apply_liger_kernel_to_gemma2",
)
QWEN = Model(
    "Qwen 2.5 0.5B",
    B=8,
    S=2048,
    V=151936,
    configuration="Qwen2Config",
    sizes={
        "num_hidden_layers": 24,
        "hidden_size": 896,
        "intermediate_size": 4864,
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
        "tie_word_embeddings": True,
    },
    liger="apply_liger_kernel_to_qwen2",
)
SFT = replace(
    QWEN,
    name=f"{QWEN.name}, {100 * PROMPTS:g} % of the labels ignored",
    liger="",
    program="sft",
    ignored=PROMPTS,
    like=QWEN.name,
)
SHALLOW = replace(QWEN, liger="", sizes={**QWEN.sizes, "num_hidden_layers": 6})
MODELS = {
    "gemma": GEMMA,
    "qwen": QWEN,
    "sft": SFT,
    "blocks": replace(SHALLOW, name="Qwen 2.5, 6 layers, blocks and loss compiled apart", program="blocks"),
    "padded": replace(SHALLOW, name="Qwen 2.5, 6 layers, padded vocabulary, soft-cap", program="padded"),
    "adapted": replace(SHALLOW, name="Qwen 2.5, 6 layers, adapters, frozen head", program="adapted"),
    "float32": replace(SHALLOW, name="Qwen 2.5, 6 layers, float32 head", program="in_float32", element=4),
    "distilled": replace(
        SHALLOW, name="Qwen 2.5, 6 layers, distilled from one as large, compiled apart", program="distilled"
    ),
    "gkd": replace(SHALLOW, name="Qwen 2.5, 6 layers, GKD from one as large, compiled apart", program="gkd"),
    "head": Model(
        "Llama 3's head alone, in float32",
        B=4,
        S=2048,
        V=128256,
        configuration="",
        sizes={"D": 4096},
        program="in_float32",
        element=4,
    ),
}


def make(model: Model, device: str = "cuda") -> tuple[nn.Module, Tensor] | NotOffered:
    """(the model, its input_ids [B, S]), or why it cannot be had."""
    torch.manual_seed(0)
    if not model.configuration:
        with torch.device(device):
            head = HeadAlone(model.B, model.S, model.V, **model.sizes)
            return head, torch.randint(0, model.V, (model.B, model.S))
    configuration: Callable[..., Any] | NotOffered = find("transformers", model.configuration)
    auto: Any = find("transformers", "AutoModelForCausalLM")
    for found in (configuration, auto):
        if isinstance(found, NotOffered):
            return found
    assert not isinstance(configuration, NotOffered)
    with torch.device(device):
        made = auto.from_config(configuration(vocab_size=model.V, **model.sizes), dtype=torch.bfloat16)
        tokens = torch.randint(0, model.V, (model.B, model.S))
    return made, tokens
