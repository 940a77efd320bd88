"""Logits that a compiled function returns beside its loss: told, and, with "nan", dropped."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from harness import Graphs, compile_rewritten, compile_without_codegen, misses, sites
from pairwise import EVERYTHING
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import inductor_ce
from inductor_ce.common.compat.dynamo import returns_to_program
from inductor_ce.common.errors import OptionError

B, S, D, V = 2, 5, 8, 37

IN_MEMORY = "The logits are returned, so all of them are in memory"
RETURNED = IN_MEMORY + '; the option returned_logits="nan" returns NaN in their place.'
DROPPED = "The logits that are returned are dropped: NaN is returned in their place."
KEPT = IN_MEMORY + ': returned_logits="nan" does not apply, because '


def inputs(n: int = S) -> tuple[Tensor, Tensor]:
    y = torch.randint(0, V, (B, n))
    y[0, 1] = -100
    return torch.randn(B, n, D, requires_grad=True), y


def loss_of(logits: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(logits.view(-1, V), y.view(-1))


# What is written, and what the user gets of it: the loss, the logits


@dataclasses.dataclass
class CausalLMOutput:
    """As transformers' outputs are."""

    loss: Tensor | None = None
    logits: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lm_head = nn.Linear(D, V, bias=False)


class NanoGPT(Model):
    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        logits = self.lm_head(x)
        loss = F.cross_entropy(logits.view(-1, logits.size(-1)), y.view(-1), ignore_index=-100)
        return loss, logits


class Transformers(Model):
    """The logits in float32, the shift by padded labels, and a dataclass."""

    def forward(self, x: Tensor, y: Tensor) -> CausalLMOutput:
        logits = self.lm_head(x)
        logits = logits.float()
        shifted = F.pad(y, (0, 1), value=-100)[..., 1:].contiguous()
        loss = F.cross_entropy(logits.view(-1, V), shifted.view(-1))
        return CausalLMOutput(loss=loss, logits=logits)


class ShiftedBySlices(Model):
    """As transformers' models of some time ago, and a dictionary."""

    def forward(self, x: Tensor, y: Tensor) -> dict[str, Tensor]:
        logits = self.lm_head(x).float()
        shift_logits = logits[..., :-1, :].contiguous()
        shift_labels = y[..., 1:].contiguous()
        loss = nn.CrossEntropyLoss()(shift_logits.view(-1, V), shift_labels.view(-1))
        return {"loss": loss, "logits": logits}


class Capped(Model):
    """As Gemma 2: what is returned is what the loss reads, after the soft-cap."""

    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        logits = 5.0 * torch.tanh(self.lm_head(x) / 5.0)
        return loss_of(logits, y), logits


class CastBeforeTheLoss(Model):
    """What is returned is as it was before the loss took it to float32."""

    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        logits = self.lm_head(x)
        return loss_of(logits.float(), y), logits


class ClassesFirst(Model):
    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        logits = self.lm_head(x)
        return F.cross_entropy(logits.transpose(1, 2), y), logits


class Detached(Model):
    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        logits = self.lm_head(x)
        return loss_of(logits, y), logits.detach()


class Viewed(Model):
    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        logits = self.lm_head(x).view(-1, V)
        return F.cross_entropy(logits, y.view(-1)), logits.T.view(V, B, -1)


class TwoLosses(Model):
    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        logits = self.lm_head(x)
        return loss_of(logits, y) + 1e-2 * logits.logsumexp(-1).square().mean(), logits


class WithAccuracy(Model):
    """The accuracy is a statistic of the rows: a site of its own, that does not need the logits."""

    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        logits = self.lm_head(x)
        with torch.no_grad():
            correct = (logits.argmax(-1) == y).sum()
        return loss_of(logits, y), logits, correct


class ShapeRead(Model):
    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        logits = self.lm_head(x)
        return loss_of(logits, y) + torch.zeros_like(logits).sum(), logits


