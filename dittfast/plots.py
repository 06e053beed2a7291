"""Plots of an evaluation as inline SVG that takes the page's text colour; needs matplotlib."""

from __future__ import annotations

import io
import re
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


def _figure(width: float, height: float):
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ValueError(
            "plots need matplotlib; pip install 'dittfast[report]', or leave them out with "
            "--no-plots"
        ) from error
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.add_subplot()
    axes.tick_params(colors=_INK)
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(_INK)
    axes.grid(alpha=0.25)
    for label in (axes.xaxis.label, axes.yaxis.label, axes.title):
        label.set_color(_INK)
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
    figure.legend(
        loc="outside lower center", ncols=columns, frameon=False, labelcolor=_INK, fontsize=8
    )


def pareto_plot(
    points: Sequence[Point], x_label: str, y_label: str, name: str, larger_x: bool = False
) -> str:
    """Methods by cost and quality, the front of the unbeaten ones joined, as SVG.

    Args:
        name: of the plot, for the ids in it: letters and hyphens.
        larger_x: True where a larger x is better (speed), False for a cost.
    """
    figure, axes = _figure(6.4, 4.4)
    front = pareto_front(points, larger_x)
    axes.plot([p.x for p in front], [p.y for p in front], color=_INK, lw=1, alpha=0.5, zorder=1)
    groups = list(dict.fromkeys(p.group for p in points))
    for number, group in enumerate(groups):
        own = [p for p in points if p.group == group]
        look = {"color": COLORS[number % len(COLORS)], "marker": MARKERS[number % len(MARKERS)]}
        axes.plot([p.x for p in own], [p.y for p in own], ls="", label=group, **look)
        for p in own:
            if p.low is not None:
                axes.plot([p.x, p.x], [p.low, p.high], color=look["color"], lw=1, alpha=0.6)
            axes.annotate(
                p.label, (p.x, p.y), (5, 4), textcoords="offset points", fontsize=8, color=_INK
            )
    axes.set_xlabel(x_label, color=_INK)
    axes.set_ylabel(y_label, color=_INK)
    axes.margins(x=0.15, y=0.1)
    _legend(figure, min(4, len(groups)))
    return _svg(figure, name)


def distance_plot(
    curves: dict[str, Sequence[float]], bins: Sequence[str], uniform: Sequence[float],
    x_label: str, name: str,
) -> str:  # fmt: skip
    """Shares of attention by distance, a line per layer, as SVG; dashed: no preference."""
    figure, axes = _figure(6.4, 4.4)
    for number, (label, shares) in enumerate(curves.items()):
        look = {"color": COLORS[number % len(COLORS)], "marker": MARKERS[number % len(MARKERS)]}
        axes.plot(range(len(bins)), [100 * s for s in shares], label=label, ms=4, lw=1.4, **look)
    axes.plot(range(len(bins)), [100 * s for s in uniform], color=_INK, ls="--", label="uniform")
    axes.set_xticks(range(len(bins)), list(bins))
    axes.set_xlabel(x_label, color=_INK)
    axes.set_ylabel("% of the attention on the grid", color=_INK)
    axes.set_ylim(bottom=0)
    _legend(figure, 2)
    return _svg(figure, name)
