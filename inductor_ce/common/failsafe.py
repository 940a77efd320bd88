"""A failure of ours must not end the user's program: it is logged, warned of once, and told to the caller."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable
from typing import Any, TypeVar

from .compat.dynamo import RestartAnalysis

log = logging.getLogger("inductor_ce")

T = TypeVar("T")

_warned = False


def attempt(what: str, step: Callable[..., T], *args: Any) -> tuple[T | None, Exception | None]:
    """(step(*args), None), or (None, the exception). `what` says what a failure leaves behind.

    That Dynamo is to read a function again, with a number as a constant, is no failure.
    """
    global _warned
    try:
        return step(*args), None
    except RestartAnalysis:
        raise
    except Exception as error:
        log.error("inductor_ce failed: %s", what, exc_info=error)
        if not _warned:
            _warned = True
            warnings.warn(f"inductor_ce failed: {what} ({type(error).__name__}: {error})", stacklevel=3)
        return None, error
