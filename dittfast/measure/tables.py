"""The tables of an evaluation: from its plain data to headings and cells."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ..markdown import as_text, markdown_table
from .comparable import settings_apart
from .summary import interval, kept, number

# What fidelity compares, in the order of its table: name -> (heading, decimals).
MEASURES = {
    "psnr_db": ("PSNR, dB", 2),
    "ssim": ("SSIM", 4),
    "lpips": ("LPIPS", 4),
    "latent_cosine": ("latent cosine", 4),
    "temporal_error": ("temporal error", 3),
    "motion_ratio": ("motion ratio", 3),
}

_TOO_FEW = (
    "With no more pictures than features the covariance is singular: these distances mean nothing."
)


@dataclass(frozen=True)
class Table:
    """Headings, rows of cells, and sentences that belong below."""

    title: str
    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    notes: tuple[str, ...] = ()

    def markdown(self, level: int = 2) -> str:
        """With its title as a heading of ``level`` and its notes as a list.

        Whatever stands in the data is shown as text; a note may set commands in backticks.
        """
        rows = [[_cell(cell) for cell in row] for row in self.rows]
        text = f"{'#' * level} {as_text(self.title)}\n\n{markdown_table(self.head, rows)}"
        notes = ("`".join(map(as_text, note.split("`"))) for note in self.notes)
        return text + "".join(f"\n- {note}" for note in notes) + ("\n" if self.notes else "")


def _cell(cell: str) -> str:
    # The table escapes the pipes itself.
    return as_text(cell).replace("\\|", "|")


def options(settings: dict) -> str:
    """``method(option=value, ...); schedule`` in a line, with the schedule only where it is set.

    A preset that they were taken from is named behind.
    """
    method = settings["method"]
    chosen = ", ".join(f"{k}={v}" for k, v in method.items() if k != "name")
    planned = {k: v for k, v in settings["schedule"].items() if v and k != "min_tokens"}
    after = "; " + ", ".join(f"{k}={v}" for k, v in planned.items()) if planned else ""
    taken = f" (from {settings['preset']})" if settings.get("preset") else ""
    return f"{method['name']}({chosen}){after}{taken}"


def idle_notes(rows) -> list[str]:
    """A sentence for every method that ran nowhere."""
    return [
        f"{row['label']} did not run: {row['did_not_run']}. Its pictures are those of dense "
        "attention, so it has no density and no ratio."
        for row in rows
        if row.get("did_not_run")
    ]


_DENSITY = (
    "density: kept fraction of token pairs in the sparse layers; FLOPs, as a fraction of dense, "
    "where a method computes its own output."
)


def _density(row: dict) -> str:
    if row.get("did_not_run"):
        return "did not run"
    known = kept(row["density"], row.get("work"))
    return "not recorded" if known == "-" else known


def setting_of(data: dict) -> str:
    """Model, size, steps, device and versions in a line."""
    call = data["call"]
    size = " x ".join(str(call[n]) for n in ("num_frames", "width", "height") if n in call)
    steps = call.get("num_inference_steps")
    device = ", ".join(
        f"{v} {k}" if k == "threads" else str(v) for k, v in data["device"].items() if k != "type"
    )
    known = ", ".join(f"{k} {v}" for k, v in data["versions"].items() if v)
    parts = [data["model"], f"weights {data['weights']}", size and f"{size} px"]
    dense = data.get("dense_attention")  # records of earlier versions do not say
    parts += [f"{steps} steps" if steps else "", data["dtype"], device]
    parts += [f"dense attention by diffusers' {dense} backend" if dense else "", known]
    return "; ".join(p for p in parts if p)


def fidelity_tables(data: dict) -> list[Table]:
    """Method by method, then the asked-for pairs of methods."""
    rows = data["methods"]
    shown = [n for n in MEASURES if any(r["pooled"][n]["n"] for r in rows)]
    head = ("method", "density", "work", "sparse layers", "dense/method time")
    head += tuple(MEASURES[n][0] for n in shown) + ("identical",)
    cells = []
    for row in rows:
        ratio, pooled = row["dense_over_method_seconds"], row["pooled"]
        cells.append(
            (
                row["label"],
                _density(row),
                "-" if row.get("did_not_run") else number(row["checked"]["work"]),
                row["sparse_layers"],
                "-" if ratio is None else f"{ratio['median']:.2f}",
                *(interval(pooled[n], MEASURES[n][1]) for n in shown),
                f"{pooled['identical']} of {len(row['pictures'])}",
            )
        )
    notes = (
        *idle_notes(rows),
        f"{len(data['items'])} prompts, one seed each; dense and method share prompt and noise. "
        f"Intervals: {data['interval']}.",
        f"{_DENSITY} work: FLOPs of their "
        "attention, summary tokens included, as a fraction of dense (on q, k, v of one step).",
        "time: median over prompts of one call each, a rough figure; "
        "`dittfast evaluate latency` measures speed.",
        f"dense: {data['dense']}.",
        f"LPIPS: {data['lpips']}.",
        setting_of(data) + ".",
        *(f"{row['label']}: {options(row)}" for row in rows),
    )
    tables = [Table("Pictures against dense attention", head, tuple(cells), notes)]
    if data["pairs"]:
        head = ("pair", *(f"{MEASURES[n][0]}, difference" for n in shown))
        pairs = tuple(
            (
                f"{pair['a']} - {pair['b']}",
                *(interval(pair["a_minus_b"][n], MEASURES[n][1]) for n in shown),
            )
            for pair in data["pairs"]
        )
        note = "Mean over prompts of the difference; an interval without 0 tells the two apart."
        tables.append(Table("Pairs of methods", head, pairs, (note,)))
    return tables


def overview_table(fidelity: dict, latency: dict | None, fid: dict | None) -> Table:
    """Density, speed and quality of every method side by side, as far as they were measured.

    Args:
        fidelity, latency, fid: results of ``dittfast evaluate``; methods are told by their labels,
            and folders of pictures by the label that they are named after. What was measured with
            other settings than the pictures of ``fidelity`` is marked, and not shown here.
    """
    timed = {row["label"]: row for row in (latency or {"rows": []})["rows"]}
    apart = {_arm(row["folder"]): row for row in (fid or {"rows": []})["rows"]}
    other = with_other_settings(fidelity, latency, fid)
    head = ["method", "density"]
    notes = [_DENSITY]
    notes += idle_notes(fidelity["methods"])
    notes += [
        f"{OTHER}: {what} of {label} was measured with {why}."
        for (what, label), why in other.items()
    ]
    if timed:
        head.append("dense seconds / method seconds, end to end")
        pairs = ", ".join(str(n) for n in sorted({row["pairs"] for row in timed.values()}))
        notes.append(
            f"Seconds: median over {pairs} pairs of whole calls in turns [20th, 80th percentile]; "
            "below 1.00 the method is slower."
        )
    head += ["PSNR to dense, dB", "SSIM to dense"]
    notes.append(
        f"PSNR and SSIM: mean over {len(fidelity['items'])} prompts and seeds, with the interval "
        f"of a {fidelity['interval']}."
    )
    if apart:
        row = next(iter(apart.values()))
        features = row["features"]
        head.append("FID" if row["is_fid"] else f"Fréchet distance, features of {features}")
        kind = "FID (Inception)" if row["is_fid"] else f"Distance in features of {features}, no FID"
        count = row["reference_pictures"]
        against = _arm(row["reference"]) if count else row["reference"]
        notes.append(
            f"{kind}: {row['pictures']} pictures of each method against "
            + (f"{count} of {against}." if count else f"{against}.")
        )
        if any(distance["too_few"] for distance in apart.values()):
            notes.append(_TOO_FEW)
    cells = []
    for row in fidelity["methods"]:
        label, pooled = row["label"], row["pooled"]
        line = [label, _density(row)]
        if timed:
            line.append(OTHER if ("speed", label) in other else _ratio(timed.get(label)))
        line += [interval(pooled["psnr_db"], 2), interval(pooled["ssim"], 4)]
        if apart:
            value = f"{apart[label]['value']:.4g}" if label in apart else "-"
            line.append(OTHER if ("distance", label) in other else value)
        cells.append(tuple(line))
    return Table("Speed and quality by method and density", tuple(head), tuple(cells), tuple(notes))


OTHER = "other settings"


def with_other_settings(
    fidelity: dict, latency: dict | None, fid: dict | None
) -> dict[tuple[str, str], str]:
    """What differs from the settings of fidelity's pictures, by ("speed" or "distance", label)."""
    rows = {row["label"]: row for row in fidelity["methods"]}
    base = {k: v for k, v in fidelity.items() if k != "methods"}
    differences = {}
    for row in (latency or {"rows": []})["rows"]:
        if row["label"] in rows:
            differences["speed", row["label"]] = settings_apart(base | rows[row["label"]], row)
    for row in (fid or {"rows": []})["rows"]:
        label = _arm(row["folder"])
        if label in rows and row.get("settings"):
            why = settings_apart(base | rows[label], row["settings"])
            if row.get("reference_settings"):
                why = why or settings_apart(base, row["reference_settings"], with_method=False)
            differences["distance", label] = why
    return {key: why for key, why in differences.items() if why is not None}


