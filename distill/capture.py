"""Attention and block outputs of a pass, taken with hooks that live as long as the pass.

Nothing is kept in modules or globals. Under non-reentrant gradient checkpointing, which diffusers
uses, the captured tensors belong to the graph; the hooks are gone when the backward pass runs the
blocks again, so nothing is captured twice.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, field

import torch


@dataclass
class Captured:
    """Outputs of chosen layers, by layer name, in the order they were computed.

    Attributes:
        losses: by their own name, what the layers' methods reported (:attr:`Method.losses`).
    """

    attention: dict[str, list[torch.Tensor]] = field(default_factory=dict)
    features: dict[str, list[torch.Tensor]] = field(default_factory=dict)
    losses: dict[str, list[torch.Tensor]] = field(default_factory=dict)

    def attention_outputs(self) -> list[torch.Tensor]:
        """``[B, N, H * D]`` for each layer, the rows of both streams of a joint layer together."""
        return [torch.cat(parts, 1) for parts in self.attention.values()]

    def block_outputs(self) -> list[torch.Tensor]:
        """``[B, N, C]`` for each stream of each block."""
        return [x for parts in self.features.values() for x in parts]


def _tensors(out) -> list[torch.Tensor]:
    return [x for x in (out if isinstance(out, tuple) else (out,)) if torch.is_tensor(x)]


@contextlib.contextmanager
def capture(
    model: torch.nn.Module,
    attention: list[str] = (),
    features: list[str] = (),
    losses: list[str] = (),
):
    """Inside, the passes of ``model`` leave their outputs in the :class:`Captured` the block gets.

    Args:
        attention: attention modules whose output is wanted before its projection. That is what
            ``to_out`` gets (and ``to_add_out``, for the other stream); a module without a
            projection of its own returns it.
        features: attention modules whose surrounding block's output is wanted.
        losses: names of losses of the enabled method that are wanted, of all layers.
    """
    captured = Captured(losses={name: [] for name in losses})
    modules = dict(model.named_modules())
    handles = []

    def into(parts: list[torch.Tensor]):
        def before(module, args):
            parts.append(args[0])

        def after(module, args, out):
            parts.extend(_tensors(out))

        return before, after

    for name in attention:
        module = modules[name]
        before, after = into(captured.attention.setdefault(name, []))
        out = getattr(module, "to_out", None)
        if out is None or isinstance(out, torch.nn.Identity):
            handles.append(module.register_forward_hook(after))
            continue
        first = out[0] if isinstance(out, (torch.nn.ModuleList, torch.nn.Sequential)) else out
        handles.append(first.register_forward_pre_hook(before))
        added = getattr(module, "to_add_out", None)
        if added is not None:
            handles.append(added.register_forward_pre_hook(before))
    for name in features:
        _, after = into(captured.features.setdefault(name, []))
        handles.append(modules[name.rpartition(".")[0]].register_forward_hook(after))
    enabled, ended = model.__dict__.get("_dittfast"), False
    layers = [] if enabled is None or not losses else list(enabled.layers.values())

    def report(name: str, value: torch.Tensor) -> None:
        # Checkpointed blocks report again when they run again, with the pass that they belong to.
        if name in captured.losses and not ended:
            captured.losses[name].append(value)

    for layer in layers:
        layer.report = report
    try:
        yield captured
    finally:
        ended = True
        for handle in handles:
            handle.remove()
        for layer in layers:
            layer.report = None
