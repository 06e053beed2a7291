"""dittfast tune on a tiny pipeline: what it records, what stops it, what it writes."""

from __future__ import annotations

import contextlib
import errno
import itertools
import json
import logging
import shutil
from dataclasses import replace
from types import SimpleNamespace

import pytest
import tiny
import torch
import yaml

import dittfast
from dittfast import Layout
from dittfast.cli import main
from dittfast.config import resolve
from dittfast.disk.problems import FileProblem
from dittfast.files import write_text
from dittfast.measure.gpus import GPUS
from dittfast.methods import Local, LogLinear, TopK
from dittfast.mixture import Mixture, Rule
from dittfast.pipelines.measure import fidelity, probe
from dittfast.pipelines.measure.drawings import Drawings
from dittfast.pipelines.runs import compare
from dittfast.pipelines.runs.prompts import make_items
from dittfast.pipelines.runs.run import run
from dittfast.pipelines.runs.sources import Source
from dittfast.pipelines.tune import book as book_module
from dittfast.pipelines.tune import earlier, measuring
from dittfast.pipelines.tune import tune as tune_module
from dittfast.pipelines.tune.budget import Budget, ImpossibleBudget
from dittfast.pipelines.tune.errors import head_errors
from dittfast.pipelines.tune.on_gpu import computed, cost_of, run_seconds
from dittfast.pipelines.tune.preset import ALWAYS, preset_data, write_preset
from dittfast.pipelines.tune.recording import attention_in_turns, record
from dittfast.pipelines.tune.report import summary_tables
from dittfast.pipelines.tune.searching import Drawn, Search
from dittfast.pipelines.tune.sensitivity import (
    WIDTH,
    answers,
    followed,
    from_text,
    sketch,
    to_text,
)
from dittfast.pipelines.tune.task import Task
from dittfast.pipelines.tune.tune import tune
from dittfast.schedule import Schedule
from dittfast.testing import attention_inputs

CALL = {"height": 48, "width": 64, "num_inference_steps": 3, "max_sequence_length": 12}
SHORT = CALL | {"num_inference_steps": 2}
SOURCE = Source("folder", "tiny", "tiny", {})
ITEMS = make_items(["a red cat", "a blue dog", "a green car"])
METHODS = [Local(window=2), TopK(topk=0.2, block_size=16)]


def task(*budget, **more) -> Task:
    given = {"methods": ("local", "topk"), "bands": 2, "rounds": 2} | more
    return Task(Budget.parse(budget), tuple(ITEMS[:1]), tuple(ITEMS[1:]), **given)


@pytest.fixture(scope="module")
def pipe():
    return tiny.flux_pipeline()


# Errors.


def dense_output(q, k, v, mask=None):
    """Attention in fp64, from the formula; ``mask`` says which keys a query sees."""
    logits = q.double() @ k.double().mT * q.shape[-1] ** -0.5
    if mask is not None:
        logits = logits.masked_fill(~mask, -torch.inf)
    return torch.softmax(logits, -1) @ v.double()


@pytest.mark.parametrize("method", [Local(window=2), LogLinear(block_size=8, topk=2, levels=1)])
def test_errors_by_head_are_those_of_dense_fp64(method):
    layout = Layout.image(9, 7, text=5)
    q, k, v, _ = attention_inputs(2, 3, layout.num_tokens, 16)
    dense = dense_output(q, k, v)
    if isinstance(method, Local):
        plan = method.plan(layout)
        ours = dense_output(q, k, v, plan.to_dense_mask())
        by_plan = head_errors(plan, layout, q, k, v)
    else:
        ours = dittfast.functional.log_linear_attention(
            q, k, v, layout, block_size=8, topk=2, levels=1
        )
        by_plan = None
    wanted = (ours - dense).square().sum((0, 2, 3)).sqrt() / dense.square().sum((0, 2, 3)).sqrt()
    found = head_errors(method, layout, q, k, v)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-6)
    if by_plan is not None:
        torch.testing.assert_close(by_plan, wanted, rtol=1e-4, atol=1e-6)


