"""What every attention method is: a frozen config that plans attention, or computes it itself."""

from __future__ import annotations

import dataclasses
from abc import ABC
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch

from ..layout import Layout
from ..plan import Plan, to_be_kept
from .amount import UNKNOWN, Amount, dense_flops


class Call(NamedTuple):
    """What :meth:`Method.attention` is given besides q, k and v.

    Attributes:
        scale: the softmax scale the model asks for; None for ``1/sqrt(D)``.
        kv_log_weight: ``[B|1, H|1, N]`` fp32, what the model's mask and the layout's padding add
            to the logits of each key; -inf hides it. None where nothing is hidden.
        geometry: what :meth:`Method.geometry` made of the layout.
        attend: :func:`dittfast.attend` on the backend that was asked for.
        inner: ``inner(method, layout, q, k, v, kept=..., heads=..., **parameters) -> out``: the
            attention of another method, planned or computed, under this call's scale and mask;
            ``kept`` as :meth:`Method.keep` of that method gave it, None to make it now; ``heads``
            the numbers of the layer's heads that q holds, None for all.
        memory: what the layer keeps from step to step of the run, in this guidance branch
            (:class:`~dittfast.methods.memory.Memory`); None outside of a pipeline's run, in passes
            that may be differentiated, and unless the method ``remembers``.
        planned: ``planned(method, layout, q, k, v, kept=..., **parameters)``: what
            :func:`dittfast.attention.method_call` gives for another method that plans, under this
            call's scale and mask: a plan to be changed, and the other arguments of ``attend``.
        observe: to be told a plan that was made from q and k, or from hidden states.
        report: ``report(name, loss)`` takes the values of :attr:`Method.losses`; None where nobody
            trains.
        hidden_states: ``[B, N, C]``, what the layer was given and projected q, k and v from, in the
            order of the sequence; carries its gradient. None unless ``needs_hidden_states``.
    """

    scale: float | None
    kv_log_weight: torch.Tensor | None
    geometry: Any
    attend: Callable[..., Any]
    inner: Callable[..., torch.Tensor]
    planned: Callable[..., Any]
    observe: Callable[[Plan], None]
    report: Callable[[str, torch.Tensor], None] | None = None
    memory: Any = None
    hidden_states: torch.Tensor | None = None


class Kept(NamedTuple):
    """What is kept of a layout for a method that computes its own output.

    Attributes:
        padding: :meth:`Layout.kv_log_weight` on the device.
        geometry: of :meth:`Method.geometry`.
    """

    padding: torch.Tensor | None
    geometry: Any


