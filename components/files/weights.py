"""Loading weights from files: safe (never runs pickled code) and strict, with errors that name the file and keys."""

from __future__ import annotations

import argparse
import contextlib
import re
import zipfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.serialization import get_unsafe_globals_in_checkpoint, safe_globals

from components.distributed.materialize import fill
from components.files.download import one_per_machine

HUB_TIMEOUT_S = 10
HUB_PATH = re.compile(r"hf://(?P<repo>[^/@]+/[^/@]+)/(?P<filename>[^@]+?)(?:@(?P<revision>.+))?")
SHOWN = 20  # maximum number of keys listed in full in a message; more are abbreviated as ranges


class WeightsError(Exception):
    """Weights are missing, unreadable, or do not match the module."""


class Opaque:
    """Placeholder for a pickled object whose class is not imported; ignores its arguments and state."""

    def __new__(cls, *_: Any, **__: Any) -> Opaque:
        return object.__new__(cls)

    def __setstate__(self, _: Any) -> None:
        pass


# Classes allowed in files besides tensors and plain values: argparse.Namespace (published training checkpoints), and
# classes that Lightning pickles (CompVis checkpoints), which are replaced by Opaque.
OPAQUE = (
    "pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint",
    "numpy.core.multiarray.scalar",
    "numpy._core.multiarray.scalar",
    "numpy.dtype",
)
ALLOWED = [argparse.Namespace, *((Opaque, name) for name in OPAQUE)]


def read_state(path: str | Path, what: str) -> dict[str, Tensor]:
    """Read a state dict from a ``.safetensors`` or ``torch.save`` file (tensors only, never code).

    Unwraps a ``state_dict`` or ``model`` key.

    Args:
        path: the file, or ``hf://organization/name/file[@revision]``.
        what: owner of the weights in messages, such as "tokenizer autoencoder_kl".

    Raises:
        WeightsError: the file is missing, is not a weights file, or contains no tensors.
    """
    state = read_tree(path, what)
    for wrapper in ("state_dict", "model"):
        if isinstance(state.get(wrapper), dict):
            state = state[wrapper]
    if not any(isinstance(v, Tensor) for v in state.values()):
        raise WeightsError(f"{what}: checkpoint '{path}' contains no named tensors")
    return {key: value for key, value in state.items() if isinstance(value, Tensor)}


def read_tree(path: str | Path, what: str) -> dict[str, Any]:
    """Read all content of a weights file: tensors and plain values in nested dicts.

    Tensors of a ``torch.save`` file are memory-mapped, because most of a training checkpoint is optimizer state.

    Args:
        path: as in :func:`read_state`.
        what: owner of the weights in messages.

    Raises:
        WeightsError: the file is missing, is not a weights file, or would run code.
    """
    file = local_file(path, what)
    if file.is_dir():
        raise WeightsError(f"{what}: checkpoint '{path}' is a folder; expected a .safetensors or torch.save file")
    if not file.is_file():
        raise WeightsError(f"{what}: checkpoint '{path}' does not exist (looked at {file.absolute()})")
    try:
        if file.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(file)
        with safe_globals(ALLOWED):
            tree = torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
    except Exception as error:
        # Skip PyTorch's first line, which recommends weights_only=False.
        reason = next((line for line in str(error).split("\n") if line and "weights_only" not in line), "")
        if code := _code_in(file, str(error)):
            raise WeightsError(
                f"{what}: checkpoint '{path}' is refused: it pickles {', '.join(code)}, and reading that could run "
                "code. Use a .safetensors file, or, only if you trust its source, save its state dict again with "
                "torch.save"
            ) from error
        raise WeightsError(
            f"{what}: checkpoint '{path}' cannot be read as .safetensors or as tensors saved by torch.save "
            f"({type(error).__name__}: {reason})"
        ) from error
    if not isinstance(tree, dict):
        raise WeightsError(f"{what}: checkpoint '{path}' contains a {type(tree).__name__}; expected named tensors")
    return tree


def _code_in(file: Path, message: str) -> list[str]:
    """Names of pickled classes and functions in a file that are not allowed, as far as they can be determined."""
    try:
        with safe_globals(ALLOWED):
            return sorted(get_unsafe_globals_in_checkpoint(file))
    except Exception:  # PyTorch's legacy format, damaged, or another kind of file
        return re.findall(r"GLOBAL (\S+) (?:was not an allowed|whose module)", message)


def local_file(path: str | Path, what: str) -> Path:
    """Resolve a path; ``hf://organization/name/file[@revision]`` is taken from the Hugging Face cache or downloaded.

    Raises:
        WeightsError: an ``hf://`` path is malformed or cannot be downloaded.
    """
    if not str(path).startswith("hf://"):
        return Path(path).expanduser()
    match = HUB_PATH.fullmatch(str(path))
    if match is None:
        raise WeightsError(f"{what}: '{path}' is not of the form hf://organization/name/file[@revision]")
    return _from_hub(
        what,
        **match.groupdict(),
        instead=f"replace '{path}' by the path of a local copy of {match['filename']}",
    )


