"""Logits that a compiled function returns lazily beside its loss: which, why not, and as eager has them."""

from __future__ import annotations

import gc
import threading
import warnings
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from harness import Graphs, compile_lazily, misses, sites
from lazy_cases import Case
from torch import Tensor, nn
from torch._inductor import compile_fx as compile_fx_module
from torch.fx import GraphModule

import inductor_ce
from inductor_ce.api import deferral
from inductor_ce.api.lazy_logits import LazyLogits
from inductor_ce.common.errors import LazyLogitsError
from inductor_ce.rewriting import promises
from inductor_ce.rewriting.promises import LAZY
from inductor_ce.rewriting.returned_logits import RETURNED

B, T, D, V = 2, 6, 8, 64


class Model(nn.Module):
    def __init__(self, bias: bool = False) -> None:
        super().__init__()
        self.embed = nn.Embedding(V, D)
        self.head = nn.Linear(D, V, bias=bias)
        self.scale = nn.Parameter(torch.tensor(1.5))

    def hidden(self, x: Tensor) -> Tensor:
        return torch.tanh(self.embed(x))


def batch(length: int = T) -> tuple[Tensor, Tensor]:
    y = torch.randint(0, V, (B, length))
    y[0, 1] = -100
    return torch.randint(0, V, (B, length)), y


