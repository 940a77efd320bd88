"""install, uninstall, the backend, options, caches, and what happens when a pass of ours fails."""

import importlib.metadata
import logging
import shutil
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from harness import Graphs, compile_without_codegen, misses, sites
from test_timeline import graph_of
from torch._inductor import config as inductor_config
from torch._inductor.compile_fx import compile_fx
from torch._inductor.custom_graph_pass import CustomGraphPass
from torch.fx import Graph, GraphModule

import inductor_ce
from inductor_ce import Options, ops
from inductor_ce.api import backend, explain, install, pass_slots, passes
from inductor_ce.api.passes import FuseHeads, FuseLosses
from inductor_ce.common import failsafe
from inductor_ce.common.compat import inductor, versions
from inductor_ce.common.sources import PACKAGE, sources
from inductor_ce.heads import fuse
from inductor_ce.rewriting import rewrite

N, V = 4, 16
ROOT = Path(__file__).parent.parent
SLOTS = ("pre_grad_custom_pass", "joint_custom_pre_pass")


class Foreign(CustomGraphPass):
    """Somebody else's pass."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, graph: Graph) -> None:
        self.calls += 1

    def uuid(self) -> Any:
        return "foreign"


@pytest.fixture(autouse=True)
def slots_are_restored() -> Iterator[None]:
    with inductor_config.patch(dict.fromkeys(SLOTS)):
        yield
        inductor_ce.uninstall()


def slots() -> list[Any]:
    return [getattr(inductor_config, slot) for slot in SLOTS]


def installed() -> list[list[type]]:
    return [[type(p) for p in pass_slots.passes_in(value)] for value in slots()]


OURS = [[FuseLosses], [FuseHeads]]


def loss(z: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(z, y)


def inputs() -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(N, V, requires_grad=True), torch.arange(N)


# install and uninstall


def test_install_and_uninstall():
    handle = inductor_ce.install(min_vocab=2)
    assert installed() == OURS
    assert handle.options == Options(min_vocab=2)
    options = (
        "Options(min_vocab=2, strategy='auto', memory_budget=None, on_miss='ignore', verify=False, "
        "returned_logits='lazy', gradient='backward')"
    )
    assert repr(handle) == f"<inductor_ce installed with {options}>"
    inductor_ce.uninstall()
    assert slots() == [None, None]


def test_uninstall_without_install():
    inductor_ce.uninstall()
    assert slots() == [None, None]


def test_installing_again_replaces_the_options():
    inductor_ce.install(min_vocab=2)
    inductor_ce.install(min_vocab=3)
    inductor_ce.install(min_vocab=3)
    assert installed() == OURS
    assert slots()[0].options == Options(min_vocab=3)
    inductor_ce.uninstall()
    assert slots() == [None, None]


def test_handles_nest():
    with inductor_ce.install(min_vocab=2) as outer:
        with inductor_ce.install(min_vocab=3):
            assert slots()[0].options.min_vocab == 3
        assert slots()[0].options == outer.options
    assert slots() == [None, None]


def test_handles_may_be_taken_back_in_any_order():
    first, second = inductor_ce.install(min_vocab=2), inductor_ce.install(min_vocab=3)
    first.uninstall()
    assert slots()[0].options.min_vocab == 3
    second.uninstall()
    second.uninstall()
    assert slots() == [None, None]


def test_exception_restores_everything():
    with pytest.raises(ZeroDivisionError), inductor_ce.install(min_vocab=2), inductor_ce.install():
        raise ZeroDivisionError
    assert slots() == [None, None]


def test_failed_install_installs_nothing():
    with pytest.raises(inductor_ce.OptionError):
        inductor_ce.install(min_vocab=1)
    assert slots() == [None, None]


@pytest.mark.parametrize(
    "lists",
    [
        pytest.param(True, marks=pytest.mark.skipif(not inductor.HAS_PASS_LISTS, reason="from torch 2.13")),
        False,
    ],
    ids=["lists", "one pass a slot"],
)
def test_foreign_pass_runs_before_ours(lists: bool, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(pass_slots, "HAS_PASS_LISTS", lists)
    theirs = Foreign()
    inductor_config.pre_grad_custom_pass = theirs
    with inductor_ce.install(min_vocab=2):
        assert installed() == [[Foreign, FuseLosses], [FuseHeads]]
        assert isinstance(slots()[0], list) == lists
        torch.compile(loss, backend=Graphs())(*inputs())
        assert (theirs.calls, sites()) == (1, 1)
    assert slots() == [theirs, None]


def test_foreign_list_is_kept_as_it_was():
    theirs = [Foreign(), Foreign()]
    inductor_config.joint_custom_pre_pass = theirs
    with inductor_ce.install():
        assert installed() == [[FuseLosses], [Foreign, Foreign, FuseHeads]]
        with inductor_ce.install():
            assert installed()[1] == [Foreign, Foreign, FuseHeads]
    assert slots()[1] is theirs
    assert len(theirs) == 2


def test_foreign_pass_that_came_later_is_kept():
    handle = inductor_ce.install()
    later = Foreign()
    inductor_config.pre_grad_custom_pass = [*pass_slots.passes_in(slots()[0]), later]
    handle.uninstall()
    assert slots() == [later, None]


def test_foreign_pass_that_came_between_is_kept():
    outer = inductor_ce.install(min_vocab=2)
    later = Foreign()
    inductor_config.pre_grad_custom_pass = [*pass_slots.passes_in(slots()[0]), later]
    with inductor_ce.install(min_vocab=3):
        assert installed()[0] == [Foreign, FuseLosses]
    assert installed()[0] == [Foreign, FuseLosses]
    outer.uninstall()
    assert slots() == [later, None]


def test_foreign_pass_in_our_place_is_left_there():
    handle = inductor_ce.install()
    inductor_config.pre_grad_custom_pass = theirs = Foreign()
    handle.uninstall()
    assert slots() == [theirs, None]


def test_chained_passes_have_a_key():
    both = pass_slots.ChainedPass((Foreign(), FuseLosses(Options())))
    assert both.uuid() == ("foreign", FuseLosses(Options()).uuid())
    assert pass_slots.ChainedPass((lambda graph: None, Foreign())).uuid() is None


def test_nothing_is_fused_without_install():
    graphs = Graphs()
    torch.compile(loss, backend=graphs)(*inputs())
    assert (sites(), graphs.count(ops.ROW_STATS)) == (0, 0)


# The backend


@pytest.fixture
def patches(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What the backend gives to Inductor, which generates no code."""
    seen: list[dict[str, Any]] = []

    def fast(gm: GraphModule, example_inputs: Any, config_patches: dict[str, Any]) -> Any:
        seen.append(config_patches)
        return compile_fx(
            gm, example_inputs, inner_compile=graphs.inner_compile, config_patches=config_patches
        )

    graphs = Graphs()
    monkeypatch.setattr(backend, "compile_fx", fast)
    return seen


