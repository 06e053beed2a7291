"""Seconds, memory and quality of every method by size: 256 to 1,024 px, and 9 to 65 frames.

    python samples/quality_table.py draw --size 1024 --count 2 --packages work/packages -o FOLDER
    python samples/quality_table.py draw --frames 33 --count 2 --emoji work/emoji.npz -o FOLDER
    python samples/quality_table.py table -o FOLDER --save docs/quality-sizes

``draw`` adds pictures or clips of one size to a folder. Dense and the methods of an evaluation take
turns, prompt by prompt, on one thread; what is there is not drawn again, so a run that is killed
goes on, and the same command with a higher ``--count`` adds to it. At 256 px sample-flux draws in
one go. Above, sample-flux-large draws the second stage of ``--stages 256,SIZE``; its first stage is
drawn once for all methods, and its seconds count for each. So does a clip's first frame.

``table`` says for each arm how many times as fast as dense attention a whole call is, in processor
time, the peak of the process's memory, and distances in the 64 features of ``sample-features``: the
root mean square over pairs of one prompt, as a part of that of art of different prompts, so that 0
is the same picture and 1 any other. Pairs need few pictures; a Fréchet distance needs hundreds
(``dittfast evaluate fid``). There are three: to the art that was trained on; to dense attention at
the model's own best size, 256 px or 9 frames, same prompt and noise; and, as the floor, between two
seeds of that. A prompt that is drawn wrong, by all methods alike, outweighs all others
in the first; so it is also told as a part of that of dense attention at this size, prompt by prompt
and then by the geometric mean, which compares rows of unlike counts as well.
"""

import argparse
import functools
import json
import math
import statistics
import time
from pathlib import Path

import numpy as np
import torch
import vector_art
from captions import BACKGROUNDS, LABELS
from captions import caption as still_caption
from clips import MOTIONS, Clips
from clips import caption as moving_caption
from distill_results import as_frames
from large_pictures import PICTURES, sharpness
from PIL import Image

from dittfast.cli.adapter import adapter_variants
from dittfast.environment import peak_memory, reset_peak_memory
from dittfast.files import atomic_path, write_json, write_text
from dittfast.markdown import markdown_table
from dittfast.measure.features import load_features
from dittfast.measure.metrics import image_tensor, psnr
from dittfast.pipelines.measure.variants import make_variants, read_variants
from dittfast.pipelines.runs.call import call_arguments
from dittfast.pipelines.runs.compare import draw as draw_once
from dittfast.pipelines.runs.first_frame import with_first_frame
from dittfast.pipelines.runs.high_resolution import convolutions_by_pixel, image_to_image
from dittfast.pipelines.runs.sources import find, load

EVALUATIONS = Path(__file__).resolve().parent.parent / "configs" / "evaluations"
BEST = {"pictures": 256, "clips": 9}  # px, frames
OTHER_SEED = 1000  # of the floor

PAGE = """# Every method by size

Written by `samples/quality_table.py table`, whose first lines say what each column is; all values
are in [{name}.json]({name}.json). Distances are root mean squares over pairs of one prompt in the
features of `sample-features`, as a part of that between the art of different prompts: 0 is the same
picture, 1 any other. "Of dense" is the distance to the art as a part of that of dense attention
(the weights that ship, at this size), prompt by prompt, the geometric mean: it compares rows of
unlike counts, and a prompt that is drawn wrong by all alike does not outweigh the others. "Two
seeds" is dense attention with another seed, at the model's own best size: the floor.

![Processor seconds of a whole call against the distance to the art; dense is 1]({name}.png)

{table}"""


def items(count, motions=()):
    """(label, background, motion) of each prompt; the same prompt has the same number always."""
    first = PICTURES if not motions else [("car", "green"), ("fox", "blue"), ("mushroom", "black")]
    turns = [
        (label, list(BACKGROUNDS)[(number + turn) % len(BACKGROUNDS)])
        for turn in range(len(BACKGROUNDS))
        for number, label in enumerate(LABELS)
    ]
    chosen = list(dict.fromkeys([*first, *turns]))[:count]
    # moves right, moves left, grows and so on, each in its turn
    return [
        (*pair, motions[(number + 2 * (number > 1)) % len(motions)] if motions else None)
        for number, pair in enumerate(chosen)
    ]


