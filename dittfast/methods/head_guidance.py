"""Head-perturbation guidance: HeadHunter and SoftPAG (Ahn et al. 2025, arXiv:2506.10978)."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch

from ..layout import Grid, Layout
from .checks import check_choice, check_integer

ROWS = ("image", "joint", "diagonal")


@dataclass(frozen=True)
class HeadGuidance:
    """Guidance away from the model with some attention heads weakened; it costs speed.

    A weakened head uses ``A' = (1 - strength) A + strength I`` in place of its attention map A, so
    its output is ``(1 - strength) A v + strength v``: no map is ever built. With the prediction
    ``c`` and the one ``p`` of the weakened model, every guided step adds
    ``guidance_scale * (c - p)`` to what the sampler would use: ``c + w (c - p)`` alone,
    ``u + g (c - u) + w (c - p)`` beside classifier-free guidance.

    Attributes:
        heads: ``(layer, head)`` pairs; a layer is an index in the order of the model (negative
            ones count from its end) or a module name.
        guidance_scale: w; 0 is the plain model.
        strength: u, from 0 (untouched) to 1 (the identity map: PAG). One number, or one for each
            of ``heads``.
        rows: "image": only the image's own tokens (grids) are weakened; "joint": all tokens of the
            sequence, as written in the paper; "diagonal": image tokens see themselves and the
            text, text tokens are left alone (what diffusers' joint PAG does).
        start_step, stop_step: guided steps are ``start_step <= step < stop_step``; None is the end.

    Raises:
        ValueError: no heads, a head twice, or a value out of range.
    """

    heads: tuple[tuple[int | str, int], ...]
    guidance_scale: float = 3.0
    strength: float | tuple[float, ...] = 1.0
    rows: str = "image"
    start_step: int = 0
    stop_step: int | None = None

    def __post_init__(self):
        heads = tuple((layer, int(head)) for layer, head in self.heads)
        object.__setattr__(self, "heads", heads)
        if not heads:
            raise ValueError("heads is empty; give (layer, head) pairs")
        for pair in heads:
            if heads.count(pair) > 1:
                raise ValueError(f"heads lists {pair} twice")
        strengths = self.strengths
        if len(strengths) != len(heads):
            raise ValueError(f"{len(strengths)} strengths for {len(heads)} heads; give one each")
        for value in strengths:
            if not 0 <= value <= 1:
                raise ValueError(f"strength must lie in 0..1, got {value!r}")
        if not math.isfinite(self.guidance_scale):
            raise ValueError(f"guidance_scale must be a finite number, got {self.guidance_scale!r}")
        check_choice("rows", self.rows, ROWS)
        check_integer("start_step", self.start_step, 0)
        if self.stop_step is not None:
            check_integer("stop_step", self.stop_step, self.start_step)

    @property
    def strengths(self) -> tuple[float, ...]:
        """One strength for each of ``heads``."""
        if isinstance(self.strength, (int, float)):
            return (float(self.strength),) * len(self.heads)
        return tuple(float(value) for value in self.strength)

    @classmethod
    def load(cls, path: str | Path, **changes: Any) -> HeadGuidance:
        """The guidance in a JSON file, such as the heads.json of :func:`dittfast.hunt`.

        Args:
            changes: fields to use in place of the file's.

        Raises:
            FileNotFoundError: no such file.
            ValueError: not JSON, no heads in it, an unknown field, or a value out of range.
        """
        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(
                f"no file with heads at {path}; dittfast hunt writes one, heads.json"
            )
        from dittfast.disk.problems import FileProblem, reading
        from dittfast.disk.records import read_record

        data = read_record(path).data
        known = [f.name for f in fields(cls)]
        if not isinstance(data.get("heads"), list):
            raise FileProblem(path, 'it names no heads; it needs "heads": [[layer, head], ...]')
        # What the search says about itself is for people.
        strange = [key for key in data if key not in (*known, "search")]
        if strange:
            raise ValueError(f"{path}: unknown field {strange[0]!r}; known: {', '.join(known)}")
        if not data["heads"]:
            raise ValueError(f"{path}: heads is empty; the search found none that help")
        data = {key: data[key] for key in known if key in data}
        pairs = [isinstance(x, list) and list(map(type, x)) == [int, int] for x in data["heads"]]
        if not all(pairs):
            raise FileProblem(path, "heads must be [layer, head] pairs")
        data["heads"] = tuple(map(tuple, data["heads"]))
        if isinstance(data.get("strength"), list):
            data["strength"] = tuple(data["strength"])
        with reading(path, "it is no guidance"):
            cls(**data)
        return cls(**(data | changes))

    def is_guided_step(self, step: int) -> bool:
        return self.start_step <= step and (self.stop_step is None or step < self.stop_step)


def soft_pag(
    out: torch.Tensor,
    v: torch.Tensor,
    strength: float | torch.Tensor,
    heads: list[int] | None = None,
    rows: Layout | None = None,
) -> torch.Tensor:
    """SoftPAG (arXiv:2506.10978): attention outputs leant towards ``v``.

    The map ``(1 - u) A + u I`` gives ``(1 - u) A v + u v``.

    Args:
        out: ``[B, H, N, D]``, an attention output ``A v``.
        v: ``[B, H, N, D]``.
        strength: u in 0..1, a number or ``[H]``.
        heads: which heads; None for all.
        rows: a layout whose context tokens are left alone; None changes every token.

    Returns:
        ``[B, H, N, D]`` in out's dtype. Differentiable.

    Raises:
        ValueError: shapes that differ, a strength outside 0..1, a head that does not exist.
    """
    if out.shape != v.shape:
        raise ValueError(f"out and v must have one shape, got {list(out.shape)}, {list(v.shape)}")
    num_heads = out.shape[1]
    if isinstance(strength, torch.Tensor):
        if tuple(strength.shape) != (num_heads,):
            raise ValueError(f"strength must be [{num_heads}], got {list(strength.shape)}")
    elif not 0 <= strength <= 1:
        raise ValueError(f"strength must lie in 0..1, got {strength!r}")
    wide = torch.promote_types(out.dtype, torch.float32)
    u = torch.as_tensor(strength, dtype=wide, device=out.device).expand(num_heads)
    if heads is not None:
        for head in heads:
            if not 0 <= head < num_heads:
                raise ValueError(f"head {head} does not exist; heads are 0..{num_heads - 1}")
        chosen = torch.zeros_like(u)
        chosen[list(heads)] = 1
        u = u * chosen
    u = u.view(1, -1, 1, 1).to(out.dtype)
    if rows is None:
        return torch.lerp(out, v, u)
    parts = []
    for start, segment in rows.spans():
        span = slice(start, start + segment.length)
        part = out[:, :, span]
        parts.append(torch.lerp(part, v[:, :, span], u) if isinstance(segment, Grid) else part)
    return torch.cat(parts, 2)
