"""The README of an adapter."""

from __future__ import annotations


def model_card(description: dict, method: str, schedule: str) -> str:
    """Markdown with the front matter that model hubs read.

    Args:
        description: what ``adapter.json`` holds.
        method, schedule: as Python shows them.
    """
    base, run, config = description["base"], description["run"], description["config"]
    train, data, losses = config["train"], config["data"], config["objectives"]
    weights = ", ".join(
        f"{name} {losses[name]:g}"
        for name in ("denoising", "prediction", "attention", "features")
        if losses[name]
    )
    trained = description["trainable"]
    if description["lora"]:
        lora = description["lora"]
        targets = ", ".join(lora["targets"])
        trained = f"LoRA of rank {lora['rank']}, alpha {lora['alpha']:g}, on {targets}"
    source = f"{run['samples']} samples"
    if data["pictures"]:
        source += f" from pictures in {data['pictures']}"
    elif data["prompts"]:
        prompts = data["prompts"]
        words = prompts[0] if len(prompts) == 1 else f"{len(prompts)} prompts"
        source += f" drawn by the base model from {words}"
    lines = [
        "---",
        f"base_model: {base['model']}",
        "library_name: diffusers",
        "tags: [dittfast, sparse-attention]",
        "---",
        "",
        f"# {base['model']} with {description['method']} attention",
        "",
        "```python",
        "import dittfast",
        "",
        'dittfast.load_adapter(pipe, "PATH_OF_THIS_FOLDER")',
        "```",
        "",
        "| | |",
        "|---|---|",
        f"| base model | {base['model']} ({base['fingerprint']['class']}) |",
        f"| method | `{method}` |",
        f"| schedule | `{schedule}` |",
        f"| trained | {trained} |",
        f"| data | {source}, seed {data['seed']} |",
        f"| steps | {run['steps']} of {run['global_batch']} samples, seed {run['seed']} |",
        f"| optimiser | {train['optimizer']}, lr {train['lr']:g}, {train['lr_schedule']} |",
        f"| losses | {weights} |",
        f"| time | {run['seconds'] / 3600:.2f} h of steps |",
    ]
    last = run["last_step"]
    if last:
        lines.append(f"| last step's loss | {last['loss']:.5g} |")
    for name, words in (("validation_before", "before"), ("validation", "after")):
        row = run[name]
        if row:
            ssim = f", SSIM {row['validation/ssim']:.3f}" if "validation/ssim" in row else ""
            psnr = row["validation/psnr_db"]
            lines.append(f"| to the dense base, {words} | PSNR {psnr:.2f} dB{ssim} |")
    lines += [
        "",
        f"Written by dittfast {description['dittfast']}. The whole configuration is in "
        "`adapter.json`.",
        "",
    ]
    return "\n".join(lines)
