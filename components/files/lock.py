"""One owner per folder: a lock file that names the process writing into it. Readers need no lock.

The lock is the file ``.titanrepa.lock`` in the folder: JSON with pid, host and start time of its owner, created
atomically by a hard link (or O_EXCL, where there are none), which also works on NFS; flock is not used. The owner
updates the file's modification time, its heartbeat, every 15 seconds, and removes the file when it ends.

A lock left behind is taken over, with a log line:

- if its process was on this machine and is dead, at once;
- if an earlier start of the same Slurm job wrote it, at once;
- otherwise (another machine or container) once its heartbeat is more than two minutes old by the file system's clock.
  A younger one is watched: a heartbeat is a refusal, two minutes without one a takeover.

A process that was suspended for so long may find that its folder has another owner: :func:`check_owned`.
"""

from __future__ import annotations

import atexit
import contextlib
import errno
import json
import logging
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

NAME = ".titanrepa.lock"
HEARTBEAT_S = 15.0
STALE_S = 120.0
POLL_S = 1.0  # between looks at a lock of another machine

logger = logging.getLogger("titanrepa")


class LockError(Exception):
    """A folder cannot be written or is in use by another process; the message names the key, the owner and a remedy."""


@contextlib.contextmanager
def owned(folder: str | Path, key: str, first: Callable[[Callable[[], Any]], Any] | None = None) -> Iterator[None]:
    """Context manager that owns a folder, which is created if missing; removed again if it was and is empty.

    Args:
        folder: to write into.
        key: config key or option that names it, for messages.
        first: ``Ranks.first`` if several ranks write: rank 0 owns the folder, and its error is raised on all.

    Raises:
        LockError: another process owns the folder, or it cannot be written.
    """
    held: list[FolderLock] = []

    def acquire() -> None:
        held.append(FolderLock(Path(folder), key))
        held[0].acquire()

    try:
        acquire() if first is None else first(acquire)
        yield
    finally:
        for lock in held:
            lock.release()


def check_owned() -> None:
    """Raise if this process has lost a folder that it owns to another process. Call before replacing files.

    Raises:
        LockError: another process took the folder over.
    """
    for lock in list(_held):
        if lost := lock.lost():
            raise LockError(f"{lost}; this process stops without writing into it")


_held: list[FolderLock] = []


