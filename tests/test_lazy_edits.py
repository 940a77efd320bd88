"""Lazy logits that are made, once, by everything that needs them; edits, hooks, what is no longer there."""

from __future__ import annotations

import copy
import io
import pickle
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from lazy_cases import B, Case, T, V, assert_same, outcome, rows_made
from torch import Tensor, nn
from torch.distributed import _functional_collectives as funcol
from torch.utils.checkpoint import checkpoint

from inductor_ce.common.errors import LazyLogitsError

Y = torch.arange(B * T)


def saved_and_loaded(z: Tensor) -> Tensor:
    file = io.BytesIO()
    torch.save({"logits": z}, file)
    file.seek(0)
    return torch.load(file)["logits"]


READERS: dict[str, Callable[[Tensor], Any]] = {
    "arithmetic": lambda z: (z + 1, 2 * z, z @ torch.ones(V, dtype=z.dtype), -z, z > 0),
    "the other operand": lambda z: (
        torch.ones_like(z).detach() - z,
        torch.maximum(torch.zeros(V).double(), z),
    ),
    "sum": lambda z: z.sum(),
    "mean over time": lambda z: torch.mean(z, dim=1),
    "numpy": lambda z: z.detach().numpy().tolist(),
    "asarray": lambda z: np.asarray(z.detach()).tolist(),
    "numpy function": lambda z: float(np.sum(z.detach().numpy())),
    "tolist": lambda z: z.tolist(),
    "item": lambda z: z[0, 0, 0].item(),
    "float": lambda z: float(z.sum()),
    "pickle": lambda z: pickle.loads(pickle.dumps(z.detach())),
    "pickle with a gradient": lambda z: pickle.loads(pickle.dumps(z)).shape,
    "deepcopy": lambda z: copy.deepcopy(z),
    "deepcopy of a leaf": lambda z: copy.deepcopy(z.detach()),
    "copy": lambda z: copy.copy(z.detach()),
    "save": lambda z: saved_and_loaded(z.detach()),
    "dlpack": lambda z: torch.from_dlpack(z.detach()),
    "dlpack with a gradient": lambda z: torch.from_dlpack(z),
    "dlpack of numpy": lambda z: np.from_dlpack(z.detach()).tolist(),
    "cat": lambda z: torch.cat([z, torch.ones(B, 1, V).double()], 1),
    "stack": lambda z: torch.stack([z, z]),
    "cross_entropy": lambda z: F.cross_entropy(z.view(-1, V), Y),
    "module": lambda z: nn.CrossEntropyLoss()(z.flatten(0, 1), Y),
    "einsum": lambda z: torch.einsum("btv,btv->b", z, z),
    "where": lambda z: torch.where(z > 0, z, torch.zeros((), dtype=z.dtype)),
    "columns": lambda z: z[..., :3],
    "equal": lambda z: (torch.equal(z, z), bool((z == z).all()), z.allclose(z)),
    "in": lambda z: 5e5 in z,
    "storage": lambda z: (z.untyped_storage().nbytes(), z.detach().storage().tolist()),
    "pointer": lambda z: z.data_ptr() != 0,
    "sort": lambda z: torch.sort(z, dim=-1),
    "nonzero": lambda z: (z > 1).nonzero(),
    "functional transform of what has a gradient": lambda z: torch.func.vmap(lambda row: row.sin().sum())(z),
    "functional transform": lambda z: torch.func.vmap(lambda row: row.sum())(z.detach()),
    "gradient of a function": lambda z: torch.func.grad(lambda x: (x * z.detach()).sum())(
        torch.ones(V).double()
    ),
}


@pytest.mark.parametrize("name", READERS)
def test_readers(name: str) -> None:
    case, read = Case(), READERS[name]
    theirs = outcome(read, case.eager)
    assert_same(outcome(read, case.z), theirs)


def test_made_once(monkeypatch: pytest.MonkeyPatch) -> None:
    made, case = rows_made(monkeypatch), Case()
    for z in (case.z, case.eager):
        (z.sum() + (z * z).mean() + z[:, -1].sum() + z.float().sum()).backward()
    assert case.z.is_made
    assert made == [B * T]
    case.same_gradients()


