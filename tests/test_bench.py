"""Benchmarks: what is measured is right, and a wrong result is not measured."""

import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from random_plans import ragged_blocks, random_plan, random_rule

from dittfast import Layout, attend, methods
from dittfast.attention import choose_backend
from dittfast.cli import main
from dittfast.measure import bench, check, timing
from dittfast.measure.bench import Workload
from dittfast.testing import attention_inputs


@given(st.integers(0, 1000), st.booleans(), st.sampled_from([(1, 1), (2, 3)]))
def test_mask_rows_are_rows_of_the_dense_mask(seed, with_rule, lists):
    q_blocks = ragged_blocks(40, 8, seed, shuffle=True)
    kv_blocks = ragged_blocks(50, 16, seed + 1, shuffle=seed % 2 == 0)
    rule = random_rule(40, 50, seed=seed) if with_rule else None
    plan = random_plan(q_blocks, kv_blocks, lists, rule, seed=seed)
    tokens = torch.randperm(40)[:7]
    assert torch.equal(check.mask_rows(plan, tokens), plan.to_dense_mask()[:, :, tokens])


@pytest.mark.parametrize("backward", [False, True])
def test_parity_holds_with_everything_a_plan_can_carry(backward):
    blocks = ragged_blocks(111, 16, 1, shuffle=True)
    weight = torch.randn(1, 1, 111)
    weight[..., 5:9] = -torch.inf
    plan = random_plan(
        blocks,
        blocks,
        (1, 2),
        random_rule(111, 111),
        kv_log_weight=weight,
        out_scale=torch.rand(1, 1, blocks.count) + 0.5,
        out_residual=torch.randn(1, 2, blocks.count, 16),
    )
    inputs = attention_inputs(1, 2, 111, 16)
    check.check_against_dense(*inputs, plan, 0.25, backward=backward)


def one_pair_more(q, k, v, plan, **options):
    """Attention to one key too many, for one query in eight."""
    mask = plan.to_dense_mask().clone()
    mask[..., ::8, -1] = True
    logits = (q @ k.mT * options["scale"]).masked_fill(~mask, -torch.inf)
    return torch.softmax(logits, -1) @ v


def wrong_gradient(q, k, v, plan, **options):
    out = attend(q, k, v, plan, **options)
    return out + (v - v.detach()) * 1e-3


@pytest.mark.parametrize("wrong, what", [(one_pair_more, "out"), (wrong_gradient, "dv")])
def test_a_wrong_result_is_not_measured(monkeypatch, wrong, what):
    monkeypatch.setattr(check, "attend", wrong)
    monkeypatch.setattr(bench, "interleaved_seconds", lambda *_: pytest.fail("was measured"))
    work = Workload(Layout.image(10, 12), head_dim=16, backward=True)
    with pytest.raises(check.WrongResult, match=f"disagrees with dense attention: {what}: error"):
        bench.bench_attention(methods.Local(3), work, repeats=1, flex=False)


@pytest.mark.parametrize("backward", [False, True])
def test_rows_say_what_was_measured(backward):
    work = Workload(Layout.image(10, 12, text=5), 2, 3, 16, backward=backward)
    method = methods.Local(3, downsample=2)
    row = bench.bench_attention(method, work, repeats=3, flex=False)
    plan = method.plan(work.layout)
    assert row["method"] == {
        "name": "local",
        "window": 3,
        "downsample": 2,
        "tile": None,
        "frame_window": None,
        "proportional": False,
    }
    assert (row["tokens"], row["keys"], row["rounds"]) == (125, 155, 3)
    assert row["density"] == plan.density
    assert row["useful_flops"] == plan.flops(16, 3, 2, backward)
    assert row["dense_flops"] == (14 if backward else 4) * 16 * 6 * 125**2
    for name in ("dense_seconds", "attend_seconds", "speedup", "useful_efficiency"):
        p20, p50, p80 = (row[name][p] for p in ("p20", "p50", "p80"))
        assert 0 < p20 <= p50 <= p80
    assert row["useful_efficiency"]["p50"] == pytest.approx(row["speedup"]["p50"] * row["density"])
    assert row["attend_gflops"] * 1e9 == pytest.approx(
        row["useful_flops"] / row["attend_seconds"]["p50"]
    )
    assert row["flex"] == {"not_run": "not asked for"}


