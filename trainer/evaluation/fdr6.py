"""FDr6: mean over six encoders of the Frechet distance divided by that of ImageNet's validation images.

Defined by FD-loss (arXiv 2604.28190, eval_all_fds.py and compute_valfd.py of its repository) and computed likewise by
DiffusionBench's fd_evaluator. Its encoders are Inception as for FID, and five timm models:

| label | timm model | pixels | vector |
| --- | --- | --- | --- |
| convnextv2_b | convnextv2_base.fcmae_ft_in22k_in1k | 224 | mean of the feature map before the head's norm |
| dinov2_l_cls | vit_large_patch14_dinov2.lvd142m | 256, padded to 266 | class token after the final norm |
| mae_l_cls | vit_large_patch16_224.mae | 224 | class token after the final norm |
| siglip2_so400m | vit_so400m_patch16_siglip_256.v2_webli | 224 | output of the attention pool |
| clip_l_cls | vit_large_patch14_clip_224.openai (GELU) | 256, padded to 266 | class token after the final norm |

Images are resized bicubically with antialiasing, normalized with the mean and std of the model's weights, and padded
with zeros at the right and at the bottom to a multiple of the patch size. Position embeddings are resampled (bicubic,
antialiased). Everything is computed in fp32; the reference code runs the transformers in bf16 on GPUs.
"""

from __future__ import annotations

from typing import NamedTuple


class Member(NamedTuple):
    """One of the encoders.

    Attributes:
        label: suffix of its distance, "fd_LABEL", and of its moments in a statistics file.
        divisor: the distance of ImageNet's validation images to the training images, at 256 pixels.
        encoder: spec, see :class:`trainer.evaluation.metric_selection.EncoderSpec`.
    """

    label: str
    divisor: float
    encoder: str


_RESIZE = "resize=bicubic_antialias"
INCEPTION_DIVISOR = 1.68
MEMBERS = (
    # The grid is that of the last feature map, so that it is averaged as it is.
    Member("convnextv2_b", 56.87,
           f"timm:model=convnextv2_base.fcmae_ft_in22k_in1k,image_size=224,grid=7,norm=false,{_RESIZE}"),
    Member("dinov2_l_cls", 14.19, f"timm:model=vit_large_patch14_dinov2.lvd142m,image_size=256,pad=true,{_RESIZE}"),
    Member("mae_l_cls", 0.04, f"timm:model=vit_large_patch16_224.mae,image_size=224,{_RESIZE}"),
    Member("siglip2_so400m", 0.60, f"timm:model=vit_so400m_patch16_siglip_256.v2_webli,image_size=224,{_RESIZE}"),
    Member("clip_l_cls", 5.60, f"timm:model=vit_large_patch14_clip_224.openai,image_size=256,pad=true,{_RESIZE}"),
)  # fmt: skip


def fdr6(values: dict[str, float | None]) -> float | None:
    """FDr6 from the distances "fid" and "fd_LABEL" of all members; None if one of them is."""
    divisors = {"fid": INCEPTION_DIVISOR} | {f"fd_{m.label}": m.divisor for m in MEMBERS}
    ratios = [value / divisor for name, divisor in divisors.items() if (value := values.get(name)) is not None]
    return sum(ratios) / len(ratios) if len(ratios) == len(divisors) else None
