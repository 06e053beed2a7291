"""Writes the training set: latents and prompt embeddings in safetensors shards."""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from dittfast.config import unknown
from dittfast.disk.locks import locked
from dittfast.disk.problems import FileProblem, first_words, reading
from dittfast.disk.records import read_record, read_text, sha256, write_record
from dittfast.disk.structure import check_structure
from dittfast.disk.tensors import write_tensors
from dittfast.pipelines.fingerprint import fingerprint
from dittfast.pipelines.models import transformers_of
from dittfast.pipelines.runs.call import (
    PicturePerPrompt,
    accepted,
    call_arguments,
    is_video,
    needs_image,
)
from dittfast.pipelines.runs.first_frame import with_first_frame
from dittfast.pipelines.runs.positions import positions_scaled
from dittfast.pipelines.runs.run import frames_drawn
from dittfast.pipelines.runs.sources import Source

from .conditioning import Conditioning, condition, draw, encode
from .config import DataConfig
from .noise import NoiseProcess, process_of
from .pictures import Picture, find_pictures, read_frames

logger = logging.getLogger(__name__)

MANIFEST = "data.json"
NEGATIVE = "negative.safetensors"
FORMAT = 1
MANIFEST_FORM = {
    "format": int,
    "model": str,
    "fingerprint": {"class": str, "shapes": str, "values": {"*": [float]}},
    "process": {
        "kind": str,
        "time_scale": float,
        "alphas_cumprod": [float],
        "noise_scale?": float,
        "smallest_time?": float,
    },
    "constants": dict,
    "latent_shape": [int],
    "call": dict,
    "position_scale?": float,
    "from": str,
    "shard_size": int,
    "prompts": [str],
    "seeds": [int],
    "records?": bool,
}
# Of a shard: what its samples were made from.
_PICTURE = {"file": str, "size": int, "modified": int, "sha256": str}
SHARD_FORM = {"samples": [{"prompt": str, "seed": int, "picture": (None, _PICTURE)}]}
AGAIN = "run dittfast distill prepare again: it makes damaged files anew"


def shard_name(index: int) -> str:
    return f"shard-{index:05d}.safetensors"


def record_name(name: str) -> str:
    """The record of a shard, or of the negative prompt: what is in it, and its SHA-256."""
    return name.removesuffix(".safetensors") + ".json"


@dataclass(frozen=True)
class Item:
    """One sample to make."""

    prompt: str
    seed: int
    picture: Picture | None = None


def plan_items(config: DataConfig) -> list[Item]:
    """The samples of a set, in order.

    Raises:
        ValueError: neither prompts nor pictures, or none in the file.
        FileNotFoundError: no such file or folder.
    """
    if config.pictures:
        sources = [(p.caption, p) for p in find_pictures(config.pictures)]
    elif config.prompts:
        sources = [(text, None) for text in _prompts(config.prompts)]
    else:
        raise ValueError("name data.prompts or data.pictures; there is nothing to prepare from")
    count = config.count or len(sources)
    if config.pictures and count > len(sources):
        raise ValueError(f"data.count is {count}, but there are {len(sources)} pictures")
    chosen = (sources[i % len(sources)] for i in range(count))
    return [Item(text, config.seed + i, picture) for i, (text, picture) in enumerate(chosen)]


def _prompts(given: tuple[str, ...]) -> list[str]:
    if len(given) > 1 or not given[0].endswith(".txt"):
        return list(given)
    path = Path(given[0])
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path} with prompts (data.prompts)")
    lines = (line.strip() for line in read_text(path).splitlines())
    prompts = [line for line in lines if line]
    if not prompts:
        raise ValueError(f"{path} holds no prompt; write one on each line")
    return prompts


def _manifest(pipe, model, source: Source, config: DataConfig, items: list[Item], call) -> dict:
    first = condition(pipe, model, _call(pipe, call, items[0])[0])
    train_steps = pipe.scheduler.config.get("num_train_timesteps", 1000)
    process = process_of(pipe, first.timestep, train_steps)
    return {
        "format": FORMAT,
        "model": source.name,
        "fingerprint": fingerprint(model),
        "process": dataclasses.asdict(process),
        "constants": first.constants,
        "latent_shape": list(first.latent_shape),
        "call": {k: v for k, v in call.items() if k not in ("prompt", "image")},
        "position_scale": config.position_scale,
        "from": "pictures" if config.pictures else "teacher",
        "shard_size": config.shard_size,
        "prompts": [item.prompt for item in items],
        "seeds": [item.seed for item in items],
        "records": True,
    }


