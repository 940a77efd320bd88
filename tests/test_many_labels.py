"""Losses that pick many logits of each row, as distillation from a teacher's best k of them does."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from gallery import run
from gpu_codegen import generate, interpret
from harness import Rewritten, compile_without_codegen, misses, sites
from head_cases import counts
from reference import assert_fair, log_sum_exp
from test_head_memory import largest, saved
from torch import Tensor
from torch._dynamo.utils import counters

from inductor_ce import ops
from inductor_ce.ops import lowering

B, S, V, K, D = 2, 6, 40, 18, 4
N = B * S


def given(*rows: int, axis: int = -1, v: int = V) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Logits, labels of which some are the same, a teacher's probabilities, and a mask of rows."""
    rows = rows or (N,)
    z = 3 * torch.randn(*rows, v).double()
    index = torch.rand(*rows, v).argsort(-1)[..., :K]
    index[..., 3] = index[..., 2]
    q = torch.rand(*rows, K).double().softmax(-1)
    z, index, q = (x.movedim(-1, axis).contiguous() for x in (z, index, q))
    mask = torch.arange(math.prod(rows)).view(rows) % 3 > 0
    return z.requires_grad_(), index, q, mask


# Spellings over [N, V]


def of_log_softmax(z: Tensor, index: Tensor, q: Tensor, mask: Tensor) -> Tensor:
    log_p = F.log_softmax(z, -1).gather(-1, index)
    return (q * (q.log() - log_p)).sum(-1).mean()


def beside_a_normaliser(z: Tensor, index: Tensor, q: Tensor, mask: Tensor) -> Tensor:
    log_p = z.gather(-1, index) - torch.logsumexp(z, -1, keepdim=True)
    return ((q * (q.log() - log_p)).sum(-1) * mask).sum() / mask.sum()


def renormalised_with_a_temperature(z: Tensor, index: Tensor, q: Tensor, mask: Tensor) -> Tensor:
    log_p = torch.take_along_dim((z / 2).log_softmax(-1), index, -1)
    q = q / q.sum(-1, keepdim=True)
    return 4 * F.kl_div(log_p, q, reduction="none").sum(-1)[mask].mean()


def as_kl_div(z: Tensor, index: Tensor, q: Tensor, mask: Tensor) -> Tensor:
    log_p = torch.gather(F.log_softmax(z, dim=-1), 1, index)
    return F.kl_div(log_p, q.log(), reduction="batchmean", log_target=True)


def of_slots(z: Tensor, index: Tensor, q: Tensor, mask: Tensor) -> Tensor:
    kept = (q > q.median()) & mask[:, None]
    return -torch.where(kept, z.log_softmax(-1).gather(1, index), 0.0).sum() / kept.sum()


def of_probabilities(z: Tensor, index: Tensor, q: Tensor, mask: Tensor) -> Tensor:
    return (z.softmax(-1).gather(-1, index) - q).square().sum(-1).mean()


def beside_a_label(z: Tensor, index: Tensor, q: Tensor, mask: Tensor) -> Tensor:
    log_p = z.log_softmax(-1)
    entropy = -(log_p.exp() * log_p).sum(-1)
    soft = -(q * log_p.gather(-1, index)).sum(-1)
    return F.nll_loss(log_p, index[:, 0]) + soft.mean() - 0.1 * entropy.mean()


def against_another(z: Tensor, index: Tensor, q: Tensor, mask: Tensor) -> Tensor:
    """As preferences between two sets of columns, and one label taken from all."""
    log_p = z.log_softmax(-1)
    gaps = log_p.gather(-1, index) - log_p.gather(-1, (index + 1) % V)
    return -F.logsigmoid(gaps - log_p.gather(-1, index[:, :1])).mean()


def with_class_weights(z: Tensor, index: Tensor, q: Tensor, mask: Tensor) -> Tensor:
    log_p = (z.log_softmax(-1) * torch.arange(V)).gather(-1, index)
    return -(q * log_p).sum(-1).mean()


def with_weights(z: Tensor, index: Tensor, q: Tensor, mask: Tensor) -> Tensor:
    log_p = (z.log_softmax(-1) * z.detach().cos()).gather(-1, index)
    return -(q * log_p).sum(-1).mean()


def detached(z: Tensor, index: Tensor, q: Tensor, mask: Tensor) -> Tensor:
    log_p = z.log_softmax(-1)
    return (log_p.gather(-1, index).detach() * q).sum() * log_p.gather(-1, index).mean()


