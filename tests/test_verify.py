"""The option `verify`: both ways side by side, and the original where they differ."""

import logging
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import test_picked_mixtures
import test_some_classes
import torch
import torch.nn.functional as F
from gallery import run
from harness import Graphs, Rewritten, compile_without_codegen, sites
from kernels import backwards_at_once
from torch import Tensor

import inductor_ce
from inductor_ce import ops
from inductor_ce.graph.builder import Builder
from inductor_ce.ops import loops, operators, verified
from inductor_ce.rewriting import picked_mixtures, some_classes
from inductor_ce.rewriting.rewrite import beside_original

N, V = 12, 40


def smoothed(z: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(z, y, label_smoothing=0.1) + 1e-3 * z.logsumexp(-1).square().mean()


def soft_capped(z: Tensor, y: Tensor) -> Tensor:
    z = 5 * torch.tanh(z.view(3, 4, V) / 5)
    return F.cross_entropy(z.flatten(0, 1).float(), y, reduction="none")


def per_token(z: Tensor, y: Tensor) -> Tensor:
    return z.log_softmax(-1).gather(-1, y[:, None]).squeeze(-1)


def with_accuracy(z: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    return F.cross_entropy(z, y), (z.argmax(-1) == y).float().mean()


def and_penalty(z: Tensor, y: Tensor) -> Tensor:
    """Somebody else needs a gradient of the logits too: values alone are compared."""
    return F.cross_entropy(z, y) + z.square().mean()


LOSSES = [smoothed, soft_capped, per_token, with_accuracy, and_penalty]


def inputs(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    return torch.randn(N, V).to(dtype).requires_grad_(), torch.randint(V, (N,))


def step(f: Callable[..., Tensor], z: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    value = f(z, y)
    value = value[0] if isinstance(value, tuple) else value
    (gradient,) = torch.autograd.grad(value, z, torch.full_like(value, 0.37))
    return value.detach(), gradient


@pytest.fixture(autouse=True)
def nothing_verified(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    verified._verdicts.clear()
    caplog.set_level(logging.ERROR, logger="inductor_ce")
    yield
    verified._verdicts.clear()


def failures() -> list[str]:
    """The keys of the losses that were found to differ."""
    verdicts = verified._verdicts.items()
    return [key for key, v in verdicts if v.gradient is False or not all(v.values.values())]


def errors(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [r.getMessage() for r in caplog.records if r.name == "inductor_ce"]


@pytest.mark.in_turns
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("loss", LOSSES)
def test_what_is_right_is_used(loss: Callable[..., Tensor], dtype: torch.dtype, caplog):
    compiled, graphs = compile_without_codegen(loss, verify=True)
    z, y = inputs(dtype)
    for _ in range(2):
        torch.testing.assert_close(step(compiled, z, y), step(loss, z, y), rtol=2e-2, atol=1e-3)
    assert sites() >= 1
    assert graphs.count(ops.ROW_GRAD) == 1
    assert errors(caplog) == failures() == []


@pytest.fixture
def broken_statistics(monkeypatch: pytest.MonkeyPatch) -> None:
    """row_stats counts half of every exponential, everywhere it is computed."""

    class Halved(operators._Columns):
        def __init__(self, *args: Any):
            super().__init__(*args)
            self.exp = self.exp / 2

    monkeypatch.setattr(operators, "_Columns", Halved)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.usefixtures("broken_statistics")
def test_a_wrong_value_gives_way_to_the_original(loss: Callable[..., Tensor], caplog):
    compiled, _ = compile_without_codegen(loss, verify=True)
    z, y = inputs()
    for _ in range(3):
        torch.testing.assert_close(step(compiled, z, y), step(loss, z, y))
    (message,) = errors(caplog)[:1]
    assert "test_verify.py:" in message
    assert "the value of the fused loss differs from the original's by up to" in message
    assert failures()


@pytest.mark.usefixtures("broken_statistics")
def test_without_it_nobody_would_have_known():
    compiled, _ = compile_without_codegen(smoothed)
    z, y = inputs()
    assert not torch.allclose(step(compiled, z, y)[0], step(smoothed, z, y)[0])


@pytest.mark.parametrize("loss", [smoothed, soft_capped, per_token, with_accuracy])
def test_a_wrong_gradient_gives_way_to_the_original(loss: Callable[..., Tensor], caplog):
    """dz is twice what it should be; the values agree."""
    graphs = Graphs()

    def inner_compile(gm, example_inputs, **kwargs):
        for node in gm.graph.find_nodes(op="call_function", target=ops.ROW_GRAD):
            with gm.graph.inserting_after(node):
                doubled = gm.graph.call_function(torch.mul, (node, 2))
            node.replace_all_uses_with(doubled, delete_user_cb=doubled.__ne__)
        gm.recompile()
        return graphs.inner_compile(gm, example_inputs, **kwargs)

    inductor_ce.install(min_vocab=2, verify=True)
    compile_fx = torch._inductor.compile_fx.compile_fx
    compiled = torch.compile(loss, backend=lambda gm, ex: compile_fx(gm, ex, inner_compile=inner_compile))
    z, y = inputs()
    for _ in range(3):
        torch.testing.assert_close(step(compiled, z, y), step(loss, z, y))
    (message,) = errors(caplog)
    assert "the gradient of the fused loss differs" in message


def test_generated_code(caplog):
    compiled = torch.compile(smoothed, backend="inductor_ce", options={"min_vocab": 2, "verify": True})
    z, y = inputs()
    for _ in range(2):
        with backwards_at_once():
            ours = step(compiled, z, y)
        torch.testing.assert_close(ours, step(smoothed, z, y))
    assert errors(caplog) == []


def test_generated_code_with_wrong_loops(caplog, monkeypatch):
    right = loops._minus_row
    monkeypatch.setattr(loops, "_minus_row", lambda x, row: loops._mul(right(x, row), 0.5))
    compiled = torch.compile(smoothed, backend="inductor_ce", options={"min_vocab": 2, "verify": True})
    z, y = inputs()
    for _ in range(2):
        with backwards_at_once():
            ours = step(compiled, z, y)
        torch.testing.assert_close(ours, step(smoothed, z, y))
    assert errors(caplog)


def test_two_compilations_are_verified_apart(caplog):
    compiled, _ = compile_without_codegen(smoothed, verify=True)
    z, y = inputs()
    step(compiled, z, y)
    torch._dynamo.reset()
    step(compiled, z, y)
    assert len(verified._verdicts) == 2


@pytest.mark.parametrize("strategy", ["token_chunks", "vocab_slabs"])
def test_heads_stay_whole_and_explain_says_so(strategy: str):
    def head(hidden: Tensor, weight: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(F.linear(hidden, weight), y)

    given = torch.randn(N, 8, requires_grad=True), torch.randn(V, 8, requires_grad=True)
    y = torch.randint(V, (N,))
    for verify, told in ((True, "materialise"), (False, strategy)):
        with inductor_ce.install(min_vocab=2, strategy=strategy, verify=verify):
            (site,) = inductor_ce.explain(head, *given, y).sites
        assert site.strategy == told
        assert ("what it would be in pieces is not compared" in site.head) == verify


def test_it_is_true_or_false():
    with pytest.raises(inductor_ce.OptionError, match="verify must be True or False, got 'yes'"):
        inductor_ce.install(verify="yes")


# What is written otherwise before it is read

HIDDEN = [
    *((f, test_some_classes.given) for f in (test_some_classes.filled, test_some_classes.beside_a_loss)),
    *((f, test_picked_mixtures.given) for f in (test_picked_mixtures.ensemble, test_picked_mixtures.pointer)),
]


@pytest.mark.parametrize(("f", "given"), HIDDEN)
def test_what_is_written_otherwise_is_beside_the_original(f, given, caplog):
    backend = Rewritten(verify=True)
    compiled, args = torch.compile(f, backend=backend, fullgraph=True), given()
    exact = run(f, args)
    for _ in range(2):
        ours = run(compiled, args)
        for mine, true in zip(ours.results + ours.gradients, exact.results + exact.gradients, strict=True):
            torch.testing.assert_close(mine, true, rtol=1e-10, atol=1e-12, equal_nan=True)
    assert backend.report.sites
    assert not backend.report.misses
    assert backend.count(verified.VERIFIED) > len(backend.report.sites)
    assert errors(caplog) == failures() == []


@pytest.mark.parametrize(
    ("f", "given", "room"),
    [
        (test_some_classes.filled, test_some_classes.given, some_classes),
        (test_picked_mixtures.ensemble, test_picked_mixtures.given, picked_mixtures),
    ],
)
def test_what_is_written_wrong_gives_way_to_the_original(f, given, room, caplog, monkeypatch):
    def doubled(graph, node, result):
        beside_original(graph, node, Builder(graph, node, node)("mul", result, 2.0))

    monkeypatch.setattr(room, "beside_original", doubled)
    compiled, args = torch.compile(f, backend=Rewritten(verify=True), fullgraph=True), given()
    exact = run(f, args)
    for _ in range(2):
        ours = run(compiled, args)
        for mine, true in zip(ours.results + ours.gradients, exact.results + exact.gradients, strict=True):
            torch.testing.assert_close(mine, true, rtol=1e-10, atol=1e-12, equal_nan=True)
    assert "the value of the fused loss differs" in errors(caplog)[0]
