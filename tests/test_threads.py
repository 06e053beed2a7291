"""Threads that share an enabled transformer get what each would get alone, to the bit."""

from __future__ import annotations

import concurrent.futures
import contextlib
import copy
import random
import sys
import threading

import pytest
import tiny
import torch
from foreign_backend import backends_of
from patterns import Band, FirstKeys

import dittfast
from dittfast.pipelines.measure.parity import METHODS, Full

SPARSE = ("local", "radial", "log_linear", "rectified")
MODELS = {"flux": lambda: tiny.flux_transformer(1, 1), "wan": tiny.wan_transformer}


def inputs(name, size, seed=0):
    """Forward arguments for a grid; Wan's has three frames and patches of two by two."""
    height, width = size
    if name == "flux":
        return tiny.flux_inputs(height, width, batch=1, seed=seed)
    return tiny.wan_inputs(3, 2 * height, 2 * width, batch=1, seed=seed)


@pytest.fixture(autouse=True)
def one_core():
    """Sums of one order, and threads that take turns often."""
    threads, interval = torch.get_num_threads(), sys.getswitchinterval()
    torch.set_num_threads(1)
    sys.setswitchinterval(1e-5)
    yield
    torch.set_num_threads(threads)
    sys.setswitchinterval(interval)


def meeting_places(model):
    """Blocks, and the inside of each attention module."""
    lists = [x for x in model.children() if isinstance(x, torch.nn.ModuleList)]
    inside = [module for name, module in model.named_modules() if name.endswith("to_q")]
    return [block for blocks in lists for block in blocks] + inside


@contextlib.contextmanager
def lockstep(models, threads):
    """Passes meet before every block and in every attention: all are in the same place at once.

    Who ends, fails or waits for the others' pass to end lets all go on by themselves.
    """
    barrier = threading.Barrier(threads)

    def meet(*_):
        with contextlib.suppress(threading.BrokenBarrierError):
            barrier.wait(0.2)

    places = [place for model in models for place in meeting_places(model)]
    hooks = [place.register_forward_pre_hook(meet) for place in places]
    try:
        yield barrier
    finally:
        for hook in hooks:
            hook.remove()


def side_by_side(models, jobs, repeats=1):
    """What every job, a function, returned in a thread of its own: ``[jobs][repeats]``."""
    with (
        lockstep(models, len(jobs)) as barrier,
        concurrent.futures.ThreadPoolExecutor(len(jobs)) as pool,
    ):

        def work(job):
            try:
                return [job() for _ in range(repeats)]
            finally:
                barrier.abort()

        return [future.result() for future in [pool.submit(work, job) for job in jobs]]


def assert_as_alone(found, alone):
    wrong = [
        (number, float((out - expected).abs().max()))
        for number, (outs, expected) in enumerate(zip(found, alone))
        for out in outs
        if not torch.equal(out, expected)
    ]
    assert wrong == []


def predict(model, arguments):
    with torch.no_grad():
        return model(**arguments)[0]


SAME = (6, 10), (10, 6)
MIXED = (*SAME, (5, 7), (9, 4))


def _slow(*values):
    return pytest.param(*values, marks=pytest.mark.slow)


@pytest.mark.parametrize("method", SPARSE)
@pytest.mark.parametrize(
    "name, sizes",
    [("flux", SAME), ("wan", MIXED), _slow("flux", MIXED), _slow("wan", SAME)],
    ids=["flux-two", "wan-four", "flux-four", "wan-two"],
)
def test_passes_side_by_side(name, method, sizes):
    """Landscape and portrait have one token count: another's plan would not even fail."""
    model = MODELS[name]()
    requests = [inputs(name, size, seed) for seed, size in enumerate(sizes)]
    options = dict(backend="cpu", min_tokens=0)
    alone = []
    for request in requests:
        with dittfast.enable(model, METHODS[method], **options):
            alone.append(predict(model, request))
    with dittfast.enable(model, METHODS[method], **options):
        jobs = [lambda request=request: predict(model, request) for request in requests]
        assert_as_alone(side_by_side([model], jobs), alone)


def test_a_pass_with_gradients_beside_one_without():
    """A training step's gradients while another thread draws another size."""
    model = tiny.flux_transformer(1, 1)
    train, draw = inputs("flux", (6, 10)), inputs("flux", (10, 6))

    def step():
        loss = model(**train)[0].square().mean()
        return torch.autograd.grad(loss, model.x_embedder.weight)[0]

    with dittfast.enable(model, METHODS["local"], backend="cpu", min_tokens=0):
        alone = [step(), predict(model, draw)]
        assert_as_alone(side_by_side([model], [step, lambda: predict(model, draw)]), alone)


