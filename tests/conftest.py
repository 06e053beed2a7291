"""Test setup: Triton's interpreter where there is no GPU, NaN in uninitialised memory, seeds."""

import gc
import os
import sys
from pathlib import Path

import torch

if "PYTEST_XDIST_WORKER" in os.environ:
    # Each worker has a core. Threads beyond that wait for each other, also in what tests start.
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"

if not torch.cuda.is_available():
    # Must be set before the first kernel module is imported.
    os.environ["TRITON_INTERPRET"] = "1"

# `python -m pytest` puts the repository root on sys.path, where our kernels/ folder would stand in
# for Hugging Face's `kernels` package. The root is needed only to import dittfast itself.
import dittfast  # noqa: F401

_ROOT = Path(__file__).resolve().parent.parent
sys.path[:] = [p for p in sys.path if Path(p or ".").resolve() != _ROOT]

import pytest  # noqa: E402
from foreign_backend import foreign  # noqa: E402, F401 (a fixture)
from hypothesis import settings  # noqa: E402

# A busy machine is no failure.
settings.register_profile("dittfast", deadline=None, max_examples=60)
settings.load_profile("dittfast")


def pytest_collection_finish():
    # What is imported by now lives as long as the run: a collection need not look at it again.
    gc.collect()
    gc.freeze()


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA or ROCm device"))


_EMPTY = {name: getattr(torch, name) for name in ("empty", "empty_like", "empty_strided")}


def _poisoned(make):
    def wrapped(*args, **kwargs):
        x = make(*args, **kwargs)
        if x.dtype.is_floating_point and type(x) is torch.Tensor and x.device.type != "meta":
            x.fill_(torch.nan)
        return x

    return wrapped


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture
def nan_empty(monkeypatch):
    """torch.empty and its kin return NaN, so that memory nobody wrote shows up."""
    # `with torch.device(...)` remembers the constructors at its first use. Were it the patched
    # ones, later tests would make models of the meta device in memory.
    with torch.device("cpu"):
        torch.empty(0)
    for name, make in _EMPTY.items():
        monkeypatch.setattr(torch, name, _poisoned(make))


@pytest.fixture(autouse=True)
def tiny_models_run_sparse(monkeypatch):
    """Test models are far below every break-even, where dense attention would run by default."""
    from dittfast import break_even

    monkeypatch.setattr(break_even, "MEASURED", {})
    monkeypatch.setattr(break_even, "ESTIMATED", {})
    monkeypatch.setattr(break_even, "FAST_HALF", {})


@pytest.fixture
def quick_interpreter(monkeypatch):
    """Triton's interpreter patches its language at every call of a device function, which is most
    of a test's time: once per module is enough."""
    if torch.cuda.is_available():
        return
    interpreter = pytest.importorskip("triton.runtime.interpreter")
    patch, patched = interpreter._patch_lang, set()
    # What undoes the patches; before Triton 3.6 they stay.
    scope = getattr(interpreter, "_LangPatchScope", type(None))

    def patch_once(fn):
        if interpreter.tl.core.is_builtin(interpreter.tl.load):
            patched.clear()
        if id(fn.__globals__) in patched:
            return scope()
        patched.add(id(fn.__globals__))
        return patch(fn)

    monkeypatch.setattr(interpreter, "_patch_lang", patch_once)


@pytest.fixture
def interpreted_bfloat16(monkeypatch):
    """Lets Triton's interpreter multiply bfloat16, whose bits it takes for integers otherwise."""
    if torch.cuda.is_available():
        return
    interpreter = pytest.importorskip("triton.runtime.interpreter")
    dot, tl = interpreter.InterpreterBuilder.create_dot, interpreter.tl

    def widened(self, a, b, d, *options):
        if a.dtype.scalar == tl.bfloat16:
            wide = (
                tl.block_type(tl.float32, list(a.data.shape)),
                tl.block_type(tl.float32, list(b.data.shape)),
            )
            a, b = (self.cast_impl(x, to) for x, to in zip((a, b), wide))
        return dot(self, a, b, d, *options)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", widened)
