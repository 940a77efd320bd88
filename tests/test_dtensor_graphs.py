"""What is made of losses over DTensor logits, on torch's fake process group.

EXPECTTEST_ACCEPT=1 accepts new graphs; read the diff.
"""

import inspect
import re
from dataclasses import replace
from typing import Any

import dtensor_cases
import pytest
import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as funcol
import torch.nn.functional as F
from by_hand_cases import whole_loss
from dtensor_cases import Exchanged, Setup, collectives, tensors
from expecttest import assert_expected_inline
from harness import compile_without_codegen, misses, sites
from head_cases import counts
from kernels import backwards_at_once
from pairwise import EVERYTHING
from releases import before
from test_golden import show
from torch import Tensor
from torch._functorch.compile_utils import fx_graph_cse
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode
from torch.distributed.tensor.experimental import implicit_replication
from torch.distributed.tensor.parallel import loss_parallel
from torch.distributed.tensor.placement_types import _StridedShard
from torch.fx import Graph
from torch.testing._internal.distributed.fake_pg import FakeStore

import inductor_ce
from inductor_ce.distributed import placements

LINE = Setup((4,), V=23)
GRID = Setup((2, 2), V=24)


@pytest.fixture(scope="module", autouse=True)
def _rank_1_of_4():
    dist.init_process_group("fake", store=FakeStore(), rank=1, world_size=4)
    yield
    dist.destroy_process_group()
    dtensor_cases._device_mesh.cache_clear()


def head(h, W, y):
    return F.cross_entropy(F.linear(h, W), y, label_smoothing=0.1)


def bare(h, W, y):
    return F.cross_entropy(F.linear(h, W), y)


def made(setup: Setup, **over: Any) -> tuple[DTensor, ...]:
    """h, W and y, placed as the setup says or as given."""
    x = dtensor_cases.distributed(setup, tensors(setup, -100))
    mesh = setup.device_mesh()
    for name, wanted in over.items():
        x[name] = x[name].detach().redistribute(placements=wanted) if isinstance(wanted, list) else wanted
    return tuple(x[name] for name in ("h", "W", "y")), mesh


def graphs_of(f, setup: Setup):
    given, _ = made(setup)
    compiled, graphs = compile_without_codegen(f)
    compiled(*given).backward()
    assert (sites(), misses()) == (1, 0)
    return graphs.final


@pytest.mark.parametrize("setup", [LINE, GRID], ids=["4", "2x2"])
def test_collectives(setup: Setup):
    forward, backward = map(collectives, graphs_of(head, setup))
    means = {"all_reduce": 1} if setup is GRID else {}
    assert (forward, backward) == ({"all_gather_into_tensor": 1} | means, {})


def told_its_entropy(h, W, y):
    """A metric of what each entry makes by itself, which is left: torch gathers the logits for it."""
    z = F.linear(h, W)
    with torch.no_grad():
        p = z.softmax(-1)
        told = -(p * (p + 1e-6).log()).sum(-1).mean()
    return F.cross_entropy(z, y), told


def test_collectives_beside_what_is_left():
    given, _ = made(LINE)
    compiled, graphs = compile_without_codegen(told_its_entropy)
    compiled(*given)[0].backward()
    assert (sites(), misses()) == (1, 1)
    assert [collectives(gm) for gm in graphs.final] == [{"all_gather_into_tensor": 2}, {}]


# NOTE Ranks that hold other columns, in other number, or other rows
# plan their heads otherwise. One that exchanges what another does not makes both wait for ever.

EVEN = Setup((4,), V=24)
FEW = Setup((4,), V=5)  # blocks of 2, 2, 1 and no columns


def exchanged(f: Any, *given: Tensor, **options: Any) -> list[dict[str, int]]:
    """What each graph of a compiled function exchanges, the backward's too if there is one."""
    compiled, graphs = compile_without_codegen(f, **options)
    loss = compiled(*given)
    if loss.requires_grad:
        loss.backward()
    return [collectives(gm) for gm in graphs.final]


