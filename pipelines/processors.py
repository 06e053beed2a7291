"""Attention processors for ``transformer.set_attn_processor``: the door without ``enable``.

They run the stock processor of the module they are called for and replace the attention inside
it, on the same core as :func:`dittfast.enable`. They see one layer at a time and no scheduler, so
there is no schedule of dense steps here: use ``enable`` for that.
"""

from __future__ import annotations

import abc
import weakref
from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch

from dittfast.config import method_fields, resolve, unknown
from dittfast.layout import Layout
from dittfast.methods import METHODS
from dittfast.methods.base import Method
from dittfast.methods.checks import check_integer
from dittfast.methods.head_groups import by_head, value_lists
from dittfast.methods.head_guidance import HeadGuidance
from dittfast.methods.memory import Memory
from dittfast.plan import to_be_kept

from .families import rotary_reader
from .guidance.perturbation import Perturbation
from .layer import AttentionCore, LayerRun, PlannedLayout
from .seam import check_reached, intercept, native_backend


def _layout_of(attn: torch.nn.Module, encoder_hidden_states, rotary) -> Layout:
    """The layout of the modules whose rotary embedding tells it."""
    kind = type(attn).__name__
    read = rotary_reader(kind)
    if read is None:
        raise ValueError(f"{kind} does not tell the processor its token grid")
    return read(rotary, None if encoder_hidden_states is None else encoder_hidden_states.shape[1])


class _AttnProcessor(abc.ABC):
    """What the processors share: the stock processor inside, and the layout."""

    # What to use where the processor cannot stand in for the stock one.
    instead: str
    # diffusers sets these on processors; they are handed on to the stock processor.
    _attention_backend = None
    _parallel_config = None

    def __init__(self, layout: Layout | None):
        self.layout = layout
        self._stock: dict[tuple[type, bool], object] = {}
        self._read: tuple[weakref.ref, Layout] | None = None

    @abc.abstractmethod
    def _run(self, attn: torch.nn.Module, layout: Layout, hidden_states) -> LayerRun | None:
        """What this call runs; None for the stock attention."""

    def __call__(
        self,
        attn: torch.nn.Module,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        image_rotary_emb: tuple[torch.Tensor, torch.Tensor] | None = None,
    ):
        arguments = (attn, hidden_states, encoder_hidden_states, attention_mask, image_rotary_emb)
        run = None
        if not getattr(attn, "is_cross_attention", False):
            layout = self._find_layout(attn, encoder_hidden_states, image_rotary_emb)
            run = self._run(attn, layout, hidden_states)
        stock = self._stock_processor(attn, watched=run is not None)
        if run is None:
            return stock(*arguments)
        given = hidden_states, encoder_hidden_states
        with intercept(run, streams=given if run.watched.hidden_states else None) as seen:
            out = stock(*arguments)
        if not torch.compiler.is_compiling():
            check_reached(run, seen.ran, seen.reached, attn)
        return out

    def _stock_processor(self, attn, watched: bool):
        """The module's own processor: on the user's attention backend, or one to be watched."""
        cls = getattr(attn, "_default_processor_cls", None)
        if cls is None:
            raise ValueError(
                f"{type(attn).__name__} does not name its stock processor, so "
                f"{type(self).__name__} cannot stand in for it; use {self.instead}"
            )
        if (cls, watched) not in self._stock:
            self._stock[cls, watched] = cls()
        stock = self._stock[cls, watched]
        stock._attention_backend = native_backend() if watched else self._attention_backend
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
                f"use {self.instead}"
            ) from error
        self._read = weakref.ref(rotary[0]), layout
        return layout


