"""Layers that run again in a backward pass run what their own pass ran, not the newest one.

The oracle never recomputes: every pass alone, without checkpointing, with a backward of its own.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import os
import socket
import subprocess
import threading
from pathlib import Path

import pytest
import torch
from interpreter import PYTHON
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

import dittfast
from dittfast.pipelines.adapter import force_dense
from dittfast.pipelines.measure.parity import METHODS, TINY

TESTS = Path(__file__).resolve().parent
MODELS = ("flux", "wan", "sd3")
SPARSE = ("local", "radial", "log_linear", "rectified")


def slow(*values):
    return pytest.param(*values, marks=pytest.mark.slow)


OFTEN = (("flux", "local"), ("wan", "radial"), ("sd3", "log_linear"), ("wan", "rectified"))
PAIRS = [x if x in OFTEN else slow(*x) for x in itertools.product(MODELS, SPARSE)]
FEW = [("flux", "local"), slow("wan", "rectified"), slow("sd3", "log_linear")]
OPTIONS = dict(backend="cpu", min_tokens=0)
# Token grids; the first two have one number of tokens, so that nothing but the values would differ.
GRIDS = ((6, 10), (10, 6), (7, 9), (5, 8))


def build(name):
    return TINY[name].build()[0]


def inputs(name, grid, seed=0):
    """Forward arguments with one batch row for a token grid of ``(height, width)``."""
    height, width = grid
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    base = {k: v[:1] for k, v in TINY[name].build()[1].items() if torch.is_tensor(v)}
    base["return_dict"] = False
    if name == "flux":
        ids = torch.zeros(height, width, 3)
        ids[..., 1] += torch.arange(height)[:, None]
        ids[..., 2] += torch.arange(width)
        ids = dict(img_ids=ids.view(-1, 3), txt_ids=torch.zeros(7, 3))
        return {**base, **ids, "hidden_states": draw(1, height * width, 16)}
    frames = (3,) if name == "wan" else ()
    return {**base, "hidden_states": draw(1, 4, *frames, 2 * height, 2 * width)}


def loss_of(model, arguments):
    return model(**arguments)[0].square().mean()


def gradients(model):
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def separately(model, passes, around=contextlib.nullcontext):
    """Gradients of all passes, each with its own backward, and the size of what was added."""
    total, sizes = {}, {}
    for arguments in passes:
        model.zero_grad()
        with around():
            loss_of(model, arguments).backward()
        for name, grad in gradients(model).items():
            total[name] = total.get(name, 0) + grad
            sizes[name] = sizes.get(name, 0) + float(grad.abs().max())
    model.zero_grad()
    return total, sizes


def assert_gradients(found, expected, factor=1.0):
    """Equal to a millionth of what went into each sum."""
    total, sizes = expected
    assert found.keys() == total.keys()
    floor = 1e-3 * max(sizes.values())
    worst = {
        name: float((found[name] - factor * total[name]).abs().max()) / max(sizes[name], floor)
        for name in total
    }
    name = max(worst, key=worst.get)
    assert worst[name] < 1e-6 * factor, f"{name} is off by {worst[name]:.1e}"


def _selective(module, *args):
    """Keeps the results of matrix products and recomputes the rest, attention too."""
    keep = [torch.ops.aten.mm.default, torch.ops.aten.addmm.default]
    contexts = functools.partial(create_selective_checkpoint_contexts, keep)
    return checkpoint(module.__call__, *args, use_reentrant=False, context_fn=contexts)


CHECKPOINTS = {
    "default": None,
    "non-reentrant": functools.partial(checkpoint, use_reentrant=False),
    "reentrant": functools.partial(checkpoint, use_reentrant=True),
    "selective": _selective,
}


def checkpoint_with(model, kind="default"):
    model.train()
    function = CHECKPOINTS[kind]
    if function is None:
        model.enable_gradient_checkpointing()
    else:
        model.enable_gradient_checkpointing(function)


def passes_of(name, count=4):
    return [inputs(name, grid, seed) for seed, grid in enumerate(GRIDS[:count])]


@pytest.mark.parametrize("name, method", PAIRS)
def test_several_passes_before_one_backward(name, method):
    model, passes = build(name), passes_of(name)
    with dittfast.enable(model, METHODS[method], **OPTIONS):
        expected = separately(model, passes)
        checkpoint_with(model)
        sum(loss_of(model, x) for x in passes).backward()
    assert_gradients(gradients(model), expected)


@pytest.mark.parametrize("kind", [k for k in CHECKPOINTS if k != "default"])
@pytest.mark.parametrize("name, method", FEW)
def test_every_kind_of_checkpoint(name, method, kind):
    model, passes = build(name), passes_of(name, 2)
    with dittfast.enable(model, METHODS[method], **OPTIONS):
        expected = separately(model, passes)
        checkpoint_with(model, kind)
        sum(loss_of(model, x) for x in passes).backward()
    assert_gradients(gradients(model), expected)


@pytest.mark.parametrize("method", ["local", "rectified"])
def test_checkpointing_switched_on_before_enable(method):
    model, passes = build("flux"), passes_of("flux", 2)
    with dittfast.enable(model, METHODS[method], **OPTIONS):
        expected = separately(model, passes)
    checkpoint_with(model)
    with dittfast.enable(model, METHODS[method], **OPTIONS):
        sum(loss_of(model, x) for x in passes).backward()
        assert_gradients(gradients(model), expected)
    # And it is diffusers' own again after it: dense passes, with diffusers' gradients.
    dense = separately(build("flux"), passes)
    model.zero_grad()
    sum(loss_of(model, x) for x in passes).backward()
    assert_gradients(gradients(model), dense)


@pytest.mark.parametrize("reentrant", [False, True], ids=["non-reentrant", "reentrant"])
@pytest.mark.parametrize("name, method", FEW)
def test_checkpoint_around_the_model(name, method, reentrant):
    """PyTorch's own checkpoint runs the whole transformer again."""
    model, passes = build(name), passes_of(name, 3)
    with dittfast.enable(model, METHODS[method], **OPTIONS):
        expected = separately(model, passes)

        def run(latents, arguments):
            return loss_of(model, {**arguments, "hidden_states": latents})

        losses = []
        for arguments in passes:
            latents = arguments["hidden_states"].clone().requires_grad_()
            losses.append(checkpoint(run, latents, arguments, use_reentrant=reentrant))
        sum(losses).backward()
    assert_gradients(gradients(model), expected)


