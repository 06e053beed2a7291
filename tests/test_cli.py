"""The command line, in process; and what only a process shows: start-up time, Ctrl-C."""

import json
import math
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from interpreter import PYTHON
from PIL import Image
from tiny import assert_same_picture, flux_pipeline, wan_pipeline
from tqdm import tqdm

import dittfast
from dittfast.attention import BACKENDS
from dittfast.cli import COMMANDS, main
from dittfast.cli.options import compact, parse_options, seconds
from dittfast.layout import Layout
from dittfast.methods import Local, Radial
from dittfast.schedule import Schedule

ROOT = Path(__file__).resolve().parent.parent


def words(line: str) -> list[str]:
    return line.split()


SMALL = words("--height 64 --width 96 --steps 2 --max-sequence-length 12 --device cpu")
SPARSE = words("--method local --set window=3 --set tile=[1,4,4] --set min_tokens=0")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = tmp_path_factory.mktemp("models") / "tiny-flux"
    flux_pipeline().save_pretrained(path)
    return str(path)


@pytest.fixture
def out(tmp_path):
    folder = tmp_path / "out"
    folder.mkdir()
    return folder


def names(folder):
    return sorted(p.name for p in folder.iterdir())


def pixels(path):
    return np.asarray(Image.open(path))


def by_hand(**options):
    """What the stock pipeline draws, with a method if one is given."""
    pipe = flux_pipeline()
    if options:
        dittfast.enable(pipe, **options)
    image = pipe(
        "a red cat", height=64, width=96, num_inference_steps=2, max_sequence_length=12,
        generator=torch.Generator().manual_seed(0), output_type="np",
    ).images[0]  # fmt: skip
    return (image * 255).round().astype(np.uint8)


def python(*arguments, **options):
    return subprocess.run(
        [*PYTHON, *arguments],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        timeout=300,
        **options,
    )


def test_generate_draws_the_stock_picture(model, out, capsys):
    assert main(["generate", "a red cat", "--model", model, "-o", str(out / "a.png"), *SMALL]) == 0
    assert names(out) == ["a.json", "a.png"]
    assert_same_picture(pixels(out / "a.png"), by_hand())
    data = json.loads((out / "a.json").read_text())
    assert data["attention"] is None and len(data["timing"]["runs"][0]["steps"]) == 2
    assert "wrote" in capsys.readouterr().out.splitlines()[-1]


def test_generate_compare(model, out, capsys):
    arguments = ["generate", "a red cat", "--model", model, "-o", str(out / "a.png"), *SMALL]
    assert main([*arguments, *SPARSE, "--compare", "--save-all"]) == 0
    assert names(out) == ["a.dense.png", "a.difference.png", "a.json", "a.local.png", "a.png"]
    dense, sparse = pixels(out / "a.dense.png"), pixels(out / "a.local.png")
    assert_same_picture(dense, by_hand())
    method = Local(window=3, tile=(1, 4, 4))
    assert_same_picture(sparse, by_hand(method=method))
    data = json.loads((out / "a.json").read_text())
    error = ((dense / 255.0 - sparse / 255.0) ** 2).mean()
    assert data["against_dense"]["psnr_db"] == pytest.approx(-10 * math.log10(error), abs=1e-6)
    mask = method.plan(Layout.image(8, 12, text=12)).to_dense_mask()
    assert data["sparse"]["density"] == pytest.approx(float(mask.double().mean()))
    assert data["files"] == ["a.png", "a.dense.png", "a.local.png", "a.difference.png"]
    shown = capsys.readouterr().out
    assert f"{data['dense_over_sparse']['per_step']:.2f}x a step" in shown
    page = pixels(out / "a.png")
    enlarged = dense.repeat(3, 0).repeat(3, 1)  # 96 px pictures are shown at 288
    rows = [y for y in range(page.shape[0] - 192) if np.array_equal(page[y, 15:303], enlarged[0])]
    assert any(np.array_equal(page[y : y + 192, 15:303], enlarged) for y in rows)


