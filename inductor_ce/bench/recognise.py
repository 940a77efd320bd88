"""What recognition costs: the time to read the torch-level graph of a transformer, and to import us."""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import GraphModule

from .. import Options
from ..api.deferral import copied
from ..api.passes import fuse_losses
from .shared import record

HELP = "the time that recognition takes; needs no GPU"
NODES, VOCABULARY, WIDTH, HEADS, TOKENS = 2000, 2048, 32, 4, 16
ROUNDS, IMPORTS = 15, 5

IMPORT = """
import time, torch
start = time.perf_counter()
import inductor_ce
print(time.perf_counter() - start)
"""

METHOD = {
    "graph": "a decoder with attention by hand, captured by Dynamo; nothing of it is run",
    "first_ms": "the first graph of a process, which also warms sympy's and torch's caches",
    "ms": "median over the rounds: read, judge and rewrite a copy of the graph",
    "import_ms": "median over fresh processes: `import inductor_ce` after `import torch`",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """It has none of its own."""


def main(options: argparse.Namespace) -> int:
    """Measure, keep the JSON, print the table."""
    result = record.new("recognise", METHOD, options.commit, found=measure(ROUNDS))
    path = record.json_path(result, options.out)
    record.write(result, path)
    print(table(result), path, sep="\n")
    return 0


class Decoder(nn.Module):
    """As many layers as make a graph of at least NODES nodes, with attention spelled out."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        layers = NODES // 35
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(2 * layers))
        self.attention = nn.ModuleList(nn.Linear(WIDTH, 3 * WIDTH) for _ in range(layers))
        self.up = nn.ModuleList(nn.Linear(WIDTH, 4 * WIDTH) for _ in range(layers))
        self.down = nn.ModuleList(nn.Linear(4 * WIDTH, WIDTH) for _ in range(layers))

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        for i, (attention, up, down) in enumerate(zip(self.attention, self.up, self.down, strict=True)):
            x = x + self._attend(attention(self.norms[2 * i](x)))
            x = x + down(F.gelu(up(self.norms[2 * i + 1](x))))
        return x

    def _attend(self, qkv: Tensor) -> Tensor:
        B, S, _ = qkv.shape
        q, k, v = (part.view(B, S, HEADS, -1).transpose(1, 2) for part in qkv.chunk(3, dim=-1))
        weights = (q @ k.transpose(-2, -1) * (WIDTH // HEADS) ** -0.5).softmax(dim=-1)
        return (weights @ v).transpose(1, 2).reshape(B, S, WIDTH)

    def hidden_only(self, tokens: Tensor) -> Tensor:
        return self(tokens).square().mean()

    def with_loss(self, tokens: Tensor) -> Tensor:
        logits = F.linear(self(tokens), self.embedding.weight).float()
        shifted = logits[:, :-1].flatten(0, 1)
        loss = F.cross_entropy(shifted, tokens[:, 1:].flatten(), label_smoothing=0.1)
        return loss + 1e-4 * shifted.logsumexp(-1).square().mean()


def measure(rounds: int) -> dict[str, Any]:
    """Times in ms of the pass over graphs with and without a loss, and of the import."""
    model = Decoder()
    found: dict[str, Any] = {}
    for name, function in (("without a loss", model.hidden_only), ("with a loss", model.with_loss)):
        graph = capture(function)
        times, sites = zip(*(_timed(graph) for _ in range(rounds + 1)), strict=True)
        found[name] = {
            "nodes": len(graph.graph.nodes),
            "sites": sites[0],
            "first_ms": times[0],
            "ms": statistics.median(times[1:]),
        }
    found["import_ms"] = statistics.median(_import_ms() for _ in range(IMPORTS))
    return found


def capture(function: Callable[[Tensor], Tensor]) -> GraphModule:
    """The torch-level graph of `function` of a batch of tokens."""
    graphs: list[GraphModule] = []

    def keep(gm: GraphModule, example_inputs: Any) -> Callable[..., Any]:
        graphs.append(gm)
        return gm.forward

    torch.compiler.reset()
    torch.compile(function, backend=keep, fullgraph=True)(torch.randint(VOCABULARY, (2, TOKENS)))
    return graphs[0]


def _timed(gm: GraphModule) -> tuple[float, int]:
    graph = copied(gm)[0]
    start = time.perf_counter()
    report = fuse_losses(graph, Options())
    return 1e3 * (time.perf_counter() - start), len(report.sites)


def _import_ms() -> float:
    seconds = subprocess.run(
        [sys.executable, "-c", IMPORT], capture_output=True, text=True, check=True
    ).stdout
    return 1e3 * float(seconds)


def table(result: dict[str, Any]) -> str:
    """The result to read."""
    found = result["found"]
    lines = [
        f"{name:<15} {row['nodes']} nodes, {row['sites']} fused: {row['ms']:.1f} ms, "
        f"{row['first_ms']:.1f} ms at first"
        for name, row in found.items()
        if name != "import_ms"
    ]
    return "\n".join([*lines, f"import          {found['import_ms']:.1f} ms beyond torch"])
