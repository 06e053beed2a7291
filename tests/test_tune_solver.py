"""The tuner's arithmetic: the knapsack against brute force, budgets, choices, rules."""

from __future__ import annotations

import itertools
import math
import random
from types import SimpleNamespace

import pytest

from dittfast.methods import METHODS, Local, TopK
from dittfast.methods.base import Method
from dittfast.mixture import Assignment
from dittfast.pipelines.tune.budget import Budget
from dittfast.pipelines.tune.candidates import candidates, check_methods, tunable
from dittfast.pipelines.tune.prediction import DENSE, Place, Prediction
from dittfast.pipelines.tune.preset import mixture_of
from dittfast.pipelines.tune.recording import bands, middle
from dittfast.pipelines.tune.solver import Choice, cheapest, hull, most_exact
from dittfast.pipelines.tune.tune import ImpossibleBudget, Tuner


def knapsack(draw: random.Random, items: int, most: int) -> list[list[Choice]]:
    """Items with a choice that errs nothing, and cheaper ones."""
    made = []
    for _ in range(items):
        dense = Choice(draw.uniform(5, 10), 0.0, "dense")
        others = [
            Choice(draw.uniform(0, 12), draw.expovariate(1), n)
            for n in range(draw.randint(0, most))
        ]
        made.append([dense, *others])
    return made


def totals(chosen):
    return sum(c.cost for c in chosen), sum(c.error for c in chosen)


@pytest.mark.parametrize("seed", range(60))
def test_the_cheapest_within_a_limit_is_within_a_step_of_brute_force(seed):
    draw = random.Random(seed)
    items = knapsack(draw, draw.randint(1, 5), 4)
    limit = draw.uniform(0, 4)
    fitting = [c for c in itertools.product(*items) if totals(c)[1] <= limit]
    best = min(totals(c)[0] for c in fitting)
    cost, error = totals(cheapest(items, limit))
    largest = max(
        (a.cost - b.cost for x in items for a, b in itertools.pairwise(hull(x))), default=0
    )
    assert error <= limit
    assert best <= cost <= best + largest + 1e-9


def test_most_knapsacks_are_solved_exactly():
    gaps = []
    for seed in range(100):
        draw = random.Random(seed)
        items, limit = knapsack(draw, 5, 4), draw.uniform(0.5, 4)
        fitting = [totals(c)[0] for c in itertools.product(*items) if totals(c)[1] <= limit]
        gaps.append(totals(cheapest(items, limit))[0] / min(fitting) - 1)
    assert sum(gap < 1e-9 for gap in gaps) > 60
    assert sum(gaps) / len(gaps) < 0.03


def test_what_is_left_of_a_limit_is_spent_off_the_hull():
    choices = [Choice(10, 0, "dense"), Choice(9, 0.5, "between"), Choice(6, 1, "sparse")]
    assert [c.what for c in hull(choices)] == ["dense", "sparse"]
    assert [c.what for c in cheapest([choices], 0.7)] == ["between"]
    assert [c.what for c in cheapest([choices, choices], 1.5)] == ["sparse", "between"]
    assert cheapest([[Choice(1, 2.0)]], 1.0) is None


@pytest.mark.parametrize("seed", range(30))
def test_the_most_exact_within_a_cost_turns_the_two_around(seed):
    draw = random.Random(seed)
    items = knapsack(draw, draw.randint(1, 5), 4)
    low = sum(min(c.cost for c in x) for x in items)
    limit = draw.uniform(low, sum(x[0].cost for x in items) + 1)
    fitting = [totals(c)[1] for c in itertools.product(*items) if totals(c)[0] <= limit]
    cost, error = totals(most_exact(items, limit))
    steps = [[Choice(c.error, c.cost) for c in x] for x in items]
    largest = max(
        (a.cost - b.cost for x in steps for a, b in itertools.pairwise(hull(x))), default=0
    )
    assert cost <= limit
    assert min(fitting) <= error <= min(fitting) + largest + 1e-9
    assert most_exact(items, low - 0.01) is None