def test_rounds_are_interleaved_and_turned_around():
    calls = []
    functions = {name: lambda name=name: calls.append(name) for name in "ab"}
    seconds = timing.interleaved_seconds(functions, 2, "cpu", warmup=1)
    assert calls == ["a", "b", "a", "b", "b", "a"]
    assert [len(x) for x in seconds.values()] == [2, 2]
    with pytest.raises(ValueError, match="repeats must be at least 1, got 0"):
        timing.interleaved_seconds(functions, 0, "cpu")


def test_percentiles():
    assert timing.percentiles(range(11)) == pytest.approx({"p20": 2, "p50": 5, "p80": 8})


@pytest.mark.slow
def test_compiled_flex_attention_beside_attend():
    row = bench.bench_attention(
        methods.Local(5, tile=(1, 8, 8)), Workload(Layout.image(16, 32)), repeats=1
    )
    assert row["flex"]["seconds"]["p50"] > 0, row["flex"]


@pytest.mark.parametrize(
    "tokens, method, frames, shape",
    [
        (16384, methods.Local(), None, (1, 128, 128)),
        (16384, methods.Radial(), None, (16, 32, 32)),
        (1000, methods.SLA(methods.Radial()), None, (8, 5, 25)),
        (97, methods.SLA(methods.Local()), None, (1, 1, 97)),
        (24, methods.Local(), 3, (3, 2, 4)),
    ],
)
def test_layouts_of_a_number_of_tokens(tokens, method, frames, shape):
    assert bench.layout_for(tokens, method, frames).grid.shape == shape


def test_impossible_layouts():
    with pytest.raises(ValueError, match="100 tokens do not fill 3 frames"):
        bench.layout_for(100, frames=3)
    with pytest.raises(ValueError, match="tokens must be at least 1, got 0"):
        bench.layout_for(0)


def rows(*speedups):
    return [{"tokens": 256 << i, "speedup": {"p50": s}} for i, s in enumerate(speedups)]


def test_break_even_is_the_least_size_from_which_all_are_faster():
    assert bench.least_faster(rows(0.5, 1.1, 0.9, 1.2, 3.0)) == 2048
    assert bench.least_faster(rows(2, 3)) == 256
    assert bench.least_faster(rows(2, 0.9)) is None
    assert bench.least_faster(rows(2, 1.0)) is None


def test_break_even_rows():
    work = Workload(Layout.image(1, 1), heads=1, head_dim=16)
    found = list(bench.break_even(methods.Local(2), [64, 16], work, repeats=1))
    assert [r["tokens"] for r in found] == [16, 64]
    assert found[1]["grid"] == [1, 8, 8]


@pytest.mark.parametrize("name", ["batch", "heads", "head_dim"])
def test_bad_workloads(name):
    with pytest.raises(ValueError, match=f"{name} must be at least 1, got 0"):
        Workload(Layout.image(2, 2), **{name: 0})


def run(*words):
    return main(["bench", *" ".join(words).split()])


ATTENTION = (
    "attention --method local --set window=3 --height 8 --width 12 --text 5",
    "--heads 2 --head-dim 16 --repeats 2 --no-flex --backward",
)


def test_command_prints_a_table_and_json_where_it_is_asked_for(tmp_path, capsys):
    assert run(*ATTENTION) == 0
    shown = capsys.readouterr()
    assert "101 tokens" in shown.out and "{" not in shown.out and not shown.err
    file = tmp_path / "attention.json"
    assert run(*ATTENTION, f"--json {file}") == 0
    shown = capsys.readouterr()
    table, data = shown.out, json.loads(file.read_text())
    assert table.splitlines()[-1] == f"wrote {file}" and "{" not in table
    (row,) = data["rows"]
    assert row["grid"] == [1, 8, 12] and row["context"] == 5 and row["backward"]
    assert data["device"]["type"] == "cpu" and data["versions"]["torch"] == torch.__version__
    for part in ("101 tokens", "forward and backward", f"density {row['density']:.4f}", "not run"):
        assert part in table


