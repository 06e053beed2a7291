"""Attention of a layer as one op of a compiled graph: what it gives, and its gradients."""

import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.testing import CompileCounterWithBackend

from dittfast import Layout
from dittfast.methods.linear import Linear
from dittfast.methods.memory import Lasting, Memory, Tally
from dittfast.pipelines import compiled
from dittfast.pipelines.guidance.perturbation import Perturbation
from dittfast.pipelines.layer import AttentionCore, LayerRun, PlannedLayout
from dittfast.pipelines.measure.parity import METHODS
from dittfast.pipelines.seam import intercept
from dittfast.testing import attention_inputs

LAYOUTS = Layout.image(6, 10, text=5), Layout.image(9, 7, text=3), Layout.image(4, 5, text=8)
STRENGTH = torch.tensor([0.0, 0.7])


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def core(method, layout):
    planned = PlannedLayout(method, layout, method.keep(layout, torch.device("cpu")))
    method.prepare(layout, torch.device("cpu"))
    return AttentionCore(method, ((planned,),), "cpu")


def run_of(name, layout):
    """What a layer of two heads of 16 runs; parameters that do something."""
    weak = Perturbation("diagonal", ((layout,),))
    if name == "weakened alone":
        return LayerRun(None, weak, STRENGTH)
    if name == "weakened":
        return LayerRun(core(METHODS["local"], layout), weak, STRENGTH)
    method = METHODS[name]
    drawn = torch.Generator().manual_seed(1)
    parameters = {
        n: (x + 0.3 * torch.randn(x.shape, generator=drawn)).requires_grad_()
        for n, x in method.parameters(2, 16).items()
    }
    return LayerRun(core(method, layout), parameters=parameters)


def call(run, handle, q, k, v, **more):
    with intercept(run, handle):
        return F.scaled_dot_product_attention(q, k, v, **more)


def answers(function, run, q, k, v, grad_out, **more):
    """The output, and gradients by q, k, v and the parameters."""
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    out = function(run, compiled.handle_of(run), *leaves, **more)
    wanted = [*leaves, *run.parameters.values()]
    return out.detach(), *torch.autograd.grad(out, wanted, grad_out.to(out))