def test_plan_probe_draws_what_is_kept_of_a_run(model, out, capsys):
    arguments = [*words("plan --method rectified --set block_size=16 --set topk=1 --layers 0,-1")]
    arguments += ["--probe", model, "--prompt", "a red cat", "--steps", "2"]
    picture, record = out / "kept.png", out / "kept.json"
    assert main([*arguments, "-o", str(picture), "--json", str(record)]) == 0
    data = json.loads(record.read_text())
    heads = [head for call in data["calls"] for head in call["heads"]]
    assert len(data["calls"]) == 2 and len(heads) == 4 and data["calls"][0]["step"] == 1
    assert data["mass"] == pytest.approx(np.mean([h["mass"] for h in heads]))
    assert all(0 < h["density"] < 1 and 0 < h["mass"] < 1 for h in heads)
    assert f"{data['mass']:.3f}" in capsys.readouterr().out
    page = pixels(picture)
    blue, red = np.array([23, 66, 112]), np.array([190, 46, 40])
    assert (page == blue).all(-1).any() and (page == red).all(-1).any()


def test_plan_without_a_grid_names_what_is_missing(capsys):
    assert main(words("plan --method local --height 4")) == 2
    assert "--width is missing" in capsys.readouterr().err
    assert main(words("plan --method local --probe --layers a")) == 2
    assert "--layers must be numbers" in capsys.readouterr().err


def test_generate_says_when_it_ran_dense(model, out, capsys):
    arguments = ["generate", "a red cat", "--model", model, "-o", str(out / "a.png"), *SMALL]
    options = words("--method local --set min_tokens=5000 --compare")
    assert main([*arguments, *options]) == 0
    shown = capsys.readouterr()
    assert shown.err.count("dense: 108 tokens are fewer than the 5,000") == 1
    assert "108 tokens are below min_tokens 5,000" in shown.out
    assert "identical pictures" in shown.out
    data = json.loads((out / "a.json").read_text())
    assert data["sparse"]["density"] == 1.0
    assert data["dense_over_sparse"] == {"per_step": None, "whole": None}
    assert "below min_tokens 5,000; min_tokens=0 runs it at any size" in data["did_not_run"]
    assert "no ratio: local DID NOT RUN (0 of 4 layers sparse" in shown.out


def test_a_name_means_on_the_command_line_what_it_means_in_python(model, out, capsys):
    """No preset is taken that was not asked for; one that was is named."""
    arguments = ["generate", "a red cat", "--model", model, "-o", str(out / "a.png"), *SMALL]
    assert main([*arguments, "--method", "local"]) == 0
    drawn = pixels(out / "a.png").astype(int)
    # A kernel may add in another order where memory lies otherwise: one value in thousands.
    assert (drawn != by_hand(method="local")).mean() < 1e-3 < (drawn != by_hand()).mean()
    data = json.loads((out / "a.json").read_text())
    assert data["preset"] is None and data["attention"]["schedule"]["min_tokens"] is None
    assert main([*arguments, "--method", "local/sample-flux", "--compare"]) == 0
    shown = capsys.readouterr().out
    assert "preset    local/sample-flux" in shown and "DID NOT RUN" in shown  # 4 dense steps
    assert json.loads((out / "a.json").read_text())["preset"] == "local/sample-flux"
    with pytest.raises(ValueError, match="is for WanTransformer3DModel, and this model is Flux"):
        dittfast.enable(flux_pipeline(), "radial/wan2.1")
    with dittfast.enable(flux_pipeline(), "radial/wan2.1", any_model=True, dense_layers=()):
        pass
    assert main([*arguments, *words("--method radial/wan2.1 --any-model")]) == 0
    assert "this model is FluxTransformer2DModel; taken all the same" in capsys.readouterr().err


def test_stages_say_where_the_method_did_not_run(model, out, capsys):
    arguments = ["generate", "a red cat", "--model", model, "-o", str(out / "a.png")]
    arguments += words("--stages 64x96,80x120 --max-sequence-length 12 --device cpu --steps 3")
    assert main([*arguments, "--method", "local/sample-flux"]) == 0
    shown = capsys.readouterr().out
    assert "local DID NOT RUN (0 of 3 denoising steps sparse" in shown
    assert "preset    local/sample-flux" in shown
    stage = json.loads((out / "a.json").read_text())["stages"][1]
    assert stage["attention"]["did_not_run"].startswith("0 of 3 denoising steps")


