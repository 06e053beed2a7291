"""Where dittfast enters a model: scaled_dot_product_attention inside attention *modules*.

Each selected attention module gets a subclass of its own class whose ``__call__`` watches for
``scaled_dot_product_attention``. The model's processor keeps its projections, norms, RoPE and
output; only the attention call inside is replaced. Undoing it restores the class, so a disabled
model is the model it was.
"""

from __future__ import annotations

import contextlib
import copy
import copyreg
import functools
import inspect
import sys
import threading

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

from .compiled import attention, is_served
from .layer import LayerRun, answer
from .models import backend_of, stock_class
from .passes import LayerState

_SDPA = F.scaled_dot_product_attention
_SDPA_ARGUMENTS = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")


class intercept(TorchFunctionMode):
    """Inside, ``run`` answers scaled_dot_product_attention over its layout's tokens.

    Args:
        handle: stands for ``run`` in compiled code; None has it traced.
        streams: the hidden states of the layer's two streams, as :func:`hidden_sequence` takes
            them; None where nobody asks for them.

    Attributes:
        ran: whether the layer did its projections; caches skip them.
        reached: whether it met scaled_dot_product_attention on the whole sequence.
    """

    def __init__(
        self, run: LayerRun, handle: torch.Tensor | None = None, streams: tuple | None = None
    ):
        super().__init__()
        self.run = run
        self.handle = handle
        self.streams = streams
        self.shortcut = run.watched.shortcut
        self.ran = self.reached = False

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is _SDPA:
            call = {**dict(zip(_SDPA_ARGUMENTS, args)), **kwargs}
            if self.streams is not None:
                call["streams"] = self.streams
            if torch.compiler.is_compiling() and is_served(self.handle, call):
                return attention(self.run, self.handle, call)
            out = answer(self.run, call, func)
            if out is not None:
                if not torch.compiler.is_compiling():
                    self.reached = True
                return out
        elif func is F.linear:
            if not torch.compiler.is_compiling():
                self.ran = True
        elif self.shortcut is not None:
            out = self.shortcut(func, args, kwargs)
            if out is not None:
                return out
        if func is torch.Tensor.unflatten:
            # Dynamo of PyTorch 2.9 and 2.10 cannot trace the method while calls are watched.
            func = torch.unflatten
        return func(*args, **kwargs)


def _call(self, *args, **kwargs):
    state = self.__dict__.get("_dittfast")
    if state is None:  # a bound method that somebody kept from before disable
        return torch.nn.Module.__call__(self, *args, **kwargs)
    # Module.__call__ by name, not super(): Dynamo refuses the latter on classes that diffusers
    # allows in the graph.
    return _watch(self, state, torch.nn.Module.__call__, args, kwargs)


def _make_forward(cls: type):
    stock = cls.forward  # the function: Dynamo refuses classes that diffusers allows in the graph

    @functools.wraps(stock)
    def forward(self, *args, **kwargs):
        state = self.__dict__.get("_dittfast")
        if state is None or torch.compiler.is_compiling():
            return stock(self, *args, **kwargs)
        if state.watching:
            state.passes.note_current(sys._getframe())
            return stock(self, *args, **kwargs)
        # Called without __call__: by somebody's own checkpoint around it, for one.
        return _watch(self, state, stock, args, kwargs)

    return forward


def _watch(module: torch.nn.Module, state: LayerState, call, args: tuple, kwargs: dict):
    """``call(module, *args, **kwargs)``, in which the present pass answers attention."""
    compiling = torch.compiler.is_compiling()
    run = state.running
    if run is None:
        run = state.passes.needed(state.name)
    if not compiling:
        state.passes.note_current(sys._getframe())
        before, state.watching = state.watching, True
    try:
        if run.watched is None:
            with _others_wait(module):
                return call(module, *args, **kwargs)
        with (
            _watchable_backend(module, run) as own,
            intercept(run, state.handle, _streams(module, run, args, kwargs)) as seen,
        ):
            out = call(module, *args, **kwargs)
    finally:
        if not compiling:
            state.watching = before
    if not compiling:
        reached = seen.reached or (own is not None and own.reached)
        current = state.passes.current
        if current is not None:
            current.saw(state.name, seen.ran, reached)
        check_reached(run, seen.ran, reached, module)
    return out


def _streams(module: torch.nn.Module, run: LayerRun, args: tuple, kwargs: dict) -> tuple | None:
    """The hidden states among the arguments of an attention module, where ``run`` asks for them."""
    names = run.watched.hidden_states
    if names is None:
        return None
    given = {**dict(zip(type(module)._dittfast_arguments, args)), **kwargs}
    streams = (given.get(name) for name in names)
    return tuple(x[None] if x is not None and x.ndim == 2 else x for x in streams)


# diffusers keeps the attention backend on processors, which threads share: while one layer runs
# with another backend than the user's, no other layer of a model that is enabled may read it.
_SWITCHING = threading.RLock()


def native_backend():
    """The one of diffusers' attention backends that calls scaled_dot_product_attention."""
    from diffusers.models.attention_dispatch import AttentionBackendName

    return AttentionBackendName.NATIVE


