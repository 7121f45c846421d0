"""Adversarial hinge loss with a PatchGAN discriminator."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from components.contracts import AdversarialLoss, Network
from components.files import weights_file
from components.files.adapter import State, StateDictAdapter
from components.files.weights import load_strict
from components.files.weights_file import WeightsFile
from components.nn.batch_norm import SyncBatchNorm2d, batch_mean
from components.nn.precision import at_least_fp32, no_autocast
from components.registry import File, losses


class PatchDiscriminator(Network):
    """PatchGAN discriminator: one logit per overlapping patch (Isola et al. 2017, arXiv 1611.07004, appendix 6.1.2).

    State-dict keys are those of the published discriminator: ``main.0.weight``, ...

    Args:
        channels: channels of the first convolution; doubled per layer, up to a factor of 8.
        layers: number of stride-2 convolutions.
        precision: of the convolutions: "fp32", or "run": as autocast says.
    """

    keep_fp32 = True

    def __init__(self, channels: int, layers: int, precision: Literal["fp32", "run"] = "fp32") -> None:
        super().__init__()
        self.precision = precision
        widths = [channels * min(2**i, 8) for i in range(layers + 1)]
        main: list[nn.Module] = [
            nn.Conv2d(3, channels, 4, stride=2, padding=1),
            nn.LeakyReLU(0.2, inplace=True),
        ]
        for i in range(1, layers + 1):
            stride = 2 if i < layers else 1
            main += [
                nn.Conv2d(widths[i - 1], widths[i], 4, stride=stride, padding=1, bias=False),
                SyncBatchNorm2d(widths[i]),
                nn.LeakyReLU(0.2, inplace=True),
            ]
        main.append(nn.Conv2d(widths[-1], 1, 4, stride=1, padding=1))
        self.main = nn.Sequential(*main)
        self.init_weights()

    def init_weights(self) -> None:
        """Initialize convolutions with N(0, 0.02), batch-norm weights with N(1, 0.02) and their biases with zeros."""
        for module in self.main:
            if isinstance(module, (nn.Conv2d, SyncBatchNorm2d)):
                module.reset_parameters()  # for convolution biases and running statistics
                nn.init.normal_(module.weight, float(isinstance(module, SyncBatchNorm2d)), 0.02)

    def forward(self, x: Tensor) -> Tensor:
        """Images (B, 3, R, R) -> one logit per patch, (B, 1, n, n) with n = R // 2**layers - 2, in at least fp32."""
        with contextlib.nullcontext() if self.precision == "run" else no_autocast(x):
            return at_least_fp32(self.main(at_least_fp32(x)))


class Published(StateDictAdapter):
    """The discriminator of the published REPA-E code: the network alone, without LeCam's averages."""

    name = "repae"

    def keys(self) -> Collection[str]:
        """Keys of the network."""
        return self.plugin.network.state_dict().keys()

    def from_file(self, file: WeightsFile, role: str, what: str) -> dict[str, State]:
        """Take the network; LeCam's averages are zero, as in a new run."""
        _, network = weights_file.take(file, role, self.keys())
        state = {key: torch.zeros(()) for key in ("ema_real", "ema_fake")}
        return {role: state | {f"network.{key}": value for key, value in network.items()}}

    def to_foreign(self, state: State) -> State:
        """Convert to the published keys; drops LeCam's averages."""
        return {key.removeprefix("network."): value for key, value in state.items() if key.startswith("network.")}


