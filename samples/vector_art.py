"""Build captioned pictures of the sample's labels at any size, from vector art.

    python samples/vector_art.py --packages work/packages --size 1024 --out work/art-1024

Draws each of the 64 labels on plain backgrounds as PNG files with captions in ``metadata.jsonl``,
which is what ``dittfast distill prepare`` takes as ``data.pictures``. The drawings are the SVG
files of the npm package ``@lobehub/fluent-emoji-modern``, rendered by skia-python; with
``--style 3d`` they are the 256 px pictures that the sample model was first trained on. Pictures
that are there already are kept, so an interrupted run goes on; the captions follow from the seed,
the label and the background alone.
"""

import argparse
import io
import json
import random
import subprocess
import tarfile
from pathlib import Path

import numpy as np
from captions import BACKGROUNDS, LABELS, random_caption
from emoji_data import code_points
from PIL import Image

from dittfast.files import atomic_path, write_text

# Style -> npm name, the file that ``npm pack`` writes, the pictures' suffix in it.
STYLES = {
    "modern": (
        "@lobehub/fluent-emoji-modern@1.0.0",
        "lobehub-fluent-emoji-modern-1.0.0.tgz",
        ".svg",
    ),
    "3d": ("@lobehub/fluent-emoji-3d@1.1.0", "lobehub-fluent-emoji-3d-1.1.0.tgz", ".webp"),
}
NAMES = ("emojibase-data@17.0.0", "emojibase-data-17.0.0.tgz")


def open_package(folder, name, file_name):
    """The open tar archive of an npm package, downloaded where ``folder`` lacks it."""
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / file_name).exists():
        subprocess.run(["npm", "pack", name], cwd=folder, check=True)
    return tarfile.open(folder / file_name)


def files_of_labels(packages, style):
    """Label -> the bytes of its picture file."""
    package, file_name, suffix = STYLES[style]
    with open_package(packages, *NAMES) as archive:
        entries = json.load(archive.extractfile("package/en/data.json"))
    hexcodes = {entry["label"]: code_points(entry["hexcode"]) for entry in entries}
    with open_package(packages, package, file_name) as archive:
        members = {
            code_points(Path(m.name).stem): m
            for m in archive.getmembers()
            if m.name.endswith(suffix)
        }
        return {
            label: archive.extractfile(members[hexcodes[cldr]]).read()
            for label, cldr in LABELS.items()
        }


def draw_svg(data, size):
    """An SVG file as ``[size, size, 4]`` uint8, straight alpha."""
    import skia

    dom = skia.SVGDOM.MakeFromStream(skia.MemoryStream(data, True))
    own = dom.containerSize()
    surface = skia.Surface(size, size)
    canvas = surface.getCanvas()
    canvas.clear(skia.ColorTRANSPARENT)
    scale = size / max(own.width(), own.height())
    canvas.translate((size - scale * own.width()) / 2, (size - scale * own.height()) / 2)
    canvas.scale(scale, scale)
    dom.render(canvas)
    return surface.toarray(colorType=skia.kRGBA_8888_ColorType)


def draw(data, style, size):
    """A label's picture as ``[size, size, 4]`` uint8."""
    if style == "modern":
        return draw_svg(data, size)
    picture = Image.open(io.BytesIO(data)).convert("RGBA")
    if picture.size != (size, size):
        picture = picture.resize((size, size), Image.Resampling.LANCZOS)
    return np.asarray(picture)


def on_background(rgba, colour):
    """``[H, W, 4]`` uint8 over a flat colour, as a picture."""
    alpha = rgba[..., 3:].astype(np.float32) / 255
    pixels = rgba[..., :3] * alpha + np.asarray(colour, np.float32) * (1 - alpha)
    return Image.fromarray(np.rint(pixels).astype(np.uint8))


def plan(backgrounds, seed):
    """(file name, label, background, caption) of each picture.

    Of eight backgrounds label number n gets ``backgrounds`` that are evenly spread, the first of
    them number n, so that every background is as frequent as any other.
    """
    colours = list(BACKGROUNDS)
    for number, label in enumerate(LABELS):
        for turn in range(backgrounds):
            index = (number + number // len(colours) + turn * len(colours) // backgrounds) % 8
            rng = random.Random(f"{seed} {label} {colours[index]}")
            text = random_caption(label, colours[index], rng)
            yield f"{number:02d}-{colours[index]}.png", label, colours[index], text


def build(packages, out, style, size, backgrounds, seed):
    """Write the pictures that are not there yet, then their captions."""
    files = files_of_labels(packages, style)
    out.mkdir(parents=True, exist_ok=True)
    lines, drawn, written = [], {}, 0
    for name, label, background, text in plan(backgrounds, seed):
        lines.append(json.dumps({"file_name": name, "text": text}))
        if (out / name).exists():
            continue
        if label not in drawn:
            drawn = {label: draw(files[label], style, size)}
        with atomic_path(out / name) as temporary:
            picture = on_background(drawn[label], BACKGROUNDS[background])
            picture.save(temporary, format="PNG", compress_level=1)
        written += 1
    write_text(out / "metadata.jsonl", "\n".join(lines) + "\n")
    print(f"{out}: {len(lines)} pictures of {size} px, {written} of them drawn now")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--packages", type=Path, required=True, help="folder of the npm tarballs")
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--size", type=int, required=True, help="pixels per side")
    parser.add_argument("--style", choices=STYLES, default="modern", help="(default: modern)")
    parser.add_argument(
        "--backgrounds", type=int, default=8, choices=(1, 2, 4, 8), help="of each label"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the captions' phrasings")
    args = parser.parse_args()
    build(args.packages, args.out, args.style, args.size, args.backgrounds, args.seed)


if __name__ == "__main__":
    main()