class Task:
    """Everything of one size: where it lies, how a picture or clip of it is drawn.

    Args:
        args: the command line's.
        kind: "pictures" or "clips".
        size: pixels, or frames.
        model: sample model or folder; None takes the one for this size.
        name: of the folder, behind kind and size, where the model is another.
    """

    def __init__(self, args, kind, size, model=None, name=None):
        self.args, self.kind, self.size = args, kind, size
        large = kind == "pictures" and (size > BEST[kind] or name == "large")
        default = "sample-video" if kind == "clips" else f"sample-flux{'-large' * large}"
        self.source = find(model or default)
        self.folder = args.output / "-".join(filter(None, (f"{kind}-{size}", name)))
        self.count = args.count
        self.best = self
        if size > BEST[kind]:
            self.best = Task(args, kind, BEST[kind], name="large" if large else None)

    @functools.cached_property
    def pipe(self):
        pipe = load(self.source, "cpu", torch.float32)
        pipe.set_progress_bar_config(disable=True)
        return pipe

    @functools.cached_property
    def larger(self):
        return image_to_image(self.pipe)

    def prompts(self):
        """The captions of the first ``--count`` prompts."""
        if self.kind == "pictures":
            return [still_caption(label, colour) for label, colour, _ in self.items()]
        return [moving_caption(*item) for item in self.items()]

    def items(self, count=None):
        motions = list(MOTIONS) if self.kind == "clips" else ()
        return items(count or self.count, motions)

    def record(self, arm, number):
        return self.folder / arm / f"{number:05d}.json"

    def read(self, arm, number):
        """What is known of a picture, or None."""
        path = self.record(arm, number)
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None

    def frames(self, arm, number):
        """``[F, H, W, 3]`` of a picture or clip; a clip's frames lie side by side in its file."""
        strip = np.asarray(Image.open(self.record(arm, number).with_suffix(".png")).convert("RGB"))
        return np.stack(np.split(strip, strip.shape[1] // strip.shape[0], 1))

    def begin(self, number, seed):
        """Pipeline and call of a prompt, and the seconds that went before them."""
        prompt, settings = self.prompts()[number], self.source.settings
        if self.kind == "clips":
            call = call_arguments(
                self.pipe, prompt, settings, num_frames=self.size - 1, num_inference_steps=8
            )
            image, seconds = self.first_frame(call, number, seed)
            return self.pipe, call | {"image": image}, seconds
        if self.best is self:
            call = call_arguments(self.pipe, prompt, settings, num_inference_steps=8)
            return self.pipe, call, 0.0
        before = self.best.dense(number, seed)
        small = Image.fromarray(self.best.frames(arm_of(seed), number)[0])
        later = settings["stages"]["later_call"] | {"num_inference_steps": 10}
        call = call_arguments(
            self.pipe, prompt, settings, height=self.size, width=self.size, **later
        )
        enlarged = small.resize((self.size, self.size), Image.Resampling.LANCZOS)
        call |= {"image": enlarged, "strength": settings["stages"]["strength"]}
        return self.larger, call, before["cpu_seconds"]

    def first_frame(self, call, number, seed):
        """A clip's first frame, drawn once for all methods and lengths; its seconds."""
        path = self.args.output / "first-frames" / f"{number:05d}-{seed}.png"
        record = path.with_suffix(".json")
        if not record.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            start = time.process_time()
            image = with_first_frame(self.pipe, call, self.source.settings)["image"]
            picture = image(call["prompt"], seed)
            spent = time.process_time() - start
            save_picture(path, picture)
            write_json(record, {"cpu_seconds": spent})
        known = json.loads(record.read_text(encoding="utf-8"))
        return Image.open(path).convert("RGB"), known["cpu_seconds"]

    def dense(self, number, seed=None):
        """The record of the dense picture, which is drawn if it is not there."""
        seed = number if seed is None else seed
        self.draw(arm_of(seed), None, number, seed)
        return self.read(arm_of(seed), number)

    def draw(self, arm, variant, number, seed):
        """Draw a prompt with a method (None: dense) unless it is there, and measure it."""
        if self.read(arm, number) is not None:
            return
        pipe, call, before = self.begin(number, seed)
        method, schedule = (None, None) if variant is None else (variant.drawn_by, variant.schedule)
        later = self.kind == "pictures" and self.best is not self
        seed += later  # as generate_high_resolution, also below
        reset_peak_memory("cpu")
        start = time.process_time()
        with convolutions_by_pixel(pipe if later else None):
            drawn, description = draw_once(pipe, call, seed, method, schedule)
        spent = time.process_time() - start
        peak = peak_memory("cpu")
        path = self.record(arm, number)
        path.parent.mkdir(parents=True, exist_ok=True)
        save_picture(path.with_suffix(".png"), Image.fromarray(np.concatenate(drawn.frames, 1)))
        row = {
            "prompt": call["prompt"],
            "seed": seed,
            "cpu_seconds": before + spent,
            "of_the_method": spent,
            "peak_bytes": peak,
            "density": 1.0 if description is None else description.density,
            "work": 1.0 if description is None else description.work,
            "features": features_of(drawn.frames),
        }
        if self.kind == "pictures":
            row["sharpness"] = sharpness(Image.fromarray(drawn.frames[0]))
        write_json(path, row)
        print(self.folder.name, arm, number, f"{before + spent:.1f} processor s", flush=True)

    def art(self, number):
        """The features of the art of a prompt, at this size."""
        path = self.record("art", number)
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            label, background, motion = self.items(number + 1)[number]
            if self.kind == "clips":
                clips = clips_of(self.args.emoji)
                frames = as_frames(clips.one(label, background, motion, self.size))
            else:
                style = "3d" if self.size == BEST[self.kind] else "modern"
                rgba = vector_art.draw(
                    art_files(self.args.packages, style)[label], style, self.size
                )
                picture = vector_art.on_background(rgba, BACKGROUNDS[background])
                frames = np.asarray(picture)[None]
            write_json(path, {"features": features_of(frames)})
        return json.loads(path.read_text(encoding="utf-8"))["features"]


def arm_of(seed):
    return "dense" if seed < OTHER_SEED else "other-seed"


def save_picture(path, picture):
    with atomic_path(path) as temporary:
        picture.save(temporary, format="PNG")


@functools.cache
def art_files(packages, style):
    return vector_art.files_of_labels(packages, style)


@functools.cache
def clips_of(emoji):
    return Clips(emoji, others=False)


@functools.cache
def network():
    return load_features()


@torch.no_grad()
def features_of(frames):
    """``[F][64]`` features of uint8 frames."""
    pixels = image_tensor(frames).float()
    return [[round(x, 5) for x in row] for row in network().features(pixels).tolist()]


def apart(a, b):
    """The mean square of differences of features; of clips of two lengths, at the same times."""
    short, long = sorted((torch.tensor(a), torch.tensor(b)), key=len)
    at = torch.arange(len(short)) * (len(long) - 1) // max(1, len(short) - 1)
    return float((short - long[at]).square().mean())


def root_mean(values):
    return math.sqrt(statistics.fmean(values))


def unit(best):
    """Root mean square over different prompts' art at the best size: what counts as 1."""
    art = [best.art(number) for number in range(len(LABELS))]
    return root_mean(apart(a, b) for i, a in enumerate(art) for b in art[:i])


def draw(args):
    """Draw the missing pictures of one size, prompt by prompt."""
    kind = "pictures" if args.size else "clips"
    task = Task(args, kind, args.size or args.frames, args.model, args.name)
    config = args.config or EVALUATIONS / (
        "sample-flux-density.yaml" if kind == "pictures" else "sample-video-density.yaml"
    )
    trained = adapter_variants(args.adapter)
    variants = {v.label: v for v in [*make_variants(read_variants(config)[0]), *trained]}
    arms = args.arms or ["dense", *variants]
    for number in range(args.count):
        task.art(number)
        task.best.art(number)
        task.best.dense(number)
        task.best.dense(number, number + OTHER_SEED)
        for arm in arms:
            task.draw(arm, None if arm == "dense" else variants[arm], number, number)
    unit(task.best)


def rows_of(task, shipped):
    """Arm -> what is known of it at this size.

    Args:
        shipped: the task of this size with the weights that ship. Distances are compared with
            those of its dense attention; seconds, too, where the task has none of its own.
    """
    dense = task if (task.folder / "dense").exists() else shipped
    arms = [p.name for p in task.folder.iterdir() if p.name not in ("art", "other-seed")]
    one = unit(task.best)
    rows = {}
    for arm in sorted(arms, key=lambda name: (name != "dense", name)):
        numbers = [n for n in range(len(LABELS) * len(BACKGROUNDS)) if task.read(arm, n)]
        records = {n: task.read(arm, n) for n in numbers}
        paired = [n for n in numbers if dense.read("dense", n)]
        row = {
            "count": len(numbers),
            "density": records[numbers[0]]["density"],
            "work": records[numbers[0]]["work"],
            "cpu_seconds": statistics.median(r["cpu_seconds"] for r in records.values()),
            "peak_bytes": max(r["peak_bytes"] for r in records.values()),
            "times_as_fast": statistics.median(
                dense.read("dense", n)["cpu_seconds"] / records[n]["cpu_seconds"] for n in paired
            ),
        }
        here = {n: records[n]["features"] for n in numbers}
        to_art = {n: apart(here[n], task.art(n)) for n in numbers}
        to_best = [apart(here[n], task.best.read("dense", n)["features"]) for n in numbers]
        row |= {"to_art": root_mean(to_art.values()) / one, "to_best": root_mean(to_best) / one}
        parts = [
            to_art[n] / apart(other["features"], task.art(n))
            for n in numbers
            if (other := shipped.read("dense", n))
        ]
        row["to_art_of_dense"] = math.sqrt(statistics.geometric_mean(parts))
        if task.kind == "pictures":
            row["sharpness"] = statistics.fmean(r["sharpness"] for r in records.values())
        if task.best is task and arm != "dense":
            row["psnr_db"] = statistics.fmean(
                psnr(*(image_tensor(task.frames(a, n)) for a in (arm, "dense"))) for n in numbers
            )
        rows[arm] = row
    return rows


def floor_of(task):
    """What dense attention itself has at its best size: between seeds, and to the art."""
    best, one = task.best, unit(task.best)
    numbers = [n for n in range(len(LABELS)) if best.read("other-seed", n)]
    pairs = [[best.read(arm, n)["features"] for arm in ("dense", "other-seed")] for n in numbers]
    return {
        "count": len(numbers),
        "between_seeds": root_mean(apart(a, b) for a, b in pairs) / one,
        "to_art": root_mean(apart(a, best.art(n)) for (a, _), n in zip(pairs, numbers)) / one,
    }


def table(args):
    """All sizes in the folder as JSON, a table and a plot."""
    sizes = {}
    for folder in sorted(args.output.glob("*-*[0-9]*")):
        kind, size, *name = folder.name.split("-", 2)
        if kind not in BEST or not size.isdigit() or name == ["large"]:
            continue
        task = Task(args, kind, int(size), name=name[0] if name else None)
        arms = rows_of(task, Task(args, kind, int(size)))
        sizes[folder.name] = {"floor": floor_of(task), "arms": arms}
    sizes = dict(sorted(sizes.items(), key=lambda x: (x[0][0] == "c", int(x[0].split("-")[1]))))
    cells = [
        (
            size.replace("-", " "),
            arm,
            "" if row["density"] is None else f"{row['density']:.2f}",
            f"{row['count']}",
            f"{row['cpu_seconds']:.1f}",
            f"{row['times_as_fast']:.2f}",
            f"{row['peak_bytes'] / 2**30:.2f}",
            f"{row['to_art']:.2f}",
            f"{row['to_art_of_dense']:.2f}",
            f"{row['to_best']:.2f}",
            f"{data['floor']['between_seeds']:.2f}",
            f"{row['sharpness']:.0f}" if "sharpness" in row else "",
            f"{row['psnr_db']:.1f}" if "psnr_db" in row else "",
        )
        for size, data in sizes.items()
        for arm, row in data["arms"].items()
    ]
    head = ("size", "method", "density", "pictures", "processor s", "times as fast", "peak, GiB")
    head += ("to the art", "of dense", "to dense at its best", "two seeds", "sharpness", "PSNR, dB")
    text = markdown_table(head, cells)
    print(text)
    if args.save:
        write_json(f"{args.save}.json", {"sizes": sizes})
        plot(sizes, f"{args.save}.png")
        name = args.save.name
        page = PAGE.format(name=name, table=text)
        write_text(f"{args.save}.md", page)


def plot(sizes, path):
    """Processor seconds against the distance to the art as a part of that of dense attention.

    A panel for pictures and one for clips; dense is at 1 in every size.
    Names that would lie on others are left out; the table has them.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import FixedLocator, NullLocator

    ticks = [m * 10.0**e for e in (-2, -1, 0, 1, 2) for m in (1, 2, 5)]
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.6), layout="constrained")
    names = []
    for ax, kind in zip(axes, BEST):
        own = {size: data for size, data in sizes.items() if size.startswith(kind)}
        for number, (size, data) in enumerate(own.items()):
            for arm, row in data["arms"].items():
                point = row["cpu_seconds"], row["to_art_of_dense"]
                ax.scatter(*point, c=f"C{number}", marker="s" if arm == "dense" else "o", s=28)
                place = {"xytext": (4, 2), "textcoords": "offset points"}
                names.append(ax.annotate(arm, point, fontsize=7, **place))
            ax.scatter([], [], c=f"C{number}", label=size.replace("-", " "))
        ax.set(xscale="log", yscale="log", xlabel="processor seconds, whole call")
        ax.set_ylabel("distance to the art, dense = 1")
        for axis in (ax.xaxis, ax.yaxis):
            axis.set_major_locator(FixedLocator(ticks))
            axis.set_major_formatter("{x:g}")
            axis.set_minor_locator(NullLocator())
        ax.set_title(f"{kind} (squares: dense)")
        ax.legend(fontsize=8)
        ax.grid(alpha=0.3)
        ax.spines[["top", "right"]].set_visible(False)
    figure.canvas.draw()
    taken = []
    for name in names:
        box = name.get_window_extent()
        name.set_visible(not any(box.overlaps(other) for other in taken))
        if name.get_visible():
            taken.append(box)
    figure.savefig(path, dpi=110)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(required=True)

    def add(name, function, words):
        command = commands.add_parser(name, help=words)
        command.add_argument("-o", "--output", type=Path, required=True, help="folder of it all")
        command.add_argument("--packages", type=Path, help="folder of the npm tarballs")
        command.add_argument("--emoji", type=Path, help="written by emoji_data.py; for clips")
        command.set_defaults(run=function)
        return command

    command = add("draw", draw, "draw and measure pictures or clips of one size")
    size = command.add_mutually_exclusive_group(required=True)
    size.add_argument("--size", type=int, help="pixels per side: 256, 512, 1024")
    size.add_argument("--frames", type=int, help="of 128 px: 9, 33, 65")
    command.add_argument("--count", type=int, default=8, help="prompts (default: %(default)s)")
    command.add_argument("--arms", nargs="+", help="dense and labels of the file (default: all)")
    command.add_argument("--config", type=Path, help="YAML file of methods under labels")
    command.add_argument(
        "--adapter", nargs="+", default=[], metavar="LABEL=FOLDER", help="students, further arms"
    )
    command.add_argument("--model", help="another model's folder; give it a --name")
    command.add_argument("--name", help="behind the size in the folder's name and the table")
    command = add("table", table, "the table and the plot of what was drawn")
    command.add_argument("--save", type=Path, help="write PREFIX.json and PREFIX.png")
    command.set_defaults(count=len(LABELS))
    args = parser.parse_args()
    torch.set_num_threads(1)
    args.run(args)


if __name__ == "__main__":
    main()
