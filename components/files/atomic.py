"""Atomic file writes."""

from __future__ import annotations

import contextlib
import os
import uuid
from collections.abc import Iterator
from pathlib import Path

from components.files.manifest import sync_folder


@contextlib.contextmanager
def atomic_write(path: Path, *, fsync: bool = True, concurrent: bool = False) -> Iterator[Path]:
    """Context manager that yields a temporary path in the same folder and renames it to ``path`` at the end.

    The body writes the temporary file and closes it. On an exception, ``path`` stays as it was, the temporary file is
    removed and the exception is passed on. A killed process leaves the temporary file: ``NAME.partial``, which the
    next write replaces, or ``.NAME.RANDOM.tmp`` if ``concurrent``.

    Args:
        path: file to create or replace; its folder must exist.
        fsync: flush the file and the folder's entry to disk, so that the file survives a power failure.
        concurrent: several processes, of any machine, may write ``path`` at the same time, so each needs its own
            temporary file.
    """
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp" if concurrent else f"{path.name}.partial")
    try:
        yield temporary
        if fsync:
            with open(temporary, "rb") as file:
                os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise
    if fsync:
        sync_folder(path.parent)


def append_line(path: Path, line: str) -> None:
    """Append a line to a text file, whole or not at all.

    Raises:
        OSError: it cannot be written; a part of it has been removed again.
    """
    with open(path, "ab", buffering=0) as file:
        size, rest = file.tell(), (line + "\n").encode()
        try:
            while rest:
                rest = rest[file.write(rest) :]
        except OSError:
            file.truncate(size)
            raise
