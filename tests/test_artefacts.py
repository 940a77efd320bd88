"""What was compiled and saved under an installation, loaded by a process that installs nothing; what
another process finds in the caches, and what else needs a process of its own, forked off one that is warm."""

import json
import os
import shutil
import subprocess
import sys
import textwrap
import uuid
from pathlib import Path
from typing import Any

import pytest
from harness import clean_slate
from spared import known_to_children
from test_explain import FUSED, SCRIPT

PROGRAM = """
import gc
import json
import os
import runpy
import sys
import traceback
from pathlib import Path
import torch
import torch._dynamo
import torch._inductor.compile_fx
import torch.nn.functional as F
from functorch.compile import make_boxed_func
from kernels import backwards_at_once, compiled_together
from spared import spare
from torch._dynamo.utils import counters

gc.disable()  # as what is forked ends soon
spare()
torch._dynamo.config.enable_aot_compile = True  # as from 2.12 on
folder = Path(sys.argv[1])
torch.manual_seed(0)
H, W, Y = torch.randn(64, 16), torch.randn(512, 16), torch.randint(512, (64,))
Y[::3] = -100

def loss(h, w, y):
    return F.cross_entropy(F.linear(h, w), y)

def verified(h, w, y):
    return F.cross_entropy(F.linear(h, w), y)

def with_logits(h, w, y):
    z = F.linear(h, w)
    return F.cross_entropy(z, y), z

OPTIONS = {
    loss: dict(strategy="token_chunks", memory_budget=0.3),
    verified: dict(verify=True),
    with_logits: {},
}

def warm():  # what torch does in a process's first compilation; a build for GPUs must not be forked then
    graph = lambda gm, inputs, **kwargs: make_boxed_func(gm.forward)
    backend = lambda gm, inputs: torch._inductor.compile_fx.compile_fx(gm, inputs, inner_compile=graph)
    if not torch.backends.cuda.is_built():
        torch.compile(lambda h: F.cross_entropy(h, Y % 16), backend=backend)(H.clone().requires_grad_())
        torch._dynamo.reset()

def told(f, compiled):
    h, w = (x.detach().clone().requires_grad_() for x in (H, W))
    results = compiled(h, w, Y)
    value, *others = results if isinstance(results, tuple) else (results,)
    assert all(type(z) is torch.Tensor for z in others)
    value.backward()
    return [x.double().norm().item() for x in (value, h.grad, w.grad, *others)]

def saved(f):
    import inductor_ce
    with inductor_ce.install(min_vocab=2, **OPTIONS[f]):
        made = torch.compile(f, fullgraph=True).aot_compile(((H.requires_grad_(), W.requires_grad_(), Y), {}))
    made.save_compiled_function(folder / f.__name__)
    return made

def loaded(f):
    with open(folder / f.__name__, "rb") as file:
        return torch.compiler.load_compiled_function(file)

def tried(f):
    try:
        return told(f, loaded(f))
    except Exception as error:
        return f"{type(error).__name__}: {error}"

def cached(min_vocab):
    import inductor_ce
    given = H[:4], W[:16], torch.arange(4)
    torch._dynamo.reset()
    counters.clear()
    with inductor_ce.install(min_vocab=min_vocab):
        _, z = torch.compile(with_logits)(*given)
        hits = counters["aot_autograd"]["autograd_cache_hit"], counters["inductor"]["fxgraph_cache_hit"]
        return {
            "lazy": [hasattr(z, "is_made"), getattr(z, "is_made", True)],
            "logits": z.tolist(),
            "eager": with_logits(*given)[1].tolist(),
            "key": repr(torch._inductor.config.pre_grad_custom_pass.uuid()),
            "hits": hits,
            "sites": counters["inductor_ce"]["sites"],
            "explained": inductor_ce.explain(with_logits, *given).to_dict(),
        }

def deferred():  # whose logits are lazy
    import defer_cases
    import inductor_ce
    torch._dynamo.reset()
    counters.clear()
    torch.manual_seed(0)
    model = defer_cases.Model()
    x, y = (torch.arange(12).view(2, 6) % defer_cases.V for _ in range(2))
    hits = lambda: counters["inductor"]["fxgraph_cache_hit"] + counters["aot_autograd"]["autograd_cache_hit"]
    with inductor_ce.install(min_vocab=2):
        z = inductor_ce.defer(model.output)(torch.tanh(model.body(model.embed(x))))
        value = torch.compile(defer_cases.loss_of)(z, y)
        value.backward()
        return {
            "lazy": not z.is_made,
            "hits": hits(),
            "explained": inductor_ce.explain(defer_cases.loss_of, z, y).to_dict(),
            "numbers": [value.item(), model.output.weight.grad.tolist()],
        }

def found(what):
    if what == "save":
        given = {f.__name__: told(f, saved(f)) for f in OPTIONS}
        given["eager"] = told(loss, loss)
    elif what == "load":
        assert "inductor_ce" not in sys.modules
        given = {f.__name__: told(f, loaded(f)) for f in OPTIONS}
    elif what == "load without the package":
        sys.modules["inductor_ce"] = None
        given = {"loss": tried(loss)}
    elif what.endswith("the caches"):  # with the program itself among what they hold
        torch._dynamo.config.caching_precompile = True
        if what.startswith("save"):
            import inductor_ce
            inductor_ce.install(min_vocab=2, **OPTIONS[loss])
        else:
            torch.compiler.load_cache_artifacts((folder / "caches").read_bytes())
        given = {"with_logits": told(with_logits, torch.compile(with_logits))}
        if what.startswith("save"):
            (folder / "caches").write_bytes(torch.compiler.save_cache_artifacts()[0])
        given["is imported"] = "inductor_ce" in sys.modules
    elif what == "compile":
        given = {"cold": cached(2), "deferred": deferred()}
    elif what == "compile again":
        given = {"warm": cached(2), "other": cached(3), "deferred": deferred()}
    elif what == "log":
        os.environ["TORCH_LOGS"] = "+inductor_ce"
        torch._logging._init_logs()  # as the import of torch does
        os.dup2(os.open(folder / "log", os.O_CREAT | os.O_WRONLY), 2)
        runpy.run_path(str(folder / "script.py"))
        given = {"said": (folder / "log").read_text()}
    elif what in ("2.10.0", "2.16.0"):
        torch.__version__ = what
        sys.modules["torch._inductor.custom_graph_pass"] = None
        import inductor_ce
        try:
            inductor_ce.install()
        except inductor_ce.UnsupportedTorchError as error:
            given = {"said": str(error)}
    else:
        from inductor_ce.ops import lowering
        lowering.sources = lambda: "of another version"
        given = {"loss": tried(loss)}
    return given

# NOTE: each in a process of its own
# They share the import of torch and of Inductor, and a first compilation, alone.
warm()
for what in sys.argv[2:]:
    if not os.fork():
        try:
            with compiled_together(), backwards_at_once():
                print("FOUND", json.dumps([what, found(what)]), flush=True)
        except Exception:
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(0)
    os.wait()
"""


