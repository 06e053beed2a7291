"""How far a method's pictures are from dense attention's, paired by prompt and seed."""

from __future__ import annotations

import contextlib
import math
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

from dittfast.environment import describe_device
from dittfast.files import write_image
from dittfast.measure.metrics import (
    SSIM_WINDOW,
    cosine,
    image_tensor,
    psnr,
    ssim,
    temporal_consistency,
)
from dittfast.measure.perceptual import load_lpips, missing_for_lpips
from dittfast.measure.summary import bootstrap_mean
from dittfast.measure.tables import MEASURES
from dittfast.measure.timing import in_turns

from ..fingerprint import weights_digest
from ..models import execution_device
from ..runs.compare import draw
from ..runs.prompts import Item
from ..runs.run import Run, duration
from ..runs.settings import run_settings
from ..runs.sources import Source
from .drawings import Drawings
from .method_check import (
    Checked,
    assignment_of,
    capture_layers,
    check_captured,
    layer_names,
    sparse_layers,
)
from .structure import mask_picture, mass_by_distance
from .variants import DENSE, Variant, check_labels

# PyTorch's scaled_dot_product_attention, and the kernels that it can be held to.
DENSE_KERNELS = {
    "auto": (),
    "math": ("MATH",),
    "flash": ("FLASH_ATTENTION",),
    "efficient": ("EFFICIENT_ATTENTION",),
    "cudnn": ("CUDNN_ATTENTION",),
}


def check_dense_kernel(name: str) -> None:
    """Raise ValueError for a name that is no kernel of PyTorch's dense attention."""
    if name not in DENSE_KERNELS:
        raise ValueError(f"dense_kernel must be one of {', '.join(DENSE_KERNELS)}, got {name!r}")


@contextlib.contextmanager
def dense_kernel(name: str) -> Iterator[None]:
    """Hold PyTorch's dense attention to one kernel, in every arm; "auto" leaves the choice to it.

    Raises:
        ValueError: an unknown name.
    """
    check_dense_kernel(name)
    if name == "auto":
        yield
        return
    from torch.nn.attention import SDPBackend, sdpa_kernel

    with sdpa_kernel([getattr(SDPBackend, n) for n in DENSE_KERNELS[name]]):
        yield


def base_settings(
    pipe, source: Source, call: dict, kernel: str, loading: dict | None = None
) -> dict:
    """What a picture of any arm depends on, but for its prompt and seed.

    Args:
        loading: what was put into the pipeline, as plain data.
    """
    settings = run_settings(pipe, source, call) | ({"loading": loading} if loading else {})
    return settings | {
        "weights": weights_digest(pipe.components),
        "device": {k: settings["device"][k] for k in ("type", "name")},
        "dense_kernel": kernel,
    }


class Arm:
    """One way of drawing and the folder where its pictures are kept."""

    def __init__(
        self, pipe, base: dict, folder: Path, variant: Variant | None, verify: bool = True
    ):
        self.pipe = pipe
        self.variant = variant
        self.label = DENSE if variant is None else variant.label
        own = None if variant is None else variant.settings()
        self.drawings = Drawings(folder / self.label, base | {"attention": own}, verify)

    def draw(self, call: dict, seed: int, warm_up: bool = False) -> tuple[Run, dict | None]:
        """The run, and for a method what ran where."""
        if self.variant is None:
            result, description = draw(self.pipe, call, seed, warm_up=warm_up)
        else:
            v = self.variant
            result, description = draw(
                self.pipe,
                call,
                seed,
                v.drawn_by,
                v.schedule,
                backend=v.backend,
                warm_up=warm_up,
            )
        return result, None if description is None else description.to_dict()


def draw_missing(
    arms: Sequence[Arm],
    call: dict,
    items: Sequence[Item],
    *,
    latents: bool = True,
    on_stage: Callable[[str], None] = lambda stage: None,
) -> int:
    """Draw what the arms' folders lack, prompt by prompt, the arms taking turns; how many.

    Each arm is warmed up by a run of one step. Pictures are stored as soon as they are drawn.

    Raises:
        OSError: a picture could not be written; those before it are kept.
    """
    left = {arm.label: {i.index for i in arm.drawings.missing(list(items))} for arm in arms}
    total = sum(map(len, left.values()))
    session = f"{time.time_ns():x}"
    for arm in arms:
        if left[arm.label]:
            on_stage(f"{arm.label}, warm-up")
            arm.draw(call | {"prompt": items[0].prompt}, items[0].seed, warm_up=True)
    done, begun = 0, time.perf_counter()
    for number, arm in in_turns(arms, len(items)):
        item = items[number]
        if item.index not in left[arm.label]:
            continue
        wait = (total - done) * (time.perf_counter() - begun) / done if done else 0
        after = f", about {duration(wait)} left" if wait >= 5 else ""
        on_stage(f"{arm.label}, picture {item.index} ({done + 1} of {total}{after})")
        result, description = arm.draw(call | {"prompt": item.prompt}, item.seed)
        facts = {
            "session": session,
            "seconds": result.timing.total,
            "busy": result.timing.busy,
            "steps": list(result.timing.steps),
            "peak_memory_bytes": result.peak_memory,
            "attention": description,
        }
        try:
            arm.drawings.save(item, result, facts, latents)
        except OSError as error:
            raise OSError(
                f"picture {item.index} of {arm.label} could not be stored: {error}. The "
                f"{done} pictures drawn before it are kept in {arm.drawings.folder.parent}; "
                "the same command goes on there"
            ) from error
        done += 1
    return total


