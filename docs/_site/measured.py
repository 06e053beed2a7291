"""The page of measured numbers: tables and charts of the JSON files in docs/."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable
from html import escape
from pathlib import Path

from dittfast.measure.summary import kept

INTRODUCTION = """\
# Measured numbers

Drawn from the JSON files that the commands wrote; each is linked. Only ratios carry over to other
machines. [Performance](performance.md) and [quality](quality.md) say what they mean.
"""
_WIDTH, _HEIGHT, _LEFT, _BOTTOM = 640, 320, 62, 44
_COLOURS = ("#3b6fb6", "#c2571a", "#3d8a4e", "#8a4fa3", "#8c6d1f")


def table(head: Iterable[str], rows: Iterable[Iterable[object]]) -> str:
    """A Markdown table."""
    lines = [list(head)]
    lines += [[str(cell) for cell in row] for row in rows]
    text = ["| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines]
    return "\n".join([text[0], "|" + "---|" * len(lines[0]), *text[1:]]) + "\n"


def spread(values: dict, form: str = ".2f", factor: float = 1.0) -> str:
    """Median and, in brackets, the 20th and 80th percentile."""
    low, middle, high = (format(values[p] * factor, form) for p in ("p20", "p50", "p80"))
    return f"{middle} ({low} to {high})"


def chart(
    series: dict[str, list[tuple[float, float]]],
    x: str,
    y: str,
    words: str,
    log: bool = False,
    lines: bool = True,
) -> str:
    """A chart as inline SVG in the page's own ink, with words for those who cannot see it."""
    scale = math.log10 if log else float
    xs, ys = zip(*(point for points in series.values() for point in points))

    def placed(value: float, values, size: float) -> float:
        low, high = (scale(v) for v in (min(values), max(values)))
        return 0.05 * size + 0.9 * size * (scale(value) - low) / ((high - low) or 1)

    def at(point: tuple[float, float]) -> tuple[float, float]:
        return (
            _LEFT + placed(point[0], xs, _WIDTH - _LEFT),
            _HEIGHT - _BOTTOM - placed(point[1], ys, _HEIGHT - _BOTTOM),
        )

    out = [
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{escape(words)}" '
        'style="max-width:40rem;width:100%" fill="currentColor" font-size="13">',
        f'<path d="M{_LEFT} 0V{_HEIGHT - _BOTTOM}H{_WIDTH}" fill="none" stroke="currentColor" '
        'opacity=".5"/>',
    ]
    for value in sorted({min(xs), max(xs)}):
        place = at((value, ys[0]))[0]
        out.append(
            f'<text x="{place:.0f}" y="{_HEIGHT - _BOTTOM + 18}" text-anchor="middle">{value:,g}'
            "</text>"
        )
    for value in sorted({min(ys), max(ys)}):
        place = at((xs[0], value))[1]
        out.append(
            f'<text x="{_LEFT - 6}" y="{place + 4:.0f}" text-anchor="end">{value:.3g}</text>'
        )
    out.append(
        f'<text x="{(_WIDTH + _LEFT) / 2:.0f}" y="{_HEIGHT - 6}" text-anchor="middle">{escape(x)}'
        f'</text><text x="{_LEFT + 8}" y="16">{escape(y)}</text>'
    )
    for number, (name, points) in enumerate(series.items()):
        colour = _COLOURS[number % len(_COLOURS)]
        places = [at(point) for point in sorted(points)]
        if lines and len(places) > 1:
            path = " ".join(f"{px:.1f},{py:.1f}" for px, py in places)
            out.append(
                f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"/>'
            )
        out += [f'<circle cx="{px:.1f}" cy="{py:.1f}" r="4" fill="{colour}"/>' for px, py in places]
        px, py = places[-1]
        anchor = "end" if px > 0.7 * _WIDTH else "start"
        shift = -8 if anchor == "end" else 8
        out.append(
            f'<text x="{px + shift:.0f}" y="{max(py - 8, 14):.0f}" '
            f'text-anchor="{anchor}" fill="{colour}">'
            f"{escape(name)}</text>"
        )
    return "".join(out) + "</svg>\n"


