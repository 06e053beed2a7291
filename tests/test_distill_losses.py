"""Losses, noise and times against their formulas in fp64 and against diffusers' schedulers."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from dittfast.distill import losses as distillation
from dittfast.distill.config import TrainConfig
from dittfast.distill.muon import orthogonalise
from dittfast.distill.noise import (
    NoiseProcess,
    generator,
    process_of,
    sample_noise,
    sample_times,
)
from dittfast.distill.optim import Average, learning_rate, make_optimizer


@pytest.mark.parametrize("size", [1, 4, 16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_losses(size, dtype):
    a, b = (size * torch.randn(2, 63, 7)).to(dtype), (size * torch.randn(2, 63, 7)).to(dtype)
    x, y = a.double().numpy(), b.double().numpy()
    mse = ((x - y) ** 2).mean()
    assert float(distillation.denoising_loss(a, b)) == pytest.approx(mse, rel=1e-5)
    assert float(distillation.prediction_loss(a, b)) == pytest.approx(mse, rel=1e-5)
    layers = float(distillation.attention_loss([a, 2 * a], [b, 2 * b]))
    assert layers == pytest.approx(2.5 * mse, rel=1e-5)
    norms = np.linalg.norm(x, axis=-1) * np.linalg.norm(y, axis=-1)
    cosine = ((x * y).sum(-1) / norms).mean()
    assert float(distillation.feature_loss([a], [b])) == pytest.approx(
        1 - cosine, rel=1e-4, abs=1e-5
    )


def test_no_gradient_reaches_the_teacher():
    a, b = torch.randn(2, 1, 5, 3).requires_grad_().unbind(0)
    losses = [
        distillation.prediction_loss(a, b),
        distillation.attention_loss([a], [b]),
        distillation.feature_loss([a], [b]),
    ]
    for loss in losses:
        student, teacher = torch.autograd.grad(loss, (a, b), retain_graph=True, allow_unused=True)
        assert student is not None and teacher is None


def test_losses_refuse_what_does_not_fit():
    a = torch.zeros(1, 3)
    with pytest.raises(ValueError, match=r"\[1, 3\] and \[3, 1\]"):
        distillation.denoising_loss(a, a.T)
    for loss in (distillation.attention_loss, distillation.feature_loss):
        with pytest.raises(ValueError, match="same layers"):
            loss([a], [a, a])
        with pytest.raises(ValueError, match="same layers"):
            loss([], [])


def test_weighted_sum():
    losses = {"a": torch.tensor(2.0), "b": torch.tensor(3.0)}
    assert float(distillation.weighted_sum(losses, {"a": 0.5, "b": 2.0, "c": 9.0})) == 7.0


def test_flow_agrees_with_diffusers():
    """The scheduler's Euler step along the exact target leads from x(t) to the clean data."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(7)
    clean, noise = torch.randn(2, 3, 4, 5)
    sigma = scheduler.sigmas[0]
    t = sigma.expand(3)
    process = process_of(SimpleNamespace(scheduler=scheduler), float(scheduler.timesteps[0]), 1000)
    assert process == NoiseProcess("flow", 1000.0)
    torch.testing.assert_close(process.timestep(t), scheduler.timesteps[0].expand(3))
    x = process.noisy(clean, noise, t)
    for step in scheduler.timesteps:
        x = scheduler.step(process.target(clean, noise, t), step, x, return_dict=False)[0]
    torch.testing.assert_close(x, clean, atol=1e-5, rtol=0)
    assert process_of(SimpleNamespace(scheduler=scheduler), 1.0, 1000) == NoiseProcess("flow", 1.0)


def pixel_pipeline(noise_scale):
    import diffusers

    if not hasattr(diffusers, "PRXPixelPipeline"):
        pytest.skip("the installed diffusers has no PRXPixelPipeline")
    from diffusers import FlowMatchEulerDiscreteScheduler, PRXPixelPipeline, PRXTransformer2DModel

    model = PRXTransformer2DModel(
        in_channels=3, patch_size=1, context_in_dim=8, hidden_size=16, num_heads=1, depth=1,
        axes_dim=[8, 8],
    )  # fmt: skip
    return PRXPixelPipeline(
        model, FlowMatchEulerDiscreteScheduler(shift=3.0), None, None, 8, 4, noise_scale
    )


