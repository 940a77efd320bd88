"""linear_cross_entropy over ranks that share the head's vocabulary: real processes, over gloo."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
import torch.distributed as dist
from pairwise import in_turns
from ranks import once, spawn
from reference import assert_fair
from test_linear_cross_entropy import Head, by_the_book, measure
from torch import Tensor
from torch.distributed.tensor.debug import CommDebugMode

from inductor_ce.api.functional import linear_cross_entropy

B, S, D, V, RANKS = 2, 5, 8, 24, 2
SPLITS = {"equal": [12, 12], "uneven": [5, 19], "all on one": [24, 0]}

CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "shift": {"shift": 1, "label_smoothing": 0.1},
    "rows": {"reduction": "none", "shift": 2, "softcap": 5.0},
    "all": {"class_weight": True, "mask": True, "z_loss_weight": 0.1, "label_smoothing": 0.2, "softcap": 9.0},
    "probabilities": {"soft": True, "shift": 1},
    "bfloat16": {"dtype": torch.bfloat16},
}
COMPILED = ("plain", "rows")


def case(name: str) -> tuple[Head, Tensor, Tensor, dict[str, Any]]:
    """The head, targets, the upstream gradient and the arguments: the same in every process."""
    torch.manual_seed(0)
    given = dict(CASES[name])
    whole = Head(torch.randn(B, S, D), torch.randn(V, D), torch.randn(V)).to(
        given.pop("dtype", torch.float32)
    )
    y = torch.randint(0, V, (B, S))
    y[:, :4] = torch.tensor([[0, -100, V - 1, 5], [12, 11, 4, -100]])
    target = torch.randn(B, S, V).softmax(-1) if given.pop("soft", False) else y
    tensors = {"class_weight": torch.rand(V), "mask": torch.arange(B * S).view(B, S) % 4 != 1}
    given = {k: tensors.get(k, v) for k, v in given.items()}
    per_row = given.get("reduction") == "none"
    upstream = torch.randn(B, S - given["shift"]) if per_row else torch.tensor(-0.37)
    return whole, target, upstream, given


# In the ranks


def shard(rank: int, name: str, split: str) -> tuple[Head, Tensor, Tensor, dict[str, Any]]:
    """As `case`, for one rank."""
    whole, target, upstream, given = case(name)
    start = sum(SPLITS[split][:rank])
    here = slice(start, start + SPLITS[split][rank])
    own = Head(whole.hidden, whole.weight[here], whole.bias[here])
    if target.is_floating_point():
        target = target[..., here]
    given |= {"group": dist.group.WORLD} | ({} if split == "equal" else {"vocab_start": start})
    return own, target, upstream, given


def losses_and_gradients(rank: int, names: tuple[str, ...], compile_it: bool) -> dict[Any, Any]:
    results = {}
    for name, split in in_turns(names, [*SPLITS]):
        own, target, upstream, given = shard(rank, name, split)
        torch._dynamo.reset()
        f = torch.compile(linear_cross_entropy, backend="aot_eager", fullgraph=True)
        f = f if compile_it else linear_cross_entropy
        results[name, split] = tuple(measure(functools.partial(f, **given), own, target, upstream))
    return results


def odds(rank: int) -> dict[str, Any]:
    """What else there is to see from within."""
    own, target, _, given = shard(rank, "plain", "equal")
    results: dict[str, Any] = {}
    for frozen in ("", "hidden"):
        hidden, weight, bias = (x.clone().requires_grad_() for x in own)
        hidden.requires_grad_(not frozen)
        with CommDebugMode() as forward:
            loss, lse = linear_cross_entropy(hidden, weight, target, bias=bias, return_lse=True, **given)
        with CommDebugMode() as backward:
            (loss + lse.square().mean()).backward()
        counts = {str(op): n for op, n in backward.get_comm_counts().items()}
        results["collectives", frozen] = forward.get_total_counts(), counts
        results["type", frozen] = type(hidden.grad).__name__
        results["lse", frozen] = lse.detach(), hidden.grad

    (alone,) = [g for r in range(RANKS) if (g := dist.new_group([r])) and r == rank]
    whole, target, _, _ = case("plain")
    results["alone"] = tuple(measure(functools.partial(linear_cross_entropy, group=alone), whole, target))
    return results


def run(rank: int) -> dict[str, dict[Any, Any]]:
    return {
        "eager": losses_and_gradients(rank, tuple(CASES), False),
        "compiled": losses_and_gradients(rank, COMPILED, True),
        "odds": odds(rank),
    }


# In the test's process


@once
def everywhere() -> list[dict[str, dict[Any, Any]]]:
    """What each rank gives."""
    return spawn(run, RANKS)


def of_ranks(what: str) -> list[dict[Any, Any]]:
    return [rank[what] for rank in everywhere()]


def check(ranks: list[dict[Any, Any]], name: str, split: str) -> None:
    """Every rank has the loss and the gradient of the hidden states, and of the head its own rows."""
    whole, target, upstream, given = case(name)
    results = [rank[name, split] for rank in ranks]
    naive = measure(functools.partial(by_the_book, dtype=torch.float32, **given), whole, target, upstream)
    exact = measure(functools.partial(by_the_book, **given), whole.to(torch.float64), target, upstream)
    assert all(torch.equal(results[0][0], value) for value, _ in results)
    assert all(torch.equal(results[0][1][0], gradients[0]) for _, gradients in results)
    assert_fair(results[0][0], naive.value, exact.value)
    ours = [results[0][1][0], *(torch.cat([g[i] for _, g in results]) for i in (1, 2))]
    for i, gradient in enumerate(ours):
        assert_fair(gradient, naive.gradients[i], exact.gradients[i])


@pytest.mark.parametrize(("name", "split"), in_turns([*CASES], [*SPLITS]))
def test_every_rank_equals_dense(name: str, split: str) -> None:
    check(of_ranks("eager"), name, split)


@pytest.mark.parametrize(("name", "split"), in_turns(COMPILED, [*SPLITS]))
def test_compiled_every_rank_equals_dense(name: str, split: str) -> None:
    check(of_ranks("compiled"), name, split)


def test_one_collective_each_way() -> None:
    """And none in the backward where the hidden states need no gradient."""
    for rank in of_ranks("odds"):
        assert rank["collectives", ""] == (1, {"c10d_functional.all_reduce": 1})
        assert rank["collectives", "hidden"] == (1, {})
        assert rank["type", ""] == "Tensor"
        assert rank["lse", "hidden"][1] is None


def test_the_lse_has_a_gradient() -> None:
    whole, target, _, _ = case("plain")

    def loss(hidden: Tensor, weight: Tensor, target: Tensor, *, bias: Tensor) -> Tensor:
        lse = (hidden @ weight.T + bias).logsumexp(-1)
        return by_the_book(hidden, weight, target, bias=bias) + lse.square().mean()

    dense = measure(loss, whole.to(torch.float64), target)
    for rank in of_ranks("odds"):
        lse, gradient = rank["lse", ""]
        torch.testing.assert_close(lse, (whole.hidden @ whole.weight.T + whole.bias).logsumexp(-1))
        torch.testing.assert_close(gradient.double(), dense.gradients[0], rtol=1e-5, atol=1e-6)


def test_a_group_of_one_is_dense() -> None:
    whole, target, _, _ = case("plain")
    dense = measure(linear_cross_entropy, whole, target)
    for rank in of_ranks("odds"):
        value, gradients = rank["alone"]
        assert torch.equal(value, dense.value)
        assert all(map(torch.equal, gradients, dense.gradients))
