"""Whether two models are the same, without comparing gigabytes.

:func:`weights_digest` tells a model from a retrained one, to the bit. :func:`fingerprint` and
:func:`difference` recognise a base model in another dtype, or with adapters in it.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping

import torch

from .models import stock_class

_PROBED = 24
_VALUES = 8
# bfloat16 keeps 8 bits; the same weights rounded twice differ by less.
_TOLERANCE = 2.0**-6


def weights_digest(modules: Mapping[str, object]) -> str:
    """A short hash of the modules' names and shapes, and of up to 64 values of every tensor.

    Args:
        modules: by name, such as a pipeline's ``components``; what is no module does not count.
    """
    digest = hashlib.sha256()
    for component, module in sorted(modules.items()):
        if not isinstance(module, torch.nn.Module):
            continue
        for name, value in sorted(module.state_dict().items()):
            flat = value.detach().flatten()
            some = flat[:: max(1, flat.numel() // 64)][:64].double().cpu().numpy()
            digest.update(f"{component}.{name} {tuple(value.shape)}".encode() + some.tobytes())
    return digest.hexdigest()[:16]


def base_parameters(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The model's own parameters by their stock names, without those of adapters in it."""
    return {
        name.replace(".base_layer.", "."): p
        for name, p in model.named_parameters()
        if ".lora_" not in name
    }


def fingerprint(model: torch.nn.Module) -> dict:
    """Class, shapes, and a few values of a transformer's parameters; plain data."""
    parameters = base_parameters(model)
    shapes = "\n".join(f"{name} {list(p.shape)}" for name, p in sorted(parameters.items()))
    large = sorted(name for name, p in parameters.items() if p.ndim == 2 and p.is_floating_point())
    probed = [large[i * len(large) // _PROBED] for i in range(_PROBED)] if large else []
    values = {}
    for name in dict.fromkeys(probed):
        flat = parameters[name].detach().reshape(-1)
        places = torch.arange(_VALUES) * flat.numel() // _VALUES
        values[name] = [round(x, 8) for x in flat[places.to(flat.device)].float().tolist()]
    return {
        "class": stock_class(type(model)).__name__,
        "shapes": hashlib.sha256(shapes.encode()).hexdigest()[:16],
        "values": values,
    }


def difference(expected: dict, model: torch.nn.Module, changed: set[str] = frozenset()) -> str:
    """Why ``model`` is not the one that gave ``expected``; empty where it is.

    Args:
        changed: parameters that are known to have other values.
    """
    found = fingerprint(model)
    if found["class"] != expected["class"]:
        return f"it is a {found['class']}, not a {expected['class']}"
    if found["shapes"] != expected["shapes"]:
        return f"its {found['class']} has parameters of other shapes"
    for name, values in expected["values"].items():
        if name in changed or name not in found["values"]:
            continue
        size = max(abs(x) for x in values)
        apart = max(abs(a - b) for a, b in zip(values, found["values"][name]))
        if not math.isfinite(apart) or apart > _TOLERANCE * size:
            return f"its {name} has other values"
    return ""
