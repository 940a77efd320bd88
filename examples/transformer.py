"""A small causal language model in plain PyTorch: nothing in this file knows of inductor_ce."""

import torch
import torch.nn as nn
import torch.nn.functional as F


class Block(nn.Module):
    """Pre-norm attention and a pre-norm MLP, [B, S, D] -> [B, S, D]."""

    def __init__(self, D: int, heads: int):
        super().__init__()
        self.head_size = D // heads
        self.attention_norm = nn.LayerNorm(D)
        self.qkv = nn.Linear(D, 3 * D, bias=False)
        self.attention_out = nn.Linear(D, D, bias=False)
        self.mlp_norm = nn.LayerNorm(D)
        self.mlp = nn.Sequential(nn.Linear(D, 4 * D, bias=False), nn.GELU(), nn.Linear(4 * D, D, bias=False))

    def forward(self, h: torch.Tensor) -> torch.Tensor:
        # Heads come first, so that a rank with a block of the columns has q, k and v of some of them.
        qkv = self.qkv(self.attention_norm(h)).unflatten(-1, (-1, 3, self.head_size))
        q, k, v = qkv.permute(3, 0, 2, 1, 4)
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        h = h + self.attention_out(attended.transpose(1, 2).flatten(2))
        return h + self.mlp(self.mlp_norm(h))


class Transformer(nn.Module):
    """A language model over a vocabulary of V for sequences of up to S tokens."""

    def __init__(self, V: int, D: int, S: int, layers: int, heads: int, tied: bool = True):
        super().__init__()
        self.token_embedding = nn.Embedding(V, D)
        self.position_embedding = nn.Embedding(S, D)
        self.blocks = nn.ModuleList([Block(D, heads) for _ in range(layers)])
        self.norm = nn.LayerNorm(D)
        self.head = nn.Linear(D, V, bias=False)
        self.apply(self._initialise)
        if tied:
            self.head.weight = self.token_embedding.weight

    @staticmethod
    def _initialise(module: nn.Module) -> None:
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=module.weight.shape[1] ** -0.5)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """The mean next-token loss of tokens x [B, S] with labels y [B, S]."""
        h = self.token_embedding(x) + self.position_embedding.weight[: x.shape[1]]
        for block in self.blocks:
            h = block(h)
        return self.loss(self.norm(h), y)

    def loss(self, h: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """Of the normalised hidden states [B, S, D]."""
        logits = self.head(h)
        return F.cross_entropy(logits.float().view(-1, logits.size(-1)), y.view(-1))