def _call(pipe, call: dict, item: Item) -> tuple[dict, np.ndarray | None]:
    """The arguments for a sample, and the frames ``[F, H, W, 3]`` of its picture or clip.

    A clip is animated from its own first frame where the pipeline animates an image.
    """
    from PIL import Image

    wanted = call | {"prompt": item.prompt, "generator": torch.Generator().manual_seed(item.seed)}
    frames = None
    if item.picture is not None:
        count = frames_drawn(pipe, call.get("num_frames", 1)) if is_video(pipe) else 1
        frames = read_frames(item.picture.path, call["height"], call["width"], count)
    if frames is not None and needs_image(pipe):
        wanted["image"] = Image.fromarray(frames[0])
    elif isinstance(call.get("image"), PicturePerPrompt):
        wanted["image"] = call["image"](item.prompt, item.seed)
    return wanted, frames


def check_call(pipe, call: dict, where: str) -> None:
    """Check the names of a configuration's call.

    Raises:
        ValueError: an argument that the pipeline does not take; the nearest one is named.
    """
    known = [f"{where}.{name}" for name in accepted(pipe)]
    for name in call:
        if f"{where}.{name}" not in known:
            raise unknown(f"argument of {type(pipe).__name__}", f"{where}.{name}", known)


def prepare(
    pipe,
    component: str,
    source: Source,
    config: DataConfig,
    process_index: int = 0,
    num_processes: int = 1,
    wait: Callable[[], None] = lambda: None,
) -> Path:
    """Write the shards of a set that are not there yet; the folder.

    A shard appears when it is complete, so an interrupted run goes on with the next one. Shards
    that are damaged, or whose pictures were replaced since, are made again. Process
    ``process_index`` writes every ``num_processes``-th shard and needs no word from the others.
    The first one keeps other launches out of the folder.

    Args:
        wait: returns when every process has called it.

    Raises:
        ValueError: the folder holds another set or is in use, or the pipeline cannot be cached.
    """
    with locked(config.folder, process_index == 0), positions_scaled(pipe, config.position_scale):
        made = _prepare(pipe, component, source, config, process_index, num_processes)
        wait()
        return made


