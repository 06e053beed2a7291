"""ARCHITECTURE.md against the tree: its file tables, its table of allowed imports, the backends."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

import dittfast

ROOT = Path(__file__).resolve().parent.parent
TEXT = (ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8")
FOLDERS = ("dittfast", "kernels", "pipelines", "distill", "samples", "configs")
# What `core` in the table stands for: dittfast without these.
NOT_CORE = ("kernels", "pipelines", "distill", "samples", "configs", "cli", "measure")
# What `runtime` stands for: dittfast.pipelines without these.
NOT_RUNTIME = ("runs", "measure", "headhunter", "tune", "ui")


def tracked_files(*suffixes: str) -> list[str]:
    """Files of the code folders, relative to the root; untracked ones too where git is absent."""
    listed = subprocess.run(
        ["git", "ls-files", *FOLDERS], cwd=ROOT, capture_output=True, text=True, check=False
    )
    names = listed.stdout.split("\n") if listed.returncode == 0 else []
    found = [name for name in names if name.endswith(suffixes) and (ROOT / name).exists()]
    every = (p for folder in FOLDERS for p in (ROOT / folder).rglob("*"))
    return found or [str(p.relative_to(ROOT)) for p in every if p.suffix in suffixes]


def section(title: str) -> str:
    """The text below ``## title``, up to the next heading of that level."""
    found = re.search(rf"^## {title}\n(.*?)(?=^## |\Z)", TEXT, re.MULTILINE | re.DOTALL)
    assert found, f"ARCHITECTURE.md has no section {title!r}"
    return found[1]


def rows(text: str) -> list[list[str]]:
    """The cells of every table row whose first cell is in backticks."""
    lines = [line.split("|")[1:-1] for line in text.splitlines() if line.startswith("| `")]
    return [[cell.strip() for cell in line] for line in lines]


def test_every_file_has_one_row_and_every_row_a_file():
    described: Counter[str] = Counter()
    for part in section("Files").split("\n### ")[1:]:
        folder = re.match(r"`(.+/)`", part)[1]
        for name, job in rows(part):
            described[folder + name.strip("`")] += 1
            assert job, f"{name} in {folder} has no job"
    twice = [name for name, count in described.items() if count > 1]
    assert not twice, f"more than one row: {twice}"
    files = set(tracked_files(".py", ".c"))
    assert not files - set(described), f"no row: {sorted(files - set(described))}"
    assert not set(described) - files, f"no file: {sorted(set(described) - files)}"


@dataclass(frozen=True)
class Import:
    """One imported module, and whether the statement stands inside a function."""

    file: str
    line: int
    module: str
    lazy: bool

    def __str__(self):
        where = "in a function" if self.lazy else "at the top"
        return f"{self.file}:{self.line} imports {self.module} {where}"


def module_name(path: str) -> str:
    parts = list(Path(path).with_suffix("").parts)
    if parts[-1] == "__init__":
        parts.pop()
    return ".".join(parts if parts[0] == "dittfast" else ["dittfast", *parts])


@cache
def modules() -> dict[str, str]:
    """Module name -> file."""
    return {module_name(path): path for path in tracked_files(".py")}


def _target(base: str, name: str) -> str:
    """What ``from base import name`` loads: a submodule, or the module that holds the name."""
    if base == "dittfast" and name in dittfast._EXPORTS:
        return dittfast._EXPORTS[name]
    return f"{base}.{name}" if f"{base}.{name}" in modules() else base


def _loaded(node: ast.AST, path: str) -> list[str]:
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if not isinstance(node, ast.ImportFrom):
        return []
    base = node.module or ""
    if node.level:
        package = module_name(path).split(".")
        above = node.level - Path(path).name.startswith("__init__.")
        base = ".".join([*package[: len(package) - above], *([base] if base else [])])
    return [_target(base, alias.name) for alias in node.names]


def _unrun(node: ast.AST) -> bool:
    """``if TYPE_CHECKING:`` is for type checkers and never runs."""
    return isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING")


def imports_of(path: str, source: str | None = None) -> list[Import]:
    """Every import statement of a file, at any depth."""
    found = []

    def visit(node: ast.AST, lazy: bool) -> None:
        for module in _loaded(node, path):
            found.append(Import(path, node.lineno, module, lazy))
        lazy = lazy or isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) or _unrun(node)
        for child in ast.iter_child_nodes(node):
            visit(child, lazy)

    visit(ast.parse(source or (ROOT / path).read_text(encoding="utf-8")), False)
    return found


@cache
def allowed_imports() -> dict[str, tuple[set[str], set[str]]]:
    """Folder -> (what its files may import at the top, what in functions) by ARCHITECTURE.md."""
    table = {}
    for folder, top, lazy in rows(section("Imports")):
        at_top, inside = (set(re.findall(r"`([^`]+)`", cell)) for cell in (top, lazy))
        table[folder.strip("`")] = at_top, at_top | inside
    return table


def folder_of(path: str) -> str:
    return max((f for f in allowed_imports() if path.startswith(f)), key=len)


def is_core(module: str) -> bool:
    parts = module.split(".")
    return parts[0] == "dittfast" and (len(parts) == 1 or parts[1] not in NOT_CORE)


