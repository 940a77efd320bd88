"""The report: its text, its fields, and that making it changes nothing; counters and the log."""

import json
import logging
import runpy
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from expecttest import TestCase
from harness import compile_without_codegen, misses, sites, without_codegen
from torch import Tensor, nn
from torch._dynamo.utils import counters

import inductor_ce
from inductor_ce import Miss, Options, Reason, Report, Site, ops
from inductor_ce.api import explain as explaining
from inductor_ce.api import passes

N, V = 6, 2048
ROOT = Path(__file__).parent.parent


def inputs(dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(N, V, dtype=dtype, requires_grad=True), torch.arange(N)


def loss(z, y):
    return F.cross_entropy(z, y, label_smoothing=0.1) + 1e-4 * z.logsumexp(-1).square().mean()  # the loss


def half_fused(z, y):
    return F.cross_entropy(z, y) + F.cross_entropy(z, z.softmax(-1))


def line_of(text: str) -> str:
    """ "file.py:NN" of the first line here that holds the text."""
    lines = Path(__file__).read_text().splitlines()
    return f"test_explain.py:{next(i for i, line in enumerate(lines, 1) if text in line)}"


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.head = nn.Linear(4, V)

    def forward(self, h, y):
        return F.cross_entropy(self.head(h), y)


class Text(TestCase):
    """EXPECTTEST_ACCEPT=1 accepts new ones."""

    maxDiff = None

    def test_fused_and_missed(self):
        site = Site(
            location="train.py:41",
            code="loss = F.cross_entropy(logits, labels)",
            form="mean[y != -100](lse - pick(y)); lse",
            statistics=("lse", "pick(y)"),
            which="max,sumexp,pick",
            sharded=False,
            strategy="materialise",
            logits_bytes=8192 * 128256 * 2,
        )
        miss = Miss("eval.py:7", "q = z.log_softmax(-1)", Reason.NOT_UNDERSTOOD, "Fact, then remedy.")
        report = Report([site], [miss])
        self.assertExpectedInline(
            str(report),
            """\
inductor_ce: 1 loss fused, 1 left as written
  fused   train.py:41  loss = F.cross_entropy(logits, labels)
    form       mean[y != -100](lse - pick(y)); lse
    statistics lse, pick(y)
    operator   row_stats[max,sumexp,pick]
    strategy   materialise
    logits     2004.0 MiB
  missed  eval.py:7  q = z.log_softmax(-1)
    NOT_UNDERSTOOD: Fact, then remedy.""",
        )

    def test_nothing(self):
        report = inductor_ce.explain(torch.relu, torch.ones(3))
        self.assertExpectedInline(str(report), """inductor_ce: 0 losses fused, 0 left as written""")

    def test_two_losses(self):
        report = inductor_ce.explain(half_fused, *inputs())
        text = str(report).replace(report.sites[0].location, "LINE")
        text = text.replace(Reason.SOFT_TARGETS.value, "REMEDY")
        self.assertExpectedInline(
            text,
            """\
inductor_ce: 1 loss fused, 1 left as written
  fused   LINE  return F.cross_entropy(z, y) + F.cross_entropy(z, z.softmax(-1))
    form       mean[y != -100](lse - pick(y))
    statistics lse, pick(y)
    operator   row_stats[max,sumexp,pick]
    strategy   materialise
    logits     0.0 MiB
  missed  LINE  return F.cross_entropy(z, y) + F.cross_entropy(z, z.softmax(-1))
    SOFT_TARGETS: The target holds class probabilities of which a gradient is wanted. REMEDY""",
        )


def test_fields_of_a_site():
    (site,) = inductor_ce.explain(loss, *inputs(torch.bfloat16)).sites
    assert isinstance(site, Site)
    assert site.location == line_of("# the loss")
    assert site.code.startswith("return F.cross_entropy(z, y, label_smoothing=0.1)")
    assert site.form.startswith("mean[y != -100](lse - ")
    assert set(site.statistics) == {"lse", "sum", "pick(y)"}
    assert site.sharded is False
    assert site.strategy == "materialise"
    assert site.logits_bytes == N * V * 2


def test_fields_of_a_miss():
    report = inductor_ce.explain(half_fused, *inputs())
    (miss,) = report.misses
    assert isinstance(miss, Miss)
    assert miss.location == report.sites[0].location == line_of("z.softmax(-1))")
    assert miss.code == "return F.cross_entropy(z, y) + F.cross_entropy(z, z.softmax(-1))"
    assert miss.reason is Reason.SOFT_TARGETS
    assert miss.message == (
        "The target holds class probabilities of which a gradient is wanted. Detach the targets if they are "
        "meant as constants; no gradient reaches them through the kernels."
    )


def test_dictionary_survives_json():
    report = inductor_ce.explain(half_fused, *inputs())
    d = report.to_dict()
    assert json.loads(json.dumps(d)) == d
    (site,), (miss,) = d["sites"], d["misses"]
    assert set(site) == {
        *("location", "code", "form", "statistics", "which", "sharded", "strategy", "logits_bytes"),
        *("head", "plan", "rows", "kept", "id"),
    }
    assert (site["statistics"], site["sharded"], site["strategy"]) == (
        ["lse", "pick(y)"],
        False,
        "materialise",
    )
    assert set(miss) == {"location", "code", "reason", "message"}
    assert miss["reason"] == "SOFT_TARGETS"


def test_what_is_told_alike_of_a_line_is_told_once():
    def f(z, y):
        return sum(F.cross_entropy(each, t) for each, t in zip(z, y, strict=True))

    report = inductor_ce.explain(f, torch.randn(3, 5, V, requires_grad=True), torch.randint(V, (3, 5)))
    text = str(report)
    assert len(report.sites) == 3
    assert text.count("  fused   ") == text.count("    (3 times)") == text.count("    operator") == 1


def test_every_reason_has_a_remedy():
    assert all(reason.value.endswith(".") for reason in Reason)


@pytest.mark.parametrize("how", ["as it is", "compiled", "compiled and run", "backend"])
def test_functions(how: str):
    z, y = inputs()
    f = loss
    if how == "backend":
        f = torch.compile(loss, backend="eager")
    elif how != "as it is":
        inductor_ce.install()
        f, _ = compile_without_codegen(loss)
    if how == "compiled and run":
        f(z, y)
    assert len(inductor_ce.explain(f, z, y).sites) == 1


@pytest.mark.parametrize("how", ["as it is", "compiled", "compiled and run", "in place"])
def test_modules(how: str):
    model, h, y = Model(), torch.randn(N, 4), torch.arange(N)
    if how == "in place":
        model.compile(backend="eager")
    elif how != "as it is":
        model, _ = compile_without_codegen(model)
    if how == "compiled and run":
        model(h, y)
    (site,) = inductor_ce.explain(model, h, y).sites
    assert site.location == line_of("F.cross_entropy(self.head(h), y)")


def test_keyword_arguments():
    z, y = inputs()
    assert len(inductor_ce.explain(loss, z, y=y).sites) == 1


def test_a_compiled_function_inside():
    inner = torch.compile(loss, backend="eager")
    assert len(inductor_ce.explain(lambda z, y: inner(z * 2, y), *inputs()).sites) == 1


def test_graph_breaks():
    def f(z, y):
        first = F.cross_entropy(z, y)
        torch._dynamo.graph_break()
        return first + F.cross_entropy(z * 2, y, reduction="sum")

    forms = [site.form for site in inductor_ce.explain(f, *inputs()).sites]
    assert forms == ["mean[y != -100](lse - pick(y))", "sum[y != -100](lse - pick(y))"]


def test_checkpointed_loss_is_listed():
    def f(z, y):
        return torch.utils.checkpoint.checkpoint(F.cross_entropy, z, y, use_reentrant=False)

    report = inductor_ce.explain(f, *inputs())
    assert len(report.sites) + len(report.misses) == 1


def test_sizes_that_are_marked_dynamic():
    def f(z, y):
        return F.cross_entropy(z[:, :-1].transpose(1, 2), y[:, 1:])

    z, y = torch.randn(2, 5, V), torch.arange(10).view(2, 5)
    for tensor in (z, y):
        torch._dynamo.mark_dynamic(tensor, 1)
    (site,) = inductor_ce.explain(f, z, y).sites
    assert site.logits_bytes == 10 * V * 4


def test_same_report_twice_and_after_compiling():
    z, y = inputs()
    first = inductor_ce.explain(loss, z, y)
    compiled, _ = compile_without_codegen(loss, min_vocab=Options().min_vocab)
    compiled(z, y)
    assert inductor_ce.explain(compiled, z, y).to_dict() == inductor_ce.explain(loss, z, y).to_dict()
    assert first.to_dict() == inductor_ce.explain(loss, z, y).to_dict()


def test_options_in_force_are_used():
    assert len(inductor_ce.explain(loss, *inputs()).sites) == 1
    with inductor_ce.install(min_vocab=V + 1):
        assert inductor_ce.explain(loss, *inputs()).small[0].reason is Reason.SMALL_VOCAB
    assert len(inductor_ce.explain(loss, *inputs()).sites) == 1


def test_explaining_raises_no_miss():
    inductor_ce.install(on_miss="raise")
    assert len(inductor_ce.explain(half_fused, *inputs()).misses) == 1


def test_explaining_leaves_counters_and_compiled_code_alone():
    z, y = inputs()
    compiled, graphs = compile_without_codegen(loss)
    compiled(z, y)
    before, compilations = dict(counters["inductor_ce"]), len(graphs.final)
    inductor_ce.explain(compiled, z, y)
    compiled(z, y)
    assert dict(counters["inductor_ce"]) == before
    assert len(graphs.final) == compilations


def test_explaining_changes_no_gradient():
    z, y = inputs()
    inductor_ce.explain(loss, z, y)
    assert z.grad is None


@pytest.mark.parametrize(
    ("options", "strategy", "why"),
    [
        ({}, "materialise", "logits under 128 MiB are not worth dividing"),
        ({"strategy": "token_chunks"}, "token_chunks", "asked for"),
        ({"strategy": "vocab_slabs"}, "vocab_slabs", "asked for"),
        ({"memory_budget": 0.5}, "token_chunks", "one scalar scales every gradient"),
    ],
    ids=lambda value: str(value),
)
def test_plan_of_a_head(options: dict[str, Any], strategy: str, why: str):
    def f(h, W, y):
        return F.cross_entropy(F.linear(h, W), y)

    h, W = torch.randn(16, 8, requires_grad=True), torch.randn(64, 8, requires_grad=True)
    with inductor_ce.install(min_vocab=2, **options):
        (site,) = inductor_ce.explain(f, h, W, torch.arange(16)).sites
    assert site.strategy == strategy
    assert site.plan.startswith(strategy)
    assert why in site.plan


@pytest.mark.parametrize("product", [torch.inner, torch.cdist])
def test_plans_of_products_by_other_names(product: Any):
    def f(h, W, y):
        return F.cross_entropy(product(h, W), y)

    with inductor_ce.install(min_vocab=2, memory_budget=0.5):
        (site,) = inductor_ce.explain(f, *head(1)).sites
    assert site.plan.startswith("token_chunks")


def test_plans_where_numbers_are_symbols(caplog: pytest.LogCaptureFixture):
    """AOTAutograd has Dynamo read a function again where a float has to be a constant."""

    def f(h, W, y, t):
        return F.cross_entropy(F.linear(F.dropout(h, t), W), y)

    with (
        torch._dynamo.config.patch(assume_static_by_default=False),
        inductor_ce.install(min_vocab=2, memory_budget=0.5),
    ):
        (site,) = inductor_ce.explain(f, *head(1), 0.1).sites
    assert site.plan.startswith("token_chunks")
    assert "failed" not in caplog.text


def two_heads(h, W, U, y):
    def of(weight):
        return F.cross_entropy(F.linear(h, weight), y)

    return of(W) + of(U)


def head(n_weights: int) -> list[torch.Tensor]:
    made = [torch.randn(16, 8), *(torch.randn(64 + 8 * i, 8) for i in range(n_weights))]
    return [*(t.requires_grad_() for t in made), torch.arange(16)]


def test_plans_of_two_losses_on_one_line():
    """In one helper, which is called in a graph inside the graph first, and then in the graph itself."""

    def f(h, W, U, y):
        def helper(h, weight, kept):
            z = F.linear(h, weight)
            return F.cross_entropy(z, y) + (z.square().sum() if kept else 0)

        first = torch.utils.checkpoint.checkpoint(helper, h, W, True, use_reentrant=False)
        return first + helper(h, U, False)

    with inductor_ce.install(min_vocab=2, strategy="token_chunks"):
        sites = inductor_ce.explain(f, *head(2)).sites
    assert sites[0].location == sites[1].location
    assert sorted(site.id for site in sites) == [0, 1]
    inside, outside = sorted(sites, key=lambda site: site.logits_bytes)
    assert inside.strategy == "materialise"
    assert "are read by" in inside.plan
    assert outside.strategy == "token_chunks"


def test_plans_of_bodies_and_of_the_graph_round_them():
    """Checkpointed losses are read each in a graph of its own."""

    def f(h, W, U, y):
        def of(weight):
            return torch.utils.checkpoint.checkpoint(
                lambda h, w: F.cross_entropy(F.linear(h, w), y), h, weight, use_reentrant=False
            )

        return of(W) + of(U) + F.cross_entropy(F.linear(h, W * 2).view(-1, 64), y)

    with inductor_ce.install(min_vocab=2, strategy="vocab_slabs"):
        report = inductor_ce.explain(f, *head(2))
    assert sorted(site.id for site in report.sites) == [0, 1, 2]
    assert all(site.plan for site in report.sites)
    sizes = {site.id: site.logits_bytes // 64 for site in report.sites}
    assert sorted(sizes.values()) == [64, 64, 72]


def test_plans_of_several_sites_of_one_head():
    """Of two temperatures, which have statistics of their own, and are divided together."""

    def f(h, W, y):
        z = F.linear(h, W)
        return F.cross_entropy(z, y) + F.cross_entropy(z * 0.5, y)

    with inductor_ce.install(min_vocab=2, strategy="vocab_slabs"):
        report = inductor_ce.explain(f, *head(1))
    assert [site.id for site in report.sites] == [0, 1]
    assert all(site.plan.startswith("vocab_slabs") for site in report.sites)


def test_a_graph_is_read_once(monkeypatch: pytest.MonkeyPatch):
    read = []
    monkeypatch.setattr(explaining, "fuse_losses", lambda graph, o: read.append(graph) or fuse(graph, o))
    fuse = passes.fuse_losses
    inductor_ce.explain(two_heads, *head(2))
    inductor_ce.explain(loss, *inputs())
    assert len(read) == 2


@pytest.mark.filterwarnings("ignore:inductor_ce failed")
@pytest.mark.parametrize("failing", ["fuse_heads", "compile_fx"])
@pytest.mark.fails_inside
def test_a_failure_to_plan_leaves_the_sites(failing: str, monkeypatch: pytest.MonkeyPatch, caplog):
    def fail(*args: Any, **kwargs: Any):
        raise RuntimeError("none today")

    monkeypatch.setattr(explaining, failing, fail)
    with inductor_ce.install(min_vocab=2):
        report = inductor_ce.explain(two_heads, *head(2))
    assert "the plans are not told" in caplog.text
    assert [site.plan for site in report.sites] == ["", ""]
    assert [site.strategy for site in report.sites] == ["materialise", "materialise"]


def test_final_graphs_carry_no_site():
    """What is computed twice is found to be one, in whatever sites it was written."""
    compiled, graphs = compile_without_codegen(two_heads, strategy="vocab_slabs")
    compiled(*head(2)).backward()
    carried = [node.kwargs for node in graphs.nodes if node.target in (ops.ROW_STATS, ops.ROW_GRAD)]
    assert carried
    assert not any(carried)


def test_counters():
    compiled, _ = compile_without_codegen(half_fused)
    compiled(*inputs())
    assert counters["inductor_ce"] == {"sites": 1, "materialise": 1, "misses": 1}


def test_log(caplog: pytest.LogCaptureFixture):
    compiled, _ = compile_without_codegen(half_fused)
    with caplog.at_level(logging.INFO, logger="inductor_ce"):
        compiled(*inputs())
    lines = [r.getMessage() for r in caplog.records if r.name == "inductor_ce" and r.levelno == logging.INFO]
    where = line_of("z.softmax(-1))")
    assert lines == [
        f"{where}: fused mean[y != -100](lse - pick(y)) (logits 0.0 MiB)",
        f"{where}: left as written [SOFT_TARGETS] The target holds class probabilities of which a gradient "
        f"is wanted. {Reason.SOFT_TARGETS.value}",
    ]


def head_and_logits(h: Tensor, W: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    z = F.linear(h, W)
    return F.cross_entropy(z, y), z


def head_given() -> tuple[Tensor, Tensor, Tensor]:
    return torch.randn(32, 8).requires_grad_(), torch.randn(64, 8), torch.randint(64, (32,))


def test_logits_at_a_temperature_are_for_a_loss_alone() -> None:
    """Those of the other loss are made in pieces too: nobody else has them in memory."""

    def distilled(h: Tensor, W: Tensor, t: Tensor, y: Tensor) -> Tensor:
        s = F.linear(h, W)
        return F.kl_div(F.log_softmax(s / 2, -1), t, reduction="batchmean") + F.cross_entropy(s, y)

    h, W = torch.randn(N, 8, requires_grad=True), torch.randn(V, 8, requires_grad=True)
    t, y = torch.softmax(torch.randn(N, V), -1), torch.randint(V, (N,))
    with inductor_ce.install(strategy="token_chunks"):
        found = inductor_ce.explain(distilled, h, W, t, y).sites
    assert [(site.head, site.strategy) for site in found] == [("", "token_chunks")] * 2


def test_lite_mode_fuses_nothing_and_says_so():
    """It has the passes off among which ours run. No logits are lazy then."""
    given = head_given()
    with inductor_ce.install(min_vocab=2, strategy="token_chunks"), without_codegen():
        compiled = torch.compile(head_and_logits, mode="lite")
        report = inductor_ce.explain(compiled, *given)
        value, z = compiled(*given)
    assert (sites(), misses(), type(z)) == (0, 0, Tensor)
    torch.testing.assert_close(value, head_and_logits(*given)[0])
    (miss,) = report.misses
    assert (report.sites, miss.reason) == ([], Reason.PASSES_OFF)
    assert 'as in mode="lite" (use_pre_grad_passes). Compile without them' in miss.message


def test_heads_stay_whole_where_the_passes_over_joint_graphs_are_off():
    given = head_given()
    with inductor_ce.install(min_vocab=2, strategy="token_chunks"), without_codegen():
        compiled = torch.compile(head_and_logits, options={"use_joint_graph_passes": False})
        (site,) = inductor_ce.explain(compiled, *given).sites
        (pieces,) = inductor_ce.explain(head_and_logits, *given).sites
        compiled(*given)[0].backward()
    assert (site.strategy, pieces.strategy) == ("materialise", "token_chunks")
    assert 'as in mode="lite" (use_joint_graph_passes)' in site.plan
    assert (counters["inductor_ce"]["sites"], counters["inductor_ce"]["token_chunks"]) == (1, 0)


def test_one_line_a_site(caplog: pytest.LogCaptureFixture):
    compiled, _ = compile_without_codegen(lambda z, y: loss(z, y) + loss(z * 2, y))
    with caplog.at_level(logging.INFO, logger="inductor_ce"):
        compiled(*inputs())
    lines = [r.getMessage() for r in caplog.records if r.name == "inductor_ce" and r.levelno >= logging.INFO]
    assert (sites(), misses(), len(lines)) == (2, 0, 2)
    assert all("\n" not in line for line in lines)


SCRIPT = """
    import torch, inductor_ce
    inductor_ce.install(min_vocab=2)
    def f(z, y):
        return torch.nn.functional.cross_entropy(z, y)
    graphs = lambda gm, inputs: torch._inductor.compile_fx.compile_fx(
        gm, inputs, inner_compile=lambda gm, inputs, **kwargs: gm.forward
    )
    with torch.no_grad():
        torch.compile(f, backend=graphs)(torch.randn(4, 16), torch.arange(4))
"""


FUSED = "script.py:5: fused mean[y != -100](lse - pick(y))"


@pytest.fixture
def script(tmp_path: Path) -> Path:
    file = tmp_path / "script.py"
    file.write_text(textwrap.dedent(SCRIPT))
    return file


def test_without_torch_logs(script: Path, capfd: pytest.CaptureFixture[str]):
    runpy.run_path(str(script))
    assert FUSED not in capfd.readouterr().err


def chosen_by_a_mask(z, y, mask):
    log_p = F.log_softmax(z, -1)
    return F.nll_loss(log_p[mask], y[mask])


def test_where_dynamo_ends_a_graph():
    """A loss that stands on both sides is missed; the report tells of the cut, and what to do."""
    z, y = inputs()
    report = inductor_ce.explain(chosen_by_a_mask, z, y, y > 0)
    assert [miss.reason for miss in report.misses] == [Reason.NOT_UNDERSTOOD]
    (cut,) = report.cuts
    assert (cut.location, cut.code) == (line_of("log_p[mask]"), "return F.nll_loss(log_p[mask], y[mask])")
    assert cut.message.startswith("Dynamo ends the graph: Dynamic shape operator. Operator `aten.nonzero")
    assert "capture_dynamic_output_shape_ops = True`" in cut.message
    assert str(report).endswith(f"  cut     {cut.location}  {cut.code}\n    {cut.message}")
    assert report.to_dict()["cuts"] == [{"location": cut.location, "code": cut.code, "message": cut.message}]
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        report = inductor_ce.explain(chosen_by_a_mask, z, y, y > 0)
    assert (len(report.sites), report.misses, report.cuts) == (1, [], [])


def of_each_group(z, y):
    total = 0.0
    for k in range(2):
        total = total + F.cross_entropy(z[y % 2 == k], y[y % 2 == k])
    return total


def test_what_dynamo_gives_up():
    """In a loop that it cannot trace nothing is compiled, and no graph is there to tell of it."""
    z, y = inputs()
    report = inductor_ce.explain(of_each_group, z, y % V)
    assert not report.sites
    assert report.cuts
    assert all(not cut.location for cut in report.cuts)
    assert all(
        cut.message.startswith("Dynamo gives a function up, or ends its graph: ") for cut in report.cuts
    )
    assert str(report).splitlines()[1] == "  cut"
