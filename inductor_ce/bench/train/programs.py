"""How users write a step: each gives the loss of a batch by a model, compiled as they compile it."""

from __future__ import annotations

import contextlib
import copy
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...api.defer import defer, restore
from ..shared.labels import RUNS, Labels
from ..shared.losses import IGNORED, jsd_of_entries

# tokens [B, S] to (the loss [], the class of the logits, "" where the program has none)
Step = Callable[[Tensor], tuple[Tensor, str]]


@contextlib.contextmanager
def returned(model: Any, ours: bool) -> Iterator[Step]:
    """transformers' Trainer: the model gives loss and logits."""
    compiled = torch.compile(model)

    def step(tokens: Tensor) -> tuple[Tensor, str]:
        out = compiled(input_ids=tokens, labels=tokens)
        return out.loss, type(out.logits).__name__

    yield step


PROMPTS = 0.75  # of the tokens, whose labels a supervised fine-tuning ignores


@contextlib.contextmanager
def sft(model: Any, ours: bool) -> Iterator[Step]:
    """TRL's SFTTrainer, on completions alone: loss and logits are given, labels of prompts ignored."""
    compiled = torch.compile(model)

    def step(tokens: Tensor) -> tuple[Tensor, str]:
        labels = tokens.masked_fill(_prompts(*tokens.shape, tokens.device), IGNORED)
        out = compiled(input_ids=tokens, labels=labels)
        return out.loss, type(out.logits).__name__

    yield step


@functools.cache
def _prompts(B: int, S: int, device: torch.device) -> Tensor:
    return Labels(PROMPTS, RUNS).mask(B * S, S).view(B, S).to(device)


@contextlib.contextmanager
def blocks(model: Any, ours: bool) -> Iterator[Step]:
    """torchtitan: blocks are compiled one by one, the loss alone, and the head is between them, eager.

    One line more for us: the head is deferred.
    """
    layers = list(model.model.layers)
    for layer in layers:
        layer.forward = torch.compile(layer.forward)
    loss = torch.compile(next_token)
    if ours:
        defer(model.lm_head)
    try:

        def step(tokens: Tensor) -> tuple[Tensor, str]:
            z = model.lm_head(model.model(input_ids=tokens).last_hidden_state)
            return loss(z, tokens), type(z).__name__

        yield step
    finally:
        if ours:
            restore(model.lm_head)
        for layer in layers:
            del layer.forward


def next_token(z: Tensor, tokens: Tensor) -> Tensor:
    return F.cross_entropy(z[:, :-1].flatten(0, 1).float(), tokens[:, 1:].flatten())


PADDING = 36  # classes that no token is


@contextlib.contextmanager
def padded(model: Any, ours: bool) -> Iterator[Step]:
    """nanochat: the padding is cut off logits with a soft-cap, and the loss alone is given."""

    def forward(tokens: Tensor) -> Tensor:
        z = model.lm_head(model.model(input_ids=tokens).last_hidden_state)
        z = 15 * torch.tanh(z[..., :-PADDING].float() / 15)
        y = tokens.roll(-1, 1).clamp(max=z.shape[-1] - 1)
        return F.cross_entropy(z.view(-1, z.shape[-1]), y.view(-1), ignore_index=-1)

    compiled = torch.compile(forward)
    yield lambda tokens: (compiled(tokens), "")


@contextlib.contextmanager
def adapted(model: Any, ours: bool) -> Iterator[Step]:
    """PEFT: adapters at queries and values, all else frozen, the head too; loss and logits are given."""
    given = [name for name, p in model.named_parameters() if p.requires_grad]
    model.requires_grad_(False)
    replaced = [
        (layer.self_attn, name, getattr(layer.self_attn, name))
        for layer in model.model.layers
        for name in ("q_proj", "v_proj")
    ]
    for parent, name, linear in replaced:
        setattr(parent, name, LowRank(linear))
    try:
        with returned(model, ours) as step:
            yield step
    finally:
        for parent, name, linear in replaced:
            setattr(parent, name, linear)
        for name in given:
            model.get_parameter(name).requires_grad_(True)


def distilled(model: Any, ours: bool) -> contextlib.AbstractContextManager[Step]:
    """Distillation from a frozen teacher: the divergence of all tokens."""
    return _with_teacher(model, ours, forward_divergence)