@dataclass(frozen=True)
class Method(ABC):
    """Base of all methods. It touches no kernel, and no kernel knows a method.

    A method is one of two kinds, by what it defines:

    - :meth:`plan`: it says which key blocks each query block sees, and ``attend`` does the rest;
    - :meth:`attention`: it computes the output itself, and :meth:`flops` says what that costs.

    Subclasses are frozen dataclasses whose fields are the method's options, validated in
    ``__post_init__`` with errors that name the value and the allowed range.

    Class attributes:
        computes: whether the method is of the second kind; set from what the class defines.
        adds: whether a method that plans adds something to the softmax (:meth:`added`); likewise.
        name: short public name, the key in :data:`dittfast.methods.METHODS`.
        static: True if the plan depends on the layout alone, so that it can be cached; False if
            it is made from q and k at every call.
        needs_grid: True if the method has no meaning for a text-only layout.
        for_videos: True if the method tells frames apart, so that benchmarks give it a video.
        dense: True if every token sees every valid one, so that the model's own attention does.
        remembers: whether :meth:`attention` keeps values from step to step, in ``call.memory``.
        needs_hidden_states: whether :meth:`attention` looks at ``call.hidden_states``; its
            :meth:`parameters` then take their width as a third argument, ``channels``.
        losses: names of what :meth:`attention` hands to ``call.report``: 0-d values that training
            may make small, by the weight of that name.
        per_head: options that may be a list with one value for each head: see :meth:`by_head`.
        takes_methods: options that are methods themselves; as text, their names.
        needs_training: whether it is meant to be run with trained parameters alone.
    """

    name: ClassVar[str]
    computes: ClassVar[bool] = False
    adds: ClassVar[bool] = False
    static: ClassVar[bool] = True
    needs_grid: ClassVar[bool] = True
    for_videos: ClassVar[bool] = False
    dense: ClassVar[bool] = False
    remembers: ClassVar[bool] = False
    needs_hidden_states: ClassVar[bool] = False
    losses: ClassVar[tuple[str, ...]] = ()
    per_head: ClassVar[tuple[str, ...]] = ()
    takes_methods: ClassVar[tuple[str, ...]] = ()
    needs_training: ClassVar[bool] = False

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        cls.computes = cls.attention is not Method.attention
        cls.adds = cls.added is not Method.added

    def plan(
        self,
        layout: Layout,
        q: torch.Tensor | None = None,
        k: torch.Tensor | None = None,
        v: torch.Tensor | None = None,
        scale: float | None = None,
        kv_log_weight: torch.Tensor | None = None,
    ) -> Plan:
        """The pattern for one layout.

        Static methods are called with the layout alone and need not take the other arguments.

        Args:
            layout: geometry of the sequence, N tokens.
            q, k, v: ``[B, H, N, D]``, before :meth:`extend`; given where ``static`` is False.
            scale: the softmax scale that ``attend`` will use; default ``1/sqrt(D)``.
            kv_log_weight: ``[B|1, H|1, N]``, what ``attend`` will add to the logits of the N keys
                on top of the plan's own: a mask that the layout does not know.

        Returns:
            A plan for N queries and N keys plus those that :meth:`extend` appends. Padding of
            ``layout.context_lengths`` is in its ``kv_log_weight``.

        Raises:
            ValueError: the method computes its own output.
        """
        raise ValueError(
            f"{self.name} computes its output itself and has no plan of key blocks; call "
            "dittfast.attention.method_attention"
        )

    def check_one_value(self) -> None:
        """Raise ValueError where an option has a value for each head."""
        for name in self.per_head:
            if isinstance(getattr(self, name), tuple):
                raise ValueError(
                    f"{name} has a value for each head, so there is a plan for each; plan with one "
                    "value, or call dittfast.attention.method_attention"
                )

    def attention(
        self,
        layout: Layout,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        call: Call,
        **parameters: torch.Tensor,
    ) -> torch.Tensor:
        """The output of a method that computes it itself; differentiable, and traceable.

        Args:
            layout: geometry of the sequence, N tokens.
            q: ``[B, H, N, D]``. k, v: ``[B, Hk, N, D]`` with H a multiple of Hk.
            call: scale, mask, what is kept of the layout, and how to run other attention.
            parameters: those of :meth:`parameters`; missing ones have their initial values.

        Returns:
            ``[B, H, N, D]`` in q's dtype.
        """
        raise ValueError(f"{self.name} plans; call dittfast.attention.method_attention")

    def formula(
        self,
        layout: Layout,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        rows: torch.Tensor,
        call: Call,
        **parameters: torch.Tensor,
    ) -> torch.Tensor:
        """What :meth:`attention` is to give for some query rows, as the paper writes it.

        Short, plain and in the dtype of the inputs; it may take ``O(len(rows) · N)``. What is
        measured of a method is compared with it first, in fp64. Arguments as :meth:`attention`,
        and ``rows``, int64 numbers of queries.
        """
        raise ValueError(f"{self.name} has no formula to be checked against")

    def added(
        self,
        layout: Layout,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        plan: Plan,
        kv_log_weight: torch.Tensor | None,
        **parameters: torch.Tensor,
    ) -> torch.Tensor | None:
        """What a method that plans adds to attention under its plan; None for nothing.

        Differentiable, and traceable. With its parameters at their initial values it adds 0: what
        is measured of such a method is checked by its plan alone.

        Args:
            q, k, v: as :meth:`attention`, before :meth:`extend`.
            plan: the method's own. kv_log_weight: the plan's and the call's, as in :class:`Call`.
            parameters: those of :meth:`parameters`; missing ones have their initial values.

        Returns:
            ``[B, H, N, D]``.
        """
        return None

    def flops(self, layout: Layout, heads: int, head_dim: int) -> float:
        """FLOPs of :meth:`attention` over one sample, forward: 2 for each multiply-add.

        Matrix products alone, as :meth:`Plan.flops` counts; dense attention has ``4 N² D H``.
        """
        raise ValueError(f"{self.name} plans; Plan.flops says what its plan costs")

    def amount(
        self,
        layout: Layout,
        heads: int | None,
        head_dim: int | None,
        kept: Any = None,
        observed: Amount | None = None,
    ) -> Amount:
        """How much of dense attention the method does on a layout.

        Args:
            heads, head_dim: of a layer; None where nothing tells.
            kept: what :meth:`keep` gave.
            observed: mean over the plans that were made from q and k; None before any.
        """
        if self.computes:
            if heads is None:
                return UNKNOWN
            dense = dense_flops(layout.num_tokens, heads, head_dim)
            return Amount(None, self.flops(layout, heads, head_dim) / dense)
        if isinstance(kept, Plan):
            pairs = kept.num_queries * kept.num_real_keys
            return Amount(kept.density, kept.flops(1) / (4.0 * pairs))
        return observed or UNKNOWN

    @property
    def planner(self) -> Method | None:
        """The method whose plan says which pairs are seen: itself, or one that it runs inside.

        None where no plan does, because the method computes its output by itself.
        """
        return None if self.computes else self

    @property
    def period(self) -> int:
        """Steps of a run after which the method has done all that it does; they cost as a whole."""
        return 1

    @property
    def parts(self) -> tuple[Method, ...]:
        """The methods that this one runs, for some heads or all; none where it is by itself."""
        return ()

    def geometry(self, layout: Layout, device: torch.device) -> Any:
        """What :meth:`attention` needs that depends on the layout alone; kept and handed to it."""
        return None

    def keep(self, layout: Layout, device: torch.device) -> Any:
        """What is made once for a layout and device: a static plan, a geometry, or nothing."""
        with to_be_kept():
            if self.computes:
                return Kept(layout.kv_log_weight(device), self.geometry(layout, device))
            return self.plan(layout).to(device) if self.static else None

    def prepare(self, layout: Layout, device: torch.device) -> None:  # noqa: B027 (optional)
        """Compute and keep what a plan made from q and k needs of the layout alone.

        Once it ran for a layout and device, planning can be traced by ``torch.compile``. What is
        kept is bounded, so call it before every pass: it costs little where nothing is missing.
        """

    def least(self) -> Method:
        """The method without what it keeps for the values of q and k on top of a fixed number.

        Estimates plan it on random q and k: its density is then the least there can be.
        """
        return self

    def extend(
        self, layout: Layout, k: torch.Tensor, v: torch.Tensor, **parameters: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """k and v ``[B, H, N + extra, D]`` with the method's summary tokens appended.

        Args:
            parameters: the method's trainable parameters, as named by :meth:`parameters`.
        """
        return k, v

    def parameters(self, heads: int, head_dim: int) -> dict[str, torch.Tensor]:
        """Initial values of the trainable parameters of one layer; none by default.

        Args:
            heads: query heads of the layer. head_dim: channels of one.
        """
        return {}

    @classmethod
    def ladder(cls, layout: Layout) -> list[dict]:
        """Options to try on a layout, from sparse to dense; none where all of them keep all."""
        return [{}]

    def layer_parameters(
        self, heads: int | None, head_dim: int | None, channels: int | None = None
    ) -> dict[str, torch.Tensor]:
        """:meth:`parameters` of a layer whose hidden states have so many channels."""
        if self.needs_hidden_states:
            return self.parameters(heads, head_dim, channels)
        return self.parameters(heads, head_dim)

    def words(self) -> str:
        """The method and those options that are not at their default."""
        given = [
            f"{f.name}={getattr(self, f.name)!r}"
            for f in dataclasses.fields(self)
            if f.init and getattr(self, f.name) != f.default
        ]
        return f"{type(self).__name__}({', '.join(given)})"

    def to_dict(self) -> dict:
        """Name and options as plain data, for records."""
        return {"name": self.name, **dataclasses.asdict(self)}

    def scale(self, layout: Layout, head_dim: int) -> float | None:
        """The factor of the logits where it is not ``1/sqrt(head_dim)``; None where it is."""
        return None
