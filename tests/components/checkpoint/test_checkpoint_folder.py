"""A damaged checkpoint never hides the intact one before it; the newest are kept, and old ones are deleted."""

import json
import logging
import os
import random
import shutil
from pathlib import Path

import pytest
import torch

from components.checkpoint import (
    CheckpointError,
    CheckpointManager,
)
from components.files import manifest
from tests.support.checkpoints import assert_holds, blank, state_at, steps, two_checkpoints

torch.set_num_threads(1)


# -- damage ---------------------------------------------------------------------------------------------------------

FILES = [".metadata", "__0_0.distcp", "meta.json", "manifest.json"]


def assert_falls_back(folder: Path, caplog, *words: str) -> None:
    caplog.clear()
    manager = CheckpointManager(folder)
    with caplog.at_level(logging.WARNING):
        path = manager.latest()
    assert path == folder / "step_00000001"
    assert_holds(manager, path, 1)
    (warning,) = (r.getMessage() for r in caplog.records if r.name == "components.checkpoint.manager")
    for word in ("step_00000002", *words):
        assert word in warning


def test_there_are_no_other_files(tmp_path):
    assert steps(two_checkpoints(tmp_path)) == sorted(FILES)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("how", ["emptied", "halved", "longer", "gone", "a folder"])
def test_a_file_of_another_length_is_noticed(tmp_path, caplog, name, how):
    file = two_checkpoints(tmp_path) / name
    size = file.stat().st_size
    if how in ("gone", "a folder"):
        file.unlink()
        if how == "a folder":
            file.mkdir()
    else:
        os.truncate(file, {"emptied": 0, "halved": size // 2, "longer": size + 1}[how])
    assert_falls_back(tmp_path, caplog, name)


@pytest.mark.parametrize("name", FILES)
def test_a_flipped_byte_is_noticed(tmp_path, caplog, name):
    file = two_checkpoints(tmp_path) / name
    whole = file.read_bytes()
    for at in random.Random(0).sample(range(len(whole)), 5):
        file.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        assert_falls_back(tmp_path, caplog, name, "damaged")


def test_a_damaged_checkpoint_asked_for_by_name_is_an_error(tmp_path):
    path = two_checkpoints(tmp_path)
    os.truncate(path / "__0_0.distcp", 10)
    with pytest.raises(CheckpointError, match=r"__0_0\.distcp is damaged: 10 bytes, expected"):
        CheckpointManager(tmp_path).load(2, blank())


def test_a_file_that_cannot_be_read_is_not_a_sound_checkpoint(tmp_path, caplog, monkeypatch):
    two_checkpoints(tmp_path)
    original = open

    def refuse(file, *args, **kwargs):
        if str(file).endswith("step_00000002/__0_0.distcp"):
            raise PermissionError(13, "Permission denied", str(file))
        return original(file, *args, **kwargs)

    monkeypatch.setattr(manifest, "open", refuse, raising=False)
    assert_falls_back(tmp_path, caplog, "__0_0.distcp", "Permission denied")


def test_an_unknown_format_is_skipped(tmp_path, caplog):
    path = two_checkpoints(tmp_path)
    fields = json.loads((path / "manifest.json").read_text())
    del fields["crc32"]
    fields["format"] = 99
    (path / "manifest.json").write_text(json.dumps(fields | {"crc32": manifest._fields_crc32(fields)}))
    assert_falls_back(tmp_path, caplog, "format 99")


def test_strangers_in_the_folder_are_no_checkpoints(tmp_path, caplog):
    assert CheckpointManager(tmp_path / "absent").latest() is None
    assert CheckpointManager(tmp_path).latest() is None
    CheckpointManager(tmp_path).save(1, state_at(1))
    (tmp_path / "step_x").write_text("a stray file")
    (tmp_path / "step_00000009").write_text("a file, not a folder")
    (tmp_path / "step_00000008").mkdir()
    (tmp_path / "step_12").mkdir()
    shutil.copytree(tmp_path / "step_00000001", tmp_path / "step_00000007.partial")
    assert list(CheckpointManager(tmp_path).candidates()) == [tmp_path / "step_00000001"]
    assert "step_00000009: it is not a folder" in caplog.text
    assert "step_00000008: manifest.json" in caplog.text
    assert "step_x" not in caplog.text
    manager = CheckpointManager(tmp_path)
    assert_holds(manager, manager.save(9, state_at(9)), 9)  # the stray file is replaced
    assert steps(tmp_path) == ["step_00000001", "step_00000008", "step_00000009", "step_12", "step_x"]


# -- retention ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("keep", [1, 3, 0])
def test_exactly_the_newest_are_kept(tmp_path, keep):
    manager = CheckpointManager(tmp_path, keep=keep)
    for step in range(1, 6):
        manager.save(step, state_at(step))
        kept = range(1 if keep == 0 else max(1, step - keep + 1), step + 1)
        assert steps(tmp_path) == [f"step_{s:08d}" for s in kept]
    assert [p.name for p in manager.candidates()] == steps(tmp_path)[::-1]


@pytest.mark.parametrize("keep_every, kept", [(3, [3, 6, 7, 8]), (4, [4, 7, 8]), (1, [1, 2, 3, 4, 5, 6, 7, 8])])
def test_multiples_are_kept_for_ever_besides_the_newest(tmp_path, keep_every, kept):
    manager = CheckpointManager(tmp_path, keep=2, keep_every=keep_every)
    for step in range(1, 9):
        manager.save(step, state_at(step))
    assert steps(tmp_path) == [f"step_{s:08d}" for s in kept]
    with pytest.raises(ValueError, match="keep_every must be 0"):
        CheckpointManager(tmp_path, keep_every=-1)


def test_what_was_just_saved_stays_and_the_damaged_do_not_count(tmp_path):
    manager = CheckpointManager(tmp_path, keep=2)
    for step in (1, 8, 9):
        manager.save(step, state_at(step))
    os.truncate(tmp_path / "step_00000009" / "meta.json", 1)
    manager.save(2, state_at(2))
    assert steps(tmp_path) == ["step_00000002", "step_00000008", "step_00000009"]


def test_saving_a_step_again_replaces_it(tmp_path):
    manager = CheckpointManager(tmp_path)
    manager.save(1, state_at(1))
    path = manager.save(1, state_at(7))
    assert steps(tmp_path) == ["step_00000001"]
    assert_holds(CheckpointManager(tmp_path), path, 7)
