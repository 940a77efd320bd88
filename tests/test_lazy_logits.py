"""Logits that a compiled function returns lazily beside its loss: which, why not, and as eager has them."""

from __future__ import annotations

import gc
import warnings
import weakref
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from harness import compile_lazily, misses, sites
from lazy_programs import (
    KEPT,
    PROMISED,
    B,
    D,
    Model,
    T,
    V,
    batch,
    ce,
    gradients,
    lazies,
    raw,
    shifted_by_slices,
    total,
    two_heads,
    wide,
)
from torch import Tensor

from inductor_ce.api import deferral
from inductor_ce.api.lazy_logits import LazyLogits
from inductor_ce.common.errors import LazyLogitsError
from inductor_ce.rewriting import promises
from inductor_ce.rewriting.promises import LAZY
from inductor_ce.rewriting.returned_logits import RETURNED


@pytest.mark.parametrize("name", PROMISED)
def test_promised(name: str) -> None:
    f, m, (x, y) = PROMISED[name], Model(), batch()
    compiled, graphs = compile_lazily(f)
    ours, theirs = compiled(m, x, y), f(m, x, y)
    assert len(lazies(ours)) == wide(theirs)
    assert not any(z.is_made for z in lazies(ours))
    assert (sites() > 0, misses()) == (True, 0)
    for a, b in zip(ours, theirs, strict=True):
        assert (a.shape, a.dtype, a.requires_grad) == (b.shape, b.dtype, b.requires_grad)
        assert a.is_leaf == b.is_leaf
    if name == "twice_and_with_its_hidden_states":
        assert ours[1] is ours[3]
    torch.testing.assert_close(*(gradients(m, r[0] * 2 + total(())) for r in (ours, theirs)))
    tolerance = {"rtol": 2e-2, "atol": 1e-3} if name.endswith("bfloat16") else {}
    torch.testing.assert_close(*(gradients(m, total(r)) for r in (ours, theirs)), **tolerance)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b)
        if isinstance(a, LazyLogits) and not name.startswith("last"):  # fewer rows are summed otherwise
            assert torch.equal(a, b)
            assert a.stride() == b.stride()
    kept = [n.meta["val"] for gm in graphs.final[:1] for n in gm.graph.output_node().all_input_nodes]
    large = [v for v in kept if isinstance(v, Tensor) and v.numel() == B * T * V]
    assert len(large) <= len(lazies(ours))  # the raw logits, for the backward of a head that is not divided


