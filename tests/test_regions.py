"""Losses in the bodies of higher-order operators: right, and fused, or left as written."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from harness import compile_with_codegen, compile_without_codegen, sites
from head_cases import counts
from pairwise import EVERYTHING
from reference import assert_fair
from releases import before
from torch import Tensor
from torch._higher_order_ops.associative_scan import associative_scan
from torch._higher_order_ops.hints_wrap import hints_wrapper
from torch._higher_order_ops.map import map as mapped
from torch._higher_order_ops.scan import scan
from torch._higher_order_ops.strict_mode import strict_mode
from torch._higher_order_ops.while_loop import while_loop
from torch._higher_order_ops.wrap import wrap
from torch.utils.checkpoint import checkpoint

import inductor_ce

N, D, V = 12, 8, 64
STRATEGIES = CHUNKS, SLABS, _ = "token_chunks", "vocab_slabs", "auto"
Program = Callable[[Tensor, Tensor, Tensor], Tensor]
region = torch.compiler.nested_compile_region


def loss(h: Tensor, w: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(h, w), y)


# Regions


@region
def region_loss(h: Tensor, w: Tensor, y: Tensor) -> Tensor:
    return loss(h, w, y)


@region
def and_rows(h: Tensor, w: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    z = F.linear(h, w)
    return F.cross_entropy(z, y), z.logsumexp(-1)


@region
def and_logits(h: Tensor, w: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    z = F.linear(h, w)
    return F.cross_entropy(z, y), z


@region
def and_best(h: Tensor, w: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    z = F.linear(h, w)
    return F.cross_entropy(z, y), z.argmax(-1)


@region
def and_one_without_gradient(h: Tensor, w: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    with torch.no_grad():
        other = loss(h, w, y)
    return loss(h, w, y), other


@region
def region_of_regions(h: Tensor, w: Tensor, y: Tensor) -> Tensor:
    return region_loss(h, w, y) + region_loss(3 * h, w, y)


@region
def of_given_logits(z: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(z, y)


def once(h: Tensor, w: Tensor, y: Tensor) -> Tensor:
    return region_loss(h, w, y)


def twice(h: Tensor, w: Tensor, y: Tensor) -> Tensor:
    return region_loss(h, w, y) + region_loss(2 * h, w, y)


def rows_too(h: Tensor, w: Tensor, y: Tensor) -> Tensor:
    a, b = and_rows(h, w, y)
    c, d = and_rows(2 * h, w, y)
    scale = torch.arange(len(h))
    return a + c + (b * scale).sum() + (d * scale).sum()


def logits_too(h: Tensor, w: Tensor, y: Tensor) -> Tensor:
    a, z = and_logits(h, w, y)
    b, z_2 = and_logits(2 * h, w, y)
    return a + b + z.square().sum() + z_2.tanh().sum()


def best_too(h: Tensor, w: Tensor, y: Tensor) -> Tensor:
    a, best = and_best(h, w, y)
    b, best_2 = and_best(2 * h, w, y)
    return a + b * (best == best_2).to(h.dtype).mean()


def partly_without_gradient(h: Tensor, w: Tensor, y: Tensor) -> Tensor:
    a, b = and_one_without_gradient(h, w, y)
    c, d = and_one_without_gradient(2 * h, w, y)
    return a * d + c * b


def nested(h: Tensor, w: Tensor, y: Tensor) -> Tensor:
    return region_of_regions(h, w, y) + region_of_regions(2 * h, w, y)


def logits_given(h: Tensor, w: Tensor, y: Tensor) -> Tensor:
    z = F.linear(h, w)
    return of_given_logits(z, y) + of_given_logits(2 * z, y)


def once_detached(h: Tensor, w: Tensor, y: Tensor) -> Tensor:
    return region_loss(h, w, y) + region_loss(h.detach(), w, y)


REGIONS = {
    f.__name__: f
    for f in (
        *(once, twice, rows_too, logits_too, best_too, partly_without_gradient, nested, logits_given),
        once_detached,
    )
}


# Others


def checkpointed(h: Tensor, w: Tensor, y: Tensor) -> Tensor:
    return checkpoint(loss, h, w, y, use_reentrant=False) + loss(2 * h, w, y)


def conditional(h: Tensor, w: Tensor, y: Tensor) -> Tensor:
    return torch.cond(h.sum() > 0, loss, lambda h, w, y: 3 * loss(2 * h, w, y), (h, w, y))


def scanned(h: Tensor, w: Tensor, y: Tensor) -> Tensor:
    def step(total: Tensor, rows: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        value = loss(rows[0], w, rows[1])
        return total + value, 2 * value

    total, values = scan(step, h.new_zeros(()), (h.view(3, -1, D), y.view(3, -1)))
    return total + values.sum()


def mapped_over(h: Tensor, w: Tensor, y: Tensor) -> Tensor:
    return mapped(loss, h.view(3, -1, D), w, y[: len(y) // 3]).sum()


def looped(h: Tensor, w: Tensor, y: Tensor) -> Tensor:
    """Of which torch has no gradient here."""
    with torch.no_grad():
        start = torch.tensor(0), h.new_zeros(())
        _, total = while_loop(lambda i, t: i < 3, lambda i, t: (i + 1, t + loss(h, w, y)), start)
    return total * loss(h, w, y)


def with_hints(h: Tensor, w: Tensor, y: Tensor) -> Tensor:
    with torch.no_grad():
        value = hints_wrapper(loss, (h, w, y), {}, hints={"a": True})
    return value * loss(h, w, y)


def strict(h: Tensor, w: Tensor, y: Tensor) -> Tensor:
    with torch.no_grad():
        (value,) = strict_mode(lambda h, w, y: (loss(h, w, y),), (h, w, y))
    return value * loss(h, w, y)


def wrapped(h: Tensor, w: Tensor, y: Tensor) -> Tensor:
    return wrap(loss, h, w, y)


class Own(torch.autograd.Function):
    """Cross entropy whose gradient is the user's."""

    @staticmethod
    def forward(ctx: Any, h: Tensor, w: Tensor, y: Tensor) -> Tensor:
        ctx.save_for_backward(h, w, y)
        return loss(h, w, y)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> Any:
        h, w, y = ctx.saved_tensors
        gradient = upstream / len(h) * (F.linear(h, w).softmax(-1) - F.one_hot(y, w.shape[0]))
        return gradient @ w, gradient.t() @ h, None


