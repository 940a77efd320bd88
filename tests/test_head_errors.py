"""Trap 15: the error of gradients summed over pieces does not grow with their number, nor with a scale."""

from __future__ import annotations

import head_cases as cases
import pytest
import torch
import torch.nn.functional as F
from harness import compile_without_codegen
from head_cases import CASES, Inputs, Loss, Made, counts, exactly, inputs, measure
from pairwise import EVERYTHING
from torch import Tensor

from inductor_ce.heads import narrow_sums
from inductor_ce.ops import label_products
from inductor_ce.ops.counted import FREQUENT_ROWS

aten = torch.ops.aten

ACCEPTED = 1.15  # of the error of materialised logits, whatever the number of pieces


def errors(made: Made, exact: Made) -> dict[str, float]:
    """Relative errors of the gradients of hidden and weight, in norm and in the worst row."""
    found = {}
    for name, ours, right in zip(("dh", "dW"), made.gradients, exact.gradients, strict=False):
        assert ours is not None
        assert right is not None
        wrong = ours.double() - right
        found[name] = (wrong.norm() / right.norm()).item()
        found[f"{name}, worst row"] = (wrong.norm(dim=-1).max() / right.norm(dim=-1).max()).item()
    return found


def measured(
    name: str, given: Inputs, strategy: str, budget: float | None, *upstreams: float
) -> tuple[list[Made], int]:
    """Of each upstream gradient, with the number of pieces in which the logits are made."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled, graphs = compile_without_codegen(CASES[name].loss, strategy=strategy, memory_budget=budget)
    made = [measure(compiled, given, torch.tensor(upstream)) for upstream in upstreams]
    assert counts() == {strategy: 1}
    return made, graphs.pieces


def assert_no_worse(
    name: str, given: Inputs, strategy: str, budgets: list[float], *upstreams: float, of: str = "d"
) -> list[int]:
    """The error with each budget is accepted, of gradients so named. Returns the numbers of pieces."""
    exact = [exactly(CASES[name], given, torch.tensor(upstream)) for upstream in upstreams]
    materialised, _ = measured(name, given, "materialise", None, *upstreams)
    whole = list(map(errors, materialised, exact))
    pieces = []
    for budget in budgets:
        made, count = measured(name, given, strategy, budget, *upstreams)
        pieces.append(count)
        for found, accepted in zip(map(errors, made, exact), whole, strict=True):
            for what, error in found.items():
                assert not what.startswith(of) or error <= ACCEPTED * accepted[what], (
                    f"{count} pieces, {what}"
                )
    return pieces


@pytest.mark.parametrize(
    ("strategy", "budgets", "pieces"),
    [
        ("token_chunks", [0.6, 0.19, 0.088], [2, 8, 32]),
        ("vocab_slabs", [0.57, 0.19, 0.094], [2, 8, 32]),
    ],
)
def test_trap_15_the_error_does_not_grow_with_the_pieces(
    strategy: str, budgets: list[float], pieces: list[int]
) -> None:
    """dW accumulated in bf16 over chunks. Of few pieces and of many; with ALL=1 of what is between them."""
    given = inputs(1024, v=768, d=24).to(torch.bfloat16)
    step = 1 if EVERYTHING else 2
    assert assert_no_worse("plain", given, strategy, budgets[::step], 1.0) == pieces[::step]


@pytest.mark.usefixtures("much")
@pytest.mark.parametrize(
    ("name", "upstream", "scale"),
    [("plain", 0.7, 0.2), ("smoothing", 0.7, 1.0), ("z-loss", 1.0, 0.2), ("soft-cap", 1.0, 1.0)],
)
def test_trap_15_sums_in_16_bits(
    name: str, upstream: float, scale: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The entries at the labels are no part of them, and frequent labels are apart. The labels are drawn
    from the model: the entries at frequent ones are outweighed by others."""
    monkeypatch.setattr(narrow_sums, "OFTEN", 64)
    given = inputs(1024, v=1024, d=16)
    frequency = 3 * scale * torch.arange(1, 1025).log()
    weight = torch.cat([given.weight[:, 1:] * scale, -frequency[:, None]], 1)
    hidden = torch.cat([given.hidden[:, 1:], torch.ones(1024, 1)], 1)
    y = (hidden @ weight.T).softmax(-1).multinomial(1)[:, 0]
    given = given._replace(hidden=hidden, weight=weight, y=y).to(torch.bfloat16)
    budgets = [2 * b if name == "soft-cap" else b for b in (0.52, 0.135)]
    assert assert_no_worse(name, given, "token_chunks", budgets, upstream, of="dW") == [2, 8]


@pytest.mark.usefixtures("much")
def test_trap_15_few_sums_are_made_in_16_bits() -> None:
    assert wide_sums(inputs(256, v=384, d=24).to(torch.bfloat16), 0.2) == [(narrow_sums.OFTEN, 24)]


