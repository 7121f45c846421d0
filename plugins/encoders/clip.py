"""Image tower of OpenAI's CLIP (Radford et al. 2021, arXiv 2103.00020)."""

from __future__ import annotations

from typing import Literal

from components.nn.timm_encoder import TimmEncoder
from components.registry import File, encoders

MODELS = {
    "b32": "vit_base_patch32_clip_quickgelu_224.openai",
    "b16": "vit_base_patch16_clip_quickgelu_224.openai",
    "l14": "vit_large_patch14_clip_quickgelu_224.openai",
    "l14_336": "vit_large_patch14_clip_quickgelu_336.openai",
}


@encoders.register("clip")
class CLIP(TimmEncoder):
    """OpenAI CLIP patch tokens of the last block, without the final norm (D = 768 or 1024).

    Follows the encoder ablations of REPA (arXiv 2410.06940) and REPA-E (arXiv 2504.10483), which use ViT-L/14:

    - tokens: patch tokens of the last block; the class token is dropped. CLIP's final norm and projection were trained
      on the class token only, so neither is applied;
    - images: scaled to [0, 1], resized (bicubic) to one patch per token (L/14: 256 -> 224 for 16 x 16 tokens; B/32:
      256 -> 512), then normalized with CLIP's mean and std;
    - activation: QuickGELU, x * sigmoid(1.702 x), which OpenAI's weights were trained with. timm's models of the same
      weights without "quickgelu" in the name use GELU;
    - position embedding: trained on a 16 x 16 grid (B/16: 14 x 14, B/32: 7 x 7, L/14 at 336 pixels: 24 x 24),
      resampled if the denoiser's grid differs;
    - image embedding: the class token after the final norm, before the projection.

    Args:
        size: ViT-B/32, B/16, L/14, or L/14 fine-tuned at 336 pixels.
        pretrained: load published weights from the Hugging Face cache, downloading if needed; false: random weights.
        checkpoint: weights file to load instead, in timm's layout or as a state dict with OpenAI's keys ("visual.*");
            OpenAI's TorchScript archive must be converted to a state dict first.
    """

    def __init__(
        self,
        resolution: int,
        grid: int,
        *,
        size: Literal["b32", "b16", "l14", "l14_336"] = "l14",
        pretrained: bool = True,
        checkpoint: File | None = None,
    ) -> None:
        super().__init__(
            MODELS[size],
            grid,
            pretrained=pretrained,
            checkpoint=checkpoint,
            final_norm=False,
            resize_first=True,
        )
