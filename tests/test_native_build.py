"""How native.c is compiled and kept, and what happens where that does not work."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from random_plans import assert_matches_oracle, ragged_blocks, random_plan, random_rule

from dittfast import attend, methods
from dittfast.attention import choose_backend
from dittfast.kernels import native, native_build
from dittfast.layout import Layout
from dittfast.testing import attention_inputs

ROOT = Path(__file__).resolve().parent.parent
pytestmark = pytest.mark.skipif(
    native.unavailable() is not None, reason="these tests need a C compiler that works"
)
# A compiler that notes when it compiles, does so without optimising (much sooner), and can be slow.
COMPILER = """#!/bin/sh
case "$*" in *-dM*) ;; *) echo "$$" >> {log}; sleep {seconds} ;; esac
exec {compiler} "$@" -O0
"""


def fake_compiler(folder: Path, text: str) -> str:
    path = folder / "fake-cc"
    path.write_text(text)
    path.chmod(0o755)
    return str(path)


@pytest.fixture
def compiles(tmp_path, monkeypatch):
    """A quick compiler and an empty cache; returns how often something was compiled."""
    log = tmp_path / "log"
    real = native_build.library().compiler
    text = COMPILER.format(log=log, seconds=0, compiler=real)
    monkeypatch.setenv("CC", fake_compiler(tmp_path, text))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return lambda: len(log.read_text().split()) if log.exists() else 0


def fresh():
    """What a new process would find."""
    return native_build.library.__wrapped__()


def works(library) -> bool:
    """Whether a result of this library is right."""
    q, k, v, _ = attention_inputs(1, 2, 30, 16)
    plan = methods.Local(2).plan(Layout.image(5, 6))
    expected = attend(q, k, v, plan, backend="reference")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(native, "library", lambda: library)
        out, _ = native.forward(q, k, v, plan.tensors(), 0.25)
    return torch.allclose(out, expected, atol=1e-5)


def test_it_is_compiled_once_and_only_for_its_user(compiles, tmp_path):
    first, second = fresh(), fresh()
    assert works(first) and works(second) and compiles() == 1
    folder = tmp_path / "cache" / "dittfast"
    assert first.folder == second.folder == folder
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    (file,) = folder.iterdir()
    assert file.suffix == ".so"


@pytest.mark.parametrize("width", ["-DLANES=16", "-DLANES=4 -DVECTORS=4"])
def test_vectors_of_other_widths_are_right(width, compiles, monkeypatch):
    """As on CPUs with AVX-512 and NEON, though this one may have neither."""
    flags = [*native_build._flags(), *width.split()]
    monkeypatch.setattr(native_build, "_flags", lambda: flags)
    library = fresh()
    monkeypatch.setattr(native, "library", lambda: library)
    blocks = ragged_blocks(111, 70, 3, shuffle=True)
    plan = random_plan(blocks, blocks, (1, 2), random_rule(111, 111))
    assert_matches_oracle(plan, "native", head_dim=20)
    assert_matches_oracle(plan, "native", dtype=torch.bfloat16)


@pytest.mark.parametrize("change", ["source", "flags", "cpu"])
def test_what_it_was_built_from_is_in_its_name(change, compiles, tmp_path, monkeypatch):
    fresh()
    if change == "source":
        source = tmp_path / "native.c"
        source.write_text(native_build.SOURCE.read_text() + "/* changed */")
        monkeypatch.setattr(native_build, "SOURCE", source)
    elif change == "flags":
        flags = [*native_build._flags(), "-DCHUNK=48"]
        monkeypatch.setattr(native_build, "_flags", lambda: flags)
    else:
        # What another CPU changes is what the compiler predefines for -march=native.
        run = native_build._run
        other = lambda command, *text: run(command, *text) + b"#define __AVX9__ 1\n"  # noqa: E731
        monkeypatch.setattr(native_build, "_run", other)
    assert works(fresh()) and compiles() == 2
    assert len(list((tmp_path / "cache" / "dittfast").iterdir())) == 2


def test_processes_that_build_at_once(compiles, tmp_path, monkeypatch):
    text = Path(os.environ["CC"]).read_text().replace("sleep 0", "sleep 1")
    monkeypatch.setenv("CC", fake_compiler(tmp_path, text))
    code = (
        "from dittfast.kernels.native_build import library\n"
        "found = library()\n"
        "print(found.folder, found.instructions)"
    )
    command = [sys.executable, "-c", code]
    running = [
        subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) for _ in range(2)
    ]
    said = [process.communicate(timeout=120)[0] for process in running]
    folder = tmp_path / "cache" / "dittfast"
    assert said[0] == said[1] and said[0].startswith(str(folder))
    assert compiles() == 2  # neither waited for the other
    assert [file.suffix for file in folder.iterdir()] == [".so"]
    assert works(fresh()) and compiles() == 2


def _file_in_the_way(cache: Path):
    cache.write_text("no folder")


def _open_to_others(cache: Path):
    (cache / "dittfast").mkdir(parents=True)
    (cache / "dittfast").chmod(0o777)


def _not_ours(cache: Path):
    if os.geteuid() != 0:
        pytest.skip("only root can give a folder away")
    (cache / "dittfast").mkdir(parents=True)
    os.chown(cache / "dittfast", 12345, 12345)


def _read_only(cache: Path):
    if os.geteuid() == 0:
        pytest.skip("root can write everywhere")
    (cache / "dittfast").mkdir(parents=True)
    (cache / "dittfast").chmod(0o500)


BAD_FOLDERS = {
    "a file is in the way": (_file_in_the_way, "Not a directory"),
    "others can write": (_open_to_others, "can be written by others (mode 777)"),
    "it belongs to another user": (_not_ours, "belongs to user 12345"),
    "it is read-only": (_read_only, "Permission denied"),
}


@pytest.mark.parametrize("name", BAD_FOLDERS)
def test_without_a_cache_folder_it_is_built_for_the_process(name, compiles, tmp_path, caplog):
    spoil, reason = BAD_FOLDERS[name]
    spoil(tmp_path / "cache")
    found = fresh()
    assert works(found) and found.folder is None and compiles() == 1
    (record,) = caplog.records
    assert reason in record.message
    assert "set XDG_CACHE_HOME to a folder that only you can write" in record.message
    assert not list((tmp_path / "cache").glob("dittfast/*"))


def test_a_prebuilt_library_in_a_read_only_folder_is_used(compiles, tmp_path, monkeypatch):
    fresh()

    def no_build(command, target):
        raise PermissionError("read-only")

    monkeypatch.setattr(native_build, "_build", no_build)
    assert works(fresh()) and compiles() == 1


def test_a_library_that_cannot_be_loaded_is_built_again(compiles, tmp_path, caplog):
    name = f"native-{native_build._fingerprint([os.environ['CC'], *native_build._flags()])}.so"
    folder = tmp_path / "cache" / "dittfast"
    folder.mkdir(parents=True, mode=0o700)
    (folder / name).write_bytes(b"\x7fELF for another machine")
    assert works(fresh()) and compiles() == 1
    assert "cannot be loaded and is compiled again" in caplog.text


def test_a_compiler_that_fails_gives_way_to_the_next(compiles, tmp_path, monkeypatch):
    (tmp_path / "broken").mkdir()
    broken = fake_compiler(tmp_path / "broken", "#!/bin/sh\nexit 3\n")
    monkeypatch.setenv("CXX", os.environ["CC"])
    monkeypatch.setenv("CC", broken)
    assert fresh().compiler == os.environ["CXX"]


@pytest.mark.parametrize("fault", ["none is there", "all fail"])
def test_without_a_compiler_the_other_backend_runs(fault, tmp_path, monkeypatch, caplog):
    empty = tmp_path / "bin"
    empty.mkdir()
    monkeypatch.setenv("PATH", str(empty))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.delenv("CXX", raising=False)
    if fault == "all fail":
        text = '#!/bin/sh\necho "cc: error: out of luck" >&2\nexit 1\n'
        monkeypatch.setenv("CC", fake_compiler(tmp_path, text))
    found = fresh()
    assert isinstance(found, native_build.BuildError)
    said = {"none is there": "no C compiler was found", "all fail": "error: out of luck"}[fault]
    (record,) = caplog.records
    assert said in record.message and "'cpu' backend" in record.message
    assert "install gcc or clang, or name a C compiler in CC" in record.message

    monkeypatch.setattr(native, "library", lambda: found)
    assert choose_backend(torch.device("cpu")) == "cpu"
    q, k, v, _ = attention_inputs(1, 1, 30, 16)
    plan = methods.Local(2).plan(Layout.image(5, 6))
    assert torch.equal(attend(q, k, v, plan), attend(q, k, v, plan, backend="cpu"))
    with pytest.raises(ValueError, match="the native backend cannot run this: no C compiler"):
        attend(q, k, v, plan, backend="native")


def test_nothing_is_compiled_when_it_is_imported(compiles):
    code = (
        "from dittfast.kernels import native, native_build\n"
        "print(native_build.library.cache_info().currsize)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "0" and compiles() == 0
