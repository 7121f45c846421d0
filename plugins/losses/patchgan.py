"""Adversarial loss with a PatchGAN discriminator."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from components.files.layouts import files
from components.files.weights import load_strict
from components.nn.batch_norm import SyncBatchNorm2d, batch_mean
from components.nn.precision import at_least_fp32, no_autocast
from components.registry import losses


class PatchDiscriminator(nn.Module):
    """Convolutions that judge overlapping patches (Isola et al. 2017, arXiv 1611.07004, appendix 6.1.2).

    State-dict keys are those of the published discriminator: ``main.0.weight``, ...

    Args:
        channels: channels of the first convolution; doubled per layer, up to eight times.
        layers: convolutions of stride 2.
    """

    keep_fp32 = True

    def __init__(self, channels: int, layers: int) -> None:
        super().__init__()
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
        """Convolutions N(0, 0.02), batch norms N(1, 0.02) with zero bias."""
        for module in self.main:
            if isinstance(module, (nn.Conv2d, SyncBatchNorm2d)):
                module.reset_parameters()  # the convolutions' biases, and the running statistics
                nn.init.normal_(module.weight, float(isinstance(module, SyncBatchNorm2d)), 0.02)

    def forward(self, x: Tensor) -> Tensor:
        """Images (B, 3, R, R) -> logits (B, 1, n, n) with n = R // 2**layers - 2, one per patch."""
        with no_autocast(x):
            return self.main(at_least_fp32(x))


@losses.register("patchgan")
class PatchGAN(nn.Module):
    """Hinge GAN loss with a PatchGAN discriminator, and LeCam regularisation on request.

    The discriminator always normalises with the statistics of the batch that it sees, over all ranks.
    Before ``start_step`` it is not evaluated, and both losses are zeros without a graph.

    Args:
        weight: factor of the generator's loss in the tokenizer's loss.
        start_step: first step at which both losses count.
        lecam_weight: weight of the LeCam term in the discriminator's loss; 0 leaves it out.
        lecam_decay: decay per step of the averaged logits that LeCam compares with.
        channels: channels of the discriminator's first convolution.
        layers: stride-2 convolutions of the discriminator; images need 3 * 2**layers px per side.
        checkpoint: weights to start from: a discriminator's own file, or one of REPA-E, CompVis or ours that holds
            one, or hf://organisation/name/file[@revision]; none: random.

    Raises:
        ValueError: fewer than one layer or channel, or a negative start_step.
    """

    ema_real: Tensor
    ema_fake: Tensor

    def __init__(
        self,
        *,
        weight: float = 0.1,
        start_step: int = 0,
        lecam_weight: float = 0.0,
        lecam_decay: float = 0.999,
        channels: int = 64,
        layers: int = 3,
        checkpoint: str | None = None,
    ) -> None:
        super().__init__()
        for name, value, least in (("layers", layers, 1), ("channels", channels, 1), ("start_step", start_step, 0)):
            if value < least:
                raise ValueError(f"[losses.patchgan] {name} = {value}: expected at least {least}")
        self.weight = weight
        self.start_step = start_step
        self.lecam_weight = lecam_weight
        self.lecam_decay = lecam_decay
        self.checkpoint = checkpoint
        self.layers = layers
        self.network = PatchDiscriminator(channels, layers)
        self.register_buffer("ema_real", torch.zeros(()))
        self.register_buffer("ema_fake", torch.zeros(()))

    def init_weights(self) -> None:
        """Re-initialises the discriminator and forgets the averaged logits."""
        self.network.init_weights()
        self.ema_real.zero_()
        self.ema_fake.zero_()

    def load_weights(self) -> None:
        """Reads the network's weights from ``checkpoint``, if given; LeCam's averages start anew.

        Raises:
            WeightsError: the file is missing or does not fit.
        """
        if self.checkpoint:
            what = "loss patchgan"
            file = files.read(self.checkpoint, what, part="discriminator")
            _, state = files.take(file, "discriminator", self.network.state_dict().keys())
            load_strict(self.network, state, what, self.checkpoint)
            files.note_left_out(file, what)

    def units(self) -> Sequence[nn.Module]:
        """The discriminator, which is called as a whole."""
        return [self.network]

    def generator(self, x_hat: Tensor, step: int) -> Tensor:
        """-mean(D(x_hat)), a scalar; zero before ``start_step``.

        Args:
            x_hat: reconstructions (B, 3, R, R).
            step: the current step.

        Raises:
            ValueError: images too small for a single patch, at any step.
        """
        self._check_size(x_hat)
        if step < self.start_step:
            return at_least_fp32(x_hat.new_zeros(()))
        return -self.network(x_hat).mean()

    def discriminator(self, x: Tensor, x_hat: Tensor, step: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Hinge loss (Lim and Ye 2017, arXiv 1705.02894) and LeCam (Tseng et al. 2021, arXiv 2104.03310).

        Args:
            x: images (B, 3, R, R) in [-1, 1].
            x_hat: reconstructions, detached.
            step: the current step.

        Returns:
            Terms: ``hinge`` = 0.5 (mean relu(1 - D(x)) + mean relu(1 + D(x_hat))) and, with a
            ``lecam_weight``, ``lecam``, times that weight. To report: ``logits_real`` and ``logits_fake``,
            detached means on this rank; nothing before ``start_step``.

        Raises:
            ValueError: images too small for a single patch, at any step.
        """
        self._check_size(x)
        if step < self.start_step:
            return {"hinge": at_least_fp32(x.new_zeros(()))}, {}
        # Two batches, real first: in one batch, batch norm would show the discriminator the other kind.
        real = self.network(x)
        fake = self.network(x_hat)
        terms = {"hinge": 0.5 * (F.relu(1 - real).mean() + F.relu(1 + fake).mean())}
        if self.lecam_weight:
            terms["lecam"] = self.lecam_weight * self._lecam(real, fake)
        return terms, {"logits_real": real.detach().mean(), "logits_fake": fake.detach().mean()}

    def _lecam(self, real: Tensor, fake: Tensor) -> Tensor:
        """Squares of what mean logits, over all ranks, are beyond the average logits of the other kind."""
        mean_real, mean_fake = batch_mean(real)[0].squeeze(), batch_mean(fake)[0].squeeze()
        loss = F.relu(mean_real - self.ema_fake).square() + F.relu(self.ema_real - mean_fake).square()
        with torch.no_grad():  # after the loss: a batch is compared with earlier ones
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