def test_density_of_a_method_that_chooses_at_every_call(model, out):
    from dittfast.cli.generate import _captions
    from dittfast.methods.amount import Amount

    arguments = ["generate", "a red cat", "--model", model, "-o", str(out / "a.png"), *SMALL]
    assert main([*arguments, *words("--method rectified --set block_size=16 --compare")]) == 0
    data = json.loads((out / "a.json").read_text())
    assert 0 < data["sparse"]["density"] < 1  # the mean over calls
    described = SimpleNamespace(method=Local(), schedule=Schedule(dense_first_steps=2))
    arms = [
        SimpleNamespace(
            name=n,
            seconds=1.0,
            seconds_per_step=0.1,
            amount=Amount(d, None),
            description=about,
            did_not_run=None,
        )
        for n, d, about in (("dense", 1.0, None), ("x", None, described))
    ]
    assert "density differs by call" in _captions(arms, data, 1)[1][1][1]
    arms[1].amount = Amount(None, 0.0321)
    assert "FLOPs 0.0321 of dense, 2 steps" in _captions(arms, data, 1)[1][1][1]
    arms[1].amount = Amount(0.25, 0.3)
    assert "density 0.250, 2 steps dense" in _captions(arms, data, 1)[1][1][1]


def test_a_sample_model_brings_its_own_call(model, out, capsys, monkeypatch):
    from dittfast.pipelines.runs import sources

    settings = {
        "prompts": ["a red cat", "a dog"], "labels": ["cat", "dog"], "height": 64, "width": 96,
        "num_inference_steps": 2, "max_sequence_length": 12,
    }  # fmt: skip
    folder = Path(model)
    (folder / "sample.json").write_text(json.dumps(settings))
    monkeypatch.setattr(sources, "sample_models", lambda: {"tiny-flux": folder})
    try:
        assert main(["generate", "--examples", "--model", "tiny-flux"]) == 0
        shown = capsys.readouterr().out
        assert shown.splitlines()[:2] == ["a red cat", "a dog"] and "cat, dog" in shown
        options = words("--method local --set window=2 --backend reference")
        options += words("--model tiny-flux --device cpu")
        assert main(["generate", "a red cat", *options, "-o", str(out / "a.png")]) == 0
        data = json.loads((out / "a.json").read_text())
        assert data["call"]["height"] == 64 and data["model"] == "tiny-flux"
        assert data["attention"]["schedule"]["min_tokens"] is None
        options += ["--set", "min_tokens=7", "-o", str(out / "b.png")]
        assert main(["generate", "a", *options]) == 0
        data = json.loads((out / "b.json").read_text())
        assert data["attention"]["schedule"]["min_tokens"] == 7
    finally:
        (folder / "sample.json").unlink()


def test_a_config_file_is_a_method(model, out, tmp_path):
    config = tmp_path / "mine.yaml"
    config.write_text("method: radial\noptions: {block_size: 16}\nschedule: {dense_layers: [0]}\n")
    arguments = ["generate", "a red cat", "--model", model, *SMALL, "-o", str(out / "a.webp")]
    assert main([*arguments, "--config", str(config)]) == 0
    data = json.loads((out / "a.json").read_text())
    assert data["attention"]["method"]["block_size"] == 16
    assert list(data["attention"]["dense_layers"]) == ["transformer_blocks.0.attn"]
    assert pixels(out / "a.webp").shape == (64, 96, 3)


def test_a_video_becomes_a_moving_picture(out, tmp_path):
    import imageio.v3 as iio

    model = tmp_path / "tiny-wan"
    wan_pipeline().save_pretrained(model)
    arguments = ["generate", "a dog", "--model", str(model), "--height", "48", "--width", "80"]
    arguments += words("--steps 1 --max-sequence-length 12 --device cpu")
    options = ["--method", "radial", "--set", "block_size=16", "--num-frames", "5", "--compare"]
    assert main([*arguments, *options, "-o", str(out / "a.gif")]) == 0
    frames = iio.imread(out / "a.gif")
    assert frames.shape[0] == 5 and frames.shape[2] > 3 * 80
    assert main([*arguments, "--num-frames", "5", "--numbered", "-o", str(out / "c.png")]) == 0
    assert sorted(p.name for p in out.glob("c.*png")) == [f"c.{n:03}.png" for n in range(5)]
    assert main([*arguments, "--num-frames", "1", "-o", str(out / "b.png")]) == 0
    assert pixels(out / "b.png").shape == (48, 80, 3)