def measure(
    dense: Drawings, other: Drawings, item: Item, lpips: Callable | None = None
) -> dict[str, float | bool | None]:
    """All measures of one stored picture against dense attention's; None where one is undefined.

    Raises:
        ValueError: a stored picture cannot be read, or the sizes differ.
    """
    frames = dense.frames(item), other.frames(item)
    if frames[0].shape != frames[1].shape:
        raise ValueError(
            f"picture {item.index} is {frames[0].shape} in {dense.folder} and {frames[1].shape} "
            f"in {other.folder}"
        )
    a, b = map(image_tensor, frames)
    identical = bool((frames[0] == frames[1]).all())
    values: dict = {"identical": identical, "psnr_db": None if identical else psnr(a, b)}
    values["ssim"] = ssim(a, b) if min(a.shape[-2:]) >= SSIM_WINDOW else None
    values["lpips"] = None if lpips is None else lpips(a, b)
    latents = dense.latents(item), other.latents(item)
    values["latent_cosine"] = None if latents[0] is None or latents[1] is None else cosine(*latents)
    temporal = {"temporal_error": None, "motion_ratio": None}
    if len(a) > 1:
        temporal = temporal_consistency(a, b)
    return values | temporal


def pool(rows: Sequence[dict]) -> dict:
    """Mean and confidence interval of every measure over prompts.

    PSNR is averaged over the pictures that differ from dense; ``identical`` counts the others.
    """
    pooled: dict = {"identical": sum(row["identical"] for row in rows)}
    for name in MEASURES:
        pooled[name] = bootstrap_mean(row[name] for row in rows if row[name] is not None)
    return pooled


def paired_difference(a: Sequence[dict], b: Sequence[dict]) -> dict:
    """Mean of (a - b) by measure over the prompts where both have it, with its interval."""
    differences = {}
    for name in MEASURES:
        both = [(x[name], y[name]) for x, y in zip(a, b)]
        differences[name] = bootstrap_mean(
            x - y for x, y in both if x is not None and y is not None
        )
    return differences


def seconds_ratio(dense: Sequence[dict], other: Sequence[dict]) -> dict | None:
    """Dense seconds over the method's, of pictures drawn in one session; None without such pairs.

    Whole calls, one each: a rough figure. ``evaluate latency`` is for speed.
    """
    ratios = [
        a["seconds"] / b["seconds"] for a, b in zip(dense, other) if a["session"] == b["session"]
    ]
    if not ratios:
        return None
    return {"median": statistics.median(ratios), "pairs": len(ratios)}