def test_pixel_transformers_agree_with_their_pipeline():
    """The pipeline's own loop, with a model that always says the clean picture."""
    pipe = pixel_pipeline(noise_scale=2.0)
    process = process_of(pipe, 1.0, 1000)
    clean, noise = torch.randn(2, 1, 3, 8, 8)
    said, seen = [], []

    def answer(hidden_states, timestep, **_):
        seen.append((hidden_states.clone(), timestep.clone()))
        said.append(process.velocity(clean, hidden_states, timestep))
        return (clean,)

    pipe.transformer.forward = answer
    steps = []
    stock = pipe.scheduler.step
    pipe.scheduler.step = lambda v, *args, **kw: steps.append(v) or stock(v, *args, **kw)
    pipe(
        prompt_embeds=torch.zeros(1, 4, 8), prompt_attention_mask=torch.ones(1, 4).bool(),
        latents=2.0 * noise, num_inference_steps=40, guidance_scale=1.0, output_type="latent",
        use_resolution_binning=False, height=8, width=8,
    )  # fmt: skip
    assert len(seen) == 40 and float(seen[-1][1]) < 0.1
    for (_, t), mine, theirs in zip(seen, said, steps):
        torch.testing.assert_close(mine, theirs)
        torch.testing.assert_close(process.timestep(t), t)
    x, t = seen[0]
    torch.testing.assert_close(process.noisy(clean, noise, t), x)
    torch.testing.assert_close(process.target(clean, noise, t), steps[0])


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_discrete_processes_agree_with_diffusers(kind):
    from diffusers import DDPMScheduler

    scheduler = DDPMScheduler(prediction_type=kind)
    process = process_of(SimpleNamespace(scheduler=scheduler), 999.0, 1000)
    clean, noise = torch.randn(2, 4, 3, 5)
    t = torch.tensor([0.0, 0.2505, 0.5, 1.0])
    index = torch.tensor([0, 250, 500, 999])
    assert torch.equal(process.timestep(t), index)
    expected = scheduler.add_noise(clean, noise, index)
    torch.testing.assert_close(process.noisy(clean, noise, t), expected)
    target = noise if kind == "epsilon" else scheduler.get_velocity(clean, noise, index)
    torch.testing.assert_close(process.target(clean, noise, t), target)


def test_other_predictions_are_refused():
    from diffusers import DDPMScheduler

    with pytest.raises(ValueError, match="'sample'"):
        process_of(SimpleNamespace(scheduler=DDPMScheduler(prediction_type="sample")), 999.0, 1000)
    with pytest.raises(ValueError, match="kind"):
        NoiseProcess("flows")
    with pytest.raises(ValueError, match="alphas_cumprod"):
        NoiseProcess("epsilon")


def test_randomness_follows_from_its_key_alone():
    first = sample_noise((3, 5), seed=1, step=2, slot=3)
    torch.manual_seed(99)
    assert torch.equal(sample_noise((3, 5), seed=1, step=2, slot=3), first)
    keys = [(1, 2, 4), (1, 3, 3), (2, 2, 3)]
    assert all(not torch.equal(sample_noise((3, 5), *key), first) for key in keys)
    wide = sample_noise((100_000,), 0, 0, 0)
    assert abs(float(wide.mean())) < 0.02 and abs(float(wide.std()) - 1) < 0.02


@pytest.mark.parametrize("distribution", ["uniform", "logit_normal"])
def test_times(distribution):
    t = sample_times(20_000, generator("t"), distribution)
    assert float(t.min()) >= 0 and float(t.max()) <= 1
    assert float(t.median()) == pytest.approx(0.5, abs=0.02)
    quarter = 0.25 if distribution == "uniform" else 1 / (1 + np.exp(0.6745))
    assert float(t.quantile(0.25)) == pytest.approx(quarter, abs=0.02)
    shifted = sample_times(20_000, generator("t"), distribution, shift=3.0)
    torch.testing.assert_close(shifted, 3 * t / (1 + 2 * t))
    part = sample_times(1000, generator("t"), distribution, time_range=(0.875, 1.0))
    assert float(part.min()) >= 0.875 and float(part.max()) <= 1


