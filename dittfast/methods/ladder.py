"""What the ladders of methods are made of: settings from sparse to dense that suit a layout."""

from __future__ import annotations

from ..layout import Layout

# Shares of key blocks that are kept.
SHARES = (0.05, 0.1, 0.2, 0.35, 0.5)
# Radii of windows, as shares of the grid's shorter side.
_RADII = (1 / 16, 3 / 32, 1 / 8, 3 / 16, 1 / 4, 3 / 8)


def radii(layout: Layout) -> list[float]:
    """Radii of windows in tokens, the smallest first."""
    side = min(layout.grid.height, layout.grid.width)
    return [side * part for part in _RADII]


def block_for(layout: Layout) -> int:
    """Tokens of a block, 16 to 64, so that there are 32 or more in all."""
    return next((size for size in (64, 32) if layout.num_tokens >= 32 * size), 16)
