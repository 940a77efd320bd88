"""What is written down with every result: where, when, and of which version."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import platform
import re
import subprocess
from pathlib import Path
from typing import Any

import torch

from ... import __version__
from .peers import versions

PACKAGE = Path(__file__).parents[2]


def new(benchmark: str, method: dict[str, Any], commit: str | None, **found: Any) -> dict[str, Any]:
    """The record of a run that begins, and what it has `found` so far."""
    return {"benchmark": benchmark, "environment": environment(commit), "method": method, **found}


def environment(commit: str | None = None) -> dict[str, Any]:
    """GPU, versions, commit and date. `commit` is what to record where git cannot tell."""
    found, dirty = git_state(PACKAGE)
    return {
        "cpu": cpu(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "triton": _version("triton"),
        "python": platform.python_version(),
        "inductor_ce": __version__,
        "peers": versions(),
        "commit": found or commit,
        "dirty": dirty,
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }


def cpu() -> str:
    """The processor's name where the system tells it, else its architecture."""
    try:
        names = re.findall(r"^model name\s*: (.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        names = []
    return names[0] if names else platform.machine()


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def git_state(package: Path) -> tuple[str | None, bool | None]:
    """(commit, whether files of the package differ from it); (None, None) where git does not track it.

    Results do not count as differences.
    """
    if _git(package, "ls-files", "--error-unmatch", "__init__.py") is None:
        return None, None
    changes = _git(package, "status", "--porcelain", "--", ".", ":!bench/results")
    return _git(package, "rev-parse", "HEAD"), None if changes is None else bool(changes)


def _git(folder: Path, *arguments: str) -> str | None:
    command = ["git", "-C", str(folder), *arguments]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def json_path(result: dict[str, Any], folder: Path) -> Path:
    """For example `ce-nvidia-h200-20261123T142500Z.json` in `folder`."""
    gpu = re.sub(r"\W+", "-", (result["environment"]["gpu"] or "no-gpu").lower())
    date = datetime.datetime.fromisoformat(result["environment"]["date"])
    return folder / f"{result['benchmark']}-{gpu}-{date:%Y%m%dT%H%M%SZ}.json"


def write(result: dict[str, Any], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n")