WHAT = ["save", "load", "load without the package", "load with another version"]
WHAT += ["save the caches", "load the caches", "compile", "compile again", "log", "2.10.0", "2.16.0"]


class Told(dict[str, dict[str, Any]]):
    """What each process says, by what it was asked; `trace` is what all of them say of errors."""

    trace = ""

    def __missing__(self, what: str) -> dict[str, Any]:
        raise AssertionError(self.trace)


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> Told:
    folder = tmp_path_factory.mktemp("artefacts")
    here = Path(__file__).parent
    shutil.copytree(here.parent / "inductor_ce", folder / "inductor_ce")  # so that nobody edits it meanwhile
    path = os.pathsep.join([str(folder), str(here), os.environ.get("PYTHONPATH", "")])
    program = folder / "program.py"
    program.write_text(PROGRAM)
    (folder / "script.py").write_text(textwrap.dedent(SCRIPT))
    with clean_slate():  # or this process would look anew for what a processor can do
        environment = os.environ | known_to_children() | {"PYTHONPATH": path}
    environment["TORCH_COMPILE_CACHE_KEY_TAG"] = uuid.uuid4().hex  # no graph was stored under it yet
    run = subprocess.run(
        [sys.executable, str(program), str(folder), *WHAT], env=environment, capture_output=True, text=True
    )
    lines = [line for line in run.stdout.splitlines() if line.startswith("FOUND ")]
    told = Told(json.loads(line.removeprefix("FOUND ")) for line in lines)
    told.trace = run.stderr
    return told


def test_the_same_numbers_where_nothing_is_installed(told: Told):
    """Of a head in pieces, of one that is verified, and of returned logits, which are then no lazy ones."""
    saved, loaded = told["save"], told["load"]
    assert loaded.keys() == saved.keys() - {"eager"}
    for name, numbers in loaded.items():
        assert numbers == pytest.approx(saved[name], rel=1e-6)
        assert numbers[:3] == pytest.approx(saved["eager"], rel=1e-5)
    assert len(loaded["with_logits"]) == 4


def test_without_the_package(told: Told):
    said = told["load without the package"]["loss"]
    assert said.startswith("ModuleNotFoundError")
    assert "inductor_ce" in said


def test_another_version_of_the_package(told: Told):
    said = told["load with another version"]["loss"]
    assert "compiled with another version of inductor_ce. Compile and save it again" in said


def test_caches_that_hold_the_program(told: Told):
    """Where they are found, our operators come with them; nothing is compiled, or read by our passes."""
    saved, loaded = told["save the caches"], told["load the caches"]
    assert loaded["is imported"]
    assert loaded["with_logits"] == pytest.approx(saved["with_logits"], rel=1e-6)


def test_second_process_hits_the_cache(told: Told):
    """A changed option misses it; explain says the same on a warm machine."""
    cold, warm, other = told["compile"]["cold"], told["compile again"]["warm"], told["compile again"]["other"]
    assert [p["hits"] for p in (cold, warm, other)] == [[0, 0], [1, 1], [0, 0]]
    assert [p["sites"] for p in (cold, warm, other)] == [1, 1, 1]
    assert [p["lazy"] for p in (cold, warm, other)] == [[True, False]] * 3
    assert warm["logits"] == cold["logits"] == cold["eager"]
    assert warm["key"] == cold["key"] != other["key"]
    assert warm["explained"] == cold["explained"]
    assert len(cold["explained"]["sites"]) == 1


def test_trap_12_explain_is_right_on_a_warm_machine(told: Told):
    """Warm cache: the pass does not run, counters read 0, the user concludes "not applied"."""
    cold, warm = told["compile"]["deferred"], told["compile again"]["deferred"]
    assert cold["hits"] == 0
    assert warm["hits"] > 0
    assert len(cold["explained"]["sites"]) == 1
    assert warm["explained"] == cold["explained"]
    assert warm["numbers"] == cold["numbers"]
    assert cold["lazy"]
    assert warm["lazy"]


@pytest.mark.parametrize("version", ["2.10.0", "2.16.0"])
def test_install_under_an_unsupported_torch(version: str, told: Told):
    """In a process of its own, where a private name is not there either."""
    assert f"supports torch>=2.11,<2.16; this is torch {version}. Install one" in told[version]["said"]


def test_torch_logs(told: Told):
    assert FUSED in told["log"]["said"]
