"""Shards by URL or from the output of a command (``pipe:``), as in WebDataset: copied into a folder once per machine.

Reading any image at any time, which exact order and exact resume need, takes whole files. A shard is written under
a temporary name, and renamed once its length (of a URL), the command's status and the end mark of tar are right. So
each file of the folder is complete, and an interrupted start goes on with the shards that are missing.
"""

from __future__ import annotations

import collections
import contextlib
import hashlib
import http.client
import logging
import os
import queue
import re
import selectors
import shutil
import signal
import ssl
import subprocess
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterable, Iterator
from pathlib import Path

from tqdm import tqdm

from components.data.loader import DataError
from components.files.atomic import atomic_write
from components.files.download import one_per_machine
from components.version import version

logger = logging.getLogger("titanrepa")

JOBS = 4  # shards that are fetched at the same time
DELAYS_S = (1.0, 3.0, 10.0)  # before each further try
TIMEOUT_S = 30.0  # without a byte from a server
POLL_S = 0.5
SAY_S = 60.0  # between lines of the log without a progress bar
BLOCK = 1 << 20
BLOCK_OF_TAR = 512
LEFT_S = 3600.0  # age after which a temporary file is that of a killed process
PIPE = "pipe:"
URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://")
COMMANDS = {"s3": "aws s3 cp {} -", "gs": "gcloud storage cat {}", "hdfs": "hdfs dfs -cat {}", "ais": "ais get {} -"}


class Failure(Exception):
    """A source cannot be fetched.

    Args:
        reason: in words.
        again: whether another try may succeed.
    """

    def __init__(self, reason: str, again: bool) -> None:
        super().__init__(reason)
        self.again = again


def split(path: str) -> list[str]:
    """The sources that a path names, between ``::``; braces are not expanded yet."""
    return [source for source in path.split("::") if source]


def is_remote(source: str) -> bool:
    """Whether a source is a URL or a command, and no file; its braces must not be expanded before."""
    return (source.startswith(PIPE) or URL.match(source) is not None) and not os.path.exists(source)


def commands(path: str) -> list[str]:
    """The commands that opening a path would run, each with its ``pipe:``."""
    return [source for source in split(path) if source.startswith(PIPE)]


