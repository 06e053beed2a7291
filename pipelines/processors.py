"""Attention processors for ``transformer.set_attn_processor``: the door without ``enable``.

They run the stock processor of the module they are called for and replace the attention inside
it, on the same core as :func:`dittfast.enable`. They see one layer at a time and no scheduler, so
there is no schedule of dense steps here: use ``enable`` for that.
"""

from __future__ import annotations

import weakref

import torch

from dittfast.config import method_fields, unknown
from dittfast.layout import Layout
from dittfast.methods import METHODS
from dittfast.methods.base import Method

from .rotary import image_layout, video_layout
from .seam import Core, LayerState, Part, check_reached, intercept


def _layout_of(attn: torch.nn.Module, encoder_hidden_states, rotary) -> Layout:
    """The layout of the modules whose rotary embedding tells it."""
    kind = type(attn).__name__
    if kind == "FluxAttention":
        joint = encoder_hidden_states is not None
        return image_layout(rotary, encoder_hidden_states.shape[1] if joint else None)
    if kind == "WanAttention":
        head_dim = rotary[0].shape[-1]
        side = 2 * (head_dim // 6)
        return video_layout(rotary, head_dim - 2 * side, side)
    raise ValueError(f"{kind} does not tell the processor its token grid")


class SparseAttnProcessor:
    """Base of the processors; ``set_attn_processor`` may share one between all layers.

    Args:
        layout: the token geometry. None reads it from the rotary embedding, which FLUX and Wan
            have; on a GPU that waits for the device once per forward pass, and it cannot be
            traced by torch.compile, so pass it there.
        backend: as in :func:`dittfast.attend`.
        min_tokens: below this many tokens attention stays dense.
        options: fields of the method.

    Raises:
        ValueError: an unknown option (the nearest is named); at the call, a layout that cannot
            be read.
    """

    method_name: str
    # diffusers sets these on processors; they are handed on to the stock processor.
    _attention_backend = None
    _parallel_config = None

    def __init__(
        self, layout: Layout | None = None, backend: str = "auto", min_tokens: int = 0, **options
    ):
        cls = METHODS[self.method_name]
        for key in options:
            if key not in method_fields(cls):
                raise unknown(f"option of {type(self).__name__}", key, method_fields(cls))
        self.method: Method = cls(**options)
        self.layout = layout
        self.backend = backend
        self.min_tokens = min_tokens
        self.state = LayerState(
            {name: torch.nn.Parameter(x) for name, x in self.method.parameters().items()}
        )
        self._stock: dict[type, object] = {}
        self._cores: dict[tuple[Layout, torch.device], Core] = {}
        self._read: tuple[weakref.ref, Layout] | None = None

    def __call__(
        self,
        attn: torch.nn.Module,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        image_rotary_emb: tuple[torch.Tensor, torch.Tensor] | None = None,
    ):
        stock = self._stock_processor(attn)
        arguments = (attn, hidden_states, encoder_hidden_states, attention_mask, image_rotary_emb)
        if getattr(attn, "is_cross_attention", False):
            return stock(*arguments)
        layout = self._find_layout(attn, encoder_hidden_states, image_rotary_emb)
        if layout.num_tokens < self.min_tokens:
            return stock(*arguments)
        self.state.core = self._core(layout, hidden_states.device)
        with intercept(self.state):
            out = stock(*arguments)
        check_reached(self.state, attn)
        return out

    def _stock_processor(self, attn):
        cls = getattr(attn, "_default_processor_cls", None)
        if cls is None:
            raise ValueError(
                f"{type(attn).__name__} does not name its stock processor, so "
                f"{type(self).__name__} cannot stand in for it; use dittfast.enable(pipe, "
                f"{self.method_name!r})"
            )
        if cls not in self._stock:
            self._stock[cls] = cls()
        stock = self._stock[cls]
        stock._attention_backend = self._attention_backend
        stock._parallel_config = self._parallel_config
        return stock

    def _find_layout(self, attn, encoder_hidden_states, rotary) -> Layout:
        if self.layout is not None:
            return self.layout
        if rotary is not None and self._read is not None and self._read[0]() is rotary[0]:
            return self._read[1]
        try:
            if rotary is None:
                raise ValueError("there is no rotary embedding to read the token grid from")
            layout = _layout_of(attn, encoder_hidden_states, rotary)
        except ValueError as error:
            raise ValueError(
                f"{type(self).__name__} cannot read the layout: {error}. Pass "
                "layout=Layout.image(height, width, text=...) or Layout.video(...) in tokens, or "
                f"use dittfast.enable(pipe, {self.method_name!r})"
            ) from error
        self._read = weakref.ref(rotary[0]), layout
        return layout

    def _core(self, layout: Layout, device: torch.device) -> Core:
        key = (layout, device)
        if key not in self._cores:
            plan = self.method.plan(layout).to(device) if self.method.static else None
            self.method.prepare(layout, device)
            self._cores[key] = Core(self.method, ((Part(layout, plan),),), self.backend)
        return self._cores[key]


class RadialAttnProcessor(SparseAttnProcessor):
    """Radial attention (arXiv:2506.19852); options of :class:`dittfast.methods.Radial`."""

    method_name = "radial"


class LocalAttnProcessor(SparseAttnProcessor):
    """CLEAR's local attention (arXiv:2412.16112); options of :class:`dittfast.methods.Local`."""

    method_name = "local"


class LogLinearAttnProcessor(SparseAttnProcessor):
    """LLSA (arXiv:2512.16615); options of :class:`dittfast.methods.LogLinear`."""

    method_name = "log_linear"


class RectifiedAttnProcessor(SparseAttnProcessor):
    """Rectified SpaAttn (arXiv:2511.19835); options of :class:`dittfast.methods.Rectified`."""

    method_name = "rectified"
