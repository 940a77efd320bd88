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


def plot_memory(curves: dict[str, list[tuple[float, int]]], logits: int, path: Path) -> None:
    """The bytes that training steps add over time, a panel for each run, and the size of the logits."""
    figure, panels = plt.subplots(
        len(curves), 1, figsize=(7, 2.5 * len(curves)), sharex=True, sharey=True, layout="constrained"
    )
    for i, (axes, (name, curve)) in enumerate(zip(panels, curves.items(), strict=True)):
        times, sizes = [time for time, _ in curve], [size / 1e6 for _, size in curve]
        axes.fill_between(times, sizes, color=f"C{i}", alpha=0.25)
        axes.plot(times, sizes, color=f"C{i}", label=f"{name}, at most {max(sizes, default=0):.0f} MB")
        axes.axhline(logits / 1e6, color="black", linestyle="--", linewidth=1)
        axes.legend(frameon=False, loc="upper right", bbox_to_anchor=(1, 1.15))
    panels[-1].text(0, logits / 1e6, " one tensor of logits [N, V]", va="bottom", fontsize="small")
    every = [logits, *(size for curve in curves.values() for _, size in curve)]
    panels[0].set_ylim(0, 1.2 * max(every) / 1e6)
    panels[0].set_xlim(left=0)
    panels[-1].set_xlabel("seconds, over the last training steps")
    figure.supylabel("memory that a step adds, MB", fontsize="medium")
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
