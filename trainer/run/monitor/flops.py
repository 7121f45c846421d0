"""FLOPs of training per image, as used for MFU."""

from __future__ import annotations

import logging
import time
from collections.abc import Collection

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from components.contracts import Batch, LossTerm, Posterior
from components.diffusion.random_numbers import placeholders
from components.distributed.parallel import World
from components.latent_cache.dataset import CachedEncoder
from components.monitor.flops import FlopCounter
from components.nn import batch_norm
from trainer.config import Config
from trainer.run.construct import trained_modules
from trainer.run.parts import Parts
from trainer.run.prepare import CONVOLUTIONAL, image_format

logger = logging.getLogger("titanrepa")


def flops_per_image(config: Config, parts: Parts, cached: Collection[str] | None = None, world_size: int = 1) -> int:
    """FLOPs of a training step's forward and backward passes per image, without recomputation.

    Runs the recipe's step on fake tensors, without communication. The count equals that of ``python -m trainer check``
    without activation checkpointing. All losses are included, even those that start late or stop early.

    Args:
        parts: on the meta device (:meth:`Parts.on_meta`); they are given fake weights.
        cached: labels of the encoders whose features are cached, if the run reads cached latents; None: it reads
            images.
        world_size: ranks of the run; sharded weights keep their memory format, which affects how some attention is
            computed.

    Raises:
        Exception: of any type, if a plugin cannot run on fake tensors.
    """
    t, m = config.training, parts.modules
    size = 2  # batch size; a batch norm needs more than one value per channel
    counter = FlopCounter()
    learns = trained_modules(parts.recipe)
    layout = image_format(config, torch.device("cpu"))["memory_format"]
    for name, module in m.named().items():
        sharded = name.split(".")[0] in learns and (world_size > 1 or config.parallel.cpu_offload)
        if name.startswith(CONVOLUTIONAL) and not sharded:
            module.to(memory_format=layout)
    with FakeTensorMode(allow_non_fake_inputs=True), batch_norm.alone():
        for name, module in m.named().items():
            trained = name.split(".")[0] in learns
            module.to_empty(device="cpu").train(trained).requires_grad_(trained)
        never_stop(parts)
        random = placeholders(parts.random_numbers, size)
        images = torch.rand(size, 3, t.resolution, t.resolution).to(memory_format=layout)
        batch = Batch(images, parts.example_condition(size))
        if cached is not None:
            tokens = {k: torch.randn(size, m.denoiser.grid**2, m.encoders[k].embed_dim) for k in cached}
            posterior = Posterior.from_std(torch.randn(size, *parts.latent), torch.ones(size, *parts.latent))
            batch = batch._replace(posterior=posterior, features=tokens)
        with counter:
            parts.recipe.step(m, batch, random, _backward, t.steps - 1)
    return round(counter.flops / size)


def never_stop(parts: Parts) -> None:
    """Keep an alignment loss that stops early at full strength."""
    if parts.modules.alignment is not None:
        parts.modules.alignment.strength = lambda step: 1.0


def try_flops_per_image(config: Config, meta: Parts, parts: Parts, world: World) -> int | None:
    """FLOPs per image on rank 0; None on other ranks, and, with a log line, if they cannot be counted.

    Args:
        meta: on the meta device, as in :func:`flops_per_image`.
        parts: of the run, to see which encoders are cached.
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
        logger.info(f"not reporting TFLOP/s and MFU: a part cannot run on fake tensors ({_first_line(error)})")
        return None
    logger.info(f"{count / 1e9:,.4g} GFLOP per image in training, counted in {time.perf_counter() - start:.1f} s")
    return count


def _backward(group: str, terms: dict[str, LossTerm], **logged: Tensor) -> None:
    total = torch.stack([weight * value for weight, value in terms.values()]).sum()
    if total.requires_grad:
        total.backward()


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0][:200]}"
