"""Golden joint graphs of each strategy. EXPECTTEST_ACCEPT=1 accepts new ones; read the diff."""

from collections.abc import Callable
from unittest import mock

import torch
import torch.nn.functional as F
from expecttest import TestCase
from harness import compile_without_codegen
from head_cases import counts
from test_golden import show
from torch import Tensor

from inductor_ce import passes

N, V, D = 6, 8, 4


def joint(f: Callable[..., Tensor], strategy: str, *args: Tensor, wanted: str = "") -> str:
    """The joint graph of f after its heads were dealt with, in two pieces."""
    shown: list[str] = []

    def fuse_and_show(graph: torch.fx.Graph, *others: object) -> object:
        planned = fuse_heads(graph, *others)
        graph.lint()
        shown.append(show(graph))
        return planned

    fuse_heads = passes.fuse_heads
    compiled, _ = compile_without_codegen(f, strategy=strategy, memory_budget=0.5)
    with mock.patch.object(passes, "fuse_heads", fuse_and_show):
        compiled(*args)
    assert counts() == {wanted or strategy: 1}
    (only,) = shown
    return only


def head(frozen: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    hidden = torch.randn(N, D, requires_grad=not frozen)
    return hidden, torch.randn(V, D, requires_grad=not frozen), torch.arange(N)


def loss(hidden: Tensor, weight: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(hidden @ weight.t(), y)


def per_token(hidden: Tensor, weight: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(hidden @ weight.t(), y, reduction="none")


class Golden(TestCase):
    maxDiff = None

    def test_materialise(self):
        self.assertExpectedInline(joint(loss, "materialise", *head()), "")

    def test_token_chunks(self):
        self.assertExpectedInline(joint(loss, "token_chunks", *head()), "")

    def test_vocab_slabs(self):
        self.assertExpectedInline(joint(per_token, "vocab_slabs", *head()), "")

    def test_forward_only(self):
        self.assertExpectedInline(joint(loss, "token_chunks", *head(frozen=True), wanted="forward_only"), "")
