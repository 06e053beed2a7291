"""docs/scaling.md: attention on GPUs that are not here, computed from published rates."""

from __future__ import annotations

from dittfast.markdown import markdown_table
from dittfast.measure.gpus import GPUS, Gpu
from dittfast.measure.roofline import (
    NUM_GPUS,
    Attention,
    break_evens,
    not_split_reason,
    seconds,
    sharing,
)

from ..families.published import published_model
from .estimate import Estimate, ModelEstimate, estimate

# Frames a second that the models are made for.
FRAME_RATES = {"wan2.1-14b": 16, "hunyuanvideo": 24, "cogvideox-5b": 8, "mochi-1": 30}
LENGTHS = (5, 15, 30, 60)
# One video model and one of pictures, under every method.
METHODS_OF = ("wan2.1-14b", "flux.1-dev")


def attention_of(model: ModelEstimate) -> Attention:
    """What a pass of the model computes in self-attention."""
    cost = model.cost
    return Attention(
        cost.attention, model.layout.num_tokens, cost.layers, cost.heads, cost.head_dim
    )


def sparse_seconds(model: ModelEstimate, method: Estimate, gpu: Gpu, count: int = 1) -> dict:
    """Seconds of a pass on ``count`` GPUs by engine; its dense layers run on the best dense kernel.

    Without engines that refuse its plans. Empty for a method that computes its own output, whose
    products are no attention kernel's, and where the GPU's rates were not published.
    """
    if method.problem is not None or not method.refused or gpu.best is None:
        return {}
    work = attention_of(model)
    dense = method.dense_layers / model.cost.layers
    usual = seconds(work, gpu, gpu.best[1].tflops, 1.0, count)
    rest = method.attention / work.flops - dense
    found, refused = {}, method.refused.get(gpu.architecture, {})
    for engine, rate in gpu.engines.items():
        if engine in refused:
            continue
        own = seconds(work, gpu, rate.tflops, rest / (1 - dense), count) if dense < 1 else usual
        found[engine] = dense * usual.total + (1 - dense) * own.total
    return found


def scaling_markdown() -> str:
    """The page."""
    models = {name: estimate(published_model(name)) for name in METHODS_OF}
    rows = _rows_of_lengths()
    sources = dict.fromkeys(
        source
        for gpu in GPUS.values()
        for source in (
            gpu.source,
            *(x.source for x in (*gpu.dense.values(), *gpu.engines.values())),
            *(x.source for x in gpu.ratios.values()),
        )
    )
    parts = [
        _HEAD,
        "## From which density a plan pays\n",
        _BREAK_EVEN,
        _break_even_table(),
        "## Methods at real size\n",
        _METHODS,
        *(_method_table(model) for model in models.values()),
        "## Seconds of a pass\n",
        _SECONDS,
        _seconds_table(rows),
        "## Over many GPUs\n",
        _MANY,
        _many_table(rows[("wan2.1-14b", 60)]),
        "## Sources\n",
        "".join(f"- {source}\n" for source in sources),
    ]
    return "\n".join(parts)


_HEAD = """# Scaling

Printed by `dittfast estimate --markdown docs/scaling.md`. **Everything here is computed from
rates that others published, nothing was measured.** A kernel takes the longer of its arithmetic
at such a rate and of reading q, k, v and writing the output once; planning, norms, projections
and launches are not in it. The rates are in `dittfast/measure/gpus.py`, each with its source.
`dittfast estimate MODEL --gpu H100 --gpus 8` prints the same for one model and size.
"""
_BREAK_EVEN = """An engine that walks block lists is slower for each pair than the best dense
kernel. A plan pays if its density (for methods with pooled keys its work) is below the number
here, and a method that keeps more gains nothing, whatever its FLOPs say. Rates without a star are
those of the same kernel on dense attention, which block lists at best reach: the true number is
lower. A dash: nobody published it.
"""
_METHODS = """Work of each method with its published settings, or its defaults, and the engines
that take its plans and whose break-even against the best dense kernel lies above it.
[backends.md](backends.md) says what each takes.
"""
_SECONDS = """Dense self-attention of one pass (one of two with guidance) at 720 x 1280, or the
model's own size, on one GPU at its best published dense rate; "at least" is by the peak of its
data sheet, where no rate was published.
"""
_MANY = """Ulysses shares heads, so one sample cannot use more GPUs than it has heads, nor a number
that does not divide them; what is left over computes other samples. Seconds of dense attention
for one minute of wan2.1-14b, whose 40 heads need ring attention to go further, and in brackets
those of exchanging heads for tokens before and after it. Nothing overlaps here.
"""


