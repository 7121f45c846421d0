"""Downloads that happen once per machine, however many processes need the file."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def one_per_machine(name: str) -> Iterator[None]:
    """Context manager that the processes of one user on this machine enter one after the other.

    The lock ends with its process. Inside, look for the file again before downloading it.

    Args:
        name: of what is downloaded, such as its URL.
    """
    digest = hashlib.sha256(name.encode()).hexdigest()[:16]
    with open(Path(tempfile.gettempdir()) / f"titanrepa-{os.getuid()}-{digest}.lock", "a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
