"""Pictures of a search: rows of samples with their scores, and curves over rounds."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from .draw import FAINT, HIDDEN, INK, _font, _Page, _wrap, line_height

# Told apart in grey, too: dark, middle, light.
COLORS = ((23, 66, 112), (196, 44, 52), (236, 160, 40), (110, 150, 90))


@dataclass(frozen=True)
class SheetRow:
    """One row of a contact sheet: what it shows, a line below that, and its pictures."""

    title: str
    line: str
    pictures: Sequence[np.ndarray]


def contact_sheet(
    rows: Sequence[SheetRow],
    columns: Sequence[str] = (),
    title: str = "",
    footer: str = "",
    size: int = 128,
) -> Image.Image:
    """Pictures in rows and columns under one title.

    Args:
        rows: at least one, each with uint8 pictures ``[H, W, 3]`` of one shape.
        columns: a caption for each column.
        size: pixels of a picture's longer side.
    """
    if not rows or not all(row.pictures for row in rows):
        raise ValueError("contact_sheet needs at least one row, and a picture in each")
    tiles = [[_scaled(p, size) for p in row.pictures] for row in rows]
    wide, high = tiles[0][0].size
    gap, text, side = 10, 14, 190
    count = max(len(row) for row in tiles)
    width = gap + side + count * (wide + gap)
    head = _wrap(title, _font(17), width - 2 * gap, 2) if title else []
    captions = [_wrap(c, _font(12), wide, 3) for c in columns[:count]]
    foot = _wrap(footer, _font(13), width - 2 * gap, 2) if footer else []
    top = gap + len(head) * line_height(17) + gap
    under = top + max((len(c) for c in captions), default=0) * line_height(12) + gap // 2
    height = under + len(rows) * (high + gap) + len(foot) * line_height(13) + gap
    page = _Page(width, height)
    page.text(gap, gap, head, 17)
    for number, caption in enumerate(captions):
        page.text(gap + side + number * (wide + gap), top, caption, 12, FAINT)
    y = under
    for row, pictures in zip(rows, tiles):
        below = page.text(gap, y, _wrap(row.title, _font(text), side - gap, 3), text)
        page.text(gap, below, _wrap(row.line, _font(13), side - gap, 3), 13, FAINT)
        for number, picture in enumerate(pictures):
            page.image.paste(picture, (gap + side + number * (wide + gap), y))
        y += high + gap
    page.text(gap, y, foot, 13, FAINT)
    return page.image


def _scaled(pixels: np.ndarray, size: int) -> Image.Image:
    image = Image.fromarray(pixels)
    factor = size / max(image.size)
    target = tuple(max(1, round(n * factor)) for n in image.size)
    how = Image.Resampling.LANCZOS if factor < 1 else Image.Resampling.NEAREST
    return image.resize(target, how)


@dataclass(frozen=True)
class Curve:
    """Values over 0, 1, 2 ...; ``error`` is drawn as bars; ``flat`` is one value for all."""

    name: str
    values: tuple[float, ...]
    error: tuple[float, ...] | None = None
    flat: bool = False


def line_chart(
    curves: Sequence[Curve],
    x_names: Sequence[str],
    title: str = "",
    footer: str = "",
    size: tuple[int, int] = (640, 360),
) -> Image.Image:
    """Curves over named places on the x axis, with a legend to the right.

    Args:
        curves: at least one; a flat one is a dashed line through ``values[0]``.
        x_names: what stands below each place.
        size: of the plot itself, in pixels.

    Raises:
        ValueError: no curve, a value that is not finite, or more values than places.
    """
    values = [v for c in curves for v in c.values]
    if not values or not all(map(math.isfinite, values)):
        raise ValueError(f"line_chart needs finite values, got {values}")
    if max(len(c.values) for c in curves) > len(x_names):
        raise ValueError(f"{len(x_names)} places on the x axis are fewer than the values")
    spread = [
        v + s * e for c in curves if c.error for v, e in zip(c.values, c.error) for s in (-1, 1)
    ]
    ticks = _ticks(min(values + spread), max(values + spread))
    width, height = size
    left, gap, side, text = 84, 16, 300, 14
    head = _wrap(title, _font(17), left + width + side - 2 * gap, 2) if title else []
    foot = _wrap(footer, _font(13), left + width + side - 2 * gap, 3) if footer else []
    top = gap + len(head) * line_height(17) + gap
    page = _Page(left + width + side, top + height + 34 + len(foot) * line_height(13) + 2 * gap)
    page.text(gap, gap, head, 17)
    x = lambda n: left + round((n + 0.5) * width / len(x_names))  # noqa: E731
    y = lambda v: top + round(height * (ticks[-1] - v) / (ticks[-1] - ticks[0]))  # noqa: E731
    for tick in ticks:
        page.draw.line((left, y(tick), left + width, y(tick)), fill=HIDDEN, width=1)
        page.draw.text((left - 8, y(tick)), f"{tick:.6g}", fill=FAINT, font=_font(13), anchor="rm")
    for number, name in enumerate(x_names):
        place = (x(number), top + height + 8)
        page.draw.text(place, name, fill=FAINT, font=_font(13), anchor="ma")
    page.draw.rectangle((left, top, left + width, top + height), outline=FAINT, width=1)
    legend = top
    for number, curve in enumerate(curves):
        color = COLORS[number % len(COLORS)]
        if curve.flat:
            at = y(curve.values[0])
            for start in range(left, left + width, 12):
                page.draw.line((start, at, start + 6, at), fill=color, width=2)
        else:
            _draw_curve(page, curve, color, x, y)
        mark = left + width + gap
        page.draw.line((mark, legend + 9, mark + 20, legend + 9), fill=color, width=3)
        names = _wrap(curve.name, _font(text), side - 3 * gap - 24, 3)
        legend = page.text(mark + 28, legend, names, text, INK) + 6
    page.text(gap, top + height + 34 + gap, foot, 13, FAINT)
    return page.image


def _draw_curve(page: _Page, curve: Curve, color, x: Callable, y: Callable) -> None:
    """A line through points with error bars; ``x(place)`` and ``y(value)`` are pixels."""
    points = [(x(n), y(v)) for n, v in enumerate(curve.values)]
    page.draw.line(points, fill=color, width=3)
    for n, (px, py) in enumerate(points):
        page.draw.ellipse((px - 4, py - 4, px + 4, py + 4), fill=color)
        if curve.error:
            ends = [y(curve.values[n] + s * curve.error[n]) for s in (-1, 1)]
            page.draw.line((px, ends[0], px, ends[1]), fill=color, width=1)


def _ticks(low: float, high: float) -> list[float]:
    """Four to nine round numbers from below ``low`` to above ``high``."""
    if high - low < 1e-12 * max(abs(high), abs(low), 1e-12):
        low, high = low - max(abs(low), 1) * 0.05, high + max(abs(high), 1) * 0.05
    raw = (high - low) / 5
    unit = 10.0 ** math.floor(math.log10(raw))
    step = next(m * unit for m in (1, 2, 2.5, 5, 10) if m * unit >= raw)
    first, last = math.floor(low / step), math.ceil(high / step)
    return [n * step for n in range(first, max(last, first + 1) + 1)]
