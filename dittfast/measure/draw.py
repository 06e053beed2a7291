"""Pictures for people: a plan's block mask, and dense and sparse results side by side."""

from __future__ import annotations

import bisect
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps

from ..block_lists import block_states
from ..layout import Blocks, Context, Layout
from ..plan import Plan

INK, FAINT, PAPER = (28, 32, 38), (98, 106, 116), (255, 255, 255)
# Dark, light and grey differ in brightness too, so that they survive a grey printer.
FULL, PARTIAL, HIDDEN = (23, 66, 112), (132, 178, 224), (240, 240, 237)
DROPPED = (190, 46, 40)
FRAME_LINE, SEGMENT_LINE = (236, 160, 40), (196, 44, 52)
PANEL = 256  # least width of a picture in a comparison, in pixels


def _font(size: int):
    return ImageFont.load_default(size)


@lru_cache(maxsize=4096)
def _has_glyph(character: str) -> bool:
    font = _font(16)
    missing = font.getmask("\uffff")
    drawn = font.getmask(character)
    return drawn.size != missing.size or bytes(drawn) != bytes(missing)


def printable(text: str) -> str:
    """``text`` in the letters Pillow's built-in font has: accents go, what is unknown becomes ?."""
    out = []
    for character in " ".join(text.split()):
        if not _has_glyph(character):
            base = unicodedata.normalize("NFKD", character)[0]
            character = base if base != character and _has_glyph(base) else "?"
        out.append(character)
    return "".join(out)


def _wrap(text: str, font, width: float, max_lines: int) -> list[str]:
    """``text`` broken at spaces into lines at most ``width`` wide; what is cut ends in dots."""
    # No letter is narrower than a pixel: what lies beyond cannot be shown.
    lines, words = [""], printable(text[: int(width + 2) * max_lines]).split()
    for word in words:
        longer = f"{lines[-1]} {word}".strip()
        if font.getlength(longer) <= width or not lines[-1]:
            lines[-1] = longer
        else:
            lines.append(word)
    cut = len(lines) > max_lines
    return [
        _fitted(line, font, width, cut and number == max_lines - 1)
        for number, line in enumerate(lines[:max_lines])
    ]


def _fitted(line: str, font, width: float, dots: bool) -> str:
    """``line``, or as much of its beginning as fits with dots behind it."""
    if not dots and font.getlength(line) <= width:
        return line
    fits = lambda n: font.getlength(line[:n].rstrip() + "...") <= width  # noqa: E731
    count = bisect.bisect_left(range(1, len(line) + 1), True, key=lambda n: not fits(n))
    return line[:count].rstrip() + "..."


class _Page:
    """A white picture that text is put on from top to bottom."""

    def __init__(self, width: int, height: int):
        self.image = Image.new("RGB", (width, height), PAPER)
        self.draw = ImageDraw.Draw(self.image)

    def text(self, x: float, y: float, lines: Sequence[str], size: int, fill=INK) -> float:
        """Write lines from the top left corner (x, y); the y below them."""
        for line in lines:
            self.draw.text((x, y), line, fill=fill, font=_font(size), anchor="la")
            y += line_height(size)
        return y


def line_height(size: int) -> int:
    return round(size * 1.35)


@dataclass(frozen=True)
class Panel:
    """One picture of a comparison: what it is called and the numbers below its name."""

    image: Image.Image
    title: str
    lines: tuple[str, ...] = ()


def difference(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, int]:
    """``|a - b|`` brightened by a power of two so that it can be seen, and that factor.

    The factor is the largest for which at most 1 % of the values are cut off, up to 64.

    Args:
        a, b: uint8 arrays of one shape: pictures ``[H, W, 3]`` or videos ``[F, H, W, 3]``.
    """
    if a.shape != b.shape or a.dtype != np.uint8 or b.dtype != np.uint8:
        raise ValueError(
            f"expected two uint8 arrays of one shape, got {a.dtype} {a.shape} and "
            f"{b.dtype} {b.shape}"
        )
    apart = np.maximum(a, b) - np.minimum(a, b)
    high = float(np.quantile(apart, 0.99))
    gain = 1
    while apart.any() and gain < 64 and high * gain * 2 <= 255:
        gain *= 2
    return np.minimum(apart.astype(np.uint16) * gain, 255).astype(np.uint8), gain


