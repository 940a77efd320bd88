"""The names of the strategies for a head."""

from __future__ import annotations

MATERIALISE, TOKEN_CHUNKS, VOCAB_SLABS, FORWARD_ONLY = STRATEGIES = (
    "materialise",
    "token_chunks",
    "vocab_slabs",
    "forward_only",
)