def test_what_is_recorded_is_what_the_formula_gives_for_captured_q_k_v(pipe):
    call = CALL | {"prompt": "a red cat"}
    stock = run(pipe, call, 0)
    drawn, data = record(pipe, call, 0, METHODS, [1, 2])
    assert (drawn.frames == stock.frames).all() and torch.equal(drawn.latents, stock.latents)
    captured = probe.capture(pipe, call, steps=[1, 2])
    assert [(c["layer"], c["step"]) for c in data["calls"]] == [(c.layer, c.step) for c in captured]
    assert data["passes"] == 1
    for found, c in zip(data["calls"], captured):
        dense = dense_output(c.q, c.k, c.v)
        assert found["size"] == pytest.approx(float(dense.square().sum()), rel=1e-4)
        for method, tried in zip(METHODS, found["tried"]):
            plan = method.plan(c.layout, c.q, c.k)
            ours = dense_output(c.q, c.k, c.v, plan.to_dense_mask())
            wanted = (ours - dense).square().sum((0, 2, 3))
            assert tried["error"] == pytest.approx(wanted.tolist(), rel=1e-3)
            assert tried["seconds"] >= tried["planning"] >= 0
            assert (tried["planning"] > 0) == (not method.static)


def predictions(pipe, call) -> list[torch.Tensor]:
    """What the transformer predicts, step by step."""
    seen = []
    hook = pipe.transformer.register_forward_hook(lambda *args: seen.append(args[-1][0]))
    try:
        run(pipe, call, 0)
    finally:
        hook.remove()
    return seen


def test_an_answer_is_what_a_rule_for_that_layer_and_step_does(pipe):
    call, layer = CALL | {"prompt": "a red cat"}, "single_transformer_blocks.0.attn"
    plain = predictions(pipe, call)
    trials = [(1, {layer: METHODS[1]}), (0, {layer: METHODS[0]})]
    trials += [(0, dict.fromkeys(probe.heads_by_layer(pipe.transformer), METHODS[0]))]
    told = []
    found = answers(pipe, call, 0, trials, on_pass=lambda: told.append(1))
    assert len(told) == len(found) == 3
    for (step, methods), vector in zip(trials, found):
        rules = [Rule(m, layers=name, steps=(step, step + 1)) for name, m in methods.items()]
        with dittfast.enable(pipe, Mixture(tuple(rules)), min_tokens=0):
            moved = predictions(pipe, call)[step]
        wanted = (moved - plain[step])[0] / plain[step][0].norm()
        assert wanted.norm() > 1e-4
        torch.testing.assert_close(vector, sketch(wanted), rtol=1e-3, atol=1e-6)


def test_blocks_before_a_changed_layer_do_not_run_again(pipe):
    """Of tiny FLUX's 2 double and 2 single blocks the trials change the third and the second."""
    layers, ran = list(probe.heads_by_layer(pipe.transformer)), []
    blocks = [*pipe.transformer.transformer_blocks, *pipe.transformer.single_transformer_blocks]
    hooks = [
        block.attn.register_forward_hook(lambda *args, number=number: ran.append(number))
        for number, block in enumerate(blocks)
    ]
    try:
        trials = [(0, {layers[2]: METHODS[0]}), (0, {layers[1]: METHODS[1], layers[3]: METHODS[0]})]
        answers(pipe, SHORT | {"prompt": "a red cat"}, 0, trials)
    finally:
        for hook in hooks:
            hook.remove()
    # 2 steps, a pass that keeps what each block gives, and the trials.
    assert [ran.count(n) for n in range(4)] == [3, 3 + 1, 3 + 2, 3 + 2]


def test_outputs_that_are_too_large_are_not_kept(pipe, monkeypatch):
    call, layer = SHORT | {"prompt": "a red cat"}, list(probe.heads_by_layer(pipe.transformer))[3]
    trials = [(1, {layer: METHODS[1]})]
    (wanted,) = answers(pipe, call, 0, trials)
    monkeypatch.setattr(earlier, "_MOST_BYTES", 1)
    ran = []
    hook = pipe.transformer.transformer_blocks[1].attn.register_forward_hook(
        lambda *args: ran.append(1)
    )
    try:
        (found,) = answers(pipe, call, 0, trials)
    finally:
        hook.remove()
    assert len(ran) == 2 + 1 + 1  # it did run again
    assert torch.equal(found, wanted)


