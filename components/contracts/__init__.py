"""Contracts between the core and plugins: one base class per plugin kind, and the records they exchange."""

from components.contracts.dataset import Dataset
from components.contracts.losses import AdversarialLoss, AlignmentLoss, ReconstructionLoss
from components.contracts.networks import Denoiser, Encoder, Network, Tokenizer, units_of
from components.contracts.optimizer import Optimizer, hidden_matrices, trained_parameters
from components.contracts.recipe import Modules, Recipe, Sampler, Update
from components.contracts.records import (
    Batch,
    Cached,
    Condition,
    DatasetItem,
    DenoiserOutput,
    Distribution,
    LatentShape,
    LossTerm,
    Posterior,
    Prediction,
    RandomNumbers,
    Tokens,
)

__all__ = [
    "AdversarialLoss",
    "AlignmentLoss",
    "Batch",
    "Cached",
    "Condition",
    "Dataset",
    "DatasetItem",
    "Denoiser",
    "DenoiserOutput",
    "Distribution",
    "Encoder",
    "LatentShape",
    "LossTerm",
    "Modules",
    "Network",
    "Optimizer",
    "Posterior",
    "Prediction",
    "RandomNumbers",
    "Recipe",
    "ReconstructionLoss",
    "Sampler",
    "Tokenizer",
    "Tokens",
    "Update",
    "hidden_matrices",
    "trained_parameters",
    "units_of",
]
