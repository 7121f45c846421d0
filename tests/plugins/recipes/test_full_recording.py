"""Replays the full recording of the published code through the trainer's own step.

The recording (57 MB: weights, inputs, random numbers, losses, and weights after one and three steps, in float64) is too
large for this repository. To run this test, name its file:
TITANREPA_RECORDING=step.pt pytest -s tests/plugins/recipes/test_full_recording.py
"""

import os
import re

import pytest
import torch

from components.contracts import Batch, Condition, Encoder, LatentShape, Modules
from components.diffusion.flow import Flow
from components.diffusion.samplers import sample_ode
from components.nn.latent_norm import LatentNorm
from components.optim.ema import Ema
from components.optim.optimizer import ParameterGroup
from components.optim.schedule import Schedule
from plugins.denoisers.sit import SiT
from plugins.losses.cosine import Cosine
from plugins.losses.lpips import LPIPS
from plugins.losses.patchgan import PatchGAN
from plugins.losses.reconstruction import KL, L1
from plugins.optimizers.adamw import AdamW
from plugins.recipes.repae import RepaE
from plugins.tokenizers.autoencoder_kl import AutoencoderKL
from trainer.run.step import Step

PATH = os.environ.get("TITANREPA_RECORDING")
pytestmark = pytest.mark.skipif(PATH is None, reason="TITANREPA_RECORDING does not name the recording's file")
TOLERANCE = 1e-9
LOSSES = {
    "reconstruction_loss": "tokenizer/l1",
    "perceptual_loss": "tokenizer/lpips",
    "kl_raw_per_batch": "tokenizer/kl",
    "gan_loss": "tokenizer/gan",
    "vae_align_proj_loss": "tokenizer/align",
    "vae_loss": "tokenizer/loss",
    "d_loss": "discriminator/loss",
    "logits_real": "discriminator/logits_real",
    "logits_fake": "discriminator/logits_fake",
    "denoising_loss": "denoiser/velocity",
    "proj_loss": "denoiser/align",
    "sit_loss": "denoiser/loss",
    "grad_norm_vae": "grad_norm/tokenizer",
    "grad_norm_disc": "grad_norm/discriminator",
    "grad_norm_sit": "grad_norm/denoiser",
}


class Recorded(Encoder):
    embed_dim = 32

    def forward(self, images):
        return self.targets


def double(state: dict, prefix: str = "") -> dict:
    return {k.removeprefix(prefix): v.double() for k, v in state.items() if k.startswith(prefix)}


def denoiser_part(state: dict) -> dict:
    return {k: v for k, v in state.items() if not k.startswith(("bn.", "projectors."))}


def load_lpips(recorded: dict) -> LPIPS:
    state = {k: v["sign"].double() * v["scale"] if isinstance(v, dict) else v.double() for k, v in recorded.items()}
    named = {}
    for key, value in state.items():
        if match := re.match(r"lpips\.net\.slice\d\.(\d+\.\w+)", key):
            named[f"features.{match[1]}"] = value
        elif match := re.match(r"lpips\.lin(\d)\.model\.1\.weight", key):
            named[f"linear.{match[1]}.weight"] = value
    lpips = LPIPS(input_range="published").double()
    lpips.load_state_dict(named)
    lpips.shift.copy_(state["lpips.scaling_layer.shift"])
    lpips.scale.copy_(state["lpips.scaling_layer.scale"])
    return lpips.requires_grad_(False)


def agree(ours: dict, recorded: dict, what: str) -> float:
    """Check and return the largest difference relative to each tensor's scale, except where theory says zero."""
    worst = 0.0
    for key, value in recorded.items():
        own = ours[key].double().detach()
        if isinstance(value, dict):
            own, value = own.flatten()[:: value["stride"]][:512], value["sample"]
        scale = value.double().abs().max().item()
        if value.numel() and scale > 1e-12:
            worst = max(worst, (own - value.double()).abs().max().item() / scale)
    assert worst < TOLERANCE, f"{what}: {worst}"
    return worst


def test_three_steps_and_the_samples_behind_them():
    g = torch.load(PATH, weights_only=True)
    sit = g["init"]["sit"]
    m = Modules(
        tokenizer=AutoencoderKL(latent_channels=4, channels=32, multipliers=[1, 2, 2, 2]).double(),
        denoiser=SiT(LatentShape(4, 8, 8), 10, width=64, depth=4, heads=4, align_depth=2).double(),
        latent_norm=LatentNorm(4).double(),
        encoders={"recorded": Recorded()},
        reconstruction={"l1": L1(), "lpips": load_lpips(g["init"]["perceptual"]), "kl": KL()},
        discriminator=PatchGAN().double(),
        alignment=Cosine(head_width=128),
        flow=Flow(),
    )
    m.heads = m.alignment.make_heads(64, [32], 4).double()
    m.tokenizer.load_state_dict(double(g["init"]["vae"]))
    m.denoiser.load_state_dict(double(denoiser_part(sit)))
    m.heads.load_state_dict(double(sit, "projectors."))
    m.latent_norm.load_state_dict(double(sit, "bn."))
    m.discriminator.network.load_state_dict(double(g["init"]["discriminator"]))
    groups = {
        name: ParameterGroup(name, {part: getattr(m, part) for part in parts}, AdamW, schedule=Schedule(1e-4))
        for name, parts in RepaE.trains.items()
    }
    ema = Ema({"denoiser": m.denoiser, "heads": m.heads, "latent_norm": m.latent_norm}, 0.9999)
    step = Step(RepaE(), m, groups, ema=ema, accumulation=1, autocast_dtype=None,
                device=torch.device("cpu"))  # fmt: skip

    def published(modules) -> dict:
        heads = {f"projectors.{k}": v for k, v in modules["heads"].state_dict().items()}
        norm = {f"bn.{k}": v for k, v in modules["latent_norm"].state_dict().items()}
        return modules["denoiser"].state_dict() | heads | norm

    differences = {}
    for k in range(3):
        batch, drawn = g["batches"][k], g["draws"][k]
        m.encoders["recorded"].targets = batch["zs"][0].double()
        normal = {"posterior": drawn["posterior_noise"].double(), "noise": drawn["noise"].double()}
        draws = normal | {"time": drawn["time"].double().flatten(), "label": drawn["label_drop_u"].double().flatten()}
        images = batch["raw_image"].double() / 127.5 - 1
        record = step(k, [(Batch(images, Condition(batch["labels"])), draws)])
        read = record.read()
        for theirs, ours in LOSSES.items():
            difference = abs(read[ours] / float(g["losses"][k][theirs]) - 1)
            assert difference < TOLERANCE, f"step {k + 1}: {theirs}: {difference}"
            differences["losses and norms"] = max(differences.get("losses and norms", 0.0), difference)
        if f"after_{k + 1}" in g:
            after = g[f"after_{k + 1}"]
            found = {
                "vae": agree(m.tokenizer.state_dict(), after["vae"], "tokenizer"),
                "gan": agree(m.discriminator.network.state_dict(), after["discriminator"], "discriminator"),
                "sit": agree(published(vars(m)), after["sit"], "denoiser"),
                "ema": agree(published(ema.modules), after["ema"], "EMA"),
            }
            differences |= {name: max(value, differences.get(name, 0.0)) for name, value in found.items()}
    s = g["sampling"]
    z = sample_ode(m.denoiser, s["noise"], Condition(s["labels"]), steps=s["num_steps"])
    differences["samples"] = agree({"z": z}, {"z": s["euler_cfg1"]}, "samples")
    print(differences)
