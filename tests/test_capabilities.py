"""What backends take, as data: refusals, the choice of "auto", and backends of other packages."""

import dataclasses
import typing
from types import SimpleNamespace

import pytest
import torch
from random_plans import even_blocks, ragged_blocks, random_plan, random_rule

import dittfast
from dittfast import Capabilities, Plan, attend
from dittfast.attention import BACKENDS, PREFERRED, choose_backend, not_supported_reasons
from dittfast.kernels import capabilities, reference_backend
from dittfast.kernels.capabilities import FEATURES, LACKS, Demand, refusals

EVEN = even_blocks(32, 16)
Q = torch.zeros(1, 2, 32, 16)


def plan_of(blocks=EVEN, **fields):
    return random_plan(blocks, blocks, runs=False, **fields)


@pytest.fixture
def registered(monkeypatch):
    """Takes what a test registers out again, and makes the oracle a backend of other abilities."""
    before = dict(BACKENDS)

    def register(**lacks):
        one = SimpleNamespace(
            attend=reference_backend.attend, CAPABILITIES=(Capabilities(**lacks),)
        )
        monkeypatch.setitem(BACKENDS, "other", lambda: one)

    yield register
    for name in set(BACKENDS) - set(before):
        del BACKENDS[name]


WEIGHT = torch.zeros(1, 1, 32)
# What a backend may lack: a plan that needs it, and the field's value where it is lacking.
NEEDS = {
    "partial_blocks": (plan_of(rule=random_rule(32, 32)), False),
    "kv_log_weight": (plan_of(kv_log_weight=WEIGHT), False),
    "ragged_blocks": (plan_of(ragged_blocks(32, 16, 1)), False),
    "epilogue": (plan_of(out_scale=torch.ones(1, 1, 2)), False),
    "tail": (plan_of(tail_lse=torch.zeros(1, 1, 2), tail_value=torch.zeros(1, 1, 2, 16)), False),
    "q_block_sizes": (plan_of(even_blocks(32, 8)), range(16, 17)),
    "kv_block_sizes": (plan_of(even_blocks(32, 8)), range(16, 65, 16)),
}


@pytest.mark.parametrize("name", NEEDS)
def test_what_a_plan_needs_and_a_backend_lacks_is_refused(registered, name):
    plan, lacking = NEEDS[name]
    registered(**{name: lacking})
    (reason,) = not_supported_reasons("other", Q, Q, Q, plan)
    side, size = name.split("_")[0], capabilities.span(lacking) if lacking else ""
    sizes = f"{side} blocks must be of {size} tokens, this plan's are 8"
    assert reason == LACKS.get(name, sizes)
    with pytest.raises(ValueError, match=r"the other backend cannot run this: .*What can: "):
        attend(Q, Q, Q, plan, backend="other")
    attend(Q, Q, Q, plan_of(), backend="other")
    assert not_supported_reasons("other", Q, Q, Q, plan_of()) == []


def test_what_a_call_needs_and_a_backend_lacks_is_refused(registered):
    plan = plan_of()
    registered(kv_log_weight=False)
    assert not_supported_reasons("other", Q, Q, Q, plan, WEIGHT) == [LACKS["kv_log_weight"]]
    registered(backward=False)
    leaf = Q.clone().requires_grad_()
    assert not_supported_reasons("other", Q, leaf, Q, plan) == [LACKS["backward"]]
    scaled = plan_of(out_scale=torch.ones(1, 1, 2).requires_grad_())
    assert not_supported_reasons("other", Q, Q, Q, scaled) == [LACKS["backward"]]
    with torch.no_grad():
        assert not_supported_reasons("other", Q, leaf, Q, plan) == []
    registered(deterministic=False)
    torch.use_deterministic_algorithms(True)
    try:
        assert not_supported_reasons("other", Q, leaf, Q, plan) == [LACKS["deterministic"]]
        assert not_supported_reasons("other", Q, Q, Q, plan) == []
    finally:
        torch.use_deterministic_algorithms(False)
    registered(compile=False)
    assert not_supported_reasons("other", Q, Q, Q, plan) == []
    with pytest.raises(Exception, match=LACKS["compile"]):
        torch.compile(
            lambda q: attend(q, q, q, plan, backend="other"), backend="eager", fullgraph=True
        )(Q)


def test_runs_are_looked_for_where_they_make_a_difference(registered):
    indices = torch.zeros(1, 1, 2, 1, dtype=torch.int32)
    count = torch.tensor([[[1, 2]]], dtype=torch.int32)
    plan = Plan(indices, count, count, EVEN, EVEN)
    assert plan.has_runs and not plan_of().has_runs
    registered(runs=False)
    assert not_supported_reasons("other", Q, Q, Q, plan) == [LACKS["runs"]]
    assert not_supported_reasons("other", Q, Q, Q, plan_of()) == []