BAD = [
    ([], "the prompt is missing"),
    (["  "], "the prompt is empty"),
    (["a", "-o", "{out}/a.txt"], "must end in .png"),
    (["a", "-o", "{out}/no/a.png"], "does not exist; create it: mkdir -p"),
    (["a", "--seed", "-1"], "--seed must lie in 0.."),
    (["a", "--height", "-64"], "height must be at least 1, got -64"),
    (["a", "--steps", "0"], "--num-inference-steps/--steps must be at least 1, got 0"),
    (["a", "--runs", "0"], "runs must be at least 1, got 0"),
    (["a", "--model", "{out}"], "without a model_index.json"),
    (["a", "--model", "sample-fluks"], "no model 'sample-fluks'"),
    (["a", "--method", "locl"], "Did you mean 'local'?"),
    (["a", "--method", "local", "--set", "windw=3"], "Did you mean 'window'?"),
    (["a", "--method", "local", "--set", "window=-1"], "window"),
    (["a", "--method", "local", "--set", "window"], "KEY=VALUE"),
    (["a", "--method", "local", "--backend", "tritn"], "Did you mean 'triton'?"),
    (["a", "--set", "window=3"], "--set needs a method"),
    (["a", "--compare"], "--compare needs a method"),
    (["a", "--config", "{out}/no.yaml"], "no config file at"),
    (["a", "--device", "cuda:99"], "there is no device cuda:99 here"),
    (["a", "--height", "60"], "the nearest is 56 or 64"),
    (["a", "--num-frames", "5"], "FluxPipeline takes no num_frames"),
    (["a", "-o", "{out}/a.gif"], "draws one picture; name it .png"),
    (["--examples"], "is no sample model"),
]


@pytest.mark.parametrize("arguments, message", BAD, ids=[" ".join(a)[:40] or "-" for a, _ in BAD])
def test_bad_input_is_one_line_and_costs_nothing(model, out, capsys, arguments, message):
    (out / "a.png").write_text("old")
    full = [a.replace("{out}", str(out)) for a in arguments]
    for option, value in {"--model": model, "-o": str(out / "a.png"), "--device": "cpu"}.items():
        full += [] if option in arguments else [option, value]
    assert main(["generate", *full]) == 2
    error = [x for x in capsys.readouterr().err.splitlines() if x.startswith("dittfast: error: ")]
    assert len(error) == 1 and message in error[0]
    assert names(out) == ["a.png"] and (out / "a.png").read_text() == "old"


def test_an_output_is_asked_for(model, capsys):
    assert main(["generate", "a", "--model", model]) == 2
    assert "-o FILE is missing" in capsys.readouterr().err


def test_debug_shows_the_traceback(model):
    with pytest.raises(ValueError, match="the prompt is empty"):
        main(["generate", " ", "--model", model, "-o", "a.png", "--debug"])


@pytest.mark.parametrize("before, after", [(["--debug"], []), ([], ["--debug"])])
def test_debug_stands_before_a_task_or_after_it(before, after):
    with pytest.raises(ValueError, match="'locl'"):
        main(["evaluate", *before, "latency", "-m", "locl", *after])


def test_overflow_is_no_picture(model, out, capsys, monkeypatch):
    from dittfast.pipelines.runs import sources

    load = sources.load

    def overflowing(*arguments):
        pipe = load(*arguments)
        with torch.no_grad():
            pipe.vae.decoder.conv_out.bias.fill_(torch.inf)
            pipe.vae.decoder.conv_out.weight.fill_(torch.nan)
        return pipe

    monkeypatch.setattr(sources, "load", overflowing)
    assert main(["generate", "a", "--model", model, "-o", str(out / "a.png"), *SMALL]) == 2
    assert "not finite" in capsys.readouterr().err
    assert names(out) == []


