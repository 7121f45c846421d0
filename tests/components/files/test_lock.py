"""A folder has one owner; the lock of a dead one is taken over, of a living one never."""

import json
import logging
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from components.files import lock
from components.files.lock import NAME, FolderLock, LockError, check_owned, owned


def write_lock(folder, beat: float = 0.0, **fields) -> None:
    """Write the lock of another process, whose last heartbeat was ``beat`` seconds ago."""
    folder.mkdir(exist_ok=True)
    owner = lock._identity() | {"token": "other", "since": "2026-01-02 03:04:05"} | fields
    (folder / NAME).write_text(json.dumps(owner))
    os.utime(folder / NAME, (time.time() - beat,) * 2)


def dead_pid() -> int:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


@pytest.fixture(autouse=True)
def soon(monkeypatch):
    monkeypatch.setattr(lock, "STALE_S", 0.6)
    monkeypatch.setattr(lock, "POLL_S", 0.02)
    monkeypatch.setattr(lock, "HEARTBEAT_S", 0.1)


def test_the_lock_names_its_owner_and_is_gone_at_the_end(tmp_path):
    (tmp_path / "mine").write_text("")
    with owned(tmp_path, "--out"):
        there = json.loads((tmp_path / NAME).read_text())
        assert there["pid"] == os.getpid() and there["host"] and there["since"]
        assert sorted(os.listdir(tmp_path)) == [NAME, "mine"]
    assert os.listdir(tmp_path) == ["mine"]


def test_it_is_gone_after_an_error_and_with_it_the_empty_folders_that_it_created(tmp_path):
    with pytest.raises(ValueError, match="wrong"), owned(tmp_path / "a" / "b", "--out"):
        assert (tmp_path / "a" / "b" / NAME).is_file()
        raise ValueError("wrong")
    assert os.listdir(tmp_path) == []
    with owned(tmp_path / "a" / "b", "--out"):
        (tmp_path / "a" / "result").write_text("")
    assert os.listdir(tmp_path / "a") == ["result"]


def test_a_living_owner_is_named_and_keeps_the_folder(tmp_path):
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    try:
        write_lock(tmp_path, pid=process.pid, started=lock._started(process.pid), beat=1e6)  # suspended for long
        with pytest.raises(LockError) as caught, owned(tmp_path, "run.dir"):
            pass
        message = str(caught.value)
        assert f"run.dir = '{tmp_path}' is in use by pid {process.pid} on host " in message
        assert "since 2026-01-02 03:04:05; wait for it, stop it, or choose another run.dir" in message
        assert "\n" not in message
        assert os.listdir(tmp_path) == [NAME]
    finally:
        process.kill()
        process.wait()


def test_another_thread_of_this_process_counts_as_another_owner(tmp_path):
    refused = pytest.raises(LockError, match=f"in use by pid {os.getpid()}")
    with owned(tmp_path, "--out"), refused, owned(tmp_path, "--out"):
        pass


@pytest.mark.parametrize("reused", [False, True])
def test_a_dead_owner_on_this_machine_is_replaced_at_once(tmp_path, caplog, reused):
    """Also if its pid was given to another process since."""
    write_lock(tmp_path, **({"started": "1"} if reused else {"pid": dead_pid()}))
    with owned(tmp_path, "run.dir"):
        assert json.loads((tmp_path / NAME).read_text())["token"] != "other"
    assert "took over the lock of pid" in caplog.text and "waiting" not in caplog.text
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("fields", [{"host": "elsewhere"}, {"place": "another container"}])
def test_an_old_heartbeat_elsewhere_is_replaced_at_once_and_a_young_one_after_a_wait(tmp_path, caplog, fields):
    write_lock(tmp_path, beat=5.0, **fields)
    with owned(tmp_path, "run.dir"):
        pass
    assert "took over" in caplog.text and "waiting" not in caplog.text
    write_lock(tmp_path, **fields)
    start = time.monotonic()
    with owned(tmp_path, "run.dir"):
        assert time.monotonic() - start >= lock.STALE_S
    assert "waiting up to" in caplog.text


def test_a_heartbeat_elsewhere_is_a_refusal(tmp_path):
    write_lock(tmp_path, host="elsewhere")
    stop = threading.Event()

    def beat():
        while not stop.wait(0.05):
            os.utime(tmp_path / NAME)

    thread = threading.Thread(target=beat)
    thread.start()
    try:
        with pytest.raises(LockError, match="on host elsewhere since"), owned(tmp_path, "--out"):
            pass
    finally:
        stop.set()
        thread.join()
    assert json.loads((tmp_path / NAME).read_text())["token"] == "other"


def test_a_requeued_slurm_job_is_not_blocked_by_its_own_start_on_another_node(tmp_path, monkeypatch):
    write_lock(tmp_path, host="node1", job="77", restart=0)
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    start = time.monotonic()
    with owned(tmp_path, "run.dir"):
        assert time.monotonic() - start < lock.STALE_S


def test_the_owner_beats(tmp_path):
    with owned(tmp_path, "--out"):
        os.utime(tmp_path / NAME, (1.0, 1.0))
        deadline = time.monotonic() + 5
        while (tmp_path / NAME).stat().st_mtime < 2 and time.monotonic() < deadline:
            time.sleep(0.02)
        assert time.time() - (tmp_path / NAME).stat().st_mtime < 5


