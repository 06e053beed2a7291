"""Train sample-flux-large on whole pictures, dense and sparse, for the same processor time.

    python samples/whole_pictures.py --size 1024 --set data/whole_sample/1024 \\
        --packages work/packages --seconds 600 -o work/whole-1024 --save docs/whole-1024

Every arm starts from the same weights and sees the same pictures, noise and times in one order,
at a constant rate, by the recipe ``whole_sample``. Dense comes first; a sparse arm is looked at
after as many steps as dense made, too. What is compared is the flow-matching loss of held-out
pictures under each arm's own attention: labels on backgrounds that training does not show at this
size. Nothing is made twice: a run that is killed goes on where it stopped.
"""

import argparse
import contextlib
import json
import statistics
from pathlib import Path

import torch
import vector_art
from captions import BACKGROUNDS
from distill_results import held_out_losses, history, steps_within, train_to

import dittfast
from dittfast.distill.adapter_files import read_weights
from dittfast.distill.config import load_config
from dittfast.distill.loader import Dataset
from dittfast.distill.prepare import prepare
from dittfast.files import atomic_path, write_json, write_text
from dittfast.pipelines.runs.sources import find, load

RECIPE = "whole_sample"
ARMS = {
    "dense": ("dense", {}),
    "local": ("local", {"window": 8}),
    "log_linear": ("log_linear", {"block_size": 16, "topk": 8, "levels": 2}),
}
TIMES = (0.3, 0.6)