def test_sketches_have_the_inner_products_of_what_they_are_of():
    draw = torch.Generator().manual_seed(1)
    x = torch.randn(50_000, 6, generator=draw) @ torch.randn(6, 6, generator=draw)
    wanted = x.T @ x
    vectors = torch.stack([sketch(column) for column in x.T]).double()
    size = wanted.diagonal().sqrt()
    apart = (vectors @ vectors.T - wanted) / size.outer(size)
    assert apart.abs().max() < 4 / WIDTH**0.5
    again = from_text(to_text(vectors[0].float()))
    torch.testing.assert_close(again, vectors[0], rtol=1e-3, atol=1e-2)
    with pytest.raises(ValueError, match="3 values, not 4096"):
        from_text(to_text(torch.ones(3)))


def test_errors_are_followed_to_the_picture_as_one_of_each_band_was():
    """Where a band's errors reach the picture by a turn and a factor, all inner products are."""
    draw = torch.Generator().manual_seed(2)
    errors = torch.randn(6, 8, generator=draw, dtype=torch.float64)
    band, factor = [0, 0, 0, 1, 1, 1], torch.tensor([2.0, 5.0], dtype=torch.float64)
    turn, _ = torch.linalg.qr(torch.randn(8, 8, generator=draw, dtype=torch.float64))
    reference = errors[[0, 3]] + errors[[1, 4]] + errors[[2, 5]]
    reference[1] += reference[0]  # so that they have something in common
    ends = factor[:, None] * reference @ turn
    pictures = factor[band][:, None] * errors @ turn
    found = followed([errors, errors], band, reference, ends @ ends.T)
    torch.testing.assert_close(found, pictures @ pictures.T)
    # Bands whose pictures have nothing in common do not help or cancel each other.
    apart = followed([errors], band, reference, torch.diag(torch.tensor([1.0, 4.0])))
    assert apart[:3, 3:].abs().max() < 1e-12
    wanted = errors[0] @ errors[1] / (reference[0] @ reference[0])
    torch.testing.assert_close(apart[0, 1], wanted)


# The whole.


@pytest.fixture
def fixed_seconds(monkeypatch):
    fix_seconds(monkeypatch)


def fix_seconds(monkeypatch):
    """Seconds that do not depend on the machine, so that results can be compared to the byte."""
    real, drawing, running = measuring.record, fidelity.Arm.draw, measuring.run

    def recorded(*args, **kwargs):
        drawn, data = real(*args, **kwargs)
        for one in data["calls"]:
            one["dense_seconds"] = 0.05
            for number, tried in enumerate(one["tried"]):
                tried |= {"seconds": 0.01 + 0.003 * number, "planning": 0.001}
        return drawn, data | {"start": [0.002] * len(data["start"])}

    def drawn(self, *args, **kwargs):
        result, description = drawing(self, *args, **kwargs)
        timing = replace(result.timing, busy=1.0 if self.variant is None else 0.75)
        return replace(result, timing=timing), description

    def timed(*args):
        result = running(*args)
        return replace(result, timing=replace(result.timing, busy=1.0))

    @contextlib.contextmanager
    def attention_seconds(*args):
        yield SimpleNamespace(attention=0.6)

    def in_turns(*args, **kwargs):
        attention_in_turns(*args, **kwargs)
        return {"dense": 0.6, "own": 0.35}

    monkeypatch.setattr(measuring, "record", recorded)
    monkeypatch.setattr(measuring, "attention_in_turns", in_turns)
    monkeypatch.setattr(measuring, "run", timed)
    monkeypatch.setattr(measuring, "attention_seconds", attention_seconds)
    monkeypatch.setattr(fidelity.Arm, "draw", drawn)


@pytest.fixture(scope="module")
def finished(pipe, tmp_path_factory):
    """A finished tuning, whose folder other budgets go on in."""
    folder, stages = tmp_path_factory.mktemp("tuned") / "whole", []
    with pytest.MonkeyPatch.context() as patch:
        fix_seconds(patch)
        done = tune(pipe, SOURCE, SHORT, task("psnr>=52"), folder, on_stage=stages.append)
    return done, stages


