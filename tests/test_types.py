"""What type checkers see: the stub of the public names, and wrong calls that they find."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import dittfast

ROOT = Path(__file__).resolve().parent.parent


def test_the_stub_names_what_is_resolved_on_first_use():
    """``__init__.pyi`` is for type checkers what ``_EXPORTS`` is for Python."""
    tree = ast.parse((ROOT / "dittfast" / "__init__.pyi").read_text(encoding="utf-8"))
    stated, modules, typed = {}, set(), set()
    for node in tree.body:
        if isinstance(node, ast.AnnAssign):
            typed.add(node.target.id)
        elif node.module == "dittfast":
            modules |= {alias.asname for alias in node.names}
        else:
            # `as` with the same name says that a stub hands the name on.
            stated |= {alias.asname: node.module for alias in node.names}
    assert stated == dittfast._EXPORTS
    assert modules == set(dittfast._MODULES)
    assert typed == {"__version__", "__all__"}


RIGHT = """
import torch
import dittfast
from dittfast import Layout, attend, methods
from dittfast.kernels.op import define_backend
from dittfast.pipelines.families import FAMILIES

layout = Layout.image(4, 4)
with dittfast.enable(torch.nn.Module(), "local", window=3) as enabled:
    density: float | None = enabled.describe().density
q = torch.randn(1, 1, 16, 8)
out: torch.Tensor = attend(q, q, q, methods.Local(window=2).plan(layout))
both: tuple[torch.Tensor, torch.Tensor] = attend(
    q, q, q, dittfast.Plan.full(16), return_lse=True
)
plain: torch.Tensor = dittfast.functional.local_attention(q, q, q, layout, window=2)
out, lse = dittfast.functional.radial_attention(q, q, q, layout, return_lse=True)


class Pipe:
    @property
    def components(self) -> dict[str, object]:
        return {}


dittfast.guide(Pipe(), heads=[(0, 0)])
"""
WRONG = """
import dittfast
from dittfast import Layout, Plan, attend

dittfast.nonexistent(1)
Layout.image("four", 4)
attend(1, 2, 3, "no plan")
Plan.full("sixteen")
dittfast.functional.local_attention(1, 2, 3, 4)
"""


@pytest.fixture
def installed(tmp_path) -> Path:
    """The code folders inside dittfast/, as a strict editable install has them."""
    package = tmp_path / "site" / "dittfast"
    package.mkdir(parents=True)
    for path in (ROOT / "dittfast").iterdir():
        (package / path.name).symlink_to(path)
    for name in ("kernels", "pipelines", "distill", "configs", "samples"):
        (package / name).symlink_to(ROOT / name)
    return package.parent


# The libraries take minutes to read and are not what is tested.
CONFIG = """
[mypy]
ignore_missing_imports = True
follow_imports = silent
[mypy-torch.*,diffusers.*,transformers.*,numpy.*,PIL.*,accelerate.*,tqdm.*,safetensors.*]
follow_imports = skip
"""


def errors(source: str, installed: Path, tmp_path: Path) -> list[str]:
    file, config = tmp_path / "use.py", tmp_path / "mypy.ini"
    file.write_text(source)
    config.write_text(CONFIG)
    options = ["--config-file", str(config), "--cache-dir", str(tmp_path / "cache")]
    done = subprocess.run(
        [sys.executable, "-m", "mypy", *options, "--no-error-summary", str(file)],
        env={**os.environ, "MYPYPATH": str(installed)}, cwd=tmp_path,
        capture_output=True, text=True, timeout=600, check=False,
    )  # fmt: skip
    assert not done.stderr, done.stderr
    return done.stdout.splitlines()


@pytest.mark.slow
def test_mypy_finds_wrong_calls_and_only_those(installed, tmp_path):
    pytest.importorskip("mypy")
    assert errors(RIGHT, installed, tmp_path) == []
    found = errors(WRONG, installed, tmp_path)
    assert 'no attribute "nonexistent"' in found[0]
    lines = WRONG.splitlines()
    for line in range(5, 10):
        assert any(f"use.py:{line}:" in text and "error" in text for text in found), lines[line - 1]


@pytest.mark.slow
def test_pyright_finds_wrong_calls_and_only_those(installed, tmp_path):
    pytest.importorskip("pyright")
    for name, source in (("right.py", RIGHT), ("wrong.py", WRONG)):
        (tmp_path / name).write_text(source)
    config = {"include": ["right.py", "wrong.py"], "extraPaths": [str(installed)]}
    (tmp_path / "pyrightconfig.json").write_text(json.dumps(config))
    done = subprocess.run(
        [sys.executable, "-m", "pyright", "--outputjson", "--pythonpath", sys.executable],
        cwd=tmp_path, capture_output=True, text=True, timeout=600, check=False,
    )  # fmt: skip
    reported = json.loads(done.stdout)["generalDiagnostics"]
    at = {(Path(x["file"]).name, x["range"]["start"]["line"]) for x in reported}
    lines = {n for n, line in enumerate(WRONG.splitlines()) if line and "import" not in line}
    # Other errors are about libraries that are not installed, and none in the right file.
    assert at == {("wrong.py", n) for n in lines}, reported


def functions_of(module: str, name: str) -> list[tuple[str, ast.FunctionDef]]:
    """The public functions that ``name`` in ``module`` stands for, a class's methods among them."""
    file = ROOT / Path(*module.split(".")[1:]).with_suffix(".py")
    file = file if file.exists() else ROOT / Path(*module.split(".")).with_suffix(".py")
    (node,) = [
        n
        for n in ast.parse(file.read_text(encoding="utf-8")).body
        if getattr(n, "name", None) == name and not ast.unparse(n).startswith("@overload")
    ]
    if isinstance(node, ast.FunctionDef):
        return [(name, node)]
    functions = [n for n in node.body if isinstance(n, ast.FunctionDef)]
    special = ("__init__", "__call__", "__enter__", "__exit__")
    return [(f"{name}.{f.name}", f) for f in functions if f.name[0] != "_" or f.name in special]


def untyped(function: ast.FunctionDef, is_method: bool) -> list[str]:
    """The parameters of a function without a type, and "return" where what it gives has none."""
    static = any(ast.unparse(d) == "staticmethod" for d in function.decorator_list)
    given = function.args
    taken = [*given.posonlyargs, *given.args][is_method and not static :]
    taken += [*given.kwonlyargs, *(x for x in (given.vararg, given.kwarg) if x is not None)]
    names = [x.arg for x in taken if x.annotation is None]
    return names + ["return"] * (function.returns is None and function.name != "__init__")


def test_public_names_are_fully_typed():
    names = {name: module for name, module in dittfast._EXPORTS.items() if name != "attend"}
    names |= dict.fromkeys(
        (n for n in dittfast.functional.__all__ if n != "soft_pag"), "dittfast.functional"
    )
    names |= {cls.__name__: cls.__module__ for cls in dittfast.methods.METHODS.values()}
    names |= {"Method": "dittfast.methods.base", "Family": "dittfast.pipelines.families.family"}
    names |= {
        "Enabled": "dittfast.pipelines.adapter",
        "Guided": "dittfast.pipelines.guidance.plain",
    }
    assert untyped(ast.parse("def f(a, *b: int, c, **d): ...").body[0], False) == [
        "a", "c", "d", "return",
    ]  # fmt: skip
    for name, module in names.items():
        for label, function in functions_of(module, name):
            assert not untyped(function, "." in label), label
