"""Golden joint graphs of each strategy. EXPECTTEST_ACCEPT=1 accepts new ones; read the diff."""

import re
from collections.abc import Callable
from unittest import mock

import torch
import torch.nn.functional as F
from expecttest import TestCase
from harness import compile_without_codegen
from head_cases import counts
from test_golden import show
from torch import Tensor

from inductor_ce.api import passes
from inductor_ce.ops import row_program

N, V, D = 6, 8, 4


_PRODUCT = re.compile(
    r"(?P<name>\w+) = auto_functionalized_v2\(.*?product_into.*?, "
    r"a=(?P<a>\w+), b=(?P<b>\w+), start=(?P<start>\w+), accumulate=(?P<accumulate>\w+), "
    r".*_all_bases=\[(?P<out>\w+)\]\)"
)


def _with_program_below(call: re.Match[str]) -> str:
    return "\n    ".join([f"{call[1]}, program", *row_program.decode(call[2]).lines])


def short(graph: str) -> str:
    """With products as `product = product_into(out, a, b, ...)`, and what follows them renamed alike.

    What a divergence is, as text, is left out, and the program of a row follows in lines as Triton has it.
    """
    graph = re.sub(r"(row_stats_grad\(.*), '(\[\d+, \d+, .*\])'", _with_program_below, graph)
    graph = re.sub(r"(divergence.*), '\[\[.*\]\]'\)", r"\1, ...)", graph)
    products = r"\g<name> = product_into(\g<out>, \g<a>, \g<b>, \g<start>, \g<accumulate>)"
    return re.sub(r"auto_functionalized_v2(\d*)", r"product\1", _PRODUCT.sub(products, graph))


def joint(
    f: Callable[..., Tensor],
    strategy: str,
    *args: Tensor,
    wanted: str = "",
    budget: float = 0.5,
    sites: int = 1,
) -> str:
    """The joint graph of f after its heads were dealt with, in two pieces."""
    shown: list[str] = []

    def fuse_and_show(graph: torch.fx.Graph, *others: object) -> object:
        planned = fuse_heads(graph, *others)
        graph.lint()
        shown.append(short(show(graph)))
        return planned

    fuse_heads = passes.fuse_heads
    compiled, _ = compile_without_codegen(f, strategy=strategy, memory_budget=budget)
    with mock.patch.object(passes, "fuse_heads", fuse_and_show):
        compiled(*args)
    assert counts() == {wanted or strategy: sites}
    (only,) = shown
    return only


