"""The tuner's arithmetic: its search against brute force, budgets, predictions, rules."""

from __future__ import annotations

import itertools
import random
from types import SimpleNamespace

import pytest
import torch

from dittfast.methods import METHODS, Local, TopK
from dittfast.methods.base import Method
from dittfast.mixture import Assignment
from dittfast.pipelines.tune.budget import Budget, ImpossibleBudget
from dittfast.pipelines.tune.candidates import candidates, check_methods, tunable
from dittfast.pipelines.tune.prediction import DENSE, Place, Prediction, _thinned
from dittfast.pipelines.tune.preset import mixture_of
from dittfast.pipelines.tune.recording import bands, middle
from dittfast.pipelines.tune.searching import Search
from dittfast.pipelines.tune.seconds import steadied
from dittfast.pipelines.tune.solver import Choice, Problem, front, hull, search


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


def problem(seed: int, items: int = 5, most: int = 4, measures: int = 2) -> Problem:
    """Items with a choice that errs nothing, and cheaper ones whose errors go anywhere."""
    draw = torch.Generator().manual_seed(seed)
    rand = lambda *shape: torch.rand(shape, generator=draw, dtype=torch.float64)  # noqa: E731
    item = torch.arange(items).repeat_interleave(most)
    errors = torch.randn(measures, items * most, 6, generator=draw, dtype=torch.float64)
    errors *= rand(items * most, 1) ** 2
    errors[:, ::most] = 0
    cost = rand(items * most)
    cost[::most] += 1
    return Problem(cost, errors @ errors.mT, item)


def every_selection(one: Problem) -> torch.Tensor:
    numbers = torch.arange(len(one.item))
    own = [numbers[one.item == i].tolist() for i in range(one.items)]
    return torch.tensor(list(itertools.product(*own)))


def total_and_error(one: Problem, chosen) -> tuple[float, float]:
    """From the definition: costs add up, errors are sums of inner products."""
    cost = sum(float(one.cost[i]) for i in chosen)
    errors = [sum(float(g[i, j]) for i in chosen for j in chosen) for g in one.grams]
    return cost, max(errors)


@pytest.mark.parametrize("by_cost", [True, False])
def test_what_is_found_is_nearly_always_what_brute_force_finds(by_cost):
    exact, gaps = 0, []
    for seed in range(7):
        one = problem(seed, items=4)
        values = torch.tensor([total_and_error(one, x) for x in every_selection(one).tolist()])
        limited, other = values.unbind(1) if by_cost else values.flip(1).unbind(1)
        bound = float(limited.quantile(0.3 + 0.03 * (seed % 8)))
        best = float(other[limited <= bound].min())
        found = total_and_error(one, search(one, bound, by_cost).tolist())
        found = found if by_cost else found[::-1]
        assert found[0] <= bound + 1e-9 and found[1] >= best - 1e-6
        gaps.append(found[1] / best - 1 if best else 0.0)
        exact += gaps[-1] < 1e-6
    assert exact >= 6
    assert sum(gaps) / len(gaps) < 0.03


def test_a_change_of_one_item_or_two_is_valued_as_it_is():
    one = problem(3, items=3, most=3)
    chosen, everything = torch.tensor([1, 3, 8]), torch.arange(9)
    errors, totals = one.changes(chosen)
    both, sums = one.pairs(chosen, everything)
    for a in range(9):
        moved = chosen.clone()
        moved[one.item[a]] = a
        wanted = total_and_error(one, moved.tolist())
        assert (float(totals[a]), float(errors.amax(0)[a])) == pytest.approx(wanted)
        for b in range(9):
            if one.item[a] == one.item[b]:
                assert sums[a, b] == float("inf")
                continue
            again = moved.clone()
            again[one.item[b]] = b
            wanted = total_and_error(one, again.tolist())
            assert (float(sums[a, b]), float(both[a, b])) == pytest.approx(wanted)


