"""A slip: the label is weighed against one head's logits, the uniform part takes those of another.

Source: none; two heads and one variable name
Family: Look-alikes
"""

import torch

N, V = 16, 48


def inputs():
    main, auxiliary = torch.randn(N, V, requires_grad=True), torch.randn(N, V, requires_grad=True)
    return main, auxiliary, torch.randint(V, (N,))


def loss(main, auxiliary, labels, eps=0.1):
    picked = main.gather(-1, labels[:, None]).squeeze(-1)
    return (main.logsumexp(-1) - (1 - eps) * picked - eps * auxiliary.mean(-1)).mean()


EXPECTED = """\
lse - 0.9*pick(y)
row_stats: max,sumexp,pick
sharded: all_gather [3, N]
"""
