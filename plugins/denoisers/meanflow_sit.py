"""SiT that also takes the interval of an average velocity (MeanFlow, arXiv 2505.13447)."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from components.contracts import Condition, DenoiserOutput, LatentShape, Prediction, Tokens
from components.nn.transformer import TimeEmbedding, last_depth, run_blocks, to_velocity, unpatchify
from components.registry import denoisers
from plugins.denoisers.sit import SiT


@denoisers.register("meanflow_sit")
class MeanFlowSiT(SiT):
    """SiT conditioned on the time t and the interval t - r, which predicts the average velocity over [r, t] (MeanFlow).

    Without an interval it predicts the instantaneous velocity (r = t), like any other denoiser. The interval has an
    embedding like that of the time, and all embeddings are added.

    Args:
        label_dropout: probability of replacing a label with the null label in training; 0: no null label. MeanFlow
            needs it only for guidance.
        prediction: what the network predicts, on the linear path; the denoiser converts it to the average velocity, by
            the same formula as to the instantaneous one.
    """

    takes = frozenset({"interval"})
    # Weights sharded over ranks are gathered in fp32: the recipe differentiates the network outside autocast.
    keep_fp32 = True

    def __init__(
        self,
        latent: LatentShape,
        num_classes: int,
        *,
        size: Literal["S", "B", "L", "XL"] = "XL",
        patch_size: int = 2,
        align_depth: int | list[int] = 8,
        label_dropout: float = 0.1,
        qk_norm: bool = False,
        width: int | None = None,
        depth: int | None = None,
        heads: int | None = None,
        label_std: float = 0.02,
        mlp_ratio: float = 4.0,
        prediction: Prediction = "velocity",
    ) -> None:
        super().__init__(
            latent, num_classes, size=size, patch_size=patch_size, align_depth=align_depth,
            label_dropout=label_dropout, qk_norm=qk_norm, width=width, depth=depth, heads=heads, label_std=label_std,
            mlp_ratio=mlp_ratio, prediction=prediction,
        )  # fmt: skip
        self.interval_embedder = TimeEmbedding(self.width)
        self.init_weights()

    def init_weights(self) -> None:
        """Initialize as SiT does, and the interval's embedding like the time's."""
        super().init_weights()
        for module in self.modules():  # SiT's constructor calls this before there is an interval_embedder
            if isinstance(module, TimeEmbedding):
                nn.init.normal_(module.mlp[0].weight, std=0.02)
                nn.init.normal_(module.mlp[2].weight, std=0.02)

    def forward(  # type: ignore[override]
        self, x_t: Tensor, t: Tensor, condition: Condition, interval: Tensor | None = None
    ) -> DenoiserOutput:
        """Predict the average velocity over [t - interval, t].

        Args:
            x_t: noisy latents (B, C, h, w).
            t: times (B,) in [0, 1].
            condition: classes (B,) in [0, num_classes].
            interval: t - r (B,) in [0, t]; None: 0, so that the velocity is the instantaneous one.
        """
        x, c = self._embed_interval(x_t, t, condition, interval)
        x, tokens = run_blocks(self.blocks, x, c, align_depth=self.align_depth)
        patches, _ = self.final_layer(x, c)
        return DenoiserOutput(to_velocity(unpatchify(patches, self.channels), x_t, t, self.prediction), tokens)

    def tokens(  # type: ignore[override]
        self, x_t: Tensor, t: Tensor, condition: Condition, interval: Tensor | None = None
    ) -> Tokens:
        """Return hidden tokens (B, N, width) after each block in ``align_depth``; later blocks do not run."""
        x, c = self._embed_interval(x_t, t, condition, interval)
        return run_blocks(self.blocks[: last_depth(self.align_depth)], x, c, align_depth=self.align_depth)[1]

    def _embed_interval(
        self, x_t: Tensor, t: Tensor, condition: Condition, interval: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        x, c = self._embed(x_t, t, condition, None)
        return x, c + self.interval_embedder(torch.zeros_like(t) if interval is None else interval, x.dtype)