@pytest.mark.parametrize(
    "name",
    ["rectified", "weakened"]
    + [
        pytest.param(n, marks=pytest.mark.slow)
        for n in (*METHODS, "weakened alone")
        if n != "rectified"
    ],
)
def test_every_layout_is_answered_by_one_graph(name):
    counter = CompileCounterWithBackend("aot_eager")
    traced = torch.compile(call, backend=counter, fullgraph=True, dynamic=True)
    for layout in LAYOUTS:
        run = run_of(name, layout)
        inputs = attention_inputs(2, 2, layout.num_tokens, 16)
        mask = torch.rand(2, 1, 1, layout.num_tokens) > 0.2
        expected = answers(call, run, *inputs, attn_mask=mask)
        found = answers(traced, run, *inputs, attn_mask=mask)
        for ours, theirs in zip(found, expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    assert counter.frame_count == 1


def test_the_backward_pass_runs_what_its_forward_pass_ran():
    """Layers have gone on to another pass, and nothing else holds the first."""
    traced = torch.compile(call, backend="aot_eager", fullgraph=True, dynamic=True)
    first, second = LAYOUTS[:2]
    q, k, v, grad_out = attention_inputs(1, 2, first.num_tokens, 16)
    run = run_of("local", first)
    expected = answers(call, run, q, k, v, grad_out)
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    out = traced(run, compiled.handle_of(run), *leaves)
    del run
    other = run_of("local", second)
    answers(traced, other, *attention_inputs(1, 2, second.num_tokens, 16))
    for ours, theirs in zip(torch.autograd.grad(out, leaves, grad_out), expected[1:]):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.slow
def test_inductor_keeps_what_the_backward_pass_needs():
    """It fuses around the op and uses memory again that only the op knew."""

    def around(run, handle, q, k, v):
        out = call(run, handle, q.sin(), k.sin(), v.sin()).cos()
        return call(run, handle, out, out.sin(), out.cos()) + 1

    traced = torch.compile(around, fullgraph=True, dynamic=True)
    for layout in LAYOUTS[:2]:
        run = run_of("linear", layout)
        inputs = attention_inputs(2, 2, layout.num_tokens, 16)
        expected = answers(around, run, *inputs)
        for ours, theirs in zip(answers(traced, run, *inputs), expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)


def test_plans_last_and_are_counted():
    """What torch.compile would trace can keep nothing; the op does, as outside of a graph."""
    traced = torch.compile(call, backend="eager", fullgraph=True)
    layout, tally = LAYOUTS[0], Tally()
    memory = Memory(Lasting(every=2), tally)
    run = LayerRun(core(METHODS["rectified"], layout), memory=memory)
    q, k, v, _ = attention_inputs(1, 2, layout.num_tokens, 16)
    for step in range(4):
        memory.begin(step)
        traced(run, compiled.handle_of(run), q, k, v)
    assert (tally.made, tally.again) == (2, 2)
    assert run.core.planned[0][0].calls > 0


def test_another_attention_inside_the_layer_stays_what_it_is():
    """Over tokens that are not the layout's, and text that is seen but does not look."""
    traced = torch.compile(call, backend="aot_eager", fullgraph=True)
    layout = LAYOUTS[0]
    run = run_of("local", layout)
    q, k, v, _ = attention_inputs(1, 2, layout.num_tokens, 16)
    image = q[:, :, 5:]
    expected = call(run, None, q, k, v)[:, :, 5:]
    torch.testing.assert_close(traced(run, compiled.handle_of(run), image, k, v), expected)
    few = k[:, :, :9], v[:, :, :9]
    expected = F.scaled_dot_product_attention(q, *few)
    torch.testing.assert_close(traced(run, compiled.handle_of(run), q, *few), expected)


def test_autocast_reaches_it():
    traced = torch.compile(call, backend="aot_eager", fullgraph=True)
    run = run_of("local", LAYOUTS[0])
    q, k, v, _ = attention_inputs(1, 2, LAYOUTS[0].num_tokens, 16)
    with torch.autocast("cpu", torch.bfloat16):
        expected = call(run, None, q, k, v.bfloat16())
        found = traced(run, compiled.handle_of(run), q, k, v.bfloat16())
    assert found.dtype == expected.dtype == torch.bfloat16
    assert torch.equal(found, expected)


def test_autocast_inside_of_the_graph_is_gone_when_the_op_runs():
    def inside(*inputs, **more):
        with torch.autocast("cpu", torch.bfloat16):
            return call(*inputs, **more)

    traced = torch.compile(inside, backend="aot_eager", fullgraph=True)
    run = run_of("weakened alone", LAYOUTS[0])
    q, k, v, _ = attention_inputs(1, 2, LAYOUTS[0].num_tokens, 16)
    mask = torch.randn(1, 1, 1, k.shape[2])
    expected = inside(run, None, q, k, v, attn_mask=mask)
    found = traced(run, compiled.handle_of(run), q, k, v, attn_mask=mask)
    assert found.dtype == expected.dtype == torch.bfloat16
    torch.testing.assert_close(found, expected)


def test_gradients_only_of_what_asks_for_them():
    traced = torch.compile(call, backend="aot_eager", fullgraph=True)
    run = run_of("local", LAYOUTS[0])
    q, k, v, grad_out = attention_inputs(1, 2, LAYOUTS[0].num_tokens, 16)
    found = []
    for function in traced, call:
        leaf = v.clone().requires_grad_()
        function(run, compiled.handle_of(run), q, k, leaf).backward(grad_out)
        found.append(leaf.grad)
    torch.testing.assert_close(*found)


def test_errors_are_those_of_eager_code():
    traced = torch.compile(call, backend="aot_eager", fullgraph=True)
    run = run_of("local", LAYOUTS[0])
    q, k, v, _ = attention_inputs(1, 2, LAYOUTS[0].num_tokens, 16)
    with pytest.raises(ValueError, match="local cannot run a causal attention layer"):
        traced(run, compiled.handle_of(run), q, k, v, is_causal=True)
    square = torch.ones(q.shape[2], q.shape[2], dtype=torch.bool)
    with pytest.raises(ValueError, match="may differ between queries"):
        traced(run, compiled.handle_of(run), q, k, v, attn_mask=square)


def test_what_a_handle_stands_for_lives_as_long_as_its_memory():
    run = run_of("local", LAYOUTS[0])
    alias = compiled.handle_of(run).detach()
    assert compiled._run_of(alias) is run
    with pytest.raises(RuntimeError, match="was copied on its way"):
        compiled._run_of(alias.clone())


@pytest.mark.parametrize("hidden", [0, 4])
def test_the_op_keeps_the_promises_of_an_op(hidden, monkeypatch):
    layout, method = LAYOUTS[0], Linear(hidden)
    parameters = {n: x.requires_grad_() for n, x in method.parameters(2, 16).items()}
    run = LayerRun(core(method, layout), parameters=parameters)
    q, k, v, _ = attention_inputs(1, 2, layout.num_tokens, 16)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    given = (*leaves, None, [*parameters.values()], compiled.handle_of(run), False, None, False)
    monkeypatch.setattr(compiled, "_run_of", lambda handle: run)  # opcheck copies what it is given
    torch.library.opcheck(compiled._attention, given)