@pytest.mark.parametrize("when", ["drawing", "writing"])
def test_an_interrupt_leaves_what_was_there(model, out, capsys, monkeypatch, when):
    from dittfast.cli import generate as command
    from dittfast.pipelines.runs import compare as module

    (out / "a.png").write_text("old")

    def interrupted(path, *_):
        if when == "writing":
            path.write_text("half")
        raise KeyboardInterrupt

    target = (module, "run") if when == "drawing" else (command, "_save")
    monkeypatch.setattr(*target, interrupted)
    assert main(["generate", "a", "--model", model, "-o", str(out / "a.png"), *SMALL]) == 130
    assert "interrupted" in capsys.readouterr().err
    assert names(out) == ["a.png"] and (out / "a.png").read_text() == "old"


@pytest.mark.skipif(os.name == "nt", reason="sends SIGINT")
def ends_within(child: int, limit: float) -> tuple[int, int]:
    """``os.waitpid`` that gives up after a number of seconds, and returns 0 for the process."""
    until = time.monotonic() + limit
    while time.monotonic() < until:
        ended = os.waitpid(child, os.WNOHANG)
        if ended[0]:
            return ended
        time.sleep(0.05)
    return 0, 0


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_ctrl_c_in_a_real_process(model, out):
    (out / "a.png").write_text("old")
    arguments = ["generate", "a", "--model", model, "-o", str(out / "a.png")]
    arguments += words("--steps 100000 --device cpu")
    read, write = os.pipe()
    child = os.fork()  # a process that need not import everything again
    if not child:
        try:
            # A test run in the background of a shell ignores SIGINT, and its children would too.
            signal.signal(signal.SIGINT, signal.default_int_handler)
            torch.set_num_threads(1)  # the threads of the parent are not here
            tqdm.set_lock(threading.RLock())
            sys.stderr = os.fdopen(write, "w", buffering=1)
            os._exit(main(arguments))
        finally:
            os._exit(99)
    os.close(write)
    with os.fdopen(read) as stderr:
        for line in stderr:
            if "the first of 100000 steps is done" in line:  # it draws
                break
        # Python drops an interrupt that falls into a destructor; people press Ctrl-C again.
        for _ in range(5):
            os.kill(child, signal.SIGINT)
            ended, status = ends_within(child, 30)
            if ended:
                break
        else:
            os.kill(child, signal.SIGKILL)
            _, status = os.waitpid(child, 0)
        errors = stderr.read()
    assert os.waitstatus_to_exitcode(status) == 130, errors
    assert "interrupted; no half-written file" in errors
    assert names(out) == ["a.png"] and (out / "a.png").read_text() == "old"


def test_plan_prints_and_draws_what_the_method_plans(out, capsys):
    arguments = words("plan --method radial --set block_size=16 --set decay_factor=0.5")
    arguments += words("--frames 7 --height 5 --width 8 --text 9 --head-dim 64 --heads 3")
    arguments += ["-o", str(out / "p.png"), "--json", str(out / "p.json")]
    assert main(arguments) == 0
    data = json.loads((out / "p.json").read_text())
    plan = Radial(block_size=16, decay_factor=0.5).plan(Layout.video(7, 5, 8, text=9))
    kept = plan.to_dense_mask()[0, 0]
    n = 7 * 5 * 8 + 9
    assert kept.shape == (n, n)
    assert data["tokens"] == n and data["text_first"] is False
    assert data["density"] == pytest.approx(int(kept.sum()) / n**2)
    assert data["flops"] == pytest.approx(4 * int(kept.sum()) * 64 * 3)
    assert data["dense_flops"] == pytest.approx(4 * n**2 * 64 * 3)
    assert data["listed_blocks"] == int(plan.to_block_mask().sum())
    assert data["build_seconds"] > 0
    assert f"{data['density']:.4f}" in capsys.readouterr().out
    assert Image.open(out / "p.png").width > 700


def test_plan_puts_text_where_it_is_told(out):
    for flags, first in (([], True), (["--text-last"], False), (["--text-first"], True)):
        arguments = words("plan --method local --height 6 --width 6 --text 5 --json")
        assert main([*arguments, str(out / "p.json"), *flags]) == 0
        assert json.loads((out / "p.json").read_text())["text_first"] is first
    video = words("plan --method radial --frames 3 --height 6 --width 6 --text 5 --json")
    assert main([*video, str(out / "p.json")]) == 0
    assert json.loads((out / "p.json").read_text())["text_first"] is False


