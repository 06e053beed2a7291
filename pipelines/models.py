"""What a transformer is: where a pipeline keeps it, its family, its attention layers."""

from __future__ import annotations

import dataclasses
import inspect
import re
from collections.abc import Callable
from typing import Any, Protocol, TypeAlias

import torch

from dittfast.layout import Layout

from .families import FAMILIES, Family
from .families.others import OTHERS
from .families.sequences import Sequences

LayoutReader = Callable[[torch.nn.Module, dict], Layout | Sequences]


class HasComponents(Protocol):
    """A pipeline of diffusers, plain or modular."""

    @property
    def components(self) -> dict[str, Any]:
        """Models and what else it is made of, by name."""


# What the public functions take: a pipeline, or its transformer alone.
Pipeline: TypeAlias = torch.nn.Module | HasComponents

# The layers of a described unknown model: all that are not told to be cross-attention.
_ANY = ".*"

# What wrappers put into the names of the modules they hold.
_WRAPPERS = re.compile(r"(?:^|(?<=\.))(?:_orig_mod|_checkpoint_wrapped_module)\.")


def stock_class(cls: type) -> type:
    """The model's own class, below those that dittfast and FSDP2 (fully_shard) put over it."""
    while True:
        if "_dittfast_stock" in cls.__dict__:
            cls = cls._dittfast_stock
        elif any(base.__name__ == "FSDPModule" for base in cls.__bases__):
            cls = next(base for base in cls.__bases__ if base.__name__ != "FSDPModule")
        else:
            return cls


def is_swapped(module: torch.nn.Module) -> bool:
    """Whether dittfast is enabled on this transformer, or on the transformer of this layer."""
    return hasattr(type(module), "_dittfast_stock") and "_dittfast" in module.__dict__


def unwrapped(module: torch.nn.Module) -> torch.nn.Module:
    """The module inside the wrappers of torch.compile, PEFT and data parallelism."""
    while True:
        if "_orig_mod" in module._modules:
            module = module._orig_mod
        elif callable(getattr(module, "get_base_model", None)):
            module = module.get_base_model()
        elif isinstance(module, (torch.nn.DataParallel, torch.nn.parallel.DistributedDataParallel)):
            module = module.module
        else:
            return module


def transformers_of(pipe: Pipeline) -> dict[str, torch.nn.Module]:
    """The diffusion transformers of a pipeline, or the model itself, by component name.

    Raises:
        ValueError: neither a pipeline with a transformer nor a module.
    """
    if isinstance(pipe, torch.nn.Module):
        return {"transformer": unwrapped(pipe)}
    components = getattr(pipe, "components", None)
    if not isinstance(components, dict):
        raise ValueError(
            f"expected a diffusers pipeline or a transformer, got {type(pipe).__name__}"
        )
    models = {
        name: unwrapped(module)
        for name, module in components.items()
        if isinstance(module, torch.nn.Module)
        and re.fullmatch(r"(unconditional_)?transformer(_\d+|_ref)?", name)
    }
    if not models:
        raise ValueError(f"{type(pipe).__name__} has no transformer; dittfast needs a DiT pipeline")
    return models


def execution_device(pipe: Pipeline) -> torch.device:
    """Where a pipeline computes: with offload not where its transformer's weights wait."""
    device = getattr(pipe, "_execution_device", None)
    return next(iter(transformers_of(pipe).values())).device if device is None else device


def exchanged(pipe: Pipeline) -> list[torch.nn.Module]:
    """Transformers that are enabled by a pipeline which no longer holds them."""
    try:
        mine = list(transformers_of(pipe).values())
    except ValueError:
        mine = []
    noted = [ref() for ref in getattr(pipe, "__dict__", {}).get("_dittfast_enabled", ())]
    return [
        model
        for model in noted
        if model is not None
        and is_swapped(model)
        and model._dittfast.session.pipe is pipe
        and not any(model is m for m in mine)
    ]


def known_family(model: torch.nn.Module) -> Family | None:
    """The family of a model's class; None where there is no entry."""
    return FAMILIES.get(stock_class(type(model)).__name__)


def family_of(model: torch.nn.Module, layout: Layout | LayoutReader | None = None) -> Family:
    """How a model is read: as its class is known, or by the layout given.

    Raises:
        ValueError: an unknown class without a layout, a class whose attention nothing can be
            left out of, or a layout that is neither a Layout nor a function.
    """
    known, name = known_family(model), stock_class(type(model)).__name__
    other = OTHERS.get(name)
    if other is not None and other.never:
        raise ValueError(f"{name} cannot be made sparse: it {other.why}")
    if layout is None:
        if known is None:
            why = "" if other is None else f": it {other.why}"
            raise ValueError(
                f"no layout reader for {name}{why}; known: {', '.join(sorted(FAMILIES))}. Pass "
                "layout=Layout.image(height, width, text=...) in tokens, or a function "
                "(model, forward_arguments) -> Layout"
            )
        return known
    if not isinstance(layout, Layout) and not callable(layout):
        raise ValueError(f"layout must be a Layout or a function, got {type(layout).__name__}")
    read = (lambda model, arguments: layout) if isinstance(layout, Layout) else layout
    if known:
        return dataclasses.replace(known, read=read, reads_values=())
    return Family(_ANY, read, strict=False)


def attention_layers(model: torch.nn.Module, family: Family) -> dict[str, torch.nn.Module]:
    """The self-attention modules of a model, in its own order."""
    return {
        name: module
        for name, module in model.named_modules()
        if callable(getattr(module, "processor", None))
        and re.fullmatch(family.layers, _WRAPPERS.sub("", name))
        and not (family.layers == _ANY and getattr(module, "is_cross_attention", False))
    }


def head_shape(family: Family, module: torch.nn.Module) -> tuple[int | None, int | None]:
    """Query heads of an attention module and the channels of one; None where it does not tell."""
    try:
        heads = family.num_heads(module)
        return heads, family.query_width(module) // heads
    except (AttributeError, ValueError):
        return None, None


def own_dtype(model: torch.nn.Module) -> torch.dtype:
    """The dtype that a method's own parameters get: the model's, fp32 where that is 8 bits."""
    kinds = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
    return next((p.dtype for p in model.parameters() if p.dtype in kinds), torch.float32)


def backend_of(processor) -> str:
    """The attention backend of diffusers that a processor runs on, by its name there."""
    if not hasattr(processor, "_attention_backend"):
        return "native"
    chosen = processor._attention_backend
    # While another thread runs the layer on a backend that can be watched, that holds the user's.
    chosen = getattr(chosen, "users_own", chosen)
    if chosen is None:
        from diffusers.models.attention_dispatch import _AttentionBackendRegistry

        chosen = _AttentionBackendRegistry.get_active_backend()[0]
    return str(getattr(chosen, "value", chosen))


def attention_backend(model: torch.nn.Module) -> str:
    """The attention backends that a transformer's processors run on; mostly one."""
    processors = getattr(model, "attn_processors", None) or {}
    return ", ".join(sorted({backend_of(x) for x in processors.values()})) or "native"


def bind_arguments(model: torch.nn.Module, args: tuple, kwargs: dict) -> dict:
    """The arguments of ``model.forward`` by name; absent ones are left out."""
    names = list(inspect.signature(stock_class(type(model)).forward).parameters)[1:]
    return {**dict(zip(names, args)), **kwargs}