def test_backend_by_name(patches: list[dict[str, Any]]):
    if "inductor_ce" not in torch.compiler.list_backends():
        pytest.skip("inductor-ce is not installed as a distribution")
    z, y = inputs()
    compiled = torch.compile(loss, backend="inductor_ce", options={"min_vocab": 2, "max_autotune": False})
    torch.testing.assert_close(compiled(z, y), loss(z, y))
    assert sites() == 1


def test_entry_point():
    try:
        found = importlib.metadata.distribution("inductor-ce").entry_points
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("inductor-ce is not installed as a distribution")
    (entry,) = (e for e in found if e.group == "torch_dynamo_backends")
    assert entry.name == "inductor_ce"
    assert entry.load() is inductor_ce.inductor_ce_backend


def compiled_with(options: dict[str, Any] | None = None, mode: str | None = None) -> Callable[..., Any]:
    both = {key: value for key, value in {"options": options, "mode": mode}.items() if value}
    return torch.compile(loss, backend=partial(inductor_ce.inductor_ce_backend, **both))


def test_backend_takes_options_of_ours_and_of_inductor(patches: list[dict[str, Any]]):
    z, y = inputs()
    options = {"min_vocab": 2, "max_autotune": False, "epilogue-fusion": True}
    result = compiled_with(options)(z, y)
    torch.testing.assert_close(result, loss(z, y))
    assert sites() == 1
    assert {"min_vocab", "epilogue-fusion"} & set(patches[0]) == set()
    assert (patches[0]["max_autotune"], patches[0]["epilogue_fusion"]) == (False, True)


def test_backend_takes_a_mode(patches: list[dict[str, Any]]):
    compiled_with({"min_vocab": 2}, mode="max-autotune-no-cudagraphs")(*inputs())
    assert patches[0]["max_autotune"] is True
    assert sites() == 1


def test_options_override_the_mode(patches: list[dict[str, Any]]):
    compiled_with({"max_autotune": False}, mode="max-autotune-no-cudagraphs")(*inputs())
    assert patches[0]["max_autotune"] is False


def test_backend_without_options_uses_the_defaults(patches: list[dict[str, Any]]):
    compiled_with()(*inputs())
    assert (sites(), misses()) == (0, 0)


