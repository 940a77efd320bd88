"""Graphs of ATen operators: of torch.export, of make_fx, in packages of AOTInductor."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import reference
import torch
import torch.nn.functional as F
from harness import Graphs, compile_lazily, compile_without_codegen, misses, sites
from pairwise import pairwise
from reference import Terms, assert_fair
from spared import known_to_children
from torch import Tensor, nn
from torch._inductor.codecache import AotCodeCompiler
from torch._inductor.compile_fx import compile_fx
from torch.fx.experimental.proxy_tensor import make_fx

import inductor_ce
from inductor_ce.api.lazy_logits import LazyLogits

B, S, V, D = 3, 8, 64, 4


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.norm, self.head = nn.Embedding(V, D), nn.LayerNorm(D), nn.Linear(D, V, bias=False)

    def logits(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.embed(x)))


class Function(Model):
    terms = Terms()

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(self.logits(x).view(-1, V).float(), y.view(-1))


class Smoothed(Model):
    terms = Terms(smoothing=0.1)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(self.logits(x).flatten(0, 1), y.flatten(), label_smoothing=0.1)


class Summed(Model):
    terms = Terms("sum")

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return F.nll_loss(self.logits(x).transpose(1, 2).log_softmax(1), y, reduction="sum")


class Gathered(Model):
    terms = Terms()

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        kept = y != -100
        picked = self.logits(x).log_softmax(-1).gather(-1, y.clamp(min=0).unsqueeze(-1)).squeeze(-1)
        return -(picked * kept).sum() / kept.sum()


class Indexed(Model):
    terms = Terms()

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        z, y = self.logits(x).reshape(-1, V), y.reshape(-1)
        kept = y != -100
        losses = z.logsumexp(-1) - z[torch.arange(z.shape[0]), y.clamp(min=0)]
        return torch.where(kept, losses, 0.0).sum() / kept.sum()


class Capped(Model):
    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        z = 3 * torch.tanh(self.logits(x) / 3)
        return F.cross_entropy(z[:, :-1].reshape(-1, V), y[:, 1:].reshape(-1))


class Returning(Model):
    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        z = self.logits(x)
        return F.cross_entropy(z.view(-1, V), y.view(-1)), z


MODELS = [Function, Smoothed, Summed, Gathered, Indexed]
LEVELS = {
    "as captured": lambda program: program,
    "of ATen": lambda program: program.run_decompositions({}),
    "of core ATen": lambda program: program.run_decompositions(),
}


def tokens() -> tuple[Tensor, Tensor]:
    x, y = torch.randint(V, (B, S)), torch.randint(V, (B, S))
    y[0, :3], y[1, 1], y[2, 2] = -100, 0, V - 1
    return x, y


def exported(model: nn.Module, level: str = "as captured") -> Any:
    return LEVELS[level](torch.export.export(model, tokens())).module()


def measured(f: Any, model: nn.Module, x: Tensor, y: Tensor) -> list[Tensor]:
    """The loss for an upstream gradient of 0.7, and the gradients of the parameters of `model`."""
    model.zero_grad()
    loss = f(x, y)
    loss = loss[0] if isinstance(loss, (tuple, list)) else loss
    (0.7 * loss).backward()
    return [loss.detach(), *(p.grad.clone() for p in model.parameters())]


def exact_of(model: Any, x: Tensor, y: Tensor) -> list[Tensor]:
    """The same in float64, by the formula."""
    twin = type(model)().double()
    twin.load_state_dict(model.state_dict())

    def loss(x: Tensor, y: Tensor) -> Tensor:
        return reference.cross_entropy(twin.logits(x).flatten(0, 1), y.flatten(), model.terms)

    return measured(loss, twin, x, y)


def assert_as_eager(f: Any, of: nn.Module, model: Any, exact: list[Tensor] | None = None) -> None:
    """Values and gradients of f, whose parameters are those of the module `of`."""
    x, y = tokens()
    ours, naive = measured(f, of, x, y), measured(model, model, x, y)
    for o, n, e in zip(ours, naive, exact or exact_of(model, x, y), strict=True):
        assert_fair(o, n, e)


TO_PIECES = (Indexed, "of core ATen")  # see test_a_logsumexp_taken_to_pieces


def chosen(way: str) -> pytest.MarkDecorator:
    """The pairs that go one way, or with ALL=1 all; every way meets every kind and every level."""
    ways = pairwise(MODELS, [*LEVELS], ["compiled", "without Dynamo"], valid=lambda *x: x[:2] != TO_PIECES)
    return pytest.mark.parametrize(("kind", "level"), [pair for *pair, of in ways if of == way])


@chosen("compiled")
def test_compiled(kind: type, level: str) -> None:
    """torch.compile of an exported program: the loss is fused, forward and backward."""
    model = kind()
    module = exported(model, level)
    compiled, graphs = compile_without_codegen(module)
    assert_as_eager(compiled, module, model)
    assert (sites(), misses()) == (1, 0)
    assert graphs.count(torch.ops.inductor_ce.row_stats.default) == 1
    assert graphs.count(torch.ops.inductor_ce.row_grad.default) == 1


@chosen("without Dynamo")
def test_without_dynamo(kind: type, level: str) -> None:
    """Inductor is given the exported graph itself, and its gradients are asked for."""
    model = kind()
    module = exported(model, level)
    inductor_ce.install(min_vocab=2)
    graphs = Graphs()
    compiled = compile_fx(module, list(tokens()), inner_compile=graphs.inner_compile)
    assert_as_eager(compiled, module, model)
    assert (sites(), misses()) == (1, 0)
    assert graphs.count(torch.ops.inductor_ce.row_grad.default) == 1


def test_chunks_of_an_exported_head() -> None:
    model = Function()
    module = exported(model)
    compiled, graphs = compile_without_codegen(module, strategy="token_chunks", memory_budget=0.5)
    assert_as_eager(compiled, module, model)
    assert (
        graphs.count(torch.ops.inductor_ce.logits.default) == 3
    )  # two, and the hidden states that they take, are more


def test_returned_logits_are_lazy() -> None:
    model = Returning()
    module = exported(model)
    compiled, _ = compile_lazily(module)
    x, y = tokens()
    loss, z = compiled(x, y)
    assert type(z) is LazyLogits
    torch.testing.assert_close(z + 0, model(x, y)[1])
    torch.testing.assert_close(loss, model(x, y)[0])


def test_explain_names_the_users_line() -> None:
    x, y = tokens()
    with inductor_ce.install(min_vocab=2):
        report = inductor_ce.explain(exported(Function()), x, y)
    (site,) = report.sites
    assert site.location.startswith("test_exported.py:")
    assert site.form == "mean[y != -100](lse - pick(y))"


def test_symbolic_rows() -> None:
    model = Capped()
    rows = torch.export.Dim("rows", min=2, max=1024)
    module = torch.export.export(model, tokens(), dynamic_shapes=({0: rows}, {0: rows})).module()
    compiled, _ = compile_without_codegen(module, dynamic=True)
    x, y = torch.randint(V, (5, S)), torch.randint(V, (5, S))
    for o, n in zip(measured(compiled, module, x, y), measured(model, model, x, y), strict=True):
        torch.testing.assert_close(o, n)
    assert (sites(), misses()) == (1, 0)


# What is not fused


def test_a_logsumexp_taken_to_pieces() -> None:
    """Core ATen keeps an infinite maximum out of it by a choice, which is told."""
    x, y = tokens()
    module = exported(Indexed(), "of core ATen")
    with inductor_ce.install(min_vocab=2):
        report = inductor_ce.explain(module, x, y)
    assert not report.sites
    (miss,) = report.misses
    assert miss.reason.name == "NOT_UNDERSTOOD"
    assert "goes into add" in miss.message


class Soft(nn.Module):
    def forward(self, z: Tensor, q: Tensor) -> Tensor:
        return F.cross_entropy(z, q)


def test_a_gradient_may_be_wanted_of_any_input() -> None:
    """An exported graph does not tell of which, so that one of soft targets is not lost."""
    z, q = torch.randn(6, V), torch.rand(6, V)
    module = torch.export.export(Soft(), (z, q)).module()
    inductor_ce.install(min_vocab=2)
    compiled = compile_fx(module, [z, q.clone().requires_grad_()], inner_compile=Graphs().inner_compile)
    leaf = q.clone().requires_grad_()
    out = compiled(z, leaf)
    (out[0] if isinstance(out, (tuple, list)) else out).backward()
    torch.testing.assert_close(leaf.grad, -z.log_softmax(-1) / 6)
    assert (sites(), misses()) == (0, 1)


def test_where_no_gradient_can_be_wanted() -> None:
    z, q = torch.randn(6, V), torch.rand(6, V)
    module = torch.export.export(Soft(), (z, q)).module()
    inductor_ce.install(min_vocab=2)
    with torch.no_grad():
        out = compile_fx(module, [z, q], inner_compile=Graphs().inner_compile)(z, q)
    torch.testing.assert_close(out[0] if isinstance(out, (tuple, list)) else out, F.cross_entropy(z, q))
    assert (sites(), misses()) == (1, 0)


def over_rows(z: Tensor, y: Tensor) -> Tensor:
    return F.nll_loss(torch.ops.aten._log_softmax.default(z, 0, False), y)


def of_sigmoid(z: Tensor, y: Tensor) -> Tensor:
    return F.nll_loss(torch.ops.aten.log_sigmoid(z), y)


def plain_mean(z: Tensor, y: Tensor) -> Tensor:
    return torch.ops.aten._log_softmax.default(z, 1, False).exp().mean()


@pytest.mark.parametrize("f", [over_rows, of_sigmoid, plain_mean])
def test_near_misses(f: Any) -> None:
    z, y = torch.randn(V, V), torch.randint(V, (V,))
    graph = make_fx(f)(z, y)
    compiled, _ = compile_without_codegen(graph)
    torch.testing.assert_close(compiled(z, y), f(z, y))
    assert sites() == 0


# make_fx


def step(h: Tensor, w: Tensor, y: Tensor) -> tuple[Tensor, ...]:
    loss = F.cross_entropy(F.linear(h, w), y)
    return loss, *torch.autograd.grad(loss, (h, w))


def head() -> tuple[Tensor, Tensor, Tensor]:
    return (
        torch.randn(9, D, requires_grad=True),
        torch.randn(V, D, requires_grad=True),
        torch.randint(V, (9,)),
    )


@pytest.mark.parametrize("mode", ["real", "fake", "symbolic"])
def test_a_whole_step_is_told_of(mode: str) -> None:
    """Its backward is written out, and reads the log-probabilities: it is left as it was."""
    given = head()
    graph = make_fx(step, tracing_mode=mode)(*given)
    with inductor_ce.install(min_vocab=2):
        report = inductor_ce.explain(graph, *given)
    assert not report.sites
    (miss,) = report.misses
    assert miss.reason.name == "BACKWARD_IN_GRAPH"
    assert "let torch.compile differentiate it" in miss.message


def test_a_whole_step_is_as_it_was() -> None:
    given = head()
    graph = make_fx(step)(*given)
    inductor_ce.install(min_vocab=2)
    with torch.no_grad():
        compiled = compile_fx(graph, list(given), inner_compile=Graphs().inner_compile)
        for ours, theirs in zip(compiled(*given), eager_step(given), strict=True):
            torch.testing.assert_close(ours, theirs)
    assert (sites(), misses()) == (0, 1)


@torch.enable_grad()
def eager_step(given: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, ...]:
    return step(*given)


@pytest.mark.parametrize("mode", ["real", "symbolic"])
def test_a_forward_of_make_fx(mode: str) -> None:
    h, w, y = head()
    graph = make_fx(lambda h, w, y: F.cross_entropy(F.linear(h, w), y), tracing_mode=mode)(h, w, y)
    compiled, _ = compile_without_codegen(graph)
    compiled(h, w, y).backward()
    for ours, theirs in zip((h.grad, w.grad), step(h, w, y)[1:], strict=True):
        torch.testing.assert_close(ours, theirs)
    assert (sites(), misses()) == (1, 0)


# AOTInductor

RUN = """
import sys, torch
given = torch.load(sys.argv[2])
loss = torch._inductor.aoti_load_package(sys.argv[1])(*given[:2])
assert "inductor_ce" not in sys.modules
torch.testing.assert_close(loss, given[2], rtol=1e-5, atol=1e-5)
print("as eager")
"""


def quickly_compiled() -> contextlib.AbstractContextManager[None]:
    """Not beforehand, 8 s each, two headers that no other program uses."""
    return torch._inductor.config.patch(
        {"aot_inductor.precompile_headers": False, "aot_inductor.compile_wrapper_opt_level": "O0"}
    )


def test_a_package_has_no_operator_of_python() -> None:
    """Whatever strategy is asked for."""

    texts: list[str] = []

    def compile_nothing(graph: Any, wrapper: str, kernels: str, *args: Any, **given: Any) -> None:
        texts.extend((wrapper, kernels))
        raise RuntimeError("not compiled")

    inductor_ce.install(min_vocab=2, strategy="token_chunks", verify=True)
    with (
        mock.patch.object(AotCodeCompiler, "compile", compile_nothing),
        pytest.raises(Exception, match="not compiled"),
    ):
        torch._inductor.aoti_compile_and_package(torch.export.export(Smoothed(), tokens()))
    assert (sites(), misses()) == (1, 0)
    wrapper, kernels = texts
    assert "cpp_fused" in kernels
    assert "inductor_ce" not in wrapper + kernels


@pytest.mark.with_all("the text of a package, the test before")
def test_a_package_runs_without_us(tmp_path: Path) -> None:
    """What is packaged has no operator of Python, whatever strategy is asked for."""
    model, given = Smoothed(), tokens()
    inductor_ce.install(min_vocab=2, strategy="token_chunks", verify=True)
    with quickly_compiled():
        package = torch._inductor.aoti_compile_and_package(
            torch.export.export(model, given), package_path=str(tmp_path / "model.pt2")
        )
    assert (sites(), misses()) == (1, 0)
    torch.save((*given, model(*given).detach()), tmp_path / "given.pt")
    done = subprocess.run(
        [sys.executable, "-c", RUN, package, str(tmp_path / "given.pt")],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=os.environ | known_to_children(),
        check=False,
    )
    assert "as eager" in done.stdout, done.stderr