def test_errors_that_cancel_are_taken_together():
    """Each of two alone errs more than the limit, both together nothing."""
    errors = torch.tensor([[0.0, 0.0], [2.0, 0.0], [0.0, 0.0], [-2.0, 0.0]], dtype=torch.float64)
    cost, item = torch.tensor([2.0, 1.0, 2.0, 1.0]), torch.tensor([0, 0, 1, 1])
    one = Problem(cost, (errors @ errors.T)[None], item)
    assert search(one, 1.0, by_cost=False).tolist() == [1, 3]
    assert search(one, 2.5, by_cost=True).tolist() == [1, 3]
    assert search(one, 1.9, by_cost=True) is None


def test_a_start_is_never_left_for_something_worse():
    one = problem(7)
    for start in every_selection(one)[::300]:
        bound = one.total(start) + 1e-9
        assert one.error(search(one, bound, True, [start])) <= one.error(start) + 1e-9


def test_no_choice_is_above_its_hull():
    draw = random.Random(0)
    for _ in range(50):
        (choices,) = knapsack(draw, 1, 8)
        points = hull(choices)
        assert set(points) <= set(front(choices))
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
LAYERS, MEASURES = ["a", "b"], ("psnr", "distance")


def prediction(heads=2, seed=0, answered=True):
    """Two layers in two bands, of one and three steps; dense attention is 32 of 46 seconds."""
    draw = random.Random(seed)
    records = []
    for _ in range(2):
        calls = [
            {
                "layer": layer, "step": step, "rows": 1, "heads": heads, "head_dim": 8,
                "size": draw.uniform(1, 3), "dense_seconds": 1.0,
                "tried": [
                    {
                        "error": [draw.uniform(0.4, 0.5) / (1 + n) for _ in range(heads)],
                        "seconds": 0.2 * (n + 1),
                        "planning": 0.05 * (n == 2),
                        "work": 0.1 * (n + 1),
                    }
                    for n in range(3)
                ],
            }
            for layer in LAYERS for step in (0, 2)
        ]  # fmt: skip
        records.append({"passes": 2, "calls": calls, "start": [0.1, 0.1, 0.2]})
    made = Prediction(METHODS_TRIED, [1, 3], [0, 2], records, 46.0, 32.0)
    settle(made, {0: 3.0, 1: 2.0, 2: 1.0})
    if answered:
        trials = {place: made.trials(place) for place in made.places}
        gram = gram_of(trials, seed)
        made.answer(trials, {m: gram for m in MEASURES})
    return records, made


def settle(made, errors):
    made.settle(dict.fromkeys(MEASURES, errors))


def gram_of(trials, seed):
    """Errors that grow as what is run becomes sparser, in directions of their own."""
    draw = torch.Generator().manual_seed(seed)
    vectors = [
        torch.randn(5, generator=draw, dtype=torch.float64)
        * sum(0 if n == DENSE else 3 - n for n in heads) / 10
        for own in trials.values() for heads in own
    ]  # fmt: skip
    return torch.stack(vectors) @ torch.stack(vectors).T


def test_seconds_are_the_sum_that_their_formula_says():
    _, made = prediction()
    assigned = {Place("a", 0): (0, 2), Place("a", 1): (1, 1),
                Place("b", 0): (DENSE, DENSE), Place("b", 1): (DENSE, 0)}  # fmt: skip
    # 2 layers, 2 passes, 4 steps of one recorded second are 32 seconds of a run: twice as many.
    scale, steps, seconds = 32 / (2 * 2 * 4), [1, 3], 0.0
    for place, heads in assigned.items():
        # A call of one head costs what one of both does, less half of what is no start of a call.
        alone = {DENSE: 0.5, 0: 0.15, 1: 0.25, 2: 0.4}
        whole = {DENSE: 1.0, 0: 0.2, 1: 0.4, 2: 0.6}
        each = [whole[heads[0]]] if heads[0] == heads[1] else [alone[n] for n in heads]
        seconds += scale * sum(each) * steps[place.band] * 2
    assert made.call_seconds(assigned) == pytest.approx(46 - 32 + seconds)
    assert made.planning(assigned) == pytest.approx({"topk": scale * 0.5 * 0.05 * 1 * 2})
    # Heads of both layers in one step, and in three: 0.1, 0.2 or 0.3 of dense attention, or all.
    heads = [(1, 0.1), (1, 0.3), (3, 0.2), (3, 0.2), (1, 1), (1, 1), (3, 1), (3, 0.1)]
    work = sum(steps * own for steps, own in heads) / 16
    assert made.work(assigned) == pytest.approx(work)
    before = made.call_seconds(assigned)
    for _ in range(3):
        made.learn_speed(assigned, 46 / (before + 1))
    assert made.call_seconds(assigned) == pytest.approx(before + 1, rel=1e-3)
    assert all(slower > 1 for slower in made.slowness.values())