def ce(z: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(z.reshape(-1, V), y.reshape(-1))


# What is returned lazily: (loss, results)

Program = Callable[[Model, Tensor, Tensor], tuple[Tensor, ...]]
PROMISED: dict[str, Program] = {}
KEPT: dict[str, Program] = {}


def promised(f: Program) -> Program:
    PROMISED[f.__name__] = f
    return f


@promised
def raw(m: Model, x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
    z = m.head(m.hidden(x))
    return ce(z, y), z


@promised
def cast(m: Model, x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
    z = m.head(m.hidden(x)).float()
    return ce(z, y), z


@promised
def cast_from_bfloat16(m: Model, x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
    z = F.linear(m.hidden(x).bfloat16(), m.head.weight.bfloat16())
    return ce(z.float(), y), z, z.float()


@promised
def capped(m: Model, x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
    z = m.head(m.hidden(x))
    z = 5.0 * torch.tanh(z / 5.0)
    return ce(z, y), z


@promised
def scaled(m: Model, x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
    z = m.head(m.hidden(x)) * m.scale
    return ce(z, y), z


@promised
def shifted(m: Model, x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
    z = m.head(m.hidden(x)) + m.embed.weight[:, 0]
    return ce(z, y), z


@promised
def viewed(m: Model, x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
    z = m.head(m.hidden(x)).view(-1, V)
    return ce(z, y), z


@promised
def last(m: Model, x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
    z = m.head(m.hidden(x))
    return ce(z, y), z[:, -1]


@promised
def shifted_by_slices(m: Model, x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
    z = m.head(m.hidden(x))
    return ce(z[..., :-1, :].contiguous(), y[..., 1:].contiguous()), z


@promised
def detached(m: Model, x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
    z = m.head(m.hidden(x))
    return ce(z, y), z.detach()


@promised
def frozen_head(m: Model, x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
    z = F.linear(m.hidden(x), m.head.weight.detach(), m.head.weight.detach()[:, 0])
    return ce(z, y), z


@promised
def without_gradient(m: Model, x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
    h = m.hidden(x)
    with torch.no_grad():
        z = m.head(h)
        loss = ce(z, y)
    return loss, z, h


@promised
def with_accuracy(m: Model, x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
    z = m.head(m.hidden(x))
    with torch.no_grad():
        correct = (z.argmax(-1) == y).float().mean()
    return ce(z, y), z, correct


@promised
def with_an_entropy_of_statistics(m: Model, x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
    z = m.head(m.hidden(x))
    return ce(z, y) + 1e-2 * z.logsumexp(-1).square().mean(), z


@promised
def tied(m: Model, x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
    z = F.linear(m.hidden(x), m.embed.weight)
    return ce(z, y), z


@promised
def product_with_a_transpose(m: Model, x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
    z = m.hidden(x) @ m.head.weight.t()
    return ce(z, y), z


@promised
def product_and_bias(m: Model, x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
    z = torch.addmm(m.embed.weight[:, 0], m.hidden(x).view(-1, D), m.head.weight.T)
    return ce(z, y), z


@promised
def with_a_bias(m: Model, x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
    z = F.linear(m.hidden(x), m.head.weight, m.embed.weight[:, 1])
    return ce(z, y), z


@promised
def two_heads(m: Model, x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
    h = m.hidden(x)
    z, w = m.head(h), F.linear(h, m.embed.weight)
    return ce(z, y) + ce(w, y), z, w


@promised
def twice_and_with_its_hidden_states(m: Model, x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
    h = m.hidden(x)
    z = m.head(h)
    return ce(z, y), z, h, z


@promised
def classes_first(m: Model, x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
    z = m.head(m.hidden(x))
    return F.cross_entropy(z.transpose(1, 2), y), z


@promised
def shape_read(m: Model, x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
    z = m.head(m.hidden(x))
    return ce(z, y) + torch.zeros_like(z).sum(), z


def lazies(results: Any) -> list[LazyLogits]:
    return [r for r in results if isinstance(r, LazyLogits)]


def wide(results: Any) -> int:
    return sum(r.dim() > 1 and r.shape[-1] == V for r in results)


def gradients(m: nn.Module, scalar: Tensor) -> tuple[Tensor, ...]:
    """Of all parameters, zeros where there is none."""
    named = list(m.parameters())
    return torch.autograd.grad(scalar, named, retain_graph=True, allow_unused=True, materialize_grads=True)


def total(results: Any) -> Tensor:
    parts = [r.float().sin().mean() for r in results if r.requires_grad]
    return torch.stack(parts).sum() if parts else torch.zeros(()).requires_grad_()


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
    tolerance = {"rtol": 2e-2, "atol": 1e-3} if name == "cast_from_bfloat16" else {}
    torch.testing.assert_close(*(gradients(m, total(r)) for r in (ours, theirs)), **tolerance)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b)
        if isinstance(a, LazyLogits) and name != "last":  # the product of fewer rows is summed otherwise
            assert torch.equal(a, b)
            assert a.stride() == b.stride()
    kept = [n.meta["val"] for gm in graphs.final[:1] for n in gm.graph.output_node().all_input_nodes]
    large = [v for v in kept if isinstance(v, Tensor) and v.numel() == B * T * V]
    assert len(large) <= len(lazies(ours))  # the raw logits, for the backward of a head that is not divided


def kept(f: Program) -> Program:
    KEPT[f.__name__] = f
    return f


@kept
def read_by_topk(m: Model, x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
    """also used by topk"""
    z = m.head(m.hidden(x))
    return ce(z, y), z, z.topk(3).values


@kept
def read_by_a_loss_that_is_not_fused(m: Model, x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
    """also used by mean"""
    z = m.head(m.hidden(x))
    return ce(z, y) + z.sigmoid().pow(2).mean(-2).sum(), z


@kept
def transposed(m: Model, x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
    """also used by transpose"""
    z = m.head(m.hidden(x))
    return ce(z, y), z.transpose(0, 1), z


@kept
def columns(m: Model, x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
    """also used by getitem"""
    z = m.head(m.hidden(x))
    return ce(z, y), z, z[..., :3]


@kept
def edited(m: Model, x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
    """also used by mul_"""
    z = m.head(m.hidden(x))
    z.mul_(2)
    return ce(z, y), z


@kept
def edited_hidden_states(m: Model, x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
    """the hidden states are changed in place"""
    with torch.no_grad():
        h = m.hidden(x)
        z = m.head(h)
        loss = ce(z, y)
        h.zero_()
    return loss, z


@kept
def temperature_of_each_row(m: Model, x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
    """takes a number for each row"""
    h = m.hidden(x)
    z = m.head(h) / h.exp().sum(-1, keepdim=True)
    return ce(z, y), z


@kept
def rows_by_a_tensor(m: Model, x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
    """chooses rows by a tensor"""
    z = m.head(m.hidden(x))
    return ce(z, y), z[torch.arange(B), y[:, 0].clamp(0, T - 1)]


@pytest.mark.parametrize("name", KEPT)
def test_kept(name: str) -> None:
    """Logits that are needed anyway are returned as they are, and the reason is told."""
    f, m, (x, y) = KEPT[name], Model(), batch()
    told: list[str] = []
    original = deferral.promise

    def spied(graph: Any, fused: Any, twins: Any) -> Any:
        made = original(graph, fused, twins)
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


def test_into_another_compiled_function() -> None:
    """After a graph break, or in a function of its own; the loss has its head there."""

    def f(m: Model, x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
        loss, z = raw(m, x, y)
        torch._dynamo.graph_break()
        return loss + ce(z.float()[:, 1:], y[:, 1:]), z

    m, (x, y) = Model(), batch()
    compiled, _ = compile_lazily(f)
    for _ in range(2):
        ours, theirs = compiled(m, x, y), f(m, x, y)
        torch.testing.assert_close(ours[0], theirs[0])
        (z,) = lazies(ours)
        assert not z.is_made
        torch.testing.assert_close(*(gradients(m, r[0] + total(r[1:])) for r in (ours, theirs)))
    assert sites() == 2


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


# Options


def test_eager() -> None:
    m, (x, y) = Model(), batch()
    compiled, _ = compile_lazily(raw, returned_logits="eager")
    ours = compiled(m, x, y)
    assert not lazies(ours)
    torch.testing.assert_close(ours, raw(m, x, y))
    assert sites() == 1


def test_nan() -> None:
    m, (x, y) = Model(), batch()
    compiled, _ = compile_lazily(raw, returned_logits="nan")
    loss, z = compiled(m, x, y)
    assert type(z) is Tensor
    assert z.isnan().all()
    torch.testing.assert_close(loss, raw(m, x, y)[0])


def test_verify_keeps_them() -> None:
    m, (x, y) = Model(), batch()
    compiled, _ = compile_lazily(raw, verify=True)
    assert not lazies(compiled(m, x, y))


@pytest.mark.parametrize("drop", [True, False])
def test_the_former_name(drop: bool) -> None:
    m, (x, y) = Model(), batch()
    with pytest.warns(DeprecationWarning, match='drop_logits is now returned_logits="nan"'):
        handle = inductor_ce.install(min_vocab=2, drop_logits=drop)
    assert handle.options.returned_logits == ("nan" if drop else "lazy")
    compiled = torch.compile(raw, backend="inductor_ce", options={"drop_logits": drop, "min_vocab": 2})
    with pytest.warns(DeprecationWarning, match='drop_logits is now returned_logits="nan"'):
        ours = compiled(m, x, y)
    assert len(lazies(ours)) == (not drop)
    assert bool(ours[1].isnan().all()) == drop


# Installed


def test_installed() -> None:
    """By Inductor's own code, without a warning, a graph break or a recompilation."""
    m, (x, y) = Model(), batch()
    theirs = raw(m, x, y)
    with inductor_ce.install(min_vocab=2), warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", module="torch")
        warnings.filterwarnings("ignore", message=".*dynamo_pgo.*")
        compiled = torch.compile(raw, fullgraph=True)
        for _ in range(2):
            ours = compiled(m, x, y)
            (z,) = lazies(ours)
            assert not z.is_made
        torch.testing.assert_close(z[:, -1].clone(), theirs[1][:, -1])
        torch.testing.assert_close(*(gradients(m, r[0] + total(r[1:])) for r in (ours, theirs)))


def test_uninstalled_after_an_exception() -> None:
    before = compile_fx_module.compile_fx
    with pytest.raises(ZeroDivisionError), inductor_ce.install(), inductor_ce.install(min_vocab=2):
        _ = 1 / (compile_fx_module.compile_fx is before)
    assert compile_fx_module.compile_fx is before


def test_installed_twice_and_from_threads() -> None:
    before = compile_fx_module.compile_fx
    handles: list[Any] = []
    threads = [threading.Thread(target=lambda: handles.append(inductor_ce.install())) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    ours = compile_fx_module.compile_fx
    assert ours.__wrapped__ is before
    for handle in handles:
        assert compile_fx_module.compile_fx is ours
        handle.uninstall()
    assert compile_fx_module.compile_fx is before


def test_another_wrapper_on_top() -> None:
    """It is kept; ours does nothing within it, and comes back where it was."""
    before = compile_fx_module.compile_fx
    calls: list[Any] = []
    try:
        inductor_ce.install(min_vocab=2)
        ours = compile_fx_module.compile_fx

        def theirs(gm: GraphModule, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            calls.append(gm)
            return ours(gm, inputs, *args, **kwargs)

        compile_fx_module.compile_fx = theirs
        inductor_ce.uninstall()
        assert compile_fx_module.compile_fx is theirs
        m, (x, y) = Model(), batch()
        assert not lazies(torch.compile(raw)(m, x, y))
        torch._dynamo.reset()
        inductor_ce.install(min_vocab=2)
        assert compile_fx_module.compile_fx is theirs
        assert len(lazies(torch.compile(raw)(m, x, y))) == 1
        assert (len(calls), sites()) == (2, 1)
        inductor_ce.uninstall()
        compile_fx_module.compile_fx = ours
        inductor_ce.install()
        inductor_ce.uninstall()
        assert compile_fx_module.compile_fx is before
    finally:
        inductor_ce.uninstall()
        compile_fx_module.compile_fx = before


def test_a_graph_that_dynamo_did_not_capture_is_left_alone() -> None:
    class Loss(nn.Module):
        def forward(self, h: Tensor, W: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
            z = F.linear(h, W)
            return ce(z, y), z

    args = torch.randn(B, T, D), torch.randn(V, D), batch()[1]
    exported = torch.export.export(Loss(), args).module()
    inductor_ce.install(min_vocab=2)
    compiled = compile_fx_module.compile_fx(exported, list(args), inner_compile=Graphs().inner_compile)
    ours = compiled(*args)
    assert not lazies(ours)
    torch.testing.assert_close(tuple(ours), Loss()(*args))


# As inputs of compiled functions


class Scaled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, z: Tensor) -> Tensor:
        return z.view_as(z)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> Tensor:
        return upstream * 10


def edit(z: Tensor) -> Tensor:
    z.mul_(2)
    return z


def hook(z: Tensor) -> Tensor:
    z.register_hook(lambda gradient: gradient * 3)
    return z


def write(z: Tensor) -> Tensor:
    z.data.zero_()
    return z


def view_of_what_is_edited(z: Tensor) -> Tensor:
    view = z.view(z.shape)
    z.sum()
    z[0].detach().zero_()
    return view


STATES: list[Callable[[Tensor], Tensor]] = [
    *(edit, hook, write, view_of_what_is_edited, Scaled.apply, Tensor.float, Tensor.detach),
    *(lambda z: z[:, :-1], lambda z: [z, z.sum()][0]),
]


def shifted_of_rows(z: Tensor, y: Tensor) -> Tensor:
    return ce(z.float()[..., :-1, :].contiguous(), y[..., 1:])


def with_metrics(z: Tensor, y: Tensor) -> Tensor:
    with torch.no_grad():
        right = (z.argmax(-1) == y).float().mean() + z.logsumexp(-1).mean() + z.max(-1).values.mean()
        picked = z.log_softmax(-1).gather(-1, y.clamp_min(0)[..., None]).mean()
    return ce(z.view(-1, z.shape[-1]), y) * right + picked


def flattened(z: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(z.flatten(0, 1), y.flatten()) + F.cross_entropy(z.unsqueeze(0)[0].mT, y)


@pytest.mark.parametrize("dynamic", [True, None])
@pytest.mark.parametrize("loss", [ce, shifted_of_rows, with_metrics, flattened])
def test_an_input_of_any_length(loss: Callable[..., Tensor], dynamic: bool | None) -> None:
    """The third length is not compiled for again, nor with `dynamic` the second."""
    m = Model()
    first, _ = compile_lazily(raw, dynamic=True)
    second, graphs = compile_lazily(loss, dynamic=dynamic)
    compiled = []
    for length in (6, 9, 4, 7):
        x, y = batch(length)
        told, z = first(m, x, y)
        ours, theirs = second(z, y), loss(m.head(m.hidden(x)), y)
        torch.testing.assert_close(ours, theirs)
        of = m.head.weight, m.embed.weight
        torch.testing.assert_close(*(torch.autograd.grad(r, of) for r in (ours + 0 * told, theirs)))
        compiled.append(len(graphs.final))
    assert compiled == [2] * 4 if dynamic else compiled == [2, 4, 4, 4]


def test_states_of_an_input() -> None:
    """One compiled function is given lazy logits to which different things have been done."""

    def loss(z: Tensor) -> Tensor:
        return F.cross_entropy(z.float().flatten(0, 1), torch.arange(z.shape[0] * z.shape[1]))

    compiled, _ = compile_lazily(loss)
    for state in [Tensor.view_as, *STATES, *reversed(STATES)]:
        case = Case()
        prepared = [state(z, z) if state is Tensor.view_as else state(z) for z in (case.z, case.eager)]
        ours, theirs = (f(z) for f, z in zip((compiled, loss), prepared, strict=True))
        torch.testing.assert_close(ours, theirs)
        if theirs.requires_grad:
            ours.backward()
            theirs.backward()
        case.same_gradients(rtol=1e-5, atol=1e-6)  # the loss is taken in float32
