"""Shared by all tests: the folder of compiled code. What needs torch is in `every_test.py`."""

import functools
import gc
import os
import tempfile
from pathlib import Path

import pytest
from xdist.scheduler import LoadFileScheduling

FOLDER = "TORCHINDUCTOR_CACHE_DIR"
NAMED = FOLDER in os.environ  # importing Inductor puts its usual folder there


@pytest.hookimpl(trylast=True)
def pytest_configure(config):
    """Code is compiled once for all workers of a run, in a folder that goes with it unless the environment
    names one: a run that was killed leaves half a library, which would fail the next one.

    A process that hands the tests out to workers runs none, and they wait for it: it does without torch.
    """
    works = hasattr(config, "workerinput")
    if not works and not NAMED:
        folder = tempfile.TemporaryDirectory(prefix="inductor-", ignore_cleanup_errors=True)
        os.environ[FOLDER] = folder.name
        config.add_cleanup(folder.cleanup)
    if works or getattr(config.option, "dist", "no") == "no":
        gc.disable()  # until all is imported: `collect_seldom`
        config.pluginmanager.import_plugin("every_test")


class RanksTogether(LoadFileScheduling):
    """The files whose tests ask ranks all go to one worker, where these live on from file to file."""

    def _split_scope(self, nodeid):
        file = super()._split_scope(nodeid)
        return "ranks" if asks_ranks(Path(__file__).with_name(Path(file).name)) else file


@functools.cache
def asks_ranks(file):
    return file.exists() and "from ranks import" in file.read_text()


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    return RanksTogether(config, log) if config.getvalue("dist") == "loadfile" else None
