"""The same training steps in plain PyTorch, as a typical hand-written loop: the baseline of all claims about speed.

Autocast around the forward passes, images in NCHW, `torch.compile` on whole modules, one optimizer step after the
other, EMA in a loop over parameters, and every metric read with `.item()`. Only the networks are the project's.

    python benchmarks/plain_step.py CONFIG --batch=16 --rounds=5 [--section.key=value ...]

times the project's step and this one, alternating, in one process.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from components.contracts import Condition, Modules


class Random(NamedTuple):
    """Random numbers of a step: posterior and noise (B, C, h, w) from N(0, I), time and label (B,) from U[0, 1)."""

    posterior: Tensor
    noise: Tensor
    time: Tensor
    label: Tensor


class Autoencoder(nn.Module):
    """Tokenizer as one module: encode, sample, decode."""

    def __init__(self, tokenizer: nn.Module) -> None:
        super().__init__()
        self.tokenizer = tokenizer

    def forward(self, x: Tensor, noise: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Map images (B, 3, R, R) to posterior mean and log-variance, z, and the reconstruction."""
        posterior = self.tokenizer.encode(x)
        z = posterior.mean + torch.exp(0.5 * posterior.logvar) * noise
        return posterior.mean, posterior.logvar, z, self.tokenizer.decode(z)


class Denoiser(nn.Module):
    """Diffusion transformer and alignment heads as one module."""

    def __init__(self, transformer: nn.Module, heads: nn.ModuleList) -> None:
        super().__init__()
        self.transformer, self.heads = transformer, heads

    def forward(
        self, x_t: Tensor, t: Tensor, labels: Tensor, align_only: bool = False
    ) -> tuple[Tensor | None, list[Tensor]]:
        """Return velocity (B, C, h, w), or None if ``align_only``, and projected tokens (B, N, D_k) per encoder."""
        if align_only:
            velocity, tokens = None, self.transformer.tokens(x_t, t, Condition(labels))
        else:
            velocity, tokens, *_ = self.transformer(x_t, t, Condition(labels))
        return velocity, [head(tokens) for head in self.heads]


class Plain:
    """Base class of the two steps below: denoiser with heads, EMA and optimizer, and the batch norm of latents.

    Args:
        modules: networks of a run on one device, in NCHW, neither compiled nor sharded. They are trained in place.
        settings: by loss ("tokenizer", "discriminator", "denoiser"): an object with lr, betas, eps, weight_decay and
            clip_norm. The learning rate is constant.
        ema_decay: per step.
        dtype: of autocast; None: no autocast.
        compile: apply `torch.compile` to each network as a whole.
        backend: for torch.compile.

    Raises:
        ValueError: the modules use an option that the plain step does not support.
    """

    def __init__(
        self,
        modules: Modules,
        settings: Mapping[str, Any],
        *,
        ema_decay: float = 0.9999,
        dtype: torch.dtype | None = None,
        compile: bool = False,
        backend: str = "inductor",
    ) -> None:
        check(modules)
        self.settings, self.ema_decay, self.dtype = settings, ema_decay, dtype
        self.compile, self.backend = compile, backend
        self.model = Denoiser(modules.denoiser, modules.heads)
        self.alignment, self.null_label = modules.alignment, modules.denoiser.null_label
        self.label_dropout = modules.denoiser.label_dropout
        source = modules.latent_norm
        device, param_dtype = source.running_mean.device, source.running_mean.dtype
        self.device = device
        norm = nn.BatchNorm2d(len(source.running_mean), source.eps, source.momentum, affine=False)
        self.norm = norm.to(device, param_dtype)
        self.norm.load_state_dict(source.state_dict())
        self.ema = copy.deepcopy(nn.ModuleList([self.model, self.norm])).requires_grad_(False)
        self.optimizer = self.adamw("denoiser", self.model)
        self.run_model = self.compiled(self.model)

    def compiled(self, module: nn.Module) -> Callable:
        return torch.compile(module, backend=self.backend) if self.compile else module

    def adamw(self, name: str, module: nn.Module) -> torch.optim.AdamW:
        s = self.settings[name]
        return torch.optim.AdamW(
            module.parameters(), lr=s.lr, betas=tuple(s.betas), eps=s.eps, weight_decay=s.weight_decay
        )

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, dtype=self.dtype, enabled=self.dtype is not None)

    def random(self, latent: torch.Size | tuple[int, ...]) -> Random:
        """Draw random numbers for latents of shape (B, C, h, w)."""
        normal, uniform = torch.randn(2, *latent, device=self.device), torch.rand(2, latent[0], device=self.device)
        return Random(*normal, *uniform)

    def apply(self, name: str, loss: Tensor, module: nn.Module, optimizer: torch.optim.Optimizer) -> Tensor:
        """Backward pass, clipping and optimizer step of one loss; returns the gradient norm."""
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(module.parameters(), self.settings[name].clip_norm or float("inf"))
        optimizer.step()
        return norm

    def align(self, projected: list[Tensor], targets: list[Tensor]) -> Tensor:
        """Negative cosine similarity, averaged over encoders, batch and tokens."""
        pairs = zip(projected, targets, strict=True)
        cosines = [(F.normalize(p, dim=-1) * F.normalize(y, dim=-1)).sum(-1).mean() for p, y in pairs]
        return -sum(cosines) / len(cosines)

    def denoise(self, z: Tensor, labels: Tensor, targets: list[Tensor], random: Random) -> dict[str, Tensor]:
        """Train the denoiser on normalized latents (B, C, h, w); returns its metrics."""
        t = random.time.view(-1, 1, 1, 1)
        with self.autocast():
            dropped = torch.where(random.label < self.label_dropout, self.null_label, labels)
            x_t, target = (1 - t) * z + t * random.noise, random.noise - z
            velocity, projected = self.run_model(x_t, random.time, dropped)
            mse, align = F.mse_loss(velocity, target), self.align(projected, targets)
            loss = mse + self.alignment.denoiser_weight * align
        norm = self.apply("denoiser", loss, self.model, self.optimizer)
        self.update_ema()
        return {
            "denoiser/velocity": mse,
            "denoiser/align": align,
            "denoiser/loss": loss,
            "grad_norm/denoiser": norm,
        }

    @torch.no_grad()
    def update_ema(self) -> None:
        sources = nn.ModuleList([self.model, self.norm])
        for average, p in zip(self.ema.parameters(), sources.parameters()):
            average.mul_(self.ema_decay).add_(p, alpha=1 - self.ema_decay)
        for average, b in zip(self.ema.buffers(), sources.buffers()):
            if b.is_floating_point():
                average.mul_(self.ema_decay).add_(b, alpha=1 - self.ema_decay)
            else:
                average.copy_(b)