def by_a_function(h: Tensor, w: Tensor, y: Tensor) -> Tensor:
    return 2 * Own.apply(h, w, y)


def by_functional_gradient(h: Tensor, w: Tensor, y: Tensor) -> Tensor:
    return torch.func.grad(loss)(h, w, y).square().sum()


def vectorised(h: Tensor, w: Tensor, y: Tensor) -> Tensor:
    return torch.func.vmap(loss, (0, None, 0))(h.view(3, -1, D), w, y.view(3, -1)).sum()


def after_a_scan(h: Tensor, w: Tensor, y: Tensor) -> Tensor:
    sums = associative_scan(lambda a, b: a + b, h, 0, combine_mode="generic")
    return loss(sums, w, y)


OTHERS = {
    f.__name__: f
    for f in (
        *(
            checkpointed,
            conditional,
            scanned,
            mapped_over,
            looped,
            with_hints,
            strict,
            wrapped,
            by_a_function,
        ),
        *(by_functional_gradient, vectorised, after_a_scan),
    )
}
BODIES = {**REGIONS, **OTHERS}
LEFT = {by_a_function, by_functional_gradient, vectorised, after_a_scan}
# What torch runs in eager only by tracing it, or else not at all.
PLAINLY: dict[Program, Program] = {
    scanned: lambda h, w, y: 3 * sum(map(lambda a, b: loss(a, w, b), h.view(3, -1, D), y.view(3, -1))),
    mapped_over: lambda h, w, y: sum(loss(a, w, y[: len(y) // 3]) for a in h.view(3, -1, D)),
    looped: lambda h, w, y: 3 * loss(h, w, y).detach() * loss(h, w, y),
    with_hints: lambda h, w, y: loss(h, w, y).detach() * loss(h, w, y),
    strict: lambda h, w, y: loss(h, w, y).detach() * loss(h, w, y),
    wrapped: loss,
    after_a_scan: lambda h, w, y: loss(h.cumsum(0), w, y),
}


def leaves(n: int = N) -> list[Tensor]:
    torch.manual_seed(0)
    return [torch.randn(n, D), torch.randn(V, D), torch.randint(V, (n,))]


def measure(f: Program, given: list[Tensor], dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    """The loss and its gradients."""
    h, w, y = given
    h, w = (t.detach().to(dtype).requires_grad_() for t in (h, w))
    value = f(h, w, y)
    return value.detach(), *torch.autograd.grad(value, (h, w))


def assert_right(compiled: Program, f: Program, given: list[Tensor]) -> None:
    f = PLAINLY.get(f, f)
    exact = measure(f, given, torch.float64)
    for ours, naive, right in zip(measure(compiled, given), measure(f, given), exact, strict=True):
        assert_fair(ours, naive, right)


@pytest.mark.parametrize(
    ("name", "strategy"),
    [(name, s) for i, name in enumerate(BODIES) for s in STRATEGIES if EVERYTHING or s == STRATEGIES[i % 3]],
)
def test_bodies(name: str, strategy: str) -> None:
    f = BODIES[name]
    if f is scanned and before(2, 13):
        pytest.skip("torch 2.11 and 2.12 have a wrong gradient of what a scan carries, without us too")
    compiled, _ = compile_without_codegen(f, strategy=strategy, memory_budget=0.7)
    assert_right(compiled, f, leaves())
    assert bool(sites()) == (f not in LEFT)


@pytest.mark.parametrize("strategy", ["materialise", CHUNKS, SLABS])
def test_a_region_is_planned_once_for_all_its_uses(strategy: str) -> None:
    compiled, _ = compile_without_codegen(twice, strategy=strategy, memory_budget=0.7)
    assert_right(compiled, twice, leaves())
    assert sites() == 1
    assert counts() == {strategy: 1}


def test_generated_code() -> None:
    """A loss and its rows, of which a region that is used twice had no gradient."""
    compiled, _ = compile_with_codegen(rows_too, strategy="materialise")
    assert_right(compiled, rows_too, leaves())
    assert sites() == 1


@pytest.mark.parametrize("strategy", [CHUNKS, *["auto"] * EVERYTHING])
def test_autocast_within(strategy: str) -> None:
    """A region may have autocast of its own; products are then in bfloat16."""

    @region
    def mixed(h: Tensor, w: Tensor, y: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return loss(h, w, y)

    def f(h: Tensor, w: Tensor, y: Tensor) -> Tensor:
        return mixed(h, w, y) + mixed(2 * h, w, y)

    given = leaves()
    compiled, _ = compile_without_codegen(f, strategy=strategy, memory_budget=0.7)
    exact = measure(twice, given, torch.float64)
    for ours, naive, right in zip(measure(compiled, given), measure(f, given), exact, strict=True):
        assert_fair(ours.bfloat16(), naive.bfloat16(), right)
    assert sites() == 1


def test_any_number_of_rows() -> None:
    compiled, _ = compile_without_codegen(twice, dynamic=True, strategy=CHUNKS, memory_budget=0.7)
    for n in (12, 7, 33):
        assert_right(compiled, twice, leaves(n))
    bodies = 2 if before(2, 12) else 1  # Dynamo of 2.11 keeps two where sizes are symbols
    assert sites() == bodies


def test_without_a_gradient() -> None:
    given = leaves()
    compiled, _ = compile_without_codegen(rows_too)
    with torch.no_grad():
        ours = compiled(*given)
    assert not ours.requires_grad
    assert_fair(ours, rows_too(*given), rows_too(given[0].double(), given[1].double(), given[2]))
    assert sites() == 1


@pytest.mark.parametrize("f", [once, twice])
def test_explained(f: Program) -> None:
    """As often as it is written, whichever way Dynamo has it in the graph; the program runs right beside."""
    h, w, y = leaves()
    with inductor_ce.install(min_vocab=2, strategy=CHUNKS, memory_budget=0.7):
        report = inductor_ce.explain(f, h.requires_grad_(), w, y)
    (site,) = report.sites
    assert site.strategy == CHUNKS
    assert "region_loss" not in site.code
    assert report.misses == []
