"""Any timm model by name (Wightman 2019, https://github.com/huggingface/pytorch-image-models)."""

from __future__ import annotations

from typing import Any, Literal

from components.nn.timm_encoder import TimmEncoder
from components.registry import File, encoders


@encoders.register("timm")
class Timm(TimmEncoder):
    """Any timm model by name: vision transformers, and hierarchical or convolutional models.

    - tokens: for a vision transformer, the patch tokens of block ``layer``, without class and register tokens. For a
      model with feature maps (Swin, Hiera, ConvNeXt, ResNet, ...), one token per position of stage ``layer``; the last
      stage is often coarser than the denoiser's grid, and ``layer = -2`` usually has twice its resolution;
    - norm: the model's final norm, as timm applies it to the features; some models with feature maps do not allow it;
    - images: scaled to [0, 1], normalized with the mean and std of the model's weights, resized to one patch per
      token, or to the pretraining size for models with feature maps. Features whose size differs from the grid are
      averaged over blocks if it is a multiple of the grid, and otherwise resized (bilinear, antialiased);
    - image embedding: timm's pooled output (class token, mean or attention pool) after a transformer's last block; in
      all other cases the mean of the features.

    Encoders that have their own plugin follow their papers instead: "mae" and "clip" do not apply the final norm,
    "perception_encoder" and "dinov3" resize differently.

    Args:
        model: timm model name with the tag of the weights, such as "vit_base_patch16_224.augreg_in21k".
        layer: block or stage, counted from 0; negative values count from the end.
        norm: apply the model's final norm to the features.
        image_size: side in pixels to resize images to; none: one patch per token, or the pretraining size.
        pad: allow an image size that is no multiple of the patch size, and fill up the last patches with zeros.
        resize: interpolation of images; without antialiasing unless it says so.
        pretrained: load published weights from the Hugging Face cache, downloading if needed; false: random weights.
        checkpoint: weights file to load instead, in timm's layout or one that timm converts.
        options: further arguments of timm's model constructor, such as { act_layer = "gelu_tanh" }.
    """

    def __init__(
        self,
        resolution: int,
        grid: int,
        *,
        model: str,
        layer: int = -1,
        norm: bool = True,
        image_size: int | None = None,
        pad: bool = False,
        resize: Literal["bicubic", "bicubic_antialias", "bilinear", "bilinear_antialias"] = "bicubic",
        pretrained: bool = True,
        checkpoint: File | None = None,
        options: dict[str, Any] | None = None,
    ) -> None:
        super().__init__(
            model,
            grid,
            pretrained=pretrained,
            checkpoint=checkpoint,
            final_norm=norm,
            layer=layer,
            image_size=image_size,
            pad=pad,
            resize=resize,
            options=options,
        )
