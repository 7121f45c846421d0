"""Image grids of a run: reconstructions and latents of fixed images, and samples from fixed noise."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from components.contracts import Modules
from components.data.pixels import bounded, to_float
from components.diffusion.image_sampler import ImageSampler, SamplingPlan
from components.diffusion.samplers import Guidance
from components.distributed.parallel import World, gather_rows
from components.monitor.latent_statistics import principal_components
from components.nn.precision import parameter_dtype
from components.optim.ema import Ema
from trainer.config import Config, check_table
from trainer.run.first_use import checked
from trainer.run.parts import Parts

COLUMNS = 10
AT_ONCE = 64  # images per call of the sampler; bounds memory
MAX_RECONSTRUCTIONS = 20


def averaged(parts: Parts, ema: Ema | None, name: str):
    """EMA copy of a module if there is one, otherwise the module itself."""
    return ema.modules[name] if ema is not None and name in ema.modules else parts.modules.named()[name]


def sampling_plan(config: Config, seed: int, options: Mapping[str, Any] | None = None) -> SamplingPlan:
    """Sampling settings: [sampling] of the config, overridden by command-line options.

    Args:
        config: of the run.
        seed: of the noise.
        options: options by name; those that are None or not in [sampling] are ignored.

    Raises:
        ConfigError: the value of an option is invalid.
    """
    s = config.sampling
    given = {
        name: value for name, value in (options or {}).items() if name in type(s).model_fields and value is not None
    }
    s = check_table(type(s), s.model_dump() | given, "--") if given else s
    guidance = Guidance(s.guidance, s.guidance_low, s.guidance_high, s.guidance_kind)
    return SamplingPlan(s.method, s.steps, guidance, seed, s.shift)


class Stoppable:
    """A denoiser that asks before each evaluation whether to go on.

    Args:
        denoiser: evaluates.
        check_stop: raises to stop.
    """

    def __init__(self, denoiser: Any, check_stop: Callable[[], None]) -> None:
        self._denoiser, self._check_stop = denoiser, check_stop

    def __call__(self, *inputs: Any, **options: Any) -> Any:
        self._check_stop()
        return self._denoiser(*inputs, **options)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._denoiser, name)


def image_sampler(
    config: Config, parts: Parts, ema: Ema | None, check_stop: Callable[[], None] | None = None
) -> ImageSampler:
    """Sampler with the settings of [sampling] and the averaged weights; ``check_stop`` may raise between its steps."""
    plan = sampling_plan(config, config.training.seed)
    networks = {name: averaged(parts, ema, name) for name in ("denoiser", "latent_norm", "tokenizer")}
    m = checked(Modules(**networks, flow=parts.modules.flow), parts.places)
    sampler = ImageSampler(plan, parts.recipe, m, parts.latent)
    if check_stop is not None:
        sampler.denoiser = Stoppable(sampler.denoiser, check_stop)
    return sampler


def sample_images(
    config: Config,
    parts: Parts,
    ema: Ema | None,
    world: World,
    count: int,
    check_stop: Callable[[], None] | None = None,
) -> tuple[Tensor, Tensor]:
    """Sample images (count, 3, R, R) in [-1, 1], cycling through the classes; returns them and labels (count,).

    The noise is the same at every step of a run. Collective: every rank samples a share, makes the same number of
    calls, since all ranks gather sharded weights together, and returns all images.
    """
    sampler = image_sampler(config, parts, ema, check_stop)
    share = -(-count // world.size)
    ids = torch.arange(world.rank * share, (world.rank + 1) * share, device=world.device)
    chunks = ids.split(AT_ONCE)
    images = torch.cat([sampler(chunk.tolist(), parts.sampling_condition(chunk)) for chunk in chunks])
    # Images beyond the count exist only so that all ranks make the same calls.
    return gather_rows(images)[:count], parts.balanced_labels(torch.arange(count, device=world.device))


@torch.no_grad()
def reconstruct(parts: Parts, ema: Ema | None, images: Tensor) -> tuple[Tensor, Tensor]:
    """Posterior means (B, C, h, w) of images (B, 3, R, R) in [-1, 1], and the images decoded from them (or NaN)."""
    tokenizer = checked(Modules(tokenizer=averaged(parts, ema, "tokenizer")), parts.places).tokenizer
    means = tokenizer.encode(images.to(parameter_dtype(tokenizer))).mean
    return means, bounded(tokenizer.decode(means).float())


def fixed_images(parts: Parts, device: torch.device) -> Tensor:
    """First images of the dataset, (B, 3, R, R) in [-1, 1]; requires ``parts.images``."""
    count = min(MAX_RECONSTRUCTIONS, len(parts.images))
    images = torch.stack([parts.images[i].image for i in range(count)])
    return to_float(images.to(device))


def grid(images: Tensor, columns: int = COLUMNS) -> Tensor:
    """Arrange images (B, 3, R, R) in [-1, 1] in a grid (3, H, W) in [0, 1]."""
    from torchvision.utils import make_grid

    return make_grid(images.float().cpu().clamp(-1, 1) * 0.5 + 0.5, nrow=columns, padding=2, pad_value=1.0)


def in_rows(*kinds: Tensor) -> Tensor:
    """Grid of several image batches (B, 3, R, R) in [-1, 1], with corresponding rows below each other."""
    rows = [row for rows in zip(*(images.float().cpu().split(COLUMNS) for images in kinds)) for row in rows]
    return grid(torch.cat(rows), columns=min(COLUMNS, len(kinds[0])))


def in_colors(latents: Tensor, side: int) -> Tensor:
    """First three principal components of latents (B, C, h, w), as images (B, 3, side, side) in [-1, 1]."""
    colors = principal_components(latents.cpu())
    return F.interpolate(colors, size=(side, side), mode="nearest-exact") * 2 - 1


def save_png(picture: Tensor, path: Path) -> None:
    from torchvision.utils import save_image

    path.parent.mkdir(parents=True, exist_ok=True)
    save_image(picture, path)