@pytest.fixture
def recorded(finished, tmp_path, fixed_seconds, monkeypatch):
    """A copy of that folder, in which nothing may be recorded again."""
    shutil.copytree(finished[0].preset.parent, tmp_path / "recorded")
    monkeypatch.setattr(measuring, "record", None)
    monkeypatch.setattr(measuring, "answers", None)
    monkeypatch.setattr(tune_module, "html_report", lambda *args, **kwargs: "")
    return tmp_path / "recorded"


def test_a_tuned_preset_holds_its_budget_and_draws_what_was_measured(finished, pipe):
    done, stages = finished
    assert any("left" in stage for stage in stages)
    best, folder = done.found["best"], done.preset.parent
    assert best["held_out"]["psnr"] >= 52
    data = yaml.safe_load(done.preset.read_text())
    assert data["tuned"]["held_out"]["psnr"] == pytest.approx(best["held_out"]["psnr"])
    assert data["tuned"]["sizes"] == [[1, 6, 8]]
    assert set(data["tuned"]["versions"]) >= {"dittfast", "torch", "diffusers"}
    page = done.report.read_text()
    assert "What was asked for" in page and "Tuned for psnr&gt;=52" in page
    # The file alone, by enable, draws the pictures that were measured.
    settings = json.loads((folder / "drawn" / best["label"] / "settings.json").read_text())
    settings.pop("sha256")
    drawings = Drawings(folder / "drawn" / best["label"], settings)
    with dittfast.enable(pipe, str(done.preset)) as enabled:
        for item in ITEMS[1:]:
            drawn = run(pipe, SHORT | {"prompt": item.prompt}, item.seed)
            assert (drawn.frames == drawings.frames(item)).all()
        assert enabled.describe().did_not_run is None


def test_another_budget_in_the_folder_records_nothing_again(recorded, pipe):
    done = tune(pipe, SOURCE, SHORT, task("distance<=0.5"), recorded)
    assert done.found["best"]["held_out"]["distance"] <= 0.5
    assert done.found["best"]["held_out"]["speedup"] == pytest.approx(1 / 0.75)
    with pytest.raises(ValueError, match="a tuning with other settings"):
        tune(pipe, SOURCE, SHORT, task("psnr>=25", bands=1), recorded)


class Faults:
    """Raises an error of each kind in turn at every n-th thing that is written or drawn."""

    def __init__(self, monkeypatch, every: int):
        self.every, self.count, self.raised = every, 0, []
        kinds = [
            KeyboardInterrupt(),
            OSError(errno.ENOSPC, "No space left on device"),
            RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB"),
            FloatingPointError("3 % of the picture's values are not finite"),
        ]
        self.kinds = itertools.cycle(kinds)
        for module, name in ((book_module, "write_record"), (compare, "run")):
            monkeypatch.setattr(module, name, self._wrapped(getattr(module, name)))

    def _wrapped(self, real):
        def wrapped(*args, **kwargs):
            self.count += 1
            if self.count % self.every == 0:
                error = next(self.kinds)
                self.raised.append(type(error))
                raise error
            return real(*args, **kwargs)

        return wrapped


def test_a_tuning_that_is_stopped_again_and_again_ends_with_the_same_preset(
    finished, pipe, tmp_path, fixed_seconds, monkeypatch
):
    monkeypatch.setattr(tune_module, "html_report", lambda *args, **kwargs: "")
    faults, starts = Faults(monkeypatch, 13), 0  # a timing is 6 calls and 2 records
    while not (tmp_path / "preset.yaml").exists():
        starts += 1
        assert starts < 30
        kinds = (KeyboardInterrupt, OSError, RuntimeError, FloatingPointError)
        with contextlib.suppress(*kinds):
            tune(pipe, SOURCE, SHORT, task("psnr>=52"), tmp_path)
        assert "_dittfast" not in pipe.transformer.__dict__  # the pipeline is as it was
    assert len(set(faults.raised)) == 4
    for name in ("preset.yaml", "tune.json"):
        whole = finished[0].preset.parent / name
        assert (tmp_path / name).read_text() == whole.read_text()