@pytest.mark.usefixtures("much")
def test_trap_15_sums_of_rows_without_a_label() -> None:
    """Each piece adds a rounding, relative to what is summed; no entry is left out with the labels."""
    given = inputs(1024, v=4096, d=64).to(torch.bfloat16)
    exact = exactly(CASES["plain"], given).gradients[1]
    assert exact is not None
    unlabelled = torch.ones(len(exact), dtype=torch.bool)
    unlabelled[given.y[given.y >= 0]] = False
    found = {}
    for strategy, budget in [("materialise", None), ("token_chunks", 0.27), ("token_chunks", 0.135)]:
        (made,), pieces = measured("plain", given, strategy, budget, 1.0)
        dW = made.gradients[1]
        assert dW is not None
        found[pieces] = ((dW.double() - exact)[unlabelled].norm() / exact[unlabelled].norm()).item()
    assert found[4] <= 1.35 * found[1]
    assert found[8] <= 1.7 * found[1]


@pytest.mark.usefixtures("much")
def test_trap_15_many_sums_are_made_in_float32() -> None:
    assert wide_sums(inputs(1024, v=384, d=24).to(torch.bfloat16), 0.1) == [(384, 24)]


def test_trap_15_sums_are_made_in_float32_where_it_costs_little() -> None:
    assert wide_sums(inputs(256, v=384, d=24).to(torch.bfloat16), 0.6) == [(256, 24), (384, 24)]


def wide_sums(given: Inputs, budget: float) -> list[tuple[int, ...]]:
    """Shapes of what is summed, or put together, in float32 over chunks."""
    compiled, graphs = compile_without_codegen(cases.plain, strategy="token_chunks", memory_budget=budget)
    measure(compiled, given)
    sums = (aten.empty.memory_format, aten.full.default, FREQUENT_ROWS)
    made = [n.meta["val"] for n in graphs.nodes if n.target in sums]
    return sorted(tuple(x.shape) for x in made if x.dtype == torch.float32 and x.dim() == 2)


@pytest.mark.usefixtures("much")
@pytest.mark.parametrize("name", ["plain", "soft-cap"])
def test_an_upstream_gradient_that_is_a_power_of_two(name: str) -> None:
    """As the scalers of gradients give."""
    given = inputs(128, v=256, d=64).to(torch.bfloat16)
    assert_no_worse(name, given, "token_chunks", [1.3], 0.5, -4.0, 65536.0)


@pytest.mark.usefixtures("much")
def test_what_is_rounded_twice() -> None:
    """Where float32 costs much, and the upstream gradient is no power of two: the hidden states' gradient."""
    given = inputs(16, v=512, d=64).to(torch.bfloat16)
    exact = exactly(CASES["plain"], given, torch.tensor(0.7))
    whole = errors(measured("plain", given, "materialise", None, 0.7)[0][0], exact)
    ours = errors(measured("plain", given, "token_chunks", 0.6, 0.7)[0][0], exact)
    assert ours["dW"] <= ACCEPTED * whole["dW"]
    assert ours["dh"] <= 1.5 * whole["dh"]


def two_labels(h: Tensor, w: Tensor, b: Tensor, y: Tensor) -> Tensor:
    z, y = cases.rows(F.linear(h, w, b), y)
    return F.cross_entropy(z, y) + 0.3 * F.cross_entropy(z, y.roll(1))


def tied(h: Tensor, w: Tensor, b: Tensor, y: Tensor) -> Tensor:
    """The weight is that of the embedding too, whose gradient is added."""
    return F.cross_entropy(*cases.rows(F.linear(h + F.embedding(y.roll(1, -1).clamp(min=0), w), w), y))


def by_matmul(h: Tensor, w: Tensor, b: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(*cases.rows(h @ w.t(), y))


@pytest.mark.usefixtures("much")
@pytest.mark.parametrize(
    ("loss", "dynamic"),
    [
        (two_labels, None),
        (tied, True),
        (by_matmul, True if EVERYTHING else None),
        (CASES["shift"].loss, None),
    ],
)
def test_sums_in_16_bits_of_any_graph(loss: Loss, dynamic: bool | None) -> None:
    given = inputs(8, 36, v=257, d=24).to(torch.bfloat16)
    compiled, graphs = compile_without_codegen(
        loss, strategy="token_chunks", memory_budget=0.26, dynamic=dynamic
    )
    ours = measure(compiled, given)
    assert counts() == {"token_chunks": 1}
    assert graphs.count(label_products.MOST_FREQUENT) == 1
    naive, exact = measure(loss, given), measure(loss, given.to(torch.float64))
    for o, n, e in zip(ours.gradients, naive.gradients, exact.gradients, strict=True):
        if e is not None:
            assert o is not None
            assert n is not None
            assert (o.double() - e).norm() <= ACCEPTED * (n.double() - e).norm()


@pytest.mark.parametrize("strategy", ["token_chunks", "vocab_slabs"])
def test_any_upstream_gradient(strategy: str) -> None:
    given = inputs(16, v=512, d=64).to(torch.bfloat16)
    assert_no_worse("soft-cap", given, strategy, [1.3], 0.7)
