"""Losses over DTensor logits: the cases, what a rank computes of them, and what is right."""

from __future__ import annotations

import functools
import math
from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any
from unittest import mock

import reference
import torch
import torch.nn.functional as F
from harness import (
    Graphs,
    Rewritten,
    clean_slate,
    compile_with_codegen,
    compile_without_codegen,
    misses,
    sites,
)
from pairwise import EVERYTHING
from ranks import Outcomes, attempt, mesh_there, spawn
from reference import Terms
from releases import TORCH
from torch import Tensor
from torch._dynamo.utils import counters
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode
from torch.distributed.tensor.experimental import implicit_replication
from torch.fx import GraphModule

from inductor_ce.ops import counted, products

D = 3


@functools.cache
def _device_mesh(sizes: tuple[int, ...], device: str) -> DeviceMesh:
    """One for each shape: torch 2.13 mixes up equal meshes, and then its partitioner fails."""
    return init_device_mesh(device, sizes, mesh_dim_names=("a", "b", "tp")[-len(sizes) :])


@dataclass(frozen=True)
class Setup:
    """A mesh with the vocabulary on its last dimension, rows on the others where `rows` says so.

    Where it is `whole`, no dimension has the vocabulary, and the rows may be on the last one as well.
    """

    mesh: tuple[int, ...]
    N: int = 8
    V: int = 24
    rows: tuple[bool, ...] = (True, True)
    dtype: torch.dtype = torch.float64
    weights: str = "as mostly"  # how w and q lie on the ranks, see `beside`
    sequence_parallel: bool = False  # whether h comes in sharded over all ranks by its rows
    device: str = "cpu"
    code: bool = False  # whether it runs Inductor's code, not the graph that it is made of
    rewritten: bool = False  # whether that graph is what the rewrite leaves, without the passes after it
    whole: bool = False
    labels: str = "as the rows"  # where y is: see `of_labels`
    counting: str = "mostly the last"  # which rows count: see `tensors`
    strategy: str = "auto"  # of the head; else it is computed in pieces, and nobody sees the logits' gradient

    def device_mesh(self) -> DeviceMesh:
        return _device_mesh(self.mesh, self.device)

    def over_rows(self, dim: int = 0) -> list[Placement]:
        over = self.rows[: len(self.mesh) - (not self.whole)]
        placements: list[Placement] = [Shard(dim) if shard else Replicate() for shard in over]
        return placements if self.whole else [*placements, Replicate()]

    def over_classes(self, dim: int) -> list[Placement]:
        last: Placement = Replicate() if self.whole else Shard(dim)
        return [Replicate()] * (len(self.mesh) - 1) + [last]

    @property
    def logits(self) -> list[Placement]:
        return self.over_rows() if self.whole else [*self.over_rows()[:-1], Shard(1)]

    @property
    def of_labels(self) -> list[Placement]:
        everywhere: list[Placement] = [Replicate()] * len(self.mesh)
        return {
            "as the rows": self.over_rows(),
            "whole": everywhere,
            "over the last": [*everywhere[:-1], Shard(0)],
        }[self.labels]

    @property
    def beside(self) -> dict[str, list[Placement] | None]:
        """The placements of w and q; None for a plain tensor that every rank holds."""
        everywhere = [Replicate()] * len(self.mesh)
        return {
            "as mostly": {"w": everywhere, "q": self.logits},
            "sharded": {"w": self.over_classes(0), "q": self.logits},
            "whole": {"w": everywhere, "q": self.over_rows()},
            "plain": {"w": None, "q": None},
        }[self.weights]


Loss = Callable[..., Tensor]


def rewritten(setup: Setup) -> Setup:
    """For numbers that need no more than the rewritten graph, in a quarter of the time; not with ALL=1, nor
    under releases whose DTensors exchange more where they run eagerly."""
    return setup if EVERYTHING or TORCH != (2, 13) else replace(setup, rewritten=True)


