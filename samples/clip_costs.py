"""Processor seconds of one pass of the sample video's transformer, by length and method.

    python samples/clip_costs.py --frames 9 33 65 -o docs/sample-video-costs.json

Dense and the methods take turns, on one thread; the pass before the timed one builds a method's
plan. What the file holds already is not measured again, so a run that is killed goes on. Weights
and inputs do not change the time: latents and text are random.
"""

import argparse
import contextlib
import json
import statistics
import time
from pathlib import Path

import torch
from diffusers import WanTransformer3DModel

import dittfast
from dittfast.files import write_json
from dittfast.pipelines.runs.sources import find

METHODS = {
    "dense": None,
    "radial": {"block_size": 32},
    "radial-narrow": {"block_size": 32, "decay_factor": 0.2},
}


@torch.no_grad()
def pass_seconds(transformer, frames, options):
    """Processor seconds of a pass over ``frames`` frames of 128 px, and the density."""
    arguments = {
        "hidden_states": torch.randn(1, transformer.config.in_channels, frames, 32, 32),
        "timestep": torch.tensor([500.0]),
        "encoder_hidden_states": torch.randn(1, 24, transformer.config.text_dim),
    }
    with contextlib.ExitStack() as stack:
        enabled = None
        if options is not None:
            enabled = dittfast.enable(transformer, "radial", **options, min_tokens=0)
            stack.enter_context(enabled)
            transformer(**arguments)
        start = time.process_time()
        transformer(**arguments)
        seconds = time.process_time() - start
        return seconds, 1.0 if enabled is None else enabled.describe().density


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--frames", type=int, nargs="+", default=[9, 33, 65])
    parser.add_argument("--rounds", type=int, default=3, help="passes of each kind")
    parser.add_argument("-o", "--output", type=Path, required=True, help="JSON file")
    args = parser.parse_args()
    torch.set_num_threads(1)
    folder = find("sample-video").location
    transformer = WanTransformer3DModel.from_pretrained(
        Path(folder) / "transformer", torch_dtype=torch.float32
    ).eval()
    costs = json.loads(args.output.read_text()) if args.output.exists() else {}
    for frames in args.frames:
        rows = costs.setdefault(str(frames), {})
        for number in range(args.rounds):
            for name, options in METHODS.items():
                row = rows.setdefault(name, {"seconds": []})
                if len(row["seconds"]) > number:
                    continue
                seconds, row["density"] = pass_seconds(transformer, frames, options)
                row["seconds"].append(round(seconds, 3))
                row["median"] = statistics.median(row["seconds"])
                if name != "dense":
                    row["speedup"] = rows["dense"]["median"] / row["median"]
                write_json(args.output, costs)
                print(frames, name, row, flush=True)


if __name__ == "__main__":
    main()
