"""Statistics and gradient by one template on a GPU: numbers, and that it ends whoever runs beside it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

import kernel_reference as reference
import pytest
import torch
import triton
import triton.language as tl
from gpu_codegen import Wrapper, launch_of
from interpreter import load_kernel
from test_gpu_kernels import RELATIVE
from test_one_read import SUMS, of_cross_entropy, soft_cap
from torch import Tensor
from torch._inductor.utils import run_and_get_code

from inductor_ce import ops
from inductor_ce.ops import lowering, one_read, one_read_lowering
from inductor_ce.ops.row_program import RowProgram, coefficients

pytestmark = pytest.mark.gpu

V = 128256
ALONE = {"delay": 0, "spin": 0}  # who is not there yet is helped at once


@pytest.fixture(autouse=True)
def nothing_cached(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(one_read, "is_faster", lambda *_: True)
    lowering.register()
    torch._dynamo.reset()
    with torch._inductor.config.patch(force_disable_caches=True):
        yield


def logits(n: int, v: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return (3 * torch.randn(n, v, device="cuda")).to(dtype)


def labels_for(n: int, v: int) -> Tensor:
    y = torch.randint(0, v, (n,), device="cuda")
    y[::5] = -100
    return y


Both = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


def both(which: str, program: RowProgram, *weights: Tensor, chain: str = "") -> Both:
    text = program.encode()

    def f(z: Tensor, y: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
        return ops.ROW_STATS_GRAD(z, [y], list(weights), which, [g], text, chain=chain)

    return torch.compile(f, dynamic=False, fullgraph=True)


def check(n: int, v: int, dtype: torch.dtype, *others: str, weights: tuple[Tensor, ...] = ()) -> None:
    z, y, g = logits(n, v, dtype), labels_for(n, v), torch.rand(n, device="cuda")
    which, program = reference.rows(1, *others), of_cross_entropy(1, *[0.01] * len(others))
    packed, dz = both(which, program, *weights)(z, y, g)
    expected = reference.stats(z, [y], weights, which)
    torch.testing.assert_close(packed.double(), expected, rtol=1e-5, atol=1e-5 * v)
    c = coefficients(program, expected, [g.double()])
    wanted = reference.grad(z, [y], weights, expected[0], c, which)
    torch.testing.assert_close(dz.double(), wanted, rtol=RELATIVE[dtype], atol=RELATIVE[dtype])


@pytest.mark.parametrize("v", [1, 50, 2049, 32000, 50257, V])
def test_any_vocabulary(v: int) -> None:
    check(130, v, torch.bfloat16)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_any_dtype(dtype: torch.dtype) -> None:
    check(130, 9000, dtype, "sum")


@pytest.mark.parametrize("v", [50, 9000])
def test_every_sum(v: int) -> None:
    weights = torch.randn(v, device="cuda"), torch.randn(70, v, device="cuda").bfloat16()
    check(70, v, torch.bfloat16, "sum", "sumexpz", *SUMS, weights=weights)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("v", [50, 50257])
def test_behind_a_chain(v: int, dtype: torch.dtype) -> None:
    z, y, g = logits(130, v, dtype), labels_for(130, v), torch.rand(130, device="cuda")
    which, program, (chain, before) = reference.rows(1), of_cross_entropy(1), soft_cap()
    packed, dz = both(which, program, chain=chain.encode())(z, y, g)
    of = z.double().requires_grad_()
    x = before(of)
    expected = reference.stats(x.detach(), [y], [], which)
    torch.testing.assert_close(packed.double(), expected, rtol=1e-5, atol=1e-5 * v)
    c = coefficients(program, expected, [g.double()])
    dx = reference.grad(x.detach(), [y], [], expected[0], c, which)
    (wanted,) = torch.autograd.grad(x, of, dx)
    torch.testing.assert_close(dz.double(), wanted, rtol=RELATIVE[dtype], atol=RELATIVE[dtype])


def test_over_logits_whose_rows_are_longer() -> None:
    """As of a head of GPT-2: what is beyond the classes is read, written and of no account."""
    n, v, which = 600, 50257, reference.rows(1, "sum")
    h, w = torch.randn(n, 64, device="cuda").bfloat16(), torch.randn(v, 64, device="cuda").bfloat16() / 2
    y, g, program = labels_for(n, v), torch.rand(n, device="cuda"), of_cross_entropy(1, 0.01)
    encoded = program.encode()

    def f(h: Tensor, w: Tensor, y: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
        z = torch.ops.inductor_ce.logits(h, w.t(), None, [])
        packed, dz = ops.ROW_STATS_GRAD(z, [y], [], which, [g], encoded)
        return packed, dz @ w

    options: dict[str, Any] = {"shape_padding": False}  # or torch reads the gradient to pad it
    compiled = torch.compile(f, dynamic=False, fullgraph=True, options=options)
    (packed, dh), (code,) = run_and_get_code(compiled, h, w, y, g)
    assert "W : tl.constexpr = 50264" in code
    z = torch.ops.inductor_ce.logits(h, w.t(), None, [])  # another product's last bits sum up
    expected = reference.stats(z, [y], [], which)
    torch.testing.assert_close(packed.double(), expected, rtol=1e-5, atol=1e-5 * v)
    wanted = reference.grad(z, [y], [], expected[0], coefficients(program, expected, [g.double()]), which)
    exact, naive = wanted @ w.double(), wanted.bfloat16() @ w  # as smoothing is small, and rounded alike
    assert (dh.double() - exact).norm() <= 1.15 * (naive.double() - exact).norm()


def set_once(monkeypatch: pytest.MonkeyPatch, **fields: int) -> None:
    monkeypatch.setattr(one_read_lowering, "ONCE", one_read_lowering.ONCE._replace(**fields))


def test_the_same_bits_by_help(monkeypatch: pytest.MonkeyPatch) -> None:
    z, y, g = logits(700, V), labels_for(700, V), torch.rand(700, device="cuda")
    which, program = reference.rows(1), of_cross_entropy(1)
    expected = both(which, program)(z, y, g)
    for fields in (ALONE, {"delay": 0}, {"spin": 0}):
        set_once(monkeypatch, **{"delay": 640, "spin": 1024, **fields})
        torch._dynamo.reset()
        assert all(map(torch.equal, both(which, program)(z, y, g), expected))


def test_it_ends_though_no_other_program_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of two rows a few programs of the first, in place."""
    set_once(monkeypatch, delay=0)
    which, program, few = reference.rows(1), of_cross_entropy(1), 5
    z, y, g = logits(2, V), torch.tensor([V - 1, 3], device="cuda"), torch.rand(2, device="cuda")
    f = both(which, program)
    expected, (code,) = run_and_get_code(f, z, y, g)
    over = z.clone()
    launch = launch_of(Wrapper(code), [over, y, g], torch.empty_like(expected[0]), over)
    warps = one_read_lowering.ONCE.warps
    load_kernel(launch.source, launch.name)[(few,)](*launch.arguments, num_warps=warps)
    torch.cuda.synchronize()
    done = few * one_read_lowering.ONCE.block
    assert torch.equal(launch.written[0][:, 0], expected[0][:, 0])
    assert torch.equal(over[0, :done], expected[1][0, :done])
    assert torch.equal(over[0, done:], z[0, done:])
    assert torch.equal(over[1], z[1])


