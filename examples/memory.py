"""Find the longest batch that trains before memory runs out, with plain torch.compile and with inductor_ce.

The batch is doubled until a training step no longer fits, then bisected between the last two. The model
(transformer.py) is plain PyTorch in bfloat16; without layers it is an embedding, a norm and the head. On a
GPU every batch is really trained on, for two steps, compiled for its own length. On a CPU the figures are
those that `inductor_ce.heads.plan` gives for a head, and nothing is trained. Prints what each batch takes;
writes batch.png.
"""

import argparse
import gc
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from inductor_ce.heads.extra_memory import HeadNumbers
from inductor_ce.heads.plan import plan
from plots import plot_batches
from train import default_device
from transformer import Transformer

RUNS = {"plain": "inductor", "inductor_ce": "inductor_ce"}  # the name of a run: its backend
STRATEGIES = {"plain": "materialise", "inductor_ce": "auto"}  # and of its plan
S, HEADS = 1024, 8
STEPS = 2  # the first makes the optimizer's state
ELEMENT = 2  # bytes of a bfloat16
GB = 10**9

Needs = Callable[[int], int | None]
"""The bytes that a batch of B sequences needs at the peak, or None where it does not fit."""


def main() -> None:
    arguments = parse_arguments()
    arguments.out.mkdir(parents=True, exist_ok=True)
    limit = int(arguments.memory * GB)
    if arguments.device == "cuda":
        limit = min(limit, torch.cuda.get_device_properties(0).total_memory)
    print(heading(arguments, limit), flush=True)
    with memory_limit(arguments.device, limit):
        tried = {name: search(needs(name, arguments, limit), arguments.refine) for name in RUNS}
    print(table(tried), verdict(tried), sep="\n\n")
    picture = arguments.out / "batch.png"
    known = {name: {S * B: size for B, size in column.items() if size} for name, column in tried.items()}
    plot_batches(known, limit, "planned" if arguments.device == "cpu" else "measured", picture)
    print(f"\nWrote {picture}.")


def parse_arguments() -> argparse.Namespace:
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    device, out = default_device(), Path("build/memory")
    parser.add_argument(
        "--memory", type=float, default=8, help="the GB to stay within (default: %(default)s)"
    )
    parser.add_argument("--vocabulary", type=int, default=128256, help="(default: %(default)s)")
    parser.add_argument("--width", type=int, default=1024, help="hidden size (default: %(default)s)")
    parser.add_argument(
        "--layers", type=int, default=0, help="of the transformer before the head (default: %(default)s)"
    )
    parser.add_argument("--refine", type=int, default=3, help="bisections (default: %(default)s)")
    parser.add_argument("--device", choices=["cpu", "cuda"], default=device, help="(default: %(default)s)")
    parser.add_argument("--out", type=Path, default=out, help="folder of the picture (default: %(default)s)")
    arguments = parser.parse_args()
    if arguments.device == "cpu" and arguments.layers:
        parser.error(
            "--layers needs a GPU: on a CPU the figures are planned, and a plan is of the head alone"
        )
    if arguments.width % HEADS:
        parser.error(f"--width must be a multiple of the {HEADS} heads")
    return arguments


def heading(arguments: argparse.Namespace, limit: int) -> str:
    how = "planned, not measured" if arguments.device == "cpu" else "measured"
    return (
        f"{arguments.device}: V = {arguments.vocabulary}, D = {arguments.width}, {arguments.layers} layers, "
        f"sequences of {S} tokens, {limit / GB:.1f} GB; bytes are {how}"
    )


@contextmanager
def memory_limit(device: str, limit: int) -> Iterator[None]:
    """Let the CUDA allocator hand out no more than `limit` bytes, as a smaller GPU would."""
    if device == "cpu":
        yield
        return
    torch.cuda.set_per_process_memory_fraction(limit / torch.cuda.get_device_properties(0).total_memory)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


