"""Returned logits on a GPU: what they are, what is in memory for them, and CUDA graphs."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import inductor_ce
from inductor_ce.api.lazy_logits import LazyLogits
from inductor_ce.common.errors import LazyLogitsError

pytestmark = pytest.mark.gpu

B, S, D, V = 4, 1024, 512, 50304
LOGITS = B * S * V * 2


class Model(nn.Module):
    """A language model with nothing between embedding and head, which returns its logits as most do."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.body = nn.Embedding(V, D), nn.Linear(D, D)
        self.head = nn.Linear(D, V, bias=False)

    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        logits = 20 * torch.tanh(self.head(F.silu(self.body(self.embed(x)))) / 20)
        return F.cross_entropy(logits.float().flatten(0, 1), y.flatten()), logits


@pytest.fixture
def model() -> Model:
    torch.manual_seed(0)
    return Model().to("cuda", torch.bfloat16)


@pytest.fixture
def batch() -> tuple[Tensor, Tensor]:
    return tuple(torch.randint(V, (B, S), device="cuda") for _ in range(2))


@pytest.fixture(autouse=True)
def installed() -> Iterator[None]:
    torch._dynamo.reset()
    with inductor_ce.install():
        yield


def gradients(model: Model) -> list[Tensor]:
    found = [p.grad for p in model.parameters()]
    model.zero_grad(set_to_none=True)
    assert all(g is not None for g in found)
    return found


def peak(step) -> int:
    """Bytes that a step holds at most, beyond what was there."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    step()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def near(a: Tensor, b: Tensor) -> None:
    """Equal but for what a product of another shape, whose sums have another order, rounds otherwise."""
    torch.testing.assert_close(a, b, rtol=2**-7, atol=2**-5)


def test_they_are_those_of_eager(model: Model, batch: tuple[Tensor, Tensor]):
    loss, logits = torch.compile(model)(*batch)
    loss.backward()
    ours = gradients(model)
    eager_loss, eager_logits = model(*batch)
    eager_loss.backward()
    assert isinstance(logits, LazyLogits)
    assert not logits.is_made
    # The last step of eager's chain is rounded like ours; the product is the same call of the same library.
    assert torch.equal(logits.detach(), eager_logits)
    torch.testing.assert_close(loss, eager_loss, rtol=1e-3, atol=1e-3)
    for a, b in zip(ours, gradients(model), strict=True):
        assert (a - b).float().norm() <= 2e-2 * b.float().norm()


def test_nobody_holds_all_logits(model: Model, batch: tuple[Tensor, Tensor]):
    compiled = torch.compile(model)

    def step() -> None:
        loss, _ = compiled(*batch)
        loss.backward()
        model.zero_grad(set_to_none=True)

    step()
    assert peak(step) < LOGITS + sum(p.numel() * 2 for p in model.parameters())  # plain holds three of them


def test_rows_take_what_rows_take(model: Model, batch: tuple[Tensor, Tensor]):
    compiled = torch.compile(model)
    with torch.no_grad():
        _, logits = compiled(*batch)
        whole = model(*batch)[1]
        last: list[Tensor] = []
        assert peak(lambda: last.append(logits[:, -1] + 0)) < 8 * B * V * 2
        near(last[0], whole[:, -1])
        best: list[Tensor] = []
        taken = peak(lambda: best.append(logits.argmax(-1)))
        assert taken < LOGITS
        assert not logits.is_made
        near(whole.gather(-1, best[0][..., None])[..., 0], whole.amax(-1))


def test_gradients_through_them(model: Model, batch: tuple[Tensor, Tensor]):
    def total(loss: Tensor, logits: Tensor) -> Tensor:
        return (
            loss + 1e-3 * logits[:, ::7].float().square().mean() + 1e-3 * logits.float().logsumexp(-1).mean()
        )

    total(*torch.compile(model)(*batch)).backward()
    ours = gradients(model)
    total(*model(*batch)).backward()
    for a, b in zip(ours, gradients(model), strict=True):
        assert (a - b).float().norm() <= 2e-2 * b.float().norm()


def test_they_outlive_a_cuda_graph_but_not_a_step(model: Model, batch: tuple[Tensor, Tensor]):
    compiled = torch.compile(model, mode="reduce-overhead")
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    kept = []
    for i in range(5):
        torch.compiler.cudagraph_mark_step_begin()
        x, y = (t.roll(i, 0) for t in batch)
        loss, logits = compiled(x, y)
        loss.backward()
        with torch.no_grad():
            expected = model(x, y)
            torch.testing.assert_close(loss, expected[0], rtol=1e-2, atol=1e-2)
            near(logits[0, :3].detach() + 0, expected[1][0, :3])
        kept.append((logits, expected[1]))
        if i < 2:
            assert torch.equal(logits.detach() + 0, expected[1])
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    assert torch.equal(kept[1][0].detach() + 0, kept[1][1])  # made in time, and still there
    with pytest.raises(LazyLogitsError, match=r"head\.weight.* was changed in place since"):
        kept[3][0].sum()


@pytest.mark.parametrize("mode", [None, "reduce-overhead"])
@pytest.mark.parametrize("compiled_body", [False, True])
def test_a_deferred_head_whose_loss_is_compiled_alone(
    model: Model, batch: tuple[Tensor, Tensor], compiled_body: bool, mode: str | None
):
    """Steps with other batches, each as eager: under CUDA graphs nothing of the step before is read."""
    inductor_ce.defer(model.head)

    def hidden(x: Tensor) -> Tensor:
        return F.silu(model.body(model.embed(x)))

    def loss_of(z: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(z.float().flatten(0, 1), y.flatten())

    body = torch.compile(hidden, mode=mode) if compiled_body else hidden
    loss = torch.compile(loss_of, mode=mode)
    x, y = batch
    for i in range(4):
        torch.compiler.cudagraph_mark_step_begin()
        x, y = x.roll(i, 1), y.roll(i, 0)
        logits = model.head(body(x))
        assert isinstance(logits, LazyLogits)
        value = loss(logits, y)
        value.backward()
        assert not logits.is_made
        value, ours = value.clone(), [g.clone() for g in gradients(model)]
        inductor_ce.restore(model.head)
        right = loss_of(model.head(hidden(x)), y)
        right.backward()
        torch.testing.assert_close(value, right, rtol=1e-3, atol=1e-3)
        for a, b in zip(ours, gradients(model), strict=True):
            assert (a - b).float().norm() <= 2e-2 * b.float().norm()
        inductor_ce.defer(model.head)
    inductor_ce.restore(model.head)
