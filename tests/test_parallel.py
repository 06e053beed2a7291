"""Context parallelism: two processes share a sequence and get what one process gets."""

import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dittfast import Layout
from dittfast.layout import Context, Grid
from dittfast.pipelines.parallel import rank_order

TESTS = Path(__file__).resolve().parent


def test_order_of_tokens_after_the_all_to_all():
    """FLUX and Qwen arrive as [text, image] of each rank; a video without text is in order."""
    layout = Layout.image(2, 3, text=4)
    arrived = [0, 1, 4, 5, 6, 2, 3, 7, 8, 9]  # tokens in the order of the ranks
    order = rank_order(layout, 2)
    assert torch.tensor(arrived)[order].tolist() == list(range(10))
    assert rank_order(Layout.video(2, 2, 3), 2).tolist() == list(range(12))
    references = Layout((Context(2), Grid(1, 2, 2), Grid(1, 1, 2)))
    assert torch.tensor([0, 2, 3, 4, 1, 5, 6, 7])[rank_order(references, 2)].tolist() == [*range(8)]
    with pytest.raises(ValueError, match="5 and 6 tokens do not divide between 2"):
        rank_order(Layout.image(2, 3, text=5), 2)


@pytest.mark.slow
def test_two_processes_equal_one():
    """Another pattern in each head, on Wan, FLUX and Qwen-Image: output, gradients, compiled."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    paths = [str(TESTS.parent), str(TESTS)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-P", str(TESTS / "parallel_worker.py"), str(rank), str(port)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    shown = [process.communicate(timeout=900)[0] for process in ranks]
    assert [process.returncode for process in ranks] == [0, 0], shown[0][-3000:]
    found = re.findall(r"^RESULT (\S+) (\S+) (\S+)$", shown[0], re.MULTILINE)
    assert [name for name, _, _ in found] == ["wan", "flux", "qwen-image"]
    for _, out, grad in found:
        assert float(out) < 1e-5 and float(grad) < 1e-4
    found = re.findall(r"^COMPILED (\S+) (\S+)$", shown[0], re.MULTILINE)
    assert [name for name, _ in found] == ["wan", "flux", "qwen-image"]
    assert all(float(out) < 1e-5 for _, out in found)