def test_learning_rates():
    config = TrainConfig("x", steps=110, lr=2.0, warmup_steps=10)
    assert [learning_rate(i, config) for i in (0, 4, 9, 10, 60, 109)] == [0.2, 1.0, 2, 2, 2, 2]
    linear = TrainConfig("x", steps=110, lr=2.0, warmup_steps=10, lr_schedule="linear")
    assert learning_rate(60, linear) == pytest.approx(1.0)
    cosine = TrainConfig("x", steps=110, lr=2.0, warmup_steps=10, lr_schedule="cosine")
    assert learning_rate(35, cosine) == pytest.approx(1 + np.cos(np.pi / 4))
    assert learning_rate(500, cosine) == pytest.approx(0)


def test_average():
    p = torch.nn.Parameter(torch.ones(3))
    average = Average({"p": p}, 0.5)
    expected = 1.0
    for n in range(1, 6):
        with torch.no_grad():
            p.add_(1)
        average.update({"p": p})
        decay = min(0.5, (1 + n) / (10 + n))
        expected = decay * expected + (1 - decay) * (1 + n)
    torch.testing.assert_close(average.values["p"], torch.full((3,), expected))


def test_prodigy_needs_its_package():
    try:
        import prodigyopt  # noqa: F401
    except ImportError:
        with pytest.raises(ValueError, match="pip install prodigyopt"):
            make_optimizer(TrainConfig("x", steps=1, optimizer="prodigy"), {})
    else:
        p = torch.nn.Parameter(torch.zeros(3))
        made = make_optimizer(TrainConfig("x", steps=1, optimizer="prodigy", lr=1.0), {"p": p})
        assert type(made).__name__ == "Prodigy"


def test_orthogonalise_brings_singular_values_near_one():
    torch.manual_seed(0)
    for shape in ((2, 24, 64), (2, 64, 24)):
        values = torch.linalg.svdvals(orthogonalise(torch.randn(shape)))
        assert values.min() > 0.5 and values.max() < 1.3


def test_muon_moves_matrices_of_blocks_and_adamw_the_rest():
    """AdamW's part is torch's own; a matrix moves along U Vᵀ of its momentum's SVD."""
    torch.manual_seed(0)
    shapes = {
        "transformer_blocks.0.attn.to_q.weight": (6, 6),
        "transformer_blocks.0.ff.weight": (8, 6),
        "transformer_blocks.0.ff.bias": (8,),
        "x_embedder.weight": (6, 4),
    }
    named = {name: torch.nn.Parameter(torch.randn(shape)) for name, shape in shapes.items()}
    config = TrainConfig("x", steps=9, optimizer="muon", lr=0.03, betas=(0.8, 0.9))
    made = make_optimizer(config, named)
    twins = {n: p.detach().clone().requires_grad_() for n, p in named.items()}
    others = [twins[name] for name in list(shapes)[2:]]
    adamw = torch.optim.AdamW(others, lr=0.03, betas=(0.8, 0.9), weight_decay=1e-2)
    momentum = {name: torch.zeros(shapes[name]) for name in list(shapes)[:2]}
    for _ in range(3):
        before = {name: p.detach().clone() for name, p in named.items()}
        for name, p in named.items():
            p.grad = torch.randn(p.shape)
            twins[name].grad = p.grad.clone()
        made.step()
        adamw.step()
        for name in momentum:
            g = named[name].grad
            momentum[name] = 0.95 * momentum[name] + 0.05 * g
            u, _, vt = torch.linalg.svd(0.05 * g + 0.95 * momentum[name], full_matrices=False)
            moved = before[name] * (1 - 0.03 * 1e-2) - named[name].detach()
            # In the basis of its singular vectors: diagonal, near 1.
            found = u.T @ moved @ vt.T / (0.03 * 0.2 * max(shapes[name]) ** 0.5)
            torch.testing.assert_close(found, torch.diag(found.diag()), atol=1e-3, rtol=0)
            assert found.diag().min() > 0.3 and found.diag().max() < 1.3
    for name in list(shapes)[2:]:
        torch.testing.assert_close(named[name], twins[name])


def test_muon_without_matrices_is_adamw():
    p = torch.nn.Parameter(torch.ones(3))
    p.grad = torch.tensor([1.0, -2.0, 0.5])
    make_optimizer(TrainConfig("x", steps=1, optimizer="muon", lr=0.1, weight_decay=0.0),
                   {"scale": p}).step()  # fmt: skip
    torch.testing.assert_close(p.detach(), torch.tensor([0.9, 1.1, 0.9]))
