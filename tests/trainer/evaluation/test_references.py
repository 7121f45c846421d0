"""Reference statistics in the formats in use, and the moments of a dataset without samples."""

import json
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch

from components.diffusion.random_numbers import generator
from components.evaluation.mind import monge_inception_distance
from plugins.datasets.shapes import Shapes
from tests.support import toys
from tests.support.few_features import FewFeatures
from trainer.__main__ import main
from trainer.evaluation import metric_selection

SAMPLES, REFERENCE = 40, 60


@pytest.fixture
def data(tmp_path, monkeypatch) -> dict[str, torch.Tensor]:
    """Samples in a folder, and images uint8 of both sides; Inception is replaced by a stand-in."""
    monkeypatch.setattr(metric_selection, "Inception", FewFeatures)
    (tmp_path / "toy.toml").write_text(toys.TOML)
    (tmp_path / "samples").mkdir()
    samples = torch.randint(256, (SAMPLES, 3, 32, 32), generator=generator("samples"), dtype=torch.uint8)
    for i, image in enumerate(samples):
        PIL.Image.fromarray(image.permute(1, 2, 0).numpy()).save(tmp_path / "samples" / f"{i:03d}.png")
    dataset = Shapes(32, size=REFERENCE)
    return {"samples": samples, "reference": torch.stack([dataset[i].image for i in range(REFERENCE)])}


def evaluate(folder: Path, *words) -> dict[str, float]:
    output = folder / "out.json"
    assert main(["evaluate", str(folder / "samples"), *map(str, words), f"--output={output}"]) == 0
    return json.loads(output.read_text())["metrics"]


def moments(images: torch.Tensor, name: str) -> tuple[np.ndarray, np.ndarray]:
    x = FewFeatures()(images)[name].double().numpy()
    return x.mean(0), np.cov(x, rowvar=False)


def frechet(one: tuple[np.ndarray, np.ndarray], two: tuple[np.ndarray, np.ndarray]) -> float:
    root_trace = np.sqrt(np.linalg.eigvals(one[1] @ two[1]).astype(complex)).real.sum()
    return ((one[0] - two[0]) ** 2).sum() + np.trace(one[1] + two[1]) - 2 * root_trace


def test_adms_batch_and_the_moments_of_a_training_set_are_one_option(data, tmp_path):
    ours = {name: moments(data["samples"], name) for name in ("pool", "spatial")}
    theirs = {name: moments(data["reference"], name) for name in ("pool", "spatial")}
    array = data["reference"].permute(0, 2, 3, 1).numpy()
    (mu, sigma), (mu_s, sigma_s) = theirs["pool"], theirs["spatial"]
    other = np.zeros_like(mu)  # moments take precedence over images
    np.savez(tmp_path / "images.npz", arr_0=array)
    np.savez(tmp_path / "adm.npz", arr_0=array, mu=mu, sigma=sigma, mu_s=mu_s, sigma_s=sigma_s)
    np.savez(tmp_path / "moved.npz", arr_0=array, mu=other, sigma=sigma, mu_s=mu_s, sigma_s=sigma_s)
    np.savez(tmp_path / "training_set.npz", mu=mu, sigma=sigma)
    np.savez(tmp_path / "ref.npz", ref_mu=mu, ref_sigma=sigma)
    fid, sfid = frechet(ours["pool"], theirs["pool"]), frechet(ours["spatial"], theirs["spatial"])
    for name in ("images", "adm"):
        found = evaluate(tmp_path, "--reference", tmp_path / f"{name}.npz", "--metrics=fid,sfid")
        assert found == pytest.approx({"fid": fid, "sfid": sfid}, rel=1e-6), name
    for name in ("training_set", "ref"):
        found = evaluate(tmp_path, "--reference", tmp_path / f"{name}.npz", "--metrics=fid")
        assert found == pytest.approx({"fid": fid}, rel=1e-6), name
    moved = evaluate(tmp_path, "--reference", tmp_path / "moved.npz", "--metrics=fid")
    assert moved["fid"] == pytest.approx(frechet(ours["pool"], (other, sigma)), rel=1e-6)


def test_the_moments_of_a_dataset_need_no_samples(data, tmp_path, capsys):
    kept, words = tmp_path / "kept.npz", ["--reference=dataset", f"--config={tmp_path}/toy.toml"]
    more = ["--encoder=tiny_vit", "--metrics=fid,sfid", f"--dataset.size={REFERENCE}", "--allow-singular"]
    assert main(["evaluate", *words, *more, f"--save-statistics={kept}"]) == 0
    assert f"statistics of {REFERENCE} images (inception, tiny_vit)" in capsys.readouterr().out
    with np.load(kept) as file:  # as any other program reads it
        for name, suffix in (("pool", ""), ("spatial", "_s")):
            mean, covariance = moments(data["reference"], name)
            np.testing.assert_allclose(file[f"mu{suffix}"], mean, rtol=1e-10)
            np.testing.assert_allclose(file[f"sigma{suffix}"], covariance, rtol=1e-10, atol=1e-8)
        assert file["mu_tiny_vit"].shape == (96,)
    assert not (tmp_path / ".evaluation").exists()
    stored = evaluate(tmp_path, "--reference", kept, "--metrics=fid,sfid")
    assert stored == evaluate(tmp_path, *words, "--metrics=fid,sfid", f"--dataset.size={REFERENCE}")
    assert main(["evaluate", *words, "--metrics=mind", f"--save-statistics={kept}"]) == 2
    assert "unknown metric 'mind'" in capsys.readouterr().err
    assert main(["evaluate", f"--reference={kept}", f"--save-statistics={kept}"]) == 2
    assert "holds no images to compute statistics of" in capsys.readouterr().err


@pytest.mark.parametrize("count", [0, 30, 5000])
def test_mind_of_the_command(data, tmp_path, count):
    words = ["--reference=dataset", f"--config={tmp_path}/toy.toml", f"--dataset.size={REFERENCE}"]
    found = evaluate(tmp_path, *words, "--metrics=mind", f"--mind-images={count}", "--batch-size=7")
    pools = (FewFeatures()(data[side])["pool"] for side in ("samples", "reference"))
    assert found == {"mind": pytest.approx(monge_inception_distance(*pools, images=count), rel=1e-5)}
    warnings = json.loads((tmp_path / "out.json").read_text())["warnings"]
    assert any("from 40 images of each side, not 5000" in text for text in warnings) == (count == 5000)
