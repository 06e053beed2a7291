"""Turn a training run into a WanImageToVideoPipeline folder, and draw strips with that folder.

python samples/export_wan.py save --run work/wan --vae work/wan-vae --out work/plain
python samples/export_wan.py decoder --model work/plain --vae work/decoder --out work/sample-video
python samples/export_wan.py strips --model work/sample-video --out work/strips.png
"""

import argparse
import json
import shutil
import time
from pathlib import Path

import numpy as np
import torch
from captions import BACKGROUNDS, LABELS
from clips import FRAMES, MOTIONS, PICTURE_PART, SIZE, caption, motion_words
from diffusers import (
    AutoencoderKLWan,
    FlowMatchEulerDiscreteScheduler,
    WanImageToVideoPipeline,
)
from export_flux import NOTICE, rename_tokenizer_class
from PIL import Image
from text_encoders import MAX_LENGTH
from transformers import PreTrainedTokenizerFast
from wan_model import TIME_SHIFT, SampleWan

# The call that the model was made for.
CALL_DEFAULTS = {
    "negative_prompt": "",
    "height": SIZE,
    "width": SIZE,
    # The VAE does not compress time, and for such the pipeline draws one frame more.
    "num_frames": FRAMES - 1,
    "num_inference_steps": 12,
    "guidance_scale": 1.0,  # none: twice as fast, and less grain
    "max_sequence_length": MAX_LENGTH,
}

# One of each motion, with pictures that the image sample draws well.
EXAMPLES = [
    *(("car", "green"), ("fox", "blue"), ("lion", "white"), ("penguin", "purple")),
    *(("mushroom", "black"), ("ghost", "pink"), ("soccer ball", "green"), ("frog", "yellow")),
]
EXAMPLE_PROMPTS = [caption(*pair, motion) for pair, motion in zip(EXAMPLES, MOTIONS)]


def save(args):
    state = torch.load(args.run / "checkpoint.pt", weights_only=False)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(args.run / "tokenizer")
    model = SampleWan(len(tokenizer)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(state["average"][name])
    pipe = WanImageToVideoPipeline(
        tokenizer=tokenizer,
        text_encoder=model.text_encoder,
        vae=AutoencoderKLWan.from_pretrained(args.vae),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=TIME_SHIFT),
        transformer=model.transformer,
    )
    pipe.to(torch.float16).save_pretrained(args.out, safe_serialization=True)
    rename_tokenizer_class(args.out)
    forget_folders(args.out)
    (args.out / "NOTICE").write_text(NOTICE.format(n=len(LABELS)))

    progress = state["progress"]
    losses = progress["losses"]
    sample = {
        "prompts": EXAMPLE_PROMPTS,
        **CALL_DEFAULTS,
        "first_frame": {
            "model": "sample-flux",
            "part": PICTURE_PART,
            "moving_words": motion_words(),
        },
        "labels": list(LABELS),
        "backgrounds": list(BACKGROUNDS),
        "motions": list(MOTIONS),
        "training": {
            "data": "clips drawn from @lobehub/fluent-emoji-3d 1.1.0, names from emojibase-data "
            "17.0.0",
            "steps": progress["step"],
            "clips": progress["samples"],
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


def forget_folders(model):
    """Take the folders of the machine that trained it out of a pipeline's configurations."""
    for path in model.glob("*/config.json"):
        config = json.loads(path.read_text())
        config.pop("_name_or_path", None)
        path.write_text(json.dumps(config, indent=2) + "\n")


def replace_decoder(args):
    """Copy a pipeline folder, with the VAE of ``train_wan_vae.py``; its latents are the same."""
    shutil.copytree(args.model, args.out)
    vae = AutoencoderKLWan.from_pretrained(args.vae, torch_dtype=torch.float16)
    vae.save_pretrained(args.out / "vae")
    forget_folders(args.out)
    sample = json.loads((args.out / "sample.json").read_text()) | CALL_DEFAULTS
    sample["training"]["decoder"] = json.loads((args.vae / "training.json").read_text())
    (args.out / "sample.json").write_text(json.dumps(sample, indent=2) + "\n")


def strips(args):
    """Animate prompts with the stock pipeline; one row of frames each in one PNG."""
    from dittfast.pictures import read_picture
    from dittfast.pipelines.runs import sources
    from dittfast.pipelines.runs.call import call_arguments
    from dittfast.pipelines.runs.first_frame import with_first_frame
    from dittfast.pipelines.runs.run import run

    source = sources.find(str(args.model))
    pipe = sources.load(source, "cpu", torch.float32)
    pipe.set_progress_bar_config(disable=True)
    image = None if args.image is None else read_picture(args.image)
    start, rows = time.time(), []
    for prompt in args.prompts or source.settings["prompts"]:
        call = call_arguments(pipe, prompt, source.settings, image=image)
        call = with_first_frame(pipe, call, source.settings)
        rows.append(np.concatenate(run(pipe, call, args.seed).frames, axis=1))
    Image.fromarray(np.concatenate(rows)).save(args.out, optimize=True)
    print(f"{args.out}: {len(rows)} clips, {time.time() - start:.0f} s")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(required=True)
    command = commands.add_parser("save", help="write the pipeline folder")
    command.add_argument("--run", type=Path, required=True, help="--out of train_wan.py")
    command.add_argument("--vae", type=Path, required=True, help="--out of wan_vae.py")
    command.add_argument("--out", type=Path, required=True, help="folder to write")
    command.set_defaults(run_command=save)
    command = commands.add_parser("decoder", help="a pipeline folder with another decoder")
    command.add_argument("--model", type=Path, required=True, help="pipeline folder")
    command.add_argument("--vae", type=Path, required=True, help="--out of train_wan_vae.py")
    command.add_argument("--out", type=Path, required=True, help="folder to write")
    command.set_defaults(run_command=replace_decoder)
    command = commands.add_parser("strips", help="animate the sample prompts, or given ones")
    command.add_argument("--model", type=Path, required=True, help="pipeline folder")
    command.add_argument("--out", type=Path, required=True, help="PNG to write")
    command.add_argument("--prompts", nargs="+", help="animate these instead")
    command.add_argument("--image", type=Path, help="first frame, instead of a drawn one")
    command.add_argument("--seed", type=int, default=0, help="random seed")
    command.add_argument("--threads", type=int, default=2, help="CPU threads")
    command.set_defaults(run_command=strips)
    args = parser.parse_args()
    torch.set_num_threads(getattr(args, "threads", 2))
    args.run_command(args)


if __name__ == "__main__":
    main()
