"""What every attention method is: a frozen config that turns a Layout into a Plan."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch

from ..layout import Layout
from ..plan import Plan


@dataclass(frozen=True)
class Method(ABC):
    """Base of all methods: a planner. It touches no kernel, and no kernel knows a method.

    Subclasses are frozen dataclasses whose fields are the method's options, validated in
    ``__post_init__`` with errors that name the value and the allowed range.

    Class attributes:
        name: short public name, the key in :data:`dittfast.methods.METHODS`.
        static: True if the plan depends on the layout alone, so that it can be cached; False if
            it is made from q and k at every call.
        needs_grid: True if the method has no meaning for a text-only layout.
        for_videos: True if the method tells frames apart, so that benchmarks give it a video.
        dense: True if every token sees every valid one, so that the model's own attention does.
    """

    name: ClassVar[str]
    static: ClassVar[bool] = True
    needs_grid: ClassVar[bool] = True
    for_videos: ClassVar[bool] = False
    dense: ClassVar[bool] = False

    @abstractmethod
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
        """

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

    def parameters(self) -> dict[str, torch.Tensor]:
        """Initial values of the trainable parameters one layer has; none by default."""
        return {}

    def scale(self, layout: Layout, head_dim: int) -> float | None:
        """The factor of the logits where it is not ``1/sqrt(head_dim)``; None where it is."""
        return None
