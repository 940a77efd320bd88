"""Options: what a user may set, checked once at the door."""

from __future__ import annotations

import warnings
from dataclasses import asdict, dataclass, fields
from typing import Any

from .errors import OptionError
from .strategies import MATERIALISE, TOKEN_CHUNKS, VOCAB_SLABS

ON_MISS = ("ignore", "warn", "raise")
RETURNED = LAZY, EAGER, NAN = "lazy", "eager", "nan"
MADE_IN = BACKWARD, FORWARD = "backward", "forward"
WANTED = ("auto", MATERIALISE, TOKEN_CHUNKS, VOCAB_SLABS)


@dataclass(frozen=True)
class Options:
    """What `install(**options)` and `torch.compile(..., options={...})` accept.

    Attributes:
        min_vocab: losses over fewer classes than this are left to plain Inductor, which is as good
            there. They are no misses: `small` of a report of `explain` has them. At least 2.
        strategy: how the linear layer before the logits is dealt with. "materialise" keeps all logits in
            memory; "token_chunks" makes those of some rows at a time, with their gradient; "vocab_slabs"
            those of some classes at a time, and again in the backward. "auto" chooses.
        memory_budget: extra memory that the head may take beyond the gradients, in bytes (an int), or as a
            fraction of the logits (a float).
        on_miss: what happens when a loss is seen and left as it was: "ignore" (it is still counted,
            logged and listed by `explain`), "warn", or "raise" a `MissError`.
        verify: compute each rewritten loss both ways, compare values and gradients when they are first
            made, and use the original, with an error in the log, where they differ. For a run of a few
            steps: it costs the time and memory of both. The original has all logits in memory, so that every
            head stays whole: what it would be in pieces is not compared.
        returned_logits: what a compiled function returns where it would return the logits of a rewritten loss
            that nothing else needs. "lazy": a tensor that makes them when somebody reads it, from the hidden
            states and the weight, which it keeps; "eager": the logits, all of which are then in memory;
            "nan": NaN of the same shape, dtype and device, one element expanded, without a gradient.
        gradient: where the gradient of logits that are whole is made. "backward": from the logits, read again
            there: three passes over memory. "forward": with the statistics, by one kernel that reads them
            once for both, where all rows share one scalar from above: two passes. The backward multiplies by
            that scalar, for which it does nothing if it is 1; else it reads and writes the gradient once
            more, four passes in all, and rounds it once more. From the forward on the gradient takes the
            memory of the logits. Heads in pieces make theirs in the forward in any case.
    """

    min_vocab: int = 1024
    strategy: str = "auto"
    memory_budget: int | float | None = None
    on_miss: str = "ignore"
    verify: bool = False
    returned_logits: str = LAZY
    gradient: str = BACKWARD

    def __post_init__(self) -> None:
        named = {"strategy": WANTED, "returned_logits": RETURNED, "gradient": MADE_IN, "on_miss": ON_MISS}
        for name, allowed in named.items():
            if (value := getattr(self, name)) not in allowed:
                raise OptionError(f"{name} must be one of {', '.join(map(repr, allowed))}, got {value!r}")
        if not _is_budget(self.memory_budget):
            raise OptionError(
                f"memory_budget must be bytes (an int), a fraction (a float) or None, and positive, "
                f"got {self.memory_budget!r}"
            )
        if isinstance(self.min_vocab, bool) or not isinstance(self.min_vocab, int) or self.min_vocab < 2:
            raise OptionError(f"min_vocab must be an int of at least 2, got {self.min_vocab!r}")
        if not isinstance(self.verify, bool):
            raise OptionError(f"verify must be True or False, got {self.verify!r}")

    def key(self) -> tuple[tuple[str, Any], ...]:
        """A stable value that differs whenever the options do, for cache keys."""
        return tuple(sorted(asdict(self).items()))


def _is_budget(value: Any) -> bool:
    if value is None:
        return True
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value < float("inf")


def option_names() -> list[str]:
    return [f.name for f in fields(Options)]


DROP_LOGITS = "drop_logits"


def _without_drop_logits(given: dict[str, Any]) -> dict[str, Any]:
    """Options with `returned_logits` in place of its former name."""
    drop = given[DROP_LOGITS]
    if not isinstance(drop, bool):
        raise OptionError(f"{DROP_LOGITS} must be True or False, got {drop!r}")
    told = f'{DROP_LOGITS} is now returned_logits="nan"; the old name goes with the next release'
    warnings.warn(told, DeprecationWarning, stacklevel=4)
    rest = {name: value for name, value in given.items() if name != DROP_LOGITS}
    return {"returned_logits": NAN, **rest} if drop else rest


def make_options(given: dict[str, Any]) -> Options:
    """Options from keywords. Raises OptionError, with the valid names, for one that does not exist."""
    if DROP_LOGITS in given:
        given = _without_drop_logits(given)
    unknown = sorted(set(given) - set(option_names()))
    if unknown:
        raise OptionError(
            f"unknown option{'s' * (len(unknown) > 1)} {', '.join(map(repr, unknown))}; "
            f"valid options are {', '.join(option_names())}"
        )
    return Options(**given)