def _ratio(row: dict | None) -> str:
    if row is None:
        return "-"
    return "did not run" if row.get("did_not_run") else _spread(row["end_to_end"], "{:.2f}")


def _arm(folder: str) -> str:
    """The label of the arm that a folder of pictures belongs to."""
    path = Path(folder)
    return path.parent.name if path.name == "images" else path.name


def fid_table(data: dict) -> Table:
    """Each folder's distance; the heading says whose features they are."""
    rows = data["rows"]
    first = rows[0]
    title = "FID (Inception, clean-fid)"
    if not first["is_fid"]:
        title = f"Fréchet distance of {first['features']} (not Inception, so not FID; clean-fid)"
    cells = tuple(
        (
            row["folder"],
            f"{row['value']:.4g}",
            str(row["pictures"]),
            f"{row['reference']}",
            "-" if row["reference_pictures"] is None else str(row["reference_pictures"]),
        )
        for row in rows
    )
    notes = [f"{first['dims']} features; smaller is nearer."]
    if any(row["too_few"] for row in rows):
        notes.append(_TOO_FEW)
    for row in rows:
        if row.get("settings") and row.get("reference_settings"):
            why = settings_apart(row["reference_settings"], row["settings"], with_method=False)
            if why:
                notes.append(f"{row['folder']} and {row['reference']} differ in settings: {why}.")
        for folder, changes in zip((row["folder"], row["reference"]), row.get("changes", ())):
            done = ", ".join(f"{what} in {count}" for what, count in changes.items())
            if done:
                notes.append(f"Read as a viewer shows them, {folder}: {done} pictures.")
    notes = list(dict.fromkeys(notes))
    head = ("pictures of", "distance", "number", "against", "number")
    return Table(title, head, cells, tuple(notes))


