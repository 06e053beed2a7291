"""The docs site: it builds without a warning, links hold, and nothing is loaded from elsewhere."""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
import yaml

import dittfast

ROOT = Path(__file__).resolve().parent.parent
SITE = ROOT / "docs" / "_site"


def module(name: str):
    spec = importlib.util.spec_from_file_location(name, SITE / f"{name}.py")
    found = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found)
    return found


def pages_of(nav) -> list[str]:
    if isinstance(nav, str):
        return [nav]
    inner = nav.values() if isinstance(nav, dict) else nav
    return [page for part in inner for page in pages_of(part)]


def test_every_page_of_docs_is_in_the_navigation():
    configured = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))
    pages = pages_of(configured["nav"])
    assert len(set(pages)) == len(pages)
    missing = {p.name for p in (ROOT / "docs").glob("*.md")} - set(pages)
    assert not missing, f"add to nav in mkdocs.yml: {sorted(missing)}"
    assert configured["strict"] and configured["theme"]["font"] is False


def test_findings_come_from_the_headers(tmp_path):
    findings = module("findings")
    assert "None is written down yet" in findings.findings_page(tmp_path / "nowhere")
    (tmp_path / "b.sh").write_text(
        "#!/usr/bin/env bash\n# Two is three.\n#\n# somelib 1.2\n#\n# Adding 1 < 2\n# gives 3.\n"
        "set -e\n# no part of it\n"
    )
    (tmp_path / "a.sh").write_text("# First\n# seen with x 1\n\necho\n")
    page = findings.findings_page(tmp_path)
    assert page.index("## First") < page.index("## Two is three\n\nsomelib 1.2\n\n")
    assert "\n\nAdding 1 &lt; 2 gives 3.\n\nShown by [b.sh](files/findings/b.sh)." in page
    assert "no part of it" not in page
    (tmp_path / "c.sh").write_text("#!/bin/sh\necho hello\n")
    with pytest.raises(ValueError, match=r"c\.sh must begin with a comment block"):
        findings.findings_page(tmp_path)


def test_every_finding_has_a_header():
    for path in (ROOT / "findings").glob("*.sh"):
        title, paragraphs = module("findings").header(path)
        assert title and paragraphs


def test_measured_numbers_are_those_of_the_files():
    page = module("measured").measured_page(ROOT / "docs")
    attention = json.loads((ROOT / "docs/attention-cpu.json").read_text(encoding="utf-8"))
    for row in attention["rows"]:
        middle = row["useful_efficiency"]["p50"]
        assert f"| {row['method']['name']} | {row['tokens']:,} | {row['density']:.3f} | " in page
        assert f"| {middle:.2f} (" in page
    fidelity = json.loads((ROOT / "docs/methods-sample.json").read_text(encoding="utf-8"))
    for method in fidelity["methods"]:
        psnr = method["pooled"]["psnr_db"]
        assert f"| `{method['label']}` | {method['density']:.3f} | {psnr['mean']:.2f} (" in page
    tasks = module("measured").TASKS
    data = {p.name: json.loads(p.read_text("utf-8")) for p in (ROOT / "docs").glob("*.json")}
    known = {name for name, x in data.items() if isinstance(x, dict) and x.get("task") in tasks}
    assert set(re.findall(r"\]\((\S+\.json)\)", page)) == known and len(known) >= 6
    assert page.count('<svg viewBox="0 0') == page.count('role="img" aria-label="') >= 3


class Page(HTMLParser):
    """What a page links to and loads, its pictures, its places and its text."""

    LOADS = frozenset(
        ("stylesheet", "icon", "preload", "prefetch", "preconnect", "dns-prefetch", "modulepreload")
    )

    def __init__(self, text: str):
        super().__init__()
        self.links, self.loads, self.pictures, self.ids, self.text = [], [], [], set(), ""
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        found = dict(attributes)
        self.ids |= {found[name] for name in ("id", "name") if found.get(name)}
        if tag == "a" and found.get("href"):
            self.links.append(found["href"])
        if found.get("src"):
            self.loads.append(found["src"])
        if tag == "link" and self.LOADS & set((found.get("rel") or "").split()):
            self.loads.append(found["href"])
        if tag == "img":
            self.pictures.append(found.get("alt") or "")
        if tag == "svg" and found.get("role") == "img":
            self.pictures.append(found.get("aria-label") or "")

    def handle_data(self, data):
        self.text += data


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> dict[Path, Page]:
    """Every page of the built site."""
    for name in ("mkdocs", "material", "mkdocstrings"):
        pytest.importorskip(name, reason="builds the site: pip install dittfast[docs]")
    out = tmp_path_factory.mktemp("site")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "-q", "-d", str(out)],
        cwd=ROOT, capture_output=True, text=True, timeout=600, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return {path: Page(path.read_text(encoding="utf-8")) for path in out.rglob("*.html")}


def outside(address: str) -> bool:
    return bool(urlsplit(address).netloc)


def test_the_site_loads_nothing_from_elsewhere(site):
    for path, page in site.items():
        assert not [x for x in page.loads if outside(x)], path.name
    (folder,) = {path.parent for path in site if path.name == "index.html"}
    for style in folder.rglob("*.css"):
        text = style.read_text(encoding="utf-8")
        assert not re.findall(r"(?:url\(|@import\s+)[\"']?(?:https?:)?//[^\"')]+", text), style.name


def test_the_links_of_the_site_lead_somewhere(site):
    wrong = []
    for path, page in site.items():
        for link in [*page.links, *page.loads]:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc or path.name == "404.html":
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            if not target.exists():
                wrong.append(f"{path.name}: {link}")
            elif target in site and parts.fragment:
                place = unquote(parts.fragment)
                wrong += [] if place in site[target].ids else [f"{path.name}: no place {link}"]
    assert not wrong


def test_every_picture_of_the_site_has_words(site):
    assert sum(len(page.pictures) for page in site.values()) > 10
    for path, page in site.items():
        assert all(len(words.split()) >= 3 for words in page.pictures), path.name


def test_the_site_has_what_it_should(site):
    by_name = {path.name: page for path, page in site.items() if path.parent.name != "reference"}
    home = by_name["index.html"]
    assert any(src.endswith("panda-compared.webp") for src in home.loads)
    assert "pip install -e . && dittfast generate" in home.text
    (reference,) = (p for path, p in site.items() if path.match("reference/dittfast.html"))
    for name, where in dittfast._EXPORTS.items():
        assert f"{where}.{name}" in reference.ids
    assert ":func:" not in reference.text and ":class:" not in reference.text
    (methods,) = (p for path, p in site.items() if path.match("reference/methods.html"))
    for cls in dittfast.methods.METHODS.values():
        assert f"{cls.__module__}.{cls.__name__}" in methods.ids
