"""Seconds on GPUs that are not here: the formulas, and what the command prints of them."""

import dataclasses
import json
from pathlib import Path

import pytest

from dittfast.cli import main
from dittfast.layout import Layout
from dittfast.measure import roofline
from dittfast.measure.gpus import GPUS, Gpu, Rate, gpu_of
from dittfast.measure.roofline import Attention
from dittfast.pipelines.measure import scaling
from dittfast.pipelines.measure.cost import Cost
from dittfast.pipelines.measure.estimate import Estimate, ModelEstimate
from dittfast.pipelines.measure.scaling import dense_words, sparse_seconds

ROOT = Path(__file__).resolve().parent.parent

# 100 TFLOPS dense, 50 with block lists; 1 TB/s of memory, 100 and 10 GB/s between GPUs.
GPU = Gpu(
    "one", 200, 1.0, 100, 10, 4, {"slow": Rate(80, "a"), "fast": Rate(100, "b")},
    {"triton": Rate(50, "c")}, "d", "sm_90",
)  # fmt: skip
WORK = Attention(4.0 * 1000**2 * 512 * 2, tokens=1000, layers=2, heads=8, head_dim=64)


def test_break_even_is_the_ratio_of_rates():
    assert roofline.break_evens(GPU) == {"triton": {"slow": 0.625, "fast": 0.5}}
    assert roofline.break_evens(GPUS["MI300X"]) == {"triton": {"AITER": 0.62}}
    assert GPU.best == ("fast", Rate(100, "b"))


def test_the_longer_of_arithmetic_and_memory():
    moved = 2 * 4 * 1000 * 512 * 2  # bytes of q, k, v and the output in two layers
    assert WORK.values == moved
    found = roofline.seconds(WORK, GPU, 100.0)
    assert found.attention == pytest.approx(WORK.flops / 1e14) and found.exchange == 0
    assert roofline.seconds(WORK, GPU, 100.0, part=1e-6).attention == pytest.approx(moved / 1e12)


@pytest.mark.parametrize("count", [2, 4, 8])
def test_ulysses_exchanges_all_but_what_stays(count):
    """Counted GPU by GPU: every one sends an equal part to each other one."""
    part = WORK.values / count / count
    nodes = [gpu // GPU.per_node for gpu in range(count)]
    inside = sum(part for other in range(1, count) if nodes[other] == nodes[0])
    outside = sum(part for other in range(1, count) if nodes[other] != nodes[0])
    found = roofline.seconds(WORK, GPU, 100.0, count=count)
    assert found.exchange == pytest.approx(max(inside / 100e9, outside / 10e9))
    assert found.attention == pytest.approx(WORK.flops / count / 1e14)


def test_heads_that_do_not_split():
    assert dense_words(WORK, GPU, 3) == "8 heads do not split over 3 GPUs"
    with pytest.raises(ValueError, match="8 heads do not split over 16 GPUs; use a divisor of 8"):
        roofline.seconds(WORK, GPU, 100.0, count=16)


def model(*methods):
    cost = Cost(0.0, WORK.flops, 0.0, layers=2, heads=8, head_dim=64)
    return ModelEstimate("m", "M", 1, 1, 8, 8, Layout.image(10, 100), cost, list(methods))


def test_dense_layers_run_on_the_dense_kernel():
    """One of two layers keeps a quarter: half the work at 100, an eighth at 50 TFLOPS."""
    half = WORK.flops / 2
    method = Estimate("x", "x", 0.25, dense_layers=1, attention=half + half / 4, work=0.25)
    method = dataclasses.replace(method, refused={"sm_90": {"cudnn": "no"}, "sm_89": {}})
    found = sparse_seconds(model(), method, GPU)
    assert found == {"triton": pytest.approx(half / 1e14 + half / 4 / 5e13)}
    assert sparse_seconds(model(), dataclasses.replace(method, refused={}), GPU) == {}
    refused = dataclasses.replace(method, refused={"sm_90": {"triton": "no"}})
    assert sparse_seconds(model(), refused, GPU) == {}
    assert sparse_seconds(model(), method, GPUS["RTX 4090"]) == {}


def test_every_rate_has_a_source_and_is_below_the_peak():
    assert {"H100", "H200", "B200", "RTX 4090", "RTX 5090", "MI300X"} == set(GPUS)
    for gpu in GPUS.values():
        assert gpu.source
        for rate in (*gpu.dense.values(), *gpu.engines.values()):
            assert len(rate.source) > 20 and 0 < rate.tflops < gpu.peak_tflops
        assert gpu.per_node == 8 and gpu.link > gpu.network


def test_the_page_says_what_the_rates_say():
    """``dittfast estimate --markdown docs/scaling.md`` writes it again; here what is quick."""
    text = (ROOT / "docs" / "scaling.md").read_text(encoding="utf-8")
    assert scaling._break_even_table() in text
    for gpu in GPUS.values():
        for x in (*gpu.dense.values(), *gpu.engines.values(), *gpu.ratios.values(), gpu):
            assert f"- {x.source}\n" in text
    # 40 layers of 40 heads of 128; one minute at 16 frames a second, 4 to a latent one.
    tokens = (1 + 960 // 4) * 45 * 80
    seconds = 4 * tokens**2 * 40 * 128 * 40 / 648e12
    assert f"| wan2.1-14b | 60 s | {tokens:,} | {seconds:,.0f} |" in text
    held = 2 * 4 * tokens * 40 * 128 * 40 / 8
    assert f"| 8 | 8 | 1 | {seconds / 8:,.0f} ({held * 7 / 8 / 450e9:.2g}) |" in text


def test_names_of_gpus():
    assert gpu_of("rtx-5090") is GPUS["RTX 5090"] and gpu_of("h100") is GPUS["H100"]
    with pytest.raises(ValueError, match="no rates of the GPU 'H300'; known are H100, H200"):
        gpu_of("H300")


def test_the_command(capsys, tmp_path):
    assert main(["estimate", "--gpu", "H100"]) == 0
    assert (
        "triton      pays below a density of 1.07 against FlashAttention-2, 0.66 against cuDNN"
        in (capsys.readouterr().out)
    )
    assert main(["estimate", "--gpus", "8"]) == 2
    assert "needs a GPU: add --gpu H100" in capsys.readouterr().err
    out = tmp_path / "x.json"
    size = ["--height", "256", "--width", "256", "--gpu", "B200", "--gpus", "8", "--json", str(out)]
    assert main(["estimate", "flux.1-dev", *size, "--method", "local", "--set", "window=4"]) == 0
    data = json.loads(out.read_text())["gpu"]
    cost = json.loads(out.read_text())["cost"]
    assert data["dense_seconds"] == pytest.approx(cost["attention"] / 8 / 1613e12, rel=1e-3)
    # flash4 wants larger query blocks on Blackwell, and cuDNN takes no token rules.
    assert set(data["methods"]["local"]) == {"triton"}
    shown = capsys.readouterr().out
    assert "seconds of attention in a pass on 8 GPUs, the exchange" in shown
    assert "cudnn refuses: " in shown and "it takes full blocks alone" in shown
    assert "flash4 refuses: q blocks must be of 129 to 256 tokens" in shown


def test_groups_that_share_heads():
    assert [roofline.sharing(WORK, count) for count in (1, 2, 6, 8, 24, 1024)] == [1, 2, 2, 8, 8, 8]