@losses.register("patchgan")
class PatchGAN(AdversarialLoss):
    """Hinge GAN loss with a PatchGAN discriminator and optional LeCam regularization.

    The discriminator's batch norm always uses batch statistics, computed over all ranks. Before it starts, the
    discriminator does not run; a loss that has not started is zero and carries no graph.

    Args:
        weight: weight of the generator's loss in the tokenizer's loss.
        adaptive: multiply ``weight`` by |grad L_rec| / (|grad L_gan| + 1e-4), at most 1e4, with the gradients of the
            decoder's last weight, as in VQGAN (arXiv 2012.09841).
        start_step: first step with the generator's loss, counted from 0.
        warmup_steps: steps before ``start_step`` in which the discriminator trains alone, so that it does not judge
            reconstructions before it can.
        lecam_weight: weight of the LeCam term in the discriminator's loss; 0: off.
        lecam_decay: per-step decay of LeCam's moving averages of the logits.
        channels: channels of the discriminator's first convolution.
        layers: stride-2 convolutions of the discriminator; images need at least 3 * 2**layers px per side.
        checkpoint: initial weights: a discriminator file, a REPA-E, CompVis or titanrepa file that contains one, or
            hf://organization/name/file[@revision]; none: random weights.
        precision: of the discriminator's convolutions: "fp32", as in the published code; "run": bf16 in bf16 runs,
            which is faster. Batch norms and losses are always computed in fp32.

    Raises:
        ValueError: ``layers`` or ``channels`` is below 1, ``start_step`` is negative, or ``warmup_steps`` is
            not in [0, start_step].
    """

    adapters = (Published,)
    adaptive_eps = 1e-4
    ema_real: Tensor
    ema_fake: Tensor

    def __init__(
        self,
        *,
        weight: float = 0.1,
        adaptive: bool = False,
        start_step: int = 0,
        warmup_steps: int = 0,
        lecam_weight: float = 0.0,
        lecam_decay: float = 0.999,
        channels: int = 64,
        layers: int = 3,
        checkpoint: File | None = None,
        precision: Literal["fp32", "run"] = "fp32",
    ) -> None:
        super().__init__()
        for name, value, least in (("layers", layers, 1), ("channels", channels, 1), ("start_step", start_step, 0)):
            if value < least:
                raise ValueError(f"[losses.patchgan] {name} = {value}: expected at least {least}")
        self.weight, self.adaptive = weight, adaptive
        if not 0 <= warmup_steps <= start_step:
            raise ValueError(f"losses.patchgan: warmup_steps = {warmup_steps}; expected 0 to start_step = {start_step}")
        self.start_step, self.warmup_steps = start_step, warmup_steps
        self.lecam_weight = lecam_weight
        self.lecam_decay = lecam_decay
        self.checkpoint = checkpoint
        self.layers = layers
        self.network = PatchDiscriminator(channels, layers, precision)
        self.register_buffer("ema_real", torch.zeros(()))
        self.register_buffer("ema_fake", torch.zeros(()))

    def init_weights(self) -> None:
        """Initialize the discriminator and zero LeCam's averages."""
        self.network.init_weights()
        self.ema_real.zero_()
        self.ema_fake.zero_()

    def load_weights(self) -> None:
        """Load the discriminator from ``checkpoint``, if set; LeCam's averages are not loaded.

        Raises:
            WeightsError: the file is missing or does not fit.
        """
        if self.checkpoint:
            what = "loss patchgan"
            file = weights_file.read(self.checkpoint, what, part="discriminator")
            _, state = weights_file.take(file, "discriminator", self.network.state_dict().keys())
            load_strict(self.network, state, what, self.checkpoint)
            weights_file.note_left_out(file, what)

    def units(self) -> Sequence[nn.Module]:
        """Return the discriminator as a single unit."""
        return [self.network]

    def generator(self, x_hat: Tensor, step: int) -> Tensor:
        """Return the generator loss -mean(D(x_hat)), a scalar; zero before ``start_step``.

        Args:
            x_hat: reconstructions (B, 3, R, R).
            step: current step, counted from 0.

        Raises:
            ValueError: images are too small for a single patch; checked at every step.
        """
        self._check_size(x_hat)
        if step < self.start_step:
            return at_least_fp32(x_hat.new_zeros(()))
        return -self.network(x_hat).mean()

    def discriminator(self, x: Tensor, x_hat: Tensor, step: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Compute the hinge loss (Lim and Ye 2017, arXiv 1705.02894) and LeCam (Tseng et al. 2021, arXiv 2104.03310).

        Args:
            x: images (B, 3, R, R) in [-1, 1].
            x_hat: reconstructions, detached.
            step: current step, counted from 0.

        Returns:
            Loss terms: ``hinge`` = 0.5 (mean relu(1 - D(x)) + mean relu(1 + D(x_hat))) and, if ``lecam_weight`` is not
            0, ``lecam``, already weighted. Values to report: ``logits_real`` and ``logits_fake``, detached means on
            this rank; none before the discriminator starts.

        Raises:
            ValueError: images are too small for a single patch; checked at every step.
        """
        self._check_size(x)
        if step < self.start_step - self.warmup_steps:
            return {"hinge": at_least_fp32(x.new_zeros(()))}, {}
        # Two separate batches, real first: in a joint batch, batch norm would mix statistics of real and fake.
        real = self.network(x)
        fake = self.network(x_hat)
        terms = {"hinge": 0.5 * (F.relu(1 - real).mean() + F.relu(1 + fake).mean())}
        if self.lecam_weight:
            terms["lecam"] = self.lecam_weight * self._lecam(real, fake)
        return terms, {"logits_real": real.detach().mean(), "logits_fake": fake.detach().mean()}

    def _lecam(self, real: Tensor, fake: Tensor) -> Tensor:
        """LeCam: relu(real - ema_fake)^2 + relu(ema_real - fake)^2, with logits averaged over all ranks."""
        mean_real, mean_fake = batch_mean(real)[0].squeeze(), batch_mean(fake)[0].squeeze()
        loss = F.relu(mean_real - self.ema_fake).square() + F.relu(self.ema_real - mean_fake).square()
        with torch.no_grad():  # after the loss, which compares this batch with earlier ones
            self.ema_real.lerp_(mean_real.to(self.ema_real.dtype), 1 - self.lecam_decay)
            self.ema_fake.lerp_(mean_fake.to(self.ema_fake.dtype), 1 - self.lecam_decay)
        return loss

    def _check_size(self, x: Tensor) -> None:
        side, least = min(x.shape[-2:]), 3 * 2**self.layers
        if side < least:
            fits = (side // 3).bit_length() - 1
            remedy = f"set it to at most {fits}, or use" if fits > 0 else "use"
            raise ValueError(
                f"loss patchgan: images of {x.shape[-2]} x {x.shape[-1]} px are too small for "
                f"[losses.patchgan] layers = {self.layers}, which needs {least} px per side; "
                f"{remedy} larger images"
            )