def latency_table(data: dict) -> Table:
    """One row per method: end to end first, and never a step without it."""
    cells = []
    for row in data["rows"]:
        if row.get("did_not_run"):
            cells.append((row["label"], "did not run", *["-"] * 9))
            continue
        share = row["share"]
        quality = row["against_dense"]["psnr_db"]
        cells.append(
            (
                row["label"],
                kept(*_first_known(row["attention"], row["parity"])),
                _spread(row["end_to_end"], "{:.2f}"),
                "-" if row["per_step"] is None else _spread(row["per_step"], "{:.2f}"),
                _both(row["seconds"], "whole"),
                "-" if row["per_step"] is None else _both(row["seconds"], "step"),
                f"{share['dense']['attention']:.0%}",
                number(row["ceiling_at_density"], 2),
                number(row["ceiling"], 2),
                _memory(row["peak_memory_bytes"]),
                "identical" if quality is None else f"{quality:.2f}",
            )
        )
    first = data["rows"][0]
    head = (
        "method", "density", "end to end, times as fast", "per step, times as fast",
        "call, s: dense / method", "step, s: dense / method", "attention's share of the dense call",
        "ceiling at this density", "ceiling without attention", "peak memory: dense / method",
        "PSNR to dense, dB",
    )  # fmt: skip
    checked = ", ".join(
        f"{r['label']}: {r['parity']['layers']} layers on {r['parity']['backend']}"
        for r in data["rows"]
    )
    notes = (
        *(
            f"{row['label']} did not run, so nothing was timed: {row['did_not_run']}."
            for row in data["rows"]
            if row.get("did_not_run")
        ),
        f"Medians over {first['pairs']} pairs of calls in turns, after a warm-up of each; in "
        "brackets the 20th and 80th percentile of the pairs' ratios. Below 1.00 the method is "
        "slower.",
        f"Checked against dense fp64 attention before anything was timed ({checked}).",
        "Ceilings are Amdahl's, 1 / (1 - share + share x density), with FLOPs where a method has "
        "no density; the share comes from a run "
        "of its own that waits for the device around each attention call.",
        "Peak memory: on a CPU all of the process, weights included.",
        setting_of(first) + ".",
        *(f"{row['label']}: {options(row)}" for row in data["rows"]),
    )
    return Table("Speed against dense attention", head, tuple(cells), notes)


def _first_known(*records: dict | None) -> tuple[float | None, float | None]:
    """Density and work from the first record that has one of them."""
    for record in records:
        amount = (record or {}).get("density"), (record or {}).get("work")
        if amount != (None, None):
            return amount
    return None, None


def _spread(values: dict, form: str) -> str:
    p20, p50, p80 = (form.format(values[p]) for p in ("p20", "p50", "p80"))
    return f"{p50} [{p20}, {p80}]"


def _both(seconds: dict, part: str) -> str:
    return " / ".join(f"{seconds[arm][part]['p50']:.3g}" for arm in ("dense", "method"))


def _memory(peaks: dict) -> str:
    if None in peaks.values():
        return "-"
    return " / ".join(f"{peaks[arm] / 2**20:,.0f} MiB" for arm in ("dense", "method"))
