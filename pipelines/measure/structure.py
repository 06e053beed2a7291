"""Where attention goes in a dense run, by distance, and what a method's plan looks like there."""

from __future__ import annotations

import itertools

import torch

from dittfast.layout import Layout
from dittfast.measure.draw import block_mask
from dittfast.plan import Plan

from .probe import Captured

# Query rows that are looked at in each call.
_ROWS = 256


def distance_edges(longest: int) -> list[int]:
    """First distance of each bin: 0, 1, 2, 3, 5, 9, 17 ... up to ``longest``."""
    edges = [0, 1]
    while edges[-1] <= longest:
        edges.append(2 if edges[-1] == 1 else 2 * edges[-1] - 1)
    return edges[:-1]


def bin_names(longest: int) -> list[str]:
    """Names of the bins of :func:`distance_edges`: "0", "1", "2", "3-4", "5-8" ..."""
    edges = [*distance_edges(longest), longest + 1]
    return [str(a) if b == a + 1 else f"{a}-{b - 1}" for a, b in itertools.pairwise(edges)]


@torch.no_grad()
def mass_by_distance(captured: Captured) -> dict:
    """Shares of dense attention by distance between query and key, on evenly spread grid rows.

    The distance is Chebyshev's, in rows and columns of tokens; frames are counted apart.

    Returns:
        ``layer``, ``step``; ``context``: per head, the share on text; ``bins``; ``space``: per
        head, the share of the mass on grid keys in each bin, and ``space_uniform`` for attention
        without preference; the same as ``frame_bins``, ``frames`` and ``frames_uniform``.
    """
    c = captured
    at = torch.from_numpy(c.layout.coordinates())
    grid = (at[:, 0] >= 0).nonzero()[:, 0]
    rows = grid[torch.linspace(0, len(grid) - 1, min(_ROWS, len(grid))).round().long()]
    heads, n = c.q.shape[1:3]
    k = c.k[0].repeat_interleave(heads // c.k.shape[1], 0).double()
    logits = c.q[0][:, rows.to(c.q.device)].double() @ k.transpose(-1, -2) * c.scale
    for weight in (c.layout.kv_log_weight(c.q.device), c.kv_log_weight):
        if weight is not None:
            logits = logits + weight[0, :, None, :n].double()
    shares = torch.softmax(logits, -1).cpu()
    on_grid = shares[:, :, grid]
    total = on_grid.sum(-1, keepdim=True)
    apart = (at[rows][:, None] - at[grid][None]).abs()
    row = {"layer": c.layer, "step": c.step, "context": (1 - total[..., 0]).mean(-1).tolist()}
    for name, distance in (("space", apart[..., 2:].amax(-1)), ("frames", apart[..., 1])):
        longest = int(distance.max())
        edges = torch.tensor(distance_edges(longest)[1:])
        which = torch.bucketize(distance.contiguous(), edges, right=True)
        masks = [which == i for i in range(len(edges) + 1)]
        mass = [(on_grid * m).sum(-1).div(total[..., 0]).mean(-1) for m in masks]
        row["bins" if name == "space" else "frame_bins"] = bin_names(longest)
        row[name] = torch.stack(mass, -1).tolist()
        row[f"{name}_uniform"] = [float(m.double().mean()) for m in masks]
    return row


def mask_picture(plan: Plan, layout: Layout, title: str, layer: str):
    """The block mask of a plan; of one made from q and k, head 0's in one layer."""
    lines = [f"density {plan.density:.3f}, mean over heads"]
    if plan.kv_indices.shape[1] > 1:
        lines.append(f"head 0 of {layer}")
    return block_mask(plan, layout, title=title, lines=lines, size=360, legend_below=True)
