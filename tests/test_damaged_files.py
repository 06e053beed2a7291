"""Every reader of the package on hundreds of damaged files: refused in a sentence, or the same."""

from __future__ import annotations

import contextlib
import json
import random
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from adapter_folder import make_adapter
from distill_run import one_thread  # noqa: F401
from PIL import Image
from test_report import folder as evaluation  # noqa: F401 (a fixture)
from tiny import flux_pipeline

import dittfast
from dittfast.disk.records import SUMS, digest_of, parse_json, with_sums, write_record
from dittfast.disk.tensors import write_tensors
from dittfast.distill.adapter_files import read_file

FEW, MANY = 12, 200
VALUES = [None, True, "x", "", -1, 0, 2**62, 10**30, 1e300, [], {}, [None], {"x": 1}, "64"]


# Damages.


def damaged_bytes(draw: random.Random, data: bytes) -> bytes:
    """One of the things that happen to files."""
    at, size = draw.randrange(len(data) + 1), draw.choice((1, 2, 7, 64, 1000))
    kind = draw.choice(("cut", "flip", "flip", "many", "zeros", "lost", "twice", "noise"))
    if kind == "cut":
        return data[:at]
    if kind == "lost":
        return data[:at] + data[at + size :]
    if kind == "twice":
        return data[:at] + data[at : at + size] + data[at:]
    if kind == "noise":
        return data[:at] + draw.randbytes(size) + data[at:]
    if kind == "zeros":
        return data[:at] + bytes(min(size, len(data) - at)) + data[at + size :]
    changed = bytearray(data)
    for _ in range(1 if kind == "flip" else size):
        changed[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
    return bytes(changed)


def places(value, found=None, path=()):
    """The ways to every entry of plain data."""
    found = [] if found is None else found
    if isinstance(value, (dict, list)):
        for key in value if isinstance(value, dict) else range(len(value)):
            found.append((*path, key))
            places(value[key], found, (*path, key))
    return found


def changed_data(draw: random.Random, data):
    """Plain data with an entry missing, of another kind, or without end."""
    data = json.loads(json.dumps(data))
    *way, last = draw.choice(places(data))
    inside = data
    for key in way:
        inside = inside[key]
    kind = draw.choice(("gone", "other", "other", "deep", "more"))
    if kind == "gone":
        del inside[last]
    elif kind == "deep":
        for _ in range(3000):
            inside[last] = inner = []
            inside, last = inner, 0
            inner.append(None)
    elif kind == "more" and isinstance(inside, dict):
        inside["unheard of"] = draw.choice(VALUES)
    else:
        inside[last] = draw.choice(VALUES)
    return data


# Readers.


@dataclass
class Reader:
    """A file of the package's, and who reads it.

    Attributes:
        file: relative to the folder.
        read: reads the folder; something that compares.
        sealed: whether a checksum covers the file.
        data: how its text becomes plain data; None for binary files.
        says_file: whether a refusal names the file or its folder.
    """

    file: str
    read: Callable[[Path], object]
    sealed: bool = True
    data: Callable[[str], object] | None = None
    says_file: bool = True


def same(a, b) -> bool:
    if torch.is_tensor(a):
        return torch.equal(a, b)
    if isinstance(a, np.ndarray):
        return np.array_equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


PIPE = []


def read_adapter(folder):
    """Load it whole into a pipeline, and what changed there."""
    if not PIPE:
        PIPE.append(flux_pipeline())
    dittfast.load_adapter(PIPE[0], folder / "adapter")
    try:
        return {n: x.clone() for n, x in PIPE[0].transformer.state_dict().items()}
    finally:
        dittfast.unload_adapter(PIPE[0])


def make_parts(folder):
    """A checkpoint in two files, with their index."""
    named = {"a.weight": "1.safetensors", "b.weight": "2.safetensors"}
    for name, file in named.items():
        write_tensors(folder / file, {name: torch.rand(3, 4)})
    (folder / "model.index.json").write_text(json.dumps({"metadata": {}, "weight_map": named}))


def read_parts(folder):
    return read_file(folder / "model.index.json")


def make_adapters(folder, kind):
    make_adapter(folder / "adapter", kind)


def run_state():
    from dittfast.distill.checkpoint import RunState
    from dittfast.distill.optim import Average

    torch.manual_seed(0)
    parameters = {n: torch.nn.Parameter(torch.randn(5, 4)) for n in "ab"}
    optimizer = torch.optim.AdamW(parameters.values())
    for p in parameters.values():
        p.grad = torch.randn_like(p)
    optimizer.step()
    return RunState(parameters, Average(parameters, 0.5), optimizer)


def make_checkpoint(folder):
    from dittfast.distill.checkpoint import Checkpoints

    state = run_state()
    progress = {"step": 3, "seconds": 1.5, "global_batch": 2, "seed": 0, "config": {"train": {}}}
    progress["data"] = {"sets": ["x"], "contents": [None]}
    Checkpoints(folder, 2).write(3, lambda part: state.write(part, progress))


def read_checkpoint(folder):
    from dittfast.distill.checkpoint import read_progress, rng_state

    state, generators = run_state(), rng_state()
    record = read_progress(folder / "step-00000003")
    state.read(folder / "step-00000003", record)
    found = rng_state()
    from dittfast.distill.checkpoint import set_rng_state

    set_rng_state(generators)
    found = {name: found[name] for name in ("torch", "numpy")}
    return [record.data, state.result(), state.optimizer.state_dict()["state"], found]


def make_set(folder):
    from dittfast.distill import prepare
    from dittfast.distill.conditioning import Conditioning

    torch.manual_seed(0)
    manifest = {
        "format": 1,
        "model": "tiny",
        "fingerprint": {"class": "X", "shapes": "x", "values": {"a.weight": [1.0, -2.0]}},
        "process": {"kind": "flow", "time_scale": 1000.0, "alphas_cumprod": []},
        "constants": {"guidance": None},
        "latent_shape": [1, 4, 2],
        "call": {"height": 8},
        "position_scale": 1.0,
        "from": "teacher",
        "shard_size": 2,
        "prompts": ["a", "b", "c"],
        "seeds": [0, 1, 2],
        "records": True,
    }
    write_record(folder / "data.json", manifest)

    def sample():
        return Conditioning({"text": torch.randn(1, 3, 2)}, {"ids": torch.zeros(4, 3)})

    facts = [{"prompt": x, "seed": i, "picture": None} for i, x in enumerate("abc")]
    latents = [(torch.randn(1, 4, 2), sample()) for _ in "abc"]
    prepare._save(folder / prepare.shard_name(0), latents[:2], facts[:2])
    prepare._save(folder / prepare.shard_name(1), latents[2:], facts[2:])
    prepare._save(folder / prepare.NEGATIVE, [(None, sample())], [])


def read_set(folder):
    from dittfast.distill.loader import Dataset

    found = Dataset(folder)
    batch = found.batch([0, 1, 2], [False, True, False])
    records = [r.data for r in found._records.values()]
    return [found.manifest, batch.latents, batch.arguments, records]


def drawing(folder, draw=False):
    from dittfast.pipelines.measure.drawings import Drawings
    from dittfast.pipelines.runs.prompts import Item
    from dittfast.pipelines.runs.run import Run, Timing

    item, found = Item(0, "a cat", 7), Drawings(folder, {"model": "m", "call": {"height": 8}})
    if draw:
        rng = np.random.default_rng(0)
        frames = rng.integers(0, 255, (2, 8, 9, 3), np.uint8)
        latents = torch.randn(1, 4, 8, 9)
        result = Run(frames, Timing(0, (), 0, 0), latents=latents)
        found.save(item, result, {"seconds": 1.0})
    assert not found.missing([item]), "it is drawn again"
    return [found.record(item), found.frames(item), found.latents(item)]


def scores(folder, score=False):
    from dittfast.pipelines.headhunter.search import ScoreBook

    book = ScoreBook({"objective": "o", "samples": [["a", 1]]}, folder / "state.json")
    if score:
        book.extend("search", ((0, 1), (2, 3)), [0.25, 1e-3])
    return book._scores


def tuning(folder, tune=False):
    from dittfast.methods import Local
    from dittfast.pipelines.tune.book import Book
    from dittfast.pipelines.tune.recording import FORM, check_record

    methods, book = [Local(window=2)], Book(folder, {"model": "m", "task": {"bands": 2}})

    def make():
        assert tune, "it is measured again"
        tried = [{"error": [0.25, 1e-3], "seconds": 0.5, "planning": 0.0, "work": 0.5}]
        call = {"layer": "a", "step": 1, "rows": 1, "heads": 2, "head_dim": 8, "size": 2.5}
        call |= {"dense_seconds": 0.75, "tried": tried}
        return {"passes": 1, "calls": [call], "start": [0.25]}

    check = lambda data: check_record(data, methods, [1])  # noqa: E731
    return book.once("recorded-00000", FORM, make, check)


def make_heads(folder):
    from dittfast.methods.head_guidance import HeadGuidance

    data = {"heads": [[1, 2], [3, 0]], "guidance_scale": 2.0, "strength": [0.5, 1.0]}
    data |= {"rows": "image", "start_step": 0, "stop_step": None, "search": {"best": "round 1"}}
    write_record(folder / "heads.json", data)
    assert HeadGuidance.load(folder / "heads.json").heads == ((1, 2), (3, 0))


def read_heads(folder):
    from dittfast.methods.head_guidance import HeadGuidance

    return HeadGuidance.load(folder / "heads.json")


def make_features(folder):
    from dittfast.measure.features import FeatureNetwork, save_features

    save_features(FeatureNetwork(["cat"], ["red"], size=32, dims=4), folder, {"steps": 1})


def read_features(folder):
    from dittfast.measure.features import load_features

    found = load_features(folder)
    return [found.labels, found.name, found.size, found.state_dict()]


def read_report(folder):
    from dittfast.measure.report import html_report, markdown_report, read_results, understanding

    results = read_results(folder)
    with understanding(folder):
        page = html_report(folder, results, plots=False)
        return [page, markdown_report(results)]


def make_latency(folder):
    write_record(folder / "latency.json", {"task": "latency", "rows": [{"label": "a", "x": 1.5}]})


def read_latency(folder):
    from dittfast.cli.evaluate import _timed_before

    return _timed_before(folder / "latency")


def make_sample(folder):
    (folder / "model_index.json").write_text("{}")
    source = Path(dittfast.__file__).parent.parent / "samples/models/sample-video/sample.json"
    shutil.copy(source, folder / "sample.json")


def read_sample(folder):
    from dittfast.pipelines.runs.sources import find, find_named_by

    settings = find(str(folder)).settings
    if "first_frame" in settings:
        find_named_by(settings["first_frame"]["model"], settings["first_frame"]["within"])


def make_texts(folder):
    (folder / "run.yaml").write_text(
        yaml.safe_dump(
            {
                "model": {"path": "m"},
                "student": {"method": "local", "options": {"window": 3}, "schedule": {}},
                "data": {"folder": "d", "prompts": ["a"], "call": {"height": 8}, "mix": {"e": 0.5}},
                "train": {"output": "o", "steps": 3, "betas": [0.9, 0.99], "crop": [2, 2]},
            }
        )
    )
    methods = {"a": {"method": "local", "options": {"window": 2}}, "b": {"method": "radial"}}
    compared = {"methods": methods, "pairs": [["a", "b"]]}
    (folder / "methods.yaml").write_text(yaml.safe_dump(compared))
    preset = {"method": "local", "options": {"window": 3}, "schedule": {"dense_layers": ["x"]}}
    (folder / "preset.yaml").write_text(yaml.safe_dump(preset | {"source": "here"}))
    rules = [
        {"layers": ["transformer_blocks.*"], "method": "local", "options": {"window": 3}},
        {"heads": ["0-1"], "steps": [0, 0.5], "method": "linear"},
    ]
    mixed = {"rules": rules, "schedule": {"dense_first_steps": 1}}
    (folder / "mixture.yaml").write_text(yaml.safe_dump(mixed))
    known = {"class": "X", "shapes": "x", "values": {"a.weight": [1.0, -2.0]}}
    tuned = {"model": "m", "fingerprints": {"transformer": known}, "sizes": [[1, 6, 8]]}
    (folder / "tuned.yaml").write_text(yaml.safe_dump({"rules": rules, "tuned": tuned}))
    (folder / "prompts.txt").write_text("a cat\n# no\n\na dög\n", encoding="utf-8")
    prompts = {"annotations": [{"caption": "a cat"}, {"caption": "a dog"}]}
    (folder / "prompts.json").write_text(json.dumps(prompts))
    Image.new("RGB", (9, 8), "red").save(folder / "a.png")
    row = {"file_name": "a.png", "text": "a cat"}
    (folder / "metadata.jsonl").write_text(json.dumps(row) + "\n")


def read_run(folder):
    from dittfast.distill.config import load_config

    load_config(str(folder / "run.yaml"))


def read_methods(folder):
    from dittfast.pipelines.measure.variants import make_variants, read_variants

    make_variants(read_variants(folder / "methods.yaml")[0])


def read_preset(name):
    from dittfast.config import resolve

    return lambda folder: resolve(str(folder / name))


def read_prompts(name):
    from dittfast.pipelines.runs.prompts import read_prompts

    return lambda folder: read_prompts(folder / name)


def read_pictures(folder):
    from dittfast.distill.pictures import find_pictures, read_frames

    for picture in find_pictures(folder):
        read_frames(picture.path, 8, 8)


def plain(text):
    return json.loads(text)


GROUPS: dict[str, tuple[Callable, list[Reader]]] = {
    "attention adapter": (
        lambda folder: make_adapters(folder, "attention"),
        [
            Reader("adapter/adapter.json", read_adapter, data=plain),
            Reader("adapter/attention.safetensors", read_adapter),
        ],
    ),
    "lora adapter": (
        lambda folder: make_adapters(folder, "lora"),
        [
            Reader("adapter/adapter.json", read_adapter, data=plain),
            Reader("adapter/pytorch_lora_weights.safetensors", read_adapter),
        ],
    ),
    "checkpoint": (
        make_checkpoint,
        [
            Reader("step-00000003/progress.json", read_checkpoint, data=plain),
            Reader("step-00000003/trainable.safetensors", read_checkpoint),
            Reader("step-00000003/average.safetensors", read_checkpoint),
            Reader("step-00000003/optimizer.pt", read_checkpoint),
            Reader("step-00000003/rng-00000.pt", read_checkpoint),
        ],
    ),
    "checkpoint in parts": (
        make_parts,
        [
            Reader("model.index.json", read_parts, False, plain),
            Reader("1.safetensors", read_parts, False),
        ],
    ),
    "training set": (
        make_set,
        [
            Reader("data.json", read_set, data=plain),
            Reader("shard-00000.json", read_set, data=plain),
            Reader("shard-00000.safetensors", read_set),
            Reader("negative.safetensors", read_set),
        ],
    ),
    "drawings": (
        lambda folder: drawing(folder, True),
        [
            Reader("settings.json", drawing, data=plain),
            Reader("records/00000.json", drawing, data=plain),
            Reader("latents/00000.npy", drawing),
            Reader("images/00000_001.png", drawing),
        ],
    ),
    "search": (lambda folder: scores(folder, True), [Reader("state.json", scores, data=plain)]),
    "tuning": (
        lambda folder: tuning(folder, True),
        [
            Reader("records/settings.json", tuning, data=plain),
            Reader("records/recorded-00000.json", tuning, data=plain),
        ],
    ),
    "heads": (make_heads, [Reader("heads.json", read_heads, data=plain)]),
    "features": (
        make_features,
        [
            Reader("features.json", read_features, data=plain),
            Reader("model.safetensors", read_features),
        ],
    ),
    "latency": (make_latency, [Reader("latency.json", read_latency, data=plain)]),
    "sample": (make_sample, [Reader("sample.json", read_sample, False, plain)]),
    "texts": (
        make_texts,
        [
            Reader("run.yaml", read_run, False, yaml.safe_load, False),
            Reader("methods.yaml", read_methods, False, yaml.safe_load, False),
            Reader("preset.yaml", read_preset("preset.yaml"), False, yaml.safe_load, False),
            Reader("mixture.yaml", read_preset("mixture.yaml"), False, yaml.safe_load, False),
            Reader("tuned.yaml", read_preset("tuned.yaml"), False, yaml.safe_load, False),
            Reader("prompts.txt", read_prompts("prompts.txt"), False),
            Reader("prompts.json", read_prompts("prompts.json"), False, plain),
            Reader("metadata.jsonl", read_pictures, False, plain),
            Reader("a.png", read_pictures, False),
        ],
    ),
}


def attempt(reader, folder, expected, must_agree):
    """Read: it is refused in a sentence, or gives what was written."""
    try:
        found = reader.read(folder)
    except (ValueError, OSError) as error:
        text = str(error)
        assert "Traceback" not in text and len(text) < 2000
        if reader.says_file:
            assert str(folder) in text, text
        return "refused"
    except AssertionError as error:
        if "again" in str(error):
            return "refused"
        raise
    if must_agree:
        assert same(found, expected)
    return "read"


def walk(name, reader, folder, count):
    """Damage a file again and again; how often it was refused."""
    draw = random.Random(f"{name} {reader.file}")
    path = folder / reader.file
    whole = path.read_bytes()
    expected = reader.read(folder)
    outcomes = {"refused": 0, "read": 0}
    try:
        for turn in range(count):
            forged = reader.data is not None and turn % 2
            if forged:
                path.write_text(forge(draw, reader, path, whole.decode()), encoding="utf-8")
            else:
                path.write_bytes(damaged_bytes(draw, whole))
            outcome = attempt(reader, folder, expected, reader.sealed and not forged)
            outcomes[outcome] += 1
    finally:
        path.write_bytes(whole)
    assert same(reader.read(folder), expected)
    return outcomes


def forge(draw, reader, path, text):
    """Damaged data with checksums that agree."""
    data = reader.data(text)
    sums = data.pop(SUMS, None) if isinstance(data, dict) else None
    data = changed_data(draw, data)
    if sums is not None:
        names = [name for name in sums if name != "record"]
        with contextlib.suppress(RecursionError):
            data = with_sums(data, path.parent, names)
    try:
        return json.dumps(data)
    except RecursionError:
        return '{"a":' * 3000 + "1" + "}" * 3000


CASES = [(name, at) for name, (_, readers) in GROUPS.items() for at in range(len(readers))]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """What each group reads, made once."""
    folders = {}

    def get(name):
        if name not in folders:
            folders[name] = tmp_path_factory.mktemp("made")
            GROUPS[name][0](folders[name])
        return folders[name]

    return get


def assert_walks(name, at, made, count):
    reader = GROUPS[name][1][at]
    outcomes = walk(name, reader, made(name), count)
    # Damage goes unnoticed nowhere: where nothing is refused, nothing was looked at.
    assert outcomes["refused"] > count / (2 if reader.sealed else 20), outcomes


@pytest.mark.parametrize(("name", "at"), CASES)
def test_damaged_files_are_refused_or_read_the_same(name, at, made):
    assert_walks(name, at, made, FEW)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "at"), CASES)
def test_many_damaged_files(name, at, made):
    assert_walks(name, at, made, MANY)


@pytest.mark.parametrize("count", [FEW, pytest.param(MANY, marks=pytest.mark.slow)])
def test_reports_of_damaged_evaluations(evaluation, count):  # noqa: F811
    data = parse_json((evaluation / "fidelity.json").read_text())
    write_record(evaluation / "fidelity.json", data)
    for reader in (
        Reader("fidelity.json", read_report, data=plain),
        Reader("wide/images/00001.png", read_report, False),
        Reader("wide/mask.png", read_report, False),
    ):
        walk("report", reader, evaluation, count)


def test_the_walk_notices_a_reader_that_does_not_look(made):
    """The oracle itself: a reader without checks fails it."""
    folder = made("latency")
    careless = Reader("latency.json", lambda f: json.loads((f / "latency.json").read_text()))
    with pytest.raises((AssertionError, UnicodeDecodeError)):
        walk("latency", careless, folder, MANY)
    assert digest_of({"a": 1}) != digest_of({"a": 2})
