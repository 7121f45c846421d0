"""Random weights for torch-fidelity's Inception, since tests have no network access."""

from __future__ import annotations

from pathlib import Path
from unittest import mock

import torch
from torch import nn


def random_inception(tmp_path_factory) -> Path:
    """Return a file of 100 MB, created once per session, whose weights keep the activations' scale across layers."""
    path = tmp_path_factory.getbasetemp() / "random_inception.pth"
    return path if path.is_file() else _write(path)


def _write(path: Path) -> Path:
    from torch_fidelity import feature_extractor_inceptionv3 as fidelity

    made = fidelity.FeatureExtractorInceptionV3
    with (
        mock.patch.object(fidelity, "load_state_dict_from_url", return_value={}),
        mock.patch.object(made, "load_state_dict"),
    ):
        network = made("inception", ["2048"])
    torch.manual_seed(0)
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.normal_(module.weight, std=(2 / module.weight[0].numel()) ** 0.5)
        elif isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.bias, std=0.1)
    nn.init.normal_(network.fc.weight, std=0.3)
    # The published file has no num_batches_tracked.
    torch.save({k: v for k, v in network.state_dict().items() if not k.endswith("num_batches_tracked")}, path)
    return path
