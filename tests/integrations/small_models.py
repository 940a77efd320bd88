"""Models of transformers, small and from configuration alone: nothing is downloaded."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

transformers: Any = pytest.importorskip(
    "transformers", reason="transformers is not installed: make integrations"
)

B, S, V = 2, 12, 1031

# What configurations call their sizes. The vocabulary is no multiple of anything.
_DECODER = {
    "vocab_size": V,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "max_position_embeddings": 64,
}
_OTHER_NAMES = {"vocab_size": V, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
_TOKENS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "decoder_start_token_id": 0}
_EXPERTS = {"num_local_experts": 4, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}

# Class name without its ending -> (ending, configuration).
CONFIGURATIONS: dict[str, tuple[str, dict[str, Any]]] = {
    "Llama": ("ForCausalLM", _DECODER),
    "Qwen2": ("ForCausalLM", _DECODER),
    "Qwen3": ("ForCausalLM", _DECODER),
    "Gemma": ("ForCausalLM", _DECODER),
    "Gemma2": ("ForCausalLM", {**_DECODER, "final_logit_softcapping": 5.0}),
    "Gemma3": ("ForCausalLM", _DECODER),
    "Mistral": ("ForCausalLM", _DECODER),
    "Mixtral": ("ForCausalLM", {**_DECODER, **_EXPERTS}),
    "Qwen2Moe": ("ForCausalLM", {**_DECODER, **_EXPERTS}),
    "Phi": ("ForCausalLM", _DECODER),
    "Phi3": ("ForCausalLM", _DECODER),
    "Olmo2": ("ForCausalLM", _DECODER),
    "StableLm": ("ForCausalLM", _DECODER),
    "Granite": ("ForCausalLM", {**_DECODER, "logits_scaling": 3.0}),
    "Cohere": ("ForCausalLM", _DECODER),
    "GPTNeoX": ("ForCausalLM", {**_DECODER, "rotary_pct": 0.5}),
    "OPT": (
        "ForCausalLM",
        {**_OTHER_NAMES, "ffn_dim": 48, "word_embed_proj_dim": 32, "max_position_embeddings": 64},
    ),
    "Falcon": ("ForCausalLM", {**_OTHER_NAMES, "num_kv_heads": 1}),
    "Bloom": ("ForCausalLM", {"vocab_size": V, "hidden_size": 32, "n_layer": 2, "n_head": 2}),
    "GPT2": ("LMHeadModel", {"vocab_size": V, "n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 64}),
    "GPTJ": (
        "ForCausalLM",
        {"vocab_size": V, "n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 64, "rotary_dim": 8},
    ),
    "T5": (
        "ForConditionalGeneration",
        {"vocab_size": V, "d_model": 32, "d_kv": 16, "d_ff": 48, "num_layers": 2, "num_heads": 2},
    ),
    "Bart": (
        "ForConditionalGeneration",
        {
            "vocab_size": V,
            "d_model": 32,
            "encoder_layers": 1,
            "decoder_layers": 1,
            "encoder_attention_heads": 2,
            "decoder_attention_heads": 2,
            "encoder_ffn_dim": 48,
            "decoder_ffn_dim": 48,
            "max_position_embeddings": 64,
        },
    ),
    "Bert": ("ForMaskedLM", {**_OTHER_NAMES, "intermediate_size": 48, "max_position_embeddings": 64}),
    "Roberta": ("ForMaskedLM", {**_OTHER_NAMES, "intermediate_size": 48, "max_position_embeddings": 64}),
}


def model_of(name: str, dtype: torch.dtype = torch.float32, **changes: Any) -> nn.Module:
    """A model in training mode, without dropout, so that two calls of it give the same."""
    ending, given = CONFIGURATIONS[name]
    kind = getattr(transformers, name + ending)
    torch.manual_seed(0)
    config = kind.config_class(**{**_TOKENS, **given, **changes})
    model = kind(config).to(dtype)
    for module in model.modules():
        for attribute, value in vars(module).items():
            if "dropout" in attribute and isinstance(value, float):
                setattr(module, attribute, 0.0)
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.05)  # no bias is zero, no scale one
    return model.train()


def batch_of(length: int = S, rows: int = B, seed: int = 0) -> dict[str, Tensor]:
    x = torch.randint(3, V, (rows, length), generator=torch.Generator().manual_seed(seed))
    labels = x.clone()
    labels[0, : length // 4] = -100
    return {"input_ids": x, "labels": labels}
