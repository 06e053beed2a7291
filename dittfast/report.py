"""One self-contained HTML page about an evaluation, and the same as Markdown and JSON."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Sequence
from html import escape
from pathlib import Path

import numpy as np
from PIL import Image

from .draw import difference
from .plots import Point, distance_plot, pareto_plot
from .tables import Table, fid_table, fidelity_tables, latency_table, setting_of

_STYLE = """
:root { color-scheme: light dark; --ink: #1c2026; --faint: #5c646e; --paper: #fff;
  --line: #d9dde2; --soft: #f4f5f7; --link: #0b5cad; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e8eb; --faint: #a2a9b3; --paper: #14171b;
  --line: #363b43; --soft: #1e2228; --link: #7db7f2; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1.2rem; max-width: 76rem; background: var(--paper);
  color: var(--ink); font: 16px/1.5 system-ui, sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 1.6rem; line-height: 1.2; margin: .4rem 0; }
h2 { font-size: 1.2rem; margin: 2.2rem 0 .6rem; }
h3 { font-size: 1rem; margin: 1.4rem 0 .4rem; }
p, li, figcaption, small { max-width: 46rem; }
.faint, figcaption { color: var(--faint); font-size: .875rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: .875rem; font-variant-numeric: tabular-nums;
  overflow-wrap: normal; }
th, td { padding: .35rem .7rem; border-bottom: 1px solid var(--line); text-align: left;
  white-space: nowrap; }
th { white-space: normal; vertical-align: bottom; background: var(--soft); }
.plots { display: grid; gap: 1.2rem; grid-template-columns: repeat(auto-fit,
  minmax(min(100%, 24rem), 1fr)); }
.plots svg, img { max-width: 100%; height: auto; display: block; }
.pictures { display: grid; gap: .8rem; grid-template-columns: repeat(auto-fill,
  minmax(8.5rem, 1fr)); }
.pair { display: grid; grid-template-columns: 1fr 1fr; gap: 2px; grid-column: span 2; }
.pair figcaption { grid-column: span 2; }
.pictures img { width: 100%; background: var(--soft); }
.masks { display: grid; gap: 1rem; grid-template-columns: repeat(auto-fill,
  minmax(min(100%, 20rem), 1fr)); }
