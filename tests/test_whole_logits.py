"""The gradient of logits that are whole, made in the forward with their statistics."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import reference
import torch
import torch.nn.functional as F
from gpu_codegen import generate
from harness import Graphs, compile_with_codegen, compile_without_codegen
from reference import Terms, assert_as_fair, measure
from test_lowering import head_arguments
from torch import Tensor

import inductor_ce
from inductor_ce import Options, ops
from inductor_ce.heads.fuse import fuse_heads
from inductor_ce.heads.plan import OUT_OF_RANGE
from inductor_ce.ops import lowering
from inductor_ce.ops.products import TIMES

B, S, V = 2, 12, 1024
N = B * S

Loss = Callable[..., Tensor]


def labels() -> Tensor:
    y = torch.randint(0, V, (B, S))
    y[:, ::5] = -100
    return y


def mean(z: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(z.view(-1, V), y.view(-1))


def z_loss(z: Tensor, y: Tensor) -> Tensor:
    lse, counts = torch.logsumexp(z.view(-1, V), -1), (y != -100).view(-1)
    return mean(z, y) + 1e-2 * (lse.square() * counts).sum() / counts.sum()


def masked(z: Tensor, y: Tensor) -> Tensor:
    rows = F.cross_entropy(z.view(-1, V).float(), y.view(-1).clamp(min=0), reduction="none")
    return (rows * (y != -100).view(-1)).sum() / (y != -100).sum()


def capped(z: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(4 * torch.tanh(z.float() / 4).view(-1, V), y.view(-1))


def scaled(z: Tensor, y: Tensor) -> Tensor:
    return mean((z * 0.25).float(), y)


LOSSES: dict[str, tuple[Loss, Terms]] = {
    "mean": (mean, Terms()),
    "mean of float32": (lambda z, y: mean(z.float(), y), Terms()),
    "sum": (lambda z, y: F.cross_entropy(z.view(-1, V).float(), y.view(-1), reduction="sum"), Terms("sum")),
    "smoothing": (
        lambda z, y: F.cross_entropy(z.view(-1, V).float(), y.view(-1), label_smoothing=0.2),
        Terms(smoothing=0.2),
    ),
    "masked": (masked, Terms()),
}


CHAINED: dict[str, tuple[Loss, Callable[[Tensor], Tensor]]] = {
    "soft-cap": (capped, lambda z: 4 * torch.tanh(z / 4)),
    "scale": (scaled, lambda z: z * 0.25),
}


def exactly(terms: Terms, before: Callable[[Tensor], Tensor] = torch.clone) -> Loss:
    return lambda z, y: reference.cross_entropy(before(z).reshape(-1, V), y.view(-1), terms)


def assert_in_the_forward(loss: Loss, exact: Loss, dtype: torch.dtype) -> Graphs:
    """It is right for two factors, and one operator makes the gradient. Returns the graphs."""
    compiled, graphs = compile_without_codegen(loss, gradient="forward")
    z, y = (3 * torch.randn(B, S, V)).to(dtype), labels()
    for upstream in (torch.tensor(1.0), torch.tensor(-0.25)):
        naive = measure(loss, z, y, upstream=upstream)
        right = measure(exact, z.double(), y, upstream=upstream)
        assert_as_fair(measure(compiled, z, y, upstream=upstream), naive, right)
    assert graphs.count(ops.ROW_STATS_GRAD) == graphs.count(TIMES) == 1
    assert graphs.count(ops.ROW_STATS) == graphs.count(ops.ROW_GRAD) == 0
    return graphs


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("name", LOSSES)
def test_numbers(name: str, dtype: torch.dtype) -> None:
    """For a factor of 1, and for another power of 2, by which nothing is rounded."""
    loss, terms = LOSSES[name]
    assert_in_the_forward(loss, exactly(terms), dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("name", CHAINED)
def test_numbers_behind_a_chain(name: str, dtype: torch.dtype) -> None:
    """What the loss reads is in no memory of its own; the gradient is by the logits before the chain."""
    loss, before = CHAINED[name]
    graphs = assert_in_the_forward(loss, exactly(Terms(), before), dtype)
    (node,) = (node for node in graphs.nodes if node.target == ops.ROW_STATS_GRAD)
    assert node.kwargs["chain"]
    assert not any(
        node.meta["val"].numel() == N * V
        for node in graphs.nodes
        if node.target in (torch.ops.aten.tanh.default, torch.ops.aten.mul.Tensor)
    )


def test_another_factor_rounds_once_more() -> None:
    compiled, _ = compile_without_codegen(lambda z, y: mean(z.float(), y), gradient="forward")
    z, y, third = (3 * torch.randn(B, S, V)).bfloat16(), labels(), torch.tensor(1 / 3)
    one, some = (measure(compiled, z, y, upstream=u).gradient for u in (torch.tensor(1.0), third))
    assert torch.equal(some, (one.float() * third).bfloat16())


def test_loss_that_is_no_longer_alone() -> None:
    """Of the scalar's own gradient too: the logits have that of the product."""
    scale = torch.tensor(2.0, requires_grad=True)

    def loss(z: Tensor, y: Tensor, scale: Tensor) -> Tensor:
        return scale * z_loss(z, y)

    compiled, graphs = compile_without_codegen(loss, gradient="forward")
    z, y = torch.randn(B, S, V), labels()
    made = []
    for f, dtype in ((compiled, torch.float32), (loss, torch.float32), (loss, torch.float64)):
        leaf = z.to(dtype).requires_grad_()
        made.append(torch.autograd.grad(f(leaf, y, scale.to(dtype)), (leaf, scale)))
    for ours, naive, exact in zip(*made, strict=True):
        reference.assert_fair(ours, naive, exact)
    assert graphs.count(ops.ROW_STATS_GRAD) == 1


