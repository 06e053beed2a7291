"""Every block of code in the documents: Python runs, commands pass all checks before the work."""

from __future__ import annotations

import ast
import re
import shlex
import shutil
import sys
import types
from pathlib import Path
from typing import NamedTuple

import hub
import pytest
import torch
import yaml
from adapter_folder import make_adapter
from PIL import Image
from test_docs import DOCUMENTS, ROOT

from dittfast.cli import COMMANDS, main

FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
EVERY = (
    *DOCUMENTS,
    "samples/README.md",
    *sorted(str(p.relative_to(ROOT)) for p in (ROOT / "docs").glob("*.md")),
)
# Shells that a document may speak.
SHELLS = ("bash", "sh")


class Block(NamedTuple):
    document: str
    number: int
    language: str
    code: str

    def __str__(self):
        return f"{self.document}-{self.number}-{self.language}"


def blocks() -> list[Block]:
    return [
        Block(document, number, language, code)
        for document in EVERY
        for number, (language, code) in enumerate(
            FENCE.findall((ROOT / document).read_text(encoding="utf-8"))
        )
    ]


# README's and its like are run whole, section by section, in test_docs.py.
PYTHON = [b for b in blocks() if b.language == "python" and b.document not in DOCUMENTS]
COMMAND = [b for b in blocks() if b.language in SHELLS]


