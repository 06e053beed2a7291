"""``dittfast distill``: train a model to work with sparse attention."""

from __future__ import annotations

import argparse
import shlex
import sys

from .options import add_json_argument, check_json, compact, seconds, write_json_result

EXAMPLE = """\
examples:
  dittfast distill prepare CONFIG.yaml           make the training set; goes on where it stopped
  dittfast distill CONFIG.yaml train.lr=1e-4     train, with a value changed
  dittfast distill CONFIG.yaml --resume latest   go on with a run that was interrupted
  dittfast distill clear_sample --dry-run        show what a shipped recipe would do
  accelerate launch -m dittfast.distill CONFIG.yaml
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``dittfast distill``."""
    parser.epilog = EXAMPLE
    parser.add_argument(
        "words",
        nargs="*",
        metavar="CONFIG [KEY=VALUE ...]",
        help="a YAML file or a shipped recipe, then dotted overrides; 'prepare' before it makes "
        "the training set",
    )
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="print the whole configuration, parameter counts and an estimate of memory",
    )
    parser.add_argument(
        "--resume",
        metavar="latest",
        nargs="?",
        const="latest",
        help="go on from the newest checkpoint, or from the one in a folder",
    )
    parser.add_argument("--list", action="store_true", help="list the shipped recipes")
    add_json_argument(parser)


def run(args) -> int:
    """Train, prepare, or show what would be done."""
    from dittfast.distill.config import load_config, shipped

    if args.json is not None and not args.dry_run:
        raise ValueError(
            f"--json {args.json} takes the numbers of --dry-run; a run writes metrics.jsonl into "
            "its output folder"
        )
    check_json(args)
    if args.list and args.words:
        raise ValueError(f"--list takes nothing else, got {' '.join(args.words)}; leave out one")
    if args.list:
        print("\n".join(sorted(shipped())))
        return 0
    words = list(args.words)
    preparing = bool(words) and words[0] == "prepare"
    if preparing:
        words.pop(0)
    if not words:
        raise ValueError("the configuration is missing; try: dittfast distill --list")
    if args.resume is not None and (preparing or args.dry_run):
        what = "prepare, which always goes on," if preparing else "--dry-run"
        raise ValueError(f"--resume {args.resume} does not go with {what}; leave out one of them")
    name, *overrides = words
    config = load_config(name, overrides)
    if args.dry_run:
        return _dry_run(args, config)
    _quiet_libraries()
    return _prepare(config) if preparing else _train(config, args.resume)


def _quiet_libraries() -> None:
    import diffusers
    import transformers

    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()


def _prepare(config) -> int:
    import torch
    from accelerate import PartialState

    from dittfast.distill.prepare import prepare
    from dittfast.pipelines.runs.sources import choose_dtype, find, load

    state = PartialState(cpu=not torch.accelerator.is_available())
    source = find(config.model.path)
    pipe = load(source, state.device, choose_dtype(config.model.dtype, state.device))
    folder = prepare(
        pipe,
        config.model.component,
        source,
        config.data,
        state.process_index,
        state.num_processes,
        state.wait_for_everyone,
    )
    if state.is_main_process:
        print(f"the training set is in {folder}")
    return 0


def _train(config, resume: str | None) -> int:
    from dittfast.distill.trainer import Trainer

    trainer = Trainer(config, resume)
    last = trainer.run()
    if trainer.accelerator.is_main_process:
        if last:
            print(f"step {trainer.step}: " + ", ".join(f"{k} {v:.5g}" for k, v in last.items()))
        print(f"{seconds(trainer.seconds)} of training steps")
        adapter = trainer.output / "adapter"
        print(f"wrote {adapter}")
        print(f"draw with it: {drawing_command(config, adapter)}")
    return 0


def drawing_command(config, adapter) -> str:
    """The command that draws with what a run trained."""
    from dittfast.pipelines.runs.sources import find

    path = config.model.path
    prompts = find(path).settings.get("prompts") or ["a red apple"]
    words = ["dittfast", "generate", prompts[0], "--model", path, "--adapter", str(adapter)]
    return shlex.join([*words, "--compare", "-o", "picture.png"])


def _dry_run(args, config) -> int:
    import yaml

    from dittfast.distill.memory import memory_needs

    print(yaml.safe_dump(config.to_dict(), sort_keys=False), end="")
    needs = memory_needs(config)
    print()
    for name, count in needs["parameters"].items():
        print(f"{name:24} {compact(count):>10} parameters")
    for name, size in needs["bytes"].items():
        print(f"{name:24} {compact(size, 'B'):>10}")
    for note in needs["notes"]:
        print(f"note: {note}", file=sys.stderr)
    write_json_result(args, needs)
    return 0
