"""The student: a pipeline's transformer with a method in it, and the teacher inside it.

Teacher and student share every weight that is not trained. The teacher's pass is the student's
with dense attention, adapters off, and the original values in the place of the trained ones.
"""

from __future__ import annotations

import contextlib
import copy

import torch

from dittfast.pipelines.adapter import enable, force_dense, method_parameters
from dittfast.pipelines.models import attention_layers, transformers_of
from dittfast.schedule import matching_layers

from .capture import capture
from .config import LossWeights, StudentConfig
from .lora import ADAPTER, add_lora
from .sharding import is_sharded, local, part, shard


def component_of(pipe, component: str) -> torch.nn.Module:
    """A transformer of the pipeline by its component name.

    Raises:
        ValueError: the pipeline has no such transformer.
    """
    models = transformers_of(pipe)
    if component not in models:
        raise ValueError(f"model.component must be one of {', '.join(models)}; got {component!r}")
    return models[component]


@contextlib.contextmanager
def without_adapters(model: torch.nn.Module):
    """Inside, PEFT layers run their base layer alone."""
    # Not model.disable_adapters(): that changes requires_grad, which DDP looks at.
    layers = [m for m in model.modules() if hasattr(m, "_disable_adapters")]
    before = [layer._disable_adapters for layer in layers]
    for layer in layers:
        layer._disable_adapters = True
    try:
        yield
    finally:
        for layer, value in zip(layers, before):
            layer._disable_adapters = value


