"""What people combine with attention: every combination gives what it gives without dittfast.

The full plan makes the comparison exact: stock model plus feature equals enabled model plus
feature, whichever was switched on first.
"""

import copy

import pytest
import tiny
import torch
from caches import CACHES, cache_config, run_of_stock
from patterns import Band

import dittfast
from dittfast.pipelines.measure import parity
from dittfast.pipelines.measure.parity import TINY, Full, distance

pytestmark = pytest.mark.filterwarnings("ignore")
NEAR = 2e-5


def built(name):
    return TINY[name].build()


def sparse(model, method=None):
    return dittfast.enable(model, method or Band(), backend="cpu", min_tokens=0)


def assert_composes(name, feature, undo=None, near=NEAR):
    """``feature(model)`` before and after enable, against the stock model with it."""
    model, inputs = built(name)
    feature(model)
    expected = parity.output(model, inputs)
    with sparse(model, Full()):
        assert distance(parity.output(model, inputs), expected) < near, "enabled after"
    assert torch.equal(parity.output(model, inputs), expected)
    model, inputs = built(name)
    with sparse(model, Full()):
        feature(model)
        assert distance(parity.output(model, inputs), expected) < near, "enabled before"
        changed = undo is not None and undo(model)
        if changed:
            plain = parity.output(*built(name))
            assert distance(parity.output(model, inputs), plain) < near, "undone"
    # The method itself does something beside the feature.
    model, inputs = built(name)
    with sparse(model):
        feature(model)
        assert distance(parity.output(model, inputs), expected) > 100 * near


def add_lora(model):
    from peft import LoraConfig

    torch.manual_seed(1)
    config = LoraConfig(r=4, target_modules=["to_q", "to_k", "to_v"], init_lora_weights="gaussian")
    model.add_adapter(config)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator)


@pytest.mark.parametrize("name", ["flux", "wan"])
def test_lora_before_after_and_fused(name):
    def unfuse(model):
        model.unfuse_lora()
        model.disable_adapters()
        return True

    assert_composes(name, add_lora)
    assert_composes(name, lambda model: (add_lora(model), model.fuse_lora()), unfuse)


@pytest.mark.parametrize("name", ["flux", "sd3", "cogvideox"])
def test_fused_projections(name):
    assert_composes(name, lambda model: model.fuse_qkv_projections())