def blocks_of(model):
    lists = [x for x in model.children() if isinstance(x, torch.nn.ModuleList)]
    return [block for blocks in lists for block in blocks]


@pytest.mark.parametrize("name, method", FEW)
def test_checkpoint_around_blocks(name, method):
    """As training code does to models that know no checkpointing: each block's forward."""
    model, passes = build(name), passes_of(name, 3)
    with dittfast.enable(model, METHODS[method], **OPTIONS):
        expected = separately(model, passes)
        for block in blocks_of(model):
            block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False)
        sum(loss_of(model, x) for x in passes).backward()
    assert_gradients(gradients(model), expected)


def test_checkpoint_around_attention():
    """Attention modules alone, inside blocks that are not recomputed."""
    model, passes = build("flux"), passes_of("flux", 3)
    with dittfast.enable(model, METHODS["local"], **OPTIONS):
        expected = separately(model, passes)
        for block in blocks_of(model):
            inner = block.attn.forward
            block.attn.forward = functools.partial(checkpoint, inner, use_reentrant=False)
        sum(loss_of(model, x) for x in passes).backward()
    assert_gradients(gradients(model), expected)


def _wrap_blocks(model):
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
        apply_activation_checkpointing,
    )

    kinds = tuple({type(block) for block in blocks_of(model)})
    apply_activation_checkpointing(model, check_fn=lambda module: isinstance(module, kinds))


def _plain_names(grads):
    return {name.replace("_checkpoint_wrapped_module.", ""): x for name, x in grads.items()}


@pytest.mark.parametrize("name, method", [("flux", "rectified"), ("wan", "local")])
def test_checkpoint_wrapper_after_enable(name, method):
    model, passes = build(name), passes_of(name, 2)
    with dittfast.enable(model, METHODS[method], **OPTIONS):
        expected = separately(model, passes)
        _wrap_blocks(model)
        sum(loss_of(model, x) for x in passes).backward()
        assert_gradients(_plain_names(gradients(model)), expected)
    dense = separately(build(name), passes)
    model.zero_grad()
    sum(loss_of(model, x) for x in passes).backward()
    assert_gradients(_plain_names(gradients(model)), dense)


def test_checkpoint_wrapper_before_enable():
    """Its extra name inside each block's path is not the model's."""
    model, passes = build("flux"), passes_of("flux", 2)
    with dittfast.enable(model, METHODS["local"], **OPTIONS):
        expected = separately(model, passes)
    _wrap_blocks(model)
    with dittfast.enable(model, METHODS["local"], **OPTIONS):
        sum(loss_of(model, x) for x in passes).backward()
    assert_gradients(_plain_names(gradients(model)), expected)


def _draw(model, grid_inputs, mode):
    with mode():
        return model(**grid_inputs)[0]


@contextlib.contextmanager
def _disabled(model):
    with dittfast.disable(model):
        yield