def cache_folder() -> Path:
    """titanrepa's folder in $XDG_CACHE_HOME, by default ~/.cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "titanrepa"


def fetch(sources: Iterable[str], cache: str | None, title: str) -> dict[str, str]:
    """Absolute path of the copy of each remote source; those that are missing are fetched, several at a time.

    Processes on one machine share one download. Machines that share the folder may fetch a shard twice.

    Args:
        sources: URLs (http, https) and commands (``pipe:COMMAND``, for /bin/sh), after the expansion of braces.
        cache: folder of the copies, created if missing; None: ``shards`` in :func:`cache_folder`.
        title: of the dataset, for messages.

    Raises:
        DataError: a source cannot be fetched, or the folder cannot be written.
    """
    sources = list(sources)
    for source in sources:
        _check_scheme(source, title)
    folder = Path(os.path.abspath(os.path.expanduser(cache))) if cache else cache_folder() / "shards"
    found = {source: folder / _name(source) for source in sources}

    def missing() -> dict[str, Path]:
        return {source: target for source, target in found.items() if not target.is_file()}

    if missing():
        with one_per_machine("\n".join([str(folder), *found])):
            if wanted := missing():
                try:
                    folder.mkdir(parents=True, exist_ok=True)
                    _remove_left(folder)
                    _Fetching(wanted, folder, title).run()
                except OSError as error:
                    raise DataError(
                        f"{title}: {folder} cannot be written: {error.strerror or error}. Free disk space, or set "
                        "[dataset] cache to another folder; shards that are complete are kept"
                    ) from error
    return {source: str(target) for source, target in found.items()}


class _Fetching:
    """Copies sources to files in threads.

    Args:
        wanted: target file by source.
        folder: of the files.
        title: of the dataset, for messages.
    """

    def __init__(self, wanted: dict[str, Path], folder: Path, title: str) -> None:
        self.wanted, self.folder, self.title = collections.deque(wanted.items()), folder, title
        self.stop = threading.Event()
        self.ended: queue.Queue[int | Exception] = queue.Queue()  # bytes of a file, or why there is none
        self.received = 0  # bytes, for the progress bar only

    def run(self) -> None:
        """Return when all files are there; raise the first error once the threads have been told to stop."""
        total = left = len(self.wanted)
        logger.info(f"{self.title}: fetching {total} shards into {self.folder}, once")
        # Daemons: a server that does not answer must not keep the process from ending.
        threads = [threading.Thread(target=self._work, name="shards", daemon=True) for _ in range(min(JOBS, total))]
        for thread in threads:
            thread.start()
        try:
            with tqdm(total=total, unit="shard", desc="shards", disable=None, dynamic_ncols=True) as bar:
                said = time.monotonic()
                while left:
                    bar.set_postfix_str(f"{self.received / 1e9:.2f} GB")
                    if bar.disable and time.monotonic() - said > SAY_S:
                        said = time.monotonic()
                        logger.info(f"{self.title}: {total - left} of {total} shards, {self.received / 1e9:.2f} GB")
                    try:
                        ended = self.ended.get(timeout=POLL_S)
                    except queue.Empty:
                        continue
                    if isinstance(ended, Exception):
                        raise ended
                    left -= 1
                    bar.update()
                    if left == total - 1:
                        self._check_space(ended * left)
        finally:
            self.stop.set()
            deadline = time.monotonic() + 2 * POLL_S
            for thread in threads:
                thread.join(max(0.0, deadline - time.monotonic()))

    def _check_space(self, need: int) -> None:
        if need > (free := shutil.disk_usage(self.folder).free):
            logger.warning(
                f"{self.title}: the other shards need about {need / 1e9:.1f} GB if they are as large as the first, but "
                f"{self.folder} has {free / 1e9:.1f} GB free; [dataset] cache sets another folder"
            )

    def _work(self) -> None:
        while not self.stop.is_set():
            try:
                source, target = self.wanted.popleft()
            except IndexError:
                return
            try:
                self.ended.put(self._fetch(source, target))
            except Exception as error:  # raised by the thread that waits
                self.ended.put(error)

    def _fetch(self, source: str, target: Path) -> int:
        for delay in (*DELAYS_S, None):
            try:
                return self._copy(source, target)
            except Failure as failure:
                if delay is None or not failure.again:
                    raise DataError(f"{self.title}: {failure}") from failure
                logger.warning(f"{self.title}: {failure}; trying again in {delay:g} s")
                if self.stop.wait(delay):
                    raise
        raise AssertionError("unreachable")

    def _copy(self, source: str, target: Path) -> int:
        size = 0
        blocks = _run(source, self.stop) if source.startswith(PIPE) else _download(source)
        with atomic_write(target, concurrent=True) as temporary:
            with open(temporary, "wb") as file, contextlib.closing(blocks):
                for block in blocks:
                    file.write(block)
                    size += len(block)
                    self.received += len(block)
                    if self.stop.is_set():
                        break
            if self.stop.is_set():  # a command's output may be cut off without an error
                raise Failure(f"'{source}': stopped", again=False)
            if target.suffix == ".tar" and not _ends(temporary):
                raise Failure(
                    f"'{source}' gave {size} bytes that are no complete tar: the end mark is missing; compressed tars "
                    "are not read, unless a command unpacks them",
                    again=False,
                )
        return size


def _download(url: str) -> Iterator[bytes]:
    """The body of a URL's answer in blocks; raises :class:`Failure`."""
    request, received = urllib.request.Request(url, headers={"User-Agent": f"titanrepa/{version()}"}), 0
    try:
        with urllib.request.urlopen(request, timeout=TIMEOUT_S) as answer:
            length = answer.headers.get("Content-Length")
            while block := answer.read(BLOCK):
                received += len(block)
                yield block
    except urllib.error.HTTPError as error:
        again = error.code >= 500 or error.code in (408, 425, 429)
        hint = {
            401: "; it needs credentials: use a signed URL, or pipe:curl with a header",
            403: "; it needs credentials (a signed URL, or pipe:curl with a header), or it does not exist",
            404: "; check its name, and the range of numbers in the pattern",
        }
        raise Failure(f"'{url}': HTTP {error.code} ({error.reason}){hint.get(error.code, '')}", again) from error
    except urllib.error.URLError as error:
        again = not isinstance(error.reason, ssl.SSLCertVerificationError)
        raise Failure(f"'{url}': {error.reason}", again) from error
    except ValueError as error:  # no valid URL
        raise Failure(f"'{url}': {error}", again=False) from error
    except (OSError, http.client.HTTPException) as error:
        raise Failure(f"'{url}': {type(error).__name__}: {error} (after {received} bytes)", again=True) from error
    if length is not None and received != int(length):
        raise Failure(f"'{url}' ended after {received} of {length} bytes", again=True)


