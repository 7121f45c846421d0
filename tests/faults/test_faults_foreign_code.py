"""No file of a checkpoint, model folder, weights or statistics runs code, whatever it pickles or names."""

import argparse
import io
import json
import pickle
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, MetadataIndex

from components.checkpoint import CheckpointError, CheckpointManager
from components.evaluation import EvaluationError
from components.evaluation.images import open_images
from components.files import manifest
from components.files.weights import WeightsError, read_state
from tests.support.checkpoints import blank, state_at
from trainer.evaluation.references import open_reference


class Calls:
    """Pickles as a call of any function."""

    def __init__(self, function, *arguments) -> None:
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@pytest.fixture
def mark(tmp_path):
    """A file that code in a pickle would create."""
    yield (path := tmp_path / "code_ran")
    assert not path.exists(), "code of a file ran"


def payloads(mark: Path) -> dict[str, Calls]:
    text = f"open({str(mark)!r}, 'w')"
    return {
        "posix.system": Calls(__import__("os").system, f"touch {mark}"),
        "builtins.eval": Calls(eval, text),
        "builtins.exec": Calls(exec, text),
        "builtins.getattr": Calls(getattr, Calls(eval, text), "name"),
        "io.open": Calls(io.open, str(mark), "w"),
        "subprocess.Popen": Calls(__import__("subprocess").Popen, ["touch", str(mark)]),
        "torch.serialization.load": Calls(torch.load, str(mark)),
        "builtins.__import__": Calls(__import__, "antigravity_of_strangers"),
        "argparse.Namespace": argparse.Namespace(x=Calls(eval, text)),
    }


NAMES = list(payloads(Path("x")))


def rewritten(checkpoint: Path, name: str, content: bytes) -> Path:
    """Replace a file of a checkpoint, and state it in the manifest as if it had always been there."""
    (checkpoint / name).write_bytes(content)
    files = manifest.read(checkpoint)["files"]
    files[name] = manifest.checksum(checkpoint / name, False)
    manifest.write(checkpoint, 1, files)
    return checkpoint


@pytest.fixture
def checkpoint(tmp_path):
    return CheckpointManager(tmp_path / "checkpoints").save(1, state_at(1))


def assert_refused(checkpoint: Path, *words: str) -> None:
    for action in (lambda m: m.read(checkpoint, ["model"]), lambda m: m.load(checkpoint, blank())):
        with pytest.raises(CheckpointError) as error:
            action(CheckpointManager(checkpoint.parent))
        assert all(word in str(error.value) for word in ("is refused", "could run code", *words)), error.value
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", NAMES)
def test_metadata_that_pickles_code(checkpoint, mark, name):
    assert_refused(rewritten(checkpoint, ".metadata", pickle.dumps(payloads(mark)[name])), "its .metadata pickles")


@pytest.mark.parametrize("name", NAMES)
def test_metadata_with_code_inside(checkpoint, mark, name):
    with open(checkpoint / ".metadata", "rb") as file:
        found = pickle.load(file)
    found.planner_data = {"x": payloads(mark)[name]}
    assert_refused(rewritten(checkpoint, ".metadata", pickle.dumps(found)), "its .metadata pickles")


def changed_metadata(checkpoint: Path, change) -> Path:
    with open(checkpoint / ".metadata", "rb") as file:
        found = pickle.load(file)
    change(found)
    return rewritten(checkpoint, ".metadata", pickle.dumps(found))


@pytest.mark.parametrize("name", NAMES)
def test_byte_item_that_pickles_code(checkpoint, mark, name):
    buffer = io.BytesIO()
    torch.save(payloads(mark)[name], buffer)

    def change(found):
        place = next(p for i, p in found.storage_data.items() if i.fqn == "model.w")
        found.state_dict_metadata["model.w"] = BytesStorageMetadata()
        found.storage_data[MetadataIndex("model.w")] = place
        place.offset, place.length = 0, len(buffer.getvalue())

    file = next(p.name for p in checkpoint.iterdir() if p.suffix == ".distcp")
    rewritten(checkpoint, file, buffer.getvalue())
    assert_refused(changed_metadata(checkpoint, change), "BytesStorageMetadata")


@pytest.mark.parametrize("name", NAMES)
def test_tensor_item_that_pickles_code(checkpoint, mark, name):
    buffer = io.BytesIO()
    torch.save(payloads(mark)[name], buffer)

    def change(found):
        for place in found.storage_data.values():
            place.offset, place.length = 0, len(buffer.getvalue())

    file = next(p.name for p in checkpoint.iterdir() if p.suffix == ".distcp")
    rewritten(checkpoint, file, buffer.getvalue())
    assert_refused(changed_metadata(checkpoint, change), "a .distcp file pickles")


