"""Measure the sample image model at sizes above its own: loss by positions, sharpness, pictures.

    python samples/large_pictures.py positions --set data/large_sample/512
    python samples/large_pictures.py vae --packages work/packages --size 1024
    python samples/large_pictures.py export --adapter runs/large_sample_3/adapter --out work/sample
    python samples/large_pictures.py draw --model work/sample --packages work/packages \\
        --stages 256,1024 --strength 0.5 --out work/draw-1024

``positions`` compares, untrained or trained, what else could be done about positions that the
model does not know. ``draw`` draws eight prompts with ``local`` attention and says how sharp each
is next to the art and to an enlarged 256 px picture. Sharpness is the mean of the largest 0.5 % of
the gradients of the picture's luma (0 to 255 a pixel).
"""

import argparse
import contextlib
import json
import shutil
import time
from pathlib import Path

import numpy as np
import torch
import vector_art
from captions import BACKGROUNDS
from diffusers.configuration_utils import FrozenDict
from PIL import Image

import dittfast
from dittfast.distill.adapter_files import read_weights
from dittfast.distill.loader import Dataset
from dittfast.distill.noise import generator, sample_noise
from dittfast.distill.windows import window
from dittfast.files import atomic_path, write_json
from dittfast.pipelines.runs.call import call_arguments
from dittfast.pipelines.runs.high_resolution import generate_high_resolution, rope_theta_scaled
from dittfast.pipelines.runs.positions import positions_scaled
from dittfast.pipelines.runs.run import run
from dittfast.pipelines.runs.sources import find, load

# Label and background; a prompt each, of different shapes and colours.
PICTURES = (
    ("panda", "green"),
    ("rocket", "blue"),
    ("fox", "blue"),
    ("red heart", "yellow"),
    ("house", "yellow"),
    ("penguin", "purple"),
    ("hamburger", "black"),
    ("cactus", "white"),
)
TIMES = (0.3, 0.6, 0.9)
WINDOW = (32, 32)


def sharpness(picture):
    """Mean of the largest 0.5 % of the luma's gradients."""
    luma = np.asarray(picture.convert("L"), np.float32)
    down, right = np.diff(luma, axis=0)[:, :-1], np.diff(luma, axis=1)[:-1]
    gradients = np.hypot(down, right).ravel()
    count = max(1, round(0.005 * gradients.size))
    return float(np.partition(gradients, -count)[-count:].mean())


def enlarged(picture, size):
    return picture.resize((size, size), Image.Resampling.LANCZOS)


def psnr(a, b):
    a, b = (np.asarray(x, np.float64) for x in (a, b))
    return float(10 * np.log10(255**2 / np.square(a - b).mean()))


class Art:
    """The vector art of :data:`PICTURES`."""

    def __init__(self, packages):
        self.files = vector_art.files_of_labels(packages, "modern")

    def __call__(self, label, background, size):
        rgba = vector_art.draw_svg(self.files[label], size)
        return vector_art.on_background(rgba, BACKGROUNDS[background])


def shifted(ids, scale):
    """Scaled positions with each token at the middle of what it covers of a full-size one."""
    result = ids.clone()
    result[..., 1:3] += (scale - 1) / 2
    return result


def compare_positions(args):
    """The flow-matching loss of windows of prepared sets, by what is done about positions."""
    pipe = load(find(args.model), "cpu", torch.float32)
    by_set = {str(folder): position_losses(pipe, folder, args) for folder in args.set}
    for folder, losses in by_set.items():
        for name, by_time in losses.items():
            means = "".join(f"  t={t}: {np.mean(x):.4f}" for t, x in by_time.items())
            print(f"{folder}  {name:15}{means}")
    if args.out:
        write_json(args.out, {"model": args.model, "count": args.count, "losses": by_set})