def _bypasses(processor) -> bool:
    """Whether the user chose a backend that does not call scaled_dot_product_attention."""
    return backend_of(processor) != "native"


@contextlib.contextmanager
def _switched(processor):
    """Inside, ``processor`` runs the native backend; others see that this is not the user's."""
    compiling = torch.compiler.is_compiling()
    with contextlib.nullcontext() if compiling else _SWITCHING:
        before = processor._attention_backend
        processor._attention_backend = native_backend() if compiling else _stand_in(before)
        try:
            yield
        finally:
            processor._attention_backend = before


def _stand_in(users_own):
    """The native backend, with the one that it stands in for."""
    native = native_backend()
    name = str.__new__(type(native), native.value)
    name._name_, name._value_, name.users_own = native.name, native.value, users_own
    return name


def _others_wait(module: torch.nn.Module):
    """Around a layer that keeps the user's backend."""
    if torch.compiler.is_compiling() or not _bypasses(module.processor):
        return contextlib.nullcontext()
    return _SWITCHING


def _watchable_backend(module: torch.nn.Module, run: LayerRun):
    """Around a layer that is answered by dittfast: a backend that can be watched.

    The user's own choice stays for dense steps, dense layers and cross-attention.
    """
    processor = module.processor
    if getattr(processor, "_parallel_config", None) is not None:
        from . import parallel

        if parallel.context_parallel(module) is not None:
            return parallel.running(module, run)
    if not _bypasses(processor):
        return contextlib.nullcontext()
    return _switched(processor)


def check_reached(run: LayerRun, ran: bool, reached: bool, module: torch.nn.Module) -> None:
    """Raise if the call of ``module`` that just ended attended somewhere we did not see."""
    if reached or not ran or not run.watched.strict:
        return
    raise RuntimeError(
        f"{type(module).__name__} ran, and its processor {type(module.processor).__name__} called "
        "no scaled_dot_product_attention over the "
        f"{run.watched.num_tokens} tokens of the layout, so dittfast had no effect. Either the "
        "sequence has another length (pass layout= to dittfast.enable), or the processor computes "
        "attention by itself (transformer.set_default_attn_processor() puts the stock one back)"
    )


def _new(cls, *args, **kwargs):
    """Whoever calls the class of an enabled model gets a stock one: from_pretrained, for one."""
    stock = stock_class(cls)
    made = stock.__new__(stock)
    made.__init__(*args, **kwargs)
    return made


def _deepcopy(self, memo):
    twin = object.__new__(type(self))
    memo[id(self)] = twin
    twin.__dict__ = copy.deepcopy(self.__dict__, memo)
    return twin


def _reduce(self, protocol):
    """Pickle as the stock class: what loads the file need not have dittfast."""
    state = {k: v for k, v in self.__dict__.items() if k != "_dittfast"}
    return copyreg._reconstructor, (stock_class(type(self)), object, None), state


@functools.cache
def _subclass(cls: type, members: tuple) -> type:
    fields = {
        **{name: make(cls) if name == "forward" else make for name, make in members},
        "__new__": _new,
        "__deepcopy__": _deepcopy,
        "__reduce_ex__": _reduce,
        "__module__": cls.__module__,
        "__qualname__": cls.__qualname__,
        "_dittfast_stock": cls,
        "_dittfast_arguments": tuple(inspect.signature(cls.forward).parameters)[1:],
    }
    return type(cls.__name__, (cls,), fields)


def swap(module: torch.nn.Module, state, **members) -> None:
    """Put ``state`` on ``module`` and override ``members``; :func:`restore` undoes it.

    Without ``members`` the module becomes a watched attention layer. ``forward`` is given as a
    function that makes it from the class.
    """
    module._dittfast = state
    members = members or {"__call__": _call, "forward": _make_forward}
    module.__class__ = _subclass(type(module), tuple(members.items()))


def restore(module: torch.nn.Module) -> None:
    """Undo :func:`swap`."""
    module.__class__ = _without_swap(type(module))
    del module._dittfast


@functools.cache
def _without_swap(cls: type) -> type:
    """The class below a swapped one; of a class that FSDP2 put over one, the same over that."""
    if "_dittfast_stock" in cls.__dict__:
        return cls._dittfast_stock
    bases = tuple(
        _without_swap(base) if hasattr(base, "_dittfast_stock") else base for base in cls.__bases__
    )
    own = {k: v for k, v in cls.__dict__.items() if k not in ("__dict__", "__weakref__")}
    return type(cls)(cls.__name__, bases, own)


@contextlib.contextmanager
def put_back(model: torch.nn.Module, layers: dict[str, LayerState]):
    """Inside, the attention layers hold these states, whatever was enabled or disabled since."""
    undo = contextlib.ExitStack()
    with undo:
        for name, layer in layers.items():
            module = model.get_submodule(name)
            now = module.__dict__.get("_dittfast")
            if now is layer:
                continue
            if now is None:
                swap(module, layer)
                undo.callback(restore, module)
            else:
                module._dittfast = layer
                undo.callback(setattr, module, "_dittfast", now)
        yield
