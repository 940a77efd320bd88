"""Deferred layers, and products behind which a graph is cut: the loss, compiled alone, has its head."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from defer_cases import D, Model, S, V, loss_of
from harness import compile_lazily, sites
from head_cases import counts
from reference import assert_fair
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.nn.utils import parametrizations

import inductor_ce
from inductor_ce.api.lazy_logits import LazyLogits
from inductor_ce.common.errors import InputError, LazyLogitsError

B = 2
CHUNKS = {"strategy": "token_chunks", "memory_budget": 0.7}


def capped(z: Tensor, y: Tensor) -> Tensor:
    return loss_of(3 * torch.tanh(z / 3), y)


def shifted(z: Tensor, y: Tensor) -> Tensor:
    return loss_of(z[:, :-1], y[:, 1:])


def both(z: Tensor, y: Tensor) -> Tensor:
    """It reads the logits otherwise, too."""
    return loss_of(z, y) + z.sigmoid().mean()


LOSSES = {f.__name__: f for f in (loss_of, capped, shifted, both)}


def tokens(s: int = S) -> tuple[Tensor, Tensor]:
    return torch.randint(V, (B, s)), torch.randint(V, (B, s))


def measured(model: nn.Module, value: Tensor) -> tuple[Tensor, ...]:
    """A loss and the gradients of all parameters."""
    return value.detach(), *torch.autograd.grad(value, list(model.parameters()))


def assert_right(model: nn.Module, value: Tensor, loss: Callable[..., Tensor], x: Tensor, y: Tensor) -> None:
    ours = measured(model, value)
    plain = inductor_ce.restore(copy.deepcopy(model))
    for module in plain.modules():
        inductor_ce.restore(module)
    naive = measured(plain, loss(plain(x), y))
    plain.double()
    for o, n, e in zip(ours, naive, measured(plain, loss(plain(x), y)), strict=True):
        assert_fair(o, n, e)


@pytest.fixture
def model() -> Model:
    made = Model()
    inductor_ce.defer(made.output)
    return made


def lazy(z: Any) -> LazyLogits:
    assert isinstance(z, LazyLogits)
    assert not z.is_made
    return z


@pytest.mark.in_turns
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("name", LOSSES)
def test_loss_compiled_alone(name: str, bias: bool) -> None:
    model, loss = Model(bias), LOSSES[name]
    inductor_ce.defer(model.output)
    compiled, _ = compile_lazily(loss, **CHUNKS)
    for _ in range(2):
        x, y = tokens()
        z = lazy(model(x))
        assert_right(model, compiled(z, y), loss, x, y)
        assert not z.is_made
    assert sites() == 1
    assert counts() == {"materialise" if loss is both else "token_chunks": 1}
    assert counters["stats"]["unique_graphs"] == 1


@pytest.mark.parametrize("strategy", ["token_chunks", "vocab_slabs"])
def test_model_and_loss_compiled_apart(model: Model, strategy: str) -> None:
    """In the model's graph our class is what marks the layer."""
    forward, _ = compile_lazily(model, strategy=strategy, memory_budget=0.7)
    compiled, _ = compile_lazily(loss_of, strategy=strategy, memory_budget=0.7)
    x, y = tokens()
    z = lazy(forward(x))
    assert_right(model, compiled(z, y), loss_of, x, y)
    assert not z.is_made
    assert counts() == {strategy: 1}


@pytest.mark.parametrize("compile_it", [False, True])
def test_whoever_reads_has_the_logits(model: Model, compile_it: bool) -> None:
    forward = compile_lazily(model)[0] if compile_it else model
    x, y = tokens()
    z = forward(x)
    assert_right(model, loss_of(z, y), loss_of, x, y)
    assert z.is_made
    assert torch.equal(z, inductor_ce.restore(model.output)(torch.tanh(model.body(model.embed(x)))))


def test_without_a_gradient(model: Model) -> None:
    compiled, _ = compile_lazily(loss_of, **CHUNKS)
    x, y = tokens()
    with torch.no_grad():
        z = lazy(model(x))
        value = compiled(z, y)
    assert not z.is_made
    inductor_ce.restore(model.output)
    assert not value.requires_grad
    assert_fair(value, loss_of(model(x), y), loss_of(model(x).double(), y))
    assert counts() == {"forward_only": 1}


