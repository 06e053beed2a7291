"""What the page shows, as HTML: pictures with words, tables, and errors in a sentence."""

from __future__ import annotations

from html import escape

from dittfast.measure.draw import difference
from dittfast.measure.embed import image_tag, png_source, webp_source
from dittfast.measure.summary import kept

from .studio import Look, Result

SIZE = 768  # pixels a picture is wide, at most

STYLE = """
.dittfast { overflow-wrap: anywhere; }
.dittfast figure { margin: 0; }
.dittfast .pictures { display: grid; gap: .8rem;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 15rem), 1fr)); }
.dittfast .two { display: grid; gap: .8rem;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 22rem), 1fr)); }
.dittfast img { width: 100%; height: auto; display: block; border-radius: 4px; }
.dittfast .two img { background: #fff; width: auto; max-width: 100%; }
.dittfast .two figure { min-width: 0; }
.dittfast figcaption, .dittfast .faint { font-size: .875rem; }
.dittfast .wide { overflow-x: auto; margin: .8rem 0; }
.dittfast table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
.dittfast th, .dittfast td { padding: .3rem .7rem; text-align: left; white-space: nowrap; }
.dittfast .problem { border-left: 4px solid #c0392b; padding: .6rem .8rem; }
.dittfast pre { overflow-x: auto; font-size: .8rem; }
@media (max-width: 40rem) {
  .dittfast table { font-size: .8rem; }
  .dittfast th, .dittfast td { padding: .3rem .4rem; }
  .dittfast .two img { max-width: none; width: 34rem; }
}
"""


def _box(inside: str, **attributes: str) -> str:
    extra = "".join(f' {name}="{escape(value)}"' for name, value in attributes.items())
    return f'<div class="dittfast"{extra}>{inside}</div>'


def sentence(words: str) -> str:
    """What happens now; a screen reader says it."""
    return _box(f"<p>{escape(words)}</p>", role="status")


def problem(error: BaseException) -> str:
    """An error in words, said at once by a screen reader."""
    words = " ".join(str(error).split()) or type(error).__name__
    return _box(f'<p class="problem"><b>That did not work.</b> {escape(words)}</p>', role="alert")


def _seconds(value: float | None) -> str:
    return "" if value is None else f"{value:.3g} s"


def _table(result: Result) -> str:
    dense, sparse, data = result.dense, result.sparse, result.record
    ratios = data["dense_over_sparse"]
    speed = "did not run"
    if sparse.did_not_run is None:
        speed = f"{ratios['per_step'] or ratios['whole']:.2f} x as fast"
    amount = kept(*sparse.amount)
    amount = "differs by call" if amount == "-" else amount
    rows = [
        (dense.name, "1", dense.seconds_per_step, dense.seconds, ""),
        (sparse.name, amount, sparse.seconds_per_step, sparse.seconds, speed),
    ]
    head = ("", "density or FLOPs", "a step", "in all", "against dense")
    lines = "".join(
        f'<tr><th scope="row">{escape(name)}</th><td>{escape(kept)}</td>'
        f"<td>{_seconds(step)}</td><td>{_seconds(whole)}</td><td>{escape(words)}</td></tr>"
        for name, kept, step, whole, words in rows
    )
    columns = "".join(f'<th scope="col">{escape(cell)}</th>' for cell in head)
    return (
        '<div class="wide" tabindex="0" role="region" aria-label="Times and density"><table>'
        f"<thead><tr>{columns}</tr></thead><tbody>{lines}</tbody></table></div>"
    )


def distance(quality: dict) -> str:
    """How far the method's picture is from dense attention's, in words."""
    if quality["identical"]:
        return "identical pictures"
    words = f"PSNR {quality['psnr_db']:.2f} dB"
    return words if quality["ssim"] is None else f"{words}, SSIM {quality['ssim']:.4f}"


def comparison(result: Result) -> str:
    """Dense, method and difference side by side, with their times and density."""
    dense, sparse, data = result.dense, result.sparse, result.record
    apart, gain = difference(dense.run.frames, sparse.run.frames)
    times, brighter = ("", "") if gain == 1 else (f", times {gain}", f", brightened {gain} times")
    near = distance(data["against_dense"])
    prompt = data["prompt"]
    kind = "picture" if len(dense.run.frames) == 1 else "clip"
    panels = [
        (dense.run.frames, "dense", f"The {kind} that dense attention drew for: {prompt}"),
        (
            sparse.run.frames,
            sparse.name,
            f"The {kind} that {sparse.name} drew for the same prompt and noise; {near} to dense",
        ),
        (
            apart,
            f"difference{times}: {near}",
            f"Where the two differ{brighter}; black where they agree",
        ),
    ]
    figures = "".join(
        f"<figure>{image_tag(webp_source(frames, SIZE), alt)}"
        f"<figcaption>{escape(name)}</figcaption></figure>"
        for frames, name, alt in panels
    )
    warning = ""
    if sparse.did_not_run is not None:
        words = f"<b>{escape(sparse.name)} did not run:</b> {escape(sparse.did_not_run)}"
        warning = f'<p class="problem">{words}</p>'
    setting = (
        f"{data['model']} on {data['device']['name']}, {data['dtype']}, seed {data['seed']}; one "
        "run of each after a warm-up of one step"
    )
    return _box(
        f'{warning}<div class="pictures">{figures}</div>{_table(result)}'
        f'<p class="faint">{escape(setting)}.</p><details><summary>What ran where</summary>'
        f"<pre>{escape(str(sparse.description))}</pre></details>"
    )


def _figure(image: str, name: str) -> str:
    """A drawing with writing in it, which scrolls rather than shrinks where there is no room."""
    return (
        f'<figure><div class="wide" tabindex="0" role="region" aria-label="{name}">{image}</div>'
        f"<figcaption>{name}</figcaption></figure>"
    )


def attention(look: Look | None, reason: str | None) -> str:
    """The plan's mask and what it keeps of dense attention, or why that is not shown."""
    if look is None:
        return _box(f"<p>{escape(reason)}</p>" if reason else "")
    words = (
        f"{look.layer}, step {look.step + 1}: {look.density:.1%} of the token pairs are kept, and "
        f"{look.mass:.1%} of dense attention lies on them; the layer's output is off by "
        f"{look.error:.1%}. Means over the heads, {look.tokens:,} tokens."
    )
    mask = image_tag(
        png_source(look.mask),
        f"Block mask: which key blocks each query block sees; density {look.density:.3f}",
    )
    kept = image_tag(
        png_source(look.kept),
        f"Dense attention of every head: kept blocks blue, dropped ones red; {look.mass:.1%} kept",
    )
    return _box(
        f'<p>{escape(words)}</p><div class="two">{_figure(mask, "the plan")}'
        f"{_figure(kept, 'what it keeps')}</div>"
    )
