"""Base classes of the networks that plugins provide: tokenizers, denoisers and encoders.

Shapes: B images per micro-batch, R pixels per side, C latent channels of h x w, N = n x n tokens on the
denoiser's grid, D_k features of encoder k. Images that reach a model are float in [-1, 1].
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from components.contracts.records import Condition, DenoiserOutput, Posterior, Prediction, Tokens


class Network(nn.Module):
    """A module that the trainer initializes, shards, compiles and loads; also the base of losses with weights.

    Attributes:
        forward_methods: methods other than ``forward`` that use the parameters; FSDP must wrap them.
        keep_fp32: compute in fp32 even in a bf16 run; may also be set on a unit that is a ``Network``.
        compiles: false on a unit that is a ``Network``: it stays eager with ``training.compile``, for example because
            its buffers change between its calls in a step, while the backward pass still needs their earlier values.
        adapters: classes derived from :class:`components.files.adapter.StateDictAdapter`: file formats of other
            programs that a tokenizer, denoiser or discriminator is read from and written to, besides its own keys.
        given: names of the constructor arguments that the trainer passes; options follow after a bare ``*``.
    """

    given: ClassVar[tuple[str, ...]] = ()
    forward_methods: ClassVar[tuple[str, ...]] = ()
    keep_fp32: ClassVar[bool] = False
    compiles: ClassVar[bool] = True
    adapters: ClassVar[tuple[Any, ...]] = ()

    def __init__(self) -> None:  # that of nn.Module accepts any arguments, so a plugin's options would not be checked
        super().__init__()

    def units(self) -> Sequence[nn.Module]:
        """Submodules to compile, checkpoint and shard separately, called only through ``forward``; none: one unit."""
        return ()

    def compiled_methods(self) -> Sequence[Any]:
        """Methods of submodules to compile beside the units: costly layers outside of them."""
        return ()

    def init_weights(self) -> None:
        """Initialize every parameter and buffer, using torch's global generator.

        A class that overrides this is constructed on the meta device and sharded before it gets memory; others are
        constructed on the CPU. Loading a trained model skips it if the state dict holds every parameter and buffer.
        """

    def load_weights(self) -> None:
        """Load pretrained weights, if the options name any. Called once, after the module has left the meta device.

        Raises:
            WeightsError: if they cannot be loaded; the message lists every way to provide them.
        """

    @classmethod
    def initializes_itself(cls) -> bool:
        """Whether the class overrides :meth:`init_weights`."""
        return cls.init_weights is not Network.init_weights


class Tokenizer(Network):
    """Encodes images to latents and decodes latents to images. Constructed from its options alone.

    Attributes:
        factor: downsampling factor, pixels per latent position along each side.
        channels: latent channels C.
        trainable: whether any part of the tokenizer can be trained.
        frozen_encoder: only the decoder can be trained. ``encode`` must not propagate gradients, and the encoder's
            parameters must not require them.
        resolution: image side in pixels, if the tokenizer supports only one.
        variant: options that change the latents, but not the weights; part of the tokenizer's fingerprint.
    """

    forward_methods = ("encode", "decode")

    factor: int
    channels: int
    trainable: bool = True
    frozen_encoder: bool = False
    resolution: int | None = None
    variant: str = ""

    @abstractmethod
    def encode(self, x: Tensor) -> Posterior:
        """Images (B, 3, R, R) in [-1, 1] -> posterior over latents (B, C, R / factor, R / factor)."""
        raise NotImplementedError

    @abstractmethod
    def decode(self, z: Tensor) -> Tensor:
        """Latents (B, C, h, w) -> images (B, 3, h * factor, w * factor), nominally in [-1, 1]."""
        raise NotImplementedError

    def last_layer(self) -> nn.Module | None:
        """The last layer of the decoder with a weight, ``nn.Linear`` or ``nn.Conv2d``, for adaptive adversarial losses.

        It must be outside of ``units()``, and ``decode`` must call it once. None: there is no such layer.
        """
        return None


class Denoiser(Network):
    """Predicts the velocity of x_t. Constructed from ``(latent: LatentShape, num_classes: int)`` and options.

    Attributes:
        width: dimension of the hidden tokens.
        grid: tokens per side; N = grid ** 2.
        align_depth: index of the block, counted from 1, whose output ``tokens`` returns; or an ascending list.
        null_label: label of the unconditional class, ``num_classes``.
        label_dropout: probability of replacing a condition with :meth:`null_condition` in training.
        prediction: what the network predicts. The denoiser converts data and noise to velocities itself
            (:func:`components.nn.transformer.to_velocity`), which is defined for the linear path only.
        noisy_inputs: tensors that the denoiser denoises together with the latent, such as REG's class token: shape per
            image by name. ``forward`` and ``tokens`` take each by this name, noised, and ``forward`` returns their
            velocities in ``others``. A vector's token precedes the patch tokens.
        early_depth: block, counted from 1, from whose tokens the denoiser predicts the velocity a second time
            (``DenoiserOutput.early``), for internal guidance; 0: it does not.
        early_weight: weight of that prediction's loss beside the final one's.
        takes: further keyword arguments of ``forward`` and ``tokens`` that recipes and their samplers may pass, such
            as MeanFlow's "interval"; each has a default.
    """

    given = ("latent", "num_classes")
    forward_methods = ("tokens",)

    width: int
    grid: int
    align_depth: int | Sequence[int]
    null_label: int
    label_dropout: float = 0.0
    prediction: Prediction = "velocity"
    early_depth: int = 0
    early_weight: float = 1.0
    takes: ClassVar[frozenset[str]] = frozenset()
    noisy_inputs: dict[str, tuple[int, ...]] = {}

    @abstractmethod
    def forward(self, x_t: Tensor, t: Tensor, condition: Condition) -> DenoiserOutput:
        """Velocity and hidden tokens at x_t (B, C, h, w), t (B,) in [0, 1], labels in [0, null_label]."""
        raise NotImplementedError

    @abstractmethod
    def tokens(self, x_t: Tensor, t: Tensor, condition: Condition) -> Tokens:
        """Hidden tokens only: blocks after the last ``align_depth`` do not run."""
        raise NotImplementedError

    def null_condition(self, condition: Condition) -> Condition:
        """The unconditional counterpart of a condition, of the same shapes."""
        return condition._replace(label=torch.full_like(condition.label, self.null_label))

    def example_condition(self, size: int) -> Condition:
        """A condition of ``size`` images, to estimate, time and check the denoiser without a dataset.

        A denoiser that needs more than the label overrides it; the condition of an image must not depend on ``size``.
        """
        return Condition(torch.zeros(size, dtype=torch.int64))


class Encoder(Network):
    """A frozen visual encoder whose patch tokens are the alignment targets.

    Constructed from ``(resolution: int, grid: int)`` (image side in pixels, the denoiser's tokens per side) and
    options.

    Attributes:
        embed_dim: dimension D of a token.
        own_embedding: whether ``embed`` is the model's own image embedding, such as its class token.
        native_grid: the ``grid`` that evaluation constructs the encoder with.
        pixel_stats: mean and standard deviation (1, 3, 1, 1) by which the encoder normalizes images in [0, 1]; None: it
            takes images in [-1, 1] as they are.
        depth: number of blocks whose tokens :meth:`block_tokens` returns; 0: the encoder does not return them.
    """

    given = ("resolution", "grid")
    forward_methods = ("embed", "block_tokens")

    embed_dim: int
    own_embedding: bool = False
    native_grid: int = 16  # 224 pixels with patches of 14
    depth: int = 0

    @property
    def pixel_stats(self) -> tuple[Tensor, Tensor] | None:
        return None

    @abstractmethod
    def forward(self, images: Tensor) -> Tensor:
        """Images (B, 3, R, R) in [-1, 1] -> patch tokens (B, grid * grid, D), in row-major order."""
        raise NotImplementedError

    def embed(self, images: Tensor) -> Tensor:
        """Images (B, 3, R, R) in [-1, 1] -> one vector (B, D) per image; by default the mean of the patch tokens."""
        tokens: Tensor = self(images)
        return tokens.mean(1)

    def drop_final_norm(self) -> None:
        """Return tokens before the model's final norm from now on, if it has one that can be left out."""

    def block_tokens(self, images: Tensor, blocks: Sequence[int]) -> list[Tensor]:
        """Patch tokens (B, grid * grid, D) after each of ``blocks``, before the final norm.

        Args:
            images: (B, 3, R, R) in [-1, 1]; gradients reach them.
            blocks: ascending indices in [0, ``depth``).
        """
        raise NotImplementedError(f"{type(self).__name__} returns the tokens of its last block only")


def units_of(module: nn.Module) -> Sequence[nn.Module]:
    """``module.units()`` of a :class:`Network`; none for any other module."""
    return module.units() if isinstance(module, Network) else ()
