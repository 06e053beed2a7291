"""Captioned clips made on the fly: an emoji that moves over a plain background.

    python samples/clips.py --data work/emoji.npz --out work/clips.png

draws one clip of each motion. The first frame looks as a picture of the image sample does, shrunk
by ``PICTURE_PART`` so that the object has room; everything after it follows from the first frame
and the motion, with nothing left to chance.
"""

import argparse
import math
import random
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from captions import BACKGROUNDS, LABELS, SYNONYMS, with_article
from emoji_data import save_grid

SIZE = 128
FRAMES = 9
PICTURE_PART = 0.625  # of the frame's side: the picture whose object moves
STEP = 4 / SIZE  # a moving object goes 4 px a frame: half a token of the transformer

# Motion -> the words that ask for it.
MOTIONS = {
    "moves right": ["moves to the right", "moving right", "slides right", "goes right"],
    "moves left": ["moves to the left", "moving left", "slides left", "goes left"],
    "moves up": ["moving up", "rises", "goes up"],
    "moves down": ["moving down", "falls", "goes down"],
    "grows": ["growing", "gets bigger"],
    "shrinks": ["shrinking", "gets smaller"],
    "spins": ["spinning", "rotates", "turns around"],
    "bounces": ["bouncing", "jumps up and down"],
}

# How often training shows each motion. Where the way depends on the place in the frame, it takes
# longer to learn than where everything shifts alike.
SHARES = {motion: 1 for motion in MOTIONS} | {"grows": 2, "shrinks": 3, "spins": 3}

_HOP = (0, 4, 6, 4, 0, 4, 6, 4, 0)

_PHRASES = [
    "{a_label} {motion} on {a_colour} background",
    "{a_label} {motion} on {a_colour} background",
    "{a_label} {motion}, {colour} background",
    "a 3d emoji of {a_label} {motion}, {colour} background",
    "a 3d emoji of {a_label}, {colour} background, {motion}",
    "{a_label} on {a_colour} background {motion}",
    "{label} {motion} on {colour}",
    "{a_label} {motion}",
]

# Without a name: pictures that only teach how things move.
_NAMELESS = ["object", "picture", "thing", "emoji", "shape"]


def poses():
    """Where the picture is in each frame of each motion: [motions, FRAMES, 4].

    Columns: x and y of its centre in frame sides from where it began (y down), its scale, and its
    angle in radians, clockwise.
    """
    table = torch.zeros(len(MOTIONS), FRAMES, 4)
    table[..., 2] = 1
    time = torch.arange(FRAMES) / (FRAMES - 1)
    way = STEP * torch.arange(FRAMES)
    table[0, :, 0], table[1, :, 0] = way, -way
    table[2, :, 1], table[3, :, 1] = -way, way
    table[4, :, 2], table[5, :, 2] = 1 + 0.6 * time, 1 - 0.45 * time
    table[6, :, 3] = math.pi * time
    table[7, :, 1] = -STEP * torch.tensor(_HOP)
    return table


def caption(label, background, motion, phrase=_PHRASES[0]):
    """One caption, ``"a red apple moves right on a blue background"`` by default."""
    return phrase.format(
        label=label,
        a_label=with_article(label),
        colour=background,
        a_colour=with_article(background),
        motion=motion,
    )


def random_caption(label, background, motion, rng: random.Random):
    """A caption in one of several wordings; ``label`` None for a picture without a name."""
    if label is None:
        label = rng.choice(_NAMELESS)
    elif label in SYNONYMS and rng.random() < 1 / 3:
        label = rng.choice(SYNONYMS[label])
    if rng.random() < 0.5:
        motion = rng.choice(MOTIONS[motion])
    return caption(label, background, motion, rng.choice(_PHRASES))


def motion_words():
    """Every wording of every motion, the longest first, so that none hides another."""
    words = [word for motion, others in MOTIONS.items() for word in (motion, *others)]
    return sorted(words, key=len, reverse=True)


def tokenizer_corpus():
    """Texts for fitting the tokenizer: each name, colour and motion in each phrase."""
    names = [*LABELS, *(word for words in SYNONYMS.values() for word in words), *_NAMELESS]
    colours, motions = list(BACKGROUNDS), motion_words()
    texts = [
        caption(name, colours[i % len(colours)], motions[i % len(motions)], phrase)
        for i, name in enumerate(names)
        for phrase in _PHRASES
    ]
    return texts + [f"{motion}, {colour}" for motion in motions for colour in colours] * 4


def render(rgba, background, pose, size=SIZE):
    """Draw clips.

    ``rgba`` [B, 4, H, W] in [0, 1], colours multiplied by alpha; ``background`` [B, 3] in [0, 1];
    ``pose`` [B, F, 4] as in :func:`poses`, its centre counted from the middle of the frame and its
    scale in frame sides -> [B, 3, F, size, size] in [-1, 1].
    """
    b, f, _ = pose.shape
    x, y, scale, angle = pose.flatten(0, 1).unbind(-1)
    cos, sin = angle.cos() / scale, angle.sin() / scale
    # From a place in the frame to the place in the picture that is seen there.
    back = torch.stack(
        [
            torch.stack([cos, sin, -2 * (cos * x + sin * y)], -1),
            torch.stack([-sin, cos, -2 * (-sin * x + cos * y)], -1),
        ],
        -2,
    )
    # Two samples per pixel and direction, so that shrunken pictures do not shimmer.
    grid = F.affine_grid(back, (b * f, 4, 2 * size, 2 * size), align_corners=False)
    seen = F.grid_sample(rgba.repeat_interleave(f, 0), grid, align_corners=False)
    seen = F.avg_pool2d(seen, 2).view(b, f, 4, size, size)
    video = seen[:, :, :3] + background[:, None, :, None, None] * (1 - seen[:, :, 3:])
    return (video * 2 - 1).transpose(1, 2).contiguous()


