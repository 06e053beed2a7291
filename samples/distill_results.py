"""The training results in docs/distill.md: runs, pictures, distances and curves.

    python samples/distill_results.py clear --emoji work/emoji.npz -o work/results \\
        --save docs/distill-clear
    python samples/distill_results.py llsa ...
    python samples/distill_results.py radial --frames 17 ...

Everything lies below ``-o`` and nothing is made twice: a run that is killed goes on where it
stopped. ``clear`` prepares the recipe's set, trains the recipe and its ablations, and draws the
held-out captions with each; ``llsa`` trains on the art of ``emoji_data.py``, and draws the same
captions. Both measure Fréchet distances, to the teacher's pictures and to the art, in the features
of the sample model's own network: no FID of Inception. ``radial`` draws clips of ``--frames``
frames from the art, a quarter of them held out, and measures the flow-matching loss on those.
"""

import argparse
import contextlib
import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

import dittfast
from dittfast.distill.config import load_config
from dittfast.distill.loader import Dataset
from dittfast.distill.noise import sample_noise
from dittfast.distill.prepare import prepare
from dittfast.distill.trainer import train
from dittfast.files import atomic_path, save_video, write_json, write_text
from dittfast.measure.features import load_features
from dittfast.measure.fid import frechet
from dittfast.measure.metrics import image_tensor, psnr, ssim
from dittfast.methods.log_linear import LogLinear
from dittfast.pipelines.runs.call import call_arguments
from dittfast.pipelines.runs.first_frame import with_first_frame
from dittfast.pipelines.runs.run import run
from dittfast.pipelines.runs.sources import find, load
from dittfast.samples.captions import BACKGROUNDS, LABELS, caption

PICTURES = 240  # of the main arms: of few pictures, those in which another object is drawn decide
FEWER = 80  # of the others; the network has 64 features
SIDE = 256  # px
FIRST_SEED = 10_000  # the training set was drawn with 0, 1, 2, ...
CLEAR = "clear_sample"
TRIAL = 3  # steps, after which it is known how many fit into a time
# Each with its own whole schedule of this many steps, shorter than the recipe's.
ABLATION_STEPS = 120
ABLATIONS = {
    "all losses": [],
    "no attention loss": ["objectives.attention=0"],
    "no prediction loss": ["objectives.prediction=0"],
}