def _break_even_table() -> str:
    rows = []
    for gpu in GPUS.values():
        found = break_evens(gpu)
        for engine, by_dense in found.items():
            rate = gpu.engines.get(engine)
            star = " \\*" if rate is not None and rate.sparse else ""
            cells = [f"{name}: {value:.2f}" for name, value in by_dense.items()]
            rows.append([gpu.name, f"`{engine}`{star}", "; ".join(cells)])
        if not found:
            rows.append([gpu.name, "–", "–"])
    return markdown_table(["GPU", "engine", "pays below a density of, against"], rows)


def _method_table(model: ModelEstimate) -> str:
    shown = [gpu for gpu in GPUS.values() if gpu.engines]
    rows = []
    for x in model.methods:
        if x.problem is not None:
            rows.append([x.settings, f"cannot run: {x.problem}", *[""] * len(shown)])
            continue
        pays = []
        for gpu in shown:
            best, _ = gpu.best
            found = break_evens(gpu)
            refused = x.refused.get(gpu.architecture, {})
            able = {
                engine: limits[best] for engine, limits in found.items() if engine not in refused
            }
            names = [f"`{engine}`" for engine, limit in able.items() if x.work < limit]
            own = "" if x.refused else "its own products"
            pays.append(own or ", ".join(names) or "none")
        least = "at least " if x.at_least else ""
        rows.append([x.settings, f"{least}{x.work:.3f}", *pays])
    size = f"{model.num_frames} frames of " if model.num_frames > 1 else ""
    title = (
        f"{model.name}, {size}{model.height} x {model.width}, {model.layout.num_tokens:,} tokens:\n"
    )
    head = ["method", "work", *(f"pays on {gpu.name} with" for gpu in shown)]
    return f"{title}\n{markdown_table(head, rows)}"


def _rows_of_lengths() -> dict[tuple[str, int], Attention]:
    rows = {}
    for name, rate in FRAME_RATES.items():
        card = published_model(name)
        for length in LENGTHS:
            step = card.token[0]
            frames = 1 + round(length * rate / step) * step
            model = estimate(card, frames, methods=["dense"])
            rows[name, length] = attention_of(model)
    return rows


def dense_words(work: Attention, gpu: Gpu, count: int = 1) -> str:
    """Seconds of a dense pass, or a bound on them, or why there is none."""
    reason = not_split_reason(work, count)
    if reason is not None:
        return reason
    rate = gpu.peak_tflops if gpu.best is None else gpu.best[1].tflops
    found = seconds(work, gpu, rate, 1.0, count)
    told = f"{found.attention:,.0f}" if found.attention >= 100 else f"{found.attention:.3g}"
    text = f"{'at least ' if gpu.best is None else ''}{told}"
    return text if count == 1 else f"{text} ({found.exchange:.2g})"


def _seconds_table(rows: dict[tuple[str, int], Attention]) -> str:
    head = ["model", "length", "tokens", *GPUS]
    lines = [
        [name, f"{length} s", f"{work.tokens:,}", *(dense_words(work, g) for g in GPUS.values())]
        for (name, length), work in rows.items()
    ]
    return markdown_table(head, lines)


def _many_table(work: Attention) -> str:
    shown = [gpu for gpu in GPUS.values() if gpu.best is not None and gpu.link > 100]
    lines = []
    for count in NUM_GPUS:
        group = sharing(work, count)
        cells = (dense_words(work, gpu, group) for gpu in shown)
        lines.append([str(count), str(group), str(count // group), *cells])
    head = ["GPUs", "share the heads", "samples at once", *(gpu.name for gpu in shown)]
    return markdown_table(head, lines)