def test_json_has_standard_output_for_itself(capsys):
    assert run(*ATTENTION, "--json -") == 0
    shown = capsys.readouterr()
    assert json.loads(shown.out)["rows"][0]["tokens"] == 101
    assert shown.out.count("\n") == 1 and "101 tokens" in shown.err


def test_command_compares_the_backends_of_a_cpu_in_both_dtypes_and_directions(capsys):
    words = "attention --method log_linear --tokens 512 --heads 1 --head-dim 16 --repeats 3"
    assert run(words, "--no-flex --table --set topk=2 --set block_size=16 --json -") == 0
    shown = capsys.readouterr()
    rows = json.loads(shown.out)["rows"]
    found = [(row["dtype"], row["backward"]) for row in rows]
    assert found == [(d, b) for d in ("float32", "bfloat16") for b in (False, True)]
    for row in rows:
        assert {row["backend"], *row["others"]} == {"cpu", choose_backend(torch.device("cpu"))}
        # Pooled keys are work.
        assert row["work"] > row["density"] > 0
        assert f"work {row['work']:.4f}" in shown.err
        for other in row["others"].values():
            assert other["useful_efficiency"]["p50"] > 0 and other["seconds"]["p20"] > 0


def test_a_backend_that_is_compared_must_be_right(monkeypatch):
    right = check.attend

    def wrong(*arguments, backend="auto", **options):
        found = right(*arguments, backend=backend, **options)
        return found * 1.01 if backend == "cpu" else found

    monkeypatch.setattr(check, "attend", wrong)
    work = Workload(Layout.image(4, 4), heads=1, head_dim=16)
    options = dict(repeats=1, flex=False, backend="reference")
    bench.bench_attention(methods.Local(2), work, **options)
    with pytest.raises(check.WrongResult):
        bench.bench_attention(methods.Local(2), work, compare=("cpu",), **options)


def test_rounds_end_early_after_two():
    seconds = bench.interleaved_seconds({"a": lambda: None}, 9, "cpu", most_seconds=0)
    assert len(seconds["a"]) == 2


def test_command_takes_options_for_one_of_several_methods(capsys):
    assert (
        run(
            "attention --method local --method radial --tokens 96 --frames 2 --set local.window=3",
            "--set radial.block_size=16 --heads 1 --head-dim 8 --repeats 1 --no-flex --json -",
        )
        == 0
    )
    local, radial = json.loads(capsys.readouterr().out)["rows"]
    assert local["method"]["window"] == 3 and radial["method"]["block_size"] == 16


def test_command_shows_no_speed_of_a_wrong_result(monkeypatch, capsys):
    monkeypatch.setattr(check, "attend", one_pair_more)
    assert run("attention --method local --tokens 64 --repeats 1 --no-flex") == 1
    out = capsys.readouterr().out
    assert "FAILED: attend disagrees with dense attention" in out
    assert " ms" not in out and "{" not in out


def test_command_finds_the_break_even(capsys):
    words = "break-even --method local --tokens 16 64 --heads 1 --repeats 1 --backend cpu"
    assert run(words, "--json -") == 0
    (found,) = json.loads(capsys.readouterr().out)["methods"]
    assert [r["tokens"] for r in found["rows"]] == [16, 64]
    assert [r["backend"] for r in found["rows"]] == ["cpu", "cpu"]
    assert found["min_tokens"] == bench.least_faster(found["rows"])


@pytest.mark.parametrize(
    "words, message",
    [
        ("attention --method local", "give the size as --tokens, or as --height and --width"),
        ("attention --method local --tokens 64 --height 8", "give the size as --tokens, or"),
        ("attention --method local --tokens 64 --text 3", "--text needs --height and --width"),
        ("attention --method lokal --tokens 64", "lokal"),
        ("attention --method local --tokens 64 --set radial.x=1", "no --method radial is given"),
        ("attention --method local --tokens 64 --set min_tokens=1", "belongs to the schedule"),
        ("attention --method local --tokens 64 --heads 0", "heads must be at least 1, got 0"),
        (
            "attention --method local --tokens 64 --repeats 0",
            "repeats must lie in 1..100000, got 0",
        ),
    ],
)
def test_command_refuses_bad_input(words, message, capsys):
    assert run(words) == 2
    assert message in capsys.readouterr().err
