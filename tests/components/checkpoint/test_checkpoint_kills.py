"""A checkpoint is complete or absent, whenever the process is killed and whichever write fails."""

import multiprocessing
import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path

import pytest
import torch

from components.checkpoint import (
    CheckpointError,
    CheckpointManager,
)
from components.checkpoint import manager as checkpoint
from components.checkpoint.folder import MARGIN_BYTES
from components.files import manifest
from tests.support.checkpoints import assert_holds, full_disk, state_at, steps, two_checkpoints
from tests.support.ranks import PRELOAD

pytestmark = pytest.mark.long

torch.set_num_threads(1)


# -- kills ----------------------------------------------------------------------------------------------------------


def _context():
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    return context


def _die_at_event(folder: Path, fatal: int) -> None:
    """Replace step 2, then save step 3 in the background, which deletes step 1; die before the given file operation."""
    count = 0

    def audit(event, arguments):
        nonlocal count
        writes = event == "open" and arguments[1] is not None and not arguments[1].startswith("r")
        changes = event in ("os.rename", "os.remove", "os.rmdir", "os.mkdir")
        in_removed_folder = event in ("os.remove", "os.rmdir") and arguments[1] >= 0  # as rmtree does
        if in_removed_folder or ((writes or changes) and str(folder) in str(arguments[0])):
            count += 1
            if count == fatal:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(audit)
    manager = CheckpointManager(folder, keep=2)
    manager.save(2, state_at(2))
    manager.save_async(3, state_at(3))
    manager.wait()


def _die_at_every_event(folder: Path) -> None:
    torch.set_num_threads(1)
    start = folder / "start"
    two_checkpoints(start)
    fatal, newest, exit_code = 0, 2, None
    while exit_code != 0:
        fatal += 1
        run = folder / str(fatal)
        shutil.copytree(start, run)
        child = os.fork()
        if child == 0:
            _die_at_event(run, fatal)
            os._exit(0)
        exit_code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        assert exit_code in (0, -signal.SIGKILL)
        manager = CheckpointManager(run, keep=2)
        found = list(manager.candidates())
        assert len(found) >= 2
        for path in found:
            assert_holds(manager, path, int(path.name[5:13]))
        assert int(found[0].name[5:13]) in (newest, newest + 1)
        newest = int(found[0].name[5:13])
        manager.save(4, state_at(4))
        assert steps(run) == [f"step_{newest:08d}", "step_00000004"]
        assert_holds(CheckpointManager(run), manager.latest(), 4)
        shutil.rmtree(run)
    assert newest == 3
    assert fatal > 20  # the audit hook sees the operations


def test_a_kill_before_any_file_operation_loses_nothing(tmp_path):
    """Kills a save before each of its file operations in turn."""
    child = _context().Process(
        target=_die_at_every_event, args=(tmp_path,)
    )  # it forks, which is better done outside pytest's process
    child.start()
    child.join()
    assert child.exitcode == 0


def _save_for_ever(folder: Path) -> None:
    torch.set_num_threads(1)
    manager, step = CheckpointManager(folder, keep=2), 0
    latest = manager.latest()
    if latest is not None:
        step = manager.load(latest, {"step": 0})["step"]
    while True:
        step += 1
        manager.save(step, state_at(step))


def test_a_run_that_is_killed_again_and_again_moves_on(tmp_path):
    context, rng, reached = _context(), random.Random(0), 0
    for _ in range(5):
        child = context.Process(target=_save_for_ever, args=(tmp_path,))
        child.start()
        until = time.monotonic() + 60
        while not (tmp_path / f"step_{reached + 2:08d}").exists() and time.monotonic() < until:
            time.sleep(0.001)
        time.sleep(rng.random() * 0.03)
        child.kill()
        child.join()
        manager = CheckpointManager(tmp_path, keep=2)
        path = manager.latest()
        step = int(path.name[5:])
        assert step > reached
        assert_holds(manager, path, step)
        reached = step


# -- failed saves ---------------------------------------------------------------------------------------------------


