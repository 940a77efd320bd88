"""NeMo-Aligner: full KL to a reference policy as a sum over the vocabulary, a bonus beside the policy loss.

Source: NVIDIA/NeMo-Aligner, nemo_aligner/models/nlp/gpt/megatron_gpt_sft_model.py
Family: KL divergence
"""

import torch

B, S, V = 2, 8, 64


def inputs():
    ref = torch.randn(B, S, V).log_softmax(-1)
    return torch.randn(B, S, V, requires_grad=True), ref, torch.randint(V, (B, S)), torch.randn(B, S)


def loss(logits, ref_log_probs, actions, advantages, beta=0.05):
    log_probs = logits.log_softmax(-1)
    picked = log_probs.gather(-1, actions.unsqueeze(-1)).squeeze(-1)
    kl = torch.sum(torch.exp(log_probs) * (log_probs - ref_log_probs), dim=-1)
    return (beta * kl - advantages * picked).mean()


EXPECTED = """\
pick(y) - lse
0.05*mean_p - 0.05*lse - 0.05*mean_p(q)
row_stats: max,sumexp,pick,sumexpz,expdot:0
sharded: all_gather [5, N]
"""
