"""Which pipeline runs: found per pass, in every thread, cheaply, and nothing is kept alive."""

from __future__ import annotations

import copy
import gc
import logging
import sys
import threading
import time
import weakref

import pytest
import tiny
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler
from test_steps_table import Seen

import dittfast
from dittfast.pipelines.running import running, running_pipeline
from dittfast.pipelines.steps import Steps, place_in, user_step


class Loop:
    """What a pipeline is at least: a transformer, a scheduler, and a loop."""

    def __init__(self, transformer, scheduler=None):
        self.transformer = transformer
        self.scheduler = scheduler or FlowMatchEulerDiscreteScheduler()
        self.inputs = tiny.flux_inputs(height=4, width=4, batch=1)

    @property
    def components(self):
        return {"transformer": self.transformer, "scheduler": self.scheduler}

    def __call__(self, steps=6, stop=None):
        self.scheduler.set_timesteps(steps)
        x = self.inputs["hidden_states"]
        for i, t in enumerate(self.scheduler.timesteps):
            x = self.step(t, x)
            if i == stop:
                return

    def step(self, t, x):
        with torch.no_grad():
            v = self.transformer(**{**self.inputs, "hidden_states": x, "timestep": t[None] / 1000})
        return self.scheduler.step(v[0], t, x).prev_sample


class Numbers(Loop):
    """Its loop goes over numbers, which are no view of anything."""

    def step(self, t, x):
        return super().step(float(t), x)

    def __call__(self, steps=6):
        self.scheduler.set_timesteps(steps)
        x = self.inputs["hidden_states"]
        for number in self.scheduler.timesteps.tolist():
            time = torch.tensor([number / 1000])
            with torch.no_grad():
                v = self.transformer(**{**self.inputs, "hidden_states": x, "timestep": time})[0]
            x = self.scheduler.step(v, number, x).prev_sample


def enabled_flags(pipe, calls, **schedule):
    """The letters of each of ``calls`` while dittfast stays enabled on ``pipe``."""
    method = Seen()
    hook = pipe.transformer.register_forward_pre_hook(lambda *_: method.flags.append("D"))
    found = []
    with dittfast.enable(pipe, method, backend="reference", min_tokens=0, **schedule):
        for call in calls:
            del method.flags[:]
            call()
            found.append("".join(method.flags))
    hook.remove()
    return found


def test_a_second_pipeline_counts_its_own_steps():
    model = tiny.flux_transformer()
    first, second = Loop(model), Loop(model)
    calls = [first, second, lambda: second(4), first]
    assert enabled_flags(first, calls, dense_first_steps=2) == [
        "DDssss", "DDssss", "DDss", "DDssss"
    ]  # fmt: skip
    assert enabled_flags(first, calls, dense_last_steps=2) == [
        "ssssDD", "ssssDD", "ssDD", "ssssDD"
    ]  # fmt: skip


def test_a_transformer_enabled_alone_counts_the_steps_of_its_pipelines():
    model = tiny.flux_transformer()
    pipe, method = Loop(model), Seen()
    hook = model.register_forward_pre_hook(lambda *_: method.flags.append("D"))
    with dittfast.enable(model, method, backend="reference", min_tokens=0, dense_last_steps=2):
        pipe()
    hook.remove()
    assert "".join(method.flags) == "ssssDD"


@pytest.mark.parametrize("scheduler", [FlowMatchEulerDiscreteScheduler, DDIMScheduler])
def test_a_loop_over_numbers(scheduler):
    """Counted by the scheduler, or by the timestep where it has no counter."""
    pipe = Numbers(tiny.flux_transformer(), scheduler())
    calls = [pipe, lambda: pipe(4), pipe]
    found = enabled_flags(pipe, calls, dense_first_steps=2, dense_last_steps=1)
    assert found == ["DDsssD", "DDsD", "DDsssD"]


def test_a_pipeline_behind_a_wrapper():
    class Wrapper:
        def __init__(self, model):
            self.inner = model

        def __call__(self, **kwargs):
            return self.inner(**kwargs)

    model = tiny.flux_transformer()
    first, second = Loop(model), Loop(model)
    second.transformer = Wrapper(model)
    assert enabled_flags(first, [first, second], dense_first_steps=2) == ["DDssss", "DDssss"]


