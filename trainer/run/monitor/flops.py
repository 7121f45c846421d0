"""The floating-point operations of one image in training: what MFU is a fraction of."""

from __future__ import annotations

import logging
import time
from collections.abc import Collection

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from components.contracts import Batch, Draws, Posterior, Weighted
from components.distributed.parallel import World
from components.latent_cache.dataset import CachedEncoder
from components.monitor.flops import FlopCounter
from components.nn import batch_norm
from trainer.config import Config
from trainer.run.assemble import trained_modules
from trainer.run.parts import Parts
from trainer.run.prepare import CONVOLUTIONAL, image_format

logger = logging.getLogger("titanrepa")


def flops_per_image(config: Config, parts: Parts, cached: Collection[str] | None = None, world_size: int = 1) -> int:
    """Operations of a training step's forward and backward passes per image, nothing recomputed.

    The recipe's own step runs on tensors without data, on this process alone whatever the process group: the same
    count as that of ``python -m trainer check`` without activation checkpointing. Every loss takes part, also one that
    starts late or stops early.

    Args:
        parts: on the meta device, as :func:`trainer.run.assemble.check` makes them; they get fake weights.
        cached: the run reads its latents from a cache, and the features of these encoders; None: it reads images.
        world_size: ranks of the run; sharded weights keep their layout, which decides how some attention is computed.

    Raises:
        Exception: of whatever kind, where a plugin cannot run on tensors without data.
    """
    t, m = config.training, parts.modules
    size = 2  # of the batch; a batch norm needs more than one value per channel
    counter = FlopCounter()
    learns = trained_modules(parts.recipe)
    layout = image_format(config)["memory_format"]
    for name, module in m.named().items():
        sharded = name.split(".")[0] in learns and (world_size > 1 or config.parallel.cpu_offload)
        if name.startswith(CONVOLUTIONAL) and not sharded:
            module.to(memory_format=layout)
    with FakeTensorMode(allow_non_fake_inputs=True), batch_norm.alone():
        for name, module in m.named().items():
            trained = name.split(".")[0] in learns
            module.to_empty(device="cpu").train(trained).requires_grad_(trained)
        never_stop(parts)
        draws = Draws(
            torch.randn(size, *parts.latent), torch.randn(size, *parts.latent), torch.rand(size), torch.rand(size),
            torch.randn(size, parts.extra_dim),
        )  # fmt: skip
        images = torch.rand(size, 3, t.resolution, t.resolution).to(memory_format=layout)
        batch = Batch(images, torch.zeros(size, dtype=torch.int64))
        if cached is not None:
            tokens = {k: torch.randn(size, m.denoiser.grid**2, m.encoders[k].embed_dim) for k in cached}
            posterior = Posterior.from_std(torch.randn(size, *parts.latent), torch.ones(size, *parts.latent))
            batch = batch._replace(posterior=posterior, features=tokens)
        with counter:
            parts.recipe.step(m, batch, draws, _backward, t.steps - 1)
    return round(counter.flops / size)


def never_stop(parts: Parts) -> None:
    """Leaves an alignment loss that stops early at full strength."""
    if hasattr(parts.modules.alignment, "strength"):
        parts.modules.alignment.strength = lambda step: 1.0


def try_flops_per_image(config: Config, meta: Parts, parts: Parts, world: World) -> int | None:
    """The same for a run, which goes on where it cannot be had; logs how long it took, or why. Rank 0 alone counts.

    Args:
        meta: as above.
        parts: of the run.
    """
    if not world.is_main:
        return None
    start = time.perf_counter()
    cached = None
    if config.latent_cache.path:
        cached = [label for label, encoder in parts.modules.encoders.items() if isinstance(encoder, CachedEncoder)]
    try:
        count = flops_per_image(config, meta, cached, world.size)
    except Exception as error:
        logger.info(f"no TFLOP/s and no MFU: a part cannot run on tensors without data ({_first_line(error)})")
        return None
    logger.info(f"{count / 1e9:,.4g} GFLOP per image in training, counted in {time.perf_counter() - start:.1f} s")
    return count


def _backward(group: str, terms: dict[str, Weighted], **extra: Tensor) -> None:
    total = torch.stack([weight * value for weight, value in terms.values()]).sum()
    if total.requires_grad:
        total.backward()


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0][:200]}"
