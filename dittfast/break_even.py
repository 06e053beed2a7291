"""From how many tokens a sparse method beats dense attention."""

from __future__ import annotations

# `dittfast bench break-even`, float32, 4 heads of 64, forward, two cores of an AMD EPYC, default
# options, images (radial: up to 16 frames): the smallest power of two from which the median of
# three rounds was faster than dense attention.
MEASURED = {
    ("local", "cpu"): 4096,
    ("log_linear", "cpu"): 4096,
    ("radial", "cpu"): 16384,
    ("rectified", "cpu"): 16384,
}
# Nobody measured these. Planning and short lists cost most on small sequences, so the guess is
# meant to be too large rather than too small.
ESTIMATED = {
    ("local", "cuda"): 8192,
    ("log_linear", "cuda"): 16384,
    ("radial", "cuda"): 16384,
    ("rectified", "cuda"): 16384,
}


def min_tokens(method: str, device_type: str) -> int:
    """Tokens from which ``method`` pays on a device; 0 for a method of your own."""
    key = method, device_type
    if key in MEASURED:
        return MEASURED[key]
    return ESTIMATED.get((method, "cuda"), 0)


def is_measured(method: str, device_type: str) -> bool:
    """Whether :func:`min_tokens` was measured; if not, it is an estimate on the safe side."""
    return (method, device_type) in MEASURED