def test_to_dlpack_never_reads_what_is_not_there() -> None:
    """It asks nobody: C++ finds no memory."""
    with pytest.raises(RuntimeError):
        torch.utils.dlpack.to_dlpack(Case().z.detach())


# Collectives


@pytest.fixture
def one_rank(tmp_path: Path) -> Iterator[None]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def gathered(z: Tensor) -> Tensor:
    (result,) = [torch.empty_like(z).contiguous()]
    dist.all_gather([result], z.detach())
    return result


COLLECTIVES: dict[str, Callable[[Tensor], Any]] = {
    "all_gather": gathered,
    "all_reduce": lambda z: [x := z.detach(), dist.all_reduce(x)][0],
    "broadcast": lambda z: [x := z.detach(), dist.broadcast(x, 0)][0],
    "functional": lambda z: funcol.all_gather_tensor(z.detach(), 0, dist.group.WORLD) + 0,
    "with a gradient": lambda z: funcol.all_reduce(z, "sum", dist.group.WORLD) + 0,
}


@pytest.mark.usefixtures("one_rank")
@pytest.mark.parametrize("name", COLLECTIVES)
def test_collectives(name: str) -> None:
    case = Case()
    torch.testing.assert_close(COLLECTIVES[name](case.z) * 1, COLLECTIVES[name](case.eager))


# Edits


def operator_edit(z: Tensor) -> None:
    z += 1


def item_edit(z: Tensor) -> None:
    z[:, 1] = 7.0


EDITS: dict[str, Callable[[Tensor], Any]] = {
    "mul_": lambda z: z.mul_(2),
    "operator": operator_edit,
    "setitem": item_edit,
    "masked_fill_": lambda z: z.masked_fill_(torch.arange(V) % 2 == 0, -1.0),
    "out": lambda z: torch.add(torch.ones_like(z), 1, out=z),
    "zero_": lambda z: z.zero_(),
    "copy_": lambda z: z.copy_(torch.arange(V)),
    "activation": lambda z: F.relu(z, inplace=True),
    "clamp_": lambda z: torch.clamp_(z, -0.5, 0.5),
    "foreach": lambda z: torch._foreach_mul_([z], 2.0),
    "generator": lambda z: z.fill_(3.0),
}
VIEWS: dict[str, Callable[[Tensor], Tensor]] = {
    "view": lambda z: z.view(-1, V),
    "last": lambda z: z[:, -1:],
    "detach": lambda z: z.detach(),
    "data": lambda z: z.data,
    "row": lambda z: z[0],
    "unsqueeze": lambda z: z.unsqueeze(0),
    "view of a view": lambda z: z.view(-1, V)[2:8].detach(),
    "narrow": lambda z: z.narrow(1, 1, 3),
    "split": lambda z: z.split(2, 1)[1],
}
COPIES: dict[str, Callable[[Tensor], Tensor]] = {
    "float": lambda z: z.float(),
    "clone": lambda z: z.clone(),
    "rows by index": lambda z: z[torch.tensor([1, 0])],
    "mask": lambda z: z[torch.ones(B, T, dtype=torch.bool)],
    "a cast of a view": lambda z: z[:, -1].float(),
}


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("edit", EDITS)
def test_edits(edit: str, grad: bool) -> None:
    """The tensor itself, and every name for it, reads as edited, in value and gradient."""
    case = Case()
    x, y = (case.z, case.eager) if grad else (case.z.detach(), case.eager.detach())
    if grad and edit == "out":
        assert outcome(EDITS[edit], x) is outcome(EDITS[edit], y) is RuntimeError
        return
    EDITS[edit](x)
    EDITS[edit](y)
    assert (x.requires_grad, x.is_leaf, x.grad_fn is None) == (y.requires_grad, y.is_leaf, y.grad_fn is None)
    torch.testing.assert_close(x.clone(), y.clone(), rtol=0, atol=0)
    if grad:
        for z in (x, y):
            z.square().sum().backward()
        case.same_gradients()


@pytest.mark.parametrize("made", [False, True])
@pytest.mark.parametrize("view", VIEWS)
def test_an_edit_of_a_view_is_seen_in_the_base_and_the_reverse(view: str, made: bool) -> None:
    case = Case()
    results = []
    for z in (case.z, case.eager):
        z = z.detach()
        if made:
            z.sum()
        base_edited = VIEWS[view](z)
        view_edited, other = VIEWS[view](z), z.view(T, B, V)[1:]
        view_edited.mul_(3)
        z.add_(1)
        results.append([x.clone() for x in (z, base_edited, view_edited, other, z[0], z.float())])
    assert_same([x * 1 for x in results[0]], results[1])