def position_losses(pipe, folder, args):
    """Choice -> time -> the loss of each window."""
    dataset = Dataset(folder)
    scale = dataset.manifest["position_scale"]
    own = lambda ids: torch.cat([ids[..., :1], ids[..., 1:] / scale], -1)  # noqa: E731
    choices = {  # what becomes of the set's scaled ids, and of the rotary base
        "own": (own, 1),
        "own-base-10": (own, 10),  # CLEAR's
        "own-base-100": (own, 100),
        "scaled": (lambda ids: ids, 1),
        "scaled-middle": (lambda ids: shifted(ids, scale), 1),
        "half-scaled": (lambda ids: own(ids) * scale**0.5, 1),
    }
    losses = {name: {t: [] for t in TIMES} for name in args.choices or choices}
    for number in range(args.count):
        index = number * len(dataset) // args.count
        batch = window(dataset.batch([index]), WINDOW, generator("window", number))
        noise = sample_noise(batch.latents.shape[1:], 0, number, 0)
        for t in TIMES:
            time_of = torch.tensor([t])
            noisy = dataset.process.noisy(batch.latents, noise, time_of)
            for name, values in losses.items():
                positions, theta = choices[name]
                arguments = {**batch.arguments, "img_ids": positions(batch.arguments["img_ids"])}
                with torch.no_grad(), rope_theta_scaled(pipe, theta):
                    velocity = pipe.transformer(
                        hidden_states=noisy,
                        timestep=dataset.process.timestep(time_of),
                        **arguments,
                        return_dict=False,
                    )[0]
                target = dataset.process.target(batch.latents, noise, time_of)
                values[t].append(float((velocity - target).square().mean()))
    return losses


def measure_vae(args):
    """How sharp the VAE leaves the art: no picture of the model can be sharper."""
    art = Art(args.packages)
    vae = load(find(args.model), "cpu", torch.float32).vae
    for label, background in PICTURES[: args.count]:
        picture = art(label, background, args.size)
        pixels = torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None] / 127.5 - 1
        with torch.no_grad():
            decoded = vae.decode(vae.encode(pixels).latent_dist.mode()).sample[0]
        pixels = ((decoded.clamp(-1, 1) + 1) * 127.5).round().byte().permute(1, 2, 0)
        again = Image.fromarray(pixels.numpy())
        small = enlarged(enlarged(picture, 256), args.size)
        print(
            f"{label:12} sharpness: art {sharpness(picture):5.1f}, VAE {sharpness(again):5.1f}, "
            f"enlarged {sharpness(small):5.1f}; VAE {psnr(picture, again):.1f} dB",
            flush=True,
        )


def export(args):
    """The sample model's folder with an adapter's weights in the transformer, or part of them.

    Weights between those of a model and of what was trained from it keep much of both
    (arXiv:2109.01903).
    """
    source = find(args.model)
    shutil.copytree(source.location, args.out, dirs_exist_ok=True)
    transformer = load(source, "cpu", torch.float32).transformer
    weights = read_weights(args.adapter)
    own = dict(transformer.named_parameters())
    if weights.keys() != own.keys():
        raise SystemExit(f"{args.adapter} does not hold the whole transformer")
    with torch.no_grad():
        for name, p in own.items():
            p.lerp_(weights[name], args.part)
    # diffusers writes down where the base was found, which is a folder of this machine.
    transformer._internal_dict = FrozenDict(
        {k: v for k, v in transformer.config.items() if k != "_name_or_path"}
    )
    transformer.to(torch.float16).save_pretrained(args.out / "transformer")
    print(f"wrote {args.out}")


def draw(args):
    """Eight prompts, each with its record; what is there already is not drawn again."""
    art = Art(args.packages)
    source = find(args.model)
    pipe = load(source, "cpu", torch.float32)
    pipe.set_progress_bar_config(disable=True)
    args.out.mkdir(parents=True, exist_ok=True)
    stages = [(int(n), int(n)) for n in args.stages.split(",")]
    size = stages[-1][0]
    rows = []
    for number, (label, background) in enumerate(PICTURES[: args.count]):
        path = args.out / f"{label.replace(' ', '-')}.png"
        record = path.with_suffix(".json")
        if not record.exists():
            start = time.process_time()
            picture = draw_one(args, pipe, source, f"{label} on {background}", stages, number)
            row = {
                "label": label,
                "background": background,
                "cpu_seconds": time.process_time() - start,
                "sharpness": sharpness(picture),
                "art": sharpness(art(label, background, size)),
                "enlarged": sharpness(enlarged(enlarged(art(label, background, size), 256), size)),
            }
            with atomic_path(path) as temporary:
                picture.save(temporary, format="PNG")
            write_json(record, row)
        row = json.loads(record.read_text())
        rows.append(row)
        print(
            f"{label:12} sharpness {row['sharpness']:5.1f}, art {row['art']:5.1f}, enlarged "
            f"{row['enlarged']:5.1f}; {row['cpu_seconds']:.0f} CPU s",
            flush=True,
        )
    sheet = [Image.open(args.out / f"{r['label'].replace(' ', '-')}.png") for r in rows]
    cells = [np.asarray(enlarged(picture, args.cell)) for picture in sheet]
    Image.fromarray(np.concatenate(cells, 1)).save(args.out / "sheet.png")


