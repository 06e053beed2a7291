"""The guider in diffusers' own modular Wan pipeline, against dittfast.guide in the plain one."""

import pytest
import tiny
import torch

import dittfast
from dittfast.pipelines.guidance.guider import HeadGuider

HEADS = [(0, 1), (-1, 0)]
OPTIONS = dict(strength=0.8, rows="joint")


def modular(pipe, guider):
    """A modular pipeline of the same components."""
    from diffusers.modular_pipelines import WanBlocks

    made = WanBlocks().init_pipeline()
    names = ("transformer", "vae", "scheduler", "text_encoder", "tokenizer")
    made.update_components(**{name: getattr(pipe, name) for name in names}, guider=guider)
    made.set_progress_bar_config(disable=True)
    return made


def run(pipe, steps=3):
    return pipe(
        prompt="a red cat", negative_prompt="a dog", height=48, width=80, num_frames=9,
        num_inference_steps=steps, max_sequence_length=12, output="latents",
        generator=torch.Generator().manual_seed(0),
    )  # fmt: skip


def plain(pipe, steps=3, cfg=3.0):
    return tiny.run(pipe, num_inference_steps=steps, guidance_scale=cfg)


@pytest.fixture(scope="module")
def pipe():
    return tiny.wan_pipeline()


@pytest.fixture(autouse=True)
def prompts_need_no_cleaning(monkeypatch):
    """The modular encoder cleans prompts with a package that diffusers does not require."""
    from diffusers.modular_pipelines.wan import encoders

    monkeypatch.setattr(encoders, "prompt_clean", lambda text: text)


@pytest.mark.parametrize("cfg", [3.0, 1.0], ids=["cfg", "no-cfg"])
@pytest.mark.parametrize("steps", [(0, None), (1, 2)], ids=["all-steps", "step-range"])
def test_equals_the_plain_pipeline(pipe, cfg, steps):
    start, stop = steps
    with dittfast.guide(pipe, heads=HEADS, guidance_scale=2.0, start_step=start, stop_step=stop,
                        **OPTIONS):  # fmt: skip
        expected = plain(pipe, cfg=cfg)
    unguided = plain(pipe, cfg=cfg)
    assert float((expected - unguided).abs().max()) > 1e-3
    guider = HeadGuider(
        heads=HEADS,
        guidance_scale=cfg,
        head_guidance_scale=2.0,
        start_step=start,
        stop_step=stop,
        **OPTIONS,
    )
    pipe2 = modular(pipe, guider)
    torch.testing.assert_close(run(pipe2), expected, rtol=0, atol=1e-4)
    torch.testing.assert_close(run(pipe2), expected, rtol=0, atol=1e-4)
    assert torch.equal(plain(pipe, cfg=cfg), unguided)


def test_no_weak_heads_is_classifier_free_guidance_of_diffusers(pipe):
    from diffusers.guiders import ClassifierFreeGuidance

    expected = run(modular(pipe, ClassifierFreeGuidance(3.0)))
    for guider in (
        HeadGuider(heads=HEADS, guidance_scale=3.0, head_guidance_scale=0.0),
        HeadGuider(heads=HEADS, guidance_scale=3.0, head_guidance_scale=2.0, start_step=9),
    ):
        assert torch.equal(run(modular(pipe, guider)), expected)
    off = HeadGuider(heads=HEADS, guidance_scale=3.0, head_guidance_scale=2.0, enabled=False)
    c = torch.randn(2, 3)
    assert off.num_conditions == 1 and torch.equal(off.forward(c).pred, c)


def test_composes_with_a_sparse_method(pipe):
    options = dict(method="local", window=2, min_tokens=0, dense_first_steps=1)
    guidance = dict(heads=HEADS, guidance_scale=2.0, **OPTIONS)
    with dittfast.enable(pipe, **options), dittfast.guide(pipe, **guidance):
        expected = plain(pipe)
    pipe2 = modular(
        pipe, HeadGuider(heads=HEADS, guidance_scale=3.0, head_guidance_scale=2.0, **OPTIONS)
    )
    with dittfast.enable(pipe2, **options):
        torch.testing.assert_close(run(pipe2), expected, rtol=0, atol=1e-4)
    assert float((run(pipe2) - expected).abs().max()) > 1e-3


def test_an_error_in_the_weak_pass_leaves_no_trace_in_the_next_run(pipe):
    guider = HeadGuider(heads=HEADS, guidance_scale=3.0, head_guidance_scale=2.0, **OPTIONS)
    pipe2 = modular(pipe, guider)
    expected = run(pipe2)
    passes = []

    def fail(*_):
        passes.append(1)
        if len(passes) == 3:
            raise KeyboardInterrupt

    handle = pipe.transformer.register_forward_pre_hook(fail)
    with pytest.raises(KeyboardInterrupt):
        run(pipe2)
    handle.remove()
    assert torch.equal(run(pipe2), expected)
    with pytest.raises(ValueError, match="not enabled"):
        dittfast.disable(pipe)


def test_the_configuration_survives_a_file(tmp_path):
    guider = HeadGuider(
        heads=HEADS,
        guidance_scale=3.0,
        head_guidance_scale=2.0,
        strength=[0.5, 1.0],
        rows="diagonal",
        stop_step=7,
    )
    guider.save_pretrained(tmp_path)
    again = HeadGuider.from_pretrained(tmp_path)
    assert again.head_guidance == guider.head_guidance
    changed = guider.new(head_guidance_scale=5.0)
    assert changed.head_guidance.guidance_scale == 5.0 and changed.guidance_scale == 3.0
    assert "num_conditions" in repr(guider) and guider.num_conditions == 3


def test_rescaling_and_the_original_formulation():
    c, u, p = torch.randn(3, 2, 4, 5)
    guider = HeadGuider(
        heads=HEADS, guidance_scale=3.0, head_guidance_scale=2.0, use_original_formulation=True
    )
    torch.testing.assert_close(guider.forward(c, u, p).pred, c + 3 * (c - u) + 2 * (c - p))
    rescaled = (
        HeadGuider(heads=HEADS, guidance_scale=3.0, head_guidance_scale=2.0, guidance_rescale=1.0)
        .forward(c, u, p)
        .pred
    )
    torch.testing.assert_close(rescaled.std((1, 2)), c.std((1, 2)))


@pytest.mark.parametrize(
    "options, message",
    [(dict(heads=[]), "empty"), (dict(heads=[(0, 0)], strength=2.0), r"0\.\.1"),
     (dict(heads=[(0, 0)], rows="row"), "image")],
)  # fmt: skip
def test_bad_input(options, message):
    with pytest.raises(ValueError, match=message):
        HeadGuider(**options)


def test_a_head_that_does_not_exist_is_named_and_the_model_stays_plain(pipe):
    before = plain(pipe)
    with pytest.raises(ValueError, match=r"layer 9 does not exist"):
        run(modular(pipe, HeadGuider(heads=[(9, 0)])))
    assert torch.equal(plain(pipe), before)
