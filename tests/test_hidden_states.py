"""What a layer was given reaches its method: the right tokens, in the order of the sequence."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import pytest
import tiny
import torch

import dittfast
from dittfast import Layout
from dittfast.attention import method_attention
from dittfast.methods import METHODS, Dense
from dittfast.methods.base import Method
from dittfast.methods.head_groups import Group, HeadGroups
from dittfast.pipelines import layer
from dittfast.pipelines.adapter import method_parameters
from dittfast.pipelines.families.tiny import TINY
from dittfast.pipelines.families.tiny_image import TINY_IMAGE
from dittfast.pipelines.families.tiny_packed import TINY_PACKED
from dittfast.pipelines.families.tiny_video import TINY_VIDEO
from dittfast.pipelines.models import known_family
from dittfast.pipelines.processors import SparseAttnProcessor
from dittfast.testing import attention_inputs

pytestmark = pytest.mark.filterwarnings("ignore")


@dataclass(frozen=True)
class Gated(Method):
    """Dense attention, times a gate of each token's hidden state."""

    name: ClassVar[str] = "gated"
    needs_grid: ClassVar[bool] = False
    needs_hidden_states: ClassVar[bool] = True

    def parameters(self, heads, head_dim, channels):
        return {"gate": torch.linspace(-1, 1, channels).repeat(heads, 1)}

    def attention(self, layout, q, k, v, call, gate=None):
        hidden = call.hidden_states
        for watch in WATCHING:
            watch(layout, q, k, v, hidden)
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
        logits = q @ k.mT * (q.shape[-1] ** -0.5 if call.scale is None else call.scale)
        if call.kv_log_weight is not None:
            logits = logits + call.kv_log_weight[:, :, None].to(logits)
        gates = 1 + torch.tanh(hidden.to(q) @ gate.to(q).mT).mT[..., None]  # [B, H, N, 1]
        return torch.softmax(logits, -1) @ v * gates

    def flops(self, layout, heads, head_dim):
        return 4.0 * layout.num_tokens**2 * head_dim * heads


WATCHING: list = []


