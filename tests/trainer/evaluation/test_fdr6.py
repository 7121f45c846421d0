"""FDr6: its encoders against timm driven as in the reference code, and the whole command against NumPy."""

import json
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import timm
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from components.diffusion.random_numbers import generator
from components.evaluation.images import ImageFiles
from components.files.weights import WeightsError
from components.nn.timm_encoder import TimmEncoder
from tests.support.few_features import FewFeatures
from trainer.__main__ import main
from trainer.evaluation import metric_selection
from trainer.evaluation.fdr6 import MEMBERS
from trainer.evaluation.metric_selection import EncoderSpec

# As in the catalog of DiffusionBench's fd_evaluator: model, input size, features, divisor.
CATALOG = {
    "convnextv2_b": ("convnextv2_base.fcmae_ft_in22k_in1k", 224, 1024, 56.87),
    "dinov2_l_cls": ("vit_large_patch14_dinov2.lvd142m", 256, 1024, 14.19),
    "mae_l_cls": ("vit_large_patch16_224.mae", 224, 1024, 0.04),
    "siglip2_so400m": ("vit_so400m_patch16_siglip_256.v2_webli", 224, 1152, 0.60),
    "clip_l_cls": ("vit_large_patch14_clip_224.openai", 256, 1024, 5.60),
}
COUNT = 40


@pytest.fixture
def small(monkeypatch, tmp_path):
    """The same models with few features and blocks, and files with seeded random weights at their native sizes."""
    from timm.models import convnext, vision_transformer

    vit, cnn = vision_transformer._create_vision_transformer, convnext._create_convnext
    few = {"embed_dim": 16, "depth": 2, "num_heads": 2}
    monkeypatch.setattr(vision_transformer, "_create_vision_transformer", lambda *a, **k: vit(*a, **k | few))
    fewer = {"depths": (1, 1, 1, 1), "dims": (4, 8, 12, 16)}
    monkeypatch.setattr(convnext, "_create_convnext", lambda *a, **k: cnn(*a, **k | fewer))

    def file(encoder) -> Path:
        name = f"{encoder.model.pretrained_cfg['architecture']}.{encoder.model.pretrained_cfg['tag']}"
        path = tmp_path / f"{name}.safetensors"
        if not path.is_file():
            state = timm.create_model(name, num_classes=0).state_dict()
            save_file({k: 0.3 * torch.randn(v.shape, generator=generator(name, k)) for k, v in state.items()}, path)
        return path

    monkeypatch.setattr(TimmEncoder, "_hub_file", file)
    monkeypatch.setattr(metric_selection, "Inception", FewFeatures)
    return tmp_path


def pictures(count: int, name: str) -> torch.Tensor:
    coarse = torch.rand(count, 3, 8, 8, generator=generator(name)) * 255
    return F.interpolate(coarse, (256, 256), mode="bilinear").round().to(torch.uint8)


def as_in_the_reference_code(name: str, size: int, weights: Path, images: torch.Tensor) -> np.ndarray:
    """Vectors of images uint8 as fd_evaluator computes them, without autocast."""
    try:
        model = timm.create_model(name, num_classes=0, dynamic_img_size=True, dynamic_img_pad=True)
    except TypeError:
        model = timm.create_model(name, num_classes=0)
    from safetensors.torch import load_file

    model.load_state_dict(load_file(weights))
    model.eval()
    mean, std = (255 * torch.tensor(model.pretrained_cfg[key]).view(1, 3, 1, 1) for key in ("mean", "std"))
    x = images.float()
    if size != x.shape[-1]:
        x = F.interpolate(x, (size, size), mode="bicubic", align_corners=False, antialias=True)
    with torch.no_grad():
        features = model.forward_features((x - mean) / std)
        if features.ndim == 4:
            vectors = features.mean((2, 3))
        elif model.attn_pool is not None:
            vectors = model.attn_pool(features)
        else:
            vectors = features[:, 0]
    return vectors.double().numpy()


def frechet(a: np.ndarray, b: np.ndarray) -> float:
    c1, c2 = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    root_trace = np.sqrt(np.linalg.eigvals(c1 @ c2).astype(complex)).real.sum()
    return ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(c1 + c2) - 2 * root_trace


@pytest.mark.parametrize("member", MEMBERS, ids=lambda m: m.label)
def test_the_vectors_are_those_of_the_reference_code(small, member):
    name, size, _, divisor = CATALOG[member.label]
    (m,) = metric_selection.make_networks([], [member.encoder], "", 256, torch.device("cpu"))
    images = pictures(3, "few")
    found = m.network(images)["embedding"].double().numpy()
    expected = as_in_the_reference_code(name, size, small / f"{name}.safetensors", images)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5 * np.abs(expected).max())
    assert member.divisor == divisor and expected.std() > 0.01
    assert np.abs(expected - expected.mean(0)).max() > 1e-3, "they depend on the image"


def test_the_models_have_their_published_sizes():
    assert [m.label for m in MEMBERS] == list(CATALOG)
    for member in MEMBERS:
        spec = EncoderSpec.parse(member.encoder)
        with torch.device("meta"):
            encoder = metric_selection.make_plugin(
                "encoder", "encoder", metric_selection.PluginTable(name=spec.name, **spec.options), 256, spec.grid
            )
        assert encoder.embed_dim == CATALOG[member.label][2]


