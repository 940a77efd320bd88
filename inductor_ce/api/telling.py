"""Who tells what is fused in the graph that is being compiled: its compiler's wrapper, or else the pass."""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Iterator

# Whether the losses of the graph that is being compiled have been told already.
_told: contextvars.ContextVar[bool] = contextvars.ContextVar("inductor_ce_told", default=False)


def is_told() -> bool:
    return _told.get()


@contextlib.contextmanager
def telling() -> Iterator[None]:
    """Within, what is fused has been told: the pass that fuses tells nothing."""
    token = _told.set(True)
    try:
        yield
    finally:
        _told.reset(token)
