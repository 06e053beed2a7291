"""Fresh processes: what an import loads, standing in the repository root, and the built wheel."""

from __future__ import annotations

import email.parser
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

import dittfast

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("dittfast", "kernels", "pipelines", "distill", "samples", "configs")
# Nobody who only plans or attends should wait for these.
HEAVY = ("diffusers", "transformers", "triton", "matplotlib", "torchvision", "PIL", "yaml")


def python(code: str, *flags: str, cwd: Path = ROOT, path: tuple[Path, ...] = (ROOT,)) -> str:
    """What ``python -c code`` prints, run in ``cwd`` with ``path`` in PYTHONPATH."""
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONSAFEPATH")}
    environment["PYTHONPATH"] = os.pathsep.join(map(str, path))
    done = subprocess.run(
        [sys.executable, *flags, "-c", code],
        cwd=cwd, env=environment, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.strip()


# A subclass of a class of diffusers, and three that make pictures.
NEED_MORE = {"HeadGuider", "hunt", "generate_high_resolution", "sample"}
IMPORT = """
import json, socket, sys, time, torch
def refuse(*args, **kwargs):
    raise AssertionError("the import asked for the network or for a GPU")
socket.socket.connect = socket.socket.connect_ex = socket.getaddrinfo = refuse
torch.cuda.is_available = torch.cuda.device_count = torch.cuda.init = refuse
sys.dont_write_bytecode = False  # a test run may ask for it
before, started = set(sys.modules), time.thread_time()
import dittfast
for name in set(dittfast.__all__) - {skipped}:
    getattr(dittfast, name)
seconds = time.thread_time() - started
loaded = sorted({module.split(".")[0] for module in set(sys.modules) - before})
print(json.dumps([dittfast.__file__, torch.cuda.is_initialized(), loaded, seconds]))
""".replace("{skipped}", repr(NEED_MORE))


def test_importing_is_light_quick_and_quiet():
    """All public names: nothing heavy, no probing, under 0.3 s of processor time beyond torch.

    Processor time, because other work on the machine does not count; the best of three,
    of which the first may compile the sources.
    """
    for _ in range(3):
        file, cuda_initialized, loaded, seconds = json.loads(python(IMPORT))
        assert file == str(ROOT / "dittfast" / "__init__.py")
        assert not cuda_initialized
        assert not set(HEAVY) & set(loaded)
        if seconds < 0.3:
            return
    pytest.fail(f"importing every public name took {seconds:.2f} s of processor time")


HELP = """
import sys, time
from dittfast.cli import main
try:
    main({arguments})
except SystemExit as stop:
    assert not stop.code
print("|", time.process_time(), *{{module.split(".")[0] for module in sys.modules}})
"""


@pytest.mark.parametrize("arguments", [["--help"], ["generate", "--help"]], ids=" ".join)
def test_help_is_quick(arguments):
    """Under 1 s, and without torch: that alone takes longer."""
    printed, _, facts = python(HELP.format(arguments=arguments)).rpartition("|")
    seconds, *loaded = facts.split()
    assert "usage: dittfast" in printed
    assert not {"torch", "numpy", *HEAVY} & set(loaded)
    assert float(seconds) < 1


def test_listing_published_models_and_refusing_sizes_needs_no_diffusers():
    python(
        "import sys\n"
        "from dittfast.cli import main\n"
        "assert main(['estimate']) == 0\n"
        "assert main(['estimate', 'wan2.1-14b', '--height', '100']) == 2\n"
        "assert not {'diffusers', 'transformers', 'peft'} & set(sys.modules)"
    )


# What diffusers and transformers do to find Hugging Face's `kernels`, and what they make of it.
PROBE = """
import sys
try:
    import kernels
except ModuleNotFoundError:
    kernels = None
print(getattr(kernels, "__file__", None), hasattr(kernels, "get_kernel"))
"""


@pytest.mark.parametrize("path", [(), (ROOT,)], ids=["installed", "root on the path"])
def test_the_root_does_not_hand_out_our_kernels(path):
    if _has_module("kernels"):
        pytest.skip("Hugging Face's kernels is installed here")
    assert python(PROBE, path=path) == "None False"


def _has_module(name: str) -> bool:
    found = python(
        f"import importlib.util as u; print(u.find_spec({name!r}))", cwd=Path("/"), path=()
    )
    return found != "None"


def test_the_root_gives_way_to_the_real_kernels(tmp_path):
    real = tmp_path / "kernels"
    real.mkdir()
    (real / "__init__.py").write_text("from .part import get_kernel\n")
    (real / "part.py").write_text("def get_kernel(): ...\n")
    assert python(PROBE, path=(tmp_path,)) == f"{real / '__init__.py'} True"
    assert python(PROBE, path=(ROOT, tmp_path)) == f"{real / '__init__.py'} True"
    imported = "import kernels.part; print(kernels.part.__file__)"
    assert python(imported, path=(tmp_path,)) == str(real / "part.py")


@pytest.mark.slow
def test_diffusers_works_from_the_root():
    python(
        "from diffusers import FluxPipeline\n"
        "from diffusers.utils import is_kernels_available\n"
        "import importlib.metadata as m\n"
        "installed = any(d.name == 'kernels' for d in m.distributions())\n"
        "assert is_kernels_available() == installed",
        path=(),
    )


# Packages are imported, modules in them only found: that needs no torch.
PARTS = """
import importlib, importlib.util
for name in "kernels", "pipelines", "distill", "configs", "samples", "cli":
    print(importlib.import_module("dittfast." + name).__file__)
for name in "kernels.reference_backend", "pipelines.adapter":
    print(importlib.util.find_spec("dittfast." + name).origin)
"""


@pytest.mark.parametrize("where", ["root", "elsewhere"])
def test_parts_import_from_a_checkout(where, tmp_path):
    cwd, path = (ROOT, ()) if where == "root" else (tmp_path, (ROOT,))
    files = python(PARTS, cwd=cwd, path=path).splitlines()
    assert files[0] == str(ROOT / "kernels" / "__init__.py")
    assert all(Path(file).is_relative_to(ROOT) for file in files)


def tracked() -> list[str]:
    """The files of the code folders, without what git ignores."""
    listed = subprocess.run(
        ["git", "ls-files", *FOLDERS], cwd=ROOT, capture_output=True, text=True, check=False
    )
    if listed.returncode == 0 and listed.stdout:
        return [name for name in listed.stdout.splitlines() if (ROOT / name).is_file()]
    files = (p for folder in FOLDERS for p in (ROOT / folder).rglob("*") if p.is_file())
    return [str(p.relative_to(ROOT)) for p in files if "__pycache__" not in p.parts]


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    """A folder with the sdist of the tracked files, and the wheel built from what is in it."""
    pytest.importorskip("setuptools", minversion="77", reason="builds the wheel")
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("dist")
    for name in [*tracked(), "setup.cfg", "pyproject.toml", "README.md", "LICENSE"]:
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / name, source / name)
    build = f"from setuptools import build_meta; build_meta.build_{{}}({str(out)!r})"
    python(build.format("sdist"), cwd=source, path=())
    (file,) = out.glob("*.tar.gz")
    with tarfile.open(file) as archive:
        archive.extractall(out / "sdist", filter="data")
    (unpacked,) = (out / "sdist").iterdir()
    python(build.format("wheel"), cwd=unpacked, path=())
    return out


