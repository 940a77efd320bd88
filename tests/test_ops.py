"""The waist: both operators as torch sees them, and as calculus does."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import reference
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses import FakeTensorMode
from torch.autograd import gradcheck

from inductor_ce import ops

N, V = 6, 11
ALL = "max,sumexp,pick,pick,sum"
FLOATS = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
INTEGERS = [torch.uint8, torch.int32, torch.int64]


def logits(*shape: int, dtype: torch.dtype = torch.float32, requires_grad: bool = False) -> Tensor:
    return (3 * torch.randn(*shape or (N, V))).to(dtype).requires_grad_(requires_grad)


def labels(n: int = N, dtype: torch.dtype = torch.int64) -> Tensor:
    """The first and the last column among them."""
    y = torch.randint(0, V, (n,))
    y[:2] = torch.tensor([0, V - 1])[:n]
    return y.to(dtype)


def coefficients(k: int = 5, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(k, N, dtype=dtype)


def expected_stats(z: Tensor, *ys: Tensor) -> Tensor:
    x = z.double()
    m = x.amax(1)
    picked = [x[torch.arange(len(x)), y.long()] for y in ys]
    return torch.stack([m, (reference.log_sum_exp(x) - m).exp(), *picked, (x - m[:, None]).sum(1)])


# As torch sees them


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(("which", "n_labels"), [("max,sumexp", 0), ("max,sumexp,pick,sum", 1), (ALL, 2)])
def test_opcheck_row_stats(which: str, n_labels: int, dtype: torch.dtype) -> None:
    z = logits(dtype=dtype, requires_grad=True)
    torch.library.opcheck(ops.row_stats, (z, [labels() for _ in range(n_labels)], which))


@pytest.mark.parametrize("dtype", FLOATS)
def test_opcheck_row_grad(dtype: torch.dtype) -> None:
    z = logits(dtype=dtype)
    c = coefficients(dtype=ops.stats_dtype(z))
    torch.library.opcheck(ops.row_grad, (z, [labels(), labels()], z.amax(1).to(c.dtype), c, ALL))


def test_schemas() -> None:
    assert str(ops.ROW_STATS._schema) == (
        "inductor_ce::row_stats(Tensor z, Tensor[] labels, str which) -> Tensor"
    )
    assert str(ops.ROW_GRAD._schema) == (
        "inductor_ce::row_grad(Tensor z, Tensor[] labels, Tensor m, Tensor coefficients, str which) -> Tensor"
    )
    assert not ops.ROW_STATS._schema.is_mutable
    assert not ops.ROW_GRAD._schema.is_mutable


@pytest.mark.parametrize(
    ("which", "n_labels"),
    [
        ("", 0),
        ("lse", 0),
        ("sumexp,max", 0),
        ("max", 0),
        ("max,sumexp,pick", 0),
        ("max,sumexp", 1),
        ("max,sumexp,pick", 2),
        ("max,sumexp,sum,pick", 1),
        ("max,sumexp,sum,sum", 0),
        ("max, sumexp", 0),
    ],
)
def test_which_is_checked(which: str, n_labels: int) -> None:
    with pytest.raises(ValueError, match="expected 'max,sumexp'"):
        ops.row_stats(logits(), [labels()] * n_labels, which)


@pytest.mark.parametrize(
    ("z", "y", "message"),
    [
        (torch.randn(2, 3, 4), torch.zeros(2).long(), r"z must be floating point \[N, V\].*\(2, 3, 4\)"),
        (torch.ones(2, 3).long(), torch.zeros(2).long(), r"z must be floating point \[N, V\].*int64"),
        (torch.randn(2, 3), torch.zeros(2), r"labels must be integers \[N\].*float32"),
        (torch.randn(2, 3), torch.zeros(2, 1).long(), r"labels must be integers \[N\].*\(2, 1\)"),
        (torch.randn(2, 3), torch.zeros(2).cfloat(), r"labels must be integers \[N\].*complex64"),
    ],
)
def test_arguments_are_checked(z: Tensor, y: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ops.row_stats(z, [y], "max,sumexp,pick")
    with pytest.raises(ValueError, match=message):
        ops.row_grad(z, [y], torch.zeros(2), torch.zeros(3, 2), "max,sumexp,pick")


def test_number_of_labels_is_checked() -> None:
    with pytest.raises(RuntimeError, match="labels and z differ in N"):
        ops.row_stats(logits(), [labels(N + 1)], "max,sumexp,pick")


@pytest.mark.parametrize("dtype", FLOATS)
def test_fake_results(dtype: torch.dtype) -> None:
    """Shapes, dtypes and strides as the real ones, of a transposed z too."""
    for z in (logits(dtype=dtype), logits(V, N, dtype=dtype).t()):
        c = coefficients(dtype=ops.stats_dtype(z))
        args = (z, [labels(), labels()], c[0], c, ALL)
        real = ops.row_stats(z, args[1], ALL), ops.row_grad(*args)
        with FakeTensorMode() as mode:
            z, y1, y2, m, c = map(mode.from_tensor, (z, *args[1], *args[2:4]))
            fake = ops.row_stats(z, [y1, y2], ALL), ops.row_grad(z, [y1, y2], m, c, ALL)
        for r, f in zip(real, fake, strict=True):
            assert (r.shape, r.dtype, r.stride()) == (f.shape, f.dtype, f.stride())


# What they compute


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("label_dtype", INTEGERS)
def test_statistics(dtype: torch.dtype, label_dtype: torch.dtype) -> None:
    z, y1, y2 = logits(dtype=dtype), labels(dtype=label_dtype), labels(dtype=torch.int64)
    actual = ops.row_stats(z, [y1, y2], ALL)
    assert actual.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(actual, expected_stats(z, y1, y2).to(actual.dtype))


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("label_dtype", INTEGERS)
def test_gradient_is_rounded_once(dtype: torch.dtype, label_dtype: torch.dtype) -> None:
    z, y = logits(dtype=dtype), labels(dtype=label_dtype)
    m, c = z.double().amax(1), coefficients(4, torch.float64)
    one_hot = torch.nn.functional.one_hot(y.long(), V)
    expected = c[1, :, None] * (z.double() - m[:, None]).exp() + c[2, :, None] * one_hot + c[3, :, None]
    actual = ops.row_grad(z, [y], m.to(ops.stats_dtype(z)), c.to(ops.stats_dtype(z)), "max,sumexp,pick,sum")
    assert actual.dtype == dtype
    half_ulp = torch.finfo(dtype).eps / 2
    computed = 4 * torch.finfo(c.dtype if dtype == torch.float64 else torch.float32).eps
    torch.testing.assert_close(actual.double(), expected, rtol=1.1 * half_ulp, atol=computed)


@pytest.mark.parametrize("outside", [-1, -100, V, V + 5, 2**31 - 1, -(2**31)])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_a_label_outside_belongs_to_no_column(outside: int, dtype: torch.dtype) -> None:
    z, y = logits(requires_grad=True), labels(dtype=dtype)
    y[2] = outside
    picked = ops.row_stats(z, [y], "max,sumexp,pick")[2]
    assert picked[2] == 0
    (dz,) = torch.autograd.grad(picked.sum(), z)
    assert dz[2].eq(0).all()
    assert dz.sum() == N - 1


def test_255_is_a_label_like_any_other() -> None:
    """uint8 does not wrap round."""
    z = logits(2, 300)
    y = torch.tensor([255, 7], dtype=torch.uint8)
    assert ops.row_stats(z, [y], "max,sumexp,pick")[2].tolist() == [z[0, 255], z[1, 7]]
    assert ops.row_stats(z[:, :100], [y], "max,sumexp,pick")[2].tolist() == [0, z[1, 7]]


@pytest.mark.parametrize(("n", "v"), [(0, 5), (3, 0), (0, 0), (1, 1), (3, 1)])
def test_no_rows_and_no_columns(n: int, v: int) -> None:
    z = torch.randn(n, v, requires_grad=True)
    stats = ops.row_stats(z, [torch.zeros(n, dtype=torch.int64)], "max,sumexp,pick,sum")
    assert stats.shape == (4, n)
    if v == 0:
        identity = torch.tensor([-torch.inf, 0, 0, 0])
        assert torch.equal(stats, identity[:, None].expand(4, n))
    (dz,) = torch.autograd.grad(stats.sum(), z)
    assert dz.shape == z.shape


@pytest.mark.parametrize("value", [-torch.inf, torch.inf, torch.nan])
@pytest.mark.parametrize("columns", [slice(0, 1), slice(V - 1, V), slice(1, V), slice(0, V)])
def test_not_finite(value: float, columns: slice) -> None:
    """m + log d is the logsumexp, NaN where a row holds NaN; a row of -inf has d = 0."""
    z = logits()
    z[2, columns] = value
    m, d = ops.row_stats(z, [], "max,sumexp")
    expected = z.logsumexp(1)
    expected[z.isposinf().any(1)] = torch.nan
    torch.testing.assert_close(m + d.log(), expected, equal_nan=True)
    if value == -torch.inf and columns == slice(0, V):
        assert d[2] == 0


# As calculus sees them


def lse(stats: Tensor) -> Tensor:
    return stats[0] + stats[1].log()


@pytest.mark.parametrize(
    "of",
    [
        lse,
        lambda s: s[2],
        lambda s: s[3],
        lambda s: V * s[0].detach() + s[4],
        lambda s: s[1].log() + (s[0] - s[2]),
        lambda s: lse(s).square() * s[3] + (V * s[0] + s[4]).sin() - s[2] * s[3],
    ],
    ids=["lse", "pick 1", "pick 2", "sum", "loss", "mixture"],
)
def test_gradcheck(of: Callable[[Tensor], Tensor]) -> None:
    y = torch.tensor([0, V - 1, 3, 3, -100, V])
    ys = [y, labels()]
    assert gradcheck(lambda z: of(ops.row_stats(z, ys, ALL)), logits(dtype=torch.float64, requires_grad=True))


def test_max_has_no_gradient() -> None:
    z = logits(requires_grad=True)
    (dz,) = torch.autograd.grad(ops.row_stats(z, [], "max,sumexp")[0].sum(), z)
    assert dz.eq(0).all()


def test_labels_of_one_row_may_agree() -> None:
    """Two label tensors with the same label: their gradients add."""
    z, y = logits(requires_grad=True), labels()
    stats = ops.row_stats(z, [y, y], "max,sumexp,pick,pick")
    (dz,) = torch.autograd.grad((2 * stats[2] + 3 * stats[3]).sum(), z)
    assert torch.equal(dz, 5.0 * torch.nn.functional.one_hot(y, V))


def test_a_second_derivative_is_refused() -> None:
    """Never a wrong number: the gradient of a gradient penalty would lack the terms through z."""
    z = logits(dtype=torch.float64, requires_grad=True)
    (dz,) = torch.autograd.grad(lse(ops.row_stats(z, [], "max,sumexp")).sum(), z, create_graph=True)
    with pytest.raises(RuntimeError, match=r"row_grad.*no autograd formula|does not require grad"):
        dz.square().sum().backward()


# Strides


@pytest.mark.parametrize("layout", ["transposed", "every other column", "expanded", "last rows"])
def test_z_of_any_strides(layout: str) -> None:
    z = {
        "transposed": logits(V, N).t(),
        "every other column": logits(N, 2 * V)[:, ::2],
        "expanded": logits(1, V).expand(N, V),
        "last rows": logits(2 * N, V)[N:],
    }[layout]
    ys, c = [labels(), labels()], coefficients()
    stats = ops.row_stats(z, ys, ALL)
    torch.testing.assert_close(stats, ops.row_stats(z.contiguous(), ys, ALL))
    dz = ops.row_grad(z, ys, stats[0], c, ALL)
    assert dz.is_contiguous()
    assert torch.equal(dz, ops.row_grad(z.contiguous(), ys, stats[0], c, ALL))


@pytest.mark.parametrize("layout", ["expanded over rows", "expanded over statistics", "transposed", "sliced"])
def test_coefficients_of_any_strides(layout: str) -> None:
    c = {
        "expanded over rows": torch.randn(5, 1).expand(5, N),
        "expanded over statistics": torch.randn(1, N).expand(5, N),
        "transposed": torch.randn(N, 5).t(),
        "sliced": torch.randn(5, 2 * N)[:, ::2],
    }[layout]
    z, ys = logits(), [labels(2 * N)[::2], labels()]
    m = torch.stack([z.amax(1)] * 2, 1)[:, 0]
    expected = ops.row_grad(z, [y.contiguous() for y in ys], m.contiguous(), c.contiguous(), ALL)
    assert torch.equal(ops.row_grad(z, ys, m, c, ALL), expected)


@pytest.mark.parametrize("upstream", ["expanded", "transposed"])
def test_upstream_gradient_of_any_strides(upstream: str) -> None:
    z, ys = logits(requires_grad=True), [labels(), labels()]
    g = torch.randn(5, 1).expand(5, N) if upstream == "expanded" else torch.randn(N, 5).t()
    stats = ops.row_stats(z, ys, ALL)
    (actual,) = torch.autograd.grad(stats, z, g, retain_graph=True)
    (expected,) = torch.autograd.grad(stats, z, g.contiguous())
    assert torch.equal(actual, expected)


# In graphs


def test_any_number_of_rows_in_one_graph() -> None:
    def f(z: Tensor, y: Tensor) -> Tensor:
        stats = ops.row_stats(z, [y], "max,sumexp,pick")
        return (lse(stats) - stats[2]).sum()

    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(f, backend=counter, dynamic=True, fullgraph=True)
    for n in (5, 2, 31, 64):
        z, y = logits(n, V, requires_grad=True), labels(n)
        actual, expected = compiled(z, y), torch.nn.functional.cross_entropy(z, y, reduction="sum")
        torch.testing.assert_close(actual, expected)
        torch.testing.assert_close(*(torch.autograd.grad(loss, z)[0] for loss in (actual, expected)))
    assert counter.frame_count == 1
