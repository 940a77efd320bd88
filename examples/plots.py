"""The examples' pictures."""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt


def plot_losses(losses: dict[str, list[float]], baseline: str, path: Path) -> None:
    """The loss of each run, and below it how far each run is from `baseline`."""
    figure, (upper, lower) = plt.subplots(2, 1, figsize=(7, 6), sharex=True, layout="constrained")
    for name, column in losses.items():
        (line,) = upper.plot(column, label=name, linewidth=4 if name == baseline else 1.5)
        difference = [abs(a - b) for a, b in zip(column, losses[baseline], strict=True)]
        if name != baseline:
            lower.plot(difference, label=name, color=line.get_color())
    upper.set_ylabel("next-token loss")
    upper.legend(frameon=False)
    lower.set_ylabel(f"distance from '{baseline}'")
    lower.set_xlabel("step")
    lower.set_ylim(bottom=0)
    save(figure, path)


def plot_memory(added: dict[str, int], logits: int, path: Path) -> None:
    """The bytes that a step of each run adds at its peak, beside the size of one tensor of logits."""
    figure, axes = plt.subplots(figsize=(7, 0.5 * len(added) + 1.5), layout="constrained")
    bars = axes.barh(list(added)[::-1], [size / 1e6 for size in added.values()][::-1])
    axes.bar_label(bars, fmt="%.0f", padding=-30, color="white")
    axes.axvline(logits / 1e6, color="C1", linestyle="--", label="one tensor of logits [N, V]")
    axes.set_xlabel("peak memory that a step adds, MB")
    figure.legend(loc="outside upper right", frameon=False)
    save(figure, path)


def plot_batches(sizes: dict[str, dict[int, int]], limit: int, how: str, path: Path) -> None:
    """The bytes that a batch of so many tokens needs, for every run, and the limit."""
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    for name, column in sizes.items():
        axes.plot(list(column), [size / 1e9 for size in column.values()], "o-", label=name)
    axes.axhline(limit / 1e9, color="black", linestyle="--", label="limit")
    axes.set_xscale("log", base=2)
    axes.set_ylim(bottom=0)
    axes.set_xlabel("tokens in a batch")
    axes.set_ylabel(f"peak memory of a step, GB ({how})")
    axes.legend(frameon=False)
    save(figure, path)


def save(figure: plt.Figure, path: Path) -> None:
    figure.savefig(path, dpi=150)
    plt.close(figure)