BETWEEN = {
    "no_grad": lambda model, x: _draw(model, x, torch.no_grad),
    "inference": lambda model, x: _draw(model, x, torch.inference_mode),
    "evaluation": lambda model, x: (model.eval(), _draw(model, x, torch.no_grad), model.train()),
}


@pytest.mark.parametrize("between", BETWEEN)
@pytest.mark.parametrize("method", [slow("log_linear"), "local"])
def test_a_drawing_between_the_passes_and_the_backward(method, between):
    model, passes = build("flux"), passes_of("flux", 3)
    with dittfast.enable(model, METHODS[method], **OPTIONS):
        expected = separately(model, passes[:2])
        checkpoint_with(model)
        first = loss_of(model, passes[0])
        BETWEEN[between](model, passes[2])
        second = loss_of(model, passes[1])
        BETWEEN[between](model, passes[2])
        (first + second).backward()
    assert_gradients(gradients(model), expected)


@pytest.mark.parametrize("kind", ["default", "reentrant"])
@pytest.mark.parametrize("inside", [force_dense, _disabled], ids=["force_dense", "disable"])
@pytest.mark.parametrize("name, method", [("flux", "local"), slow("wan", "rectified")])
def test_a_dense_pass_among_sparse_ones(name, method, inside, kind):
    """Distillation's teacher pass: dense, between two sparse ones, before one backward."""
    model, passes = build(name), passes_of(name, 3)
    with dittfast.enable(model, METHODS[method], **OPTIONS):
        total, sizes = separately(model, [passes[0], passes[2]])
        dense, dense_sizes = separately(model, passes[1:2], lambda: inside(model))
        for key in total:
            total[key] = total[key] + dense[key]
            sizes[key] += dense_sizes[key]
        checkpoint_with(model, kind)
        losses = [loss_of(model, passes[0])]
        with inside(model):
            losses.append(loss_of(model, passes[1]))
        losses.append(loss_of(model, passes[2]))
        sum(losses).backward()
    assert_gradients(gradients(model), (total, sizes))


def test_dense_steps_among_sparse_ones():
    """A bare model counts its steps by the timestep; recomputing a step counts none."""
    model, passes = build("flux"), passes_of("flux", 4)
    for arguments, time in zip(passes, (1.0, 0.7, 0.4, 0.1)):
        arguments["timestep"] = torch.tensor([time])
    with dittfast.enable(model, METHODS["local"], dense_first_steps=2, **OPTIONS):
        expected = separately(model, passes)
        checkpoint_with(model)
        sum(loss_of(model, x) for x in passes).backward()
        assert_gradients(gradients(model), expected)
        model.zero_grad()
        sum(loss_of(model, x) for x in passes).backward()
        assert_gradients(gradients(model), expected)
    sparse_only = build("flux")
    with dittfast.enable(sparse_only, METHODS["local"], **OPTIONS), pytest.raises(AssertionError):
        assert_gradients(separately(sparse_only, passes)[0], expected)


def test_the_method_is_gone_before_the_backward():
    """Passes were sparse when they ran, so their backward is, after disable and another enable."""
    model, passes = build("flux"), passes_of("flux", 3)
    with dittfast.enable(model, METHODS["local"], **OPTIONS):
        expected = separately(model, passes[:2])
        checkpoint_with(model)
        losses = [loss_of(model, x) for x in passes[:2]]
    sum(losses).backward()
    assert_gradients(gradients(model), expected)
    model.zero_grad()
    with dittfast.enable(model, METHODS["local"], **OPTIONS):
        losses = [loss_of(model, x) for x in passes[:2]]
    with dittfast.enable(model, METHODS["rectified"], **OPTIONS):
        _draw(model, passes[2], torch.no_grad)
        sum(losses).backward()
    assert_gradients(gradients(model), expected)


def test_enabled_between_a_pass_and_its_backward():
    """A dense pass from before enable is recomputed dense."""
    model, passes = build("flux"), passes_of("flux", 2)
    expected = separately(model, passes)
    checkpoint_with(model)
    losses = [loss_of(model, x) for x in passes]
    with dittfast.enable(model, METHODS["local"], **OPTIONS):
        _draw(model, passes[0], torch.no_grad)
        sum(losses).backward()
    assert_gradients(gradients(model), expected)


@pytest.mark.parametrize("kind", ["none", "default"])
def test_a_second_backward(kind):
    """retain_graph keeps a graph over other passes; its second backward equals the first."""
    model, passes = build("flux"), passes_of("flux", 3)
    with dittfast.enable(model, METHODS["local"], **OPTIONS):
        expected = separately(model, passes[:2])
        if kind != "none":
            checkpoint_with(model, kind)
        loss = sum(loss_of(model, x) for x in passes[:2])
        loss.backward(retain_graph=True)
        assert_gradients(gradients(model), expected)
        _draw(model, passes[2], torch.no_grad)
        model.zero_grad()
        loss.backward()
    assert_gradients(gradients(model), expected)


