"""The lowerings: compiled CPU code against float64, and the code that a GPU would get."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import kernel_reference as reference
import pytest
import torch
from gpu_codegen import generate
from interpreter import triton_ir
from torch import Tensor
from torch._inductor.utils import run_and_get_code

from inductor_ce import compat, lowering, ops, shield

N, V = 8192, 32000
WHICH = "max,sumexp,pick,pick,sum"


@pytest.fixture(autouse=True)
def registered() -> Iterator[None]:
    lowering.register()
    torch._dynamo.reset()
    with torch._inductor.config.patch(force_disable_caches=True):
        yield


def loss(z: Tensor, y: Tensor, weight: Tensor) -> Tensor:
    return reference.loss(z, y, weight)


# On the CPU: Inductor's own loops


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_loss_and_gradient(dtype: torch.dtype) -> None:
    n, v = 7, 37
    z = (3 * torch.randn(n, v)).to(dtype).requires_grad_()
    y, weight = reference.random_labels(n, v, torch.int32), torch.rand(n)
    actual = torch.compile(loss)(z, y, weight)
    (dz,) = torch.autograd.grad(actual, z)
    zd = z.detach().double().requires_grad_()
    expected = reference.loss_reference(zd, y, weight)
    (dzd,) = torch.autograd.grad(expected, zd)
    tolerance = {torch.bfloat16: 1e-2, torch.float32: 1e-5, torch.float64: 1e-12}[dtype]
    torch.testing.assert_close(actual.double(), expected, rtol=min(tolerance, 1e-5), atol=0)
    torch.testing.assert_close(dz.double(), dzd, rtol=tolerance, atol=tolerance * dzd.abs().max().item())


def test_no_fallback() -> None:
    z, y, weight = torch.randn(5, 33, requires_grad=True), reference.random_labels(5, 33), torch.rand(5)

    def step() -> None:
        torch.compile(loss)(z, y, weight).backward()

    _, codes = run_and_get_code(step)
    assert len(codes) == 2
    assert not any("torch.ops.inductor_ce" in code for code in codes)


def test_row_count_is_dynamic() -> None:
    compiled = torch.compile(lambda z, y: ops.row_stats(z, [y, y], WHICH), dynamic=True)
    for n in (5, 7, 1, 0):
        z, y = torch.randn(n, 9), reference.random_labels(n, 9)
        expected = reference.stats(z, [y, y], with_sum=True).float()
        torch.testing.assert_close(compiled(z, y), expected)


@pytest.mark.parametrize("strided", ["transposed", "expanded"])
def test_coefficients_of_any_strides(strided: str) -> None:
    n, v = 6, 11
    z, y = torch.randn(n, v), reference.random_labels(n, v)
    m = z.amax(1)
    coefficients = torch.rand(n, 5).t() if strided == "transposed" else torch.rand(5, 1).expand(5, n)
    compiled = torch.compile(lambda *args: ops.row_grad(args[0], [y, y.flip(0)], *args[1:], WHICH))
    expected = reference.grad(z, [y, y.flip(0)], m, coefficients, with_sum=True)
    torch.testing.assert_close(compiled(z, m, coefficients), expected.float())


@pytest.mark.parametrize("value", [-torch.inf, torch.inf, torch.nan])
def test_not_finite(value: float) -> None:
    z, y = torch.randn(4, 9), reference.random_labels(4, 9)
    z[1, 3], z[2] = value, value
    compiled = torch.compile(lambda z, y: ops.row_stats(z, [y, y], WHICH))
    torch.testing.assert_close(compiled(z, y), ops.row_stats(z, [y, y], WHICH), equal_nan=True)


# On a GPU: one template, nothing of size [N, V] but what is asked for


def gpu_arguments(v: int = V, dtype: torch.dtype = torch.bfloat16) -> tuple[Tensor, Tensor, Tensor]:
    return (
        torch.empty(N, v, dtype=dtype, device="meta", requires_grad=True),
        torch.empty(N, dtype=torch.int64, device="meta"),
        torch.empty(N, device="meta"),
    )


@pytest.mark.parametrize("chain", reference.CHAINS)
def test_chain_is_absorbed(chain: Callable[[Tensor, Tensor], Tensor]) -> None:
    bias = torch.empty(V, device="meta")
    forward, backward = generate(
        lambda x, y, weight, bias: reference.loss(chain(x, bias), y, weight),
        *gpu_arguments(),
        bias,
        prepare_joint=reference.recompute_chain,
    )
    for wrapper in (forward, backward):
        assert sum(name.startswith("triton_tem") for name in wrapper.launches) == 1
        assert "extern_kernels" not in "\n".join(wrapper.kernels)
    assert (N, V) not in forward.allocations
    assert backward.allocations.count((N, V)) == 1


def test_chain_is_computed_once_in_the_backward() -> None:
    _, backward = generate(
        lambda x, y, weight: reference.loss(reference.soft_cap(x, x), y, weight),
        *gpu_arguments(50257),
        prepare_joint=reference.recompute_chain,
    )
    name, source = next(item for item in backward.kernels.items() if item[0].startswith("triton_tem"))
    ttir = triton_ir(source, name, backward.signature(name))
    assert source.count("libdevice.tanh") == 2
    assert ttir.count("__nv_tanhf") == 1


@pytest.mark.skipif(
    not compat.HAS_PASS_LISTS, reason="before 2.13 a view stands between template and epilogue"
)
def test_view_of_a_chain_is_absorbed() -> None:
    x = torch.empty(8, 1024, V, dtype=torch.bfloat16, device="meta", requires_grad=True)
    y, weight = (a.reshape(-1) for a in gpu_arguments()[1:])
    forward, backward = generate(
        lambda x, y, weight: reference.loss(reference.soft_cap(x, x).reshape(-1, V), y, weight),
        x,
        y,
        weight,
        prepare_joint=reference.recompute_chain,
    )
    assert sum(name.startswith("triton_tem") for name in forward.launches) == 1
    assert not [shape for shape in forward.allocations if V in shape]
    assert len([shape for shape in backward.allocations if V in shape]) == 1


@pytest.mark.parametrize("v", [V, 50257])
def test_plain_logits_are_read_once_a_graph(v: int) -> None:
    forward, backward = generate(loss, *gpu_arguments(v))
    assert forward.allocations[0] == (4, N)
    assert [shape for shape in backward.allocations if shape == (N, v)] == [(N, v)]
    assert not any("torch.ops.inductor_ce" in w.code for w in (forward, backward))


def test_dynamic_rows_on_a_gpu() -> None:
    forward, backward = generate(loss, *gpu_arguments(), dynamic=True)
    assert (-1, V) not in forward.allocations
    assert (-1, V) in backward.allocations


def test_empty_on_a_gpu() -> None:
    z, y = torch.empty(0, V, device="meta"), torch.empty(0, dtype=torch.int64, device="meta")
    (wrapper,) = generate(lambda z, y: ops.row_stats(z, [y], "max,sumexp,pick"), z, y)
    assert not any(name.startswith("triton_tem") for name in wrapper.launches)


def test_no_room_to_time_takes_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    class Choice:
        def output_node(self) -> Choice:
            return self

    class Template:
        name = "any"

        def maybe_append_choice(self, choices: list[Choice], **kwargs: object) -> None:
            choices.append(Choice())

    def out_of_memory(name: str, choices: list[Choice], *args: object, **kwargs: object) -> None:
        seen.extend(choices)
        raise torch.OutOfMemoryError

    seen: list[Choice] = []
    monkeypatch.setattr(compat, "autotune_select_algorithm", out_of_memory)
    assert compat.choose(Template(), [], None, [], [{}, {}]) is seen[0]


# In place


def head_arguments() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    h = torch.empty(512, 64, dtype=torch.bfloat16, device="meta", requires_grad=True)
    w = torch.empty(V, 64, dtype=torch.bfloat16, device="meta", requires_grad=True)
    return h, w, torch.empty(512, dtype=torch.int64, device="meta"), torch.empty(512, device="meta")


def head_loss(h: Tensor, w: Tensor, y: Tensor, weight: Tensor) -> Tensor:
    return loss(h @ w.t(), y, weight)


def head_loss_and_logits(h: Tensor, w: Tensor, y: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    z = h @ w.t()
    return loss(z, y, weight), z


def head_loss_and_penalty(h: Tensor, w: Tensor, y: Tensor, weight: Tensor) -> Tensor:
    z = h @ w.t()
    return loss(z, y, weight) + z.float().square().mean()


def both_in_one_graph(h: Tensor, w: Tensor, y: Tensor, weight: Tensor) -> Tensor:
    z = h @ w.t()
    m = ops.row_stats(z, [y], "max,sumexp,pick")[0]
    return ops.row_grad(z, [y], m, weight.expand(3, -1), "max,sumexp,pick").t() @ h


def test_gradient_is_written_over_logits_that_die() -> None:
    forward, backward = generate(head_loss, *head_arguments())
    assert forward.allocations.count((512, V)) == 1
    assert (512, V) not in backward.allocations


def test_gradient_is_written_over_logits_of_the_same_graph() -> None:
    h, w, y, weight = (a.detach() for a in head_arguments())
    (wrapper,) = generate(both_in_one_graph, h, w, y, weight)
    assert wrapper.allocations.count((512, V)) == 1


@pytest.mark.parametrize("f", [head_loss_and_logits, head_loss_and_penalty])
def test_logits_that_somebody_else_reads_are_kept(f: Callable[..., object]) -> None:
    _, backward = generate(f, *head_arguments())
    assert (512, V) in backward.allocations


def test_template_that_cannot_be_had(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Inductor's loops take over, with a traceback in the log and one warning."""

    def refuse(*args: object, **kwargs: object) -> None:
        raise RuntimeError("no such instruction")

    monkeypatch.setattr(compat, "choose", refuse)
    monkeypatch.setattr(shield, "_warned", False)
    x, y, weight = gpu_arguments()
    with pytest.warns(UserWarning, match="no such instruction"):
        forward, backward = generate(reference.loss, x, y, weight)
    assert not any(name.startswith("triton_tem") for name in forward.launches + backward.launches)
    assert "Traceback" in caplog.text
