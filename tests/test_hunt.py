"""HeadHunter: the greedy search against brute force, and the whole of it on a tiny pipeline."""

import itertools
import json
import math
import statistics

import numpy as np
import pytest
import tiny
import torch
from PIL import Image

import dittfast
from dittfast.cli import main
from dittfast.pipelines.headhunter.hunt import hunt
from dittfast.pipelines.headhunter.objectives import Colorfulness, Contrast
from dittfast.pipelines.headhunter.report import paired
from dittfast.pipelines.headhunter.search import Policy, ScoreBook, calls, greedy, name_of

POOL = [(layer, head) for layer in range(3) for head in range(3)]
CALL = dict(height=48, width=64, num_inference_steps=1, max_sequence_length=12)
PROMPTS = ["a red cat", "a blue dog"]


class Fake:
    """Scores of sets of heads: a sum over heads and pairs, with noise by sample."""

    def __init__(self, seed=0, pairs=0.0, noise=0.0, samples=4):
        self.rng = np.random.default_rng(seed)
        self.single = {head: self.rng.normal() for head in POOL}
        self.pair = {p: pairs * self.rng.normal() for p in itertools.combinations(POOL, 2)}
        self.noise, self.samples, self.drawn = noise, samples, {}

    def mean(self, heads):
        both = sum(self.pair[p] for p in itertools.combinations(sorted(heads), 2))
        return sum(self.single[h] for h in heads) + both

    def __call__(self, heads, count):
        count = self.samples if count is None else count
        key = name_of(heads)
        self.drawn[key] = max(count, self.drawn.get(key, 0))
        rng = np.random.default_rng(abs(hash(key)) % 2**32)
        return [self.mean(heads) + self.noise * float(rng.normal()) for _ in range(count)]


@pytest.mark.parametrize("seed", range(5))
def test_additive_scores_give_the_best_set_of_all(seed):
    score = Fake(seed)
    rounds = greedy(score, POOL, Policy(rounds=4, min_gain=None))
    for number, found in enumerate(rounds, 1):
        best = max(itertools.combinations(POOL, number), key=score.mean)
        assert set(found.heads) == set(best)
        assert found.mean == pytest.approx(score.mean(best))


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("topk", [1, 2])
def test_every_round_takes_the_best_heads_beside_those_chosen(seed, topk):
    score = Fake(seed, pairs=1.0)
    rounds = greedy(score, POOL, Policy(rounds=3, topk=topk, min_gain=None))
    chosen = ()
    for found in rounds:
        left = [head for head in POOL if head not in chosen]
        wanted = sorted(left, key=lambda head: -score.mean((*chosen, head)))[:topk]
        assert list(found.added) == wanted
        chosen = (*chosen, *wanted)
        assert found.heads == chosen
        assert found.scores == tuple(score(chosen, None))


def test_it_stops_where_a_round_gains_nothing():
    score = Fake(3)
    order = sorted(POOL, key=lambda head: -score.single[head])
    helpful = [head for head in order if score.single[head] > 0]
    assert 0 < len(helpful) < len(POOL)
    rounds = greedy(score, POOL, Policy(rounds=9))
    assert [r.best_so_far for r in rounds] == [True] * len(helpful) + [False]
    assert [head for r in rounds for head in r.added] == order[: len(helpful) + 1]
    everything = greedy(score, POOL, Policy(rounds=20, min_gain=None))
    assert len(everything) == len(POOL)
    assert [r.best_so_far for r in everything] == [r.number <= len(helpful) for r in everything]
    tall = greedy(score, POOL, Policy(rounds=9, min_gain=score.single[helpful[0]] + 1e-9))
    assert len(tall) == 1


def test_screening_looks_at_all_and_judges_few():
    score = Fake(1, samples=6)
    (found,) = greedy(score, POOL, Policy(rounds=1, screen=2, keep=3))
    assert [c.samples for c in found.candidates] == [6] * 3 + [2] * 6
    assert [c.head for c in found.candidates] == sorted(POOL, key=lambda h: -score.single[h])
    assert sorted(score.drawn.values()) == [2] * 6 + [6] * 4


