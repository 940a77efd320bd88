"""Trap 11: one cache for all ranks, cold and then, in other processes, warm. What is cached knows no rank."""

import uuid

import dtensor_cases
import pytest
import torch
import torch.nn.functional as F
from dtensor_cases import Setup, distributed, replace, tensors
from ranks import spawn, tagged_caches
from torch._dynamo.utils import counters

import inductor_ce

SETUP = Setup((2,), V=24)


def train_step(rank: int, device: str, tag: str) -> dict:
    """As a user compiles it, with a cache that is shared with the other rank."""
    given = distributed(replace(SETUP, device=device), tensors(SETUP, -100))
    with inductor_ce.install(min_vocab=2), tagged_caches(tag):
        f = torch.compile(lambda h, W, y: F.cross_entropy(F.linear(h, W), y, label_smoothing=0.1))
        loss = f(given["h"], given["W"], given["y"])
        loss.backward()
    hits = counters["inductor"]["fxgraph_cache_hit"] + counters["aot_autograd"]["autograd_cache_hit"]
    return {
        "loss": loss.detach().full_tensor(),
        "dW": given["W"].grad.full_tensor(),
        "dh": given["h"].grad.full_tensor(),
        "hits": hits,
    }


@pytest.fixture(scope="module", params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def runs(request: pytest.FixtureRequest):
    device, tag = request.param, uuid.uuid4().hex
    return tuple(spawn(train_step, 2, device, tag, device=device, new=new) for new in (False, True))


def test_trap_11_cold_and_warm_equal_dense(runs):
    x = tensors(SETUP, -100)
    h, W = x["h"].requires_grad_(), x["W"].requires_grad_()
    loss = dtensor_cases.reference.cross_entropy(F.linear(h, W), x["y"], dtensor_cases.Terms(smoothing=0.1))
    loss.backward()
    for ranks in runs:
        for rank in ranks:
            torch.testing.assert_close(rank["loss"], loss.detach())
            torch.testing.assert_close(rank["dW"], W.grad)
            torch.testing.assert_close(rank["dh"], h.grad)


def test_the_second_run_is_warm(runs):
    assert all(rank["hits"] for rank in runs[1])
