"""Golden graphs: what the rewrite makes of a loss. EXPECTTEST_ACCEPT=1 accepts new ones; read the diff."""

import operator
import re
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from expecttest import TestCase
from harness import compile_without_codegen
from torch._dispatch.python import enable_python_dispatcher
from torch.fx import Graph, GraphModule, Node

import inductor_ce
from inductor_ce.api.passes import fuse_losses

N, B, S, V, D = 10, 2, 5, 11, 4


def show(graph: Graph) -> str:
    """`name = target(arguments)` line by line: placeholders by their name, others by target and count."""
    names: dict[Node, str] = {}
    used: Counter[str] = Counter()
    lines = []
    for node in graph.nodes:
        if node.op == "output":
            lines.append(f"return {_show_argument(node.args[0], names)}")
            continue
        target = _target(node)
        name = re.sub(r"^l_|_$", "", node.name) if node.op == "placeholder" else target.split(".")[0]
        used[name] += 1
        names[node] = name if used[name] == 1 else f"{name}{used[name]}"
        lines.append(f"{names[node]} = {_show_call(node, target, names)}")
    return "\n".join(lines)


def _target(node: Node) -> str:
    target = node.target
    if isinstance(target, torch._ops.OpOverload):
        return target._schema.name.split("::")[1] + f".{target._overloadname}".removesuffix(".default")
    return getattr(target, "__name__", str(target))


def _show_call(node: Node, target: str, names: dict[Node, str]) -> str:
    args = [_show_argument(a, names) for a in node.args]
    args += [f"{k}={_show_argument(v, names)}" for k, v in node.kwargs.items() if k != "site"]
    if node.op in ("placeholder", "get_attr"):
        return f"<{node.op}>"
    if node.target is operator.getitem:
        return f"{args[0]}[{args[1]}]"
    return (
        f"{args[0]}.{target}({', '.join(args[1:])})"
        if node.op == "call_method"
        else f"{target}({', '.join(args)})"
    )


def _show_argument(arg: Any, names: dict[Node, str]) -> str:
    if isinstance(arg, Node):
        return names[arg]
    if isinstance(arg, (list, tuple)):
        inside = ", ".join(_show_argument(a, names) for a in arg)
        return f"({inside})" if isinstance(arg, tuple) else f"[{inside}]"
    if isinstance(arg, slice):
        return f"{_show_part(arg.start)}:{_show_part(arg.stop)}"
    return re.sub(r"^torch\.", "", str(arg)) if isinstance(arg, torch.dtype) else repr(arg)


def _show_part(part: Any) -> str:
    return "" if part is None else str(part)


