"""What `explain` says of a linear layer and its loss; the README shows it.

python examples/explain.py
"""

import torch
import torch.nn.functional as F

import inductor_ce


def loss(h, W, y):
    logits = F.linear(h, W)
    return F.cross_entropy(logits.float(), y)


def main():
    h = torch.randn(4096, 64, dtype=torch.bfloat16, requires_grad=True)
    W = torch.randn(32000, 64, dtype=torch.bfloat16, requires_grad=True)
    y = torch.randint(32000, (4096,))
    with inductor_ce.install():
        print(inductor_ce.explain(loss, h, W, y))


if __name__ == "__main__":
    main()