def test_an_edit_of_a_view_has_its_gradient() -> None:
    case = Case()
    for z in (case.z, case.eager):
        last = z[:, -1]
        last.mul_(3)
        (z.square().sum() + last.sum()).backward()
    case.same_gradients()


@pytest.mark.parametrize("read_before", [False, True])
@pytest.mark.parametrize("name", COPIES)
def test_a_copy_keeps_what_was_there_before_the_edit(name: str, read_before: bool) -> None:
    case = Case()
    results = []
    for z in (case.z, case.eager):
        kept = COPIES[name](z)
        if read_before:
            kept.sum()
        z.mul_(3)
        results.append(kept * 1)
        (kept.sum() + z.sum()).backward()
    assert_same(*results)
    case.same_gradients()


def test_what_is_written_through_its_memory_is_read() -> None:
    for write in (
        lambda z: z.numpy().fill(2),
        lambda z: z.data.fill_(2),
        lambda z: z.untyped_storage().fill_(0),
    ):
        results = []
        case = Case()
        for z in (case.z.detach(), case.eager.detach()):
            z.sum()
            write(z)
            results.append(z * 1)
            assert not getattr(z, "is_ours", False)
        assert_same(*results)


# Hooks, and gradients of the logits themselves


class Scaled(torch.autograd.Function):
    """A gradient ten times that of the identity."""

    @staticmethod
    def forward(ctx: Any, z: Tensor) -> Tensor:
        return z.view_as(z)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> Tensor:
        return upstream * 10


class Squared(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, z: Tensor) -> Tensor:
        ctx.save_for_backward(z)
        return z * z

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> Tensor:
        (z,) = ctx.saved_tensors
        return upstream * 2 * z


WAYS: dict[str, Callable[[Tensor], Tensor]] = {
    "all": lambda z: z.sin().sum(),
    "cast": lambda z: z.float().sin().sum(),
    "slice": lambda z: z[:, -1].sin().sum(),
    "slice of a cast": lambda z: z.float()[:, -1].sin().sum(),
    "rows": lambda z: z[torch.tensor([0])].sin().sum(),
    "view": lambda z: z.view(-1, V)[3:].sin().sum(),
    "both": lambda z: z.sin().sum() + z[:, 0].sum() + z.bfloat16().float().sum(),
}


@pytest.mark.parametrize("function", [Scaled, Squared])
@pytest.mark.parametrize("way", WAYS)
def test_autograd_functions(way: str, function: type[torch.autograd.Function]) -> None:
    """No gradient goes round them, and none is lost."""
    case = Case()
    for z in (case.z, case.eager):
        result = function.apply(z)
        assert result.requires_grad
        WAYS[way](result).backward()
    case.same_gradients()


@pytest.mark.parametrize("way", WAYS)
def test_hooks(way: str) -> None:
    case = Case()
    seen: list[Tensor] = []
    for z in (case.z, case.eager):
        z.register_hook(lambda gradient: [seen.append(gradient), gradient * 3][1])
        z.retain_grad()
        WAYS[way](z).backward()
        seen.append(z.grad)
    case.same_gradients()
    assert_same(seen[:2], seen[2:])


@pytest.mark.parametrize("way", WAYS)
def test_gradients_of_the_logits(way: str) -> None:
    """Where rows have been taken already, it is an error."""
    case = Case()
    (theirs,) = torch.autograd.grad(WAYS[way](case.eager), case.eager)
    loss = WAYS[way](case.z)
    if way in ("all", "cast", "both"):
        assert_same(torch.autograd.grad(loss, case.z)[0], theirs)
        return
    for watch in (
        lambda: torch.autograd.grad(loss, case.z),
        lambda: torch.autograd.grad(loss, [case.z]),
        case.z.retain_grad,
        lambda: case.z.register_hook(print),
    ):
        with pytest.raises(LazyLogitsError, match="Rows have been taken of logits that were returned lazily"):
            watch()


