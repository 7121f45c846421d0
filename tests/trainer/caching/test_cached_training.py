"""A run on cached latents matches the run on images, with the same random numbers; a mismatched cache is refused."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from components.distributed.parallel import World
from components.latent_cache.cache import LatentCache, read_index, write_json
from components.latent_cache.dataset import CachedDataset, CachedEncoder
from plugins.tokenizers.autoencoder_kl import AutoencoderKL
from tests.support import toys
from trainer import config
from trainer.__main__ import main
from trainer.config import ConfigError
from trainer.run import assemble
from trainer.run.initial_statistics import prepare_latent_norm
from trainer.run.loop import Trainer

SIZE = 40


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """Configs, tokenizers and caches: `flip-fp32` and `flip-fp16` with mirrored copies and features, `plain-fp32`."""
    folder = tmp_path_factory.mktemp("second_stage")
    for seed, name in ((0, "tuned"), (1, "other")):
        torch.manual_seed(seed)
        tokenizer = AutoencoderKL(latent_channels=4, channels=8, multipliers=[1, 2, 2], norm_groups=4, res_blocks=1)
        save_file(tokenizer.state_dict(), folder / f"{name}.safetensors")
    text = toys.TOML.replace('name = "repae"', 'name = "repa"')
    text = text.replace("[tokenizer]", f'[tokenizer]\ncheckpoint = "{folder / "tuned.safetensors"}"')
    (folder / "toy.toml").write_text(text)
    for name, options in (
        ("flip-fp32", ["--flip", "--features", "--dtype=fp32"]),
        ("flip-fp16", ["--flip", "--features"]),
        ("plain-fp32", ["--dtype=fp32"]),
    ):
        encode = ["encode", str(folder / "toy.toml"), "--out", str(folder / name), "--shard-size=16", "--batch-size=8"]
        assert main([*encode, *options]) == 0
    return folder


def load(place: Path, *overrides: str) -> config.Config:
    return config.load(str(place / "toy.toml"), list(overrides))


def losses(place: Path, *overrides: str, world: World = World()) -> list[dict[str, float]]:
    """Losses of the first six steps, as the training loop receives them."""
    trainer = Trainer(load(place, *overrides), world)
    prepare_latent_norm(trainer.config, trainer.parts, world)
    with trainer._batches() as batches:
        steps = [trainer.train_step(step, trainer._micro_batches(batches)).read() for step in range(6)]
    return [{k: v for k, v in values.items() if k.startswith(("denoiser/", "grad_norm/"))} for values in steps]


def assert_close(a: list[dict[str, float]], b: list[dict[str, float]], relative: float) -> None:
    assert len(a) == len(b) == 6 and {"denoiser/velocity", "denoiser/align", "grad_norm/denoiser"} <= a[0].keys()
    for first, second in zip(a, b):
        assert first == pytest.approx(second, rel=relative)


@pytest.mark.long
def test_the_same_losses_as_on_images(place):
    """Six steps of eight images out of forty: into the second epoch, with mirrored images."""
    statistics = f"--latent_norm.statistics={place / 'flip-fp32' / 'latents-stats.safetensors'}"
    flip = [statistics, "--dataset.flip=true"]
    plain = losses(place, statistics)
    mirrored = losses(place, *flip)
    assert plain != mirrored

    def on_cache(name: str, *overrides: str) -> list[dict[str, float]]:
        return losses(place, f"--latent_cache.path={place / name}", *overrides)

    assert_close(on_cache("plain-fp32", statistics), plain, 1e-6)
    assert_close(on_cache("flip-fp32", *flip), mirrored, 1e-6)
    assert_close(on_cache("flip-fp32", *flip, "--latent_cache.features=false"), mirrored, 1e-6)
    halves = on_cache("flip-fp16", *flip)
    assert_close(halves, mirrored, 1e-3)
    assert halves != mirrored


@pytest.mark.long
def test_without_the_images_nothing_reads_them(tmp_path, monkeypatch):
    """With latents and features cached and the image files removed, training and its pictures need no image."""
    from PIL import Image

    for label in range(10):
        (tmp_path / "data" / str(label)).mkdir(parents=True)
        for i in range(2):
            Image.new("RGB", (40, 34), (25 * label, 90 * i, 7)).save(tmp_path / "data" / str(label) / f"{i}.png")
    text = toys.TOML.replace('name = "repae"', 'name = "repa"').replace("[dataset]\nname = \"shapes\"\nsize = 40", (
        f'[dataset]\nname = "image_folder"\npath = "{tmp_path / "data"}"'
    ))  # fmt: skip
    torch.manual_seed(0)
    tokenizer = AutoencoderKL(latent_channels=4, channels=8, multipliers=[1, 2, 2], norm_groups=4, res_blocks=1)
    save_file(tokenizer.state_dict(), tmp_path / "tuned.safetensors")
    (tmp_path / "toy.toml").write_text(
        text.replace("[tokenizer]", f'[tokenizer]\ncheckpoint = "{tmp_path / "tuned.safetensors"}"')
    )
    out = tmp_path / "latents"
    assert main(["encode", str(tmp_path / "toy.toml"), "--out", str(out), "--flip", "--features"]) == 0
    here = tmp_path / "run"
    options = [f"--latent_cache.path={out}", "--training.steps=1"]
    index = read_index(out)
    assert index["dataset"]["options"].pop("decoder") == "exact"  # as in a cache older than this option
    write_json(out / "index.json", index)
    with pytest.raises(ConfigError, match=r'options\.decoder: "exact" -> "fast"'):
        assemble.build(load(tmp_path, *options, "--dataset.decoder=fast"), World())
    expected = losses(tmp_path, *options)
    shutil.rmtree(tmp_path / "data")
    assert losses(tmp_path, *options) == expected
    trainer = Trainer(load(tmp_path, f"--run.dir={here}", *options), World())
    assert trainer.parts.images is None and isinstance(trainer.parts.modules.encoders["tiny_vit"], CachedEncoder)
    mean, std = LatentCache(out).statistics
    assert trainer.run()
    assert torch.equal(trainer.parts.modules.latent_norm.running_mean, mean.float())
    assert torch.equal(trainer.parts.modules.latent_norm.running_var, std.square().float())
    assert {p.name.split("_")[0] for p in (here / "images").iterdir()} == {"samples"}
    with pytest.raises(ConfigError, match="dataset image_folder"):
        assemble.build(load(tmp_path, *options, "--latent_cache.features=false"), World())


def test_the_two_sources_of_labels_must_agree(place):
    cache = LatentCache(place / "plain-fp32")
    dataset = assemble.build(load(place), World()).dataset
    mixed = CachedDataset(cache, dataset, flip=False, features=[])
    assert mixed[3].label == dataset[3].label and torch.equal(mixed[3].image, dataset[3].image)
    shifted = CachedDataset(cache, [dataset[i + 1] for i in range(SIZE - 1)], flip=False, features=[])
    with pytest.raises(Exception, match="image 3 has label 3 in the cache and 4 in the dataset"):
        shifted[3]


REFUSED = [
    (
        "flip-fp32",
        ["--tokenizer.checkpoint={place}/other.safetensors"],
        ["another tokenizer", "toy.toml", "other.safetensors", "sha256", "tokenizer.checkpoint"],
    ),
    ("plain-fp32", ["--dataset.flip=true"], ["no mirrored copies", "--flip", "flip = false"]),
    ("plain-fp32", ["--dataset.size=80"], ["another dataset", "options.size: 40 -> 80"]),
    ("plain-fp32", ["--dataset.seed=7"], ["another dataset", "options.seed: 0 -> 7"]),
    ("plain-fp32", ["--training.resolution=64"], ["resolution: 32 -> 64"]),
    ("flip-fp32", ["--denoiser.patch_size=4"], ["'tiny_vit'", "another encoder", "shape: [16, 96] -> [4, 96]"]),
    ("flip-fp32", ["--encoders.tiny_vit.checkpoint={place}/vit.safetensors"], ["'tiny_vit'", "weights sha256"]),
    ("nowhere", [], ["latent_cache.path", "does not exist", "trainer encode"]),
]  # fmt: skip


@pytest.mark.parametrize(("name", "overrides", "says"), REFUSED, ids=[f"{r[0]} {' '.join(r[1])}" for r in REFUSED])
def test_a_cache_of_something_else_is_refused(place, name, overrides, says):
    if not (place / "vit.safetensors").exists():
        from plugins.encoders.tiny_vit import TinyViT

        save_file(TinyViT(32, 4).state_dict(), place / "vit.safetensors")
    given = [override.format(place=place) for override in overrides]
    with pytest.raises(ConfigError) as error:
        assemble.build(load(place, f"--latent_cache.path={place / name}", *given), World())
    for text in says:
        assert text in str(error.value)


def test_other_images_under_the_same_names_are_refused(place, monkeypatch):
    from plugins.datasets.shapes import Shapes

    paint = Shapes._paint
    monkeypatch.setattr(Shapes, "_paint", lambda self, u, coverage: 255 - paint(self, u, coverage))
    with pytest.raises(ConfigError, match="differ from those of the dataset"):
        assemble.build(load(place, f"--latent_cache.path={place / 'plain-fp32'}"), World())


@pytest.mark.parametrize("recipe", ["repae", "naive_e2e", "tokenizer"])
def test_recipes_that_train_the_tokenizer_refuse_a_cache(place, recipe):
    with pytest.raises(ConfigError) as error:
        assemble.check(load(place, f"--latent_cache.path={place / 'plain-fp32'}", f"--recipe.name={recipe}"), 1)
    for text in ("latent_cache.path", recipe, "trains the tokenizer", "ldm, meanflow, repa, sra"):
        assert text in str(error.value)


def test_a_widened_tokenizer_is_the_same_tokenizer(place):
    overrides = ["--training.precision=fp64", f"--latent_cache.path={place / 'plain-fp32'}"]
    assert isinstance(assemble.build(load(place, *overrides), World()).dataset, CachedDataset)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_the_same_losses_on_a_gpu(place):
    """A cache made on a CPU against images encoded on the GPU, to GPU rounding."""
    gpu = World(device=torch.device("cuda", 0))
    options = [f"--latent_norm.statistics={place / 'flip-fp32' / 'latents-stats.safetensors'}", "--dataset.flip=true"]
    options += ["--training.tf32=false", "--loader.workers=2"]
    cached = losses(place, f"--latent_cache.path={place / 'flip-fp32'}", *options, world=gpu)
    assert_close(cached, losses(place, *options, world=gpu), 1e-3)