def is_runtime(module: str) -> bool:
    parts = module.split(".")
    return parts[:2] == ["dittfast", "pipelines"] and parts[2:3] not in [[n] for n in NOT_RUNTIME]


def is_allowed(found: Import) -> bool:
    module = found.module
    top = module.split(".")[0]
    if top in sys.stdlib_module_names:
        return True
    folder = folder_of(found.file)
    allowed = allowed_imports()[folder][found.lazy]
    return (
        "anything" in allowed
        or ("core" in allowed and is_core(module))
        or ("runtime" in allowed and is_runtime(module))
        or any(module == name or module.startswith(name + ".") for name in allowed)
    )


def test_imports_keep_to_the_table():
    wrong = [str(i) for path in tracked_files(".py") for i in imports_of(path) if not is_allowed(i)]
    assert not wrong, "not allowed by ARCHITECTURE.md:\n" + "\n".join(wrong)


@pytest.mark.parametrize(
    "path, source, allowed",
    [
        ("dittfast/plan.py", "from .layout import Layout", True),
        ("dittfast/plan.py", "from .kernels import op", False),
        ("dittfast/attention.py", "def f():\n    from .kernels import op", True),
        ("dittfast/plan.py", "from dittfast import enable", False),
        ("dittfast/plan.py", "def f():\n    import dittfast.pipelines.seam", False),
        ("dittfast/plan.py", "import triton", False),
        ("dittfast/plan.py", "from .measure import timing", False),
        ("dittfast/measure/bench.py", "from ..attention import attend", True),
        ("dittfast/measure/bench.py", "def f():\n    import dittfast.pipelines.seam", False),
        ("dittfast/methods/base.py", "from ..plan import Plan", True),
        ("dittfast/methods/base.py", "from ..attention import attend", False),
        ("dittfast/methods/base.py", "from ..kernels.op import define_backend", False),
        ("dittfast/cli/__init__.py", "from dittfast.pipelines import seam", False),
        ("dittfast/cli/__init__.py", "def f():\n    from dittfast.pipelines import seam", True),
        ("kernels/op.py", "from dittfast.plan import PlanTensors", True),
        ("kernels/op.py", "from dittfast import attend", False),
        ("kernels/op.py", "import dittfast.methods", False),
        ("pipelines/seam.py", "from dittfast import attend", True),
        ("pipelines/seam.py", "from dittfast.kernels import op", False),
        ("pipelines/seam.py", "from dittfast import distill", False),
        ("pipelines/seam.py", "from .runs import call", False),
        ("pipelines/seam.py", "from dittfast.measure import timing", False),
        ("pipelines/runs/call.py", "from ..adapter import enable", True),
        ("pipelines/runs/call.py", "from ..measure import cost", False),
        ("pipelines/measure/cost.py", "from ..runs import call", True),
    ],
)
def test_the_table_says_what_design_says(path, source, allowed):
    assert [is_allowed(found) for found in imports_of(path, source)] == [allowed]


@cache
def graph(at_top_only: bool) -> dict[str, set[str]]:
    """Module -> modules of ours it imports."""
    edges = {}
    for name, path in modules().items():
        found = (i for i in imports_of(path) if not (at_top_only and i.lazy))
        edges[name] = {i.module for i in found if i.module in modules()} - {name}
    return edges


def circles(edges: dict[str, set[str]]) -> list[set[str]]:
    """Modules that reach each other, in groups."""
    reached = {module: closure(edges, module) for module in edges}
    together = [
        frozenset(b for b in reached[a] if a in reached[b]) | {a} for a in edges if a in reached[a]
    ]
    return [set(group) for group in dict.fromkeys(together)]


def closure(edges: dict[str, set[str]], module: str) -> set[str]:
    """What a module imports, and what that imports ...; the module itself only by a circle."""
    seen, left = set(), list(edges[module])
    while left:
        at = left.pop()
        if at not in seen:
            seen.add(at)
            left.extend(edges[at])
    return seen


def test_no_import_circles():
    """Neither at the top nor in functions nor for type checkers."""
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": {"a"}}) == [{"b", "c"}]
    assert circles(graph(at_top_only=False)) == []


def reachable(module: str) -> set[str]:
    """Modules of dittfast.kernels that a module needs, at the top or in functions."""
    edges, seen, left = graph(at_top_only=False), set(), [module]
    while left:
        at = left.pop()
        if at not in seen and at.startswith("dittfast.kernels"):
            seen.add(at)
            left.extend(edges[at])
    return seen


def defines_backend(path: str) -> bool:
    calls = [n for n in ast.walk(ast.parse((ROOT / path).read_text())) if isinstance(n, ast.Call)]
    return any(getattr(call.func, "id", None) == "define_backend" for call in calls)


def test_backends_are_independent_of_each_other_and_of_the_oracle():
    backends = [name for name, path in modules().items() if defines_backend(path)]
    assert "dittfast.kernels.reference_backend" in backends
    for name in backends:
        assert name.startswith("dittfast.kernels."), name
        needs = reachable(name) - {name}
        assert not needs & set(backends), f"{name} imports another backend"
        has_oracle = "dittfast.kernels.reference" in needs
        assert has_oracle == name.endswith(".reference_backend"), f"{name} and the oracle"
    assert reachable("dittfast.kernels.reference") == {"dittfast.kernels.reference"}