@pytest.mark.parametrize("policy", [
    Policy(3, 1), Policy(2, 3), Policy(2, 2, screen=2, keep=4), Policy(20, 2), Policy(9, 1, 3, 2),
], ids=str)  # fmt: skip
def test_the_progress_bar_knows_how_many_pictures(policy):
    policy = Policy(policy.rounds, policy.topk, policy.screen, policy.keep, None)
    score = Fake(2, samples=5)
    greedy(score, POOL, policy)
    assert sum(score.drawn.values()) == calls(policy, len(POOL), 5)


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(rounds=0), "rounds.*0"),
        (dict(topk=0), "topk"),
        (dict(screen=2), "keep=None"),
        (dict(keep=2), "screen=None"),
        (dict(topk=3, screen=2, keep=2), "keep.*at least 3.*2"),
        (dict(min_gain=math.nan), "nan"),
    ],
)
def test_bad_policies(options, message):
    with pytest.raises(ValueError, match=message):
        Policy(**options)


def test_the_book_keeps_scores_and_refuses_another_search(tmp_path):
    path = tmp_path / "state.json"
    settings = dict(guidance=dict(strength=1.0), samples=[("a cat", 0)])
    book = ScoreBook(settings, path)
    book.extend("search", ((3, 1), (0, 2)), [0.5])
    book.extend("search", ((0, 2), (3, 1)), [0.25])
    again = ScoreBook(settings, path)
    assert again.get("search", ((3, 1), (0, 2))) == [0.5, 0.25]
    assert again.get("holdout", ((3, 1), (0, 2))) == [] == again.get("search", ())
    other = dict(guidance=dict(strength=0.5), samples=[("a cat", 0)])
    with pytest.raises(ValueError, match=r"guidance\.strength = 1\.0, and now it is 0\.5"):
        ScoreBook(other, path)
    with pytest.raises(ValueError, match=r"guidance\.rows"):
        ScoreBook(dict(guidance=dict(strength=1.0, rows="image"), samples=[]), path)
    path.write_text("{")
    with pytest.raises(ValueError, match=r"state.json: it is not valid JSON .*; remove it"):
        ScoreBook(settings, path)


@pytest.fixture(scope="module")
def pipe():
    return tiny.flux_pipeline(double=1, single=1)


def search(pipe, **changes):
    options = dict(objective=Contrast(), prompts=PROMPTS, call=CALL, rounds=2, progress=False)
    return hunt(pipe, **options | changes)


def by_hand(pipe, heads, prompt, seed, objective=Contrast(), **guidance):  # noqa: B008
    """One picture's score, drawn alone with dittfast.guide."""
    if heads:
        dittfast.guide(pipe, heads=heads, **guidance)
    generator = torch.Generator().manual_seed(seed)
    image = pipe(prompt, **CALL, generator=generator, output_type="pt").images
    if heads:
        dittfast.unguide(pipe)
    return float(objective(image)[0])


def test_scores_are_those_of_guided_pictures(pipe):
    result = search(pipe, seeds=(3, 4), min_gain=None, guidance_scale=5.0, strength=0.8,
                    compare_layers=True, batch_size=3)  # fmt: skip
    samples = [(p, s) for s in (3, 4) for p in PROMPTS]
    options = dict(guidance_scale=5.0, strength=0.8)
    everyone = (result.unguided, *result.layers, *result.found)
    assert [c.name for c in everyone] == [
        "unguided", "layer 0", "layer 1", "round 1", "round 2"
    ]  # fmt: skip
    for contender in everyone:
        alone = [by_hand(pipe, contender.heads, *sample, **options) for sample in samples]
        assert contender.search == pytest.approx(alone, rel=1e-4)
    (first, second) = result.rounds
    singles = {
        head: statistics.fmean(by_hand(pipe, [head], *s, **options) for s in samples)
        for head in [(layer, head) for layer in range(2) for head in range(2)]
    }
    assert first.added == (max(singles, key=singles.get),)
    assert {c.head: pytest.approx(c.mean, rel=1e-4) for c in first.candidates} == singles
    assert second.heads[:1] == first.heads and len(second.heads) == 2
    assert set(result.layers[1].heads) == {(1, 0), (1, 1)}
    assert result.best_layer.search == max((c.search for c in result.layers), key=sum)


def test_the_pipeline_is_plain_afterwards(pipe):
    stock = tiny.run(pipe)
    bars = dict(pipe._progress_bar_config)
    search(pipe, rounds=1, prompts=PROMPTS[:1])
    assert torch.equal(tiny.run(pipe), stock)
    assert pipe._progress_bar_config == bars
    with pytest.raises(ValueError, match="not enabled"):
        dittfast.disable(pipe)


