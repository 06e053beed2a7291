"""Whether two results may stand side by side: what differs in the settings they were drawn with."""

from __future__ import annotations

# What a picture and its speed depend on. Prompt, seed and versions may differ.
_RUN = (
    "model", "pipeline", "weights", "dtype", "call", "dense_attention", "dense_kernel",
    "loading",
)  # fmt: skip
_METHOD = ("method", "schedule", "backend", "adapter")


def difference_of_settings(wanted: dict, actual: dict, prefix: str = "") -> list[str]:
    """What differs, as ``"name: actual -> wanted"``, nested names with dots."""
    lines = []
    for key in sorted({*wanted, *actual}):
        a, b = actual.get(key), wanted.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            lines += difference_of_settings(b, a, f"{prefix}{key}.")
        elif a != b:
            lines.append(f"{prefix}{key}: {a!r} -> {b!r}")
    return lines


def settings_apart(one: dict, other: dict, with_method: bool = True) -> str | None:
    """What differs between two results, in a line; None where they may stand side by side.

    Args:
        one, other: rows of latency, settings of an arm's folder, or a fidelity result with the
            row of a method in it. What one of them does not tell is not compared.
        with_method: whether method, schedule and backend have to agree, too.
    """
    first, second = (_comparable(x, with_method) for x in (one, other))
    both = first.keys() & second.keys()
    lines = difference_of_settings(*({k: x[k] for k in both} for x in (second, first)))
    return "; ".join(lines) or None


def _comparable(result: dict, with_method: bool) -> dict:
    known = {k: result[k] for k in _RUN if k in result}
    if isinstance(result.get("device"), dict):
        known["device"] = {k: result["device"].get(k) for k in ("type", "name")}
    own = result.get("attention") or {}
    own = own if "method" in own and "method" not in result else result
    if with_method:
        known |= {k: own[k] for k in _METHOD if k in own}
    return known
