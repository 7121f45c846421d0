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
    DenoiserOutput,
    Draws,
    LatentShape,
    Posterior,
    Sample,
    Tokens,
    Weighted,
)

__all__ = [
    "AdversarialLoss",
    "AlignmentLoss",
    "Batch",
    "Cached",
    "Dataset",
    "Denoiser",
    "DenoiserOutput",
    "Draws",
    "Encoder",
    "LatentShape",
    "Modules",
    "Posterior",
    "Recipe",
    "ReconstructionLoss",
    "Sample",
    "Tokenizer",
    "Tokens",
    "Update",
    "Weighted",
]
