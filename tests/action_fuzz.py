"""Random sequences of what people do to a pipeline, with dittfast and without it.

Two pipelines of one tiny model get the same actions; one of them gets dittfast's besides. Wherever
the method keeps everything both give the same, where it keeps a band the other one attends under
that band's mask, and where dittfast is off they agree to the bit.

    python tests/action_fuzz.py --seed 0 --count 1000 [--start 250] [--family wan]

A sequence that fails is made shorter as long as it fails, and printed as Python.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import functools
import logging
import random
import re
import sys
import tempfile
import traceback
import warnings
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from caches import CACHES, cache_config

import dittfast
from dittfast.layout import make_blocks
from dittfast.methods.base import Method
from dittfast.pipelines.measure.parity import TINY, Full, distance
from dittfast.plan import Plan

FAMILIES = ("flux", "wan", "sd3")
SIZES = ((6, 8), (8, 6), (5, 7))  # tokens; the first two have one count
FRAMES, TEXT, BLOCK = 2, 7, 16
NEAR = 5e-5  # of the largest value; rounding through a few layers and steps
SDPA = torch.nn.functional.scaled_dot_product_attention


@dataclass(frozen=True)
class Near(Method):
    """Blocks of 16 tokens, text or not, see themselves and the blocks beside them."""

    name: ClassVar[str] = "near"
    needs_grid: ClassVar[bool] = False

    def plan(self, layout, q=None, k=None, v=None):
        starts = np.arange(0, layout.num_tokens, BLOCK)
        lengths = np.minimum(BLOCK, layout.num_tokens - starts)
        blocks, at = make_blocks(starts, lengths), torch.arange(len(starts))
        return Plan.from_block_mask((at[:, None] - at).abs() <= 1, blocks, blocks)


class Masked(torch.overrides.TorchFunctionMode):
    """Stock attention over ``num_tokens`` tokens sees what :class:`Near` keeps."""

    def __init__(self, num_tokens):
        super().__init__()
        at = torch.arange(num_tokens) // BLOCK
        self.mask = (at[:, None] - at).abs() <= 1

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if func is SDPA:
            q, k = args[0] if args else kwargs["query"], args[1] if args else kwargs["key"]
            if q.shape[-2] == k.shape[-2] == len(self.mask):
                kwargs["attn_mask"] = self.mask
        return func(*args, **kwargs)


class Off(Exception):
    """The stock model itself refuses this action here."""


class Wrong(AssertionError):
    """dittfast made a difference."""


METHODS = {
    "full": lambda: Full(),
    "full-5": lambda: Full(block_size=5),
    "dense": lambda: "dense",
    "local-all": lambda: dittfast.methods.Local(window=100),
    "near": lambda: Near(),
}


class Pipe:
    """What matters of a pipeline: components, a scheduler, a loop with a cache's context."""

    do_classifier_free_guidance = False

    def __init__(self, transformer):
        from diffusers import FlowMatchEulerDiscreteScheduler

        self.transformer = transformer
        self.scheduler = FlowMatchEulerDiscreteScheduler()
        self.time = None

    @property
    def components(self):
        return {"transformer": self.transformer, "scheduler": self.scheduler}

    def __call__(self, arguments, steps, around):
        """Latents after some steps; ``around(step)`` is entered around every pass."""
        model, latents = self.transformer, arguments["hidden_states"]
        self.scheduler.set_timesteps(steps)
        if hasattr(self.scheduler, "set_begin_index"):
            self.scheduler.set_begin_index(0)
        context = getattr(model, "cache_context", lambda name: contextlib.nullcontext())
        like = arguments["timestep"]
        for step, time in enumerate(self.scheduler.timesteps):
            self.time = float(time)
            now = time.expand(like.shape).to(like.dtype) / (1 if like.max() > 1 else 1000)
            call = {**arguments, "hidden_states": latents, "timestep": now}
            with torch.no_grad(), around(step), context("cond"):
                out = model(**call)[0]
            latents = self.scheduler.step(out[:, : latents.shape[1]], time, latents).prev_sample
        if hasattr(model, "_reset_stateful_cache"):
            model._reset_stateful_cache()
        return latents