class FolderLock:
    """Ownership of a folder by this process.

    Args:
        folder: created by :meth:`acquire` if missing.
        key: config key or option that names it, for messages.
    """

    def __init__(self, folder: Path, key: str) -> None:
        self.folder, self.key, self.path = folder, key, folder / NAME
        self.me = _identity()
        self._made: list[Path] = []  # folders that acquire created, innermost first
        self._released = threading.Event()

    def acquire(self) -> None:
        """Own the folder until :meth:`release` or the end of the process.

        Raises:
            LockError: another process owns it, or it cannot be written.
        """
        try:
            self._make_folder()
            while not self._create():
                self._wait_for_stale()
        except OSError as error:
            self._remove_made()
            raise LockError(self._unwritable(error)) from error
        except BaseException:
            self._remove_made()
            raise
        _held.append(self)
        atexit.register(self.release)
        threading.Thread(target=self._beat, name="folder-lock", daemon=True).start()

    def release(self) -> None:
        """Remove the lock, and the folder if :meth:`acquire` created it and it is empty."""
        if self not in _held or self.me["pid"] != os.getpid():  # a forked process inherits this object
            return
        _held.remove(self)
        self._released.set()
        atexit.unregister(self.release)
        with contextlib.suppress(OSError):
            if _token(_read(self.path)) == self.me["token"]:
                self.path.unlink()
        self._remove_made()

    def lost(self) -> str:
        """Which process owns the folder now, in words, if it is no longer this one; otherwise "".

        A lock that somebody removed is created again.
        """
        try:
            there = _read(self.path)
            if there is None and not self._released.is_set() and self._create():
                if self._released.is_set():  # by another thread, meanwhile
                    self.path.unlink(missing_ok=True)
                else:
                    logger.warning(f"{self.key} = '{self.folder}': its lock was removed; created it again")
                return ""
            there = _read(self.path) if there is None else there
        except OSError:
            return ""  # a file server that is away for a moment, or a full disk
        if there is None or _token(there) == self.me["token"]:
            return ""
        return f"{self.key} = '{self.folder}': its lock was taken over by {_described(there[0])}"

    def _make_folder(self) -> None:
        missing = [p for p in (self.folder, *self.folder.parents) if not os.path.lexists(p)]
        self.folder.mkdir(parents=True, exist_ok=True)
        self._made = missing

    def _remove_made(self) -> None:
        for folder in self._made:
            with contextlib.suppress(OSError):  # not empty, or gone
                folder.rmdir()

    def _create(self) -> bool:
        """Create the lock file; False if there is one."""
        own = self.folder / f"{NAME}.{self.me['token']}"
        text = json.dumps(self.me)
        try:
            own.write_text(text)
            os.link(own, self.path)
            return True
        except FileExistsError:
            # An NFS server may have created the link although its answer was lost.
            return _token(_read(self.path)) == self.me["token"]
        except OSError as error:
            if error.errno not in (errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK):
                raise
        finally:
            with contextlib.suppress(OSError):
                own.unlink()
        try:  # a file system without hard links
            descriptor = os.open(self.path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
        except FileExistsError:
            return False
        with os.fdopen(descriptor, "w") as file:
            file.write(text)
        return True

    def _wait_for_stale(self) -> None:
        """Remove the present lock if it is stale; wait if that cannot be known at once.

        Raises:
            LockError: its owner is alive.
        """
        there = _read(self.path)
        if there is None:
            return  # released meanwhile
        owner, beat = there
        alive = _alive(owner, self.me)
        if alive is None and self._now() - beat <= STALE_S:
            logger.warning(
                f"{self.key} = '{self.folder}': {_described(owner)} left or holds a lock; waiting up to "
                f"{STALE_S:.0f} s for a sign of life"
            )
            deadline = time.monotonic() + STALE_S
            while time.monotonic() < deadline:
                time.sleep(POLL_S)
                again = _read(self.path)
                if again is None or _token(again) != _token(there):
                    return
                if again[1] != beat:
                    alive = True
                    break
        if alive:
            raise LockError(
                f"{self.key} = '{self.folder}' is in use by {_described(owner)}; wait for it, stop it, or choose "
                f"another {self.key}"
            )
        self._take_over(owner)

    def _take_over(self, owner: dict[str, Any]) -> None:
        aside = self.folder / f"{NAME}.stale.{self.me['token']}"
        try:
            os.rename(self.path, aside)
        except FileNotFoundError:
            return  # another process was faster
        moved = _read(aside)
        if moved is not None and _token(moved) != owner.get("token"):
            # The lock of a process that took over between our look and the rename: give it back.
            with contextlib.suppress(FileExistsError):
                os.link(aside, self.path)
        else:
            logger.warning(f"{self.key} = '{self.folder}': took over the lock of {_described(owner)}, which is gone")
        aside.unlink(missing_ok=True)

    def _now(self) -> float:
        """Time by the clock of the file system, which may be another machine's."""
        probe = self.folder / f"{NAME}.{self.me['token']}"
        try:
            probe.write_text("")
            return probe.stat().st_mtime
        finally:
            probe.unlink(missing_ok=True)

    def _beat(self) -> None:
        while not self._released.wait(HEARTBEAT_S):
            if lost := self.lost():
                if not self._released.is_set():
                    logger.error(f"{lost}; stop one of the two processes")
                return
            with contextlib.suppress(OSError):  # the next beat tries again
                os.utime(self.path)

    def _unwritable(self, error: OSError) -> str:
        blocked = next((p for p in (self.folder, *self.folder.parents) if p.exists() and not p.is_dir()), None)
        why = f"'{blocked}' is a file, not a folder" if blocked is not None else (error.strerror or str(error))
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        remedy = "free disk space" if full else "choose a folder that this user can write to"
        return f"{self.key} = '{self.folder}' cannot be written: {why}; {remedy}"


def _identity() -> dict[str, Any]:
    """What identifies this process to others."""
    return {
        "pid": os.getpid(),
        "host": socket.gethostname(),
        "since": time.strftime("%Y-%m-%d %H:%M:%S"),
        "token": uuid.uuid4().hex,
        "place": _place(),
        "started": _started(os.getpid()),
        "job": os.environ.get("SLURM_JOB_ID", ""),
        "restart": int(os.environ.get("SLURM_RESTART_COUNT") or 0),
    }


def _place() -> str:
    """Identifies the boot of this machine and the container, within which process ids are unique."""
    try:
        return f"{Path('/proc/sys/kernel/random/boot_id').read_text().strip()} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return "unknown"  # not Linux: the host name must do


def _started(pid: int) -> str:
    """Start time of a process in ticks since boot, since process ids are reused; "" if unknown."""
    try:
        return Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return ""


def _alive(owner: dict[str, Any], me: dict[str, Any]) -> bool | None:
    """Whether the owner of a lock runs; None if only its heartbeat can tell."""
    try:
        if owner["job"] and owner["job"] == me["job"] and owner["restart"] < me["restart"]:
            return False  # Slurm requeues a job after all its processes have ended
        if (owner["host"], owner["place"]) != (me["host"], me["place"]):
            return None
        pid, started = int(owner["pid"]), owner["started"]
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass  # it runs, as another user
    except (KeyError, TypeError, ValueError, OverflowError):
        return None  # an unreadable lock
    found = _started(pid)
    return not (started and found and started != found) and not _is_zombie(pid)


def _is_zombie(pid: int) -> bool:
    """Whether a process has ended but was not waited for."""
    try:
        return Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()[0] in "ZX"
    except (OSError, IndexError):
        return False


def _read(path: Path) -> tuple[dict[str, Any], float] | None:
    """Owner and heartbeat of a lock; None if there is none. Opens the file, for which NFS clients ask the server."""
    try:
        with open(path, "rb") as file:
            beat, text = os.fstat(file.fileno()).st_mtime, file.read()
    except FileNotFoundError:
        return None
    except OSError as error:
        if error.errno == errno.ESTALE:  # NFS: removed while it was opened
            return None
        raise
    try:
        owner = json.loads(text)
    except ValueError:
        owner = {}
    return (owner if isinstance(owner, dict) else {}), beat


def _token(there: tuple[dict[str, Any], float] | None) -> str | None:
    return None if there is None else there[0].get("token")


def _described(owner: dict[str, Any]) -> str:
    if not {"pid", "host", "since"} <= owner.keys():
        return "an unknown process"
    return f"pid {owner['pid']} on host {owner['host']} since {owner['since']}"
