"""From how many tokens a sparse method beats dense attention, by backend and dtype."""

from __future__ import annotations

import math

import torch

# 4 heads of 64, forward, the planning of dynamic methods included, default options, images (radial:
# up to 16 frames): the smallest power of two, from 512 on, from which the median was faster than
# dense attention. AMD Zen 3, AVX2, which has no instruction that multiplies half precision: what
# holds there is no measurement for CPUs that do. See docs/performance.md.
MEASURED = {
    ("local", "native", "float32"): 512,
    ("log_linear", "native", "float32"): 1024,
    ("radial", "native", "float32"): 512,
    ("rectified", "native", "float32"): 2048,
    ("local", "native", "bfloat16"): 512,
    ("log_linear", "native", "bfloat16"): 1024,
    ("radial", "native", "bfloat16"): 512,
    ("rectified", "native", "bfloat16"): 2048,
    ("local", "native", "float16"): 512,
    ("log_linear", "native", "float16"): 512,
    ("radial", "native", "float16"): 512,
    ("rectified", "native", "float16"): 512,
    ("local", "cpu", "float32"): 4096,
    ("log_linear", "cpu", "float32"): 4096,
    ("radial", "cpu", "float32"): 16384,
    ("rectified", "cpu", "float32"): 16384,
}
# Nobody measured these. Planning and short lists cost most on small sequences, so the guess is
# meant to be too large rather than too small.
ESTIMATED = {
    ("local", "triton"): 8192,
    ("neighborhood", "triton"): 8192,
    ("topk", "triton"): 16384,
    ("log_linear", "triton"): 16384,
    ("radial", "triton"): 16384,
    ("rectified", "triton"): 16384,
    ("sol", "triton"): 16384,
    ("vsa", "triton"): 16384,
    ("reattention", "triton"): 8192,
}
# Where the CPU multiplies half precision (AMX, AVX512-BF16), dense attention in it is about three
# times as fast as in fp32, and our kernels, which widen it, are not. Estimated from that: methods
# that keep more than a third of the pairs never pay.
FAST_HALF = {
    "local": 8192,
    "neighborhood": 8192,
    "topk": 32768,
    "log_linear": 32768,
    "radial": math.inf,
    "rectified": math.inf,
    "sol": math.inf,
    "vsa": 32768,
    "reattention": 32768,
}


def min_tokens(method: str, backend: str, dtype: torch.dtype = torch.float32) -> float:
    """Tokens from which ``method`` pays; infinity where it never does, 0 for a method of your own.

    Args:
        backend: the name of the backend that runs it (:func:`dittfast.attention.choose_backend`).
    """
    if _widens(backend, dtype) and multiplies_half():
        return FAST_HALF.get(method, 0)
    key = method, backend, _name(dtype)
    if key in MEASURED:
        return MEASURED[key]
    return ESTIMATED.get((method, "triton"), 0)


def is_measured(method: str, backend: str, dtype: torch.dtype = torch.float32) -> bool:
    """Whether :func:`min_tokens` was measured; if not, it is an estimate on the safe side."""
    if _widens(backend, dtype) and multiplies_half():
        return False
    return (method, backend, _name(dtype)) in MEASURED


def multiplies_half() -> bool:
    """Whether this CPU has instructions that multiply bf16."""
    return torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()


def _widens(backend: str, dtype: torch.dtype) -> bool:
    return backend in ("native", "cpu") and dtype in (torch.float16, torch.bfloat16)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
