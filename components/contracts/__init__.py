"""What parts promise each other: records and protocols."""

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
