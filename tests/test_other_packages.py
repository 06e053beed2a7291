"""With what people bring along: quantised linears, cache-dit, diffusers' modular pipelines.

As in test_composition.py the full plan makes the comparison exact. What is not installed is
skipped.
"""

import pytest
import tiny
import torch
from patterns import Band
from test_composition import NEAR, assert_composes, built, sparse

import dittfast
from dittfast.pipelines.measure import parity
from dittfast.pipelines.measure.parity import Full, distance

pytestmark = pytest.mark.filterwarnings("ignore")


def exchange(model, made) -> int:
    """Put ``made(linear)`` where a linear layer of the blocks stands; how many."""
    places = [
        (parent, name, child)
        for path, parent in model.named_modules()
        if "blocks" in path
        for name, child in parent.named_children()
        if type(child) is torch.nn.Linear
    ]
    for parent, name, child in places:
        setattr(parent, name, made(child))
    return len(places)


def gguf_linears(model) -> None:
    """The layers that diffusers makes of a GGUF file, with its Q8_0 blocks."""
    gguf = pytest.importorskip("gguf")
    from diffusers.quantizers.gguf.utils import GGUFLinear, GGUFParameter

    kind = gguf.GGMLQuantizationType.Q8_0

    def made(linear):
        if linear.in_features % 32:
            return linear
        new = GGUFLinear(
            linear.in_features, linear.out_features, linear.bias is not None, torch.float32
        )
        blocks = torch.from_numpy(gguf.quants.quantize(linear.weight.detach().numpy(), kind))
        new.weight = GGUFParameter(blocks, quant_type=kind)
        new.bias = linear.bias
        return new

    assert exchange(model, made)


def quanto_linears(model) -> None:
    quanto = pytest.importorskip("optimum.quanto")
    quanto.quantize(model, weights=quanto.qint8)
    quanto.freeze(model)


def bitsandbytes_linears(model) -> None:
    bnb = pytest.importorskip("bitsandbytes")

    def made(linear):
        new = bnb.nn.Linear4bit(
            linear.in_features,
            linear.out_features,
            linear.bias is not None,
            compute_dtype=torch.float32,
            quant_type="nf4",
        )
        new.load_state_dict(linear.state_dict())
        return new.to("cpu")

    assert exchange(model, made)


@pytest.mark.parametrize("name", ["flux", "wan"])
@pytest.mark.parametrize("quantise", [gguf_linears, quanto_linears, bitsandbytes_linears])
def test_quantised_linears(quantise, name):
    model, inputs = built(name)
    plain = parity.output(model, inputs)
    quantise(model)
    stock = parity.output(model, inputs)
    assert distance(stock, plain) > 1e-4
    assert_composes(name, quantise)
    found = {}
    for backend in ("cpu", "reference"):
        with dittfast.enable(model, Band(), backend=backend, min_tokens=0):
            found[backend] = parity.output(model, inputs)
    assert distance(found["cpu"], found["reference"]) < NEAR
    assert torch.equal(parity.output(model, inputs), stock)


@pytest.mark.parametrize("first", ["dittfast", "cache"])
def test_cache_dit(first):
    """In either order; taken out again, the pipeline is to the bit what it was."""
    cache_dit = pytest.importorskip("cache_dit")
    run = dict(num_inference_steps=6)

    def cached(pipe):
        config = cache_dit.DBCacheConfig(
            Fn_compute_blocks=1,
            Bn_compute_blocks=0,
            max_warmup_steps=1,
            residual_diff_threshold=10.0,
        )
        cache_dit.enable_cache(pipe, cache_config=config)

    pipe = tiny.flux_pipeline()
    plain = tiny.run(pipe, **run)
    cached(pipe)
    expected = tiny.run(pipe, **run)
    assert distance(expected, plain) > 1e-4
    cache_dit.disable_cache(pipe)
    assert torch.equal(tiny.run(pipe, **run), plain)

    pipe = tiny.flux_pipeline()
    if first == "dittfast":
        sparse(pipe, Full())
    cached(pipe)
    if first == "cache":
        sparse(pipe, Full())
    assert distance(tiny.run(pipe, **run), expected) < 1e-4
    if first == "dittfast":
        cache_dit.disable_cache(pipe)
        assert distance(tiny.run(pipe, **run), plain) < 1e-4
        dittfast.disable(pipe)
    else:
        dittfast.disable(pipe)
        assert distance(tiny.run(pipe, **run), expected) < 1e-4
        cache_dit.disable_cache(pipe)
    assert torch.equal(tiny.run(pipe, **run), plain)


def modular_flux(pipe):
    """diffusers' modular FLUX of the same components."""
    from diffusers.modular_pipelines import FluxAutoBlocks

    made = FluxAutoBlocks().init_pipeline()
    names = (
        "transformer", "vae", "scheduler", "text_encoder", "text_encoder_2", "tokenizer",
        "tokenizer_2",
    )  # fmt: skip
    made.update_components(**{name: getattr(pipe, name) for name in names})
    made.set_progress_bar_config(disable=True)
    return made


def run_modular(pipe):
    """Final latents, packed as the plain pipeline leaves them."""
    from diffusers import FluxPipeline

    latents = pipe(
        prompt="a red cat", height=64, width=96, guidance_scale=3.5, num_inference_steps=3,
        max_sequence_length=12, output="latents", generator=torch.Generator().manual_seed(0),
    )  # fmt: skip
    return latents if latents.ndim == 3 else FluxPipeline._pack_latents(latents, *latents.shape)


def test_a_modular_flux_pipeline():
    """Dense and sparse as the plain pipeline, and as it was afterwards."""
    pipe = tiny.flux_pipeline()
    made = modular_flux(pipe)
    stock = run_modular(made)
    assert distance(stock, tiny.run(pipe)) < 1e-4
    with sparse(pipe):
        expected = tiny.run(pipe)
    with sparse(made) as enabled:
        found = run_modular(made)
        assert 0 < enabled.describe().density < 1
    assert distance(found, expected) < 1e-4 < 1e-3 < distance(found, stock)
    assert torch.equal(run_modular(made), stock)


@pytest.mark.slow
@pytest.mark.parametrize("steps", [1, 2])
def test_dense_steps_of_a_modular_pipeline(steps):
    """Steps are counted as in the plain pipeline."""
    pipe = tiny.flux_pipeline()
    options = dict(backend="cpu", min_tokens=0, dense_first_steps=steps)
    with dittfast.enable(pipe, Band(), **options):
        expected = tiny.run(pipe)
    made = modular_flux(pipe)
    with dittfast.enable(made, Band(), **options):
        assert distance(run_modular(made), expected) < 1e-4
