"""Configurations of diffusers' caches, for tests that compose with them."""

import diffusers
import pytest
import tiny

CACHES = (
    "FirstBlockCache",
    "PyramidAttentionBroadcast",
    "FasterCache",
    "MagCache",
    "TaylorSeerCache",
)


def cache_config(kind, timestep, steps):
    """A cache that skips something in a run of so many steps.

    Args:
        timestep: gives the one at hand, where a cache asks for it.
    """
    common = dict(current_timestep_callback=timestep)
    if kind == "FirstBlockCache":
        return diffusers.FirstBlockCacheConfig(threshold=10.0)
    if kind == "PyramidAttentionBroadcast":
        return diffusers.PyramidAttentionBroadcastConfig(
            spatial_attention_block_skip_range=2,
            spatial_attention_timestep_skip_range=(1, 999),
            spatial_attention_block_identifiers=("transformer_blocks", "blocks"),
            **common,
        )
    if kind == "FasterCache":
        return diffusers.FasterCacheConfig(
            spatial_attention_block_skip_range=2,
            spatial_attention_timestep_skip_range=(-1, 901),
            attention_weight_callback=lambda _: 0.5,
            is_guidance_distilled=True,
            **common,
        )
    if kind == "MagCache":
        return diffusers.MagCacheConfig(
            threshold=0.5, num_inference_steps=steps, retention_ratio=0.2, mag_ratios=[1.0] * steps
        )
    return diffusers.TaylorSeerCacheConfig(cache_interval=2, disable_cache_before_step=1)


def run_of_stock(pipe, **changes):
    """Skips where diffusers cannot: in 0.38 FLUX does not name its calls, which caches ask for, and
    no pipeline does that ran once before its cache was enabled."""
    try:
        return tiny.run(pipe, **changes)
    except ValueError as error:
        if "No context is set" not in str(error):
            raise
        pytest.skip("the stock pipeline of this diffusers does not run with this cache")
