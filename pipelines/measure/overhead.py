"""What enabling dittfast costs by itself: forward passes that leave nothing out, beside stock ones.

Two arms are timed, each in pairs with the stock model. In ``enabled`` the method is dense: layout
and step are read, and every layer runs its stock attention. In ``full_plan`` every attention goes
the way of a sparse one, under a plan that keeps all token pairs, which ``attend`` gives to
PyTorch's own attention: the adapter without a kernel.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from functools import partial

import torch

from dittfast.layout import Layout
from dittfast.measure.bench import Workload, layout_for
from dittfast.measure.check import WrongResult
from dittfast.measure.timing import interleaved_seconds, percentiles

from ..adapter import enable
from .parity import Full, distance, eager_noise, output

ARMS = ("enabled", "full_plan")
_FRAMES = 4
_CHANNELS = 16


def _flux(work: Workload, tokens: int, layers: int) -> tuple[torch.nn.Module, dict, Layout]:
    from diffusers import FluxTransformer2DModel

    text = tokens // 16
    layout = Layout.image(*layout_for(tokens - text).grid.shape[1:], text=text)
    _, height, width = layout.grid.shape
    axis = 2 * (work.head_dim // 6)
    double = layers // 3
    model = FluxTransformer2DModel(
        in_channels=_CHANNELS, num_layers=double, num_single_layers=layers - double,
        num_attention_heads=work.heads, attention_head_dim=work.head_dim, joint_attention_dim=256,
        pooled_projection_dim=64, guidance_embeds=True,
        axes_dims_rope=(work.head_dim - 2 * axis, axis, axis),
    )  # fmt: skip
    ids = torch.zeros(height, width, 3)
    ids[..., 1], ids[..., 2] = torch.arange(height)[:, None], torch.arange(width)
    inputs = dict(
        hidden_states=torch.randn(work.batch, height * width, _CHANNELS),
        encoder_hidden_states=torch.randn(work.batch, text, 256),
        pooled_projections=torch.randn(work.batch, 64),
        timestep=torch.full((work.batch,), 0.5),
        guidance=torch.full((work.batch,), 3.5),
        img_ids=ids.view(-1, 3),
        txt_ids=torch.zeros(text, 3),
    )
    return model, inputs, layout


def _wan(work: Workload, tokens: int, layers: int) -> tuple[torch.nn.Module, dict, Layout]:
    from diffusers import WanTransformer3DModel

    layout = layout_for(tokens, frames=math.gcd(tokens, _FRAMES))
    frames, height, width = layout.grid.shape
    inner = work.heads * work.head_dim
    model = WanTransformer3DModel(
        patch_size=(1, 2, 2), num_attention_heads=work.heads, attention_head_dim=work.head_dim,
        in_channels=_CHANNELS, out_channels=_CHANNELS, text_dim=256, ffn_dim=4 * inner,
        num_layers=layers, rope_max_seq_len=max(layout.grid.shape),
    )  # fmt: skip
    inputs = dict(
        hidden_states=torch.randn(work.batch, _CHANNELS, frames, 2 * height, 2 * width),
        encoder_hidden_states=torch.randn(work.batch, 512, 256),
        timestep=torch.full((work.batch,), 500.0),
    )
    return model, inputs, layout


MODELS: dict[str, Callable] = {"flux": _flux, "wan": _wan}


def _twin(model: torch.nn.Module) -> torch.nn.Module:
    """Another module with the same tensors, so that only the code differs."""
    tensors = [*model.parameters(), *model.buffers()]
    return copy.deepcopy(model, {id(x): x for x in tensors})


def _built(name: str, work: Workload, tokens: int, layers: int):
    """A random model on its device, its inputs and their layout."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(work.seed)
        model, inputs, layout = MODELS[name](work, tokens, layers)
    model = model.eval().to(work.device)
    if work.dtype != torch.float32:
        model = model.to(work.dtype)
    floating = lambda x: x.is_floating_point() and x.ndim > 1  # noqa: E731
    inputs = {k: x.to(work.device, work.dtype if floating(x) else None) for k, x in inputs.items()}
    return model, inputs | {"return_dict": False}, layout


def _in_pairs(
    arms: dict[str, torch.nn.Module], inputs: dict, repeats: int, device
) -> tuple[dict[str, list[float]], dict[str, dict]]:
    """Seconds of the stock model and of each arm, and how much slower each is than its partners."""
    functions = {arm: partial(output, x, inputs) for arm, x in arms.items()}
    seconds, overhead = {"stock": []}, {}
    for arm in ARMS:
        pair = {name: functions[name] for name in ("stock", arm)}
        paired = interleaved_seconds(pair, repeats, device)
        seconds["stock"] += paired["stock"]
        seconds[arm] = paired[arm]
        overhead[arm] = percentiles(a / b - 1 for a, b in zip(paired[arm], paired["stock"]))
    return seconds, overhead


def measure_overhead(
    name: str, work: Workload, *, tokens: int = 4096, layers: int = 12, repeats: int = 10
) -> dict:
    """Check, then time a random model of a real diffusers class, stock and enabled, in turns.

    Args:
        name: "flux" (a third of the layers are double blocks, a 16th of the tokens text) or "wan"
            (up to 4 frames; 512 text tokens in cross-attention).
        work: batch, heads, head dim, dtype, device and seed; its layout is not used.
        tokens: of the sequence that self-attention sees.
        layers: self-attention layers.
        repeats: pairs for each arm, in turns stock first and arm first.

    Returns:
        A row of plain values. ``overhead`` holds, for each arm, percentiles over the pairs of
        (its seconds / the stock model's seconds - 1).

    Raises:
        WrongResult: an arm's output is not the stock model's; nothing is timed.
        ValueError: an unknown model, or sizes that do not work.
    """
    from dittfast.config import unknown

    if name not in MODELS:
        raise unknown("model", name, MODELS)
    if layers < 1 or tokens < 64:
        raise ValueError(f"needs at least 1 layer and 64 tokens, got {layers} and {tokens}")
    model, inputs, layout = _built(name, work, tokens, layers)
    arms = {"stock": model} | {arm: _twin(model) for arm in ARMS}
    enable(arms["enabled"], "dense")
    enable(arms["full_plan"], Full(block_size=128), min_tokens=0)
    errors, noise = _check(arms, inputs)

    seconds, overhead = _in_pairs(arms, inputs, repeats, work.device)
    return {
        "model": type(model).__name__,
        "layers": layers,
        "tokens": layout.num_tokens,
        "grid": list(layout.grid.shape),
        "context": layout.num_context,
        "batch": work.batch,
        "heads": work.heads,
        "head_dim": work.head_dim,
        "dtype": str(work.dtype).removeprefix("torch."),
        "pairs": repeats,
        "seconds": {arm: percentiles(values) for arm, values in seconds.items()},
        "overhead": overhead,
        "error": errors,
        "noise": noise,
    }


def _check(arms: dict[str, torch.nn.Module], inputs: dict) -> tuple[dict[str, float], float]:
    """Each arm's difference from the stock output, and eager attention's own, in the same unit."""
    stock = output(arms["stock"], inputs)
    noise = eager_noise(arms["stock"], inputs, stock)
    errors = {}
    for arm in ARMS:
        most = 0.0 if arm == "enabled" else 8 * noise
        errors[arm] = distance(output(arms[arm], inputs), stock)
        if not errors[arm] <= most:
            raise WrongResult(
                f"{arm} differs from the stock model by {errors[arm]:.1e} of its largest output; "
                f"at most {most:.1e} is rounding"
            )
    return errors, noise
