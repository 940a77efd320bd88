"""The functional form over ranks that share the vocabulary: real processes, over gloo or NCCL."""

from __future__ import annotations

import functools
import uuid
from collections.abc import Callable
from typing import Any

import pytest
import textbook
import torch
import torch.distributed as dist
from harness import without_codegen
from pairwise import EVERYTHING
from ranks import on_devices, once, spawn, tagged_caches
from reference import Measured, assert_as_fair, assert_fair, measure
from torch import Tensor
from torch._dynamo.utils import counters
from torch.distributed.tensor.debug import CommDebugMode
from torch.utils._pytree import tree_map

import inductor_ce
from inductor_ce.api.functional import cross_entropy
from inductor_ce.common.errors import InputError

N, V = 10, 24

# How many columns each rank has, where they are not as many.
UNEVEN = {2: [5, 19], 4: [10, 1, 0, 13]}
TENSORS = {"weight": True, "mask": True}
CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "smoothing": {"label_smoothing": 0.1},
    "weight": {"weight": True},
    "weight and smoothing": {"weight": True, "label_smoothing": 0.2},
    "z-loss and soft-cap": {"z_loss_weight": 0.1, "softcap": 5.0},
    "mask": {"mask": True, "num_label_tokens": 7, "reduction": "sum"},
    "ignore the last class": {"ignore_index": V - 1, "label_smoothing": 0.1, "z_loss_weight": 0.1},
    "rows": {"reduction": "none", "label_smoothing": 0.1},
    "probabilities": {"soft": True},
    "probabilities, all": {"soft": True, "weight": True, "label_smoothing": 0.2, "z_loss_weight": 0.1},
    "large gaps": {"scale": 1000.0, "label_smoothing": 0.1},
    "bfloat16": {"dtype": torch.bfloat16, "label_smoothing": 0.1},
    "a rank of -inf": {"masked": True},
}
COMPILED = {"equal": ("plain", "weight and smoothing"), "uneven": ("probabilities, all",)}
if EVERYTHING:
    COMPILED = dict.fromkeys(COMPILED, ("plain", "weight and smoothing", "probabilities, all"))
# As generated code: each rank's own, and with ALL=1 alike on all ranks, as in test_dtensor_cache.py.
CACHED = [*[("probabilities, all", "equal")] * EVERYTHING, ("weight and smoothing", "uneven")]


