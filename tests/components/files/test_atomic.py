"""A file written with ``atomic_write`` is complete or absent; a failed write leaves the old file and nothing else."""

import errno
import multiprocessing
import os
import re
import signal

import numpy as np
import pytest

from components.files.atomic import atomic_write

NAMES = {False: r"x\.bin\.partial", True: r"\.x\.bin\.[0-9a-f]{32}\.tmp"}


def names(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("concurrent", [False, True])
@pytest.mark.parametrize("fsync", [False, True])
@pytest.mark.parametrize("before", [None, b"a longer old content"])
def test_the_file_appears_complete_when_the_block_ends(tmp_path, fsync, concurrent, before):
    path = tmp_path / "x.bin"
    if before:
        path.write_bytes(before)
    with atomic_write(path, fsync=fsync, concurrent=concurrent) as temporary:
        assert temporary.parent == tmp_path and re.fullmatch(NAMES[concurrent], temporary.name)
        temporary.write_bytes(b"new")
        assert (path.read_bytes() if before else path.exists()) == (before or False)
    assert path.read_bytes() == b"new"
    assert names(tmp_path) == ["x.bin"]


def test_text_bytes_and_file_objects(tmp_path):
    with atomic_write(tmp_path / "text") as temporary:
        temporary.write_text("σ = 1\n", encoding="utf-8")
    with atomic_write(tmp_path / "bytes") as temporary:
        temporary.write_bytes(bytes(range(256)))
    with atomic_write(tmp_path / "array.npy") as temporary, open(temporary, "wb") as file:
        np.save(file, np.arange(5))
    assert (tmp_path / "text").read_text(encoding="utf-8") == "σ = 1\n"
    assert (tmp_path / "bytes").read_bytes() == bytes(range(256))
    assert np.load(tmp_path / "array.npy").tolist() == [0, 1, 2, 3, 4]
    assert names(tmp_path) == ["array.npy", "bytes", "text"]


@pytest.mark.parametrize("concurrent", [False, True])
@pytest.mark.parametrize("error", [ValueError("wrong"), KeyboardInterrupt(), OSError(errno.ENOSPC, "No space left")])
@pytest.mark.parametrize("started", [False, True])
def test_an_exception_keeps_the_old_file_and_is_passed_on(tmp_path, error, concurrent, started):
    path = tmp_path / "x.bin"
    path.write_bytes(b"old")
    with pytest.raises(type(error)) as caught, atomic_write(path, concurrent=concurrent) as temporary:
        if started:
            temporary.write_bytes(b"ne")
        raise error
    assert caught.value is error
    assert path.read_bytes() == b"old"
    assert names(tmp_path) == ["x.bin"]


@pytest.mark.parametrize("failing", ["fsync", "replace"])
def test_a_disk_that_fails_at_the_end_keeps_the_old_file(tmp_path, monkeypatch, failing):
    path = tmp_path / "x.bin"
    path.write_bytes(b"old")

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, failing, full)
    with pytest.raises(OSError, match="No space left on device"), atomic_write(path) as temporary:
        temporary.write_bytes(b"new")
    assert path.read_bytes() == b"old"
    assert names(tmp_path) == ["x.bin"]


def test_a_full_disk(tmp_path):
    if not os.path.exists("/dev/full"):
        pytest.skip("needs /dev/full")
    (tmp_path / "x.bin.partial").symlink_to("/dev/full")
    with pytest.raises(OSError) as caught, atomic_write(tmp_path / "x.bin") as temporary:
        temporary.write_bytes(b"new")
    assert caught.value.errno == errno.ENOSPC
    assert names(tmp_path) == []


def test_a_missing_folder_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError), atomic_write(tmp_path / "none" / "x.bin") as temporary:
        temporary.write_bytes(b"new")
    assert names(tmp_path) == []


def test_fsync_covers_the_file_before_the_rename_and_the_folder_after_it(tmp_path, monkeypatch):
    calls, fsync, replace = [], os.fsync, os.replace

    def flush(descriptor):
        calls.append(os.readlink(f"/proc/self/fd/{descriptor}"))
        fsync(descriptor)

    def rename(*paths):
        calls.append("rename")
        replace(*paths)

    monkeypatch.setattr(os, "fsync", flush)
    monkeypatch.setattr(os, "replace", rename)
    path = tmp_path / "x.bin"
    with atomic_write(path) as temporary:
        temporary.write_bytes(b"new")
    assert calls == [str(temporary), "rename", str(tmp_path)]
    calls.clear()
    with atomic_write(path, fsync=False) as temporary:
        temporary.write_bytes(b"new")
    assert calls == ["rename"]


def _killed(path):
    with atomic_write(path) as temporary:
        temporary.write_bytes(b"a long beginning")
        os.kill(os.getpid(), signal.SIGKILL)


def test_the_next_write_replaces_what_a_killed_process_left(tmp_path):
    path = tmp_path / "x.bin"
    path.write_bytes(b"old")
    process = multiprocessing.get_context("fork").Process(target=_killed, args=(path,))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert path.read_bytes() == b"old"
    assert names(tmp_path) == ["x.bin", "x.bin.partial"]
    with atomic_write(path) as temporary:
        temporary.write_bytes(b"new")
    assert path.read_bytes() == b"new"
    assert names(tmp_path) == ["x.bin"]


def _write(path, value, ready):
    with atomic_write(path, fsync=False, concurrent=True) as temporary, open(temporary, "wb") as file:
        file.write(value * 1000)
        file.flush()
        ready.wait(30)
        file.write(value * 1000)


def test_processes_that_write_one_file_together_do_not_mix_their_data(tmp_path):
    path, context = tmp_path / "x.bin", multiprocessing.get_context("fork")
    ready = context.Barrier(2)
    processes = [context.Process(target=_write, args=(path, value, ready)) for value in (b"a", b"b")]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
        assert process.exitcode == 0
    assert path.read_bytes() in (b"a" * 2000, b"b" * 2000)
    assert names(tmp_path) == ["x.bin"]