@pytest.mark.parametrize("lengths", [(9000, 3000), (3000, 9000)], ids=str)
def test_exchanges_do_not_tell_for_how_many_rows_a_rank_was_compiled_first(lengths: tuple[int, int]):
    """It may be compiled anew alone, for its own reasons."""

    def exchanges_of(n: int) -> dict[str, int]:
        (h, W, y), _ = made(replace(EVEN, N=n))
        with Exchanged() as forward:
            compiled(h, W, y)
        return forward.counts

    compiled, _ = compile_without_codegen(bare, dynamic=True)
    found = {n: exchanges_of(n) for n in lengths}
    for n in lengths:
        torch._dynamo.reset()
        assert exchanges_of(n) == found[n]
    if max(found[9000].values()) > 1:  # no head is in chunks where torch makes the weight's sizes symbols too
        assert found[3000] != found[9000]


def test_a_head_is_not_even_because_another_is():
    """One is done in three chunks, each of which is exchanged; the other is exchanged once on every rank."""
    (h, W, y), _ = made(EVEN)
    (_, few, of_few), _ = made(FEW)

    def both(h, W, few, y, of_few):
        return bare(h, W, y) + bare(h, few, of_few)

    options = {"strategy": "token_chunks", "memory_budget": 0.4}
    forward, backward = exchanged(both, h, W, few, y, of_few, **options)
    assert (forward["all_gather_into_tensor"], backward) == (3 + 1, {})
    assert counts() == {"token_chunks": 1, "vocab_slabs": 1}


def test_rows_are_left_out_on_no_rank_or_on_all():
    """With fewer columns the logits are small, the head is whole, and no rows are left out."""
    given, _ = made(FEW)
    with torch.no_grad():
        alike = exchanged(bare, *given, memory_budget=0.3)
    assert alike == [{"all_gather_into_tensor": 1}]
    assert counts() == {"forward_only": 1}


@pytest.mark.skipif(before(2, 12), reason="torch compiles autograd functions wrongly by itself")
def test_rows_of_losses_by_hand_are_left_out_on_no_rank():
    """Nobody knows how many columns another rank has; with one, a product is no head."""
    x = tensors(LINE, -100)

    def loss(h, W, y):
        rows = whole_loss(F.linear(h, W), y.clamp_min(0), 6)
        return torch.where(y != -100, rows, 0.0).sum()

    with torch.no_grad():
        alike = exchanged(loss, x["h"].float(), x["W"][6:12].float(), x["y"], memory_budget=0.3)
    assert alike == [{"all_gather_into_tensor": 1}]
    assert counts() == {"forward_only": 1}


@pytest.mark.parametrize("grad", [True, False])
def test_losses_that_are_gathered_are_no_statistics(grad: bool):
    """Ranks whose batches differ in length share no rows, and their heads are as they are on one rank."""
    x = tensors(LINE, -100)

    def logged(h, W, y):
        loss = bare(h, W, y)
        return loss + 0 * funcol.all_gather_tensor(loss.detach()[None], 0, dist.group.WORLD).sum()

    options = {"strategy": "token_chunks", "memory_budget": 0.4}
    with torch.set_grad_enabled(grad):
        given = x["h"].requires_grad_(), x["W"].requires_grad_(), x["y"]
        forward, *backward = exchanged(logged, *given, **options)
    assert (forward, any(backward)) == ({"all_gather_into_tensor": 1}, False)
    assert counts() == {"token_chunks" if grad else "forward_only": 1}


# From 2.14 torch keeps apart the equal constants of which only one is also for the backward.
KEPT_APART = """\
full4 = full([], 0.0, dtype=float64, layout=torch.strided, device=device(type='cpu'), pin_memory=False)
where3 = where.self(ne, mul7, full4)"""


