"""Two ranks over gloo: DDP, its static graph, its buckets, and FSDP2, each beside plain torch.compile."""

from __future__ import annotations

import warnings
from typing import Any
from unittest import mock

import pytest
import torch
from harness import clean_slate, sites, without_codegen
from ranks import spawn
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

pytest.importorskip("transformers", reason="transformers is not installed: make integrations")
from small_models import batch_of, model_of

import inductor_ce
from inductor_ce.api import deferral
from inductor_ce.common.errors import LazyLogitsError
from inductor_ce.rewriting.promises import EAGER, INSIDE
from inductor_ce.rewriting.promises import LAZY as LAZILY

pytestmark = pytest.mark.xdist_group("integrations over ranks")

RANKS, STEPS = 2, 2
WRAPS = {
    "ddp": DistributedDataParallel,
    "static": lambda model: DistributedDataParallel(model, static_graph=True),
    "buckets": lambda model: DistributedDataParallel(model, bucket_cap_mb=1e-2),
    "fsdp2": lambda model: [*map(fully_shard, model.model.layers), fully_shard(model)][-1],
}
# Whether logits are not there after each step. Of a static graph Dynamo makes them once, where it looks at
# what DDP has put its own node behind. Of buckets each is a compiled function of its own.
LAZY = {"ddp": [True, True], "static": [False, True], "buckets": [False, False], "fsdp2": [True, True]}


def whole(x: Tensor) -> Tensor:
    return x.full_tensor() if isinstance(x, DTensor) else x


def trained(rank: int, name: str, ours: bool) -> dict[str, Any]:
    """What a rank sees of a few steps on batches of its own, and reads of the logits before and after."""
    seen: dict[str, Any] = {"losses": [], "lazy": [], "read": [], "errors": []}
    first_bucket = 1 if name == "buckets" else torch.distributed._DEFAULT_FIRST_BUCKET_BYTES
    with (
        clean_slate(),
        without_codegen(),
        mock.patch.object(torch.distributed, "_DEFAULT_FIRST_BUCKET_BYTES", first_bucket),
        mock.patch.object(deferral, "publish", wraps=deferral.publish) as told,
        warnings.catch_warnings(record=True) as warned,
    ):
        warnings.simplefilter("always")
        if ours:
            inductor_ce.install()
        model: nn.Module = WRAPS[name](model_of("Llama", num_hidden_layers=1))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        compiled = torch.compile(model)
        for step in range(STEPS):
            optimizer.zero_grad()
            out = compiled(**batch_of(seed=10 * step + rank))
            out.loss.backward()
            seen["losses"].append(out.loss.item())
            seen["lazy"].append(getattr(out.logits, "is_made", True) is False)
            try:
                seen["read"].append(out.logits.detach() + 0)
            except LazyLogitsError as error:
                seen["errors"].append(str(error))
            seen["gradients"] = {n: whole(p.grad).clone() for n, p in model.named_parameters()}
            optimizer.step()
        if name == "fsdp2":
            with torch.no_grad():
                seen["read"].append(compiled(**batch_of(seed=rank)).logits + 0)
        seen["sites"] = sites()
        seen["heads"] = [site.head for call in told.call_args_list for site in call.args[0].sites]
        seen["warned"] = {str(w.message) for w in warned}
        inductor_ce.uninstall()
    return seen


def on_rank(rank: int) -> dict[str, Any]:
    return {name: [trained(rank, name, ours) for ours in (False, True)] for name in WRAPS}


@pytest.fixture(scope="module")
def ranks() -> list[dict[str, Any]]:
    return spawn(on_rank, RANKS)


@pytest.mark.parametrize("name", WRAPS)
def test_as_plain_compile(name: str, ranks: list[dict[str, Any]]):
    for rank in ranks:
        plain, ours = rank[name]
        assert ours["sites"] >= 1
        assert ours["losses"] == pytest.approx(plain["losses"], rel=1e-6)
        assert len(set(ours["losses"])) == STEPS
        assert ours["lazy"] == LAZY[name]
        assert ours["warned"] <= plain["warned"]
        assert ours["gradients"].keys() == plain["gradients"].keys()
        for parameter, gradient in plain["gradients"].items():
            torch.testing.assert_close(ours["gradients"][parameter], gradient, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["ddp", "static", "buckets"])
def test_logits_read_between_backward_and_step(name: str, ranks: list[dict[str, Any]]):
    for rank in ranks:
        plain, ours = rank[name]
        assert not ours["errors"]
        torch.testing.assert_close(ours["read"], plain["read"], rtol=1e-5, atol=1e-5)


def test_what_is_told(ranks: list[dict[str, Any]]):
    for rank in ranks:
        for name in ("ddp", "static", "fsdp2"):
            assert set(rank[name][1]["heads"]) == {LAZILY}
        assert set(rank["buckets"][1]["heads"]) == {EAGER.format(why=INSIDE)}


def test_fsdp_has_freed_the_weight_after_the_backward(ranks: list[dict[str, Any]]):
    """An error that says what is gone and what to do; read where the weight is there, they are right."""
    for rank in ranks:
        plain, ours = rank["fsdp2"]
        assert len(ours["errors"]) == STEPS
        for error in ours["errors"]:
            assert "lm_head" in error
            assert "was freed since" in error
            assert "before backward()" in error
            assert 'returned_logits="eager"' in error
        torch.testing.assert_close(ours["read"][-1], plain["read"][-1], rtol=1e-5, atol=1e-5)
