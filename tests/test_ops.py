"""The waist: both operators as torch sees them, and as calculus does."""

from __future__ import annotations

from collections.abc import Callable

import kernel_reference
import pytest
import reference
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses import FakeTensorMode
from torch.autograd import gradcheck
from torch.fx.experimental.proxy_tensor import make_fx

from inductor_ce import ops

N, V = 6, 11
ALL = "max,sumexp,pick,pick,sum"
EVERY = kernel_reference.every_row(2, 2)
K = 13
FLOATS = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
INTEGERS = [torch.uint8, torch.int32, torch.int64]


def logits(*shape: int, dtype: torch.dtype = torch.float32, requires_grad: bool = False) -> Tensor:
    return (3 * torch.randn(*shape or (N, V))).to(dtype).requires_grad_(requires_grad)


def labels(n: int = N, dtype: torch.dtype = torch.int64) -> Tensor:
    """The first and the last column among them."""
    y = torch.randint(0, V, (n,))
    y[:2] = torch.tensor([0, V - 1])[:n]
    return y.to(dtype)


def weights(dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """A weight of columns, and one of rows and columns."""
    return [torch.randn(V).to(dtype), torch.randn(N, V).to(dtype)]


def coefficients(which: str = EVERY, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(which.count(",") + 1, N, dtype=dtype)


def expected_stats(z: Tensor, *ys: Tensor) -> Tensor:
    x = z.double()
    m = x.amax(1)
    picked = [x[torch.arange(len(x)), y.long()] for y in ys]
    return torch.stack([m, (reference.log_sum_exp(x) - m).exp(), *picked, (x - m[:, None]).sum(1)])


# As torch sees them


ROWS = {
    "max,sumexp": (0, 0),
    "max,sumexp,pick,sum": (1, 0),
    "max,sumexp,argmax": (0, 0),
    "max,sumexp,sumexpz": (0, 0),
    "max,sumexp,pick,mass:0,expdot:1": (1, 2),
    kernel_reference.rows(0, *kernel_reference.kept(2)): (0, 2),
    EVERY: (2, 2),
}


@pytest.mark.in_turns
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("which", ROWS)
def test_opcheck_row_stats(which: str, dtype: torch.dtype) -> None:
    n_labels, n_weights = ROWS[which]
    z = logits(dtype=dtype, requires_grad=True)
    args = (z, [labels() for _ in range(n_labels)], weights(dtype)[:n_weights], which)
    torch.library.opcheck(ops.row_stats, args)


@pytest.mark.in_turns
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("which", ROWS)
def test_opcheck_row_grad(which: str, dtype: torch.dtype) -> None:
    n_labels, n_weights = ROWS[which]
    z = logits(dtype=dtype)
    c = coefficients(which, ops.stats_dtype(z))
    args = ([labels() for _ in range(n_labels)], weights(dtype)[:n_weights], z.amax(1).to(c.dtype), c)
    torch.library.opcheck(ops.row_grad, (z, *args, which))


def test_schemas() -> None:
    assert str(ops.ROW_STATS._schema) == (
        "inductor_ce::row_stats(Tensor z, Tensor[] labels, Tensor[] weights, str which, *, "
        "SymInt site=-1) -> Tensor"
    )
    assert str(ops.ROW_GRAD._schema) == (
        "inductor_ce::row_grad(Tensor z, Tensor[] labels, Tensor[] weights, Tensor m, Tensor coefficients, "
        "str which, *, SymInt site=-1) -> Tensor"
    )
    assert not ops.ROW_STATS._schema.is_mutable
    assert not ops.ROW_GRAD._schema.is_mutable


@pytest.mark.parametrize(
    ("which", "n_labels", "n_weights"),
    [
        ("", 0, 0),
        ("lse", 0, 0),
        ("sumexp,max", 0, 0),
        ("max", 0, 0),
        ("max,sumexp,pick", 0, 0),
        ("max,sumexp", 1, 0),
        ("max,sumexp,pick", 2, 0),
        ("max,sumexp,sum,pick", 1, 0),
        ("max,sumexp,sum,sum", 0, 0),
        ("max, sumexp", 0, 0),
        ("max,sumexp,sumexpz,sum", 0, 0),
        ("max,sumexp,argmax,sumexpz", 0, 0),
        ("max,sumexp,argmax,argmax", 0, 0),
        ("max,sumexp,top", 0, 0),
        ("max,sumexp,top,argmax", 0, 0),
        ("max,sumexp", 0, 1),
        ("max,sumexp,dot", 0, 1),
        ("max,sumexp,dot:0", 0, 0),
        ("max,sumexp,dot:0", 0, 2),
        ("max,sumexp,dot:1", 0, 1),
        ("max,sumexp,dot:0,dot:0", 0, 1),
        ("max,sumexp,mass:0,dot:0", 0, 1),
        ("max,sumexp,dot:1,dot:0", 0, 2),
        ("max,sumexp,dot:0,sum", 0, 1),
        ("max,sumexp,pick:0", 0, 1),
        ("max,sumexp,dot:00", 0, 1),
        ("max,sumexp,dot:x", 0, 1),
    ],
)
def test_which_is_checked(which: str, n_labels: int, n_weights: int) -> None:
    with pytest.raises(ValueError, match="expected 'max,sumexp'"):
        ops.row_stats(logits(), [labels()] * n_labels, weights()[:n_weights], which)


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
        ops.row_stats(z, [y], [], "max,sumexp,pick")
    with pytest.raises(ValueError, match=message):
        ops.row_grad(z, [y], [], torch.zeros(2), torch.zeros(3, 2), "max,sumexp,pick")


def test_number_of_labels_is_checked() -> None:
    with pytest.raises(RuntimeError, match="labels and z differ in N"):
        ops.row_stats(logits(), [labels(N + 1)], [], "max,sumexp,pick")


@pytest.mark.parametrize(
    ("q", "error", "message"),
    [
        (torch.tensor(1.0), ValueError, r"weights must be real \[V\] or \[N, V\].*\(\)"),
        (torch.zeros(1, N, V), ValueError, r"weights must be real \[V\] or \[N, V\].*\(1, 6, 11\)"),
        (torch.zeros(V).cfloat(), ValueError, r"weights must be real \[V\] or \[N, V\].*complex64"),
        (torch.zeros(V + 1), RuntimeError, "weights and z differ in V"),
        (torch.zeros(N, 1), RuntimeError, "weights and z differ in V"),
        (torch.zeros(1, V), RuntimeError, "weights and z differ in N"),
    ],
)
def test_weights_are_checked(q: Tensor, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        ops.row_stats(logits(), [], [q], "max,sumexp,dot:0")
    with pytest.raises(error, match=message):
        ops.row_grad(logits(), [], [q], torch.zeros(N), coefficients("max,sumexp,dot:0"), "max,sumexp,dot:0")


def test_argmax_of_more_columns_than_float32_counts() -> None:
    """float64 counts them."""
    with FakeTensorMode():
        z = torch.empty(2, ops.MAX_COLUMNS + 1)
        with pytest.raises(RuntimeError, match="argmax over more than 16777216 columns"):
            ops.row_stats(z, [], [], "max,sumexp,argmax")
        for fits in (z[:, 1:], z.double()):
            assert ops.row_stats(fits, [], [], "max,sumexp,argmax").shape == (3, 2)


@pytest.mark.parametrize("dtype", FLOATS)
def test_fake_results(dtype: torch.dtype) -> None:
    """Shapes, dtypes and strides as the real ones, of a transposed z too."""
    for z in (logits(dtype=dtype), logits(V, N, dtype=dtype).t()):
        ys, qs, c = [labels(), labels()], weights(), coefficients(dtype=ops.stats_dtype(z))
        real = ops.row_stats(z, ys, qs, EVERY), ops.row_grad(z, ys, qs, c[0], c, EVERY)
        with FakeTensorMode() as mode:
            z, c, *others = map(mode.from_tensor, (z, c, *ys, *qs))
            ys, qs = others[:2], others[2:]
            fake = ops.row_stats(z, ys, qs, EVERY), ops.row_grad(z, ys, qs, c[0], c, EVERY)
        for r, f in zip(real, fake, strict=True):
            assert (r.shape, r.dtype, r.stride()) == (f.shape, f.dtype, f.stride())


# What they compute


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("label_dtype", INTEGERS)
def test_statistics(dtype: torch.dtype, label_dtype: torch.dtype) -> None:
    z, y1, y2 = logits(dtype=dtype), labels(dtype=label_dtype), labels(dtype=torch.int64)
    actual = ops.row_stats(z, [y1, y2], [], ALL)
    assert actual.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(actual, expected_stats(z, y1, y2).to(actual.dtype))


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("label_dtype", INTEGERS)
def test_gradient_is_rounded_once(dtype: torch.dtype, label_dtype: torch.dtype) -> None:
    z, y = logits(dtype=dtype), labels(dtype=label_dtype)
    m, c = z.double().amax(1), coefficients("max,sumexp,pick,sum", torch.float64)
    one_hot = torch.nn.functional.one_hot(y.long(), V)
    expected = c[1, :, None] * (z.double() - m[:, None]).exp() + c[2, :, None] * one_hot + c[3, :, None]
    m, c = m.to(ops.stats_dtype(z)), c.to(ops.stats_dtype(z))
    actual = ops.row_grad(z, [y], [], m, c, "max,sumexp,pick,sum")
    assert actual.dtype == dtype
    half_ulp = torch.finfo(dtype).eps / 2
    computed = 4 * torch.finfo(c.dtype if dtype == torch.float64 else torch.float32).eps
    torch.testing.assert_close(actual.double(), expected, rtol=1.1 * half_ulp, atol=computed)


WEIGHTS: dict[str, Callable[[], Tensor]] = {
    "float32": lambda: torch.randn(N, V),
    "float64": lambda: torch.randn(N, V).double(),
    "bfloat16": lambda: torch.randn(N, V).bfloat16(),
    "float16": lambda: torch.randn(N, V).half(),
    "bool": lambda: torch.randn(N, V) > 0,
    "int64": lambda: torch.randint(-9, 9, (N, V)),
    "uint8": lambda: torch.randint(0, 256, (N, V)).byte(),
    "of columns": lambda: torch.randn(V),
    "of columns, bool": lambda: torch.randn(V) > 0,
    "of columns, strided": lambda: torch.randn(2 * V)[::2],
    "transposed": lambda: torch.randn(V, N).t(),
    "every other column": lambda: torch.randn(N, 2 * V)[:, ::2],
    "last rows": lambda: torch.randn(2 * N, V)[N:],
    "expanded over rows": lambda: torch.randn(1, V).expand(N, V),
    "expanded over columns": lambda: torch.randn(N, 1).expand(N, V),
    "one number": lambda: torch.randn(1, 1).expand(N, V),
}


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("kind", WEIGHTS)
def test_weighted_statistics(kind: str, dtype: torch.dtype) -> None:
    z, ys, qs = logits(dtype=dtype), [labels(), labels()], [WEIGHTS[kind](), torch.rand(V)]
    actual = ops.row_stats(z, ys, qs, EVERY)
    expected = kernel_reference.stats(z, ys, qs, EVERY)
    torch.testing.assert_close(actual, expected.to(actual.dtype))


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("kind", WEIGHTS)
def test_weighted_gradient_is_rounded_once(kind: str, dtype: torch.dtype) -> None:
    z, ys, qs = logits(dtype=dtype), [labels(), labels()], [WEIGHTS[kind](), torch.rand(V)]
    acc = ops.stats_dtype(z)
    m, c = z.to(acc).amax(1), coefficients(dtype=acc)
    actual = ops.row_grad(z, ys, qs, m, c, EVERY)
    assert actual.dtype == dtype
    expected = kernel_reference.grad(z, ys, qs, m, c, EVERY)
    largest_slope = qs[0].double().abs().clamp(min=1).amax(-1)
    computed = 2 * torch.finfo(acc).eps * (c.double().abs().sum(0) * largest_slope)[:, None]
    rounded = torch.finfo(dtype).eps * expected.abs().clamp(min=torch.finfo(dtype).smallest_normal) / 2
    assert ((actual.double() - expected).abs() <= computed + 1.1 * rounded).all()


@pytest.mark.parametrize("n_weights", [1, 2, 3])
@pytest.mark.parametrize(
    "names",
    [
        ("dot",),
        ("mass",),
        ("expdot",),
        ("dot", "expdot"),
        ("mass", "expdot"),
        (*kernel_reference.KEPT, *kernel_reference.SEEN),
    ],
)
def test_some_rows_of_several_weights(names: tuple[str, ...], n_weights: int) -> None:
    z, qs = logits(requires_grad=True), [torch.randn(V), torch.randn(N, V), torch.rand(V)][:n_weights]
    which = kernel_reference.rows(0, *(f"{name}:{j}" for j in range(n_weights) for name in names))
    actual, upstream = ops.row_stats(z, [], qs, which), coefficients(which)
    torch.testing.assert_close(actual, kernel_reference.stats(z, [], qs, which).float())
    (dz,) = torch.autograd.grad(actual, z, upstream)
    torch.testing.assert_close(dz, kernel_reference.grad(z, [], qs, actual[0], upstream, which).float())


def test_no_gradient_flows_to_weights() -> None:
    z, q = logits(requires_grad=True), torch.randn(V, requires_grad=True)
    ops.row_stats(z, [], [q], "max,sumexp,dot:0,mass:0,expdot:0").sum().backward()
    assert z.grad is not None
    assert q.grad is None


TIES = {
    "two": [0.0, 7.0, 1.0, 7.0],
    "all": [2.0, 2.0, 2.0, 2.0],
    "signed zeros": [-1.0, -0.0, 0.0, -1.0],
    "at the ends": [3.0, 0.0, 0.0, 3.0],
    "all -inf": [-torch.inf] * 4,
    "+inf": [0.0, torch.inf, torch.inf, 1.0],
    "NaN": [0.0, torch.nan, 5.0, torch.nan],
    "NaN after +inf": [torch.inf, 1.0, torch.nan, 0.0],
    "all NaN": [torch.nan] * 4,
    "NaN among -inf": [-torch.inf, -torch.inf, torch.nan, -torch.inf],
}


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("row", TIES.values(), ids=TIES)
def test_argmax_is_the_first_of_the_largest(row: list[float], dtype: torch.dtype) -> None:
    z = torch.tensor([row, [0.0, 1.0, 2.0, 3.0]], dtype=dtype)
    first = ops.row_stats(z, [], [], "max,sumexp,argmax")[2]
    assert first.tolist() == z.argmax(1).tolist() == kernel_reference.first_largest(z).tolist()


def test_16_bit_ties_are_ties() -> None:
    """What is equal in bfloat16 is equal, though it was not before it was rounded."""
    z = torch.tensor([[1.0, 256.0, 256.4]]).bfloat16()
    assert ops.row_stats(z, [], [], "max,sumexp,argmax")[2].item() == 1


@pytest.mark.parametrize("outside", [-torch.inf, -1e30, -3e38, -5000.0])
def test_a_logit_of_minus_infinity_is_the_limit(outside: float) -> None:
    """In what has exp it counts 0, whatever its weight is, and so it does in the gradients."""
    z, q = logits(), torch.randn(V)
    q[[0, 4, V - 1]] = 3.0
    z[:, [0, 4, V - 1]] = outside
    keep = [i for i in range(V) if i not in (0, 4, V - 1)]
    which = "max,sumexp,sumexpz,expdot:0,expzdot:0,keptexpdot:0"
    z.requires_grad_()
    actual = ops.row_stats(z, [], [q], which)
    torch.testing.assert_close(actual, ops.row_stats(z[:, keep], [], [q[keep]], which))
    (dz,) = torch.autograd.grad(actual.sum(), z)
    assert dz[:, [0, 4, V - 1]].eq(0).all()
    assert dz.isfinite().all()


@pytest.mark.parametrize("q", [torch.inf, -torch.inf, torch.nan, 0.0])
def test_a_column_at_minus_infinity_is_left_out(q: float) -> None:
    """Whatever its weight is; and a row of nothing but such columns has sums of 0."""
    z, weight = logits(), torch.randn(N, V)
    z[:, [0, 4, V - 1]], weight[:, [0, 4, V - 1]] = -torch.inf, q
    z[2] = -torch.inf
    keep = [i for i in range(V) if i not in (0, 4, V - 1)]
    which = kernel_reference.rows(0, *(f"{name}:0" for name in kernel_reference.KEPT))
    z.requires_grad_()
    actual = ops.row_stats(z, [], [weight], which)
    torch.testing.assert_close(actual, ops.row_stats(z[:, keep], [], [weight[:, keep]], which))
    assert actual[2:, 2].eq(0).all()
    (dz,) = torch.autograd.grad(actual.sum(), z)
    assert dz[:, [0, 4, V - 1]].eq(0).all()
    assert dz[2].eq(0).all()


@pytest.mark.parametrize("outside", [-torch.inf, 0.0, 100.0])
def test_a_column_whose_weight_is_nan_is_not_looked_at(outside: float) -> None:
    """Whatever its logit is, but for what that makes of the maximum."""
    z, weight = logits(), torch.randn(N, V)
    weight[:, [0, 4, V - 1]] = torch.nan
    which = "max,sumexp,seendot:0,seenmass:0"
    keep = [i for i in range(V) if i not in (0, 4, V - 1)]
    expected = ops.row_stats(z[:, keep], [], [weight[:, keep]], "max,sumexp,dot:0,mass:0")
    z[:, 4] = outside
    z.requires_grad_()
    actual = ops.row_stats(z, [], [weight], which)
    torch.testing.assert_close(actual[3], expected[3])
    torch.testing.assert_close(actual[2], expected[2] - (actual[0] - expected[0]) * expected[3])
    (dz,) = torch.autograd.grad(actual[2].sum(), z)
    torch.testing.assert_close(dz, weight.nan_to_num(nan=0.0))


@pytest.mark.parametrize("finite", [0, V // 2, V - 1])
def test_one_finite_column(finite: int) -> None:
    z, q = torch.full((N, V), -torch.inf), torch.randn(N, V)
    z[:, finite] = torch.randn(N)
    which = "max,sumexp,sumexpz,argmax,mass:0,expdot:0"
    actual = ops.row_stats(z, [], [q], which)
    ones, column = torch.ones(N), torch.full((N,), float(finite))
    expected = torch.stack([z[:, finite], ones, 0 * ones, column, q.sum(1), q[:, finite]])
    torch.testing.assert_close(actual, expected)


def test_row_of_minus_infinity() -> None:
    z, q = logits(), torch.rand(N, V)
    z[2] = -torch.inf
    actual = ops.row_stats(z, [], [q], "max,sumexp,sum,sumexpz,argmax,dot:0,mass:0,expdot:0")[:, 2]
    assert actual.tolist() == [-torch.inf, 0, -torch.inf, 0, 0, -torch.inf, q[2].sum().item(), 0]


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("column", [0, 5, V - 1])
def test_not_finite_in_every_row(value: float, column: int) -> None:
    """All sums of the row are NaN but those of the weights alone; no other row knows of it."""
    z, ys, qs = logits(), [labels(), labels()], weights()
    z[2, column] = value
    actual, expected = ops.row_stats(z, ys, qs, EVERY), kernel_reference.stats(z, ys, qs, EVERY).float()
    torch.testing.assert_close(actual, expected, equal_nan=True)
    sums = [k for k, row in enumerate(EVERY.split(",")) if row.startswith(("sum", "dot", "expdot"))]
    assert actual[sums, 2].isnan().all()
    assert actual[EVERY.split(",").index("argmax"), 2] == column


@pytest.mark.parametrize("outside", [-1, -100, V, V + 5, 2**31 - 1, -(2**31)])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_a_label_outside_belongs_to_no_column(outside: int, dtype: torch.dtype) -> None:
    z, y = logits(requires_grad=True), labels(dtype=dtype)
    y[2] = outside
    picked = ops.row_stats(z, [y], [], "max,sumexp,pick")[2]
    assert picked[2] == 0
    (dz,) = torch.autograd.grad(picked.sum(), z)
    assert dz[2].eq(0).all()
    assert dz.sum() == N - 1


def test_255_is_a_label_like_any_other() -> None:
    """uint8 does not wrap round."""
    z = logits(2, 300)
    y = torch.tensor([255, 7], dtype=torch.uint8)
    assert ops.row_stats(z, [y], [], "max,sumexp,pick")[2].tolist() == [z[0, 255], z[1, 7]]
    assert ops.row_stats(z[:, :100], [y], [], "max,sumexp,pick")[2].tolist() == [0, z[1, 7]]


@pytest.mark.parametrize(("n", "v"), [(0, 5), (3, 0), (0, 0), (1, 1), (3, 1)])
def test_no_rows_and_no_columns(n: int, v: int) -> None:
    z = torch.randn(n, v, requires_grad=True)
    stats = ops.row_stats(z, [torch.zeros(n, dtype=torch.int64)], [], "max,sumexp,pick,sum")
    assert stats.shape == (4, n)
    if v == 0:
        identity = torch.tensor([-torch.inf, 0, 0, 0])
        assert torch.equal(stats, identity[:, None].expand(4, n))
    (dz,) = torch.autograd.grad(stats.sum(), z)
    assert dz.shape == z.shape


@pytest.mark.parametrize(("n", "v"), [(0, 5), (3, 0), (0, 0), (1, 1), (3, 1), (1, 5)])
def test_every_statistic_of_no_rows_and_no_columns(n: int, v: int) -> None:
    z, ys = torch.randn(n, v, requires_grad=True), [torch.zeros(n, dtype=torch.int64)] * 2
    stats = ops.row_stats(z, ys, [torch.randn(v), torch.randn(n, v)], EVERY)
    assert stats.shape == (13, n)
    if v == 0:
        assert stats[0].eq(-torch.inf).all()
        assert stats[1:].eq(0).all()
    (dz,) = torch.autograd.grad(stats.sum(), z)
    assert dz.shape == z.shape
    assert dz.isfinite().all()


@pytest.mark.parametrize("value", [-torch.inf, torch.inf, torch.nan])
@pytest.mark.parametrize("columns", [slice(0, 1), slice(V - 1, V), slice(1, V), slice(0, V)])
def test_not_finite(value: float, columns: slice) -> None:
    """m + log d is the logsumexp, NaN where a row holds NaN; a row of -inf has d = 0."""
    z = logits()
    z[2, columns] = value
    m, d = ops.row_stats(z, [], [], "max,sumexp")
    expected = z.logsumexp(1)
    expected[z.isposinf().any(1)] = torch.nan
    torch.testing.assert_close(m + d.log(), expected, equal_nan=True)
    if value == -torch.inf and columns == slice(0, V):
        assert d[2] == 0


# As calculus sees them


def lse(stats: Tensor) -> Tensor:
    return stats[0] + stats[1].log()


M, D, PICK1, PICK2, SUM, T, ARGMAX, DOT, MASS, EXPDOT, DOT2, MASS2, EXPDOT2 = range(13)
INVARIANT: dict[str, Callable[[Tensor], Tensor]] = {
    "lse": lse,
    "pick 1": lambda s: s[PICK1],
    "pick 2": lambda s: s[PICK2],
    "sum": lambda s: V * s[M].detach() + s[SUM],
    "loss": lambda s: s[D].log() + (s[M] - s[PICK1]),
    "mixture": lambda s: lse(s).square() * s[PICK2] + (V * s[M] + s[SUM]).sin() - s[PICK1] * s[PICK2],
    "mean_p": lambda s: s[M] + s[T] / s[D],
    "entropy": lambda s: s[D].log() - s[T] / s[D],
    "dot": lambda s: s[MASS] * s[M].detach() + s[DOT],
    "soft targets": lambda s: s[MASS2] * s[D].log() - s[DOT2],
    "expected q": lambda s: s[EXPDOT] / s[D],
    "all": lambda s: (
        (s[EXPDOT] / s[D]).sin() * (s[EXPDOT2] / s[D]).log() * (s[D].log() - s[T] / s[D])
        + (s[MASS] * s[D].log() - s[DOT]).square() * (s[DOT2] - s[MASS2] * s[SUM] / V)
        + s[ARGMAX].detach() * lse(s)
    ),
}


@pytest.mark.parametrize("of", INVARIANT.values(), ids=INVARIANT)
def test_gradcheck(of: Callable[[Tensor], Tensor]) -> None:
    ys = [torch.tensor([0, V - 1, 3, 3, -100, V]), labels()]
    qs = [torch.randn(V).double(), torch.rand(N, V).double()]
    z = logits(dtype=torch.float64, requires_grad=True)
    assert gradcheck(lambda z: of(ops.row_stats(z, ys, qs, EVERY)), z)


@pytest.mark.parametrize("row", [M, ARGMAX, MASS, MASS2])
def test_coefficients_that_are_not_read(row: int) -> None:
    z, ys, qs, c = logits(), [labels(), labels()], weights(), coefficients()
    expected = ops.row_grad(z, ys, qs, z.amax(1), c, EVERY)
    c[row] = torch.nan
    assert torch.equal(ops.row_grad(z, ys, qs, z.amax(1), c, EVERY), expected)


def test_max_argmax_and_mass_have_no_gradient() -> None:
    z = logits(requires_grad=True)
    stats = ops.row_stats(z, [labels(), labels()], weights(), EVERY)
    (dz,) = torch.autograd.grad(stats[[M, ARGMAX, MASS, MASS2]].sum(), z)
    assert dz.eq(0).all()


def test_labels_of_one_row_may_agree() -> None:
    """Two label tensors with the same label: their gradients add."""
    z, y = logits(requires_grad=True), labels()
    stats = ops.row_stats(z, [y, y], [], "max,sumexp,pick,pick")
    (dz,) = torch.autograd.grad((2 * stats[2] + 3 * stats[3]).sum(), z)
    assert torch.equal(dz, 5.0 * torch.nn.functional.one_hot(y, V))


def test_a_second_derivative_is_refused() -> None:
    """Never a wrong number: the gradient of a gradient penalty would lack the terms through z."""
    z = logits(dtype=torch.float64, requires_grad=True)
    (dz,) = torch.autograd.grad(lse(ops.row_stats(z, [], [], "max,sumexp")).sum(), z, create_graph=True)
    with pytest.raises(RuntimeError, match=r"has no second derivative|does not require grad"):
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
    ys, qs, c = [labels(), labels()], weights(), coefficients()
    stats = ops.row_stats(z, ys, qs, EVERY)
    torch.testing.assert_close(stats, ops.row_stats(z.contiguous(), ys, qs, EVERY))
    dz = ops.row_grad(z, ys, qs, stats[0], c, EVERY)
    assert dz.is_contiguous()
    assert torch.equal(dz, ops.row_grad(z.contiguous(), ys, qs, stats[0], c, EVERY))


@pytest.mark.parametrize("layout", ["expanded over rows", "expanded over statistics", "transposed", "sliced"])
def test_coefficients_of_any_strides(layout: str) -> None:
    c = {
        "expanded over rows": torch.randn(K, 1).expand(K, N),
        "expanded over statistics": torch.randn(1, N).expand(K, N),
        "transposed": torch.randn(N, K).t(),
        "sliced": torch.randn(K, 2 * N)[:, ::2],
    }[layout]
    z, ys, qs = logits(), [labels(2 * N)[::2], labels()], weights()
    m = torch.stack([z.amax(1)] * 2, 1)[:, 0]
    expected = ops.row_grad(z, [y.contiguous() for y in ys], qs, m.contiguous(), c.contiguous(), EVERY)
    assert torch.equal(ops.row_grad(z, ys, qs, m, c, EVERY), expected)


@pytest.mark.parametrize("upstream", ["expanded", "transposed"])
def test_upstream_gradient_of_any_strides(upstream: str) -> None:
    z, ys, qs = logits(requires_grad=True), [labels(), labels()], weights()
    g = torch.randn(K, 1).expand(K, N) if upstream == "expanded" else torch.randn(N, K).t()
    stats = ops.row_stats(z, ys, qs, EVERY)
    (actual,) = torch.autograd.grad(stats, z, g, retain_graph=True)
    (expected,) = torch.autograd.grad(stats, z, g.contiguous())
    assert torch.equal(actual, expected)


# In graphs


def test_any_number_of_rows_in_one_graph() -> None:
    def f(z: Tensor, y: Tensor) -> Tensor:
        stats = ops.row_stats(z, [y], [], "max,sumexp,pick")
        return (lse(stats) - stats[2]).sum()

    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(f, backend=counter, dynamic=True, fullgraph=True)
    for n in (5, 2, 31, 64):
        z, y = logits(n, V, requires_grad=True), labels(n)
        actual, expected = compiled(z, y), torch.nn.functional.cross_entropy(z, y, reduction="sum")
        torch.testing.assert_close(actual, expected)
        torch.testing.assert_close(*(torch.autograd.grad(loss, z)[0] for loss in (actual, expected)))
    assert counter.frame_count == 1


def test_every_statistic_in_one_graph() -> None:
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(
        kernel_reference.loss_of_every_row, backend=counter, dynamic=True, fullgraph=True
    )
    cost = torch.rand(V)
    for n in (5, 2, 31):
        z, y, weight, q = logits(n, V, requires_grad=True), labels(n), torch.rand(n), torch.rand(n, V)
        actual = compiled(z, y, weight, q, cost)
        expected = kernel_reference.loss_of_every_row_reference(z, y, weight, q, cost)
        torch.testing.assert_close(actual, expected)
        torch.testing.assert_close(*(torch.autograd.grad(loss, z)[0] for loss in (actual, expected)))
    assert counter.frame_count == 1


def test_a_gradient_carries_the_site_of_its_statistics() -> None:
    def step(z: Tensor, y: Tensor) -> Tensor:
        stats = ops.row_stats(z, [y], [], "max,sumexp,pick", site=7)
        return torch.autograd.grad(stats.sum(), z)[0]

    graph = make_fx(step)(logits().requires_grad_(), labels()).graph
    sites = {n.target: n.kwargs for n in graph.nodes if n.target in (ops.ROW_STATS, ops.ROW_GRAD)}
    assert sites == {ops.ROW_STATS: {"site": 7}, ops.ROW_GRAD: {"site": 7}}


@pytest.mark.parametrize("compiled", [False, True])
def test_top_has_the_gradient_of_max(compiled: bool) -> None:
    """That of torch.max(dim): of the first of equals alone, beside the gradients of other rows."""
    z, y = logits(requires_grad=True), labels()
    with torch.no_grad():
        z[0, 2] = z[0, 5] = z[0].max() + 1
        z[1, 3] = -torch.inf

    def confidence(z: Tensor, y: Tensor) -> Tensor:
        m, d, picked, _, top = ops.row_stats(z, [y], [], "max,sumexp,pick,argmax,top").unbind(0)
        return ((top - m).exp() / d + (picked - m)).square()

    def plain(z: Tensor, y: Tensor) -> Tensor:
        picked = z.gather(1, y[:, None])[:, 0]
        return (z.softmax(1).max(1).values + (picked - z.detach().max(1).values)).square()

    f = torch.compile(confidence, backend="aot_eager") if compiled else confidence
    actual, expected = f(z, y), plain(z.double(), y)
    # The statistics hold the maximum constant; so does `plain` where it is not that of the softmax.
    torch.testing.assert_close(actual, expected.float())
    dz, wanted = (torch.autograd.grad(loss.sum(), z)[0] for loss in (actual, expected))
    torch.testing.assert_close(dz, wanted)
