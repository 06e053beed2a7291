"""Measure where the sample model's attention goes, per layer and head, and plot it.

    python samples/attention_structure.py --model samples/models/sample-flux \\
        --out docs/sample-flux-attention

writes ``.json`` and ``.png``. Numbers are averages over prompts, over the image tokens' rows of
the attention matrix, for the conditional branch. For every layer, head and time it gives

- ``text``: the share of an image row's mass that goes to text tokens;
- ``distance``: the share of the mass on image keys that lies at each Chebyshev distance, in
  tokens, from the query; ``distance_uniform`` is the same for attention without preference;
- ``top_blocks``: the share of the mass on image keys held by the top tenth of key blocks, chosen
  for each block of queries by its own mass (an oracle). Blocks are 64 tokens in raster order
  (two rows), 64 tokens as an 8x8 tile, and 16 tokens as a 4x4 tile;
- ``top_tokens``: the same for single keys chosen for each single query.
"""

import argparse
import json
from pathlib import Path
from unittest.mock import patch

import matplotlib
import numpy as np
import torch
from diffusers import FluxPipeline
from diffusers.models.transformers import transformer_flux

matplotlib.use("Agg")
import matplotlib.pyplot as plt

DISTANCE_EDGES = (0, 1, 2, 3, 5, 9, 17, 32)
DISTANCE_NAMES = ("0", "1", "2", "3-4", "5-8", "9-16", "17-31")
TOP_PART = 0.1


