"""Shared by the integrations: compilation without code, and a count of the logits that are made."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import pytest
from harness import without_codegen
from torch import Tensor

import inductor_ce
from inductor_ce.rewriting.recipes import Recipe


@pytest.fixture
def cheap() -> Iterator[None]:
    """No code is generated; what compiles is wrapped when we are installed, and put back before this ends."""
    with without_codegen():
        yield
        inductor_ce.uninstall()


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many rows of logits were made at a time, in order."""
    rows: list[int] = []
    make = Recipe.make

    def counted(self: Recipe, parts: Sequence[Tensor]) -> Tensor:
        rows.append(parts[0].shape[:-1].numel())
        return make(self, parts)

    monkeypatch.setattr(Recipe, "make", counted)
    return rows
