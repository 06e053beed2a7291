"""Plots of an evaluation as inline SVG that takes the page's text colour; needs matplotlib."""

from __future__ import annotations

import io
import re
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass

# Stands for the colour of text and axes, and becomes "currentColor" in the SVG.
_INK = "#010203"
# Okabe and Ito's colours, told apart by the colour-blind too; readable on white and on black.
COLORS = (
    "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#8a6d3b", "#8f7ee0",
)  # fmt: skip
MARKERS = "osD^vPX*"


@dataclass(frozen=True)
class Point:
    """One method: what it costs, how good it is, and its interval."""

    label: str
    group: str
    x: float
    y: float
    low: float | None = None
    high: float | None = None


def pareto_front(points: Sequence[Point], larger_x: bool) -> list[Point]:
    """The points that no other beats in both x and y, in order of x; larger y is better."""
    front = [
        p
        for p in points
        if not any(
            q.y >= p.y and (q.x >= p.x if larger_x else q.x <= p.x) and (q.x, q.y) != (p.x, p.y)
            for q in points
        )
    ]
    return sorted(front, key=lambda p: p.x)


def _figure():
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ValueError(
            "plots need matplotlib; pip install 'dittfast[report]', or leave them out with "
            "--no-plots"
        ) from error
    # As wide as a phone: there 9 pt stay 9 pt, and on a desktop they grow.
    figure = Figure(figsize=(5.0, 4.0), layout="constrained")
    axes = figure.add_subplot()
    axes.tick_params(colors=_INK, labelsize=9)
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(_INK)
    axes.grid(alpha=0.25)
    return figure, axes


def _svg(figure, name: str) -> str:
    """The figure as an ``<svg>`` element; ``name`` keeps its ids apart from other figures'."""
    import matplotlib

    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
        out = io.BytesIO()
        figure.savefig(out, format="svg", transparent=True, metadata={"Date": None})
    text = out.getvalue().decode()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r'(id="|href="#|url\(#)', rf"\g<1>{name}-", text)
    text = re.sub(r'<svg([^>]*?) width="[^"]*"', r"<svg\1", text, count=1)
    text = re.sub(r'<svg([^>]*?) height="[^"]*"', r"<svg\1", text, count=1)
    return text.replace(_INK, "currentColor")


def _legend(figure, columns: int) -> None:
    """Below the axes, in so many columns or as many as there is room for."""
    names = [t for axes in figure.axes for t in axes.get_legend_handles_labels()[1]]
    columns = max(1, min(columns, 64 // max(8 + len(name) for name in names)))
    figure.legend(
        loc="outside lower center", ncols=columns, frameon=False, labelcolor=_INK, fontsize=9
    )


def _name_points(figure, axes, points: Sequence[Point]) -> None:
    """Each point's label beside it, where it hides no point and no other label if there is room."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    renderer = FigureCanvasAgg(figure).get_renderer()
    figure.draw_without_rendering()
    inside = axes.get_window_extent(renderer)
    scale = figure.dpi / 72
    at = [axes.transData.transform((p.x, p.y)) for p in points]
    taken = [(x - 4 * scale, y - 4 * scale, x + 4 * scale, y + 4 * scale) for x, y in at]
    # Right, left, and ever farther above and below.
    places = [
        (side * 6, up, "left" if side > 0 else "right")
        for up in (0, 9, -9, 18, -18, 27, -27)
        for side in (1, -1)
    ]
    for point in points:
        best = None
        for dx, dy, align in places:
            text = axes.annotate(
                point.label, (point.x, point.y), (dx, dy), textcoords="offset points",
                fontsize=9, color=_INK, ha=align, va="center",
            )  # fmt: skip
            box = text.get_window_extent(renderer)
            hidden = sum(
                max(0, min(box.x1, c) - max(box.x0, a)) * max(0, min(box.y1, d) - max(box.y0, b))
                for a, b, c, d in taken
            )
            hidden += (max(0, box.x1 - inside.x1) + max(0, inside.x0 - box.x0)) * box.height
            hidden += (max(0, box.y1 - inside.y1) + max(0, inside.y0 - box.y0)) * box.width
            if best is None or hidden < best[0]:
                if best is not None:
                    best[1].remove()
                best = hidden, text, (box.x0, box.y0, box.x1, box.y1)
            else:
                text.remove()
            if not best[0]:
                break
        taken.append(best[2])


def pareto_plot(
    points: Sequence[Point], x_label: str, y_label: str, name: str, larger_x: bool = False
) -> str:
    """Methods by cost and quality, as SVG: one colour per method, the unbeaten ones underlaid.

    Args:
        name: of the plot, for the ids in it: letters and hyphens.
        larger_x: True where a larger x is better (speed), False for a cost.
    """
    figure, axes = _figure()
    front = pareto_front(points, larger_x)
    axes.plot([p.x for p in front], [p.y for p in front], color=_INK, lw=5, alpha=0.15, zorder=1)
    groups = list(dict.fromkeys(p.group for p in points))
    for number, group in enumerate(groups):
        own = sorted((p for p in points if p.group == group), key=lambda p: p.x)
        look = {"color": COLORS[number % len(COLORS)], "marker": MARKERS[number % len(MARKERS)]}
        axes.plot([p.x for p in own], [p.y for p in own], ls=":", lw=1, label=group, **look)
        for p in own:
            if p.low is not None:
                axes.plot([p.x, p.x], [p.low, p.high], color=look["color"], lw=1, alpha=0.6)
    axes.set_xlabel(textwrap.fill(x_label, 52), color=_INK)
    axes.set_ylabel(y_label, color=_INK)
    axes.margins(x=0.15, y=0.1)
    _legend(figure, min(4, len(groups)))
    _name_points(figure, axes, points)
    return _svg(figure, name)


def distance_plot(
    curves: dict[str, Sequence[float]], bins: Sequence[str], uniform: Sequence[float],
    x_label: str, name: str,
) -> str:  # fmt: skip
    """Shares of attention by distance, a line per layer, as SVG; dashed: no preference.

    Of more layers than there are colours: their mean, and the range that they span.
    """
    figure, axes = _figure()
    places = range(len(bins))
    if len(curves) <= len(COLORS):
        for number, (label, shares) in enumerate(curves.items()):
            look = {"color": COLORS[number], "marker": MARKERS[number]}
            axes.plot(places, [100 * s for s in shares], label=label, ms=4, lw=1.4, **look)
    else:
        columns = [[100 * s for s in column] for column in zip(*curves.values())]
        low, high = ([f(column) for column in columns] for f in (min, max))
        mean = [sum(column) / len(column) for column in columns]
        axes.fill_between(places, low, high, color=COLORS[0], alpha=0.2, lw=0)
        label = f"mean and range of {len(curves)} layers"
        axes.plot(places, mean, label=label, color=COLORS[0], marker="o", ms=4, lw=1.4)
    axes.plot(places, [100 * s for s in uniform], color=_INK, ls="--", label="uniform")
    axes.set_xticks(places, list(bins))
    axes.set_xlabel(x_label, color=_INK)
    axes.set_ylabel("% of the attention on the grid", color=_INK)
    axes.set_ylim(bottom=0)
    _legend(figure, 2)
    return _svg(figure, name)