@pytest.mark.parametrize("name", ["flux", "wan", "sd3"])
def test_gradient_checkpointing(name):
    model, inputs = built(name)

    def gradients():
        model.zero_grad()
        model(**inputs)[0].square().mean().backward()
        return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    with sparse(model):
        plain = gradients()
        model.enable_gradient_checkpointing()
        model.train()
        checkpointed = gradients()
    assert plain.keys() == checkpointed.keys()
    for key in plain:
        torch.testing.assert_close(checkpointed[key], plain[key], rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("kind", ["leaf_level", "block_level"])
def test_group_offloading(kind):
    def offload(model):
        cpu = torch.device("cpu")
        model.enable_group_offload(cpu, cpu, offload_type=kind, num_blocks_per_group=1)

    assert_composes("wan", offload)


def test_model_offloading():
    from accelerate import cpu_offload

    assert_composes("flux", lambda model: cpu_offload(model, execution_device="cpu"))


def test_layerwise_casting():
    cast = dict(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    assert_composes("flux", lambda model: model.enable_layerwise_casting(**cast))


@pytest.mark.parametrize("name", ["flux", "wan"])
@pytest.mark.parametrize("kind", ["Int8WeightOnlyConfig", "Int8DynamicActivationInt8WeightConfig"])
def test_quantised_linears(kind, name):
    quantization = pytest.importorskip("torchao.quantization")

    def quantise(model):
        quantization.quantize_(model, getattr(quantization, kind)())
        assert any(is_of_torchao(m.weight) for m in model.modules() if is_linear(m))

    assert_composes(name, quantise)
    model, inputs = built(name)
    plain = parity.output(model, inputs)
    quantise(model)
    stock = parity.output(model, inputs)
    assert distance(stock, plain) > 1e-3
    found = {}
    for backend in ("cpu", "reference"):
        with dittfast.enable(model, Band(), backend=backend, min_tokens=0):
            found[backend] = parity.output(model, inputs)
    # Rounding that tips an activation over to the next of 256 steps moves the output as
    # quantising itself does.
    near = NEAR if kind == "Int8WeightOnlyConfig" else distance(stock, plain)
    assert distance(found["cpu"], found["reference"]) < near
    assert torch.equal(parity.output(model, inputs), stock)


def test_quantised_while_loading(tmp_path):
    """diffusers' own way to torchao: from_pretrained with a quantization_config."""
    quantization = pytest.importorskip("torchao.quantization")
    import diffusers

    model, inputs = built("flux")
    model.save_pretrained(tmp_path)
    config = diffusers.TorchAoConfig(quantization.Int8WeightOnlyConfig())
    loaded = type(model).from_pretrained(
        tmp_path, quantization_config=config, torch_dtype=torch.float32
    )
    assert is_of_torchao(loaded.transformer_blocks[0].attn.to_q.weight)
    expected = parity.output(loaded, inputs)
    with sparse(loaded, Full()):
        assert distance(parity.output(loaded, inputs), expected) < NEAR
    with sparse(loaded):
        assert distance(parity.output(loaded, inputs), expected) > 100 * NEAR
    assert torch.equal(parity.output(loaded, inputs), expected)


def is_linear(module):
    return isinstance(module, torch.nn.Linear)


def is_of_torchao(weight):
    """Of any class that its versions have for eight bits."""
    return type(weight).__module__.startswith("torchao.")


def cache_of(kind, pipe):
    return cache_config(kind, lambda: pipe._current_timestep, steps=5)


@pytest.mark.parametrize("first", ["dittfast", "cache"])
@pytest.mark.parametrize("kind", CACHES)
def test_caches(kind, first):
    pipe = tiny.flux_pipeline()
    run = dict(num_inference_steps=5)
    plain = tiny.run(pipe, **run)
    pipe.transformer.enable_cache(cache_of(kind, pipe))
    expected = run_of_stock(pipe, **run)
    assert not torch.equal(expected, plain)
    pipe.transformer.disable_cache()
    if first == "dittfast":
        sparse(pipe, Full())
    pipe.transformer.enable_cache(cache_of(kind, pipe))
    if first == "cache":
        sparse(pipe, Full())
    assert distance(tiny.run(pipe, **run), expected) < 1e-4
    pipe.transformer.disable_cache()
    assert distance(tiny.run(pipe, **run), plain) < 1e-4
    dittfast.disable(pipe)
    assert torch.equal(tiny.run(pipe, **run), plain)


@pytest.mark.parametrize(
    "kind", ["FirstBlockCache", "PyramidAttentionBroadcast", "MagCache", "TaylorSeerCache"]
)
def test_caches_with_two_calls_a_step_and_dense_steps(kind):
    """What a cache skips is no step: both calls of Wan's guidance agree in every step."""
    pipe = tiny.wan_pipeline()
    run = dict(num_inference_steps=5)
    pipe.transformer.enable_cache(cache_of(kind, pipe))
    expected = tiny.run(pipe, **run)
    steps = {}
    with dittfast.enable(
        pipe, Full(), backend="cpu", min_tokens=0, dense_first_steps=2, dense_last_steps=1
    ):
        layer = next(iter(pipe.transformer._dittfast.layers.values()))

        def watch(model, args, kwargs):
            flags = steps.setdefault(float(kwargs["timestep"].max()), [])
            flags.append(layer.core is not None)

        hook = pipe.transformer.register_forward_pre_hook(watch, with_kwargs=True)
        assert distance(tiny.run(pipe, **run), expected) < 1e-4
        hook.remove()
    sparse_steps = [steps[time] for time in sorted(steps, reverse=True)]
    assert sparse_steps == [[flag] * 2 for flag in (False, False, True, True, False)]


def test_ip_adapter():
    """The image prompt's attention has other keys: it stays, beside the method's."""
    from diffusers.models.transformers.transformer_flux import FluxIPAdapterAttnProcessor

    model, inputs = built("flux")
    torch.manual_seed(0)
    processor = FluxIPAdapterAttnProcessor(32, 32, num_tokens=(4,), scale=[1.0])
    model.transformer_blocks[0].attn.set_processor(processor)
    tokens = torch.randn(2, 1, 4, 32)
    inputs["joint_attention_kwargs"] = {"ip_hidden_states": [tokens]}
    with_image = parity.output(model, copy.copy(inputs))
    with sparse(model, Full()):
        assert distance(parity.output(model, copy.copy(inputs)), with_image) < NEAR
    without = {**inputs, "joint_attention_kwargs": {"ip_hidden_states": [0 * tokens]}}
    assert distance(parity.output(model, without), with_image) > 1e-3


def test_ip_adapter_of_sd3():
    from diffusers.models.attention_processor import SD3IPAdapterJointAttnProcessor2_0

    model, inputs = built("sd3")
    plain = parity.output(model, inputs)
    torch.manual_seed(0)
    processor = SD3IPAdapterJointAttnProcessor2_0(
        hidden_size=32, ip_hidden_states_dim=24, head_dim=16, timesteps_emb_dim=20
    )
    model.transformer_blocks[0].attn.set_processor(processor)
    image = {"ip_hidden_states": torch.randn(2, 4, 24), "temb": torch.randn(2, 20)}
    inputs["joint_attention_kwargs"] = image
    with_image = parity.output(model, copy.copy(inputs))
    assert distance(with_image, plain) > 1e-3
    with sparse(model, Full()):
        assert distance(parity.output(model, copy.copy(inputs)), with_image) < NEAR
    with sparse(model):
        assert distance(parity.output(model, copy.copy(inputs)), with_image) > 100 * NEAR


@pytest.mark.parametrize(
    "name, argument",
    [
        ("flux", "controlnet_block_samples"),
        ("sd3", "block_controlnet_hidden_states"),
        ("qwen-image", "controlnet_block_samples"),
    ],
)
def test_controlnet_residuals(name, argument):
    model, inputs = built(name)
    inputs[argument] = [torch.randn(2, 99, 32)]
    expected = parity.output(model, inputs)
    with sparse(model, Full()):
        assert distance(parity.output(model, inputs), expected) < NEAR


def test_controlnet_pipeline(caplog):
    """A real FluxControlNetPipeline; the ControlNet itself stays dense, and says so."""
    from diffusers import FluxControlNetModel, FluxControlNetPipeline

    base = tiny.flux_pipeline()
    torch.manual_seed(1)
    controlnet = FluxControlNetModel.from_transformer(
        base.transformer, num_layers=1, num_single_layers=1, num_attention_heads=2,
        attention_head_dim=16, load_weights_from_transformer=False,
    ).eval()  # fmt: skip
    for parameter in controlnet.parameters():
        if not parameter.any():
            parameter.data.normal_(std=0.3)
    pipe = FluxControlNetPipeline(**base.components, controlnet=controlnet)
    pipe.set_progress_bar_config(disable=True)
    image = dict(control_image=torch.rand(1, 3, 64, 96), controlnet_conditioning_scale=1.0)
    expected = tiny.run(pipe, **image)
    assert distance(tiny.run(pipe, **{**image, "controlnet_conditioning_scale": 0.0}), expected) > 0
    with caplog.at_level("INFO", "dittfast"), sparse(pipe, Full()) as enabled:
        assert distance(tiny.run(pipe, **image), expected) < 1e-4
        notes = enabled.describe().notes
    said = "controlnet (FluxControlNetModel) is dense"
    assert any(said in note for note in notes) and said in caplog.text
    assert torch.equal(tiny.run(pipe, **image), expected)


@pytest.mark.slow
def test_no_recompile_between_steps():
    """Repeated blocks of 12 layers, five steps of which two are dense: two graphs."""
    from torch._dynamo.testing import CompileCounterWithBackend

    torch._dynamo.reset()
    model = tiny.wan_transformer(12)
    inputs = tiny.wan_inputs(frames=2, height=6, width=8, batch=1)
    dittfast.enable(model, Band(), backend="cpu", min_tokens=0, dense_first_steps=2)
    counter = CompileCounterWithBackend("eager")
    model.compile_repeated_blocks(backend=counter, fullgraph=True)
    for time in (900, 700, 500, 300, 100):
        with torch.no_grad():
            model(**{**inputs, "timestep": torch.tensor([time])})
    assert counter.frame_count == 2
    torch._dynamo.reset()