def test_the_users_backend_side_by_side(foreign):
    """A sparse pass takes no other thread's dense layers away from the user's kernel."""
    model, sizes = tiny.flux_transformer(1, 1), ((6, 10), (4, 9), (10, 6))
    model.set_attention_backend("flex")
    chosen = backends_of(model)
    with dittfast.enable(model, METHODS["local"], backend="cpu", min_tokens=50):
        jobs = [lambda size=size: predict(model, inputs("flux", size)) for size in sizes]
        alone = [job() for job in jobs]
        assert foreign == [(41, 41)] * 2
        foreign.clear()
        assert_as_alone(side_by_side([model], jobs), alone)
    assert foreign == [(41, 41)] * 2
    assert backends_of(model) == chosen


def test_more_requests_than_threads():
    """The threads of a server's pool run one size after another."""
    model, random_order = tiny.flux_transformer(1, 1), random.Random(0)
    sizes = [(6, 10), (10, 6), (4, 9), (9, 4)]
    with dittfast.enable(model, METHODS["local"], backend="cpu", min_tokens=0):
        alone = [predict(model, inputs("flux", size)) for size in sizes]
        order = random_order.choices(range(4), k=12)
        with concurrent.futures.ThreadPoolExecutor(3) as pool, lockstep([model], 3):
            found = pool.map(lambda n: predict(model, inputs("flux", sizes[n])), order)
            for number, out in zip(order, found):
                assert torch.equal(out, alone[number])


@pytest.mark.slow
def test_compiled_blocks_side_by_side():
    """Where a pass is carried by a graph that both threads run."""
    torch._dynamo.reset()
    model = tiny.flux_transformer(1, 1)
    requests = [inputs("flux", size) for size in ((6, 10), (10, 6))]
    with dittfast.enable(model, METHODS["local"], backend="cpu", min_tokens=0):
        model.compile_repeated_blocks(backend="eager")
        alone = [predict(model, request) for request in requests]
        jobs = [lambda request=request: predict(model, request) for request in requests]
        assert_as_alone(side_by_side([model], jobs), alone)
    torch._dynamo.reset()


def test_two_pipelines_with_two_methods_and_one_that_comes_and_goes():
    """Another pipeline is enabled and disabled meanwhile; no state is shared between them."""
    flux, wan, third = tiny.flux_pipeline(), tiny.wan_pipeline(), tiny.flux_pipeline()
    options = dict(backend="cpu", min_tokens=0, dense_first_steps=1)
    dittfast.enable(flux, METHODS["local"], **options)
    dittfast.enable(wan, METHODS["log_linear"], **options)

    def comes_and_goes():
        with dittfast.enable(third, METHODS["rectified"], **options):
            sparse = tiny.run(third, num_inference_steps=2)
        return torch.cat([sparse, tiny.run(third, num_inference_steps=2)])

    jobs = [
        lambda: tiny.run(flux, num_inference_steps=2),
        lambda: tiny.run(wan, num_inference_steps=2),
        comes_and_goes,
    ]
    alone = [job() for job in jobs]
    models = [flux.transformer, wan.transformer, third.transformer]
    assert_as_alone(side_by_side(models, jobs), alone)


PIPELINES = {"flux": tiny.flux_pipeline, "wan": tiny.wan_pipeline, "sd3": tiny.sd3_pipeline}
# Steps and size of each pipeline of a pool: with one and the same number of tokens, and not.
POOL = ((4, (64, 96)), (3, (96, 64)), (3, (64, 64)))


def embedded(name, pipe):
    """The prompt as tensors: tokenizers and text encoders are not what threads share here."""
    text = dict(prompt="a red cat", max_sequence_length=12)
    if name == "flux":
        found = pipe.encode_prompt(prompt_2=None, **text)
        return dict(prompt_embeds=found[0], pooled_prompt_embeds=found[1])
    if name == "wan":
        cond, uncond = pipe.encode_prompt(negative_prompt="a dog", **text)
        return dict(prompt_embeds=cond, negative_prompt_embeds=uncond)
    text |= dict(prompt_2=None, prompt_3=None, negative_prompt="a dog")
    keys = "prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds"
    return dict(zip((*keys, "negative_pooled_prompt_embeds"), pipe.encode_prompt(**text)))


