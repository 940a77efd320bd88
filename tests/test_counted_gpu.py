"""Rows that do not count, on a GPU: numbers, CUDA graphs, and nobody waits.

Each step of a chunk is an operator of its own here; chunks as one operator have tests of theirs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import inductor_ce
from inductor_ce.heads import rolled, skip
from inductor_ce.ops import counted_kernels

pytestmark = pytest.mark.gpu

N, V, D = 2048, 32000, 512
GRAPHS = "reduce-overhead"
SHARES = [0.0, 0.5, 0.9, 1.0]


@pytest.fixture(autouse=True)
def _in_chunks(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    torch._dynamo.reset()
    monkeypatch.setattr(skip, "LOOKED_WORK", 0)
    monkeypatch.setattr(rolled, "DEVICES", ())
    with inductor_ce.install(strategy="token_chunks", memory_budget=0.3):
        yield


# Who looks at how many rows count: the host, which a body gives the time to, or the device alone.
BODIES = {"host": 0, "device": 2**62}


@pytest.fixture
def mode(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str | None:
    """Of torch.compile, for who looks, or the mode in which the device alone does."""
    monkeypatch.setattr(skip, "BODY", BODIES.get(request.param, skip.BODY))
    return None if request.param in BODIES else request.param


everywhere = pytest.mark.parametrize("mode", [*BODIES, GRAPHS], indirect=True)
by_the_host = pytest.mark.parametrize("mode", ["host"], indirect=True)


def plain(h: Tensor, W: Tensor, b: Tensor | None, y: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(h, W, b).float(), y, reduction="sum") / 100


def smooth(h: Tensor, W: Tensor, b: Tensor | None, y: Tensor) -> Tensor:
    z = F.linear(h, W, b).float()
    counted = y != -100
    kept = torch.where(counted, z.logsumexp(-1), 0)
    return F.cross_entropy(z, y, label_smoothing=0.1, reduction="sum") / 100 + 1e-4 * kept.square().sum()


def capped(h: Tensor, W: Tensor, b: Tensor | None, y: Tensor) -> Tensor:
    z = 30 * torch.tanh(F.linear(h, W, b) / 30)
    return F.cross_entropy(z.float(), y, reduction="sum") / 100


def multiplied(h: Tensor, W: Tensor, b: Tensor | None, y: Tensor) -> Tensor:
    mask = (y != -100).float()
    losses = F.cross_entropy(F.linear(h, W, b).float(), y.clamp(min=0), reduction="none")
    return (losses * mask).sum() / 100


LOSSES: dict[str, Callable[..., Tensor]] = {
    "plain": plain,
    "smooth": smooth,
    "capped": capped,
    "multiplied": multiplied,
}


def inputs(share: float, dtype: torch.dtype = torch.bfloat16, v: int = V) -> tuple[Tensor, ...]:
    torch.manual_seed(0)
    h = torch.randn(N, D, device="cuda").to(dtype)
    W = (torch.randn(v, D, device="cuda") * D**-0.5).to(dtype)
    b = torch.randn(v, device="cuda").to(dtype)
    y = torch.randint(0, v, (N,), device="cuda")
    y[torch.rand(N, device="cuda") < share] = -100
    return h, W, b, y


def stepped(f: Callable[..., Tensor], h: Tensor, W: Tensor, b: Tensor, y: Tensor) -> list[Tensor]:
    leaves = [x.detach().requires_grad_() for x in (h, W, b)]
    torch.compiler.cudagraph_mark_step_begin()
    loss = f(*leaves, y)
    return [x.detach().clone() for x in (loss, *torch.autograd.grad(loss, leaves))]


def errors(made: list[Tensor], exact: list[Tensor]) -> list[float]:
    return [
        ((m.double() - e).norm() / e.norm().clamp(min=1e-30)).item() for m, e in zip(made, exact, strict=True)
    ]


def in_64_bits(f: Callable[..., Tensor], given: tuple[Tensor, ...]) -> list[Tensor]:
    def exact(h: Tensor, W: Tensor, b: Tensor, y: Tensor) -> Tensor:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Tensor, "float", lambda x: x)
            return f(h, W, b, y)

    return stepped(exact, *(x.double() if x.is_floating_point() else x for x in given))


@everywhere
@pytest.mark.parametrize(("name", "v"), [*((name, V) for name in LOSSES), ("plain", 32003)])
def test_numbers(name: str, v: int, mode: str | None) -> None:
    f = LOSSES[name]
    compiled = torch.compile(f, mode=mode)
    for share in SHARES:
        given = inputs(share, v=v)
        for _ in range(3 if mode and not share else 1):
            made = stepped(compiled, *given)
        again = stepped(compiled, *given)
        assert all(torch.equal(x, y) for x, y in zip(made, again, strict=True))
        exact = in_64_bits(f, given)
        allowed = errors(stepped(f, *given), exact)
        for own, naive in zip(errors(made, exact), allowed, strict=True):
            assert own <= 1.15 * naive + 1e-5
    assert torch._dynamo.utils.counters["inductor_ce"]["token_chunks"] == 1


@pytest.mark.parametrize("mode", [*BODIES], indirect=True)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_other_dtypes(dtype: torch.dtype, mode: None) -> None:
    """Of which the device makes no products: where it would have to, all rows are computed."""
    given = inputs(0.7, dtype)
    made, exact = stepped(torch.compile(plain), *given), in_64_bits(plain, given)
    allowed = errors(stepped(plain, *given), exact)
    assert all(own <= 1.15 * naive + 1e-6 for own, naive in zip(errors(made, exact), allowed, strict=True))


@everywhere
def test_nobody_waits_for_the_gpu(mode: str | None) -> None:
    compiled = torch.compile(plain, mode=mode)
    given = inputs(0.75)
    for _ in range(3):
        stepped(compiled, *given)
    torch.cuda.set_sync_debug_mode("error")
    try:
        stepped(compiled, *given)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize(("first", "ours"), [(0.0, False), (0.5, True)])
def test_a_graph_is_recorded_as_the_call_before_it_was(
    first: float, ours: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With products of all rows, or of those that count; what comes later is right with either."""
    called, product = [], counted_kernels._product

    def counting(*args: Any, **kwargs: Any) -> bool:
        called.append(torch.cuda.is_current_stream_capturing())
        return product(*args, **kwargs)

    monkeypatch.setattr(counted_kernels, "_product", counting)
    compiled = torch.compile(plain, mode=GRAPHS)
    for share in (first, first, first, 0.9, 0.0):
        given = inputs(share)
        made, exact = stepped(compiled, *given), in_64_bits(plain, given)
        allowed = errors(stepped(plain, *given), exact)
        assert all(
            own <= 1.15 * naive + 1e-5 for own, naive in zip(errors(made, exact), allowed, strict=True)
        )
    assert False in called  # a call that is not recorded
    assert (True in called) == ours


