"""Training runs: the loss falls, a killed run goes on to the bit, two processes equal one."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from distill_run import fresh_accelerate, make_config, one_thread, write_config  # noqa: F401
from interpreter import PYTHON
from safetensors.torch import load_file

from dittfast.cli import main
from dittfast.distill import checkpoint
from dittfast.distill import trainer as training
from dittfast.distill.adapter_files import read_weights
from dittfast.distill.checkpoint import Checkpoints
from dittfast.distill.loader import Dataset, mixed_batches
from dittfast.distill.trainer import Trainer, train

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """With a model and a training set that the tests share."""
    path = tmp_path_factory.mktemp("distill")
    make_config(path)
    return path


def run_config(folder, output, **sections):
    train_section = {"output": str(output), **sections.pop("train", {})}
    return make_config(folder, train=train_section, **sections)


def losses(output) -> list[dict]:
    lines = (Path(output) / "metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    return [{k: v for k, v in row.items() if not k.endswith("seconds")} for row in rows]


def state(output) -> dict[str, torch.Tensor]:
    """Every tensor of the newest checkpoint."""
    checkpoint = Checkpoints(Path(output) / "checkpoints", 2).latest()
    found = {f"p/{n}": x for n, x in load_file(checkpoint / "trainable.safetensors").items()}
    if (checkpoint / "average.safetensors").is_file():
        averages = load_file(checkpoint / "average.safetensors")
        found |= {f"average/{n}": x for n, x in averages.items()}
    optimizer = torch.load(checkpoint / "optimizer.pt", weights_only=True)["optimizer"]
    for index, values in optimizer["state"].items():
        found |= {f"{index}/{n}": torch.as_tensor(x) for n, x in values.items()}
    found["rng"] = torch.load(checkpoint / "rng-00000.pt", weights_only=True)["torch"]
    return found


def assert_same(a: dict, b: dict) -> None:
    assert a.keys() == b.keys()
    assert [n for n in a if not torch.equal(a[n], b[n])] == []


def test_the_loss_falls(folder, tmp_path):
    """A student with a window that hurts comes nearer to its teacher; the CI test."""
    config = run_config(
        folder,
        tmp_path / "run",
        objectives={"denoising": 0.0, "prediction": 1.0, "attention": 1.0},
        train={"steps": 60, "batch_size": 3, "lr": 3e-3, "checkpoint_every": 60, "ema": 0.9},
    )
    train(config)
    found = [row["loss"] for row in losses(tmp_path / "run")]
    assert len(found) == 60
    assert np.mean(found[-6:]) < 0.6 * np.mean(found[:6])


def test_losses_are_what_their_formulas_say(folder, tmp_path):
    """The logged values of the first step, computed again with a stock model in the open."""
    from dittfast.pipelines.runs.sources import find, load

    config = run_config(
        folder, tmp_path / "run", objectives={"features": 0.25},
        student={"method": "dense", "options": {}},
        train={"steps": 1, "drop_prompt": 0.5, "time_shift": 2.0},
    )  # fmt: skip
    trainer = Trainer(config)
    trainer._order = mixed_batches([trainer.dataset.shapes], [1.0], 2, config.train.seed)
    (micro,) = trainer._micros(0)
    trainer.run()
    (row,) = losses(tmp_path / "run")
    t = micro.t.view(-1, 1, 1)
    clean, noise = micro.batch.latents, micro.noise
    with torch.no_grad():
        prediction = load(find(config.model.path)).transformer(
            **micro.batch.arguments,
            hidden_states=(1 - t) * clean + t * noise,
            timestep=micro.t,
            return_dict=False,
        )[0]
    expected = float((prediction - (noise - clean)).double().square().mean())
    assert row["denoising"] == pytest.approx(expected, rel=1e-5)
    # A dense student starts as its teacher: only the denoising loss is not 0.
    assert row["prediction"] == row["attention"] == 0 and abs(row["features"]) < 1e-6
    assert row["loss"] == pytest.approx(row["denoising"] + 0.25 * row["features"])


def test_the_student_moves_and_the_teacher_does_not(folder, tmp_path):
    config = run_config(folder, tmp_path / "run", train={"steps": 3})
    trainer = Trainer(config)
    trained = set(trainer.parameters)
    values = trainer.student.transformer.state_dict()
    before = {n: x.clone() for n, x in values.items()}
    original = {n: x.clone() for n, x in trainer.student._original.items()}
    trainer.run()
    now = trainer.student.transformer.state_dict()
    changed = {n for n in before if not torch.equal(before[n], now[n])}
    assert changed and changed <= trained
    assert len(changed) >= len(trained) - 8  # biases of keys get no gradient: softmax ignores them
    assert all(torch.equal(original[n], before[n]) for n in original)
    assert_same(original, trainer.student._original)


@pytest.mark.parametrize(
    "options",
    [
        {"gradient_checkpointing": True},
        pytest.param(
            {"mixed_precision": "bf16", "gradient_checkpointing": True}, marks=pytest.mark.slow
        ),
    ],
)
def test_a_resumed_run_is_the_same_to_the_bit(folder, tmp_path, options):
    """Stopped after a step in the middle of an epoch, with averages, LoRA dropout and warm-up."""
    student = {"trainable": "lora", "rank": 4, "dropout": 0.3}
    settings = dict(
        steps=6, checkpoint_every=4, ema=0.9, accumulation=2, batch_size=1, drop_prompt=0.3,
        lr_schedule="cosine", warmup_steps=2, **options,
    )  # fmt: skip
    whole = run_config(folder, tmp_path / "whole", student=student, train=settings)
    train(whole)
    half = run_config(folder, tmp_path / "half", student=student, train=settings)
    trainer = Trainer(half)
    stop = trainer._train_step

    def until_five(micros):
        if trainer.step == 5:
            raise KeyboardInterrupt
        return stop(micros)

    trainer._train_step = until_five
    with pytest.raises(KeyboardInterrupt):
        trainer.run()
    torch.manual_seed(12345)
    with pytest.raises(ValueError, match="--resume latest"):
        Trainer(half)
    resumed = Trainer(half, "latest")
    assert resumed.step == 4
    resumed.run()
    assert losses(tmp_path / "half") == losses(tmp_path / "whole")
    assert_same(state(tmp_path / "half"), state(tmp_path / "whole"))
    half_adapter, whole_adapter = (
        read_weights(tmp_path / n / "adapter") for n in ("half", "whole")
    )
    assert_same(half_adapter, whole_adapter)


def test_windows_of_mixed_sets(folder, tmp_path):
    """Each step shows one set's pictures in part, at their places; a resumed run shows the same."""
    data = {"folder": str(tmp_path / "scaled"), "position_scale": 0.5, "count": 3}
    make_config(folder, data=data)
    plain = make_config(folder).data.folder
    data["mix"] = {plain: {"share": 2.0, "time_range": [0.5, 0.6], "crop": [2, 5]}}
    settings = dict(steps=6, checkpoint_every=2, crop=[3, 4], optimizer="muon")
    settings["time_range"] = [0.9, 1.0]
    sections = dict(data=data, train=settings, student={"trainable": "all"})
    seen = []

    class Watched(Trainer):
        def losses(self, micro):
            seen.append(micro)
            return super().losses(micro)

    Watched(run_config(folder, tmp_path / "whole", **sections)).run()
    steps = torch.tensor(
        [m.batch.arguments["img_ids"][:, 1:].diff(dim=0).abs().max() for m in seen]
    )
    # 3 columns back in halves, or 4 in ones.
    assert sorted((steps // 1).tolist()) == [1, 1, 4, 4, 4, 4]
    whole = {scale: Dataset(f) for scale, f in ((0.5, tmp_path / "scaled"), (1.0, plain))}
    for micro in seen:
        ids = micro.batch.arguments["img_ids"]
        scale = float(ids[1, 2] - ids[0, 2])
        rows, columns = (ids[:, 1:] / scale).long().unbind(1)
        pictures = [whole[scale].batch([i]).latents[0] for i in range(len(whole[scale]))]
        parts = [picture.view(8, 12, -1)[rows, columns] for picture in pictures]
        for latents, noise in zip(micro.batch.latents, micro.noise):
            assert latents.shape == noise.shape == ((12, 16) if scale < 1 else (10, 16))
            assert any(torch.equal(latents, part) for part in parts)
        low, high = (0.9, 1.0) if scale < 1 else (0.5, 0.6)
        assert ((micro.t >= low) & (micro.t <= high)).all()
    places = {tuple(m.batch.arguments["img_ids"][0].tolist()) for m in seen}
    assert len(places) > 3
    train(run_config(folder, tmp_path / "half", **sections | {"train": settings | {"steps": 4}}))
    train(run_config(folder, tmp_path / "half", **sections), "latest")
    assert losses(tmp_path / "half") == losses(tmp_path / "whole")
    assert_same(state(tmp_path / "half"), state(tmp_path / "whole"))


def test_mixed_sets_must_be_of_one_model(folder, tmp_path):
    config = make_config(folder)
    other = tmp_path / "other"
    shutil.copytree(config.data.folder, other)
    manifest = json.loads((other / "data.json").read_text())
    manifest["process"]["time_scale"] = 7.0
    del manifest["sha256"]
    (other / "data.json").write_text(json.dumps(manifest))
    mixed = run_config(folder, tmp_path / "run", data={"mix": {str(other): 1.0}})
    with pytest.raises(ValueError, match="other was made for another noise process"):
        Trainer(mixed)


KILLED = """
import os, shutil, signal, sys
import torch
torch.set_num_threads(1)
torch.set_num_interop_threads(1)
from dittfast.distill import trainer
from dittfast.distill.config import load_config

path, output = sys.argv[1:]


def run(name, kill_at=None, resume=None):
    # A child that trains, and is killed by SIGKILL at the given event of a checkpoint write.
    child = os.fork()
    if child:
        return os.waitpid(child, 0)[1]
    count = [0]

    def watched(function, before):
        def call(*args, **kwargs):
            count[0] += 1
            if before and count[0] == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)
            result = function(*args, **kwargs)
            return result
        return call

    if kill_at is not None:
        os.rename = watched(os.rename, True)
        os.fsync = watched(os.fsync, True)
        shutil.rmtree = watched(shutil.rmtree, True)
        trainer.torch.save = watched(torch.save, True)
        step = trainer.Trainer._train_step
        trainer.Trainer._train_step = watched(step, True)
    status = 1
    try:
        config = load_config(path, ["train.output=" + output + "/" + name])
        trainer.train(config, resume)
        status = 0
    finally:
        os._exit(status)


assert run("whole") == 0
for kill_at in range(1, 100):
    name = f"killed-{kill_at}"
    status = run(name, kill_at)
    if status == 0:
        break
    assert status == 9, (name, status)
    assert run(name, resume="latest") == 0, name
print("kills:", kill_at - 1)
"""


@pytest.mark.slow
def test_runs_killed_at_every_point_resume_to_the_bit(folder, tmp_path):
    """SIGKILL before each step and at each file, fsync, rename and removal of the checkpoints."""
    path = write_config(
        folder, train={"steps": 2, "checkpoint_every": 1, "keep": 1, "ema": 0.9, "batch_size": 1}
    )
    done = python("-c", KILLED, path, str(tmp_path), timeout=3600)
    assert done.returncode == 0, done.stdout + done.stderr
    kills = int(done.stdout.split("kills:")[1])
    assert kills > 20
    for run in sorted(tmp_path.glob("killed-*")):
        assert losses(run) == losses(tmp_path / "whole"), run.name
        assert_same(state(run), state(tmp_path / "whole"))
        left = sorted(p.name for p in (run / "checkpoints").iterdir())
        assert left == ["step-00000002"], run.name


def python(*arguments, timeout=3600):
    return subprocess.run(
        [*PYTHON, *arguments],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        timeout=timeout,
        check=False,
    )


def test_a_run_killed_while_it_writes_resumes_to_the_bit(folder, tmp_path, monkeypatch):
    """The quick form: the folder as a SIGKILL leaves it at the second checkpoint's last rename."""
    settings = {"steps": 3, "checkpoint_every": 1, "batch_size": 1}
    output, rename = tmp_path / "killed", os.rename

    def watched(a, b):
        if str(b).endswith("step-00000002"):
            shutil.copytree(tmp_path / "whole", output)
        rename(a, b)

    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", watched)
        train(run_config(folder, tmp_path / "whole", train=settings))
    there = sorted(p.name for p in (output / "checkpoints").iterdir())
    assert there == [".step-00000002.part", "step-00000001"]
    trainer = Trainer(run_config(folder, output, train=settings), "latest")
    assert trainer.step == 1
    trainer.run()
    assert losses(output) == losses(tmp_path / "whole")
    assert_same(state(output), state(tmp_path / "whole"))
    assert not list((output / "checkpoints").glob(".*"))


def launch(config: str) -> list[str]:
    """Two processes through a shipped file of accelerate; on CPUs they talk by gloo."""
    command = ["-m", "accelerate.commands.launch", "--num_processes", "2"]
    file = ROOT / "configs" / "accelerate" / config
    return [*command, "--main_process_port", "0", "--config_file", str(file)]


GLOBAL_BATCH = {"steps": 4, "batch_size": 2, "accumulation": 2, "drop_prompt": 0.3, "ema": 0.9}


def assert_near(one, two) -> None:
    """Loss curves and weights of two runs, within float noise."""
    a, b = losses(one), losses(two)
    assert len(a) == len(b) >= 4
    for x, y in zip(a, b):
        for name in x:  # pictures have 8 bits, and a value may be rounded the other way
            tolerance = 1e-3 if name.startswith("validation") else 2e-5
            assert y[name] == pytest.approx(x[name], rel=tolerance), name
    one_state, two_state = state(one), state(two)
    for name, x in one_state.items():
        if name.startswith(("p/", "average/")):
            assert float((two_state[name] - x).abs().max()) < 2e-4, name


@pytest.mark.slow
def test_two_processes_give_the_curve_of_one(folder, tmp_path):
    """DDP, through the documented command; the same global batch of 4 each time."""
    student = {"options": {"window": 2, "downsample": 2}}
    train(run_config(folder, tmp_path / "one", train=GLOBAL_BATCH, student=student))
    two = {**GLOBAL_BATCH, "accumulation": 1, "output": str(tmp_path / "two")}
    path = write_config(folder, train=two, student=student)
    done = python(*launch("ddp.yaml"), "-m", "dittfast.distill", path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert_near(tmp_path / "one", tmp_path / "two")
    assert len(list((tmp_path / "two" / "checkpoints").glob("step-00000004/rng-*"))) == 2


@pytest.mark.slow
@pytest.mark.parametrize(
    ("student", "options"),
    [
        ({"options": {"window": 2, "downsample": 2}}, {"accumulation": 1}),
        ({"trainable": "all"}, {"batch_size": 1, "gradient_checkpointing": True}),
        ({"trainable": "lora", "rank": 4}, {"accumulation": 1}),
    ],
    ids=["attention", "all", "lora"],
)
def test_two_processes_with_fsdp_give_the_curve_of_one(folder, tmp_path, student, options):
    """Sharded weights, averages and optimiser; stopped and resumed, the LoRA in one process."""
    validation = {"every": 4, "prompts": ["a red cat"]}
    one = {**GLOBAL_BATCH, "output": str(tmp_path / "one")}
    train(make_config(folder, train=one, student=student, validation=validation))
    two = {**GLOBAL_BATCH, **options, "output": str(tmp_path / "two"), "checkpoint_every": 2}
    path = write_config(folder, train=two, student=student, validation=validation)
    command = [*launch("fsdp.yaml"), "-m", "dittfast.distill", path]
    done = python(*command, "train.steps=2")
    assert done.returncode == 0, done.stderr[-3000:]
    if student.get("trainable") == "lora":
        again = {**GLOBAL_BATCH, "output": str(tmp_path / "two")}
        train(make_config(folder, train=again, student=student, validation=validation), "latest")
    else:
        done = python(*command, "--resume", "latest")
        assert done.returncode == 0, done.stderr[-3000:]
    rows = losses(tmp_path / "two")
    early = [row for row in rows if row["step"] == 2 and "validation/psnr_db" in row]
    assert len(early) == 1  # the first run ended there
    kept = "\n".join(json.dumps(row) for row in rows if row not in early)
    (tmp_path / "two" / "metrics.jsonl").write_text(kept + "\n")
    assert_near(tmp_path / "one", tmp_path / "two")
    a, b = (read_weights(tmp_path / name / "adapter") for name in ("one", "two"))
    assert a.keys() == b.keys()
    assert max(float((a[name] - b[name]).abs().max()) for name in a) < 2e-4


def test_nan_stops_the_run_and_names_the_loss(folder, tmp_path, monkeypatch):
    config = run_config(folder, tmp_path / "run", train={"steps": 6, "checkpoint_every": 2})
    trainer = Trainer(config)
    real, seen = training.attention_loss, []

    def broken(student, teacher):
        seen.append(0)
        value = real(student, teacher)
        return value * float("nan") if len(seen) == 4 else value

    monkeypatch.setattr(training, "attention_loss", broken)
    kept = {}

    def remember(*args):
        kept.update({n: p.detach().clone() for n, p in trainer.parameters.items()})
        return step(*args)

    step, trainer._train_step = trainer._train_step, remember
    with pytest.raises(FloatingPointError, match=r"step 3: attention is not finite.*step-00000002"):
        trainer.run()
    assert all(torch.equal(kept[n], p) for n, p in trainer.parameters.items())
    assert [p.name for p in trainer.checkpoints.all()] == ["step-00000002"]
    assert [row["step"] for row in losses(tmp_path / "run")] == [1, 2, 3]


def test_an_infinite_gradient_stops_the_run(folder, tmp_path):
    trainer = Trainer(run_config(folder, tmp_path / "run", train={"steps": 2}))
    first = next(iter(trainer.parameters.values()))
    first.register_hook(lambda grad: grad * float("inf"))
    with pytest.raises(FloatingPointError, match=r"gradient is not finite.*no checkpoint yet"):
        trainer.run()
    assert all(p.isfinite().all() for p in trainer.parameters.values())


def with_loss_scaling(monkeypatch, scale: float) -> None:
    """fp16 as accelerate sets it up on a GPU; on a CPU it would train in fp32 instead."""
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    def make(config):
        accelerator = Accelerator(cpu=True, mixed_precision="fp16")
        accelerator.native_amp = True
        accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=2)
        return accelerator

    AcceleratorState._reset_state(reset_partial_state=True)  # it holds the precision before
    monkeypatch.setattr(training, "make_accelerator", make)


def test_fp16_scales_the_loss_and_resumes_to_the_bit(folder, tmp_path, monkeypatch):
    settings = {"steps": 4, "checkpoint_every": 3, "batch_size": 1}
    plain = run_config(folder, tmp_path / "plain", train=settings)
    train(plain)
    with_loss_scaling(monkeypatch, 2.0**10)
    half = {**settings, "mixed_precision": "fp16"}
    train(run_config(folder, tmp_path / "whole", train=half))
    for a, b in zip(losses(tmp_path / "plain"), losses(tmp_path / "whole")):
        assert b["loss"] == pytest.approx(a["loss"], rel=0.02) and b["loss"] != a["loss"]
        assert b["gradient_norm"] == pytest.approx(a["gradient_norm"], rel=0.05)  # unscaled
    train(run_config(folder, tmp_path / "parts", train={**half, "steps": 3}))
    checkpoint = Checkpoints(tmp_path / "parts" / "checkpoints", 2).latest()
    saved = torch.load(checkpoint / "optimizer.pt", weights_only=True)["scaler"]
    assert saved["scale"] == 2.0**11 and saved["_growth_tracker"] == 1
    with_loss_scaling(monkeypatch, 2.0)
    train(run_config(folder, tmp_path / "parts", train=half), "latest")
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")
    assert_same(state(tmp_path / "parts"), state(tmp_path / "whole"))


def test_fp16_skips_steps_that_overflow_and_stops_if_all_do(folder, tmp_path, monkeypatch):
    with_loss_scaling(monkeypatch, 2.0**2)
    settings = {"steps": 9, "batch_size": 1, "mixed_precision": "fp16"}
    trainer = Trainer(run_config(folder, tmp_path / "run", train=settings))
    before = {n: p.detach().clone() for n, p in trainer.parameters.items()}
    next(iter(trainer.parameters.values())).register_hook(lambda grad: grad * float("inf"))
    with pytest.raises(FloatingPointError, match="step 3: gradient is not finite"):
        trainer.run()  # with scales of 4, 2 and 1 the steps are skipped
    assert all(torch.equal(before[n], p) for n, p in trainer.parameters.items())
    assert trainer.accelerator.scaler.get_scale() < 1


def test_tensorboard_gets_the_numbers(folder, tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    train(run_config(folder, tmp_path / "run", train={"steps": 2, "trackers": ["tensorboard"]}))
    found = EventAccumulator(str(tmp_path / "run" / "dittfast")).Reload()
    for name in ("loss", "attention", "gradient_norm"):
        values = [(e.step, e.value) for e in found.Scalars(name)]
        expected = [(row["step"], row[name]) for row in losses(tmp_path / "run")]
        assert [step for step, _ in values] == [1, 2]
        assert values == [(step, pytest.approx(x, rel=1e-6)) for step, x in expected]


def test_wandb_gets_the_numbers(folder, tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    sent = []
    log = wandb.Run.log
    monkeypatch.setattr(
        wandb.Run, "log", lambda run, data, **rest: (sent.append(data), log(run, data, **rest))
    )
    train(run_config(folder, tmp_path / "run", train={"steps": 2, "trackers": ["wandb"]}))
    rows = losses(tmp_path / "run")
    assert [row["loss"] for row in sent if "loss" in row] == [row["loss"] for row in rows]
    assert list((tmp_path / "wandb").glob("offline-run-*/*.wandb"))


def test_prodigy_trains_and_resumes_to_the_bit(folder, tmp_path):
    pytest.importorskip("prodigyopt")
    settings = {"optimizer": "prodigy", "lr": 1.0, "batch_size": 1, "checkpoint_every": 2}
    train(run_config(folder, tmp_path / "whole", train={**settings, "steps": 4}))
    train(run_config(folder, tmp_path / "parts", train={**settings, "steps": 2}))
    train(run_config(folder, tmp_path / "parts", train={**settings, "steps": 4}), "latest")
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")
    assert_same(state(tmp_path / "parts"), state(tmp_path / "whole"))


def test_a_resumed_run_finishes_what_a_kill_left_of_rotation(folder, tmp_path):
    config = run_config(folder, tmp_path / "run", train={"steps": 2, "keep": 1})
    train(config)
    at = tmp_path / "run" / "checkpoints"
    (at / ".step-00000001.gone").mkdir()
    shutil.copytree(at / "step-00000002", at / "step-00000001")
    train(config, "latest")
    assert [p.name for p in at.iterdir()] == ["step-00000002"]


def save_text(part):
    (part / "a").write_text("x")
    return {"a": 1}


def test_checkpoints_rotate(tmp_path):
    made = Checkpoints(tmp_path / "c", keep=2)
    assert made.latest() is None and made.all() == []
    for step in (5, 50, 500):
        made.write(step, save_text)
    assert [p.name for p in made.all()] == ["step-00000050", "step-00000500"]
    assert made.latest().name == "step-00000500"
    (tmp_path / "c" / ".step-00000600.part").mkdir()
    (tmp_path / "c" / ".step-00000050.gone").mkdir()
    assert made.latest().name == "step-00000500"
    made.write(600, save_text)
    assert sorted(p.name for p in (tmp_path / "c").iterdir()) == ["step-00000500", "step-00000600"]
    made.write(600, lambda part: pytest.fail("it is there"))


def test_a_checkpoint_loses_its_name_before_its_files(tmp_path, monkeypatch):
    """Killed while an old one is removed: no folder of that name is left, whole or not."""
    made = Checkpoints(tmp_path / "c", keep=1)
    made.write(1, save_text)

    def killed(folder, ignore_errors=False):
        if folder.exists():
            (folder / "a").unlink(missing_ok=True)
            raise KeyboardInterrupt

    monkeypatch.setattr(shutil, "rmtree", killed)
    with pytest.raises(KeyboardInterrupt):
        made.write(2, save_text)
    assert [p.name for p in made.all()] == ["step-00000002"]


def test_generators_go_on_where_they_were(tmp_path):
    """In the middle of their blocks of numbers too, and with half of a pair of normal ones kept."""
    np.random.random(5), np.random.standard_normal(), random.random(), torch.rand(3)
    torch.save(checkpoint.rng_state(), tmp_path / "rng.pt")

    def draw():
        numpy = np.random.standard_normal(3), np.random.random(3)
        return [*numpy[0], *numpy[1], random.random(), random.gauss(0, 1), *torch.rand(3).tolist()]

    expected = draw()
    checkpoint.set_rng_state(torch.load(tmp_path / "rng.pt", weights_only=True))
    assert draw() == expected


def test_what_does_not_fit_is_refused(folder, tmp_path):
    def refuse(error, message, resume=None, **sections):
        with pytest.raises(error, match=message):
            Trainer(run_config(folder, tmp_path / "run", **sections), resume)

    refuse(FileNotFoundError, "no run in", resume="latest")
    refuse(FileNotFoundError, "no checkpoint", resume=str(tmp_path))
    refuse(ValueError, "mixed_precision=bf16", model={"dtype": "bfloat16"})
    refuse(ValueError, "another model.*sample-flux", model={"path": "sample-flux"})
    refuse(ValueError, "train.trackers names wandb", train={"trackers": ["wandb"]})
    if not torch.accelerator.is_available():
        refuse(ValueError, "fp16 needs a GPU", train={"mixed_precision": "fp16"})
    done = run_config(folder, tmp_path / "run", train={"steps": 1})
    train(done)
    refuse(ValueError, "global_batch 2.*has 4", resume="latest", train={"accumulation": 2})
    refuse(ValueError, "seed 0.*has 1", resume="latest", train={"seed": 1})
    trainable = {"trainable": "lora"}
    change = r"another training \(student.trainable: 'attention' -> 'lora'"
    refuse(ValueError, change, resume="latest", student=trainable)


def test_validation_measures_against_the_teacher(folder, tmp_path):
    """Oracle: the stock pipeline's pictures, and PSNR from its definition."""
    from dittfast.distill.artifacts import load_adapter
    from dittfast.pipelines.runs.sources import find, load

    config = run_config(
        folder, tmp_path / "run", train={"steps": 2, "lr": 1e-2},
        validation={"every": 1, "prompts": ["a red cat", "a dog"]},
    )  # fmt: skip
    trainer = Trainer(config)
    trainer.run()
    rows = [row for row in losses(tmp_path / "run") if "validation/psnr_db" in row]
    assert [row["step"] for row in rows] == [0, 1, 2]
    pictures = sorted(p.name for p in (tmp_path / "run" / "validation").iterdir())
    assert pictures == [f"step-0000000{i}.png" for i in range(3)]
    pipe = load(find(config.model.path))
    pipe.set_progress_bar_config(disable=True)

    def draw():
        return [
            pipe(
                prompt, **config.data.call, output_type="np",
                generator=torch.Generator().manual_seed(1000 + i),
            ).images[0]
            for i, prompt in enumerate(config.validation.prompts)
        ]  # fmt: skip

    dense = draw()
    load_adapter(pipe, tmp_path / "run" / "adapter")
    sparse = draw()
    errors = [((np.rint(a * 255) - np.rint(b * 255)) ** 2).mean() for a, b in zip(dense, sparse)]
    expected = np.mean([10 * np.log10(255**2 / e) for e in errors])
    assert rows[-1]["validation/psnr_db"] == pytest.approx(expected, abs=1e-4)


def test_command_line(folder, tmp_path, capsys):
    path = write_config(folder, train={"output": str(tmp_path / "run"), "steps": 1})
    assert main(["distill", "prepare", path]) == 0
    assert main(["distill", path, "train.steps=2", "--resume", "latest"]) == 2
    assert "no run in" in capsys.readouterr().err
    assert main(["distill", path]) == 0
    assert f"wrote {tmp_path / 'run' / 'adapter'}" in capsys.readouterr().out
    assert main(["distill", path, "--resume", "latest", "train.steps=2"]) == 0
    assert "step 2: loss" in capsys.readouterr().out
    assert main(["distill", path]) == 2
    assert "--resume latest" in capsys.readouterr().err


def test_metrics_survive_a_half_written_line(folder, tmp_path):
    config = run_config(folder, tmp_path / "run", train={"steps": 2, "checkpoint_every": 1})
    train(config)
    with open(tmp_path / "run" / "metrics.jsonl", "a") as file:
        file.write('{"step": 3, "lo')
    more = run_config(folder, tmp_path / "run", train={"steps": 3, "checkpoint_every": 1})
    train(more, "latest")
    assert [row["step"] for row in losses(tmp_path / "run")] == [1, 2, 3]


def test_length_extension(folder, tmp_path):
    """Radial LoRA on clips of more frames than before, the first layer dense; then used."""
    from distill_run import CALLS

    import dittfast
    from dittfast.distill.artifacts import load_adapter
    from dittfast.files import save_video
    from dittfast.pipelines.runs.sources import find, load

    clips = tmp_path / "clips"
    clips.mkdir()
    for i in range(2):
        noise = np.random.default_rng(i).integers(0, 255, (1, 48, 80, 3), dtype=np.uint8)
        fading = np.repeat(noise, 18, 0) // (1 + np.arange(18).reshape(-1, 1, 1, 1))
        save_video(clips / f"{i}.gif", fading.astype(np.uint8))
        (clips / f"{i}.txt").write_text("a red car moves left")
    long = CALLS["wan"] | {"num_frames": 17}
    config = make_config(
        folder, "wan",
        data={"pictures": str(clips), "prompts": [], "count": 2, "folder": str(tmp_path / "long"),
              "call": long},
        student={
            "method": "radial", "options": {"block_size": 16}, "trainable": "lora", "rank": 4,
            "schedule": {"dense_layers": [0]},
        },
        objectives={"denoising": 1.0, "prediction": 0.0, "attention": 0.0},
        train={"output": str(tmp_path / "run"), "steps": 30, "lr": 1e-2, "time_range": [0.5, 0.6]},
    )  # fmt: skip
    train(config)
    found = [row["loss"] for row in losses(tmp_path / "run")]
    assert np.mean(found[-5:]) < 0.97 * np.mean(found[:5])
    pipe = load(find(config.model.path))
    pipe.set_progress_bar_config(disable=True)
    load_adapter(pipe, tmp_path / "run" / "adapter")
    frames = pipe("a red car", **long, output_type="np").frames[0]
    assert frames.shape[0] == 17 and np.isfinite(frames).all()
    described = dittfast.describe(pipe)
    assert described.num_tokens == 5 * 3 * 5 and described.density < 1
    assert [layer.dense is None for layer in described.layers] == [False, True]
