"""``dittfast bench overhead``: equal outputs first, then pairs; real models at a small size."""

import json

import pytest
import torch

from dittfast import Layout, attend
from dittfast.cli import main
from dittfast.measure.bench import Workload
from dittfast.measure.check import WrongResult
from dittfast.pipelines.measure import overhead
from dittfast.plan import Plan
from dittfast.testing import attention_inputs

pytestmark = pytest.mark.filterwarnings("ignore")
WORK = Workload(Layout.image(1, 1), heads=2, head_dim=16)


@pytest.mark.parametrize("name, grid, text", [("flux", [1, 12, 15], 12), ("wan", [4, 6, 8], 0)])
def test_rows_say_what_was_measured(name, grid, text):
    row = overhead.measure_overhead(name, WORK, tokens=192, layers=3, repeats=2)
    assert (row["tokens"], row["grid"], row["context"]) == (192, grid, text)
    assert row["error"]["enabled"] == 0 and row["error"]["full_plan"] <= 8 * row["noise"]
    assert set(row["overhead"]) == {"enabled", "full_plan"}
    assert all(x["p50"] > 0 for x in row["seconds"].values())
    assert row["pairs"] == 2


def test_a_wrong_result_is_not_timed(monkeypatch):
    def one_less(q, k, v, plan, **options):
        return attend(q, k, v, plan) * 1.001

    monkeypatch.setattr("dittfast.attention.attend", one_less)
    monkeypatch.setattr(overhead, "interleaved_seconds", lambda *a: pytest.fail("timed"))
    with pytest.raises(WrongResult, match="full_plan differs from the stock model"):
        overhead.measure_overhead("wan", WORK, tokens=64, layers=1)


def test_command(tmp_path, capsys):
    path = tmp_path / "overhead.json"
    size = "--tokens 64 --layers 1 --heads 1 --head-dim 16 --repeats 1"
    assert main(["bench", "overhead", "--model", "wan", *size.split(), "--json", str(path)]) == 0
    data = json.loads(path.read_text())
    assert capsys.readouterr().out.splitlines()[-1] == f"wrote {path}"
    assert data["rows"][0]["model"] == "WanTransformer3DModel" and data["versions"]["torch"]
    for wrong, message in [("--model wann", "Did you mean 'wan'"), ("--tokens 8", "64 tokens")]:
        assert main(["bench", "overhead", *wrong.split()]) == 2
        assert message in capsys.readouterr().err


def test_a_plan_that_leaves_nothing_out_is_pytorchs_own_attention():
    """Which is what the model ran before; a backend that is named still runs."""
    q, k, v, _ = attention_inputs(1, 2, 111, 16)
    plan = Plan.full(111, block_size=32)
    stock = torch.nn.functional.scaled_dot_product_attention(q, k, v, scale=0.3)
    assert torch.equal(attend(q, k, v, plan, scale=0.3), stock)
    profiler = torch.profiler.profile
    for backend, found in (("auto", False), ("cpu", True)):
        with profiler() as seen:
            attend(q, k, v, plan, backend=backend)
        assert ("dittfast::attend_cpu" in {x.key for x in seen.key_averages()}) == found


def test_only_a_plan_without_anything_added_is_dense():
    full = Plan.full(40, block_size=16)
    assert full.is_dense
    weight = torch.zeros(1, 1, 40)
    weight[..., -1] = -torch.inf
    assert not full.replace(kv_log_weight=weight).is_dense
    assert not full.replace(out_scale=torch.full((1, 1, 3), 2.0)).is_dense
    assert not full.with_lists(full.kv_indices, full.kv_num_blocks).is_dense
    mask = full.to_block_mask()
    mask[..., 0, 2] = False
    assert not Plan.from_block_mask(mask, full.q_blocks, full.kv_blocks).is_dense
    assert full.select_heads(slice(0, 1)).is_dense
