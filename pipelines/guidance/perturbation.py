"""SoftPAG: what weakens the chosen heads of a layer, and the pass in which they are weak."""

from __future__ import annotations

import threading

import torch

from dittfast.attention import method_attention
from dittfast.cache import BytesLRU
from dittfast.layout import Layout
from dittfast.methods.head_guidance import HeadGuidance, soft_pag
from dittfast.methods.local import Local
from dittfast.plan import Plan, to_be_kept

from ..layer import by_rows, key_log_weight
from ..passes import Pass

# What is kept of sequences: a server sees a new one with every prompt length.
_MOST_KEPT, _MOST_BYTES = 256, 2**28


class Perturbation:
    """SoftPAG in one pass: heads lean towards a map in which every token sees itself alone.

    Args:
        rows: where: "image" (the grids' tokens), "joint" (all tokens), or "diagonal" (image tokens
            see themselves and the text; text tokens are left alone).
        layouts: of each length of sequence, one for the whole batch or one per batch row; the main
            sequence first.
        outer_mask: whether an N x N mask is known to be m mᵀ, with all grid tokens valid.
    """

    # The stock attention may run before it, and needs its mask whole.
    strict, shortcut, hidden_states = True, None, None

    def __init__(
        self,
        rows: str,
        layouts: tuple[tuple[Layout, ...], ...],
        device: torch.device | None = None,
        outer_mask: bool = False,
    ):
        self.rows = rows
        self.outer_mask = outer_mask
        self.weak = Local(window=1) if rows == "diagonal" else None
        self._planned = {
            same[0].num_tokens: tuple((layout, self._plan(layout, device)) for layout in same)
            for same in layouts
        }
        main = layouts[0][0]
        self.num_tokens = main.num_tokens
        self.text_before, self.text_behind = main.grid_start, main.text_behind

    def _plan(self, layout: Layout, device: torch.device | None) -> Plan | None:
        if self.weak is None:
            return None
        with to_be_kept():
            plan = self.weak.plan(layout)
            return plan if device is None else plan.to(device)

    def covers(self, num_tokens: int) -> bool:
        return num_tokens in self._planned

    def __call__(self, out: torch.Tensor, strength: torch.Tensor, call: dict) -> torch.Tensor:
        q, k, v = call["query"], call["key"], call["value"]
        planned = self._planned[out.shape[-2]]
        token = planned[0][0].grid_start if self.outer_mask else None
        weight = None if self.weak is None else key_log_weight(call.get("attn_mask"), q, token)
        scale = call.get("scale")

        def lean(row: tuple[Layout, Plan | None], out, q, k, v, weight):
            layout, plan = row
            if self.weak is not None:
                weak = method_attention(
                    self.weak, layout, q, k, v, kept=plan, kv_log_weight=weight, scale=scale
                )
                return soft_pag(out, weak, strength, rows=layout)
            if v.shape[1] != out.shape[1]:
                v = v.repeat_interleave(out.shape[1] // v.shape[1], 1)
            return soft_pag(out, v, strength, rows=layout if self.rows == "image" else None)

        return by_rows(planned, lean, out, q, k, v, weight)


class HeadWeakening:
    """Which heads of a transformer are weakened and how far; makes the passes that do it.

    Args:
        config: heads, strength and rows.
        strengths: ``[H]`` by layer name, from :func:`head_strengths`.
    """

    def __init__(self, config: HeadGuidance, strengths: dict[str, torch.Tensor]):
        self.config = config
        self._strengths = strengths
        self._lock = threading.Lock()
        self._moved: dict[torch.device, dict[str, torch.Tensor]] = {}
        self._perturbations = BytesLRU(_MOST_KEPT, _MOST_BYTES)

    def __deepcopy__(self, memo):
        return HeadWeakening(self.config, self._strengths)

    def weakened(self, model: torch.nn.Module, current: Pass) -> Pass:
        """The pass ``current`` with the chosen heads weakened."""
        device = current.device
        with self._lock:
            if device not in self._moved:
                moved = {name: x.to(device) for name, x in self._strengths.items()}
                self._moved[device] = moved
            strengths = self._moved[device]
        perturbation = self._perturbations.get(
            (current.sequences, device),
            lambda: Perturbation(
                self.config.rows,
                current.sequences.by_length(),
                device,
                model._dittfast.family.outer_mask,
            ),
        )
        return current.changed(
            {
                name: run.weakened().changed(perturbation, strengths[name])
                if name in strengths
                else run.weakened()
                for name, run in current.runs.items()
            }
        )


def head_strengths(layers: dict[str, int], config: HeadGuidance) -> dict[str, torch.Tensor]:
    """``[H]`` strengths by layer name.

    Args:
        layers: the number of heads of each self-attention layer, in the order of the model.

    Raises:
        ValueError: a layer or a head that the model does not have; all that exist are said.
    """
    names = list(layers)
    by_layer: dict[str, torch.Tensor] = {}
    for (layer, head), strength in zip(config.heads, config.strengths):
        if isinstance(layer, int) and -len(names) <= layer < len(names):
            name = names[layer]
        elif layer in layers:
            name = layer
        else:
            raise ValueError(
                f"layer {layer!r} does not exist; this model has {len(names)} self-attention "
                f"layers, 0..{len(names) - 1}, named {names[0]} ... {names[-1]}"
            )
        num_heads = layers[name]
        if not 0 <= head < num_heads:
            raise ValueError(
                f"head {head} of {name} does not exist; its heads are 0..{num_heads - 1}"
            )
        by_layer.setdefault(name, torch.zeros(num_heads))[head] = strength
    return by_layer
