"""`reattention` against its definition, step by step in fp64, and in the runs of tiny pipelines."""

import gc
import weakref
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import pytest
import tiny
import torch

import dittfast
from dittfast import functional
from dittfast.attention import method_attention
from dittfast.layout import Context, Grid, Layout
from dittfast.methods import Local, Reattention
from dittfast.methods.base import Method
from dittfast.methods.memory import Memory
from dittfast.mixture import Rule
from dittfast.pipelines.processors import ReattentionAttnProcessor
from dittfast.testing import assert_within_budget, attention_inputs


def near(layout, method):
    """``[N, N]`` bool, token by token: what the mask keeps."""
    grid, _, y, x = torch.from_numpy(layout.coordinates()).unbind(1)
    tokens, width = layout.grid.tokens_per_frame, layout.grid.width
    if method.mask == "disc":
        square = (y[:, None] - y) ** 2 + (x[:, None] - x) ** 2
        here = square < method.density * tokens / torch.pi
        return here | (grid[:, None] != grid) | (grid < 0)
    apart = ((y[:, None] - y) * width + x[:, None] - x).abs()
    return (apart <= int(method.density * tokens) // 2) | (grid[:, None] != 0) | (grid != 0)


def softmax(q, k, v, seen, weight):
    """``(out, lse)`` with k and v for each query head."""
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    logits = q @ k.mT * q.shape[-1] ** -0.5 + weight.to(q)[:, :, None]
    logits = logits.masked_fill(~seen, -torch.inf)
    return torch.softmax(logits, -1) @ v, logits.logsumexp(-1, keepdim=True)


class ByHand:
    """The definition for the calls of one layer and branch, each at a later step."""

    def __init__(self, layout, method):
        self.method, self.refreshed = method, None
        self.near, self.all = near(layout, method), torch.ones(1, dtype=torch.bool)
        self.weight = torch.zeros(1, 1, layout.num_tokens)
        if layout.context_lengths is not None:
            self.weight = self.weight.masked_fill(~layout.valid()[:, None], -torch.inf)

    def __call__(self, step, q, k, v):
        local, lse = softmax(q, k, v, self.near, self.weight)
        if self.refreshed is None or step - self.refreshed >= self.method.every:
            whole, all_lse = softmax(q, k, v, self.all, self.weight)
            self.refreshed, self.share = step, (lse - all_lse).exp().detach()
            self.rest = (whole - self.share * local).detach()
            return whole
        share = self.share + self.method.growth * (step - self.refreshed - 1)
        return torch.clamp(share, max=1) * local + self.rest


LAYOUTS = {
    "image": Layout.image(7, 9),
    "text first, padded": Layout.image(5, 8, text=7, text_lengths=[7, 3]),
    "video, padded behind": Layout.video(3, 3, 5, text=5).with_text_lengths([1, 5]),
    "several grids": Layout((Grid(1, 5, 7), Context(3), Grid(1, 2, 4))),
}


within = partial(assert_within_budget, floor=16)


def check(
    method, layout, steps, head_dim=8, dtype=torch.float32, size=1.0, backend="cpu",
    judge=within,
):  # fmt: skip
    """Output and gradients at these steps of a run of two samples, by the definition."""
    options = dict(density=method.density, mask=method.mask, every=method.every)
    options |= dict(growth=method.growth, backend=backend)
    memory, exact, eager = Memory(), ByHand(layout, method), ByHand(layout, method)
    for step in steps:
        shape = 2, 2, layout.num_tokens, head_dim
        q, k, v, grad = attention_inputs(*shape, dtype=dtype, scale=size, seed=step // 2)
        dead = (exact.weight == -torch.inf).expand(2, 2, -1)[..., None]
        grad = grad.masked_fill(dead, 0)
        memory.begin(step)

        def ours(q, k, v):
            return functional.reattention(q, k, v, layout, memory, **options)

        sides = []
        for run, kind in (
            (ours, dtype),
            (lambda *x: exact(step, *x), torch.float64),  # noqa: B023
            (lambda *x: eager(step, *x), dtype),  # noqa: B023
        ):
            leaves = [x.to(kind).requires_grad_() for x in (q, k, v)]
            out = run(*leaves).masked_fill(dead, 0)
            sides.append([out.detach(), *torch.autograd.grad(out, leaves, grad.to(kind))])
        for what, *values in zip(("out", "dq", "dk", "dv"), *sides):
            judge(f"step {step}, {what}", *values)


@pytest.mark.parametrize("mask", ["band", "disc"])
@pytest.mark.parametrize("name", LAYOUTS)
def test_steps_of_a_run(name, mask):
    """Refreshes at steps 0, 2 and 5, for a step is left out; each gradient at every step."""
    check(Reattention(0.3, mask, every=2, growth=0.2), LAYOUTS[name], (0, 1, 2, 3, 5, 6))


@pytest.mark.parametrize(
    "backend", ["native", "reference", pytest.param("triton", marks=pytest.mark.slow)]
)
def test_every_backend_with_fewer_key_heads(backend):
    layout, method = LAYOUTS["text first, padded"], Reattention(0.3, every=9, growth=0.5)
    memory, hand = Memory(), ByHand(layout, method)
    for step in range(4):
        q, k, v, _ = attention_inputs(2, 4, layout.num_tokens, 16, seed=step)
        memory.begin(step)
        k, v = k[:, ::2], v[:, ::2]
        out = method_attention(method, layout, q, k, v, memory=memory, backend=backend)
        expected = hand(step, *(x.double() for x in (q, k, v)))
        alive = (hand.weight > -torch.inf).expand(2, 4, -1)
        torch.testing.assert_close(out[alive], expected.float()[alive])
    assert float((hand.share + 3 * 0.5).min()) > 1  # cut at 1, and the test would see it


def test_without_a_run_it_is_dense():
    layout = LAYOUTS["image"]
    q, k, v, grad = attention_inputs(1, 2, layout.num_tokens, 8)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    out = functional.reattention(*leaves, layout, None)
    dense = torch.nn.functional.scaled_dot_product_attention(*leaves)
    torch.testing.assert_close(out, dense)
    for a, b in zip(*(torch.autograd.grad(x, leaves, grad) for x in (out, dense))):
        torch.testing.assert_close(a, b)


CHANGES = {
    "batch": (lambda x: x[:1], Layout.image(6, 8)),
    "heads": (lambda x: x[:, :1], Layout.image(6, 8)),
    "head dim": (lambda x: x[..., :4], Layout.image(6, 8)),
    "dtype": (lambda x: x.double(), Layout.image(6, 8)),
    "size": (lambda x: x[:, :, :40], Layout.image(5, 8)),
    "grid": (lambda x: x, Layout.image(8, 6)),
    "text": (lambda x: x, Layout.image(5, 8, text=8, text_lengths=[8, 2])),
    "a later refresh": (lambda x: x, None),
}


@pytest.mark.parametrize("what", CHANGES)
def test_what_was_kept_for_something_else_is_renewed(what):
    """At step 1 the other inputs give what they give at the first step of a run: the exact."""
    change, layout = CHANGES[what]
    method, memory, fresh = Reattention(0.2, every=3), Memory(), Memory()
    one, two = (attention_inputs(2, 2, 48, 8, seed=seed)[:3] for seed in (0, 1))
    memory.begin(0)
    method_attention(method, Layout.image(6, 8), *one, memory=memory)
    memory.begin(3 if layout is None else 1)
    fresh.begin(0)
    layout = layout or Layout.image(6, 8)
    two = [change(x) for x in two]
    found = method_attention(method, layout, *two, memory=memory)
    assert torch.equal(found, method_attention(method, layout, *two, memory=fresh))
    # And from there on it goes.
    memory.begin(memory.step + 1)
    assert not torch.equal(method_attention(method, layout, *two, memory=memory), found)


def test_questions_of_a_pass_do_not_meet():
    """Two calls at a step, as of two groups of heads or two batch rows, equal in all but values."""
    layout, method = Layout.image(6, 8), Reattention(0.2)
    together, apart = Memory(), (Memory(), Memory())
    for step in range(3):
        together.begin(step)
        for number, memory in enumerate(apart):
            memory.begin(step)
            qkv = attention_inputs(1, 2, 48, 8, seed=2 * step + number)[:3]
            found = method_attention(method, layout, *qkv, memory=together)
            assert torch.equal(found, method_attention(method, layout, *qkv, memory=memory))


# In the runs of pipelines.

STEPS = 6
METHOD = Reattention(0.2, every=3, growth=0.1)


@dataclass(frozen=True)
class Definition(Method):
    """The definition in each call of a run, of which there are so many a step, one a layer."""

    name: ClassVar[str] = "definition"
    calls: int = 4

    def __post_init__(self):
        object.__setattr__(self, "kept", {})
        object.__setattr__(self, "count", [0])

    def attention(self, layout, q, k, v, call):
        step, number = divmod(self.count[0], self.calls)
        self.count[0] += 1
        if number not in self.kept or step == 0:
            self.kept[number] = ByHand(layout, METHOD)
        return self.kept[number](step, *(x.double() for x in (q, k, v))).to(q.dtype)

    def flops(self, layout, heads, head_dim):
        return 0.0


def draw(pipe, **changes):
    return tiny.run(pipe, **{"num_inference_steps": STEPS, **changes})


@pytest.mark.parametrize("name", ["flux", "wan"])
def test_a_run_is_the_definition_in_each_layer_and_guidance_branch(name):
    """A step of FLUX is one pass through 4 layers, one of Wan two passes through 2 layers."""
    pipe = tiny.flux_pipeline() if name == "flux" else tiny.wan_pipeline()
    stock = draw(pipe)
    with dittfast.enable(pipe, Definition(), min_tokens=0):
        expected = draw(pipe)
    with dittfast.enable(pipe, METHOD, min_tokens=0) as enabled:
        found = draw(pipe)
        described = enabled.describe()
        assert torch.equal(draw(pipe), found)  # nothing is left of the first run
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert float((found - stock).abs().max()) > 1e-2
    assert described.density is None and 1 / 3 < described.work < 1
    with dittfast.enable(pipe, METHOD, min_tokens=0, every=1):
        torch.testing.assert_close(draw(pipe), stock, rtol=1e-4, atol=1e-4)
    assert torch.equal(draw(pipe), stock)


def test_runs_that_are_interrupted_and_of_other_sizes_and_batches(monkeypatch):
    pipe, kept, values = tiny.flux_pipeline(), [], Memory.values

    def noted(self, made_for):
        given = values(self, made_for)
        kept.extend(weakref.ref(x) for x in given.values() if torch.is_tensor(x))
        return given

    def stop(pipe, step, time, given):
        if step == 2:
            raise KeyboardInterrupt
        return given

    monkeypatch.setattr(Memory, "values", noted)
    alive = lambda: (gc.collect(), sum(ref() is not None for ref in kept))[1]  # noqa: E731
    others = (dict(height=48), dict(num_images_per_prompt=2), dict(seed=3))
    with dittfast.enable(pipe, METHOD, min_tokens=0):
        found = draw(pipe)
        assert len(kept) > 8 and alive() == 0
        with pytest.raises(KeyboardInterrupt):
            draw(pipe, callback_on_step_end=stop)
        assert torch.equal(draw(pipe), found) and alive() == 0
        mixed = [draw(pipe, **other) for other in others]
    for other, drawn in zip(others, mixed):
        with dittfast.enable(pipe, METHOD, min_tokens=0):
            assert torch.equal(draw(pipe, **other), drawn)


def test_threads_have_runs_of_their_own():
    one = tiny.flux_pipeline()
    two = tiny.twin(one)
    with dittfast.enable(one, METHOD, min_tokens=0):
        expected = [draw(one), draw(one, prompt="a blue dog", seed=1)]
        found = tiny.in_threads(lambda: draw(one), lambda: draw(two, prompt="a blue dog", seed=1))
    assert all(torch.equal(a, b) for a, b in zip(found, expected))


def test_gradients_are_those_of_dense_attention_and_keep_nothing():
    model, inputs = tiny.flux_transformer(), tiny.flux_inputs()

    def gradients():
        model.zero_grad()
        model(**inputs)[0].square().mean().backward()
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    stock = gradients()
    with dittfast.enable(model, METHOD, min_tokens=0):
        for _ in range(2):
            for a, b in zip(gradients(), stock):
                torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
        assert model._dittfast.last.memories == {}


def test_beside_other_methods_and_dense_steps():
    """The first refresh comes with the first step that is the method's."""
    pipe = tiny.flux_pipeline(heads=4)
    rules = [Rule(METHOD, heads=(0, 1)), Rule(METHOD, heads=(2,)), Rule(Local(2), heads=(3,))]
    whole = [Rule(METHOD, heads=(0, 1, 2)), Rule(Local(2), heads=(3,))]
    drawn = []
    for mixture in (rules, whole):
        with dittfast.enable(pipe, mixture, min_tokens=0, dense_first_steps=2):
            drawn.append(draw(pipe))
    torch.testing.assert_close(*drawn, rtol=1e-4, atol=1e-4)
    stock = draw(pipe, num_inference_steps=3)
    with dittfast.enable(pipe, METHOD, min_tokens=0, dense_first_steps=2):
        exact = draw(pipe, num_inference_steps=3)
    torch.testing.assert_close(exact, stock, rtol=1e-4, atol=1e-4)


def test_processor_equals_enable_and_has_to_be_told_the_steps():
    pipe = tiny.wan_pipeline()
    with dittfast.enable(pipe, METHOD, min_tokens=0):
        expected = draw(pipe)
    processor = ReattentionAttnProcessor(density=0.2, every=3, growth=0.1)
    pipe.transformer.set_attn_processor(processor)
    with pytest.raises(ValueError, match=r"call begin\(step\) before each, or use dittfast.enable"):
        draw(pipe)

    def told(pipe, step, time, given):
        processor.begin(step + 1)
        return given

    for _ in range(2):
        processor.begin(0)
        assert torch.equal(draw(pipe, callback_on_step_end=told), expected)


BAD = [
    (dict(density=0), r"density must be a number in \(0, 1\]; got 0"),
    (dict(density=1.5), r"density must be a number in \(0, 1\]; got 1.5"),
    (dict(density="much"), "got 'much'"),
    (dict(growth=-0.1), r"growth must be a number in \[0, 1\]; got -0.1"),
    (dict(mask="square"), "mask must be one of band, disc; got 'square'"),
    (dict(every=0), "every must be an integer, at least 1; got 0"),
]


@pytest.mark.parametrize("options, message", BAD, ids=[str(options) for options, _ in BAD])
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        Reattention(**options)


def test_bad_inputs():
    q = torch.zeros(1, 1, 8, 4)
    with pytest.raises(ValueError, match="grid"):
        functional.reattention(q, q, q, Layout((Context(8),)), Memory())
    with pytest.raises(ValueError, match="describes 9 tokens"):
        functional.reattention(q, q, q, Layout.image(3, 3), Memory())
    with pytest.raises(ValueError, match="step must be an integer, at least 0; got -1"):
        ReattentionAttnProcessor().begin(-1)


def test_its_mask_is_drawn(tmp_path, capsys):
    from dittfast.cli import main

    picture = tmp_path / "mask.png"
    asked = ["plan", "--height", "16", "--width", "16", "--set", "density=0.1"]
    assert main([*asked, "--method", "reattention", "-o", str(picture)]) == 0
    band = near(Layout.image(16, 16), Reattention(0.1))
    assert f"density   {band.double().mean():.4f}" in capsys.readouterr().out
    assert picture.stat().st_size > 1000


def test_what_is_measured_is_a_mean_over_its_period(monkeypatch):
    from dittfast.measure import bench

    work = bench.Workload(Layout.image(8, 8), heads=2, head_dim=8)
    calls, attend = [], bench.method_attention
    monkeypatch.setattr(
        bench,
        "method_attention",
        lambda *a, **k: (calls.append(k["memory"].step), attend(*a, **k))[1],
    )
    monkeypatch.setattr(
        bench, "interleaved_seconds", lambda f, *a, **k: {n: [(g(), 12.0)[1]] for n, g in f.items()}
    )
    row = bench.bench_attention(Reattention(0.2, every=4), work, flex=False)
    assert calls == [0, 1, 2, 3] and row["attend_seconds"]["p50"] == 3 and row["density"] is None
    assert row["work"] == pytest.approx(1 / 4 + Reattention(0.2).planner.plan(work.layout).density)
    with pytest.raises(ValueError, match="reattention keeps nothing in passes that may be diff"):
        bench.bench_attention(Reattention(), bench.replace(work, backward=True))