class Tokens:
    """Follows values back to the token of the layer's arguments that they were projected from."""

    def __init__(self, model):
        self.calls, self.tokens = 0, 0
        for module in model._dittfast.layers:
            model.get_submodule(module).register_forward_pre_hook(self.enter, with_kwargs=True)

    def enter(self, module, args, kwargs):
        """The layer gets leaves of the graph, one for each tensor that it is given."""
        leaves = {}

        def leaf(x):
            tokens = torch.is_tensor(x) and x.ndim in (2, 3) and x.requires_grad
            return leaves.setdefault(id(x), x.detach().requires_grad_()) if tokens else x

        given = tuple(map(leaf, args)), {name: leaf(x) for name, x in kwargs.items()}
        self.given = list(leaves.values())
        return given

    def __call__(self, layout, q, k, v, hidden):
        self.calls += 1
        n = layout.num_tokens
        assert hidden.shape[:2] == (q.shape[0], n)
        edges = [at for start, s in layout.spans() for at in (start, start + s.length - 1)]
        for at in sorted({*edges, n // 2, n // 3}):
            row = self.calls % q.shape[0]
            value = v[row, :, at].square().sum()
            if not value.requires_grad or float(value) == 0:
                continue  # padding that the model cuts away
            found = []
            for x, grad in zip(
                self.given,
                torch.autograd.grad(value, self.given, retain_graph=True, allow_unused=True),
            ):
                if grad is not None:
                    found += [x[tuple(place)] for place in grad.any(-1).nonzero().tolist()]
            assert len(found) == 1
            assert torch.equal(found[0], hidden[row, at])
            self.tokens += 1


# One of each kind; the others have one stream, or two in one of these orders.
DEFAULT = ("flux", "sd3", "prx", "lumina2", "wan", "hunyuan-video", "mochi", "cosmos3")


@pytest.mark.parametrize(
    "name", [n if n in DEFAULT else pytest.param(n, marks=pytest.mark.slow) for n in TINY]
)
def test_each_token_of_every_family(name, monkeypatch):
    model, inputs = TINY[name].build()
    for x in inputs.values():
        if torch.is_tensor(x) and x.is_floating_point():
            x.requires_grad_()
    if known_family(model).hidden_states is None:
        with pytest.raises(ValueError, match=f"gated needs .* {type(model).__name__}"):
            dittfast.enable(model, Gated(), min_tokens=0)
        return
    with dittfast.enable(model, Gated(), min_tokens=0):
        tokens = Tokens(model)
        monkeypatch.setattr(f"{__name__}.WATCHING", [tokens])
        model(**inputs)
    assert tokens.calls >= 2 and tokens.tokens >= 4


def test_defaults_are_there():
    assert set(DEFAULT) <= (TINY_IMAGE | TINY_VIDEO | TINY_PACKED).keys()


def test_gradients_and_checkpointing_in_two_orders():
    model, inputs = tiny.flux_transformer(), tiny.flux_inputs()
    with dittfast.enable(model, Gated(), min_tokens=0):
        plain = tiny.gradients(model, inputs)
        model.enable_gradient_checkpointing()
        again = tiny.gradients(model, inputs)
        own = method_parameters(model)
    assert all(p.shape == (2, 32) and p.grad.any() for p in own.values()) and len(own) == 4
    for a, b in zip(plain, again, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


@pytest.mark.slow
def test_gradients_reach_them_through_a_compiled_model():
    model, inputs = tiny.flux_transformer(1, 1), tiny.flux_inputs()
    with dittfast.enable(model, Gated(), min_tokens=0):
        expected = tiny.gradients(model, inputs)
        torch._dynamo.reset()
        model.compile(backend="aot_eager", fullgraph=True)
        found = tiny.gradients(model, inputs)
        torch._dynamo.reset()
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_compiled_and_as_a_processor(monkeypatch):
    model, inputs = tiny.flux_transformer(1, 1), tiny.flux_inputs()
    with torch.no_grad():
        stock = model(**inputs)[0]
        with dittfast.enable(model, Gated(), min_tokens=0):
            expected = model(**inputs)[0]
            torch._dynamo.reset()
            model.compile(backend="eager", fullgraph=True)
            torch.testing.assert_close(model(**inputs)[0], expected)
            model._compiled_call_impl = None
            torch._dynamo.reset()
        assert not torch.allclose(expected, stock, atol=1e-3)
        monkeypatch.setitem(METHODS, "gated", Gated)
        processor = type("GatedProcessor", (SparseAttnProcessor,), {"method_name": "gated"})
        model.set_attn_processor(processor(heads=2, head_dim=16, channels=32))
        torch.testing.assert_close(model(**inputs)[0], expected)


def test_who_does_not_ask_pays_nothing(monkeypatch):
    def never(*_):
        raise AssertionError

    monkeypatch.setattr(layer, "hidden_sequence", never)
    model, inputs = tiny.flux_transformer(), tiny.flux_inputs()
    with dittfast.enable(model, "local", min_tokens=0), torch.no_grad():
        model(**inputs)
    with dittfast.enable(model, Gated(), min_tokens=0), pytest.raises(AssertionError):
        model(**inputs)


def test_groups_of_heads_hand_them_on():
    layout, channels = Layout.image(3, 5), 6
    q, k, v, _ = attention_inputs(2, 3, 15, 8)
    hidden = torch.randn(2, 15, channels)
    whole = Gated().parameters(3, 8, channels)["gate"]
    groups = HeadGroups((Group((0, 2), Gated(), "a_"), Group((1,), Dense(), "b_")))
    assert (
        groups.needs_hidden_states and not HeadGroups((Group((0,), Dense()),)).needs_hidden_states
    )
    own = groups.parameters(3, 8, channels)
    assert {name: x.shape for name, x in own.items()} == {"a_gate": (2, channels)}
    out = method_attention(groups, layout, q, k, v, hidden_states=hidden, **own)
    gated = method_attention(Gated(), layout, q, k, v, hidden_states=hidden, gate=whole)
    torch.testing.assert_close(out[:, [0, 2]], gated[:, [0, 2]])
    torch.testing.assert_close(out[:, [1]], method_attention(Dense(), layout, q, k, v)[:, [1]])


@pytest.mark.parametrize(
    "shape, words",
    [
        (None, "gated needs the layer's hidden states; give hidden_states"),
        ((2, 14, 6), r"must be \[B, N, C\] = \[2, 15, channels\] like q, got \[2, 14, 6\]"),
        ((1, 15, 6), r"got \[1, 15, 6\]"),
        ((2, 3, 15, 8), r"got \[2, 3, 15, 8\]"),
    ],
)
def test_bad_hidden_states(shape, words):
    q, k, v, _ = attention_inputs(2, 3, 15, 8)
    given = None if shape is None else torch.zeros(shape)
    with pytest.raises(ValueError, match=words):
        method_attention(Gated(), Layout.image(3, 5), q, k, v, hidden_states=given)


def test_what_cannot_be_put_together():
    class Where:
        text_before, text_behind = 4, 0

    class Both:
        text_before, text_behind = 4, 4

    class History:  # context before the grid that is the layer's own, and text behind
        text_before, text_behind = 9, 4

    image, text = torch.zeros(2, 15, 6), torch.ones(2, 4, 6)
    joint = layer.hidden_sequence((image, text), Where, 19)
    assert torch.equal(joint, torch.cat([text, image], 1))
    assert layer.hidden_sequence((image, text), Where, 15) is image
    joint = layer.hidden_sequence((image, text), History, 19)
    assert torch.equal(joint, torch.cat([image, text], 1))
    with pytest.raises(ValueError, match="cannot be told apart"):
        layer.hidden_sequence((image, text), Both, 19)
    for given, tokens, words in (
        ((image, text), 20, "over 20 tokens .* of 15 and 4"),
        ((image, text[:, :3]), 18, "of 15 and 3"),
        ((None, None), 20, "of none"),
        ((image, text[..., :5]), 19, "6 and 5 channels"),
    ):
        with pytest.raises(ValueError, match=words):
            layer.hidden_sequence(given, Where, tokens)
