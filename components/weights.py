"""Loading weights from files: strict, safe (no pickled code), with errors that name file and keys."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from components.materialise import fill

HUB_TIMEOUT_S = 10


class WeightsError(Exception):
    """Weights are missing, unreadable, or do not fit the module."""


def read_state(path: str | Path, what: str) -> dict[str, Tensor]:
    """Reads a state dict from ``.safetensors`` or a ``torch.save`` file (tensors only, never code).

    A wrapper of one level (``state_dict``, ``model``) is opened.

    Args:
        path: the file.
        what: whose weights they are, for messages ("tokenizer autoencoder_kl").

    Raises:
        WeightsError: no such file; not a weights file; it holds no tensors.
    """
    file = Path(path).expanduser()
    if not file.is_file():
        raise WeightsError(f"{what}: checkpoint '{path}' does not exist (looked at {file.absolute()})")
    try:
        if file.suffix == ".safetensors":
            from safetensors.torch import load_file

            state = load_file(file)
        else:
            state = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:
        reason = str(error).split("\n", 1)[0]
        raise WeightsError(
            f"{what}: checkpoint '{path}' cannot be read as .safetensors or as tensors saved by torch.save "
            f"({type(error).__name__}: {reason})"
        ) from error
    for wrapper in ("state_dict", "model"):
        if isinstance(state, dict) and isinstance(state.get(wrapper), dict):
            state = state[wrapper]
    if not isinstance(state, dict) or not any(isinstance(v, Tensor) for v in state.values()):
        raise WeightsError(f"{what}: checkpoint '{path}' holds no named tensors")
    return {key: value for key, value in state.items() if isinstance(value, Tensor)}


def hub_file(what: str, repo: str, filename: str, *, revision: str | None = None, option: str, file: str) -> Path:
    """A file of a Hugging Face repository: from the local cache, or downloaded into it.

    Args:
        what: whose weights they are, for messages.
        repo: "organisation/name".
        filename: within the repository.
        revision: branch, tag or commit; none: the main branch.
        option: the key that names a local file instead, as ``[losses.lpips] vgg_checkpoint``.
        file: which file that may be.

    Raises:
        WeightsError: neither cached nor to be had; says both ways to provide it.
    """
    from huggingface_hub import get_hf_file_metadata, hf_hub_download, hf_hub_url
    from huggingface_hub.utils import LocalEntryNotFoundError

    where = {"repo_id": repo, "filename": filename, "revision": revision}
    try:
        try:
            return Path(hf_hub_download(**where, local_files_only=True))
        except LocalEntryNotFoundError:
            # One request first: without a network, hf_hub_download retries for 25 s before it gives up.
            get_hf_file_metadata(hf_hub_url(**where), timeout=HUB_TIMEOUT_S)
            return Path(hf_hub_download(**where))
    except Exception as error:
        reason = str(error).split("\n", 1)[0]
        raise WeightsError(
            f"{what}: the weights {repo} are not in the Hugging Face cache and could not be downloaded "
            f"({type(error).__name__}: {reason}). Either run once with network access (or copy a filled cache and "
            f'point HF_HOME at it), or set\n  {option} = "FILE"\nwhere FILE is {file}'
        ) from error


def load_strict(module: nn.Module, state: dict[str, Tensor], what: str, source: str | Path) -> None:
    """Loads ``state`` into ``module`` in place, all of it or nothing; a sharded module's ranks take their parts.

    Raises:
        WeightsError: missing, unexpected or mis-shaped keys, each named (the first eight of a kind).
    """
    own = module.state_dict()
    missing = [key for key in own if key not in state]
    unexpected = [key for key in state if key not in own]
    shapes = [
        f"{key}: file {tuple(state[key].shape)}, expected {tuple(own[key].shape)}"
        for key in own
        if key in state and state[key].shape != own[key].shape
    ]
    problems = [
        f"  {len(keys)} {title}: {', '.join(keys[:8])}{', ...' if len(keys) > 8 else ''}"
        for title, keys in (("missing", missing), ("unexpected", unexpected), ("of another shape", shapes))
        if keys
    ]
    if problems:
        raise WeightsError(f"{what}: '{source}' does not fit the module:\n" + "\n".join(problems))
    if any(isinstance(value, DTensor) for value in own.values()):
        for key, value in own.items():
            fill(value, state[key])
    else:
        module.load_state_dict(state)
