"""Steps are counted by scheduler step: dense first and last steps hit the steps they should."""

import logging

import pytest
import tiny
import torch
from patterns import Band

import dittfast


def watch(pipe, seen):
    """Record, before each forward pass, its timestep, batch and whether attention is sparse."""
    hooks = []
    for model in (pipe.transformer, getattr(pipe, "transformer_2", None)):
        if model is None:
            continue
        state = next(iter(model._dittfast.layers.values()))

        def record(model, args, kwargs, state=state):
            batch = kwargs["hidden_states"].shape[0]
            seen.append((float(kwargs["timestep"].max()), batch, state.core is not None, model))

        hooks.append(model.register_forward_pre_hook(record, with_kwargs=True))
    return hooks


def passes(pipe, run=tiny.run, schedule=None, **call):
    """``[(timestep, batch, sparse, model)]`` of the forward passes of one run."""
    seen = []
    schedule = schedule or dict(dense_first_steps=2, dense_last_steps=1)
    with dittfast.enable(pipe, Band(), backend="reference", min_tokens=0, **schedule):
        hooks = watch(pipe, seen)
        try:
            run(pipe, **call)
        finally:
            for hook in hooks:
                hook.remove()
    return seen


def by_step(seen):
    """One flag a step, first step first; all passes of a step must agree."""
    steps = {}
    for timestep, _, sparse, _ in seen:
        steps.setdefault(timestep, set()).add(sparse)
    assert all(len(flags) == 1 for flags in steps.values()), steps
    return [flags.pop() for _, flags in sorted(steps.items(), reverse=True)]


FIVE = [False, False, True, True, False]


def test_no_guidance_flux():
    seen = passes(tiny.flux_pipeline(), num_inference_steps=5)
    assert len(seen) == 5
    assert by_step(seen) == FIVE


def test_batched_guidance_sd3():
    seen = passes(tiny.sd3_pipeline(), num_inference_steps=5)
    assert [batch for _, batch, _, _ in seen] == [2] * 5
    assert by_step(seen) == FIVE


def test_two_call_guidance_wan():
    seen = passes(tiny.wan_pipeline(), num_inference_steps=5)
    assert [batch for _, batch, _, _ in seen] == [1] * 10
    assert by_step(seen) == FIVE


def test_a_run_without_a_sparse_step_says_so_once(caplog):
    caplog.set_level(logging.WARNING, logger="dittfast")
    pipe, words = tiny.wan_pipeline(), "leave none of 3 steps to"
    assert not any(sparse for _, _, sparse, _ in passes(pipe, num_inference_steps=3))
    assert [words in record.message for record in caplog.records] == [True]
    caplog.clear()
    passes(pipe, num_inference_steps=4)
    assert not caplog.records


def test_both_experts_of_wan_22():
    pipe = tiny.wan_pipeline(two_experts=True)
    pipe.register_to_config(boundary_ratio=0.9)
    seen = passes(pipe, num_inference_steps=5)
    assert by_step(seen) == FIVE
    high = {t for t, _, _, model in seen if model is pipe.transformer}
    low = {t for t, _, _, model in seen if model is pipe.transformer_2}
    assert high and low and min(high) > max(low)
    # The second expert starts in the middle: its first pass is no first step.
    assert next(sparse for t, _, sparse, m in seen if m is pipe.transformer_2)


def test_image_to_image_runs_fewer_steps():
    from diffusers import FluxImg2ImgPipeline

    pipe = tiny.flux_pipeline()
    painter = FluxImg2ImgPipeline(**pipe.components)
    painter.set_progress_bar_config(disable=True)
    image = torch.rand(1, 3, 64, 96, generator=torch.Generator().manual_seed(0))
    # Five of the eight steps run: the schedule counts those, from the first that runs.
    seen = passes(painter, num_inference_steps=8, image=image, strength=0.6)
    assert len(seen) in (4, 5)
    flags = [sparse for _, _, sparse, _ in seen]
    assert flags == [False, False] + [True] * (len(seen) - 3) + [False]


def test_two_runs_in_a_row_and_another_number_of_steps():
    pipe = tiny.wan_pipeline()
    seen = []
    with dittfast.enable(
        pipe, Band(), backend="reference", min_tokens=0, dense_first_steps=2, dense_last_steps=1
    ):
        watch(pipe, seen)
        for steps, expected in ((5, FIVE), (5, FIVE), (3, [False] * 3), (1, [False])):
            seen.clear()
            tiny.run(pipe, num_inference_steps=steps)
            assert by_step(seen) == expected


def test_a_block_cache():
    """First-block caching runs one block and skips the rest; steps stay scheduler steps."""
    from diffusers import FirstBlockCacheConfig

    for make in (tiny.flux_pipeline, tiny.wan_pipeline):
        pipe = make()
        pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=1e9))
        for _ in range(2):
            assert by_step(passes(pipe, num_inference_steps=5)) == FIVE


@pytest.mark.parametrize("how", ["exception", "interrupt"])
def test_an_interrupted_run(how):
    """The run after one that stopped in the middle counts from its own first step."""
    pipe = tiny.flux_pipeline()

    def stop(pipe, step, timestep, kwargs):
        if how == "exception":
            raise KeyboardInterrupt
        pipe._interrupt = True
        return kwargs

    with dittfast.enable(pipe, Band(), backend="reference", min_tokens=0, dense_first_steps=1):
        whole = tiny.run(pipe)
        if how == "exception":
            with pytest.raises(KeyboardInterrupt):
                tiny.run(pipe, callback_on_step_end=stop)
        else:
            tiny.run(pipe, callback_on_step_end=stop)
        seen = []
        watch(pipe, seen)
        assert torch.equal(tiny.run(pipe), whole)
    assert by_step(seen) == [False, True, True]


def test_last_steps_need_a_scheduler():
    model = tiny.flux_transformer()
    dittfast.enable(model, Band(), dense_last_steps=1)
    with pytest.raises(ValueError, match="scheduler"):
        model(**tiny.flux_inputs())


def test_first_steps_of_a_bare_model_follow_the_timestep():
    model = tiny.flux_transformer()
    dittfast.enable(model, Band(), dense_first_steps=1, backend="reference")
    flags = []
    for t in (0.9, 0.9, 0.6, 0.3, 0.9, 0.6):
        model(**{**tiny.flux_inputs(), "timestep": torch.full((2,), t)})
        flags.append(next(iter(model._dittfast.layers.values())).core is not None)
    assert flags == [False, False, True, True, False, True]


def test_first_steps_where_time_rises():
    """Z-Image and Lumina 2 count their time up."""
    from dittfast.pipelines.measure.parity import TINY

    model, inputs = TINY["z-image"].build()
    dittfast.enable(model, Band(), dense_first_steps=1, backend="reference", min_tokens=0)
    flags = []
    for t in (0.1, 0.1, 0.4, 0.9, 0.1):
        with torch.no_grad():
            model(**{**inputs, "t": torch.full((2,), t)})
        flags.append(next(iter(model._dittfast.layers.values())).core is not None)
    assert flags == [False, False, True, True, False]
