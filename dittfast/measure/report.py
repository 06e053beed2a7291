"""One self-contained HTML page about an evaluation, and the same as Markdown and JSON."""

from __future__ import annotations

import contextlib
import io
import json
import math
from collections.abc import Iterator, Sequence
from html import escape
from pathlib import Path

import numpy as np
from PIL import Image

from ..disk.inside import path_inside
from ..disk.problems import FileProblem, reading
from ..disk.records import read_record
from ..markdown import as_text
from .draw import difference
from .embed import image_tag, png_source, webp_source
from .plots import Point, distance_plot, pareto_plot
from .tables import (
    Table,
    fid_table,
    fidelity_tables,
    idle_notes,
    latency_table,
    overview_table,
    setting_of,
    with_other_settings,
)

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
th { white-space: normal; vertical-align: bottom; background: var(--soft); font-weight: 600; }
tbody th { white-space: nowrap; vertical-align: top; background: var(--paper);
  font-weight: inherit; }
/* The name of a row stays in sight while its numbers are scrolled through. */
th:first-child { position: sticky; left: 0; }
.plots { display: grid; gap: 1.2rem; grid-template-columns: repeat(auto-fit,
  minmax(min(100%, 24rem), 1fr)); }
.plots figure { max-width: 40rem; }
svg, img { max-width: 100%; height: auto; display: block; }
.triples { display: grid; gap: .8rem 1.2rem; grid-template-columns: repeat(auto-fill,
  minmax(min(100%, 22rem), 1fr)); }
.triple { display: grid; gap: 2px; grid-template-columns: repeat(3, 1fr); }
.triple figcaption { grid-column: span 3; }
.triple img { width: 100%; background: var(--soft); }
.masks { display: grid; gap: 1rem; grid-template-columns: repeat(auto-fill,
  minmax(min(100%, 20rem), 1fr)); }
