"""Shared by all tests: the gpu marker, and a clean slate round each test."""

import logging

import pytest
import torch
from harness import clean_slate

from inductor_ce.heads import plan

logging.getLogger("torch.__trace").setLevel(logging.ERROR)  # pytest would format and keep every record


def pytest_collection_modifyitems(items):
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