@functools.cache
def inputs(family, size):
    height, width = SIZES[size]
    generator = torch.Generator().manual_seed(size)
    draw = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    base = {k: v[:1] for k, v in TINY[family].build()[1].items() if torch.is_tensor(v)}
    base["return_dict"] = False
    if family == "flux":
        ids = torch.zeros(height, width, 3)
        ids[..., 1] += torch.arange(height)[:, None]
        ids[..., 2] += torch.arange(width)
        ids = dict(img_ids=ids.view(-1, 3), txt_ids=torch.zeros(TEXT, 3))
        return {**base, **ids, "hidden_states": draw(1, height * width, 16)}
    frames = (FRAMES,) if family == "wan" else ()
    return {**base, "hidden_states": draw(1, 4, *frames, 2 * height, 2 * width)}


def num_tokens(family, size):
    height, width = SIZES[size]
    return FRAMES * height * width if family == "wan" else height * width + TEXT


class World:
    """A pipeline with dittfast and its twin without, and what was done to both."""

    def __init__(self, family):
        self.family = family
        self.pipe, self.twin = Pipe(TINY[family].build()[0]), Pipe(TINY[family].build()[0])
        # What the process-wide choice of an attention backend does not reach.
        self.twin.transformer.set_attention_backend("native")
        self.flags = set()
        self.handles = []

    @property
    def models(self):
        return self.pipe.transformer, self.twin.transformer

    def both(self, action):
        """``action(pipe)`` on the twin first: what stock refuses is no fault of dittfast's."""
        try:
            action(self.twin)
        except Exception as error:
            raise Off(f"{type(error).__name__}: {error}") from error
        action(self.pipe)

    def description(self):
        """What ``describe`` says; None where dittfast is off."""
        try:
            return dittfast.describe(self.pipe)
        except ValueError as error:
            _expect(error, "not enabled")

    def compare(self, found, expected, exact, what):
        if not torch.isfinite(found).all():
            raise Wrong(f"{what}: not finite")
        if exact and not torch.equal(found, expected):
            raise Wrong(f"{what}: dittfast is off and {distance(found, expected):.1e} is left")
        if distance(found, expected) > NEAR:
            raise Wrong(f"{what}: off by {distance(found, expected):.1e}")

    def expectation(self, size):
        """How the twin is run: exactly or not, and its mode in sparse steps."""
        said = self.description()
        rough = {"flex", "compiled", "loaded"} & self.flags
        method = said.method.name if said else "dense"
        mode = Masked(num_tokens(self.family, size)) if method == "near" else None
        return method == "dense" and not rough, mode, said and said.schedule


def _expect(error, *words):
    for word in words:
        if not re.search(word, str(error)):
            raise Wrong(f"refused without {word!r}: {error}") from error


def _refusable(call, refused, *words):
    """What ``call`` gives. ``refused`` says whether it has to be (True, False) or may be (None);
    a refusal has all of ``words``.
    """
    try:
        found = call()
    except ValueError as error:
        if refused is False:
            raise
        _expect(error, *words)
    else:
        if refused:
            raise Wrong(f"accepted, though it has to be refused with {words}")
        return found


# dittfast's actions, on one of the two


def enable(world, method, dense_first_steps=0, dense_last_steps=0, dense_layers=()):
    steps = dict(dense_first_steps=dense_first_steps, dense_last_steps=dense_last_steps)
    options = dict(dense_layers=list(dense_layers), min_tokens=0, backend="cpu", **steps)
    on = world.description() is not None
    # On a guided pipeline it may compose or be refused.
    return _refusable(
        lambda: dittfast.enable(world.pipe, METHODS[method](), **options),
        None if "guided" in world.flags and on else on,
        "enabled|guide",
    )


def disable(world):
    found = _refusable(
        lambda: dittfast.disable(world.pipe), world.description() is None, "not enabled"
    )
    world.flags.discard("guided")
    return found


def guide(world, layer, head):
    """With strength 0: another pass in every call, and no difference."""
    options = dict(heads=[(layer, head)], strength=0.0, guidance_scale=2.0)
    _refusable(lambda: dittfast.guide(world.pipe, **options), "guided" in world.flags, "guided")
    world.flags.add("guided")


