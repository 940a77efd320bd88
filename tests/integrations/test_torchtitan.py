"""torchtitan's losses, compiled apart from its model, under its FSDP2, on two ranks over gloo."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from documented import (
    EAGER,
    OURS,
    PLAIN,
    STEPS,
    assert_documented,
    explained,
    rows_of_the_table,
    run,
)
from harness import clean_slate, without_codegen
from ranks import close_groups, spawn
from small_models import V, batch_of
from torch.distributed.fsdp import FSDPModule

pytest.importorskip("torchtitan", reason="torchtitan is not installed: make integrations")

pytestmark = pytest.mark.xdist_group("integrations over ranks")
RANKS = 2
HEADINGS = ("torchtitan", "torchtitan, chunked loss")


def names(rank: int) -> dict[str, Any]:
    from torchtitan.components.loss import ChunkedLossWrapper, CrossEntropyLoss
    from torchtitan.config import CompileConfig, ParallelismConfig, TrainingConfig
    from torchtitan.distributed import ParallelDims, parallel_dims
    from torchtitan.models.common.attention import ScaledDotProductAttention
    from torchtitan.models.llama3 import llama3_configs, parallelize_llama
    from torchtitan.models.llama3.model import Llama3Model

    config: Any = llama3_configs["debugmodel"](attn_backend="flex")
    config.layers = config.layers[:1]
    config.layers[0].attention.inner_attention = ScaledDotProductAttention.Config()  # for CPUs
    config.vocab_size = config.tok_embeddings.num_embeddings = config.lm_head.out_features = V
    parallel_dims.device_type = "cpu"  # it takes GPUs for granted
    parallelism = ParallelismConfig(data_parallel_shard_degree=RANKS, spmd_backend="partial_dtensor")
    dims = ParallelDims.from_config(parallelism, RANKS)
    settings = {
        "parallel_dims": dims,
        "training": TrainingConfig(mixed_precision_param="float32"),
        "parallelism": parallelism,
        "ac_config": None,
        "dump_folder": "",
    }
    torch.manual_seed(0)
    model = Llama3Model(config)
    model.init_states(buffer_device=torch.device("cpu"))
    batches = [batch_of(seed=10 * step + rank) for step in range(STEPS)]

    def parallelized(*given: Any, **arguments: Any) -> Any:
        made = parallelize_llama(*given, **arguments)
        for module in made.modules():
            if isinstance(module, FSDPModule):
                module.set_force_sum_reduction_for_comms(True)  # gloo has no other
        return made

    @functools.cache
    def optimizer(model: Any) -> torch.optim.Optimizer:
        return torch.optim.SGD(model.parameters(), lr=0.1)

    return {
        "model": model,
        "settings": settings,
        "compile_config": CompileConfig(enable=True),
        "batches": [(batch["input_ids"], batch["labels"]) for batch in batches],
        "tokens": torch.tensor(40.0),
        "optimizer": optimizer,
        "parallelize_llama": parallelized,
        "CrossEntropyLoss": CrossEntropyLoss,
        "ChunkedLossWrapper": ChunkedLossWrapper,
    }


def on_rank(rank: int) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {}
    for heading in HEADINGS:
        found[heading] = {how: run(heading, names(rank), how) for how in (EAGER, PLAIN, OURS)}
        found[heading]["explained"] = explained(_asked(found[heading][OURS].names), {})
        for how in (EAGER, PLAIN, OURS):
            found[heading][how].names.clear()
    return found


def _asked(names: dict[str, Any]) -> Callable[[], Any]:
    """What is compiled: the loss, of logits that are given to it."""
    model, loss, (x, y) = names["model"], names["loss_function"], names["batches"][0]
    with clean_slate(), without_codegen():
        logits = model.lm_head(model(x)) if model._skip_lm_head else model(x)
    inner = getattr(loss, "loss_fn", loss)
    return lambda: inner.fn(logits, y)


@pytest.fixture(scope="module")
def found() -> Iterator[list[dict[str, dict[str, Any]]]]:
    yield spawn(on_rank, RANKS, new=True)
    close_groups()  # torchtitan changes torch where it is imported


@pytest.mark.parametrize("heading", HEADINGS)
def test_program(heading: str, found: list[dict[str, dict[str, Any]]]):
    told = rows_of_the_table()[heading]
    for rank in found:
        eager, plain, ours = (rank[heading][how] for how in (EAGER, PLAIN, OURS))
        assert_documented(told, eager, plain, ours, None, rank[heading]["explained"])
    first, second = (rank[heading][OURS] for rank in found)
    assert first.losses != second.losses  # each has batches of its own
    torch.testing.assert_close(first.gradients, second.gradients)
