"""The tables that a tuned preset's page begins with."""

from __future__ import annotations

from dittfast.measure.summary import number
from dittfast.measure.tables import Table

_SHOWN = [
    *(("predicted", measure) for measure in ("psnr", "distance", "work", "speedup")),
    *(("tuned", measure) for measure in ("psnr", "distance")),
    *(("held_out", measure) for measure in ("psnr", "distance", "speedup")),
]
_COMPUTED = (
    "All seconds and speeds are computed for {} from published rates, without planning; nothing "
    "was timed there."
)


def summary_tables(found: dict) -> list[Table]:
    """What was asked for, drawn and found, and what runs where.

    Args:
        found: as ``tune.json`` holds it.
    """
    return [_rounds(found), _places(found)]


def _rounds(found: dict) -> Table:
    best = found["best"]
    rows = []
    for one in [*found["rounds"], *([best] if best["replan_every"] else [])]:
        drawn = [number(one[which].get(measure)) for which, measure in _SHOWN]
        chosen = "yes" if one["label"] == best["label"] else ""
        rows.append((one["label"], *drawn, chosen))
    head = (
        "preset", "predicted PSNR, dB", "predicted distance", "work", "predicted speedup",
        "PSNR, prompts tuned with", "distance, prompts tuned with", "PSNR, held out",
        "distance, held out", "speedup, timed", "chosen",
    )  # fmt: skip
    planning = found["planning"]
    gpu = found["gpu"]
    notes = [
        "Tuned for " + " and ".join(found["budget"]) + ", means over held-out prompts.",
        "distance: |x - dense| / |dense| of the final latents. work: the products of attention, of "
        "those of dense attention, without planning. speedup: dense seconds over the "
        "preset's, with attention timed in turns, call by call." + _whole(found["whole_calls"]),
        *([_COMPUTED.format(gpu)] if gpu else []),
        f"Attention is {found['attention_share']:.0%} of a dense run of "
        f"{found['run_seconds']:.3g} s.",
        f"Planning from q and k takes {planning['seconds']:.3g} s of a run"
        + _saved(best["replan_every"], planning["saved"]),
    ]
    return Table("What was asked for and what was drawn", head, tuple(rows), tuple(notes))


def _whole(pairs: list[float]) -> str:
    """What whole calls in turns gave, pair by pair."""
    return f" Whole calls in turns: {', '.join(f'{x:.3g}' for x in pairs)}." if pairs else ""


def _saved(every: dict[str, int], seconds: float) -> str:
    """What plans save that last so many steps, by method."""
    if not every:
        return "."
    lasting = ", ".join(f"{n} steps ({name})" for name, n in every.items())
    return f", of which plans that last {lasting} save {seconds:.3g} s."


def _places(found: dict) -> Table:
    bands = found["bands"]
    layers = list(dict.fromkeys(place["layer"] for place in found["places"]))
    by_place = {(place["layer"], place["band"]): place for place in found["places"]}
    rows = []
    for layer in layers:
        cells = [by_place.get((layer, band)) for band in range(len(bands))]
        rows.append((layer, *("-" if cell is None else "; ".join(cell["runs"]) for cell in cells)))
    head = ("layer", *(f"steps {first}-{end - 1}" for first, end in bands))
    return Table("What runs where", head, tuple(rows), ("Heads that no method names are dense.",))