DROPPABLE = [
    *(NanoGPT, Transformers, ShiftedBySlices, Capped, CastBeforeTheLoss, ClassesFirst, Detached, Viewed),
    *(TwoLosses, WithAccuracy, ShapeRead),
]


def unpacked(output: Any) -> tuple[Tensor, Tensor]:
    if isinstance(output, dict):
        return output["loss"], output["logits"]
    if isinstance(output, CausalLMOutput):
        assert output.loss is not None
        assert output.logits is not None
        return output.loss, output.logits
    return output[:2]


def is_one_nan(x: Tensor) -> bool:
    return bool(x.isnan().all()) and set(x.stride()) == {0} and x.untyped_storage().nbytes() == x.itemsize


def large(graphs: Graphs, n: int = B * S * V) -> list[Any]:
    """What the compiled graphs return of the size of the logits, for the user or for the backward."""
    outputs = [node for gm in graphs.final for node in gm.graph.output_node().all_input_nodes]
    return [node for node in outputs if isinstance(v := node.meta.get("val"), Tensor) and v.numel() == n]


@pytest.mark.in_turns
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("model", DROPPABLE)
def test_dropped(model: type[Model], dtype: torch.dtype) -> None:
    """The loss and its gradients are the same, the logits are NaN, and the report says so."""
    module = model().to(dtype)
    x, y = inputs()
    x = x.detach().to(dtype).requires_grad_()
    loss, logits = unpacked(module(x, y))
    expected = torch.autograd.grad(loss, (x, module.lm_head.weight))
    compiled, graphs = compile_without_codegen(module, returned_logits="nan")
    ours, dropped = unpacked(compiled(x, y))
    assert is_one_nan(dropped)
    assert (dropped.shape, dropped.dtype, dropped.device) == (logits.shape, logits.dtype, logits.device)
    assert not dropped.requires_grad
    tolerance = {} if dtype == torch.float32 else {"rtol": 2e-2, "atol": 2e-2}
    torch.testing.assert_close(ours.float(), loss.float(), **tolerance)
    for a, b in zip(torch.autograd.grad(ours, (x, module.lm_head.weight)), expected, strict=True):
        torch.testing.assert_close(a, b, **tolerance)
    report = inductor_ce.explain(module, x, y) if EVERYTHING or model is NanoGPT else graphs.report
    assert (sites(), misses()) == (len(report.sites), 0)
    assert {site.head for site in report.sites} == {DROPPED}
    assert f"head       {DROPPED}" in str(report)
    assert report.to_dict()["sites"][0]["head"] == DROPPED
    (kept,) = {node.target for node in large(graphs)} - {torch.ops.aten.expand.default}
    assert kept in (
        torch.ops.aten.mm.default,
        torch.ops.aten.view.default,
    )  # the raw logits, for the backward


@pytest.mark.parametrize("model", DROPPABLE)
def test_eager(model: type[Model]) -> None:
    module, (x, y) = model(), inputs()
    loss, logits = unpacked(module(x, y))
    compiled, graphs = compile_rewritten(module, returned_logits="eager")
    ours, kept = unpacked(compiled(x, y))
    torch.testing.assert_close(kept, logits)
    torch.testing.assert_close(ours, loss)
    assert kept.requires_grad == logits.requires_grad
    assert {site.head for site in graphs.report.sites} == {RETURNED}


def test_without_a_gradient() -> None:
    module, (x, y) = NanoGPT(), inputs()
    compiled, graphs = compile_without_codegen(module, returned_logits="nan")
    with torch.no_grad():
        ours, dropped = compiled(x, y)
    assert is_one_nan(dropped)
    torch.testing.assert_close(ours, module(x, y)[0])
    assert [node.target for node in large(graphs)] == [torch.ops.aten.expand.default]