def head(frozen: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    hidden = torch.randn(N, D, requires_grad=not frozen)
    return hidden, torch.randn(V, D, requires_grad=not frozen), torch.arange(N)


def two_passes(hidden: Tensor, weight: Tensor, y: Tensor) -> Tensor:
    p, q = ((h @ weight.t()).log_softmax(-1) for h in (hidden, hidden.flip(1)))
    return ((p.exp() - q.exp()) * (p - q)).sum()


def loss(hidden: Tensor, weight: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(hidden @ weight.t(), y)


def of_all_rows(hidden: Tensor, weight: Tensor, y: Tensor) -> Tensor:
    """No label is left out."""
    z = hidden @ weight.t()
    return (z.logsumexp(-1) - z.gather(-1, y[:, None]).squeeze(-1)).mean()


def per_token(hidden: Tensor, weight: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(hidden @ weight.t(), y, reduction="none")


class Golden(TestCase):
    maxDiff = None

    def test_materialise(self):
        self.assertExpectedInline(
            joint(loss, "materialise", *head()),
            """\
primals_1 = <placeholder>
primals_2 = <placeholder>
primals_3 = <placeholder>
tangents_1 = <placeholder>
permute = permute(primals_1, [1, 0])
mm = mm(primals_2, permute)
row_stats = row_stats(mm, [primals_3], [], 'max,sumexp,pick')
select = select.int(row_stats, 0, 0)
unbind = unbind.int(row_stats)
getitem = unbind[0]
getitem2 = unbind[1]
getitem3 = unbind[2]
log = log(getitem2)
sub = sub.Tensor(getitem3, getitem)
sub2 = sub.Tensor(log, sub)
ge = ge.Scalar(primals_3, 0)
lt = lt.Scalar(primals_3, 8)
logical_and = logical_and(ge, lt)
eq = eq.Scalar(primals_3, -100)
logical_or = logical_or(logical_and, eq)
scalar_tensor = scalar_tensor(nan, dtype=float32, layout=torch.strided, device=device(type='cpu'))
scalar_tensor2 = scalar_tensor(1.0, dtype=float32, layout=torch.strided, device=device(type='cpu'))
where = where.self(logical_or, scalar_tensor2, scalar_tensor)
mul = mul.Tensor(sub2, where)
ne = ne.Scalar(primals_3, -100)
scalar_tensor3 = scalar_tensor(0.0, dtype=float32, layout=torch.strided, device=device(type='cpu'))
where2 = where.self(ne, mul, scalar_tensor3)
sum = sum(where2)
sum2 = sum(ne)
div = div.Tensor(sum, sum2)
div2 = div.Tensor(tangents_1, sum2)
expand = expand(div2, [6])
scalar_tensor4 = scalar_tensor(0, dtype=float32, layout=torch.strided, device=device(type='cpu'))
where3 = where.self(ne, expand, scalar_tensor4)
mul2 = mul.Tensor(where3, where)
neg = neg(mul2)
neg2 = neg(neg)
div3 = div.Tensor(mul2, getitem2)
cat = cat([neg2, div3, neg])
view = view(cat, [3, 6])
row_grad = row_grad(mm, [primals_3], [], select, view, 'max,sumexp,pick')
permute2 = permute(row_grad, [1, 0])
mm2 = mm(permute2, primals_2)
permute3 = permute(mm2, [1, 0])
permute4 = permute(permute, [1, 0])
mm3 = mm(row_grad, permute4)
permute5 = permute(permute3, [1, 0])
return [div, permute5, mm3, None]""",
        )

    def test_token_chunks(self):
        self.assertExpectedInline(
            joint(of_all_rows, "token_chunks", *head()),
            """\
primals_1 = <placeholder>
primals_2 = <placeholder>
primals_3 = <placeholder>
tangents_1 = <placeholder>
permute = permute(primals_1, [1, 0])
unsqueeze = unsqueeze(primals_3, 1)
view = view(unsqueeze, [-1])
slice = slice.Tensor(primals_2, 0, 0, 3)
logits = logits(slice, permute, None, [])
slice2 = slice.Tensor(view, 0, 0, 3)
full = full([], 1.0, dtype=float32, device=device(type='cpu'), pin_memory=False)
expand = expand(full, [6])
div = div.Scalar(expand, 6)
ge = ge.Scalar(view, 0)
lt = lt.Scalar(view, 8)
logical_and = logical_and(ge, lt)
scalar_tensor = scalar_tensor(1.0, dtype=float32, layout=torch.strided, device=device(type='cpu'))
scalar_tensor2 = scalar_tensor(nan, dtype=float32, layout=torch.strided, device=device(type='cpu'))
where = where.self(logical_and, scalar_tensor, scalar_tensor2)
mul = mul.Tensor(div, where)
reshape = reshape(mul, [-1])
slice3 = slice.Tensor(reshape, 0, 0, 3)
row_stats_grad = row_stats_grad(logits, [slice2], [], 'max,sumexp,pick', [slice3], program
    v_4 = s_0 == float("inf")
    v_5 = tl.where(v_4, 1.0, s_1)
    v_6 = g_0 / v_5
    v_7 = tl.where(v_4, 0.0, v_6)
    v_8 = -g_0
    v_9 = -v_8
    c_0 = v_9
    c_1 = v_7
    c_2 = v_8)
getitem = row_stats_grad[0]
slice4 = slice.Tensor(primals_2, 0, 3, 6)
getitem2 = row_stats_grad[1]
permute2 = permute(getitem2, [1, 0])
slice5 = slice.Tensor(primals_2, 0, 0, 3)
empty = empty.memory_format([8, 4], dtype=float32, device=device(type='cpu'), pin_memory=False)
product = product_into(empty, permute2, slice5, 0, False)
getitem3 = product[1]
permute3 = permute(permute, [1, 0])
empty2 = empty.memory_format([6, 4], dtype=float32, device=device(type='cpu'), pin_memory=False)
product2 = product_into(empty2, getitem2, permute3, 0, False)
getitem4 = product2[1]
logits2 = logits(slice4, permute, None, [getitem3, getitem4])
slice6 = slice.Tensor(view, 0, 3, 6)
slice7 = slice.Tensor(reshape, 0, 3, 6)
row_stats_grad2 = row_stats_grad(logits2, [slice6], [], 'max,sumexp,pick', [slice7], program
    v_4 = s_0 == float("inf")
    v_5 = tl.where(v_4, 1.0, s_1)
    v_6 = g_0 / v_5
    v_7 = tl.where(v_4, 0.0, v_6)
    v_8 = -g_0
    v_9 = -v_8
    c_0 = v_9
    c_1 = v_7
    c_2 = v_8)
getitem5 = row_stats_grad2[0]
cat = cat([getitem, getitem5], 1)
getitem6 = row_stats_grad2[1]
permute4 = permute(getitem6, [1, 0])
slice8 = slice.Tensor(primals_2, 0, 3, 6)
product3 = product_into(getitem3, permute4, slice8, 0, True)
getitem7 = product3[1]
product4 = product_into(getitem4, getitem6, permute3, 3, False)
getitem8 = product4[1]
once_made = once_made(cat, float32, [getitem7, getitem8])
unbind = unbind.int(once_made)
getitem9 = unbind[0]
getitem10 = unbind[1]
getitem11 = unbind[2]
eq = eq.Scalar(getitem9, inf)
scalar_tensor3 = scalar_tensor(1.0, dtype=float32, layout=torch.strided, device=device(type='cpu'))
where2 = where.self(eq, scalar_tensor3, getitem10)
log = log(where2)
sub = sub.Tensor(getitem11, getitem9)
sub2 = sub.Tensor(log, sub)
mul2 = mul.Tensor(sub2, where)
mean = mean(mul2)
times = times(getitem7, tangents_1)
permute5 = permute(times, [1, 0])
permute6 = permute(permute5, [1, 0])
times2 = times(getitem8, tangents_1)
return [mean, permute6, times2, None]""",
        )

    def test_vocab_slabs(self):
        self.assertExpectedInline(
            joint(per_token, "vocab_slabs", *head()),
            """\
primals_1 = <placeholder>
primals_2 = <placeholder>
primals_3 = <placeholder>
tangents_1 = <placeholder>
permute = permute(primals_1, [1, 0])
slice = slice.Tensor(permute, 1, 0, 4)
logits = logits(primals_2, slice, None, [])
convert_element_type = convert_element_type(primals_3, int64)
sub = sub.Tensor(convert_element_type, 0)
row_stats = row_stats(logits, [sub], [], 'max,sumexp,pick')
slice2 = slice.Tensor(permute, 1, 4, 8)
logits2 = logits(primals_2, slice2, None, [row_stats])
convert_element_type2 = convert_element_type(primals_3, int64)
sub2 = sub.Tensor(convert_element_type2, 4)
row_stats2 = row_stats(logits2, [sub2], [], 'max,sumexp,pick')
cat = cat([row_stats, row_stats2])
view = view(cat, [2, 3, 6])
unbind = unbind.int(view, 1)
getitem = unbind[0]
amax = amax(getitem, [0])
select = select.int(view, 1, 1)
eq = eq.Scalar(getitem, -inf)
scalar_tensor = scalar_tensor(0.0, dtype=float32, layout=torch.strided, device=device(type='cpu'))
sub3 = sub.Tensor(getitem, amax)
where = where.self(eq, scalar_tensor, sub3)
exp = exp(where)
mul = mul.Tensor(select, exp)
sum = sum.dim_IntList(mul, [0])
select2 = select.int(view, 1, 2)
sum2 = sum.dim_IntList(select2, [0])
cat2 = cat([amax, sum, sum2])
view2 = view(cat2, [3, 6])
select3 = select.int(view2, 0, 0)
unbind2 = unbind.int(view2)
getitem2 = unbind2[0]
getitem3 = unbind2[1]
getitem4 = unbind2[2]
log = log(getitem3)
sub4 = sub.Tensor(getitem4, getitem2)
sub5 = sub.Tensor(log, sub4)
ge = ge.Scalar(primals_3, 0)
lt = lt.Scalar(primals_3, 8)
logical_and = logical_and(ge, lt)
eq2 = eq.Scalar(primals_3, -100)
logical_or = logical_or(logical_and, eq2)
scalar_tensor2 = scalar_tensor(nan, dtype=float32, layout=torch.strided, device=device(type='cpu'))
scalar_tensor3 = scalar_tensor(1.0, dtype=float32, layout=torch.strided, device=device(type='cpu'))
where2 = where.self(logical_or, scalar_tensor3, scalar_tensor2)
mul2 = mul.Tensor(sub5, where2)
ne = ne.Scalar(primals_3, -100)
scalar_tensor4 = scalar_tensor(0.0, dtype=float32, layout=torch.strided, device=device(type='cpu'))
where3 = where.self(ne, mul2, scalar_tensor4)
scalar_tensor5 = scalar_tensor(0, dtype=float32, layout=torch.strided, device=device(type='cpu'))
where4 = where.self(ne, tangents_1, scalar_tensor5)
mul3 = mul.Tensor(where4, where2)
neg = neg(mul3)
neg2 = neg(neg)
div = div.Tensor(mul3, getitem3)
cat3 = cat([neg2, div, neg])
view3 = view(cat3, [3, 6])
slice3 = slice.Tensor(permute, 1, 4, 8)
slice4 = slice.Tensor(permute, 1, 0, 4)
logits3 = logits(primals_2, slice4, None, [view3])
convert_element_type3 = convert_element_type(primals_3, int64)
sub6 = sub.Tensor(convert_element_type3, 0)
row_grad = row_grad(logits3, [sub6], [], select3, view3, 'max,sumexp,pick')
permute2 = permute(row_grad, [1, 0])
empty = empty.memory_format([8, 4], dtype=float32, device=device(type='cpu'), pin_memory=False)
product = product_into(empty, permute2, primals_2, 0, False)
getitem5 = product[1]
permute3 = permute(permute, [1, 0])
slice5 = slice.Tensor(permute3, 0, 0, 4)
empty2 = empty.memory_format([6, 4], dtype=float32, device=device(type='cpu'), pin_memory=False)
product2 = product_into(empty2, row_grad, slice5, 0, False)
getitem6 = product2[1]
logits4 = logits(primals_2, slice3, None, [getitem5, getitem6])
convert_element_type4 = convert_element_type(primals_3, int64)
sub7 = sub.Tensor(convert_element_type4, 4)
row_grad2 = row_grad(logits4, [sub7], [], select3, view3, 'max,sumexp,pick')
permute4 = permute(row_grad2, [1, 0])
product3 = product_into(getitem5, permute4, primals_2, 4, False)
getitem7 = product3[1]
permute5 = permute(getitem7, [1, 0])
permute6 = permute(permute5, [1, 0])
slice6 = slice.Tensor(permute3, 0, 4, 8)
product4 = product_into(getitem6, row_grad2, slice6, 0, True)
getitem8 = product4[1]
return [where3, permute6, getitem8, None]""",
        )

    def test_forward_only(self):
        self.assertExpectedInline(
            joint(of_all_rows, "token_chunks", *head(frozen=True), wanted="forward_only"),
            """\
arg0_1 = <placeholder>
arg1_1 = <placeholder>
arg2_1 = <placeholder>
permute = permute(arg0_1, [1, 0])
unsqueeze = unsqueeze(arg2_1, 1)
view = view(unsqueeze, [-1])
slice = slice.Tensor(arg1_1, 0, 0, 3)
logits = logits(slice, permute, None, [])
slice2 = slice.Tensor(view, 0, 0, 3)
row_stats = row_stats(logits, [slice2], [], 'max,sumexp,pick')
slice3 = slice.Tensor(arg1_1, 0, 3, 6)
logits2 = logits(slice3, permute, None, [row_stats])
slice4 = slice.Tensor(view, 0, 3, 6)
row_stats2 = row_stats(logits2, [slice4], [], 'max,sumexp,pick')
cat = cat([row_stats, row_stats2], 1)
unbind = unbind.int(cat)
getitem = unbind[0]
getitem2 = unbind[1]
getitem3 = unbind[2]
eq = eq.Scalar(getitem, inf)
scalar_tensor = scalar_tensor(1.0, dtype=float32, layout=torch.strided, device=device(type='cpu'))
where = where.self(eq, scalar_tensor, getitem2)
log = log(where)
sub = sub.Tensor(getitem3, getitem)
sub2 = sub.Tensor(log, sub)
ge = ge.Scalar(view, 0)
lt = lt.Scalar(view, 8)
logical_and = logical_and(ge, lt)
scalar_tensor2 = scalar_tensor(nan, dtype=float32, layout=torch.strided, device=device(type='cpu'))
scalar_tensor3 = scalar_tensor(1.0, dtype=float32, layout=torch.strided, device=device(type='cpu'))
where2 = where.self(logical_and, scalar_tensor3, scalar_tensor2)
mul = mul.Tensor(sub2, where2)
mean = mean(mul)
return (mean)""",
        )

    def test_sides_of_a_divergence(self):
        """Of one weight, whose gradient is one sum."""
        self.assertExpectedInline(
            joint(two_passes, "token_chunks", *head(), budget=2.0, sites=2),
            """\
primals_1 = <placeholder>
primals_2 = <placeholder>
tangents_1 = <placeholder>
rev = rev(primals_1, [1])
permute = permute(primals_2, [1, 0])
permute2 = permute(primals_2, [1, 0])
slice = slice.Tensor(primals_1, 0, 0, 3)
logits = logits(slice, permute, None, [])
row_stats = row_stats(logits, [], [], 'max,sumexp')
slice2 = slice.Tensor(primals_1, 0, 3, 6)
full = full([1], 0.0, dtype=float32, device=device(type='cpu'), pin_memory=False)
slice3 = slice.Tensor(rev, 0, 0, 3)
logits2 = logits(slice3, permute2, None, [])
constant_pad_nd = constant_pad_nd(row_stats, [0, 3], 0.0)
unbind = unbind.int(constant_pad_nd)
getitem = unbind[1]
isnan = isnan(getitem)
getitem2 = unbind[0]
ne = ne.Scalar(getitem2, inf)
logical_and = logical_and(isnan, ne)
scalar_tensor = scalar_tensor(nan, dtype=float32, layout=torch.strided, device=device(type='cpu'))
where = where.self(logical_and, scalar_tensor, getitem2)
alias = alias(where)
slice4 = slice.Tensor(alias, 0, 0, 3)
row_stats2 = row_stats(logits2, [], [], 'max,sumexp')
constant_pad_nd2 = constant_pad_nd(row_stats2, [0, 3], 0.0)
unbind2 = unbind.int(constant_pad_nd2)
getitem3 = unbind2[1]
isnan2 = isnan(getitem3)
getitem4 = unbind2[0]
ne2 = ne.Scalar(getitem4, inf)
logical_and2 = logical_and(isnan2, ne2)
scalar_tensor2 = scalar_tensor(nan, dtype=float32, layout=torch.strided, device=device(type='cpu'))
where2 = where.self(logical_and2, scalar_tensor2, getitem4)
alias2 = alias(where2)
slice5 = slice.Tensor(alias2, 0, 0, 3)
sub = sub.Tensor(getitem2, getitem2)
mul = mul.Tensor(sub, -1)
exp = exp(mul)
mul2 = mul.Tensor(getitem, exp)
alias3 = alias(mul2)
slice6 = slice.Tensor(alias3, 0, 0, 3)
sub2 = sub.Tensor(getitem4, getitem4)
mul3 = mul.Tensor(sub2, -1)
exp2 = exp(mul3)
mul4 = mul.Tensor(getitem3, exp2)
alias4 = alias(mul4)
slice7 = slice.Tensor(alias4, 0, 0, 3)
divergence = divergence([logits, logits2], [slice4, slice5], [slice6, slice7], ...)
full2 = full([], 1.0, dtype=float32, device=device(type='cpu'), pin_memory=False)
expand = expand(full2, [6, 1])
squeeze = squeeze.dim(expand, 1)
slice8 = slice.Tensor(squeeze, 0, 0, 3)
divergence_grad = divergence_grad([logits, logits2], [slice4, slice5], divergence, slice8, ...)
getitem5 = divergence_grad[1]
permute3 = permute(getitem5, [1, 0])
slice9 = slice.Tensor(rev, 0, 0, 3)
empty = empty.memory_format([8, 4], dtype=float32, device=device(type='cpu'), pin_memory=False)
product = product_into(empty, permute3, slice9, 0, False)
getitem6 = product[1]
permute4 = permute(permute2, [1, 0])
empty2 = empty.memory_format([6, 4], dtype=float32, device=device(type='cpu'), pin_memory=False)
product2 = product_into(empty2, getitem5, permute4, 0, False)
getitem7 = product2[1]
getitem8 = divergence_grad[0]
permute5 = permute(getitem8, [1, 0])
slice10 = slice.Tensor(primals_1, 0, 0, 3)
product3 = product_into(getitem6, permute5, slice10, 0, True)
getitem9 = product3[1]
permute6 = permute(permute, [1, 0])
empty3 = empty.memory_format([6, 4], dtype=float32, device=device(type='cpu'), pin_memory=False)
product4 = product_into(empty3, getitem8, permute6, 0, False)
getitem10 = product4[1]
once_made = once_made(full, float32, [getitem6, getitem7, getitem9, getitem10])
logits3 = logits(slice2, permute, None, [once_made])
row_stats3 = row_stats(logits3, [], [], 'max,sumexp')
slice11 = slice.Tensor(rev, 0, 3, 6)
logits4 = logits(slice11, permute2, None, [once_made])
constant_pad_nd3 = constant_pad_nd(row_stats3, [3, 0], 0.0)
unbind3 = unbind.int(constant_pad_nd3)
getitem11 = unbind3[1]
isnan3 = isnan(getitem11)
getitem12 = unbind3[0]
ne3 = ne.Scalar(getitem12, inf)
logical_and3 = logical_and(isnan3, ne3)
where3 = where.self(logical_and3, scalar_tensor, getitem12)
alias5 = alias(where3)
slice12 = slice.Tensor(alias5, 0, 3, 6)
row_stats4 = row_stats(logits4, [], [], 'max,sumexp')
constant_pad_nd4 = constant_pad_nd(row_stats4, [3, 0], 0.0)
unbind4 = unbind.int(constant_pad_nd4)
getitem13 = unbind4[1]
isnan4 = isnan(getitem13)
getitem14 = unbind4[0]
ne4 = ne.Scalar(getitem14, inf)
logical_and4 = logical_and(isnan4, ne4)
where4 = where.self(logical_and4, scalar_tensor2, getitem14)
alias6 = alias(where4)
slice13 = slice.Tensor(alias6, 0, 3, 6)
sub3 = sub.Tensor(getitem12, getitem12)
mul5 = mul.Tensor(sub3, -1)
exp3 = exp(mul5)
mul6 = mul.Tensor(getitem11, exp3)
alias7 = alias(mul6)
slice14 = slice.Tensor(alias7, 0, 3, 6)
sub4 = sub.Tensor(getitem14, getitem14)
mul7 = mul.Tensor(sub4, -1)
exp4 = exp(mul7)
mul8 = mul.Tensor(getitem13, exp4)
alias8 = alias(mul8)
slice15 = slice.Tensor(alias8, 0, 3, 6)
divergence2 = divergence([logits3, logits4], [slice12, slice13], [slice14, slice15], ...)
expand2 = expand(full2, [6, 1])
squeeze2 = squeeze.dim(expand2, 1)
slice16 = slice.Tensor(squeeze2, 0, 3, 6)
divergence_grad2 = divergence_grad([logits3, logits4], [slice12, slice13], divergence2, slice16, ...)
getitem15 = divergence_grad2[1]
permute7 = permute(getitem15, [1, 0])
slice17 = slice.Tensor(rev, 0, 3, 6)
product5 = product_into(getitem9, permute7, slice17, 0, True)
getitem16 = product5[1]
product6 = product_into(getitem7, getitem15, permute4, 3, False)
getitem17 = product6[1]
getitem18 = divergence_grad2[0]
permute8 = permute(getitem18, [1, 0])
slice18 = slice.Tensor(primals_1, 0, 3, 6)
product7 = product_into(getitem16, permute8, slice18, 0, True)
getitem19 = product7[1]
product8 = product_into(getitem10, getitem18, permute6, 3, False)
getitem20 = product8[1]
cat = cat([divergence, divergence2], 1)
once_made2 = once_made(cat, float32, [getitem16, getitem17, getitem19, getitem20])
select = select.int(once_made2, 0, 0)
unsqueeze = unsqueeze(select, 1)
sum = sum(unsqueeze)
times = times(getitem19, tangents_1)
permute9 = permute(times, [1, 0])
permute10 = permute(permute9, [1, 0])
times2 = times(getitem17, tangents_1)
rev2 = rev(times2, [1])
times3 = times(getitem20, tangents_1)
add = add.Tensor(times3, rev2)
return [sum, add, permute10]""",
        )

    def test_rows_that_count(self):
        self.assertExpectedInline(
            joint(loss, "token_chunks", *head(frozen=True), wanted="forward_only"),
            """\
arg0_1 = <placeholder>
arg1_1 = <placeholder>
arg2_1 = <placeholder>
permute = permute(arg0_1, [1, 0])
ne = ne.Scalar(arg2_1, -100)
reshape = reshape(ne, [-1])
row_order = row_order(reshape)
getitem = row_order[0]
slice = slice.Tensor(getitem, 0, 0, 2)
index = index.Tensor(reshape, [getitem])
slice2 = slice.Tensor(index, 0, 0, 2)
getitem2 = row_order[2]
iota = iota(3, start=0, step=1, dtype=int32, device=device(type='cpu'), requires_grad=False)
mul = mul.Tensor(iota, 2)
sub = sub.Tensor(getitem2, mul)
add = add.Tensor(sub, 63)
bitwise_and = bitwise_and.Scalar(add, -64)
take_rows = take_rows(arg1_1, slice, slice2, [], left=bitwise_and, host=None, piece=0)
logits = logits(take_rows, permute, None, [], left=bitwise_and, host=None, piece=0)
index2 = index.Tensor(arg2_1, [getitem])
full = full([], -1, dtype=int64, device=device(type='cpu'), pin_memory=False)
where = where.self(index, index2, full)
slice3 = slice.Tensor(where, 0, 0, 2)
some_row_stats = some_row_stats(logits, [slice3], [], 'max,sumexp,pick', bitwise_and, 0)
slice4 = slice.Tensor(getitem, 0, 2, 4)
slice5 = slice.Tensor(index, 0, 2, 4)
take_rows2 = take_rows(arg1_1, slice4, slice5, [some_row_stats], left=bitwise_and, host=None, piece=1)
logits2 = logits(take_rows2, permute, None, [some_row_stats], left=bitwise_and, host=None, piece=1)
slice6 = slice.Tensor(where, 0, 2, 4)
some_row_stats2 = some_row_stats(logits2, [slice6], [], 'max,sumexp,pick', bitwise_and, 1)
slice7 = slice.Tensor(getitem, 0, 4, 6)
slice8 = slice.Tensor(index, 0, 4, 6)
take_rows3 = take_rows(arg1_1, slice7, slice8, [some_row_stats2], left=bitwise_and, host=None, piece=2)
logits3 = logits(take_rows3, permute, None, [some_row_stats2], left=bitwise_and, host=None, piece=2)
slice9 = slice.Tensor(where, 0, 4, 6)
some_row_stats3 = some_row_stats(logits3, [slice9], [], 'max,sumexp,pick', bitwise_and, 2)
cat = cat([some_row_stats, some_row_stats2, some_row_stats3], 1)
getitem3 = row_order[1]
index3 = index.Tensor(cat, [None, getitem3])
full2 = full([], 1.0, dtype=float32, device=device(type='cpu'), pin_memory=False)
where2 = where.self(reshape, index3, full2)
unbind = unbind.int(where2)
getitem4 = unbind[0]
getitem5 = unbind[1]
getitem6 = unbind[2]
log = log(getitem5)
sub2 = sub.Tensor(getitem6, getitem4)
sub3 = sub.Tensor(log, sub2)
ge = ge.Scalar(arg2_1, 0)
lt = lt.Scalar(arg2_1, 8)
logical_and = logical_and(ge, lt)
eq = eq.Scalar(arg2_1, -100)
logical_or = logical_or(logical_and, eq)
scalar_tensor = scalar_tensor(nan, dtype=float32, layout=torch.strided, device=device(type='cpu'))
scalar_tensor2 = scalar_tensor(1.0, dtype=float32, layout=torch.strided, device=device(type='cpu'))
where3 = where.self(logical_or, scalar_tensor2, scalar_tensor)
mul2 = mul.Tensor(sub3, where3)
scalar_tensor3 = scalar_tensor(0.0, dtype=float32, layout=torch.strided, device=device(type='cpu'))
where4 = where.self(ne, mul2, scalar_tensor3)
sum = sum(where4)
sum2 = sum(ne)
div = div.Tensor(sum, sum2)
return (div)""",
        )
