"""How much the picture minds an error: of a layer's attention, and of a step's prediction.

Both are measured by putting noise of a known size where the error would be. A layer's noise is
followed to the prediction of the same pass, which takes one more pass; a band's noise from the
predictions to the finished picture, which takes one more run. Their product is what an error of a
layer's attention in a band does to the picture, to first order.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator

import torch

from dittfast.layout import Layout

from ..adapter import enable
from ..guidance.plain import added, each, prediction_of
from ..layer import LayerRun
from ..models import transformers_of
from ..passes import Pass
from ..runs.run import Run, run
from ..state import ModelState


def noise_like(x: torch.Tensor, strength: float, seed: int) -> torch.Tensor:
    """Noise of ``strength`` times the root mean square of ``x [B, ...]``; alike in all rows.

    Alike, because the rows are guidance's branches of one latent, whose errors go together:
    independent ones would be enlarged by the guidance scale.
    """
    generator = torch.Generator("cpu").manual_seed(seed)
    drawn = torch.randn(x.shape[1:], generator=generator).to(x.device, torch.float32)
    size = x.float().square().mean().sqrt()
    return (strength * size * drawn).to(x.dtype).expand_as(x)


class _Noise:
    """Stands in a layer for one pass: puts noise on its attention."""

    strict, shortcut, hidden_states = True, None, None

    def __init__(self, layout: Layout, strength: float, seed: int):
        self.num_tokens = layout.num_tokens
        self.text_before, self.text_behind = layout.grid_start, layout.text_behind
        self.strength, self.seed = strength, seed

    def covers(self, num_tokens: int) -> bool:
        return num_tokens == self.num_tokens

    def __call__(self, out: torch.Tensor, strength, call: dict) -> torch.Tensor:
        return out + noise_like(out, self.strength, self.seed)


def _square(x: torch.Tensor | list[torch.Tensor]) -> float:
    parts = [x] if torch.is_tensor(x) else x
    return float(sum(part.float().square().sum(dtype=torch.float64) for part in parts))


def layer_sensitivity(
    model: torch.nn.Module,
    state: ModelState,
    done: Pass,
    arguments: dict,
    out,
    layer: str,
    strength: float,
    seed: int = 0,
) -> float:
    """Relative squared change of a prediction for each unit of a layer's relative squared error.

    Runs the transformer once more, with noise on the layer's attention.

    Args:
        model, state, done, arguments, out: a transformer that is enabled, and the pass that gave
            ``out``, as :class:`~dittfast.pipelines.state.Guidance` is told of it.
        strength: of the noise, relative to the attention's root mean square.
    """
    noise = _Noise(done.sequences.layout, strength, seed)
    noisy = dict.fromkeys(done.runs, LayerRun()) | {layer: LayerRun(transform=noise)}
    with state.passes.under_way(done.changed(noisy)):
        moved = prediction_of(torch.nn.Module.__call__(model, **arguments))
    before = prediction_of(out)
    return _square(each(torch.sub, moved, before)) / _square(before) / strength**2


class LayerSensitivity:
    """In the place of guidance: measures every layer at the first pass of some steps."""

    def __init__(self, steps: Collection[int], strength: float):
        self.steps, self.strength = frozenset(steps), strength
        self.found: dict[tuple[str, int], float] = {}

    def describe(self) -> str:
        return "every layer's sensitivity is measured"

    def guide(self, model, state: ModelState, done: Pass, arguments: dict, out):
        step = done.step[0]
        for layer in state.layers if step in self.steps else ():
            if (layer, step) not in self.found:
                given = (model, state, done, arguments, out, layer, self.strength)
                self.found[layer, step] = layer_sensitivity(*given)
        return out


class _Disturbance:
    """In the place of guidance: puts noise on the predictions of some steps."""

    def __init__(self, steps: Collection[int], strength: float, seed: int):
        self.steps, self.strength, self.seed = frozenset(steps), strength, seed

    def describe(self) -> str:
        return f"noise of {self.strength:g} on some predictions"

    def guide(self, model, state: ModelState, done: Pass, arguments: dict, out):
        if done.step[0] not in self.steps:
            return out
        noise = lambda x: noise_like(x, self.strength, self.seed)  # noqa: E731
        return added(out, each(noise, prediction_of(out)))


@contextlib.contextmanager
def disturbed(pipe, steps: Collection[int], strength: float, seed: int = 0) -> Iterator[None]:
    """Inside, a pipeline's dense predictions at some steps get noise, the same in all of them.

    The same, because errors of attention go together from step to step.

    Raises:
        ValueError: as :func:`dittfast.enable`.
    """
    with enable(pipe, "dense"):
        for model in transformers_of(pipe).values():
            model._dittfast.guidance = _Disturbance(steps, strength, seed)
        yield


def draw_disturbed(pipe, call: dict, seed: int, steps: Collection[int], strength: float) -> Run:
    """A dense run with noise of relative size ``strength`` on the predictions of some steps.

    How far its picture is from the dense one, divided by ``strength**2``, is what an error of the
    predictions in these steps does.
    """
    with disturbed(pipe, steps, strength), torch.no_grad():
        return run(pipe, call, seed)
