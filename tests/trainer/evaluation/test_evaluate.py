"""The evaluate command matches independent code, on any number of ranks and after any interruption."""

import argparse
import json
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
from torch import nn

from components.diffusion.random_numbers import generator
from components.distributed.parallel import World
from components.evaluation import precision_recall
from components.evaluation.encoder_network import EncoderNetwork
from components.evaluation.inception import Inception
from components.evaluation.psnr_ssim import psnr, ssim
from plugins.datasets.shapes import Shapes
from plugins.encoders.tiny_vit import TinyViT
from tests.support import toys
from tests.support.inception_weights import random_inception
from tests.support.ranks import run_ranks
from trainer import config as configs
from trainer.__main__ import main
from trainer.evaluation import metric_selection, tokenizer_quality

pytestmark = pytest.mark.long

SAMPLES, REFERENCE = 110, 130  # more than tiny_vit's 96 features, and not a multiple of the batch size


def images(count: int, noise: float, split: str) -> torch.Tensor:
    """Noisy images of the shapes dataset: uint8 (N, 3, 32, 32)."""
    clean = torch.stack([Shapes(32, split=split)[i].image for i in range(count)]).float()
    clean += noise * torch.randn(clean.shape, generator=generator("noise"))
    return clean.clamp(0, 255).to(torch.uint8)


