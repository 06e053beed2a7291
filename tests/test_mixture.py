"""Mixtures by layer, head and step, against PyTorch's attention under masks of each head."""

import contextlib
import json

import pytest
import tiny
import torch
import torch.nn.functional as F
import yaml
from torch._dynamo.testing import CompileCounterWithBackend

import dittfast
from dittfast import Layout, Mixture, Rule, Schedule, functional
from dittfast.attention import method_attention
from dittfast.config import resolve
from dittfast.methods import Dense, Linear, Local, LogLinear, Radial, Rectified, Sol, TopK
from dittfast.methods.head_groups import Group, HeadGroups, by_head, select_heads, split
from dittfast.mixture import Assignment
from dittfast.pipelines.adapter import method_parameters
from dittfast.testing import attention_inputs

HEIGHT, WIDTH, TEXT, HEADS, STEPS = 8, 12, 12, 4, 4
TOKENS = TEXT + HEIGHT * WIDTH


@pytest.fixture(scope="module")
def pipe():
    """FLUX with 2 double and 3 single blocks of 4 heads; 108 tokens, 12 of them text."""
    pipe = tiny.flux_pipeline(double=2, single=3, heads=HEADS)
    yield pipe
    with contextlib.suppress(ValueError):
        dittfast.disable(pipe)


def draw(pipe, **changes):
    return tiny.run(pipe, num_inference_steps=STEPS, **changes)


def circle(window):
    """``[N, N]``: text sees and is seen by all, image tokens those with dy² + dx² < window²."""
    if window is None:
        return torch.ones(TOKENS, TOKENS, dtype=torch.bool)
    at = torch.arange(HEIGHT * WIDTH)
    y, x = at // WIDTH, at % WIDTH
    near = (y[:, None] - y) ** 2 + (x[:, None] - x) ** 2 < window**2
    mask = torch.ones(TOKENS, TOKENS, dtype=torch.bool)
    mask[TEXT:, TEXT:] = near
    return mask


def masked(pipe, window):
    """The stock pipeline with PyTorch's attention under ``window(layer, head, step)``'s circles."""
    layers = [m for n, m in pipe.transformer.named_modules() if n.endswith(".attn")]
    sdpa, now = F.scaled_dot_product_attention, {"step": -1}

    def attention(query, key, value, **options):
        masks = [circle(window(now["layer"], h, now["step"])) for h in range(HEADS)]
        return sdpa(query, key, value, attn_mask=torch.stack(masks)[None])

    def begin(*_):
        now["step"] += 1

    def enter(number):
        def hook(*_):
            now["layer"] = number
            F.scaled_dot_product_attention = attention

        return hook

    def leave(*_):
        F.scaled_dot_product_attention = sdpa

    handles = [pipe.transformer.register_forward_pre_hook(begin)]
    for number, module in enumerate(layers):
        handles.append(module.register_forward_pre_hook(enter(number)))
        handles.append(module.register_forward_hook(leave, always_call=True))
    try:
        return draw(pipe)
    finally:
        for handle in handles:
            handle.remove()


