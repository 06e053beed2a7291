"""Speed: gated by right results, end to end and per step together, with attention's share."""

import json
import math
import time

import pytest
import torch
import torch.nn.functional as F
from tiny import flux_pipeline

from dittfast.environment import peak_memory, reset_peak_memory
from dittfast.measure.check import WrongResult
from dittfast.measure.tables import latency_table
from dittfast.methods import Local
from dittfast.pipelines.measure import latency
from dittfast.pipelines.measure.latency import amdahl, attention_seconds, measure_latency
from dittfast.pipelines.measure.variants import Variant
from dittfast.pipelines.runs.sources import Source
from dittfast.schedule import Schedule

CALL = dict(prompt="a red cat", height=64, width=96, num_inference_steps=2, max_sequence_length=12)
LOCAL = Variant("local3", Local(window=3, tile=(1, 4, 4)), Schedule(min_tokens=0))


@pytest.fixture(scope="module")
def pipe():
    return flux_pipeline()


@pytest.fixture(scope="module")
def measured(pipe):
    return measure_latency(pipe, Source("folder", "tiny", "tiny"), CALL, LOCAL, pairs=2)


def test_numbers_follow_from_the_runs(measured):
    dense, sparse = measured["runs"]["dense"], measured["runs"]["method"]
    ratios = sorted(a["total"] / b["total"] for a, b in zip(dense, sparse))
    assert len(ratios) == measured["pairs"] == 2
    assert measured["end_to_end"]["p50"] == pytest.approx(sum(ratios) / 2)
    assert measured["per_step"]["p50"] > 0
    assert all(len(x["steps"]) == 2 for x in (*dense, *sparse))
    share = measured["share"]["dense"]
    # 2 steps of 4 layers; attention is a part of its modules, and they of the call.
    assert share["calls"] == 8 and 0 < share["attention"] < share["modules"] < 1
    assert measured["ceiling"] == pytest.approx(1 / (1 - share["attention"]))
    assert 1 < measured["ceiling_at_density"] < measured["ceiling"]
    assert measured["parity"]["layers"] == 4
    assert measured["attention"]["density"] == pytest.approx(measured["parity"]["density"])
    assert measured["against_dense"]["psnr_db"] > 0


def test_the_table_never_shows_a_step_without_the_whole(measured):
    json.dumps(measured, allow_nan=False)
    table = latency_table({"rows": [measured]})
    at = table.head.index("end to end, times as fast")
    assert table.head[at + 1] == "per step, times as fast"
    assert table.rows[0][at].startswith(f"{measured['end_to_end']['p50']:.2f} [")
    assert "Checked against dense fp64 attention" in table.markdown()


def test_nothing_is_timed_when_the_method_is_wrong(pipe, monkeypatch):
    from dittfast.measure import check

    right = check.attend
    monkeypatch.setattr(check, "attend", lambda *a, **k: right(*a, **k) + 0.1)
    monkeypatch.setattr(latency, "draw", lambda *a, **k: pytest.fail("was timed"))
    with pytest.raises(WrongResult, match="local, layer"):
        measure_latency(pipe, Source("folder", "tiny", "tiny"), CALL, LOCAL)
    with pytest.raises(ValueError, match="pairs must be at least 1, got 0"):
        measure_latency(pipe, Source("folder", "tiny", "tiny"), CALL, LOCAL, pairs=0)


def test_attention_seconds_count_what_attention_takes(pipe, monkeypatch):
    stock = F.scaled_dot_product_attention
    generator = torch.Generator().manual_seed(0)
    with attention_seconds(pipe) as before:
        pipe(**CALL, generator=generator, output_type="latent")
    assert before.calls == 8

    # A hook that sleeps inside each module is time of the module, not of attention.
    hooks = [
        block.attn.norm_q.register_forward_hook(lambda *_: time.sleep(0.03))
        for block in pipe.transformer.single_transformer_blocks
    ]
    with attention_seconds(pipe) as slept:
        pipe(**CALL, generator=generator, output_type="latent")
    for hook in hooks:
        hook.remove()
    assert slept.modules - slept.attention > 4 * 0.03
    assert F.scaled_dot_product_attention is stock
    assert not any(m._forward_hooks for m in pipe.transformer.modules())


def test_amdahl():
    assert amdahl(0.5) == 2 and amdahl(0.5, 0.5) == pytest.approx(1 / 0.75)
    assert amdahl(0) == 1 and amdahl(1) == math.inf and amdahl(0.8, 1.0) == pytest.approx(1)
    with pytest.raises(ValueError, match=r"share must lie in 0..1, got 1.5"):
        amdahl(1.5)


def test_peak_memory_begins_anew():
    reset_peak_memory("cpu")
    before = peak_memory("cpu")
    block = torch.ones(1 << 25)
    grown = peak_memory("cpu")
    del block
    assert grown - before > 0.8 * (1 << 27)
    reset_peak_memory("cpu")
    assert peak_memory("cpu") < grown
