"""Inputs and tolerances for testing attention; shared with users who add a method or a kernel."""

from __future__ import annotations

import torch


def attention_inputs(
    batch: int, heads: int, num_queries: int, head_dim: int, num_keys: int | None = None,
    dtype=torch.float32, scale: float = 1.0, device="cpu", seed: int = 0,
):  # fmt: skip
    """Random ``(q, k, v, grad_out)``; ``scale`` multiplies q and k."""
    generator = torch.Generator().manual_seed(seed)

    def draw(n, factor=1.0):
        x = torch.randn(batch, heads, n, head_dim, generator=generator, dtype=torch.float64)
        return (x * factor).to(dtype).to(device)

    num_keys = num_keys or num_queries
    return draw(num_queries, scale), draw(num_keys, scale), draw(num_keys), draw(num_queries)


def eager_attention(q, k, v, mask, scale, log_weight=None):
    """Plain attention in the inputs' own dtype: what its rounding costs sets the budget."""
    logits = (q @ k.transpose(-1, -2)) * scale
    if log_weight is not None:
        logits = logits + log_weight[..., None, :].to(logits)
    logits = logits.masked_fill(~mask.to(logits.device), -torch.inf)
    return torch.softmax(logits, -1) @ v


def assert_within_budget(name, actual, exact, eager, factor: float = 4.0, floor: float = 2.0):
    """Assert that ``actual`` is at most ``factor`` times as wrong as ``eager`` is.

    Args:
        exact: the fp64 result.
        eager: the result of plain attention in the dtype under test.
        floor: least budget, in units of the dtype's epsilon times the largest exact value, for
            the rare case that eager is exact.
    """
    if not torch.isfinite(actual).all():
        raise AssertionError(f"{name}: {int((~torch.isfinite(actual)).sum())} values not finite")
    exact = exact.double()
    error = (actual.double() - exact).abs()
    allowed = factor * float((eager.double() - exact).abs().max())
    allowed = max(allowed, floor * torch.finfo(actual.dtype).eps * float(exact.abs().max()))
    if float(error.max()) > allowed:
        at = [int(i) for i in torch.unravel_index(error.argmax(), error.shape)]
        wrong = float((error > allowed).double().mean())
        raise AssertionError(
            f"{name}: error {float(error.max()):.3e} at {at} exceeds the budget {allowed:.3e} "
            f"({wrong:.1%} of values do)"
        )