def _enlarged(image: Image.Image) -> Image.Image:
    """Small pictures with every pixel repeated, so that the text below has room."""
    factor = max(1, -(-PANEL // image.width))
    if factor == 1:
        return image.convert("RGB")
    size = (image.width * factor, image.height * factor)
    return image.convert("RGB").resize(size, Image.Resampling.NEAREST)


def compare(panels: Sequence[Panel], title: str = "", footer: str = "") -> Image.Image:
    """Pictures side by side, each with its name and numbers, under one title.

    Args:
        panels: at least one; pictures narrower than 256 px are enlarged pixel by pixel.
        title, footer: one line each, wrapped to two where long; empty for none.
    """
    if not panels:
        raise ValueError("compare needs at least one panel")
    images = [_enlarged(p.image) for p in panels]
    size = max(15, min(p.width for p in images) // 26)
    small = max(13, round(size * 0.88))
    gap = size
    width = sum(i.width for i in images) + gap * (len(images) + 1)
    head = _wrap(title, _font(size), width - 2 * gap, 2) if title else []
    foot = _wrap(footer, _font(small), width - 2 * gap, 2) if footer else []
    texts = []
    for panel, image in zip(panels, images):
        names = _wrap(panel.title, _font(size), image.width, 2)
        texts.append(
            (names, [w for line in panel.lines for w in _wrap(line, _font(small), image.width, 2)])
        )
    deepest = max(len(n) * line_height(size) + len(t) * line_height(small) for n, t in texts)
    top = gap + len(head) * line_height(size) + (gap // 2 if head else 0)
    under = top + max(i.height for i in images) + gap // 2
    below = under + deepest
    height = below + gap + (len(foot) * line_height(small) + gap // 2 if foot else 0)
    page = _Page(width, height)
    page.text(gap, gap, head, size)
    x = gap
    for image, (names, lines) in zip(images, texts):
        page.image.paste(image, (x, top))
        y = page.text(x, under, names, size)
        page.text(x, y, lines, small, FAINT)
        x += image.width + gap
    page.text(gap, below + gap // 2, foot, small, FAINT)
    return page.image


def _shares(plan: Plan, batch: int, head: int, cells: int) -> tuple[np.ndarray, np.ndarray]:
    """Share of full and of partial blocks ``[rows, columns]``, at most ``cells`` each way."""
    lists = plan.kv_indices.shape
    for name, index, size in (("batch", batch, lists[0]), ("head", head, lists[1])):
        if not 0 <= index < size:
            raise ValueError(f"{name} must lie in 0..{size - 1} for this plan, got {index}")
    one = (plan.kv_indices, plan.kv_num_blocks, plan.kv_num_full_blocks)
    state = block_states(*(x[batch, head] for x in one), plan.kv_blocks.count).cpu().numpy()
    rows, columns = np.nonzero(state)
    # Row and column numbers in order of position, whatever order the plan lists its blocks in.
    place = [
        np.argsort(np.argsort(b.starts.cpu().numpy())) for b in (plan.q_blocks, plan.kv_blocks)
    ]
    step = max(1, -(-max(plan.q_blocks.count, plan.kv_blocks.count) // cells))
    shape = tuple(-(-b.count // step) for b in (plan.q_blocks, plan.kv_blocks))
    at = place[0][rows] // step, place[1][columns] // step
    is_full = state[rows, columns] == 2
    counts = np.zeros((2, *shape))
    np.add.at(counts[0], tuple(x[is_full] for x in at), 1)
    np.add.at(counts[1], tuple(x[~is_full] for x in at), 1)
    size = [np.bincount(np.arange(b.count) // step) for b in (plan.q_blocks, plan.kv_blocks)]
    counts /= size[0][:, None] * size[1]
    return counts[0], counts[1]


def _shaded(full: np.ndarray, partial: np.ndarray, size: int) -> Image.Image:
    """A cell for every share, as large as fits into ``size`` pixels."""
    colours = np.array([HIDDEN, PARTIAL, FULL], dtype=np.float64)
    shade = np.stack([1 - full - partial, partial, full], -1) @ colours
    image = Image.fromarray(np.clip(np.rint(shade), 0, 255).astype(np.uint8))
    scale = max(1, size // max(full.shape))
    return image.resize((image.width * scale, image.height * scale), Image.Resampling.NEAREST)


def _marks(layout: Layout, blocks: Blocks):
    """Where segments and frames begin, in blocks: two lists of ``(place, name)``.

    Frames are left out where the block order mixes them.
    """
    starts, lengths = (x.cpu().numpy().astype(np.int64) for x in (blocks.starts, blocks.lengths))
    by = np.argsort(starts)
    edges = np.append(starts[by], (starts + lengths).max())
    in_blocks = lambda position: float(np.interp(position, edges, np.arange(edges.size)))  # noqa: E731
    frame_of = np.pad(
        layout.coordinates()[:, 1], (0, edges[-1] - layout.num_tokens), constant_values=-1
    )
    if blocks.order is not None:
        frame_of = frame_of[blocks.order.cpu().numpy()]
    segments, frames = [], []
    for start, segment in layout.spans():
        if isinstance(segment, Context):
            segments.append((in_blocks(start), "text"))
            continue
        segments.append((in_blocks(start), "video" if segment.frames > 1 else "image"))
        inside = frame_of[start : start + segment.length]
        if segment.frames > 1 and (np.diff(inside) >= 0).all():
            first = start + np.arange(segment.frames) * segment.tokens_per_frame
            frames += [(in_blocks(p), str(n)) for n, p in enumerate(first)]
    if edges[-1] > layout.num_tokens:
        segments.append((in_blocks(layout.num_tokens), "pooled"))
    return segments, frames


def block_mask(
    plan: Plan,
    layout: Layout | None = None,
    *,
    title: str = "",
    lines: Sequence[str] = (),
    batch: int = 0,
    head: int = 0,
    size: int = 720,
    legend_below: bool = False,
) -> Image.Image:
    """The block mask of a plan, one cell a block: queries from top to bottom, keys to the right.

    Args:
        layout: marks where text, images and frames begin; None for no marks.
        title: shown above; ``lines`` are shown beside the mask, below its legend.
        batch, head: which list of the plan to draw.
        size: about how many pixels the longer side of the mask gets. A plan with more blocks
            than that is drawn with several blocks to a pixel, shaded by their mean.
        legend_below: legend and lines below the mask instead of beside it, for narrow pages.

    Raises:
        ValueError: a batch row or head that the plan does not have.
    """
    full, partial = _shares(plan, batch, head, size)
    mask = _shaded(full, partial, size)

    text, side = 15, 285
    axes = [_axis(layout, b, n) for b, n in zip((plan.q_blocks, plan.kv_blocks), mask.size[::-1])]
    legend = _legend(full, partial, axes[1])
    notes = [w for line in lines for w in _wrap(line, _font(text), side, 3)]

    left = 78
    width = left + (max(mask.width, side) if legend_below else mask.width + 30 + side) + 20
    heading = _wrap(title, _font(19), width - 40, 2) if title else []
    top = 16 + len(heading) * line_height(19) + 68
    words = (len(legend) + len(notes) + 2) * (line_height(text) + 4)
    height = mask.height + 20 + words if legend_below else max(mask.height, words)
    page = _Page(width, top + height + 20)
    page.text(20, 16, heading, 19)
    page.image.paste(mask, (left, top))
    _draw_axes(page, plan, axes, mask.size, (left, top))

    x, y = (left, top + mask.height + 20) if legend_below else (left + mask.width + 30, top)
    for colour, meaning, is_line in legend:
        if is_line:
            page.draw.line((x, y + 9, x + 20, y + 9), fill=colour, width=2)
        else:
            page.draw.rectangle((x, y + 2, x + 20, y + 16), fill=colour, outline=FAINT)
        page.text(x + 30, y, [meaning], text)
        y += line_height(text) + 4
    page.text(x, y + line_height(text) // 2, notes, text)
    return page.image


def _legend(full: np.ndarray, partial: np.ndarray, axis: _Axis) -> list[tuple[tuple, str, bool]]:
    """Colour, meaning, and whether it is a line, of what the mask shows."""
    legend = [(FULL, "every token pair kept", False)]
    if partial.any():
        legend.append((PARTIAL, "some token pairs kept", False))
    if (full + partial < 1).any():
        legend.append((HIDDEN, "never computed", False))
    if len(axis.segments) > 1:
        legend.append((SEGMENT_LINE, "first token of a segment", True))
    if axis.frames:
        legend.append((FRAME_LINE, "first token of a frame", True))
    return legend


def kept_mass(
    maps: Sequence[Sequence[tuple[np.ndarray, np.ndarray, str]]],
    *,
    title: str = "",
    names: Sequence[str] = (),
    cell: int = 220,
) -> Image.Image:
    """Where dense attention puts its mass, and how much of that a plan keeps: a panel per head.

    Args:
        maps: rows of panels, a row per layer. A panel is ``(mass, kept, label)``:
            attention between blocks ``[nQ, nK]``, bool of the same shape, and a line below.
        names: a line above each row.
        cell: pixels a panel is wide, at least.

    Kept block pairs are blue and dropped ones red, both the darker the more mass they hold.
    """
    most = max(max(mass.shape) for row in maps for mass, _, _ in row)
    scale = max(1, cell // most)
    pictures = [[_mass_picture(mass, kept, scale) for mass, kept, _ in row] for row in maps]
    width = max(p.width for row in pictures for p in row)
    columns, gap, small = max(map(len, maps)), 14, 13
    row_height = [
        line_height(15) + max(p.height for p in row) + 2 * line_height(small) + gap
        for row in pictures
    ]
    total = max(640, gap + columns * (width + gap))
    heading = _wrap(title, _font(18), total - 2 * gap, 3) if title else []
    top = gap + len(heading) * line_height(18) + line_height(small) + gap
    page = _Page(total, top + sum(row_height) + gap)
    y = page.text(gap, gap, heading, 18)
    x = gap
    for colour, meaning in ((FULL, "kept"), (DROPPED, "dropped")):
        page.draw.rectangle((x, y + 3, x + 14, y + 15), fill=colour)
        page.text(x + 20, y, [meaning], small, FAINT)
        x += 100
    words = "darker: more attention (root scale); queries down, keys across"
    page.text(x, y, [words], small, FAINT)
    y = top
    for number, (row, drawn) in enumerate(zip(maps, pictures)):
        if number < len(names):
            page.text(gap, y, _wrap(names[number], _font(15), total - 2 * gap, 1), 15)
        for column, ((_, _, label), picture) in enumerate(zip(row, drawn)):
            x = gap + column * (width + gap)
            page.image.paste(picture, (x, y + line_height(15)))
            lines = _wrap(label, _font(small), width, 2)
            page.text(x, y + line_height(15) + picture.height + 2, lines, small, FAINT)
        y += row_height[number]
    return page.image


def _mass_picture(mass: np.ndarray, kept: np.ndarray, scale: int) -> Image.Image:
    # A root shows small shares too; relative to the largest of the panel.
    depth = np.sqrt(mass / max(float(mass.max()), 1e-30))[..., None]
    ink = np.where(kept[..., None], np.array(FULL, float), np.array(DROPPED, float))
    shade = depth * ink + (1 - depth) * np.array(PAPER, float)
    picture = Image.fromarray(np.clip(np.rint(shade), 0, 255).astype(np.uint8))
    size = picture.width * scale, picture.height * scale
    return ImageOps.expand(picture.resize(size, Image.Resampling.NEAREST), 1, FAINT)


@dataclass(frozen=True)
class _Axis:
    """Pixel offsets along one side of a mask, with names."""

    segments: list[tuple[int, str]]
    frames: list[tuple[int, str]]


def _axis(layout: Layout | None, blocks, pixels: int) -> _Axis:
    if layout is None:
        return _Axis([], [])
    segments, frames = _marks(layout, blocks)
    return _Axis(
        *([(round(at * pixels / blocks.count), name) for at, name in x] for x in (segments, frames))
    )


def _draw_axes(page: _Page, plan: Plan, axes: Sequence[_Axis], size, corner) -> None:
    """Lines and names of segments and frames, and how many blocks there are, on both sides."""
    left, top = corner
    width, height = size
    edge = left + width - 1, top + height - 1
    for axis, vertical in zip(axes, (False, True)):
        steps = [b[0] - a[0] for a, b in zip(axis.frames, axis.frames[1:])]
        # At least 26 px between numbers; lines between them only where that stays uncluttered.
        number = -(-26 // max(1, min(steps, default=26)))
        every = 1 if min(steps, default=26) >= 12 else number
        lines = [(at, FRAME_LINE, 1) for at, _ in axis.frames[::every]]
        lines += [(at, SEGMENT_LINE, 2) for at, _ in axis.segments]
        for at, colour, thick in lines:
            ends = (left + at, top, left + at, edge[1])
            if not vertical:
                ends = (left, top + at, edge[0], top + at)
            if at:
                page.draw.line(ends, fill=colour, width=thick)
        for at, name in axis.frames[::number]:
            place, anchor = (
                ((left + at, top - 19), "la") if vertical else ((left - 6, top + at), "ra")
            )
            page.draw.text(place, name, fill=INK, font=_font(13), anchor=anchor)
        free = 0  # where the name before ends: those of short segments would overlap
        for at, name in axis.segments:
            if vertical:
                x = max(left + at, free)
                page.text(x, top - 40, [name], 14)
                free = x + round(_font(14).getlength(name)) + 6
            else:
                label = _turned(name, 14, INK)
                y = min(max(top + at, free), page.image.height - label.height - 4)
                page.image.paste(label, (left - 50, y))
                free = y + label.height + 6
    page.draw.rectangle((left - 1, top - 1, left + width, top + height), outline=FAINT, width=1)
    page.text(left, top - 62, [f"key blocks 0 to {plan.kv_blocks.count - 1}"], 14, FAINT)
    label = _turned(f"query blocks 0 to {plan.q_blocks.count - 1}", 14, FAINT)
    page.image.paste(label, (left - 72, top))


def _turned(text: str, size: int, fill) -> Image.Image:
    page = _Page(round(_font(size).getlength(text)) + 2, line_height(size))
    page.text(0, 0, [text], size, fill)
    return page.image.rotate(90, expand=True)