def write(folder: Path, batch: torch.Tensor) -> Path:
    for i, image in enumerate(batch):
        file = folder / f"{i % 2}" / f"{i:06d}.png"  # nested
        file.parent.mkdir(parents=True, exist_ok=True)
        PIL.Image.fromarray(image.permute(1, 2, 0).numpy()).save(file)
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Folders of samples and of reference images; read-only."""
    place = tmp_path_factory.mktemp("evaluate")
    write(place / "samples", images(SAMPLES, 30.0, "heldout"))
    write(place / "reference", images(REFERENCE, 0.0, "train"))
    return place


def evaluate(*words) -> int:
    return main(["evaluate", *map(str, words)])


def results(file: Path) -> dict:
    return json.loads(file.read_text())


def embeddings(folder: Path) -> np.ndarray:
    """tiny_vit's mean tokens per image, in the order of the paths, computed without the command's code."""
    encoder = TinyViT(32, 8)
    encoder.load_weights()
    arrays = [np.array(PIL.Image.open(file)) for file in sorted(folder.rglob("0*.png"))]
    x = torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2).float() / 127.5 - 1
    return encoder(x).mean(1).double().numpy()


def frechet(a: np.ndarray, b: np.ndarray) -> float:
    """Frechet distance by the eigenvalues of the product, whose square roots sum to the trace of its matrix root."""
    c1, c2 = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    root_trace = np.sqrt(np.linalg.eigvals(c1 @ c2).astype(complex)).real.sum()
    return ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(c1 + c2) - 2 * root_trace


@pytest.fixture(scope="module")
def whole(data):
    """Result of an uninterrupted evaluation in one process."""
    assert evaluate(data / "samples", "--reference", data / "reference", "--encoder=tiny_vit",
                    "--batch-size=16", "--output", data / "whole.json") == 0  # fmt: skip
    return results(data / "whole.json")["metrics"]["fd_tiny_vit"]


def test_the_distance_is_that_of_independent_code(data, whole):
    assert whole == pytest.approx(frechet(embeddings(data / "samples"), embeddings(data / "reference")), rel=1e-5)
    assert not (data / ".evaluation").exists()


def _on_rank(rank: int, world: int, words: list[str]) -> tuple:
    from trainer.commands import evaluate as command

    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    command.evaluate(parser.parse_args(words), [], World(rank, world))
    precision_recall.ROWS = 7
    x = torch.randn(60, 8, generator=generator("samples"))
    y = 0.8 * torch.randn(80, 8, generator=generator("reference"))
    return precision_recall.precision_recall(x, y, rank=rank, world=world)


def test_three_ranks_give_the_same_number(data, whole, tmp_path):
    words = [str(data / "samples"), "--reference", str(data / "reference"), "--encoder=tiny_vit", "--batch-size=16"]
    found = run_ranks(_on_rank, 3, [*words, "--output", str(tmp_path / "ranks.json")])
    # Bit for bit if both have the same number of threads.
    assert results(tmp_path / "ranks.json")["metrics"]["fd_tiny_vit"] == pytest.approx(whole, rel=1e-9)
    x = torch.randn(60, 8, generator=generator("samples"))
    y = 0.8 * torch.randn(80, 8, generator=generator("reference"))
    expected = precision_recall.precision_recall(x, y)
    assert found == [expected] * 3
    assert 0 < expected.recall < 1 and 0 < expected.precision < 1


def test_a_killed_evaluation_goes_on_and_mixes_nothing(data, whole, tmp_path, monkeypatch, capsys):
    forward, calls = EncoderNetwork.forward, []

    def counted(self, batch):
        if len(calls) == limit:
            raise KeyboardInterrupt
        calls.append(len(batch))
        return forward(self, batch)

    monkeypatch.setattr(EncoderNetwork, "forward", counted)
    words = [data / "samples", "--reference", data / "reference", "--encoder=tiny_vit",
             "--output", tmp_path / "evaluation.json"]  # fmt: skip
    limit = 9  # seven batches of samples, two of the reference
    assert evaluate(*words, "--batch-size=16") == 130
    assert "repeat the command to resume" in capsys.readouterr().err
    assert calls == [16] * 6 + [14] + [16] * 2 and not (tmp_path / "evaluation.json").exists()
    # Another batch size rounds differently: the first one's results are neither used nor lost.
    calls.clear()
    limit = 2
    assert evaluate(*words, "--batch-size=50") == 130 and calls == [50, 50]
    # A truncated unit, as after a full disk, is recomputed.
    (damaged,) = tmp_path.glob(".evaluation/*/000003.safetensors")
    damaged.write_bytes(damaged.read_bytes()[:100])
    calls.clear()
    limit = 100
    assert evaluate(*words, "--batch-size=16") == 0
    assert calls == [16] * 7 + [2] or calls == [16] + [16] * 6 + [2]
    assert results(tmp_path / "evaluation.json")["metrics"]["fd_tiny_vit"] == whole
    assert len(list(tmp_path.glob(".evaluation/*"))) == 1  # the other batch size's


def test_archives_and_kept_statistics_give_the_same_number(data, whole, tmp_path, capsys):
    files = sorted((data / "samples").rglob("*.png"))
    array = np.stack([np.array(PIL.Image.open(file)) for file in files])
    np.savez(tmp_path / "stored.npz", arr_0=array)
    np.savez_compressed(tmp_path / "packed.npz", arr_0=array)
    words = ["--encoder=tiny_vit", "--batch-size=16"]
    kept = ["--save-statistics", tmp_path / "kept.npz"]
    assert evaluate(tmp_path / "stored.npz", "--reference", data / "reference", *words, *kept) == 0
    assert evaluate(tmp_path / "packed.npz", "--reference", tmp_path / "kept.npz", *words) == 0
    for name in ("stored", "packed"):
        assert results(tmp_path / f"{name}.evaluation.json")["metrics"]["fd_tiny_vit"] == whole
    # Another network is never used silently.
    assert evaluate(tmp_path / "stored.npz", "--reference", tmp_path / "kept.npz", "--encoder=tiny_vit:grid=4") == 2
    assert "only mu_tiny_vit" in capsys.readouterr().err
    np.savez(tmp_path / "other.npz", **dict(np.load(tmp_path / "kept.npz")) | {"about": json.dumps({"tiny_vit": {}})})
    assert evaluate(tmp_path / "stored.npz", "--reference", tmp_path / "other.npz", *words) == 2
    assert "another network" in capsys.readouterr().err


def test_the_suite_of_inception(data, tmp_path, tmp_path_factory, monkeypatch, capsys):
    """FID, sFID, IS, precision and recall of few images with random weights match independent code, with warnings."""
    from torch_fidelity.metric_isc import isc_features_to_metric

    weights = random_inception(tmp_path_factory)
    seen: list[dict] = []
    forward = Inception.forward

    def recorded(self, batch):
        seen.append(forward(self, batch) | {"fc": self.network.fc.weight})
        return seen[-1]

    monkeypatch.setattr(Inception, "forward", recorded)
    words = [data / "samples", "--reference", data / "reference", "--inception-weights", weights, "--max-images=5",
             "--reference-images=4", "--output", tmp_path / "evaluation.json", "--batch-size=6"]  # fmt: skip
    # Square roots of 2048 x 2048 matrices are slow; 40 features are enough.
    monkeypatch.setattr(Inception, "dims", {"pool": 40, "spatial": 30})
    monkeypatch.setattr(Inception, "logits", lambda self, pool: pool @ self.network.fc.weight[:, :40].T)
    monkeypatch.setattr(Inception, "forward", lambda self, b: (
        recorded(self, b) and {"pool": seen[-1]["pool"][:, :40], "spatial": seen[-1]["spatial"][:, :30]}
    ))  # fmt: skip
    assert evaluate(*words, "--allow-singular") == 0
    found = results(tmp_path / "evaluation.json")
    (a, b), values = seen, found["metrics"]
    assert list(values) == ["fid", "sfid", "is", "precision", "recall"]
    for name, feature, dim in (("fid", "pool", 40), ("sfid", "spatial", 30)):
        # tr (C1 C2)^1/2 of few samples is the sum of the singular values of X1 X2^T, centered.
        x, y = (s[feature][:, :dim].double() for s in (a, b))
        cx, cy = ((z - z.mean(0)) / (len(z) - 1) ** 0.5 for z in (x, y))
        cross = torch.linalg.svdvals(cx @ cy.T).sum()
        expected = (x.mean(0) - y.mean(0)).square().sum() + cx.square().sum() + cy.square().sum() - 2 * cross
        assert values[name] == pytest.approx(float(expected), rel=1e-6)
    logits = a["pool"][:, :40] @ a["fc"][:, :40].T
    score = isc_features_to_metric(logits, splits=1, shuffle=False)["inception_score_mean"]
    assert values["is"] == pytest.approx(score, rel=1e-6)
    assert 0 <= values["precision"] <= 1 and 0 <= values["recall"] <= 1
    assert any("NOT the published Inception weights" in text for text in found["warnings"])
    assert sum("too few" in text for text in found["warnings"]) == 4
    assert found["networks"]["inception"]["published"] is False
    shown = capsys.readouterr().out
    assert "FID" in shown and "NOT the published" in shown


def test_samples_of_a_run_know_their_dataset_and_their_curves(data, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = tmp_path / "run"
    folder = write(run / "samples" / "step7-ema-euler2", images(SAMPLES, 30.0, "heldout"))
    (run / "config.toml").write_text(toys.TOML)
    settings = {"run": str(run), "source": "run", "step": 7, "num_samples": SAMPLES}
    (folder / "samples.json").write_text(json.dumps(settings))
    PIL.Image.new("RGB", (90, 90)).save(folder / "grid.png")  # not a sample
    assert evaluate(folder, "--reference=dataset", "--encoder=tiny_vit", f"--dataset.size={REFERENCE}") == 0
    value = results(folder / "evaluation.json")["metrics"]["fd_tiny_vit"]
    expected = frechet(embeddings(folder), embeddings(data / "reference"))  # the dataset's first images
    assert value == pytest.approx(expected, rel=1e-5)
    events = EventAccumulator(str(run / "tensorboard" / "evaluate-ema-euler2"))
    events.Reload()
    (scalar,) = events.Scalars("evaluation/fd_tiny_vit")
    assert scalar.step == 7 and scalar.value == pytest.approx(value, rel=1e-6)


class NoInception(nn.Module):
    """Stand-in for a network that is never called."""

    dims = Inception.dims
    about = {"sha256": "0", "published": True}

    def __init__(self, weights):
        super().__init__()


def test_errors_name_the_file_and_what_to_do(data, tmp_path, monkeypatch, capsys):
    def refused(*words) -> str:
        assert evaluate(*words) == 2
        return capsys.readouterr().err

    to_reference = ["--reference", data / "reference", "--encoder=tiny_vit"]
    broken = write(tmp_path / "broken", images(100, 0.0, "heldout"))
    (broken / "1" / "000007.png").write_bytes((broken / "1" / "000007.png").read_bytes()[:60])
    assert "broken/1/000007.png cannot be read" in refused(broken, *to_reference)
    PIL.Image.new("RGB", (32, 30)).save(broken / "1" / "000007.png")
    assert "000007.png has 32 x 30 pixels, the first one 32 x 32" in refused(broken, *to_reference)
    (broken / "samples.json").write_text(json.dumps({"num_samples": 120}))
    assert "100 of 120 images: sampling was interrupted" in refused(broken, *to_reference)

    samples = data / "samples"
    assert "50 images of the samples are too few" in refused(samples, *to_reference, "--max-images=50")
    assert "60 images of the reference are too few" in refused(samples, *to_reference, "--reference-images=60")
    monkeypatch.setattr(metric_selection, "Inception", NoInception)
    assert "110 images of the samples are too few for 2048" in refused(samples, *to_reference[:2], "--metrics=fid")
    few = ["--metrics=recall", "--max-images=3"]
    assert "need more than 3 samples and reference images" in refused(samples, *to_reference[:2], *few)
    assert "--reference is missing" in refused(samples)
    assert "add --config=TOML_OR_RUN" in refused(samples, "--reference=dataset", "--encoder=tiny_vit")
    assert "nowhere does not exist" in refused(samples, "--reference=nowhere", "--encoder=tiny_vit")
    assert "did you mean 'tiny_vit'" in refused(samples, *to_reference[:2], "--encoder=tinyvit")
    assert "sizes" in refused(samples, *to_reference[:2], "--encoder=tiny_vit:sizes=3")
    assert "did you mean 'sfid'" in refused(samples, *to_reference[:2], "--metrics=sfids")
    assert "'--foo=1' is not an option" in refused(samples, *to_reference, "--foo=1")
    np.savez(tmp_path / "wrong.npz", arr_0=np.zeros((4, 3, 8, 8), np.uint8))
    assert "expected uint8 (N, H, W, 3)" in refused(tmp_path / "wrong.npz", *to_reference)
    np.savez(tmp_path / "adm.npz", mu=np.zeros(2048), sigma=np.eye(2048))
    text = refused(samples, "--reference", tmp_path / "adm.npz", "--metrics=precision,sfid")
    assert "precision, recall: " in text and "holds statistics only" in text and "nor mu_s, only mu" in text


def test_reconstructions_are_measured(tmp_path, monkeypatch):
    """Compares with the formulas on the tokenizer's reconstructions."""

    class Difference(nn.Module):
        def forward(self, x, x_hat, posterior):
            return (x - x_hat).abs().mean()

    monkeypatch.setattr(tokenizer_quality, "make_metric", lambda name, config, device: Difference())
    from safetensors.torch import save_file

    tokenizer = toys.modules(dtype=torch.float32).tokenizer.eval()
    save_file(tokenizer.state_dict(), tmp_path / "tokenizer.safetensors")
    toml = tmp_path / "toy.toml"
    # A path relative to the TOML file.
    toml.write_text(toys.TOML.replace('name = "autoencoder_kl"', 'name = "autoencoder_kl"\ncheckpoint = "tokenizer.safetensors"'))  # fmt: skip # noqa: E501
    words = [toml, "--reconstruction", "--metrics=psnr,ssim,lpips", "--encoder=tiny_vit", "--dataset.split=heldout",
             "--dataset.size=110", "--output", tmp_path / "out.json", "--batch-size=40"]  # fmt: skip
    assert evaluate(*words) == 0
    found = results(tmp_path / "out.json")["metrics"]
    x = images(110, 0.0, "heldout")
    with torch.no_grad():
        y = torch.cat([tokenizer_quality.reconstruct(tokenizer, part) for part in x.split(40)])
    assert found["psnr"] == pytest.approx(psnr(x, y).mean().item(), rel=1e-9)
    assert found["ssim"] == pytest.approx(ssim(x, y).mean().item(), rel=1e-9)
    # Means over images, not over batches: the last batch is smaller.
    assert found["lpips"] == pytest.approx((x.float() - y.float()).abs().mean().item() / 127.5, rel=1e-5)
    expected = frechet(embeddings(write(tmp_path / "y", y)), embeddings(write(tmp_path / "x", x)))
    assert found["rfd_tiny_vit"] == pytest.approx(expected, rel=1e-5)