def test_ragged_means_more_than_a_short_last_block():
    assert not Plan.full(30, 37, 8).q_ragged and not Plan.full(30, 37, 8).kv_ragged
    for starts, lengths in (([0, 8], [8, 3]), ([0], [5])):
        blocks = dittfast.layout.make_blocks(torch.tensor(starts), torch.tensor(lengths))
        assert not plan_of(blocks).q_ragged
    for starts, lengths in (([0, 3], [3, 8]), ([8, 0], [8, 8]), ([0, 8, 11], [8, 3, 3])):
        blocks = dittfast.layout.make_blocks(torch.tensor(starts), torch.tensor(lengths))
        assert plan_of(blocks).kv_ragged and plan_of(blocks).to("cpu").q_ragged


def test_the_nearest_of_several_capabilities_speaks():
    here = Capabilities(("cpu",), (torch.float32,), head_dims=range(16, 33, 16), backward=False)
    there = Capabilities(("cuda",), architectures=("sm_90",))
    backend = SimpleNamespace(CAPABILITIES=(there, here))
    asked = Demand(torch.device("cpu"), torch.float16, 48, needs=("backward",))
    reasons = refusals(backend, asked)
    assert reasons[:2] == [
        "it computes float32, got float16",
        "head dim must be 16 to 32 in steps of 16, got 48",
    ]
    assert reasons[2:] == [LACKS["backward"]]
    assert "pad q, k and v with zeros" in refusals(backend, asked._replace(head_dim=17))[1]
    assert refusals(backend, Demand(torch.device("meta"), torch.float32))[0].endswith("on meta")


def test_auto_takes_the_first_that_can(registered, monkeypatch):
    plan = plan_of(rule=random_rule(32, 32))
    registered(partial_blocks=False, dtypes=(torch.float32,))
    monkeypatch.setitem(PREFERRED, "cpu", ("other", "cpu"))
    asked = capabilities.demand(Q, Q, Q, plan)
    assert choose_backend(*asked) == "cpu"
    assert choose_backend(*capabilities.demand(Q, Q, Q, plan_of())) == "other"
    assert choose_backend(Q.device) == "other"
    assert choose_backend(Q.device, torch.float64) == "cpu"
    out = attend(Q, Q, Q + 1, plan)
    assert torch.equal(out, attend(Q, Q, Q + 1, plan, backend="cpu"))


def test_auto_looks_at_the_architecture(monkeypatch, registered):
    registered()
    monkeypatch.setitem(PREFERRED, "cuda", ("triton", "other"))
    for architecture, expected in (("sm_90", "triton"), ("gfx1100", "other"), (None, "triton")):
        monkeypatch.setattr(capabilities, "architecture_of", lambda device, a=architecture: a)
        assert choose_backend(torch.device("cuda"), torch.float16, 64) == expected


def test_a_backend_of_another_package(registered):
    def forward(q, k, v, t, scale):
        assert t.worklist.tolist() == [32]
        return v * scale, q.new_zeros(q.shape[:3])

    takes = Capabilities(("cpu",), backward=False)
    made = dict(make_worklist=lambda t: torch.tensor([t.kv_lengths.sum()], dtype=torch.int32))
    dittfast.register_backend("theirs", forward, capabilities=takes, **made)
    q = torch.ones(1, 2, 32, 16)
    assert float(attend(q, q, q, plan_of(), scale=3, backend="theirs").max()) == 3
    method = dittfast.methods.Local(window=2)
    layout = dittfast.Layout.image(4, 8)
    out = dittfast.attention.method_attention(method, layout, q, q, q, backend="theirs", scale=3)
    assert float(out.max()) == 3
    missing = dict(machine_reasons=lambda asked: [f"no wheel for {asked.dtype}"])
    dittfast.register_backend("theirs", forward, capabilities=(takes,), **missing)
    with pytest.raises(ValueError, match=r"no wheel for torch\.float32\. What can: backend='"):
        attend(q, q, q, plan_of(), backend="theirs")


def test_what_register_backend_refuses():
    takes = Capabilities(("cpu",), backward=False)
    for name in ("auto", "triton", "two words"):
        with pytest.raises(ValueError, match=f"name must be an identifier .* got '{name}'"):
            dittfast.register_backend(name, print, capabilities=takes)
    with pytest.raises(ValueError, match="promises a backward pass: give backward, or backward=F"):
        dittfast.register_backend("mine", print, capabilities=Capabilities())
    assert "mine" not in BACKENDS


def test_every_switch_has_words_and_every_lack_a_switch():
    types = typing.get_type_hints(Capabilities)
    switches = [f.name for f in dataclasses.fields(Capabilities) if types[f.name] is bool]
    assert switches == list(FEATURES) and set(LACKS) < set(switches)
    # These two change how a call is made, not whether.
    assert set(switches) - set(LACKS) == {"grouped_heads", "slow_start"}
    assert len(capabilities.described(Capabilities())) == len(FEATURES) + 6
