"""Head guidance on every model family, against heads weakened by hand in one attention module."""

import re

import pytest
import torch
from torch.overrides import TorchFunctionMode

import dittfast
from dittfast.layout import Grid
from dittfast.pipelines.families import FAMILIES
from dittfast.pipelines.families.sequences import Sequences
from dittfast.pipelines.guidance.plain import guide
from dittfast.pipelines.measure.parity import TINY, Full

pytestmark = pytest.mark.filterwarnings("ignore")
SDPA = torch.nn.functional.scaled_dot_product_attention


class Weak(TorchFunctionMode):
    """Inside one module, head 0 of attention gives image tokens their own values."""

    def __init__(self, sequences):
        super().__init__()
        self.layouts = {rows[0].num_tokens: rows for rows in sequences.by_length()}
        self.on, self.calls = False, 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        call = {**dict(zip(("query", "key", "value"), args)), **(kwargs or {})}
        value = call.get("value")
        if func is SDPA and self.on and value.shape[2] in self.layouts:
            rows = self.layouts[value.shape[2]]
            missing = value.shape[2] - out.shape[2]
            # Text without queries: PRX's stands in front, NucleusMoE's behind.
            missing = missing if rows[0].grid_start >= missing else 0
            out = out.clone()
            for b in range(out.shape[0]):
                layout = rows[b if len(rows) > 1 else 0]
                for start, segment in layout.spans():
                    if isinstance(segment, Grid):
                        span = slice(start, start + segment.length)
                        moved = slice(span.start - missing, span.stop - missing)
                        out[b, 0, moved] = value[b, 0, span]
            self.calls += 1
        return out


def parts(out):
    out = out[0] if isinstance(out, tuple) else out
    return out if isinstance(out, list) else [out]


def by_hand(name, model, inputs):
    family = FAMILIES[type(model).__name__]
    first = next(
        module for at, module in model.named_modules()
        if re.fullmatch(family.layers, at) and callable(getattr(module, "processor", None))
    )  # fmt: skip
    with torch.no_grad():
        plain = parts(model(**inputs))
        weak = Weak(Sequences.of(family.read(model, inputs)))
        before = first.register_forward_pre_hook(lambda *_: setattr(weak, "on", True))
        after = first.register_forward_hook(lambda *_: setattr(weak, "on", False))
        with weak:
            moved = parts(model(**inputs))
        before.remove(), after.remove()
    assert weak.calls
    return plain, [c + 1.5 * (c - p) for c, p in zip(plain, moved)]


@pytest.mark.parametrize(
    "name",
    [n if at % 3 == 1 else pytest.param(n, marks=pytest.mark.slow) for at, n in enumerate(TINY)],
)
def test_every_family(name):
    model, inputs = TINY[name].build()
    plain, expected = by_hand(name, model, inputs)
    config = dict(heads=[(0, 0)], guidance_scale=1.5)
    with guide(model, **config), torch.no_grad():
        guided = parts(model(**inputs))
    largest = max(float(x.abs().max()) for x in expected)
    for ours, theirs, stock in zip(guided, expected, plain):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-5 * largest)
        assert float((ours - stock).abs().max()) > 1e-4 * largest
    enabled = dittfast.enable(model, Full(), backend="cpu", min_tokens=0)
    with enabled, guide(model, **config), torch.no_grad():
        again = parts(model(**inputs))
    for ours, theirs in zip(again, expected):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-4 * largest)
    with torch.no_grad():
        assert all(map(torch.equal, parts(model(**inputs)), plain))


def test_an_offloaded_model():
    """Its parameters are on the meta device until a layer runs."""
    from accelerate import cpu_offload

    model, inputs = TINY["wan"].build()
    with guide(model, heads=[(0, 0)]), torch.no_grad():
        (expected,) = parts(model(**inputs))
        cpu_offload(model, execution_device="cpu")
        assert next(model.parameters()).device.type == "meta"
        (found,) = parts(model(**inputs))
    assert torch.equal(found, expected)


class HalvesTurned:
    """Z-Image's pipeline: lists, [cond, uncond], and steps that run without the second half."""

    do_classifier_free_guidance = True

    def __init__(self, model):
        self.transformer = model
        self.components = {"transformer": model}


def test_a_batch_whose_conditional_half_comes_first():
    model, inputs = TINY["z-image"].build()
    x, text = inputs["x"][0], inputs["cap_feats"]
    assert text[0].shape != text[1].shape or not torch.equal(*text)
    both = {**inputs, "x": [x, x], "t": inputs["t"][:1].expand(2)}
    one = {**inputs, "x": [x], "t": inputs["t"][:1], "cap_feats": text[:1]}
    plain, expected = by_hand("z-image", model, one)
    with torch.no_grad():
        c, u = parts(model(**both))
    pipe = HalvesTurned(model)
    with guide(pipe, heads=[(0, 0)], guidance_scale=1.5), torch.no_grad():
        guided_c, guided_u = parts(model(**both))
        (alone,) = parts(model(**one))
    delta = expected[0] - plain[0]
    torch.testing.assert_close(alone, expected[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(guided_c, c + delta, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(guided_u, u + delta, rtol=1e-3, atol=1e-4)


def test_a_refused_guide_leaves_nothing_behind():
    class NoHeads(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = torch.nn.Linear(8, 8)
            self.processor = lambda attn, x: attn.linear(x)

        def forward(self, x):
            return self.processor(self, x)

    model = torch.nn.Sequential(NoHeads())
    for module, message in ((model, "no layout reader"), (TINY["kandinsky5"].build()[0], "head 9")):
        before = {n: type(m) for n, m in module.named_modules()}
        with pytest.raises(ValueError, match=message):
            guide(module, heads=[(0, 9)])
        assert before == {n: type(m) for n, m in module.named_modules()}
        with pytest.raises(ValueError, match="not enabled"):
            dittfast.disable(module)
    layout = dittfast.Layout.image(2, 4)
    dittfast.enable(model, "dense", layout=layout)
    with pytest.raises(ValueError, match=r"NoHeads has no number of heads in \.heads"):
        guide(model, heads=[(0, 0)])
    dittfast.disable(model)