SPELLINGS = [of_log_softmax, beside_a_normaliser, renormalised_with_a_temperature, as_kl_div, of_slots]
SPELLINGS += [of_probabilities, beside_a_label, against_another, with_class_weights, with_weights, detached]

# Over other dimensions


def of_a_sequence(z: Tensor, index: Tensor, q: Tensor, mask: Tensor) -> Tensor:
    log_p = z[:, :-1].log_softmax(-1).gather(-1, index[:, 1:])
    return -(q[:, 1:] * log_p).sum(-1)[mask[:, 1:]].mean()


def cut_afterwards(z: Tensor, index: Tensor, q: Tensor, mask: Tensor) -> Tensor:
    log_p = z.log_softmax(-1)[:, :-1].gather(-1, index[:, 1:])
    return -(q[:, 1:] * log_p).sum(-1).mean()


def flattened(z: Tensor, index: Tensor, q: Tensor, mask: Tensor) -> Tensor:
    log_p = z.reshape(-1, V).log_softmax(-1).gather(-1, index.reshape(-1, K))
    return -(q * log_p.view(B, S, K)).sum(-1).mean()


def with_classes_between(z: Tensor, index: Tensor, q: Tensor, mask: Tensor) -> Tensor:
    log_p = z.log_softmax(1).gather(1, index)
    return (q * (q.log() - log_p)).sum(1).mean()


def with_rows_transposed(z: Tensor, index: Tensor, q: Tensor, mask: Tensor) -> Tensor:
    log_p = z.log_softmax(1).transpose(1, 2).gather(-1, index.transpose(1, 2))
    return -(q.transpose(1, 2) * log_p).sum(-1).mean()


def rewritten(f: Callable[..., Tensor], args: tuple[Tensor, ...]) -> Rewritten:
    backend = Rewritten()
    ours, exact = run(torch.compile(f, backend=backend), args), run(f, args)
    for mine, true in zip(ours.results + ours.gradients, exact.results + exact.gradients, strict=True):
        torch.testing.assert_close(mine, true, rtol=1e-12, atol=1e-14)
    return backend


@pytest.mark.parametrize("f", SPELLINGS)
def test_numbers(f: Callable[..., Tensor]) -> None:
    ours = rewritten(f, given())
    assert ours.count(ops.ROW_STATS) == 1
    assert not ours.report.misses


@pytest.mark.parametrize(
    ("f", "axis"),
    [
        (of_a_sequence, -1),
        (cut_afterwards, -1),
        (flattened, -1),
        (with_classes_between, 1),
        (with_rows_transposed, 1),
    ],
)
def test_other_dimensions(f: Callable[..., Tensor], axis: int) -> None:
    ours = rewritten(f, given(B, S, axis=axis))
    assert ours.count(ops.ROW_STATS) == 1
    assert not ours.report.misses


def test_weights_of_labels_have_their_gradient() -> None:
    z, index, q, mask = given()
    ours = rewritten(of_log_softmax, (z, index, q.requires_grad_(), mask))
    assert ours.count(ops.ROW_STATS) == 1


def test_one_row() -> None:
    def f(z: Tensor, index: Tensor) -> Tensor:
        return -z.log_softmax(-1)[index].mean()

    z, index, *_ = given(1)
    ours = rewritten(f, (z.detach()[0].requires_grad_(), index[0] - V))
    assert ours.count(ops.ROW_STATS) == 1


def test_labels_that_are_no_class() -> None:
    """Torch raises, on a CPU; here their slots are NaN, and no others."""
    z, index, *_ = given()
    index[0, 0], index[1, 1] = -1, V

    def f(z: Tensor, index: Tensor) -> Tensor:
        return z.log_softmax(-1).gather(-1, index)

    ours = torch.compile(f, backend=Rewritten())(z, index)
    wrong = torch.zeros(N, K, dtype=torch.bool)
    wrong[0, 0] = wrong[1, 1] = True
    torch.testing.assert_close(ours.isnan(), wrong)
    torch.testing.assert_close(ours[~wrong], f(z, index.clamp(0, V - 1))[~wrong])


# Heads


def head(loss: Callable[..., Tensor], dtype: torch.dtype | None = None) -> Callable[..., Tensor]:
    def f(h: Tensor, W: Tensor, index: Tensor, q: Tensor, mask: Tensor) -> Tensor:
        return loss(F.linear(h, W) if dtype is None else F.linear(h, W).to(dtype), index, q, mask)

    return f