class Clips:
    """Random captioned clips from the pictures of ``emoji_data.py``."""

    def __init__(self, data, others=True):
        arrays = np.load(data)
        self.named = _pictures(arrays["labelled"])
        self.others = _pictures(arrays["others"]) if others else None
        self.colours = torch.tensor(list(BACKGROUNDS.values())) / 255
        self.poses = poses()

    def one(self, label, background, motion, frames=FRAMES):
        """The clip of three names, ``[3, frames, SIZE, SIZE]``, as a clean sample would show it.

        With more frames it is the same motion in smaller steps.
        """
        picture = self.named[list(LABELS).index(label)]
        colour = self.colours[list(BACKGROUNDS).index(background)]
        table = self.poses[list(MOTIONS).index(motion)]
        at = torch.linspace(0, FRAMES - 1, frames)
        before = at.floor().long().clamp_max(FRAMES - 2)
        rest = (at - before)[:, None]
        pose = table[before] * (1 - rest) + table[before + 1] * rest
        pose[:, 2] *= PICTURE_PART
        return render(picture[None], colour[None], pose[None])[0]

    def batch(self, size, rng, caption_rng, frames=None, side=SIZE):
        """``size`` clips [B, 3, F, side, side] and their captions, motions by ``SHARES``.

        ``frames`` [B, F]: only these of each clip's FRAMES. A third of the clips show pictures
        without a name, half of those in strange colours, so that motion is learnt apart from what
        moves.
        """
        deck = torch.tensor([i for i, name in enumerate(MOTIONS) for _ in range(SHARES[name])])
        motion = deck.repeat(-(-size // len(deck)))
        motion = motion[torch.randperm(len(motion), generator=rng)][:size]
        label = torch.randint(len(self.named), (size,), generator=rng)
        colour = torch.randint(len(self.colours), (size,), generator=rng)
        rgba, background = self.named[label].clone(), self.colours[colour].clone()
        # Drawn backgrounds are never exactly the colour that was asked for.
        background += 0.04 * torch.randn(background.shape, generator=rng)
        names = [list(LABELS)[i] for i in label.tolist()]
        if self.others is not None:
            for i in (torch.rand(size, generator=rng) < 1 / 3).nonzero()[:, 0].tolist():
                names[i] = None
                rgba[i] = self.others[int(torch.randint(len(self.others), (), generator=rng))]
                if torch.rand((), generator=rng) < 0.5:
                    rgba[i, :3] = rgba[i, torch.randperm(3, generator=rng)]
                    background[i] = torch.rand(3, generator=rng)
        for i in (torch.rand(size, generator=rng) < 0.5).nonzero()[:, 0].tolist():
            soft = int(torch.randint(64, 193, (), generator=rng))  # as drawn pictures are
            small = F.interpolate(rgba[i : i + 1], size=(soft, soft), mode="area")
            rgba[i] = F.interpolate(small, size=rgba.shape[-2:], mode="bilinear")[0]
        pose = self.poses[motion].clone()
        pose[..., :2] += 0.03 * (2 * torch.rand(size, 1, 2, generator=rng) - 1)
        pose[..., 2] *= PICTURE_PART * (0.92 + 0.16 * torch.rand(size, 1, generator=rng))
        if frames is not None:
            pose = pose.gather(1, frames[..., None].expand(-1, -1, 4))
        clips = render(rgba, background.clamp(0, 1), pose, side)
        colours, motions = list(BACKGROUNDS), list(MOTIONS)
        texts = [
            random_caption(name, colours[c], motions[m], caption_rng)
            for name, c, m in zip(names, colour.tolist(), motion.tolist())
        ]
        return clips, texts


def _pictures(rgba):
    """[N, H, W, 4] uint8 -> [N, 4, H, W] in [0, 1], colours multiplied by alpha."""
    pixels = torch.from_numpy(rgba).float().permute(0, 3, 1, 2) / 255
    return torch.cat([pixels[:, :3] * pixels[:, 3:], pixels[:, 3:]], 1)


def save_strips(clips, path):
    """Write [B, 3, F, H, W] clips in [-1, 1] as one PNG, a clip per row."""
    save_grid(clips.transpose(1, 2).flatten(0, 1), path, columns=clips.shape[2])


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="file written by emoji_data.py")
    parser.add_argument("--out", type=Path, required=True, help="PNG to write")
    args = parser.parse_args()
    clips = Clips(args.data, others=False)
    labels, colours = list(LABELS), list(BACKGROUNDS)
    rows = [clips.one(labels[7 * i], colours[i], motion) for i, motion in enumerate(MOTIONS)]
    save_strips(torch.stack(rows), args.out)


if __name__ == "__main__":
    main()
