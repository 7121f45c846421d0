"""The latent norm's initial statistics: measured as by a plain computation, or read from either file layout."""

import contextlib

import pytest
import torch

from components.contracts import Posterior
from components.distributed.parallel import World
from tests.support import toys
from trainer import config
from trainer.run import assemble
from trainer.run import initial_statistics as latents


@pytest.fixture
def parts(tmp_path):
    path = tmp_path / "toy.toml"
    path.write_text(toys.TOML)
    loaded = config.load(str(path), ["--recipe.name=ldm", "--latent_norm.images=24"])
    return loaded, assemble.build(loaded, World())


def test_measured_statistics_are_those_of_the_first_training_images(parts, monkeypatch):
    loaded, built = parts
    seen = []
    sample = Posterior.sample
    monkeypatch.setattr(Posterior, "sample", lambda *arguments: seen.append(sample(*arguments)) or seen[-1])
    mean, std = latents.measure_statistics(loaded, built, World())
    z = torch.cat(seen).double()
    assert len(z) == 24
    assert torch.allclose(mean, z.mean((0, 2, 3))) and torch.allclose(std, z.std((0, 2, 3), unbiased=False))


def test_published_and_plain_files_say_the_same(tmp_path):
    mean, std = torch.tensor([0.5, -1.0]), torch.tensor([2.0, 4.0])
    torch.save({"latents_bias": mean.view(1, 2, 1, 1), "latents_scale": 1 / std.view(1, 2, 1, 1)}, tmp_path / "a.pt")
    torch.save({"mean": mean, "std": std}, tmp_path / "b.pt")
    torch.save({"running_mean": mean, "running_var": std.square()}, tmp_path / "c.pt")
    torch.save({"mean": mean, "var": std.square()}, tmp_path / "d.pt")
    for name in ("a.pt", "b.pt", "c.pt", "d.pt"):
        got = latents.read_statistics(str(tmp_path / name))
        assert torch.allclose(got[0], mean) and torch.allclose(got[1], std)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (None, "does not exist"),
        ({"scale": torch.ones(4)}, "expected tensors mean and std"),
        ({"mean": torch.zeros(3), "std": torch.ones(3)}, "4 means"),
        ({"mean": torch.zeros(4), "std": torch.zeros(4)}, "positive"),
    ],
)
def test_a_bad_file_is_named(parts, tmp_path, content, says):
    loaded, built = parts
    path = tmp_path / "stats.pt"
    if content is not None:
        torch.save(content, path)
    norm = loaded.latent_norm.model_copy(update={"statistics": str(path)})
    with pytest.raises(config.ConfigError, match=says) as error:
        latents.prepare_latent_norm(loaded.model_copy(update={"latent_norm": norm}), built, World())
    assert "latent_norm.statistics" in str(error.value)


def test_statistics_per_position_are_measured_and_read(parts, tmp_path, monkeypatch):
    loaded, built = parts
    norm = loaded.latent_norm.model_copy(update={"per_position": True})
    loaded = loaded.model_copy(update={"latent_norm": norm})
    built = assemble.build(loaded, World())
    seen = []
    sample = Posterior.sample
    monkeypatch.setattr(Posterior, "sample", lambda *arguments: seen.append(sample(*arguments)) or seen[-1])
    mean, std = latents.measure_statistics(loaded, built, World())
    z = torch.cat(seen).double()
    assert mean.shape == built.latent and torch.allclose(mean, z.mean(0)) and torch.allclose(std, z.std(0, False))
    for coarse, says in ((1, ""), (2, r"of this resolution; got \(4, 4, 4\)")):
        path = tmp_path / "stats.pt"  # as published by RAE
        torch.save({"mean": mean[:, ::coarse, ::coarse], "var": std[:, ::coarse, ::coarse].square()}, path)
        updated = norm.model_copy(update={"statistics": str(path)})
        with pytest.raises(config.ConfigError, match=says) if says else contextlib.nullcontext():
            latents.prepare_latent_norm(loaded.model_copy(update={"latent_norm": updated}), built, World())
    assert torch.equal(built.modules.latent_norm.running_mean, mean.float())
