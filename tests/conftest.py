"""Shared by all tests: the gpu marker, and a clean slate round each test."""

import os
import zlib

import pytest
import torch
from harness import clean_slate

from inductor_ce.heads import plan

# Matrices of many like cases, of which continuous integration runs a third, always the same.
THINNED = {
    *("test_head.py", "test_head_memory.py", "test_linear_cross_entropy.py", "test_generated.py"),
    "test_rowlocal.py",
}


def is_left_out(item):
    """Whether a case of a matrix is for `ALL=1 make test` alone."""
    return item.path.name in THINNED and "[" in item.name and zlib.crc32(item.name.encode()) % 3 != 0


def pytest_collection_modifyitems(config, items):
    if not os.environ.get("ALL") and len(items) > 1000:
        left_out = [item for item in items if is_left_out(item)]
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if not is_left_out(item)]
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a GPU")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)


@pytest.fixture(autouse=True)
def _clean_slate():
    with clean_slate():
        yield


@pytest.fixture
def much(monkeypatch):
    """As if float32 beside 16-bit gradients cost much."""
    monkeypatch.setattr(plan, "LITTLE", 0)
    monkeypatch.setattr(plan, "LITTLE_OF_LOGITS", 0)