def test_no_choice_is_above_its_hull():
    draw = random.Random(0)
    for _ in range(50):
        (choices,) = knapsack(draw, 1, 8)
        points = hull(choices)
        assert points[0].error == min(c.error for c in choices)
        assert points[-1].cost == min(c.cost for c in choices)
        slopes = [(a.cost - b.cost) / (b.error - a.error) for a, b in itertools.pairwise(points)]
        assert slopes == sorted(slopes, reverse=True) and len(set(slopes)) == len(slopes)
        for a, b in itertools.pairwise(points):
            for c in choices:
                if a.error <= c.error <= b.error:
                    part = (c.error - a.error) / (b.error - a.error)
                    assert c.cost >= a.cost + part * (b.cost - a.cost) - 1e-9


# Budgets.


def test_a_budget_is_read_and_judged():
    budget = Budget.parse(["psnr>=30", "speedup >= 1.5"])
    assert budget == Budget(psnr=30, speedup=1.5) and budget.has_quality
    assert budget.words() == ["psnr>=30", "speedup>=1.5"]
    assert Budget.parse(budget.words()) == budget
    assert not budget.lacks({"psnr": 30.0, "speedup": 1.5})
    assert budget.lacks({"psnr": 29.9, "speedup": 2.0}) == ["psnr 29.9, not >= 30"]
    assert not Budget.parse(["distance<=0.1"]).lacks({"distance": 0.1})
    assert Budget.parse(["distance<=0.1"]).lacks({"distance": 0.11})
    assert not Budget(speedup=2.0).has_quality
    assert budget.lacks({"psnr": 31.0}) == ["speedup was not measured"]


@pytest.mark.parametrize(
    ("texts", "words"),
    [
        ([], "there is no budget"),
        (["psnr"], "written NAME>=NUMBER"),
        (["psnr>=x"], "psnr must be above 0"),
        (["psnr>=nan"], "psnr must be above 0"),
        (["psnr>=0"], "psnr must be above 0"),
        (["psnr>=101"], "at most 100"),
        (["psnr<=30"], "psnr takes >=, got 'psnr<=30'; write psnr>=30"),
        (["psnr>30"], "psnr takes >="),
        (["psnr=30"], "psnr takes >="),
        (["distance>=0.1"], "distance takes <="),
        (["distance<=1.5"], "below 1"),
        (["speedup>=1"], "speedup must be above 1"),
        (["speed>=2"], "Did you mean 'speedup'"),
        (["psnr>=30", "psnr>=31"], "has psnr twice"),
    ],
)
def test_a_wrong_budget_is_refused(texts, words):
    with pytest.raises(ValueError) as error:
        Budget.parse(texts)
    assert words in str(error.value)


# Candidates.


def test_candidates_leave_something_out_and_differ():
    from dittfast import Layout

    layout = Layout.image(16, 24, text=5)
    found = candidates(layout, tunable())
    assert {m.name for m in found} >= {"local", "topk", "sol", "rectified"}
    assert "radial" not in {m.name for m in found}  # one frame sees itself in full
    assert len(set(found)) == len(found)
    for method in found:
        if method.static and not method.computes:
            assert 0 < method.plan(layout).density < 0.9
    video = candidates(Layout.video(5, 8, 8, text=5), ["radial"])
    assert {m.name for m in video} == {"radial"}


@pytest.mark.parametrize(
    ("names", "words"),
    [
        ([], "no methods to try"),
        (["lokal"], "Did you mean 'local'"),
        (["linear"], "has to be trained first"),
        (["reattention"], "keeps values from step to step"),
        (["dense"], "cannot be tuned"),
        (["local", "local"], "named twice"),
    ],
)
def test_wrong_methods_are_refused(names, words):
    with pytest.raises(ValueError) as error:
        check_methods(names)
    assert words in str(error.value)


def test_a_method_without_a_ladder_is_tried_as_it_is(monkeypatch):
    from dataclasses import dataclass

    from dittfast import Layout

    @dataclass(frozen=True)
    class Mine(Local):
        """Local under another name, as it is."""

        name = "mine"
        ladder = Method.ladder

    monkeypatch.setitem(METHODS, "mine", Mine)
    assert candidates(Layout.image(32, 32), check_methods(["mine"])) == [Mine()]


def test_bands_cover_a_run_once():
    for steps, count in itertools.product(range(1, 13), range(1, 6)):
        found = bands(steps, count)
        assert [s for a, b in found for s in range(a, b)] == list(range(steps))
        assert len(found) == min(steps, count)
        assert all(a <= middle((a, b)) < b for a, b in found)