def test_every_block_is_of_a_language_that_is_checked():
    known = {"python", "yaml", *SHELLS}
    unknown = [str(b) for b in blocks() if b.language not in known]
    assert not unknown, f"no test reads these: {unknown}"


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A folder with what the documents' programs name, as the working directory."""
    for name in ("docs", "configs", "samples"):
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / "FOLDER").mkdir()
    (tmp_path / "FOLDER" / "model_index.json").write_text("{}")
    shutil.copy(ROOT / "configs/distill/clear_sample.yaml", tmp_path / "CONFIG.yaml")
    (tmp_path / "prompts.txt").write_text("a cat\na dog\na red car\n")
    (tmp_path / "mine.py").write_text("def score(images):\n    return images.mean((1, 2, 3))\n")
    (tmp_path / "hunt").mkdir()
    shutil.copy(ROOT / "docs/headhunter.json", tmp_path / "hunt" / "heads.json")
    Image.new("RGB", (80, 48), "teal").save(tmp_path / "first.png")
    hub.write_loras(tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


# What a block goes on from, where the text around it says so.
BEFORE = {
    "docs/distill.md": "import dittfast\nfrom diffusers import FluxPipeline\n"
    "pipe = FluxPipeline.from_pretrained('black-forest-labs/FLUX.1-dev')\n",
}
# Blocks that leave dittfast enabled when they call a pipeline: what they must then have run.
SPARSE = {"docs/recipes.md"}


@pytest.mark.parametrize("block", PYTHON, ids=str)
@pytest.mark.filterwarnings("ignore")
def test_python_runs(block, here, monkeypatch):
    ran = hub.stand_in(monkeypatch)
    if block.document == "docs/distill.md":
        make_adapter(here / "runs/clear_flux/adapter", "lora", **hub.FLUX)
    example = types.ModuleType("example")
    monkeypatch.setitem(sys.modules, "example", example)
    code = BEFORE.get(block.document, "") + block.code.replace('"cuda"', '"cpu"')
    exec(compile(code, str(block), "exec"), example.__dict__)
    if block.document in SPARSE:
        assert ran, "no pipeline was called while dittfast was enabled"
        assert not [str(said) for said in ran if said.did_not_run is not None]


@pytest.mark.parametrize("block", [b for b in blocks() if b.language == "yaml"], ids=str)
def test_yaml_is_a_configuration(block, here):
    from dittfast.distill.config import load_config

    (here / "block.yaml").write_text(block.code)
    read = load_config("block.yaml", []).to_dict()
    for section, values in yaml.safe_load(block.code).items():
        for name, value in values.items():
            assert read[section][name] in (value, [value])  # one name stands for a list of it


class Loaded(Exception):
    """Everything that is checked before a model is loaded was."""


def commands(code: str) -> list[list[str]]:
    """The commands of a shell block, as words; `&&` and line ends divide them."""
    lines = [re.sub(r"(^|\s)#.*", "", line) for line in code.replace("\\\n", " ").splitlines()]
    found = []
    for line in lines:
        words: list[str] = []
        for word in [*shlex.split(line), "&&"]:
            if word != "&&":
                words.append(word)
            elif words:
                found.append(words)
                words = []
    return found


def check(words: list[str], folder: Path, monkeypatch) -> None:
    """One command: what can be judged without the work that it does."""
    while re.fullmatch(r"[A-Z_]+=\S*", words[0]):
        words = words[1:]
    program, *rest = words
    if program == "dittfast":
        check_dittfast(rest, monkeypatch)
    elif program == "accelerate":
        check_accelerate(rest, monkeypatch)
    elif program in ("python", "python3") and rest[0].endswith(".py"):
        check_script(rest)
    elif program == "pip":
        check_pip(rest)
    elif program == "cd":
        folder.joinpath(rest[0]).mkdir(parents=True, exist_ok=True)
        monkeypatch.chdir(folder / rest[0])
    else:
        assert words in KNOWN, f"no check for {shlex.join(words)}"


KNOWN = [
    ["python3", "-m", "venv", ".venv"],
    [".", ".venv/bin/activate"],
    ["export", "OMP_WAIT_POLICY=passive"],
    ["pytest", "-n", "2"],
    ["mkdocs", "build"],
]
# These are parsed, and their methods resolved; what they do is quick to name and long to run.
PARSED = ("bench", "report", "parity", "doctor", "ui")


def check_dittfast(words: list[str], monkeypatch) -> None:
    from dittfast import cli
    from dittfast.pipelines.runs import sources

    command = words[0]
    assert command in COMMANDS
    if command in PARSED or words[:2] == ["evaluate", "fid"]:
        args, unknown = cli._parser(command).parse_known_args(words)
        assert not unknown
        resolve_methods(args)
        return
    if command == "distill":
        check_distill(words)
        return

    def load(*args, **kwargs):
        raise Loaded

    monkeypatch.setattr(sources, "load", load)
    # Documents are written for people with a GPU; nothing runs on it before the model is loaded.
    monkeypatch.setattr(sources, "choose_device", lambda *_: torch.device("cuda"))
    if command in ("plan", "methods", "estimate"):
        assert main(words) == 0
        return
    with pytest.raises(Loaded):
        main(words)


def check_distill(words: list[str]) -> None:
    from dittfast import cli
    from dittfast.distill.config import load_config

    args, rest = cli._parser("distill").parse_known_args(words)
    assert not [word for word in rest if word.startswith("-")]
    given = [word for word in [*args.words, *rest] if word != "prepare"]
    assert bool(given) != args.list
    if given:
        load_config(given[0], given[1:])


def resolve_methods(args) -> None:
    from dittfast.cli.options import parse_options
    from dittfast.config import resolve

    asked = getattr(args, "method", None) or []
    options = parse_options(getattr(args, "options", None) or [])
    for name in [asked] if isinstance(asked, str) else asked:
        own = {k.partition(".")[2]: v for k, v in options.items() if k.startswith(f"{name}.")}
        resolve(name, **own)


def check_accelerate(words: list[str], monkeypatch) -> None:
    assert words[0] == "launch"
    at = words.index("-m")
    assert words[at + 1] == "dittfast.distill"
    if "--config_file" in words:
        path = words[words.index("--config_file") + 1]
        assert yaml.safe_load(Path(path).read_text())["distributed_type"]
    check_dittfast(["distill", *words[at + 2 :]], monkeypatch)


def check_script(words: list[str]) -> None:
    """A script of samples/: it is there and has the options, by what its parser is given."""
    tree = ast.parse((ROOT / words[0]).read_text(encoding="utf-8"))
    known = {node.value for node in ast.walk(tree) if isinstance(node, ast.Constant)}
    named = [word for word in words[1:] if word.startswith("--")]
    commands = any(getattr(node, "attr", "") == "add_parser" for node in ast.walk(tree))
    for word in [words[1], *named] if commands else named:
        assert word in known, f"{words[0]} knows no {word}"


def check_pip(words: list[str]) -> None:
    from setuptools.config.setupcfg import read_configuration

    extras = read_configuration(str(ROOT / "setup.cfg"))["options"]["extras_require"]
    assert words[0] == "install"
    for word in words[1:]:
        found = re.fullmatch(r"(?:\.|dittfast)(?:\[([\w,]+)\])?", word)
        assert found or word == "-e", f"installs {word}"
        if found and found[1]:
            assert set(found[1].split(",")) <= set(extras)


@pytest.mark.parametrize("block", COMMAND, ids=str)
def test_commands_pass_their_checks(block, here, monkeypatch, capsys):
    for words in commands(block.code):
        check(words, here, monkeypatch)


@pytest.mark.parametrize(
    "line",
    [
        "dittfast generate 'a cat' --metod local -o x.png",
        "dittfast generate 'a cat' --method lokal -o x.png",
        "dittfast generate 'a cat' --method local --set windw=3 -o x.png",
        "dittfast bench attention --method local --set local.windw=3",
        "dittfast draw",
        "python samples/train_flux.py --dta x",
        "python samples/no_such.py",
        "pip install 'dittfast[uii]'",
        "curl x",
    ],
)
def test_wrong_commands_do_not_pass(line, here, monkeypatch):
    with pytest.raises((AssertionError, SystemExit, ValueError, OSError, pytest.fail.Exception)):
        check(commands(line)[0], here, monkeypatch)


PICTURE = re.compile(r"!\[([^\]]*)\]\(([^)]+)\)|<img\b[^>]*>")


@pytest.mark.parametrize("document", EVERY)
def test_no_picture_without_words(document):
    text = (ROOT / document).read_text(encoding="utf-8")
    for found in PICTURE.finditer(FENCE.sub("", text)):
        words = found[1]
        if words is None:
            words = (re.search(r'\balt="([^"]*)"', found[0]) or ["", ""])[1]
        assert len(words.split()) >= 3, f"{document}: {found[0]}: say what it shows"
