"""The example over ranks, with a smaller model and without code generation."""

from __future__ import annotations

import contextlib
import importlib
import io
import os
import re
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from harness import without_codegen
from ranks import spawn

EXAMPLES = Path(__file__).parent.parent / "examples"
STEPS, RANKS = 3, 2
SIZES = {"B": 2, "S": 16, "D": 16, "V": 1027, "layers": 1, "heads": 2}


def on_rank(rank: int, folder: str) -> str:
    """What the example prints on this rank, whose process group is there already."""
    sys.path.insert(0, str(EXAMPLES))
    example, train = (importlib.import_module(name) for name in ("tensor_parallel", "train"))
    small: Any = train.Sizes(**SIZES)
    with (
        mock.patch.dict(os.environ, LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE=str(RANKS)),
        mock.patch.object(sys, "argv", ["tensor_parallel.py", "--steps", str(STEPS), "--out", folder]),
        mock.patch.object(train.Sizes, "for_device", lambda device: small),
        mock.patch.multiple(
            dist, init_process_group=lambda backend: None, destroy_process_group=lambda: None
        ),
        contextlib.redirect_stdout(io.StringIO()) as out,
        without_codegen(),
    ):
        example.main()
    return out.getvalue()


@pytest.mark.skipif(torch.cuda.is_available(), reason="the example takes GPUs where there are any")
def test_tensor_parallel(tmp_path: Path):
    """Two ranks train to the losses of one, through a head that each has half of."""
    tokens = torch.randint(0, SIZES["V"], (500,), generator=torch.Generator().manual_seed(0))
    name = f"tokens-py{sys.version_info.major}.{sys.version_info.minor}-{SIZES['V']}.pt"
    torch.save(tokens.to(torch.int32), tmp_path / name)
    first, second = spawn(on_rank, RANKS, str(tmp_path))
    assert second == ""
    assert "1 loss fused, 0 left as written" in first
    assert "vocabulary sharded" in first
    rows = re.findall(r"^(\d+) +(\d+\.\d+) +(\d+\.\d+)$", first, re.MULTILINE)
    assert [int(step) for step, *_ in rows] == list(range(STEPS))
    alone, together = ([float(row[column]) for row in rows] for column in (1, 2))
    assert together == pytest.approx(alone, abs=1e-5)
    assert len(set(alone)) == STEPS