@torch._functorch.config.patch(donated_buffer=False)
def test_backward_twice() -> None:
    """Where torch is told that it may be: it keeps what the first one read."""
    compiled, _ = compile_with_codegen(mean, gradient="forward")
    z, y = torch.randn(B, S, V), labels()
    leaf = z.clone().requires_grad_()
    value = compiled(leaf, y)
    gradients = [torch.autograd.grad(k * value, leaf, retain_graph=True)[0] for k in (3.0, 3.0, 1.0)]
    assert torch.equal(gradients[0], gradients[1])
    torch.testing.assert_close(gradients[0], 3 * gradients[2])
    torch.testing.assert_close(gradients[2], measure(mean, z, y).gradient)


def test_no_row_counts() -> None:
    compiled, _ = compile_without_codegen(masked, gradient="forward")
    z, y = torch.randn(B, S, V), torch.full((B, S), -100)
    ours, eager = (measure(f, z, y) for f in (compiled, masked))
    assert ours.value.isnan()
    assert eager.value.isnan()
    assert torch.equal(ours.gradient.isnan(), eager.gradient.isnan())


@pytest.mark.parametrize("loss", [mean, capped])
def test_symbolic_rows(loss: Loss) -> None:
    compiled, graphs = compile_without_codegen(loss, gradient="forward", dynamic=True)
    for rows in (3, 5):
        z, y = torch.randn(rows, S, V), torch.randint(0, V, (rows, S))
        ours, eager = (measure(f, z, y) for f in (compiled, loss))
        torch.testing.assert_close(ours.gradient, eager.gradient)
    assert graphs.count(ops.ROW_STATS_GRAD) == 1


BIAS = torch.linspace(-1.0, 1.0, V)


