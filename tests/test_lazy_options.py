"""Returned logits by the options, and by installations that come and go."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from harness import Graphs, compile_lazily, sites, without_codegen
from lazy_programs import B, D, Model, T, V, batch, ce, gradients, lazies, raw, total
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch._inductor import compile_fx as compile_fx_module
from torch.fx import GraphModule

import inductor_ce

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
    with without_codegen(), pytest.warns(DeprecationWarning, match="drop_logits is now"):
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


def test_installed_for_every_thread() -> None:
    """Inductor's configuration is each thread's own from torch 2.13."""

    def in_a_thread(f: Callable[[], Any]) -> Any:
        with ThreadPoolExecutor(1) as pool:
            return pool.submit(f).result()

    def compiled() -> Any:
        torch._dynamo.reset()
        counters.clear()
        h, w, y = torch.randn(4, 8), torch.randn(16, 8), torch.arange(4)
        f = lambda: F.cross_entropy(F.linear(h, w), y)  # noqa: E731
        torch.testing.assert_close(torch.compile(f)(), f())
        return counters["inductor_ce"]["sites"], len(inductor_ce.explain(f).sites)

    with without_codegen():
        with inductor_ce.install(min_vocab=2):
            assert in_a_thread(compiled) == (1, 1)
            with torch._inductor.config.patch(pre_grad_custom_pass=None):
                assert compiled()[0] == 0  # who takes the pass out has it out
        assert in_a_thread(compiled) == (0, 0)  # under 1024 classes, as nothing is installed


@without_codegen()
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