@pytest.mark.parametrize("inside", [False, True])
def test_autocast(model: Model, inside: bool) -> None:
    """Of the layer's call, whatever is around the loss."""
    compiled, _ = compile_lazily(loss_of, **CHUNKS)
    x, y = tokens()
    with torch.autocast("cpu", torch.bfloat16):
        z = lazy(model(x))
        assert z.dtype == torch.bfloat16
        value = compiled(z, y) if inside else None
    ours = measured(model, compiled(z, y) if value is None else value)
    inductor_ce.restore(model.output)
    with torch.autocast("cpu", torch.bfloat16):
        naive = measured(model, loss_of(model(x), y))
    exact = measured(model.double(), loss_of(model(x), y))
    for o, n, e in zip(ours, naive, exact, strict=True):
        assert_fair(o.bfloat16(), n.bfloat16(), e)
    assert counts() == {"token_chunks": 1}


def test_any_length(model: Model) -> None:
    compiled, _ = compile_lazily(loss_of, dynamic=True, **CHUNKS)
    for s in (6, 9, 17):
        x, y = tokens(s)
        assert_right(model, compiled(lazy(model(x)), y), loss_of, x, y)
    assert sites() == 1


def last(z: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(z[:, -1], y[:, -1])


def last_two(z: Tensor, y: Tensor) -> Tensor:
    return loss_of(z[:, -2:], y[:, -2:])


def unpadded(z: Tensor, y: Tensor) -> Tensor:
    return loss_of(z[..., : V - 3], y % (V - 3))


@pytest.mark.parametrize("dynamic", [None, True])
@pytest.mark.parametrize("loss", [last, last_two, unpadded])
def test_what_is_cut_is_cut_before_the_layer(
    model: Model, loss: Callable[..., Tensor], dynamic: bool | None
) -> None:
    """As where both are compiled together."""
    compiled, _ = compile_lazily(loss, dynamic=dynamic, strategy="token_chunks", memory_budget=1.0)
    for s in (6, 9, 17):
        x, y = tokens(s)
        assert_right(model, compiled(lazy(model(x)), y), loss, x, y)
    assert counts() == {"token_chunks": 1 if dynamic else 2}


def test_two_of_them(model: Model) -> None:
    """A policy and a reference, each with a head of its own."""
    reference = Model().requires_grad_(False)
    inductor_ce.defer(reference.output)

    def preference(z: Tensor, z_0: Tensor, y: Tensor) -> Tensor:
        ours, theirs = (F.cross_entropy(t.flatten(0, 1), y.flatten(), reduction="none") for t in (z, z_0))
        return -F.logsigmoid((theirs - ours).sum())

    compiled, _ = compile_lazily(preference)
    x, y = tokens()
    value = compiled(lazy(model(x)), lazy(reference(x)), y)
    assert_right(model, value, lambda z, y: preference(z, reference(x).to(z.dtype), y), x, y)
    assert sites() == 2


def test_a_changed_weight_is_told(model: Model) -> None:
    compiled, _ = compile_lazily(loss_of)
    x, y = tokens()
    compiled(model(x), y)
    z = model(x)
    with torch.no_grad():
        model.output.weight.mul_(2)
    with pytest.raises(LazyLogitsError, match="the layer's weight was changed in place since"):
        compiled(z, y)


def test_explained(model: Model) -> None:
    x, y = tokens()
    with inductor_ce.install(min_vocab=2, **CHUNKS):
        report = inductor_ce.explain(lambda: loss_of(model(x), y))
        alone = inductor_ce.explain(loss_of, model(x), y)
    assert [site.strategy for each in (report, alone) for site in each.sites] == ["token_chunks"] * 2


# What else is done to the module


def test_all_else_is_as_it_was(model: Model) -> None:
    plain = Model()
    assert isinstance(model.output, nn.Linear)
    assert repr(model) == repr(plain)
    assert list(model.state_dict()) == list(plain.state_dict())
    model.load_state_dict(plain.state_dict())
    model.output.weight = model.embed.weight
    assert [name for name, _ in model.named_parameters()] == ["embed.weight", "body.weight", "body.bias"]
    x, y = tokens()
    compiled, _ = compile_lazily(loss_of, **CHUNKS)
    assert_right(model, compiled(lazy(model(x)), y), loss_of, x, y)


def test_copied(model: Model) -> None:
    twin = copy.deepcopy(model)
    assert twin.output.weight is not model.output.weight
    z = lazy(twin(tokens()[0]))
    assert z.source.parts[1] is twin.output.weight


def test_saved_as_it_was(model: Model) -> None:
    file = io.BytesIO()
    torch.save(model, file)
    assert b"inductor_ce" not in file.getvalue()
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    assert type(loaded.output) is nn.Linear
    assert torch.equal(loaded.output.weight, model.output.weight)


def test_restored(model: Model) -> None:
    assert inductor_ce.defer(model.output) is model.output  # twice is once
    assert type(inductor_ce.restore(model.output)) is nn.Linear
    assert type(inductor_ce.restore(model.output)) is nn.Linear
    assert not isinstance(model(tokens()[0]), LazyLogits)


def test_restored_from_under_another_class(model: Model) -> None:
    """As FSDP2 derives one."""

    class Sharded:
        extra = 1

    kind = type(model.output)
    model.output.__class__ = type("ShardedLinear", (Sharded, kind), {})
    lazy(model(tokens()[0]))
    inductor_ce.restore(model.output)
    assert [c.__name__ for c in type(model.output).__mro__[:3]] == ["ShardedLinear", "Sharded", "Linear"]
    assert not isinstance(model(tokens()[0]), LazyLogits)


def test_a_layer_with_parametrised_weight() -> None:
    model = Model()
    parametrizations.weight_norm(model.output)
    inductor_ce.defer(model.output)
    compiled, _ = compile_lazily(loss_of, **CHUNKS)
    x, y = tokens()
    ours = measured(model, compiled(lazy(model(x)), y))
    inductor_ce.restore(model.output)
    naive = measured(model, loss_of(model(x), y))
    exact = measured(model.double(), loss_of(model(x), y))
    for o, n, e in zip(ours, naive, exact, strict=True):
        assert_fair(o, n, e)


class Adapted(nn.Module):
    """A layer with an adapter beside it."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base, self.down, self.up = base, nn.Linear(D, 2, bias=False), nn.Linear(2, V, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.up(self.down(x))


def test_adapted(model: Model) -> None:
    model.output = Adapted(model.output)  # type: ignore[assignment]
    x, y = tokens()
    assert_right(model, loss_of(model(x), y), loss_of, x, y)


class Scaled(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


@pytest.mark.parametrize("module", [nn.Embedding(4, 4), nn.Bilinear(2, 2, 2), Scaled(4, 4)])
def test_refused(module: nn.Module) -> None:
    kind = type(module)
    with pytest.raises(InputError, match=f"defer takes a torch.nn.Linear, .* not {kind.__name__}"):
        inductor_ce.defer(module)
    assert type(module) is kind


def test_where_nothing_can_be_lazy(model: Model) -> None:
    """Transforms, exported programs and inputs that are no plain tensors have the product."""
    x = torch.randn(5, D)
    inner = model.output
    assert torch.equal(torch.func.vmap(inner)(x), inductor_ce.restore(copy.deepcopy(inner))(x))
    exported = torch.export.export(inner, (x,))
    assert torch.equal(exported.module()(x), inner(x).made())
    with pytest.raises(RuntimeError, match="dtype"):
        inner(x.double())
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        inner(x[:, 1:])


# Graphs that are cut


def cut(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    z = model(x)
    torch._dynamo.graph_break()
    return loss_of(z, y)


def read_between(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    z = model(x)
    print(end="" if z.isfinite().all() else "!")
    return loss_of(z, y)


@pytest.mark.parametrize("f", [cut, read_between])
def test_a_break_between_head_and_loss(f: Callable[..., Tensor]) -> None:
    model = Model()
    compiled, _ = compile_lazily(f, **CHUNKS)
    for _ in range(2):
        x, y = tokens()
        assert_right(model, compiled(model, x, y), lambda z, y: loss_of(z, y), x, y)
    assert sites() == 1
    if f is cut:
        assert counts() == {"token_chunks": 1}
        assert counters["stats"]["unique_graphs"] == 2


@pytest.mark.parametrize("why", ["no gradient", "few classes", "eager"])
def test_a_cut_that_stays(why: str) -> None:
    seen = []

    def f(model: nn.Module, x: Tensor) -> Tensor:
        z = model(x)
        seen.append(z)
        torch._dynamo.graph_break()
        return z.sum()

    options = {"few classes": {"min_vocab": V + 1}, "eager": {"returned_logits": "eager"}}.get(why, {})
    compiled, _ = compile_lazily(f, **options)
    with torch.set_grad_enabled(why != "no gradient"):
        compiled(Model(), tokens()[0])
    assert not any(isinstance(z, LazyLogits) for z in seen)
