"""Distillation from two heads, composed at random: in pieces, both of them, and right.

The same programs each time. GENERATED=20 runs twenty times as many.
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from harness import compile_without_codegen
from head_cases import counts
from test_head_generated import ROUNDING, assert_nothing_failed
from test_head_teachers import BUDGET, measured
from torch import Tensor
from two_heads import Given, N, V, given

PROGRAMS = 8 * max(int(os.environ.get("GENERATED", "1")), 1)

STUDENT = (
    *("F.linear(h, W)", "h @ W.t() * 0.7", "4 * torch.tanh(F.linear(h, W) / 4)", "F.linear(h, W, b)"),
    "torch.addmm(b, h, W.t())",
)
TEACHER = (
    *("F.linear(t, U)", "t @ U.t() + b", "torch.addmm(b, t, U.t())", "torch.einsum('nd,vd->nv', t, U)"),
    "F.linear(t.view(3, -1, t.shape[-1]), U).flatten(0, 1)",
)
CHAIN = (
    *("q / 2", "3 * torch.tanh(q / 3)", "q + noise", "q * rows[:, None]", "q.clamp(-4, 4)"),
    *("q.masked_fill(torch.arange(V) > V - 3, -1e4)", "q - q.amax(-1, keepdim=True)", "q.log_softmax(-1)"),
)
LOSS = (
    "F.kl_div(s.log_softmax(-1), q.softmax(-1), reduction='none').sum(-1)",
    "F.kl_div(s.log_softmax(-1), q.log_softmax(-1), reduction='none', log_target=True).sum(-1)",
    "-(q.softmax(-1) * s.log_softmax(-1)).sum(-1)",
    "F.cross_entropy(s, (q - q.logsumexp(-1, keepdim=True)).exp(), reduction='none')",
    "F.cross_entropy(s, 0.9 * q.softmax(-1) + 0.1 / V, reduction='none')",
    "(s.softmax(-1) * (s.log_softmax(-1) - q.log_softmax(-1))).sum(-1)",
)
TAIL = (
    *("l.mean()", "(l * mask).sum() / mask.sum()", "torch.where(mask, l, 0).sum()", "l.square().mean()"),
    *("(l * q.softmax(-1).amax(-1)).mean()", "(l / (l.detach() + 1)).mean()", "l.clamp(max=5).mean()"),
    *("l.view(3, -1).mean(1).sum()", "(l * rows).mean() + (q.softmax(-1) * q).sum(-1).mean()"),
)


def program(choose: Callable[[Any], Any]) -> str:
    """The source of f(h, W, t, U, b, mask, rows, noise)."""
    lines = [f"s, q = {choose(STUDENT)}, {choose(TEACHER)}"]
    lines += [f"q = {choose(CHAIN)}" for _ in range(choose((0, 1, 1, 2)))]
    lines += [f"l = {choose(LOSS)}", f"return {choose(TAIL)}"]
    return "".join(f"    {line}\n" for line in lines)


def function(body: str) -> Callable[..., Tensor]:
    """f(h, W, t, U, b, mask), with a number for each row, and noise, of its own."""
    names: dict[str, Any] = {"torch": torch, "F": F, "V": V}
    exec(f"def f(h, W, t, U, b, mask, rows, noise):\n{body}", names)
    rows, noise = torch.rand(N) + 0.5, torch.randn(N, V)
    return lambda h, *others: names["f"](h, *others, rows.to(h.dtype), noise.to(h.dtype))


def check(body: str, caplog: pytest.LogCaptureFixture) -> None:
    f, inputs = function(body), given()
    compiled, graphs = compile_without_codegen(f, strategy="token_chunks", memory_budget=BUDGET)
    each = measured(compiled, inputs), measured(f, inputs), measured(f, Given.to(inputs, torch.float64))
    assert counts().keys() == {"token_chunks"}
    assert (
        graphs.count(torch.ops.inductor_ce.logits.default)
        == 2 * graphs.pieces // counts()["token_chunks"]
        >= 4
    )
    for ours, naive, right in zip(*each, strict=True):
        error, accepted = (torch.linalg.vector_norm(x.double() - right) for x in (ours, naive))
        assert error <= 1.5 * accepted + ROUNDING[torch.float32] * torch.linalg.vector_norm(right)
    assert_nothing_failed(caplog)


@pytest.mark.parametrize("seed", range(PROGRAMS))
def test_a_generated_distillation_is_divided_and_right(seed: int, caplog: pytest.LogCaptureFixture) -> None:
    body = program(random.Random(seed).choice)
    print(body)
    check(body, caplog)
