"""Build the picture set: Fluent 3D emoji at 256 px with an alpha channel, and their names.

    python samples/emoji_data.py --packages work/packages --out work/emoji.npz

The art comes from the npm package ``@lobehub/fluent-emoji-3d`` and the names from
``emojibase-data``; packages missing from ``--packages`` are fetched with ``npm pack``.
"""

import argparse
import io
import json
import subprocess
import tarfile
from pathlib import Path

import numpy as np
import torch
from captions import BACKGROUNDS, LABELS
from PIL import Image

# npm name -> the file that ``npm pack`` writes.
PACKAGES = {
    "@lobehub/fluent-emoji-3d@1.1.0": "lobehub-fluent-emoji-3d-1.1.0.tgz",
    "emojibase-data@17.0.0": "emojibase-data-17.0.0.tgz",
}
# emojibase groups: smileys, animals and nature, food, travel, activities, objects.
PICTURE_GROUPS = {0, 3, 4, 5, 6, 7}


def fetch_packages(folder: Path):
    """Return the two open tar archives, downloading what ``folder`` lacks."""
    folder.mkdir(parents=True, exist_ok=True)
    archives = []
    for name, file_name in PACKAGES.items():
        if not (folder / file_name).exists():
            subprocess.run(["npm", "pack", name], cwd=folder, check=True)
        archives.append(tarfile.open(folder / file_name))  # noqa: SIM115 - closed at exit
    return archives


def code_points(hexcode):
    """File-name form of a code point sequence: lower case, without variation selectors."""
    return hexcode.lower().replace("-fe0f", "")


def build(packages: Path, out: Path, n_others: int):
    """Write ``out`` with ``labelled`` and ``others`` [N, 256, 256, 4] uint8, and ``words``."""
    fluent, emojibase = fetch_packages(packages)
    entries = json.load(emojibase.extractfile("package/en/data.json"))
    members = {
        code_points(Path(m.name).stem): m for m in fluent.getmembers() if m.name.endswith(".webp")
    }

    def picture(entry):
        data = fluent.extractfile(members[code_points(entry["hexcode"])]).read()
        image = Image.open(io.BytesIO(data)).convert("RGBA")
        assert image.size == (256, 256)
        return np.asarray(image)

    by_name = {entry["label"]: entry for entry in entries}
    labelled = np.stack([picture(by_name[cldr]) for cldr in LABELS.values()])
    used = set(LABELS.values())
    rest = [
        entry
        for entry in entries
        if entry.get("group") in PICTURE_GROUPS
        and entry["label"] not in used
        and code_points(entry["hexcode"]) in members
    ]
    rest = rest[:: max(1, len(rest) // n_others)][:n_others]
    words = sorted({w for e in entries for w in [*e["label"].lower().split(), *e.get("tags", [])]})
    out.parent.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(
        out, labelled=labelled, others=np.stack([picture(e) for e in rest]), words=np.array(words)
    )
    print(f"{out}: {len(labelled)} labelled pictures, {len(rest)} others, {len(words)} words")


def compose(rgba, background_index):
    """Put pictures on flat backgrounds.

    ``rgba`` [B, H, W, 4] uint8 and ``background_index`` [B] -> [B, 3, H, W] in [-1, 1].
    """
    colours = torch.tensor(list(BACKGROUNDS.values()), dtype=torch.float32)[background_index] / 255
    pixels = rgba.float() / 255
    alpha = pixels[..., 3:]
    image = pixels[..., :3] * alpha + colours[:, None, None, :] * (1 - alpha)
    return (image * 2 - 1).permute(0, 3, 1, 2).contiguous()


def save_grid(images, path, columns=8):
    """Write [N, 3, H, W] images in [-1, 1] as one PNG."""
    pixels = ((images.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()
    n, height, width, _ = pixels.shape
    sheet = np.full((-(-n // columns) * height, columns * width, 3), 255, np.uint8)
    for i in range(n):
        row, column = divmod(i, columns)
        sheet[row * height :, column * width :][:height, :width] = pixels[i]
    Image.fromarray(sheet).save(path)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--packages", type=Path, required=True, help="folder of the npm tarballs")
    parser.add_argument("--out", type=Path, required=True, help="the .npz file to write")
    parser.add_argument(
        "--others", type=int, default=256, help="unlabelled pictures kept for the VAE"
    )
    args = parser.parse_args()
    build(args.packages, args.out, args.others)


if __name__ == "__main__":
    main()
