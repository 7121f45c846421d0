"""Features equal torch-fidelity's; unpublished weights are used only with a warning, missing ones are requested."""

import urllib.request

import pytest
import torch

from components.diffusion.random_numbers import generator
from components.evaluation import inception
from components.evaluation.inception import Inception
from components.files.weights import WeightsError
from tests.support.inception_weights import random_inception


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    return random_inception(tmp_path_factory)


@pytest.fixture(scope="module")
def network(weights):
    return Inception(weights)


def images(count: int = 2, side: int = 20) -> torch.Tensor:
    return torch.randint(256, (count, 3, side, side), generator=generator("images")).to(torch.uint8)


def test_features_are_those_of_torch_fidelitys_extractor(weights, network):
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    theirs = FeatureExtractorInceptionV3("x", ["2048", "logits_unbiased"], feature_extractor_weights_path=str(weights))
    layer = {}
    theirs.Mixed_6d.branch1x1.register_forward_hook(lambda m, i, out: layer.update(out=out))
    pool, logits = theirs(images())
    found = network(images())
    assert torch.equal(found["pool"], pool) and pool.std() > 0.01
    torch.testing.assert_close(network.logits(found["pool"]), logits, rtol=1e-6, atol=1e-6)
    # ADM: the layer's first seven channels in TensorFlow's order, (row, column, channel).
    expected = layer["out"][:, :7].permute(0, 2, 3, 1).reshape(2, -1)
    assert found["spatial"].shape == (2, 2023) and torch.equal(found["spatial"], expected)
    assert found["spatial"].min() == 0 and found["spatial"].std() > 0.01  # after the ReLU


def test_features_do_not_depend_on_autocast_or_training_mode(network):
    expected = network(images(1))["pool"]
    network.train()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(network(images(1))["pool"], expected)


def test_other_weights_are_named(weights, network):
    assert network.about["published"] is False and network.about["file"] == str(weights)
    assert network.about["sha256"] == inception.file_sha256(weights)


def test_published_weights_come_from_the_cache_and_are_checked(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    file = tmp_path / "checkpoints" / "weights-inception-2015-12-05-6726825d.pth"
    file.parent.mkdir()
    file.write_bytes(b"damaged")
    with pytest.raises(WeightsError, match=r"sha256 begins with .* expected 6726825d"):
        inception.find_weights()
    monkeypatch.setattr(inception, "PUBLISHED", inception.file_sha256(file)[:8])
    assert inception.find_weights()[0] == file


def test_weights_that_are_missing_offline_are_asked_for(monkeypatch, tmp_path):
    def offline(*args, **kwargs):
        raise urllib.error.URLError("no network")

    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(urllib.request, "urlopen", offline)
    with pytest.raises(WeightsError, match=r"run once with network access .*--inception-weights FILE"):
        Inception()
    assert not list((tmp_path / "checkpoints").iterdir())
    with pytest.raises(WeightsError, match=r"nowhere.pth' do not exist"):
        Inception("nowhere.pth")


def test_weights_of_another_network_are_refused(tmp_path):
    torch.save({"conv.weight": torch.zeros(3)}, tmp_path / "other.pth")
    with pytest.raises(WeightsError, match=r"other.pth' does not match"):
        Inception(tmp_path / "other.pth")