def test_no_permission_names_the_folder_and_the_reason(tmp_path):
    inside = tmp_path / "file"
    inside.write_text("")
    with pytest.raises(CheckpointError, match=r"step 1 could not be written to .*file: (File exists|Not a directory)"):
        CheckpointManager(inside).save(1, state_at(1))
    shut = tmp_path / "shut"
    CheckpointManager(shut).save(1, state_at(1))
    shut.chmod(0o500)
    root = os.geteuid() == 0
    try:
        if root:  # root has all permissions
            os.chmod(tmp_path, 0o711)
            os.seteuid(65534)
        with pytest.raises(CheckpointError, match=r"could not be written to .*: Permission denied"):
            CheckpointManager(shut).save(2, state_at(2))
    finally:
        if root:
            os.seteuid(0)
        shut.chmod(0o700)
    assert steps(shut) == ["step_00000001"]


def test_a_full_disk_removes_the_partial_and_names_the_reason(tmp_path):
    CheckpointManager(tmp_path).save(1, state_at(1))
    with full_disk(), pytest.raises(CheckpointError, match=r"to .*: File too large.*earlier checkpoints") as caught:
        CheckpointManager(tmp_path).save(2, {"w": torch.ones(50_000)})
    assert str(tmp_path) in str(caught.value)
    assert steps(tmp_path) == ["step_00000001"]
    manager = CheckpointManager(tmp_path)
    assert_holds(manager, manager.latest(), 1)


def test_a_checkpoint_without_room_is_not_begun(tmp_path, monkeypatch):
    folder, asked, free = tmp_path / "a" / "b", [], 3 << 30

    def disk_usage(path):
        asked.append(Path(path))
        return shutil._ntuple_diskusage(100 << 30, 90 << 30, free)

    monkeypatch.setattr(shutil, "disk_usage", disk_usage)
    monkeypatch.setattr(checkpoint, "disk_bytes", lambda tensors: 5 << 30)
    with pytest.raises(CheckpointError, match=r"it needs 5\.06 GiB, but only 3\.00 GiB are free\. .*Free disk space"):
        CheckpointManager(folder).save(1, state_at(1))
    assert asked == [tmp_path] and steps(tmp_path) == []
    free = 6 << 30
    CheckpointManager(folder).save(1, state_at(1))
    free = 3 << 30
    with pytest.raises(CheckpointError, match=r"GiB are free"):
        CheckpointManager(folder).save(2, state_at(2))
    assert asked[-1] == folder and steps(folder) == ["step_00000001"]


def test_the_room_asked_for_is_enough_and_counts_what_killed_runs_left(tmp_path, monkeypatch):
    state = {"module": {f"blocks.{i}.attention.projection.weight.exp_avg_sq": torch.ones(50) for i in range(300)}}
    need = checkpoint.disk_bytes(state["module"])
    left = tmp_path / "step_00000001.partial"
    left.mkdir()

    def disk_usage(path):
        assert not left.exists()
        return shutil._ntuple_diskusage(0, 0, need + MARGIN_BYTES)

    monkeypatch.setattr(shutil, "disk_usage", disk_usage)
    path = CheckpointManager(tmp_path).save(2, state)
    assert 0.3 * need < sum(file.stat().st_size for file in path.iterdir()) <= need


@pytest.mark.parametrize("where", ["write", "checksum", "sync_folder"])
def test_a_disk_that_fills_at_the_end_leaves_no_partial_either(tmp_path, monkeypatch, where):
    CheckpointManager(tmp_path).save(1, state_at(1))

    def full(*args, **kwargs):
        if where == "checksum":
            return "No space left on device"
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(manifest, where, full)
    with pytest.raises(CheckpointError, match="No space left on device"):
        CheckpointManager(tmp_path).save(2, state_at(2))
    monkeypatch.undo()
    assert steps(tmp_path) == ["step_00000001"]


def test_ctrl_c_during_a_save_is_still_ctrl_c(tmp_path, monkeypatch):
    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint.Writer, "write_data", interrupt)
    with pytest.raises(KeyboardInterrupt):
        CheckpointManager(tmp_path).save(1, state_at(1))
    assert steps(tmp_path) == []
