"""The README of an adapter."""

from __future__ import annotations

from dittfast.markdown import as_text, markdown_table


def model_card(description: dict, method: str, schedule: str) -> str:
    """Markdown with the front matter that model hubs read.

    Names and prompts from the configuration are shown as text, whatever they hold.

    Args:
        description: what ``adapter.json`` holds.
        method, schedule: as Python shows them.
    """
    base = as_text(description["base"]["model"])
    about = [
        ("base model", f"{base} ({description['base']['fingerprint']['class']})"),
        ("method", _code(method)),
        ("schedule", _code(schedule)),
        ("trained", _trained(description)),
        *_run(description["run"], description["config"]),
    ]
    return "\n".join(
        [
            _front_matter(description["base"]["model"]),
            f"# {base} with {description['method']} attention",
            "",
            "```python",
            "import dittfast",
            "",
            'dittfast.load_adapter(pipe, "PATH_OF_THIS_FOLDER")',
            "```",
            "",
            # Pipes are escaped by the table.
            markdown_table(("", ""), [(name, x.replace("\\|", "|")) for name, x in about]),
            f"Written by dittfast {description['dittfast']}. The whole configuration is in "
            "`adapter.json`.",
            "",
        ]
    )


def _front_matter(base: str) -> str:
    import yaml

    tags = ["dittfast", "sparse-attention"]
    # In one line: a line of dashes in a name would end the front matter.
    fields = {"base_model": " ".join(base.split()), "library_name": "diffusers", "tags": tags}
    text = yaml.safe_dump(fields, sort_keys=False, allow_unicode=True, width=10**6)
    return f"---\n{text}---\n"


def _code(text: str) -> str:
    return f"`{' '.join(text.split()).replace('`', '')}`"


def _trained(description: dict) -> str:
    lora = description["lora"]
    if not lora:
        return description["trainable"]
    targets = as_text(", ".join(lora["targets"]))
    return f"LoRA of rank {lora['rank']}, alpha {lora['alpha']:g}, on {targets}"


def _run(run: dict, config: dict) -> list[tuple[str, str]]:
    """What was trained on what, for how long, and what came of it."""
    train, losses = config["train"], config["objectives"]
    weights = ", ".join(
        f"{name} {losses[name]:g}"
        for name in ("denoising", "prediction", "attention", "features")
        if losses[name]
    )
    rows = [
        ("data", f"{_source(run, config['data'])}, seed {config['data']['seed']}"),
        ("steps", f"{run['steps']} of {run['global_batch']} samples, seed {run['seed']}"),
        ("optimiser", f"{train['optimizer']}, lr {train['lr']:g}, {train['lr_schedule']}"),
        ("losses", weights),
        ("time", f"{run['seconds'] / 3600:.2f} h of steps"),
    ]
    if run["last_step"]:
        rows.append(("last step's loss", f"{run['last_step']['loss']:.5g}"))
    for name, words in (("validation_before", "before"), ("validation", "after")):
        row = run[name]
        if row:
            ssim = f", SSIM {row['validation/ssim']:.3f}" if "validation/ssim" in row else ""
            psnr = f"PSNR {row['validation/psnr_db']:.2f} dB{ssim}"
            rows.append((f"to the dense base, {words}", psnr))
    return rows


def _source(run: dict, data: dict) -> str:
    samples = f"{run['samples']} samples"
    if data["pictures"]:
        return f"{samples} from pictures in {as_text(data['pictures'])}"
    if not data["prompts"]:
        return samples
    prompts = data["prompts"]
    words = as_text(prompts[0]) if len(prompts) == 1 else f"{len(prompts)} prompts"
    return f"{samples} drawn by the base model from {words}"
