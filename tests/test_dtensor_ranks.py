"""Losses over DTensor logits in real processes, over gloo, against a dense float64 reference."""

import functools

import pytest
from dtensor_cases import CASES, Setup, check, on_rank
from ranks import spawn

TWO = [(name, Setup((2,), V=23)) for name in CASES]


@functools.cache
def two():
    return spawn(on_rank, 2, TWO)


@pytest.mark.parametrize(("name", "setup"), TWO, ids=lambda x: x if isinstance(x, str) else "")
def test_two_ranks(name, setup):
    check(two(), name, setup)
