"""HeadHunter (Ahn et al. 2025, arXiv:2506.10978): which heads to weaken, found by drawing."""

from __future__ import annotations

import contextlib
import math
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import torch

from dittfast.disk.locks import locked
from dittfast.environment import describe_device
from dittfast.files import write_image
from dittfast.methods.checks import check_integer
from dittfast.methods.head_guidance import HeadGuidance

from ..fingerprint import weights_digest
from ..guidance.plain import guide, head_counts
from ..models import Pipeline, is_swapped, transformers_of
from ..runs.call import PicturePerPrompt, call_arguments
from ..runs.first_frame import with_first_frame
from .objectives import Objective, describe_objective, evaluate
from .report import SHEET_COLUMNS, Contender, HuntResult, curve, holdout_sheet, round_sheet
from .search import Head, Heads, Policy, Round, ScoreBook, calls, greedy, name_of


class _Studio:
    """Draws samples under a set of heads, and judges them."""

    def __init__(self, pipe, objective: Objective, call: dict, guidance: dict, batch_size: int):
        self.pipe, self.objective, self.call = pipe, objective, call
        self.guidance, self.batch_size = guidance, batch_size
        # The last sets' first pictures, for contact sheets.
        self._shown: OrderedDict[str, dict[tuple, np.ndarray]] = OrderedDict()

    def draw(self, heads: Heads, samples: Sequence[tuple[str, int]]) -> torch.Tensor:
        """``[n, F, 3, H, W]`` in 0..1; F is 1 for images.

        Raises:
            ValueError: values that are not finite.
        """
        call = dict(self.call, prompt=[prompt for prompt, _ in samples], output_type="pt")
        if isinstance(call.get("negative_prompt"), str):
            call["negative_prompt"] = [call["negative_prompt"]] * len(samples)
        call["generator"] = [torch.Generator("cpu").manual_seed(seed) for _, seed in samples]
        guided = contextlib.nullcontext()
        if heads:
            guided = guide(self.pipe, HeadGuidance(heads, **self.guidance))
        with guided, torch.no_grad():
            out = self.pipe(**call)
        images = out.frames if hasattr(out, "frames") else out.images[:, None]
        images = torch.as_tensor(images).float()
        if not torch.isfinite(images).all():
            raise ValueError(
                f"the picture drawn with heads {name_of(heads)} has values that are not finite; "
                "use a lower guidance_scale, or bfloat16 or float32"
            )
        return images

    def score(self, heads: Heads, samples: Sequence[tuple[str, int]], show: Iterable) -> np.ndarray:
        """One score a sample; the pictures of samples in ``show`` are kept for sheets.

        Raises:
            ValueError: as :meth:`draw`, a wrong number of scores, or one that is not finite.
        """
        images = self.draw(heads, samples)
        frames = images.shape[1]
        prompts = [prompt for prompt, _ in samples for _ in range(frames)]
        with torch.no_grad():
            scores = evaluate(self.objective, images.flatten(0, 1), prompts)
        scores = scores.reshape(len(samples), frames).mean(1)
        for (prompt, seed), value in zip(samples, scores):
            if not math.isfinite(value):
                raise ValueError(
                    f"the objective {describe_objective(self.objective)} returned {value} for "
                    f"heads {name_of(heads)}, prompt {prompt!r}, seed {seed}; it must return "
                    "finite numbers"
                )
        self._keep(heads, images, samples, show)
        return scores

    def _keep(self, heads, images, samples, show) -> None:
        kept = self._shown.setdefault(name_of(heads), {})
        self._shown.move_to_end(name_of(heads))
        for image, sample in zip(images, samples):
            if sample in show:
                middle = image[len(image) // 2].permute(1, 2, 0).clamp(0, 1)
                kept[sample] = (middle * 255).round().byte().cpu().numpy()
        while len(self._shown) > 64:
            self._shown.popitem(last=False)

    def pictures(self, heads: Heads, samples: Sequence[tuple[str, int]]) -> list[np.ndarray]:
        """Pictures ``[H, W, 3]`` uint8; drawn again where they are not kept any more."""
        kept = self._shown.get(name_of(heads), {})
        missing = [s for s in samples if s not in kept]
        for first in range(0, len(missing), self.batch_size):
            batch = missing[first : first + self.batch_size]
            self._keep(heads, self.draw(heads, batch), batch, batch)
        return [self._shown[name_of(heads)][s] for s in samples]


class _Judge:
    """Scores by set of heads: what the book knows, and what has to be drawn."""

    def __init__(self, studio: _Studio, book: ScoreBook, splits: dict[str, list], bar):
        self.studio, self.book, self.splits, self.bar = studio, book, splits, bar
        self._counted: dict[tuple[str, str], int] = {}

    def __call__(self, heads: Heads, count: int | None = None, split: str = "search") -> list:
        samples = self.splits[split]
        count = len(samples) if count is None else min(count, len(samples))
        show = samples[:SHEET_COLUMNS]
        known = self.book.get(split, heads)
        self._advance(heads, split, min(len(known), count))
        while len(known) < count:
            batch = samples[len(known) : min(count, len(known) + self.studio.batch_size)]
            self.book.extend(split, heads, self.studio.score(heads, batch, show).tolist())
            known = self.book.get(split, heads)
            self._advance(heads, split, len(known))
        return known[:count]

    def _advance(self, heads: Heads, split: str, done: int) -> None:
        key = split, name_of(heads)
        self.bar.set_postfix_str(key[1], refresh=False)
        self.bar.update(max(0, done - self._counted.get(key, 0)))
        self._counted[key] = max(done, self._counted.get(key, 0))


@contextlib.contextmanager
def _no_bars(pipe):
    """The pipeline shows no progress bars of its own inside."""
    before = dict(getattr(pipe, "_progress_bar_config", {}))
    pipe.set_progress_bar_config(**before | {"disable": True})
    try:
        yield
    finally:
        pipe._progress_bar_config = before


def check_pool(
    pipe, policy: Policy, layers: Sequence[int] | None, heads: Heads | None
) -> list[Head]:
    """The candidates: ``heads``, or all heads of ``layers``, or all heads.

    Raises:
        ValueError: a layer or head that the model does not have, one named twice, none at all, or
            fewer than a round adds.
    """
    counts = head_counts(pipe)
    if layers is not None and heads is not None:
        raise ValueError("give layers or heads to search, not both")
    for layer in layers or ():
        if not 0 <= layer < len(counts):
            raise ValueError(
                f"layer {layer} does not exist; this model's layers are 0..{len(counts) - 1}"
            )
    for layer, head in heads or ():
        if not 0 <= layer < len(counts) or not 0 <= head < counts[layer]:
            raise ValueError(
                f"head {layer}.{head} does not exist; this model has layers "
                f"0..{len(counts) - 1} with heads 0..{max(counts) - 1}"
            )
    if heads is not None:
        pool = [(int(layer), int(head)) for layer, head in heads]
    else:
        chosen = range(len(counts)) if layers is None else layers
        pool = [(layer, head) for layer in chosen for head in range(counts[layer])]
    if len(set(pool)) != len(pool):
        raise ValueError("a layer or head to search is named twice")
    if not pool:
        raise ValueError("there are no heads to search; name at least one layer or head")
    if policy.topk > len(pool):
        raise ValueError(
            f"topk {policy.topk} is more than the {len(pool)} heads that are searched; lower it"
        )
    return pool


def _samples(prompts: Sequence[str], seeds: Sequence[int], name: str) -> list[tuple[str, int]]:
    """Every prompt with the first seed, then with the second ..., so that few cover all prompts."""
    if isinstance(prompts, str) or not all(isinstance(p, str) for p in prompts):
        raise ValueError(f"{name} must be a list of prompts, got {prompts!r}")
    if any(not p.strip() for p in prompts):
        raise ValueError(f"{name} holds an empty prompt; describe a picture in each")
    if not seeds:
        raise ValueError(f"there are no seeds for {name}; name at least one")
    samples = [(prompt, int(seed)) for seed in seeds for prompt in prompts]
    if len(set(samples)) != len(samples):
        raise ValueError(f"{name} or the seeds hold one twice, which would count it double")
    return samples


def check_samples(
    prompts: Sequence[str],
    seeds: Sequence[int],
    holdout: Sequence[str] = (),
    holdout_seeds: Sequence[int] | None = None,
) -> dict[str, list[tuple[str, int]]]:
    """The samples to search with and, where there are any, those held out.

    Raises:
        ValueError: none, one of them twice, or one that is searched with and held out.
    """
    if not prompts:
        raise ValueError("there are no prompts to search with; give at least one")
    splits = {"search": _samples(prompts, seeds, "prompts")}
    if holdout:
        again = seeds if holdout_seeds is None else holdout_seeds
        splits["holdout"] = _samples(holdout, again, "holdout")
        both = set(splits["search"]) & set(splits["holdout"])
        if both:
            raise ValueError(f"held-out pictures must be new; {sorted(both)[0]!r} is searched with")
    return splits


def _guidance(pool, guidance_scale, strength, rows, start_step, stop_step) -> dict:
    """The options of the guidance but its heads, checked."""
    options = HeadGuidance(tuple(pool), guidance_scale, strength, rows, start_step, stop_step)
    if not isinstance(strength, (int, float)):
        raise ValueError(f"strength must be one number for a search, got {strength!r}")
    return {name: value for name, value in asdict(options).items() if name != "heads"}


def _arguments(pipe, prompt: str, call: dict) -> dict:
    """The pipeline's arguments but the prompt."""
    if any(is_swapped(m) and m._dittfast.guidance for m in transformers_of(pipe).values()):
        raise ValueError("this pipeline is guided already; call dittfast.unguide(pipe) first")
    arguments = with_first_frame(pipe, call_arguments(pipe, prompt, **call))
    if isinstance(arguments.get("image"), PicturePerPrompt):
        raise ValueError(
            "a head search draws several prompts at once and cannot make each its own first "
            "frame; pass one picture as the call's image"
        )
    return {name: value for name, value in arguments.items() if name != "prompt"}


def _searched(
    judge: _Judge,
    settings: dict,
    policy: Policy,
    pool: list[Head],
    whole_layers: list[Heads],
    on_round: Callable[[Round], None],
) -> HuntResult:
    """All contenders, judged on the samples searched with and on those held out."""
    rounds = greedy(judge, pool, policy, on_round)
    result = HuntResult(
        settings["objective"],
        settings,
        tuple(rounds),
        Contender("unguided", (), tuple(judge(()))),
        tuple(
            Contender(f"layer {number}", layer, tuple(judge(layer)))
            for number, layer in enumerate(whole_layers)
        ),
        tuple(Contender(f"round {r.number}", r.heads, r.scores) for r in rounds),
    )
    return _on_holdout(result, judge) if "holdout" in judge.splits else result


def _on_holdout(result: HuntResult, judge: _Judge) -> HuntResult:
    """The result with every contender judged on the held-out samples, too."""

    def held(contender: Contender) -> Contender:
        return replace(contender, holdout=tuple(judge(contender.heads, split="holdout")))

    return replace(
        result,
        unguided=held(result.unguided),
        layers=tuple(map(held, result.layers)),
        found=tuple(map(held, result.found)),
    )


def _most_pictures(policy: Policy, pool: list[Head], whole_layers: list, splits: dict) -> int:
    """How many pictures a search draws at most."""
    searched, held_out = len(splits["search"]), len(splits.get("holdout", ()))
    contenders = 1 + len(whole_layers) + policy.rounds
    rounds = calls(policy, len(pool), searched)
    return rounds + len(whole_layers) * searched + contenders * held_out


def _write(folder: Path, result: HuntResult, studio: _Studio, splits: dict) -> None:
    if "holdout" in splits:
        sheet = holdout_sheet(studio.pictures, splits["holdout"], result)
        write_image(folder / "holdout.png", sheet)
    write_image(folder / "curve.png", curve(result))
    result.save(folder / "heads.json")


def _model_facts(pipe) -> dict:
    models = transformers_of(pipe)
    first = next(iter(models.values()))
    session = first._dittfast.session if is_swapped(first) else None
    return {
        "pipeline": type(pipe).__name__,
        "weights": {name: weights_digest({name: model}) for name, model in models.items()},
        "method": None if session is None else f"{session.method} {session.schedule}",
        "device": describe_device(first.device)["name"],
        "dtype": str(first.dtype).removeprefix("torch."),
    }


def hunt(
    pipe: Pipeline,
    objective: Objective,
    prompts: Sequence[str],
    *,
    seeds: Sequence[int] = (0,),
    call: dict | None = None,
    rounds: int = 3,
    topk: int = 1,
    layers: Sequence[int] | None = None,
    heads: Heads | None = None,
    guidance_scale: float = 3.0,
    strength: float = 1.0,
    rows: str = "image",
    start_step: int = 0,
    stop_step: int | None = None,
    screen: int | None = None,
    keep: int | None = None,
    min_gain: float | None = 0.0,
    batch_size: int = 4,
    holdout: Sequence[str] = (),
    holdout_seeds: Sequence[int] | None = None,
    compare_layers: bool = False,
    folder: str | Path | None = None,
    verify: bool = True,
    progress: bool = True,
    on_round: Callable[[Round], None] = lambda round_: None,
) -> HuntResult:
    """Search the heads whose weakening guides a pipeline best (HeadHunter, arXiv:2506.10978).

    A set of heads is scored by the mean objective over prompts x seeds, drawn with
    :func:`dittfast.guide`. Each round tries every remaining head beside those already chosen and
    adds the best ``topk``. That draws about prompts x seeds x heads pictures a round.

    Args:
        pipe: a diffusers pipeline, with a sparse method enabled or not.
        objective: ``(images [B, 3, H, W] in 0..1, prompts) -> B scores`` or ``(images) -> B
            scores``, higher is better; :mod:`dittfast.pipelines.headhunter.objectives` holds those
            built in. A video is scored by the mean over its frames.
        prompts: to search with.
        seeds: each prompt is drawn with each.
        call: the other arguments of the pipeline's call, such as height or num_inference_steps.
        rounds, topk, screen, keep, min_gain: see
            :class:`~dittfast.pipelines.headhunter.search.Policy`.
        layers, heads: search these layers, or these ``(layer, head)`` pairs, only.
        guidance_scale, strength, rows, start_step, stop_step: see :class:`dittfast.HeadGuidance`.
        batch_size: pictures drawn at once.
        holdout: prompts that the search does not see; the sets found are judged by them after it.
        holdout_seeds: default ``seeds``.
        compare_layers: judge every whole layer, too.
        folder: made if it is missing. The search keeps its scores there in state.json and goes on
            from them when it is called again; heads.json, the curve, and contact sheets of each
            round and of held-out pictures go there, too. None writes nothing.
        verify: compare the scores in ``folder`` with the SHA-256 that was written with them.
        progress: show a bar, in pictures.
        on_round: called with each :class:`~dittfast.pipelines.headhunter.search.Round`.

    Returns:
        The result; ``dittfast.guide(pipe, result.guidance)`` or ``heads="FOLDER/heads.json"``.

    Raises:
        ValueError: bad options, heads or layers that do not exist, no prompts, a pipeline that is
            guided already, a folder of a search with other settings, an objective that returns
            the wrong number of scores or NaN.
    """
    policy = Policy(rounds, topk, screen, keep, min_gain)
    check_integer("batch_size", batch_size, 1)
    splits = check_samples(prompts, seeds, holdout, holdout_seeds)
    counts = head_counts(pipe)
    pool = check_pool(pipe, policy, layers, heads)
    guidance = _guidance(pool, guidance_scale, strength, rows, start_step, stop_step)
    arguments = _arguments(pipe, prompts[0], call or {})
    settings = {
        "objective": describe_objective(objective),
        "model": _model_facts(pipe),
        "guidance": guidance,
        "call": arguments,
        "samples": splits["search"],
        "holdout": splits.get("holdout", []),
        "batch_size": batch_size,
    }
    folder = None if folder is None else Path(folder)
    whole_layers = [
        tuple((layer, head) for head in range(n)) for layer, n in enumerate(counts)
    ] if compare_layers else []  # fmt: skip

    from tqdm.auto import tqdm

    with contextlib.nullcontext() if folder is None else locked(folder):
        book = ScoreBook(settings, None if folder is None else folder / "state.json", verify)
        studio = _Studio(pipe, objective, arguments, guidance, batch_size)

        def finish(round_: Round) -> None:
            if folder is not None:
                sheet = round_sheet(studio.pictures, splits["search"], round_, judge(()), settings)
                write_image(folder / f"round-{round_.number}.png", sheet)
            on_round(round_)

        total = _most_pictures(policy, pool, whole_layers, splits)
        with _no_bars(pipe), tqdm(total=total, unit="picture", disable=not progress) as bar:
            judge = _Judge(studio, book, splits, bar)
            result = _searched(judge, book.settings, policy, pool, whole_layers, finish)
            bar.total = bar.n
            bar.refresh()
            if folder is not None:
                _write(folder, result, studio, splits)
        return result
