"""One training run of the quickstart, in a process of its own so that its peak memory is its own.

`quickstart.py` starts this file; by hand: python examples/train.py --help
"""

import argparse
import contextlib
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

import inductor_ce
from sampling import Samples, sampled
from transformer import Transformer

WARM_UP = 3  # steps that compile, or that the allocator and the caches still learn from
STEPS = 20
DRAWN = 3  # steps, the last ones, over which memory is drawn


@dataclass(frozen=True)
class Sizes:
    """Batch B, sequence S, hidden size D and vocabulary V of one model."""

    B: int
    S: int
    D: int
    V: int
    layers: int
    heads: int

    @classmethod
    def for_device(cls, device: str) -> "Sizes":
        if device == "cuda":
            return cls(B=16, S=1024, D=768, V=32768, layers=6, heads=12)
        return cls(B=32, S=256, D=128, V=8192, layers=1, heads=2)

    def logits_bytes(self, device: str) -> int:
        """The size of one tensor of logits [N, V]: bfloat16 on a GPU, else float32."""
        return self.B * self.S * self.V * (2 if device == "cuda" else 4)


def default_device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def main() -> None:
    arguments = parse_arguments()
    sizes = Sizes.for_device(arguments.device)
    torch.manual_seed(0)
    model = Transformer(sizes.V, sizes.D, sizes.S, sizes.layers, sizes.heads, tied=not arguments.untied).to(
        arguments.device
    )
    batches = sample_batches(torch.load(arguments.tokens, weights_only=True), sizes, arguments.steps)
    if arguments.reverse_rows:
        batches = [batch.flip(0) for batch in batches]

    installed = inductor_ce.install() if arguments.run == "inductor_ce" else contextlib.nullcontext()
    with installed:
        result = train(model, batches, arguments.device, arguments.label)
        if arguments.run == "inductor_ce":
            x, y = split(batches[0].to(arguments.device))
            report = inductor_ce.explain(loss_function(model, arguments.device), x, y)
            result |= {"explain": str(report), "sites": len(report.sites)}
    arguments.json.write_text(json.dumps(result))


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--run", choices=["plain", "inductor_ce"], required=True, help="what compiles the model"
    )
    parser.add_argument("--tokens", type=Path, required=True, help="the corpus: a 1-D tensor of token ids")
    parser.add_argument(
        "--json", type=Path, required=True, help="where to write the losses, times and memory"
    )
    parser.add_argument("--steps", type=int, default=STEPS, help="training steps (default: %(default)s)")
    parser.add_argument("--device", default=default_device(), help="cpu or cuda (default: %(default)s)")
    parser.add_argument("--untied", action="store_true", help="give the head a weight of its own")
    parser.add_argument("--reverse-rows", action="store_true", help="the same batches, rows in reverse order")
    parser.add_argument("--label", default="training", help="the progress bar's text")
    return parser.parse_args()


def sample_batches(tokens: torch.Tensor, sizes: Sizes, steps: int) -> list[torch.Tensor]:
    """`steps` batches [B, S+1] of random windows of the corpus; the same ones for every run."""
    generator = torch.Generator().manual_seed(0)
    windows = tokens.unfold(0, sizes.S + 1, 1)
    return [
        windows[torch.randint(len(windows), (sizes.B,), generator=generator)].long() for _ in range(steps)
    ]


def split(batch: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs x [B, S] and next-token labels y [B, S] of a batch [B, S+1]."""
    return batch[:, :-1].contiguous(), batch[:, 1:].contiguous()


def loss_function(model: Transformer, device: str) -> Callable[..., torch.Tensor]:
    """The model's loss, under bfloat16 autocast on a GPU."""

    def loss(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            return model(x, y)

    return loss


def train(model: Transformer, batches: list[torch.Tensor], device: str, label: str) -> dict:
    """Train on each batch once; the losses, the times, and the memory after the warm-up.

    On a GPU `memory` is what its allocator had handed out in the last steps, from `drawn[0]` to `drawn[1]`;
    of a CPU it is empty, for there the memory of a process is seen best from outside.
    """
    loss_of = torch.compile(loss_function(model, device))
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3 if device == "cpu" else 1e-3, betas=(0.9, 0.95))
    losses, seconds = [], []

    def take(batch: torch.Tensor) -> None:
        x, y = split(batch.to(device))
        start = time.perf_counter()
        loss = loss_of(x, y)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())  # also waits for the GPU
        seconds.append(time.perf_counter() - start)
        bar.update()

    with tqdm(total=len(batches), desc=label) as bar:
        for batch in batches[:WARM_UP]:
            take(batch)
        at_rest = reset_peak_memory(device)
        for batch in batches[WARM_UP:-DRAWN]:
            take(batch)
        with memory_samples(device) as memory:
            start = time.perf_counter()
            for batch in batches[WARM_UP:][-DRAWN:]:
                take(batch)
            end = time.perf_counter()
    return {
        "losses": losses,
        "first_step_s": seconds[0],
        "step_s": statistics.median(seconds[WARM_UP:]),
        "rest_bytes": at_rest,
        "peak_bytes": peak_memory(device),
        "drawn": (start, end),
        "memory": memory,
    }


def memory_samples(device: str) -> contextlib.AbstractContextManager[Samples]:
    """What the CUDA allocator has handed out within the block."""
    return sampled(torch.cuda.memory_allocated, 0.001) if device == "cuda" else contextlib.nullcontext([])


def reset_peak_memory(device: str) -> int:
    """Start `peak_memory` anew and return the bytes in use; where /proc forbids it the older peak stays."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    return process_status("VmRSS")


def peak_memory(device: str) -> int:
    """The most bytes in use since the reset: the CUDA allocator's, or this process's resident set."""
    return torch.cuda.max_memory_allocated() if device == "cuda" else process_status("VmHWM")


def process_status(key: str) -> int:
    """A size in bytes from /proc/self/status."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(f"{key}:"))


if __name__ == "__main__":
    main()