@pytest.fixture(scope="module")
def wheel(built) -> tuple[Path, list[str]]:
    """(folder with the unpacked wheel, names in it)."""
    (file,) = built.glob("*.whl")
    with zipfile.ZipFile(file) as archive:
        archive.extractall(built / "unpacked")
        return built / "unpacked", archive.namelist()


def test_wheel_holds_the_package_and_nothing_else(wheel):
    inside = {name for name in wheel[1] if ".dist-info/" not in name}
    assert {name.split("/")[0] for name in inside} == {"dittfast"}
    wanted = {
        name if name.startswith("dittfast/") else f"dittfast/{name}"
        for name in tracked()
        if name.endswith((".py", ".pyi", ".yaml", "py.typed", "native.c"))
        or name.startswith(("samples/models/", "configs/evaluations/"))
    }
    assert {"dittfast/py.typed", "dittfast/__init__.pyi"} <= wanted
    assert inside == wanted


def test_wheel_has_its_licences_and_command(wheel):
    folder, names = wheel
    notices = [name for name in tracked() if name.endswith("/NOTICE")]
    assert len(notices) >= 3
    for name in ["LICENSE", *notices]:
        assert any(found.endswith(f"dist-info/licenses/{name}") for found in names), name
    (commands,) = folder.glob("*.dist-info/entry_points.txt")
    assert "dittfast = dittfast.cli:main" in commands.read_text()


