"""Heads within programs: other spellings, tied weights, several heads, checkpoints, accumulation, escapes."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import head_cases as cases
import pytest
import torch
import torch.nn.functional as F
from harness import compile_without_codegen, sites
from head_cases import B, D, S, V, assert_all_fair, counts, inputs, measure
from reference import assert_fair
from torch import Tensor, nn
from torch._dynamo.decorators import mark_unbacked
from torch.utils.checkpoint import checkpoint

import inductor_ce
from inductor_ce.heads.no_head import CONVOLUTION, DIVIDED, JOINED, RANGE, ROWS, SYMBOLIC_ROWS
from inductor_ce.heads.row_rules import OF_OTHERS

DIVIDING = ["token_chunks", "vocab_slabs"]
by_dividing = pytest.mark.parametrize("strategy", DIVIDING)
BUDGET = 0.7


def compiled(f: Callable[..., Any], strategy: str, budget: float = BUDGET) -> Callable[..., Any]:
    return compile_without_codegen(f, strategy=strategy, memory_budget=budget)[0]


def check(
    loss: cases.Loss, strategy: str, heads: int = 1, budget: float = BUDGET, expected: str = ""
) -> None:
    """The loss is computed by `strategy` throughout, or as expected, and is fair to itself in float64."""
    given, upstream = inputs(), torch.randn(loss(*inputs()).shape)
    ours = measure(compiled(loss, strategy, budget), given, upstream)
    assert counts() == {expected or strategy: heads}
    exact = measure(loss, given.to(torch.float64), upstream)
    assert_all_fair(ours, measure(loss, given, upstream), exact)


# Spellings of the product

PRODUCTS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "einsum": lambda h, w: torch.einsum("bsd,vd->bsv", h, w),
    "einsum of rows": lambda h, w: torch.einsum("nd,vd->nv", h.flatten(0, 1), w).view(B, S, V),
    "matmul": lambda h, w: torch.matmul(h, w.t()),
    "mm": lambda h, w: torch.mm(h.reshape(-1, D), w.t()).view(B, S, V),
    "bmm of one": lambda h, w: torch.bmm(h.reshape(1, -1, D), w.t()[None]).view(B, S, V),
    "baddbmm of one": lambda h, w: torch.baddbmm(w.mean(-1), h.reshape(1, -1, D), w.t()[None]).view(B, S, V),
    "operator": lambda h, w: h @ w.transpose(-1, -2),
    "transposed twice": lambda h, w: (w @ h.flatten(0, 1).t()).t().view(B, S, V),
    "scaled hidden": lambda h, w: F.linear(h * D**-0.5, w),
    "scaled": lambda h, w: F.linear(h, w) * D**-0.5,
    "a temperature that is learnt": lambda h, w: F.linear(h, w) / w.abs().mean(),
}


@pytest.mark.parametrize(
    ("name", "strategy"),
    [
        *((name, "token_chunks") for name in PRODUCTS),
        ("einsum", "vocab_slabs"),
        ("bmm of one", "vocab_slabs"),
        ("transposed twice", "vocab_slabs"),
    ],
)
def test_product(name: str, strategy: str) -> None:
    product = PRODUCTS[name]

    def loss(h: Tensor, w: Tensor, b: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(product(h, w).view(-1, V), y.view(-1))

    check(loss, strategy)


@by_dividing
def test_addmm(strategy: str) -> None:
    def loss(h: Tensor, w: Tensor, b: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(torch.addmm(b, h.view(-1, D), w.t()), y.view(-1))

    check(loss, strategy)


# Each sequence, or each codebook, has a weight of its own
WEIGHTS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "bmm": lambda h, w: torch.bmm(h, w.mT),
    "baddbmm": lambda h, w: torch.baddbmm(w.mean(-1)[:, None], h, w.mT),
    "matmul": lambda h, w: h @ w.mT,
    "einsum": lambda h, w: torch.einsum("bsd,bvd->bsv", h, w),
    "einsum, batch last": lambda h, w: torch.einsum("sbd,bvd->sbv", h.transpose(0, 1), w).transpose(0, 1),
}
CHANGING_PLACES = {"einsum of all with one": lambda h, w: torch.einsum("sd,bvd->bsv", h[0], w)}


def of_weights(product: Callable[[Tensor, Tensor], Tensor]) -> cases.Loss:
    def loss(h: Tensor, w: Tensor, b: Tensor, y: Tensor) -> Tensor:
        weights = torch.stack([w * (k + 1) for k in range(B)])
        return F.cross_entropy(product(h, weights).reshape(-1, V), y.view(-1))

    return loss


@pytest.mark.parametrize("name", [*WEIGHTS, *CHANGING_PLACES])
def test_batched_products_are_not_divided(name: str, caplog: pytest.LogCaptureFixture) -> None:
    loss = of_weights((WEIGHTS | CHANGING_PLACES)[name])
    with caplog.at_level("DEBUG", logger="inductor_ce"):
        check(loss, "token_chunks", expected="materialise")
    reason = "change places between" if name in CHANGING_PLACES else "each of whose matrices has a weight of"
    assert reason in caplog.text


def of_ranges(ranges: Callable[[Tensor], Iterable[Tensor]]) -> cases.Loss:
    def loss(h: Tensor, w: Tensor, b: Tensor, y: Tensor) -> Tensor:
        y = y.where(y < 0, y % (V // 2)).view(-1)
        return sum(F.cross_entropy(z, y) for z in ranges(F.linear(h, w, b).view(-1, V)))

    return loss


NO_LAYER = "no linear layer in the graph makes the logits"
RANGES: dict[str, tuple[cases.Loss, int, str]] = {
    "slices": (of_ranges(lambda z: (z[:, : V // 2], 2 * z[:, V // 2 :])), 2, RANGE),
    "split": (of_ranges(lambda z: z.split([V // 2, V - V // 2], -1)), 2, RANGE),
    "chunks": (of_ranges(lambda z: z.chunk(2, -1)), 2, RANGE),
    "the mean of two": (of_ranges(lambda z: [z.view(-1, 2, V // 2).mean(1)]), 1, NO_LAYER),
}


@pytest.mark.parametrize("name", RANGES)
def test_ranges_of_one_layer_are_not_divided(name: str, caplog: pytest.LogCaptureFixture) -> None:
    loss, losses, reason = RANGES[name]
    with caplog.at_level("DEBUG", logger="inductor_ce"):
        check(loss, "token_chunks", losses, expected="materialise")
    assert reason in caplog.text


def test_rows_that_are_divided_are_not_cut(caplog: pytest.LogCaptureFixture) -> None:
    """A layer of several codebooks, whose logits a view takes apart."""

    def loss(h: Tensor, w: Tensor, b: Tensor, y: Tensor) -> Tensor:
        z = F.linear(h, torch.cat([w, 2 * w])).view(-1, V)
        return F.cross_entropy(z, y.view(-1).repeat_interleave(2))

    with caplog.at_level("DEBUG", logger="inductor_ce"):
        check(loss, "token_chunks", expected="materialise")
    assert DIVIDED in caplog.text


def codebooks(h: Tensor, w: Tensor, b: Tensor, y: Tensor) -> Tensor:
    z = F.linear(h, torch.cat([w, 2 * w])).view(*y.shape, 2, V)
    return sum(F.cross_entropy(z[:, :, k].flatten(0, 1), y.view(-1)) for k in range(2))


def a_few_places(h: Tensor, w: Tensor, b: Tensor, y: Tensor) -> Tensor:
    z = F.linear(h, w, b)
    return sum(F.cross_entropy(z[:, k], y[:, k]) for k in range(2))


def halves_of_sequences(h: Tensor, w: Tensor, b: Tensor, y: Tensor) -> Tensor:
    n, z = h.shape[1] // 2, F.linear(h, w, b)
    late = F.cross_entropy(z[:, n:].flatten(0, 1), y[:, n:].flatten())
    return F.cross_entropy(z[:, :n].flatten(0, 1), y[:, :n].flatten()) + 2 * late


def convolution(h: Tensor, w: Tensor, b: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(F.conv1d(h.mT, w[..., None], b), y)


def of_two_weights(h: Tensor, w: Tensor, b: Tensor, y: Tensor) -> Tensor:
    z = torch.cat([F.linear(h[:, :3], w, b), F.linear(h[:, 3:], 2 * w)], 1)
    return F.cross_entropy(z.flatten(0, 1), y.flatten())


NO_HEADS: dict[str, tuple[cases.Loss, int, bool, str]] = {
    "codebooks": (codebooks, 2, False, DIVIDED),
    "a few places": (a_few_places, 2, False, ROWS),
    "halves of sequences": (halves_of_sequences, 2, True, SYMBOLIC_ROWS),
    "joined": (of_two_weights, 1, False, JOINED),
    "convolution": (convolution, 1, False, CONVOLUTION),
}


@pytest.mark.parametrize("name", NO_HEADS)
def test_why_there_is_no_head(name: str) -> None:
    loss, losses, is_dynamic, reason = NO_HEADS[name]
    h, w, b, y = inputs()
    if is_dynamic:
        for each in (h, y):
            torch._dynamo.mark_dynamic(each, 1)
    with inductor_ce.install(min_vocab=2, strategy="token_chunks"):
        report = inductor_ce.explain(loss, h, w, b, y)
    assert len(report.sites) == losses
    assert all(reason in site.plan for site in report.sites)


@by_dividing
def test_a_loop_over_weights(strategy: str) -> None:
    """As the reason for the former says."""

    def loss(h: Tensor, w: Tensor, b: Tensor, y: Tensor) -> Tensor:
        weights = torch.stack([w * (k + 1) for k in range(B)])
        losses = [F.cross_entropy(F.linear(h[k], weights[k]), y[k], reduction="sum") for k in range(B)]
        return sum(losses) / (y != -100).sum()

    check(loss, strategy, B)


@pytest.mark.parametrize("marked", [False, True], ids=["chosen by a mask", "marked"])
def test_rows_of_which_the_number_depends_on_data(marked: bool) -> None:
    """It has no example: the plan takes them for as many as Inductor would, not for none."""

    def loss(h: Tensor, w: Tensor, b: Tensor, y: Tensor) -> Tensor:
        rows, y = h.flatten(0, -2), y.flatten()
        counted = slice(None) if marked else y != -100
        return F.cross_entropy(F.linear(rows[counted], w, b), y[counted])

    def of_marked(h: Tensor, w: Tensor, b: Tensor, y: Tensor) -> Tensor:
        for each in (h, y) if marked else ():
            mark_unbacked(each, 1)
        return ours_of(h, w, b, y)

    given, ours_of = inputs(), compiled(loss, "auto")
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        ours = measure(of_marked, given)
    assert counts() == {"vocab_slabs": 1}
    assert_all_fair(ours, measure(loss, given), measure(loss, given.to(torch.float64)))


def test_rows_weighed_by_each_others_losses(caplog: pytest.LogCaptureFixture) -> None:
    """Two heads, each of whose gradients is made of the statistics of both: one alone has chunks."""

    def loss(h: Tensor, w: Tensor, b: Tensor, y: Tensor) -> Tensor:
        one, other = (F.cross_entropy(F.linear(h, x).mT, y, reduction="none") for x in (w, 2 * w))
        return (one * other).mean()

    given = inputs(ignored=False)
    with caplog.at_level("DEBUG", logger="inductor_ce"):
        ours = measure(compiled(loss, "token_chunks"), given)
    assert counts() == {"token_chunks": 1, "vocab_slabs": 1}
    assert_all_fair(ours, measure(loss, given), measure(loss, given.to(torch.float64)))
    assert OF_OTHERS in caplog.text


# What is made of the loss

UPSTREAM: dict[str, Callable[[Tensor], Tensor]] = {
    "scaled": lambda loss: loss * 0.37,
    "negative": lambda loss: -loss,
    "zero": lambda loss: loss * 0,
    "squared": lambda loss: loss**2,
    "added": lambda loss: loss + 3,
    "in other units": lambda loss: loss.exp(),
}


@pytest.mark.in_turns
@by_dividing
@pytest.mark.parametrize("within", ["", "squared", "in other units"])
def test_trap_02_upstream_gradients(within: str, strategy: str) -> None:
    """Of what is made of a loss that is compiled alone, and of what is compiled with it."""
    given = inputs()
    half = None if within else compiled(cases.biased, strategy)
    for then in [UPSTREAM[within]] if within else UPSTREAM.values():

        def whole(*given: Tensor, then: Callable[[Tensor], Tensor] = then) -> Tensor:
            return then(cases.biased(*given))

        outside = lambda *given, then=then: then(half(*given))  # noqa: E731
        ours = measure(outside if half else compiled(whole, strategy), given)
        assert counts() == {strategy: 1}
        assert_all_fair(ours, measure(whole, given), measure(whole, given.to(torch.float64)))


@by_dividing
def test_trap_23_two_backwards(strategy: str) -> None:
    """Saved gradient scaled in place: the second backward is wrong."""
    given = inputs().leaves()
    wanted = given[:3]
    loss = compiled(cases.biased, strategy)(*given)
    first = torch.autograd.grad(loss, wanted, torch.tensor(0.37), retain_graph=True)
    kept = [g.clone() for g in first]
    second = torch.autograd.grad(loss, wanted, torch.tensor(-2.0), retain_graph=True)
    third = torch.autograd.grad(loss, wanted, torch.tensor(0.37))
    expected = torch.autograd.grad(cases.biased(*given), wanted)
    assert counts() == {strategy: 1}
    for one, copy, two, three, right in zip(first, kept, second, third, expected, strict=True):
        assert torch.equal(one, copy)
        assert torch.equal(one, three)
        torch.testing.assert_close(one, 0.37 * right)
        torch.testing.assert_close(two, -2 * right)


@by_dividing
def test_a_loss_that_nobody_uses(strategy: str) -> None:
    """Its gradients are none; those of what else is computed are right."""

    def two(h: Tensor, w: Tensor, b: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        return cases.biased(h, w, b, y), h.square().sum() + w.sum()

    given = inputs().leaves()
    _, other = compiled(two, strategy)(*given)
    other.backward()
    assert counts() == {strategy: 1}
    torch.testing.assert_close(given.hidden.grad, 2 * given.hidden.detach())
    torch.testing.assert_close(given.weight.grad, torch.ones_like(given.weight))


@by_dividing
def test_accumulation_over_two_steps(strategy: str) -> None:
    steps, model = [inputs(), inputs()], inputs().leaves()
    expected = inputs()._replace(weight=model.weight.detach(), bias=model.bias.detach()).leaves()
    run = compiled(cases.biased, strategy)
    for step in steps:
        (run(step.hidden, model.weight, model.bias, step.y) / 2).backward()
        (cases.biased(step.hidden, expected.weight, expected.bias, step.y) / 2).backward()
    assert counts() == {strategy: 1}
    torch.testing.assert_close(model.weight.grad, expected.weight.grad)
    torch.testing.assert_close(model.bias.grad, expected.bias.grad)


# Models


class Model(nn.Module):
    """Embeddings, one layer, and a head that may be the embedding's."""

    def __init__(self, tied: bool = False, body: str = "", head: str = ""):
        super().__init__()
        self.embed = nn.Embedding(V, D)
        self.layer = nn.Sequential(nn.Linear(D, 2 * D), nn.GELU(), nn.Linear(2 * D, D))
        self.head = nn.Linear(D, V, bias=not tied)
        if tied:
            self.head.weight = self.embed.weight
        self.checkpointed = body, head

    def loss(self, x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(self.head(x).view(-1, V), y.view(-1))

    def forward(self, tokens: Tensor, y: Tensor) -> Tensor:
        body, head = self.checkpointed
        x = self.embed(tokens)
        x = x + (checkpoint(self.layer, x, use_reentrant=False) if body else self.layer(x))
        return checkpoint(self.loss, x, y, use_reentrant=False) if head else self.loss(x, y)


@pytest.mark.in_turns
@by_dividing
@pytest.mark.parametrize(
    "options",
    [{}, {"tied": True}, {"body": "yes"}, {"head": "yes"}, {"tied": True, "body": "y", "head": "y"}],
)
def test_model(options: dict[str, Any], strategy: str) -> None:
    """Tied embeddings; activation checkpoints round the body and round the head."""
    model = Model(**options)
    tokens, y = torch.randint(0, V, (B, S)), torch.randint(0, V, (B, S))

    def gradients(f: Callable[..., Tensor]) -> list[Tensor]:
        loss = f(tokens, y)
        return [loss.detach(), *torch.autograd.grad(loss, list(model.parameters()))]

    ours, naive = gradients(compiled(model, strategy)), gradients(model)
    assert counts() == {strategy: 1}
    model.double()
    for o, n, exact in zip(ours, naive, gradients(model), strict=True):
        assert_fair(o, n, exact)


# Several


@pytest.mark.in_turns
@by_dividing
@pytest.mark.parametrize("heads", [2, 3])
def test_heads(heads: int, strategy: str) -> None:
    """As for several tokens ahead, each of its own weight."""

    def loss(h: Tensor, w: Tensor, b: Tensor, y: Tensor) -> Tensor:
        losses = [F.cross_entropy(F.linear(h, w * (k + 1), b).view(-1, V), y.view(-1)) for k in range(heads)]
        return sum(x * 0.5**k for k, x in enumerate(losses))

    check(loss, strategy, heads)


@by_dividing
def test_heads_that_share_a_weight(strategy: str) -> None:
    def loss(h: Tensor, w: Tensor, b: Tensor, y: Tensor) -> Tensor:
        ahead = F.cross_entropy(F.linear(h.tanh(), w)[:, :-1].reshape(-1, V), y[:, 1:].reshape(-1))
        return cases.biased(h, w, b, y) + 0.3 * ahead

    check(loss, strategy, 2)


@by_dividing
def test_losses_on_one_head(strategy: str) -> None:
    """They share the statistics of one z, and one scalar."""

    def loss(h: Tensor, w: Tensor, b: Tensor, y: Tensor) -> Tensor:
        z, y = cases.rows(F.linear(h, w, b), y)
        reversed_labels = F.cross_entropy(z, y.flip(0))
        return F.cross_entropy(z, y, label_smoothing=0.1) + 0.1 * reversed_labels

    check(loss, strategy, 1)


@by_dividing
def test_losses_of_two_temperatures(strategy: str) -> None:
    """Two readings of one product."""

    def loss(h: Tensor, w: Tensor, b: Tensor, y: Tensor) -> Tensor:
        z, y = cases.rows(F.linear(h, w, b), y)
        return F.cross_entropy(z, y) + F.cross_entropy(z * 0.5, y)

    check(loss, strategy, 2, budget=0.7)


@by_dividing
def test_a_part_under_no_grad(strategy: str) -> None:
    """A reference model's log-probabilities are wanted for their values alone."""

    def loss(h: Tensor, w: Tensor, b: Tensor, y: Tensor) -> Tensor:
        with torch.no_grad():
            before = cases.per_token(h * 0.9, w, b, y)
        return (cases.per_token(h, w, b, y) * before.sigmoid()).mean()

    given = inputs()
    ours = measure(compiled(loss, strategy), given)
    assert counts() == {strategy: 1, "forward_only": 1}
    assert_all_fair(ours, measure(loss, given), measure(loss, given.to(torch.float64)))


# Logits that escape


def returned(z: Tensor, loss: Tensor) -> Any:
    return loss, z


def auxiliary(z: Tensor, loss: Tensor) -> Any:
    return (loss + 1e-3 * z.square().mean(),)


def accuracy(z: Tensor, loss: Tensor) -> Any:
    return loss, z.argmax(-1)


def top(z: Tensor, loss: Tensor) -> Any:
    return loss, *z.detach().topk(3).values.unbind(-1)


def last(z: Tensor, loss: Tensor) -> Any:
    return loss, z[-1]


ESCAPES = {
    "returned": (returned, "materialise"),
    "auxiliary loss": (auxiliary, "materialise"),
    "top-k": (top, "materialise"),
    "the last position": (last, "materialise"),
    "argmax": (accuracy, ""),  # a statistic, so the head is divided all the same
}


@pytest.mark.in_turns
@by_dividing
@pytest.mark.parametrize(
    ("name", "dtype"), [*((name, torch.float32) for name in ESCAPES), ("returned", torch.bfloat16)]
)
def test_trap_14_logits_that_somebody_else_reads(name: str, dtype: torch.dtype, strategy: str) -> None:
    """Gradient written over logits that somebody else still reads: the loss is fused, and all is right."""
    then, expected = ESCAPES[name]
    given = inputs().to(dtype)

    def whole(h: Tensor, w: Tensor, b: Tensor, y: Tensor) -> Any:
        z, y = cases.rows(F.linear(h, w, b), y)
        return then(z, F.cross_entropy(z.float(), y))

    def step(f: Callable[..., Any]) -> tuple[Any, ...]:
        leaves = given.leaves()
        loss, *others = f(*leaves)
        before = [t.detach().clone() for t in others]
        total = loss + sum(t.float().square().mean() for t in others if t.requires_grad)
        gradients = torch.autograd.grad(total, leaves[:3])
        assert all(torch.equal(a, b) for a, b in zip(others, before, strict=True))
        return loss.detach(), *before, *gradients

    ours, eager = step(compiled(whole, strategy)), step(whole)
    assert sites() == 1
    assert counts() == {expected or strategy: 1}
    tolerance = {"rtol": 2e-2, "atol": 2e-2} if dtype == torch.bfloat16 else {}
    torch.testing.assert_close(ours, eager, **tolerance)


def test_the_log_says_what_else_reads_them(caplog: pytest.LogCaptureFixture) -> None:
    def whole(h: Tensor, w: Tensor, b: Tensor, y: Tensor) -> Any:
        z, y = cases.rows(F.linear(h, w, b), y)
        return F.cross_entropy(z, y), z

    with caplog.at_level("DEBUG", logger="inductor_ce"):
        compiled(whole, "token_chunks")(*inputs().leaves())
    assert "the logits are returned" in caplog.text


def test_symmetric_losses_are_not_divided(caplog: pytest.LogCaptureFixture) -> None:
    """As CLIP's: rows and columns of the same product are normalised."""

    def loss(h: Tensor, w: Tensor, b: Tensor, y: Tensor) -> Tensor:
        z = h.view(-1, D)[:V] @ w[: B * S].t()
        labels = torch.arange(B * S)
        return (F.cross_entropy(z, labels) + F.cross_entropy(z.t(), labels)) / 2

    given = inputs()
    with caplog.at_level("DEBUG", logger="inductor_ce"):
        ours = measure(compiled(loss, "token_chunks"), given)
    assert counts() == {"materialise": 2}
    assert caplog.text.count("the rows and the columns of one product are both normalised") == 2
    assert_all_fair(ours, measure(loss, given), measure(loss, given.to(torch.float64)))


@by_dividing
def test_symmetric_losses_of_two_products(strategy: str) -> None:
    """As OpenCLIP's, and as the reason for the former says."""

    def loss(h: Tensor, w: Tensor, b: Tensor, y: Tensor) -> Tensor:
        image, text = h.view(-1, D), b.mean().exp() * w[: B * S]
        labels = torch.arange(B * S)
        return (F.cross_entropy(image @ text.t(), labels) + F.cross_entropy(text @ image.t(), labels)) / 2

    check(loss, strategy, 2)


def column_normalised(h: Tensor, w: Tensor, b: Tensor, y: Tensor) -> Tensor:
    z = w @ h.flatten(0, 1).t()
    return (z.logsumexp(0) - (h.flatten(0, 1) * w[y.flatten().clamp(min=0)]).sum(-1)).mean()


def of_a_transposed_layer(h: Tensor, w: Tensor, b: Tensor, y: Tensor) -> Tensor:
    return F.nll_loss(F.linear(w, h.flatten(0, 1)).log_softmax(0).mT, y.view(-1))


def of_exponentials(h: Tensor, w: Tensor, b: Tensor, y: Tensor) -> Tensor:
    """As Proxy-Anchor sums over the batch."""
    return (1 + (0.3 * (w @ h.flatten(0, 1).transpose(0, 1) + 0.1)).exp().sum(0)).log().mean()


@by_dividing
@pytest.mark.parametrize("loss", [column_normalised, of_a_transposed_layer, of_exponentials])
def test_products_whose_rows_are_the_classes(loss: cases.Loss, strategy: str) -> None:
    check(loss, strategy)


def along_both(h: Tensor, w: Tensor, b: Tensor, y: Tensor) -> Tensor:
    z = w[: B * S] @ h.flatten(0, 1).t()
    return ((z.logsumexp(0) + z.logsumexp(1)) / 2 - z.diag()).mean()


def with_a_bias(h: Tensor, w: Tensor, b: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(torch.addmm(b[:, None], w, h.flatten(0, 1).t()).t(), y.view(-1))


def read_beside(h: Tensor, w: Tensor, b: Tensor, y: Tensor) -> Tensor:
    z = w @ h.flatten(0, 1).t()
    return F.cross_entropy(z.t(), y.view(-1)) + z.sigmoid().mean()


@pytest.mark.parametrize(("loss", "heads"), [(along_both, 2), (with_a_bias, 1), (read_beside, 1)])
def test_products_that_are_not_turned(loss: cases.Loss, heads: int, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("DEBUG", logger="inductor_ce"):
        check(loss, "token_chunks", heads, expected="materialise")
    assert "the logits are the transpose of a product" in caplog.text or loss is along_both
