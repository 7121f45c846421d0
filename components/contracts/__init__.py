"""Contracts between the core and plugins: one protocol per plugin kind, and the records they exchange."""

from components.contracts.parts import (
    AdversarialLoss,
    AlignmentLoss,
    Dataset,
    Denoiser,
    Encoder,
    Modules,
    Recipe,
    ReconstructionLoss,
    Tokenizer,
    Update,
)
from components.contracts.records import (
    Batch,
    Cached,
    DatasetItem,
    DenoiserOutput,
    Draws,
    LatentShape,
    LossTerm,
    Posterior,
    Tokens,
)

__all__ = [
    "AdversarialLoss",
    "AlignmentLoss",
    "Batch",
    "Cached",
    "Dataset",
    "DatasetItem",
    "Denoiser",
    "DenoiserOutput",
    "Draws",
    "Encoder",
    "LatentShape",
    "LossTerm",
    "Modules",
    "Posterior",
    "Recipe",
    "ReconstructionLoss",
    "Tokenizer",
    "Tokens",
    "Update",
]