def test_backend_changes_nothing_global(patches: list[dict[str, Any]]):
    before = inductor_config.save_config_portable()
    compiled_with({"min_vocab": 2, "max_autotune": True})(*inputs())
    assert inductor_config.save_config_portable() == before
    assert slots() == [None, None]
    graphs = Graphs()
    torch.compile(lambda z, y: loss(z, y) * 2, backend=graphs)(*inputs())
    assert graphs.count(ops.ROW_STATS) == 0


def test_backend_beside_install_does_not_double(patches: list[dict[str, Any]]):
    inductor_ce.install(min_vocab=V + 1)
    compiled_with({"min_vocab": 2})(*inputs())
    assert (sites(), misses()) == (1, 0)
    assert [type(p) for p in pass_slots.passes_in(patches[0][SLOTS[0]])] == [FuseLosses]
    assert slots()[0].options.min_vocab == V + 1


def test_backend_keeps_foreign_passes(patches: list[dict[str, Any]]):
    configured, given = Foreign(), Foreign()
    inductor_config.pre_grad_custom_pass = configured
    compiled_with({"min_vocab": 2, "joint_custom_pre_pass": given})(*inputs())
    assert (configured.calls, given.calls, sites()) == (1, 1, 1)
    assert slots() == [configured, None]


# Options


VALID = "min_vocab, strategy, memory_budget, on_miss, verify, returned_logits, gradient"


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"minvocab": 2}, f"unknown option 'minvocab'; valid options are {VALID}"),
        ({"a": 1, "b": 2}, f"unknown options 'a', 'b'; valid options are {VALID}"),
        ({"min_vocab": 1}, "min_vocab must be an int of at least 2, got 1"),
        ({"min_vocab": "many"}, "min_vocab must be an int of at least 2, got 'many'"),
        ({"min_vocab": True}, "min_vocab must be an int of at least 2, got True"),
        ({"min_vocab": 2.5}, "min_vocab must be an int of at least 2, got 2.5"),
        ({"on_miss": "shout"}, "on_miss must be one of 'ignore', 'warn', 'raise', got 'shout'"),
        ({"gradient": "now"}, "gradient must be one of 'backward', 'forward', got 'now'"),
        ({"on_miss": None}, "on_miss must be one of 'ignore', 'warn', 'raise', got None"),
        (
            {"strategy": "chunks"},
            "strategy must be one of 'auto', 'materialise', 'token_chunks', 'vocab_slabs', got 'chunks'",
        ),
        *(
            (
                {"memory_budget": wrong},
                "memory_budget must be bytes (an int), a fraction (a float) or None, and positive, "
                f"got {wrong!r}",
            )
            for wrong in (0, -1, float("nan"), float("inf"), True, "1 GB")
        ),
    ],
)
def test_wrong_options(given: dict[str, Any], says: str):
    with pytest.raises(inductor_ce.OptionError) as caught:
        inductor_ce.install(**given)
    assert str(caught.value) == says
    assert isinstance(caught.value, ValueError)


def test_wrong_options_of_the_backend():
    with pytest.raises(Exception, match=f"unknown option 'max_autotoon'; valid options are {VALID}, and"):
        compiled_with({"min_vocab": 2, "max_autotoon": True})(*inputs())
    with pytest.raises(Exception, match="min_vocab must be an int of at least 2, got 0"):
        compiled_with({"min_vocab": 0})(*inputs())


@pytest.mark.parametrize(
    "version", ["2.11.0", "2.13.0+cpu", "2.15.0a0", "2.12.1+cu130", "2.14.0a0+git1234567"]
)
def test_supported_torch(version: str):
    versions.check_torch(version)


@pytest.mark.parametrize("version", ["2.10.1", "2.16.0", "1.13.1", "3.0.0", "2.9.0+cpu"])
def test_unsupported_torch(version: str):
    with pytest.raises(inductor_ce.UnsupportedTorchError) as caught:
        versions.check_torch(version)
    assert str(caught.value) == (
        f"inductor_ce supports torch>=2.11,<2.16; this is torch {version}. Install one that is supported, "
        'pip install "torch>=2.11,<2.16", or a release of inductor_ce for this torch.'
    )
    assert isinstance(caught.value, ImportError)


def test_unsupported_torch_is_refused_everywhere(monkeypatch: pytest.MonkeyPatch):
    def refuse() -> None:
        raise inductor_ce.UnsupportedTorchError("too old")

    for module in (install, explain):
        monkeypatch.setattr(module, "check_torch", refuse)
    for use in (inductor_ce.install, partial(inductor_ce.explain, loss, *inputs())):
        with pytest.raises(inductor_ce.UnsupportedTorchError):
            use()
    assert slots() == [None, None]


