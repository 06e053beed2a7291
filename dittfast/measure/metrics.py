"""How far two pictures, clips or tensors are apart. Pure torch, computed in fp64."""

from __future__ import annotations

import math

import numpy as np
import torch
import torch.nn.functional as F

SSIM_WINDOW = 11


def image_tensor(image) -> torch.Tensor:
    """A ``PIL.Image`` or a uint8 array ``[..., H, W, C]`` as fp64 ``[..., C, H, W]`` in 0..1."""
    array = np.asarray(image)
    if array.dtype != np.uint8:
        raise ValueError(f"expected 8-bit pictures, got {array.dtype}")
    if array.ndim == 2:
        array = array[..., None]
    return torch.from_numpy(array.astype(np.float64) / 255).movedim(-1, -3)


def _pair(a: torch.Tensor, b: torch.Tensor, data_range: float):
    if a.shape != b.shape:
        raise ValueError(f"the pictures differ in shape: {list(a.shape)} and {list(b.shape)}")
    if a.numel() == 0:
        raise ValueError(f"the pictures are empty: {list(a.shape)}")
    if not data_range > 0:
        raise ValueError(f"data_range must be positive, got {data_range}")
    return a.double(), b.double()


def psnr(a: torch.Tensor, b: torch.Tensor, data_range: float = 1.0) -> float:
    """Peak signal-to-noise ratio in dB, over all values at once; ``inf`` for equal inputs.

    Args:
        a, b: tensors of one shape.
        data_range: the largest possible value minus the smallest.

    Raises:
        ValueError: shapes that differ, an empty input, a range that is not positive.
    """
    a, b = _pair(a, b, data_range)
    error = float((a - b).square().mean())
    return math.inf if error == 0 else 10 * math.log10(data_range**2 / error)


def ssim(a: torch.Tensor, b: torch.Tensor, data_range: float = 1.0) -> float:
    """Structural similarity (Wang et al., IEEE TIP 2004), 1 for equal inputs.

    An 11 x 11 Gaussian window with sigma 1.5, population statistics, K1 = 0.01, K2 = 0.03; the
    mean over channels and over all places where the window fits entirely.

    Args:
        a, b: ``[..., H, W]`` of one shape, such as ``[C, H, W]`` or ``[F, C, H, W]``.
        data_range: the largest possible value minus the smallest.

    Raises:
        ValueError: as :func:`psnr`, or a picture smaller than the window.
    """
    a, b = _pair(a, b, data_range)
    if a.ndim < 2 or min(a.shape[-2:]) < SSIM_WINDOW:
        raise ValueError(
            f"SSIM needs pictures of at least {SSIM_WINDOW} x {SSIM_WINDOW}, got {list(a.shape)}"
        )
    height, width = a.shape[-2:]
    offset = torch.arange(SSIM_WINDOW, dtype=torch.float64, device=a.device) - SSIM_WINDOW // 2
    kernel = torch.exp(-offset.square() / (2 * 1.5**2))
    kernel = kernel / kernel.sum()

    def blur(x):
        x = x.reshape(-1, 1, height, width)
        return F.conv2d(F.conv2d(x, kernel.view(1, 1, -1, 1)), kernel.view(1, 1, 1, -1))

    mean_a, mean_b = blur(a), blur(b)
    var_a, var_b = blur(a * a) - mean_a**2, blur(b * b) - mean_b**2
    covariance = blur(a * b) - mean_a * mean_b
    c1, c2 = (0.01 * data_range) ** 2, (0.03 * data_range) ** 2
    value = (2 * mean_a * mean_b + c1) * (2 * covariance + c2)
    value = value / ((mean_a**2 + mean_b**2 + c1) * (var_a + var_b + c2))
    return float(value.mean())


def cosine(a: torch.Tensor, b: torch.Tensor) -> float:
    """Cosine of the angle between two tensors of one shape, each taken as one long vector.

    Raises:
        ValueError: shapes that differ, or a tensor of zeros, which has no direction.
    """
    if a.shape != b.shape:
        raise ValueError(f"the tensors differ in shape: {list(a.shape)} and {list(b.shape)}")
    a, b = a.double().flatten(), b.double().flatten()
    lengths = a.norm() * b.norm()
    if not lengths > 0:
        raise ValueError("the cosine of a tensor of zeros is not defined")
    return float((a @ b / lengths).clamp(-1, 1))


def relative_distance(a: torch.Tensor, b: torch.Tensor) -> float:
    """``|a - b| / |a|`` of two tensors of one shape, in the 2-norm.

    Raises:
        ValueError: shapes that differ, or an ``a`` of zeros, from which nothing has a distance.
    """
    if a.shape != b.shape:
        raise ValueError(f"the tensors differ in shape: {list(a.shape)} and {list(b.shape)}")
    a, b = a.double(), b.double()
    if not a.norm() > 0:
        raise ValueError("the distance relative to a tensor of zeros is not defined")
    return float((a - b).norm() / a.norm())


def temporal_consistency(reference: torch.Tensor, other: torch.Tensor) -> dict[str, float | None]:
    """How the change from frame to frame differs between two clips ``[F, C, H, W]``.

    Returns:
        ``temporal_error``: ``|d' - d| / |d|`` in the 2-norm, where d holds the differences of
        consecutive frames of ``reference`` and d' those of ``other``; 0 for equal motion.
        ``motion_ratio``: mean ``|d'|`` over mean ``|d|``; above 1 the clip moves or flickers more.
        Both are None where the reference does not move.

    Raises:
        ValueError: shapes that differ, or fewer than two frames.
    """
    a, b = _pair(reference, other, 1.0)
    if a.ndim != 4 or len(a) < 2:
        raise ValueError(f"expected clips [F, C, H, W] of 2 frames or more, got {list(a.shape)}")
    a, b = a.diff(dim=0), b.diff(dim=0)
    if not a.any():
        return {"temporal_error": None, "motion_ratio": None}
    return {
        "temporal_error": float((b - a).norm() / a.norm()),
        "motion_ratio": float(b.abs().mean() / a.abs().mean()),
    }