class PlainStep(Plain):
    """REPA-E step: tokenizer, discriminator, denoiser. Arguments: see :class:`Plain`."""

    def __init__(self, modules: Modules, settings: Mapping[str, Any], **options: Any) -> None:
        super().__init__(modules, settings, **options)
        self.autoencoder, self.discriminator = Autoencoder(modules.tokenizer), modules.discriminator.network
        weights = {name: loss.weight for name, loss in modules.reconstruction.items()}
        self.weights = weights | {"gan": modules.discriminator.weight, "align": self.alignment.tokenizer_weight}
        self.optimizer_tokenizer = self.adamw("tokenizer", self.autoencoder)
        self.optimizer_discriminator = self.adamw("discriminator", self.discriminator)
        self.run_autoencoder = self.compiled(self.autoencoder)
        self.run_discriminator = self.compiled(self.discriminator)
        self.encoders = [self.compiled(encoder) for encoder in modules.encoders.values()]
        lpips = modules.reconstruction.get("lpips")
        self.lpips = self.compiled(lpips) if lpips is not None else None
        self.channels, self.factor = modules.tokenizer.channels, modules.tokenizer.factor

    def __call__(self, x: Tensor, labels: Tensor, random: Random | None = None) -> dict[str, float]:
        """Run one step on images (B, 3, R, R) in [-1, 1] and labels (B,); returns its metrics."""
        side = x.shape[-1] // self.factor
        random = self.random((len(x), self.channels, side, side)) if random is None else random
        with self.autocast(), torch.no_grad():
            targets = [encoder(x) for encoder in self.encoders]

        # Tokenizer, through the frozen denoiser and discriminator.
        requires_grad(self.model, False)
        requires_grad(self.discriminator, False)
        self.norm.eval()
        with self.autocast():
            mean, logvar, z, x_hat = self.run_autoencoder(x, random.posterior)
            terms = {"l1": F.l1_loss(x_hat, x), "kl": 0.5 * (mean**2 + logvar.exp() - 1 - logvar).sum() / len(x)}
            if self.lpips is not None:
                terms["lpips"] = self.lpips(x, x_hat, None)
            terms["gan"] = -self.run_discriminator(x_hat).mean()
            t = random.time.view(-1, 1, 1, 1)
            x_t = (1 - t) * self.norm(z) + t * random.noise
            _, projected = self.run_model(x_t, random.time, labels, align_only=True)
            terms["align"] = self.align(projected, targets)
            loss = sum(self.weights[name] * value for name, value in terms.items() if name in self.weights)
        norm = self.apply("tokenizer", loss, self.autoencoder, self.optimizer_tokenizer)
        seen = {f"tokenizer/{name}": value for name, value in terms.items() if name in self.weights}
        seen |= {"tokenizer/loss": loss, "grad_norm/tokenizer": norm}

        # Discriminator.
        requires_grad(self.discriminator, True)
        with self.autocast():
            real, fake = self.run_discriminator(x), self.run_discriminator(x_hat.detach())
            hinge = 0.5 * (F.relu(1 - real).mean() + F.relu(1 + fake).mean())
        norm = self.apply("discriminator", hinge, self.discriminator, self.optimizer_discriminator)
        seen |= {"discriminator/hinge": hinge, "discriminator/logits_real": real.mean()}
        seen |= {"discriminator/logits_fake": fake.mean(), "grad_norm/discriminator": norm}

        # Denoiser, on detached latents.
        requires_grad(self.model, True)
        self.norm.train()
        seen |= self.denoise(self.norm(z.detach()), labels, targets, random)
        return {name: value.item() for name, value in seen.items()}


