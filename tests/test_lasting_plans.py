"""Plans that last for some steps: against a method that repeats its own plans, call by call."""

import gc
import weakref
from dataclasses import dataclass
from typing import ClassVar

import pytest
import tiny
import torch

import dittfast
from dittfast import Schedule
from dittfast.methods import VSA, Local, LogLinear, Rectified, TopK
from dittfast.mixture import Mixture, Rule
from dittfast.pipelines.adapter import method_parameters

LOG_LINEAR = LogLinear(block_size=8, topk=1, levels=1)
STEPS = 5


@dataclass(frozen=True)
class Repeating(LogLinear):
    """Plans in every ``every``-th step, in which there are so many calls, one a layer and pass."""

    name: ClassVar[str] = "repeating"
    every: int = 2
    calls: int = 4

    def __post_init__(self):
        super().__post_init__()
        object.__setattr__(self, "_plans", [])
        object.__setattr__(self, "_count", [0])

    def plan(self, layout, q=None, k=None, v=None, scale=None, kv_log_weight=None):
        step, call = divmod(self._count[0], self.calls)
        self._count[0] += 1
        if step % self.every == 0:
            plan = super().plan(layout, q, k, v, scale, kv_log_weight)
            self._plans[call : call + 1] = [plan]
        return self._plans[call]


@pytest.fixture(params=["flux", "wan"])
def pipe(request):
    """FLUX has one pass in a step, Wan calls its transformer twice: conditional and not."""
    return tiny.flux_pipeline() if request.param == "flux" else tiny.wan_pipeline()


def draw(pipe, **changes):
    return tiny.run(pipe, num_inference_steps=STEPS, **changes)


def repeating(pipe, every):
    # A step of FLUX is a pass through 4 layers, one of Wan 2 passes through 2 layers.
    with dittfast.enable(pipe, Repeating(8, 1, 1, every=every, calls=4), min_tokens=0):
        return draw(pipe)