def _run(source: str, stop: threading.Event) -> Iterator[bytes]:
    """The output of a command in blocks; raises :class:`Failure` if its status is not 0. Kills it if closed before."""
    command = source.removeprefix(PIPE).strip()
    with tempfile.TemporaryFile() as errors:
        try:
            process = subprocess.Popen(
                command, shell=True, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=errors, bufsize=0,
                start_new_session=True,  # to kill what it starts, too; signals of the terminal come by way of ``stop``
            )  # fmt: skip
        except (OSError, ValueError) as error:
            raise Failure(f"the command '{command}' cannot be started: {error}", again=False) from error
        try:
            yield from _output(process, stop)
            while True:
                try:
                    status = process.wait(POLL_S)
                    break
                except subprocess.TimeoutExpired:
                    if stop.is_set():
                        return
        finally:
            process.stdout.close()
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        if status:
            errors.seek(max(0, errors.seek(0, os.SEEK_END) - 4096))
            said = errors.read().decode(errors="replace").strip().splitlines()
            reason = f": {said[-1].strip()}" if said else " and wrote no error"
            again = status not in (126, 127)  # not executable, not found
            raise Failure(f"the command '{command}' ended with status {status}{reason}", again)


def _output(process: subprocess.Popen[bytes], stop: threading.Event) -> Iterator[bytes]:
    with selectors.DefaultSelector() as selector:
        selector.register(process.stdout, selectors.EVENT_READ)
        while not stop.is_set():
            if selector.select(POLL_S):
                if not (block := process.stdout.read(BLOCK)):
                    return
                yield block


def _check_scheme(source: str, title: str) -> None:
    if source.startswith(PIPE):
        return
    scheme = URL.match(source)[1].lower()
    if scheme not in ("http", "https"):
        hint = f", such as pipe:{COMMANDS[scheme].format(source)}" if scheme in COMMANDS else ""
        raise DataError(
            f"{title}: '{source}': {scheme}:// is not read; expected files, http://, https://, or pipe: and a command "
            f"that writes the shard to its output{hint}"
        )


def _name(source: str) -> str:
    """Name of a source's copy: readable, and different for other sources."""
    digest = hashlib.sha256(source.encode(errors="surrogateescape")).hexdigest()[:16]
    words = re.findall(r"([\w.-]+)\.(tar|json)\b", source)
    stem, suffix = words[-1] if words else ("shard", "tar")
    return f"{stem[-100:].lstrip('.')}-{digest}.{suffix}"


def _ends(file: Path) -> bool:
    """Whether a file ends as an uncompressed tar does, in blocks of zeros."""
    size = file.stat().st_size
    if not size or size % BLOCK_OF_TAR:
        return False
    with open(file, "rb") as content:
        content.seek(-BLOCK_OF_TAR, os.SEEK_END)
        return not any(content.read())


def _remove_left(folder: Path) -> None:
    """Remove temporary files of processes that were killed."""
    for file in folder.glob(".*.tmp"):
        try:
            if time.time() - file.stat().st_mtime > LEFT_S:
                file.unlink()
        except FileNotFoundError:
            pass
