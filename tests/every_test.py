"""Round every test, where tests run: their order, the gpu marker, a clean slate; a plugin of pytest."""

import logging
import traceback

import pytest
import ranks
import torch
from harness import clean_slate, collect_seldom
from pairwise import left_to_others
from releases import skip_if_limit

from inductor_ce.heads import extra_memory


def pytest_unconfigure():
    ranks.close_groups()


# What takes long goes first, so that both workers have something to do until the end; and `docs`, whose lines
# of README.md take a gigabyte, while a worker has little else.
LONG = (
    *(
        "dtensor_ranks",
        "docs",
        "templates",
        "traps",
        "lowering",
        "head",
        "head_memory",
        "functional_group",
        "patterns",
    ),
    *("regions", "lazy_dtensor", "backend", "head_programs", "functional", "rowlocal", "numerics"),
    *(
        "explain",
        "generated",
        "confidence",
        "linear_cross_entropy",
        "lazy_inputs",
        "dtensor_product",
        "head_traps",
    ),
    *("head_sides", "counted_rows", "learnt_scale", "exported", "powers", "verify", "recognise"),
)
_PLACE = {f"test_{name}.py": place for place, name in enumerate(LONG)}


@pytest.hookimpl(trylast=True)  # of what -k and -m choose
def pytest_collection_modifyitems(config, items):
    left_out = left_to_others(items)
    if left_out:
        config.hook.pytest_deselected(items=list(left_out))
        items[:] = [item for item in items if item not in left_out]
    items.sort(key=lambda item: _PLACE.get(item.path.name, len(LONG)))
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a GPU")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)


def pytest_collection_finish():
    collect_seldom()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item):
    try:
        return (yield)
    except Exception as error:
        skip_if_limit(error)
        raise


@pytest.fixture(autouse=True)
def _clean_slate():
    with clean_slate():
        yield


@pytest.fixture(autouse=True)
def _nothing_fails_inside(request):
    """A step of the package that fails leaves a loss as it was, so that numbers alone do not tell."""
    failed = _Failed(logging.ERROR)
    logger = logging.getLogger("inductor_ce")
    logger.addHandler(failed)
    try:
        yield
    finally:
        logger.removeHandler(failed)
    if request.node.get_closest_marker("fails_inside") is None:
        assert not failed.told


class _Failed(logging.Handler):
    def __init__(self, level):
        super().__init__(level)
        self.told = []

    def emit(self, record):
        if record.exc_info:  # not where `verify` has found a wrong number
            self.told.append("".join((record.getMessage(), *traceback.format_exception(*record.exc_info))))


@pytest.fixture
def much(monkeypatch):
    """As if float32 beside 16-bit gradients cost much."""
    monkeypatch.setattr(extra_memory, "LITTLE", 0)
    monkeypatch.setattr(extra_memory, "LITTLE_OF_LOGITS", 0)
