"""How a transformer's prediction answers to a method in one layer: by one more pass, with it.

What counts is where an error of attention leads, not its size: layers differ by factors, and their
errors cancel or help each other. So every answer is kept as a vector. Its sketch, random signs
summed in a few thousand buckets, has the same inner products up to a percent or two, at any size of
a model.
"""

from __future__ import annotations

import base64
import contextlib
from collections.abc import Callable, Mapping, Sequence

import torch

from dittfast.methods.base import Method

from ..adapter import enable
from ..guidance.plain import prediction_of
from ..layer import LayerRun
from ..models import transformers_of
from ..passes import Pass
from ..runs.run import run
from ..state import ModelState, device_of, dtype_of
from .earlier import Earlier

WIDTH = 4096
# What a record of one run with answers holds.
FORM = {"asked": str, "vectors": [str]}

# A step, and what layers run in it; all others are dense.
Trial = tuple[int, Mapping[str, Method]]


def sketch(x: torch.Tensor, width: int = WIDTH, seed: int = 0) -> torch.Tensor:
    """``[width]`` fp32: the values of ``x`` with random signs, summed in random buckets.

    Inner products of sketches are, up to ``|x| |y| / sqrt(width)`` or so, those of the tensors
    (Charikar, Chen and Farach-Colton 2002).
    """
    flat = x.detach().flatten().to("cpu", torch.float32)
    generator = torch.Generator("cpu").manual_seed(seed)
    bucket = torch.randint(width, flat.shape, generator=generator)
    sign = torch.randint(2, flat.shape, generator=generator) * 2 - 1
    return torch.zeros(width).index_add_(0, bucket, flat * sign)


def to_text(vector: torch.Tensor) -> str:
    """A vector in half precision, as text."""
    return base64.b64encode(vector.half().numpy().tobytes()).decode("ascii")


def from_text(text: str) -> torch.Tensor:
    """``[n]`` fp64.

    Raises:
        ValueError: no such text, or another length than a sketch's.
    """
    values = torch.frombuffer(bytearray(base64.b64decode(text, validate=True)), dtype=torch.float16)
    if len(values) != WIDTH:
        raise ValueError(f"a vector has {len(values)} values, not {WIDTH}")
    return values.double()


def _first_row(out) -> torch.Tensor:
    prediction = prediction_of(out)
    return prediction[0].float()


def answer(
    model: torch.nn.Module,
    state: ModelState,
    done: Pass,
    arguments: dict,
    out,
    methods: Mapping[str, Method],
    earlier: Earlier | None = None,
) -> torch.Tensor:
    """How far methods in some layers move a prediction, relative to its size; of the first row.

    Runs the transformer once more, from the first of these layers on where ``earlier`` has what
    the blocks before it gave.

    Args:
        model, state, done, arguments, out: a transformer that is enabled, and the dense pass that
            gave ``out``, as :class:`~dittfast.pipelines.state.Guidance` is told of it.
        methods: what layers run, by their names; all others are dense.
    """
    with contextlib.nullcontext() if earlier is None else earlier.reused(methods):
        moved = _first_row(_run(model, state, done, arguments, methods))
    before = _first_row(out)
    return (moved - before) / before.norm()


def _run(model, state: ModelState, done: Pass, arguments: dict, methods: Mapping[str, Method]):
    """The output of one more pass, dense but for the layers named."""
    given = done.sequences, device_of(arguments), dtype_of(arguments)
    runs = dict.fromkeys(done.runs, LayerRun())
    runs |= {name: LayerRun(state.core(method, *given)) for name, method in methods.items()}
    with state.passes.under_way(done.changed(runs)):
        return torch.nn.Module.__call__(model, **arguments)


class _Answers:
    """In the place of guidance: asks for answers at the first pass of some steps."""

    def __init__(
        self, trials: Sequence[tuple[int, Mapping[str, Method]]], told: Callable[[], None]
    ):
        self.trials, self.told = trials, told
        self.found: dict[int, torch.Tensor] = {}

    def describe(self) -> str:
        return "the answer to methods in single layers is measured"

    def guide(self, model, state: ModelState, done: Pass, arguments: dict, out):
        asked: dict[int, dict[str, Method]] = {}
        for number, (step, methods) in enumerate(self.trials):
            own = {name: method for name, method in methods.items() if name in state.layers}
            if step == done.step[0] and number not in self.found and own:
                asked[number] = own
        if asked:
            earlier = Earlier(model, lambda: _run(model, state, done, arguments, {}))
        for number, methods in asked.items():
            moved = answer(model, state, done, arguments, out, methods, earlier)
            self.found[number] = sketch(moved)
            self.told()
        return out


def answers(
    pipe,
    call: dict,
    seed: int,
    trials: Sequence[Trial],
    *,
    backend: str = "auto",
    on_pass: Callable[[], None] = lambda: None,
) -> list[torch.Tensor]:
    """For each of ``trials``, (step, methods by layer), how the prediction of that step answers.

    One dense run, with one more pass for each. Vectors are sketches, ``[WIDTH]`` fp32, relative to
    the size of the prediction.

    Raises:
        ValueError: as :func:`dittfast.enable`.
    """
    with enable(pipe, "dense", min_tokens=0, backend=backend), torch.no_grad():
        asked = []
        for model in transformers_of(pipe).values():
            model._dittfast.guidance = _Answers(trials, on_pass)
            asked.append(model._dittfast.guidance)
        run(pipe, call, seed)
    found = {number: x for one in asked for number, x in one.found.items()}
    return [found[number] for number in range(len(trials))]


def followed(
    answered: Sequence[torch.Tensor],
    band: Sequence[int],
    reference: torch.Tensor,
    drawn: torch.Tensor,
) -> torch.Tensor:
    """``[n, n]``: inner products of what trials do to the picture, a mean over prompts.

    How a moved prediction goes on to the picture is told by one trial in each band that was
    followed there: how long it became, and how much nearer to or farther from those of other bands.

    Args:
        answered: one prompt's answers each, ``[n, width]``.
        band: of each of the n.
        reference: ``[bands, width]``, the answers to the trials that were followed.
        drawn: ``[bands, bands]``, inner products of what these did to the picture.
    """
    band = torch.tensor(band, dtype=torch.long)
    answers, pictures = reference @ reference.T, drawn.double()
    length, far = answers.diagonal().sqrt(), pictures.diagonal().sqrt()
    near, together = answers / length.outer(length), pictures / far.outer(far)
    turned = _semidefinite((together / near.clamp(min=_LEAST_COSINE)).clamp(-1, 1))
    change = (far / length).outer(far / length) * turned
    mean = sum(x @ x.T for x in answered) / len(answered)
    return mean * change[band][:, band]


# Below this two answers have so little in common that their quotient says nothing.
_LEAST_COSINE = 0.2


def _semidefinite(matrix: torch.Tensor) -> torch.Tensor:
    """The nearest that inner products of vectors of length 1 can be."""
    values, vectors = torch.linalg.eigh((matrix + matrix.T) / 2)
    kept = vectors @ torch.diag(values.clamp(min=0)) @ vectors.T
    scale = kept.diagonal().sqrt()
    return kept / scale.outer(scale)
