"""Family by method: do tiny real models agree with themselves when dittfast is enabled?"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from dittfast.attention import choose_backend
from dittfast.methods import (
    SLA,
    VSA,
    Agent,
    Dense,
    Linear,
    Local,
    LogLinear,
    MixtureOfHeads,
    Neighborhood,
    Radial,
    Reattention,
    Rectified,
    Sol,
    TopK,
)
from dittfast.methods.base import Method
from dittfast.methods.head_guidance import HeadGuidance
from dittfast.plan import Plan

from ..adapter import enable
from ..description import describe
from ..families.tiny import TINY
from ..families.tiny_model import Tiny
from ..guidance.plain import guide
from ..models import known_family


@dataclass(frozen=True)
class Full(Method):
    """Dense attention as a plan of blocks: what the other methods keep all of."""

    name: ClassVar[str] = "full"
    needs_grid: ClassVar[bool] = False

    block_size: int = 16

    def plan(self, layout, q=None, k=None):
        weight = layout.kv_log_weight()
        return Plan.full(layout.num_tokens, block_size=self.block_size, kv_log_weight=weight)


@dataclass(frozen=True)
class ByFormula(Method):
    """A method that computes its own output, replaced by its formula."""

    name: ClassVar[str] = "by formula"
    needs_grid: ClassVar[bool] = False

    method: Method | None = None

    @property
    def needs_hidden_states(self):
        return self.method.needs_hidden_states

    def parameters(self, heads, head_dim, channels=None):
        return self.method.layer_parameters(heads, head_dim, channels)

    def attention(self, layout, q, k, v, call, **parameters):
        rows = torch.arange(q.shape[2], device=q.device)
        return self.method.formula(layout, q, k, v, rows, call, **parameters)

    def geometry(self, layout, device):
        return self.method.geometry(layout, device)

    def flops(self, layout, heads, head_dim):
        return self.method.flops(layout, heads, head_dim)


# Small blocks, so that even a hundred tokens have something to leave out.
METHODS: dict[str, Method] = {
    "full": Full(),
    "radial": Radial(block_size=4, decay_factor=0.2),
    "local": Local(window=3),
    "neighborhood": Neighborhood(window=2),
    "topk": TopK(block_size=8, topk=2),
    "log_linear": LogLinear(block_size=16, topk=2, levels=1),
    "rectified": Rectified(block_size=16, topk=2, top_p=0.1),
    "sol": Sol(block_size=16),
    "sla": SLA(TopK(block_size=8, topk=2)),
    "vsa": VSA(topk=2, cube=(2, 2, 4)),
    "reattention": Reattention(),
    "linear": Linear(),
    "agent": Agent(agents=(2, 3, 3), text_agents=2, trained=True),
    "mixture_of_heads": MixtureOfHeads(Dense(block_size=16), shared=0, routed=1),
}

# Weakened heads are no method: guidance runs beside any of them, here beside none and "full".
# Gradient checkpointing and torch.compile are neither; they run "local". Tracing takes longer than
# all else, so that column is run where it is asked for.
GUIDED, CHECKPOINTED, COMPILED = "guided", "checkpointed", "compiled"
COLUMNS = (*METHODS, GUIDED, CHECKPOINTED)


@dataclass(frozen=True)
class Cell:
    """One family under one method.

    Attributes:
        density: kept fraction of the token pairs; None for guidance, where nothing ran, and for a
            method that computes its own output.
        error: largest difference that should be none, relative to the largest output: of the full
            plan, and of a method that keeps values over a run, from the stock model, of a sparse
            one between the CPU backends and reference, of a method that computes its own output
            from its formula.
        noise: what eager attention loses by another order of its sums, in the same unit.
        change: how far the method moves the output from the stock model's.
        problem: what is wrong; None if nothing is.
        absent: whether diffusers has no such thing for this class, or it is broken there, or the
            method needs what the class does not have.
        work: FLOPs of attention as a fraction of dense.
    """

    family: str
    method: str
    density: float | None = None
    error: float = 0.0
    noise: float = 0.0
    change: float = 0.0
    problem: str | None = None
    absent: bool = False
    work: float | None = None

    @property
    def ok(self) -> bool:
        return self.problem is None


def output(model: torch.nn.Module, inputs: dict) -> torch.Tensor:
    """The prediction of one forward pass without gradients, flat."""
    with torch.no_grad():
        out = model(**inputs)
    out = out[0] if isinstance(out, tuple) else out
    parts = out if isinstance(out, list) else [out]
    return torch.cat([x.flatten() for x in parts])


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    """Largest difference, relative to the largest value of ``b``."""
    return float((a - b).abs().max() / b.abs().max())


def eager_noise(model: torch.nn.Module, inputs: dict, stock: torch.Tensor) -> float:
    """How far the stock model moves when PyTorch computes its attention another way."""
    with sdpa_kernel(SDPBackend.MATH):
        other = output(model, inputs)
    return max(distance(other, stock), 4 * torch.finfo(stock.dtype).eps)


def check(name: str, tiny: Tiny, methods: Iterable[str]) -> Iterator[Cell]:
    """The cells of one family. Every method starts from the stock model and must leave it so."""
    model, inputs = tiny.build()
    stock = output(model, inputs)
    noise = eager_noise(model, inputs, stock)
    cells = {GUIDED: _guided_cell, CHECKPOINTED: _checkpointed_cell, COMPILED: _compiled_cell}
    for method in methods:
        yield cells.get(method, _cell)(name, method, model, inputs, stock, noise)


def _cell(name, method, model, inputs, stock, noise) -> Cell:
    outputs, chosen = {}, METHODS[method]
    if chosen.needs_hidden_states and known_family(model).hidden_states is None:
        return Cell(name, method, absent=True)
    try:
        for backend in (*_cpu_backends(stock), "reference"):
            if backend == "reference" and chosen.computes:
                chosen = ByFormula(chosen)
            with enable(model, chosen, backend=backend, min_tokens=0):
                outputs[backend] = output(model, inputs)
                density, work = describe(model).amount
    except (ValueError, RuntimeError) as error:
        return Cell(name, method, problem=f"{type(error).__name__}: {error}")
    *ours, reference = outputs.values()
    error = max(distance(x, reference) for x in ours)
    change = distance(reference, stock)
    # What keeps values over a run is exact without one.
    exact = density == 1 or METHODS[method].remembers
    if exact:
        error, change = max(error, change), 0.0
    problem = None
    if not torch.equal(output(model, inputs), stock):
        problem = "disable did not restore the stock model"
    elif not error <= 8 * noise:
        problem = f"differs by {error:.1e} where eager attention loses {noise:.1e}"
    elif not exact and change <= 20 * noise:
        problem = f"the method changed nothing ({change:.1e})"
    return Cell(name, method, density, error, noise, change, problem, work=work)


def _cpu_backends(stock: torch.Tensor) -> list[str]:
    """The backend in plain PyTorch, and the native one where there is a compiler."""
    return list(dict.fromkeys(("cpu", choose_backend(stock.device, stock.dtype))))


def _guided_cell(name, method, model, inputs, stock, noise) -> Cell:
    """One head of the first layer weakened: the same beside stock attention and the full plan."""
    config = HeadGuidance(heads=((0, 0),), guidance_scale=1.0)
    try:
        with guide(model, config):
            alone = output(model, inputs)
        with enable(model, METHODS["full"], backend="cpu", min_tokens=0), guide(model, config):
            beside = output(model, inputs)
    except (ValueError, RuntimeError) as error:
        return Cell(name, method, problem=f"{type(error).__name__}: {error}")
    error, change = distance(beside, alone), distance(alone, stock)
    problem = None
    if not torch.equal(output(model, inputs), stock):
        problem = "unguide did not restore the stock model"
    elif not error <= 24 * noise:  # c + (c - p): three passes add up
        problem = f"differs by {error:.1e} where eager attention loses {noise:.1e}"
    elif change <= 20 * noise:
        problem = f"the weakened head changed nothing ({change:.1e})"
    return Cell(name, method, None, error, noise, change, problem)


def _gradients(model: torch.nn.Module, inputs: dict) -> torch.Tensor:
    """The gradients of all parameters, each scaled to its largest value, flat."""
    model.zero_grad()
    output = model(**inputs)[0]
    parts = output if isinstance(output, list) else [output]
    sum(x.float().square().mean() for x in parts).backward()
    grads = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
    return torch.cat([grad / grad.abs().max().clamp_min(1e-6) for grad in grads])


def _can_be_checkpointed(model: torch.nn.Module, inputs: dict) -> bool:
    """Whether the stock model's gradients stay what they are with diffusers' checkpointing.

    Chroma's single blocks lose their mask there, and HunyuanImage's get an argument too many.
    """
    if not getattr(model, "_supports_gradient_checkpointing", False):
        return False
    plain = _gradients(model, inputs)
    model.enable_gradient_checkpointing()
    try:
        return distance(_gradients(model, inputs), plain) <= 1e-4
    except TypeError:
        return False
    finally:
        model.disable_gradient_checkpointing()


def _checkpointed_cell(name, method, model, inputs, stock, noise) -> Cell:
    """Sparse gradients with the layers run again, and without: the same."""
    if not _can_be_checkpointed(model, inputs):
        return Cell(name, method, absent=True)
    try:
        with enable(model, METHODS["local"], backend="cpu", min_tokens=0):
            plain = _gradients(model, inputs)
            model.enable_gradient_checkpointing()
            again = _gradients(model, inputs)
            density = describe(model).density
    except (ValueError, RuntimeError) as error:
        return Cell(name, method, problem=f"{type(error).__name__}: {error}")
    finally:
        model.disable_gradient_checkpointing()
        model.zero_grad()
    error = distance(again, plain)
    problem = None
    if not error <= 1e-4:
        problem = f"gradients differ by {error:.1e}"
    elif not torch.equal(output(model, inputs), stock):
        problem = "disable did not restore the stock model"
    return Cell(name, method, density, error, noise, problem=problem)


def _compiled_cell(name, method, model, inputs, stock, noise) -> Cell:
    """A traced sparse pass and an eager one: the same."""
    try:
        with enable(model, METHODS["local"], backend="cpu", min_tokens=0):
            eager = output(model, inputs)
            torch._dynamo.reset()
            model.compile(backend="eager")
            traced = output(model, inputs)
            density = describe(model).density
    except Exception as error:  # whatever Dynamo raises
        return Cell(name, method, problem=f"{type(error).__name__}: {error}")
    finally:
        model._compiled_call_impl = None
        torch._dynamo.reset()
    error, change = distance(traced, eager), distance(traced, stock)
    problem = None
    if not error <= 8 * noise:
        problem = f"differs by {error:.1e} where eager attention loses {noise:.1e}"
    elif change <= 20 * noise:
        problem = f"the method changed nothing ({change:.1e})"
    return Cell(name, method, density, error, noise, change, problem)


def matrix(families: Iterable[str] = (), methods: Iterable[str] = ()) -> Iterator[Cell]:
    """The cells of the chosen families and methods, by default all of them but "compiled".

    Raises:
        ValueError: an unknown family or method; all known ones are named.
    """
    from dittfast.config import unknown

    families, methods = list(families) or list(TINY), list(methods) or list(COLUMNS)
    for kind, given, known in (
        ("family", families, TINY),
        ("method", methods, (*COLUMNS, COMPILED)),
    ):
        for value in given:
            if value not in known:
                raise unknown(kind, value, known)
    for name in families:
        yield from check(name, TINY[name], methods)


def text_of(cell: Cell) -> str:
    """What a table shows of a good cell: the density, FLOPs with an F, "yes" where neither is."""
    if not cell.ok:
        return "FAILED"
    if cell.absent:
        return "-"
    if cell.method not in METHODS:
        return "yes"
    return f"{cell.work:.2f} F" if cell.density is None else f"{cell.density:.2f}"
