"""Shared by all tests: the gpu marker, and a clean slate round each test."""

import pytest
import torch
from harness import clean_slate


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