def test_a_method_that_gives_nan_is_recorded_as_such_and_loses_nothing(pipe, monkeypatch):
    from dittfast.pipelines.tune import recording

    real = recording.method_attention

    def attention(method, *args, **kwargs):
        out = real(method, *args, **kwargs)
        return out * torch.nan if isinstance(method, Local) else out

    monkeypatch.setattr(recording, "method_attention", attention)
    drawn, data = record(pipe, CALL | {"prompt": "a red cat"}, 0, METHODS, [1])
    assert torch.isfinite(drawn.latents).all()
    for one in data["calls"]:
        assert one["tried"][0]["error"] is None and one["tried"][1]["error"] is not None


@pytest.mark.parametrize(
    ("budget", "words"),
    [
        (["speedup>=50"], "times as fast; that is the nearest possible"),
        (["psnr>=99", "speedup>=1.3"], "the nearest has psnr"),
        (["speedup>=1.4"], "at 1.33 times the speed"),
    ],
)
def test_an_impossible_budget_is_refused_with_the_nearest(recorded, pipe, budget, words):
    (recorded / "preset.yaml").unlink()
    with pytest.raises(ImpossibleBudget, match=words):
        tune(pipe, SOURCE, SHORT, task(*budget, rounds=1), recorded)
    assert not (recorded / "preset.yaml").exists()


def test_only_one_process_tunes_in_a_folder(pipe, tmp_path):
    from dittfast.disk.locks import LOCK

    write_text(
        tmp_path / LOCK,
        '{"host": "elsewhere", "pid": 1, "start": "1", "since": "x", "command": "dittfast"}',
    )
    with pytest.raises(ValueError, match="is in use by process 1 on elsewhere"):
        tune(pipe, SOURCE, SHORT, task("psnr>=25"), tmp_path)


@pytest.mark.parametrize("name", ["answers-00000", "dense-seconds", "recorded-00000"])
def test_a_damaged_record_is_named(recorded, pipe, name):
    path = min((recorded / "records").glob(f"{name}*.json"))
    path.write_text(path.read_text().replace("0", "1", 1))
    with pytest.raises(FileProblem, match=name):
        tune(pipe, SOURCE, SHORT, task("psnr>=52"), recorded)


def test_attention_is_timed_both_ways_where_it_runs(pipe, monkeypatch):
    """By a clock that dense attention advances by 4, and any method by 1."""
    from dittfast.pipelines.tune import recording

    now, real = [0.0], recording.method_attention

    def method_attention(*args, **kwargs):
        now[0] += 1
        return real(*args, **kwargs)

    def dense(**call):
        now[0] += 4

    monkeypatch.setattr(recording, "clock_for", lambda device: lambda: now[0])
    monkeypatch.setattr(recording, "method_attention", method_attention)
    monkeypatch.setattr(recording, "F", SimpleNamespace(scaled_dot_product_attention=dense))
    mixture = Mixture((Rule(METHODS[0], (0,), None, (0, 1)), Rule(METHODS[1], (1, 2), (1,))))
    call = SHORT | {"prompt": "a red cat"}
    # 4 layers in 2 steps; layer 0 is sparse in one of them, layers 1 and 2 in both.
    found = attention_in_turns(pipe, call, 0, mixture, Schedule())
    assert found == {"dense": 4.0 * 8, "own": 1.0 * 5 + 4.0 * 3}
    # But not in a first step that is dense, nor layer 2.
    schedule = Schedule(dense_first_steps=1, dense_layers=(2,))
    found = attention_in_turns(pipe, call, 0, mixture, schedule)
    assert found == {"dense": 4.0 * 8, "own": 1.0 * 1 + 4.0 * 7}


def test_the_time_of_stopped_tunings_adds_up(tmp_path, monkeypatch):
    now = [100.0]
    monkeypatch.setattr(book_module.time, "perf_counter", lambda: now[0])
    book = book_module.Book(tmp_path, {"a": 1})
    now[0] += 5
    book.note_seconds()
    now[0] += 1  # lost: nobody wrote it down
    again = book_module.Book(tmp_path, {"a": 1})
    now[0] += 2
    assert again.seconds == pytest.approx(7)


