"""Dense attention as a method: the baseline, and what a schedule runs where nothing is sparse."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from ..layout import Layout
from ..plan import Plan
from .base import Method
from .checks import check_block_size


@dataclass(frozen=True)
class Dense(Method):
    """Every token sees every valid token.

    Args:
        block_size: tokens in a block, 1 to 256. It changes the speed, not the result.

    Raises:
        ValueError: a block size out of range.
    """

    name: ClassVar[str] = "dense"
    needs_grid: ClassVar[bool] = False
    dense: ClassVar[bool] = True

    block_size: int = 128

    def __post_init__(self):
        check_block_size(self.block_size)

    def plan(
        self, layout: Layout, q: torch.Tensor | None = None, k: torch.Tensor | None = None
    ) -> Plan:
        return Plan.full(
            layout.num_tokens, block_size=self.block_size, kv_log_weight=layout.kv_log_weight()
        )
