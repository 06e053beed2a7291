#!/usr/bin/env bash
# Triton's interpreter multiplies bfloat16 matrices as if they were integers
#
# Versions: triton 3.8.0, torch 2.14.1, CPU with TRITON_INTERPRET=1; seen on 2026-11-29
#
# tl.dot of two 16 x 16 matrices. In float16 it is right to the rounding error. In bfloat16 the
# interpreter returns values of about 1e10 where 15 is the largest that is right, without a
# warning: NumPy has no bfloat16, the interpreter keeps such tensors as 16-bit integers, and
# multiplies those. A kernel whose numbers were checked in the interpreter was not checked in the
# type that it will run in.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet torch==2.14.1 triton==3.8.0 numpy==2.4.6
"$work/venv/bin/python" -W ignore - <<'PYTHON'
import os
import pathlib
import runpy
import tempfile

os.environ["TRITON_INTERPRET"] = "1"
program = """
import torch
import triton
import triton.language as tl


@triton.jit
def multiply(a, b, out):
    at = tl.arange(0, 16)[:, None] * 16 + tl.arange(0, 16)[None, :]
    tl.store(out + at, tl.dot(tl.load(a + at), tl.load(b + at)))


def error(dtype):
    torch.manual_seed(0)
    a, b = (torch.randn(16, 16).to(dtype) for _ in range(2))
    out = torch.empty(16, 16)
    multiply[(1,)](a, b, out)
    return (out - a.float() @ b.float()).abs().max().item()
"""
with tempfile.TemporaryDirectory() as folder:  # jit reads its function from a file
    path = pathlib.Path(folder) / "program.py"
    path.write_text(program)
    names = runpy.run_path(str(path))
    import torch

    half, bfloat = names["error"](torch.float16), names["error"](torch.bfloat16)
print(f"largest error: float16 {half:.1e}, bfloat16 {bfloat:.1e}")
assert half < 1e-4 and bfloat > 1e3
PYTHON