def test_wheel_is_pure_python(built, wheel):
    (file,) = built.glob("*.whl")
    assert file.name == f"dittfast-{dittfast.__version__}-py3-none-any.whl"
    (about,) = wheel[0].glob("*.dist-info/WHEEL")
    assert "Root-Is-Purelib: true" in about.read_text()
    assert not [name for name in wheel[1] if name.endswith((".so", ".o", ".pyc"))]


def test_metadata(wheel):
    """What a package index shows, and what it makes of the description."""
    (about,) = wheel[0].glob("*.dist-info/METADATA")
    found = email.parser.Parser().parsestr(about.read_text(encoding="utf-8"))
    assert found["Name"] == "dittfast" and found["Version"] == dittfast.__version__
    assert found["Requires-Python"] == ">=3.10"
    assert (found["License-Expression"] or found["License"]) == "Apache-2.0"
    assert found.get_payload().startswith("# dittfast")
    extras = set(found.get_all("Provides-Extra"))
    assert {"dev", "distill", "docs", "report", "samples", "ui"} <= extras
    # Unless somebody asks for an extra, none of what only extras need is installed.
    always = [x for x in found.get_all("Requires-Dist") if "extra ==" not in x]
    assert not [x for x in always if x.startswith(("gradio", "mkdocs", "matplotlib", "pytest"))]


def test_metadata_passes_twine(built):
    pytest.importorskip("twine", reason="checks what package indexes ask of metadata")
    from twine.commands.check import check

    files = [str(f) for f in built.iterdir() if f.name.endswith((".whl", ".tar.gz"))]
    assert len(files) == 2 and not check(files, strict=True)


def test_a_release_is_tagged_by_its_version(tmp_path):
    path = ROOT / ".github" / "check_tag.py"
    spec = importlib.util.spec_from_file_location("check_tag", path)
    check_tag = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(check_tag)
    (tmp_path / "dittfast").mkdir()
    (tmp_path / "dittfast" / "__init__.py").write_text('__version__ = "1.2.3"\n')
    changes = tmp_path / "CHANGELOG.md"
    changes.write_text("# Changes\n\n## 1.2.3, 2026-12-31\n")
    assert check_tag.problems("v1.2.3", tmp_path) == []
    (wrong,) = check_tag.problems("v1.2.4", tmp_path)
    assert "v1.2.4" in wrong and "1.2.3" in wrong
    changes.write_text("# Changes\n\n## 1.2.3, not released yet\n")
    assert "CHANGELOG.md has no section" in check_tag.problems("v1.2.3", tmp_path)[0]
    # It finds the version of this checkout.
    assert dittfast.__version__ in check_tag.problems("v0", ROOT)[0]


WORKS = """
import torch, dittfast, dittfast.config
from dittfast import Layout, Plan, attend
q = torch.randn(1, 2, 111, 16)
assert attend(q, q, q, Plan.full(111), backend="reference").shape == q.shape
for preset in dittfast.config.presets():
    dittfast.config.resolve(preset)
print(dittfast.__file__)
"""


def test_wheel_imports_from_outside_the_root(wheel, tmp_path):
    folder = wheel[0]
    files = python(PARTS, cwd=tmp_path, path=(folder,)).splitlines()
    assert all(Path(file).is_relative_to(folder / "dittfast") for file in files)
    assert python(WORKS, cwd=tmp_path, path=(folder,)) == str(folder / "dittfast" / "__init__.py")


def test_wheel_installed_and_run_from_the_root(wheel):
    """Without -P Python prefers the checkout, with it the installed package: both are whole."""
    folder = wheel[0]
    checkout = python(PARTS, path=(folder,)).splitlines()
    assert all(Path(file).is_relative_to(ROOT) for file in checkout)
    if sys.version_info >= (3, 11):
        installed = python(PARTS, "-P", path=(folder,)).splitlines()
        assert all(Path(file).is_relative_to(folder) for file in installed)