def test_any_use_is_loud() -> None:
    module, (x, y) = NanoGPT(), inputs()
    compiled, _ = compile_rewritten(module, returned_logits="nan")
    loss, logits = compiled(x, y)
    assert logits.sum().isnan()
    assert logits[0, -1, 3].isnan()
    with pytest.raises(RuntimeError, match="single memory location"):
        logits.add_(1)
    with pytest.raises(RuntimeError, match="does not require grad"):
        logits.sum().backward()
    torch.testing.assert_close(loss, module(x, y)[0])


def test_what_is_computed_from_nan_adds_nothing_to_the_gradient() -> None:
    module, (x, y) = NanoGPT(), inputs()
    (expected,) = torch.autograd.grad(module(x, y)[0], x)
    compiled, _ = compile_rewritten(module, returned_logits="nan")
    loss, logits = compiled(x, y)
    total = loss + logits.mean()
    assert total.isnan()
    torch.testing.assert_close(torch.autograd.grad(total, x)[0], expected)


def test_any_length() -> None:
    module = NanoGPT()
    compiled, _ = compile_rewritten(module, returned_logits="nan", dynamic=True)
    for n in (5, 9, 4):
        x, y = inputs(n)
        loss, logits = compiled(x, y)
        assert is_one_nan(logits)
        assert logits.shape == (B, n, V)
        torch.testing.assert_close(loss, module(x, y)[0])


def test_compiled_by_inductor() -> None:
    """One element in memory, from generated code too; that of the gradient is another's."""
    module, (x, y) = Transformers(), inputs()
    options = {"returned_logits": "nan", "min_vocab": 2}
    with torch.no_grad():
        output = torch.compile(module, backend="inductor_ce", options=options)(x, y)
    assert isinstance(output, CausalLMOutput)
    assert is_one_nan(output.logits)
    torch.testing.assert_close(output.loss, module(x, y).loss)


# What is kept, and why