def unseen(size, seen, count):
    """(file name, label, background, caption) of pictures that training leaves out.

    Args:
        seen: backgrounds that each label has in training, as ``vector_art.py --backgrounds``.
        count: pictures, each of another label.
    """
    trained = {name for name, *_ in vector_art.plan(seen, 0)}
    by_label = {}
    for picture in vector_art.plan(len(BACKGROUNDS), 0):
        if picture[0] not in trained:
            by_label.setdefault(picture[1], picture)
    every = len(by_label) // count
    return list(by_label.values())[every // 2 :: every][:count]


def held_out_set(args, pipe):
    """The prepared set of :func:`unseen` pictures."""
    pictures = args.output / "held-out"
    pictures.mkdir(parents=True, exist_ok=True)
    chosen = unseen(args.size, args.backgrounds, args.count)
    files = vector_art.files_of_labels(args.packages, "modern")
    for name, label, background, _ in chosen:
        if not (pictures / name).exists():
            rgba = vector_art.draw_svg(files[label], args.size)
            with atomic_path(pictures / name) as temporary:
                vector_art.on_background(rgba, BACKGROUNDS[background]).save(
                    temporary, format="PNG"
                )
    lines = [json.dumps({"file_name": name, "text": text}) for name, *_, text in chosen]
    write_text(pictures / "metadata.jsonl", "\n".join(lines) + "\n")
    folder = args.output / "held-out-set"
    config = load_config(
        RECIPE, [f"data.folder={folder}", f"data.pictures={pictures}", *_size(args)]
    )
    prepare(pipe, config.model.component, find(config.model.path), config.data)
    return Dataset(folder)


def _size(args):
    return [f"data.call.height={args.size}", f"data.call.width={args.size}"]


def at(t):
    """A time as a key without a dot."""
    return f"t{round(100 * t)}"


def compare(args):
    """Train and evaluate every arm; what is known is written after each evaluation."""
    pipe = load(find(load_config(RECIPE).model.path), "cpu", torch.float32)
    dataset = held_out_set(args, pipe)
    start = {name: p.detach().clone() for name, p in pipe.transformer.named_parameters()}
    path = args.output / "results.json"
    results = json.loads(path.read_text()) if path.exists() else {"arms": {}}
    results |= {"size": args.size, "seconds": args.seconds, "prompts": dataset.manifest["prompts"]}
    arms = results["arms"]
    dense_steps = None
    for name in args.arms:
        method, options = ARMS[name]
        output = args.output / "runs" / name
        how = [
            f"student.method={method}",
            f"student.options={json.dumps(options)}",
            f"data.folder={args.set}",
            *_size(args),
        ]
        if dense_steps and args.equal_steps:
            total = dense_steps
        else:
            total = steps_within(RECIPE, how, output, args.seconds)
        dense_steps = dense_steps or total
        arm = arms.setdefault(name, {"method": method, "options": options, "after": {}})
        for steps in sorted({0, min(dense_steps, total), total}):
            weights = start
            if steps:
                trained = train_to(RECIPE, how, output, steps)
                weights = read_weights(trained / "average.safetensors")
            rows = history(output)
            arm["curve"] = [[row["cpu_seconds"], row["denoising"]] for row in rows]
            if str(steps) in arm["after"]:
                continue
            pipe.transformer.load_state_dict(weights)
            with contextlib.ExitStack() as stack:
                if method != "dense":
                    enabled = dittfast.enable(pipe, method, **options, min_tokens=0)
                    stack.enter_context(enabled)
                losses = held_out_losses(pipe, dataset, TIMES)
                arm["density"] = 1.0 if method == "dense" else enabled.describe().density
            arm["after"][str(steps)] = {
                "cpu_seconds": sum(row["cpu_seconds"] for row in rows[:steps]),
                "losses": {at(t): x for t, x in losses.items()},
                "loss": {at(t): statistics.fmean(x) for t, x in losses.items()},
            }
            write_json(path, results)
            print(name, steps, arm["after"][str(steps)]["loss"], flush=True)
        arm["steps"] = total
        arm["equal_steps"] = min(dense_steps, total)
        arm["step_cpu_seconds"] = statistics.median(row["cpu_seconds"] for row in rows)
        write_json(path, results)
    return results


def plot(results, path):
    """The loss on training pictures, over ten steps, and on held-out ones, by processor time."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 1 + len(TIMES), figsize=(11, 3.4), layout="constrained")
    for number, (name, arm) in enumerate(results["arms"].items()):
        seconds, losses, spent = [], [], 0.0
        for step, (cost, _) in enumerate(arm["curve"]):
            spent += cost
            seconds.append(spent)
            recent = arm["curve"][max(0, step - 9) : step + 1]
            losses.append(statistics.fmean(loss for _, loss in recent))
        axes[0].plot(seconds, losses, f"C{number}", label=name)
        for ax, t in zip(axes[1:], TIMES):
            points = arm["after"].values()
            x, y = [p["cpu_seconds"] for p in points], [p["loss"][at(t)] for p in points]
            ax.plot(x, y, f"C{number}", marker="o", markersize=4)
    for ax, title in zip(axes, ["training loss", *(f"held out, t = {t}" for t in TIMES)]):
        ax.set(xlabel="processor seconds", title=title)
        ax.grid(alpha=0.3)
        ax.spines[["top", "right"]].set_visible(False)
    axes[0].legend(fontsize=8)
    figure.savefig(path, dpi=110)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", type=int, required=True, help="pixels per side")
    parser.add_argument("--set", type=Path, required=True, help="prepared training set")
    parser.add_argument("--backgrounds", type=int, default=1, help="of each label in that set")
    parser.add_argument("--packages", type=Path, required=True, help="folder of the npm tarballs")
    parser.add_argument("--seconds", type=float, default=600, help="processor time of each arm")
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=ARMS, help="dense first")
    parser.add_argument(
        "--equal-steps", action="store_true", help="sparse arms stop after as many steps as dense"
    )
    parser.add_argument("--count", type=int, default=6, help="held-out pictures")
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--save", type=Path, help="write PREFIX.json and PREFIX.png")
    args = parser.parse_args()
    torch.set_num_threads(1)
    results = compare(args)
    if args.save:
        write_json(f"{args.save}.json", results)
        plot(results, f"{args.save}.png")


if __name__ == "__main__":
    main()