def draw_one(args, pipe, source, prompt, stages, seed):
    method = {} if args.method == "dense" else {"window": args.window}
    settings = {"num_inference_steps": args.steps, "true_cfg_scale": args.guidance}
    if len(stages) == 1:
        call = call_arguments(
            pipe, prompt, source.settings, height=stages[0][0], width=stages[0][1], **settings
        )
        with contextlib.ExitStack() as stack:
            scale = source.settings["height"] / stages[0][0]
            stack.enter_context(positions_scaled(pipe, scale, args.until))
            stack.enter_context(dittfast.enable(pipe, args.method, min_tokens=0, **method))
            return Image.fromarray(run(pipe, call, seed).frames[0])
    call = call_arguments(pipe, prompt, source.settings, **settings)
    call = {k: v for k, v in call.items() if k not in ("prompt", "height", "width")}
    return generate_high_resolution(
        pipe, prompt, stages, call=call, strength=args.strength, method=args.method,
        schedule=dittfast.Schedule(min_tokens=0), proportional=False, ntk_factor=1,
        position_scale="fit", position_until=args.until, seed=seed, **method,
    )[-1].image  # fmt: skip


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(required=True)

    def add(name, function, words):
        command = commands.add_parser(name, help=words)
        command.add_argument("--model", default="sample-flux", help="sample model or folder")
        command.add_argument("--threads", type=int, default=1, help="CPU threads")
        command.set_defaults(run=function)
        return command

    command = add("positions", compare_positions, "the loss by what is done about positions")
    command.add_argument("--set", type=Path, nargs="+", required=True, help="prepared sets")
    command.add_argument("--choices", nargs="+", help="some of them (default: all)")
    command.add_argument("--count", type=int, default=16, help="windows")
    command.add_argument("--out", type=Path, help="JSON with every loss")
    command = add("vae", measure_vae, "how sharp the VAE leaves the art")
    command.add_argument("--packages", type=Path, required=True, help="folder of the npm tarballs")
    command.add_argument("--size", type=int, required=True, help="pixels per side")
    command.add_argument("--count", type=int, default=len(PICTURES), help="pictures")
    command = add("export", export, "write a pipeline folder with an adapter's weights")
    command.add_argument("--adapter", type=Path, required=True, help="train.output/adapter")
    command.add_argument("--part", type=float, default=1.0, help="of the way to its weights")
    command.add_argument("--out", type=Path, required=True, help="folder to write")
    command = add("draw", draw, "draw eight prompts and measure them")
    command.add_argument("--packages", type=Path, required=True, help="folder of the npm tarballs")
    command.add_argument("--out", type=Path, required=True, help="folder to write")
    command.add_argument("--stages", default="256,1024", help="sides; one of them: in one go")
    command.add_argument("--strength", type=float, default=0.5, help="of further stages")
    command.add_argument("--steps", type=int, default=20, help="of a whole schedule")
    command.add_argument("--guidance", type=float, default=3.0, help="true_cfg_scale")
    command.add_argument("--method", default="local", choices=("local", "dense"))
    command.add_argument("--until", type=float, default=0.0, help="time at which scaling ends")
    command.add_argument("--window", type=float, default=16, help="of local")
    command.add_argument("--count", type=int, default=len(PICTURES), help="prompts")
    command.add_argument("--cell", type=int, default=512, help="px of a picture in sheet.png")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    args.run(args)


if __name__ == "__main__":
    main()
