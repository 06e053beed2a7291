"""A server that runs for weeks: memory and objects stay flat, and sizes that return are known."""

import collections
import contextlib
import gc
import itertools
import random

import pytest
import torch
from adapter_folder import make_adapter, named
from distill_run import one_thread  # noqa: F401
from tiny import flux_pipeline, run
from torch._dynamo.testing import CompileCounterWithBackend

import dittfast
from dittfast.methods import Dense
from dittfast.pipelines.guidance.perturbation import Perturbation
from dittfast.pipelines.measure import parity
from dittfast.pipelines.state import ModelState

METHODS = tuple(parity.METHODS.values())
MIXTURE = {0: parity.METHODS["local"], 1: parity.METHODS["rectified"]}
SERVED = {**parity.METHODS, "dense": Dense(), "mixture": MIXTURE}
SIZES = [(8 * h, 8 * w) for h in range(4, 12, 2) for w in range(4, 14, 2)]
PROMPTS = ("a red cat", "the dog", "a photo of the green car", "a blue dog on a car")


def resident() -> int:
    """Bytes of this process in memory."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096


def objects() -> collections.Counter:
    gc.collect()
    return collections.Counter(type(x).__name__ for x in gc.get_objects())


class Server:
    """A pipeline and what its users ask for, one request after the other."""

    def __init__(self, adapters, seed=0):
        self.pipe = flux_pipeline()
        self.adapters = adapters
        self.draw = random.Random(seed)
        self.enabled = self.guided = self.loaded = False

    def request(self):
        draw = self.draw
        if draw.random() < 0.2:
            self._change()
        height, width = draw.choice(SIZES)
        prompt = [draw.choice(PROMPTS)] * draw.choice((1, 1, 2))
        steps = draw.choice((1, 1, 1, 3))  # some methods keep values from step to step
        found = run(self.pipe, prompt=prompt, height=height, width=width, num_inference_steps=steps)
        assert torch.isfinite(found).all()

    def _change(self):
        """Another method, guidance or adapter."""
        if self.guided:
            dittfast.unguide(self.pipe)
        if self.loaded:
            dittfast.unload_adapter(self.pipe)
        elif self.enabled:
            dittfast.disable(self.pipe)
        self.enabled = self.loaded = self.guided = False
        kind = self.draw.choice(("dense", "method", "method", "adapter"))
        if kind == "method":
            dittfast.enable(self.pipe, self.draw.choice(list(SERVED.values())), min_tokens=0)
            self.enabled = True
        elif kind == "adapter":
            dittfast.load_adapter(self.pipe, self.draw.choice(self.adapters))
            self.loaded = True
        if self.draw.random() < 0.4:
            dittfast.guide(self.pipe, heads=[(self.draw.randrange(4), 0)])
            self.guided = True


@pytest.fixture
def server(tmp_path):
    """With a LoRA, and with the trained parameters of every method that has some."""
    adapters = [make_adapter(tmp_path / "lora", "lora")]
    for name, method in parity.METHODS.items():
        if method.layer_parameters(4, 16, 64):
            adapters.append(make_adapter(tmp_path / name, "method", method=named(method)))
    assert len(adapters) > 4
    return Server(adapters)


def growth(server, requests):
    """Bytes of memory and numbers of objects before and after some requests."""
    before, kinds = resident(), objects()
    for _ in range(requests):
        server.request()
    return before, kinds, resident(), objects()


def assert_flat(before, kinds, after, more, requests):
    """Growth under 1 % of the memory for 1,000 requests, and no kind of object without end."""
    assert after - before < 0.01 * before * requests / 1000, f"{before:,} to {after:,} bytes"
    grown = {name: more[name] - kinds[name] for name in more if more[name] - kinds[name] > 0}
    assert sum(grown.values()) < 0.01 * sum(kinds.values()) * requests / 1000, grown


@pytest.mark.slow
def test_two_thousand_requests(server):
    for _ in range(500):
        server.request()
    assert_flat(*growth(server, 2000), 2000)


@pytest.mark.slow
def test_changing_everything_leaves_no_objects(server):
    """Briefly: objects alone, which do not depend on the allocator."""
    sizes = itertools.cycle(SIZES[:2])

    def round_trip():
        for kind in range(6):
            server.draw = random.Random(kind)
            server._change()
            height, width = next(sizes)
            run(server.pipe, height=height, width=width, num_inference_steps=1)

    for _ in range(3):  # isinstance and the like keep what they learn
        round_trip()
        kinds = objects()
    for _ in range(3):
        round_trip()
    more = objects()
    ours = [n for n in more if n in ("ModelState", "LayerState", "Plan", "Session", "Perturbation")]
    assert all(more[name] <= kinds[name] for name in ours), (kinds, more)
    assert sum(more.values()) - sum(kinds.values()) < 30, more - kinds


FORTY = [(8 * h, 8 * w) for h in range(4, 12) for w in range(4, 14, 2)]


@pytest.fixture(scope="module")
def compiled_server():
    """A pipeline whose blocks are compiled, and the counter of its graphs."""
    torch._dynamo.reset()
    pipe, counter = flux_pipeline(double=1, single=1), CompileCounterWithBackend("eager")
    pipe.transformer.compile_repeated_blocks(fullgraph=True, dynamic=True, backend=counter)
    yield pipe, counter
    torch._dynamo.reset()


def serve(pipe, size):
    return run(pipe, height=size[0], width=size[1], num_inference_steps=1)


@pytest.mark.slow
@pytest.mark.parametrize("name", SERVED)
def test_a_compiled_server_sees_forty_sizes(compiled_server, name, monkeypatch):
    """In random order, plain and guided: what eager code draws; nothing is made twice.

    Traced and not translated: how many graphs there are is Dynamo's.
    """
    pipe, counter = compiled_server
    made = collections.Counter()

    def count(cls, function):
        original = getattr(cls, function)

        def counting(*args, **kwargs):
            made[function] += 1
            return original(*args, **kwargs)

        monkeypatch.setattr(cls, function, counting)

    for cls in {type(x) for x in parity.METHODS.values()}:
        if hasattr(cls, "_make_geometry"):
            count(cls, "_make_geometry")
    count(ModelState, "_make_core")
    count(Perturbation, "__init__")
    draw = random.Random(0)
    with contextlib.ExitStack() as stack:
        stack.enter_context(dittfast.enable(pipe, SERVED[name], min_tokens=0))
        plain = {size: serve(pipe, size) for size in draw.sample(FORTY, 40)}
        graphs, cores = counter.frame_count, made.copy()
        assert made["_make_core"] >= 40 or name == "dense"
        for size in FORTY[::8]:
            with torch.compiler.set_stance("force_eager"):
                torch.testing.assert_close(plain[size], serve(pipe, size), rtol=1e-4, atol=1e-4)
        assert made == cores  # one plan for compiled and for eager code

        stack.enter_context(dittfast.guide(pipe, heads=[(1, 0)], rows="diagonal"))
        drawn = {size: serve(pipe, size) for size in draw.sample(FORTY, 40)}
        assert not any(torch.equal(drawn[size], plain[size]) for size in FORTY)
        assert made - cores == {"__init__": 40}  # the weakened heads of each size
        for size in draw.sample(FORTY, 40):
            torch.testing.assert_close(serve(pipe, size), drawn[size])
        assert made - cores == {"__init__": 40}
        # A layer that is weakened and else the stock model's has a graph of its own.
        assert counter.frame_count == graphs + (name == "dense")


@pytest.mark.slow
def test_a_server_compiled_by_inductor_sees_twelve_sizes():
    torch._dynamo.reset()
    pipe = flux_pipeline(double=1, single=1)
    pipe.transformer.compile_repeated_blocks(fullgraph=True, dynamic=True)
    for method in MIXTURE.values():
        with dittfast.enable(pipe, method, min_tokens=0):
            for size in random.Random(1).sample(FORTY, 12):
                found = serve(pipe, size)
                with torch.compiler.set_stance("force_eager"):
                    expected = serve(pipe, size)
                torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)
    torch._dynamo.reset()
