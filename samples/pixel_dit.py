"""Write an untrained pixel transformer as a pipeline folder: what LLSA's recipe trains.

    python samples/pixel_dit.py --out work/pixel-dit-32
    python samples/pixel_dit.py --out work/pixel-dit-128 --noise-scale 2

The size is that of LLSA's pixel DiT-S (Zhou et al. 2025, arXiv:2512.16615): 12 layers, 6 heads of
64, a token for each pixel, rotary positions in rows and columns. The class is diffusers'
``PRXPixelPipeline``, which answers with the clean picture, where the authors' network answers with
the velocity; training compares velocities either way. The text encoder is small, random and stays
so: it tells captions apart and knows no language.
"""

import argparse
import json
from pathlib import Path

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, PRXPixelPipeline, PRXTransformer2DModel
from text_encoders import MAX_LENGTH, WIDTH, build_t5, build_tokenizer

HEAD_DIM = 64


def build(layers=12, heads=6, noise_scale=1.0, captions=("a face",), seed=0):
    """The pipeline; the same seed gives the same weights whatever the noise scale."""
    tokenizer = build_tokenizer(list(captions), vocab_size=512)
    torch.manual_seed(seed)
    transformer = PRXTransformer2DModel(
        in_channels=3,
        patch_size=1,
        context_in_dim=WIDTH,
        hidden_size=heads * HEAD_DIM,
        mlp_ratio=8 / 3,  # gated: as many weights as a plain one of ratio 4
        num_heads=heads,
        depth=layers,
        axes_dim=[HEAD_DIM // 2, HEAD_DIM // 2],
    )
    return PRXPixelPipeline(
        transformer,
        FlowMatchEulerDiscreteScheduler(),
        build_t5(len(tokenizer)),
        tokenizer,
        prompt_max_tokens=MAX_LENGTH,
        noise_scale=noise_scale,
    )


def save(pipe, out, size, captions):
    """Write the folder, with the call that suits it."""
    pipe.save_pretrained(out)
    call = {
        "height": size,
        "width": size,
        "num_inference_steps": 20,
        "guidance_scale": 1.0,
        "use_resolution_binning": False,
    }
    text = json.dumps({"prompts": list(captions)[:16], **call}, indent=2)
    (Path(out) / "sample.json").write_text(text + "\n", encoding="utf-8")


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--size", type=int, default=32, help="px it draws unless told otherwise")
    parser.add_argument(
        "--noise-scale", type=float, default=1.0, help="of the noise it starts from"
    )
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--heads", type=int, default=6)
    parser.add_argument("--captions", type=Path, help="file with a caption a line, for its words")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    captions = ["a face"]
    if args.captions:
        captions = args.captions.read_text(encoding="utf-8").split("\n")
    pipe = build(args.layers, args.heads, args.noise_scale, captions, args.seed)
    save(pipe, args.out, args.size, captions)
    count = sum(p.numel() for p in pipe.transformer.parameters())
    print(f"{args.out}: {count / 1e6:.1f} M parameters, untrained")


if __name__ == "__main__":
    main()
