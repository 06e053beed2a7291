"""torch.compile of an enabled model: one graph, no breaks, the same result."""

import pytest
import tiny
import torch
from patterns import Band
from torch._dynamo.testing import CompileCounterWithBackend

import dittfast
from dittfast.mixture import Rule
from dittfast.pipelines.measure import parity
from dittfast.pipelines.measure.parity import TINY


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def forward(model, inputs):
    with torch.no_grad():
        return model(**inputs)[0]


@pytest.mark.parametrize("backend", ["cpu", pytest.param("reference", marks=pytest.mark.slow)])
def test_whole_model_is_one_graph(backend):
    model, inputs = tiny.flux_transformer(1, 1), tiny.flux_inputs()
    dittfast.enable(model, Band(), backend=backend)
    eager = forward(model, inputs)
    counter = CompileCounterWithBackend("aot_eager")
    model.compile(backend=counter, fullgraph=True)
    for _ in range(2):
        torch.testing.assert_close(forward(model, inputs), eager, rtol=0, atol=1e-5)
    assert counter.frame_count == 1


@pytest.mark.slow
def test_repeated_blocks_share_their_graphs():
    """As many graphs as the stock model has: state has one Python shape in every layer."""
    inputs = tiny.flux_inputs()

    def graphs(model):
        counter = CompileCounterWithBackend("eager")
        model.compile_repeated_blocks(backend=counter, fullgraph=True)
        for _ in range(2):
            forward(model, inputs)
        return counter.frame_count

    stock = graphs(tiny.flux_transformer(3, 3))
    torch._dynamo.reset()
    model = tiny.flux_transformer(3, 3)
    dittfast.enable(model, Band(), backend="reference")
    assert graphs(model) == stock


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=pytest.mark.slow) for n in TINY],
)
def test_no_more_graphs_than_the_stock_model(name):
    """Also where diffusers lets Dynamo take the attention class whole (SD3).

    Mochi has more: each batch row runs attention of its own, and says how many there are.
    """

    def graphs(model):
        torch._dynamo.reset()
        counter = CompileCounterWithBackend("eager")
        model.compile(backend=counter)
        return parity.output(model, inputs), counter.frame_count

    model, inputs = TINY[name].build()
    stock = graphs(model)[1]
    model, inputs = TINY[name].build()
    with dittfast.enable(model, parity.METHODS["local"], backend="cpu", min_tokens=0):
        eager = parity.output(model, inputs)
        found, count = graphs(model)
    assert parity.distance(found, eager) < 1e-4
    assert count <= stock or name == "mochi"


def test_compiling_around_the_reading_of_the_layout():
    """torch.compile(model) breaks the graph there, and says what to do where it may not."""
    model, inputs = tiny.flux_transformer(1, 1), tiny.flux_inputs()
    dittfast.enable(model, Band(), backend="reference")
    eager = forward(model, inputs)
    torch.testing.assert_close(
        forward(torch.compile(model, backend="eager"), inputs), eager, rtol=0, atol=1e-5
    )
    torch._dynamo.reset()
    with pytest.raises(Exception, match=r"pipe\.transformer\.compile\(\)"):
        forward(torch.compile(model, backend="eager", fullgraph=True), inputs)


MIXTURE = [Rule(parity.METHODS["local"], heads="0"), Rule(parity.METHODS["topk"], heads="1")]
SERVED = {
    "static": parity.METHODS["local"],
    "dynamic": parity.METHODS["rectified"],
    "own": dittfast.methods.Linear(hidden=0),
    "mixture": MIXTURE,
    "parameters": dittfast.methods.Linear(),
}


def test_sizes_methods_and_guidance_share_their_graphs():
    """As many graphs as the stock model has; one more for layers with a method's parameters."""
    model = tiny.flux_transformer(0, 1)
    counter = CompileCounterWithBackend("eager")
    model.compile_repeated_blocks(backend=counter, fullgraph=True, dynamic=True)

    def graphs(*sizes):
        for size in sizes:
            inputs = tiny.flux_inputs(*size)
            with torch.compiler.set_stance("force_eager"):
                expected = forward(model, inputs)
            torch.testing.assert_close(forward(model, inputs), expected, rtol=1e-4, atol=1e-5)
        return counter.frame_count

    stock = graphs((6, 10), (9, 7), (3, 13))
    served = 2 * stock  # those of the stock model stay, for layers that are dense
    for name, method in SERVED.items():
        more = stock if name == "parameters" else 0
        with dittfast.enable(model, method, backend="cpu", min_tokens=0):
            assert graphs((9, 7), (3, 13)) == served + more, name
            with dittfast.guide(model, heads=[(0, 0)], rows="diagonal"):
                assert graphs((6, 10)) == served + more, name