def test_it_searches_under_a_sparse_method(pipe):
    options = dict(heads=[(1, 1)], rounds=1, prompts=PROMPTS[:1], min_gain=None)
    dense = search(pipe, **options)
    with dittfast.enable(pipe, "local", window=2, min_tokens=0):
        sparse = search(pipe, **options)
        dittfast.guide(pipe, heads=[(1, 1)])
        generator = torch.Generator().manual_seed(0)
        image = pipe(PROMPTS[0], **CALL, generator=generator, output_type="pt").images
        dittfast.unguide(pipe)
    assert sparse.found[0].search == pytest.approx(Contrast()(image).tolist(), rel=1e-4)
    assert sparse.found[0].search != dense.found[0].search
    assert "Local" in sparse.settings["model"]["method"] and not dense.settings["model"]["method"]


class Interrupting:
    """Contrast, until a Ctrl-C at the nth call; 0 for none. Counts the pictures it judged."""

    def __init__(self, at=0):
        self.at, self.calls, self.pictures = at, 0, 0

    def __call__(self, images):
        self.calls += 1
        if self.calls == self.at:
            raise KeyboardInterrupt
        self.pictures += len(images)
        return Contrast()(images)


def test_an_interrupted_search_goes_on_where_it_stopped(pipe, tmp_path):
    options = dict(holdout=["a green car"], compare_layers=True, screen=1, keep=2, batch_size=1,
                   min_gain=None)  # fmt: skip
    whole = Interrupting()
    search(pipe, objective=whole, folder=tmp_path / "whole", **options)
    drawn = 0
    for at in (2, 6, 9, 0):
        part = Interrupting(at)
        if at:
            with pytest.raises(KeyboardInterrupt):
                search(pipe, objective=part, folder=tmp_path / "parts", **options)
        else:
            search(pipe, objective=part, folder=tmp_path / "parts", **options)
        drawn += part.pictures
    # Pictures are judged once; a sheet may have to draw some of them again to show them.
    assert drawn == whole.pictures
    names = [
        "curve.png", "heads.json", "holdout.png", "round-1.png", "round-2.png", "state.json"
    ]  # fmt: skip
    for name in names:
        a, b = ((tmp_path / folder / name).read_bytes() for folder in ("whole", "parts"))
        assert a == b, name
    assert sorted(p.name for p in (tmp_path / "parts").iterdir()) == names
    # More rounds of the same search use what is known.
    more = Interrupting()
    result = search(pipe, objective=more, folder=tmp_path / "parts", **options | dict(rounds=3))
    assert len(result.rounds) == 3 and 0 < more.pictures < whole.pictures
    with pytest.raises(ValueError, match=r"guidance_scale = 3\.0, and now it is 4\.0"):
        search(pipe, objective=whole, folder=tmp_path / "parts", guidance_scale=4.0, **options)
    with pytest.raises(ValueError, match="objective"):
        search(pipe, folder=tmp_path / "parts", **options)
    with torch.no_grad():
        pipe.transformer.proj_out.bias[0] += 1
    try:
        with pytest.raises(ValueError, match="weights"):
            search(pipe, objective=whole, folder=tmp_path / "parts", **options)
    finally:
        with torch.no_grad():
            pipe.transformer.proj_out.bias[0] -= 1


def test_what_was_found_guides(pipe, tmp_path):
    result = search(pipe, objective=Colorfulness(), holdout=["a green car"], folder=tmp_path,
                    strength=0.5, compare_layers=True, min_gain=None)  # fmt: skip
    assert result.best.heads
    with dittfast.guide(pipe, result.guidance):
        expected = tiny.run(pipe)
    with dittfast.guide(pipe, heads=tmp_path / "heads.json"):
        assert torch.equal(tiny.run(pipe), expected)
    with dittfast.guide(pipe, heads=str(tmp_path / "heads.json"), guidance_scale=0.0):
        assert not torch.equal(tiny.run(pipe), expected)
    data = json.loads((tmp_path / "heads.json").read_text())
    assert data["heads"] == [list(h) for h in result.best.heads] and data["strength"] == 0.5
    report = data["search"]["holdout"]
    apart = paired(result.best, result.best_layer)
    key = f"best_minus_{result.best_layer.name.replace(' ', '_')}"
    assert report[key] == apart and set(report) == {key, "best_minus_unguided"}
    assert apart["mean"] == pytest.approx(
        result.best.holdout[0] - result.best_layer.holdout[0]
    )  # fmt: skip
    assert apart["pictures"] == 1 and apart["standard_error"] is None
    assert Image.open(tmp_path / "curve.png").width > 600


