"""Models of transformers, compiled as they are: the loss is fused, and the logits beside it are lazy."""

from __future__ import annotations

import copy
import threading
import warnings
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from harness import misses, sites
from reference import assert_all_fair, assert_fair
from torch import Tensor, nn
from torch._dynamo.utils import counters

pytest.importorskip("transformers", reason="transformers is not installed: make integrations")
from small_models import CONFIGURATIONS, B, S, V, batch_of, model_of

import inductor_ce
from inductor_ce.api.deferral import compile_deferring
from inductor_ce.api.lazy_logits import LazyLogits
from inductor_ce.common.options import Options


def stepped(
    f: Callable[..., Any], model: nn.Module, batch: dict[str, Tensor]
) -> tuple[Any, dict[str, Tensor]]:
    """(what f returns, gradients by name)."""
    model.zero_grad()
    out = f(**batch)
    out.loss.backward()
    return out, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def events() -> dict[str, int]:
    """What Dynamo has counted: graphs, those of recompilations among them, and breaks."""
    return {
        "graphs": counters["stats"]["unique_graphs"],
        "breaks": sum(counters["graph_break"].values()),
    }


def plainly(model: nn.Module, batch: dict[str, Tensor]) -> tuple[dict[str, int], Counter[str]]:
    """What Dynamo counts, and which warnings appear, without us."""
    torch._dynamo.reset()
    counters.clear()
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        torch.compile(model, backend="eager")(**batch)
    found = events()
    torch._dynamo.reset()
    counters.clear()
    return found, Counter(str(w.message) for w in seen)


def small(name: str, dtype: torch.dtype = torch.float32) -> Any:
    model: Any = model_of(name, dtype, num_hidden_layers=1)
    if name == "GPT2":
        model.loss_type = "ForCausalLM"  # else transformers warns, and the graph breaks there: see below
    return model


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        *(pytest.param(name, torch.float32, id=name) for name in CONFIGURATIONS),
        *(pytest.param(name, torch.bfloat16, id=f"{name}-bf16") for name in ("Llama", "Gemma2", "T5")),
    ],
)
def test_model(name: str, dtype: torch.dtype, cheap: None):
    """Lazy logits, never made by the step; as many graphs, breaks and warnings as without us; fair values."""
    model, batch = small(name, dtype), batch_of()
    naive, naive_gradients = stepped(model, model, batch)
    exact, exact_gradients = stepped(double := in_float64(model), double, batch)
    plain, expected_warnings = plainly(model, batch)

    inductor_ce.install()
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        out, gradients = stepped(torch.compile(model), model, batch)
    assert (sites(), misses()) == (1, 0)
    assert is_unmade(out.logits)
    assert events() == plain
    assert not Counter(str(w.message) for w in seen) - expected_warnings
    assert_fair(out.loss.detach(), naive.loss.detach(), exact.loss.detach())
    assert_all_fair(gradients, naive_gradients, exact_gradients)
    assert out.logits.dtype == naive.logits.dtype
    assert_fair(out.logits.detach() + 0, naive.logits.detach(), exact.logits.detach())


def in_float64(model: Any) -> Any:
    double = copy.deepcopy(model).double()
    if hasattr(double.config, "num_experts_per_tok"):
        double.set_experts_implementation("eager")  # the grouped product has no float64
    return double


def is_unmade(logits: Tensor) -> bool:
    return isinstance(logits, LazyLogits) and not logits.is_made


def test_generated_code(made: list[int]):
    """As it runs for users, with the head in chunks."""
    model, batch = small("Qwen2"), batch_of()
    naive, naive_gradients = stepped(model, model, batch)
    exact, exact_gradients = stepped(double := in_float64(model), double, batch)
    inductor_ce.install(strategy="token_chunks")
    out, gradients = stepped(torch.compile(model), model, batch)
    assert counters["inductor_ce"]["token_chunks"] == 1
    assert is_unmade(out.logits)
    assert made == []
    assert_fair(out.loss.detach(), naive.loss.detach(), exact.loss.detach())
    assert_all_fair(gradients, naive_gradients, exact_gradients)
    assert_fair(out.logits.detach() + 0, naive.logits.detach(), exact.logits.detach())


