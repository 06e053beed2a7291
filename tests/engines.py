"""What the tests of engines in other packages share: an H100 on paper, methods, signatures."""

import ast
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from dittfast import Layout, attend, methods
from dittfast.attention import method_call
from dittfast.kernels import capabilities
from dittfast.kernels.epilogue import EPILOGUE

# Exact in every engine: full blocks, no log weights.
FULL_BLOCKS = {
    "radial": (methods.Radial(block_size=64), Layout.video(5, 6, 7, text=7)),
    "rectified": (methods.Rectified(block_size=64, topk=2), Layout.image(15, 16, text=5)),
    "topk": (methods.TopK(block_size=64, topk=2), Layout.image(15, 16, text=5)),
}
# These need a token rule, and log weights; with what an engine says that lacks that.
LACKING = {"local": "it takes full blocks alone", "log_linear": "it adds no log weights to keys"}
RULES_AND_WEIGHTS = {
    "local": (methods.Local(window=3, tile=(1, 8, 8)), Layout.image(9, 10, text=5)),
    "log_linear": (methods.LogLinear(block_size=16, topk=2), Layout.image(17, 16, text=5)),
}


def as_on_a_gpu(monkeypatch, backend, architecture: str) -> None:
    """A backend's GPU, in which CPU tensors lie, with all packages there."""
    monkeypatch.setattr(backend, "machine_reasons", lambda asked: [])
    here = tuple(replace(x, devices=("cpu",)) for x in backend.CAPABILITIES)
    monkeypatch.setattr(backend, "CAPABILITIES", here)
    for module in (backend, capabilities):
        if hasattr(module, "architecture_of"):
            monkeypatch.setattr(module, "architecture_of", lambda device: architecture)


def applied(method, layout, dtype=torch.float16, head_dim=64):
    """``(q, k, v, plan, options)`` of a method: what :func:`attend` takes."""
    draw = torch.Generator().manual_seed(0)
    shape = 1, 2, layout.num_tokens, head_dim
    q, k, v = (torch.randn(shape, generator=draw).to(dtype) for _ in range(3))
    plan, k, v, weight, scale = method_call(method, layout, q, k, v)
    return q, k, v, plan, dict(kv_log_weight=weight, scale=scale)


def assert_exact(backend: str, method, layout) -> None:
    """A method's result is the oracle's, as far as half precision goes."""
    q, k, v, plan, options = applied(method, layout)
    out = attend(q, k, v, plan, backend=backend, **options)
    wide = (x.double() for x in (q, k, v))
    exact = attend(*wide, plan, backend="reference", **options)
    assert float((out.double() - exact).abs().max()) <= 2e-3 * float(exact.abs().max())


def assert_negative_scale(backend: str) -> None:
    """The softmax of the smallest product, not of the largest."""
    q, k, v, plan, _ = applied(*FULL_BLOCKS["radial"])
    out = attend(q, k, v, plan, backend=backend, scale=-0.5)
    exact = attend(*(x.double() for x in (q, k, v)), plan, backend="reference", scale=-0.5)
    assert float((out.double() - exact).abs().max()) <= 2e-3 * float(exact.abs().max())


def assert_refused(backend: str, name: str) -> None:
    """One of :data:`RULES_AND_WEIGHTS` is refused with the reason, and with who can."""
    q, k, v, plan, options = applied(*RULES_AND_WEIGHTS[name])
    with pytest.raises(ValueError, match=rf"{LACKING[name]}.*What can: .*'flex'"):
        attend(q, k, v, plan, backend=backend, **options)


def assert_gradients(backend: str, plan, inputs, tolerance=0.02, with_lse=False) -> None:
    """The result and gradients of q, k, v and of the epilogue, beside those of the oracle.

    Those of a tail, which is merged around every backend, have tests of their own.
    """
    found = []
    for name, cast in ((backend, None), ("reference", torch.float64)):
        leaves = [x.detach().to(cast or x.dtype).requires_grad_() for x in inputs]
        ends = {n: getattr(plan, n) for n in EPILOGUE if getattr(plan, n) is not None}
        ends = {n: x.detach().to(cast or x.dtype).requires_grad_() for n, x in ends.items()}
        mine = plan.replace(**ends)
        out, lse = attend(*leaves, mine, backend=name, return_lse=True)
        total = out.double().square().sum()
        if with_lse:
            total = total + lse.double().masked_fill(lse == -torch.inf, 0).square().sum()
        found.append([out.detach(), *torch.autograd.grad(total, [*leaves, *ends.values()])])
    for name, ours, exact in zip(("out", "dq", "dk", "dv", *ends), *found):
        error = float((ours.double() - exact.double()).abs().max())
        limit = tolerance * float(exact.abs().max())
        assert error <= limit, f"{name}: {error:.2e} apart, {limit:.2e} allowed"


def wheel(folder, *requirements: str):
    """The files of packages, without what they need; not imported."""
    install = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--pre"]
    subprocess.run([*install, "--target", str(folder), *requirements], check=True, timeout=900)
    return folder


def signatures(path) -> dict[str, list[tuple[str, str | None]]]:
    """Of every function of a file, methods as ``Class.name``: its parameters, as they stand."""
    found = {}
    for node in _statements(path):
        inner = node.body if isinstance(node, ast.ClassDef) else [node]
        prefix = f"{node.name}." if isinstance(node, ast.ClassDef) else ""
        for one in inner:
            if isinstance(one, ast.FunctionDef):
                found[prefix + one.name] = _parameters(one)
    return found


def fields(path, name: str) -> list[tuple[str, str | None]]:
    """The fields of a NamedTuple of a file, each with its default."""
    (found,) = (n for n in _statements(path) if isinstance(n, ast.ClassDef) and n.name == name)
    pairs = ((x.target.id, x.value) for x in found.body if isinstance(x, ast.AnnAssign))
    return [(name, None if value is None else ast.unparse(value)) for name, value in pairs]


def _statements(path) -> list[ast.stmt]:
    return ast.parse(Path(path).read_text(encoding="utf-8")).body


def _parameters(function: ast.FunctionDef) -> list[tuple[str, str | None]]:
    """Names in order, keyword-only ones after "*", each with its default."""
    given = function.args
    defaults = [None] * (len(given.args) - len(given.defaults)) + given.defaults
    pairs = [*zip(given.args, defaults), (ast.arg("*"), None)]
    pairs += zip(given.kwonlyargs, given.kw_defaults)
    return [(x.arg, None if default is None else ast.unparse(default)) for x, default in pairs]