def unguide(world):
    _refusable(lambda: dittfast.unguide(world.pipe), "guided" not in world.flags, "not guided")
    world.flags.discard("guided")


def enter(world, kind, method="full"):
    """The ``with`` block of a handle, left by :func:`leave`."""
    handle = disable(world) if kind == "disable" else enable(world, method)
    if handle is not None:
        world.handles.append(handle.__enter__())


def leave(world):
    """Leave the innermost block; may be refused only where something is on meanwhile."""
    if world.handles:
        refused = None if world.description() else False
        _refusable(lambda: world.handles.pop().__exit__(None, None, None), refused, "enabled")
        said = world.description()
        if said is None or not any("guided" in note for note in said.notes):
            world.flags.discard("guided")
        else:
            world.flags.add("guided")


# Passes


def run_pass(world, size, mode="no_grad"):
    exact, mask, schedule = world.expectation(size)
    if schedule and schedule.dense_last_steps:
        return  # a pass outside of a pipeline belongs to no number of steps
    arguments = inputs(world.family, size)  # made outside of inference mode
    with getattr(torch, mode)():
        found = world.pipe.transformer(**arguments)[0]
        with mask or contextlib.nullcontext():
            expected = world.twin.transformer(**arguments)[0]
    if mask is None or not (schedule.dense_first_steps or schedule.dense_last_steps):
        world.compare(found, expected, exact, f"pass of size {size}")


def generate(world, size, steps=3):
    exact, mask, schedule = world.expectation(size)
    first = schedule.dense_first_steps if schedule else 0
    last = schedule.dense_last_steps if schedule else 0

    def around(step):
        sparse = mask is not None and first <= step < steps - last
        return mask if sparse else contextlib.nullcontext()

    found = world.pipe(inputs(world.family, size), steps, lambda step: contextlib.nullcontext())
    expected = world.twin(inputs(world.family, size), steps, around)
    world.compare(found, expected, exact, f"{steps} steps of size {size}")


def train(world, sizes, update=False):
    """One backward of one or two passes; both models take the twin's step."""
    exact, mask, schedule = world.expectation(sizes[0])
    if schedule and schedule.dense_last_steps:
        return  # a pass outside of a pipeline belongs to no number of steps
    exact = exact and "guided" not in world.flags  # a sum of one more term
    if mask is not None:
        if schedule.dense_first_steps or schedule.dense_last_steps:
            return
        sizes = sizes[:1]  # a mask has one size
    grads = []
    for model, mode in zip(world.models, (None, mask)):
        model.train()
        model.zero_grad()
        with mode or contextlib.nullcontext():
            calls = [model(**inputs(world.family, n))[0] for n in sizes]
            if not any(out.requires_grad for out in calls):
                return  # PEFT freezes the model, and leaves it frozen
            sum(out.square().mean() for out in calls).backward()
        grads.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
        model.eval()
    if grads[0].keys() != grads[1].keys():
        raise Wrong(f"gradients of {sorted(grads[0].keys() ^ grads[1].keys())[:3]}")
    scale = 1e-3 * max(float(x.abs().max()) for x in grads[1].values())
    for name, expected in grads[1].items():
        error = float((grads[0][name] - expected).abs().max())
        if error > (0 if exact else 20 * NEAR * max(scale, float(expected.abs().max()))):
            raise Wrong(f"gradient of {name}: off by {error:.1e}")
    if update:
        parameters = [dict(model.named_parameters()) for model in world.models]
        with torch.no_grad():
            for name, grad in grads[1].items():
                step = 0.1 * grad / (1e-12 + grad.abs().max())
                for found in parameters:
                    found[name].sub_(step * 0.01)
    for model in world.models:
        model.zero_grad()


# What people do besides, to both


def _lora(model, name, seed):
    from peft import LoraConfig

    config = LoraConfig(r=2, target_modules=["to_q", "to_k", "to_v"], init_lora_weights=False)
    model.add_adapter(config, adapter_name=name)
    generator = torch.Generator().manual_seed(seed)
    for key, parameter in model.named_parameters():
        if f"lora_A.{name}" in key or f"lora_B.{name}" in key:
            parameter.data = 0.2 * torch.randn(parameter.shape, generator=generator)


