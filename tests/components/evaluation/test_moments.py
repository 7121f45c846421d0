"""Moments do not depend on the division into batches; the Frechet distance equals torch-fidelity's."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from components.diffusion.random_numbers import generator
from components.distributed.parallel import World
from components.evaluation import EvaluationError
from components.evaluation.comparison import frechet_distance
from components.evaluation.statistics import Gaussian, Moments, NetworkMetrics, StatisticsBuilder
from trainer.evaluation.references import read_statistics, save_statistics


def features(count: int, dim: int = 8, seed: int = 0, offset: float = 0.0) -> torch.Tensor:
    g = generator("features", seed)
    mix = torch.randn(dim, dim, generator=g, dtype=torch.float64)
    return torch.randn(count, dim, generator=g, dtype=torch.float64) @ mix + offset


def moments(x: torch.Tensor, batch: int) -> Moments:
    found = Moments(x.shape[1])
    for part in x.split(batch):
        found.update(part)
    return found


@pytest.mark.parametrize("batch", [1, 7, 64, 101])
@pytest.mark.parametrize("offset", [0.0, 1e6])
def test_moments_are_those_of_numpy_for_every_batch_size(batch, offset):
    x = features(101, offset=offset)
    g = moments(x, batch).gaussian()
    np.testing.assert_allclose(g.mean, x.numpy().mean(0), rtol=1e-13)
    # The precision of the means limits the rest.
    np.testing.assert_allclose(g.covariance, np.cov(x.numpy(), rowvar=False), rtol=1e-10, atol=1e-12 * (1 + offset))
    assert g.count == 101


def test_a_feature_that_is_not_finite_is_named_by_its_image():
    x = features(10)
    x[7, 3] = float("nan")
    network = SimpleNamespace(dims={"embedding": x.shape[1]})
    builder = StatisticsBuilder(NetworkMetrics("x", network, ("fd",)), World(), generated=True)
    builder.add({"embedding": x[:4]})
    with pytest.raises(EvaluationError, match=r"'embedding' of 1 of 4 images .* not finite \(first: number 7\)"):
        builder.add({"embedding": x[4:8]})


def test_statistics_files_keep_the_bits(tmp_path):
    g = moments(features(20), 20).gaussian()
    save_statistics(tmp_path / "a.npz", {"": g, "_s": g}, {"network": "some"})
    assert [p.name for p in tmp_path.iterdir()] == ["a.npz"]
    found, about = read_statistics(tmp_path / "a.npz")
    assert about == {"network": "some"} and set(found) == {"", "_s"} and found["_s"].count == 20
    assert torch.equal(found[""].mean, g.mean) and torch.equal(found[""].covariance, g.covariance)


def test_adm_statistics_are_read_and_broken_ones_named(tmp_path):
    sigma = np.eye(4)
    np.savez(tmp_path / "adm.npz", mu=np.ones(4), sigma=sigma, mu_s=np.zeros(4), sigma_s=2 * sigma)
    found, about = read_statistics(tmp_path / "adm.npz")
    assert about == {} and set(found) == {"", "_s"} and found[""].count is None
    assert torch.equal(found["_s"].covariance, 2 * torch.eye(4, dtype=torch.float64))
    np.savez(tmp_path / "bad.npz", mu=np.ones(3), sigma=sigma)
    with pytest.raises(EvaluationError, match=r"bad.npz.*\(4, 4\)"):
        read_statistics(tmp_path / "bad.npz")
    (tmp_path / "text.npz").write_text("no")
    with pytest.raises(EvaluationError, match=r"text.npz"):
        read_statistics(tmp_path / "text.npz")


def test_frechet_distance_is_that_of_torch_fidelity():
    from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric

    a, b = features(300, 64, seed=1), features(250, 64, seed=2, offset=0.5)
    theirs = fid_statistics_to_metric(*map(fid_features_to_statistics, (a, b)), False)["frechet_inception_distance"]
    ours = frechet_distance(moments(a, 32).gaussian(), moments(b, 32).gaussian())
    assert ours.value == pytest.approx(theirs, rel=1e-9) and not ours.warnings


def test_frechet_distance_of_diagonal_covariances_with_zeros():
    """(sqrt a - sqrt b)^2 per axis, also for axes without variance: square roots must not amplify rounding."""
    a = torch.tensor([4.0, 1.0, 0.0, 9.0, 0.0], dtype=torch.float64)
    b = torch.tensor([1.0, 1.0, 2.0, 0.0, 0.0], dtype=torch.float64)
    rotation = torch.linalg.qr(features(5, 5)).Q
    one, two = (Gaussian(torch.zeros(5).double(), rotation @ x.diag() @ rotation.T, 100) for x in (a, b))
    found = frechet_distance(one, two)
    assert found.value == pytest.approx(1 + 2 + 9, abs=1e-12)
    assert len(found.warnings) == 2 and "rank 3 of 5" in found.warnings[0]
    assert frechet_distance(one, one).value < 1e-12


def test_too_few_images_give_an_error_or_a_warning_but_no_bare_number():
    few, many = moments(features(8, 8), 8).gaussian(), moments(features(100, 8, seed=3), 8).gaussian()
    for pair in ((few, many), (many, few)):
        with pytest.raises(EvaluationError, match=r"8 images of .* too few for 8 features.*more than 8"):
            frechet_distance(*pair)
        found = frechet_distance(*pair, allow_singular=True)
        assert found.value > 0 and "too few" in found.warnings[0]
    with pytest.raises(EvaluationError, match="at least 2"):
        moments(features(1), 1).gaussian()


def test_the_distance_of_few_images_has_no_rounding_noise():
    """For N < D images, tr (C1 C2)^1/2 is the sum of the singular values of X1 X2^T, centered and scaled."""
    x, y = features(12, 200, seed=4), features(15, 200, seed=5)
    cx, cy = ((z - z.mean(0)) / (len(z) - 1) ** 0.5 for z in (x, y))
    traces = cx.square().sum() + cy.square().sum() - 2 * torch.linalg.svdvals(cx @ cy.T).sum()
    expected = (x.mean(0) - y.mean(0)).square().sum() + traces
    found = frechet_distance(moments(x, 5).gaussian(), moments(y, 5).gaussian(), allow_singular=True)
    assert found.value == pytest.approx(float(expected), rel=1e-12)


def test_images_that_are_all_alike_have_no_distance():
    alike = moments(torch.ones(100, 8), 10).gaussian()
    with pytest.raises(EvaluationError, match="all have the same features"):
        frechet_distance(alike, moments(features(100), 10).gaussian(), allow_singular=True)


def test_moments_of_two_networks_do_not_mix():
    with pytest.raises(EvaluationError, match=r"8 features, .* 6"):
        frechet_distance(moments(features(20), 5).gaussian(), moments(features(20, 6), 5).gaussian())