@pytest.mark.parametrize("kind", ["default", "reentrant"])
@pytest.mark.parametrize("name, method", FEW)
def test_backward_in_another_thread(name, method, kind):
    """The pass is taken along by the graph, not by the thread; here another one draws meanwhile."""
    model, passes = build(name), passes_of(name, 3)
    with dittfast.enable(model, METHODS[method], **OPTIONS):
        expected = separately(model, passes[:2])
        checkpoint_with(model, kind)
        loss = sum(loss_of(model, x) for x in passes[:2])
        errors = []

        def backward():
            try:
                loss.backward()
            except Exception as error:
                errors.append(error)

        thread = threading.Thread(target=backward)
        thread.start()
        while thread.is_alive():
            _draw(model, passes[2], torch.no_grad)
        thread.join()
    assert errors == []
    assert_gradients(gradients(model), expected)


@pytest.mark.parametrize("name, method", PAIRS)
def test_training_after_a_drawing_in_inference_mode(name, method):
    """A validation picture leaves nothing that a backward may not touch."""
    model, (arguments, other) = build(name), passes_of(name, 2)
    with dittfast.enable(model, METHODS[method], **OPTIONS):
        expected = separately(model, [arguments, other])
    with dittfast.enable(model, METHODS[method], **OPTIONS):
        _draw(model, arguments, torch.inference_mode)
        sum(loss_of(model, x) for x in (arguments, other)).backward()
        assert_gradients(gradients(model), expected)
        _draw(model, other, torch.inference_mode)


def test_training_after_guidance_in_inference_mode():
    model, (arguments,) = build("flux"), passes_of("flux", 1)
    guidance = dict(heads=[(0, 1)], guidance_scale=2.0, rows="diagonal")
    with dittfast.enable(model, METHODS["local"], **OPTIONS), dittfast.guide(model, **guidance):
        expected = separately(model, [arguments])
    with dittfast.enable(model, METHODS["local"], **OPTIONS), dittfast.guide(model, **guidance):
        _draw(model, arguments, torch.inference_mode)
        loss_of(model, arguments).backward()
    assert_gradients(gradients(model), expected)


@pytest.mark.parametrize("rows", ["image", "diagonal"])
def test_guided_passes_are_recomputed_as_they_ran(rows):
    """The weakened pass is recomputed weak, the plain one plain."""
    model, passes = build("flux"), passes_of("flux", 2)
    guidance = dict(heads=[(0, 1), (1, 0)], guidance_scale=2.0, rows=rows)
    with dittfast.enable(model, METHODS["local"], **OPTIONS), dittfast.guide(model, **guidance):
        expected = separately(model, passes)
        checkpoint_with(model)
        sum(loss_of(model, x) for x in passes).backward()
    assert_gradients(gradients(model), expected)


def test_trainable_parameters_of_a_method_are_recomputed():
    """Gradients of parameters that the method itself added, from two grids."""
    from dittfast.pipelines.adapter import method_parameters

    model, passes = build("flux"), [inputs("flux", grid) for grid in ((6, 10), (10, 6))]
    method = dittfast.methods.Local(window=3, downsample=2)
    with dittfast.enable(model, method, **OPTIONS):
        own = method_parameters(model)
        expected = {}
        for arguments in passes:
            for name, grad in zip(
                own, torch.autograd.grad(loss_of(model, arguments), own.values())
            ):
                expected[name] = expected.get(name, 0) + grad
        checkpoint_with(model)
        for parameter in own.values():
            parameter.grad = None
        sum(loss_of(model, x) for x in passes).backward()
        for name, parameter in own.items():
            torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-6, atol=1e-8)


@pytest.mark.slow
@pytest.mark.parametrize("order", ["enable-first", "shard-first"])
def test_two_processes_under_fsdp(order):
    """Sharded weights, checkpointing and two grids before one backward give one process's sums."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    paths = [str(TESTS.parent), str(TESTS)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    script = str(TESTS / "recomputation_worker.py")
    ranks = [
        subprocess.Popen(
            [*PYTHON, script, str(rank), str(port), order],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        shown = [process.communicate(timeout=600)[0] for process in ranks]
    finally:
        for process in ranks:
            process.kill()
    assert [process.returncode for process in ranks] == [0, 0], shown[0][-3000:]
    assert shown[0].count("RESULT") == 6, shown[0][-3000:]
