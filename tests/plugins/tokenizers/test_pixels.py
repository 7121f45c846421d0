"""Diffusion on pixels: `identity` trains, resumes, samples and is cached like any tokenizer; training it is refused."""

import pytest
import torch

from components.files.model_file import read_part
from plugins.tokenizers.identity import Identity
from tests.support import toys
from trainer import config
from trainer.__main__ import main
from trainer.config import ConfigError
from trainer.run import assemble

HEAD, REST = toys.TOML.split("[tokenizer]\n")
TOML = (HEAD + '[tokenizer]\nname = "identity"\n\n' + REST[REST.index("[denoiser]") :]).replace(
    'name = "sit"\n', 'name = "sit"\npatch_size = 4\n'
)


@pytest.fixture(scope="module")
def toml(tmp_path_factory):
    path = tmp_path_factory.mktemp("pixels") / "toy.toml"
    path.write_text(TOML)
    return path


def test_images_come_back_bit_for_bit():
    x = torch.rand(2, 3, 8, 8, dtype=torch.float64) * 2 - 1
    posterior = Identity().encode(x)
    assert torch.equal(Identity().decode(posterior.mean), x)
    assert (posterior.sample(torch.randn_like(x)) - x).abs().max() < 2e-6
    assert Identity().encode(x.bfloat16()).mean.dtype == torch.float32


@pytest.mark.long
def test_trains_resumes_samples_exports_and_caches(toml, tmp_path):
    run, options = tmp_path / "run", ["--recipe.name=ldm", "--training.steps=2", "--sampling.every=2"]
    assert main(["train", str(toml), f"--run.dir={run}", *options]) == 0
    assert (run / "images").is_dir() and len(list((run / "checkpoints").glob("step_*"))) == 1
    assert main(["train", str(toml), f"--run.dir={run}", *options, "--training.steps=3"]) == 0
    assert "step 3 of 3" in (run / "log.txt").read_text() and (run / "log.txt").read_text().count("step 2 of") == 1
    assert main(["export", str(run), "--format=safetensors", f"--out={tmp_path}/model"]) == 0
    assert "running_mean" in read_part(tmp_path / "model" / "latent_norm.safetensors")[0]
    words = ["--num-samples=2", "--steps=2", f"--out={tmp_path}/samples"]
    assert main(["sample", f"{tmp_path}/model", *words]) == 0
    assert len(list((tmp_path / "samples").glob("0*.png"))) == 2
    assert main(["encode", str(toml), "--recipe.name=ldm", f"--out={tmp_path}/cache"]) == 0
    cached = ["--recipe.name=ldm", "--training.steps=1", f"--latent_cache.path={tmp_path}/cache"]
    assert main(["train", str(toml), f"--run.dir={tmp_path}/second", *cached]) == 0


@pytest.mark.parametrize("recipe", ["repae", "naive_e2e", "tokenizer"])
def test_a_recipe_that_trains_the_tokenizer_is_refused_by_name(toml, recipe):
    with pytest.raises(ConfigError) as refusal:
        assemble.check(config.load(str(toml), [f"--recipe.name={recipe}"]), 1)
    for text in (f"recipe.name = '{recipe}'", "'identity' has nothing to train", "ldm", "repa"):
        assert text in str(refusal.value)