figure { margin: 0; }
pre { background: var(--soft); padding: .8rem; overflow-x: auto; font-size: .8rem; }
"""


def read_results(folder: str | Path) -> dict:
    """``{"fidelity", "latency", "fid"}``: what ``dittfast evaluate`` wrote there; None where not.

    Raises:
        FileNotFoundError: the folder is not there, or holds no fidelity.json.
        ValueError: a file that is no such result.
    """
    folder = Path(folder)
    if not (folder / "fidelity.json").is_file():
        raise FileNotFoundError(
            f"{folder} holds no fidelity.json; run dittfast evaluate fidelity -o {folder} first"
        )
    found = {}
    for name in ("fidelity", "latency", "fid"):
        path = folder / f"{name}.json"
        found[name] = None
        if path.is_file():
            try:
                found[name] = json.loads(path.read_text(encoding="utf-8"))
                right = found[name]["task"] == name
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(f"{path} is no result of dittfast evaluate: {error}") from error
            if not right:
                raise ValueError(f"{path} is a result of {found[name]['task']}, not of {name}")
    return found


def tables_of(results: dict) -> list[Table]:
    """Every table there is, fidelity first."""
    tables = fidelity_tables(results["fidelity"])
    if results["latency"]:
        tables.append(latency_table(results["latency"]))
    if results["fid"]:
        tables.append(fid_table(results["fid"]))
    return tables


def _points(results: dict) -> list[tuple[list[Point], str, str, bool]]:
    """The Pareto plots: (points, x label, name, larger x is better)."""
    work, speed = [], []
    timed = {row["label"]: row for row in (results["latency"] or {"rows": []})["rows"]}
    for row in results["fidelity"]["methods"]:
        psnr = row["pooled"]["psnr_db"]
        if psnr["mean"] is None:
            continue
        about = (row["label"], row["method"]["name"])
        rest = (psnr["mean"], psnr["low"], psnr["high"])
        if row["checked"]["work"] is not None:
            work.append(Point(*about, row["checked"]["work"], *rest))
        if row["label"] in timed:
            speed.append(Point(*about, timed[row["label"]]["end_to_end"]["p50"], *rest))
        elif not timed and row["dense_over_method_seconds"]:
            speed.append(Point(*about, row["dense_over_method_seconds"]["median"], *rest))
    what = "dense seconds / method seconds, whole call"
    what += "" if timed else " (one call each, rough)"
    plots = [
        (speed, what, "speed", True),
        (work, "FLOPs of attention, as a fraction of dense", "work", False),
    ]
    return [plot for plot in plots if plot[0]]


def _plots(results: dict) -> list[tuple[str, str]]:
    """SVG and caption of every plot."""
    found = []
    for points, x_label, name, larger in _points(results):
        svg = pareto_plot(points, x_label, "PSNR to dense, dB", f"pareto-{name}", larger)
        side = "right" if larger else "left"
        found.append((svg, f"Better is up and to the {side}; the line joins what nothing beats."))
    structure = results["fidelity"].get("structure") or []
    kinds = [("space", "bins", "distance in tokens"), ("frames", "frame_bins", "frames apart")]
    for kind, bins, x_label in kinds:
        first = structure[0] if structure else None
        if first is None or len(first[bins]) < 2:
            continue
        curves = {
            entry["layer"]: [sum(head[i] for head in entry[kind]) / len(entry[kind])
                             for i in range(len(first[bins]))]
            for entry in structure
        }  # fmt: skip
        svg = distance_plot(curves, first[bins], first[f"{kind}_uniform"], x_label, f"mass-{kind}")
        found.append(
            (svg, "Dense attention by distance from the query, mean over heads and queries.")
        )
    return found


def _picture(frames: np.ndarray, size: int) -> str:
    """An ``<img>`` source: WebP, animated for several frames, at most ``size`` pixels wide."""
    images = [Image.fromarray(frame) for frame in frames]
    if images[0].width > size:
        scaled = (size, round(images[0].height * size / images[0].width))
        images = [image.resize(scaled, Image.Resampling.LANCZOS) for image in images]
    out = io.BytesIO()
    more = {"save_all": True, "append_images": images[1:], "duration": 125, "loop": 0}
    images[0].save(out, "WEBP", quality=88, **(more if len(images) > 1 else {}))
    return "data:image/webp;base64," + base64.b64encode(out.getvalue()).decode()


def _frames(folder: Path, label: str, item: dict) -> np.ndarray:
    stem = folder / label / "images"
    files = sorted(stem.glob(f"{item['index']:05d}.png")) or sorted(
        stem.glob(f"{item['index']:05d}_*.png")
    )
    if not files:
        raise FileNotFoundError(
            f"picture {item['index']} of {label} is not in {stem}; run dittfast evaluate fidelity "
            "again"
        )
    try:
        return np.stack([np.asarray(Image.open(f).convert("RGB")) for f in files])
    except (OSError, SyntaxError, ValueError) as error:
        raise ValueError(f"{files[0]} cannot be read: {error}") from error


def _image(source: str, alt: str) -> str:
    return f'<img src="{source}" alt="{escape(alt)}" loading="lazy">'


def _pictures(folder: Path, data: dict, count: int, size: int) -> str:
    parts = []
    for position, item in enumerate(data["items"][:count]):
        dense = _frames(folder, "dense", item)
        cells = [
            f"<figure>{_image(_picture(dense, size), 'dense: ' + item['prompt'])}"
            "<figcaption>dense</figcaption></figure>"
        ]
        for row in data["methods"]:
            label, found = row["label"], row["pictures"][position]
            frames = _frames(folder, label, item)
            apart, gain = difference(dense, frames)
            psnr = "identical" if found["identical"] else f"{found['psnr_db']:.2f} dB"
            words = f"{label}: {psnr}; difference x {gain}"
            cells.append(
                f'<figure class="pair">{_image(_picture(frames, size), label)}'
                f"{_image(_picture(apart, size), label + ', difference')}"
                f"<figcaption>{escape(words)}</figcaption></figure>"
            )
        title = f"{item['prompt']} (seed {item['seed']})"
        parts.append(f'<h3>{escape(title)}</h3><div class="pictures">{"".join(cells)}</div>')
    return "".join(parts)


def _masks(folder: Path, data: dict) -> str:
    cells = []
    for row in data["methods"]:
        path = folder / row["label"] / "mask.png"
        if path.is_file():
            source = "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode()
            caption = f"{row['label']}: block mask"
            cells.append(
                f"<figure>{_image(source, caption)}<figcaption>{escape(caption)}</figcaption>"
                "</figure>"
            )
    return f'<h2>Masks</h2><div class="masks">{"".join(cells)}</div>' if cells else ""


def _table(table: Table) -> str:
    head = "".join(f"<th>{escape(cell)}</th>" for cell in table.head)
    rows = "".join(
        "<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in table.rows
    )
    notes = "".join(f"<li>{escape(note.replace('`', ''))}</li>" for note in table.notes)
    return (
        f"<h2>{escape(table.title)}</h2>"
        f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>'
        f'</div><ul class="faint">{notes}</ul>'
    )


def html_report(
    folder: str | Path, results: dict, *, pictures: int = 4, size: int = 256, plots: bool = True
) -> str:
    """The page, with all pictures and plots inside and nothing to load.

    Args:
        folder: of ``dittfast evaluate fidelity``, for its pictures.
        results: of :func:`read_results`.
        pictures: prompts whose pictures are shown.
        size: largest width of a picture, in pixels.
        plots: whether to draw plots, for which matplotlib is needed.

    Raises:
        FileNotFoundError, ValueError: a picture is missing or cannot be read; matplotlib is not
            installed; numbers out of range.
    """
    for name, value in (("pictures", pictures), ("size", size)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    folder, data = Path(folder), results["fidelity"]
    title = f"{data['model']}: sparse attention against dense"
    drawn = _plots(results) if plots else []
    figures = "".join(
        f'<figure>{svg}<figcaption class="faint">{escape(caption)}</figcaption></figure>'
        for svg, caption in drawn
    )
    exact = {k: v for k, v in data.items() if k not in ("methods", "items", "structure")}
    exact["methods"] = [
        {k: row[k] for k in ("label", "method", "schedule", "backend", "checked")}
        for row in data["methods"]
    ]
    tables = tables_of(results)
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{_STYLE}</style></head><body><main>"
        f'<h1>{escape(title)}</h1><p class="faint">{escape(setting_of(data))}</p>'
        f"{_table(tables[0])}"
        + (f'<h2>Trade-offs and structure</h2><div class="plots">{figures}</div>' if drawn else "")
        + "".join(map(_table, tables[1:]))
        + f'<h2>Pictures</h2><p class="faint">{min(pictures, len(data["items"]))} of '
        f"{len(data['items'])} prompts; per method its picture and the brightened difference to "
        f"dense.</p>{_pictures(folder, data, pictures, size)}"
        + _masks(folder, data)
        + "<h2>Settings and versions</h2><details><summary>as JSON</summary>"
        f"<pre>{escape(json.dumps(exact, indent=2))}</pre></details></main></body></html>\n"
    )


def markdown_report(results: dict) -> str:
    """The tables with their notes."""
    data = results["fidelity"]
    parts = [table.markdown() for table in tables_of(results)]
    prompts = "\n".join(f"- {i['prompt']} (seed {i['seed']})" for i in data["items"])
    head = f"# {data['model']}: sparse attention against dense\n\n{setting_of(data)}\n\n"
    return head + "\n".join(parts) + f"\n## Prompts\n\n{prompts}\n"


def json_report(results: dict) -> dict:
    """All results in one mapping, those that are there."""
    return {name: found for name, found in results.items() if found is not None}


def report_paths(output: str | Path) -> Sequence[Path]:
    """``.html``, ``.md`` and ``.json`` of one name."""
    output = Path(output)
    return [output.with_suffix(ending) for ending in (".html", ".md", ".json")]