def _prepare(pipe, component, source, config: DataConfig, process_index, num_processes) -> Path:
    from PIL import Image

    model = transformers_of(pipe)[component]
    folder = Path(config.folder)
    items = plan_items(config)
    given = dict(config.call)
    check_call(pipe, given, "data.call")
    if config.pictures and needs_image(pipe):
        size = given.get("height"), given.get("width")
        if None in size:
            raise ValueError("data.call needs height and width, the size of the clips")
        # Each clip brings its own, but a call without one is refused.
        given["image"] = Image.fromarray(read_frames(items[0].picture.path, *size)[0])
    call = call_arguments(pipe, items[0].prompt, source.settings, **given)
    call = with_first_frame(pipe, call, source.settings)
    manifest = _manifest(pipe, model, source, config, items, call)
    folder.mkdir(parents=True, exist_ok=True)
    _agree(folder / MANIFEST, manifest)
    pipe.set_progress_bar_config(disable=True)
    fresh = _Freshness(folder, config)
    if process_index == 0 and not fresh.is_current(NEGATIVE, []):
        negative, _ = _call(pipe, call, items[0])
        negative["prompt"] = call.get("negative_prompt") or ""
        _save(folder / NEGATIVE, [(None, condition(pipe, model, negative))], [])
    shards = -(-len(items) // config.shard_size)
    mine = range(process_index, shards, num_processes)
    size = config.shard_size
    of_shard = {i: items[i * size : (i + 1) * size] for i in mine}
    missing = [i for i in mine if not fresh.is_current(shard_name(i), of_shard[i])]
    total = sum(len(of_shard[i]) for i in missing)
    with tqdm(total=total, desc="preparing", unit="sample", disable=process_index > 0) as bar:
        for index in missing:
            # Before they are read: a picture that is replaced meanwhile is noticed the next time.
            facts = [fresh.facts(item) for item in of_shard[index]]
            samples = []
            for item in of_shard[index]:
                samples.append(_sample(pipe, model, call, item))
                bar.update()
            _save(folder / shard_name(index), samples, facts)
    return folder


def read_manifest(path: Path, verify: bool = True) -> dict:
    """The manifest of a set.

    Raises:
        FileProblem: it is damaged.
        ValueError: another version wrote it.
    """
    form = {"format": int, "*": object}
    data = read_record(path, form, verify=verify, remedy="delete the folder and prepare again").data
    if data["format"] != FORMAT:
        raise ValueError(
            f"{path} has format {data['format']}, this version reads {FORMAT}; prepare the set "
            "again"
        )
    with reading(path, "it is no manifest of a set"):
        check_structure(data, MANIFEST_FORM)
        if data["shard_size"] < 1 or not data["prompts"]:
            raise ValueError(f"{len(data['prompts'])} samples in shards of {data['shard_size']}")
        if len(data["prompts"]) != len(data["seeds"]):
            raise ValueError(f"{len(data['prompts'])} prompts and {len(data['seeds'])} seeds")
        read_process(data)
    return data


def _agree(path: Path, manifest: dict) -> None:
    """Write the manifest, or check that the one there describes the same set."""
    if not path.exists():
        write_record(path, manifest)
        return
    # Sets of earlier versions know fewer fields, and shards without records.
    there = {"position_scale": 1.0, **read_manifest(path), "records": True}
    there["process"] = json.loads(json.dumps(dataclasses.asdict(read_process(there))))
    ours = json.loads(json.dumps(manifest))
    different = sorted(key for key in {*there, *ours} if there.get(key) != ours.get(key))
    if different:
        raise ValueError(
            f"{path.parent} holds another training set (different: {', '.join(different)}); name "
            "another data.folder, or delete that one"
        )


class _Freshness:
    """Whether the files of a set are whole, and made from the pictures as they are now."""

    def __init__(self, folder: Path, config: DataConfig):
        self.folder = folder
        self.pictures = Path(config.pictures) if config.pictures else None
        self.has_records = read_manifest(folder / MANIFEST).get("records", False)

    def facts(self, item: Item, known: dict | None = None) -> dict:
        """What a sample is made from. Of a picture with the size and time known, not read again."""
        picture = None
        if item.picture is not None:
            path = item.picture.path
            about = path.stat()
            picture = {
                "file": path.relative_to(self.pictures).as_posix(),
                "size": about.st_size,
                "modified": about.st_mtime_ns,
            }
            same = known and all(known[name] == value for name, value in picture.items())
            picture["sha256"] = known["sha256"] if same else sha256(path)
        return {"prompt": item.prompt, "seed": item.seed, "picture": picture}

    def is_current(self, name: str, items: list[Item]) -> bool:
        """Whether a file need not be written; says why one that is there must be."""
        path = self.folder / name
        if not path.exists():
            return False
        record = self.folder / record_name(name)
        if not record.exists():
            return not self.has_records and self._is_older(path, items)
        try:
            written = read_record(record, SHARD_FORM)
            written.check(name)
        except FileProblem as problem:
            logger.warning("%s; it is made again", first_words(problem, 400))
            return False
        before = written.data["samples"]
        if len(before) != len(items):
            return False
        now = [self.facts(item, old["picture"]) for item, old in zip(items, before)]
        for old, new in zip(before, now):
            if _content(old) != _content(new):
                what = "" if new["picture"] is None else f": {new['picture']['file']} was replaced"
                logger.warning("%s is made again%s", path, what)
                return False
        if now != before:  # touched, but the same
            write_record(record, {"samples": now}, [name])
        return True

    def _is_older(self, path: Path, items: list[Item]) -> bool:
        """Of sets of earlier versions only times are known."""
        made = path.stat().st_mtime
        for item in items:
            if item.picture is not None and item.picture.path.stat().st_mtime > made:
                logger.warning("%s is made again: %s is newer", path, item.picture.path)
                return False
        return True


def _content(sample: dict) -> tuple:
    picture = sample["picture"]
    return sample["prompt"], sample["seed"], picture and (picture["file"], picture["sha256"])


def _sample(pipe, model, call: dict, item: Item) -> tuple[torch.Tensor, Conditioning]:
    wanted, frames = _call(pipe, call, item)
    if frames is None:
        return draw(pipe, model, wanted)
    conditioning = condition(pipe, model, wanted)
    return encode(pipe, torch.from_numpy(frames), conditioning.latent_shape), conditioning


def _save(
    path: Path, samples: list[tuple[torch.Tensor | None, Conditioning]], facts: list[dict]
) -> None:
    """``{i}/latents`` and ``{i}/{argument}`` of each sample, ``shared/{argument}`` once.

    Args:
        facts: what each sample was made from, for the record beside the file.
    """
    tensors = {}
    shared = samples[0][1].shared
    for index, (latents, conditioning) in enumerate(samples):
        same = conditioning.shared.keys() == shared.keys()
        if not same or not all(torch.equal(conditioning.shared[k], shared[k]) for k in shared):
            raise ValueError(
                "position ids and other shared arguments differ between samples of one set; give "
                "them one size (data.call)"
            )
        if latents is not None:
            tensors[f"{index}/latents"] = latents
        tensors |= {f"{index}/{name}": x for name, x in conditioning.own.items()}
    tensors |= {f"shared/{name}": x for name, x in shared.items()}
    tensors = {name: x.to("cpu").contiguous() for name, x in tensors.items()}
    write_tensors(path, tensors)
    write_record(path.with_name(record_name(path.name)), {"samples": facts}, [path.name])


def read_process(manifest: dict) -> NoiseProcess:
    """The noise process of a set."""
    fields = dict(manifest["process"])
    fields["alphas_cumprod"] = tuple(fields["alphas_cumprod"])
    return NoiseProcess(**fields)
