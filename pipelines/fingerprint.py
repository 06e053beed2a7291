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
# Of values of a smaller dtype: half a step between neighbours, and rounding to bfloat16 before.
_SMALLER = {torch.float8_e4m3fn: 0.07, torch.float8_e5m2: 0.14}
# Between zero and its smallest normal number float8_e4m3fn has steps of 2^-9.
_NEAR_ZERO = 2.0**-10


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
            flat = _flat(value.detach())
            some = flat[:: max(1, flat.numel() // 64)][:64].double().cpu().numpy()
            digest.update(f"{component}.{name} {tuple(value.shape)}".encode() + some.tobytes())
    return digest.hexdigest()[:16]


def _flat(x: torch.Tensor) -> torch.Tensor:
    try:
        return x.flatten()
    except NotImplementedError:  # torchao's tensors
        return x.dequantize().flatten()


def base_parameters(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The model's own parameters by their stock names, without those of adapters in it."""
    return {
        name.replace(".base_layer.", "."): p
        for name, p in model.named_parameters()
        if ".lora_" not in name
    }


def is_quantised(p: torch.Tensor) -> bool:
    """Whether a parameter holds its values in a form of another library (torchao, GGUF ...)."""
    own = type(p.data) not in (torch.Tensor, torch.nn.Parameter) and not hasattr(p, "to_local")
    return own or not p.is_floating_point()


def _probed(p: torch.Tensor) -> tuple[list[float], float]:
    """A few values of a matrix, and how far rounding can have moved them.

    Raises:
        ValueError: its values cannot be read.
    """
    x = p.detach()
    if is_quantised(p):
        try:
            x = x.dequantize()
        except Exception as error:  # each kind has its own
            raise ValueError(f"{type(p.data).__name__} cannot be read") from error
    if x.device.type == "meta" or x.ndim != 2:
        raise ValueError("there are no values here")
    flat = x.reshape(-1)
    places = (torch.arange(_VALUES) * flat.numel() // _VALUES).to(flat.device)
    # One by one: PyTorch 2.9 indexes no float8 by a tensor.
    read = torch.stack([flat[place].float() for place in places.tolist()])
    values = [round(v, 8) for v in read.tolist()]
    size = max(abs(v) for v in values)
    moved = max(_SMALLER.get(x.dtype, _TOLERANCE) * size, _NEAR_ZERO * (x.dtype in _SMALLER))
    if is_quantised(p):
        # A row shares its steps: 127 of them from zero to its largest value in 8 bits, 7 in 4.
        steps = 7 if "4" in type(p.data).__name__ else 127
        rows = x.float().abs().amax(1)[places // x.shape[1]]
        moved = max(moved, float(rows.max()) / steps, 0.07 * size)
    return values, moved


def _shapes(parameters: Mapping[str, torch.Tensor]) -> str:
    shapes = "\n".join(f"{name} {list(p.shape)}" for name, p in sorted(parameters.items()))
    return hashlib.sha256(shapes.encode()).hexdigest()[:16]


def fingerprint(model: torch.nn.Module) -> dict:
    """Class, shapes, and a few values of a transformer's parameters; plain data."""
    parameters = base_parameters(model)
    large = sorted(name for name, p in parameters.items() if p.ndim == 2 and p.is_floating_point())
    probed = [large[i * len(large) // _PROBED] for i in range(_PROBED)] if large else []
    return {
        "class": stock_class(type(model)).__name__,
        "shapes": _shapes(parameters),
        "values": {name: _probed(parameters[name])[0] for name in dict.fromkeys(probed)},
    }


def difference(expected: dict, model: torch.nn.Module, changed: set[str] = frozenset()) -> str:
    """Why ``model`` is not the one that gave ``expected``; empty where it is.

    The weights may have been rounded to a smaller dtype since, or quantised.

    Args:
        changed: parameters that are known to have other values.
    """
    name = stock_class(type(model)).__name__
    if name != expected["class"]:
        return f"it is a {name}, not a {expected['class']}"
    parameters = base_parameters(model)
    quantised = sorted({type(p.data).__name__ for p in parameters.values() if is_quantised(p)})
    if _shapes(parameters) != expected["shapes"]:
        if quantised:
            return f"its weights are quantised ({', '.join(quantised)}) and cannot be compared"
        return f"its {name} has parameters of other shapes"
    for place, values in expected["values"].items():
        if place in changed or place not in parameters:
            continue
        try:
            actual, moved = _probed(parameters[place])
        except ValueError:
            kinds = ", ".join(quantised) or "not in memory"
            return f"its weights cannot be compared ({kinds})"
        size = max(abs(x) for x in values) if values else 0.0
        apart = max((abs(a - b) for a, b in zip(values, actual)), default=0.0)
        if not math.isfinite(apart) or apart > max(moved, _TOLERANCE * size):
            return f"its {place} has other values"
    return ""
