"""Mixture with learned shares: log sum_i w_i exp(z_i), of whose weights a gradient is wanted as well.

Source: none named; a partition function with learned masses of its states
Family: Look-alikes
"""

import torch

N, V = 16, 48


def inputs():
    return (
        torch.randn(N, V, requires_grad=True),
        torch.rand(V).add(0.1).requires_grad_(),
        torch.randint(V, (N,)),
    )


def loss(energies, masses, states):
    partition = torch.log((masses * torch.exp(energies)).sum(dim=1))
    return (partition - energies.gather(1, states[:, None])[:, 0]).mean()


EXPECTED = """\
nothing to fuse
"""