# Prediction.

METHODS_TRIED = [Local(window=2), Local(window=4), TopK(topk=0.2)]
LAYERS = ["a", "b"]


def prediction(heads=2, seed=0):
    draw = random.Random(seed)
    records = []
    for _ in range(2):
        calls = [
            {
                "layer": layer, "step": step, "rows": 1, "heads": heads, "head_dim": 8,
                "size": draw.uniform(1, 3), "dense_seconds": 1.0,
                "sensitivity": draw.uniform(0.1, 1),
                "tried": [
                    {
                        "error": [draw.uniform(0, 0.5) for _ in range(heads)],
                        "seconds": 0.2 * (n + 1),
                        "planning": 0.05 * (n == 2),
                    }
                    for n in range(3)
                ],
            }
            for layer in LAYERS for step in (0, 2)
        ]  # fmt: skip
        records.append({"passes": 2, "calls": calls, "start": [0.1, 0.1, 0.2]})
    return records, Prediction(METHODS_TRIED, [1, 3], [0, 2], records, {"psnr": [0.5, 2.0]}, 30.0)


def test_the_prediction_is_the_sum_that_its_formula_says():
    records, made = prediction()
    assigned = {Place("a", 0): (0, 2), Place("a", 1): (1, 1),
                Place("b", 0): (DENSE, DENSE), Place("b", 1): (DENSE, 0)}  # fmt: skip
    made.factors["psnr"]["topk"] = 3.0
    middles, reach, steps = [0, 2], [0.5, 2.0], [1, 3]
    error = seconds = 0.0
    for (layer, band), heads in assigned.items():
        calls = [c for r in records for c in r["calls"]
                 if (c["layer"], c["step"]) == (layer, middles[band])]  # fmt: skip
        weight = sum(c["sensitivity"] for c in calls) / 2
        for head, n in enumerate(heads):
            if n == DENSE:
                continue
            own = sum(c["tried"][n]["error"][head] / c["size"] for c in calls) / 2
            error += own * weight * reach[band] * (3.0 if n == 2 else 1.0)
        # A call of one head costs what one of both does, less half of what is no start of a call.
        alone = {DENSE: 0.5, 0: 0.15, 1: 0.25, 2: 0.4}
        whole = {DENSE: 1.0, 0: 0.2, 1: 0.4, 2: 0.6}
        each = [whole[heads[0]]] if heads[0] == heads[1] else [alone[n] for n in heads]
        seconds += sum(each) * steps[band] * 2
    assert made.squared_error(assigned, "psnr") == pytest.approx(error)
    rest = 30.0 - 2 * 2 * (1 + 3)  # layers, passes, steps of one second
    assert made.call_seconds(assigned) == pytest.approx(rest + seconds)
    assert made.planning(assigned) == pytest.approx(0.5 * 0.05 * 1 * 2)


def test_choices_cost_and_err_what_the_whole_says():
    _, made = prediction(heads=3)
    place = Place("b", 1)
    limit = 0.7
    for choice in made.choices(place, {"psnr": limit}):
        alone = {place: choice.what}
        assert choice.cost == pytest.approx(made.seconds(place, choice.what))
        assert choice.error == pytest.approx(made.squared_error(alone, "psnr") / limit)
    whats = {choice.what for choice in made.choices(place, {"psnr": limit})}
    assert {(n,) * 3 for n in (DENSE, 0, 1, 2)} <= whats
    assert any(len(set(what)) > 1 for what in whats)


def test_a_correction_moves_the_prediction_to_what_was_drawn():
    _, made = prediction()
    one = {place: (0, 0) for place in made.places}
    before = made.squared_error(one, "psnr")
    made.correct(one, "psnr", 5 * before)
    assert made.squared_error(one, "psnr") == pytest.approx(5 * before)
    other = {place: (2, 2) for place in made.places}
    assert made.factors["psnr"] == pytest.approx({"local": 5.0, "topk": 1.0})
    both = {place: (0, 2) for place in made.places}
    before, parts = dict(made.factors["psnr"]), made.contributions(both, "psnr")
    share = parts["local"] / sum(parts.values())
    made.correct(both, "psnr", 4 * sum(parts.values()))
    moved = {name: x / before[name] for name, x in made.factors["psnr"].items()}
    assert moved == pytest.approx({"local": 4**share, "topk": 4 ** (1 - share)})
    for _ in range(30):
        made.correct(both, "psnr", 2.0)
    assert made.squared_error(both, "psnr") == pytest.approx(2.0, rel=1e-3)
    assert made.squared_error(other, "psnr") > 0


