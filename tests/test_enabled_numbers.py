"""What an enabled model takes from the model to the token: its scale, its grid, its length."""

import pytest
import tiny
import torch
from patterns import Band, Full

import dittfast
from dittfast.methods import Local


def run(model, inputs):
    with torch.no_grad():
        return model(**inputs)[0]


@pytest.mark.parametrize("scale", [0.7, None])
def test_the_scale_a_model_asks_for_is_used(scale, monkeypatch):
    """A plan that keeps everything gives the stock output at any scale."""
    functional = torch.nn.functional
    stock_call = functional.scaled_dot_product_attention
    scaled = lambda *args, **kwargs: stock_call(*args, **kwargs | {"scale": scale})  # noqa: E731
    monkeypatch.setattr(functional, "scaled_dot_product_attention", scaled)
    model, inputs = tiny.flux_transformer(1, 1), tiny.flux_inputs()
    stock = run(model, inputs)
    with dittfast.enable(model, Full(), backend="cpu"):
        torch.testing.assert_close(run(model, inputs), stock, rtol=1e-5, atol=1e-5)
    monkeypatch.undo()
    assert torch.allclose(run(model, inputs), stock) == (scale is None)


def test_ids_that_change_in_place_are_read_again():
    """One tensor, written anew: 9 x 7 tokens, then 7 x 9."""
    model, method = tiny.flux_transformer(1, 1), Local(window=2)
    first, second = tiny.flux_inputs(9, 7), tiny.flux_inputs(7, 9)
    dittfast.enable(model, method)
    expected = run(model, second)
    ids = first["img_ids"].clone()
    run(model, first | {"img_ids": ids})
    ids.copy_(second["img_ids"])
    assert torch.equal(run(model, second | {"img_ids": ids}), expected)


@pytest.mark.parametrize("beyond", [0, 1])
def test_min_tokens_to_the_token(beyond):
    """A sequence of min_tokens tokens is sparse; dense are those below."""
    model, inputs = tiny.flux_transformer(1, 1), tiny.flux_inputs(9, 7, text=5)
    stock = run(model, inputs)
    with dittfast.enable(model, Band(width=0), min_tokens=9 * 7 + 5 + beyond):
        assert torch.equal(run(model, inputs), stock) == bool(beyond)
