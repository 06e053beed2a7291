"""Context parallelism: processes that share a sequence get what one process gets."""

import os
import re
import socket
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from interpreter import PYTHON
from patterns import Band

from dittfast import Layout, methods
from dittfast.layout import Context, Grid
from dittfast.methods.head_groups import by_head
from dittfast.pipelines.exchange import Ranks, share_lengths, split_heads, token_shares
from dittfast.pipelines.layer import PlannedLayout
from dittfast.pipelines.parallel import Place, _check
from dittfast.pipelines.ring import ring_steps

TESTS = Path(__file__).resolve().parent


def test_shares_of_tokens():
    """FLUX and Qwen arrive as [text, image] of each rank; a video without text is in order."""
    shares = token_shares(Layout.image(2, 3, text=4), 2)
    assert [x.tolist() for x in shares] == [[0, 1, 4, 5, 6], [2, 3, 7, 8, 9]]
    shares = token_shares(Layout.video(2, 2, 3), 2)
    assert [x.tolist() for x in shares] == [[*range(6)], [*range(6, 12)]]
    references = Layout((Context(2), Grid(1, 2, 2), Grid(1, 1, 2)))
    shares = token_shares(references, 2)
    assert [x.tolist() for x in shares] == [[0, 2, 3, 4], [1, 5, 6, 7]]
    uneven = Layout.image(2, 4, text=4)  # as tensor_split: the first ranks hold more
    assert [x.tolist() for x in token_shares(uneven, 3)] == [
        [0, 1, 4, 5, 6], [2, 7, 8, 9], [3, 10, 11],
    ]  # fmt: skip
    assert share_lengths(uneven, 3) == [5, 4, 3]


def place(ring: int, ulysses: int) -> Place:
    return Place(*(Ranks(0, n, None) for n in (ring, ulysses, ring * ulysses)))


def check(method, layout, ring, ulysses, **config):
    planned = PlannedLayout(method, layout, method.keep(layout, torch.device("cpu")))
    _check(method, planned, place(ring, ulysses), SimpleNamespace(**config))


IMAGE, ODD = Layout.image(4, 6, text=4), Layout.image(2, 3, text=5)
LOCAL, POOLED = methods.Local(window=2), methods.Local(window=2, downsample=2)
REFUSALS = [
    (methods.TopK(), IMAGE, 2, 1, "topk chooses key blocks from all of q and k, and in ring "
     "attention (ring_degree=2) no rank has them; use ContextParallelConfig(ulysses_degree=...) "
     "alone"),
    (POOLED, IMAGE, 4, 1, "local appends summaries of all keys"),
    (methods.Linear(), IMAGE, 2, 1, "linear computes for all heads and keys"),
    (methods.SLA(), IMAGE, 1, 2, "sla computes for all heads and keys of a layer at once, and "
     "under context parallelism ranks share them; keep the layers dense with dense_layers"),
    (by_head(methods.Local(window=(2, 3)), 2), IMAGE, 1, 2, "computes for all heads and keys"),
    (LOCAL, ODD, 1, 2, "5 and 6 tokens do not divide between 2 ranks; use "
     "ContextParallelConfig(ulysses_anything=True), or another size"),
    (LOCAL, ODD, 3, 1, "ContextParallelConfig(ring_anything=True)"),
    (LOCAL, ODD, 2, 2, "take ring_degree or ulysses_degree alone, with ring_anything or "
     "ulysses_anything"),
    (LOCAL, Layout.image(2, 4, text=3), 4, 1, "3 tokens cannot be shared by 4 ranks"),
]  # fmt: skip


