"""The documents: their Python runs, their links lead somewhere, README and CI agree."""

from __future__ import annotations

import json
import operator
import os
import re
import subprocess
import sys
import types
from pathlib import Path

import pytest
import tiny
import torch

from dittfast.attention import BACKENDS
from dittfast.pipelines.families import FAMILIES

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = ("README.md", "ARCHITECTURE.md", "CONTRIBUTING.md")


def text_of(document: str) -> str:
    return (ROOT / document).read_text(encoding="utf-8")


def sections(document: str) -> dict[str, str]:
    """Heading of second level -> the Python below it, blocks one after the other."""
    found = {}
    for part in re.split(r"^## ", text_of(document), flags=re.MULTILINE)[1:]:
        blocks = re.findall(r"^```python\n(.*?)^```", part, re.MULTILINE | re.DOTALL)
        if blocks:
            found[part.splitlines()[0]] = "\n".join(blocks)
    return found


class Attention(torch.nn.Module):
    """Self-attention as diffusers has it: a module that hands itself to its processor."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.qkv = torch.nn.Linear(width, 3 * width)
        self.heads = heads
        self.processor = _processor

    def forward(self, hidden_states):
        return self.processor(self, hidden_states)


def _processor(attention, hidden_states):
    q, k, v = attention.qkv(hidden_states).unflatten(-1, (3, attention.heads, -1)).unbind(2)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    out = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    return out.transpose(1, 2).flatten(2)


class Block(torch.nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.attn = Attention(width, heads=2)

    def forward(self, hidden_states):
        return hidden_states + self.attn(hidden_states)


class TinyDiT(torch.nn.Module):
    """A made-up transformer: latents ``[B, C, H, W]`` in patches of 2, text in front."""

    def __init__(self):
        super().__init__()
        self.config = types.SimpleNamespace(patch_size=2)
        self.patch = torch.nn.Conv2d(4, 32, 2, stride=2)
        self.blocks = torch.nn.ModuleList([Block(32), Block(32)])

    def forward(self, hidden_states, encoder_hidden_states):
        image = self.patch(hidden_states).flatten(2).transpose(1, 2)
        x = torch.cat([encoder_hidden_states, image], 1)
        for block in self.blocks:
            x = block(x)
        return x


def tiny_dit():
    """A model and the arguments of its forward."""
    inputs = dict(
        hidden_states=torch.randn(2, 4, 18, 22), encoder_hidden_states=torch.randn(2, 5, 32)
    )
    return TinyDiT().eval().requires_grad_(False), inputs


@pytest.fixture
def restored():
    """Takes back what the examples register."""
    registries = FAMILIES, BACKENDS
    before = [dict(registry) for registry in registries]
    yield
    for registry, entries in zip(registries, before):
        registry.clear()
        registry.update(entries)


@pytest.fixture
def tiny_wan(monkeypatch):
    """The hub's Wan is a tiny one here, on the CPU, that makes short and small videos."""
    from diffusers import WanPipeline

    call = WanPipeline.__call__

    def short(self, prompt, **options):
        assert set(options) <= {"num_frames", "height", "width"}
        small = dict(num_frames=9, height=48, width=80, num_inference_steps=13)
        return call(self, prompt, **small, max_sequence_length=12, output_type="pt")

    monkeypatch.setattr(WanPipeline, "from_pretrained", lambda name: tiny.wan_pipeline())
    monkeypatch.setattr(WanPipeline, "to", lambda self, *where: self)
    monkeypatch.setattr(WanPipeline, "__call__", short)


EXAMPLES = [(d, title) for d in DOCUMENTS for title in sections(d)]


@pytest.mark.parametrize("document, title", EXAMPLES, ids=lambda x: x)
def test_examples_run(document, title, restored, tiny_wan, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)  # some save what they drew
    example = types.ModuleType("example")
    monkeypatch.setitem(sys.modules, "example", example)
    example.tiny_dit = tiny_dit
    exec(compile(sections(document)[title], f"{document}: {title}", "exec"), example.__dict__)


def test_every_way_to_contribute_has_an_example():
    wanted = {"Adding a method", "Adding a model family", "Adding a kernel", "Adding an objective"}
    assert wanted <= set(sections("CONTRIBUTING.md"))


@pytest.mark.parametrize(
    "document",
    (
        *DOCUMENTS,
        "samples/README.md",
        *sorted(str(p.relative_to(ROOT)) for p in (ROOT / "docs").glob("*.md")),
    ),
)
def test_links_lead_somewhere(document):
    links = re.findall(r"(?<!!)\[[^\]]*\]\(([^)#]+)[^)]*\)", text_of(document))
    files = [link for link in links if not link.startswith(("https:", "mailto:"))]
    folder = (ROOT / document).parent
    assert not [name for name in files if not (folder / name).exists()]


def test_ci_runs_the_readme_test_command():
    (command,) = re.findall(
        r"^pip install -e '.\[dev\]' && (.+)$", text_of("README.md"), re.MULTILINE
    )
    ci = text_of(".ci/run").splitlines()
    assert "pip install --quiet -c .ci/constraints.txt -e '.[dev]'" in ci
    assert ci[-1] == command


# A number in prose with its source behind it, unseen in the page: file, path in it, format.
# A path may be two of them, or one and a number, with an operator between.
NUMBER = re.compile(r"(-?[\d.,]*\d)<!-- (\S+\.json) (.+?) (\S+) -->")
OPERATORS = {"-": operator.sub, "*": operator.mul, "/": operator.truediv}


def value_at(data, path: str):
    left, sign, right = re.fullmatch(r"(.+?)(?: ([-*/]) (.+))?", path).groups()
    if sign is not None:
        return OPERATORS[sign](value_at(data, left), value_at(data, right))
    if path.isdigit():
        return int(path)
    for key in path.split("."):
        data = data[int(key)] if isinstance(data, list) else data[key]
    return data


def shown(value, form: str, number: str) -> str:
    """The value as prose has it: the words around it say "below", and the unit."""
    return format(value if number.startswith("-") else abs(value), form).rstrip("%")


def test_numbers_are_those_of_the_files_beside_them():
    documents = ["README.md", *(str(p.relative_to(ROOT)) for p in (ROOT / "docs").glob("*.md"))]
    found = [(d, *groups) for d in documents for groups in NUMBER.findall(text_of(d))]
    pages = ("performance", "distill", "head-guidance", "sample-model")
    assert {d for d, *_ in found} >= {"README.md", *(f"docs/{page}.md" for page in pages)}
    for document, number, file, path, form in found:
        value = value_at(json.loads((ROOT / file).read_text(encoding="utf-8")), path)
        said = f"{document}: {number}, but {file} {path} is {value}"
        assert number == shown(value, form, number), said


def test_the_backends_say_what_they_take():
    """``dittfast doctor --markdown docs/backends.md`` writes it again; not in the interpreter."""
    table = text_of("docs/backends.md")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    code = "from dittfast.cli.doctor import backends_markdown; print(backends_markdown(), end='')"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment | {"PYTHONPATH": str(ROOT)},
        capture_output=True, text=True, timeout=300, check=True,
    )  # fmt: skip
    assert done.stdout.splitlines() == table.splitlines()
    assert "| head dims | 16 to 256 in steps of 16 |" in table


def test_the_readme_fits_on_two_screens():
    assert len(text_of("README.md").splitlines()) <= 140
