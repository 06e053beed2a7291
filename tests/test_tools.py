"""The tools that kill runs and fuzz attention, briefly; by themselves they run for long."""

import os
import subprocess
import sys
from pathlib import Path

import attention_fuzz
import pytest

from dittfast.methods import METHODS
from dittfast.pipelines.measure import parity


def test_random_attention(tmp_path, capsys):
    """Twenty cases, in two goes: the second begins where the first stopped."""
    state = tmp_path / "state.json"
    assert attention_fuzz.main(["--count", "8", "--state", str(state)]) == 0
    assert attention_fuzz.main(["--count", "20", "--state", str(state)]) == 0
    assert "20 cases of seed 0: 0 wrong" in capsys.readouterr().out


def test_the_fuzz_notices_a_wrong_kernel(monkeypatch, capsys):
    """The oracle itself: attention that is wrong by a thousandth fails."""
    right = attention_fuzz.attend

    def wrong(*given, **options):
        out, lse = right(*given, **options)
        return out * 1.001, lse

    monkeypatch.setattr(attention_fuzz, "attend", wrong)
    monkeypatch.setattr(attention_fuzz, "KINDS", {"local": 1})
    monkeypatch.setattr(attention_fuzz, "DTYPES", {"float32": attention_fuzz.torch.float32})
    assert attention_fuzz.main(["--count", "3"]) == 1
    assert "0 wrong" not in capsys.readouterr().out


def test_every_method_is_drawn():
    assert attention_fuzz.KINDS.keys() == attention_fuzz.CASES.keys() == {"plan", *METHODS}
    assert {"full", *METHODS} - {"dense"} == parity.METHODS.keys()  # what servers and kills draw


@pytest.mark.slow
@pytest.mark.parametrize("command", ["generate", "prepare", "train", "hunt", "evaluate"])
def test_commands_killed_at_random_moments(command):
    """One signal of each kind."""
    tool = Path(__file__).with_name("kill_runs.py")
    done = subprocess.run(
        [sys.executable, tool, "--each", "1", "--command", command],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(tool.parent.parent), "OMP_NUM_THREADS": "1"},
        timeout=3600,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