def biased(z: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(z.view(-1, V) + BIAS.to(z.dtype), y.view(-1))


def of_two_chains(z: Tensor, y: Tensor) -> Tensor:
    return capped(z, y) + mean(0.5 * z, y)


def entropy(z: Tensor, y: Tensor) -> Tensor:
    p = z.view(-1, V).softmax(-1)
    return mean(z, y) + (p * p.log()).sum(-1).mean()


def of_each_row(z: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(z.view(-1, V), y.view(-1), reduction="none")


def checkpointed(z: Tensor, y: Tensor) -> Tensor:
    return torch.utils.checkpoint.checkpoint(mean, z, y, use_reentrant=False)


def of_half_the_classes(z: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(z.view(-1, V)[:, : V // 2], y.view(-1).clamp(max=V // 2 - 1))


LEFT: dict[str, tuple[Loss, torch.dtype, int, str]] = {
    "a chain": (biased, torch.float32, V, "the logits are not in memory as they are"),
    "other sums": (entropy, torch.float32, V, "one kernel for both is not faster than two"),
    "unaligned rows": (
        lambda z, y: F.cross_entropy(z.flatten(0, 1), y.view(-1)),
        torch.float32,
        V + 1,
        "one kernel for both is not faster than two",
    ),
    "each row": (of_each_row, torch.float32, V, "the upstream gradient differs from row to row"),
    "float16": (mean, torch.float16, V, OUT_OF_RANGE),
    "a part": (of_half_the_classes, torch.float32, V, "the logits are not in memory as they are"),
    "a checkpoint": (checkpointed, torch.float32, V, "a checkpoint makes the logits again"),
}


@pytest.mark.parametrize("name", LEFT)
def test_left_in_the_backward(name: str) -> None:
    loss, dtype, v, why = LEFT[name]
    compiled, graphs = compile_without_codegen(loss, gradient="forward")
    z, y = torch.randn(B, S, v).to(dtype), labels()
    upstream = torch.rand_like(loss(z.float(), y)).to(dtype)
    ours, eager = (measure(f, z, y, upstream=upstream) for f in (compiled, loss))
    torch.testing.assert_close(ours, eager)
    assert graphs.count(ops.ROW_STATS_GRAD) == 0 < graphs.count(ops.ROW_GRAD)
    with inductor_ce.install(min_vocab=2, gradient="forward"):
        (site,) = inductor_ce.explain(loss, z.requires_grad_(), y).sites
    assert f"their gradient is not made with the statistics: {why}" in site.plan


def test_two_losses_behind_chains_of_their_own() -> None:
    """Each would hold a gradient of the same logits."""
    compiled, graphs = compile_without_codegen(of_two_chains, gradient="forward")
    z, y = torch.randn(B, S, V), labels()
    ours, eager = (measure(f, z, y) for f in (compiled, of_two_chains))
    torch.testing.assert_close(ours, eager)
    assert graphs.count(ops.ROW_STATS_GRAD) == 0


def test_told() -> None:
    with inductor_ce.install(min_vocab=2, gradient="forward"):
        (site,) = inductor_ce.explain(mean, torch.randn(B, S, V, requires_grad=True), labels()).sites
    assert site.plan.endswith("their gradient is made with the statistics")


def test_made_in_the_backward_unless_asked_for() -> None:
    compiled, graphs = compile_without_codegen(mean)
    measure(compiled, torch.randn(B, S, V), labels())
    assert graphs.count(ops.ROW_STATS) == graphs.count(ops.ROW_GRAD) == 1


def test_over_the_logits_of_a_head_that_is_whole() -> None:
    """Nobody reads them any more: the forward has one matrix of their size, which is the gradient."""
    lowering.register()
    v = 4096

    def loss(h: Tensor, w: Tensor, y: Tensor) -> Tensor:
        m, d, pick = ops.row_stats(h @ w.t(), [y], [], "max,sumexp,pick").unbind()
        return (m + d.log() - pick).sum()

    h, w, y, _ = head_arguments()
    w = torch.empty(v, w.shape[1], dtype=w.dtype, device="meta", requires_grad=True)
    options = Options(gradient="forward")
    forward, backward = generate(loss, h, w, y, prepare_joint=lambda graph: fuse_heads(graph, options))
    assert forward.allocations.count((len(h), v)) == 1
    assert (len(h), v) not in backward.allocations
    assert [name for name in forward.launches if "tem" in name]
    assert not [name for name in backward.launches if "tem" in name]


def test_at_once_where_no_factor_comes_from_above() -> None:
    """A graph that makes loss and gradient needs no option: nothing waits for the backward."""
    graph = torch.fx.experimental.proxy_tensor.make_fx(_loss_and_gradient, tracing_mode="fake")(
        torch.randn(N, V), torch.randint(0, V, (N,))
    )
    (planned,) = fuse_heads(graph.graph, Options())
    graph.recompile()
    assert planned.plan.reason.endswith("their gradient is made with the statistics")
    assert not graph.graph.find_nodes(op="call_function", target=ops.ROW_GRAD)
    z, y = torch.randn(N, V), torch.randint(0, V, (N,))
    for ours, expected in zip(graph(z, y), _loss_and_gradient(z, y), strict=True):
        torch.testing.assert_close(ours, expected)


def test_each_of_two_losses_would_hold_a_gradient() -> None:
    """Though they read the logits by views of their own."""

    def both(z: Tensor, y: Tensor) -> Tensor:
        return _loss_and_gradient(z, y)[1] + _loss_and_gradient(z.view(1, N, V).view(N, V), y.flip(0))[1]

    graph = torch.fx.experimental.proxy_tensor.make_fx(both, tracing_mode="fake")(
        torch.randn(N, V), torch.randint(0, V, (N,))
    )
    assert all("with the statistics" not in each.plan.reason for each in fuse_heads(graph.graph, Options()))
    assert not graph.graph.find_nodes(op="call_function", target=ops.ROW_STATS_GRAD)


def _loss_and_gradient(z: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    m, d, pick = ops.row_stats(z, [y], [], "max,sumexp,pick").unbind()
    share = torch.full((N,), 1 / N)
    c = torch.cat([x.unsqueeze(0) for x in (m, share / d, -share)])
    return (m + d.log() - pick).mean(), ops.row_grad(z, [y], [], m, c, "max,sumexp,pick")
