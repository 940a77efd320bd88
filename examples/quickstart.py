"""Train a small language model with plain torch.compile and with inductor_ce, and compare the two.

The text is the Python standard library's own source, cut into a byte-pair vocabulary that is trained on it;
the model (transformer.py) is plain PyTorch. Each run (train.py) takes the same steps on the same batches, in
a process of its own. Plain torch.compile runs three times, once with the rows of each batch in reverse order:
how far these runs lie apart is the noise that another order of the same sums makes. Prints what
`inductor_ce.explain` found, the losses, step times and peak memory; writes loss.png and memory.png. On a GPU
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
from train import WARM_UP, Sizes, default_device

TRAIN = Path(__file__).with_name("train.py")
RUNS = {
    "plain": ["--run", "plain"],
    "inductor_ce": ["--run", "inductor_ce"],
    "plain again": ["--run", "plain"],
    "plain reversed": ["--run", "plain", "--reverse-rows"],
}


def main() -> None:
    arguments = parse_arguments()
    sizes = Sizes.for_device(arguments.device)
    arguments.out.mkdir(parents=True, exist_ok=True)
    tokens = token_file(arguments.out, sizes.V)
    results = {name: run(name, tokens, arguments) for name in RUNS}
    print(heading(sizes, arguments), results["inductor_ce"]["explain"], *tables(results), sep="\n\n")
    print(memory_note(arguments.device), differences(results), sep="\n\n")
    pictures(results, sizes, arguments)
    if not results["inductor_ce"]["sites"]:
        sys.exit("inductor_ce rewrote no loss: the comparison above says nothing")


def parse_arguments() -> argparse.Namespace:
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    device, out = default_device(), Path("build/quickstart")
    parser.add_argument(
        "--steps", type=int, default=40, help="training steps of a run (default: %(default)s)"
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
    """One training run in a new process: what train.py writes of it."""
    path = arguments.out / f"{name.replace(' ', '_')}.json"
    command = [sys.executable, TRAIN, *RUNS[name], "--label", name, "--tokens", tokens, "--json", path]
    command += ["--steps", str(arguments.steps), "--device", arguments.device]
    # glibc then hands every large tensor back at once, and the resident set is that of the tensors in use.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": str(2**20)}
    subprocess.run(command + ["--untied"] * arguments.untied, check=True, env=environment)
    return json.loads(path.read_text())


def heading(sizes: Sizes, arguments: argparse.Namespace) -> str:
    """The sizes of the run on one line."""
    return (
        f"\n{arguments.device}: N = {sizes.B} x {sizes.S} tokens a step, V = {sizes.V}, D = {sizes.D}, "
        f"{sizes.layers} layers, {'untied' if arguments.untied else 'tied'} head"
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
        row("peak memory, MB", [f"{result['peak_bytes'] / 1e6:.0f}" for result in results.values()]),
        row("a step adds, MB", [f"{added_bytes(result) / 1e6:.0f}" for result in results.values()]),
    ]
    return "\n".join(losses), "\n".join(costs)


def row(title: str, cells: list[str]) -> str:
    return f"{title:16}" + "".join(f"{cell:>16}" for cell in cells)


def added_bytes(result: dict) -> int:
    return result["peak_bytes"] - result["rest_bytes"]


def memory_note(device: str) -> str:
    """How the numbers in the table were taken."""
    memory = "the CUDA allocator's" if device == "cuda" else "the process's resident set, torch included"
    return (
        "The first step compiles what Inductor's caches do not hold; "
        f"the median leaves out the first {WARM_UP} steps.\n"
        f"Memory is {memory}; what a step adds is its peak less what is in use between steps."
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


def pictures(results: dict[str, dict], sizes: Sizes, arguments: argparse.Namespace) -> None:
    """Write loss.png and memory.png."""
    loss, memory = arguments.out / "loss.png", arguments.out / "memory.png"
    plot_losses({name: result["losses"] for name, result in results.items()}, "plain", loss)
    added = {name: added_bytes(result) for name, result in results.items()}
    plot_memory(added, sizes.logits_bytes(arguments.device), memory)
    print(f"\nWrote {loss} and {memory}.")


if __name__ == "__main__":
    main()