def hub_file(what: str, repo: str, filename: str, *, revision: str | None = None, option: str, file: str) -> Path:
    """Return a file of a Hugging Face repository from the local cache, downloading it if necessary.

    Args:
        what: owner of the weights in messages.
        repo: "organization/name".
        filename: within the repository.
        revision: branch, tag or commit; None: the main branch.
        option: config key for a local file instead, such as ``[losses.lpips] vgg_checkpoint``.
        file: description of that file, for messages.

    Raises:
        WeightsError: the file is not cached and cannot be downloaded; the message says how to provide it.
    """
    return _from_hub(what, repo, filename, revision, instead=f'set\n  {option} = "FILE"\nwhere FILE is {file}')


def _from_hub(what: str, repo: str, filename: str, revision: str | None, instead: str) -> Path:
    from huggingface_hub import get_hf_file_metadata, hf_hub_download, hf_hub_url
    from huggingface_hub.utils import LocalEntryNotFoundError

    where = {"repo_id": repo, "filename": filename, "revision": revision}
    try:
        with contextlib.suppress(LocalEntryNotFoundError):
            return Path(hf_hub_download(**where, local_files_only=True))
        with one_per_machine(f"{repo}/{filename}@{revision}"):
            with contextlib.suppress(LocalEntryNotFoundError):  # another process may have downloaded it meanwhile
                return Path(hf_hub_download(**where, local_files_only=True))
            # Probe first: without network access, hf_hub_download retries for 25 s before it fails.
            get_hf_file_metadata(hf_hub_url(**where), timeout=HUB_TIMEOUT_S)
            return Path(hf_hub_download(**where))
    except Exception as error:
        reason = str(error).split("\n", 1)[0]
        raise WeightsError(
            f"{what}: the weights {repo} are not in the Hugging Face cache and could not be downloaded "
            f"({type(error).__name__}: {reason}). Either run once with network access (or copy a cache that has them "
            f"and set HF_HOME), or {instead}"
        ) from error


def load_strict(module: nn.Module, state: dict[str, Tensor], what: str, source: str | Path) -> None:
    """Load ``state`` into ``module`` in place if all keys and shapes match; a sharded module loads its shards.

    Raises:
        WeightsError: keys are missing, unexpected or of another shape; the message lists all of them.
    """
    own = module.state_dict()
    check_fit(own, state, what, source)
    if any(isinstance(value, DTensor) for value in own.values()):
        for key, value in own.items():
            fill(value, state[key])
    else:
        module.load_state_dict(state)


def check_fit(own: dict[str, Tensor], state: dict[str, Tensor], what: str, source: str | Path) -> None:
    """Check that a file's state dict has the names and shapes of a module's, which may be on the meta device.

    Raises:
        WeightsError: keys are missing, unexpected or of another shape; the message lists all of them, long lists
            abbreviated as ``blocks.{0..27}.mlp.fc1.bias``.
    """
    shapes: dict[str, list[str]] = {}
    for key in own:
        if key in state and state[key].shape != own[key].shape:
            change = f"file {tuple(state[key].shape)}, expected {tuple(own[key].shape)}"
            shapes.setdefault(change, []).append(key)
    mis_shaped = sum(len(keys) for keys in shapes.values())
    listed = [f"{key}: {change}" for change, keys in shapes.items() for key in compact(keys, mis_shaped)]
    problems = [f"  {mis_shaped} with a different shape: {', '.join(listed)}"] if listed else []
    for title, keys in (
        ("unexpected", [key for key in state if key not in own]),
        ("missing", [key for key in own if key not in state]),
    ):
        if keys:
            problems.insert(0, f"  {len(keys)} {title}: {', '.join(compact(keys, len(keys)))}")
    if problems:
        raise WeightsError(f"{what}: '{source}' does not match the module:\n" + "\n".join(problems))


def compact(keys: Sequence[str], count: int = SHOWN + 1) -> Iterable[str]:
    """Abbreviate a list of keys without loss, as ``blocks.{0..27}.attn.qkv.weight``.

    Args:
        keys: dotted names.
        count: number of keys in the whole message; up to :data:`SHOWN` are listed in full.
    """
    if count <= SHOWN:
        return keys
    rows = [tuple(key.split(".")) for key in keys]
    for place in range(max(map(len, rows))):
        groups: dict[Any, list[str]] = {}
        for row in rows:
            number = place < len(row) and row[place].isdigit()
            groups.setdefault((row[:place], row[place + 1 :]) if number else row, []).append(
                row[place] if number else ""
            )
        rows = [(*frame[0], _range(numbers), *frame[1]) if numbers[0] else frame for frame, numbers in groups.items()]
    return [".".join(row) for row in rows]


def _range(numbers: list[str]) -> str:
    values = sorted(map(int, numbers))
    if len(values) == 1:
        return numbers[0]
    if values == list(range(values[0], values[-1] + 1)):
        return f"{{{values[0]}..{values[-1]}}}"
    return f"{{{','.join(map(str, values))}}}"
