"""Rainbow: the distributions of all actions, of which those that were taken are chosen by index.

Source: Kaixhin/Rainbow, agent.py
Family: Rows chosen after
"""

import torch
import torch.nn.functional as F

BATCH, ACTIONS, ATOMS = 12, 4, 51


def inputs():
    logits = torch.randn(BATCH, ACTIONS, ATOMS, requires_grad=True)
    m = torch.randn(BATCH, ATOMS).softmax(-1)
    return logits, torch.randint(ACTIONS, (BATCH,)), m, torch.rand(BATCH)


def loss(q, actions, m, weights):
    log_ps = F.log_softmax(q, dim=2)
    log_ps_a = log_ps[range(BATCH), actions]
    loss = -torch.sum(m * log_ps_a, 1)
    return (weights * loss).mean(), loss


EXPECTED = """\
lse*mass(q) - dot(q)
row_stats: max,sumexp,dot:0,mass:0
sharded: all_gather [4, N]
"""
