"""torch.compile of an enabled model: one graph, no breaks, the same result."""

import pytest
import tiny
import torch
from patterns import Band
from torch._dynamo.testing import CompileCounterWithBackend

import dittfast


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def forward(model, inputs):
    with torch.no_grad():
        return model(**inputs)[0]


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_whole_model_is_one_graph(backend):
    model, inputs = tiny.flux_transformer(1, 1), tiny.flux_inputs()
    dittfast.enable(model, Band(), backend=backend)
    eager = forward(model, inputs)
    counter = CompileCounterWithBackend("aot_eager")
    model.compile(backend=counter, fullgraph=True)
    for _ in range(2):
        torch.testing.assert_close(forward(model, inputs), eager, rtol=0, atol=1e-5)
    assert counter.frame_count == 1


def test_repeated_blocks_share_their_graphs():
    """As many graphs as the stock model has: state has one Python shape in every layer."""
    inputs = tiny.flux_inputs()

    def graphs(model):
        counter = CompileCounterWithBackend("aot_eager")
        model.compile_repeated_blocks(backend=counter, fullgraph=True)
        for _ in range(2):
            forward(model, inputs)
        return counter.frame_count

    stock = graphs(tiny.flux_transformer(4, 5))
    torch._dynamo.reset()
    model = tiny.flux_transformer(4, 5)
    dittfast.enable(model, Band(), backend="reference")
    assert graphs(model) == stock


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
