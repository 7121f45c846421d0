"""Every shipped config parses, assembles on the meta device, and has the published hyperparameters."""

import json

import pytest

from tests.support import ROOT, toys
from trainer import config
from trainer.__main__ import main
from trainer.run import assemble

CONFIGS = sorted((ROOT / "train_configs").glob("*.toml"))


@pytest.fixture(autouse=True)
def at_the_root(monkeypatch):
    monkeypatch.chdir(ROOT)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_assembles_on_the_meta_device(path):
    loaded = config.load(str(path))
    parts = assemble.check(loaded, world_size=1)
    assert all(p.is_meta for module in parts.modules.named().values() for p in module.parameters())
    assert not parts.unused, "the file has tables that its recipe ignores"


PARAMETERS = {  # of the published modules, counted in their code
    "repae_sit_xl": {"tokenizer": 83_653_863, "denoiser": 674_816_272, "heads": 8_131_328, "discriminator": 2_765_633},
    "repae_sit_xl_invae": {"tokenizer": 69_836_067, "denoiser": 674_853_152},
    "repae_sit_xl_vavae": {"tokenizer": 69_836_067, "denoiser": 674_853_152},
    "reg_sit_xl": {"denoiser": 676_589_968, "heads": 8_131_328},
    "raev2_dinov3_l": {"denoiser": 875_216_244},
    "sra_sit_xl": {"denoiser": 674_816_272, "heads": 5_311_872, "copies.teacher": 674_816_272},
}  # fmt: skip


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameter_counts_are_the_published_ones(name):
    named = assemble.check(config.load(f"train_configs/{name}.toml"), 8).modules.named()
    for part, count in PARAMETERS[name].items():
        assert sum(p.numel() for p in named[part].parameters()) == count


def test_published_hyper_parameters():
    c = config.load("train_configs/repae_sit_xl.toml")
    assert (c.training.steps, c.training.batch_size, c.training.resolution) == (400_000, 256, 256)
    for group in ("tokenizer", "discriminator", "denoiser"):
        o = c.optimizer.group(group)
        assert (o.lr, o.betas, o.weight_decay, o.eps, o.clip_norm) == (1e-4, [0.9, 0.999], 0.0, 1e-8, 1.0)
        assert o.schedule == "constant" and o.warmup_steps == 0
    assert c.ema.decay == 0.9999 and not c.ema.tokenizer
    assert (c.latent_norm.momentum, c.latent_norm.eps) == (0.1, 1e-4)
    assert (c.flow.path, c.flow.time) == ("linear", "uniform")
    m = assemble.check(c, 8).modules
    assert (m.denoiser.align_depth, m.denoiser.label_dropout, m.denoiser.null_label) == (8, 0.1, 1000)
    assert (m.alignment.tokenizer_weight, m.alignment.denoiser_weight, m.alignment.head_width) == (1.5, 0.5, 2048)
    weights = {name: loss.weight for name, loss in m.reconstruction.items()}
    assert weights == {"l1": 1.0, "lpips": 1.0, "kl": 1e-6} and m.discriminator.weight == 0.1
    assert m.reconstruction["lpips"].input_range == "published"


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_the_input_range_of_lpips_is_never_left_to_the_default(path):
    for loss in config.load(str(path)).losses.values():
        if loss.name == "lpips":
            published = "published" if path.stem.startswith(("repae_", "ablation_", "naive_")) else "unit"
            assert loss.options["input_range"] == published


def test_a_group_with_another_optimizer_inherits_the_options_that_it_has(tmp_path):
    c = config.load(
        "train_configs/quickstart.toml",
        [
            "--optimizer.denoiser={name = 'muon', momentum = 0.9}",
            "--optimizer.weight_decay=0.1",
            "--optimizer.eps=1e-6",
        ],
    )
    muon, adamw = c.optimizer.group("denoiser"), c.optimizer.group("tokenizer")
    assert (muon.name, muon.lr, muon.momentum, muon.nesterov) == ("muon", 2e-3, 0.9, True)
    assert muon.options["betas"] == [0.9, 0.99] and (muon.weight_decay, muon.eps) == (0.1, 1e-6)
    assert adamw.options == {"betas": [0.9, 0.99], "eps": 1e-6, "weight_decay": 0.1} and adamw.lr == 3e-4
    (tmp_path / "resolved.toml").write_text(c.to_toml())
    assert config.load(str(tmp_path / "resolved.toml"), [f"--run.dir={c.run.dir}"]).optimizer == c.optimizer


def test_a_replaced_optimizer_takes_its_options_with_it(tmp_path):
    (tmp_path / "muon.toml").write_text(toys.TOML + "[optimizer]\nname = 'muon'\nmomentum = 0.9\neps = 1e-6\n")
    c = config.load(str(tmp_path / "muon.toml"), ["--optimizer.name=adamw"])
    assert c.optimizer.options == {"eps": 1e-6}


@pytest.mark.parametrize("recipe", ["repae", "repa", "ldm", "naive_e2e", "tokenizer"])
def test_one_line_switches_the_recipe(recipe):
    parts = assemble.check(config.load("train_configs/repae_sit_xl.toml", [f"--recipe.name={recipe}"]), 1)
    used = {name.split(".")[0] for name in parts.modules.named()}
    assert used <= parts.recipe.uses


@pytest.mark.long
def test_missing_imagenet_says_what_to_get(capsys, tmp_path, monkeypatch):
    """The message names the data, the tokenizer and its discriminator, and how to get the data."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert main(["train", str(ROOT / "train_configs/repae_sit_xl.toml")]) == 2
    err = capsys.readouterr().err
    for text in (
        "data/imagenet/train",
        "n01440764",
        "sdvae-f8d4.pt",
        "latents-stats.pt",
        "discriminator",
        "encoders.dinov2",
        "checkpoint",
    ):
        assert text in err, f"{text} in:\n{err}"


def test_resolved_config_is_json_free_of_none():
    dumped = config.load("train_configs/repae_sit_xl.toml").model_dump(exclude_none=True)
    assert "null" not in json.dumps(dumped)
