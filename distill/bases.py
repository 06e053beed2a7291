"""What a transformer that is to take an adapter may look like, checked before anything changes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch

from dittfast.pipelines.fingerprint import base_parameters, is_quantised

from .lora import ADAPTER, has_lora

_FIRST = "load the adapter first, and do that afterwards"


def fused_layers(model: torch.nn.Module) -> list[str]:
    """Attention modules whose projections are fused into one (``fuse_qkv_projections``)."""
    return [n for n, m in model.named_modules() if getattr(m, "fused_projections", False)]


def check_not_fused(model: torch.nn.Module, what: str) -> None:
    """Raise ValueError where to_q, to_k and to_v would be passed over."""
    fused = fused_layers(model)
    if fused:
        raise ValueError(
            f"{what}: the projections of {fused[0]} are fused, so its to_q, to_k and to_v are not "
            "used; call unfuse_qkv_projections() first"
        )


def check_not_added(
    model: torch.nn.Module, layers: Mapping[str, torch.nn.Module], what: str
) -> None:
    """Raise ValueError where diffusers' ``fuse_lora`` has added our LoRA to the weights.

    Args:
        layers: the LoRA's layers by name, whether they are in the model still or not.
    """
    added = _added(layers)
    if added and not has_lora(model):
        raise ValueError(
            f"{what}: its LoRA was added to the weights of {added[0]} by fuse_lora(), and "
            "unload_lora_weights() took away what could undo that; load the base model anew"
        )
    if added:
        raise ValueError(
            f"{what}: its LoRA was added to the weights of {added[0]} by fuse_lora(); call "
            "unfuse_lora() first"
        )


def check_has_lora(
    model: torch.nn.Module, layers: Mapping[str, torch.nn.Module], what: str
) -> None:
    """Raise ValueError where our LoRA was taken out, as ``unload_lora_weights`` does with all.

    Where it was added to the weights before, nothing is missing.
    """
    if not has_lora(model) and not _added(layers):
        raise ValueError(
            f"{what}: its LoRA was taken out of the {type(model).__name__} "
            "(unload_lora_weights() takes out all of them, delete_adapters(NAME) one); call "
            "dittfast.unload_adapter(pipe), and load_adapter to have it back"
        )


def _added(layers: Mapping[str, torch.nn.Module]) -> list[str]:
    return [name for name, layer in layers.items() if ADAPTER in layer.merged_adapters]


def check_base(model: torch.nn.Module, replaced: Iterable[str], touched: Iterable[str]) -> None:
    """Whether a transformer as it is now can take an adapter.

    Args:
        replaced: names of parameters that get other values.
        touched: names of modules or parameters that the adapter changes or adds to.

    Raises:
        ValueError: it cannot, or it would lose the values in silence.
    """
    touched = list(touched)
    if any(".to_" in name for name in touched):
        check_not_fused(model, "this adapter cannot be loaded")
    away = [name for name, p in model.named_parameters() if p.device.type == "meta"]
    if away:
        raise ValueError(
            f"the weights of this {type(model).__name__} are not in memory ({away[0]} is on the "
            f"meta device, as enable_sequential_cpu_offload leaves them); {_FIRST}"
        )
    if _offloaded_to_disk(model):
        raise ValueError(
            f"the weights of this {type(model).__name__} are kept in files (group offloading with "
            f"offload_to_disk_path), which would bring back the old values; {_FIRST}"
        )
    parameters = base_parameters(model)
    for name in replaced:
        p = parameters.get(name)
        if p is not None and is_quantised(p):
            raise ValueError(
                f"this adapter replaces {name}, which is quantised ({type(p.data).__name__}); "
                "load it into the model as it was published, and quantise afterwards"
            )


def check_mergeable(model: torch.nn.Module, layers: Iterable[torch.nn.Module]) -> None:
    """Raise ValueError where a LoRA cannot be added to the weights without loss."""
    check_not_fused(model, "the adapter cannot be merged")
    for layer in layers:
        weight = layer.base_layer.weight
        small = weight.is_floating_point() and weight.element_size() < 2
        if is_quantised(weight) or small:
            kind = type(weight.data).__name__ if is_quantised(weight) else str(weight.dtype)
            raise ValueError(
                f"the weights are kept as {kind.removeprefix('torch.')}, into which a LoRA cannot "
                "be merged without loss; merge before quantising or enable_layerwise_casting, or "
                "keep the adapter unmerged"
            )


def _offloaded_to_disk(model: torch.nn.Module) -> bool:
    for module in model.modules():
        hooks = getattr(module, "_diffusers_hook", None)
        hook = hooks and hooks.get_hook("group_offloading")
        if hook and getattr(hook.group, "offload_to_disk_path", None):
            return True
    return False
