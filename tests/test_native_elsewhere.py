"""The native kernel compiled for other CPUs and run under QEMU, on random plans.

Needs a cross compiler and QEMU's user mode, on Debian ``qemu-user gcc-aarch64-linux-gnu``.
"""

import ctypes
import shutil
import subprocess
from pathlib import Path

import plan_fuzz
import pytest

from dittfast.kernels import native

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("nan_empty")]
HERE = Path(__file__).parent
# Compiler and its options, emulator, what the kernel says it was compiled to.
CPUS = {
    "NEON": ("aarch64-linux-gnu-gcc", [], "qemu-aarch64"),
    "SSE2": ("gcc", ["-march=x86-64"], None),
    "AVX2": ("gcc", ["-march=haswell"], None),
}


def pointers(structure, start=0):
    """Places of the pointers in a ctypes structure, in bytes."""
    for name, kind in structure._fields_:
        at = start + getattr(structure, name).offset
        if issubclass(kind, ctypes.Structure):
            yield from pointers(kind, at)
        elif kind is not ctypes.c_double and kind is not ctypes.c_int64:
            yield at


def number(*values):
    return b"".join(int(x).to_bytes(8, "little") for x in values)


class Elsewhere:
    """Stands for ``_Call.run``: the same call in a process of another kind."""

    def __init__(self, command, says, folder):
        self.command, self.says, self.file, self.calls = command, says, folder / "call", 0

    def __call__(self, call):
        problem = call.problem
        places = list(pointers(type(problem)))
        storages = {x.untyped_storage().data_ptr(): x.untyped_storage() for x in call.alive}
        sizes = {at: storage.nbytes() for at, storage in storages.items()}
        with open(self.file, "wb") as file:
            file.write(number(len(sizes), len(places)))
            file.writelines(number(*pair) for pair in sizes.items())
            file.write(number(*places) + bytes(problem))
            contents = file.tell()
            file.writelines(ctypes.string_at(at, size) for at, size in sizes.items())
        done = subprocess.run(
            [*self.command, str(self.file)], capture_output=True, text=True, timeout=120
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout.strip() == self.says
        with open(self.file, "rb") as file:
            file.seek(contents)
            for at, size in sizes.items():
                ctypes.memmove(at, file.read(size), size)
        self.calls += 1


@pytest.mark.parametrize("name", CPUS)
def test_random_plans(name, tmp_path, monkeypatch):
    compiler, options, emulator = CPUS[name]
    for program in filter(None, (compiler, emulator)):
        if shutil.which(program) is None:
            pytest.skip(f"{program} is not installed")
    program = tmp_path / "elsewhere"
    flags = ["-O3", *options, "-fno-math-errno", "-fno-trapping-math", "-std=gnu11", "-static"]
    source = str(HERE / "native_elsewhere.c")
    subprocess.run(
        [compiler, *flags, "-pthread", source, "-o", str(program), "-lm"],
        check=True, timeout=300,
    )  # fmt: skip
    elsewhere = Elsewhere([emulator, str(program)] if emulator else [str(program)], name, tmp_path)
    monkeypatch.setattr(native._Call, "run", lambda call: elsewhere(call))
    for seed in range(100):
        plan_fuzz.check(seed)
    assert elsewhere.calls >= 300