@pytest.mark.parametrize(
    "arguments, message",
    [
        ("--height 4 --width 4", "the method is missing"),
        ("--method radil --height 4 --width 4", "Did you mean 'radial'?"),
        ("--method local --height 0 --width 4", "--height must be at least 1, got 0"),
        ("--method local --height 4 --width 4 --text -1", "text must be"),
        ("--method local --height 4 --width 4 --set min_tokens=3", "belongs to the schedule"),
        ("--method local --height 4 --width 4 --heads 0", "--heads must be at least 1, got 0"),
        ("--method local --height 4 --width 4 -o p.jpg", "must end in .png"),
        ("--method local --height 4 --width 4 --set window=3 --set window=4", "twice"),
    ],
)
def test_plan_bad_input(capsys, arguments, message):
    assert main(["plan", *arguments.split()]) == 2
    assert message in capsys.readouterr().err


def test_plan_refuses_methods_without_a_mask_of_their_own(capsys, monkeypatch):
    from dataclasses import dataclass

    from dittfast import config
    from dittfast.methods.base import Method

    @dataclass(frozen=True)
    class Dynamic(Method):
        name = "dynamic"
        static = False

        def plan(self, layout, q=None, k=None):
            raise AssertionError("planned without q and k")

    monkeypatch.setitem(config.METHODS, "dynamic", Dynamic)
    assert main(["plan", "--method", "dynamic", "--height", "4", "--width", "4"]) == 2
    assert "chooses blocks from q and k" in capsys.readouterr().err


def test_doctor_checks_results_not_only_imports(capsys, monkeypatch):
    reference = BACKENDS["reference"]()
    wrong = SimpleNamespace(
        not_supported_reasons=lambda q, k, v: [],
        attend=lambda *a: tuple(1.01 * x for x in reference.attend(*a)),
    )
    refusing = SimpleNamespace(not_supported_reasons=lambda q, k, v: ["needs a toaster"])
    monkeypatch.setitem(BACKENDS, "triton", lambda: refusing)
    monkeypatch.setattr("dittfast.environment.devices", lambda: [torch.device("cpu")])
    monkeypatch.setattr("dittfast.cli.doctor._compiler_finding", lambda: "not asked")
    monkeypatch.setattr("dittfast.attention.choose_backend", lambda device: "cpu")
    monkeypatch.setitem(BACKENDS, "native", lambda: refusing)
    monkeypatch.setitem(BACKENDS, "cpu", lambda: reference)
    assert main(["doctor"]) == 0
    shown = capsys.readouterr().out
    assert "float32, float16, bfloat16 right forward and backward" in shown
    assert "cannot run: needs a toaster" in shown
    assert "attention works here" in shown and torch.__version__ in shown
    monkeypatch.setitem(BACKENDS, "cpu", lambda: wrong)
    assert main(["doctor"]) == 1
    shown = capsys.readouterr().out
    assert "FAILS" in shown and "exceeds the budget" in shown
    assert "attention does not work here" in shown


def test_options_are_yaml_values():
    pairs = ["a=8", "b=[1, 2]", "c=true", "d=1e-3", "e=null", "f=x-y", "g=", "h='8'", "i=a=b"]
    expected = dict(a=8, b=[1, 2], c=True, d=0.001, e=None, f="x-y", g=None, h=8.0, i="a=b")
    assert parse_options(pairs) == expected
    for bad, message in (("a", "KEY=VALUE"), ("=3", "KEY=VALUE"), ("a=[1", "no YAML value")):
        with pytest.raises(ValueError, match=message):
            parse_options([bad])


def test_numbers_are_readable():
    assert [compact(x) for x in (0, 12, 1234, 2.5e12)] == ["0", "12", "1.23 k", "2.5 T"]
    assert compact(3.1e6, "B") == "3.1 MB"
    assert [seconds(x) for x in (0.01234, 1.5, 123.4)] == ["0.0123 s", "1.5 s", "123 s"]


def test_usage_errors_and_help(capsys):
    for arguments in ([], ["frobnicate"], ["plan", "--method"]):
        assert main(arguments) == 2
        assert capsys.readouterr().err.count("\n") == 1
    with pytest.raises(SystemExit) as exit:
        main(["--help"])
    assert exit.value.code == 0
    shown = capsys.readouterr().out
    assert all(f"    {name} " in shown for name in COMMANDS)
    with pytest.raises(SystemExit):
        main(["--version"])
    assert capsys.readouterr().out == f"dittfast {dittfast.__version__}\n"


