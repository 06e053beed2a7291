"""A LoRA of our own in a transformer: put in whole or not at all, and taken out."""

from __future__ import annotations

import torch

ADAPTER = "dittfast"
# What PEFT and diffusers keep on a model that has adapters.
_MARKS = ("peft_config", "_hf_peft_config_loaded")


def lora_modules(model: torch.nn.Module, targets) -> dict[str, torch.nn.Module]:
    """The modules that a LoRA with these targets goes into, by their names in the stock model.

    Args:
        targets: the ends of module names, as PEFT takes them.
    """
    ends = tuple(f".{target}" for target in targets)
    modules = {}
    for name, module in model.named_modules():
        inside = ".lora_" in f".{name}." or name.endswith(".base_layer") or ".base_layer." in name
        if not inside and (name in targets or name.endswith(ends)):
            modules[name] = getattr(module, "base_layer", module)
    return modules


def lora_shapes(model: torch.nn.Module, rank: int, targets) -> dict[str, tuple[int, ...] | None]:
    """Shapes of the LoRA's tensors by their names in the model; None where PEFT alone knows."""
    shapes: dict[str, tuple[int, ...] | None] = {}
    for name, module in lora_modules(model, targets).items():
        down = up = None
        if isinstance(module, torch.nn.Linear):
            down, up = (rank, module.in_features), (module.out_features, rank)
        shapes[f"{name}.lora_A.{ADAPTER}.weight"] = down
        shapes[f"{name}.lora_B.{ADAPTER}.weight"] = up
    return shapes


def has_lora(model: torch.nn.Module) -> bool:
    """Whether a LoRA named "dittfast" is in a transformer."""
    return ADAPTER in (getattr(model, "peft_config", None) or {})


def lora_layers(model: torch.nn.Module) -> dict[str, torch.nn.Module]:
    """PEFT's layers that hold the LoRA named "dittfast", by their names in the model."""
    return {
        name: module
        for name, module in model.named_modules()
        if hasattr(module, "base_layer") and ADAPTER in getattr(module, "r", {})
    }


def compute_dtype(model: torch.nn.Module) -> torch.dtype | None:
    """In which dtype weights are used that diffusers keeps in a smaller one; None where it does
    not (``enable_layerwise_casting``)."""
    for module in model.modules():
        hooks = getattr(module, "_diffusers_hook", None)
        casting = hooks and hooks.get_hook("layerwise_casting")
        if casting:
            return casting.compute_dtype
    return None


def add_lora(model: torch.nn.Module, rank: int, alpha: float | None, targets, dropout=0.0) -> None:
    """Put a trainable LoRA named "dittfast" into a transformer, beside those that are active.

    Changes nothing if it must refuse. Over weights that are kept in a smaller dtype than they are
    used in, the LoRA has the dtype of their use.

    Raises:
        ValueError: PEFT is not installed, or no module has such a name.
    """
    try:
        from peft import LoraConfig
    except ImportError as error:
        raise ValueError(
            "student.trainable=lora needs PEFT: pip install 'dittfast[distill]'"
        ) from error
    if not lora_modules(model, targets):
        raise ValueError(
            f"no module of {type(model).__name__} is named {', '.join(targets)}; these are the "
            "LoRA's targets, ends of module names such as to_q"
        )
    config = LoraConfig(
        r=rank,
        lora_alpha=rank if alpha is None else alpha,
        target_modules=list(targets),
        lora_dropout=dropout,
        init_lora_weights=True,
    )
    before = {name: model.__dict__[name] for name in _MARKS if name in model.__dict__}
    others = dict(getattr(model, "peft_config", None) or {})
    trainable = {p: p.requires_grad for p in model.parameters()}
    active = model.active_adapters() if others else []
    try:
        model.add_adapter(config, adapter_name=ADAPTER)
        if active:
            model.set_adapter([*active, ADAPTER])
        _fit(model)
    except BaseException:
        _take_out(model)
        for name in _MARKS:
            model.__dict__.pop(name, None)
        model.__dict__.update(before)
        if others:
            model.peft_config = others
            model.set_adapter(active)
        for p, value in trainable.items():
            p.requires_grad_(value)
        raise


def _fit(model: torch.nn.Module) -> None:
    """What the new layers need where the model's own do not lie still."""
    from diffusers.hooks.group_offloading import _maybe_remove_and_reapply_group_offloading

    dtype = compute_dtype(model)
    for name, p in model.named_parameters():
        if f".{ADAPTER}." in name and dtype is not None:
            p.data = p.data.to(dtype)
    _maybe_remove_and_reapply_group_offloading(model)


def _take_out(model: torch.nn.Module) -> None:
    """Undo what PEFT did before it failed, layer by layer."""
    for name, module in lora_layers(model).items():
        if set(module.r) == {ADAPTER}:
            parent, _, own = name.rpartition(".")
            setattr(model.get_submodule(parent), own, module.base_layer)
        else:
            module.delete_adapter(ADAPTER)


def remove_lora(model: torch.nn.Module) -> None:
    """Take the LoRA named "dittfast" out; without another one nothing of PEFT is left."""
    model.delete_adapters(ADAPTER)
    if not getattr(model, "peft_config", None):
        model.unload_lora()
