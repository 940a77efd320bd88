"""C51: the distributions of all actions, clamped against log(0), of which those that were taken are chosen.

Source: thu-ml/tianshou, C51Policy, and Curt-Park/rainbow-is-all-you-need, 06.categorical_dqn and 08.rainbow
Family: Rows chosen after
"""

import torch
import torch.nn.functional as F

BATCH, ACTIONS, ATOMS = 12, 4, 51


def inputs():
    logits = torch.randn(BATCH, ACTIONS * ATOMS, requires_grad=True)
    proj_dist = torch.randn(BATCH, ATOMS).softmax(-1)
    return logits, torch.randint(ACTIONS, (BATCH,)), proj_dist, torch.rand(BATCH)


def loss(logits, action, proj_dist, weights):
    q_atoms = logits.view(-1, ACTIONS, ATOMS)
    dist = F.softmax(q_atoms, dim=-1)
    dist = dist.clamp(min=1e-3)
    log_p = torch.log(dist[range(BATCH), action])
    elementwise_loss = -(proj_dist * log_p).sum(1)
    return torch.mean(elementwise_loss * weights), elementwise_loss


EXPECTED = """\
sum t*log(clamp(p, min=0.001))
row_stats: max,sumexp
sharded: left as written
"""