def evaluate_fidelity(
    pipe,
    source: Source,
    call: dict,
    items: Sequence[Item],
    variants: Sequence[Variant],
    folder: str | Path,
    *,
    kernel: str = "auto",
    pairs: Sequence[tuple[str, str]] = (),
    verify: bool = True,
    on_stage: Callable[[str], None] = lambda stage: None,
    loading: dict | None = None,
    progress: Callable[[Iterable, str], Iterable] = lambda values, name: values,
) -> dict:
    """Check, draw what is missing, compare: the whole table as plain data.

    The dense arm, and the dense steps and layers of every method, run the model's own attention,
    held to one ``kernel``. Pictures are kept in ``folder/LABEL``; a second call with the same
    settings draws only what is missing and finds the same numbers.

    Args:
        call: see :func:`~dittfast.pipelines.runs.call.call_arguments`; its prompt is replaced.
        pairs: labels of two methods whose difference is to be tabled, too.
        verify: compare pictures and latents that are there with their SHA-256.
        loading: as :func:`base_settings`.
        progress: as :func:`dittfast.measure.fid.frechet`, of the comparison.

    Raises:
        dittfast.measure.check.WrongResult: a method is wrong on this model; nothing is drawn
            with it.
        ValueError: labels given twice or unknown, or a folder with other settings.
        OSError: a picture could not be written; those before it are kept.
    """
    labels = [v.label for v in variants]
    if not variants:
        raise ValueError("there is no method to compare with dense attention")
    check_labels(labels, pairs)
    folder = Path(folder)
    device = execution_device(pipe)
    base = base_settings(pipe, source, call, kernel, loading)
    arms = [Arm(pipe, base, folder, variant, verify) for variant in (None, *variants)]
    first = call | {"prompt": items[0].prompt}
    with dense_kernel(kernel):
        on_stage("checking the methods' attention")
        checks, structure = _check_all(pipe, first, variants, folder, items[0].seed)
        drawn = draw_missing(arms, call, items, on_stage=on_stage)
    on_stage("comparing")
    missing = missing_for_lpips()
    rows = _compare(arms, items, checks, None if missing else load_lpips(device), progress)
    measured = {row["label"]: row["pictures"] for row in rows}
    return base | {
        "task": "fidelity",
        "dense": "the model's own attention (PyTorch's scaled_dot_product_attention, kernel "
        f"{kernel}), in the dense arm and in the dense steps and layers of every method",
        "device": describe_device(device),
        "items": [asdict(item) for item in items],
        "drawn_now": drawn,
        "lpips": missing or "AlexNet",
        "interval": "95 % percentile bootstrap over prompts, 10,000 resamples, seed 0",
        "methods": rows,
        "structure": structure,
        "pairs": [
            {"a": a, "b": b, "a_minus_b": paired_difference(measured[a], measured[b])}
            for a, b in pairs
        ],
    }


def _check_all(pipe, call: dict, variants, folder: Path, seed: int):
    """Check every method on one dense run; its attention by distance. Masks go into folders."""
    layers = {v.label: sparse_layers(pipe, v.method, v.schedule) for v in variants}
    every = sorted({x for some in layers.values() for x in some})
    hidden = any(v.method.needs_hidden_states for v in variants)
    captured = capture_layers(pipe, call, every, seed, hidden)
    names = layer_names(pipe)
    checks: dict[str, Checked] = {}
    for v in variants:
        own = [names[x] for x in layers[v.label]]
        mine = [c for c in captured if c.layer in own]
        if own and not mine:
            mine = capture_layers(pipe, call, layers[v.label], seed, hidden)
        checks[v.label], plan = check_captured(assignment_of(pipe, v.method), mine, v.backend)
        path = folder / v.label / "mask.png"
        if plan is not None and not path.exists():
            picture = mask_picture(plan, mine[0].layout, v.label, mine[0].layer)
            write_image(path, picture)
    return checks, [mass_by_distance(c) for c in captured]


def _compare(
    arms: Sequence[Arm], items: Sequence[Item], checks: dict, lpips, progress
) -> list[dict]:
    """The row of every method: its pictures against those of the first arm."""
    records = {arm.label: [arm.drawings.record(item) for item in items] for arm in arms}
    rows = []
    for arm in arms[1:]:
        mine = progress(items, f"comparing {arm.label}")
        measured = [measure(arms[0].drawings, arm.drawings, item, lpips) for item in mine]
        rows.append(_row(arm.variant, checks[arm.label], records, measured))
    return rows


def _row(variant: Variant, checked: Checked, records: dict, measured: list[dict]) -> dict:
    """What is known of one method, as plain data; without a ratio where it did not run."""
    own = records[variant.label]
    idle = did_not_run(own)
    return {
        "label": variant.label,
        "preset": variant.preset,
        **variant.settings(),
        "did_not_run": idle,
        "density": _mean_of(own, "density"),
        "work": _mean_of(own, "work"),
        "checked": checked.to_dict(),
        "sparse_layers": _sparse_layers(own),
        "dense_over_method_seconds": None if idle else seconds_ratio(records[DENSE], own),
        "pooled": pool(measured),
        "pictures": measured,
    }


def did_not_run(records: Sequence[dict]) -> str | None:
    """Why the method ran in no picture; None where it ran in any."""
    reasons = [r["attention"].get("did_not_run") for r in records]
    return None if None in reasons else reasons[0]


def _mean_of(records: Sequence[dict], name: str) -> float | None:
    """Mean over pictures of what ``describe`` found in sparse layers; None if not recorded."""
    values = [r["attention"].get(name) if r["attention"]["sparse_layers"] else 1 for r in records]
    if None in values:
        return None
    return math.fsum(values) / len(values)


def _sparse_layers(records: Sequence[dict]) -> str:
    about = records[0]["attention"]
    sparse, dense = len(about["sparse_layers"]), len(about["dense_layers"])
    return f"{sparse} of {sparse + dense}"