def lora_load(world, name):
    world.both(lambda pipe: _lora(pipe.transformer, name, len(name)))
    world.flags |= {"lora", name}


def lora_unload(world, name):
    world.both(lambda pipe: pipe.transformer.delete_adapters(name))
    world.flags.discard(name)
    if not {"one", "other"} & world.flags:
        world.flags.discard("lora")
        # The wrappers are left by peft; diffusers' pipelines take them away with the last one.
        world.both(lambda pipe: pipe.transformer.unload_lora())


def lora_set(world, names, weights):
    world.both(lambda pipe: pipe.transformer.set_adapters(list(names), list(weights)))


def lora_fuse(world, scale=1.0):
    world.both(lambda pipe: pipe.transformer.fuse_lora(lora_scale=scale))
    world.flags.add("fused-lora")


def lora_unfuse(world):
    world.both(lambda pipe: pipe.transformer.unfuse_lora())
    world.flags.discard("fused-lora")


def fuse_qkv(world):
    world.both(lambda pipe: pipe.transformer.fuse_qkv_projections())
    world.flags.add("qkv")


def unfuse_qkv(world):
    world.both(lambda pipe: pipe.transformer.unfuse_qkv_projections())
    world.flags.discard("qkv")


def compile_(world, blocks=True):
    """PyTorch's tracing without code generation; the twin stays as it is."""
    model = world.pipe.transformer
    if blocks and model._repeated_blocks:  # SD3 names none
        model.compile_repeated_blocks(backend="eager", fullgraph=True)
    else:
        model.compile(backend="eager")
    world.flags.add("compiled")


def cache_on(world, kind):
    world.both(
        lambda pipe: pipe.transformer.enable_cache(cache_config(kind, lambda: pipe.time, steps=3))
    )
    world.flags.add("cache")


def cache_off(world):
    world.both(lambda pipe: pipe.transformer.disable_cache())
    world.flags.discard("cache")


def offload(world, kind):
    """Group offloading, or accelerate's hooks on every module."""

    def act(pipe):
        if kind == "model":
            from accelerate import cpu_offload

            cpu_offload(pipe.transformer, execution_device="cpu")
        else:
            cpu = torch.device("cpu")
            pipe.transformer.enable_group_offload(
                cpu, cpu, offload_type=kind, num_blocks_per_group=1
            )

    world.both(act)
    world.flags.add("hooked")