CASES = {
    "layers by pattern": (
        {"transformer_blocks.*": Local(2), "single_transformer_blocks.*": Local(4)},
        lambda layer, head, step: 2 if layer < 2 else 4,
    ),
    "layers by number, the rest dense": (
        [Rule(Local(3), layers=(0, "2-3"))],
        lambda layer, head, step: 3 if layer in (0, 2, 3) else None,
    ),
    "dense is a rule": (
        {"single*": "dense", "transformer_blocks.*": {"method": "local", "options": {"window": 2}}},
        lambda layer, head, step: 2 if layer < 2 else None,
    ),
    "heads": (
        [Rule(Local(2), heads=(0, 3)), Rule(Local(4), heads=("1",))],
        lambda layer, head, step: {0: 2, 1: 4, 2: None, 3: 2}[head],
    ),
    "steps by number": (
        [Rule(Local(2), steps=(0, 1)), Rule(Local(4), steps=(2, None))],
        lambda layer, head, step: {0: 2, 1: None}.get(step, 4),
    ),
    "steps from the end": (
        [Rule(Local(2), steps=(None, -1)), Rule(Local(3), steps=(-1, None))],
        lambda layer, head, step: 3 if step == STEPS - 1 else 2,
    ),
    "steps as fractions": (
        [Rule(Local(2), steps=(0.0, 0.5)), Rule(Local(4), steps=(0.75, 1))],
        lambda layer, head, step: {0: 2, 1: 2, 2: None, 3: 4}[step],
    ),
    "all at once": (
        [
            Rule(Local(2), layers="transformer_blocks.*", heads="0-1", steps=(1, None)),
            Rule(Local(4), layers=(0,), heads=(2,)),
            Rule(Local(3), layers=("2-4",), steps=(0.5, 1.0)),
        ],
        lambda layer, head, step: (
            (2 if head < 2 and step else 4 if layer == 0 and head == 2 else None)
            if layer < 2
            else (3 if step >= 2 else None)
        ),
    ),
    "an option for each head": (
        Local(window=(2, 4, 4, 1)),
        lambda layer, head, step: (2, 4, 4, 1)[head],
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_each_layer_head_and_step_runs_its_rule(pipe, case):
    rules, window = CASES[case]
    stock = draw(pipe)
    with dittfast.enable(pipe, rules, min_tokens=0) as enabled:
        found = draw(pipe)
        density = enabled.describe().density
    torch.testing.assert_close(found, masked(pipe, window), rtol=1e-4, atol=1e-4)
    assert float((found - stock).abs().max()) > 1e-3
    assert torch.equal(draw(pipe), stock)
    assert 0 < density < 1


def test_the_density_is_that_of_the_masks(pipe):
    rules, window = CASES["heads"]
    kept = [circle(window(0, head, 0)).double().mean() for head in range(HEADS)]
    with dittfast.enable(pipe, rules, min_tokens=0) as enabled:
        assert enabled.describe().density is None
        draw(pipe)
        described = enabled.describe()
    assert described.density == pytest.approx(float(sum(kept) / HEADS))
    assert "Local(window=2) in heads 0, 3 | Local(window=4) in heads 1" in str(described)
    layers = described.to_dict()["layers"]
    assert len(layers) == 5 and layers["transformer_blocks.0.attn"]["density"] == described.density
    json.dumps(described.to_dict())


def test_schedule_stays_on_top(pipe):
    rules = {"*": Local(2)}
    with dittfast.enable(pipe, rules, min_tokens=0, dense_layers=[1], dense_first_steps=2):
        found = draw(pipe)
    expected = masked(pipe, lambda layer, head, step: None if layer == 1 or step < 2 else 2)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_min_tokens_holds_for_all_rules(pipe):
    with dittfast.enable(pipe, {"0": Local(2), "1": Linear()}, min_tokens=1000) as enabled:
        assert torch.equal(draw(pipe), draw(pipe))
        described = enabled.describe()
    assert "108 tokens are below min_tokens 1,000" in described.did_not_run


def test_methods_of_every_kind_mix(pipe):
    """A static plan, plans from q and k, and one that computes, in heads of one layer."""
    rules = [
        Rule(Local(3), heads=(0,)),
        Rule(Rectified(block_size=16, topk=2, top_p=0.1), heads=(1,)),
        Rule(Linear(hidden=3), heads=("2-3",)),
    ]
    with dittfast.enable(pipe, rules, min_tokens=0) as enabled:
        names = {n.rpartition(".")[2] for n in method_parameters(pipe)}
        assert len(names) == 12 and all(n.startswith("rule2_") for n in names)
        found = draw(pipe)
        described = enabled.describe()
        assert described.density is None and 0 < described.work < 1
        before = method_parameters(pipe)["transformer.transformer_blocks.0.attn.rule2_q_out"]
        assert before.shape == (2, 3, 16)
        with torch.no_grad():
            before.add_(0.5)
        assert not torch.allclose(draw(pipe), found, atol=1e-4)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_of_head_groups(checkpointing):
    """Those of the same windows given as one mask per head to PyTorch."""
    from dittfast.pipelines import layer

    model, inputs = tiny.flux_transformer(heads=4), tiny.flux_inputs()
    if checkpointing:
        model.enable_gradient_checkpointing()

    def gradients():
        model.zero_grad()
        model(**inputs)[0].square().mean().backward()
        return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    windows = (2, 3, 2, 4)
    with dittfast.enable(model, Local(window=windows), min_tokens=0):
        found = gradients()

    def by_mask(method, layout, q, k, v, **_):
        masks = [Local(w).plan(layout).to_dense_mask()[0, 0] for w in windows]
        return F.scaled_dot_product_attention(q, k, v, attn_mask=torch.stack(masks)[None])

    ours, layer.method_attention = layer.method_attention, by_mask
    try:
        with dittfast.enable(model, Local(window=2), min_tokens=0):
            expected = gradients()
    finally:
        layer.method_attention = ours
    assert found.keys() == expected.keys()
    for name, grad in expected.items():
        size = max(float(grad.abs().max()), 1e-6)
        assert float((found[name] - grad).abs().max()) < 1e-3 * size, name


@pytest.mark.slow
def test_repeated_blocks_share_a_graph_between_methods():
    inputs = tiny.flux_inputs()

    def graphs(rules):
        torch._dynamo.reset()
        model = tiny.flux_transformer(1, 6)
        counter = CompileCounterWithBackend("eager")
        with dittfast.enable(model, rules, min_tokens=0, backend="cpu"), torch.no_grad():
            eager = model(**inputs)[0]
            model.compile_repeated_blocks(backend=counter, fullgraph=True)
            for _ in range(2):
                torch.testing.assert_close(model(**inputs)[0], eager, rtol=1e-4, atol=1e-5)
        torch._dynamo.reset()
        return counter.frame_count

    alone = graphs({"*": Local(2)})
    mixed = {"transformer*": Local(2), "1-3": Local(2), "4-5": Linear(hidden=0)}
    assert graphs({**mixed, "6": Local(2)}) == alone
    assert graphs(mixed) == alone + 1  # the last layer is dense
    assert graphs({**mixed, "6": Linear()}) == alone + 1  # and here it has parameters


def test_guided_and_with_two_experts():
    pipe = tiny.wan_pipeline(two_experts=True)
    rules = {"blocks.0*": Local(2), "blocks.1*": Radial(block_size=4)}
    with dittfast.enable(pipe, rules, min_tokens=0) as enabled:
        plain = tiny.run(pipe)
        assert len([x for x in enabled.describe().layers if x.dense is None]) == 4
        with dittfast.guide(pipe, heads=((0, 0),), guidance_scale=2.0):
            assert not torch.equal(tiny.run(pipe), plain)
        assert torch.equal(tiny.run(pipe), plain)


REFUSED = {
    "a pattern that matches nothing": (
        {"blocks*": Local()},
        r"rule 0 \(local\): layers entry 'blocks\*' matches no layer.*0\.\.4",
    ),
    "a layer that is not there": ({7: Local()}, r"rule 0.*entry 7 matches no layer.*0\.\.4"),
    "layers that meet": (
        {"*": Local(), "single*": Linear()},
        r"rules 0 \(local\) and 1 \(linear\) meet in layer single_transformer_blocks.0.attn;",
    ),
    "heads that meet": (
        [Rule(Local(), heads="0-2"), Rule(Linear(), heads="2-3")],
        r"meet in layer transformer_blocks.0.attn in heads 2;",
    ),
    "steps that meet": (
        [Rule(Local(), steps=(0, 3)), Rule(Linear(), steps=(2, None))],
        "rules 0 .* and 1 .* meet",
    ),
    "steps from the end that meet": (
        [Rule(Local(), steps=(-3, None)), Rule(Linear(), steps=(-5, -2))],
        "rules 0 .* and 1 .* meet",
    ),
    "a head outside": ([Rule(Local(), heads=(4,))], r"heads of .*attn are 0\.\.3, got 4"),
    "a range of heads outside": ([Rule(Local(), heads="2-9")], r"are 0\.\.3, got '2-9'"),
    "too few values": (Local(window=(1, 2)), "window has 2 values, .* there are 4 heads"),
    "no rules": ([], "must be a list of rules"),
    "an unknown key": ([dict(method="local", layer=1)], "unknown key 'layer'.*'layers'"),
    "an unknown method": ({"*": "lokal"}, "rule 0: unknown method 'lokal'.*'local'"),
    "an unknown option": (
        {"*": dict(method="local", options=dict(windw=2))}, "rule 0: unknown option.*'window'",
    ),
    "a bad option": ({"*": dict(method="local", options=dict(window=0))}, "window must be"),
    "a schedule in a rule": (
        {"*": dict(method="local", options=dict(min_tokens=0))}, "min_tokens belongs to the sched",
    ),
    "no method": ([dict(layers="*")], "rule 0: it must be a mapping with the key 'method'"),
    "an empty band": ([dict(method="local", steps=[3, 3])], r"\[3, 3\] hold no step"),
    "a fraction above 1": ([dict(method="local", steps=[0.5, 1.5])], "0 <= first < end <= 1"),
    "three steps": ([dict(method="local", steps=[0, 1, 2])], r"must be \(first, end\)"),
    "no layers": ([Rule, ()], "it must be a mapping"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_refused_before_anything_changes(pipe, case):
    rules, words = REFUSED[case]
    classes = {n: type(m) for n, m in pipe.transformer.named_modules()}
    with pytest.raises(ValueError, match=words):
        dittfast.enable(pipe, rules, min_tokens=0)
    assert classes == {n: type(m) for n, m in pipe.transformer.named_modules()}


def test_rules_that_meet_at_some_number_of_steps_only(pipe):
    rules = [Rule(Local(2), steps=(0, 3)), Rule(Local(4), steps=(0.5, 1.0))]
    with dittfast.enable(pipe, rules, min_tokens=0):
        tiny.run(pipe, num_inference_steps=6)
        with pytest.raises(ValueError, match=r"rules 0 .* and 1 .* meet"):
            tiny.run(pipe, num_inference_steps=4)


def test_steps_from_the_end_need_their_number():
    model, inputs = tiny.flux_transformer(), tiny.flux_inputs()
    enabled = dittfast.enable(model, [Rule(Local(2), steps=(-2, None))], min_tokens=0)
    need = pytest.raises(ValueError, match=r"steps \[-2, None\] need to know the number")
    with enabled, need:
        model(**inputs)


def test_from_yaml_and_back(tmp_path, pipe):
    path = tmp_path / "mix.yaml"
    data = {
        "rules": [
            {"layers": "transformer_blocks.*", "method": "local",
             "options": {"window": [1, 2, 2, 3]}},
            {"layers": "2-4", "heads": ["0-1"], "steps": [0.0, 0.5], "method": "linear"},
        ],
        "schedule": {"min_tokens": 0, "dense_layers": [1]},
        "transformers": ["FluxTransformer2DModel"],
    }  # fmt: skip
    path.write_text(yaml.safe_dump(data))
    method, schedule = resolve(str(path))
    expected = (
        Rule(Local(window=(1, 2, 2, 3)), layers="transformer_blocks.*"),
        Rule(Linear(), layers="2-4", heads="0-1", steps=(0.0, 0.5)),
    )
    assert method == Mixture(expected) and schedule == Schedule(min_tokens=0, dense_layers=(1,))
    plain = json.loads(json.dumps(method.to_dict()))
    assert resolve(plain.pop("name"), **plain)[0] == method
    with dittfast.enable(pipe, str(path)) as enabled:
        assert enabled.describe().method == method
        draw(pipe)
    path.write_text("rules: {'*': local}\nmethod: local\n")
    with pytest.raises(ValueError, match="has 'rules', which name their own methods"):
        resolve(str(path))


# Groups of heads, without a model.

LAYOUT = Layout.image(9, 7, text=5, text_lengths=[3, 5])


@pytest.mark.parametrize("kv_heads", [6, 3, 2])
def test_groups_are_their_heads(kv_heads):
    q, k, v, _ = attention_inputs(2, 6, LAYOUT.num_tokens, 8)
    k, v = k[:, :kv_heads], v[:, :kv_heads]
    weight = torch.randn(2, 6, LAYOUT.num_tokens)
    parts = {(0, 1): Local(2), (4, 2): Linear(), (3, 5): LogLinear(8, 2, 1)}
    groups = HeadGroups(tuple(Group(tuple(sorted(h)), m) for h, m in parts.items()))
    found = method_attention(groups, LAYOUT, q, k, v, kv_log_weight=weight)
    wide = [x.repeat_interleave(6 // kv_heads, 1) for x in (k, v)]
    for heads, method in parts.items():
        own = sorted(heads)
        inputs = (q[:, own], *(x[:, own] for x in wide))
        alone = method_attention(method, LAYOUT, *inputs, kv_log_weight=weight[:, own])
        torch.testing.assert_close(found[:, own], alone)


def test_heads_that_share_keys_are_not_repeated():
    k = torch.arange(3.0).view(1, 3, 1, 1)
    assert select_heads(k, (2, 3), 6).flatten().tolist() == [1]
    assert select_heads(k, (0, 1, 4, 5), 6).flatten().tolist() == [0, 2]
    assert select_heads(k, (1, 2), 6).flatten().tolist() == [0, 1]
    assert select_heads(k, (1, 2, 3), 6).flatten().tolist() == [0, 1, 1]


@pytest.mark.parametrize(
    "method",
    [
        Local(window=(2, 5, 2, 1)),
        LogLinear(block_size=8, topk=(1, 3, 1, 3), levels=1),
        Rectified(block_size=8, topk=(1, 2, 3, 4), top_p=0.0),
        Rectified(block_size=8, top_p=(0.1, 0.5, 0.9, 0.9)),
        Radial(block_size=4, decay_factor=(0.2, 1.0, 1.0, 2.0)),
    ],
    ids=lambda m: m.name,
)
def test_lists_with_a_value_for_each_head(method):
    layout = Layout.video(4, 5, 4, text=3)
    q, k, v, _ = attention_inputs(2, 4, layout.num_tokens, 8)
    found = method_attention(method, layout, q, k, v)
    seen = []
    for group in split(method, 4):
        own = list(group.heads)
        seen += own
        assert not any(isinstance(getattr(group.method, n), tuple) for n in method.per_head)
        alone = method_attention(group.method, layout, q[:, own], k[:, own], v[:, own])
        torch.testing.assert_close(found[:, own], alone)
    assert sorted(seen) == [0, 1, 2, 3]


def test_functional_takes_lists():
    layout = Layout.image(6, 5)
    q, k, v, _ = attention_inputs(1, 2, 30, 8)
    found = functional.local_attention(q, k, v, layout, window=(2, 3))
    for head, window in enumerate((2, 3)):
        one = [x[:, head : head + 1] for x in (q, k, v)]
        alone = functional.local_attention(*one, layout, window=window)
        torch.testing.assert_close(found[:, head : head + 1], alone)
    with pytest.raises(ValueError, match=r"window has 2 values.*there are 1 heads"):
        functional.local_attention(q[:, :1], k[:, :1], v[:, :1], layout, window=(2, 3))
    with pytest.raises(ValueError, match="window has a value for each head"):
        Local(window=(2, 3)).plan(layout)
    with pytest.raises(ValueError, match="window must be a finite number above 0; got 0"):
        Local(window=(2, 0))


def test_groups_must_have_every_head_once():
    with pytest.raises(ValueError, match=r"each head 0, 1, ... once, got \[0, 2\]"):
        HeadGroups((Group((0,), Local()), Group((2,), Dense())))
    assert by_head(Local(3), 4) == Local(3)


def test_assignment_says_what_runs_where():
    heads = {"a.0": 4, "a.1": 4, "b.0": 4}
    rules = Mixture((Rule(Local(2), layers="a.*", heads="0-1", steps=(0, 2)), Rule(Dense(), "b.*")))
    found = Assignment(rules, heads)
    assert found.needs_steps
    at = found.at(1, 5)
    assert at["b.0"] is None and at["a.0"] == at["a.1"]
    assert [(g.heads, g.method.name) for g in at["a.0"].method.groups] == [
        ((0, 1), "local"), ((2, 3), "dense"),
    ]  # fmt: skip
    assert found.at(2, 5) == dict.fromkeys(heads)
    assert found.ever("b.0") == () and len(found.ever("a.0")) == 1
    with pytest.raises(ValueError, match="does not tell its number of heads"):
        Assignment(rules, dict.fromkeys(heads))


@pytest.mark.parametrize(
    "method", [Sol(block_size=16), LogLinear(8, 1, 1), TopK(block_size=16, topk=(1, 2, 1, 3))]
)
def test_work_counted_while_drawing_is_that_of_the_plan(method):
    """With summaries and tails, without waiting for the device."""
    q, k, v, _ = attention_inputs(2, 4, LAYOUT.num_tokens, 8)
    plan = method.plan(LAYOUT, q, k, v)
    dense = LAYOUT.num_tokens * LAYOUT.valid().sum(-1).double().mean()
    assert float(plan.listed_density()) == pytest.approx(plan.density)
    assert float(plan.listed_work()) == pytest.approx(plan.flops(1) / (4 * float(dense)))
