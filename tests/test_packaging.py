"""What the distribution promises, and that its commands run."""

import ast
import os
import re
import runpy
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

tomllib = pytest.importorskip("tomllib", reason="the standard library reads TOML from Python 3.11")

ROOT = Path(__file__).parent.parent
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PROJECT = PYPROJECT["project"]
PINS = dict(re.findall(r"^([\w.-]+)==(\S+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE))


def names(requirements: list[str]) -> set[str]:
    return {re.match(r"[\w.-]+", requirement)[0] for requirement in requirements}


def test_distribution_facts():
    assert PROJECT["name"] == "inductor-ce"
    assert PROJECT["license"] == "BSD-3-Clause"
    assert PROJECT["requires-python"] == ">=3.10"
    assert PROJECT["dependencies"] == ["torch>=2.11,<2.16", "sympy"]
    assert set(PROJECT["optional-dependencies"]) == {"test", "examples", "bench", "lint", "integrations"}
    assert PROJECT["dynamic"] == ["version"]
    assert (ROOT / "LICENSE").read_text().startswith("BSD 3-Clause License")


def test_named_tuples_have_no_other_base():
    """Python 3.10 refuses them, and so the whole package; neither ruff nor mypy tells."""
    for path in (ROOT / "inductor_ce").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            bases = [ast.unparse(base) for base in node.bases] if isinstance(node, ast.ClassDef) else []
            assert "NamedTuple" not in bases or len(bases) == 1, f"{path}:{node.lineno}"


def test_triton_is_required_nowhere():
    extras = PROJECT["optional-dependencies"].values()
    assert "triton" not in names(PROJECT["dependencies"]).union(*map(names, extras))


WITHOUT_TRITON = """
import importlib.abc, importlib.util, sys

class Refusing(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name.split(".")[0] == "triton":
            raise ModuleNotFoundError(name)

find_spec = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name == "triton" else find_spec(name, *rest)
sys.meta_path.insert(0, Refusing())
import torch, inductor_ce

def loss(h, w, y):
    return torch.nn.functional.cross_entropy(h @ w.t(), y)

h, w = (torch.randn(n, 8, requires_grad=True) for n in (64, 2048))
with inductor_ce.install(strategy="token_chunks"):
    print(len(inductor_ce.explain(loss, h, w, torch.randint(2048, (64,))).sites))
"""


def test_triton_may_be_missing():
    pytest.importorskip("torch")
    run = subprocess.run([sys.executable, "-c", WITHOUT_TRITON], capture_output=True, text=True, check=False)
    assert run.stdout == "1\n", run.stderr


def test_backend_entry_point_names_a_callable():
    (target,) = PROJECT["entry-points"]["torch_dynamo_backends"].values()
    assert target == "inductor_ce.api.backend:inductor_ce_backend"
    module, name = target.split(":")
    source = (ROOT / module.replace(".", "/")).with_suffix(".py").read_text()
    assert re.search(rf"^(def {name}\b|{name} =)", source, re.MULTILINE)


def test_torch_finds_the_installed_backend():
    torch = pytest.importorskip("torch")
    assert "inductor_ce" in torch.compiler.list_backends()


def test_wheel_holds_the_package_data(tmp_path: Path):
    pytest.importorskip("setuptools")
    source = tmp_path / "source"
    shutil.copytree(ROOT / "inductor_ce", source / "inductor_ce")
    for name in ["pyproject.toml", "README.md", "LICENSE"]:
        shutil.copy(ROOT / name, source)
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--no-deps",
        "--no-build-isolation",
        "-w",
        tmp_path,
        source,
    ]
    subprocess.run(command, capture_output=True, check=True)
    (wheel,) = tmp_path.glob("*.whl")
    held = set(zipfile.ZipFile(wheel).namelist())
    data = [ROOT / "inductor_ce/py.typed", *ROOT.glob("inductor_ce/ops/templates/*.jinja")]
    assert len(data) > 1
    assert {str(path.relative_to(ROOT)) for path in data} <= held
    assert not any(name.startswith(("tests/", "examples/", "patterns/")) for name in held)


def test_every_extra_is_pinned():
    wanted = names(PROJECT["dependencies"]).union(*map(names, PROJECT["optional-dependencies"].values()))
    assert wanted <= PINS.keys()
    exact = (r.split("==") for r in PROJECT["optional-dependencies"]["integrations"])
    assert {name: PINS[name] == version for name, version in exact} == dict.fromkeys(
        names(PROJECT["optional-dependencies"]["integrations"]), True
    )
    assert PINS["torch"] == "2.13.0"
    assert PINS["triton"] == "3.6.0"


def test_installed_versions_are_the_pinned_ones():
    """In the environment that `make` made; any other is the user's own affair."""
    if Path(sys.prefix) != ROOT / ".venv":
        pytest.skip("not running in .venv")
    command = [sys.executable, "-m", "pip", "list", "--format=freeze", "--disable-pip-version-check"]
    frozen = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    installed = dict(line.split("==") for line in frozen.splitlines() if "==" in line)
    assert {name: version.split("+")[0] for name, version in installed.items() if name in PINS} == {
        name: version for name, version in PINS.items() if name in installed
    }


def test_ci_is_executable_and_stops_at_the_first_failure():
    script = ROOT / ".ci/run"
    assert os.access(script, os.X_OK)
    assert "set -euo pipefail" in script.read_text()


def test_committed_text_names_no_index_and_no_home():
    for name in ["pyproject.toml", "constraints.txt", "Makefile", ".ci/run", "tools/zig-c++"]:
        text = (ROOT / name).read_text()
        assert not re.search(r"index-url|find-links|https?://|file://|/home/|/root/", text), name


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """Runs a file of `examples/` as a command, in this process; returns its exit status."""

    def run(name: str, *arguments: str) -> int:
        monkeypatch.syspath_prepend(ROOT / "examples")
        monkeypatch.setattr(sys, "argv", [name, *arguments])
        try:
            runpy.run_path(str(ROOT / "examples" / name), run_name="__main__")
        except SystemExit as stopped:
            return stopped.code or 0
        return 0

    return run


def test_quickstart_help(example: Callable[..., int], capsys: pytest.CaptureFixture[str]):
    pytest.importorskip("tokenizers")
    assert example("quickstart.py", "--help") == 0
    text = capsys.readouterr().out
    for option in ["--steps", "--untied", "--device", "--out"]:
        assert option in text


def test_quickstart_refuses_too_few_steps(example: Callable[..., int], capsys: pytest.CaptureFixture[str]):
    pytest.importorskip("tokenizers")
    assert example("quickstart.py", "--steps", "3") == 2
    assert "--steps must be more than the 3 that warm up" in capsys.readouterr().err


def test_memory_plans_on_a_cpu(
    tmp_path: Path, example: Callable[..., int], capsys: pytest.CaptureFixture[str]
):
    """Without a GPU the figures are planned, and the example says so."""
    pytest.importorskip("torch")
    pytest.importorskip("matplotlib")
    assert example("memory.py", "--device", "cpu", "--out", str(tmp_path)) == 0
    text = capsys.readouterr().out
    assert "bytes are planned, not measured" in text
    plain, ours = map(int, re.findall(r"(\d+)(?: tokens)? with", text))
    assert ours > 2 * plain
    assert (tmp_path / "batch.png").read_bytes().startswith(b"\x89PNG")


def test_memory_refuses_layers_on_a_cpu(example: Callable[..., int], capsys: pytest.CaptureFixture[str]):
    pytest.importorskip("torch")
    pytest.importorskip("matplotlib")
    assert example("memory.py", "--device", "cpu", "--layers", "2") == 2
    assert "--layers needs a GPU" in capsys.readouterr().err