def test_an_owner_that_lost_its_folder_says_so_and_leaves_the_new_lock(tmp_path, caplog):
    caplog.set_level(logging.ERROR, logger="titanrepa")
    with owned(tmp_path, "--out"):
        write_lock(tmp_path, host="elsewhere")
        deadline = time.monotonic() + 5
        while "taken over by" not in caplog.text and time.monotonic() < deadline:
            time.sleep(0.02)
        assert "taken over by pid" in caplog.text
        with pytest.raises(LockError, match=r"taken over by pid .* stops without writing"):
            check_owned()
    check_owned()  # of released folders there is nothing to lose
    assert json.loads((tmp_path / NAME).read_text())["token"] == "other"


def test_a_lock_that_somebody_removed_is_created_again(tmp_path, caplog):
    with owned(tmp_path, "--out"):
        (tmp_path / NAME).unlink()
        check_owned()
        assert json.loads((tmp_path / NAME).read_text())["pid"] == os.getpid()
        assert "its lock was removed; created it again" in caplog.text
        with pytest.raises(LockError, match="in use"), owned(tmp_path, "--out"):
            pass
    assert not (tmp_path / NAME).exists()


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b'{"pid": "x", "host": 3}'])
def test_an_unreadable_lock_does_not_block_for_ever(tmp_path, content):
    (tmp_path / NAME).write_bytes(content)
    os.utime(tmp_path / NAME, (1.0, 1.0))
    with owned(tmp_path, "--out"):
        assert json.loads((tmp_path / NAME).read_text())["pid"] == os.getpid()


def test_a_file_system_without_hard_links(tmp_path, monkeypatch):
    def no_link(*_):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", no_link)
    with owned(tmp_path, "--out"):
        assert os.listdir(tmp_path) == [NAME]
        with pytest.raises(LockError, match="in use"), owned(tmp_path, "--out"):
            pass
    assert os.listdir(tmp_path) == []


def test_an_answer_lost_by_nfs_is_an_acquired_lock(tmp_path, monkeypatch):
    link = os.link

    def lossy(source, target):
        link(source, target)
        raise FileExistsError(17, "File exists")

    monkeypatch.setattr(os, "link", lossy)
    with owned(tmp_path, "--out"):
        assert json.loads((tmp_path / NAME).read_text())["pid"] == os.getpid()


@pytest.mark.parametrize("inside", ["", "deeper"])
def test_a_file_in_the_way_is_one_line(tmp_path, inside):
    (tmp_path / "file").write_text("mine")
    folder = tmp_path / "file" / inside
    with pytest.raises(LockError) as caught, owned(folder, "run.dir"):
        pass
    assert str(caught.value) == (
        f"run.dir = '{folder}' cannot be written: '{tmp_path / 'file'}' is a file, not a folder; choose a folder that "
        "this user can write to"
    )


def test_a_read_only_folder_is_one_line(tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr("pathlib.Path.write_text", refuse)  # root may write anywhere
    with pytest.raises(LockError, match="cannot be written: Read-only file system; choose"), owned(tmp_path, "--out"):
        pass
    assert os.listdir(tmp_path) == []


def test_a_forked_process_does_not_release(tmp_path):
    held = FolderLock(tmp_path, "--out")
    held.acquire()
    process = multiprocessing.get_context("fork").Process(target=held.release)
    process.start()
    process.join()
    assert (tmp_path / NAME).is_file()
    held.release()
    assert not (tmp_path / NAME).exists()


COMPETE = """
import sys, time
from pathlib import Path
from components.files.lock import LockError, owned
folder = Path(sys.argv[1])
while not (folder.parent / "go").exists():
    time.sleep(0.001)
try:
    with owned(folder, "--out"):
        print("owner", flush=True)
        time.sleep(2)
except LockError:
    print("refused", flush=True)
"""


@pytest.mark.long
@pytest.mark.parametrize("stale", [False, True])
def test_of_many_that_start_at_once_one_owns_the_folder(tmp_path, stale):
    folder = tmp_path / "folder"
    folder.mkdir()
    if stale:
        write_lock(folder, pid=dead_pid())
    processes = [
        subprocess.Popen([sys.executable, "-c", COMPETE, str(folder)], stdout=subprocess.PIPE, text=True)
        for _ in range(8)
    ]
    time.sleep(1.5)
    (tmp_path / "go").touch()
    answers = sorted(process.communicate(timeout=60)[0].strip() for process in processes)
    assert answers == ["owner"] + ["refused"] * 7
    assert os.listdir(folder) == []


@pytest.mark.long
def test_a_killed_owner_is_replaced(tmp_path):
    (tmp_path / "go").touch()
    process = subprocess.Popen([sys.executable, "-c", COMPETE, str(tmp_path / "f")], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "owner\n"
    with pytest.raises(LockError, match=f"pid {process.pid} "), owned(tmp_path / "f", "--out"):
        pass
    process.send_signal(signal.SIGKILL)
    process.wait()
    with owned(tmp_path / "f", "--out"):
        pass