def test_gpt2_whose_graph_is_cut_between_logits_and_loss(cheap: None):
    """Its class's name says no loss, so transformers warns, at which Dynamo ends the graph: the logits, which
    the first graph returns, go on lazily, so that the loss in the second has its head."""
    model, batch = model_of("GPT2", num_hidden_layers=1), batch_of()
    plain, _ = plainly(model, batch)
    assert plain["breaks"] > 0
    naive, naive_gradients = stepped(model, model, batch)
    inductor_ce.install(strategy="token_chunks", memory_budget=0.35)
    out, gradients = stepped(torch.compile(model), model, batch)
    assert events() == plain
    assert sites() == 1
    assert counters["inductor_ce"]["token_chunks"] == 1
    assert not out.logits.is_made
    torch.testing.assert_close(out.loss, naive.loss)
    torch.testing.assert_close(gradients, naive_gradients, rtol=1e-4, atol=1e-6)


def test_second_loss_on_returned_logits(cheap: None):
    """Taken eagerly, and by another compiled function: gradients are eager's."""
    model, batch = small("Llama"), batch_of()

    def distilled(out: Any) -> Tensor:
        z = out.logits[:, :-1].float()
        return out.loss + F.kl_div(z.log_softmax(-1), torch.full_like(z, 1 / V), reduction="batchmean")

    def gradients(out: Any, loss: Callable[[Any], Tensor]) -> list[Tensor]:
        return list(torch.autograd.grad(loss(out), list(model.parameters())))

    expected = gradients(model(**batch), distilled)
    inductor_ce.install()
    compiled = torch.compile(model)
    alone = torch.compile(
        lambda z: F.kl_div(z.log_softmax(-1), torch.full_like(z, 1 / V), reduction="batchmean")
    )
    for loss in (
        distilled,
        torch.compile(distilled),
        lambda out: out.loss + alone(out.logits[:, :-1].float()),  # the logits are its only argument
    ):
        out = compiled(**batch)
        torch.testing.assert_close(gradients(out, loss), expected, rtol=1e-4, atol=1e-5)


def test_generation_by_the_same_compiled_model(cheap: None):
    model, batch = small("Llama"), batch_of()
    expected = model.eval().generate(batch["input_ids"], max_new_tokens=3, do_sample=False)
    inductor_ce.install()
    model.train().compile()
    out, _ = stepped(model, model, batch)
    assert is_unmade(out.logits)
    found = model.eval().generate(batch["input_ids"], max_new_tokens=3, do_sample=False)
    assert found.equal(expected)
    assert sites() == 1


@pytest.mark.filterwarnings("ignore:.*activation_checkpointing_enable:FutureWarning")
def test_activation_checkpointing(cheap: None):
    model, batch = small("Llama"), batch_of()
    model.gradient_checkpointing_enable()
    naive, naive_gradients = stepped(model, model, batch)
    plain, _ = plainly(model, batch)
    inductor_ce.install()
    out, gradients = stepped(torch.compile(model), model, batch)
    assert is_unmade(out.logits)
    assert events() == plain
    torch.testing.assert_close(out.loss, naive.loss)
    torch.testing.assert_close(gradients, naive_gradients, rtol=1e-4, atol=1e-6)


