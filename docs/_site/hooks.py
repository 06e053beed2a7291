"""MkDocs hooks: pages that are made from the repository, and links that hold there and here.

A Markdown file links as it stands in the repository. On the site those links lead to the pages
made of README and its like, or to a copy of the file.
"""

from __future__ import annotations

import ast
import configparser
import posixpath
import re
import sys
import tempfile
from pathlib import Path

from mkdocs.plugins import event_priority
from mkdocs.structure.files import File

sys.path.insert(0, str(Path(__file__).parent))
from measured import measured_page

from findings import findings_page

ROOT = Path(__file__).resolve().parents[2]
# File of the repository -> page of the site.
PAGES = {
    "README.md": "index.md",
    "ARCHITECTURE.md": "architecture.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "SECURITY.md": "security.md",
    "samples/README.md": "samples.md",
}
# Besides the names of dittfast/__init__.py.
CONFIG = ("dittfast.config.resolve", "dittfast.config.presets", "dittfast.testing")
_LINK = re.compile(r"(!?\[[^\]]*\]\()([^)\s#]+)(#[^)\s]*)?\)")
_ROLE = re.compile(r":(?:func|class|meth|mod|attr|data|exc):<code>~?([^<]+)</code>")
_source_tree = tempfile.TemporaryDirectory()


@event_priority(100)  # before mkdocstrings reads its own
def on_config(config):
    """Show mkdocstrings the package as it is installed: one tree, nothing imported."""
    tree = Path(_source_tree.name) / "dittfast"
    if not tree.exists():
        tree.mkdir()
        for path in (ROOT / "dittfast").iterdir():
            if not path.name.endswith((".pyi", "__pycache__")):
                (tree / path.name).symlink_to(path)
        setup = configparser.ConfigParser()
        setup.read(ROOT / "setup.cfg", encoding="utf-8")
        for line in setup["options"]["package_dir"].split("\n"):
            package, _, folder = (part.strip() for part in line.partition("="))
            if package.startswith("dittfast."):
                (tree / package.split(".")[1]).symlink_to(ROOT / folder)
    config.plugins["mkdocstrings"].config.handlers["python"]["paths"] = [_source_tree.name]
    return config


def on_files(files, config):
    """Add the pages that are no files of docs/, and copies of what is linked and is no page."""
    made = {page: (ROOT / name).read_text(encoding="utf-8") for name, page in PAGES.items()}
    made |= reference_pages()
    made["findings.md"] = findings_page(ROOT / "findings")
    made["measured.md"] = measured_page(ROOT / "docs")
    for page, text in made.items():
        files.append(File.generated(config, page, content=text))
    linked = set()
    for file in files.documentation_pages():
        here = repository_path(file.src_uri)
        for _, target, _ in _LINK.findall(file.content_string):
            path = resolved(here, target)
            if path is not None and site_path(path).startswith("files/"):
                linked.add(path)
    linked |= {str(p.relative_to(ROOT)) for p in (ROOT / "findings").glob("*.sh")}
    for path in sorted(linked):
        files.append(File.generated(config, site_path(path), abs_src_path=str(ROOT / path)))
    return files


def on_page_markdown(markdown, page, config, files):
    """Point links at the site's own pages."""
    here = repository_path(page.file.src_uri)
    start = posixpath.dirname(page.file.src_uri) or "."

    def moved(match):
        before, target, anchor = match[1], match[2], match[3] or ""
        path = resolved(here, target)
        if path is None:
            return match[0]
        return f"{before}{posixpath.relpath(site_path(path), start)}{anchor})"

    return _LINK.sub(moved, markdown)


def on_page_content(html, page, config, files):
    """Docstrings name code as Sphinx does; leave the name."""
    return _ROLE.sub(lambda m: f"<code>{m[1].rsplit('.', 1)[-1]}</code>", html)


def repository_path(page: str) -> str:
    """Where a page of the site comes from."""
    return next((name for name, made in PAGES.items() if made == page), f"docs/{page}")


def resolved(here: str, target: str) -> str | None:
    """The file or folder of the repository that a link means; None if it means none."""
    if re.match(r"[a-z]+:", target):
        return None
    path = posixpath.normpath(posixpath.join(posixpath.dirname(here), target))
    return path if (ROOT / path).exists() and not path.startswith("..") else None


def site_path(path: str) -> str:
    """Where the site has a file of the repository."""
    if path in PAGES:
        return PAGES[path]
    if path == "findings":
        return "findings.md"
    return path.removeprefix("docs/") if path.startswith("docs/") else f"files/{path}"


def reference_pages() -> dict[str, str]:
    """Pages of directives for mkdocstrings, from the public names of the package."""
    text = (ROOT / "dittfast" / "__init__.py").read_text(encoding="utf-8")
    exports = next(
        ast.literal_eval(node.value)
        for node in ast.parse(text).body
        if isinstance(node, ast.Assign) and node.targets[0].id == "_EXPORTS"
    )
    methods = [
        f"dittfast.methods.{path.stem}.{name}"
        for path in sorted((ROOT / "dittfast" / "methods").glob("*.py"))
        for name in re.findall(r"^class (\w+)\(\w*Method\)", path.read_text("utf-8"), re.MULTILINE)
    ]
    pages = {
        "dittfast": ("dittfast", [f"{module}.{name}" for name, module in exports.items()]),
        "methods": ("Methods", ["dittfast.methods.base.Method", *methods]),
        "functional": ("Functions of q, k and v", ["dittfast.functional"]),
        "config": ("Configuration and tests", list(CONFIG)),
    }
    return {
        f"reference/{name}.md": f"# {title}\n\n" + "\n\n".join(f"::: {path}" for path in paths)
        for name, (title, paths) in pages.items()
    }