def test_gradients_of_edited_logits() -> None:
    case = Case()
    results = []
    for z in (case.z, case.eager):
        z.mul_(2)
        results.append(torch.autograd.grad(z.square().sum(), z)[0])
    assert_same(*results)


def test_an_edit_of_watched_logits_is_an_error() -> None:
    z = Case().z
    z.retain_grad()
    with pytest.raises(LazyLogitsError, match="written to while they, or a view of them, have hooks"):
        z.mul_(2)


@pytest.mark.parametrize(
    "form", [lambda z: z, lambda z: z.float(), lambda z: z.view(-1, V), lambda z: z[:, -1]]
)
@pytest.mark.parametrize("backward", [torch.autograd.backward, lambda z, g: z.backward(g)])
def test_backward_from_the_logits(form: Callable[[Tensor], Tensor], backward: Callable[..., Any]) -> None:
    case = Case()
    for z in (case.z, case.eager):
        z = form(z)
        backward(z, torch.linspace(0, 1, z.numel(), dtype=z.dtype).view(z.shape))
    case.same_gradients()


def test_backward_twice() -> None:
    case = Case()
    for z in (case.z, case.eager):
        loss = z.square().sum() + z[:, -1].exp().sum()
        loss.backward(retain_graph=True)
        loss.backward()
    case.same_gradients()