def _children_seconds():
    """CPU time of processes that have ended: waiting for a shared machine is no part of it."""
    times = os.times()
    return times.children_user + times.children_system


def test_help_is_quick_and_loads_no_torch():
    times = []
    for _ in range(3):
        start = _children_seconds()
        result = python("-m", "dittfast", "--help")
        times.append(_children_seconds() - start)
        assert result.returncode == 0 and "generate" in result.stdout
    assert min(times) < 1
    modules = {p.stem for p in (ROOT / "dittfast" / "cli").glob("*.py")}
    parts = {"__init__", "adapter", "options", "parser", "values", "growth", "gpu_day"}
    parts |= {"kernels", "overhead"}
    modules -= parts
    assert modules == set(COMMANDS)
    code = (
        f"import sys\nfrom dittfast.cli import _parser\nfor name in {modules}: _parser(name)\n"
        "print([m for m in ('torch', 'diffusers', 'numpy', 'PIL') if m in sys.modules])"
    )
    assert python("-c", code).stdout == "[]\n"


def test_the_kernels_folder_is_not_taken_for_hugging_faces_package():
    """From the repository root, `import kernels` must not end in ours, nor in an error."""
    code = (
        "import importlib, importlib.util, sys\nsys.path.insert(0, '')\n"
        "found = importlib.util.find_spec('kernels') and importlib.import_module('kernels')\n"
        "print(getattr(found, '__file__', None))\nimportlib.util.find_spec('kernels')"
    )
    result = python("-c", code, cwd=ROOT)
    assert result.returncode == 0, result.stderr
    assert not result.stdout.startswith(str(ROOT))


@pytest.mark.parametrize(
    "first, more", [("SIGTERM", "SIGTERM"), ("SIGHUP", "SIGTERM"), ("SIGINT", "SIGTERM"),
                    ("SIGTERM", "SIGINT"), ("SIGTERM", "SIGHUP")],
)  # fmt: skip
def test_a_signal_ends_a_command_as_ctrl_c_does(tmp_path, monkeypatch, capsys, first, more):
    """Half-written files go, also when more signals come; and the status says which was first."""
    from dittfast.cli import methods
    from dittfast.files import atomic_path

    first, more = getattr(signal, first), getattr(signal, more)

    def run(args):
        with atomic_path(tmp_path / "a.png") as temporary:
            temporary.write_bytes(b"half")
            try:
                os.kill(os.getpid(), first)
                time.sleep(5)
            finally:
                os.kill(os.getpid(), more)
                time.sleep(0.01)

    monkeypatch.setattr(methods, "run", run)
    usual = {first: signal.SIG_DFL, more: signal.SIG_DFL}  # nohup ignores one of them
    usual |= {signal.SIGINT: signal.default_int_handler}
    before = {number: signal.signal(number, handler) for number, handler in usual.items()}
    try:
        assert main(["methods"]) == 128 + first
        assert not list(tmp_path.iterdir())
        assert all(signal.getsignal(number) == handler for number, handler in usual.items())
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    assert "no half-written file is left" in capsys.readouterr().err


def test_a_signal_that_a_destructor_swallowed_is_not_the_last(monkeypatch, capsys):
    """Python drops what is raised there; the next one ends the command."""
    from dittfast import cli
    from dittfast.cli import methods

    heard = []

    class Busy:
        def __del__(self):
            heard.append("SIGTERM")
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.01)

    def run(args):
        Busy()
        os.kill(os.getpid(), signal.SIGTERM)  # at once: no more than the first
        time.sleep(0.01)
        heard.append("still here")
        monkeypatch.setattr(cli, "_CLEARING", 0.0)  # some seconds later
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(5)

    monkeypatch.setattr(methods, "run", run)
    monkeypatch.setattr(sys, "unraisablehook", lambda found: heard.append(found.exc_type.__name__))
    before = signal.signal(signal.SIGTERM, signal.SIG_DFL)
    try:
        assert main(["methods"]) == 128 + signal.SIGTERM
    finally:
        signal.signal(signal.SIGTERM, before)
    assert heard == ["SIGTERM", "_Ended", "still here"]
    assert "no half-written file is left" in capsys.readouterr().err