@pytest.mark.long
def test_the_whole_command_in_one_pass(small, monkeypatch):
    """All distances and FDr6, from images, from saved moments and from one file per network."""
    reads: list[int] = []
    read = ImageFiles.__getitem__
    monkeypatch.setattr(ImageFiles, "__getitem__", lambda self, i: (reads.append(i), read(self, i))[1])
    vectors: dict[str, list[np.ndarray]] = {}
    for side in ("samples", "reference"):
        (small / side).mkdir()
        images = pictures(COUNT, side)
        for i, image in enumerate(images):
            PIL.Image.fromarray(image.permute(1, 2, 0).numpy()).save(small / side / f"{i:03d}.png")
        vectors.setdefault("fid", []).append(FewFeatures()(images)["pool"].double().numpy())
        metric_selection.make_networks([], [m.encoder for m in MEMBERS], "", 256, "cpu")  # writes the files
        for label, (name, size, *_) in CATALOG.items():
            found = as_in_the_reference_code(name, size, small / f"{name}.safetensors", images)
            vectors.setdefault(f"fd_{label}", []).append(found)

    def evaluate(*words) -> dict[str, float]:
        output = small / "out.json"
        command = ["evaluate", small / "samples", "--metrics=fdr6", f"--output={output}", "--batch-size=9", *words]
        assert main([str(word) for word in command]) == 0
        return json.loads(output.read_text())["metrics"]

    values = evaluate("--reference", small / "reference")
    assert set(values) == {*vectors, "fdr6"}
    for name, sides in vectors.items():
        assert values[name] == pytest.approx(frechet(*sides), rel=1e-3), name
    divisors = {"fid": 1.68} | {f"fd_{label}": row[-1] for label, row in CATALOG.items()}
    assert values["fdr6"] == pytest.approx(np.mean([values[name] / d for name, d in divisors.items()]), rel=1e-12)
    # Batches read ahead compare with the size of image 0: once a pass.
    assert sorted(reads) == sorted([*range(COUNT)] * 2 + [0] * (len(reads) - 2 * COUNT)) and len(reads) <= 2 * COUNT + 8

    kept = small / "kept.npz"
    save = ["--reference", small / "reference", "--metrics=fdr6", "--batch-size=9", "--save-statistics", kept]
    assert main(["evaluate", *map(str, save)]) == 0
    assert evaluate("--reference", kept) == values

    moments = []
    with np.load(kept) as file:
        for label in ("inception", *CATALOG):
            suffix = "" if label == "inception" else f"_{label}"
            start = "ref_" if label == "mae_l_cls" else ""  # another spelling in use
            stored = {f"{start}mu": file[f"mu{suffix}"], f"{start}sigma": file[f"sigma{suffix}"]}
            np.savez(small / f"{label}.npz", **stored)
            moments += ["--reference-moments", f"{label}={small}/{label}.npz"]
    wrong = small / "wrong.npz"
    np.savez(wrong, mu=np.zeros(3), sigma=np.eye(3))
    assert evaluate("--reference", wrong, *moments) == pytest.approx(values, rel=1e-12)


def test_weights_come_from_files(small, monkeypatch, capsys):
    (small / "samples").mkdir()
    for i, image in enumerate(pictures(14, "samples")):
        PIL.Image.fromarray(image.permute(1, 2, 0).numpy()).save(small / "samples" / f"{i:03d}.png")
    networks = metric_selection.make_networks(["fdr6"], [], "", 256, "cpu")  # writes the files
    files = [f"{label}={small}/{row[0]}.safetensors" for label, row in CATALOG.items()]

    def offline(encoder):
        raise WeightsError("no network")

    monkeypatch.setattr(TimmEncoder, "_hub_file", offline)
    found = metric_selection.make_networks(["fdr6"], [], "", 256, "cpu", files)
    assert [m.network.about for m in found[1:]] == [m.network.about for m in networks[1:]]
    evaluate = ["evaluate", str(small / "samples"), f"--reference={small}/samples"]
    for words, message in (
        (["--metrics=fdr6"], "FDr6: no network; or pass it by --encoder-weights=convnextv2_b=FILE"),
        (["--metrics=fdr6", "--encoder-weights=mae=x"], "FDr6 has no such encoder; did you mean 'mae_l_cls'?"),
        (["--metrics=fdr6", "--encoder-weights=mae_l_cls=no.pt"], "expected LABEL=FILE with an existing file"),
        (["--metrics=fid", f"--encoder-weights={files[0]}"], "is for --metrics=fdr6; of others: --encoder"),
    ):
        assert main([*evaluate, *words]) == 2
        assert message in capsys.readouterr().err


def test_moments_of_another_network_are_refused(small, capsys):
    (small / "samples").mkdir()
    for i, image in enumerate(pictures(14, "samples")):
        PIL.Image.fromarray(image.permute(1, 2, 0).numpy()).save(small / "samples" / f"{i:03d}.png")
    np.savez(small / "wrong.npz", mu=np.zeros(3), sigma=np.eye(3))
    for words, message in (
        (["--reference", small / "wrong.npz", "--metrics=fid"], "holds moments of 3 features, but this network has 12"),
        (["--reference", small / "wrong.npz", "--metrics=mind"], "MIND needs reference images"),
        (["--reference", small / "samples", "--reference-moments=fid"], "expected LABEL=FILE"),
        (
            ["--reference", small / "samples", f"--reference-moments=mae_l={small}/wrong.npz", "--metrics=fid"],
            "--reference-moments=mae_l=...: no such network among those of the metrics; expected one of: inception",
        ),
    ):
        assert main(["evaluate", str(small / "samples"), *map(str, words)]) == 2
        assert message in capsys.readouterr().err
    assert main(["evaluate", f"--reference={small}/samples"]) == 2
    assert "SAMPLES is missing" in capsys.readouterr().err
