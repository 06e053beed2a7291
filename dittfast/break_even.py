"""From how many tokens a sparse method beats dense attention."""

from __future__ import annotations


def min_tokens(method: str, device_type: str) -> int:
    """Tokens from which ``method`` pays on a device; 0 until it has been measured."""
    return 0
