"""Which sources make what is compiled."""

from __future__ import annotations

import functools
import hashlib
from pathlib import Path

PACKAGE = Path(__file__).parents[1]


@functools.cache
def sources(package: Path = PACKAGE) -> str:
    """A hash of all files that a compiled graph may depend on: those of every room but `bench`."""
    files = sorted(f for ending in ("py", "jinja") for f in package.rglob(f"*.{ending}"))
    digest = hashlib.sha256()
    for file in files:
        name = file.relative_to(package)
        if name.parts[0] != "bench":
            digest.update(f"{name.as_posix()} {file.stat().st_size} ".encode() + file.read_bytes())
    return digest.hexdigest()