class PlainSecondStage(Plain):
    """REPA step on cached latents and features. Arguments: see :class:`Plain`."""

    def __call__(
        self, mean: Tensor, std: Tensor, features: list[Tensor], labels: Tensor, random: Random | None = None
    ) -> dict[str, float]:
        """Run one step on posteriors (B, C, h, w) and features (B, N, D_k) per encoder; returns its metrics."""
        random = self.random(mean.shape) if random is None else random
        z = mean + std * random.posterior
        self.norm.eval()
        seen = self.denoise(self.norm(z), labels, features, random)
        return {name: value.item() for name, value in seen.items()}


def requires_grad(module: nn.Module, flag: bool) -> None:
    for p in module.parameters():
        p.requires_grad = flag


def check(m: Modules) -> None:
    """Raise ValueError if the modules use an option that the plain step does not support."""
    wrong = []
    if m.denoiser is None or m.heads is None or m.alignment is None:
        wrong.append("recipe: expected one with a denoiser and alignment, e.g. repae or repa")
    if m.flow is not None and (m.flow.path, m.flow.time, m.flow.shift) != ("linear", "uniform", 1):
        wrong.append("[flow]: expected the linear path and uniform times without a shift")
    if len(m.encoder_weights) > 1 and len(set(m.encoder_weights.values())) > 1:
        wrong.append("[encoders]: expected equal weights")
    loss = m.alignment
    if loss is not None and (getattr(loss, "spatial_norm", True) or loss.schedule != "constant"):
        wrong.append("alignment loss: expected the cosine without spatial_norm and schedule")
    if m.denoiser is not None and (not isinstance(m.denoiser.align_depth, int) or m.denoiser.noisy_inputs):
        wrong.append("[denoiser]: expected one align_depth and no class token")
    if set(m.reconstruction) - {"l1", "kl", "lpips"}:
        wrong.append(f"[losses]: expected l1, kl and lpips; got {sorted(m.reconstruction)}")
    gan = m.discriminator
    if gan is not None and (getattr(gan, "start_step", 1) or getattr(gan, "lecam_weight", 1)):
        wrong.append("adversarial loss: expected patchgan with start_step = 0 and lecam_weight = 0")
    if wrong:
        raise ValueError("not supported by the plain step:\n" + "\n".join(f"- {line}" for line in wrong))


# -- the comparison ----------------------------------------------------------------------------------------------------


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description="Time the project's training step and the plain one, alternating, in one process.",
        epilog="Weights, images and cached latents are random. Any config key can be overridden: --section.key=value",
        allow_abbrev=False,
    )
    parser.add_argument("config", help="TOML file with the recipe repae or repa (which trains on cached latents here)")
    parser.add_argument("--batch", type=int, help="images per step (default: training.batch_size)")
    parser.add_argument("--rounds", type=int, default=5, help="pairs of measurements (default: 5)")
    parser.add_argument("--steps", type=int, default=5, help="steps per measurement (default: 5)")
    parser.add_argument("--ours", choices=VARIANTS, help="variant of the project's step (default: training.compile)")
    parser.add_argument("--plain", choices=VARIANTS, help="variant of the plain step (default: as --ours)")
    parser.add_argument("--json", type=Path, help="also write the results to this file")
    arguments, overrides = parser.parse_known_args(argv)
    from benchmarks.workload import PlainWorkload, Workload, alternate, machine, pick_device, table
    from trainer import config as configs
    from trainer.__main__ import user_errors
    from trainer.commands.train import set_backends

    try:
        if min(arguments.rounds, arguments.steps, arguments.batch or 1) < 1:
            raise configs.ConfigError("--batch, --rounds and --steps: expected at least 1")
        config, device = configs.load(arguments.config, overrides), pick_device()
        ours = arguments.ours or VARIANTS[config.training.compile]
        plain = arguments.plain or ours
        set_backends(config)
        batch = arguments.batch or config.training.batch_size
        work = Workload(config, device, compile=ours == "compiled")
        baseline = PlainWorkload(config, device, compile=plain == "compiled")
    except (*user_errors(), ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    found = {
        "machine": machine(device),
        "config": arguments.config,
        "overrides": overrides,
        "batch": batch,
        "ours is": ours,
        "plain is": plain,
        **alternate(work.runner(batch), baseline.runner(batch), device, arguments.rounds, arguments.steps, batch),
    }
    print(table(found))
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=1) + "\n")
    return 0


VARIANTS = ("eager", "compiled")

if __name__ == "__main__":
    sys.exit(main())
