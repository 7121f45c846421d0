"""Base class of alignment encoders built on timm models."""

from __future__ import annotations

import contextlib
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from components.contracts import Encoder
from components.files.weights import WeightsError, hub_file, load_strict, read_state
from components.nn.precision import at_least_fp32
from components.registry import File, encoders

HUB_FILE = "model.safetensors"  # unless timm names another


class TimmEncoder(Encoder):
    """A frozen timm model as :class:`components.contracts.Encoder`; base class for plugins.

    Vision transformers: images are resized to ``grid * patch_size`` pixels per side, so that patches match the
    denoiser's tokens at any resolution. Position embeddings of another grid are resampled when weights are loaded (see
    :attr:`position_resize`). Class and register tokens take part in attention but are not returned.

    Models with feature maps (hierarchical transformers, convolutional networks): images are resized to the pretraining
    resolution, and the last feature map to ``grid`` per side.

    Features whose size differs from ``grid`` are average-pooled if it is a multiple of ``grid``, otherwise resized
    (bilinear; antialiased when downsampling).

    Weights are random until ``load_weights`` is called.

    Args:
        model: timm model name with weights tag, such as "vit_base_patch14_dinov2.lvd142m".
        grid: the denoiser's tokens per side.
        pretrained: load the pretrained weights of ``model`` from the Hugging Face cache, or download them.
        checkpoint: file to load instead (.safetensors, or tensors saved by torch.save), in timm's layout or one that
            timm converts, which includes the original files of DINOv2 and OpenAI's CLIP.
        final_norm: whether to apply the model's final norm to the features.
        resize_first: resize before normalization instead of after it. The resize weights sum to one, so the order
            affects only the last bits.
        resize: interpolation mode, without antialiasing unless it ends in "_antialias".
        layer: block whose tokens are returned (stage, for models with feature maps); negative values count from the
            last.
        image_size: pixels per side to resize images to; overrides the sizes above.
        pad: allow an ``image_size`` that is no multiple of the patch size: resized and normalized images are padded
            with zeros at the right and at the bottom, as by timm's ``dynamic_img_pad``.
        options: further arguments of timm's model constructor, such as {"global_pool": "token"}.

    Attributes:
        embed_dim: embedding dimension D of a token.
        side: pixels per side that images are resized to.
        position_resize: options of timm's ``resample_abs_pos_embed``; its defaults are bicubic and antialiased.

    Raises:
        ValueError: timm has no such model or tag, cannot create it with these options, or it provides no features.
    """

    own_embedding = True
    position_resize: dict[str, Any] = {}

    def __init__(
        self,
        model: str,
        grid: int,
        *,
        pretrained: bool = True,
        checkpoint: File | None = None,
        final_norm: bool = True,
        resize_first: bool = False,
        resize: Literal["bicubic", "bicubic_antialias", "bilinear", "bilinear_antialias"] = "bicubic",
        layer: int = -1,
        image_size: int | None = None,
        pad: bool = False,
        options: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.grid = grid
        self.pretrained = pretrained
        self.checkpoint = checkpoint
        self.final_norm = final_norm
        self.resize_first = resize_first
        mode, _, antialias = resize.partition("_")
        self.resize = {"mode": mode, "antialias": bool(antialias), "align_corners": False}
        self.model = self._made(model, options)
        self.patch_tokens = all(hasattr(self.model, name) for name in ("set_input_size", "num_prefix_tokens"))
        self.layer = layer
        self.padding = 0
        if self.patch_tokens:
            depth, patch = len(self.model.blocks), self.model.patch_embed.feat_ratio()
            if not -depth <= layer < depth:
                raise ValueError(f"{self._what}: layer = {layer}, but '{model}' has {depth} blocks: 0 to {depth - 1}")
            if image_size is not None and (image_size <= 0 or (image_size % patch and not pad)):
                raise ValueError(
                    f"{self._what}: image_size = {image_size} is no multiple of the patch size {patch} "
                    "(pad = true fills it up)"
                )
            self.is_last = layer % depth == depth - 1
            self.depth = depth
            self.side = image_size or grid * patch
            self.padding = -self.side % patch
            self.model.set_input_size(img_size=self.side + self.padding)
            self.embed_dim: int = self.model.embed_dim
        else:
            self.is_last = layer == -1
            self.side = image_size or self.model.pretrained_cfg["input_size"][-1]
            self.embed_dim = self._map_features(model, options)
            if hasattr(self.model, "set_input_size"):
                self.model.set_input_size(img_size=self.side)
        self._computed_on_meta = any(buffer.is_meta for buffer in self.model.buffers())
        self.register_buffer("mean", torch.empty(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.empty(1, 3, 1, 1), persistent=False)
        self._fill_buffers()
        self.requires_grad_(False).eval()

    def train(self, mode: bool = True) -> TimmEncoder:
        """Keep the module in eval mode; ``mode`` is ignored."""
        return super().train(False)

    @property
    def pixel_stats(self) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation (1, 3, 1, 1) of the model's weights, for images in [0, 1]."""
        return self.mean, self.std

    def drop_final_norm(self) -> None:
        """Return features before the final norm from now on."""
        self.final_norm = False

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """Patch tokens (B, grid * grid, D) in row-major order, fp32 (fp64 if the module is in fp64).

        Args:
            images: (B, 3, R, R) in [-1, 1].
        """
        return self._as_tokens(self._features(self.model, self._prepared(images)))

    def block_tokens(self, images: Tensor, blocks: Sequence[int]) -> list[Tensor]:
        """Patch tokens of several blocks of a vision transformer: see :class:`components.contracts.Encoder`."""
        found = self.model.forward_intermediates(
            self._prepared(images),
            indices=list(blocks),
            norm=False,
            stop_early=True,
            output_fmt="NLC",
            intermediates_only=True,
        )
        return [self._as_tokens(features) for features in found]

    @torch.no_grad()
    def embed(self, images: Tensor) -> Tensor:
        """Image embedding (B, D), fp32.

        If ``layer`` is a vision transformer's last block, this is the timm model's pooled output: the class token after
        the final norm, the mean of the patch tokens, or the output of attention pooling. Otherwise it is the mean of
        the features.

        Args:
            images: (B, 3, R, R) in [-1, 1].
        """
        if not (self.patch_tokens and self.is_last):
            return self(images).mean(1)
        tokens = self.model.forward_features(self._prepared(images))
        return at_least_fp32(self.model.forward_head(tokens, pre_logits=True))

    def load_weights(self) -> None:
        """Load ``checkpoint`` if set, otherwise the pretrained weights if ``pretrained``; all keys must match.

        Classifier keys are ignored.

        Raises:
            WeightsError: the file is missing, unreadable or of another architecture, or the download failed.
        """
        # Constants are lost if the module was created on the meta device.
        self._fill_buffers()
        if self.checkpoint is None and not self.pretrained:
            return
        path = self.checkpoint or self._hub_file()
        load_strict(self.model, self._converted(self._read(path)), self._what, path)

    def _made(self, model: str, options: dict[str, Any] | None) -> nn.Module:
        import timm  # takes seconds

        try:
            return timm.create_model(model, pretrained=False, num_classes=0, **(options or {}))
        except (RuntimeError, TypeError) as error:
            raise ValueError(f"{self._what}: timm cannot create '{model}': {error}") from error

    def _map_features(self, model: str, options: dict[str, Any] | None) -> int:
        """Embedding dimension D of a model with feature maps, found by running it on the meta device.

        Raises:
            ValueError: it cannot process images of this size, has no such layer, or cannot apply its final norm.
        """
        with torch.device("meta"):
            probe = self._made(model, options).eval()
            try:
                if hasattr(probe, "set_input_size"):
                    probe.set_input_size(img_size=self.side)
                shape = self._features(probe, torch.empty(1, 3, self.side, self.side)).shape
            except Exception as error:
                raise ValueError(
                    f"{self._what}: timm's '{model}' returns no features of layer {self.layer} for images of "
                    f"{self.side} pixels, {'with' if self.final_norm else 'without'} its final norm: "
                    f"{type(error).__name__}: {error}"
                ) from error
        if len(shape) != 4 or shape[-1] != shape[-2]:
            raise ValueError(f"{self._what}: timm's '{model}' returns features {tuple(shape)}, expected (B, D, n, n)")
        return shape[1]

    def _features(self, model: nn.Module, x: Tensor) -> Tensor:
        """Tokens (B, n * n, D) or a feature map (B, D, n, n) of ``layer``."""
        (features,) = model.forward_intermediates(
            x,
            indices=[self.layer],
            norm=self.final_norm,
            stop_early=not self.is_last,
            output_fmt="NLC" if self.patch_tokens else "NCHW",
            intermediates_only=True,
        )
        return features

    def _as_tokens(self, features: Tensor) -> Tensor:
        """Tokens (B, n * n, D) or a feature map (B, D, n, n) -> tokens (B, grid * grid, D) in at least fp32."""
        features = at_least_fp32(features)
        if features.ndim == 3:
            if features.shape[1] == self.grid**2:
                return features
            features = features.transpose(1, 2).unflatten(2, (math.isqrt(features.shape[1]), -1))
        return _on_grid(features, self.grid).flatten(2).transpose(1, 2)

    def _prepared(self, images: Tensor) -> Tensor:
        """Resize and normalize images in [-1, 1] for the model."""
        x = (at_least_fp32(images) + 1) / 2
        if self.resize_first:
            x = self._normalized(self._resized(x))
        else:
            x = self._resized(self._normalized(x))
        if self.padding:
            x = F.pad(x, (0, self.padding, 0, self.padding))
        return x.to(next(self.model.parameters()).dtype)

    def _resized(self, x: Tensor) -> Tensor:
        if x.shape[-2:] == (self.side, self.side):
            return x
        return F.interpolate(x, size=(self.side, self.side), **self.resize)

    def _normalized(self, x: Tensor) -> Tensor:
        return (x - self.mean) / self.std

    @torch.no_grad()
    def _fill_buffers(self) -> None:
        for name, buffer in (("mean", self.mean), ("std", self.std)):
            buffer.copy_(buffer.new_tensor(self.model.pretrained_cfg[name]).view(1, 3, 1, 1))
        if self._computed_on_meta:
            for name, module in self.model.named_modules():
                if hasattr(module, "init_non_persistent_buffers"):
                    module.init_non_persistent_buffers()
                elif module._non_persistent_buffers_set and not self.mean.is_meta:
                    raise WeightsError(
                        f"{self._what}: created on the meta device, where {name} lost buffers that its constructor "
                        "computed, and this timm cannot recompute them; create the encoder on the CPU, or install a "
                        "newer timm"
                    )

    def _read(self, path: str | Path) -> dict[str, Tensor]:
        """Read the named tensors of a file, in timm's layout or one that timm converts; plugins may support more."""
        return read_state(path, self._what)

    def _converted(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Convert a state dict to timm's layout, resample its position embedding and drop the classifier."""
        convert = getattr(sys.modules[type(self.model).__module__], "checkpoint_filter_fn", None)
        if convert is not None:
            # timm's conversion may fail for another architecture; load_strict then lists the file's own keys.
            with contextlib.suppress(Exception):
                state = convert(dict(state), self.model, **self.position_resize)
        classifier = self.model.pretrained_cfg.get("classifier") or ()
        heads = tuple(f"{c}." for c in ([classifier] if isinstance(classifier, str) else classifier))
        return {key: value for key, value in state.items() if not key.startswith(heads)}

    def _hub_file(self) -> Path:
        """Path of the pretrained weights in the Hugging Face cache; downloads them if necessary."""
        config = self.model.pretrained_cfg
        option = f"[encoders.{self._name}] checkpoint"
        url = config.get("url")
        if not config.get("hf_hub_id"):
            raise WeightsError(
                f"{self._what}: timm publishes no weights for '{config['architecture']}'; set\n"
                f'  {option} = "FILE"\n{f"where FILE is the original {url}, " if url else ""}'
                "or pretrained = false to use random weights"
            )
        repo, _, revision = config["hf_hub_id"].partition("@")
        filename = config.get("hf_hub_filename") or HUB_FILE
        original = f", or the original {url}" if url else ""
        file = f"{filename} of the Hugging Face repository {repo}{original}"
        return hub_file(self._what, repo, filename, revision=revision or None, option=option, file=file)

    @property
    def _name(self) -> str:
        """Name of the plugin in messages."""
        return next((p.name for p in encoders if p.cls is type(self)), type(self).__name__)

    @property
    def _what(self) -> str:
        return f"encoder {self._name}"


def _on_grid(planes: Tensor, grid: int) -> Tensor:
    """Resize feature maps (B, D, n, n) to (B, D, grid, grid)."""
    n = planes.shape[-1]
    if n % grid == 0:
        return F.adaptive_avg_pool2d(planes, grid)
    return F.interpolate(planes, (grid, grid), mode="bilinear", antialias=n > grid, align_corners=False)