def of_every_release(graph: Graph) -> str:
    """As `show`, without meshes, which are inputs and results from torch 2.12 on, and a number that moves."""
    inputs = [node for node in graph.nodes if node.op == "placeholder"]
    meshes = [node.name for node in inputs if not isinstance(node.meta["val"], Tensor)]
    kept = [node.name for node in inputs if node.name not in meshes]
    shown = show(graph)
    for name in meshes:
        shown = shown.replace(f"{name} = <placeholder>\n", "").replace(f", {name}", "")
    primals = [name for name in kept if name.startswith("primals_")]
    for i, name in enumerate(primals, 1):  # each takes a number that is free
        shown = re.sub(rf"\b{name}\b", f"primals_{i}", shown)
    shown = re.sub(r"\bpermute_\d+\b", "permute_n", shown)
    if "extra_node_key" in inspect.signature(fx_graph_cse).parameters and "mul7" in shown:
        assert shown.count(KEPT_APART) == 1
    return shown.replace(KEPT_APART, "where3 = where.self(ne, mul7, full)")


def test_golden_of_four_ranks():
    forward, backward = graphs_of(head, LINE)
    assert_expected_inline(
        of_every_release(forward.graph),
        """\
primals_1 = <placeholder>
primals_2 = <placeholder>
primals_3 = <placeholder>
permute = permute(primals_2, [1, 0])
mm = mm(primals_1, permute)
group_rank = group_rank(primals_1, '0', False)
mul = mul.Tensor(group_rank, 6)
iota = iota(4, start=0, step=1, dtype=int64, device=device(type='cpu'), requires_grad=False)
mul2 = mul.Tensor(iota, 6)
sub = sub.Tensor(23, mul2)
clamp_min = clamp_min(sub, 0)
clamp_max = clamp_max(clamp_min, 6)
sub2 = sub.Tensor(primals_3, mul)
row_stats = row_stats(mm, [sub2], [], 'max,sumexp,pick,sum')
all_gather_into_tensor = all_gather_into_tensor(row_stats, 4, '0')
wait_tensor = wait_tensor(all_gather_into_tensor)
view = view(wait_tensor, [4, 4, 8])
convert_element_type = convert_element_type(clamp_max, float64)
unsqueeze = unsqueeze(convert_element_type, 1)
unbind = unbind.int(view, 1)
getitem = unbind[0]
amax = amax(getitem, [0])
eq = eq.Scalar(getitem, -inf)
sub3 = sub.Tensor(getitem, amax)
full = full([], 0.0, dtype=float64, layout=torch.strided, device=device(type='cpu'), pin_memory=False)
where = where.self(eq, full, sub3)
exp = exp(where)
select = select.int(view, 1, 1)
mul3 = mul.Tensor(select, exp)
sum = sum.dim_IntList(mul3, [0])
select2 = select.int(view, 1, 2)
sum2 = sum.dim_IntList(select2, [0])
select3 = select.int(view, 1, 3)
mul4 = mul.Tensor(unsqueeze, where)
add = add.Tensor(select3, mul4)
sum3 = sum.dim_IntList(add, [0])
cat = cat([amax, sum, sum2, sum3])
view2 = view(cat, [4, 8])
select4 = select.int(view2, 0, 0)
unbind2 = unbind.int(view2)
getitem2 = unbind2[0]
getitem3 = unbind2[1]
getitem4 = unbind2[2]
getitem5 = unbind2[3]
log = log(getitem3)
sub4 = sub.Tensor(getitem4, getitem2)
mul5 = mul.Tensor(sub4, 0.9)
sub5 = sub.Tensor(log, mul5)
mul6 = mul.Tensor(getitem5, 0.004347826086956522)
sub6 = sub.Tensor(sub5, mul6)
ge = ge.Scalar(primals_3, 0)
lt = lt.Scalar(primals_3, 23)
logical_and = logical_and(ge, lt)
eq2 = eq.Scalar(primals_3, -100)
logical_or = logical_or(logical_and, eq2)
full2 = full([], nan, dtype=float32, layout=torch.strided, device=device(type='cpu'), pin_memory=False)
full3 = full([], 1.0, dtype=float32, layout=torch.strided, device=device(type='cpu'), pin_memory=False)
where2 = where.self(logical_or, full3, full2)
mul7 = mul.Tensor(sub6, where2)
ne = ne.Scalar(primals_3, -100)
where3 = where.self(ne, mul7, full)
sum4 = sum(where3)
sum5 = sum(ne)
div = div.Tensor(sum4, sum5)
permute2 = permute(permute, [1, 0])
return (div, primals_1, mm, sub2, select4, getitem3, logical_or, ne, permute2)""",
    )
    assert_expected_inline(
        of_every_release(backward.graph),
        """\
primals_1 = <placeholder>
mm = <placeholder>
sub_1 = <placeholder>
select_4 = <placeholder>
getitem_5 = <placeholder>
logical_or = <placeholder>
ne = <placeholder>
permute_n = <placeholder>
tangents_1 = <placeholder>
sum = sum(ne)
div = div.Tensor(tangents_1, sum)
expand = expand(div, [8])
full = full([], 0.0, dtype=float64, layout=torch.strided, device=device(type='cpu'), pin_memory=False)
where = where.self(ne, expand, full)
full2 = full([], nan, dtype=float32, layout=torch.strided, device=device(type='cpu'), pin_memory=False)
full3 = full([], 1.0, dtype=float32, layout=torch.strided, device=device(type='cpu'), pin_memory=False)
where2 = where.self(logical_or, full3, full2)
mul = mul.Tensor(where, where2)
neg = neg(mul)
mul2 = mul.Tensor(neg, 0.004347826086956522)
mul3 = mul.Tensor(neg, 0.9)
neg2 = neg(mul3)
div2 = div.Tensor(mul, getitem_5)
cat = cat([neg2, div2, mul3, mul2])
view = view(cat, [4, 8])
row_grad = row_grad(mm, [sub_1], [], select_4, view, 'max,sumexp,pick,sum')
permute = permute(row_grad, [1, 0])
mm2 = mm(permute, primals_1)
mm3 = mm(row_grad, permute_n)
return (mm3, mm2, None)""",
    )


