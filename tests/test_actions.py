"""Random sequences of actions, with dittfast and without it; tests/action_fuzz.py says how."""

import action_fuzz
import pytest
import torch

import dittfast


@pytest.fixture(autouse=True)
def one_core():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_random_sequences():
    done = [action_fuzz.check(0, number, slow=False) for number in range(16)]
    assert sum(done) > 12  # what stock diffusers refuses itself says nothing


@pytest.mark.slow
def test_a_thousand_random_sequences():
    done = 0
    for number in range(1000):
        done += action_fuzz.check(1, number)
        torch._dynamo.reset()
    assert done > 900


def test_a_sequence_says_where_it_came_from():
    """The same seed and number give the same actions; another number gives others."""
    assert action_fuzz.sequence(3, 7) == action_fuzz.sequence(3, 7)
    assert action_fuzz.sequence(3, 7) != action_fuzz.sequence(3, 8)


def test_a_failure_is_found_and_made_short(monkeypatch):
    """An enable that forgets what it was asked for: two of nine actions show it."""
    real = dittfast.enable
    monkeypatch.setattr(
        dittfast, "enable", lambda pipe, method, **options: real(pipe, "dense", **options)
    )
    monkeypatch.setattr(action_fuzz.World, "description", _said_near)
    actions = [
        ("run_pass", dict(size=1)),
        ("checkpointing", dict(on=True)),
        ("enable", dict(method="near")),
        ("lora_load", dict(name="one")),
        ("deepcopy", {}),
        ("run_pass", dict(size=0)),
        ("disable", {}),
        ("fuse_qkv", {}),
    ]
    assert isinstance(action_fuzz.failure("flux", actions), action_fuzz.Wrong)
    shorter = action_fuzz.shrink("flux", actions)
    assert [name for name, _ in shorter] == ["enable", "run_pass"]
    source = action_fuzz.reproduction("flux", shorter)
    with pytest.raises(action_fuzz.Wrong, match="off by"):
        exec(source, {})


def _said_near(world):
    """A description that believes what was asked for."""
    import dataclasses

    try:
        said = dittfast.describe(world.pipe)
    except ValueError:
        return None
    return dataclasses.replace(said, method=action_fuzz.Near())
