"""SiT and the samplers against numbers recorded from the published REPA-E code (tests/data/published_sit.npz).

The recording ran in float64 at a tiny size: width 64, depth 4, 4 heads, latents 4 x 8 x 8, ten classes. The file holds
the initial weights and inputs, the outputs of the denoiser for each path and time distribution, and the samples drawn
with the weights after three training steps (stored as differences from the initial ones, in 12 bits).
"""

import numpy as np
import pytest
import torch

from components.contracts import Condition, Denoiser, LatentShape
from components.diffusion.flow import Flow
from components.diffusion.samplers import Guidance, sample_ode, sample_sde
from components.nn.latent_norm import LatentNorm
from plugins.denoisers.sit import SiT, sincos_positions
from plugins.losses.cosine import Cosine
from tests.support import DATA

RECORDED = {key: torch.from_numpy(value) for key, value in np.load(DATA / "published_sit.npz").items()}
LATENT = LatentShape(4, 8, 8)


def part(prefix: str) -> dict[str, torch.Tensor]:
    return {key[len(prefix) :]: value for key, value in RECORDED.items() if key.startswith(prefix)}


def published_modules(trained: bool):
    """Denoiser, heads and latent norm with the recorded weights, loaded by the published names."""
    state = {key: value.double() for key, value in part("init/").items()}
    if trained:
        for key, delta in part("delta/").items():
            state[key] = state[key] + delta * RECORDED[f"scale/{key}"]
    state["pos_embed"] = sincos_positions(64, 4).double()
    denoiser = SiT(LATENT, 10, width=64, depth=4, heads=4, patch_size=2, align_depth=2).double()
    heads = Cosine(head_width=128).make_heads(64, [32], 4).double()
    norm = LatentNorm(4).double()
    denoiser.load_state_dict({k: v for k, v in state.items() if not k.startswith(("bn.", "projectors."))})
    heads.load_state_dict({k.removeprefix("projectors."): v for k, v in state.items() if k.startswith("projectors.")})
    norm.load_state_dict({k.removeprefix("bn."): v for k, v in state.items() if k.startswith("bn.")})
    return denoiser, heads, norm


def close(ours: torch.Tensor, recorded: torch.Tensor, tolerance: float) -> None:
    recorded = recorded.double().reshape(ours.shape)
    assert ((ours - recorded).abs().max() / recorded.abs().max()).item() < tolerance


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("time", ["uniform", "lognormal"])
@pytest.mark.parametrize("path", ["linear", "cosine"])
def test_denoiser_path_and_alignment(path, time, mode):
    recorded = part(f"variants/{path}/{time}/{mode}/")
    denoiser, heads, norm = published_modules(trained=False)
    flow = Flow(path, time)
    draw = recorded["time_draw"].double().flatten()
    t = flow.times(draw if time == "uniform" else torch.special.ndtr(draw))
    close(t, recorded["time_input"], 1e-12)

    x = RECORDED["variants/x"].double()
    point = flow.sample(norm.batch(x) if mode == "train" else norm(x), t, RECORDED["variants/noise"])
    # In training mode the recording also dropped labels at random; the alignment pass never does.
    out = denoiser(point.x_t, t, Condition(RECORDED["variants/labels"]))
    close(norm.running_mean, recorded["bn_running_mean"], 1e-12)
    close(norm.running_var, recorded["bn_running_var"], 1e-12)
    if mode == "eval":
        close(out.velocity.flatten()[::8], recorded["model_output"], 1e-9)
        close((out.velocity - point.velocity).square().mean(dim=(1, 2, 3)), recorded["denoising_loss"], 1e-9)
        aligned = Cosine().align([heads[0](out.tokens)], [RECORDED["variants/target"].double()])
        close(aligned, recorded["proj_loss"], 1e-9)


INTERVAL = {"low": 0.1, "high": 0.7}


@pytest.mark.parametrize(
    ("name", "kind", "options"),
    [
        ("euler_cfg1", "ode", {}),
        ("euler_cfg2", "ode", {"guidance": Guidance(2.0, **INTERVAL)}),
        ("euler_cfg2_full", "ode", {"guidance": Guidance(2.0)}),
        ("heun_cfg1", "ode", {"heun": True}),
        ("heun_cfg2_full", "ode", {"heun": True, "guidance": Guidance(2.0)}),
        ("sde_cfg1", "sde", {"flow": Flow()}),
        ("sde_cfg2", "sde", {"flow": Flow(), "guidance": Guidance(2.0, **INTERVAL)}),
        ("sde_cfg1_cosine", "sde", {"flow": Flow("cosine")}),
    ],
)
def test_samplers(name, kind, options):
    denoiser, _, _ = published_modules(trained=True)
    noise, labels = RECORDED["sampling/noise"].double(), Condition(RECORDED["sampling/labels"])
    if kind == "ode":
        z = sample_ode(denoiser, noise, labels, steps=10, **options)
    else:
        z = sample_sde(
            denoiser, noise, labels, steps=10, step_noise=lambda i: RECORDED["sampling/sde_eps"][i], **options
        )
    close(z, RECORDED[f"sampling/{name}"], 1e-5)


def test_heun_guides_by_the_time_it_evaluates():
    """The published sampler tests t for both slopes of a step; this one tests each slope's own time."""
    seen = []

    class Spy(Denoiser):
        null_label = 10

        def forward(self, x, t, condition):
            seen.append((round(t[0].item(), 6), len(x) == 2))
            return type("Out", (), {"velocity": torch.zeros_like(x)})

    sample_ode(
        Spy(),
        torch.zeros(1, 4, 8, 8),
        Condition(torch.tensor([1])),
        steps=4,
        guidance=Guidance(2.0, 0.3, 0.6),
        heun=True,
    )
    assert seen and all(guided == (0.3 <= t <= 0.6) for t, guided in seen)
