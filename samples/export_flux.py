"""Turn a training run into a FluxPipeline folder, and draw with that folder.

python samples/export_flux.py save --run work/flux --vae work/vae --out work/sample-flux
python samples/export_flux.py grid --model work/sample-flux --out work/grid.png
"""

import argparse
import json
import time
from pathlib import Path

import torch
from captions import BACKGROUNDS, LABELS, caption
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline
from flux_model import FULL_SIZE, SampleFlux
from PIL import Image
from safetensors.torch import load_file, save_file
from text_encoders import MAX_LENGTH
from transformers import PreTrainedTokenizerFast

NOTICE = """\
The pictures this model draws were learnt from Fluent Emoji by Microsoft
(https://github.com/microsoft/fluentui-emoji), 3D style, 256 px, as packaged in
@lobehub/fluent-emoji-3d 1.1.0 on npm; {n} of them were used, each on eight plain backgrounds.
Names come from the Unicode CLDR short names in emojibase-data 17.0.0 (MIT).
The weights are the dittfast project's own, under its licence. The art's licence follows.

MIT License

Copyright (c) Microsoft Corporation.

Permission is hereby granted, free of charge, to any person obtaining a copy
of this software and associated documentation files (the "Software"), to deal
in the Software without restriction, including without limitation the rights
to use, copy, modify, merge, publish, distribute, sublicense, and/or sell
copies of the Software, and to permit persons to whom the Software is
furnished to do so, subject to the following conditions:

The above copyright notice and this permission notice shall be included in all
copies or substantial portions of the Software.

THE SOFTWARE IS PROVIDED "AS IS", WITHOUT WARRANTY OF ANY KIND, EXPRESS OR
IMPLIED, INCLUDING BUT NOT LIMITED TO THE WARRANTIES OF MERCHANTABILITY,
FITNESS FOR A PARTICULAR PURPOSE AND NONINFRINGEMENT. IN NO EVENT SHALL THE
AUTHORS OR COPYRIGHT HOLDERS BE LIABLE FOR ANY CLAIM, DAMAGES OR OTHER
LIABILITY, WHETHER IN AN ACTION OF CONTRACT, TORT OR OTHERWISE, ARISING FROM,
OUT OF OR IN CONNECTION WITH THE SOFTWARE OR THE USE OR OTHER DEALINGS IN THE
SOFTWARE.
"""

# The call that the model was made for; a stock FluxPipeline's own defaults do not fit it.
CALL_DEFAULTS = {
    "negative_prompt": "",
    "height": FULL_SIZE,
    "width": FULL_SIZE,
    "num_inference_steps": 20,
    "true_cfg_scale": 3.0,
    "guidance_scale": 1.0,
    "max_sequence_length": MAX_LENGTH,
}

# Checked by eye; everything a folder of weights is shown with.
EXAMPLE_PROMPTS = [
    "a 3d emoji of a lion, white background",
    "a panda on a green background",
    "a 3d emoji of a fox, blue background",
    "a 3d emoji of a frog, yellow background",
    "a 3d emoji of a snail, black background",
    "a 3d emoji of a rabbit, blue background",
    "a car on a green background",
    "a 3d emoji of a penguin, purple background",
    "a 3d emoji of a cactus, white background",
    "a 3d emoji of a mushroom, black background",
    "a 3d emoji of a watermelon, black background",
    "a 3d emoji of an avocado, pink background",
    "a 3d emoji of a hamburger, black background",
    "a 3d emoji of a rainbow, black background",
    "a 3d emoji of a house, yellow background",
    "a 3d emoji of a ghost, pink background",
]


