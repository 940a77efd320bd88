"""Derivatives that the operators have not, of torch.func, in forward mode, second ones: an error or right."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from harness import compile_without_codegen
from torch import Tensor
from torch.autograd import forward_ad

import inductor_ce
from inductor_ce.common.errors import DerivativeError

N, V, D = 6, 8, 4


def forms() -> dict[str, tuple[Callable[[Tensor], Any], Tensor]]:
    w, y = torch.randn(V, D), torch.randint(V, (N,))
    return {
        "cross_entropy": (lambda z: inductor_ce.cross_entropy(z, y), torch.randn(N, V)),
        "linear_cross_entropy": (lambda h: inductor_ce.linear_cross_entropy(h, w, y), torch.randn(N, D)),
    }


def in_forward_mode(f: Callable[[Tensor], Any], x: Tensor) -> Any:
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(f(forward_ad.make_dual(x, x.cos()))).tangent


def twice(f: Callable[[Tensor], Any], x: Tensor) -> Tensor:
    leaf = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(f(leaf), leaf, create_graph=True)
    return torch.autograd.grad(gradient.square().sum(), leaf)[0]


TRANSFORMS: dict[str, Callable[..., Any]] = {
    "grad": lambda f, x: torch.func.grad(f)(x),
    "vjp": lambda f, x: torch.func.vjp(f, x),
    "vmap": lambda f, x: torch.vmap(f)(torch.stack([x, 2 * x])),
    "vmap of grad": lambda f, x: torch.vmap(torch.func.grad(f))(torch.stack([x, 2 * x])),
    "jvp": lambda f, x: torch.func.jvp(f, (x,), (x.cos(),)),
    "jacrev": lambda f, x: torch.func.jacrev(f)(x),
    "hessian": lambda f, x: torch.func.hessian(f)(x),
    "forward mode": in_forward_mode,
}
FORMS = ["cross_entropy", "linear_cross_entropy"]


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("form", FORMS)
def test_a_functional_form_names_the_way_out(form: str, transform: str) -> None:
    """In forward mode torch itself would give 0 for the tangent, without a word."""
    f, x = forms()[form]
    with pytest.raises(DerivativeError, match=r"use torch\.nn\.functional\.cross_entropy there"):
        TRANSFORMS[transform](f, x)


@pytest.mark.parametrize("form", FORMS)
def test_no_second_derivative(form: str) -> None:
    f, x = forms()[form]
    with pytest.raises(DerivativeError, match=r"no second derivative.*torch.nn.functional.cross_entropy"):
        twice(f, x)


@pytest.mark.parametrize("form", FORMS)
def test_create_graph_alone_is_right(form: str) -> None:
    f, x = forms()[form]
    leaf = x.clone().requires_grad_()
    (kept,) = torch.autograd.grad(f(leaf), leaf, create_graph=True)
    (plain,) = torch.autograd.grad(f(leaf), leaf)
    torch.testing.assert_close(kept.detach(), plain)


@pytest.mark.parametrize("form", FORMS)
def test_a_dual_level_without_tangents_is_no_derivative(form: str) -> None:
    f, x = forms()[form]
    with forward_ad.dual_level():
        torch.testing.assert_close(f(x), f(x))


@pytest.mark.parametrize("transform", ["grad", "vmap", "jvp", "forward mode"])
@pytest.mark.parametrize("form", FORMS)
def test_within_compiled_code(form: str, transform: str) -> None:
    f, x = forms()[form]
    compiled, _ = compile_without_codegen(lambda x: TRANSFORMS[transform](f, x))
    with pytest.raises(Exception, match=r"use torch\.nn\.functional\.cross_entropy there"):
        compiled(x)


def test_operators_under_vmap() -> None:
    z, y = torch.randn(2, N, V), torch.randint(V, (N,))
    with pytest.raises(DerivativeError, match="give it all batches as rows"):
        torch.vmap(lambda z: torch.ops.inductor_ce.row_stats(z, [y], [], "max,sumexp,pick"))(z)


def losses() -> dict[str, tuple[Callable[[Tensor], Any], Tensor]]:
    w, y = torch.randn(V, D).double(), torch.randint(V, (N,))
    return {
        "loss": (lambda z: F.cross_entropy(z, y), torch.randn(N, V).double()),
        "head": (lambda h: F.cross_entropy(h @ w.t(), y), torch.randn(N, D).double()),
    }


@pytest.mark.in_turns
@pytest.mark.parametrize("transform", [name for name in TRANSFORMS if name != "forward mode"])
@pytest.mark.parametrize("name", ["loss", "head"])
def test_a_compiled_loss_under_a_transform(name: str, transform: str) -> None:
    """Dynamo leaves such code to eager torch, or captures the transform: either way it is right."""
    f, x = losses()[name]
    compiled, _ = compile_without_codegen(f)
    compiled(x.clone().requires_grad_()).backward()  # there is fused code that could be taken
    ours, theirs = (torch.utils._pytree.tree_leaves(TRANSFORMS[transform](g, x)) for g in (compiled, f))
    for o, t in zip(ours, theirs, strict=True):
        if isinstance(t, Tensor):
            torch.testing.assert_close(o, t)


@pytest.mark.parametrize("transform", ["grad", "vmap", "jvp"])
def test_a_transform_within_compiled_code(transform: str) -> None:
    f, x = losses()["head"]
    compiled, _ = compile_without_codegen(lambda x: TRANSFORMS[transform](f, x))
    ours, theirs = (
        torch.utils._pytree.tree_leaves(g(x)) for g in (compiled, lambda x: TRANSFORMS[transform](f, x))
    )
    for o, t in zip(ours, theirs, strict=True):
        torch.testing.assert_close(o, t)


@pytest.mark.parametrize("name", ["loss", "head"])
def test_a_compiled_loss_has_no_second_derivative(name: str) -> None:
    """As torch.compile has none: an error, and no number."""
    f, x = losses()[name]
    compiled, _ = compile_without_codegen(f)
    told = "support double backward|not have been used in the graph|does not require grad"
    with pytest.raises(RuntimeError, match=told):
        twice(compiled, x)
