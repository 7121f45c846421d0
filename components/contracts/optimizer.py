"""Base class of optimizers."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from components.contracts.networks import units_of


class Optimizer(torch.optim.Optimizer):
    """Updates the parameters of one group of the recipe; a ``torch.optim.Optimizer`` with a few promises.

    Constructed from ``(modules: nn.ModuleDict, lr: float)`` and options. The trainer clips gradients, and before each
    step sets every entry of ``param_groups`` to what the constructor made it, with its ``lr`` multiplied by the
    schedule; a param group may start with a learning rate of its own. ``step`` must

    - treat parameters whose ``grad`` is None as absent, and create state at their first step only;
    - leave parameters and state as they are, NaN gradients included, where ``found_inf`` is 1, without reading it on
      the host: ``torch.where(self.found_inf > 0, old, new)``;
    - be exact for DTensors: parameters, gradients and state may be sharded by rows over the ranks
      (:func:`components.distributed.parallel.local`; whole matrices: :mod:`components.optim.whole_matrices`).

    State by parameter consists of tensors, those of the parameter's shape sharded like it (``torch.zeros_like(p)``);
    it is zero before the first step, and saved in checkpoints by the parameter's name.

    Attributes:
        given: names of the constructor arguments that the trainer passes; options follow after a bare ``*``.
        found_inf: float scalar on the parameters' device, 1 to skip the step and 0 to apply it; None: apply it.
    """

    given: ClassVar[tuple[str, ...]] = ("modules", "lr")

    found_inf: Tensor | None = None


def trained_parameters(modules: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that require gradients, by their names in the unwrapped module."""
    named = ((name.replace("_checkpoint_wrapped_module.", ""), p) for name, p in modules.named_parameters())
    return {name: p for name, p in named if p.requires_grad}


def hidden_matrices(modules: nn.ModuleDict) -> set[nn.Parameter]:
    """Trained matrices of the networks' hidden layers: of their ``units()``, such as blocks, without embeddings.

    Embeddings of inputs, times and classes, and the output layer of a transformer are outside of its units.
    """
    units = [unit for network in modules.values() for unit in units_of(network)]
    layers = {layer for unit in units for layer in unit.modules() if not isinstance(layer, nn.Embedding)}
    own = (p for layer in layers for p in layer.parameters(recurse=False))
    return {p for p in own if p.ndim == 2 and p.requires_grad}