@pytest.mark.parametrize("name", KEPT)
def test_kept(name: str) -> None:
    """Logits that are needed anyway are returned as they are, and the reason is told."""
    f, m, (x, y) = KEPT[name], Model(), batch()
    told: list[str] = []
    original = deferral.promise

    def spied(*args: Any) -> Any:
        made = original(*args)
        told.extend(made.facts.values())
        return made

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(deferral, "promise", spied)
        compiled, _ = compile_lazily(f)
        ours = compiled(m, x, y)
    theirs = f(m, x, y)
    assert sites() == 1
    assert not lazies(ours)
    assert told
    assert all(str(f.__doc__) in sentence for sentence in told), told
    assert LAZY not in told
    torch.testing.assert_close(ours, theirs)
    ours, theirs = (
        [*torch.autograd.grad(total(r), [*m.parameters()], allow_unused=True)] for r in (ours, theirs)
    )
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("where", ["promises", "results"])
@pytest.mark.fails_inside
def test_told_as_is_when_an_internal_error_stops_it(
    where: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """After the first of two heads has been promised: neither is lazy, and neither is said to be."""
    made: list[Any] = []
    original = promises.recipe_of

    def failing(*args: Any) -> Any:
        if made:
            raise ZeroDivisionError
        made.append(original(*args))
        return made[0]

    if where == "promises":
        monkeypatch.setattr(promises, "recipe_of", failing)
    else:
        monkeypatch.setattr(deferral, "_Lazy", lambda *args: 1 / 0)
    reports: list[Any] = []
    monkeypatch.setattr(deferral, "publish", lambda report, options: reports.append(report))
    m, (x, y) = Model(), batch()
    compiled, _ = compile_lazily(two_heads)
    with warnings.catch_warnings():  # of the first failure in this process
        warnings.simplefilter("ignore")
        ours = compiled(m, x, y)
    assert "inductor_ce failed: returned logits are kept" in caplog.text
    assert len(made) == (where == "promises")
    assert not lazies(ours)
    torch.testing.assert_close(ours, two_heads(m, x, y))
    assert [site.head.split(";")[0] for site in reports[0].sites] == [RETURNED] * 2


# Where they come from


@pytest.mark.parametrize("inside", [False, True])
def test_autocast(inside: bool) -> None:
    """The weight is cast in the graph; what autocast gives is given bit for bit."""

    def f(m: Model, x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
        h = m.hidden(x)
        if not inside:
            return raw(m, x, y)
        with torch.autocast("cpu", torch.bfloat16):
            z = m.head(h)
            loss = ce(z, y)
        return loss, z, z.float()

    m, (x, y) = Model(), batch()
    compiled, _ = compile_lazily(f)
    with torch.autocast("cpu", torch.bfloat16, enabled=not inside):
        ours, theirs = compiled(m, x, y), f(m, x, y)
    assert lazies(ours)
    for a, b in zip(ours[1:], theirs[1:], strict=True):
        assert isinstance(a, LazyLogits)
        assert a.dtype == b.dtype
        assert torch.equal(a, b)
    gradients = [torch.autograd.grad(total(r[1:]), [m.head.weight, m.embed.weight]) for r in (ours, theirs)]
    torch.testing.assert_close(*gradients, rtol=2e-2, atol=1e-4)


def test_any_length() -> None:
    m = Model()
    compiled, graphs = compile_lazily(shifted_by_slices, dynamic=True)
    for length in (6, 9, 4):
        x, y = batch(length)
        ours = compiled(m, x, y)
        assert ours[1].shape == (B, length, V)
        torch.testing.assert_close(ours[1][:, -1].clone(), shifted_by_slices(m, x, y)[1][:, -1])
        torch.testing.assert_close(ours[1] * 1, m.head(m.hidden(x)))
    assert len(graphs.final) == 2  # forward and backward, once


def test_numbers_that_change_from_call_to_call() -> None:
    def f(m: Model, x: Tensor, y: Tensor, t: float, cap: float) -> tuple[Tensor, ...]:
        z = cap * torch.tanh(m.head(m.hidden(x)) / t / cap)
        return ce(z, y), z, (0.5 - z.bfloat16() / t)

    m, (x, y) = Model(), batch()
    compiled, graphs = compile_lazily(f)
    for t, cap in ((1.0, 5.0), (0.9, 4.0), (0.7, 3.0)):
        ours, theirs = compiled(m, x, y, t, cap), f(m, x, y, t, cap)
        assert len(lazies(ours)) == 2
        torch.testing.assert_close(*(gradients(m, total(r)) for r in (ours, theirs)), rtol=2e-2, atol=1e-3)
        for a, b in zip(ours, theirs, strict=True):
            assert a.dtype == b.dtype
            torch.testing.assert_close(a, b)
    assert len(graphs.final) == 4  # forward and backward, of numbers and of any


def test_hidden_states_that_are_an_input() -> None:
    def f(h: Tensor, W: Tensor, y: Tensor) -> tuple[Tensor, ...]:
        z = F.linear(h, W)
        return ce(z, y), z

    h, W = torch.randn(B, T, D, requires_grad=True), torch.randn(V, D, requires_grad=True)
    (_, y) = batch()
    compiled, _ = compile_lazily(f)
    ours, theirs = compiled(h, W, y), f(h, W, y)
    (z,) = lazies(ours)
    assert z.source.parts == (h, W)
    torch.testing.assert_close(*(torch.autograd.grad(r[0] + total(r[1:]), (h, W)) for r in (ours, theirs)))


def test_an_edit_of_one_of_two_results_that_share_memory_is_an_error() -> None:
    def f(m: Model, x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
        z = m.head(m.hidden(x))
        return ce(z, y), z, z[:, -1], z.view(-1, V), z.float() * 2

    m, (x, y) = Model(), batch()
    compiled, _ = compile_lazily(f)
    _, z, row, flat, double = compiled(m, x, y)
    for each in (z, row, flat):
        assert isinstance(each, LazyLogits)
        with pytest.raises(LazyLogitsError, match="would share memory with them"), torch.no_grad():
            each.mul_(2)
    with torch.no_grad():
        double.mul_(2)
    torch.testing.assert_close(double.detach(), 4 * z.detach())


def test_a_step_of_the_optimizer() -> None:
    m, (x, y) = Model(), batch()
    compiled, _ = compile_lazily(raw)
    optimizer = torch.optim.SGD(m.parameters(), 0.1)
    _, early = compiled(m, x, y)
    loss, late = compiled(m, x, y)
    expected = raw(m, x, y)[1].detach()
    early.sum()
    loss.backward()
    optimizer.step()
    torch.testing.assert_close(early.detach(), expected)
    with pytest.raises(LazyLogitsError, match=r"head.*weight.* \[64x8\] was changed in place"):
        late.sum()


def test_what_they_are_made_of_goes_with_them() -> None:
    m, (x, y) = Model(), batch()
    compiled, _ = compile_lazily(raw)
    compiled(m, x, y)
    gc.collect()
    gc.disable()
    try:
        loss, z = compiled(m, x, y)
        hidden = weakref.ref(z.source.parts[0])
        z[:, -1].sum().backward(retain_graph=True)
        loss.backward()
        assert hidden() is not None
        del loss, z
        assert hidden() is None
    finally:
        gc.enable()