class Results:
    """Arms of one experiment: pictures of the same captions and seeds.

    Args:
        folder: of everything that is made.
        recipe: whose model and call the pictures are drawn with.
        overrides: of the recipe.
    """

    def __init__(self, folder: Path, recipe: str = CLEAR, overrides: Sequence[str] = ()):
        self.folder = folder
        config = load_config(recipe, overrides)
        self.data = folder / "data" / recipe
        self.art = folder / "pictures" / "art"
        self.source = find(config.model.path)
        self.config = config
        self.pipe = load(self.source, "cpu", torch.float32)
        self.pipe.set_progress_bar_config(disable=True)
        self.call = config.data.call

    def prepare(self, recipe: str, overrides: list[str]) -> None:
        """A recipe's training set."""
        config = load_config(recipe, overrides)
        prepare(self.pipe, config.model.component, self.source, config.data)

    def write_art(self, emoji: Path) -> None:
        """The pictures that the sample model was trained on, as files with captions."""
        from emoji_data import compose

        self.art.mkdir(parents=True, exist_ok=True)
        rgba = torch.from_numpy(np.load(emoji)["labelled"])
        lines = []
        for number, label in enumerate(LABELS):
            names = [f"{number:02d}-{i}.png" for i in range(len(BACKGROUNDS))]
            for name, colour in zip(names, BACKGROUNDS):
                lines.append(json.dumps({"file_name": name, "text": caption(label, colour)}))
            if (self.art / names[-1]).exists():
                continue
            pictures = rgba[number : number + 1].expand(len(names), -1, -1, -1)
            pictures = compose(pictures, torch.arange(len(names)))
            pictures = F.interpolate(pictures, (SIDE, SIDE), mode="area")
            pixels = ((pictures + 1) * 127.5).round().clamp(0, 255).byte().permute(0, 2, 3, 1)
            for name, picture in zip(names, pixels.numpy()):
                _save(self.art / name, Image.fromarray(picture))
        write_text(self.art / "metadata.jsonl", "\n".join(lines) + "\n")

    def prompts(self) -> list[str]:
        """``PICTURES`` captions, each label in turn, none of them in the training set."""
        known = set(self.config.data.prompts)
        settings = self.source.settings
        captions = []
        for index in range(PICTURES):
            turn, number = divmod(index, len(settings["labels"]))
            label, colours = settings["labels"][number], settings["backgrounds"]
            options = [caption(label, colours[(number + i) % len(colours)]) for i in range(8)]
            captions.append([text for text in options if text not in known][turn])
        return captions

    def draw(self, name: str, adapter: Path | None = None, count: int = PICTURES, **method):
        """Pictures of an arm: an adapter's, a method's without training, or the teacher's.

        Args:
            method: name and options, in the place of the adapter's own.
        """
        folder = self.folder / "pictures" / name
        folder.mkdir(parents=True, exist_ok=True)
        missing = [i for i in range(count) if not (folder / f"{i:05d}.png").exists()]
        if not missing:
            return
        prompts = self.prompts()
        with contextlib.ExitStack() as stack:
            if adapter is not None:
                dittfast.load_adapter(self.pipe, adapter, **method)
                stack.callback(dittfast.unload_adapter, self.pipe)
            elif method:
                stack.enter_context(dittfast.enable(self.pipe, **method, min_tokens=0))
            for i in missing:
                call = call_arguments(self.pipe, prompts[i], self.source.settings, **self.call)
                call = with_first_frame(self.pipe, call, self.source.settings)
                frames = run(self.pipe, call, FIRST_SEED + i).frames
                _save(folder / f"{i:05d}.png", Image.fromarray(frames[0]))

    def first(self, name: str, count: int) -> Path:
        """A folder with the first pictures of an arm."""
        folder = self.folder / "first" / str(count) / name
        folder.mkdir(parents=True, exist_ok=True)
        for i in range(count):
            link = folder / f"{i:05d}.png"
            if not link.exists():
                link.symlink_to((self.folder / "pictures" / name / link.name).resolve())
        return folder

    def measure(self, name: str, count: int = PICTURES) -> dict:
        """Distances of an arm's pictures to the teacher's and to the art; PSNR, SSIM in pairs."""
        here, teacher = self.first(name, count), self.first("teacher", count)
        network = load_features()
        values = {"distance_to_art": frechet(here, self.art, network)["value"]}
        if name != "teacher":
            pairs = [
                [image_tensor(Image.open(f / f"{i:05d}.png")) for f in (teacher, here)]
                for i in range(count)
            ]
            values |= {
                "distance": frechet(here, teacher, network)["value"],
                "psnr_db": statistics.fmean(psnr(a, b) for a, b in pairs),
                "ssim": statistics.fmean(ssim(a, b) for a, b in pairs),
            }
        return values

    def train(self, name: str, recipe: str, overrides: list[str]) -> Path:
        """Run a recipe to its end, or go on with it; its folder."""
        output = self.folder / "runs" / name
        config = load_config(recipe, [f"train.output={output}", *overrides])
        done = output / "adapter" / "adapter.json"
        if done.exists():
            facts = json.loads(done.read_text(encoding="utf-8"))["run"]
            if facts["steps"] == config.train.steps:
                return output
        train(config, "latest" if (output / "config.json").exists() else None)
        return output


def train_to(recipe: str, overrides: Sequence[str], output: Path, steps: int) -> Path:
    """Run a recipe to a number of steps, or go on with it; the checkpoint that it leaves there."""
    folder = output / "checkpoints" / f"step-{steps:08d}"
    if not folder.exists():
        config = load_config(recipe, [*overrides, f"train.output={output}", f"train.steps={steps}"])
        train(config, "latest" if (output / "config.json").exists() else None)
    return folder


