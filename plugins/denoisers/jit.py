"""JiT (arXiv 2511.13720): a plain vision transformer on pixels that predicts the data."""

from __future__ import annotations

from typing import Literal

from components.contracts import LatentShape, Prediction
from components.registry import denoisers
from plugins.denoisers.lightningdit import LightningDiT

# (width, depth, heads, bottleneck)
SIZES = {"B": (768, 12, 12, 128), "L": (1024, 24, 16, 128), "H": (1280, 32, 16, 256)}


@denoisers.register("jit")
class JiT(LightningDiT):
    """JiT: LightningDiT with large patches, a narrow patch embedding, class tokens in context, and data prediction.

    For the tokenizer ``identity``; sizes B, L and H with patches of 16 at 256 pixels and 32 at 512. State-dict keys are
    those of the published code (LTH14/JiT) without its prefix ``net.`` and its second rotary table. Its time is 0 at
    noise and 1 at data: load its weights with ``reversed_time``. It has a dropout of 0.2 in the middle blocks of H,
    which is not available here.

    Args:
        size: published preset for width, depth, heads and bottleneck.
        patch_size: pixels per token side, a divisor of the image's side.
        align_depth: block whose tokens are aligned, counted from 1; a list selects several.
        label_dropout: probability of replacing a label with the null label in training; 0: no null label.
        qk_norm: apply RMS norm to queries and keys.
        width: features per token; overrides the preset.
        depth: number of blocks; overrides the preset.
        heads: attention heads; overrides the preset.
        bottleneck: features between patch and token in the patch embedding; 0: one linear layer; overrides the preset.
        context_tokens: number of class tokens that later blocks attend to beside the patch tokens; 0: none.
        context_start: number of blocks that run before the class tokens join; None: a third of them, as published.
        label_std: standard deviation for initializing label embeddings.
        mlp_ratio: MLP width / token width of a plain MLP; SwiGLU uses 2 / 3 of it, for the same number of weights.
        prediction: what the network predicts, on the linear path; the denoiser converts it to the velocity.
        reversed_time: for weights trained with 0 for noise and 1 for data, as published.

    Raises:
        ValueError: as ``lightningdit``.
    """

    def __init__(
        self,
        latent: LatentShape,
        num_classes: int,
        *,
        size: Literal["B", "L", "H"] = "B",
        patch_size: int = 16,
        align_depth: int | list[int] = 8,
        label_dropout: float = 0.1,
        qk_norm: bool = True,
        width: int | None = None,
        depth: int | None = None,
        heads: int | None = None,
        bottleneck: int | None = None,
        context_tokens: int = 32,
        context_start: int | None = None,
        label_std: float = 0.02,
        mlp_ratio: float = 4.0,
        prediction: Prediction = "data",
        reversed_time: bool = False,
    ) -> None:
        preset = SIZES[size]
        depth = depth or preset[1]
        super().__init__(
            latent,
            num_classes,
            patch_size=patch_size,
            align_depth=align_depth,
            label_dropout=label_dropout,
            qk_norm=qk_norm,
            width=width or preset[0],
            depth=depth,
            heads=heads or preset[2],
            bottleneck=preset[3] if bottleneck is None else bottleneck,
            context_tokens=context_tokens,
            context_start=depth // 3 if context_start is None else context_start,
            label_std=label_std,
            mlp_ratio=mlp_ratio,
            prediction=prediction,
            reversed_time=reversed_time,
        )