def test_a_busy_or_lucky_moment_is_no_slow_or_fast_method():
    """Seconds are those beside dense attention's of the same moment, as most calls have them."""
    records, made = prediction()
    for one in records[0]["calls"]:  # while this prompt was recorded all took twice as long
        one["dense_seconds"] *= 2
        for tried in one["tried"]:
            tried["seconds"] *= 2
            tried["planning"] *= 2
    records[0]["calls"][0]["tried"][1]["seconds"] /= 5  # and one call was lucky
    records[0]["start"][0] = 5.0
    steady = steadied(records, METHODS_TRIED)
    again = Prediction(METHODS_TRIED, [1, 3], [0, 2], steady, 46.0, 32.0)
    for n in range(3):
        assert again.speedup(again.alike(n)) == pytest.approx(made.speedup(made.alike(n)))
    half = {place: (0, DENSE) for place in made.places}
    assert again.speedup(half) == pytest.approx(made.speedup(half), rel=0.1)


def test_a_call_with_more_work_is_slower_by_as_much():
    records, _ = prediction()
    for record in records:
        for one in record["calls"]:
            if one["layer"] == "b":
                one["tried"][2]["work"] *= 2
                one["tried"][2]["seconds"] = 0.05 + 2 * 0.55
    (first, second), _ = (
        [x["tried"][2] for x in r["calls"] if x["step"] == 0]
        for r in steadied(records, METHODS_TRIED)
    )
    assert first["seconds"] == pytest.approx(0.6) and second["seconds"] == pytest.approx(1.15)
    assert first["planning"] == second["planning"] == pytest.approx(0.05)


def test_errors_are_the_sum_that_their_formula_says():
    _, made = prediction()
    trials = {place: made.trials(place) for place in made.places}
    every = [(place, heads) for place in made.places for heads in trials[place]]
    gram = gram_of(trials, 0)
    assigned = {place: own[0] for place, own in trials.items()}
    made.factors["psnr"] = 3.0
    at = [every.index(one) for one in assigned.items()]
    wanted = 3 * sum(float(gram[i, j]) for i in at for j in at)
    assert made.squared_error(assigned, "psnr") == pytest.approx(wanted)
    dense = {place: (DENSE,) * 2 for place in made.places}
    assert made.squared_error(dense, "psnr") == 0
    shares = sum(x["squared_error"]["psnr"] for x in made.table(assigned))
    assert shares == pytest.approx(wanted)


def test_every_way_that_is_tried_is_worth_it_somewhere():
    _, made = prediction(heads=3, answered=False)
    assert made.usual == [2, 1, 0]
    for place in made.places:
        own = made.trials(place)
        assert {(n,) * 3 for n in made.usual} <= set(own)
        assert any(len(set(heads)) > 1 for heads in own)
        dense = made.seconds(place, (DENSE,) * 3)
        assert all(made.seconds(place, heads) < dense for heads in own)


def test_candidates_are_chosen_by_what_they_do_in_all_layers_at_once():
    """Errors of attention say little of the picture: only what is clearly worse is left out."""
    records, made = prediction(answered=False)
    assert made.worth() == [2, 1, 0]
    for record in records:
        for one in record["calls"]:
            one["tried"][1]["error"] = [1.5 * x for x in one["tried"][0]["error"]]
    settle(again := Prediction(METHODS_TRIED, [1, 3], [0, 2], records, 46.0, 32.0), {0: 1, 2: 2})
    assert again.worth() == [2, 1, 0] and again.usual == [0]
    for record in records:
        for one in record["calls"]:
            one["tried"][1]["error"] = [3 * x for x in one["tried"][0]["error"]]
    assert Prediction(METHODS_TRIED, [1, 3], [0, 2], records, 46.0, 32.0).worth() == [2, 0]


