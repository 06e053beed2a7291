"""Small methods made for tests: a full plan, a block band, and one planned from q and k."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from dittfast.methods.base import Method
from dittfast.plan import Plan


@dataclass(frozen=True)
class Full(Method):
    """Dense attention, through a plan."""

    name: ClassVar[str] = "full"

    def plan(self, layout, q=None, k=None, v=None):
        return Plan.full(layout.num_tokens, block_size=16)


@dataclass(frozen=True)
class Band(Method):
    """Blocks of 16 tokens see ``width`` blocks to either side; position-dependent."""

    name: ClassVar[str] = "band"
    width: int = 1

    def plan(self, layout, q=None, k=None, v=None):
        blocks = layout.blocks(16)
        at = torch.arange(blocks.count)
        return Plan.from_block_mask((at[:, None] - at).abs() <= self.width, blocks, blocks)


@dataclass(frozen=True)
class HeadBand(Band):
    """Blocks see ``width`` blocks to either side in head 0 and one more in every further head."""

    name: ClassVar[str] = "head_band"
    heads: int = 2

    def plan(self, layout, q=None, k=None, v=None):
        blocks = layout.blocks(16)
        at = torch.arange(blocks.count)
        reach = self.width + torch.arange(self.heads)[:, None, None]
        return Plan.from_block_mask((at[:, None] - at).abs() <= reach, blocks, blocks)


@dataclass(frozen=True)
class FirstKeys(Method):
    """A dynamic method: every head sees the block itself and the one with the largest k."""

    name: ClassVar[str] = "first_keys"
    static: ClassVar[bool] = False

    def plan(self, layout, q=None, k=None, v=None, scale=None, kv_log_weight=None):
        blocks = layout.blocks(16)
        largest = torch.stack(
            [
                k[:, :, s : s + n].abs().amax((-1, -2))
                for s, n in zip(blocks.starts, blocks.lengths)
            ],
            -1,
        ).argmax(-1)
        at = torch.arange(blocks.count)
        mask = (at[:, None] == at) | (at == largest[..., None, None])
        return Plan.from_block_mask(mask, blocks, blocks)