# Caches


def test_key_is_of_the_options_and_the_pass():
    assert FuseLosses(Options()).uuid() == FuseLosses(Options()).uuid()
    keys = [FuseLosses(Options()), FuseLosses(Options(min_vocab=2)), FuseLosses(Options(on_miss="warn"))]
    assert len({repr(p.uuid()) for p in [*keys, FuseHeads(Options())]}) == 4


def test_key_is_of_the_sources(monkeypatch: pytest.MonkeyPatch):
    before = FuseLosses(Options()).uuid()
    monkeypatch.setattr(passes, "sources", lambda: "changed")
    assert FuseLosses(Options()).uuid() != before


def test_a_changed_file_in_any_room_changes_the_key(tmp_path: Path):
    package = tmp_path / "inductor_ce"
    shutil.copytree(PACKAGE, package, ignore=shutil.ignore_patterns("__pycache__", "bench"))
    files = [file for ending in ("py", "jinja") for file in package.rglob(f"*.{ending}")]
    keys = {sources(PACKAGE)}
    sources.cache_clear()
    for file in files:
        file.write_bytes(file.read_bytes()[:-1] + b"#")  # of the same size
        keys.add(sources(package))
        sources.cache_clear()
    assert len(files) > 60
    assert len(keys) == 1 + len(files)


def test_the_key_is_the_same_wherever_the_package_lies(tmp_path: Path):
    package = tmp_path / "inductor_ce"
    shutil.copytree(PACKAGE, package, ignore=shutil.ignore_patterns("__pycache__"))
    assert sources(package) == sources(PACKAGE)


# Failures of ours


@pytest.fixture
def not_warned_yet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(failsafe, "_warned", False)


def boom(*args: Any, **kwargs: Any) -> Any:
    raise ZeroDivisionError("a bug of ours")


FAILURES = {
    "recognise": (passes, "recognise"),
    "judge": (passes, "judge"),
    "site": (passes, "_site"),
    "rewrite": (passes, "rewrite"),
    "middle of the rewrite": (rewrite.Statistics, "row"),
    "end of the rewrite": (rewrite, "_reduced"),
    "sweep": (passes, "sweep"),
    "heads": (passes, "fuse_heads"),
    "proof": (fuse, "Proof"),
    "plan": (fuse, "numbers_of"),
    "pieces": (fuse, "token_chunks"),
    "chains": (passes, "recompute_chains"),
}