def test_backward_through_a_gradient_is_an_error() -> None:
    case = Case()
    (gradient,) = torch.autograd.grad(case.z.square().sum(), case.parts[0], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


def test_a_leaf_of_its_own() -> None:
    """Logits that are detached and asked for a gradient keep it to themselves."""
    case = Case()
    results = []
    for z in (case.z, case.eager):
        leaf = z.detach().requires_grad_()
        (leaf.square().sum() + leaf[:, -1].sum() + leaf.float().sum()).backward()
        results.append(leaf.grad)
    assert_same(*results)
    assert case.parts[0].grad is case.parts[1].grad is None


def nothing(z: Tensor) -> None:
    pass


@pytest.mark.parametrize("before", [nothing, Tensor.sum, lambda z: z.mul_(2), lambda z: z[:, -1]])
@pytest.mark.parametrize("detach", [Tensor.detach_, torch.detach_])
def test_detached_in_place(before: Callable[[Tensor], Any], detach: Callable[[Tensor], Tensor]) -> None:
    """A leaf from then on; what was made of it before keeps its gradient."""
    case = Case()
    results = []
    for z in (case.z, case.eager):
        kept = [before(z), z.float(), z.view(-1, V), z[0]][1:]
        assert detach(z) is z
        sums = [x.sin().sum() for x in kept]
        torch.stack([x.double() for x in sums]).sum().backward()
        results.append([z * 1, z.requires_grad, z.is_leaf, z.grad_fn])
        z.requires_grad_().retain_grad()
        z.square().sum().backward()
        results[-1] += [z.detach_().grad, z.mul_(3).view(-1) * 1]
    assert_same(*results)
    case.same_gradients()


def test_a_view_is_not_detached_in_place() -> None:
    for z in (Case().z, Case().eager):
        with pytest.raises(RuntimeError, match="Can't detach views in-place"):
            z.view(-1, V).detach_()


def edit_a_view(z: Tensor) -> Tensor:
    view = z.view(-1, V)
    view[2:].mul_(3)
    return view


def edit_below_a_view(z: Tensor) -> Tensor:
    view = z.view(-1, V)
    z.mul_(3)
    return view


def edit_all(z: Tensor) -> Tensor:
    z.mul_(3)
    return z


@pytest.mark.parametrize("edit", [edit_all, edit_a_view, edit_below_a_view])
def test_backward_from_edited_logits(edit: Callable[[Tensor], Tensor]) -> None:
    """Alone and in a list, which is handed to C++ as it is."""
    for backward in (
        lambda z, edited, g: edited.backward(g),
        lambda z, edited, g: torch.autograd.backward([edited], [g]),
        lambda z, edited, g: torch.autograd.backward([z.sum(), edited, z], [None, g, g.view(z.shape)]),
        lambda z, edited, g: torch.autograd.backward((edited, z.exp().sum()), (g, None)),
    ):
        case = Case()
        for z in (case.z, case.eager):
            edited = edit(z)
            backward(z, edited, torch.linspace(0, 1, z.numel(), dtype=z.dtype).view(edited.shape))
        case.same_gradients()


def test_an_optimizer_of_logits() -> None:
    case = Case()
    results = []
    for z in (case.z, case.eager):
        leaf = z.detach().requires_grad_()
        optimizer = torch.optim.SGD([leaf], lr=0.1)
        for _ in range(3):
            optimizer.zero_grad()
            leaf.square().sum().backward()
            optimizer.step()
        assert leaf.is_leaf
        results.append([leaf.grad, leaf.detach() * 1])
    assert_same(*results)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoints(reentrant: bool) -> None:
    case = Case()
    for z in (case.z, case.eager):
        checkpoint(lambda z: mixed(z), z, use_reentrant=reentrant).backward()
    case.same_gradients()


def mixed(z: Tensor) -> Tensor:
    return z.sin().sum() + z[:, -1].exp().sum() + z.float().sin().sum()


def test_modules_with_hooks() -> None:
    case, seen = Case(), []
    for z in (case.z, case.eager):
        layer = nn.Linear(V, 2, bias=False, dtype=z.dtype)
        layer.weight.data.fill_(0.5)
        layer.register_forward_pre_hook(lambda module, args: (args[0] * 2,))
        layer.register_full_backward_hook(lambda module, inward, outward: seen.append(inward[0]))
        layer(z).square().sum().backward()
    assert_same(*seen)
    case.same_gradients()


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_whoever_looks_first_takes_no_gradient_away(mode: Any) -> None:
    case = Case()
    for z in (case.z, case.eager):
        with mode():
            z.sum()
        z.square().sum().backward()
    case.same_gradients()


def test_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    made, z = rows_made(monkeypatch), Case().z
    start, found = threading.Barrier(4), []

    def read() -> None:
        start.wait()
        found.append(z.made())

    threads = [threading.Thread(target=read) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert made == [B * T]
    assert all(each is found[0] for each in found)


# Never a wrong number


def step_of_an_optimizer(h: Tensor, W: Tensor) -> None:
    W.grad = torch.ones_like(W)
    torch.optim.AdamW([W], lr=0.1, foreach=True).step()


@torch.no_grad()
def in_place(h: Tensor, W: Tensor) -> None:
    W.add_(1)


@torch.no_grad()
def all_in_place(h: Tensor, W: Tensor) -> None:
    torch._foreach_add_([W], 1)


@torch.no_grad()
def hidden_states(h: Tensor, W: Tensor) -> None:
    h[0].zero_()


def freed(h: Tensor, W: Tensor) -> None:
    W.untyped_storage().resize_(0)


CHANGES = {
    step_of_an_optimizer: r"the weight \[16x4\] was changed in place since",
    in_place: r"the weight \[16x4\] was changed in place since",
    all_in_place: r"the weight \[16x4\] was changed in place since",
    hidden_states: "the hidden states was changed in place since",
    freed: r"the weight \[16x4\] was freed since",
}
LATE: list[Callable[[Tensor], Any]] = [
    *(lambda z: z.sum(), lambda z: z[:, -1], lambda z: z.detach().argmax(-1), lambda z: z.float()),
    *(lambda z: z.clone(), lambda z: z.mul_(2), lambda z: z.view(-1, V), lambda z: z.detach().numpy()),
]


@pytest.mark.parametrize("change", CHANGES)
def test_what_is_no_longer_there(change: Callable[[Tensor, Tensor], None]) -> None:
    for late in LATE:
        case = Case()
        forms = [case.z, case.z.float(), case.z[:, -1:].contiguous(), case.z.detach().unsqueeze(0)[0]]
        change(*case.parts)
        for z in forms:
            with pytest.raises(LazyLogitsError, match=CHANGES[change]) as error:
                late(z).sum()
            assert not z.is_made
            assert "before backward()" if change is freed else "before optimizer.step()" in str(error.value)
            assert 'returned_logits="eager"' in str(error.value)


@pytest.mark.parametrize("change", CHANGES)
def test_what_was_made_before_is_still_there(change: Callable[[Tensor, Tensor], None]) -> None:
    case = Case()
    case.z.sum()
    change(*case.parts)
    assert_same(case.z * 1, case.eager * 1)
    assert_same(case.z[:, -1] * 1, case.eager[:, -1] * 1)
