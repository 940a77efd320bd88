"""Which labels are ignored: every 17th, or a share of them, in long runs or scattered."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

IGNORED_EVERY = 17
SEQUENCE = 2048
RUNS, SCATTERED = "runs", "scattered"
PATTERNS = (RUNS, SCATTERED)


@dataclass(frozen=True)
class Labels:
    """Which labels are ignored: the share `ignored` of them by `pattern`, the same at each call.

    RUNS are the starts of sequences, as prompts are, of lengths spread evenly round the share; SCATTERED
    labels have nothing to do with one another. Where `ignored` is None it is every 17th.
    """

    ignored: float | None = None
    pattern: str = ""

    def __str__(self) -> str:
        if not self.ignored:
            return f"every {IGNORED_EVERY}th ignored" if self.ignored is None else "none ignored"
        return f"{100 * self.ignored:g} % ignored, {self.pattern}"

    def mask(self, N: int, sequence: int = SEQUENCE) -> Tensor:
        """[N], on the CPU: True where the label is ignored. At least one is not."""
        if self.ignored is None:
            return torch.arange(N) % IGNORED_EVERY == 0
        if self.pattern == RUNS:
            return _runs(N, self.ignored, min(sequence, N))
        mask = torch.zeros(N, dtype=torch.bool)
        mask[torch.randperm(N, generator=_generator())[: int(self.ignored * N)]] = True
        return mask


USUAL = Labels()


def of_share(share: float, patterns: tuple[str, ...] | list[str]) -> list[Labels]:
    """The share in each pattern; one if there is nothing to arrange."""
    return [Labels(share, pattern) for pattern in patterns] if share else [Labels(0.0)]


def _runs(N: int, share: float, sequence: int) -> Tensor:
    """The lengths lie within half of what is between the share and nothing or all."""
    starts = range(0, N, sequence)
    spread = min(share, 1 - share) / 2 if len(starts) > 1 else 0.0
    shares = torch.linspace(share - spread, share + spread, len(starts), dtype=torch.float64)
    shares = shares[torch.randperm(len(starts), generator=_generator())]
    place = torch.arange(N)
    return place % sequence < (shares * sequence).floor()[place // sequence]


def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)