def test_of_many_choices_the_least_crowded_are_left():
    choices = [Choice(cost, -cost) for cost in (10.0, 9.9, 9.8, 5.0, 1.2, 1.0)]
    assert [c.cost for c in _thinned(choices, 3)] == [10.0, 5.0, 1.0]
    assert _thinned(choices, 6) == choices


def test_what_is_solved_holds_its_limits():
    _, made = prediction()
    one = made.alike(1)
    limits = {m: made.squared_error(one, m) for m in ("psnr", "distance")}
    found = made.solve(limits, starts=[one])
    assert all(made.squared_error(found, m) <= limits[m] * (1 + 1e-9) for m in limits)
    assert made.call_seconds(found) <= made.call_seconds(one)
    same = made.solve({"psnr": 1.0}, made.call_seconds(one), [one])
    assert made.call_seconds(same) <= made.call_seconds(one) + 1e-9
    assert made.squared_error(same, "psnr") <= made.squared_error(one, "psnr") + 1e-12
    assert made.solve({"psnr": 1.0}, made.call_seconds(made.fastest()) - 0.1) is None


def test_a_correction_moves_the_prediction_to_what_was_drawn():
    _, made = prediction()
    one = made.alike(0)
    before = made.squared_error(one, "psnr")
    made.correct(one, "psnr", 5 * before)
    assert made.squared_error(one, "psnr") == pytest.approx(5 * before)
    assert made.factors == pytest.approx({"psnr": 5.0, "distance": 1.0})
    half = {p: (0, 0) if p.layer == "a" else (2, 2) for p in made.places}
    made.correct(half, "psnr", 2.0)
    assert made.squared_error(half, "psnr") == pytest.approx(2.0)


def test_a_method_that_was_not_finite_is_not_chosen():
    records, _ = prediction()
    records[0]["calls"][0]["tried"][1]["error"] = None
    made = Prediction(METHODS_TRIED, [1, 3], [0, 2], records, 46.0, 32.0)
    assert sorted(made.worth()) == [0, 2]
    settle(made, {0: 2.0, 2: 1.0})
    assert {n for heads in made.trials(Place("a", 0)) for n in heads} <= {DENSE, 0, 2}
    assert [made.is_finite(n) for n in range(3)] == [True, False, True]
    assert made.usual == [2, 0]


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
    measured = SimpleNamespace(layers=LAYERS, total_steps=4, bands=[(0, 1), (1, 4)], task=None)
    tuning = Search(measured, made)
    fastest = made.speedup({place: (0, 0) for place in made.places})

    def solved(speedup):
        tuning.task = SimpleNamespace(budget=Budget(speedup=speedup))
        return made.speedup(tuning._solve({}))

    assert 1.03 * 1.2 <= solved(1.2) < fastest
    assert fastest / 1.01 <= solved(fastest / 1.01) <= fastest
    with pytest.raises(ImpossibleBudget, match=f"{fastest:.2f} times as fast; that is the nearest"):
        solved(1.01 * fastest)
    alike = tuning._alike({})  # the bound is out of reach for all
    assert alike is None
    tuning.task = SimpleNamespace(budget=Budget(speedup=1.2))
    every = [made.alike(n) for n in range(3)]
    fast = [one for one in every if made.speedup(one) >= 1.2 * 1.03]
    assert tuning._alike({}) == min(fast, key=lambda x: made.squared_error(x, "psnr"))
    tuning.task = SimpleNamespace(budget=Budget(psnr=1.0))
    assert tuning._alike({"psnr": -30.0}) == min(every, key=made.call_seconds)
    tuning.task = SimpleNamespace(budget=Budget(psnr=90.0))
    assert tuning._alike({"psnr": 90.0}) is None
    with pytest.raises(ImpossibleBudget, match="dense attention is the nearest"):
        tuning._solve({"psnr": 90.0})
