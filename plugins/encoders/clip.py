"""The image tower of OpenAI's CLIP (Radford et al. 2021, arXiv 2103.00020)."""

from __future__ import annotations

from typing import Literal

from components.nn.timm_encoder import TimmEncoder
from components.registry import encoders

MODELS = {
    "b32": "vit_base_patch32_clip_quickgelu_224.openai",
    "b16": "vit_base_patch16_clip_quickgelu_224.openai",
    "l14": "vit_large_patch14_clip_quickgelu_224.openai",
    "l14_336": "vit_large_patch14_clip_quickgelu_336.openai",
}


@encoders.register("clip")
class CLIP(TimmEncoder):
    """OpenAI CLIP patch tokens of the last block, without the final norm (D = 768 or 1024).

    As in the encoder ablations of REPA (arXiv 2410.06940) and REPA-E (arXiv 2504.10483), which take ViT-L/14:

    - tokens: the patch tokens as they leave the last block. CLIP's final norm and projection were trained on the
      class token alone, so neither is applied; the class token is dropped;
    - images: [0, 1], bicubic to one patch per token (L/14: 256 -> 224 for 16 x 16 tokens; B/32 sees the image
      enlarged to 512), then CLIP's own mean and deviation;
    - activation: x * sigmoid(1.702 x). OpenAI's weights were trained with it; timm's entry of the same weights
      without "quickgelu" in its name computes GELU;
    - position embedding: that of the 16 x 16 grid (B/16: 14 x 14, B/32: 7 x 7, L/14 at 336 pixels: 24 x 24),
      resampled where the denoiser's differs;
    - one vector per image: the class token behind the final norm, before the projection.

    Args:
        size: ViT-B/32, B/16, L/14, or L/14 as tuned on 336 pixels.
        pretrained: read the published weights from the Hugging Face cache, or download them; false: random.
        checkpoint: file of weights to read instead, in timm's layout or as a state dict with OpenAI's keys
            ("visual.*"; the TorchScript archive that OpenAI distributes must be saved as one first).
    """

    def __init__(
        self,
        resolution: int,
        grid: int,
        *,
        size: Literal["b32", "b16", "l14", "l14_336"] = "l14",
        pretrained: bool = True,
        checkpoint: str | None = None,
    ) -> None:
        super().__init__(
            MODELS[size],
            grid,
            pretrained=pretrained,
            checkpoint=checkpoint,
            final_norm=False,
            resize_first=True,
        )
