"""Any model of timm (Wightman 2019, https://github.com/huggingface/pytorch-image-models), by its name."""

from __future__ import annotations

from components.nn.timm_encoder import TimmEncoder
from components.registry import encoders


@encoders.register("timm")
class Timm(TimmEncoder):
    """Any vision transformer, hierarchical or convolutional model of timm, by its timm name.

    - tokens: of a transformer of patch tokens, those of block ``layer``; class and register tokens are dropped. Of a
      model of feature maps (Swin, Hiera, ConvNeXt, ResNet, ...), the map of stage ``layer``, each place a token. The
      last stage is often coarser than the denoiser's grid: ``layer = -2`` has twice as many per side;
    - norm: the model's last norm, as timm applies it to the features. Not every model of feature maps allows it;
    - images: [0, 1], the mean and deviation of the model's weights, then bicubic (no antialiasing) to one patch per
      token, or for feature maps to the pretraining's size. Features of another size than the grid are averaged over
      blocks where the grid divides it, else resized (bilinear, antialiased);
    - one vector per image: what timm pools to (class token, mean or attention pool) after a transformer's last block,
      else the mean of the features.

    Encoders with a plugin of their own differ where their papers do: "mae" and "clip" leave out the norm,
    "perception_encoder" and "dinov3" resize otherwise.

    Args:
        model: timm's name, with the tag of the weights: "vit_base_patch16_224.augreg_in21k".
        layer: block or stage, from 0; negative ones count from the last.
        norm: apply the model's last norm to the features.
        image_size: pixels per side that the model sees; none: as above.
        pretrained: read the published weights from the Hugging Face cache, or download them; false: random.
        checkpoint: file of weights to read instead, in timm's layout or one that timm converts.
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
        pretrained: bool = True,
        checkpoint: str | None = None,
    ) -> None:
        super().__init__(
            model,
            grid,
            pretrained=pretrained,
            checkpoint=checkpoint,
            final_norm=norm,
            layer=layer,
            image_size=image_size,
        )