def of_head(dtype: torch.dtype = torch.float64) -> tuple[Tensor, ...]:
    _, index, q, mask = given()
    h, W = torch.randn(N, D).to(dtype), torch.randn(V, D).to(dtype)
    return h.requires_grad_(), W.requires_grad_(), index, q.float() if dtype != torch.float64 else q, mask


PIECES = 3
HEADS = [of_log_softmax, beside_a_normaliser, of_slots, beside_a_label, against_another]


@pytest.mark.parametrize(
    ("loss", "strategy"),
    [
        *((loss, "token_chunks") for loss in HEADS),
        (of_log_softmax, "vocab_slabs"),
        (beside_a_label, "vocab_slabs"),
    ],
)
def test_heads_in_pieces(loss: Callable[..., Tensor], strategy: str) -> None:
    args = of_head()
    compiled, graphs = compile_without_codegen(head(loss), strategy=strategy, memory_budget=0.4)
    ours, exact = run(compiled, args), run(head(loss), args)
    for mine, true in zip(ours.results + ours.gradients, exact.results + exact.gradients, strict=True):
        torch.testing.assert_close(mine, true, rtol=1e-12, atol=1e-14)
    assert counts() == {strategy: 1}
    assert (sites(), misses()) == (1, 0)
    assert graphs.pieces > 1


def of_chosen_rows(z: Tensor, index: Tensor, q: Tensor, mask: Tensor) -> Tensor:
    rows = (q * (q.log() - z.log_softmax(-1).gather(-1, index))).sum(-1)
    return torch.where(mask, rows, 0.0).sum() / mask.sum()


def of_chosen_slots(z: Tensor, index: Tensor, q: Tensor, mask: Tensor) -> Tensor:
    slots = z.log_softmax(-1).gather(-1, index).masked_fill(~mask[:, None], 0.0)
    return -slots.sum(-1).square().mean()


@pytest.mark.parametrize("loss", [of_chosen_rows, of_chosen_slots])
def test_rows_that_do_not_count_are_skipped(loss: Callable[..., Tensor]) -> None:
    args = of_head()
    compiled, _ = compile_without_codegen(head(loss), strategy="token_chunks", memory_budget=0.5)
    ours, exact = run(compiled, args), run(head(loss), args)
    for mine, true in zip(ours.results + ours.gradients, exact.results + exact.gradients, strict=True):
        torch.testing.assert_close(mine, true, rtol=1e-12, atol=1e-14)
    assert counters["inductor_ce"]["skips_rows"] == 1


def large() -> tuple[Tensor, ...]:
    """Of a head whose logits are larger than all else, even than what is picked of them."""
    _, index, q, mask = given(LARGE_N, v=LARGE_V)
    h, W = torch.randn(LARGE_N, D), torch.randn(LARGE_V, D)
    return h.requires_grad_(), W.requires_grad_(), index, q.float(), mask


LARGE_N, LARGE_V = 60, 400
MOST = max(LARGE_V * D, LARGE_N * (2 + K))  # a gradient of the weight, or the statistics


def test_logits_are_never_all_in_memory() -> None:
    f = head(of_log_softmax)
    compiled, graphs = compile_without_codegen(f, strategy="token_chunks", memory_budget=0.28)
    run(compiled, large())
    forward, backward = graphs.final
    assert largest(forward) == LARGE_N // 4 * LARGE_V
    assert max(*saved(forward), largest(backward)) <= MOST


def test_gradient_alone_has_the_size_of_given_logits() -> None:
    h, W, *others = large()
    z = F.linear(h, W).detach().requires_grad_()
    compiled, graphs = compile_without_codegen(of_log_softmax)
    run(compiled, (z, *others))
    forward, backward = graphs.final
    assert largest(forward) <= MOST
    assert max(saved(forward)) <= MOST
    assert [n.target for n in backward.graph.nodes if size(n) > MOST and n.op != "placeholder"] == [
        ops.ROW_GRAD
    ]


def size(node: torch.fx.Node) -> int:
    value = node.meta.get("val")
    return value.numel() if isinstance(value, Tensor) else 0