def test_plans_last_by_method_where_that_loses_nothing():
    """Those of one may, of another for 2 steps alone, and of one that hardly plans nobody asks."""
    drawn = []
    psnr = {"topk-4": 29.95, "sol-4": 29.0, "sol-2-topk-4": 29.93, "sol-4-topk-4": 28.0}
    prediction = SimpleNamespace(
        planning=lambda assigned: {"sol": 0.2, "topk": 0.4, "vsa": 0.001},
        call_seconds=lambda assigned: 10.0,
    )
    mixture = Mixture((Rule(METHODS[1]),))
    best = Drawn("x", mixture, {}, ALWAYS, {}, {"psnr": 30.0}, {"psnr": 28.0})
    held = [27.95]
    measured = SimpleNamespace(
        task=SimpleNamespace(budget=Budget(speedup=1.5), items="tuned", held_out="held"),
        variant=lambda label, mixture, schedule: SimpleNamespace(
            label=label, variant=SimpleNamespace(schedule=schedule)
        ),
        draw=lambda name, arm, items: drawn.append((arm.label, items)),
        judge=lambda arm, items: {
            "psnr": held[0] if items == "held" else psnr[arm.label.removeprefix("x-")]
        },
    )
    tuning = Search(measured, prediction)
    found = tuning.lasting(best)
    assert dict(found.schedule.replan_every) == {"topk": 4, "sol": 2}
    assert found.tuned == {"psnr": 29.93} and found.held_out == {"psnr": 27.95}
    asked = [label for label, items in drawn if items == "tuned"]
    assert asked == ["x-topk-4", "x-sol-4-topk-4", "x-sol-2-topk-4"]
    held[0] = 27.0
    assert tuning.lasting(best) is best  # held-out prompts object


# Another GPU.


def test_seconds_of_a_gpu_are_those_of_its_published_rates(pipe):
    _, data = record(pipe, CALL | {"prompt": "a red cat"}, 0, METHODS, [1])
    with dittfast.enable(pipe, "dense"):
        run(pipe, CALL | {"prompt": "a red cat", "num_inference_steps": 1}, 0)
        cost = cost_of(pipe.transformer, pipe.transformer._dittfast.sequences)
        layout = pipe.transformer._dittfast.layout
    gpu = GPUS["H100"]
    (found,) = computed([data], METHODS, layout, cost, gpu)
    before, after = data["calls"][0], found["calls"][0]
    flops = 4 * layout.num_tokens**2 * before["heads"] * before["head_dim"]
    # A sequence this short is bound by memory: q, k, v and the output in bf16.
    moving = 2 * 4 * layout.num_tokens * before["heads"] * before["head_dim"] / 3.35e12
    assert after["dense_seconds"] == pytest.approx(max(flops / 648e12, moving))
    for old, new in zip(before["tried"], after["tried"]):
        assert new["error"] == old["error"] and new["planning"] == 0
        assert 0 < new["work"] <= 1.5
        rates = [rate.tflops for rate in gpu.engines.values()]
        possible = [max(new["work"] * flops / (rate * 1e12), moving) for rate in rates]
        assert any(new["seconds"] == pytest.approx(x) for x in possible)
    whole, attention = run_seconds([found], 3, cost, gpu)
    assert attention == pytest.approx(3 * sum(x["dense_seconds"] for x in found["calls"]))
    assert whole - attention == pytest.approx(3 * (cost.linear + cost.other_attention) / 989e12)


def test_a_preset_for_a_gpu_says_that_its_speed_is_computed(recorded, pipe, monkeypatch):
    monkeypatch.setattr(measuring, "answers", answers)
    with pytest.raises(ImpossibleBudget, match="no method saves anything"):
        tune(pipe, SOURCE, SHORT, task("psnr>=45", gpu="h100", rounds=1), recorded)
    # So few tokens are bound by memory, whatever is left out of them. Not with more of it.
    monkeypatch.setitem(GPUS, "H100", replace(GPUS["H100"], memory=1e6))
    done = tune(pipe, SOURCE, SHORT, task("psnr>=45", gpu="h100", rounds=1), recorded)
    assert done.data["tuned"]["speed_computed_for"] == done.found["gpu"] == "H100"
    best = done.found["best"]
    assert best["held_out"]["speedup"] == pytest.approx(best["predicted"]["speedup"], rel=0.1)
    assert any("computed for H100" in note for note in summary_tables(done.found)[0].notes)
    with pytest.raises(ValueError, match="block lists is on RTX 4090"):
        task("psnr>=52", gpu="RTX 4090")


