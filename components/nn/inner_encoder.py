"""Encoder plugins inside of other plugins, chosen by name and options."""

from __future__ import annotations

from typing import Any

from pydantic import ValidationError

from components.contracts import Encoder
from components.files.weights import WeightsError
from components.registry import PluginError, encoders


def make_encoder(place: str, name: str, options: dict[str, Any], resolution: int, grid: int) -> Encoder:
    """Construct an encoder, frozen and in eval mode, with random weights.

    Args:
        place: config table of the plugin that contains it, with the keys ``encoder`` and ``encoder_options``.
        name: of the encoder plugin.
        options: of that plugin.
        resolution: side of the images in pixels.
        grid: tokens per side.

    Raises:
        ValueError: there is no such encoder, or it refuses its options; names the key.
    """
    try:
        plugin = encoders.get(name)
        plugin.schema().model_validate(options)
    except PluginError as error:
        raise ValueError(f"{place}.encoder: {error}") from error
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        key = ".".join(map(str, first["loc"]))
        raise ValueError(
            f"{place}.encoder_options.{key}: {first['msg']}; options of encoder '{name}': {', '.join(plugin.options)}"
        ) from error
    encoder: Encoder = plugin.cls(resolution, grid, **options)
    encoder.requires_grad_(False).eval()
    return encoder


def load_encoder(encoder: Encoder, name: str, what: str, options: str) -> None:
    """Load the encoder's weights.

    Args:
        name: of the encoder plugin.
        what: the plugin that contains it, in messages.
        options: what messages call the table of the encoder's options.

    Raises:
        WeightsError: they cannot be loaded; names the options to set.
    """
    try:
        encoder.load_weights()
    except WeightsError as error:
        raise WeightsError(f"{what}: {str(error).replace(f'[encoders.{name}]', options)}") from error
