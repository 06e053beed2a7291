"""Head-perturbation guidance as a guider of diffusers' modular pipelines."""

from __future__ import annotations

import contextlib
import math
import weakref
from typing import Any

import torch
from diffusers.configuration_utils import register_to_config
from diffusers.guiders import BaseGuidance
from diffusers.guiders.guider_utils import GuiderOutput, rescale_noise_cfg

from dittfast.methods.dense import Dense
from dittfast.methods.head_guidance import HeadGuidance

from ..adapter import disable, enable
from ..models import is_swapped
from .perturbation import HeadWeakening, head_strengths
from .plain import heads_by_layer


class HeadGuider(BaseGuidance):
    """Guidance away from the model with some heads weakened (HeadHunter, arXiv:2506.10978).

    For modular pipelines: ``pipe.update_components(guider=HeadGuider(heads=[(7, 3)]))``. With the
    predictions c (prompt), u (negative prompt) and p (prompt, heads weakened) a guided step uses
    ``u + guidance_scale (c - u) + head_guidance_scale (c - p)``; without classifier-free guidance
    ``c + head_guidance_scale (c - p)``. Plain pipelines have :func:`dittfast.guide` instead.

    Args:
        heads: ``(layer, head)`` pairs, as in :class:`dittfast.HeadGuidance`.
        guidance_scale: of classifier-free guidance; 1 turns it off.
        head_guidance_scale, strength, rows, start_step, stop_step: see
            :class:`dittfast.HeadGuidance` (its ``guidance_scale`` is head_guidance_scale here).
        guidance_rescale, use_original_formulation, start, stop, enabled: of classifier-free
            guidance, as in diffusers' own guiders; ``enabled=False`` turns off all guidance.

    Raises:
        ValueError: a value out of range; at the first guided step, a layer or head that the model
            does not have, or a model whose token layout dittfast cannot read.
    """

    _input_predictions = ["pred_cond", "pred_uncond", "pred_weak"]  # noqa: RUF012 (diffusers' own)

    @register_to_config
    def __init__(
        self,
        *,  # diffusers' guider.new() takes positional arguments for defaults and loses them
        heads: list,
        guidance_scale: float = 5.0,
        head_guidance_scale: float = 3.0,
        strength: float | list = 1.0,
        rows: str = "image",
        start_step: int = 0,
        stop_step: int | None = None,
        guidance_rescale: float = 0.0,
        use_original_formulation: bool = False,
        start: float = 0.0,
        stop: float = 1.0,
        enabled: bool = True,
    ):
        super().__init__(start, stop, enabled)
        if isinstance(strength, list):
            strength = tuple(strength)
        self.head_guidance = HeadGuidance(
            tuple((layer, head) for layer, head in heads),
            head_guidance_scale,
            strength,
            rows,
            start_step,
            stop_step,
        )
        self.guidance_scale = guidance_scale
        self.guidance_rescale = guidance_rescale
        self.use_original_formulation = use_original_formulation
        self._weakenings: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()
        # What the current step did to the model, to be undone in reverse order.
        self._step_changes = contextlib.ExitStack()
        self._weak_pass = contextlib.ExitStack()

    def _uses_uncond(self) -> bool:
        if not self._enabled:
            return False
        if self._num_inference_steps is not None:
            first, last = (int(x * self._num_inference_steps) for x in (self._start, self._stop))
            if not first <= self._step < last:
                return False
        off = 0.0 if self.use_original_formulation else 1.0
        return not math.isclose(self.guidance_scale, off)

    def _uses_weak(self) -> bool:
        guidance = self.head_guidance
        if not self._enabled or guidance.guidance_scale == 0:
            return False
        return self._step is None or guidance.is_guided_step(self._step)

    def _passes(self) -> list[tuple[int, str]]:
        """Which input, conditional (0) or not (1), each pass takes, and what it predicts."""
        passes = [(0, "pred_cond")]
        if self._uses_uncond():
            passes.append((1, "pred_uncond"))
        if self._uses_weak():
            passes.append((0, "pred_weak"))
        return passes

    @property
    def num_conditions(self) -> int:
        return len(self._passes())

    @property
    def is_conditional(self) -> bool:
        return self._passes()[max(self._count_prepared, 1) - 1][0] == 0

    def prepare_inputs(self, data: dict) -> list:
        return [self._prepare_batch(data, index, name) for index, name in self._passes()]

    def prepare_inputs_from_block_state(self, data: Any, input_fields: dict) -> list:
        return [
            self._prepare_batch_from_block_state(input_fields, data, index, name)
            for index, name in self._passes()
        ]

    def prepare_models(self, denoiser: torch.nn.Module) -> None:
        """Before each pass: dittfast is in the model for the whole step, weak in the last pass."""
        self._count_prepared += 1
        if self._count_prepared == 1:
            self._undo()  # an error may have ended the step before
        if not self._uses_weak():
            return
        if not is_swapped(denoiser):
            enable(denoiser, Dense())
            self._step_changes.callback(disable, denoiser)
        if self._count_prepared == self.num_conditions:
            if denoiser not in self._weakenings:
                strengths = head_strengths(heads_by_layer(denoiser), self.head_guidance)
                self._weakenings[denoiser] = HeadWeakening(self.head_guidance, strengths)
            state = denoiser._dittfast
            state.weakening = self._weakenings[denoiser]
            self._weak_pass.callback(setattr, state, "weakening", None)

    def cleanup_models(self, denoiser: torch.nn.Module) -> None:
        self._weak_pass.close()
        if self._count_prepared == self.num_conditions:
            self._undo()

    def _undo(self) -> None:
        self._weak_pass.close()
        self._step_changes.close()

    def forward(
        self,
        pred_cond: torch.Tensor,
        pred_uncond: torch.Tensor | None = None,
        pred_weak: torch.Tensor | None = None,
    ) -> GuiderOutput:
        if self._num_inference_steps is not None and self._step == self._num_inference_steps - 1:
            # The next run's text encoder asks how many passes there are before its first step.
            self._step = self._num_inference_steps = None
        pred = pred_cond
        if pred_uncond is not None:
            base = pred_cond if self.use_original_formulation else pred_uncond
            pred = base + self.guidance_scale * (pred_cond - pred_uncond)
        if pred_weak is not None:
            pred = pred + self.head_guidance.guidance_scale * (pred_cond - pred_weak)
        if self.guidance_rescale > 0:
            pred = rescale_noise_cfg(pred, pred_cond, self.guidance_rescale)
        return GuiderOutput(pred=pred, pred_cond=pred_cond, pred_uncond=pred_uncond)