def attention(data: dict) -> str:
    """``dittfast bench attention``."""
    rows = data["rows"]
    head = ("method", "tokens", "density", "efficiency", "dense time / time", "backend, dtype")
    cells = [
        (
            r["method"]["name"],
            f"{r['tokens']:,}",
            kept(r["density"], r.get("work")),
            spread(r["useful_efficiency"]),
            spread(r["speedup"]),
            f"{r['backend']}, {r['dtype']}",
        )
        for r in rows
    ]
    return "Efficiency is dense time x density / time.\n\n" + table(head, cells)


def growth(data: dict) -> str:
    """``dittfast bench growth``."""
    series = {
        m["method"]["name"]: [(r["tokens"], r["seconds"]["p50"]) for r in m["rows"]]
        for m in data["methods"]
    }
    series["dense"] = [
        (r["tokens"], r["dense_seconds"]["p50"])
        for r in data["methods"][0]["rows"]
        if r["dense_seconds"]
    ]
    ends = "; ".join(
        f"{name} from {min(points)[1]:.3g} to {max(points)[1]:.3g}"
        for name, points in series.items()
    )
    words = f"Seconds against tokens, both in log scale: {ends}"
    cells = [
        (
            m["method"]["name"],
            f"{r['tokens']:,}",
            kept(r["density"], r.get("work"), 4),
            spread(r["seconds"], ".3g"),
            spread(r["dense_seconds"], ".3g") if r["dense_seconds"] else "not measured",
            f"{r['plan_bytes']:,}",
        )
        for m in data["methods"]
        for r in m["rows"]
    ]
    head = ("method", "tokens", "density", "seconds", "dense seconds", "bytes of the plan")
    return chart(series, "tokens", "seconds", words, log=True) + "\n" + table(head, cells)


def overhead(data: dict) -> str:
    """``dittfast bench overhead``."""
    cells = [
        (
            r["model"],
            f"{r['tokens']:,}",
            spread(r["seconds"]["stock"], ".2f"),
            spread(r["overhead"]["enabled"], ".1f", 100),
            spread(r["overhead"]["full_plan"], ".1f", 100),
        )
        for r in data["rows"]
    ]
    head = ("model", "tokens", "stock, s", "enabled, dense: % more", "full plan: % more")
    return table(head, cells)


def fidelity(data: dict) -> str:
    """``dittfast evaluate fidelity``."""
    rows = [m for m in data["methods"] if m["pooled"]["psnr_db"]["mean"] is not None]
    planned = [m for m in rows if m["density"] is not None]
    points = {m["label"]: [(m["density"], m["pooled"]["psnr_db"]["mean"])] for m in planned}
    said = "; ".join(f"{name} {p[0][1]:.1f} dB at {p[0][0]:.2f}" for name, p in points.items())
    words = f"PSNR to dense attention against density: {said}"
    cells = []
    for m in rows:
        psnr, ssim = m["pooled"]["psnr_db"], m["pooled"]["ssim"]
        cells.append(
            (
                f"`{m['label']}`",
                kept(m["density"], m.get("work")),
                f"{psnr['mean']:.2f} ({psnr['low']:.2f} to {psnr['high']:.2f})",
                f"{ssim['mean']:.4f}",
            )
        )
    intro = f"{data['model']}, {len(data['items'])} prompts; intervals over prompts.\n\n"
    picture = chart(points, "density", "PSNR, dB", words, lines=False)
    return intro + picture + "\n" + table(("method", "density", "PSNR, dB", "SSIM"), cells)


TASKS: dict[str, tuple[str, Callable[[dict], str]]] = {
    "attention": ("Attention", attention),
    "growth": ("Growth with the number of tokens", growth),
    "overhead": ("What enabling costs by itself", overhead),
    "fidelity": ("Pictures against dense attention", fidelity),
}


def measured_page(folder: Path) -> str:
    """The page as Markdown: a section for each file of a known task."""
    parts = [INTRODUCTION]
    for path in sorted(folder.glob("*.json")):
        data = json.loads(path.read_text(encoding="utf-8"))
        if data.get("task") not in TASKS:
            continue
        title, show = TASKS[data["task"]]
        device, versions = data["device"], data["versions"]
        threads = f", {device['threads']} threads" if "threads" in device else ""
        where = f"{device['name']}{threads}; torch {versions['torch']}"
        parts.append(
            f"## {title}: {path.stem}\n\n[{path.name}]({path.name}); {where}.\n\n{show(data)}"
        )
    return "\n".join(parts)