@pytest.mark.usefixtures("not_warned_yet")
@pytest.mark.parametrize("place", FAILURES)
@pytest.mark.fails_inside
def test_failure_leaves_a_program_that_runs(
    place: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    """The program runs, one warning is given, and the log holds the traceback."""
    monkeypatch.setattr(*FAILURES[place], boom)
    z, y = inputs()
    W = torch.randn(V, V)

    def f(z, y):
        return loss(z, y) + loss(z @ W, y)

    compiled, _ = compile_without_codegen(f, strategy="token_chunks")
    expected = f(z, y)
    with pytest.warns(UserWarning, match="ZeroDivisionError: a bug of ours") as caught:
        result = compiled(z, y)
    torch.testing.assert_close(result, expected)
    torch.testing.assert_close(torch.autograd.grad(result, z), torch.autograd.grad(expected, z))
    assert len([w for w in caught if "a bug of ours" in str(w.message)]) == 1
    (record, *_) = (r for r in caplog.records if r.name == "inductor_ce" and r.levelno >= logging.ERROR)
    assert record.exc_info is not None
    assert "boom" in caplog.text


@pytest.mark.usefixtures("not_warned_yet")
@pytest.mark.parametrize("place", ["judge", "rewrite", "middle of the rewrite", "end of the rewrite"])
@pytest.mark.filterwarnings("ignore:inductor_ce left a loss")
@pytest.mark.fails_inside
def test_failure_leaves_the_graph_as_it_was(place: str, monkeypatch: pytest.MonkeyPatch):
    def f(z, y):
        return F.cross_entropy(z, y), z.log_softmax(-1).gather(-1, y.unsqueeze(-1)).squeeze(-1).sum()

    graph = graph_of(f, *inputs())
    before = str(graph)
    monkeypatch.setattr(*FAILURES[place], boom)
    report = passes.fuse_losses(graph, Options(min_vocab=2))
    assert str(graph) == before
    graph.lint()
    assert report.sites == []
    assert [m.reason for m in report.misses] == [inductor_ce.Reason.INTERNAL_ERROR]


@pytest.mark.usefixtures("not_warned_yet")
@pytest.mark.filterwarnings("ignore:inductor_ce left a loss")
@pytest.mark.fails_inside
def test_failure_in_one_loss_leaves_the_others(monkeypatch: pytest.MonkeyPatch):
    calls = []

    def fail_once(*args: Any) -> None:
        calls.append(args)
        return boom() if len(calls) == 1 else rewrite.rewrite(*args)

    monkeypatch.setattr(passes, "rewrite", fail_once)
    z, y = inputs()
    compiled, graphs = compile_without_codegen(lambda z, y: loss(z, y) + loss(z * 2, y))
    torch.testing.assert_close(compiled(z, y), loss(z, y) + loss(z * 2, y))
    assert (sites(), misses(), graphs.count(ops.ROW_STATS)) == (1, 1, 1)


@pytest.mark.usefixtures("not_warned_yet")
@pytest.mark.fails_inside
def test_failure_warns_once(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(passes, "judge", boom)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for factor in (1, 2):
            compile_without_codegen(lambda z, y, factor=factor: loss(z * factor, y))[0](*inputs())
    assert len([w for w in caught if "inductor_ce failed" in str(w.message)]) == 1
    assert misses() == 2


# Inductor driven by the caller


def captured(f: Callable[..., Any], *args: Any) -> GraphModule:
    kept: list[GraphModule] = []

    def keep(gm: GraphModule, example_inputs: Any) -> Callable[..., Any]:
        kept.append(gm)
        return gm.forward

    torch.compile(f, backend=keep, fullgraph=True)(*args)
    return kept[0]


def test_caller_drives_compile_fx():
    z, y = inputs()
    gm = captured(loss, z, y)
    torch._dynamo.reset()
    inductor_ce.install(min_vocab=2)
    graphs = Graphs()
    compiled = compile_fx(gm, [z, y], inner_compile=graphs.inner_compile)
    (result,) = compiled(z, y)
    torch.testing.assert_close(result, loss(z, y))
    torch.testing.assert_close(torch.autograd.grad(result, z), torch.autograd.grad(loss(z, y), z))
    assert (sites(), graphs.count(ops.ROW_STATS), graphs.count(ops.ROW_GRAD)) == (1, 1, 1)


def test_caller_drives_compile_fx_on_a_traced_module():
    """Without example values nothing is read; with them it is fused."""

    class Loss(torch.nn.Module):
        def forward(self, z, y):
            return (F.cross_entropy(z, y),)

    z, y = inputs()
    inductor_ce.install(min_vocab=2)
    graphs = Graphs()
    compiled = compile_fx(torch.fx.symbolic_trace(Loss()), [z, y], inner_compile=graphs.inner_compile)
    torch.testing.assert_close(compiled(z, y)[0], loss(z, y))


# Bad input

BAD_LABELS = {
    "float": torch.arange(N).float(),
    "float of one row more": torch.arange(N + 1).float(),
    "one row more": torch.arange(N + 1),
    "column": torch.arange(N)[:, None],
    "scalar": torch.tensor(1),
    "int32": torch.arange(N).int(),
    "int16": torch.arange(N).short(),
    "uint8": torch.arange(N).to(torch.uint8),
    "bool": torch.ones(N, dtype=torch.bool),
    "complex": torch.arange(N).cfloat(),
}


def picked(z: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return z.log_softmax(-1).gather(-1, y.unsqueeze(-1)).squeeze(-1)


def outcome(f: Callable[..., Any], *args: Any) -> Any:
    """The value, or the type of the exception and what it says."""
    torch._dynamo.reset()
    try:
        return torch.compile(f, backend=Graphs())(*args).detach()
    except Exception as error:
        return type(error), str(error).splitlines()[0]


def check_outcome(f: Callable[..., Any], *args: Any) -> None:
    expected = outcome(f, *args)
    inductor_ce.install(min_vocab=2)
    actual = outcome(f, *args)
    if isinstance(expected, tuple):
        assert actual == expected
    else:
        torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("f", [loss, picked])
@pytest.mark.parametrize("labels", BAD_LABELS.values(), ids=BAD_LABELS)
def test_bad_labels_raise_what_torch_raises(f: Callable[..., Any], labels: torch.Tensor):
    check_outcome(f, inputs()[0], labels)


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.cfloat], ids=str)
def test_bad_logits_raise_what_torch_raises(dtype: torch.dtype):
    check_outcome(loss, torch.randn(N, V).to(dtype), torch.arange(N))