def search(needs: Needs, refine: int) -> dict[int, int | None]:
    """{batch: bytes or None} of all tried: 1, 2, 4, ... until one does not fit, then between the last two."""
    tried: dict[int, int | None] = {}
    too_long = 1
    while (size := needs(too_long)) is not None:
        tried[too_long] = size
        too_long *= 2
    tried[too_long] = None
    fits = too_long // 2
    for _ in range(refine):
        if too_long - fits > 1:
            middle = (fits + too_long) // 2
            tried[middle] = needs(middle)
            fits, too_long = (middle, too_long) if tried[middle] else (fits, middle)
    return dict(sorted(tried.items()))


def needs(name: str, arguments: argparse.Namespace, limit: int) -> Needs:
    if arguments.device == "cpu":
        return lambda B: planned(B, STRATEGIES[name], arguments.vocabulary, arguments.width, limit)
    return lambda B: measured(B, RUNS[name], arguments)


def planned(B: int, strategy: str, V: int, D: int, limit: int) -> int | None:
    """By the plan of the head: weights with gradients and Adam's two moments, hidden states, extra memory."""
    N = B * S
    parameters = 2 * V * D + S * D + 2 * D
    hidden = 4 * N * D  # the embedded tokens, the normed ones, and the gradients of both
    head = HeadNumbers(n=N, v=V, d=D, element=ELEMENT, weight_element=ELEMENT)
    size = ELEMENT * (4 * parameters + hidden) + plan(head, strategy=strategy).extra_bytes
    return size if size <= limit else None


def measured(B: int, backend: str, arguments: argparse.Namespace) -> int | None:
    """The peak of two training steps, or None where memory ran out. Nothing is left behind."""
    print(f"{backend}: {B * S} tokens", file=sys.stderr, flush=True)
    torch.cuda.reset_peak_memory_stats()
    peak = None
    try:
        train(B, backend, arguments)
        peak = torch.cuda.max_memory_allocated()
    except Exception as error:
        if not ran_out_of_memory(error):
            raise
    torch.compiler.reset()
    gc.collect()
    torch.cuda.empty_cache()
    return peak


def ran_out_of_memory(error: Exception) -> bool:
    """In a step, or when a kernel was tried in compilation, which tells it in the text of another error."""
    return isinstance(error, torch.OutOfMemoryError) or "out of memory" in str(error)


def train(B: int, backend: str, arguments: argparse.Namespace) -> None:
    """Two steps of AdamW on random tokens. A length of its own: what inductor_ce plans depends on it."""
    with torch.device(arguments.device):
        model = Transformer(arguments.vocabulary, arguments.width, S, arguments.layers, HEADS, tied=False)
    model.bfloat16()
    loss_of = torch.compile(model, backend=backend, dynamic=False)
    optimizer = torch.optim.AdamW(model.parameters(), foreach=False)
    x, y = torch.randint(arguments.vocabulary, (2, B, S), device=arguments.device)
    for _ in range(STEPS):
        loss_of(x, y).backward()
        optimizer.step()
        optimizer.zero_grad()


def table(tried: dict[str, dict[int, int | None]]) -> str:
    """A line for each batch, a column for each run; blank where the batch was not tried."""
    lines = [f"{'tokens':>10}" + "".join(f"{name + ', GB':>18}" for name in tried)]
    for B in sorted(set().union(*tried.values())):
        cells = ("" if B not in column else cell(column[B]) for column in tried.values())
        lines.append(f"{B * S:>10}" + "".join(f"{text:>18}" for text in cells))
    return "\n".join(lines)


def cell(size: int | None) -> str:
    return "does not fit" if size is None else f"{size / GB:.2f}"


def verdict(tried: dict[str, dict[int, int | None]]) -> str:
    best = {
        name: S * max((B for B, size in column.items() if size), default=0) for name, column in tried.items()
    }
    plain, ours = best.values()
    factor = f", {ours / plain:.1f} times as many" if plain else ""
    return f"Longest batch: {plain} tokens with plain torch.compile, {ours} with inductor_ce{factor}."


if __name__ == "__main__":
    main()