@pytest.mark.parametrize("every", [1, 2, 3, 99])
def test_plans_last_in_their_layer_and_branch(pipe, every):
    expected = repeating(pipe, every)
    with dittfast.enable(pipe, LOG_LINEAR, min_tokens=0, replan_every=every) as enabled:
        found = draw(pipe)
        assert torch.equal(draw(pipe), found)  # nothing is left of the first run
        notes = enabled.describe().notes
    assert torch.equal(found, expected)
    made = 2 * 4 * -(-STEPS // every)
    words = f"last {every} steps: {made} made, used again {2 * 4 * STEPS - made} times"
    assert any(words in note for note in notes) == (every > 1)


def test_a_kept_plan_changes_the_picture():
    pipe = tiny.flux_pipeline()
    with dittfast.enable(pipe, LOG_LINEAR, min_tokens=0):
        plain = draw(pipe)
    with dittfast.enable(pipe, LOG_LINEAR, min_tokens=0, replan_every=1):
        assert torch.equal(draw(pipe), plain)
    assert not torch.equal(repeating(pipe, 99), plain)


def test_until_drift():
    pipe = tiny.flux_pipeline()
    for drift, every in ((1e9, 99), (1e-9, 1)):
        with dittfast.enable(pipe, LOG_LINEAR, min_tokens=0, replan_drift=drift):
            assert torch.equal(draw(pipe), repeated(pipe, every))
    with dittfast.enable(pipe, LOG_LINEAR, min_tokens=0, replan_drift=1e9, replan_every=2):
        assert torch.equal(draw(pipe), repeated(pipe, 2))


def repeated(pipe, every):
    """:func:`repeating` on a stock copy: the pipeline is enabled."""
    with dittfast.disable(pipe):
        return repeating(pipe, every)


def test_drift_is_the_change_of_pooled_q_and_k():
    from dittfast.methods.memory import Lasting, Memory, Tally

    torch.manual_seed(0)
    q, k = torch.randn(1, 2, 130, 8), torch.randn(1, 2, 130, 8)
    pooled = [torch.stack([x[:, :, a:b].mean(2) for a, b in ((0, 64), (64, 128), (128, 130))])
              for x in (q, k)]  # fmt: skip
    step = torch.randn(1, 2, 1, 8)
    size = float(step.expand(1, 2, 3, 8).norm() / pooled[0].norm())
    for factor, renews in ((0.9, False), (1.1, True)):
        memory, made = Memory(Lasting(None, size), Tally()), []
        ask = lambda q, k: memory.plan(LOG_LINEAR, "l", q, k, lambda: made.append(0))  # noqa: B023, E731
        for number, moved in enumerate((q, q + factor * step)):
            memory.begin(number)
            ask(moved, k)
        assert len(made) == 1 + renews


def test_plans_are_freed_at_the_end_and_when_a_run_was_interrupted(monkeypatch):
    pipe, plans, plan = tiny.flux_pipeline(), [], Rectified.plan
    method = Rectified(block_size=16, topk=2, top_p=0.1)

    def noted(self, *args, **kwargs):
        plans.append(weakref.ref(made := plan(self, *args, **kwargs)))
        return made

    def stop(pipe, step, time, given):
        if step == 2:
            raise KeyboardInterrupt
        return given

    monkeypatch.setattr(Rectified, "plan", noted)
    alive = lambda: (gc.collect(), sum(ref() is not None for ref in plans))[1]  # noqa: E731
    with dittfast.enable(pipe, method, min_tokens=0, replan_every=3):
        found = draw(pipe)
        assert len(plans) == 8 and alive() == 0
        with pytest.raises(KeyboardInterrupt):
            draw(pipe, callback_on_step_end=stop)
        assert torch.equal(draw(pipe), found) and alive() == 0
        small = draw(pipe, height=48)
        assert torch.equal(draw(pipe), found)
    with dittfast.enable(pipe, method, min_tokens=0, replan_every=3):
        assert torch.equal(draw(pipe, height=48), small)
    assert alive() == 0


def test_the_weakened_pass_of_guidance_has_plans_of_its_own():
    pipe = tiny.flux_pipeline()
    with dittfast.enable(pipe, LOG_LINEAR, min_tokens=0, replan_every=2) as enabled:
        with dittfast.guide(pipe, heads=((0, 0),), guidance_scale=2.0):
            draw(pipe)
        assert any("24 made, used again 16 times" in note for note in enabled.describe().notes)


def test_passes_that_may_be_differentiated_plan_every_time():
    model, inputs = tiny.flux_transformer(), tiny.flux_inputs()
    with dittfast.enable(model, LOG_LINEAR, min_tokens=0, replan_every=5):
        state = model._dittfast
        for _ in range(2):
            model(**inputs)[0].square().mean().backward()
        assert state.tally.made == state.tally.again == 0
        assert method_parameters(model) == {}


def test_threads_have_runs_of_their_own():
    one = tiny.flux_pipeline()
    two = tiny.twin(one)
    with dittfast.enable(one, LOG_LINEAR, min_tokens=0, replan_every=2):
        expected = [draw(one), draw(one, prompt="a blue dog", seed=1)]
        found = tiny.in_threads(lambda: draw(one), lambda: draw(two, prompt="a blue dog", seed=1))
    assert all(torch.equal(a, b) for a, b in zip(found, expected))


def test_heads_with_options_of_their_own_keep_plans_of_their_own():
    pipe = tiny.flux_pipeline()
    method = LogLinear(block_size=8, topk=(1, 3), levels=1)
    with dittfast.enable(pipe, method, min_tokens=0, replan_every=99) as enabled:
        draw(pipe)
        assert any("8 made, used again 32 times" in note for note in enabled.describe().notes)


def test_plans_last_as_long_as_their_method_says():
    """Of the 4 layers of tiny FLUX 2 run each method."""
    pipe = tiny.flux_pipeline()
    rules = (Rule(LOG_LINEAR, ("0-1",)), Rule(TopK(topk=0.5, block_size=16), ("2-3",)))
    with dittfast.enable(
        pipe, Mixture(rules), min_tokens=0, replan_every={"log_linear": 99}
    ) as enabled:
        draw(pipe)
        notes = enabled.describe().notes
    words = f"last 99 steps (log_linear): {2 + 2 * STEPS} made, used again {2 * (STEPS - 1)} times"
    assert any(words in note for note in notes)
    with pytest.raises(ValueError, match="names 'sol', which plans nothing here"):
        dittfast.enable(pipe, Mixture(rules), replan_every={"sol": 2})
    assert Schedule(replan_every={"b": 2, "a": 3}) == Schedule(replan_every=[["a", 3], ["b", 2]])


@pytest.mark.parametrize(
    "options, words",
    [
        (dict(replan_every=0), "replan_every must be an integer, at least 1; got 0"),
        (dict(replan_every=1.5), "replan_every must be an integer"),
        (dict(replan_every={"topk": 0}), "replan_every of topk must be an integer"),
        (dict(replan_every={}), "integers by the names of methods"),
        (dict(replan_every=["topk"]), "integers by the names of methods"),
        (dict(replan_drift=0), "replan_drift must be a finite number above 0"),
    ],
)
def test_bad_values(options, words):
    with pytest.raises(ValueError, match=words):
        Schedule(**options)


def test_the_planner_of_a_method_that_computes_lasts_too():
    pipe = tiny.flux_pipeline()
    with dittfast.enable(pipe, VSA(2, (1, 4, 4)), min_tokens=0, replan_every=99) as enabled:
        draw(pipe)
        assert any("4 made, used again 16 times" in note for note in enabled.describe().notes)


def test_static_plans_need_no_steps():
    model, inputs = tiny.flux_transformer(), tiny.flux_inputs()
    with dittfast.enable(model, Local(2), min_tokens=0, replan_every=5):
        with torch.no_grad():
            model(**inputs)
        assert model._dittfast.last.step is None