def gkd(model: Any, ours: bool) -> contextlib.AbstractContextManager[Step]:
    """TRL's GKDTrainer: the generalised Jensen-Shannon divergence of completions, half from each side."""
    return _with_teacher(model, ours, generalised_jsd)


@contextlib.contextmanager
def _with_teacher(model: Any, ours: bool, divergence: Callable[[Tensor, Tensor], Tensor]) -> Iterator[Step]:
    """A student and a frozen teacher as large, which are compiled apart, as the loss is.

    Two lines more for us: both heads are deferred.
    """
    teacher = _another(model)
    heads = (model.lm_head, teacher.lm_head)
    student, taught = torch.compile(model), torch.compile(teacher)
    loss = torch.compile(divergence)
    for head in heads if ours else ():
        defer(head)
    try:

        def step(tokens: Tensor) -> tuple[Tensor, str]:
            with torch.no_grad():
                q = taught(input_ids=tokens, use_cache=False).logits
            z = student(input_ids=tokens, use_cache=False).logits
            return loss(z, q), type(z).__name__

        yield step
    finally:
        for head in heads if ours else ():
            restore(head)


def _another(model: Any) -> Any:
    """A frozen model like a given one, with weights of its own: those in reverse order."""
    made = copy.deepcopy(model).requires_grad_(False)
    for p in made.parameters():
        p.copy_(p.flatten().flip(0).view_as(p))
    return made


def forward_divergence(z: Tensor, q: Tensor) -> Tensor:
    """The mean over tokens of sum_i q_i (log q_i - log p_i)."""
    log_p, log_q = (F.log_softmax(x.flatten(0, 1).float(), -1) for x in (z, q))
    return F.kl_div(log_p, log_q, reduction="batchmean", log_target=True)


COMPLETION = 0.75  # of the tokens, those behind the prompt


def generalised_jsd(z: Tensor, q: Tensor) -> Tensor:
    """The mean over the tokens of completions, half of the mixture from each side."""
    start = z.shape[1] - int(COMPLETION * z.shape[1])
    log_p, log_q = (F.log_softmax(x[:, start - 1 : -1], -1) for x in (z, q))
    jsd = jsd_of_entries(log_p, log_q, beta=0.5)
    return jsd.sum() / (jsd.shape[0] * jsd.shape[1])


class LowRank(nn.Module):
    """A linear layer with an adapter of `rank` beside it."""

    def __init__(self, linear: nn.Linear, rank: int = 16, scale: float = 2.0):
        super().__init__()
        w = linear.weight
        generator = torch.Generator(w.device).manual_seed(sum(w.shape))
        a = torch.randn(rank, w.shape[1], generator=generator, device=w.device, dtype=w.dtype)
        self.linear, self.scale = linear, scale
        self.a = nn.Parameter(a / w.shape[1] ** 0.5)
        self.b = nn.Parameter(w.new_zeros(w.shape[0], rank))

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) + self.scale * F.linear(F.linear(x, self.a), self.b)


@contextlib.contextmanager
def in_float32(model: Any, ours: bool) -> Iterator[Step]:
    """Reinforcement learning: the head in float32 over bfloat16 hidden states and weight."""

    def forward(tokens: Tensor) -> Tensor:
        hidden = model.model(input_ids=tokens).last_hidden_state
        z = F.linear(hidden.float(), model.lm_head.weight.float())
        return next_token(z, tokens)

    compiled = torch.compile(forward)
    yield lambda tokens: (compiled(tokens), "")


class HeadAlone(nn.Module):
    """A model whose body is given hidden states, by the names that transformers has."""

    def __init__(self, B: int, S: int, V: int, D: int):
        super().__init__()
        self.hidden = nn.Parameter(torch.randn(B, S, D, dtype=torch.bfloat16))
        self.lm_head = nn.Linear(D, V, bias=False, dtype=torch.bfloat16)

    def model(self, input_ids: Tensor) -> Body:
        return Body(self.hidden)


class Body:
    def __init__(self, hidden: Tensor):
        self.last_hidden_state = hidden


_PROGRAMS = (returned, sft, blocks, padded, adapted, in_float32, distilled, gkd)
PROGRAMS: dict[str, Callable[[nn.Module, bool], contextlib.AbstractContextManager[Step]]] = {
    function.__name__: function for function in _PROGRAMS
}
