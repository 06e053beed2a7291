"""Kills commands at random moments, runs them again, and compares with runs that nobody disturbed.

Of ``distill``, ``distill prepare``, ``evaluate``, ``hunt`` and ``generate`` on a tiny model: each
is killed by SIGKILL or ended by SIGTERM at a random moment, again and again, and then runs to its
end; attention runs by a method drawn from all that there are. Nothing may be lost (what was
finished stays as it is), the results must be those of the undisturbed run, and no temporary file
may be left: by SIGTERM at once, by SIGKILL after the next run.

    python tests/kill_runs.py --seed 0 --each 20 --json kills.json

Each run is a fork of one process that has imported everything, so that the moments fall into the
work itself.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import threading
import time
import traceback
from pathlib import Path

import torch
import tqdm
import yaml
from adapter_folder import named
from distill_run import PROMPTS, write_config
from safetensors.torch import load_file
from tiny import flux_pipeline

from dittfast import break_even
from dittfast.cli import main as dittfast
from dittfast.disk.locks import LOCK
from dittfast.files import write_json
from dittfast.methods import METHODS
from dittfast.pipelines.measure import parity

SIGNALS = {"SIGKILL": signal.SIGKILL, "SIGTERM": signal.SIGTERM}
COMMANDS = ("train", "prepare", "evaluate", "hunt", "generate")
SPARSE = ("train", "evaluate", "generate")  # commands that a method is drawn for
CALL = [
    *("--height", "64", "--width", "96", "--steps", "2", "--max-sequence-length", "12"),
    *("--device", "cpu"),
]


class Lost(AssertionError):
    """A run that was disturbed ended with something else."""


def preload() -> None:
    """Import what the commands import, so that forks begin with the work."""
    import accelerate  # noqa: F401
    import diffusers.pipelines.flux.pipeline_flux
    import peft  # noqa: F401

    import dittfast.distill.trainer
    import dittfast.measure.tables
    import dittfast.pipelines.headhunter.hunt
    import dittfast.pipelines.measure.fidelity
    import dittfast.pipelines.measure.variants  # noqa: F401

    diffusers.utils.logging.disable_progress_bar()


class Bench:
    """A tiny model, and what each command does with it in a folder of its own."""

    def __init__(self, folder: Path, trains: bool):
        self.folder = folder
        flux_pipeline().save_pretrained(folder / "tiny")
        (folder / "prompts.txt").write_text("\n".join(PROMPTS[:2]) + "\n")
        self.methods, self._undisturbed = {}, {}
        for name, method in parity.METHODS.items():
            if name not in METHODS:
                continue
            chosen, options = named(method)
            data = {"method": chosen, "options": options, "schedule": {"min_tokens": 0}}
            self.methods[name] = folder / f"{name}.yaml"
            self.methods[name].write_text(yaml.safe_dump(data))
        if not trains:
            return
        self.data = folder / "shared"
        self.data.mkdir()
        train = {"steps": 6, "checkpoint_every": 1, "keep": 2}
        config = write_config(self.data, student={"options": {}}, train=train)
        self._must(self.run(["distill", "prepare", config]))

    @staticmethod
    def _must(status: int) -> None:
        if status:
            raise RuntimeError(f"an undisturbed run ended with {status}")

    def undisturbed(self, command: str, method: str | None) -> tuple[float, dict]:
        """Seconds and results of a run that nobody disturbs."""
        key = command, method
        if key not in self._undisturbed:
            out = self.folder / f"whole-{command}-{method}"
            began = time.monotonic()
            self._must(self.run(self.arguments(command, out, method)))
            self._undisturbed[key] = time.monotonic() - began, results(command, out)
        return self._undisturbed[key]

    def arguments(self, command: str, out: Path, method: str | None) -> list[str]:
        model = ["--model", str(self.folder / "tiny")]
        if command == "train":
            resume = ["--resume", "latest"] if out.is_dir() else []
            changes = f"student.method={self.methods[method]}", f"train.output={out}"
            return ["distill", str(self.data / "config.yaml"), *changes, *resume]
        if command == "prepare":
            config = str(self.data / "config.yaml")
            return ["distill", "prepare", config, f"data.folder={out}", "data.shard_size=1"]
        if command == "generate":
            picture = str(out.with_suffix(".png"))
            sparse = ["--config", str(self.methods[method])]
            call = [*CALL, "--true-cfg-scale", "1"]
            return ["generate", PROMPTS[0], *model, *sparse, *call, "-o", picture]
        prompts = ["--prompts", str(self.folder / "prompts.txt")]
        if command == "hunt":
            search = ["--objective", "contrast", "--rounds", "1", "--layers", "0"]
            return ["hunt", *search, *model, *prompts, *CALL, "-o", str(out)]
        sparse = ["--config", str(self.methods[method])]
        return ["evaluate", "fidelity", *sparse, *model, *prompts, *CALL, "-o", str(out)]

    def start(self, arguments: list[str]) -> int:
        """A fork that runs a command; its process id."""
        child = os.fork()
        if child:
            return child
        status = 1
        try:
            # Its usual lock is shared by all forks, and stays taken when one of them is killed.
            tqdm.tqdm.set_lock(threading.RLock())
            break_even.MEASURED = break_even.ESTIMATED = {}
            quiet = os.open(os.devnull, os.O_WRONLY)
            os.dup2(quiet, 1)
            log = os.open(self.folder / "log.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(log, 2)
            status = dittfast(arguments)
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)

    def run(self, arguments: list[str]) -> int:
        return os.waitstatus_to_exitcode(os.waitpid(self.start(arguments), 0)[1])

    def disturbed(self, arguments: list[str], number: int, seconds: float) -> int | None:
        """The exit status of a run that gets a signal after some seconds; None if it was done."""
        child = self.start(arguments)
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            done, status = os.waitpid(child, os.WNOHANG)
            if done:
                self._must(os.waitstatus_to_exitcode(status))
                return None
            time.sleep(0.01)
        os.kill(child, number)
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def temporary_files(out: Path) -> list[str]:
    """Hidden files and folders of ours, the lock apart."""
    places = [out.parent.glob(f".{out.stem}.*"), out.rglob(".*") if out.is_dir() else []]
    return sorted(p.name for found in places for p in found if p.name != LOCK)


def results(command: str, out: Path) -> dict:
    """What a run leaves, without times."""
    if command == "generate":
        return {"picture": out.with_suffix(".png").read_bytes()}
    if command == "train":
        lines = (out / "metrics.jsonl").read_text().splitlines()
        rows = [json.loads(line) for line in lines]
        weights = load_file(out / "adapter" / "attention.safetensors")
        return {
            "losses": [(row["step"], row["loss"]) for row in rows],
            "weights": {name: x.tolist() for name, x in weights.items()},
            "checkpoints": sorted(p.name for p in (out / "checkpoints").iterdir()),
        }
    if command == "prepare":
        return {p.name: p.read_bytes() for p in sorted(out.iterdir()) if p.name != LOCK}
    if command == "hunt":
        found = json.loads((out / "heads.json").read_text())
        state = json.loads((out / "state.json").read_text())
        return {"heads": found["heads"], "scores": state["scores"]}
    data = json.loads((out / "fidelity.json").read_text())
    pictures = {str(p.relative_to(out)): p.read_bytes() for p in out.glob("*/images/*.png")}
    return {"psnr": data["methods"][0]["pooled"]["psnr_db"], "pictures": pictures}


def finished(command: str, out: Path) -> dict[str, bytes]:
    """Files that a disturbed run has finished and a later one must keep as they are."""
    patterns = {
        "prepare": ["shard-*.safetensors"],
        "evaluate": ["*/images/[0-9]*.png", "*/latents/[0-9]*.npy"],
        "train": ["checkpoints/step-*/trainable.safetensors"],
    }.get(command, [])
    return {str(p): p.read_bytes() for x in patterns for p in out.glob(x)}


def trial(bench: Bench, command: str, name: str, method: str | None, draw) -> int:
    """Disturb a run one to three times and let it end; how many signals met it at work."""
    seconds, wanted = bench.undisturbed(command, method)
    out = bench.folder / "trials" / f"{command}-{draw.randrange(10**9)}"
    out.parent.mkdir(exist_ok=True)
    met = 0
    for _ in range(draw.randint(1, 3)):
        kept = finished(command, out)
        status = bench.disturbed(
            bench.arguments(command, out, method), SIGNALS[name], draw.uniform(0, seconds)
        )
        if status is None:
            break
        met += 1
        if name == "SIGTERM" and temporary_files(out):
            raise Lost(f"{command}: SIGTERM left {temporary_files(out)}")
        now = finished(command, out)
        rotated = command == "train"  # old checkpoints go when new ones are there
        if any(now.get(path, data if rotated else None) != data for path, data in kept.items()):
            raise Lost(f"{command}: {name} lost or changed what was finished")
    if bench.run(bench.arguments(command, out, method)):
        raise Lost(f"{command}: the run after {name} failed")
    if temporary_files(out):
        raise Lost(f"{command}: {temporary_files(out)} is left after the next run")
    if results(command, out) != wanted:
        raise Lost(f"{command}: other results after {name}")
    shutil.rmtree(out, ignore_errors=True)
    return met


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--each", type=int, default=20, help="signals of each kind to a command")
    parser.add_argument("--command", choices=COMMANDS, action="append")
    parser.add_argument("--json", type=Path, help="the counts, written after every command")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    torch.set_num_interop_threads(1)
    preload()
    counts, wrong = [], 0
    with tempfile.TemporaryDirectory() as folder:
        commands = options.command or COMMANDS
        bench = Bench(Path(folder), bool({"train", "prepare"} & set(commands)))
        for command in commands:
            for name in SIGNALS:
                draw = random.Random(f"{options.seed} {command} {name}")
                row = {"command": command, "signal": name, "signals": 0, "runs": 0, "lost": 0}
                drawn = set()
                while row["signals"] < options.each:
                    method = draw.choice(list(bench.methods)) if command in SPARSE else None
                    drawn |= {method} - {None}
                    row["runs"] += 1
                    try:
                        row["signals"] += trial(bench, command, name, method, draw)
                    except Lost as error:
                        row["lost"] += 1
                        row["signals"] += 1
                        print(f"{method}: {error}", flush=True)
                row["methods"] = sorted(drawn)
                wrong += row["lost"]
                counts.append(row)
                print(row, flush=True)
                if options.json:
                    write_json(options.json, {"seed": options.seed, "rows": counts})
        if wrong:
            print((bench.folder / "log.txt").read_text()[-4000:])
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
