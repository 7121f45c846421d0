"""Inception Score against torch-fidelity, precision and recall against a plain k-NN, PSNR and SSIM against formulas."""

import numpy as np
import pytest
import torch

from components.diffusion.random_numbers import generator
from components.evaluation import EvaluationError, precision_recall
from components.evaluation.inception_score import InceptionScore
from components.evaluation.psnr_ssim import psnr, ssim


def logits(count: int) -> torch.Tensor:
    return 3 * torch.randn(count, 20, generator=generator("logits"))


@pytest.mark.parametrize("batch", [1, 7, 30, 120])
def test_inception_score_is_that_of_torch_fidelity(batch):
    from torch_fidelity.metric_isc import isc_features_to_metric

    x = logits(120)
    ours = InceptionScore(split_size=30)
    for part in x.split(batch):
        ours.update(part)
    theirs = isc_features_to_metric(x, splits=4, shuffle=False)["inception_score_mean"]
    assert ours.value() == pytest.approx(theirs, rel=1e-9)


def test_a_shorter_last_split_counts_as_one():
    x = logits(50)
    p = x.double().softmax(1).numpy()
    expected = [np.exp((q * (np.log(q) - np.log(q.mean(0)))).sum(1).mean()) for q in (p[:30], p[30:])]
    ours = InceptionScore(split_size=30)
    ours.update(x)
    assert ours.value() == pytest.approx(np.mean(expected), rel=1e-9)


def test_probabilities_that_underflow_do_not_break_the_inception_score():
    ours = InceptionScore()
    ours.update(torch.eye(4).repeat(5, 1) * 1e4)
    assert ours.value() == pytest.approx(4.0)  # four classes, each predicted with certainty
    with pytest.raises(EvaluationError, match="at least one image"):
        InceptionScore().value()


def plain(samples: np.ndarray, reference: np.ndarray, k: int) -> tuple[float, float]:
    """Precision and recall by sorting all distances."""

    def distances(a, b):
        return np.sqrt(((a[:, None] - b[None]) ** 2).sum(-1))

    def share(points, centers):
        radii = np.sort(distances(centers, centers), 1)[:, k]
        return (distances(points, centers) <= radii).any(1).mean()

    return share(samples, reference), share(reference, samples)


@pytest.mark.parametrize("rows", [7, 1024])
@pytest.mark.parametrize("offset", [0.0, 300.0])
def test_precision_and_recall_are_those_of_a_plain_k_nn(monkeypatch, rows, offset):
    monkeypatch.setattr(precision_recall, "ROWS", rows)
    samples = 0.7 * torch.randn(60, 16, generator=generator(1)) + 0.4 + offset
    reference = torch.randn(90, 16, generator=generator(2)) + offset
    found = precision_recall.precision_recall(samples, reference)
    expected = plain(samples.double().numpy(), reference.double().numpy(), 3)
    assert found == pytest.approx(expected, abs=1e-12)
    assert 0.1 < found.recall < found.precision < 1  # neither is trivial here


def test_the_same_images_have_precision_and_recall_one():
    x = torch.randn(50, 16, generator=generator(3))
    assert precision_recall.precision_recall(x, x.clone()) == (1.0, 1.0)
    with pytest.raises(EvaluationError, match="3 images of the samples"):
        precision_recall.precision_recall(x[:3], x)


def pair() -> tuple[torch.Tensor, torch.Tensor]:
    g = generator("pair")
    x = torch.randint(256, (3, 3, 24, 24), generator=g)
    y = (x + torch.randint(-20, 21, x.shape, generator=g)).clamp(0, 255)
    return x.to(torch.uint8), y.to(torch.uint8)


def test_psnr_is_its_formula_per_image():
    x, y = pair()
    mse = ((x.double() - y.double()) ** 2).mean((1, 2, 3)).numpy()
    np.testing.assert_allclose(psnr(x, y), 10 * np.log10(255**2 / mse), rtol=1e-12)
    assert torch.isinf(psnr(x, x)).all()


def test_ssim_is_its_formula_per_image():
    """Wang et al. (2004), written out with a separable window on reflected borders."""
    x, y = pair()
    offsets = np.arange(11) - 5
    window = np.exp(-(offsets**2) / (2 * 1.5**2))
    window /= window.sum()

    def smooth(a: np.ndarray) -> np.ndarray:
        a = np.pad(a, [(0, 0), (0, 0), (5, 5), (5, 5)], mode="reflect")
        a = np.apply_along_axis(np.convolve, -1, a, window, mode="valid")
        return np.apply_along_axis(np.convolve, -2, a, window, mode="valid")

    a, b = x.numpy() / 255, y.numpy() / 255
    c1, c2 = 0.01**2, 0.03**2
    ma, mb = smooth(a), smooth(b)
    va, vb, cov = smooth(a * a) - ma**2, smooth(b * b) - mb**2, smooth(a * b) - ma * mb
    expected = ((2 * ma * mb + c1) * (2 * cov + c2) / ((ma**2 + mb**2 + c1) * (va + vb + c2))).mean((1, 2, 3))
    np.testing.assert_allclose(ssim(x, y), expected, rtol=1e-6)
    np.testing.assert_allclose(ssim(x, x), 1.0, rtol=1e-12)
    with pytest.raises(ValueError, match="11 pixels"):
        ssim(x[..., :8, :8], y[..., :8, :8])