def block_layouts(side):
    """Name -> (order of the tokens, tokens per block) for a ``side`` x ``side`` picture."""
    grid = torch.arange(side * side).view(side, side)

    def tiles(n):
        parts = grid.view(side // n, n, side // n, n).permute(0, 2, 1, 3)
        return parts.reshape(-1), n * n

    return {
        "raster_64": (grid.reshape(-1), 64),
        "tile_8x8": tiles(8),
        "tile_4x4": tiles(4),
    }


def distance_bins(side):
    """[N, N] index into ``DISTANCE_NAMES`` for every pair of image tokens."""
    y, x = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    y, x = y.flatten(), x.flatten()
    distance = torch.maximum((y[:, None] - y).abs(), (x[:, None] - x).abs())
    return torch.bucketize(distance, torch.tensor(DISTANCE_EDGES[1:]), right=True)


def n_top(n):
    """How many of ``n`` blocks make a tenth, rounded up."""
    return -(-n // round(1 / TOP_PART))


def statistics(query, key, n_image):
    """Per-head numbers of one attention call; ``query`` and ``key`` are [1, S, H, D]."""
    side = round(n_image**0.5)
    scores = torch.einsum("qhd,khd->hqk", query[0].float(), key[0].float())
    attention = (scores * query.shape[-1] ** -0.5).softmax(-1)[:, -n_image:]
    on_image = attention[..., -n_image:]
    text = 1 - on_image.sum(-1).mean(-1)
    rows = on_image / on_image.sum(-1, keepdim=True)

    bins = distance_bins(side)
    distance = [(rows * (bins == i)).sum(-1).mean(-1) for i in range(len(DISTANCE_NAMES))]
    top_blocks = {}
    for name, (order, size) in block_layouts(side).items():
        n = n_image // size
        mass = rows[:, order][:, :, order].view(-1, n, size, n, size).sum(-1).mean(2)
        top_blocks[name] = mass.topk(n_top(n), -1).values.sum(-1).mean(-1)
    top_tokens = rows.topk(n_top(n_image), -1).values.sum(-1).mean(-1)
    return {
        "text": text,
        "distance": torch.stack(distance, -1),
        "top_blocks": top_blocks,
        "top_tokens": top_tokens,
    }


class Recorder:
    """Stands in for diffusers' attention dispatch, and notes statistics at the chosen steps."""

    def __init__(self, transformer, steps):
        self.n_layers = len(transformer.transformer_blocks) + len(
            transformer.single_transformer_blocks
        )
        self.steps, self.calls, self.by_call = steps, 0, {}
        self.dispatch = transformer_flux.dispatch_attention_fn

    def __call__(self, query, key, value, **kwargs):
        forward, layer = divmod(self.calls, self.n_layers)
        step, is_negative = divmod(forward, 2)  # true CFG runs the prompt, then the negative
        self.calls += 1
        if step in self.steps and not is_negative:
            numbers = statistics(query, key, self.n_image)
            self.by_call.setdefault((step, layer), []).append(numbers)
        return self.dispatch(query, key, value, **kwargs)

    def start(self, n_image):
        self.calls, self.n_image = 0, n_image


def measure(model_folder, n_prompts, steps):
    """Run the pipeline on the sample's prompts and return the whole table."""
    sample = json.loads((model_folder / "sample.json").read_text())
    pipe = FluxPipeline.from_pretrained(model_folder, torch_dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    names = ["negative_prompt", "height", "width", "num_inference_steps", "true_cfg_scale"]
    names += ["guidance_scale", "max_sequence_length"]
    call = {name: sample[name] for name in names}
    side = call["height"] // (2 * pipe.vae_scale_factor)
    recorder = Recorder(pipe.transformer, steps)
    prompts = sample["prompts"][:n_prompts]
    with patch.object(transformer_flux, "dispatch_attention_fn", recorder):
        for seed, prompt in enumerate(prompts):
            recorder.start(side * side)
            generator = torch.Generator().manual_seed(seed)
            pipe(prompt, generator=generator, output_type="latent", **call)
    times = [round(float(t), 3) for t in pipe.scheduler.timesteps / 1000]

    n_double = len(pipe.transformer.transformer_blocks)
    rows = []
    for (step, layer), many in sorted(recorder.by_call.items()):

        def mean(read, many=many):
            return torch.stack([read(numbers) for numbers in many]).mean(0)

        text, distance = mean(lambda n: n["text"]), mean(lambda n: n["distance"])
        tokens = mean(lambda n: n["top_tokens"])
        blocks = {
            name: mean(lambda n, name=name: n["top_blocks"][name]) for name in block_layouts(side)
        }
        for head in range(len(text)):
            rows.append(
                {
                    "step": step,
                    "time": times[step],
                    "layer": layer,
                    "kind": "double" if layer < n_double else "single",
                    "head": head,
                    "text": round(float(text[head]), 4),
                    "distance": [round(float(v), 4) for v in distance[head]],
                    "top_blocks": {name: round(float(v[head]), 4) for name, v in blocks.items()},
                    "top_tokens": round(float(tokens[head]), 4),
                }
            )
    n = side * side
    bins = distance_bins(side)
    return {
        "image_tokens": n,
        "prompts": prompts,
        "steps_in_all": call["num_inference_steps"],
        "distance_names": DISTANCE_NAMES,
        "distance_uniform": [
            round(float((bins == i).float().mean()), 4) for i in range(len(DISTANCE_NAMES))
        ],
        "top_blocks_uniform": {
            name: round(n_top(n // size) / (n // size), 4)
            for name, (_, size) in block_layouts(side).items()
        },
        "top_tokens_uniform": round(n_top(n) / n, 4),
        "rows": rows,
    }


def plot(table, path):
    """One column per time: mass by distance above, shares of the top tenth below."""
    steps = sorted({row["step"] for row in table["rows"]})
    figure, axes = plt.subplots(
        2, len(steps), figsize=(4.8 * len(steps), 9.4), squeeze=False, layout="constrained"
    )
    for column, step in enumerate(steps):
        rows = [row for row in table["rows"] if row["step"] == step]
        names = [
            f"{row['kind']} {row['layer']} head {row['head']}\n({100 * row['text']:.0f} % on text)"
            for row in rows
        ]
        upper, lower = axes[:, column]
        mass = np.array([row["distance"] for row in rows])
        uniform = np.array(table["distance_uniform"])
        stacked = np.vstack([mass, uniform])
        picture = upper.imshow(stacked, vmin=0, vmax=0.6, cmap="viridis", aspect="auto")
        for (y, x), value in np.ndenumerate(stacked):
            shade = "white" if value < 0.35 else "black"
            upper.text(x, y, f"{100 * value:.0f}", ha="center", va="center", color=shade, size=7)
        upper.set_xticks(range(len(DISTANCE_NAMES)), DISTANCE_NAMES)
        upper.set_yticks(range(len(names) + 1), [*names, "uniform"], fontsize=6)
        upper.set_xlabel("distance, tokens")
        upper.set_title(f"step {step + 1} of {table['steps_in_all']}, t = {rows[0]['time']:.2f}")
        shares = {name: [r["top_blocks"][name] for r in rows] for name in rows[0]["top_blocks"]}
        shares["single tokens"] = [row["top_tokens"] for row in rows]
        expected = {**table["top_blocks_uniform"], "single tokens": table["top_tokens_uniform"]}
        y = np.arange(len(rows))
        for i, (name, values) in enumerate(shares.items()):
            bars = lower.barh(y + 0.2 * (i - 1.5), values, height=0.2, label=name)
            lower.axvline(expected[name], color=bars[0].get_facecolor(), ls=":", lw=1)
        lower.set_yticks(y, names, fontsize=6)
        lower.invert_yaxis()
        lower.set_xlim(0, 1)
        lower.set_xlabel("share of the mass in the top tenth (dotted: uniform)")
    figure.colorbar(picture, ax=axes[0, -1], label="share of the mass on image keys")
    handles, labels = axes[1, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels))
    figure.suptitle("Where the sample model's attention goes (image rows, averaged over prompts)")
    figure.savefig(path, dpi=90)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, required=True, help="pipeline folder")
    parser.add_argument("--out", type=Path, required=True, help="path without suffix")
    parser.add_argument("--prompts", type=int, default=8, help="how many of the sample's prompts")
    parser.add_argument(
        "--steps", type=int, nargs="+", default=[1, 10, 18], help="denoising steps to look at"
    )
    parser.add_argument("--threads", type=int, default=2, help="CPU threads")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    table = measure(args.model, args.prompts, args.steps)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.with_suffix(".json").write_text(json.dumps(table, indent=1) + "\n")
    plot(table, args.out.with_suffix(".png"))
    print(f"wrote {args.out}.json and .png")


if __name__ == "__main__":
    main()
