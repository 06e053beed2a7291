"""Train the feature network on the sample's art: label and background of augmented pictures.

    python samples/train_features.py --data work/emoji.npz --out samples/models/sample-features

A few CPU minutes. Its features serve clean-fid offline and its class probabilities judge whether a
picture shows what its prompt asked for; they are no Inception features.
"""

import argparse
import math
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from captions import BACKGROUNDS, LABELS, SYNONYMS

from dittfast.measure.features import FeatureNetwork, save_features


def load_art(path):
    """[64, 4, 96, 96] in 0..1, colours multiplied by alpha."""
    rgba = torch.from_numpy(np.load(path)["labelled"]).permute(0, 3, 1, 2).float() / 255
    rgba[:, :3] *= rgba[:, 3:]
    return F.interpolate(rgba, (96, 96), mode="area")


def draw(art, label, background, size, generator=None):
    """Pictures [B, 3, size, size] in 0..1; with a generator moved, scaled, blurred and noisy."""
    n = len(label)
    rand = lambda *shape: torch.rand(*shape, generator=generator)  # noqa: E731
    zoom, shift, angle = torch.ones(n), torch.zeros(n, 2), torch.zeros(n)
    if generator is not None:
        zoom, shift = 0.85 + 0.4 * rand(n), 0.3 * (rand(n, 2) - 0.5)
        angle = 0.4 * (rand(n) - 0.5)
    turn = torch.stack([angle.cos(), -angle.sin(), angle.sin(), angle.cos()], -1).view(n, 2, 2)
    matrix = torch.cat([turn * zoom[:, None, None], shift[..., None]], -1)
    grid = F.affine_grid(matrix, (n, 4, size, size), align_corners=False)
    moved = F.grid_sample(art[label], grid, align_corners=False)
    colours = torch.tensor(list(BACKGROUNDS.values())).float()[background] / 255
    if generator is None:
        return moved[:, :3] + (1 - moved[:, 3:]) * colours[:, :, None, None]
    colours = (colours + 0.08 * (rand(n, 3) - 0.5)).clamp(0, 1)
    image = moved[:, :3] + (1 - moved[:, 3:]) * colours[:, :, None, None]
    image = image * (0.85 + 0.3 * rand(n, 1, 1, 1)) + 0.1 * (rand(n, 3, 1, 1) - 0.5)
    # What a rough generator does: lost detail in some, blotches and noise in all.
    coarse = F.interpolate(F.avg_pool2d(image, 4), size=(size, size), mode="bilinear")
    blend = rand(n, 1, 1, 1) * (rand(n, 1, 1, 1) < 0.5)
    image = image.lerp(coarse, blend)
    blotches = torch.randn(n, 3, 8, 8, generator=generator)
    image = image + 0.12 * rand(n, 1, 1, 1) * F.interpolate(blotches, (size, size), mode="bicubic")
    noise = torch.randn(image.shape, generator=generator)
    return (image + 0.08 * rand(n, 1, 1, 1) * noise).clamp(0, 1)


def accuracy(network, images, label, background):
    """Shares of right labels and right backgrounds."""
    with torch.no_grad():
        logits = network(images)
    return [float((x.argmax(-1) == y).float().mean()) for x, y in zip(logits, (label, background))]


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, help="written by emoji_data.py")
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--steps", type=int, default=280)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--threads", type=int, default=2, help="CPU threads")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    art = load_art(args.data)
    network = FeatureNetwork(tuple(LABELS), tuple(BACKGROUNDS), SYNONYMS)
    optimizer = torch.optim.AdamW(network.parameters(), lr=args.lr, weight_decay=0.01)
    generator = torch.Generator().manual_seed(1)
    began, losses = time.process_time(), []
    for step in range(args.steps):
        for group in optimizer.param_groups:
            warm = min(1.0, (step + 1) / 50)
            group["lr"] = args.lr * warm * 0.5 * (1 + math.cos(math.pi * step / args.steps))
        label = torch.randint(len(LABELS), (args.batch,), generator=generator)
        background = torch.randint(len(BACKGROUNDS), (args.batch,), generator=generator)
        out = network(draw(art, label, background, network.size, generator))
        loss = F.cross_entropy(out[0], label, label_smoothing=0.05)
        loss = loss + 0.3 * F.cross_entropy(out[1], background)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
        if step % 50 == 0:
            print(f"step {step} loss {sum(losses[-50:]) / len(losses[-50:]):.3f}", flush=True)
    seconds = time.process_time() - began
    network.eval()
    pairs = torch.cartesian_prod(torch.arange(len(LABELS)), torch.arange(len(BACKGROUNDS)))
    plain = draw(art, *pairs.T, network.size)
    held_out = torch.Generator().manual_seed(2)
    rough = draw(art, *pairs.T, network.size, held_out)
    facts = {
        "data": "@lobehub/fluent-emoji-3d 1.1.0, 64 labels on 8 backgrounds, augmented",
        "steps": args.steps,
        "batch": args.batch,
        "cpu_seconds": round(seconds),
        "loss_last_50_steps": round(sum(losses[-50:]) / len(losses[-50:]), 4),
        "accuracy_plain": [round(x, 4) for x in accuracy(network, plain, *pairs.T)],
        "accuracy_augmented": [round(x, 4) for x in accuracy(network, rough, *pairs.T)],
    }
    save_features(network, args.out, facts)
    print(facts)


if __name__ == "__main__":
    main()