def test_golden_of_a_grid():
    forward, backward = graphs_of(bare, GRID)
    assert_expected_inline(
        of_every_release(forward.graph),
        """\
primals_1 = <placeholder>
primals_2 = <placeholder>
primals_3 = <placeholder>
permute = permute(primals_2, [1, 0])
mm = mm(primals_1, permute)
group_rank = group_rank(primals_1, '3', True)
mul = mul.Tensor(group_rank, 12)
sub = sub.Tensor(primals_3, mul)
row_stats = row_stats(mm, [sub], [], 'max,sumexp,pick')
all_gather_into_tensor = all_gather_into_tensor(row_stats, 2, '3')
wait_tensor = wait_tensor(all_gather_into_tensor)
view = view(wait_tensor, [2, 3, 4])
unbind = unbind.int(view, 1)
getitem = unbind[0]
amax = amax(getitem, [0])
eq = eq.Scalar(getitem, -inf)
sub2 = sub.Tensor(getitem, amax)
full = full([], 0.0, dtype=float64, layout=torch.strided, device=device(type='cpu'), pin_memory=False)
where = where.self(eq, full, sub2)
exp = exp(where)
select = select.int(view, 1, 1)
mul2 = mul.Tensor(select, exp)
sum = sum.dim_IntList(mul2, [0])
select2 = select.int(view, 1, 2)
sum2 = sum.dim_IntList(select2, [0])
cat = cat([amax, sum, sum2])
view2 = view(cat, [3, 4])
select3 = select.int(view2, 0, 0)
unbind2 = unbind.int(view2)
getitem2 = unbind2[0]
getitem3 = unbind2[1]
getitem4 = unbind2[2]
log = log(getitem3)
sub3 = sub.Tensor(getitem4, getitem2)
sub4 = sub.Tensor(log, sub3)
ge = ge.Scalar(primals_3, 0)
lt = lt.Scalar(primals_3, 24)
logical_and = logical_and(ge, lt)
eq2 = eq.Scalar(primals_3, -100)
logical_or = logical_or(logical_and, eq2)
full2 = full([], nan, dtype=float32, layout=torch.strided, device=device(type='cpu'), pin_memory=False)
full3 = full([], 1.0, dtype=float32, layout=torch.strided, device=device(type='cpu'), pin_memory=False)
where2 = where.self(logical_or, full3, full2)
mul3 = mul.Tensor(sub4, where2)
ne = ne.Scalar(primals_3, -100)
where3 = where.self(ne, mul3, full)
sum3 = sum(where3)
sum4 = sum(ne)
convert_element_type = convert_element_type(sum4, float64)
unsqueeze = unsqueeze(sum3, 0)
unsqueeze2 = unsqueeze(convert_element_type, 0)
cat2 = cat([unsqueeze, unsqueeze2])
all_reduce = all_reduce(cat2, 'sum', '2')
wait_tensor2 = wait_tensor(all_reduce)
unbind3 = unbind.int(wait_tensor2)
getitem5 = unbind3[0]
getitem6 = unbind3[1]
div = div.Tensor(getitem5, getitem6)
permute2 = permute(permute, [1, 0])
return (div, primals_1, mm, sub, select3, getitem3, logical_or, ne, getitem6, permute2)""",
    )
    assert_expected_inline(
        of_every_release(backward.graph),
        """\
primals_1 = <placeholder>
mm = <placeholder>
sub_1 = <placeholder>
select_3 = <placeholder>
getitem_4 = <placeholder>
logical_or = <placeholder>
ne = <placeholder>
getitem_7 = <placeholder>
permute_n = <placeholder>
tangents_1 = <placeholder>
div = div.Tensor(tangents_1, getitem_7)
unsqueeze = unsqueeze(div, 0)
full = full([1], 0.0, dtype=float64, layout=torch.strided, device=device(type='cpu'), pin_memory=False)
cat = cat([unsqueeze, full])
select = select.int(cat, 0, 0)
expand = expand(select, [4])
full2 = full([], 0.0, dtype=float64, layout=torch.strided, device=device(type='cpu'), pin_memory=False)
where = where.self(ne, expand, full2)
full3 = full([], nan, dtype=float32, layout=torch.strided, device=device(type='cpu'), pin_memory=False)
full4 = full([], 1.0, dtype=float32, layout=torch.strided, device=device(type='cpu'), pin_memory=False)
where2 = where.self(logical_or, full4, full3)
mul = mul.Tensor(where, where2)
neg = neg(mul)
neg2 = neg(neg)
div2 = div.Tensor(mul, getitem_4)
cat2 = cat([neg2, div2, neg])
view = view(cat2, [3, 4])
row_grad = row_grad(mm, [sub_1], [], select_3, view, 'max,sumexp,pick')
permute = permute(row_grad, [1, 0])
mm2 = mm(permute, primals_1)
mm3 = mm(row_grad, permute_n)
return (mm3, mm2, None)""",
    )