def rewritten(f: Callable[..., Any], *args: Any) -> str:
    """The torch-level graph of f after the rewrite."""
    shown: list[str] = []

    def backend(gm: GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        with enable_python_dispatcher():  # as Inductor calls its passes
            assert fuse_losses(gm.graph, inductor_ce.Options(min_vocab=2)).sites
        gm.graph.lint()
        shown.append(show(gm.graph))
        return GraphModule(gm, gm.graph).forward

    last_place = torch.finfo(args[0].dtype).eps
    compiled = torch.compile(f, backend=backend, fullgraph=True)
    torch.testing.assert_close(compiled(*args), f(*args), rtol=max(last_place, 1.3e-6), atol=1e-5)
    return shown[0]


def final(f: Callable[..., Any], *args: Any) -> tuple[str, ...]:
    """The forward and the backward that Inductor would lower."""
    compiled, graphs = compile_without_codegen(f)
    compiled(*args).backward()
    return tuple(show(gm.graph) for gm in graphs.final)


class Golden(TestCase):
    maxDiff = None

    def test_cross_entropy(self):
        z, y = torch.randn(N, V), torch.arange(N)
        self.assertExpectedInline(
            rewritten(lambda z, y: F.cross_entropy(z, y), z, y),
            """\
z = <placeholder>
y = <placeholder>
row_stats = row_stats(z, [y], [], 'max,sumexp,pick')
unbind = unbind(row_stats, 0)
getitem = unbind[0]
getitem2 = unbind[1]
getitem3 = unbind[2]
log = log(getitem2)
sub = sub(getitem3, getitem)
sub2 = sub(log, sub)
ge = ge(y, 0)
lt = lt(y, 11)
logical_and = logical_and(ge, lt)
eq = eq(y, -100)
logical_or = logical_or(logical_and, eq)
where = where(logical_or, 1.0, nan)
mul = mul(sub2, where)
ne = ne(y, -100)
where2 = where(ne, mul, 0.0)
sum = sum(where2)
sum2 = sum(ne)
div = div(sum, sum2)
return (div)""",
        )

    def test_causal_shift_by_slices(self):
        def f(z, y):
            return F.cross_entropy(z[..., :-1, :].reshape(-1, V), y[..., 1:].reshape(-1))

        z, y = torch.randn(B, S, V), torch.arange(N).view(B, S)
        self.assertExpectedInline(
            rewritten(f, z, y),
            """\
z = <placeholder>
y = <placeholder>
getitem = y[(Ellipsis, 1:)]
reshape = getitem.reshape(-1)
reshape2 = reshape.reshape([2, 4])
pad = pad(reshape2, [0, 1, 0, 0], value=0)
reshape3 = pad.reshape(-1)
reshape4 = z.reshape(-1, 11)
row_stats = row_stats(reshape4, [reshape3], [], 'max,sumexp,pick')
unbind = unbind(row_stats, 0)
getitem2 = unbind[0]
getitem3 = unbind[1]
getitem4 = unbind[2]
log = log(getitem3)
sub = sub(getitem4, getitem2)
sub2 = sub(log, sub)
ge = ge(reshape3, 0)
lt = lt(reshape3, 11)
logical_and = logical_and(ge, lt)
eq = eq(reshape3, -100)
logical_or = logical_or(logical_and, eq)
where = where(logical_or, 1.0, nan)
mul = mul(sub2, where)
reshape5 = mul.reshape([2, 5])
getitem5 = reshape5[(:, :-1)]
reshape6 = getitem5.reshape([8])
ne = ne(reshape, -100)
where2 = where(ne, reshape6, 0.0)
sum = sum(where2)
sum2 = sum(ne)
div = div(sum, sum2)
return (div)""",
        )

    def test_smoothing_and_z_loss_on_the_class_axis(self):
        def f(z, y):
            loss = F.cross_entropy(z.transpose(1, 2), y, label_smoothing=0.1)
            return loss + 1e-4 * z.float().logsumexp(-1).pow(2).mean()

        z, y = torch.randn(B, S, V, dtype=torch.bfloat16), torch.arange(N).view(B, S)
        self.assertExpectedInline(
            rewritten(f, z, y),
            """\
z = <placeholder>
y = <placeholder>
reshape = y.reshape(-1)
reshape2 = z.reshape(-1, 11)
row_stats = row_stats(reshape2, [reshape], [], 'max,sumexp,pick,sum')
unbind = unbind(row_stats, 0)
getitem = unbind[0]
getitem2 = unbind[1]
getitem3 = unbind[2]
getitem4 = unbind[3]
log = log(getitem2)
sub = sub(getitem3, getitem)
mul = mul(sub, 0.9)
sub2 = sub(log, mul)
mul2 = mul(getitem4, 0.00909090909090909)
sub3 = sub(sub2, mul2)
ge = ge(reshape, 0)
lt = lt(reshape, 11)
logical_and = logical_and(ge, lt)
eq = eq(reshape, -100)
logical_or = logical_or(logical_and, eq)
where = where(logical_or, 1.0, nan)
mul3 = mul(sub3, where)
reshape3 = mul3.reshape([2, 5])
ne = ne(y, -100)
where2 = where(ne, reshape3, 0.0)
sum = sum(where2)
sum2 = sum(ne)
div = div(sum, sum2)
to = div.to(bfloat16)
eq2 = eq(getitem, inf)
where3 = where(eq2, 1.0, getitem2)
log2 = log(where3)
add = add(log2, getitem)
reshape4 = add.reshape([2, 5])
pow = reshape4.pow(2)
mean = pow.mean()
mul4 = mul(0.0001, mean)
add2 = add(to, mul4)
return (add2)""",
        )

    def test_log_softmax_and_gather(self):
        def f(z, y):
            return -z.log_softmax(-1).gather(-1, y.unsqueeze(-1)).squeeze(-1).mean()

        z, y = torch.randn(N, V), torch.arange(N)
        self.assertExpectedInline(
            rewritten(f, z, y),
            """\
z = <placeholder>
y = <placeholder>
unsqueeze = y.unsqueeze(-1)
reshape = unsqueeze.reshape(-1)
row_stats = row_stats(z, [reshape], [], 'max,sumexp,pick')
unbind = unbind(row_stats, 0)
getitem = unbind[0]
getitem2 = unbind[1]
getitem3 = unbind[2]
sub = sub(getitem3, getitem)
log = log(getitem2)
sub2 = sub(sub, log)
ge = ge(reshape, 0)
lt = lt(reshape, 11)
logical_and = logical_and(ge, lt)
where = where(logical_and, 1.0, nan)
mul = mul(sub2, where)
mean = mul.mean()
neg = neg(mean)
return (neg)""",
        )

    def test_soft_cap_of_sequences(self):
        """The reshape goes before the chain, so that the derivative can be an epilogue."""

        def f(z, y):
            z = 30 * torch.tanh(z.float() / 30)
            return F.cross_entropy(z.view(-1, V), y.view(-1))

        z, y = torch.randn(B, S, V, dtype=torch.bfloat16), torch.arange(N).view(B, S)
        self.assertExpectedInline(
            rewritten(f, z, y),
            """\
z = <placeholder>
y = <placeholder>
view = y.view(-1)
reshape = z.reshape(-1, 11)
float = reshape.float()
truediv = truediv(float, 30)
tanh = tanh(truediv)
mul = mul(30, tanh)
row_stats = row_stats(mul, [view], [], 'max,sumexp,pick')
unbind = unbind(row_stats, 0)
getitem = unbind[0]
getitem2 = unbind[1]
getitem3 = unbind[2]
log = log(getitem2)
sub = sub(getitem3, getitem)
sub2 = sub(log, sub)
ge = ge(view, 0)
lt = lt(view, 11)
logical_and = logical_and(ge, lt)
eq = eq(view, -100)
logical_or = logical_or(logical_and, eq)
where = where(logical_or, 1.0, nan)
mul2 = mul(sub2, where)
ne = ne(view, -100)
where2 = where(ne, mul2, 0.0)
sum = sum(where2)
sum2 = sum(ne)
div = div(sum, sum2)
return (div)""",
        )

    def test_rows_of_a_symbolic_number(self):
        def f(z, y):
            return F.cross_entropy(z[:, :-1].transpose(1, 2), y[:, 1:], reduction="none")

        z, y = torch.randn(B, S, V), torch.arange(N).view(B, S)
        for tensor in (z, y):
            torch._dynamo.mark_dynamic(tensor, 1)
        self.assertExpectedInline(
            rewritten(f, z, y),
            """\
s32 = <placeholder>
z = <placeholder>
y = <placeholder>
getitem = y[(:, 1:)]
pad = pad(getitem, [0, 1, 0, 0], value=0)
reshape = pad.reshape(-1)
reshape2 = z.reshape(-1, 11)
row_stats = row_stats(reshape2, [reshape], [], 'max,sumexp,pick')
unbind = unbind(row_stats, 0)
getitem2 = unbind[0]
getitem3 = unbind[1]
getitem4 = unbind[2]
log = log(getitem3)
sub = sub(getitem4, getitem2)
sub2 = sub(log, sub)
ge = ge(reshape, 0)
lt = lt(reshape, 11)
logical_and = logical_and(ge, lt)
eq = eq(reshape, -100)
logical_or = logical_or(logical_and, eq)
where = where(logical_or, 1.0, nan)
mul = mul(sub2, where)
size = z.size(1)
reshape3 = mul.reshape([2, size])
getitem5 = reshape3[(:, :-1)]
ne = ne(getitem, -100)
where2 = where(ne, getitem5, 0.0)
return (where2)""",
        )

    def test_final_cross_entropy(self):
        z, y = torch.randn(N, V, requires_grad=True), torch.arange(N)
        forward, backward = final(lambda z, y: F.cross_entropy(z, y), z, y)
        self.assertExpectedInline(
            forward,
            """\
primals_1 = <placeholder>
primals_2 = <placeholder>
row_stats = row_stats(primals_1, [primals_2], [], 'max,sumexp,pick')
select = select.int(row_stats, 0, 0)
unbind = unbind.int(row_stats)
getitem = unbind[0]
getitem2 = unbind[1]
getitem3 = unbind[2]
log = log(getitem2)
sub = sub.Tensor(getitem3, getitem)
sub2 = sub.Tensor(log, sub)
ge = ge.Scalar(primals_2, 0)
lt = lt.Scalar(primals_2, 11)
logical_and = logical_and(ge, lt)
eq = eq.Scalar(primals_2, -100)
logical_or = logical_or(logical_and, eq)
full = full([], nan, dtype=float32, layout=torch.strided, device=device(type='cpu'), pin_memory=False)
full2 = full([], 1.0, dtype=float32, layout=torch.strided, device=device(type='cpu'), pin_memory=False)
where = where.self(logical_or, full2, full)
mul = mul.Tensor(sub2, where)
ne = ne.Scalar(primals_2, -100)
full3 = full([], 0.0, dtype=float32, layout=torch.strided, device=device(type='cpu'), pin_memory=False)
where2 = where.self(ne, mul, full3)
sum = sum(where2)
sum2 = sum(ne)
div = div.Tensor(sum, sum2)
return (div, primals_1, primals_2, select, getitem2, logical_or, ne)""",
        )
        self.assertExpectedInline(
            backward,
            """\
primals_1 = <placeholder>
primals_2 = <placeholder>
select = <placeholder>
getitem_1 = <placeholder>
logical_or = <placeholder>
ne = <placeholder>
tangents_1 = <placeholder>
sum = sum(ne)
div = div.Tensor(tangents_1, sum)
expand = expand(div, [10])
full = full([], 0.0, dtype=float32, layout=torch.strided, device=device(type='cpu'), pin_memory=False)
where = where.self(ne, expand, full)
full2 = full([], nan, dtype=float32, layout=torch.strided, device=device(type='cpu'), pin_memory=False)
full3 = full([], 1.0, dtype=float32, layout=torch.strided, device=device(type='cpu'), pin_memory=False)
where2 = where.self(logical_or, full3, full2)
mul = mul.Tensor(where, where2)
neg = neg(mul)
neg2 = neg(neg)
div2 = div.Tensor(mul, getitem_1)
cat = cat([neg2, div2, neg])
view = view(cat, [3, 10])
row_grad = row_grad(primals_1, [primals_2], [], select, view, 'max,sumexp,pick')
return (row_grad, None)""",
        )

    def test_final_soft_cap(self):
        """The raw bfloat16 logits are saved; the chain is made again in the backward."""

        def f(h, w, y):
            z = h @ w.t()
            return F.cross_entropy(30 * torch.tanh(z.float() / 30), y)

        h = torch.randn(N, D, dtype=torch.bfloat16, requires_grad=True)
        w = torch.randn(V, D, dtype=torch.bfloat16, requires_grad=True)
        forward, backward = final(f, h, w, torch.arange(N))
        self.assertExpectedInline(
            forward,
            """\
primals_1 = <placeholder>
primals_2 = <placeholder>
primals_3 = <placeholder>
permute = permute(primals_1, [1, 0])
mm = mm(primals_2, permute)
convert_element_type = convert_element_type(mm, float32)
div = div.Tensor(convert_element_type, 30)
tanh = tanh(div)
mul = mul.Tensor(tanh, 30)
row_stats = row_stats(mul, [primals_3], [], 'max,sumexp,pick')
select = select.int(row_stats, 0, 0)
unbind = unbind.int(row_stats)
getitem = unbind[0]
getitem2 = unbind[1]
getitem3 = unbind[2]
log = log(getitem2)
sub = sub.Tensor(getitem3, getitem)
sub2 = sub.Tensor(log, sub)
ge = ge.Scalar(primals_3, 0)
lt = lt.Scalar(primals_3, 11)
logical_and = logical_and(ge, lt)
eq = eq.Scalar(primals_3, -100)
logical_or = logical_or(logical_and, eq)
full = full([], nan, dtype=float32, layout=torch.strided, device=device(type='cpu'), pin_memory=False)
full2 = full([], 1.0, dtype=float32, layout=torch.strided, device=device(type='cpu'), pin_memory=False)
where = where.self(logical_or, full2, full)
mul2 = mul.Tensor(sub2, where)
ne = ne.Scalar(primals_3, -100)
full3 = full([], 0.0, dtype=float32, layout=torch.strided, device=device(type='cpu'), pin_memory=False)
where2 = where.self(ne, mul2, full3)
sum = sum(where2)
sum2 = sum(ne)
div2 = div.Tensor(sum, sum2)
permute2 = permute(permute, [1, 0])
return (div2, primals_2, primals_3, mm, select, getitem2, logical_or, ne, permute2)""",
        )
        self.assertExpectedInline(
            backward,
            """\
primals_2 = <placeholder>
primals_3 = <placeholder>
mm = <placeholder>
select = <placeholder>
getitem_1 = <placeholder>
logical_or = <placeholder>
ne = <placeholder>
permute_3 = <placeholder>
tangents_1 = <placeholder>
sum = sum(ne)
div = div.Tensor(tangents_1, sum)
expand = expand(div, [10])
full = full([], 0.0, dtype=float32, layout=torch.strided, device=device(type='cpu'), pin_memory=False)
where = where.self(ne, expand, full)
full2 = full([], nan, dtype=float32, layout=torch.strided, device=device(type='cpu'), pin_memory=False)
full3 = full([], 1.0, dtype=float32, layout=torch.strided, device=device(type='cpu'), pin_memory=False)
where2 = where.self(logical_or, full3, full2)
mul = mul.Tensor(where, where2)
neg = neg(mul)
neg2 = neg(neg)
div2 = div.Tensor(mul, getitem_1)
cat = cat([neg2, div2, neg])
view = view(cat, [3, 10])
convert_element_type = convert_element_type(mm, float32)
div3 = div.Tensor(convert_element_type, 30)
tanh = tanh(div3)
mul2 = mul.Tensor(tanh, 30)
row_grad = row_grad(mul2, [primals_3], [], select, view, 'max,sumexp,pick')
mul3 = mul.Tensor(row_grad, 30)
mul4 = mul.Tensor(tanh, tanh)
sub = sub.Tensor(1, mul4)
mul5 = mul.Tensor(mul3, sub)
div4 = div.Tensor(mul5, 30)
convert_element_type2 = convert_element_type(div4, bfloat16)
permute = permute(convert_element_type2, [1, 0])
mm2 = mm(permute, primals_2)
mm3 = mm(convert_element_type2, permute_3)
return (mm2, mm3, None)""",
        )