def test_a_method_that_was_not_finite_is_not_chosen():
    records, _ = prediction()
    records[0]["calls"][0]["tried"][1]["error"] = None
    made = Prediction(METHODS_TRIED, [1, 3], [0, 2], records, {"psnr": [0.5, 2.0]}, 30.0)
    whats = {n for c in made.choices(Place("a", 0), {"psnr": 1.0}) for n in c.what}
    assert whats == {DENSE, 0, 2}
    assert [made.is_finite(n) for n in range(3)] == [True, False, True]
    one = {place: (1, 1) for place in made.places}
    made.correct(one, "psnr", 1.0)  # nothing is learned of what cannot be predicted
    assert made.factors["psnr"] == {"local": 1.0, "topk": 1.0}
    assert all(math.isfinite(c.error) for c in made.choices(Place("a", 0), {"psnr": 1.0}))


@pytest.mark.parametrize("seed", range(20))
def test_rules_say_what_was_chosen_for_every_layer_head_and_step(seed):
    draw = random.Random(seed)
    layers, heads, steps, count = ["x", "y", "z"], draw.choice((1, 3)), 8, draw.choice((1, 2, 4))
    cut = bands(steps, count)
    chosen = {
        Place(layer, band): tuple(draw.choice((DENSE, 0, 1, 2)) for _ in range(heads))
        for layer in layers for band in range(len(cut))
    }  # fmt: skip
    mixture = mixture_of(chosen, METHODS_TRIED, layers, [(a / steps, b / steps) for a, b in cut])
    if all(n == DENSE for what in chosen.values() for n in what):
        assert mixture is None
        return
    found = Assignment(mixture, dict.fromkeys(layers, heads))
    for band, (first, end) in enumerate(cut):
        for step in range(first, end):
            for layer, assigned in found.at(step, steps).items():
                wanted = [METHODS_TRIED[n] if n != DENSE else None for n in chosen[layer, band]]
                if assigned is None:
                    assert wanted == [None] * heads
                    continue
                groups = getattr(assigned.method, "groups", None)
                if groups is None:
                    assert wanted == [assigned.method] * heads
                    continue
                runs = {h: g.method for g in groups for h in g.heads}
                assert wanted == [None if runs[h].dense else runs[h] for h in range(heads)]


def test_a_speed_is_aimed_above_its_bound_where_there_is_room():
    _, made = prediction()
    tuner = object.__new__(Tuner)
    tuner.layers, tuner.total_steps, tuner.bands = LAYERS, 4, [(0, 1), (1, 4)]
    fastest = made.speedup({place: (0, 0) for place in made.places})

    def solved(speedup):
        tuner.task = SimpleNamespace(budget=Budget(speedup=speedup))
        return made.speedup(tuner._solve(made, {}))

    assert 1.04 * 1.2 <= solved(1.2) < fastest
    assert fastest / 1.01 <= solved(fastest / 1.01) <= fastest
    with pytest.raises(ImpossibleBudget, match=f"{fastest:.2f} times as fast; that is the nearest"):
        solved(1.01 * fastest)
    alike = tuner._alike(made, {})  # the bound is out of reach for all
    assert alike is None
    tuner.task = SimpleNamespace(budget=Budget(speedup=1.2))
    every = [{place: (n, n) for place in made.places} for n in range(3)]
    fast = [one for one in every if made.speedup(one) >= 1.2 * 1.04]
    assert tuner._alike(made, {}) == min(fast, key=lambda x: made.squared_error(x, "psnr"))
    tuner.task = SimpleNamespace(budget=Budget(psnr=1.0))
    assert tuner._alike(made, {"psnr": -30.0}) == min(every, key=made.call_seconds)
    tuner.task = SimpleNamespace(budget=Budget(psnr=90.0))
    assert tuner._alike(made, {"psnr": 90.0}) is None
    with pytest.raises(ImpossibleBudget, match="dense attention is the nearest"):
        tuner._solve(made, {"psnr": 90.0})
