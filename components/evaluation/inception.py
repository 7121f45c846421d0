"""The Inception network that defines FID: torch-fidelity's port of the 2015-12-05 TensorFlow graph."""

from __future__ import annotations

import hashlib
import io
import urllib.request
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from components.files.atomic import atomic_write
from components.files.download import one_per_machine
from components.files.weights import WeightsError, read_state
from components.nn.precision import full_fp32, no_autocast

WHAT = "Inception (FID)"
PUBLISHED = "6726825d"  # prefix of the published weights' sha256
POOL, SPATIAL = 2048, 17 * 17 * 7
DOWNLOAD_TIMEOUT_S = 10


class Inception(nn.Module):
    """Computes the features for FID, sFID and the Inception Score; frozen, in fp32.

    Args:
        weights: weights file in torch-fidelity's layout; empty: the published one, from PyTorch's cache or downloaded.

    Attributes:
        dims: number of features by name.
        about: identifies the network: ``name``, ``sha256``, ``published`` (whether the weights are those used for
            published numbers) and ``file``.

    Raises:
        WeightsError: the weights are missing, unreadable or from another network.
    """

    dims = {"pool": POOL, "spatial": SPATIAL}

    def __init__(self, weights: str | Path = "") -> None:
        super().__init__()
        path, sha256 = find_weights(weights)
        state = read_state(path, WHAT)
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

        # torch-fidelity unpickles its file, so pass it tensors that were read safely.
        buffer = io.BytesIO()
        torch.save(state, buffer)
        buffer.seek(0)
        try:
            self.network = FeatureExtractorInceptionV3("inception", ["2048"], feature_extractor_weights_path=buffer)
        except RuntimeError as error:
            raise WeightsError(f"{WHAT}: '{path}' does not match torch-fidelity's Inception: {error}") from error
        self.about: dict[str, Any] = {
            "name": "inception-v3-2015-12-05 (torch-fidelity)",
            "sha256": sha256,
            "published": sha256.startswith(PUBLISHED),
            "file": str(path),
        }
        self._spatial: Tensor | None = None
        # mixed_6/conv of the TensorFlow graph, after batch norm and ReLU.
        self.network.Mixed_6d.branch1x1.register_forward_hook(self._keep_spatial)
        self.requires_grad_(False).eval()

    def train(self, mode: bool = True) -> Inception:
        """Keep the module in eval mode; ``mode`` is ignored."""
        return super().train(False)

    @torch.no_grad()
    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Return ``pool`` (B, 2048) and ``spatial`` (B, 2023), float32.

        ``spatial`` is used for sFID (Nash et al. 2021, arXiv 2103.03841, as in ADM's suite): the first 7 channels of a
        17 x 17 feature map, flattened in the order (row, column, channel) of ADM's files.

        Args:
            images: uint8 (B, 3, H, W); resized to 299 x 299 as in TensorFlow 1 (bilinear, ``align_corners=False``).
        """
        with no_autocast(images), full_fp32():
            (pool,) = self.network(images)
        spatial, self._spatial = self._spatial[:, :7].permute(0, 2, 3, 1).flatten(1), None
        return {"pool": pool, "spatial": spatial}

    @torch.no_grad()
    def logits(self, pool: Tensor) -> Tensor:
        """Logits (B, 1008) from ``pool`` (B, 2048), without bias as in the original Inception Score."""
        with no_autocast(pool), full_fp32():
            return pool @ self.network.fc.weight.T

    def _keep_spatial(self, module: nn.Module, args: Any, output: Tensor) -> None:
        self._spatial = output


def find_weights(weights: str | Path = "") -> tuple[Path, str]:
    """Find or download the weights; return the file and its sha256.

    Args:
        weights: a file with any weights; empty: the published ones, which are verified.

    Raises:
        WeightsError: the file is missing or damaged; the message says how to provide it.
    """
    if weights:
        path = Path(weights).expanduser()
        if not path.is_file():
            raise WeightsError(f"{WHAT}: the weights '{weights}' do not exist (looked at {path.absolute()})")
        return path, file_sha256(path)
    from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3 as URL

    path = Path(torch.hub.get_dir()) / "checkpoints" / URL.rsplit("/", 1)[1]
    try:
        if not path.is_file():
            with one_per_machine(URL):
                if not path.is_file():
                    _download(URL, path)
        sha256 = file_sha256(path)
    except OSError as error:
        raise WeightsError(
            f"{WHAT}: the weights are not in PyTorch's cache ({path}) and could not be downloaded "
            f"({type(error).__name__}: {error}). Either run once with network access (or copy the file {path.name} "
            f"there), or pass it with --inception-weights FILE or [evaluation] inception_weights in the config; "
            f"it is published at {URL}"
        ) from error
    if not sha256.startswith(PUBLISHED):
        raise WeightsError(
            f"{WHAT}: {path} is damaged or another file: its sha256 begins with {sha256[:8]}, expected {PUBLISHED}; "
            "remove it and run again, or pass other weights with --inception-weights FILE"
        )
    return path, sha256


def file_sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _download(url: str, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with (
        atomic_write(path, fsync=False, concurrent=True) as temporary,  # other machines may share the folder
        urllib.request.urlopen(url, timeout=DOWNLOAD_TIMEOUT_S) as answer,
        open(temporary, "wb") as file,
    ):
        while block := answer.read(1 << 20):
            file.write(block)
