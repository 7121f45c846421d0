"""Every family of shipped configs trains the same with inductor, the backend of real runs, as in eager mode.

The networks are small, but keep the configs' proportions: images twice as wide as the tokenizer's first level has
channels, the same multipliers, patch sizes, alignment depths and heads. Compilation takes minutes, so these tests are
marked slow.
"""

import pytest
import torch

from components.registry import discover
from tests.support import ROOT
from tests.support.compiled import assert_learns_alike, learn
from trainer import config

discover("plugins")
TOKENIZER = ["--tokenizer.channels=32", "--training.resolution=64"]
DENOISER = ["--denoiser.width=96", "--denoiser.depth=2", "--denoiser.heads=2", "--denoiser.align_depth=1"]
ALIGNED = ["--encoders.dinov2.size=s", "--losses.cosine.head_width=32"]
HEAD = ["--denoiser.head_width=96", "--denoiser.head_depth=1", "--denoiser.head_heads=2"]
FAMILIES = {
    "repae_sit_xl": [*TOKENIZER, *DENOISER, *ALIGNED],
    "repae_sit_xl_invae": [*TOKENIZER, *DENOISER, *ALIGNED],
    "repae_lightningdit_xl_vavae": [*TOKENIZER, *DENOISER, *ALIGNED],
    "repae_ditdh_xl_vavae": [*TOKENIZER, *DENOISER, *ALIGNED, *HEAD],
    "naive_e2e_sit_xl": [*TOKENIZER, *DENOISER],
    "repa_sit_xl": [*TOKENIZER, *DENOISER, *ALIGNED],
    "irepa_sit_xl": [*TOKENIZER, *DENOISER, "--encoders.dinov2.size=s"],
    "reg_sit_xl": [*TOKENIZER, *DENOISER, *ALIGNED, "--denoiser.class_token_dim=384"],
    "sra_sit_xl": [*TOKENIZER, *DENOISER, "--denoiser.align_depth=[1,2]"],
    "sit_xl": [*TOKENIZER, *DENOISER],
    "quickstart": ["--training.batch_size=2"],
    "rae_decoder_shapes": ["--training.batch_size=2"],
    "rae_decoder_dino_gan_shapes": ["--losses.dino_gan.start_step=0", "--losses.dino_gan.warmup_steps=0"],
    "meanflow_shapes": ["--training.batch_size=2", "--recipe.omega=0.8", "--recipe.kappa=0.5"],
}


def load(name: str) -> config.Config:
    options = ["--training.precision=fp32", "--training.batch_size=2", "--training.num_classes=10"]
    # Adam turns the rounding of gradients that are zero in theory into full-size steps: keep these small.
    rates = [f"--optimizer.{group}lr=1e-6" for group in ("", "tokenizer.", "discriminator.", "denoiser.")]
    options += [*rates, "--optimizer.schedule=constant", "--optimizer.warmup_steps=0"]
    return config.load(str(ROOT / f"train_configs/{name}.toml"), [*options, *FAMILIES[name]])


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_compiled_trains_as_eager(name):
    torch._dynamo.reset()
    assert_learns_alike(learn(load(name), None), learn(load(name), "inductor"))
