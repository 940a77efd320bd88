"""Other libraries: how they are found, and why one does not take part."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import logging
import sys
from dataclasses import dataclass
from typing import Any

DISTRIBUTIONS = {
    "liger_kernel": "liger-kernel",
    "quack": "quack-kernels",
    "cut_cross_entropy": "cut-cross-entropy",
    "transformer_engine": "transformer-engine",
}


@dataclass(frozen=True)
class NotOffered:
    """Why a system does not take part."""

    reason: str

    @classmethod
    def because(cls, error: Exception) -> NotOffered:
        """The first line of what a system raised; of what lies within, where the compiler wrapped it."""
        error = getattr(error, "inner_exception", error)
        return cls(f"failed: {type(error).__name__}: {str(error).partition(chr(10))[0]}")


def find(module: str, name: str) -> Any:
    """`module.name`, or NotOffered where it cannot be had."""
    try:
        return getattr(importlib.import_module(module), name)
    except Exception as error:  # a peer may raise anything while it is imported; ours must run all the same
        package = module.partition(".")[0]
        if isinstance(error, ModuleNotFoundError) and error.name == package:
            return NotOffered(f"{package} is not installed")
        return NotOffered(f"{module} cannot be imported: {type(error).__name__}: {error}")


def quack(module: str, name: str) -> Any:
    """The same of quack, which keeps its kernels by keys of all that they read, and refuses what has none.

    nvidia-cutlass-dsl 4.7 has a logger there, which is therefore given its name for a key, before quack is
    imported, as it asks then.
    """
    if "quack" in sys.modules or importlib.util.find_spec("quack"):
        logging.Logger.__quack_semantic_key__ = lambda self: self.name  # type: ignore[attr-defined]
    return find(f"quack.{module}", name)


def versions() -> dict[str, str | None]:
    """The installed version of each peer, None where it is absent."""
    found: dict[str, str | None] = {}
    for name, distribution in DISTRIBUTIONS.items():
        try:
            found[name] = importlib.metadata.version(distribution)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    return found