def test_explain():
    given, _ = made(GRID)
    with inductor_ce.install(min_vocab=2):
        report = inductor_ce.explain(head, *given)
    (site,) = report.sites
    assert (site.sharded, site.strategy) == (True, "materialise")
    assert site.which == "max,sumexp,pick,sum"
    assert "vocabulary sharded" in str(report)


# What else is taken


def site_of(f, *given):
    with inductor_ce.install(min_vocab=2):
        report = inductor_ce.explain(f, *given)
    assert not report.misses, report
    (site,) = report.sites
    return site


def test_sequences():
    (h, W, y), mesh = made(GRID)
    h = distribute_tensor(
        torch.randn(4, 5, 3, dtype=torch.float64), mesh, GRID.over_rows(), src_data_rank=None
    )
    y = distribute_tensor(torch.randint(0, 24, (4, 5)), mesh, GRID.over_rows(), src_data_rank=None)
    assert site_of(
        lambda h, W, y: F.cross_entropy(F.linear(h, W).flatten(0, 1), y.flatten()), h, W, y
    ).sharded
    assert site_of(lambda h, W, y: F.cross_entropy(F.linear(h, W).transpose(1, 2), y), h, W, y).sharded


@pytest.mark.parametrize("context", [loss_parallel, implicit_replication])
def test_plain_labels_that_all_ranks_hold(context):
    (h, W, y), _ = made(LINE)
    with context():
        assert site_of(bare, h, W, y.to_local()).sharded


