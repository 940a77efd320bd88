"""Train a small language model with plain torch.compile and with inductor_ce, and compare the two.

What to look at is memory.png: the memory of a training step over time. Plain torch.compile has all logits in
memory, from the end of the forward to that of the backward; inductor_ce those of some tokens at a time.

The text is the Python standard library's own source, cut into a byte-pair vocabulary that is trained on it;
the model (transformer.py) is plain PyTorch. Each run (train.py) takes the same steps on the same batches, in
a process of its own. Plain torch.compile runs three times, once with the rows of each batch in reverse order:
how far these runs lie apart is the noise that another order of the same sums makes. Prints what
`inductor_ce.explain` found, the losses, step times and peak memory; writes memory.png and loss.png. On a GPU
the model is larger and runs in bfloat16.
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

from corpus import token_file
from plots import plot_losses, plot_memory
from sampling import resident_bytes, sampled
from train import STEPS, WARM_UP, Sizes, default_device

TRAIN = Path(__file__).with_name("train.py")
RUNS = {
    "plain": ["--run", "plain"],
    "inductor_ce": ["--run", "inductor_ce"],
    "plain again": ["--run", "plain"],
    "plain reversed": ["--run", "plain", "--reverse-rows"],
}
COMPARED = ("plain", "inductor_ce")


def main() -> None:
    arguments = parse_arguments()
    sizes = Sizes.for_device(arguments.device)
    arguments.out.mkdir(parents=True, exist_ok=True)
    tokens = token_file(arguments.out, sizes.V)
    results = {name: run(name, tokens, arguments) for name in RUNS}
    print(heading(sizes, arguments), results["inductor_ce"]["explain"], *tables(results), sep="\n\n")
    device = arguments.device
    print(memory_note(device), differences(results), saving(results, sizes, device), sep="\n\n")
    pictures(results, sizes, arguments)
    if not results["inductor_ce"]["sites"]:
        sys.exit("inductor_ce rewrote no loss: the comparison above says nothing")


def parse_arguments() -> argparse.Namespace:
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    device, out = default_device(), Path("build/quickstart")
    parser.add_argument(
        "--steps", type=int, default=STEPS, help="training steps of a run (default: %(default)s)"
    )
    parser.add_argument("--untied", action="store_true", help="give the head a weight of its own")
    parser.add_argument("--device", choices=["cpu", "cuda"], default=device, help="(default: %(default)s)")
    parser.add_argument(
        "--out", type=Path, default=out, help="folder for every output (default: %(default)s)"
    )
    arguments = parser.parse_args()
    if arguments.steps <= WARM_UP:
        parser.error(f"--steps must be more than the {WARM_UP} that warm up")
    return arguments


def run(name: str, tokens: Path, arguments: argparse.Namespace) -> dict:
    """One training run in a new process: what train.py writes of it, on a CPU with its memory over time."""
    path = arguments.out / f"{name.replace(' ', '_')}.json"
    command = [sys.executable, TRAIN, *RUNS[name], "--label", name, "--tokens", tokens, "--json", path]
    command += ["--steps", str(arguments.steps), "--device", arguments.device]
    # glibc then hands every large tensor back at once, and the resident set is that of the tensors in use.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": str(2**20)}
    command += ["--untied"] * arguments.untied
    with (
        subprocess.Popen(command, env=environment) as process,
        sampled(lambda: resident_bytes(process.pid)) as memory,
    ):
        if process.wait():
            raise subprocess.CalledProcessError(process.returncode, command)
    result = json.loads(path.read_text())
    return result | {"memory": result["memory"] or memory}


def heading(sizes: Sizes, arguments: argparse.Namespace) -> str:
    """The sizes of the run on one line."""
    return (
        f"\n{arguments.device}: N = {sizes.B} x {sizes.S} tokens a step, V = {sizes.V}, D = {sizes.D}, "
        f"{sizes.layers} layer{'s' * (sizes.layers > 1)}, {'untied' if arguments.untied else 'tied'} head"
    )


def tables(results: dict[str, dict]) -> tuple[str, str]:
    """The losses, a column for each run, and under the same columns times and memory."""
    columns = [result["losses"] for result in results.values()]
    losses = [row("loss at step", list(results))]
    losses += [
        row(str(i), [f"{loss:.6f}" for loss in step]) for i, step in enumerate(zip(*columns, strict=True))
    ]
    costs = [row("", list(results))]
    costs += [
        row("first step, s", [f"{result['first_step_s']:.2f}" for result in results.values()]),
        row("median step, ms", [f"{1e3 * result['step_s']:.2f}" for result in results.values()]),
        row("peak memory, MB", [megabytes(result["peak_bytes"]) for result in results.values()]),
        row("a step adds, MB", [megabytes(added_bytes(result)) for result in results.values()]),
    ]
    return "\n".join(losses), "\n".join(costs)


def row(title: str, cells: list[str]) -> str:
    return f"{title:16}" + "".join(f"{cell:>16}" for cell in cells)


def megabytes(size: int) -> str:
    return f"{size / 1e6:.0f}"


def added_bytes(result: dict) -> int:
    return result["peak_bytes"] - result["rest_bytes"]


def memory_note(device: str) -> str:
    """How the numbers in the table were taken."""
    memory = (
        "the CUDA allocator's"
        if device == "cuda"
        else "the process's resident set, torch included, and large tensors leave it when they are freed"
    )
    return (
        "The first step compiles what Inductor's caches do not hold; "
        f"the median leaves out the first {WARM_UP} steps.\n"
        f"Memory is {memory}.\nWhat a step adds is its peak less what is in use between steps."
    )


def differences(results: dict[str, dict]) -> str:
    """How far inductor_ce's losses are from plain torch.compile's, beside the noise of the plain runs."""
    plain = results["plain"]["losses"]
    distance = {
        name: max(abs(a - b) for a, b in zip(result["losses"], plain, strict=True))
        for name, result in results.items()
    }
    noise = max(distance["plain again"], distance["plain reversed"])
    ours = distance["inductor_ce"]
    return (
        f"Largest difference of a loss from plain: inductor_ce {ours:.2e}, the other plain runs {noise:.2e}."
    )


def saving(results: dict[str, dict], sizes: Sizes, device: str) -> str:
    """What a step of each adds to the memory in use, how long it takes, and what is saved."""
    plain, ours = (results[name] for name in COMPARED)
    less = added_bytes(plain) - added_bytes(ours)
    return (
        f"A step adds {megabytes(added_bytes(plain))} MB with plain torch.compile and "
        f"{megabytes(added_bytes(ours))} MB with inductor_ce: {megabytes(less)} MB less. "
        f"The logits are {megabytes(sizes.logits_bytes(device))} MB.\n"
        f"It takes {1e3 * plain['step_s']:.0f} ms and {1e3 * ours['step_s']:.0f} ms, "
        f"{ours['step_s'] / plain['step_s']:.2f} times as long."
    )


def pictures(results: dict[str, dict], sizes: Sizes, arguments: argparse.Namespace) -> None:
    """Write memory.png and loss.png."""
    loss, memory = arguments.out / "loss.png", arguments.out / "memory.png"
    plot_losses({name: result["losses"] for name, result in results.items()}, "plain", loss)
    curves = {name: curve(results[name]) for name in COMPARED}
    plot_memory(curves, sizes.logits_bytes(arguments.device), memory)
    print(f"\nWrote {memory} and {loss}.")


def curve(result: dict) -> list[tuple[float, int]]:
    """(seconds, bytes beyond what is in use between steps) over the steps that are drawn."""
    start, end = result["drawn"]
    return [(at - start, size - result["rest_bytes"]) for at, size in result["memory"] if start <= at <= end]


if __name__ == "__main__":
    main()