# The preset.


@pytest.fixture
def preset(pipe, tmp_path):
    mixture = Mixture((Rule(Local(window=2), (0, 2), (1,), (0.0, 0.5)), Rule(METHODS[1], (1,))))
    about = {"budget": ["psnr>=20"], "sizes": [[1, 6, 8]], "held_out": {"psnr": 21.0}}
    schedule = Schedule(min_tokens=0, replan_every=2)
    data = preset_data(pipe, "tiny", CALL, mixture, schedule, about)
    write_preset(tmp_path / "preset.yaml", data)
    return tmp_path / "preset.yaml", mixture, schedule


def test_a_preset_is_read_back_as_it_was_meant(preset, pipe):
    path, mixture, schedule = preset
    found = resolve(str(path))
    assert found == (mixture, schedule)
    assert found[0].tuned["model"] == "tiny"
    assert yaml.safe_load(path.read_text())["transformers"] == ["FluxTransformer2DModel"]
    text = path.read_text()
    assert "&id" not in text and "window: 2" in text and "proportional" not in text


def test_another_model_is_refused_unless_asked_for(preset, caplog):
    path, *_ = preset
    torch.manual_seed(1)
    other = tiny.flux_pipeline()
    with torch.no_grad():
        for p in other.transformer.parameters():
            p.mul_(1.5)
    with pytest.raises(
        ValueError, match=r"tuned for tiny, and this is another model.*other values"
    ):
        dittfast.enable(other, str(path))
    with pytest.raises(ValueError, match=r"another model"):
        dittfast.enable(other, resolve(str(path))[0])  # not by its name, either
    larger = tiny.flux_pipeline(single=3)
    with pytest.raises(ValueError, match="parameters of other shapes"):
        dittfast.enable(larger, str(path))
    with caplog.at_level(logging.WARNING), dittfast.enable(other, str(path), any_model=True):
        pass
    assert "taken all the same" in caplog.text


def test_another_size_is_warned_of_once(preset, pipe, caplog):
    path, *_ = preset
    call = CALL | {"prompt": "a red cat", "num_inference_steps": 2}
    with dittfast.enable(pipe, str(path)), caplog.at_level(logging.WARNING):
        run(pipe, call, 0)
        assert "tuned for" not in caplog.text
        run(pipe, call | {"width": 48}, 0)
        run(pipe, call | {"width": 48}, 1)
    assert caplog.text.count("the preset was tuned for 1 x 6 x 8 tokens") == 1


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"tuned": {"model": "x"}}, "tuned has no 'fingerprints'"),
        ({"tuned": 3}, "must be a mapping"),
        ({"rules": None, "method": "local", "tuned": {}}, "belongs to the 'rules'"),
    ],
)
def test_a_preset_of_another_form_is_refused(preset, change, words):
    path, *_ = preset
    data = yaml.safe_load(path.read_text()) | change
    data = {key: value for key, value in data.items() if value is not None}
    path.write_text(yaml.safe_dump(data))
    with pytest.raises(ValueError) as error:
        resolve(str(path))
    assert words in str(error.value)


# Bad input, before weights are read.