def one_per_label():
    """A prompt for each label, the backgrounds taking turns."""
    colours = list(BACKGROUNDS)
    return [caption(label, colours[(i + i // 8) % len(colours)]) for i, label in enumerate(LABELS)]


def rename_tokenizer_class(folder):
    """Write the tokenizers' class as transformers 4 knows it; 5 has renamed it and reads both."""
    for file in [folder / "model_index.json", *folder.glob("tokenizer*/tokenizer_config.json")]:
        config = json.loads(
            file.read_text().replace("TokenizersBackend", "PreTrainedTokenizerFast")
        )
        for leftover in ("is_local", "local_files_only"):
            config.pop(leftover, None)
        file.write_text(json.dumps(config, indent=2) + "\n")


def rename_clip_weights(folder):
    """Give CLIP's weights the prefix of transformers 4; 5 has dropped it and reads both."""
    file = folder / "text_encoder" / "model.safetensors"
    weights = {
        f"text_model.{name.removeprefix('text_model.')}": tensor
        for name, tensor in load_file(file).items()
    }
    save_file(weights, file, metadata={"format": "pt"})


def save(args):
    state = torch.load(args.run / "checkpoint.pt", weights_only=False)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(args.run / "tokenizer")
    model = SampleFlux(len(tokenizer)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(state["average"][name])
    pipe = FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=False),
        vae=AutoencoderKL.from_pretrained(args.vae),
        text_encoder=model.clip,
        tokenizer=tokenizer,
        text_encoder_2=model.t5,
        tokenizer_2=tokenizer,
        transformer=model.transformer,
    )
    pipe.to(torch.float16).save_pretrained(args.out, safe_serialization=True)
    rename_tokenizer_class(args.out)
    rename_clip_weights(args.out)
    (args.out / "NOTICE").write_text(NOTICE.format(n=len(LABELS)))

    progress = state["progress"]
    losses = progress["losses"]
    sample = {
        "prompts": EXAMPLE_PROMPTS,
        **CALL_DEFAULTS,
        "labels": list(LABELS),
        "backgrounds": list(BACKGROUNDS),
        "training": {
            "data": "@lobehub/fluent-emoji-3d 1.1.0, names from emojibase-data 17.0.0",
            "pictures": len(LABELS) * len(BACKGROUNDS),
            "steps": progress["step"],
            "samples": progress["samples"],
            "cpu_hours": round(progress["cpu_seconds"] / 3600, 2),
            "wall_hours_on_2_shared_cores": round(progress["seconds"] / 3600, 2),
            "loss_last_200_steps": round(sum(losses) / max(1, len(losses)), 4),
            "finished_stages": progress["history"],
            "last_stage_steps": progress["stage_step"],
        },
    }
    (args.out / "sample.json").write_text(json.dumps(sample, indent=2) + "\n")
    size = sum(f.stat().st_size for f in args.out.rglob("*") if f.is_file())
    print(f"{args.out}: {size / 1e6:.2f} MB")


def grid(args):
    """Draw prompts with the stock pipeline and paste the pictures into one PNG."""
    pipe = FluxPipeline.from_pretrained(args.model, torch_dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    prompts = args.prompts or one_per_label()
    call = {**CALL_DEFAULTS, "height": args.size, "width": args.size}
    del call["negative_prompt"]
    start, pictures = time.time(), []
    for first in range(0, len(prompts), args.batch):
        some = prompts[first : first + args.batch]
        pictures += pipe(
            some,
            negative_prompt=[""] * len(some),
            generator=[
                torch.Generator().manual_seed(args.seed + first + i) for i in range(len(some))
            ],
            **call,
        ).images
    rows = -(-len(pictures) // args.columns)
    sheet = Image.new("RGB", (args.columns * args.cell, rows * args.cell), "white")
    for i, picture in enumerate(pictures):
        row, column = divmod(i, args.columns)
        picture = picture.resize((args.cell, args.cell), Image.Resampling.LANCZOS)
        sheet.paste(picture, (column * args.cell, row * args.cell))
    sheet.save(args.out, optimize=True)
    print(f"{args.out}: {len(pictures)} pictures, {time.time() - start:.0f} s")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(required=True)
    command = commands.add_parser("save", help="write the pipeline folder")
    command.add_argument("--run", type=Path, required=True, help="--out of train_flux.py")
    command.add_argument("--vae", type=Path, required=True, help="--out of train_vae.py")
    command.add_argument("--out", type=Path, required=True, help="folder to write")
    command.set_defaults(run_command=save)
    command = commands.add_parser("grid", help="draw one picture per label, or given prompts")
    command.add_argument("--model", type=Path, required=True, help="pipeline folder")
    command.add_argument("--out", type=Path, required=True, help="PNG to write")
    command.add_argument("--prompts", nargs="+", help="draw these instead of every label")
    command.add_argument("--size", type=int, default=FULL_SIZE, help="pixels per side")
    command.add_argument("--cell", type=int, default=128, help="pixels per picture in the PNG")
    command.add_argument("--columns", type=int, default=8, help="pictures per row")
    command.add_argument("--batch", type=int, default=8, help="prompts per pipeline call")
    command.add_argument("--seed", type=int, default=0, help="seed of the first picture")
    command.add_argument("--threads", type=int, default=2, help="CPU threads")
    command.set_defaults(run_command=grid)
    args = parser.parse_args()
    torch.set_num_threads(getattr(args, "threads", 2))
    args.run_command(args)


if __name__ == "__main__":
    main()