def sliced(module: Model, x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
    """Some of the logits need all of them, or another product."""
    logits = module.lm_head(x)
    return loss_of(logits, y), logits[:, -1:]


def returned_and_read(module: Model, x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
    logits = module.lm_head(x)
    return loss_of(logits, y), logits, logits.sigmoid().mean()


def rounded(module: Model, x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
    """Integers have no NaN."""
    logits = module.lm_head(x)
    return loss_of(logits, y), logits.long()


def changed(module: Model, x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
    logits = module.lm_head(x)
    logits.div_(0.7)
    return loss_of(logits, y), logits


def padded_vocabulary(module: Model, x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
    """The logits are a view of a tensor that is returned as well."""
    every = module.lm_head(x)
    logits = every[..., :-1]
    return F.cross_entropy(logits.reshape(-1, V - 1), y.view(-1).clamp(max=V - 2)), logits, every


KEPT_BECAUSE: dict[Callable[..., Any], str] = {
    sliced: "The logits are also used by getitem at test_drop_logits.py:",
    returned_and_read: KEPT + "they are also used by sigmoid at test_drop_logits.py:",
    rounded: "The logits are also used by long at test_drop_logits.py:",
    changed: KEPT + "they are also used by div_ at test_drop_logits.py:",
    padded_vocabulary: KEPT + "a tensor that shares their memory is an argument or is returned too.",
}


@pytest.mark.in_turns
@pytest.mark.parametrize("returned_logits", ["eager", "nan"])
@pytest.mark.parametrize("f", KEPT_BECAUSE)
def test_kept(f: Callable[..., Any], returned_logits: str) -> None:
    module, (x, y) = Model(), inputs()
    expected = f(module, x, y)
    compiled, graphs = compile_rewritten(f, returned_logits=returned_logits)
    for ours, theirs in zip(compiled(module, x, y), expected, strict=True):
        torch.testing.assert_close(ours, theirs)
    assert (sites(), misses()) == (1, 0)
    (site,) = graphs.report.sites
    if returned_logits == "nan":
        assert site.head.startswith(KEPT_BECAUSE[f])
    else:
        assert "does not apply" not in site.head
        assert "in memory" in site.head


def test_logits_that_are_an_argument() -> None:
    def f(z: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        return F.cross_entropy(z, y), z.float()

    z, y = torch.randn(6, V), torch.randint(0, V, (6,))
    compiled, _ = compile_without_codegen(f, returned_logits="nan")
    assert torch.equal(compiled(z, y)[1], z)
    (site,) = inductor_ce.explain(f, z, y).sites
    assert site.head == KEPT + "they are an argument of the graph."


def test_logits_of_a_loss_that_is_left_as_it_was() -> None:
    """The loss over few classes is not fused, so its logits are not touched."""
    module, (x, y) = NanoGPT(), inputs()
    compiled, _ = compile_rewritten(module, returned_logits="nan", min_vocab=V + 1)
    torch.testing.assert_close(compiled(x, y)[1], module(x, y)[1])


def test_logits_beside_a_loss_that_is_left_as_it_was() -> None:
    """Of two losses on the same logits one is not understood."""

    def f(module: Model, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        logits = module.lm_head(x)
        p = logits.softmax(-1)
        return loss_of(logits, y) + (p * (p + 1e-8).log().sin()).sum(), logits

    module, (x, y) = Model(), inputs()
    compiled, _ = compile_without_codegen(f, returned_logits="nan")
    torch.testing.assert_close(compiled(module, x, y)[1], module.lm_head(x))
    assert (sites(), misses()) == (1, 1)
    (site,) = inductor_ce.explain(f, module, x, y).sites
    assert site.head.startswith(KEPT + "they are also used by softmax")


def test_a_body_inside_another_graph() -> None:
    """What a checkpointed body returns goes to the graph around it."""

    def body(module: Model, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        logits = module.lm_head(x)
        return loss_of(logits, y), logits

    def f(module: Model, x: Tensor, y: Tensor) -> Tensor:
        loss, logits = checkpoint(body, module, x, y, use_reentrant=False)
        return loss + logits.sigmoid().mean()

    module, (x, y) = Model(), inputs()
    compiled, _ = compile_without_codegen(f, returned_logits="nan")
    torch.testing.assert_close(compiled(module, x, y), f(module, x, y))
    assert sites() == 1
    (site,) = inductor_ce.explain(f, module, x, y).sites
    assert site.head == KEPT + "they are returned to other compiled code, not to the program."


def test_a_part_that_is_compiled_apart() -> None:
    class Reason:
        reason = "DDPOptimizer intentional graph-break (See Note [DDPOptimizer])."

    part = nn.Module()
    assert not returns_to_program(part)
    part.compile_subgraph_reason = Reason()
    assert not returns_to_program(part)


def test_verify_keeps_the_logits() -> None:
    module, (x, y) = NanoGPT(), inputs()
    compiled, _ = compile_without_codegen(module, returned_logits="nan", verify=True)
    torch.testing.assert_close(compiled(x, y)[1], module(x, y)[1])
    (site,) = inductor_ce.explain(module, x, y).sites
    assert site.head == (
        "The option verify computes the original too, which has all logits in memory; the head stays whole, "
        "and what it would be in pieces is not compared."
    )


def test_nothing_to_tell() -> None:
    def f(module: Model, x: Tensor, y: Tensor) -> Tensor:
        return loss_of(module.lm_head(x), y)

    module, (x, y) = Model(), inputs()
    report = inductor_ce.explain(f, module, x, y)
    assert report.sites == []  # 37 classes are few
    with inductor_ce.install(min_vocab=2):
        report = inductor_ce.explain(f, module, x, y)
    assert [site.head for site in report.sites] == [""]
    assert "head" not in str(report)


def test_the_option_is_a_truth_value() -> None:
    with pytest.raises(OptionError, match="drop_logits must be True or False, got 'yes'"):
        inductor_ce.install(drop_logits="yes")