def test_a_modular_pipeline_counts_its_own_steps(monkeypatch):
    """It passes itself to blocks as ``components``; no method of it is on the way."""
    from diffusers.guiders import ClassifierFreeGuidance
    from diffusers.modular_pipelines.wan import encoders
    from test_guider import modular, run

    monkeypatch.setattr(encoders, "prompt_clean", lambda text: text)
    pipe = tiny.wan_pipeline()
    other = modular(pipe, ClassifierFreeGuidance(3.0))
    other.update_components(scheduler=copy.deepcopy(pipe.scheduler))
    calls = [lambda: tiny.run(pipe, num_inference_steps=4), lambda: run(other, 6)]
    found = enabled_flags(pipe, calls, dense_first_steps=2, dense_last_steps=1)
    assert found == ["DDDDssDD", "DDDDssssssDD"]  # two passes a step


def own_loop(pipe, scheduler, numbers=False, steps=6):
    """A user's own loop with a scheduler that is not the pipeline's."""
    scheduler.set_timesteps(steps)
    inputs = tiny.flux_inputs(height=4, width=4, batch=1)
    x = inputs["hidden_states"]
    for t in scheduler.timesteps.tolist() if numbers else scheduler.timesteps:
        call = {**inputs, "hidden_states": x, "timestep": torch.as_tensor(t)[None] / 1000}
        with torch.no_grad():
            v = pipe.transformer(**call)[0]
        x = scheduler.step(v, t, x).prev_sample


def test_a_loop_with_another_scheduler_counts_that_one(caplog):
    pipe, other = Loop(tiny.flux_transformer()), FlowMatchEulerDiscreteScheduler()
    loop = lambda: own_loop(pipe, other)  # noqa: E731
    assert (
        enabled_flags(pipe, [loop, pipe, loop], dense_first_steps=2, dense_last_steps=1)
        == ["DDsssD"] * 3
    )
    assert not caplog.records


def test_a_scheduler_that_does_not_run_is_told_in_one_sentence(caplog):
    pipe, other = Loop(tiny.flux_transformer()), FlowMatchEulerDiscreteScheduler()
    pipe.scheduler.set_timesteps(6)
    loop = lambda: own_loop(pipe, other, numbers=True)  # noqa: E731
    # Counted rightly by the timestep before the pipeline's own scheduler has run, and after.
    for calls in ([loop], [pipe, loop]):
        caplog.clear()
        assert enabled_flags(pipe, calls, dense_first_steps=2)[-1] == "DDssss"
        said = [r.message for r in caplog.records if "not the scheduler that runs" in r.message]
        assert len(said) == 1
        assert "Loop.scheduler (FlowMatchEulerDiscreteScheduler)" in said[0]
        assert "pipe.scheduler = " in said[0]
    with pytest.raises(ValueError, match="dense_last_steps=1 needs to know the number of steps"):
        enabled_flags(pipe, [loop], dense_last_steps=1)


def test_a_run_that_stopped_does_not_spoil_the_next():
    model = tiny.flux_transformer()
    pipe, other = Loop(model, DDIMScheduler()), Loop(model)
    calls = [lambda: pipe(stop=3), pipe, lambda: other(stop=1), other, pipe]
    assert enabled_flags(pipe, calls, dense_first_steps=2, dense_last_steps=1) == [
        "DDss", "DDsssD", "DD", "DDsssD", "DDsssD"
    ]  # fmt: skip


def test_threads_with_a_pipeline_each():
    """Runs of different length in step with each other, over one transformer's step reader."""

    class Model(torch.nn.Module):
        def forward(self, x):
            found.setdefault(threading.get_ident(), []).append(steps.read(self, None, None))
            barrier.wait(10)
            return x

    class Pipe:
        def __init__(self, model, count):
            self.transformer, self.scheduler = model, FlowMatchEulerDiscreteScheduler()
            self.count = count

        def run(self):
            self.scheduler.set_timesteps(self.count)
            for t in self.scheduler.timesteps:
                self.transformer(t)
            for _ in range(8 - self.count):
                barrier.wait(10)

    found, steps, barrier, model = {}, Steps(), threading.Barrier(4), Model()
    pipes = [Pipe(model, n) for n in (5, 6, 7, 8)]
    threads = [threading.Thread(target=pipe.run) for pipe in pipes]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    wanted = sorted([(i, n) for i in range(n)] for n in (5, 6, 7, 8))
    assert sorted(found.values()) == wanted