def steps_within(recipe: str, overrides: Sequence[str], output: Path, seconds: float) -> int:
    """How many steps of a run fit into processor seconds, by its second and third, which it does.

    The run's learning rate should not depend on its length.
    """
    if not (output / "metrics.jsonl").exists() or len(history(output)) < TRIAL:
        train_to(recipe, overrides, output, TRIAL)
    cost = statistics.median(row["cpu_seconds"] for row in history(output)[1:TRIAL])
    return max(TRIAL, round(seconds / cost))


def _save(path: Path, image: Image.Image) -> None:
    with atomic_path(path) as temporary:
        image.save(temporary, format="PNG")


def history(run_folder: Path) -> list[dict]:
    """The lines of a run's ``metrics.jsonl``."""
    text = (run_folder / "metrics.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def facts(run_folder: Path) -> dict:
    """What an adapter's description says about its run."""
    path = run_folder / "adapter" / "adapter.json"
    return json.loads(path.read_text(encoding="utf-8"))["run"]


def clear(results: Results) -> dict:
    """CLEAR's recipe in small, and shorter runs with and without one of its losses."""
    data, steps = f"data.folder={results.data}", results.config.train.steps
    results.prepare(CLEAR, [data])
    results.draw("teacher")
    method = results.config.student
    results.draw("untrained", method=method.method, **method.options)
    distilled = f"all losses, {steps} steps"
    runs = {distilled: results.train("clear", CLEAR, [data])}
    results.draw(distilled, runs[distilled] / "adapter")
    for name, overrides in ABLATIONS.items():
        short = [data, f"train.steps={ABLATION_STEPS}", f"validation.every={ABLATION_STEPS}"]
        folder = f"clear_{name.replace(' ', '_')}"
        label = f"{name}, {ABLATION_STEPS} steps"
        runs[label] = results.train(folder, CLEAR, [*short, *overrides])
        results.draw(label, runs[label] / "adapter", FEWER)
    arms = {name: results.measure(name) for name in ("teacher", "untrained", distilled)}
    fewer = {name: results.measure(name, FEWER) for name in ("teacher", "untrained", *runs)}
    return {"arms": recovered(arms), "ablations": recovered(fewer)} | describe_runs(runs)


def recovered(arms: dict[str, dict]) -> dict[str, dict]:
    """The arms, with the share of what "untrained" lost that each has back."""
    teacher, lost = arms["teacher"], arms["untrained"]
    for values in arms.values():
        if values is teacher:
            continue
        # The same captions and seeds: the teacher itself is at 0, so this is the strict measure.
        values["recovered"] = 1 - values["distance"] / lost["distance"]
        gap = lost["distance_to_art"] - teacher["distance_to_art"]
        values["recovered_to_art"] = (lost["distance_to_art"] - values["distance_to_art"]) / gap
    return arms


def describe_runs(runs: dict[str, Path]) -> dict:
    """The curves and the configurations of runs, by arm."""
    return {
        "runs": {
            name: {
                "config": json.loads((folder / "config.json").read_text(encoding="utf-8")),
                "facts": facts(folder),
                "history": history(folder),
            }
            for name, folder in runs.items()
        }
    }


@contextlib.contextmanager
def published_gradients():
    """Inside, gradients through pooled keys and values are too small by the block size.

    That is what the published kernels do with one level (METHODS: the backward pass leaves out the
    weight of a pooled token). The forward pass is untouched.
    """
    right = LogLinear.extend

    def extend(self, layout, k, v, **parameters):
        extended = right(self, layout, k, v, **parameters)
        tokens, part = layout.num_tokens, 1 / self.block_size

        def weaken(x):
            pooled = x[:, :, tokens:]
            pooled = part * pooled + (1 - part) * pooled.detach()
            return torch.cat([x[:, :, :tokens], pooled], 2)

        return tuple(weaken(x) for x in extended)

    with patch.object(LogLinear, "extend", extend):
        yield


def llsa(results: Results) -> dict:
    """LLSA's second stage at 4 times the tokens: dense, log-linear, published gradients."""
    results.draw("teacher", count=FEWER)
    data = {}
    for stage in ("llsa_sample_stage1", "llsa_sample_stage2"):
        data[stage] = [
            f"data.folder={results.folder / 'data' / stage}",
            f"data.pictures={json.dumps(str(results.art))}",
        ]
        results.prepare(stage, data[stage])
    first, second = data
    stage1 = results.train("llsa_stage1", first, data[first]) / "adapter"
    both = [*data[second], f"student.start={stage1}"]
    dense = ["student.method=dense", "student.options={}"]
    runs = {
        "dense": results.train("llsa_dense", second, [*both, *dense]),
        "log_linear": results.train("llsa_log_linear", second, both),
    }
    with published_gradients():
        runs["log_linear, published gradients"] = results.train("llsa_published", second, both)
    for name, folder in runs.items():
        results.draw(name, folder / "adapter", FEWER)
    arms = {name: results.measure(name, FEWER) for name in ("teacher", *runs)}
    runs_as_data = describe_runs({"stage 1": stage1.parent, **runs})
    ratio = arms["log_linear"]["distance_to_art"] / arms["dense"]["distance_to_art"]
    compared = {"arms": arms, "distance_ratio": ratio, "seconds_per_step": step_seconds(runs)}
    return compared | runs_as_data


def write_table(data: dict, path: Path, title: str, picture: str) -> None:
    """The arms and the runs as Markdown, with the pictures."""
    lines = [f"# {title}", "", f"![Losses and PSNR by step]({picture}.png)", ""]
    if "teacher" in data["arms"]:
        lines += [
            "Distances are Fréchet distances in the features of `sample-features`, not FID by "
            "Inception. `distance`: to the teacher's pictures of the same captions and seeds, "
            "where the teacher itself is at 0. `distance_to_art`: to the "
            f"{len(LABELS) * len(BACKGROUNDS)} pictures that the teacher was trained on.",
            "",
            f"![The first pictures: {', '.join(shown(data))}]({picture}-pictures.png)",
            "",
        ]
    for part in ("arms", "ablations"):
        if part in data:
            lines += [*_rows(data[part]), ""]
    lines += ["| run | steps | seed | minutes of steps, wall clock |", "|---|---|---|---|"]
    for name, run_of in data["runs"].items():
        facts = run_of["facts"]
        minutes = facts["seconds"] / 60
        lines.append(f"| {name} | {facts['steps']} | {facts['seed']} | {minutes:.0f} |")
    text = "\n".join(lines)
    write_text(
        path,
        f"{text}\n\nConfigurations, curves and all values: [{picture}.json]({picture}.json).\n",
    )


def _rows(arms: dict[str, dict]) -> list[str]:
    columns = list(dict.fromkeys(name for values in arms.values() for name in values))
    lines = [f"| | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
    for name, values in arms.items():
        cells = [f"{values[c]:.4g}" if c in values else "" for c in columns]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines


def shown(data: dict) -> list[str]:
    """The rows of the sheet of pictures."""
    return list(data["arms"] | data.get("ablations", {}))


def plot(data: dict, path: Path) -> None:
    """Losses of the runs, smoothed over ten steps, and PSNR to the teacher."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    names = ["denoising", "prediction", "attention", "validation/psnr_db"]
    names = [
        n for n in names if any(n in row for r in data["runs"].values() for row in r["history"])
    ]
    figure, axes = plt.subplots(1, len(names), figsize=(4 * len(names), 3.4), layout="constrained")
    for ax, name in zip([axes] if len(names) == 1 else axes, names):
        for number, (label, values) in enumerate(data["runs"].items()):
            points = [(row["step"], row[name]) for row in values["history"] if name in row]
            if not points:
                continue
            steps, y = zip(*points)
            if "/" not in name:
                y = [statistics.fmean(y[max(0, i - 9) : i + 1]) for i in range(len(y))]
            marker = "o" if "/" in name else None
            ax.plot(steps, y, f"C{number}", marker=marker, markersize=3, label=label)
        ax.set(xlabel="step", title="PSNR to the teacher, dB" if "/" in name else f"{name} loss")
        if "/" not in name:
            ax.set_yscale("log")
        ax.grid(alpha=0.3)
        ax.spines[["top", "right"]].set_visible(False)
    ax.legend(fontsize=8)
    figure.savefig(path, dpi=110)


def sheet(results: Results, names: list[str], path: Path, count: int = 8) -> None:
    """The first pictures of each arm, one row for each."""
    files = [
        [results.folder / "pictures" / n / f"{i:05d}.png" for i in range(count)] for n in names
    ]
    side = 128
    page = Image.new("RGB", (side * count, side * len(names)))
    for row, line in enumerate(files):
        for column, file in enumerate(line):
            page.paste(Image.open(file).resize((side, side)), (column * side, row * side))
    page.save(path)


HELD_OUT_TIMES = (0.3, 0.6, 0.9)
RADIAL = "radial_sample_4x"


def write_clips(emoji: Path, folder: Path, frames: int) -> None:
    """Clips of each motion at ``frames`` frames, the same way in smaller steps, with captions.

    Every eighth label goes to ``held-out``, with two motions each; every other
    label to ``train``, with one.
    """
    from clips import MOTIONS, Clips
    from clips import caption as moving

    source = Clips(emoji, others=False)
    motions, colours = list(MOTIONS), list(BACKGROUNDS)
    for number, label in enumerate(LABELS):
        held_out = number % 8 == 1
        for turn in range(2 if held_out else 1):
            motion = motions[(number // 8 + number + 3 * turn) % len(motions)]
            colour = colours[(5 * number + turn) % len(colours)]
            there = folder / ("held-out" if held_out else "train")
            there.mkdir(parents=True, exist_ok=True)
            file = there / f"{number:02d}-{turn}.gif"
            if not file.exists():
                save_video(file, as_frames(source.one(label, colour, motion, frames)))
                write_text(file.with_suffix(".txt"), moving(label, colour, motion))


def as_frames(video: torch.Tensor) -> np.ndarray:
    """A clip ``[3, F, H, W]`` in -1..1 as ``[F, H, W, 3]`` uint8."""
    return ((video + 1) * 127.5).round().clamp(0, 255).byte().permute(1, 2, 3, 0).numpy()


@torch.no_grad()
def held_out_losses(pipe, dataset: Dataset, times: Sequence[float]) -> dict[float, list[float]]:
    """The flow-matching loss of each sample at each time, always with the same noise."""
    losses: dict[float, list[float]] = {time: [] for time in times}
    for index in range(len(dataset)):
        batch = dataset.batch([index])
        arguments = dict(batch.arguments)
        appended = arguments.pop("hidden_states", None)  # of a first frame
        for slot, time in enumerate(times):
            t = torch.tensor([time])
            noise = sample_noise(batch.latents.shape[1:], 1, index, slot)[None]
            noisy = dataset.process.noisy(batch.latents, noise, t)
            velocity = pipe.transformer(
                hidden_states=noisy if appended is None else torch.cat([noisy, appended], 1),
                timestep=dataset.process.timestep(t),
                **arguments,
                return_dict=False,
            )[0]
            target = dataset.process.target(batch.latents, noise, t)
            losses[time].append(float((velocity - target).square().mean()))
    return losses


def held_out_loss(pipe, dataset: Dataset) -> float:
    """The mean of :func:`held_out_losses` over samples and :data:`HELD_OUT_TIMES`."""
    losses = held_out_losses(pipe, dataset, HELD_OUT_TIMES)
    return statistics.fmean(x for of_time in losses.values() for x in of_time)


def radial(
    folder: Path,
    emoji: Path,
    frames: int,
    seconds: float | None = None,
    clips_of: Sequence[int] = (56, 16),
) -> dict:
    """Length extension: a LoRA at more frames, radial and dense, against no training.

    Args:
        seconds: processor time of each run, instead of the recipe's number of steps.
        clips_of: how many are for training, and how many are held out.
    """
    length = [f"data.call.num_frames={frames - 1}"]  # the pipeline draws one more
    results = Results(folder, RADIAL, length)
    clips = folder / f"clips-{frames}"
    write_clips(emoji, clips, frames)
    sets, data = {}, {}
    for name, count in zip(("train", "held-out"), clips_of):
        data[name] = folder / "data" / f"{RADIAL}-{frames}-{name}"
        sets[name] = [
            *length,
            f"data.folder={data[name]}",
            f"data.pictures={clips / name}",
            f"data.count={count}",
        ]
        results.prepare(RADIAL, sets[name])
    dense = ["student.method=dense", "student.options={}", "student.schedule={}"]
    runs = {}
    for name, overrides in (("radial", sets["train"]), ("dense", [*sets["train"], *dense])):
        if seconds is not None:
            output = folder / "runs" / f"{name}-{frames}"
            steps = steps_within(RADIAL, overrides, output, seconds)
            overrides = [*overrides, f"train.steps={steps}"]
        runs[f"{name} LoRA"] = results.train(f"{name}-{frames}", RADIAL, overrides)
    known = folder / f"held-out-{frames}.json"
    losses = json.loads(known.read_text(encoding="utf-8")) if known.exists() else {}
    held_out = Dataset(data["held-out"])
    student = results.config.student
    method = {**student.options, **student.schedule, "min_tokens": 0}
    for name in ("dense, untrained", "radial, untrained", *runs):
        if name in losses:
            continue
        with contextlib.ExitStack() as stack:
            if name in runs:
                dittfast.load_adapter(results.pipe, runs[name] / "adapter")
                stack.callback(dittfast.unload_adapter, results.pipe)
            elif name.startswith(student.method):
                stack.enter_context(dittfast.enable(results.pipe, student.method, **method))
            losses[name] = held_out_loss(results.pipe, held_out)
        write_json(known, losses)
    return {
        "arms": {name: {"held_out_loss": value} for name, value in losses.items()},
        "frames": frames,
        "held_out_clips": len(held_out),
        "seconds_per_step": step_seconds(runs),
    } | describe_runs(runs)


def step_seconds(runs: dict[str, Path]) -> dict[str, float]:
    """The median over each run's steps, of processor seconds."""
    return {
        name: statistics.median(
            row["cpu_seconds"] for row in history(folder) if "cpu_seconds" in row
        )
        for name, folder in runs.items()
    }


EXPERIMENTS = ("clear", "llsa", "radial")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("experiment", choices=EXPERIMENTS)
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--emoji", type=Path, required=True, help="written by emoji_data.py")
    parser.add_argument("--save", type=Path, help="write PREFIX.json, .png and -pictures.png")
    parser.add_argument("--frames", type=int, default=33, help="of radial's clips")
    parser.add_argument("--seconds", type=float, help="processor time of each of radial's runs")
    parser.add_argument(
        "--clips", type=int, nargs=2, default=(56, 16), help="of radial: to train, held out"
    )
    args = parser.parse_args()
    results = None
    if args.experiment == "radial":
        data = radial(args.output, args.emoji, args.frames, args.seconds, args.clips)
    else:
        results = Results(args.output)
        results.write_art(args.emoji)
        data = clear(results) if args.experiment == "clear" else llsa(results)
    print(json.dumps({k: v for k, v in data.items() if k != "runs"}, indent=1))
    if args.save:
        for run_of in data["runs"].values():
            _relative(run_of["config"], args.output)
        write_json(f"{args.save}.json", data)
        plot(data, Path(f"{args.save}.png"))
        title = f"{args.experiment}: training on the sample model"
        write_table(data, Path(f"{args.save}.md"), title, args.save.name)
        if results is not None:
            sheet(results, shown(data), Path(f"{args.save}-pictures.png"))


def _relative(config: dict, folder: Path) -> None:
    """Paths below ``folder`` as if it were ``work/results``."""
    for key, value in config.items():
        if isinstance(value, dict):
            _relative(value, folder)
        elif isinstance(value, str):
            config[key] = value.replace(str(folder), "work/results")


if __name__ == "__main__":
    main()
