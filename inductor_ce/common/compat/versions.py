"""Which releases of torch are supported, and what is said where another one is installed."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

from ..errors import AFTER_LAST_TORCH, FIRST_TORCH, UnsupportedTorchError, unsupported


@contextlib.contextmanager
def of_supported_torch() -> Iterator[None]:
    """Round imports of private names: where one is missing, torch is another than those that have it."""
    try:
        yield
    except ImportError as missing:
        raise UnsupportedTorchError(unsupported(torch.__version__)) from missing


def check_torch(version: str = torch.__version__) -> None:
    """Raise UnsupportedTorchError, naming the supported versions, unless `version` is one of them."""
    major, minor = (int(part) for part in version.split(".")[:2])
    if not FIRST_TORCH <= (major, minor) < AFTER_LAST_TORCH:
        raise UnsupportedTorchError(unsupported(version))