class Probe(torch.nn.Module):
    """A model that looks for its pipeline."""

    def forward(self, x, look):
        look(self)
        return x


class Holder:
    def __init__(self, model):
        self.transformer, self.scheduler = model, FlowMatchEulerDiscreteScheduler()

    def __call__(self, look):
        for t in self.scheduler.timesteps[:1]:
            self.transformer(t, look)


def test_the_nearest_pipeline_is_found_and_none_outside():
    model, seen = Probe(), []
    pipe, other = Holder(model), Holder(Probe())
    pipe(lambda m: seen.append(running_pipeline(m)))
    model(0, lambda m: seen.append(running_pipeline(m)))
    other(lambda m: seen.append(running_pipeline(m)))
    # Called right here, where two pipelines are local variables, the one that holds the model.
    assert seen == [pipe, pipe, other]


def test_no_frame_keeps_what_its_code_let_go():
    class Big:
        pass

    def outer(pipe):
        big = Big()
        gone = weakref.ref(big)
        pipe(running)
        del big
        assert gone() is None

    pipe = Holder(Probe())
    gc.disable()  # reference counting alone must do
    try:
        outer(pipe)
        inner = weakref.ref(pipe)
        del pipe
        assert inner() is None
    finally:
        gc.enable()


def test_what_a_function_got_from_locals_stays_its_own():
    pipe = Holder(Probe())

    def caller(pipe, word):
        mine = locals()
        pipe.transformer(0, running)
        return mine["word"]

    assert caller(pipe, "kept") == "kept"


def test_a_walk_costs_less_than_50_microseconds():
    """Processor time, best of 20, from the depth at which diffusers calls a transformer."""
    pipe, times = tiny.flux_pipeline(), []

    def look(*_):
        for _ in range(20):
            start = time.thread_time()
            for _ in range(20):  # the clock itself is slow on some machines
                running(pipe.transformer)
            times.append((time.thread_time() - start) / 20)

    hook = pipe.transformer.register_forward_pre_hook(look)
    tiny.run(pipe, num_inference_steps=1)
    hook.remove()
    assert min(times) < 50e-6


def test_nothing_is_looked_at_while_torch_compile_traces(monkeypatch):
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    monkeypatch.setattr(sys, "_getframe", lambda *_: pytest.fail("looked at frames"))
    assert running_pipeline(torch.nn.Identity()) is None


def test_a_copied_session_remembers_its_own_runs():
    pipe = tiny.flux_pipeline()
    with dittfast.enable(pipe, Seen(), dense_first_steps=1):
        twin = copy.deepcopy(pipe)
        ours, theirs = (p.transformer._dittfast.session.steps for p in (pipe, twin))
        assert ours is not theirs


def test_runs_are_forgotten_with_their_timesteps():
    steps, model = Steps(), Probe()
    pipe = Holder(model)
    for n in range(3, 9):
        pipe.scheduler.set_timesteps(n)
        pipe(lambda m: steps.read(m, None, None))
    gc.collect()
    assert len(steps._runs) == 1


def test_places_are_read_from_memory_not_values():
    timesteps = torch.arange(10.0)
    part = timesteps[4:]
    assert [place_in(timesteps, t) for t in part] == [4, 5, 6, 7, 8, 9]
    assert place_in(timesteps, part[0].expand(3)) == 4
    assert place_in(part, part[1]) == 1
    assert place_in(part, timesteps[0]) is None
    assert place_in(timesteps, timesteps) is None
    assert place_in(timesteps, torch.tensor(4.0)) is None
    # A run that began inside the schedule of a second-order scheduler.
    from diffusers import HeunDiscreteScheduler

    heun = HeunDiscreteScheduler()
    heun.set_timesteps(5)
    assert len(heun.timesteps) == 9
    assert [user_step(heun, i, 4) for i in range(4, 9)] == [(0, 3), (0, 3), (1, 3), (1, 3), (2, 3)]


def test_a_step_that_nobody_tells(caplog):
    caplog.set_level(logging.WARNING, logger="dittfast")
    with pytest.raises(ValueError, match="neither a timestep nor a pipeline"):
        Steps().read(torch.nn.Identity(), None, None)
