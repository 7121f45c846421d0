"""Alignment encoders out of timm's vision transformers: what every such plugin shares."""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from components.precision import at_least_fp32
from components.registry import encoders
from components.weights import WeightsError, hub_file, load_strict, read_state

HUB_FILE = "model.safetensors"  # unless timm names another


class TimmEncoder(nn.Module):
    """A frozen vision transformer of timm as a :class:`components.contracts.Encoder`; plugins derive from it.

    Images are resized to ``grid * patch_size`` pixels per side (bicubic, no antialiasing), so that the
    transformer's patches are the denoiser's tokens whatever the resolution. A position embedding of another grid
    is resampled when the weights are read (bicubic, antialiased: timm's ``resample_abs_pos_embed``). Class and
    register tokens take part in attention and are dropped from the result.

    The weights stay random before ``load_weights``.

    Args:
        model: name in timm, with the tag of its weights: "vit_base_patch14_dinov2.lvd142m".
        grid: the denoiser's tokens per side.
        pretrained: read the weights that belong to ``model`` from the Hugging Face cache, or download them.
        checkpoint: file to read instead (.safetensors, or tensors saved by torch.save), in timm's layout or in
            any that timm converts to it, which includes the original authors' for DINOv2 and OpenAI's CLIP.
        final_norm: whether the tokens pass the transformer's last norm.
        resize_first: resize before the normalisation instead of after it. Bicubic weights sum to one, so this
            matters to the last bits only.

    Attributes:
        embed_dim: features D of a token.
        side: pixels per side that the transformer sees.

    Raises:
        ValueError: timm knows no such model or tag, or it is no vision transformer whose patch grid timm can change.
    """

    def __init__(
        self,
        model: str,
        grid: int,
        *,
        pretrained: bool = True,
        checkpoint: str | None = None,
        final_norm: bool = True,
        resize_first: bool = False,
    ) -> None:
        super().__init__()
        import timm  # takes seconds

        self.pretrained = pretrained
        self.checkpoint = checkpoint
        self.final_norm = final_norm
        self.resize_first = resize_first
        try:
            self.model = timm.create_model(model, pretrained=False, num_classes=0)
        except RuntimeError as error:
            raise ValueError(f"{self._what}: timm cannot make '{model}': {error}") from error
        if not hasattr(self.model, "set_input_size") or not hasattr(self.model, "num_prefix_tokens"):
            raise ValueError(f"{self._what}: timm's '{model}' is no vision transformer of patch tokens")
        self.embed_dim: int = self.model.num_features
        self.side = grid * self.model.patch_embed.patch_size[0]
        self.model.set_input_size(img_size=self.side)
        self.register_buffer("mean", torch.empty(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.empty(1, 3, 1, 1), persistent=False)
        self._fill_buffers()
        self.requires_grad_(False).eval()

    def train(self, mode: bool = True) -> TimmEncoder:
        """Stays in evaluation mode whatever ``mode`` says."""
        return super().train(False)

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """Patch tokens (B, grid * grid, D), rows first, fp32 (fp64 from a module in fp64).

        Args:
            images: (B, 3, R, R) in [-1, 1].
        """
        x = self._prepared(images)
        (tokens,) = self.model.forward_intermediates(
            x, indices=1, norm=self.final_norm, output_fmt="NLC", intermediates_only=True
        )
        return at_least_fp32(tokens)

    @torch.no_grad()
    def embed(self, images: Tensor) -> Tensor:
        """One vector per image (B, D), fp32: the class token behind the final norm, or what timm's model pools to.

        Args:
            images: (B, 3, R, R) in [-1, 1].
        """
        tokens = self.model.forward_features(self._prepared(images))
        return at_least_fp32(self.model.forward_head(tokens, pre_logits=True))

    def load_weights(self) -> None:
        """Reads ``checkpoint``, or else the pretrained weights, or else nothing; every key must fit.

        Keys of a classifier are left out; the encoder has none.

        Raises:
            WeightsError: the file is missing, unreadable or of another architecture; or the download failed.
        """
        # On the meta device, where the module may have been made, the constants were lost.
        self._fill_buffers()
        if self.checkpoint is None and not self.pretrained:
            return
        path = self.checkpoint or self._hub_file()
        load_strict(self.model, self._converted(read_state(path, self._what)), self._what, path)

    def _prepared(self, images: Tensor) -> Tensor:
        """Images in [-1, 1], as the transformer takes them."""
        x = (at_least_fp32(images) + 1) / 2
        if self.resize_first:
            x = self._normalised(self._resized(x))
        else:
            x = self._resized(self._normalised(x))
        return x.to(self.model.patch_embed.proj.weight.dtype)

    def _resized(self, x: Tensor) -> Tensor:
        if x.shape[-2:] == (self.side, self.side):
            return x
        return F.interpolate(x, size=(self.side, self.side), mode="bicubic", align_corners=False)

    def _normalised(self, x: Tensor) -> Tensor:
        return (x - self.mean) / self.std

    @torch.no_grad()
    def _fill_buffers(self) -> None:
        for name in ("mean", "std"):
            buffer = getattr(self, name)
            buffer.copy_(buffer.new_tensor(self.model.pretrained_cfg[name]).view(1, 3, 1, 1))

    def _converted(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """A state dict in timm's layout, position embedding on our grid, without the classifier."""
        convert = getattr(sys.modules[type(self.model).__module__], "checkpoint_filter_fn", None)
        if convert is not None:
            # Another architecture may break timm's conversion half way: then load_strict names the file's own keys.
            with contextlib.suppress(Exception):
                state = convert(dict(state), self.model)
        classifier = self.model.pretrained_cfg.get("classifier") or ()
        heads = tuple(f"{c}." for c in ([classifier] if isinstance(classifier, str) else classifier))
        return {key: value for key, value in state.items() if not key.startswith(heads)}

    def _hub_file(self) -> Path:
        """The pretrained weights' file in the Hugging Face cache, downloaded if need be."""
        config = self.model.pretrained_cfg
        option = f"[encoders.{self._name}] checkpoint"
        if not config.get("hf_hub_id"):
            raise WeightsError(
                f"{self._what}: timm publishes no weights for '{config['architecture']}'; set\n"
                f'  {option} = "FILE"\nor pretrained = false for random weights'
            )
        repo, _, revision = config["hf_hub_id"].partition("@")
        filename = config.get("hf_hub_filename") or HUB_FILE
        original = f", or the original {config['url']}" if config.get("url") else ""
        file = f"{filename} of the Hugging Face repository {repo}{original}"
        return hub_file(self._what, repo, filename, revision=revision or None, option=option, file=file)

    @property
    def _name(self) -> str:
        """The plugin's name, for messages."""
        return next((p.name for p in encoders if p.cls is type(self)), type(self).__name__)

    @property
    def _what(self) -> str:
        return f"encoder {self._name}"