def layerwise_casting(world):
    cast = dict(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    world.both(lambda pipe: pipe.transformer.enable_layerwise_casting(**cast))
    world.flags.add("frozen")


def quantise(world):
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    world.both(lambda pipe: quantize_(pipe.transformer, Int8WeightOnlyConfig()))
    world.flags.add("frozen")


def deepcopy(world):
    """Go on with copies; what the first pair was stays what it was."""
    was = world.pipe, world.twin
    world.pipe, world.twin = copy.deepcopy(world.pipe), copy.deepcopy(world.twin)
    run_pass(world, 0)
    now, (world.pipe, world.twin) = (world.pipe, world.twin), was
    run_pass(world, 0)
    world.pipe, world.twin = now


def save_and_load(world):
    """Files know nothing of dittfast; the loaded transformer takes the other's place."""
    for pipe in (world.pipe, world.twin):
        with tempfile.TemporaryDirectory() as folder:
            pipe.transformer.save_pretrained(folder)
            loaded = type(pipe.transformer).from_pretrained(folder).eval()
        if pipe is world.pipe and world.description() is not None:
            dittfast.disable(pipe)
        pipe.transformer = loaded
    world.twin.transformer.set_attention_backend("native")
    # Weights lie elsewhere in memory, which moves the last bit of a product.
    world.flags -= {"guided", "flex", "checkpointing"}
    world.flags.add("loaded")


def attention_backend(world, name):
    world.pipe.transformer.set_attention_backend(name)
    world.flags.discard("flex")
    if name != "native":
        world.flags.add("flex")


def checkpointing(world, on):
    name = "enable_gradient_checkpointing" if on else "disable_gradient_checkpointing"
    world.both(lambda pipe: getattr(pipe.transformer, name)())


# name: (action, flags that forbid it, flags it needs, arguments to choose from, weight)
_SIZE = dict(size=range(len(SIZES)))
_LAYERS = ((), (0,), (-1,), ("0-1",))
_STEPS = dict(dense_first_steps=(0, 0, 1, 2), dense_last_steps=(0, 0, 1))
ACTIONS = {
    "enable": (enable, (), (), dict(method=tuple(METHODS), **_STEPS), 6),
    "disable": (disable, (), (), {}, 3),
    "guide": (guide, ("cache",), (), dict(layer=(0, 1), head=(0, 1)), 2),
    "unguide": (unguide, (), (), {}, 1),
    "enter": (enter, (), (), dict(kind=("enable", "disable"), method=("full", "near")), 3),
    "leave": (leave, (), (), {}, 4),
    "run_pass": (run_pass, ("cache",), (), dict(**_SIZE, mode=("no_grad", "inference_mode")), 9),
    "generate": (generate, (), (), dict(**_SIZE, steps=(2, 3)), 5),
    "train": (
        train,
        ("cache", "hooked", "frozen", "flex", "qkv", "compiled"),
        (),
        dict(sizes=((0,), (1,), (0, 1), (2, 0)), update=(False, True)),
        5,
    ),
    "checkpointing": (checkpointing, ("compiled",), (), dict(on=(True, True, False)), 2),
    "lora_load": (
        lora_load,
        ("frozen", "hooked", "qkv", "cache", "compiled", "fused-lora"),
        (),
        dict(name=("one", "other")),
        3,
    ),
    "lora_unload": (
        lora_unload,
        ("fused-lora", "hooked"),
        ("lora",),
        dict(name=("one", "other")),
        2,
    ),
    "lora_set": (
        lora_set,
        ("fused-lora",),
        ("lora", "one", "other"),
        dict(names=(("one",), ("other",), ("one", "other")), weights=((0.5, 0.5), (1.0, -0.5))),
        1,
    ),
    "lora_fuse": (lora_fuse, ("fused-lora", "hooked"), ("lora",), dict(scale=(1.0, 0.5)), 2),
    "lora_unfuse": (lora_unfuse, ("hooked",), ("fused-lora",), {}, 2),
    "fuse_qkv": (fuse_qkv, ("qkv", "lora", "frozen", "hooked", "cache"), (), {}, 2),
    "unfuse_qkv": (unfuse_qkv, (), ("qkv",), {}, 1),
    "compile": (
        compile_,
        ("hooked", "cache", "frozen", "lora", "compiled", "checkpointing"),
        (),
        dict(blocks=(True, False)),
        1,
    ),
    "cache_on": (
        cache_on,
        ("cache", "hooked", "compiled", "guided", "qkv"),
        (),
        dict(kind=CACHES),
        3,
    ),
    "cache_off": (cache_off, (), ("cache",), {}, 2),
    "offload": (
        offload,
        ("hooked", "cache", "compiled", "frozen", "lora", "qkv"),
        (),
        dict(kind=("leaf_level", "block_level", "model")),
        1,
    ),
    "layerwise_casting": (
        layerwise_casting,
        ("frozen", "hooked", "cache", "compiled", "lora", "qkv"),
        (),
        {},
        1,
    ),
    "quantise": (quantise, ("frozen", "hooked", "cache", "compiled", "lora", "qkv"), (), {}, 1),
    "deepcopy": (deepcopy, ("cache", "hooked", "compiled", "frozen"), (), {}, 2),
    "save_and_load": (
        save_and_load,
        ("cache", "hooked", "compiled", "frozen", "lora", "qkv"),
        (),
        {},
        1,
    ),
    "attention_backend": (
        attention_backend,
        ("compiled",),
        (),
        dict(name=("flex", "_native_math", "native")),
        2,
    ),
}
# Tracing costs a second of every use.
SLOW = ("compile",)


def possible(world, name, arguments):
    _, forbidden, needed, _, _ = ACTIONS[name]
    if world.flags & set(forbidden) or not world.flags >= set(needed):
        return False
    if name == "lora_load":
        return arguments["name"] not in world.flags
    if name == "lora_unload":
        return arguments["name"] in world.flags
    if name == "lora_set":
        return world.flags >= set(arguments["names"])
    if name == "cache_on" and world.handles:
        return False  # leaving one may bring guidance back, whose passes a cache would count
    if name in ("cache_on", "cache_off"):
        return hasattr(world.twin.transformer, "enable_cache")
    if name in ("deepcopy", "save_and_load"):
        return not world.handles  # they would close over the pipeline that was
    return True


def sequence(seed, number, slow=True, families=FAMILIES):
    """The family and the actions of one number of one seed; few and quick ones without slow."""
    choose = random.Random(f"{seed} {number}")
    names = [name for name in ACTIONS if slow or name not in SLOW]
    weights = [ACTIONS[name][4] for name in names]
    family, actions = choose.choice(families), []
    for name in choose.choices(names, weights, k=choose.randint(5, 16 if slow else 9)):
        arguments = {k: choose.choice(list(v)) for k, v in ACTIONS[name][3].items()}
        if name == "enable" and arguments["method"] != "near":
            arguments["dense_layers"] = choose.choice(_LAYERS)
        actions.append((name, arguments))
    return family, actions


@contextlib.contextmanager
def _process_left_alone():
    from diffusers.models.attention_dispatch import _AttentionBackendRegistry as registry

    before, disabled = registry._active_backend, logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        registry._active_backend = before
        logging.disable(disabled)


def replay(family, actions):
    """Run actions; those that cannot be done where they stand are left out.

    Raises:
        Wrong: dittfast made a difference.
        Off: stock diffusers refused an action.
    """
    with _process_left_alone():
        world = World(family)
        for name, arguments in actions:
            if possible(world, name, arguments):
                ACTIONS[name][0](world, **arguments)
        while world.handles:
            leave(world)
        if world.description() is not None:
            disable(world)
        if "cache" in world.flags:
            generate(world, 0)
        else:
            for size in range(len(SIZES)):
                run_pass(world, size)


def failure(family, actions):
    """The error of a sequence of actions; None where all is well, or stock refuses."""
    try:
        replay(family, actions)
    except Off:
        return None
    except Exception as error:
        return error


def shrink(family, actions):
    """The shortest sequence found that fails alike, by leaving out ever smaller parts."""
    kind, size = type(failure(family, actions)), len(actions) // 2
    while size:
        start = 0
        while start < len(actions):
            shorter = actions[:start] + actions[start + size :]
            if type(failure(family, shorter)) is kind:
                actions = shorter
            else:
                start += size
        size //= 2
    return actions


def reproduction(family, actions):
    lines = "".join(f"    ({name!r}, {arguments!r}),\n" for name, arguments in actions)
    return f"from action_fuzz import replay\nreplay({family!r}, [\n{lines}])"


def check(seed, number, slow=True, families=FAMILIES):
    """One sequence. Returns whether stock went along to the end.

    Raises:
        Wrong: with the shortest reproduction found.
    """
    family, actions = sequence(seed, number, slow, families)
    try:
        replay(family, actions)
    except Off:
        return False
    except Exception:
        actions = shrink(family, actions)
        error = failure(family, actions)
        shown = "".join(traceback.format_exception(error)[-3:])
        raise Wrong(
            f"seed {seed}, number {number}: {type(error).__name__}: {error}\n"
            f"{reproduction(family, actions)}\n{shown}"
        ) from None
    return True


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--start", type=int, default=0, help="go on from this number")
    parser.add_argument("--family", choices=FAMILIES, action="append")
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    failed = left_out = 0
    for number in range(options.start, options.start + options.count):
        try:
            families = tuple(options.family or FAMILIES)
            left_out += not check(options.seed, number, not options.no_compile, families)
        except Wrong as error:
            failed += 1
            print(error, flush=True)
        torch._dynamo.reset()
        if number % 50 == 49:
            print(f"{number + 1}: {failed} failed, {left_out} refused by stock", flush=True)
    print(
        f"{options.count} sequences of seed {options.seed}: {failed} failed, "
        f"{left_out} refused by stock"
    )
    return failed > 0


if __name__ == "__main__":
    sys.exit(main())
