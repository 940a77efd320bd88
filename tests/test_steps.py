"""The table of steps: every row can be read, none hides another, and a refusal is told with its fact."""

import contextlib
import dataclasses
import operator
import re
from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from torch.fx import Graph

import inductor_ce
from inductor_ce.reading import spellings
from inductor_ce.reading.recognise import FUNCTIONS
from inductor_ce.reading.steps import STEPS, View

N, V = 10, 11


def test_no_spelling_is_in_two_rows():
    counted = Counter(target for step in STEPS for target in step.targets)
    assert [target for target, count in counted.items() if count > 1] == []


def test_rows_of_one_name_are_read_by_one_function():
    functions = {(step.name, step.function) for step in STEPS}
    assert len(functions) == len({name for name, _ in functions})


def test_every_row_that_names_a_function_has_it():
    assert {step for step in STEPS if step.function} == FUNCTIONS.keys()
    assert all(map(callable, FUNCTIONS.values()))


def test_methods_exist():
    methods = [t for step in STEPS for t in step.targets if isinstance(t, str)]
    attributes = [t[1] for step in STEPS for t in step.targets if isinstance(t, tuple)]
    assert [name for name in methods + attributes if not hasattr(torch.Tensor, name)] == []


def operators(x, m):
    z = torch.zeros_like(x)
    z[~m & (m | m)] = 1.0
    z += x
    z *= 2
    compared = x == z, x != z, x > z, x >= z, x < z, x <= 1, x < 2
    return (
        z,
        compared,
        -x,
        1 - x,
        x - 1,
        2 * x,
        x / 3,
        x // 2,
        x**2,
        x @ x,
        x[0],
        x.T,
        x.split(2)[1],
        x.chunk(2),
    )


def test_operators_are_the_same_steps_within_a_default_device():
    """There Dynamo calls methods, and functions of torch.Tensor, where else it calls Python's operators:
    rsub(x, 1) for 1 - x."""
    steps: list[list[str | None]] = []

    def backend(gm, example_inputs):
        found = [spellings.step_of(node) for node in gm.graph.nodes if node.op.startswith("call")]
        steps.append([None if step is None else step.name.removeprefix("r") for step in found])
        return gm.forward

    x = torch.ones(4, 4)
    for device in (contextlib.nullcontext(), torch.device("cpu")):
        torch._dynamo.reset()
        with device:
            torch.compile(operators, backend=backend)(x, x > 0)
    outside, inside = steps
    assert inside == outside
    assert None not in outside


def test_only_what_reads_its_input_is_a_view():
    assert all(step.parameters[0] == "input" for step in STEPS if step.view is not None)
    assert {step.view for step in STEPS} == {*View, None}


def test_every_trait_is_had_and_lacked():
    traits = [f.name for f in dataclasses.fields(STEPS[0]) if f.type == "bool"]
    assert len(traits) > 10
    for trait in traits:
        assert {getattr(step, trait) for step in STEPS} == {False, True}, trait


def test_arguments_go_by_the_names_of_the_row():
    graph = Graph()
    x = graph.placeholder("x")
    by_keyword = graph.call_method("softmax", (x,), {"axis": 1})
    assert spellings.arguments(by_keyword, spellings.step_of(by_keyword)) == {"input": x, "dim": 1}
    rest = graph.call_method("view", (x, 2, -1))
    assert spellings.read(rest)[1] == {"input": x, "shape": (2, -1)}
    last_two = graph.call_function(getattr, (x, "mT"))
    assert spellings.read(last_two)[1] == {"input": x, "dim0": -2, "dim1": -1}
    assert spellings.step_of(graph.call_function(getattr, (x, "shape"))) is None


@pytest.mark.parametrize(("sign", "turned"), [("<", "gt"), (">=", "le"), ("!=", "ne")])
def test_a_number_in_front_of_a_comparison_comes_behind_it(sign, turned):
    graph = Graph()
    x = graph.placeholder("x")
    compare = {"<": operator.lt, ">=": operator.ge, "!=": operator.ne}[sign]
    step, given = spellings.read(graph.call_function(compare, (3, x)))
    assert (step.name, given) == (turned, {"input": x, "other": 3})


def with_alpha(z, y):
    return torch.sub(z.log_softmax(-1), z.softmax(-1), alpha=2).sum(-1).mean()


def of_no_labels(z, y):
    return z.log_softmax(-1).gather(-1, y[:, None][:, :0]).sum()


def in_narrower_dtype(z, y):
    return (F.one_hot(y, V) * z.log_softmax(-1)).sum(-1, dtype=torch.float16).mean()


def of_another_equation(z, y):
    return torch.einsum("nv,mv->nm", z.log_softmax(-1), z.softmax(-1)).mean()


def of_edited_logits(z, y):
    x = z.detach() * 1
    whole = x.view(-1)
    lse = x.logsumexp(-1)
    x.mul_(2)
    return (lse - x.gather(-1, y[:, None]).squeeze(-1)).mean() + whole[0]


@pytest.mark.parametrize(
    ("f", "fact"),
    [
        (with_alpha, "goes into sub .* Its alpha is 2\\."),
        (of_no_labels, "goes into gather .* It picks no labels\\."),
        (in_narrower_dtype, "Its argument dtype casts torch.float32 to torch.float16\\."),
        (of_another_equation, "Its equation 'nv,mv->nm' has not two operands alike"),
        (of_edited_logits, "The logits are changed in place between what sub at .* joins\\."),
    ],
    ids=lambda p: getattr(p, "__name__", ""),
)
def test_a_step_says_why_it_does_not_read(f, fact):
    z, y = torch.randn(N, V, requires_grad=True), torch.randint(V, (N,))
    inductor_ce.install(min_vocab=2)
    (miss,) = inductor_ce.explain(f, z, y).misses
    assert re.search(fact, miss.message), miss.message