def case(options: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor, dict[str, Any]]:
    """Logits, target, the upstream gradient and the arguments: the same in every process."""
    torch.manual_seed(0)
    given = dict(options)
    z = (given.pop("scale", 3.0) * torch.randn(N, V)).to(given.pop("dtype", torch.float32))
    y = torch.randint(0, V, (N,))
    y[:4] = torch.tensor([0, V - 1, given.get("ignore_index", -100), V // 2])
    target = torch.randn(N, V).softmax(-1) if given.pop("soft", False) else y
    if given.pop("masked", False):
        z[:, : V // 2] = -torch.inf
        target = target % (V // 2) + V // 2
    tensors = {"weight": torch.rand(V), "mask": torch.arange(N) % 4 != 1}
    given = {k: tensors[k] if v is True else v for k, v in given.items()}
    upstream = torch.randn(N) if given.get("reduction") == "none" else torch.tensor(-0.37)
    return z, target, upstream, given


# In the ranks


def columns(rank: int, sizes: list[int]) -> slice:
    start = sum(sizes[:rank])
    return slice(start, start + sizes[rank])


def splits_of(size: int) -> dict[str, list[int]]:
    return {"equal": [V // size] * size, "uneven": UNEVEN[size]}


def shard(rank: int, name: str, split: str, size: int, device: str) -> tuple[Tensor, Tensor, Tensor, dict]:
    """As `case`, for one rank; the logits are a leaf."""
    sizes = splits_of(size)[split]
    z, target, upstream, given = on(device, case(CASES[name]))
    here = columns(rank, sizes)
    if target.is_floating_point():
        target = target[:, here]
    given["group"] = dist.group.WORLD
    if split == "uneven":
        given["vocab_start"] = here.start
    return z[:, here].contiguous().requires_grad_(), target, upstream, given


def on(device: str, x: Any) -> Any:
    """Every tensor of it on the device."""
    return tree_map(lambda leaf: leaf.to(device) if isinstance(leaf, Tensor) else leaf, x)


def eager(rank: int, size: int, device: str) -> dict[str, Any]:
    """Of each case on equal and uneven shards: loss, lse and the gradient of this rank's columns."""
    results = {}
    for name in CASES:
        for split in splits_of(size):
            leaf, target, upstream, given = shard(rank, name, split, size, device)
            loss, lse = cross_entropy(leaf, target, return_lse=True, **given)
            (gradient,) = torch.autograd.grad(loss, leaf, upstream)
            results[name, split] = (loss.detach(), lse.detach(), gradient)
    return results


def in_one_graph(rank: int, names: tuple[str, ...], split: str, size: int) -> dict[Any, Any]:
    """The same of cases that are compiled together."""
    shards = (shard(rank, name, split, size, "cpu") for name in names)
    leaves, targets, upstreams, given = zip(*shards, strict=True)

    def losses(leaves: tuple[Tensor, ...], targets: tuple[Tensor, ...]) -> list[tuple[Tensor, Tensor]]:
        calls = zip(leaves, targets, given, strict=True)
        return [cross_entropy(z, y, return_lse=True, **how) for z, y, how in calls]

    torch._dynamo.reset()
    found = torch.compile(losses, fullgraph=True)(leaves, targets)
    gradients = torch.autograd.grad([loss for loss, _ in found], leaves, upstreams)
    return {
        (name, split): (loss.detach(), lse.detach(), gradient)
        for name, (loss, lse), gradient in zip(names, found, gradients, strict=True)
    }


def compiled(rank: int, size: int) -> dict[Any, Any]:
    results: dict[Any, Any] = {}
    for split, names in COMPILED.items():
        with without_codegen():
            results |= in_one_graph(rank, names, split, size)
    return results


def cached(rank: int, size: int, tag: str) -> dict[Any, Any]:
    with tagged_caches(tag):
        results = {}
        for name, split in CACHED:
            results |= in_one_graph(rank, (name,), split, size)
    return results | {"hits": counters["inductor"]["fxgraph_cache_hit"]}


def odds(rank: int, size: int) -> dict[str, Any]:
    """What else there is to see from within."""
    group, here = dist.group.WORLD, columns(rank, [V // size] * size)
    z, target, _, _ = case({})
    leaf = z[:, here].contiguous().requires_grad_()
    results: dict[str, Any] = {}
    with CommDebugMode() as forward:
        loss = cross_entropy(leaf, target, group=group, label_smoothing=0.1, z_loss_weight=0.1)
    with CommDebugMode() as backward:
        loss.backward()
    results["collectives"] = forward.get_total_counts(), backward.get_total_counts()

    wrong = target.clone()
    wrong[3] = V
    results["outside"] = cross_entropy(leaf.detach(), wrong, group=group, reduction="none")
    uneven = z[:, columns(rank, UNEVEN[size])]
    results["unannounced"] = cross_entropy(uneven, target, group=group)
    results["empty"] = cross_entropy(leaf[:0].detach(), target[:0], group=group, reduction="sum")

    graphs: list[str] = []

    def keep(gm: torch.fx.GraphModule, example_inputs: Any) -> Any:
        graphs.append(gm.print_readable(print_output=False))
        return gm.forward

    torch.compile(cross_entropy, backend=keep, fullgraph=True)(leaf, target, group=group)
    results["graphs"] = graphs

    if size == 2:
        torch._dynamo.reset()
        with inductor_ce.install(min_vocab=2), without_codegen():
            again = torch.compile(cross_entropy, backend="inductor")
            again(leaf, target, group=group, softcap=5.0).backward()
        results["counts"] = dict(counters["inductor_ce"])

    subgroups = [dist.new_group([r]) for r in range(size)]
    alone = measure(functools.partial(cross_entropy, group=subgroups[rank]), z, target)
    results["alone"] = tuple(alone)
    return results


# In the test's process

sizes = pytest.mark.parametrize("size", [2, 4])
splits = pytest.mark.parametrize("split", ["equal", "uneven"])


@once
def everywhere(what: Callable[..., dict[str, Any]], size: int) -> list[dict[str, Any]]:
    """What each rank gives."""
    return spawn(what, size, size)


@once
def eager_on(device: str, size: int) -> list[dict[str, Any]]:
    return spawn(eager, size, size, device, device=device)


def check(ranks: list[dict[str, Any]], name: str, split: str) -> None:
    """Every rank has the loss of the whole vocabulary, and together they have its gradient."""
    z, target, upstream, given = case(CASES[name])
    losses, lses, gradients = zip(*(rank[name, split] for rank in ranks), strict=True)
    assert all(torch.equal(losses[0], loss) for loss in losses)
    assert all(torch.equal(lses[0], lse) for lse in lses)
    naive = functools.partial(textbook.cross_entropy, dtype=torch.float32, **given)
    exact = functools.partial(textbook.cross_entropy, **given)
    assert_as_fair(
        Measured(losses[0], torch.cat(gradients, 1)),
        measure(naive, z, target, upstream=upstream),
        measure(exact, z.double(), target, upstream=upstream),
    )
    capped = z.double() if "softcap" not in given else given["softcap"] * torch.tanh(z / given["softcap"])
    assert_fair(lses[0], torch.logsumexp(capped.float(), -1), torch.logsumexp(capped.double(), -1))


@pytest.mark.in_turns
@on_devices
@sizes
@splits
@pytest.mark.parametrize("name", CASES)
def test_every_rank_equals_dense(name: str, split: str, size: int, device: str) -> None:
    check(eager_on(device, size), name, split)


@pytest.mark.parametrize(
    ("split", "name"), [(split, name) for split, names in COMPILED.items() for name in names]
)
def test_compiled_every_rank_equals_dense(name: str, split: str) -> None:
    check(everywhere(compiled, 2), name, split)


def test_trap_11_two_ranks_and_one_cache() -> None:
    tag = uuid.uuid4().hex
    cold, warm = (spawn(cached, 2, 2, tag, new=new) for new in (False, EVERYTHING))
    for ranks in (cold, warm):
        for name, split in CACHED:
            check(ranks, name, split)
    assert all(rank["hits"] > 0 for rank in warm)


@sizes
def test_one_collective_and_none_in_the_backward(size: int) -> None:
    assert [rank["collectives"] for rank in everywhere(odds, size)] == [(1, 0)] * size


def test_what_is_called_is_not_recognised_again() -> None:
    """Neither as a site nor as a miss; its logits are dealt with as any others."""
    assert [rank["counts"] for rank in everywhere(odds, 2)] == [{"materialise": 1}] * 2


@sizes
def test_no_rank_in_the_graph(size: int) -> None:
    """What is compiled is the same text on every rank."""
    texts = {tuple(rank["graphs"]) for rank in everywhere(odds, size)}
    assert len(texts) == 1


@sizes
def test_trap_26_a_label_outside_makes_its_row_nan_on_every_rank(size: int) -> None:
    for rank in everywhere(odds, size):
        assert rank["outside"].isnan().tolist() == [i == 3 for i in range(N)]


@sizes
def test_uneven_shards_that_are_not_told_are_nan(size: int) -> None:
    assert all(rank["unannounced"].isnan() for rank in everywhere(odds, size))


@sizes
def test_no_rows(size: int) -> None:
    assert [rank["empty"].item() for rank in everywhere(odds, size)] == [0.0] * size


@sizes
def test_a_group_of_one_is_dense(size: int) -> None:
    z, target, _, _ = case({})
    dense = measure(cross_entropy, z, target)
    for rank in everywhere(odds, size):
        assert all(map(torch.equal, rank["alone"], dense))


def test_a_start_needs_a_group() -> None:
    with pytest.raises(InputError, match="vocab_start is where a shard starts: it needs a group"):
        cross_entropy(torch.zeros(2, 3), torch.zeros(2, dtype=torch.int64), vocab_start=torch.tensor(1))
