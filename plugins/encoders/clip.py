"""The image tower of OpenAI's CLIP (Radford et al. 2021, arXiv 2103.00020)."""

from __future__ import annotations

from components.registry import encoders
from components.timm_encoder import TimmEncoder


@encoders.register("clip")
class CLIP(TimmEncoder):
    """OpenAI CLIP ViT-L/14 patch tokens of the last block, without the final norm (D = 1024).

    As in the encoder ablations of REPA (arXiv 2410.06940) and REPA-E (arXiv 2504.10483):

    - tokens: the patch tokens as they leave the last block. CLIP's final norm and projection were trained on the
      class token alone, so neither is applied; the class token is dropped;
    - images: [0, 1], bicubic to 14 pixels per token (256 -> 224 for 16 x 16 tokens), then CLIP's own mean and
      deviation;
    - activation: x * sigmoid(1.702 x). OpenAI's weights were trained with it; timm's entry of the same weights
      without "quickgelu" in its name computes GELU;
    - position embedding: that of the 16 x 16 grid, resampled where the denoiser's differs.

    Args:
        pretrained: read the published weights from the Hugging Face cache, or download them; false: random.
        checkpoint: file of weights to read instead, in timm's layout or as a state dict with OpenAI's keys
            ("visual.*"; the TorchScript archive that OpenAI distributes must be saved as one first).
    """

    def __init__(
        self,
        resolution: int,
        grid: int,
        *,
        pretrained: bool = True,
        checkpoint: str | None = None,
    ) -> None:
        super().__init__(
            "vit_large_patch14_clip_quickgelu_224.openai",
            grid,
            pretrained=pretrained,
            checkpoint=checkpoint,
            final_norm=False,
            resize_first=True,
        )