@pytest.mark.parametrize("fields", [{}, {"delay": 0}, ALONE], ids=["in time", "waiting", "by help"])
def test_several_at_a_time(fields: dict[str, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """In streams of their own, beside products: none is wholly on the GPU at once."""
    set_once(monkeypatch, **fields)
    f = both(reference.rows(1), of_cross_entropy(1))
    streams = [torch.cuda.Stream() for _ in range(4)]
    given = [(logits(400, V), labels_for(400, V), torch.rand(400, device="cuda")) for _ in streams]
    expected = [f(*each) for each in given]
    a = torch.randn(4096, 4096, device="cuda", dtype=torch.bfloat16)
    torch.cuda.synchronize()
    for _ in range(5):
        made = []
        for stream, each in zip(streams, given, strict=True):
            with torch.cuda.stream(stream):
                made.append(f(*each))
        for _ in range(5):
            a @ a
        torch.cuda.synchronize()
        for own, wanted in zip(made, expected, strict=True):
            assert all(map(torch.equal, own, wanted))


@triton.jit
def _until(flag):
    while tl.load(flag, volatile=True) == 0:
        pass


FULL = 16  # programs of four warps that a multiprocessor has room for


@pytest.mark.parametrize("free", [2, 0])
def test_beside_what_fills_the_gpu(free: int) -> None:
    """With room for a few programs it ends meanwhile, and without any thereafter."""
    f = both(reference.rows(1), of_cross_entropy(1))
    given = logits(64, V), labels_for(64, V), torch.rand(64, device="cuda")
    expected, flag = f(*given), torch.zeros(1, dtype=torch.int32, device="cuda")
    others, own, release = (torch.cuda.Stream() for _ in range(3))
    one = torch.ones(1, dtype=torch.int32).pin_memory()
    _until[(1,)](torch.ones_like(flag))
    with torch.cuda.stream(own):
        f(*given)  # memory that is asked for beside what never ends might wait for that
    torch.cuda.synchronize()
    room = torch.cuda.get_device_properties(0).multi_processor_count * FULL
    with torch.cuda.stream(others):
        _until[(room - free,)](flag)
    with torch.cuda.stream(own):
        made = f(*given)
        ended = own.record_event()
    time.sleep(0.3)
    early = ended.query()
    with torch.cuda.stream(release):
        flag.copy_(one, non_blocking=True)
    torch.cuda.synchronize()
    assert early == (free > 0)
    assert all(map(torch.equal, made, expected))