@dataclass(frozen=True)
class Case:
    """A loss of (z, y, w [V], q [N, V]) in torch, and the same in float64 by its textbook formula.

    Attributes:
        loss, exact: these.
        ignored: the label of the rows that do not count.
        batch: if not 0, what `loss` is given are sequences, z [batch, N / batch, V] and y likewise.
        offsets: what is added to the logits.
        outside: whether the first two labels are V and -1.
    """

    loss: Loss
    exact: Loss
    ignored: int = -100
    batch: int = 0
    offsets: Callable[[int, int], Tensor] = torch.zeros
    outside: bool = False


def _log_p(z: Tensor) -> Tensor:
    return z - reference.log_sum_exp(z)[:, None]


def cross_entropy(terms: Terms) -> Case:
    def loss(z: Tensor, y: Tensor, w: Tensor, q: Tensor) -> Tensor:
        value = F.cross_entropy(
            z,
            y,
            ignore_index=terms.ignore_index,
            reduction=terms.reduction,
            label_smoothing=terms.smoothing,
        )
        if not terms.z_weight:
            return value
        squares = torch.where(y != terms.ignore_index, torch.logsumexp(z, -1).square(), 0.0)
        if terms.reduction == "none":
            return value + terms.z_weight * squares
        count = (y != terms.ignore_index).sum() if terms.reduction == "mean" else 1
        return value + terms.z_weight * squares.sum() / count

    return Case(loss, lambda z, y, w, q: reference.cross_entropy(z, y, terms), terms.ignore_index)


def _weighted(z: Tensor, y: Tensor, w: Tensor, q: Tensor) -> Tensor:
    counts, safe = y != -100, torch.where(y != -100, y, 0)
    log_p = _log_p(z)
    picked = -w[safe] * log_p.gather(1, safe[:, None])[:, 0]
    uniform = -(w * log_p).sum(-1) / z.shape[1]
    rows = torch.where(counts, 0.9 * picked + 0.1 * uniform, 0.0)
    return rows.sum() / torch.where(counts, w[safe], 0.0).sum()


def _entropy(z: Tensor, y: Tensor, w: Tensor, q: Tensor) -> Tensor:
    log_p = F.log_softmax(z, -1)
    return -(log_p.exp() * log_p).sum(-1)


def _accuracy(z: Tensor, y: Tensor, w: Tensor, q: Tensor) -> Tensor:
    right = F.softmax(z, -1).argmax(-1) == y
    return F.cross_entropy(z, y, reduction="none") * torch.where(right, 0.5, 1.0)


def _exact_accuracy(z: Tensor, y: Tensor, w: Tensor, q: Tensor) -> Tensor:
    rows = reference.cross_entropy(z, y, Terms("none"))
    return rows * torch.where(z.argmax(-1) == y, 0.5, 1.0)


def _confidence(z: Tensor, y: Tensor, w: Tensor, q: Tensor) -> Tensor:
    return F.softmax(z, -1).max(-1).values + F.cross_entropy(z, y, reduction="none")


def _exact_confidence(z: Tensor, y: Tensor, w: Tensor, q: Tensor) -> Tensor:
    return _log_p(z).max(-1).values.exp() + reference.cross_entropy(z, y, Terms("none"))


def _shifted(z: Tensor, y: Tensor, w: Tensor, q: Tensor) -> Tensor:
    return F.cross_entropy(z[:, :-1].reshape(-1, z.shape[-1]), y[:, 1:].reshape(-1))


def _exact_shifted(z: Tensor, y: Tensor, w: Tensor, q: Tensor) -> Tensor:
    z, y = z.unflatten(0, (2, -1)), y.unflatten(0, (2, -1))
    return reference.cross_entropy(z[:, :-1].flatten(0, 1), y[:, 1:].flatten(), Terms())