figure { margin: 0; }
summary { cursor: pointer; }
pre { background: var(--soft); padding: .8rem; overflow-x: auto; font-size: .8rem; }
"""

_FORM = {"task": str, "*": object}
# Ten minutes of a small clip, or one of 720p; small files could hold any number.
_MOST_PIXELS = 2**30
# What a screen reader says of a plot.
_SPOKEN = '<svg role="img" aria-label="{}"'


def read_results(folder: str | Path, verify: bool = True) -> dict:
    """``{"fidelity", "latency", "fid"}``: what ``dittfast evaluate`` wrote there; None where not.

    Args:
        verify: compare them with the SHA-256 that was written with them.

    Raises:
        FileNotFoundError: the folder is not there, or holds no fidelity.json.
        ValueError: a file that is no such result, was damaged, or is a link; a label that is no
            name of a folder there.
    """
    folder = Path(folder)
    if not path_inside(folder, "fidelity.json").is_file():
        raise FileNotFoundError(
            f"{folder} holds no fidelity.json; run dittfast evaluate fidelity -o {folder} first"
        )
    results = {}
    for name in ("fidelity", "latency", "fid"):
        path = path_inside(folder, f"{name}.json")
        results[name] = None
        if path.is_file():
            remedy = f"run dittfast evaluate {name} again"
            results[name] = read_record(path, _FORM, verify=verify, remedy=remedy).data
            task = results[name]["task"]
            if task != name:
                raise FileProblem(path, f"it is a result of {task}, not of {name}", remedy)
    with understanding(folder):
        for row in results["fidelity"]["methods"]:
            path_inside(folder, row["label"])
    return results


@contextlib.contextmanager
def understanding(folder: str | Path):
    """Inside, results that lack what a page is made of are refused in a sentence.

    Raises:
        FileProblem: they do.
    """
    try:
        yield
    except FileProblem:
        raise
    except ValueError as error:
        raise ValueError(f"{folder}: {error}") from error
    except (LookupError, TypeError, AttributeError, ArithmeticError, RecursionError) as error:
        path = Path(folder) / "fidelity.json"
        what = f"it, or a result beside it, is no result of dittfast evaluate ({error!r:.100})"
        raise FileProblem(path, what, "run dittfast evaluate again") from error


def tables_of(results: dict) -> list[Table]:
    """Every table there is: what is known of each method in one, then measure by measure."""
    tables = fidelity_tables(results["fidelity"])
    if results["latency"] or results["fid"]:
        three = (results[name] for name in ("fidelity", "latency", "fid"))
        tables.insert(0, overview_table(*three))
    if results["latency"]:
        tables.append(latency_table(results["latency"]))
    if results["fid"]:
        tables.append(fid_table(results["fid"]))
    return tables


def _points(results: dict) -> list[tuple[list[Point], str, str, bool]]:
    """The Pareto plots: (points, x label, name, larger x is better)."""
    work, speed = [], []
    other = with_other_settings(*(results[name] for name in ("fidelity", "latency", "fid")))
    timed = {
        row["label"]: row
        for row in (results["latency"] or {"rows": []})["rows"]
        if ("speed", row["label"]) not in other and not row.get("did_not_run")
    }
    for row in results["fidelity"]["methods"]:
        psnr = row["pooled"]["psnr_db"]
        if psnr["mean"] is None or row.get("did_not_run"):
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
    plots = []
    for points, x_label, name, larger in _points(results):
        svg = pareto_plot(points, x_label, "PSNR to dense, dB", f"pareto-{name}", larger)
        side = "right" if larger else "left"
        plots.append(
            (
                svg,
                f"Better is up and to the {side}; the broad grey line joins what nothing beats, "
                "bars are 95 % intervals over prompts.",
            )
        )
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
        plots.append(
            (
                svg,
                "Where dense attention goes, by distance from the query: mean over heads and "
                "queries, at the second step of a run of two of the first prompt.",
            )
        )
    return plots


def _frames(folder: Path, label: str, item: dict) -> np.ndarray:
    stem = path_inside(folder, label, "images")
    number = int(item["index"])
    files = sorted(stem.glob(f"{number:05d}.png")) or sorted(stem.glob(f"{number:05d}_*.png"))
    if not files:
        raise FileNotFoundError(
            f"picture {item['index']} of {label} is not in {stem}; run dittfast evaluate fidelity "
            "again"
        )
    paths = [path_inside(folder, label, "images", file.name) for file in files]
    pixels = sum(math.prod(_size(path)) for path in paths)
    if pixels > _MOST_PIXELS:
        raise FileProblem(
            files[0],
            f"its {len(files)} frames have {pixels:,} pixels together, of which a page takes "
            f"{_MOST_PIXELS:,}",
            "leave frames of it away",
        )
    drawn = [_png(path) for path in paths]
    with reading(files[0], "its frames differ in size"):
        return np.stack(drawn)


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[Image.Image]:
    """A PNG file; a file of another kind is no picture here."""
    with reading(path, "it cannot be read as a PNG"), Image.open(path, formats=["PNG"]) as image:
        yield image


def _size(path: Path) -> tuple[int, int]:
    """Width and height as the header says."""
    with _opened(path) as image:
        return image.size


def _png(path: Path) -> np.ndarray:
    """``[H, W, 3]`` uint8."""
    with _opened(path) as image:
        return np.asarray(image.convert("RGB"))


def _pictures(folder: Path, data: dict, count: int, size: int) -> str:
    parts = []
    for position, item in enumerate(data["items"][:count]):
        dense = _frames(folder, "dense", item)
        before = image_tag(webp_source(dense, size), f"dense: {item['prompt']}")
        cells = []
        for row in data["methods"]:
            label, measured = row["label"], row["pictures"][position]
            frames = _frames(folder, label, item)
            apart, gain = difference(dense, frames)
            psnr = "identical" if measured["identical"] else f"{measured['psnr_db']:.2f} dB"
            psnr = "did not run" if row.get("did_not_run") else psnr
            words = f"dense | {label}: {psnr} | difference x {gain}"
            after = image_tag(webp_source(frames, size), f"{label}: {item['prompt']}")
            alt = f"difference of {label} and dense, x {gain}"
            between = image_tag(webp_source(apart, size), alt)
            cells.append(
                f'<figure class="triple">{before}{after}{between}'
                f"<figcaption>{escape(words)}</figcaption></figure>"
            )
        title = f"{item['prompt']} (seed {item['seed']})"
        parts.append(f'<h3>{escape(title)}</h3><div class="triples">{"".join(cells)}</div>')
    return "".join(parts)


def _masks(folder: Path, data: dict) -> str:
    cells = []
    for row in data["methods"]:
        path = path_inside(folder, row["label"], "mask.png")
        if path.is_file():
            # Written anew, so that nothing but its pixels gets into the page.
            out = io.BytesIO()
            Image.fromarray(_png(path)).save(out, "PNG", optimize=True)
            source = png_source(out.getvalue())
            caption = f"{row['label']}: block mask"
            cells.append(
                f"<figure>{image_tag(source, caption)}<figcaption>{escape(caption)}</figcaption>"
                "</figure>"
            )
    return f'<h2>Masks</h2><div class="masks">{"".join(cells)}</div>' if cells else ""


def _table(table: Table, known: set[str]) -> str:
    """The table with its notes but for those that the page has shown already."""
    head = "".join(f'<th scope="col">{escape(cell)}</th>' for cell in table.head)
    rows = "".join(
        f'<tr><th scope="row">{escape(row[0])}</th>'
        + "".join(f"<td>{escape(cell)}</td>" for cell in row[1:])
        + "</tr>"
        for row in table.rows
    )
    notes = "".join(
        f"<li>{escape(note.replace('`', ''))}</li>" for note in table.notes if note not in known
    )
    known.update(table.notes)
    return (
        f"<h2>{escape(table.title)}</h2>"
        f'<div class="wide" tabindex="0" role="region" aria-label="{escape(table.title)}"><table>'
        f"<thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>"
        f'<ul class="faint">{notes}</ul>'
    )


def html_report(
    folder: str | Path,
    results: dict,
    *,
    pictures: int = 4,
    size: int = 256,
    plots: bool = True,
    more: Sequence[Table] = (),
) -> str:
    """The page, with all pictures and plots inside and nothing to load.

    Args:
        folder: of ``dittfast evaluate fidelity``, for its pictures.
        results: of :func:`read_results`.
        pictures: prompts whose pictures are shown.
        size: largest width of a picture, in pixels.
        plots: whether to draw plots, for which matplotlib is needed.
        more: tables to begin with.

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
        f"<figure>{svg.replace('<svg', _SPOKEN.format(escape(caption)), 1)}"
        f'<figcaption class="faint">{escape(caption)}</figcaption></figure>'
        for svg, caption in drawn
    )
    exact = {k: v for k, v in data.items() if k not in ("methods", "structure")}
    exact["methods"] = [
        {k: row[k] for k in ("label", "method", "schedule", "backend", "checked")}
        for row in data["methods"]
    ]
    setting = f"{setting_of(data)}."
    idle = idle_notes(data["methods"])
    known = {setting, *idle}
    before = "".join(_table(table, known) for table in more)
    first, *others = [_table(table, known) for table in tables_of(results)]
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{_STYLE}</style></head><body><main>"
        f'<h1>{escape(title)}</h1><p class="faint">{escape(setting)}</p>'
        + "".join(f'<p role="alert"><strong>{escape(x)}</strong></p>' for x in idle)
        + f"{before}{first}"
        + (f'<h2>Trade-offs and structure</h2><div class="plots">{figures}</div>' if drawn else "")
        + f'<h2>Pictures</h2><p class="faint">{min(pictures, len(data["items"]))} of '
        f"{len(data['items'])} prompts, with the same noise in both: dense attention, the "
        f"method, and their difference, brightened.</p>{_pictures(folder, data, pictures, size)}"
        + _masks(folder, data)
        + "".join(others)
        + "<h2>Settings and versions</h2><details><summary>as JSON</summary>"
        f"<pre>{escape(json.dumps(exact, indent=2))}</pre></details></main></body></html>\n"
    )


def markdown_report(results: dict) -> str:
    """The tables with their notes, and the prompts; HTML in a prompt stays text."""
    data = results["fidelity"]
    parts = [table.markdown() for table in tables_of(results)]
    prompts = "\n".join(f"- {as_text(i['prompt'], True)} (seed {i['seed']})" for i in data["items"])
    title = f"{as_text(data['model'])}: sparse attention against dense"
    head = f"# {title}\n\n{as_text(setting_of(data))}.\n\n"
    return head + "\n".join(parts) + f"\n## Prompts\n\n{prompts}\n"


def json_report(results: dict) -> dict:
    """All results in one mapping, those that are there."""
    return {name: result for name, result in results.items() if result is not None}


def report_paths(output: str | Path) -> Sequence[Path]:
    """``.html``, ``.md`` and ``.json`` of one name."""
    output = Path(output)
    return [output.with_suffix(ending) for ending in (".html", ".md", ".json")]
