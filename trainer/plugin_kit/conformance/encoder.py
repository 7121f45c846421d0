"""Checks of encoders."""

from __future__ import annotations

from torch import Tensor

from trainer.plugin_kit.conformance import generic
from trainer.plugin_kit.conformance.adapter import Adapter, images, shapes
from trainer.plugin_kit.conformance.case import GIVEN, SIDE, Case, Check, Failure, bind
from trainer.plugin_kit.conformance.contract import sets_every_attribute

GRID = GIVEN["grid"]
SIZES = ((32, 4, 1), (64, 4, 2), (48, 3, 3), (64, 8, 2))  # pixels, tokens per side, images


def checks(case: Case) -> list[Check]:
    adapter = Adapter(
        make=case.make,
        inputs=lambda count: (images(count, SIDE),),
        call=lambda encoder, inputs: {"tokens": encoder(*inputs), "embedding": encoder.embed(*inputs)},
        learns=False,
        may_be_bf16=("tokens", "embedding"),
    )
    own = bind(case, case, sets_every_attribute, returns_tokens, tokens_are_row_major)
    return own + generic.checks(case, adapter, generic.is_frozen)


def returns_tokens(case: Case) -> None:
    """Images (B, 3, R, R) become tokens (B, grid * grid, embed_dim) for any R and grid."""
    for side, grid, count in SIZES:
        encoder = case.make(resolution=side, grid=grid).eval()
        expected = (count, grid**2, encoder.embed_dim)
        tokens = encoder(images(count, side))
        where = f"{count} images of {side} px and a grid of {grid}"
        if isinstance(tokens, Tensor) and tokens.dim() == 3 and 0 < tokens.shape[1] - grid**2 < 9:
            raise Failure(
                f"tokens have shape {tuple(tokens.shape)} for {where}; expected {expected}: drop class and register "
                "tokens"
            )
        shapes({"tokens": tokens}, expected, where)
        shapes({"embed(images)": encoder.embed(images(count, side))}, (count, encoder.embed_dim), where)


def tokens_are_row_major(case: Case) -> None:
    """Tokens are in row-major order: the upper right image corner affects token grid - 1 most."""
    encoder = case.make().eval()
    x = images(1, SIDE)
    y, patch = x.clone(), SIDE // GRID
    y[..., :patch, -patch:] *= -1
    change = (encoder(x) - encoder(y)).detach().float().norm(dim=-1)[0]
    if change[GRID * (GRID - 1)] > 2 * change[GRID - 1]:
        raise Failure("tokens are in column-major order; expected row-major, flatten(2) of (B, D, rows, columns)")