def test_lpips_sees_images_in_the_range_it_was_made_for(tmp_path, monkeypatch):
    from plugins.losses.lpips import LPIPS

    monkeypatch.setattr(LPIPS, "load_weights", lambda self: None)
    toml = tmp_path / "toy.toml"
    toml.write_text(toys.TOML + '\n[losses.percept]\nname = "lpips"\nvgg_checkpoint = "vgg.pth"\nweight = 2.0\n')
    loss = tokenizer_quality.make_metric("lpips", configs.load(str(toml)), torch.device("cpu"))
    assert loss.input_range == "unit" and loss.vgg_checkpoint == "vgg.pth"
    with pytest.raises(configs.ConfigError, match="metric = 'dists'"):
        tokenizer_quality.make_metric("dists", configs.load(str(toml)), torch.device("cpu"))


def test_vision_transformers_are_compared_by_their_class_token():
    """The class token equals timm's own after its final norm, for images of another range."""
    from components.nn.timm_encoder import TimmEncoder

    torch.manual_seed(0)
    encoder = TimmEncoder("vit_tiny_patch16_224", 2, pretrained=False)  # two patches of 16 pixels per side
    batch = images(2, 0.0, "heldout")
    found = EncoderNetwork(encoder, {})(batch)["embedding"]
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)))
    x = (batch / 255 - mean) / std
    torch.testing.assert_close(found, encoder.model.forward_features(x)[:, 0], rtol=1e-4, atol=1e-5)
    assert found.shape == (2, encoder.embed_dim) and found.std() > 0.1