class Student(torch.nn.Module):
    """A transformer with the method enabled, its trainable parameters, and its teacher.

    Args:
        pipe: the pipeline; dittfast is enabled on it.
        component: which of its transformers is trained.
        config: the method and what is trainable.
        objectives: which layers the losses look at.
        separate_teacher: give the teacher a transformer of its own.

    Attributes:
        transformer: the model; frozen but for what is trainable.
        layers: names of its self-attention modules.
        own: names of the method's trainable parameters.
        dtype: of the frozen weights.

    Raises:
        ValueError: nothing to train, or a layer that the model does not have.
    """

    def __init__(
        self,
        pipe,
        component: str,
        config: StudentConfig,
        objectives: LossWeights,
        separate_teacher: bool = False,
    ):
        super().__init__()
        method, schedule = config.resolved()
        model = component_of(pipe, component)
        self.dtype = model.dtype
        self.pipe = pipe
        self.component = component
        self.kind = config.trainable
        for m in pipe.components.values():
            if isinstance(m, torch.nn.Module):
                m.requires_grad_(False)
        # Kept in a list: the teacher is no part of what is trained, saved or synchronised.
        self._teacher = [copy.deepcopy(model).eval()] if separate_teacher else []
        self._running = [model]
        if config.trainable == "lora":
            add_lora(model, config.rank, config.alpha, config.targets, config.dropout)
        enable(pipe, method, schedule=schedule)
        if model._dittfast.assignment.needs_steps:
            raise ValueError(
                "rules for some denoising steps cannot be trained, because a training pass belongs "
                "to no step; leave steps out of student.options.rules"
            )
        self.transformer = model
        self._family = model._dittfast.family
        self.layers = list(attention_layers(model, self._family))
        self.attention_taps, self.feature_taps = self._taps(objectives)
        self.reported = self._reported(objectives)
        self.own, self._own = self._own_parameters()
        for name in self._model_names():
            p = model.get_parameter(name)
            p.data = p.data.float()
            p.requires_grad_(True)
        if not self.trainable():
            raise ValueError(
                f"student.trainable={config.trainable} leaves nothing to train: {method} has no "
                "parameters of its own; use attention, lora or all"
            )
        self.eval()
        for module in model.modules():
            if hasattr(module, "lora_dropout"):
                module.lora_dropout.train()
        # The teacher's values of what is trained; adapters and the method's own are off for it.
        self._original = {}
        if not separate_teacher and objectives.needs_teacher and config.trainable != "lora":
            self._original = {
                name: model.get_parameter(name).detach().clone() for name in self._model_names()
            }

    def _taps(self, objectives: LossWeights) -> tuple[list[str], list[str]]:
        """The layers whose attention, and whose blocks' output, the losses compare."""
        attention, features = [], []
        if objectives.attention:
            option = "objectives.attention_layers"
            attention = matching_layers(objectives.attention_layers, self.layers, option)
        if objectives.features:
            option = "objectives.feature_layers"
            features = matching_layers(objectives.feature_layers, self.layers, option)
        return attention, features

    def _reported(self, objectives: LossWeights) -> list[str]:
        """The losses that the method is to report."""
        state = self.transformer._dittfast
        there = {
            name
            for layer in state.sparse_layers
            for group in state.assignment.ever(layer)
            for name in group.method.losses
        }
        for name in objectives.reported:
            if name not in there:
                raise ValueError(
                    f"objectives.{name} has a weight, and {state.session.method.words()} has no "
                    "such loss; leave it out, or take a method that has"
                )
        return objectives.reported

    def _own_parameters(self) -> tuple[list[str], torch.nn.ParameterList]:
        """The method's parameters in layers that are not dense: dense ones never use theirs."""
        dense = tuple(f"{layer}." for layer in self.transformer._dittfast.dense_layers)
        prefix, own = f"{self.component}.", {}
        for full, p in method_parameters(self.pipe).items():
            if full.startswith(prefix):
                name = full.removeprefix(prefix)
                p.data = p.data.float()
                p.requires_grad_(not name.startswith(dense))
                if p.requires_grad:
                    own[name] = p
        return list(own), torch.nn.ParameterList(own.values())

    def _model_names(self) -> list[str]:
        names = [name for name, _ in self.transformer.named_parameters()]
        if self.kind == "attention":
            # As CLEAR: the text stream's own projections are left alone.
            return self._family.projection_weights(self.transformer, self.layers)
        if self.kind == "lora":
            return [name for name in names if f".{ADAPTER}." in name]
        return names if self.kind == "all" else []

    def trainable(self) -> dict[str, torch.nn.Parameter]:
        """The trained parameters by name, in a fixed order; fp32."""
        parameters = {name: self.transformer.get_parameter(name) for name in self._model_names()}
        return parameters | dict(zip(self.own, self._own))

    def shard(self, device: torch.device) -> None:
        """Spread the transformer over the processes (FSDP2), block by block.

        :meth:`trainable` gives other objects afterwards. The method's own parameters stay whole.
        """
        for p in self.trainable().values():  # a LoRA starts from each process's own random numbers
            torch.distributed.broadcast(p.detach(), 0)
        blocks = {layer.rpartition(".")[0] for layer in self.layers} - {""}
        shard(self.transformer, sorted(blocks, key=lambda name: (-name.count("."), name)), device)
        sharded = self.trainable()
        self._original = {n: part(x, sharded[n]).clone() for n, x in self._original.items()}

    @contextlib.contextmanager
    def as_teacher(self):
        """Inside, a forward pass is the frozen, dense teacher's, without gradients."""
        if self._teacher:
            self._running, before = self._teacher, self._running
            try:
                with torch.no_grad():
                    yield
            finally:
                self._running = before
            return
        with (
            torch.no_grad(),
            force_dense(self.pipe),
            without_adapters(self.transformer),
            swapped(self.trainable(), self._original),
        ):
            yield

    @contextlib.contextmanager
    def teacher_pipeline(self):
        """Inside, calls of the pipeline are the teacher's."""
        if not self._teacher:
            with self.as_teacher():
                yield
            return
        setattr(self.pipe, self.component, self._teacher[0])
        try:
            yield
        finally:
            setattr(self.pipe, self.component, self.transformer)

    def forward(self, arguments: dict):
        """``(prediction, attention outputs, block outputs, losses)`` of one pass.

        Args:
            arguments: the transformer's forward arguments.

        Returns:
            The prediction in the shape of ``hidden_states``, two lists with the outputs of the
            layers that the objectives look at, and what each layer reported, by the loss's name.
        """
        model, taps = self._running[0], (self.attention_taps, self.feature_taps)
        with capture(model, *taps, self.reported) as captured:
            out = model(**arguments, return_dict=False)[0]
        latents = arguments["hidden_states"]
        if out.shape[1] == 2 * latents.shape[1]:
            out = out.chunk(2, 1)[0]  # the other half is a learned variance
        outputs = captured.attention_outputs(), captured.block_outputs()
        return out, *outputs, captured.losses


@contextlib.contextmanager
def swapped(parameters: dict[str, torch.nn.Parameter], values: dict[str, torch.Tensor]):
    """Inside, parameters hold other values of the same dtype; ``values`` hold theirs.

    Of sharded parameters the values are those of this process's part.
    """

    def swap():
        for name, value in values.items():
            p = parameters[name]
            if is_sharded(p):  # in place: FSDP gathers from the storage it knows
                mine = local(p)
                values[name] = mine.clone()
                mine.copy_(value)
            else:
                p.data, values[name] = value, p.data
        # Inside of autocast: it keeps what it cast, and takes a parameter for what it was.
        torch.clear_autocast_cache()

    swap()
    try:
        yield
    finally:
        swap()
