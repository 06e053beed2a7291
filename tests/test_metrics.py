"""PSNR and SSIM against their formulas, written out pixel by pixel."""

import math

import numpy as np
import pytest
import torch

from dittfast.measure.metrics import image_tensor, psnr, ssim


def pictures(shape, noise, seed=0):
    rng = np.random.default_rng(seed)
    a = rng.random(shape)
    return a, np.clip(a + noise * rng.standard_normal(shape), 0, 1)


def ssim_by_loops(a, b, data_range):
    """Wang et al. 2004, equations 6 and 13-16, one window at a time."""
    weights = np.array(
        [
            [math.exp(-((y - 5) ** 2 + (x - 5) ** 2) / (2 * 1.5**2)) for x in range(11)]
            for y in range(11)
        ]
    )
    weights /= weights.sum()
    c1, c2 = (0.01 * data_range) ** 2, (0.03 * data_range) ** 2
    values = []
    for x, y in zip(a.reshape(-1, *a.shape[-2:]), b.reshape(-1, *b.shape[-2:])):
        for top in range(x.shape[0] - 10):
            for left in range(x.shape[1] - 10):
                p, q = (m[top : top + 11, left : left + 11] for m in (x, y))
                mean_p, mean_q = (weights * p).sum(), (weights * q).sum()
                var_p = (weights * (p - mean_p) ** 2).sum()
                var_q = (weights * (q - mean_q) ** 2).sum()
                both = (weights * (p - mean_p) * (q - mean_q)).sum()
                values.append(
                    (2 * mean_p * mean_q + c1)
                    * (2 * both + c2)
                    / ((mean_p**2 + mean_q**2 + c1) * (var_p + var_q + c2))
                )
    return sum(values) / len(values)


@pytest.mark.parametrize("shape", [(11, 11), (3, 13, 17), (2, 3, 12, 11)])
@pytest.mark.parametrize("data_range", [1.0, 255.0])
def test_ssim_is_its_formula(shape, data_range):
    a, b = pictures(shape, 0.2)
    a, b = a * data_range, b * data_range
    got = ssim(torch.from_numpy(a), torch.from_numpy(b), data_range)
    assert got == pytest.approx(ssim_by_loops(a, b, data_range), abs=1e-10)
    assert got < 0.99


@pytest.mark.parametrize("data_range", [1.0, 255.0])
def test_psnr_is_its_formula(data_range):
    a, b = pictures((3, 5, 7), 0.1)
    total = sum((x - y) ** 2 for x, y in zip(a.ravel(), b.ravel()))
    expected = 20 * math.log10(1 / math.sqrt(total / a.size))
    got = psnr(torch.from_numpy(a * data_range), torch.from_numpy(b * data_range), data_range)
    assert got == pytest.approx(expected, abs=1e-9)


def test_equal_pictures():
    a = torch.rand(3, 16, 16)
    assert psnr(a, a) == math.inf
    assert ssim(a, a) == pytest.approx(1, abs=1e-12)
    flat = torch.full((3, 16, 16), 0.3)
    assert ssim(flat, flat) == pytest.approx(1, abs=1e-12)


def test_half_precision_is_not_computed_in_half():
    a, b = pictures((3, 16, 16), 1e-3)
    half_a, half_b = (torch.from_numpy(x).half() for x in (a, b))
    exact = ((half_a.double() - half_b.double()) ** 2).mean().item()
    assert psnr(half_a, half_b) == pytest.approx(-10 * math.log10(exact), abs=1e-9)


def test_more_noise_is_worse_for_both():
    scores = []
    for noise in (0.01, 0.05, 0.2, 0.5):
        a, b = (torch.from_numpy(x) for x in pictures((3, 20, 20), noise))
        assert psnr(a, b) == psnr(b, a)
        assert ssim(a, b) == pytest.approx(ssim(b, a), abs=1e-12)
        scores.append((psnr(a, b), ssim(a, b)))
    assert scores == sorted(scores, reverse=True)


def test_bad_inputs_are_named():
    a = torch.rand(3, 16, 16)
    with pytest.raises(ValueError, match=r"differ in shape: \[3, 16, 16\] and \[3, 16, 15\]"):
        psnr(a, a[..., :15])
    with pytest.raises(ValueError, match="at least 11 x 11"):
        ssim(a[..., :10], a[..., :10])
    with pytest.raises(ValueError, match="at least 11 x 11"):
        ssim(a[0, 0], a[0, 0])
    with pytest.raises(ValueError, match="data_range must be positive, got 0"):
        psnr(a, a, 0)
    with pytest.raises(ValueError, match="empty"):
        psnr(a[:0], a[:0])


def test_image_tensor_puts_channels_before_rows():
    pixels = np.random.default_rng(0).integers(0, 256, (2, 4, 5, 3), dtype=np.uint8)
    tensor = image_tensor(pixels)
    assert tensor.shape == (2, 3, 4, 5) and tensor.dtype == torch.float64
    assert float(tensor[1, 2, 3, 4]) == pixels[1, 3, 4, 2] / 255
    assert image_tensor(pixels[0, ..., 0]).shape == (1, 4, 5)
    with pytest.raises(ValueError, match="expected 8-bit pictures, got float64"):
        image_tensor(pixels / 255)