class SparseAttnProcessor(_AttnProcessor):
    """Base of the sparse processors; ``set_attn_processor`` may share one between all layers.

    Args:
        layout: the token geometry. None reads it from the rotary embedding, which FLUX and Wan
            have; on a GPU that waits for the device once per forward pass, and it cannot be
            traced by torch.compile, so pass it there.
        backend: as in :func:`dittfast.attend`.
        min_tokens: below this many tokens attention stays dense.
        heads, head_dim, channels: of the layers (channels: of their hidden states), for a method
            whose parameters depend on them and are to be trained or loaded; without them such a
            method has its initial values.
        options: fields of the method.

    Attributes:
        parameters: the method's trainable parameters, by name. Layers that share the processor
            share them.

    Raises:
        ValueError: an unknown option (the nearest is named); at the call, a layout that cannot
            be read.
    """

    method_name: str

    def __init__(
        self,
        layout: Layout | None = None,
        backend: str = "auto",
        min_tokens: int = 0,
        heads: int | None = None,
        head_dim: int | None = None,
        channels: int | None = None,
        **options,
    ):
        super().__init__(layout)
        cls = METHODS[self.method_name]
        for key in options:
            if key not in method_fields(cls):
                raise unknown(f"option of {type(self).__name__}", key, method_fields(cls))
        self.method: Method = resolve(self.method_name, **options)[0]
        if heads is not None:
            values = by_head(self.method, heads).layer_parameters(heads, head_dim, channels)
        else:
            method = self.method
            unknown_shape = method.computes or method.adds or value_lists(method)
            values = {} if unknown_shape else method.parameters(None, None)
        self.parameters = {n: torch.nn.Parameter(x) for n, x in values.items()}
        self.backend = backend
        self.min_tokens = min_tokens
        self._runs: dict[tuple[Layout, torch.device, int], LayerRun] = {}

    @property
    def instead(self) -> str:
        return f"dittfast.enable(pipe, {self.method_name!r})"

    def _run(self, attn, layout: Layout, hidden_states) -> LayerRun | None:
        if layout.num_tokens < self.min_tokens:
            return None
        key = (layout, hidden_states.device, attn.heads)
        if key not in self._runs:
            method = by_head(self.method, attn.heads)
            with to_be_kept():
                method.prepare(layout, key[1])
            planned = ((PlannedLayout(method, layout, method.keep(layout, key[1])),),)
            core = AttentionCore(method, planned, self.backend)
            self._runs[key] = LayerRun(core, parameters=self.parameters)
        return self._runs[key]


class RadialAttnProcessor(SparseAttnProcessor):
    """Radial attention (arXiv:2506.19852); options of :class:`dittfast.methods.Radial`."""

    method_name = "radial"


class LocalAttnProcessor(SparseAttnProcessor):
    """CLEAR's local attention (arXiv:2412.16112); options of :class:`dittfast.methods.Local`."""

    method_name = "local"


class NeighborhoodAttnProcessor(SparseAttnProcessor):
    """NATTEN's windows (arXiv:2504.16922); options of :class:`dittfast.methods.Neighborhood`."""

    method_name = "neighborhood"


class TopKAttnProcessor(SparseAttnProcessor):
    """Block top-k and top-p; options of :class:`dittfast.methods.TopK`."""

    method_name = "topk"


class LogLinearAttnProcessor(SparseAttnProcessor):
    """LLSA (arXiv:2512.16615); options of :class:`dittfast.methods.LogLinear`."""

    method_name = "log_linear"


class RectifiedAttnProcessor(SparseAttnProcessor):
    """Rectified SpaAttn (arXiv:2511.19835); options of :class:`dittfast.methods.Rectified`."""

    method_name = "rectified"


class SolAttnProcessor(SparseAttnProcessor):
    """Sol-Attn (arXiv:2607.24027); options of :class:`dittfast.methods.Sol`."""

    method_name = "sol"


class VSAAttnProcessor(SparseAttnProcessor):
    """VSA (arXiv:2505.13389); options of :class:`dittfast.methods.VSA`."""

    method_name = "vsa"


class ReattentionAttnProcessor(SparseAttnProcessor):
    """Re-ttention (arXiv:2505.22918); options of :class:`dittfast.methods.Reattention`.

    It keeps values from step to step, and no scheduler tells it the steps: call :meth:`begin`
    before each. What a layer is called for at one step are its guidance branches, in their order.
    One run at a time; passes that may be differentiated keep nothing.
    """

    method_name = "reattention"

    def __init__(self, *args: Any, **options: Any):
        super().__init__(*args, **options)
        self._step: int | None = None
        self._memories: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()
        self._calls: Counter = Counter()

    def begin(self, step: int) -> None:
        """The passes of ``step`` follow, from 0; a step that is not later begins another run."""
        check_integer("step", step, 0)
        if self._step is None or step <= self._step:
            self._memories.clear()
        self._step = step
        self._calls.clear()

    def _run(self, attn, layout: Layout, hidden_states) -> LayerRun | None:
        run = super()._run(attn, layout, hidden_states)
        if run is None or torch.is_grad_enabled():
            return run
        if self._step is None:
            raise ValueError(
                "ReattentionAttnProcessor keeps values from step to step, and was not told the "
                f"step: call begin(step) before each, or use {self.instead}"
            )
        branches = self._memories.setdefault(attn, [])
        number = self._calls[attn]
        self._calls[attn] += 1
        if number == len(branches):
            branches.append(Memory())
        branches[number].begin(self._step)
        return LayerRun(run.core, parameters=run.parameters, memory=branches[number])


class LinearAttnProcessor(SparseAttnProcessor):
    """LinFusion (arXiv:2409.02097); options of :class:`dittfast.methods.Linear`."""

    method_name = "linear"