def test_held_out_prompts_are_new():
    with pytest.raises(ValueError, match="'a red cat' is tuned with, too"):
        Task(Budget(psnr=30), tuple(ITEMS[:1]), tuple(ITEMS[:1]), ("local",))
    with pytest.raises(ValueError, match="no prompts held out"):
        Task(Budget(psnr=30), tuple(ITEMS[:1]), (), ("local",))
    with pytest.raises(ValueError, match="rounds must be at least 1"):
        replace(task("psnr>=30"), rounds=0)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "there is no budget"),
        (["--budget", "psnr=30"], "psnr takes >="),
        (["--budget", "psnr>=30", "--budget", "psnr>=31"], "psnr twice"),
        (["--budget", "psnr>=30"], "-o FOLDER is missing"),
        (["--budget", "psnr>=30", "-o", "FILE"], "is a file; name a folder"),
        (["--budget", "psnr>=30", "-o", "OUT", "--methods", "lokal"], "Did you mean 'local'"),
        (["--budget", "psnr>=30", "-o", "OUT", "--methods", "linear"], "trained first"),
        (["--budget", "psnr>=30", "-o", "OUT", "--methods", "local,local"], "twice"),
        (["--budget", "psnr>=30", "-o", "OUT", "--model", "nowhere"], "no model 'nowhere'"),
        (["--budget", "psnr>=30", "-o", "OUT", "--prompts", "ONE"], "none is left to judge by"),
        (["--budget", "psnr>=30", "-o", "OUT", "--held-out", "GONE"], "no prompts file"),
        (["--budget", "psnr>=30", "-o", "OUT", "--size", "512,256"], "--size is one size"),
        (["--budget", "psnr>=30", "-o", "OUT", "--size", "50"], "must be a multiple of"),
        (["--budget", "psnr>=30", "-o", "OUT", "--size", "64", "--height", "64"], "--size is one"),
        (["--budget", "psnr>=30", "-o", "OUT", "--num-frames", "4"], "takes no num_frames"),
        (["--budget", "psnr>=30", "-o", "OUT", "--bands", "0"], "must be at least 1"),
        (["--budget", "psnr>=30", "-o", "OUT", "--backend", "nativ"], "unknown backend"),
        (["--budget", "psnr>=30", "-o", "OUT", "--position-scale", "0"], "above 0"),
    ],
)
def test_bad_input_is_one_sentence_before_weights_are_read(
    words, message, tmp_path, capsys, monkeypatch
):
    from dittfast.pipelines.runs import loading

    (tmp_path / "file").write_text("x")
    (tmp_path / "one.txt").write_text("a cat\n")
    places = {"FILE": "file", "OUT": "out", "ONE": "one.txt", "GONE": "gone.txt"}
    words = [str(tmp_path / places[w]) if w in places else w for w in words]
    monkeypatch.setattr(loading, "load_with", None)  # nothing is loaded
    assert main(["tune", *words]) == 2
    error = capsys.readouterr().err.strip()
    assert message in error and len(error.splitlines()) == 1


def test_the_command_asks_for_what_its_options_say(finished, pipe, tmp_path, capsys, monkeypatch):
    from dittfast.cli import tune as command

    done, asked = finished[0], []

    def fake(*given, **options):
        asked.append((*given, options))
        return done

    monkeypatch.setattr(command, "load_pipeline", lambda args, source: pipe)
    monkeypatch.setattr(tune_module, "tune", fake)
    words = [
        "--budget",
        "psnr>=30",
        "--budget",
        "speedup>=1.5",
        "-o",
        str(tmp_path),
        "--steps",
        "3",
    ]
    words += ["--size", "512", "--position-scale", "fit", "--methods", "topk,local", "--json", "-"]
    assert main(["tune", *words]) == 0
    printed = capsys.readouterr()
    assert json.loads(printed.out) == json.loads(json.dumps(done.found))
    assert "wrote" in printed.err and "held-out prompts: psnr" in printed.err
    ((given, _, call, chosen, folder, options),) = asked
    assert given is pipe and folder == tmp_path and options["position_scale"] == 0.5
    assert (call["height"], call["width"], call["num_inference_steps"]) == (512, 512, 3)
    assert chosen.budget == Budget(psnr=30, speedup=1.5) and chosen.methods == ("topk", "local")
    assert [item.index for item in (*chosen.items, *chosen.held_out)] == list(range(6))
    assert len(chosen.items) == 2
    (tmp_path / "prompts.txt").write_text("a cat\na dog\na car\n")
    assert main(["tune", *words[:-2], "--prompts", str(tmp_path / "prompts.txt")]) == 0
    chosen = asked[1][3]
    assert [x.prompt for x in chosen.items] == ["a cat", "a car"]
    assert [x.prompt for x in chosen.held_out] == ["a dog"]

    def impossible(*given, **options):
        raise ImpossibleBudget("the nearest has psnr 20")

    monkeypatch.setattr(tune_module, "tune", impossible)
    assert main(["tune", *words[:-2]]) == 1
    assert "NOT POSSIBLE: the nearest has psnr 20" in capsys.readouterr().out
