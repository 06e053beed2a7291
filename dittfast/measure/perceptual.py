"""LPIPS (Zhang et al. 2018, arXiv:1801.03924), where its package and weights are installed."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path

import torch

BACKBONE = "alexnet-owt-7be5be79.pth"

Distance = Callable[[torch.Tensor, torch.Tensor], float]


def missing_for_lpips() -> str | None:
    """Why LPIPS cannot be computed here, with the remedy; None where it can. Looks, never loads."""
    if importlib.util.find_spec("lpips") is None:
        return "the lpips package is not installed; pip install lpips"
    path = Path(torch.hub.get_dir()) / "checkpoints" / BACKBONE
    if not path.is_file():
        return (
            f"AlexNet's weights are not at {path}; fetch "
            f"https://download.pytorch.org/models/{BACKBONE} there"
        )
    return None


def load_lpips(device="cpu") -> Distance:
    """LPIPS with AlexNet, as ``distance(a, b)`` of ``[F, 3, H, W]`` in 0..1: the mean over F.

    Raises:
        ValueError: package or weights are not here; nothing is downloaded.
    """
    missing = missing_for_lpips()
    if missing:
        raise ValueError(f"LPIPS cannot be computed: {missing}")
    import lpips

    network = lpips.LPIPS(net="alex", verbose=False).to(device).eval()

    @torch.no_grad()
    def distance(a: torch.Tensor, b: torch.Tensor) -> float:
        both = [x.to(device, torch.float32) * 2 - 1 for x in (a, b)]
        return float(network(*both).double().mean())

    return distance