def test_inside_loss_parallel():
    (h, W, y), _ = made(LINE)
    with loss_parallel():
        assert site_of(bare, h, W, y).sharded

    def within(h, W, y):
        with loss_parallel():
            return bare(h, W, y)

    assert site_of(within, h, W, y).sharded


@pytest.mark.parametrize("setup", [LINE, GRID], ids=["4", "2x2"])
def test_trap_9_replicated_logits_are_no_shards(setup: Setup):
    given, _ = made(setup, W=[Replicate()] * len(setup.mesh))
    compiled, graphs = compile_without_codegen(head)
    compiled(*given)
    assert sites() == 1
    assert "all_gather_into_tensor" not in collectives(graphs.final[0])
    assert not site_of(head, *given).sharded


def test_two_losses_over_different_dimensions_of_a_mesh():
    (h, W, y), _ = made(GRID)
    y = y.redistribute(placements=[Replicate()] * 2)
    h = h.detach().redistribute(placements=[Replicate()] * 2)
    W2 = W.detach().redistribute(placements=[Shard(0), Replicate()])

    def two(h, W, W2, y):
        return head(h, W, y) + head(h, W2, y)

    with inductor_ce.install(min_vocab=2):
        report = inductor_ce.explain(two, h, W, W2, y)
    assert [site.sharded for site in report.sites] == [True, True]


# What is refused