def pool_of(name, change):
    """Pipelines on one transformer with a scheduler each, their jobs, and what each gives alone.

    ``change(pipe)`` is done to one pipeline of the pool, and to every lonely one.
    """
    first = PIPELINES[name]()
    call = embedded(name, first)
    pipes = [first]
    for shift in (2.0, 5.0):
        scheduler = type(first.scheduler).from_config(first.scheduler.config, shift=shift)
        pipes.append(type(first)(**{**first.components, "scheduler": scheduler}))
    if name == "wan":
        pipes.pop()
    jobs, alone = [], []
    for seed, (pipe, (steps, (height, width))) in enumerate(zip(pipes, POOL)):
        pipe.set_progress_bar_config(disable=True)
        size = dict(height=height, width=width)
        changes = dict(num_inference_steps=steps, prompt=None, negative_prompt=None, **size)

        def job(pipe=pipe, seed=seed, changes=changes):
            return tiny.run(pipe, seed, **changes, **call)

        jobs.append(job)
        parts = {"transformer": copy.deepcopy(first.transformer)}
        parts["scheduler"] = copy.deepcopy(pipe.scheduler)
        lonely = type(pipe)(**{**pipe.components, **parts})
        lonely.set_progress_bar_config(disable=True)
        change(lonely)
        alone.append(job(lonely))
    change(first)
    return first.transformer, jobs, alone


SCHEDULES = {
    "flux": (METHODS["local"], dict(dense_first_steps=1, dense_last_steps=1)),
    "wan": (METHODS["log_linear"], dict(dense_first_steps=1)),
    "sd3": (FirstKeys(), dict(dense_last_steps=1)),
}


@pytest.mark.parametrize("name", PIPELINES)
def test_a_pool_of_pipelines_shares_a_transformer(name):
    """Every pipeline has its own dense steps, alone, after the others and beside them."""
    method, schedule = SCHEDULES[name]
    options = dict(backend="cpu", min_tokens=0, **schedule)
    model, jobs, alone = pool_of(name, lambda pipe: dittfast.enable(pipe, method, **options))
    assert_as_alone([[job()] for job in jobs + jobs[:1]], alone + alone[:1])
    assert_as_alone(side_by_side([model], jobs), alone)


@pytest.mark.parametrize("name", PIPELINES)
def test_guided_pipelines_side_by_side(name):
    """Guidance in one call a step, in two and in a batch of two, over a sparse method."""

    def change(pipe):
        dittfast.enable(pipe, Band(), backend="cpu", min_tokens=0)
        dittfast.guide(pipe, heads=[(0, 1)], guidance_scale=2.0, start_step=1)

    model, jobs, alone = pool_of(name, change)
    assert_as_alone([[job()] for job in jobs + jobs[:1]], alone + alone[:1])
    assert_as_alone(side_by_side([model], jobs), alone)


def test_a_guided_pipeline_beside_a_plain_one():
    """Pipelines with transformers of their own, only one of them guided."""
    guided, plain = tiny.wan_pipeline(), tiny.wan_pipeline()
    dittfast.guide(guided, heads=[(1, 0)], guidance_scale=2.0)
    dittfast.enable(plain, Full(), backend="cpu", min_tokens=0)
    call = dict(num_inference_steps=2, prompt=None, negative_prompt=None)
    call |= embedded("wan", plain)
    jobs = [lambda: tiny.run(guided, **call), lambda: tiny.run(plain, **call)]
    alone = [job() for job in jobs]
    assert_as_alone(side_by_side([guided.transformer, plain.transformer], jobs), alone)


@pytest.mark.slow
def test_four_threads_two_hundred_passes():
    """Two transformers with two methods, mixed sizes in a random order, no meeting arranged."""
    sizes = [(6, 10), (10, 6), (5, 7), (9, 4), (12, 5)]
    models = {name: make() for name, make in MODELS.items()}
    methods = {"flux": "local", "wan": "log_linear"}
    requests = [(name, inputs(name, size, n)) for name in models for n, size in enumerate(sizes)]
    for name, model in models.items():
        dittfast.enable(model, METHODS[methods[name]], backend="cpu", min_tokens=0)
    alone = [predict(models[name], request) for name, request in requests]

    def serve(seed):
        wrong, errors = 0, []
        for number in random.Random(seed).choices(range(len(requests)), k=200):
            name, request = requests[number]
            try:
                wrong += not torch.equal(predict(models[name], request), alone[number])
            except Exception as error:  # counted, so that all 800 passes are seen
                errors.append(f"{type(error).__name__}: {error}")
        return wrong, errors

    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        found = list(pool.map(serve, range(4)))
    assert found == [(0, [])] * 4