@pytest.mark.parametrize("method, layout, ring, ulysses, message", REFUSALS)
def test_what_ranks_cannot_share_is_refused_by_name(method, layout, ring, ulysses, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        check(method, layout, ring, ulysses)


def test_what_ranks_can_share_is_not_refused():
    check(methods.TopK(), IMAGE, 1, 2)
    check(POOLED, IMAGE, 1, 2)
    check(LOCAL, IMAGE, 2, 2)
    check(LOCAL, ODD, 3, 1, ring_anything=True)
    check(LOCAL, ODD, 1, 3, ulysses_anything=True)
    with pytest.raises(ValueError, match="3 heads cannot be shared by 4 ranks"):
        split_heads(3, 4)


@pytest.mark.parametrize("text", [0, 6])
@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_a_ring_computes_the_pairs_of_the_plan_and_sends_no_more_keys_than_they_need(ranks, text):
    """A local window over rows: a rank gets the rows beside its own. Text sees everything."""
    layout = Layout.image(16, 5, text=text)
    plan = methods.Local(window=2, tile=(1, 1, 5)).plan(layout)
    shares = token_shares(layout, ranks)
    steps = [ring_steps(plan, shares, rank) for rank in range(ranks)]
    mask, kept = plan.to_dense_mask()[0, 0], 0
    for rank, own in enumerate(steps):
        assert [step.offset for step in own] == [step.offset for step in steps[0]]
        got = torch.cat([step.takes for step in own])
        needed = mask[shares[rank]].any(0)
        assert not needed[[t for t in range(layout.num_tokens) if t not in got]].any()
        assert len(got) == layout.num_tokens if text else len(got) < layout.num_tokens
        for step in own:
            giver = steps[(rank - step.offset) % ranks][own.index(step)]
            assert torch.equal(shares[(rank - step.offset) % ranks][giver.gives], step.takes)
            if step.plan is not None:
                kept += step.plan.density * len(shares[rank]) * len(step.takes)
    assert kept == pytest.approx(plan.density * layout.num_tokens**2)


def test_ranks_that_need_nothing_of_each_other_take_no_step():
    layout = Layout.video(4, 4, 4)  # four blocks of 16 tokens
    steps = ring_steps(Band(width=0).plan(layout), token_shares(layout, 2), 1)
    assert [(step.offset, step.plan.density) for step in steps] == [(0, 0.5)]


def run_ranks(script: str, ranks: int, *arguments: object) -> list[str]:
    """What each of some processes prints that run ``script RANK PORT *arguments``."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    paths = [str(TESTS.parent), str(TESTS)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    started = [
        subprocess.Popen(
            [*PYTHON, str(TESTS / script), str(rank), str(port), *map(str, arguments)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(ranks)
    ]
    shown = [process.communicate(timeout=900)[0] for process in started]
    for process, text in zip(started, shown):
        assert process.returncode == 0, text[-3000:]
    return shown


def assert_ranks_agree(ring: int, ulysses: int, *cases: str) -> None:
    for shown in run_ranks("ring_worker.py", ring * ulysses, ring, ulysses, *cases):
        found = re.findall(r"^RESULT (\S+) (.+)$", shown, re.MULTILINE)
        assert [name for name, _ in found] == list(cases)
        for _, errors in found:
            assert all(float(error) < 8 for error in errors.split())


@pytest.mark.slow
def test_a_ring_of_two_equals_one_process():
    """Uneven shares, padded text, a token rule; output and gradients; diffusers is not loaded."""
    assert_ranks_agree(2, 1, "local")


@pytest.mark.slow
@pytest.mark.parametrize("ring, ulysses", [(2, 1), (1, 2), (2, 2), (4, 1)])
def test_ring_and_ulysses_equal_one_process(ring, ulysses):
    """Three heads between two ranks, lengths that do not divide, masks, plans of single heads."""
    assert_ranks_agree(ring, ulysses, "local", "mask", "radial", "heads", "apart")


MODELS = ("wan", "flux", "qwen-image")


@pytest.mark.slow
@pytest.mark.parametrize(
    "ring, ulysses, anything", [(1, 2, 0), (1, 2, 1), (2, 1, 0), (2, 1, 1), (2, 2, 0)]
)
def test_models_of_diffusers_equal_one_process(ring, ulysses, anything):
    """Another pattern in each head, on Wan, FLUX and Qwen-Image: output, gradients, compiled."""
    arguments = ring, ulysses, anything, *MODELS
    shown = run_ranks("parallel_worker.py", ring * ulysses, *arguments)[0]
    found = re.findall(r"^RESULT (\S+) (\S+) (\S+)$", shown, re.MULTILINE)
    assert tuple(name for name, _, _ in found) == MODELS
    for _, out, grad in found:
        assert float(out) < 1e-5 and float(grad) < 1e-4
    found = re.findall(r"^COMPILED (\S+) (\S+)$", shown, re.MULTILINE)
    assert tuple(name for name, _ in found) == MODELS
    assert all(float(out) < 1e-5 for _, out in found)