class AgentAttnProcessor(SparseAttnProcessor):
    """Agent attention (arXiv:2312.08874); options of :class:`dittfast.methods.Agent`."""

    method_name = "agent"


class SLAAttnProcessor(SparseAttnProcessor):
    """SLA (arXiv:2509.24006): a linear branch; options of :class:`dittfast.methods.SLA`."""

    method_name = "sla"


class MixtureOfHeadsAttnProcessor(SparseAttnProcessor):
    """MoH (arXiv:2410.11842); options of :class:`dittfast.methods.MixtureOfHeads`."""

    method_name = "mixture_of_heads"


class _LastPart:
    """A perturbation of the last of several equal parts of the batch."""

    def __init__(self, inner: Perturbation, parts: int):
        self.inner, self.parts = inner, parts
        self.strict, self.shortcut = inner.strict, inner.shortcut
        self.hidden_states = inner.hidden_states
        self.num_tokens = inner.num_tokens
        self.text_before, self.text_behind = inner.text_before, inner.text_behind

    def covers(self, num_tokens: int) -> bool:
        return self.inner.covers(num_tokens)

    def __call__(self, out: torch.Tensor, strength: torch.Tensor, call: dict) -> torch.Tensor:
        batch = out.shape[0]
        first = batch - batch // self.parts
        part = {
            name: x[first:] if torch.is_tensor(x) and x.ndim > 2 and x.shape[0] == batch else x
            for name, x in call.items()
        }
        return torch.cat([out[:first], self.inner(out[first:], strength, part)])


class HeadGuidanceAttnProcessor(_AttnProcessor):
    """Weakens attention heads of the layers it is set on (SoftPAG, arXiv:2506.10978).

    A processor cannot run a second pass, so the guided prediction is for the caller to form from
    the plain one c and the weakened one p, ``c + w (c - p)``. Both can come from one batch::

        weak = HeadGuidanceAttnProcessor(heads=[3], passes=2)
        name = "transformer_blocks.7.attn.processor"
        transformer.set_attn_processor({**transformer.attn_processors, name: weak})
        c, p = transformer(latents.repeat(2, 1, 1), ...).sample.chunk(2)

    :func:`dittfast.guide` does all of it, in plain pipelines.

    Args:
        heads: which heads of the layer. Layers that share the processor weaken the same ones.
        strength: u in 0..1 of the map ``(1 - u) A + u I``; one number, or one for each of heads.
        rows: "image", "joint" or "diagonal", as in :class:`dittfast.HeadGuidance`.
        passes: equal parts of the batch, of which the last is weakened: 1 weakens all of it, 2
            takes [plain, weakened], 3 [unconditional, plain, weakened].
        layout: as in :class:`SparseAttnProcessor`.

    Attributes:
        active: set it to False to run the stock attention.

    Raises:
        ValueError: a value out of range, a head twice; at the call, a head that the layer does not
            have, a batch that passes does not divide, a layout that cannot be read.
    """

    instead = "dittfast.guide(pipe, heads=...)"

    def __init__(
        self,
        heads: Sequence[int],
        strength: float | Sequence[float] = 1.0,
        rows: str = "image",
        passes: int = 1,
        layout: Layout | None = None,
    ):
        super().__init__(layout)
        if not isinstance(strength, (int, float)):
            strength = tuple(strength)
        self.guidance = HeadGuidance(tuple((0, h) for h in heads), strength=strength, rows=rows)
        check_integer("passes", passes, 1, remedy="2 for a batch of [plain, weakened]")
        self.passes = passes
        self.active = True
        self._perturbations: dict[Layout, _LastPart] = {}
        self._strengths: dict[tuple[int, torch.device], torch.Tensor] = {}

    def _run(self, attn, layout: Layout, hidden_states) -> LayerRun | None:
        if not self.active:
            return None
        if hidden_states.shape[0] % self.passes:
            raise ValueError(
                f"a batch of {hidden_states.shape[0]} does not divide into passes={self.passes} "
                "equal parts; stack the passes along the batch"
            )
        if layout not in self._perturbations:
            inner = Perturbation(self.guidance.rows, ((layout,),), hidden_states.device)
            self._perturbations[layout] = _LastPart(inner, self.passes)
        key = (attn.heads, hidden_states.device)
        if key not in self._strengths:
            self._strengths[key] = self._strength(attn.heads).to(key[1])
        return LayerRun(None, self._perturbations[layout], self._strengths[key])

    def _strength(self, num_heads: int) -> torch.Tensor:
        strength = torch.zeros(num_heads)
        for (_, head), value in zip(self.guidance.heads, self.guidance.strengths):
            if not 0 <= head < num_heads:
                raise ValueError(f"head {head} does not exist; heads are 0..{num_heads - 1}")
            strength[head] = value
        return strength
