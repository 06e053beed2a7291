"""What a run must have in common with the checkpoint it goes on from, and what it may change."""

from __future__ import annotations

from pathlib import Path

from dittfast.pipelines.measure.drawings import difference_of_settings

from .config import DistillConfig
from .loader import Dataset

# With another value of these a checkpoint is of another training.
_FIXED = (
    "model.component",
    "student.method",
    "student.options",
    "student.trainable",
    "train.optimizer",
    "train.seed",
)
_FIXED_OF_LORA = ("student.rank", "student.alpha", "student.targets")
# What is known already, or changes nothing that is trained.
_SILENT = ("train.output", "train.keep", "train.trackers", "train.checkpoint_every", "train.verify")


def run_facts(config: DistillConfig, sets: list[Dataset], global_batch: int) -> dict:
    """What a checkpoint says of its run; plain data."""
    return {
        "global_batch": global_batch,
        "seed": config.train.seed,
        "config": config.to_dict(),
        "data": {"sets": [x.identity for x in sets], "contents": [x.contents for x in sets]},
    }


def check_resume(folder: Path, progress: dict, facts: dict) -> list[str]:
    """Compare a checkpoint's run with the one that goes on; what changes, in words.

    Args:
        progress: of the checkpoint; those of earlier versions know less, and are believed.
        facts: of this run, as :func:`run_facts`.

    Raises:
        ValueError: it is another training: another method, other parameters, or other data.
    """
    for name in ("global_batch", "seed"):
        if progress[name] != facts[name]:
            raise ValueError(
                f"{folder} was written with {name} {progress[name]}, this run has {facts[name]}; "
                "the order of its data would change"
            )
    before = progress.get("config")
    if before is None:
        return []
    fixed, free = [], []
    lora = facts["config"]["student"]["trainable"] == "lora"
    for line in difference_of_settings(_known(facts["config"], before), before):
        name = line.partition(":")[0]
        if _is_among(name, _FIXED) or (lora and _is_among(name, _FIXED_OF_LORA)):
            fixed.append(line)
        elif not _is_among(name, _SILENT):
            free.append(line)
    if fixed:
        raise ValueError(
            f"{folder} belongs to another training ({'; '.join(fixed)}); go on with the values "
            "from before, or start a new one from what it learnt, in another train.output with "
            "student.start=ADAPTER"
        )
    return free + _data_changes(folder, progress["data"], facts["data"])


def _data_changes(folder: Path, before: dict, now: dict) -> list[str]:
    if before["sets"] != now["sets"]:
        raise ValueError(
            f"{folder} was trained on another training set (its prompts, sizes or seeds differ), "
            "so the order of the data would change; prepare the set as it was, or start a new run"
        )
    return ["the training set's samples"] if before["contents"] != now["contents"] else []


def _is_among(name: str, known: tuple[str, ...]) -> bool:
    return any(name == entry or name.startswith(f"{entry}.") for entry in known)


def _known(now: dict, before: dict) -> dict:
    """``now`` without the sections and keys that the earlier version did not have."""
    return {
        section: {k: v for k, v in values.items() if k in before[section]}
        for section, values in now.items()
        if section in before
    }
