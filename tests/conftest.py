"""Shared by all tests: the gpu marker, and a clean slate round each test."""

import logging
import os
import tempfile

import pytest
import torch
from harness import clean_slate
from torch._inductor.runtime.cache_dir_utils import cache_dir, default_cache_dir

from inductor_ce.heads import plan

logging.getLogger("torch.__trace").setLevel(logging.ERROR)  # pytest would format and keep every record


@pytest.hookimpl(trylast=True)
def pytest_configure(config):
    """Code is compiled once for all workers of a run, in a folder that goes with it unless the environment
    names one: a run that was killed leaves half a library, which would fail the next one.

    Importing Inductor has put its usual folder into the environment.
    """
    if not hasattr(config, "workerinput") and cache_dir() == default_cache_dir():
        folder = tempfile.TemporaryDirectory(prefix="inductor-", ignore_cleanup_errors=True)
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = folder.name
        config.add_cleanup(folder.cleanup)


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