def _special(n: int, v: int) -> Tensor:
    """NaN, +inf and -inf on the first or on the last ranks, or on all; the last row has none."""
    x = torch.zeros(n, v)
    x[0, 1] = x[1, -1] = torch.nan
    x[2, 1] = x[3, -1] = torch.inf
    x[4, : v // 2 + 1], x[5, v // 2 + 1 :] = -torch.inf, -torch.inf
    x[6] = -torch.inf
    return x


def _exact_outside(z: Tensor, y: Tensor, w: Tensor, q: Tensor) -> Tensor:
    wrong = torch.arange(y.shape[0]) < 2
    rows = reference.cross_entropy(z, torch.where(wrong, 0, y), Terms("none"))
    return rows * torch.where(wrong, torch.nan, 1.0)


def _smoothed(z: Tensor, y: Tensor, w: Tensor, q: Tensor) -> Tensor:
    return F.cross_entropy(z, y.clamp_min(0), reduction="none", label_smoothing=0.1)


def _dot(z: Tensor, y: Tensor, w: Tensor, q: Tensor) -> Tensor:
    return F.cross_entropy(z, q, reduction="none")


def _entropy_without_zeros(z: Tensor, y: Tensor, w: Tensor, q: Tensor) -> Tensor:
    """With 0 log 0 = 0, of which torch's own code makes NaN."""
    log_p = F.log_softmax(z, -1)
    log_p = torch.where(log_p == -torch.inf, 0.0, log_p)
    return -(torch.where(z == -torch.inf, 0.0, log_p.exp()) * log_p).sum(-1)


def _many(y: Tensor) -> Tensor:
    return y.clamp_min(0)[:, None].expand(-1, 20)


def as_eager(loss: Loss) -> Case:
    """Logits that are NaN or infinite, where torch's own code in one process is what is right."""
    return Case(loss, loss, offsets=_special)


CASES = {
    "plain": cross_entropy(Terms()),
    "smoothing": cross_entropy(Terms("sum", smoothing=0.1)),
    "rows, z-loss": cross_entropy(Terms("none", z_weight=0.01)),
    "all, ignoring 0": cross_entropy(Terms("mean", 0, 0.2, 0.01)),
    "all, ignoring the last": cross_entropy(Terms("mean", -7, 0.2, 0.01)),  # V - 1, see `terms_of`
    "class weights": Case(lambda z, y, w, q: F.cross_entropy(z, y, weight=w, label_smoothing=0.1), _weighted),
    "soft targets": Case(
        lambda z, y, w, q: F.cross_entropy(z, q), lambda z, y, w, q: -(q * _log_p(z)).sum(-1).mean()
    ),
    "entropy": Case(_entropy, lambda z, y, w, q: -(_log_p(z).exp() * _log_p(z)).sum(-1)),
    "powers": Case(
        lambda z, y, w, q: (
            F.softmax(z, -1).pow(2).sum(-1).log() + torch.logsumexp(0.5 * F.log_softmax(z, -1), -1)
        ),
        lambda z, y, w, q: (2 * _log_p(z)).exp().sum(-1).log() + (_log_p(z) / 2).exp().sum(-1).log(),
    ),
    "normaliser": Case(lambda z, y, w, q: torch.logsumexp(z, -1), lambda z, y, w, q: z.exp().sum(-1).log()),
    "weighed exponentials": Case(
        lambda z, y, w, q: torch.log1p((w * z.exp()).sum(-1)),
        lambda z, y, w, q: (1 + (w * z.exp()).sum(-1)).log(),
    ),
    "accuracy": Case(_accuracy, _exact_accuracy),
    "confidence": Case(_confidence, _exact_confidence),
    "divergence": Case(
        lambda z, y, w, q: F.kl_div(F.log_softmax(z, -1), q, reduction="batchmean"),
        lambda z, y, w, q: (q * (q.log() - _log_p(z))).sum() / z.shape[0],
    ),
    "expectation": Case(
        lambda z, y, w, q: (F.softmax(z, -1) * w).sum(-1) + F.cross_entropy(z, q, reduction="none"),
        lambda z, y, w, q: (_log_p(z).exp() * w).sum(-1) - (q * _log_p(z)).sum(-1),
    ),
    "many labels": Case(
        lambda z, y, w, q: F.log_softmax(z, -1).gather(1, _many(y)).square().sum(-1),
        lambda z, y, w, q: 20 * _log_p(z).gather(1, y.clamp_min(0)[:, None])[:, 0].square(),
    ),
    "fixed column": Case(
        lambda z, y, w, q: F.log_softmax(z, -1)[:, 3] + F.cross_entropy(z, y, reduction="none"),
        lambda z, y, w, q: _log_p(z)[:, 3] + reference.cross_entropy(z, y, Terms("none")),
    ),
    "divergence of rows, a mean": Case(
        lambda z, y, w, q: F.kl_div(F.log_softmax(z, -1), q, reduction="none").sum(-1).mean(),
        lambda z, y, w, q: (q * (q.log() - _log_p(z))).sum(-1).mean(),
    ),
    "causal shift": Case(_shifted, _exact_shifted, batch=2),
    "special numbers": as_eager(lambda z, y, w, q: F.cross_entropy(z, y.clamp_min(0), reduction="none")),
    "special numbers, smoothing": as_eager(_smoothed),
    "special numbers, entropy": Case(_entropy, _entropy_without_zeros, offsets=_special),
    "special numbers, soft targets": as_eager(_dot),
    "special numbers, confidence": as_eager(lambda z, y, w, q: F.softmax(z, -1).max(-1).values),
    "labels outside": Case(
        lambda z, y, w, q: F.cross_entropy(z, y, reduction="none"), _exact_outside, outside=True
    ),
}


Name = str | Terms  # one of CASES, or a cross entropy that has no name


def case_of(name: Name, V: int) -> Case:
    """The case; its `ignored` of -7 stands for V - 1."""
    if isinstance(name, Terms):
        return cross_entropy(name)
    case = CASES[name]
    return cross_entropy(Terms("mean", V - 1, 0.2, 0.01)) if case.ignored == -7 else case


def tensors(setup: Setup, ignored: int) -> dict[str, Tensor]:
    """Hidden states, head, labels, class weights and soft targets: the same in every process.

    Half of the first half of the rows is ignored, or all of it: ranks that share rows have unequal numbers
    that count, or some have none.
    """
    generator = torch.Generator().manual_seed(0)
    h = torch.randn(setup.N, D, generator=generator, dtype=torch.float64)
    W = 2 * torch.randn(setup.V, D, generator=generator, dtype=torch.float64)
    W[-1] = W[0]  # a tie over ranks
    y = torch.randint(0, setup.V, (setup.N,), generator=generator)
    y[0], y[1], y[-1] = 0, setup.V - 1, setup.V // 2
    y[2 if setup.counting == "mostly the last" else 0 : setup.N // 2] = ignored
    w = torch.rand(setup.V, generator=generator, dtype=torch.float64)
    q = torch.randn(setup.N, setup.V, generator=generator, dtype=torch.float64).softmax(-1)
    return {
        "h": h.to(setup.dtype),
        "W": W.to(setup.dtype),
        "y": y,
        "w": w.to(setup.dtype),
        "q": q.to(setup.dtype),
    }


def given_to(name: Name, setup: Setup) -> dict[str, Tensor]:
    """What a case is computed of, with `zero` to add to the logits."""
    case = case_of(name, setup.V)
    given = tensors(setup, case.ignored)
    if case.outside:
        given["y"][:2] = torch.tensor([setup.V, -1])
    return given | {"zero": case.offsets(setup.N, setup.V).to(setup.dtype)}


def distributed(setup: Setup, given: dict[str, Tensor]) -> dict[str, Any]:
    """The same as DTensors, with `zero` to add to the logits, whose gradient is theirs."""
    mesh = setup.device_mesh()
    placements: dict[str, list[Placement] | None] = setup.beside | {
        "h": [Shard(0)] * len(setup.mesh) if setup.sequence_parallel else setup.over_rows(),
        "W": setup.over_classes(0),
        "y": setup.of_labels,
        "zero": setup.logits,
    }
    given = {"zero": torch.zeros(setup.N, setup.V, dtype=setup.dtype)} | given
    made = {
        name: x.to(setup.device)
        if (where := placements[name]) is None
        else distribute_tensor(x, mesh, where, src_data_rank=None)
        for name, x in given.items()
    }
    for name in ("h", "W", "zero"):
        made[name].requires_grad_()
    return made


def upstream_of(loss: Tensor) -> Tensor:
    return torch.linspace(-1, 2, loss.numel(), dtype=torch.float64).reshape(loss.shape) + 0.37


def on_rank(rank: int, jobs: list[tuple[Name, Setup]]) -> dict[Any, dict[str, Any]]:
    """Of each job: the loss, whole and as this rank has it, and the gradients."""
    with clean_slate():
        return {job: attempt(run, *job) for job in jobs}


def everywhere(jobs: list[tuple[Name, Setup]], size: int, device: str) -> list[dict[Any, dict[str, Any]]]:
    """What each of `size` ranks gives of the jobs on a device, by the job; of fewer, on smaller meshes, where
    there are not as many GPUs."""
    meshes = [mesh_there(setup.mesh, device) for _, setup in jobs]
    there = [
        (name, replace(setup, device=device, mesh=mesh))
        for (name, setup), mesh in zip(jobs, meshes, strict=True)
    ]
    if meshes:
        size = math.prod(meshes[0])
    ranks = spawn(on_rank, size, there, device=device)
    return [Outcomes(zip(jobs, (found[job] for job in there), strict=True)) for found in ranks]


def collectives(graph: GraphModule) -> dict[str, int]:
    """How often a graph calls each collective."""
    names = (str(node.target) for node in graph.graph.nodes if "c10d" in str(node.target))
    return dict(Counter(name.split(".")[1] for name in names if "wait" not in name))


def exchanged(graph: GraphModule) -> list[int]:
    """How many numbers each collective of a graph gives."""
    nodes = [node for node in graph.graph.nodes if "c10d" in str(node.target)]
    return [node.meta["val"].numel() for node in nodes if "wait" not in str(node.target)]


class Exchanged(CommDebugMode):
    """Counts collectives as they run, for graphs of DTensors, which have none; of compiled code too,
    which torch does not run under other modes.

    `sizes` is how many numbers each of them gave.

    NOTE It also sees what DTensor does outside the graph: torch 2.11 gathers the gradient of `zero`.
    """

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[int] = []

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        return True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        so_far = self.get_total_counts()
        out = super().__torch_dispatch__(func, types, args, kwargs)
        if self.get_total_counts() > so_far:
            self.sizes.append(out.numel())
        return out

    @property
    def counts(self) -> dict[str, int]:
        return {str(op).split(".")[-1]: count for op, count in self.get_comm_counts().items()}


def run(name: Name, setup: Setup) -> dict[str, Any]:
    torch._dynamo.reset()
    case = case_of(name, setup.V)
    x = distributed(setup, given_to(name, setup))

    def f(h: Tensor, W: Tensor, zero: Tensor, y: Tensor, w: Tensor, q: Tensor) -> Tensor:
        if setup.sequence_parallel:
            h = h.redistribute(placements=setup.over_rows())
        if case.batch:
            h, zero, y = (x.unflatten(0, (case.batch, -1)) for x in (h, zero, y))
        z = F.linear(h, W)
        return case.loss(z + zero if setup.strategy == "auto" else z, y, w, q)

    before = sites(), misses()
    counts = counters["inductor_ce"]
    counts["token_chunks"] = counts["vocab_slabs"] = 0
    options = {} if setup.strategy == "auto" else {"strategy": setup.strategy, "memory_budget": 0.34}
    graphs = Graphs()
    if setup.rewritten:
        compiled = torch.compile(f, backend=Rewritten())
    else:
        compiled, graphs = (compile_with_codegen if setup.code else compile_without_codegen)(f, **options)
    forward, backward = Exchanged(), Exchanged()
    computed: list[int | None] = []

    def rows_of_piece(*given: Any) -> int | None:
        computed.append(counted.rows_of_piece(*given))
        return computed[-1]

    with (
        implicit_replication() if setup.weights == "plain" else nullcontext(),
        mock.patch.object(products, "rows_of_piece", rows_of_piece),
        forward if setup.rewritten else nullcontext(),
    ):
        loss = compiled(x["h"], x["W"], x["zero"], x["y"], x["w"], x["q"])
    upstream = upstream_of(loss).to(loss.dtype)
    upstream = distribute_tensor(
        upstream,
        loss.device_mesh,
        setup.over_rows() if loss.ndim else [Replicate()] * loss.device_mesh.ndim,
        src_data_rank=None,
    )
    with backward if setup.rewritten else nullcontext():
        loss.backward(upstream)
    x["zero"].grad = torch.zeros_like(x["zero"]) if x["zero"].grad is None else x["zero"].grad
    return {
        "sites": sites() - before[0],
        "misses": misses() - before[1],
        "strategies": {name: counts[name] for name in ("token_chunks", "vocab_slabs") if counts[name]},
        "loss": loss.detach().full_tensor(),
        "collectives": (
            (forward.counts, backward.counts) if setup.rewritten else tuple(map(collectives, graphs.final))
        ),
        "exchanged": (
            forward.sizes + backward.sizes
            if setup.rewritten
            else [n for g in graphs.final for n in exchanged(g)]
        ),
        "rows": computed,
        "loss placements": tuple(map(str, loss.placements)),
        "dz": x["zero"].grad.full_tensor(),
        "dz shard": x["zero"].grad.redistribute(placements=setup.logits).to_local(),  # whole in torch 2.11
        "dW": x["W"].grad.full_tensor(),
        "dW placements": tuple(map(str, x["W"].grad.placements)),
        "dh": x["h"].grad.full_tensor(),
        "dh placements": tuple(map(str, x["h"].grad.placements)),
    }


def exact(name: Name, setup: Setup) -> dict[str, Tensor]:
    """The same in float64 of logits rounded as on the ranks, in one process."""
    case = case_of(name, setup.V)
    x = {k: v.double() if v.is_floating_point() else v for k, v in given_to(name, setup).items()}
    h, W = x["h"].requires_grad_(), x["W"].requires_grad_()
    z = F.linear(h, W)
    z = z + (z.detach().to(setup.dtype).double() - z.detach()) + x["zero"]
    z.retain_grad()
    loss = case.exact(z, x["y"], x["w"], x["q"])
    loss.backward(upstream_of(loss))
    return {"loss": loss.detach(), "dz": z.grad, "dW": W.grad, "dh": h.grad}


def check(ranks: list[dict[Any, dict[str, Any]]], name: Name, setup: Setup) -> None:
    """Every rank has the loss and the gradients of the whole vocabulary and of all rows."""
    rtol = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 1.25e-3}[
        setup.dtype
    ]
    truth = exact(name, setup)
    for rank in ranks:
        result = rank[name, setup]
        assert (result["sites"], result["misses"]) == (1, 0)
        torch.testing.assert_close(
            result["loss"], ranks[0][name, setup]["loss"], rtol=0, atol=0, equal_nan=True
        )
        if setup.strategy != "auto":
            assert result["strategies"] == {setup.strategy: 1}
            truth.pop("dz", None)
        for key, value in truth.items():
            torch.testing.assert_close(result[key].double(), value, rtol=rtol, atol=rtol, equal_nan=True)


__all__ = [
    "CASES",
    "Case",
    "D",
    "DTensor",
    "Name",
    "Setup",
    "check",
    "distributed",
    "everywhere",
    "exact",
    "on_rank",
    "replace",
    "rewritten",
    "run",
    "tensors",
]