REFUSED = {
    "partial sums": (
        lambda mesh: ([Replicate(), Shard(1)], [Replicate(), Shard(1)], [Replicate(), Replicate()]),
        "of which a rank does not hold a block",
    ),
    "two dimensions": (
        lambda mesh: ([Replicate()] * 2, [Shard(0), Shard(0)], [Replicate()] * 2),
        "whose vocabulary 2 mesh dimensions shard",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name: str):
    places, fact = REFUSED[name]
    mesh = GRID.device_mesh()
    h, W, y = places(mesh)
    given, _ = made(GRID, h=h, W=W, y=y)
    with inductor_ce.install(min_vocab=2):
        report = inductor_ce.explain(head, *given)
    assert not report.sites
    (miss,) = report.misses
    assert miss.reason.name == "PLACEMENTS"
    assert fact in miss.message
    assert "a DTensor [8, 24] with placements (" in miss.message


MOVED = {  # beside logits whose rows and classes are sharded: labels, and soft targets
    "labels on every rank": lambda y, q: y.redistribute(placements=[Replicate()] * 2),
    "labels over the other dimension": lambda y, q: y.redistribute(placements=[Replicate(), Shard(0)]),
    "labels over both": lambda y, q: y.redistribute(placements=[Shard(0)] * 2),
    "targets on every rank": lambda y, q: q.redistribute(placements=[Replicate()] * 2),
}
LEFT = {
    "labels of which each rank has a part of a sum": (
        lambda y, q: DTensor.from_local(y.to_local(), y.device_mesh, [Shard(0), Partial()], run_check=False),
        "sharded otherwise",
    ),
    "plain labels": (lambda y, q: y.full_tensor(), "whose rows are sharded"),
    "targets over the other dimension": (
        lambda y, q: q.redistribute(placements=[Replicate(), Shard(0)]),
        "sharded otherwise",
    ),
}


def placed_beside(placing: Any) -> Any:
    """What `explain` says of a loss whose labels or targets are where `placing` has them."""
    x = dtensor_cases.distributed(GRID, tensors(GRID, -100))
    (h, W), y, q = (x["h"], x["W"]), x["y"], x["q"]
    beside = placing(y, q)
    with inductor_ce.install(min_vocab=2), implicit_replication():
        return inductor_ce.explain(bare, h, W, beside)


@pytest.mark.parametrize("name", MOVED)
def test_what_can_be_moved_is_brought_to_the_rows(name: str):
    report = placed_beside(MOVED[name])
    assert (len(report.sites), len(report.misses)) == (1, 0)


@pytest.mark.parametrize("name", LEFT)
def test_what_cannot_be_moved_is_left(name: str):
    """Parts of sums, numbers [N, V] that others have, and tensors that may be whole or a rank's part."""
    placing, fact = LEFT[name]
    report = placed_beside(placing)
    (miss,) = report.misses
    assert (miss.reason.name, len(report.sites)) == ("PLACEMENTS", 0)
    assert fact in miss.message


def test_returned_logits_are_not_dropped():
    def f(h, W, y):
        z = F.linear(h, W)
        return F.cross_entropy(z, y), z

    given, _ = made(LINE)
    compiled, _ = compile_without_codegen(f, returned_logits="nan")
    assert not compiled(*given)[1].to_local().isnan().any()
    (site,) = inductor_ce.explain(f, *given).sites
    assert site.head.endswith('returned_logits="nan" does not apply, because they are no plain tensor.')


def test_strided_shards_are_refused():
    """As FSDP makes them of a head that is sharded already: a rank's columns are not all neighbours."""
    (_, _, y), mesh = made(GRID)
    placed = [_StridedShard(1, split_factor=2), Shard(1)]
    z = DTensor.from_local(
        torch.randn(8, 6), mesh, placed, run_check=False, shape=torch.Size([8, 24]), stride=(24, 1)
    )
    y = y.redistribute(placements=[Replicate()] * 2)
    with inductor_ce.install(min_vocab=2):
        report = inductor_ce.explain(lambda z, y: F.cross_entropy(z, y), z, y)
    (miss,) = report.misses
    assert (miss.reason.name, len(report.sites)) == ("PLACEMENTS", 0)
    assert f"of which a rank does not hold a block: {placed[0]}." in miss.message
    assert "a DTensor [8, 24] with placements (" in miss.message


# The functions by themselves


def test_communication_in_eager_code():
    mesh = LINE.device_mesh()
    z = distribute_tensor(torch.randn(8, 23), mesh, [Shard(1)], src_data_rank=None).requires_grad_()
    y = distribute_tensor(torch.zeros(8, dtype=torch.int64), mesh, [Replicate()], src_data_rank=None)
    with CommDebugMode() as forward:
        rows = placements.whole_rows(z, [y], [], "max,sumexp,pick")
    with CommDebugMode() as backward:  # torch 2.11 would gather what it adds to the gradient of a leaf
        torch.autograd.grad((rows[1].log() + rows[0].detach() - rows[2]).sum(), z)
    assert (forward.get_total_counts(), backward.get_total_counts()) == (1, 0)


@pytest.mark.parametrize("strategy", ["materialise", *["token_chunks"] * EVERYTHING])
def test_code_for_logits_whose_rows_are_of_several_dimensions(strategy: str):
    """As of models that return them: the rank is asked for by another tensor than it was traced with."""

    def loss(h, W, y):
        h, y = h.unflatten(0, (2, -1)), y.unflatten(0, (2, -1))
        return F.cross_entropy(F.linear(h, W).flatten(0, 1).float(), y.flatten())

    given, _ = made(LINE)
    h, W, y = given
    with inductor_ce.install(min_vocab=2, strategy=strategy, memory_budget=0.5), backwards_at_once():
        torch.compile(loss, fullgraph=True)(h, W, y).backward()
    assert sites() == 1


def test_code_for_a_leaf_whose_rows_are_of_several_dimensions():
    (h, W, y), _ = made(LINE)
    logits = F.linear(h.unflatten(0, (2, -1)), W).detach().requires_grad_()
    with inductor_ce.install(min_vocab=2), backwards_at_once():
        torch.compile(lambda z, y: F.cross_entropy(z.flatten(0, 1), y))(logits, y).backward()
    assert sites() == 1


def test_a_divergence_is_left():
    """Of several sets of logits no rank is asked for statistics."""
    (h, W, _), _ = made(LINE)

    def both(h, W):
        a, b = F.log_softmax(F.linear(h, W), -1), F.log_softmax(F.linear(2 * h, W), -1)
        return ((a.exp() - b.exp()) * (a - b)).sum(-1).mean()

    with inductor_ce.install(min_vocab=2):
        report = inductor_ce.explain(both, h, W)
    assert not report.sites
    assert {miss.reason.name for miss in report.misses} == {"UNSUPPORTED_TENSOR"}
    assert "a divergence between several sets of logits, which are DTensors" in report.misses[0].message