def test_no_heads_that_help(pipe, tmp_path):
    first = []

    def nearness_to_the_unguided_pictures(images):
        first.append(images)
        return -(images - first[0]).abs().mean((1, 2, 3))

    result = search(pipe, objective=nearness_to_the_unguided_pictures, folder=tmp_path)
    assert len(result.rounds) == 1
    assert result.best is result.unguided and not result.best.heads
    with pytest.raises(ValueError, match="no heads were found"):
        _ = result.guidance
    with pytest.raises(ValueError, match="heads is empty"):
        dittfast.guide(pipe, heads=tmp_path / "heads.json")


def test_a_video_is_scored_by_its_frames():
    pipe = tiny.wan_pipeline()
    seen = []

    def objective(images, prompts):
        seen.append((list(images.shape), prompts))
        return images.mean((1, 2, 3))

    call = dict(height=48, width=80, num_frames=5, num_inference_steps=1, max_sequence_length=12,
                guidance_scale=3.0, negative_prompt="a dog")  # fmt: skip
    result = hunt(pipe, objective, PROMPTS, call=call, rounds=1, heads=[(0, 0)], progress=False,
                  min_gain=None)  # fmt: skip
    assert seen[0] == ([10, 3, 48, 80], [PROMPTS[0]] * 5 + [PROMPTS[1]] * 5)
    assert len(result.unguided.search) == 2


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(prompts=[]), "no prompts"),
        (dict(prompts=["a cat", " "]), "empty prompt"),
        (dict(prompts="a cat"), "list of prompts"),
        (dict(prompts=["a cat", "a cat"]), "twice"),
        (dict(seeds=()), "no seeds"),
        (dict(holdout=[PROMPTS[1]]), "held-out.*a blue dog"),
        (dict(layers=[2]), r"layer 2 does not exist.*0\.\.1"),
        (dict(heads=[(1, 2)]), r"head 1\.2 does not exist"),
        (dict(heads=[(0, 1), (0, 1)]), "twice"),
        (dict(heads=[]), "no heads to search"),
        (dict(heads=[(0, 1)], layers=[0]), "not both"),
        (dict(strength=1.5), r"0\.\.1.*1\.5"),
        (dict(strength=(0.5,) * 4), "one number"),
        (dict(guidance_scale=math.inf), "inf"),
        (dict(rows="rows"), "image"),
        (dict(start_step=3, stop_step=1), "stop_step"),
        (dict(batch_size=0), "batch_size"),
        (dict(call=dict(hight=64)), "hight"),
        (dict(call=dict(height=50)), "multiple of"),
        (dict(objective=lambda images: images.mean((2, 3))), r"shape \[2, 3\] for 2 pictures"),
        (dict(objective=lambda images: images.mean()), r"shape \[\]"),
    ],
)
def test_bad_input(pipe, options, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        search(pipe, **options, folder=tmp_path / "new")
    with pytest.raises(ValueError, match="not enabled"):
        dittfast.disable(pipe)


def test_nan_names_the_heads_the_prompt_and_the_value(pipe, tmp_path):
    calls = []

    def objective(images):
        calls.append(1)
        scores = Contrast()(images)
        return scores / torch.tensor([1.0, 0.0]) if len(calls) == 3 else scores

    message = r"returned inf for heads 0\.1, prompt 'a blue dog', seed 0"
    with pytest.raises(ValueError, match=message):
        search(pipe, objective=objective, folder=tmp_path)
    book = json.loads((tmp_path / "state.json").read_text())["scores"]["search"]
    assert list(book) == ["unguided", "0.0"]
    with pytest.raises(ValueError, match="not enabled"):
        dittfast.disable(pipe)


def test_a_guided_pipeline_is_refused(pipe):
    with (
        dittfast.guide(pipe, heads=[(0, 0)]),
        pytest.raises(ValueError, match="guided already"),
    ):
        search(pipe)


@pytest.mark.parametrize(
    "text, message",
    [
        ("[", "not valid JSON"),
        ("[1]", "it must be a mapping, got a list"),
        ('{"heads": []}', "heads is empty"),
        ('{"heads": [1]}', "pairs"),
        ('{"heads": [[0, 1]], "scale": 2}', "'scale'"),
        ('{"heads": [[0, 1]], "strength": 2}', "0..1"),
    ],
)
def test_bad_files_of_heads(tmp_path, text, message):
    path = tmp_path / "heads.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        dittfast.HeadGuidance.load(path)
    with pytest.raises(FileNotFoundError):
        dittfast.HeadGuidance.load(tmp_path / "none.json")


SMALL = [
    *("--height", "48", "--width", "64", "--steps", "1"),
    *("--max-sequence-length", "12", "--device", "cpu"),
]


@pytest.fixture(scope="module")
def model(tmp_path_factory, pipe):
    path = tmp_path_factory.mktemp("models") / "tiny-flux"
    pipe.save_pretrained(path)
    return str(path)


def test_the_command_line(model, tmp_path, capsys):
    (tmp_path / "prompts.txt").write_text("a red cat\n\na blue dog\n")
    (tmp_path / "holdout.txt").write_text("a green car\n")
    folder = tmp_path / "hunt"
    arguments = [
        "hunt", "--model", model, "--objective", "colorfulness", "-o", str(folder), *SMALL,
        "--prompts", str(tmp_path / "prompts.txt"), "--holdout", str(tmp_path / "holdout.txt"),
        "--rounds", "1", "--all-rounds", "--guide-scale", "4", "--compare-layers",
    ]  # fmt: skip
    assert main(arguments) == 0
    shown = capsys.readouterr().out
    data = json.loads((folder / "heads.json").read_text())
    assert len(data["search"]["settings"]["samples"]) == 2 and data["guidance_scale"] == 4
    assert data["search"]["settings"]["holdout"] == [["a green car", 0]]
    for row in data["search"]["layers"]:
        assert f"{row['mean']['holdout']:.6g}" in shown
    if not data["heads"]:
        return
    picture = tmp_path / "a.png"
    draw = ["generate", "a red cat", "--model", model, "-o", str(picture), *SMALL]
    assert main([*draw, "--guide", str(folder / "heads.json")]) == 0
    record = json.loads((tmp_path / "a.json").read_text())
    assert record["guidance"]["heads"] == data["heads"]
    by_file = np.asarray(Image.open(picture))
    names = ",".join(f"{layer}.{head}" for layer, head in data["heads"])
    assert main([*draw, "--guide-heads", names, "--guide-scale", "4"]) == 0
    assert np.array_equal(np.asarray(Image.open(picture)), by_file)
    assert main(draw) == 0
    assert not np.array_equal(np.asarray(Image.open(picture)), by_file)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["hunt"], "-o FOLDER"),
        (["hunt", "-o", "new"], "--objective"),
        (["hunt", "-o", "new", "--objective", "colorfulnes"], "'colorfulness'"),
        (["hunt", "-o", "new", "--objective", "contrast", "--objective-set", "a=1"], "'a'"),
        (["hunt", "-o", "new", "--objective", "contrast", "--prompts", "none.txt"], "none.txt"),
        (["hunt", "-o", "new", "--objective", "contrast", "--seeds", "x"], "'x'"),
        (["hunt", "-o", "new", "--objective", "contrast", "--heads", "31"], "LAYER.HEAD"),
        (["hunt", "-o", "new", "--objective", "nothing_here:f"], "nothing_here"),
        (["generate", "a cat", "-o", "a.png", "--guide-scale", "2"], "no heads"),
        (["generate", "a cat", "-o", "a.png", "--guide-heads", "1"], "LAYER.HEAD"),
        (["generate", "a cat", "-o", "a.png", "--guide", "none.json"], "none.json"),
        (["generate", "a cat", "-o", "a.png", "--guide-heads", "1.0", "--guide-steps", "4"], "A:B"),
        (["generate", "a cat", "-o", "a.png", "--guide-heads", "1.0", "--guide-strength", "2"],
         "at most 1"),
    ],
)  # fmt: skip
def test_bad_command_lines_are_one_line_and_write_nothing(
    tmp_path, monkeypatch, capsys, arguments, message
):
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    shown = capsys.readouterr().err
    assert message in shown and shown.count("\n") == 1
    assert not list(tmp_path.iterdir())