@by_the_host
def test_a_capture_of_the_users(mode: None) -> None:
    """The host may not look while it is recorded, nor when it is replayed with other labels."""
    compiled = torch.compile(plain)
    h, W, b, y = inputs(0.75)
    leaves = [x.requires_grad_() for x in (h, W, b)]
    other = inputs(0.2)[3]
    want = [stepped(compiled, h, W, b, labels) for labels in (y, other)]

    def step() -> list[Tensor]:
        loss = compiled(*leaves, y)
        return [loss, *torch.autograd.grad(loss, leaves)]

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        made = step()
    for labels, right in zip((y.clone(), other), want, strict=True):
        y.copy_(labels)
        graph.replay()
        assert max(errors(made, [x.double() for x in right])) < 5e-3


@by_the_host
def test_the_host_is_told_long_before_the_head(mode: None) -> None:
    """What is counted is on its way before the body begins, so that the body's time hides it."""
    from torch._inductor.utils import run_and_get_code

    def model(x: Tensor, A: Tensor, W: Tensor, b: Tensor, y: Tensor) -> Tensor:
        return plain(torch.tanh(x @ A) @ A, W, b, y)

    h, W, b, y = inputs(0.5)
    A = torch.randn(D, D, device="cuda", dtype=torch.bfloat16) / D**0.5
    leaves = [x.requires_grad_() for x in (h, A, W, b)]
    _, (code, *_) = run_and_get_code(torch.compile(model), *leaves, y)
    called: Any = code[code.index("def call(") :]
    assert called.index("host_copy") < called.index("extern_kernels.mm") < called.index("inductor_ce_logits")