@pytest.mark.parametrize("strategy", ["materialise", "token_chunks", "vocab_slabs"])
def test_errors_in_16_bits(strategy: str) -> None:
    """A student near its teacher: its gradients are small differences of probabilities."""

    def f(h: Tensor, W: Tensor, index: Tensor, log_p: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            z = F.linear(h, W)
        log_q = F.log_softmax(z.float(), -1).gather(-1, index)
        return F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1).mean()

    h, W = torch.randn(LARGE_N, D).bfloat16().float(), torch.randn(LARGE_V, D).bfloat16().float()
    z = h.double() @ W.double().T
    log_p, index = ((z + 0.01 * torch.randn_like(z)).log_softmax(-1)).topk(K, -1)
    args = h.requires_grad_(), W.requires_grad_(), index, log_p.float()
    compiled, _ = compile_without_codegen(f, strategy=strategy, memory_budget=0.28)
    ours, naive = run(compiled, args), run(f, args)
    true = run(by_formula, (*(x.detach().double().requires_grad_() for x in (h, W)), index, log_p.float()))
    for part in ("results", "gradients"):
        for each in zip(getattr(ours, part), getattr(naive, part), getattr(true, part), strict=True):
            assert_fair(*each)


def by_formula(h: Tensor, W: Tensor, index: Tensor, log_p: Tensor) -> Tensor:
    z, log_p = h @ W.T, log_p.double()
    log_q = torch.stack([z[n, index[n]] for n in range(len(z))]) - log_sum_exp(z)[:, None]
    return (log_p.exp() * (log_p - log_q)).sum(-1).mean()


# Code


def for_templates(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, str]:
    """Logits over a ragged vocabulary, a label and many of each row, some of them the same or no class."""
    z = (3 * torch.randn(3, 1030)).to(dtype)
    index = torch.randint(0, 1030, (3, K), dtype=torch.int32)
    index[:, 0], index[0, 1], index[1, 2], index[:, 5] = 1029, -1, 1030, index[:, 4]
    return z, torch.tensor([0, 1029, -100]), index, f"max,sumexp,pick,sum,picks*{K}"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_templates(dtype: torch.dtype) -> None:
    lowering.register()
    z, y, index, which = for_templates(dtype)
    (stats,) = generate(lambda z, *ys: ops.row_stats(z, list(ys), [], which), *metas(z, y, index))
    packed = torch.full((4 + K, len(z)), torch.nan)
    interpret(stats, [z, y, index], packed)
    x = z.double().requires_grad_()
    exact = by_definition(x, y, index)
    torch.testing.assert_close(packed.double(), exact, rtol=1e-5, atol=1e-3)

    m, c = packed[0].contiguous(), torch.randn(4 + K, len(z))
    (grad,) = generate(
        lambda z, m, c, *ys: ops.row_grad(z, list(ys), [], m, c, which), *metas(z, m, c, y, index)
    )
    dz = torch.full_like(z, torch.nan)
    interpret(grad, [z, m, c, y, index], dz)
    exact.backward(c.double())
    assert_fair(dz, x.grad.to(dtype), x.grad)


@pytest.mark.with_all("templates, whose rows are these; and graphs that run eagerly")
def test_loops() -> None:
    """What runs where there are no templates."""
    lowering.register()
    z, y, index, which = for_templates(torch.bfloat16)
    m, c = z.amax(-1).float(), torch.randn(4 + K, len(z))

    def f(z: Tensor, y: Tensor, index: Tensor, m: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        return ops.row_stats(z, [y, index], [], which), ops.row_grad(z, [y, index], [], m, c, which)

    packed, dz = torch.compile(f, fullgraph=True)(z, y, index, m, c)
    x = z.double().requires_grad_()
    exact = by_definition(x, y, index)
    torch.testing.assert_close(packed.double(), exact, rtol=1e-5, atol=1e-3)
    exact.backward(c.double())
    assert_fair(dz, x.grad.bfloat16(), x.grad)


def by_definition(z: Tensor, y: Tensor, index: Tensor) -> Tensor:
    """The rows of `for_templates`, by one-hot products."""
    m = z.detach().amax(-1)
    hot = torch.cat([y[:, None], index.long()], 1)[..., None] == torch.arange(z.shape[1])
    single, *several = (hot * z[:, None]).sum(-1).unbind(1)
    gap = z - m[:, None]
    return torch.stack([m, gap.exp().sum(-1), single, gap.sum(-1), *several])


def metas(*tensors: Tensor) -> list[Tensor]:
    return [t.to("meta") for t in tensors]