def test_fullgraph_and_two_threads(cheap: None):
    model, batch = small("Llama"), batch_of()
    expected = model(**batch)
    inductor_ce.install()
    compiled = torch.compile(model, fullgraph=True)
    compiled(**batch)
    found: dict[int, Any] = {}

    def run(which: int) -> None:
        found[which] = compiled(**batch)

    threads = [threading.Thread(target=run, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for out in found.values():
        assert is_unmade(out.logits)
        torch.testing.assert_close(out.loss, expected.loss)
        torch.testing.assert_close(out.logits + 0, expected.logits)
    assert len(found) == 2


def test_lengths_that_change(cheap: None):
    """The second makes the length symbolic, the third compiles nothing."""
    model = small("Llama")
    batches = [batch_of(length) for length in (12, 17, 23)]
    torch._dynamo.reset()
    counters.clear()
    plain = torch.compile(model)
    for batch in batches:
        plain(**batch)
    expected = events()
    assert expected["graphs"] == 2
    torch._dynamo.reset()
    counters.clear()
    inductor_ce.install()
    compiled = torch.compile(model)
    for batch in batches:
        out, naive = compiled(**batch), model(**batch)
        assert is_unmade(out.logits)
        torch.testing.assert_close(out.logits + 0, naive.logits)
        torch.testing.assert_close(out.loss, naive.loss)
    assert events() == expected


def test_metrics_of_lazy_logits(cheap: None, made: list[int]):
    """Token accuracy and entropy as trainers log them, without a gradient: made by rows, and not kept."""
    model, batch = small("Llama"), batch_of()

    @torch.no_grad()
    def logged(out: Any) -> tuple[Tensor, Tensor]:
        guesses = out.logits[..., :-1, :].contiguous().argmax(-1)
        labels = batch["labels"][..., 1:]
        accuracy = (guesses == labels)[labels != -100].float().mean()
        entropies = []
        for rows in out.logits.view(-1, V).split(8):
            log_p = F.log_softmax(rows, -1)
            entropies.append(-(log_p.exp() * log_p).sum(-1))
        return accuracy, torch.cat(entropies)

    expected = logged(model(**batch))
    inductor_ce.install()
    out, _ = stepped(torch.compile(model), model, batch)
    assert made == []
    torch.testing.assert_close(logged(out), expected)
    assert not out.logits.is_made
    assert made == [B * (S - 1), *[8] * (B * S // 8)]


def test_loss_without_gradients(cheap: None, made: list[int]):
    model, batch = small("Llama"), batch_of()
    inductor_ce.install()
    with torch.no_grad():
        out, naive = torch.compile(model)(**batch), model(**batch)
    assert is_unmade(out.logits)
    torch.testing.assert_close(out.loss, naive.loss)
    torch.testing.assert_close(out.logits[:, -1] + 0, naive.logits[:, -1])
    assert made == [B]


def test_tuples_of_logits_and_loss(cheap: None):
    """As nanoGPT and what comes from it return them."""

    class GPT(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = small("Llama").model
            self.lm_head = nn.Linear(32, V, bias=False)
            self.body.embed_tokens.weight = self.lm_head.weight

        def forward(self, x: Tensor, y: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
            h = self.body(x).last_hidden_state
            if y is None:
                return self.lm_head(h[:, [-1], :]), None
            logits = self.lm_head(h)
            return logits, F.cross_entropy(logits.view(-1, logits.size(-1)), y.view(-1), ignore_index=-1)

    x = batch_of()["input_ids"]
    model = GPT()
    expected, loss = model(x, x)
    (gradient,) = torch.autograd.grad(loss, model.lm_head.weight)
    inductor_ce.install()
    compiled = torch.compile(model)
    logits, loss = compiled(x, x)
    assert is_unmade(logits)
    (found,) = torch.autograd.grad(loss, model.lm_head.weight)
    torch.testing.assert_close(found, gradient, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(logits + 0, expected)
    alone, nothing = compiled(x)
    assert nothing is None
    assert not isinstance(alone, LazyLogits)
    torch.testing.assert_close(alone, expected[:, [-1]])


def test_results_of_cuda_graphs_are_copied(cheap: None):
    """A CUDA graph writes over its results when it runs again: lazy logits keep a copy of their own."""
    model, results = small("Llama"), []

    def backend(module: Any, inputs: Any) -> Callable[..., Any]:
        def run_as_graph(*given: Tensor) -> Any:
            results[:] = module.forward(*given)
            return tuple(results)

        patches = {"triton.cudagraphs": True}
        return compile_deferring(module, inputs, lambda m, i: run_as_graph, Options(), patches)

    batch = batch_of()
    with torch.no_grad():
        expected = model(**batch).logits
        out = torch.compile(model, backend=backend)(**batch)
        assert is_unmade(out.logits)
        assert any(r.shape == (B, S, 32) for r in results)
        for result in results:
            result.zero_()
        torch.testing.assert_close(out.logits + 0, expected)
