"""Launches past Triton are, bit by bit, those of Triton: what both tell a driver that launches nothing."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

triton = pytest.importorskip("triton")
HERE = Path(__file__).parent
COMPILER = os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")


@pytest.mark.skipif(COMPILER is None, reason="Triton's launchers need a C compiler")
def test_a_launch_past_triton_is_its_own(tmp_path: Path) -> None:
    """Grid, stream, threads, shared memory and every parameter, whatever the release of Triton."""
    library, headers = tmp_path / "libcuda.so.1", Path(triton.__file__).parent / "backends/nvidia/include"
    build = [COMPILER, "-shared", "-fPIC", "-w", f"-I{headers}", HERE / "fake_driver.c", "-o", library]
    subprocess.run(build, check=True)
    (tmp_path / "libcuda.so").symlink_to(library)
    paths = dict.fromkeys(("TRITON_LIBCUDA_PATH", "LD_LIBRARY_PATH", "TRITON_CACHE_DIR"), str(tmp_path))
    environment = {**os.environ, **paths, "TRITON_INTERPRET": "0"}
    command = [sys.executable, "-W", "ignore", HERE / "launched_again.py", library]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.stdout == f"checked {triton.__version__}\n", done.stderr