def test_metadata_that_reads_files_outside(checkpoint, mark, tmp_path):
    (tmp_path / "outside.distcp").write_bytes(b"")

    def change(found):
        for place in found.storage_data.values():
            place.relative_path = "../../outside.distcp"

    assert_refused(changed_metadata(checkpoint, change), "outside the checkpoint")


def test_metadata_that_is_something_else(checkpoint, mark):
    assert_refused(rewritten(checkpoint, ".metadata", pickle.dumps({"a": 1})), "is a dict")


@pytest.mark.parametrize("dtype", ["load", "hub", 5, None])
def test_meta_json_that_names_a_function_for_a_dtype(checkpoint, dtype):
    meta = json.loads((checkpoint / "meta.json").read_text())
    meta["model"]["w"]["$tensor"][0] = dtype
    rewritten(checkpoint, "meta.json", json.dumps(meta).encode())
    with pytest.raises(CheckpointError, match=r"is refused: meta\.json"):
        CheckpointManager(checkpoint.parent).read(checkpoint, ["model"])


@pytest.mark.parametrize("path", [b"pathlib\nPosixPath", b"pathlib._local\nPosixPath", b"pathlib\nWindowsPath"])
def test_metadata_names_paths_as_other_pythons_and_systems_do(checkpoint, path):
    with open(checkpoint / ".metadata", "rb") as file:
        raw = pickle.dumps(pickle.load(file), protocol=2)
    assert b"pathlib\nPosixPath" in raw
    rewritten(checkpoint, ".metadata", raw.replace(b"pathlib\nPosixPath", path))
    assert CheckpointManager(checkpoint.parent).load(checkpoint, blank())["step"] == 1


@pytest.mark.parametrize("name", [n for n in NAMES if n != "torch.serialization.load"])
@pytest.mark.parametrize("form", ["zip", "legacy", "plain pickle", "safetensors"])
def test_weights_that_pickle_code(tmp_path, mark, name, form):
    tree, path = {"w": torch.ones(2), "x": payloads(mark)[name]}, tmp_path / "weights.pt"
    if form == "plain pickle":
        path.write_bytes(pickle.dumps({"x": payloads(mark)[name]}))
    else:
        torch.save(tree, path, _use_new_zipfile_serialization=form != "legacy")
    if form == "safetensors":
        path = path.rename(path.with_suffix(".safetensors"))
    with pytest.raises(WeightsError) as error:
        read_state(path, "tokenizer")
    assert "weights_only" not in str(error.value) and "\n" not in str(error.value)
    if form in ("zip", "legacy"):
        assert "is refused: it pickles" in str(error.value) and "could run code" in str(error.value)


def test_safetensors_under_another_name(tmp_path):
    from safetensors.torch import save_file

    save_file({"w": torch.ones(2)}, tmp_path / "weights.pt")
    with pytest.raises(WeightsError, match=r"cannot be read as \.safetensors or as tensors saved by torch\.save"):
        read_state(tmp_path / "weights.pt", "tokenizer")


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_arrays_that_pickle_code(tmp_path, mark, name, save):
    array = np.empty(2, dtype=object)
    array[0] = payloads(mark)[name]
    save(tmp_path / "images.npz", arr_0=array)
    save(tmp_path / "statistics.npz", mu=array, sigma=np.eye(2))
    save(tmp_path / "about.npz", mu=np.zeros(2), sigma=np.eye(2), about=array)
    with pytest.raises(EvaluationError, match=r"images\.npz"):
        open_images(str(tmp_path / "images.npz"))
    for file in ("statistics.npz", "about.npz", "images.npz"):
        with pytest.raises(EvaluationError, match=file):
            open_reference(str(tmp_path / file), None, 0)


def test_an_archive_whose_array_is_a_bare_pickle(tmp_path, mark):
    with zipfile.ZipFile(tmp_path / "images.npz", "w") as archive:
        archive.writestr("arr_0.npy", pickle.dumps(payloads(mark)["builtins.eval"]))
        archive.writestr("mu", pickle.dumps(payloads(mark)["builtins.eval"]))
    with pytest.raises(EvaluationError, match=r"images\.npz"):
        open_images(str(tmp_path / "images.npz"))
