"""What is in memory: nothing of the size of the logits, in the graphs or in the code made of them."""

from __future__ import annotations

import math
import re

import pytest
import torch
import torch.nn.functional as F
from gpu_codegen import Wrapper, lower_after_passes
from harness import Graphs, compile_without_codegen
from head_cases import CASES, Inputs, Loss, assert_all_fair, counts, exactly, inputs, measure, rows
from kernels import backwards_at_once
from pairwise import EVERYTHING, in_turns
from torch import Tensor
from torch._inductor.utils import run_and_get_code
from torch.fx import GraphModule
from torch.utils._pytree import tree_leaves

import inductor_ce
from inductor_ce.ops import lowering

N, V, D = 60, 100, 4
K = 4  # pieces
PIECE = {"token_chunks": N // K * V, "vocab_slabs": N * V // K, "forward_only": N // K * V}
assert max(V * D, N * D, 3 * N) < min(PIECE.values())


def largest(gm: GraphModule) -> int:
    """Elements of the largest tensor that a graph makes."""
    made = [tree_leaves(n.meta.get("val")) for n in gm.graph.nodes if n.op == "call_function"]
    return max(t.numel() for found in made for t in found if isinstance(t, Tensor))


def saved(forward: GraphModule) -> list[int]:
    """Elements of what a forward leaves for the backward, but its inputs."""
    nodes = [n for n in tree_leaves(forward.graph.output_node().args) if hasattr(n, "meta")]
    values = [n.meta["val"] for n in nodes if n.op != "placeholder"]
    return [v.numel() for v in values if isinstance(v, Tensor)]


def run(name: str, strategy: str, given: Inputs, budget: float) -> Graphs:
    compiled, graphs = compile_without_codegen(CASES[name].loss, strategy=strategy, memory_budget=budget)
    measure(compiled, given)
    assert counts() == {strategy: 1}
    return graphs


NAMES = ["plain", "soft-cap", "bias", "z-loss", "entropy bonus", "class weights", "by hand"]
BUDGET = 0.28  # of rows that are brought together the hidden states, and their gradient, take memory too
CHAINED = {"soft-cap": 0.53}


@pytest.mark.parametrize(("name", "strategy"), in_turns(NAMES, ["token_chunks", "vocab_slabs"]))
def test_largest_tensor(name: str, strategy: str) -> None:
    given = inputs(N, v=V, d=D)
    forward, backward = run(name, strategy, given, CHAINED.get(name, BUDGET)).final
    assert largest(forward) == PIECE[strategy]
    assert max(saved(forward)) <= max(V * D, N * D, 3 * N)
    assert largest(backward) == (PIECE[strategy] if strategy == "vocab_slabs" else max(V * D, N * D))


def test_materialised_logits_are_seen() -> None:
    """What is asserted of the others would fail of these."""
    forward, backward = run("plain", "materialise", inputs(N, v=V, d=D), 0.26).final
    assert largest(forward) == largest(backward) == max(saved(forward)) == N * V


@pytest.mark.parametrize("name", ["plain", "soft-cap", "entropy bonus"])
def test_largest_tensor_of_a_forward(name: str) -> None:
    compiled, graphs = compile_without_codegen(CASES[name].loss, strategy="token_chunks", memory_budget=0.26)
    with torch.no_grad():
        compiled(*inputs(N, v=V, d=D))
    assert counts() == {"forward_only": 1}
    (forward,) = graphs.final
    assert largest(forward) == PIECE["forward_only"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_logits_are_made_in_their_own_dtype(dtype: torch.dtype) -> None:
    given = inputs(N, v=V, d=D).to(dtype)
    for gm in run("plain", "token_chunks", given, 0.45).final:
        wide = [n.meta["val"] for n in gm.graph.nodes if n.target is torch.ops.aten.empty.memory_format]
        assert {t.dtype for t in wide if t.shape[-1] == V} <= {dtype}


# Generated code


def sizes(code: str) -> dict[str, int]:
    """Elements of each buffer that a wrapper allocates, or gives another name."""
    found: dict[str, int] = {}
    for line in code.splitlines():
        if made := re.match(r"\s*(\w+) = empty_strided_(?:cpu|cuda)\(\(([\d, ]*)\)", line):
            found[made[1]] = math.prod(map(int, re.findall(r"\d+", made[2])))
        elif reused := re.match(r"\s*(\w+) = (?:reinterpret_tensor\()?(\w+)\b.*; del \2\b", line):
            found[reused[1]] = found.get(reused[2], 0)
    return found


def most_at_once(code: str, piece: int) -> int:
    """How many buffers of the size of a piece are there at once, but for the words of a template for itself,
    which are 8 bytes for each block of a row."""
    wide = {name for name, size in sizes(code).items() if size >= piece and "workspace" not in name}
    live: set[str] = set()
    most = 0
    for line in code[code.index("def call(") :].splitlines():
        if made := re.match(r"\s*(\w+) = ", line):
            live |= {made[1]} & wide
        if gone := re.search(r"\bdel (\w+)", line):
            live.discard(gone[1])
        most = max(most, len(live))
    return most


@pytest.mark.parametrize("strategy", ["token_chunks", "vocab_slabs"])
def test_generated_code(strategy: str) -> None:
    """It is right, and has the logits of one piece and their gradient at most.

    Also for slabs with a chain, of whose logits torch's loops read too early if they are written in place.
    There is a first piece, one between, and a last.
    """
    case, given = CASES["soft-cap"], inputs(N, v=V, d=D)
    piece = {"token_chunks": N // 3 * V, "vocab_slabs": N * -(-V // 3)}[strategy]
    inductor_ce.install(min_vocab=2, strategy=strategy, memory_budget=0.8)
    with backwards_at_once():
        ours, codes = run_and_get_code(lambda: measure(torch.compile(case.loss), given))
    assert counts() == {strategy: 1}
    assert_all_fair(ours, measure(case.loss, given), exactly(case, given))
    assert len(codes) == 2
    assert max(size for code in codes for size in sizes(code).values()) <= piece
    assert max(most_at_once(code, piece) for code in codes) <= 2


# Code for a GPU


def scaled(h: Tensor, w: Tensor, b: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(*rows(F.linear(h, w) * 0.5, y))


def biased_and_capped(h: Tensor, w: Tensor, b: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(*rows(3 * torch.tanh(F.linear(h, w, b).float() / 3), y))


def masked(h: Tensor, w: Tensor, b: Tensor, y: Tensor) -> Tensor:
    z = F.linear(h, w).float()
    padding = torch.arange(z.shape[-1], device=z.device) >= z.shape[-1] - 3
    return F.cross_entropy(*rows(z.masked_fill(padding, -torch.inf), y.clamp(max=z.shape[-1] - 4)))


def learnt_scale(h: Tensor, w: Tensor, b: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(*rows(F.linear(h, w) * b.float().mean().exp(), y))


def learnt_temperatures(h: Tensor, w: Tensor, b: Tensor, y: Tensor) -> Tensor:
    """One for each row."""
    z, y = rows(F.linear(h, w).float(), y)
    return F.cross_entropy(z / (y % 3 + b.float().mean().exp())[:, None], y)


def learnt_cap(h: Tensor, w: Tensor, b: Tensor, y: Tensor) -> Tensor:
    cap = b.float().square().sum()
    return F.cross_entropy(*rows(cap * torch.tanh(F.linear(h, w).float() / cap), y))


def learnt_scales_of_classes(h: Tensor, w: Tensor, b: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(*rows(F.linear(h, w) * b, y))


def biased_behind_a_scale(h: Tensor, w: Tensor, b: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(*rows(F.linear(h, w) * 0.5 + b, y))


def cast(h: Tensor, w: Tensor, b: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(*rows(F.linear(h, w).float(), y))


CHAINS = {
    "soft-cap": CASES["soft-cap"].loss,
    "scale": scaled,
    "bias and soft-cap": biased_and_capped,
    "mask": masked,
    "learnt scale": learnt_scale,
    "learnt temperatures": learnt_temperatures,
    "learnt cap": learnt_cap,
    "learnt scales of classes": learnt_scales_of_classes,
    "bias behind a scale": biased_behind_a_scale,
}
NARROW = max(V * D, N * D, 3 * N)  # elements of the largest tensor that is no piece


def gpu_code(loss: Loss, strategy: str, pieces: int = 2, v: int = V) -> list[Wrapper]:
    """The code of the forward and of the backward, of a head in bfloat16."""
    budget = {2: 1.2, 3: 1.0}[pieces]
    compiled, graphs = compile_without_codegen(loss, strategy=strategy, memory_budget=budget)
    measure(compiled, inputs(N, v=v, d=D).to(torch.bfloat16))
    assert counts() == {strategy: 1}
    twice = strategy == "vocab_slabs"  # the backward makes them again
    assert graphs.count(torch.ops.inductor_ce.logits.default) == (1 + twice) * pieces
    lowering.register()
    return [lower_after_passes(gm, is_backward=i == 1) for i, gm in enumerate(graphs.final)]


# Those that are no part of another, nor written by the functions of another
ALIKE = ("soft-cap", "scale", "learnt scale", "learnt temperatures", "bias behind a scale")
ABSORBED = [name for name in CHAINS if EVERYTHING or name not in ALIKE]


@pytest.mark.parametrize(("chain", "strategy"), in_turns(ABSORBED, ["token_chunks", "vocab_slabs"]))
def test_chain_of_a_piece_is_absorbed(chain: str, strategy: str) -> None:
    """On a GPU nothing of a piece is in memory but its logits and their gradient, both in bfloat16.

    Though in one graph the chain is read for the statistics and again for the gradient.
    """
    for wrapper in gpu_code(CHAINS[chain], strategy, pieces=3 if "soft-cap" in chain else 2):
        assert [shape for shape in wrapper.allocations_of("float32") if math.prod(shape) > NARROW] == []
        assert most_at_once(wrapper.code, NARROW + 1) <= 1


@pytest.mark.parametrize("strategy", ["token_chunks", "vocab_slabs"])
def test_gradient_of_a_piece_is_written_over_its_logits(strategy: str) -> None:
    """A cast is no chain. Beside the logits are the words of the template, one for each block and label."""
    words = {"token_chunks": 8 * N // 2 * (-(-V // 64) + 1), "vocab_slabs": 0}[strategy]  # blocks of 64
    for wrapper in gpu_code(cast, strategy):
        assert most_at_once(wrapper.code, NARROW + 1) == 0
        assert all(size == words for name, size in sizes(wrapper.code).items() if "workspace" in name)


@pytest.mark.parametrize("chain", ["soft-cap", "scale"])
def test_gradient_behind_a_chain_is_written_over_the_logits(chain: str) -> None:
    """Of elements alone, where one kernel makes statistics and gradient."""
    v, pieces = V + 4, 3 if chain == "soft-cap" else 2  # rows of whole vectors
    forward, backward = gpu_code(CHAINS[chain], "token_chunks", pieces, v)
    assert forward.code.count("'torch.ops.inductor_ce.logits.default'") > 1
    for wrapper in (forward, backward):
        assert most_at_once(wrapper.code, max(NARROW, v * D) + 1) == 0


@pytest.mark.in_turns
@pytest.mark.parametrize("strategy", ["token_chunks", "vocab_slabs"])
@pytest.mark.parametrize("name", ["plain", "soft-cap"])
def test_rows_of_a_piece_are_aligned(name: str, strategy: str) -> None:
    """On a GPU, whose libraries have slower products for others; those of a gradient behind a chain too."""
    code = "".join(wrapper.code for wrapper in gpu_code(CASES[name].loss, strategy, v=V + 1))
    logits = re.findall(
        r"assert_\w+\(\w+, \((\d+), (\d+)\), \((\d+), 1\), (?:torch\.\w+, )?'torch.ops.inductor_ce.logits",
        code,
    )
    assert logits
    gradients = re.findall(r"empty_strided_cuda\(\((\d+), (\d+)\), \((\d+), 1\), torch.bfloat16\)", code)
    gradients = [found for found in gradients if int(found[0]) * int(found[1]) > (V + 1) * D]
    assert bool(gradients) == (name == "soft-cap")
    for _, columns, step in logits + gradients:
        assert int(step) == -(-int(columns) // 8) * 8
