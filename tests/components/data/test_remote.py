"""Shards by URL and from commands are read as local ones, fetched once, and complete or absent."""

import contextlib
import functools
import http.server
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

from components.data import remote, shards
from components.data.loader import DataError, make_loader
from plugins.datasets.webdataset import WebDataset
from tests.components.data.test_data import take
from tests.plugins.datasets.test_webdataset import same
from tests.support import ROOT
from tests.support.image_files import samples, write_shards
from tests.support.ranks import run_ranks

torch.set_num_threads(1)


class Handler(http.server.SimpleHTTPRequestHandler):
    """Serves files; ``server.answer(name, number)`` may change the answer to a file's request of this number."""

    def do_GET(self):
        name = self.path.rpartition("/")[2]
        with self.server.lock:
            self.server.asked.append(name)
            number = self.server.asked.count(name)
        action = self.server.answer(name, number)
        if isinstance(action, int):
            return self.send_error(action)
        if action is None:
            return super().do_GET()
        content = Path(self.directory, name).read_bytes()
        self.send_response(200)
        if action != "no length":
            self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if action == "slow":
            time.sleep(0.3)
        elif action == "stalled":
            self.wfile.write(content[: len(content) // 2])
            self.wfile.flush()
            self.server.stalled.wait(300)
        cut = {"truncated": len(content) // 2, "not tar": 700}.get(action, len(content))
        return self.wfile.write(content[:cut])

    def log_message(self, *_):
        pass


class Server(http.server.ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, folder):
        super().__init__(("127.0.0.1", 0), functools.partial(Handler, directory=str(folder)))
        self.lock, self.asked, self.answer = threading.Lock(), [], lambda name, number: None
        self.stalled = threading.Event()
        self.url = f"http://127.0.0.1:{self.server_port}"

    def handle_error(self, *_):
        pass  # a client that was killed


@pytest.fixture
def there(tmp_path, monkeypatch):
    """A folder of four shards, as local files."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(remote, "DELAYS_S", (0.01, 0.01, 0.01))
    return write_shards(tmp_path / "there", samples(10), 4)


@pytest.fixture
def server(there):
    found = Server(there)
    thread = threading.Thread(target=found.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    yield found
    found.stalled.set()
    found.shutdown()
    found.server_close()
    thread.join()


def files(folder):
    return sorted(path.name.split("-")[0] for path in Path(folder).iterdir() if path.name.endswith((".tar", ".tmp")))


ALL = ["000", "001", "002", "003"]


@pytest.mark.parametrize("form", ["url", "pipe", "list", "mixed", "no length"])
def test_remote_shards_give_the_items_of_local_ones(tmp_path, there, server, form):
    local = WebDataset(16, path=str(there))
    url, pipe = f"{server.url}/{{000..003}}.tar", f"pipe:cat {there}/{{000..003}}.tar"
    server.answer = lambda name, number: "no length" if form == "no length" else None
    path = {
        "pipe": pipe,
        "list": f"{server.url}/000.tar::pipe:cat {there}/001.tar::{server.url}/00{{2,3}}.tar",
        "mixed": f"{there}/00{{0..1}}.tar::{server.url}/00{{2..3}}.tar",
    }.get(form, url)
    for _ in range(2):
        assert same(WebDataset(16, path=path, cache=str(tmp_path / "cache")), local)
    assert len(server.asked) == {"pipe": 0, "list": 3, "mixed": 2}.get(form, 4)
    assert files(tmp_path / "cache") == (["002", "003"] if form == "mixed" else ALL)


def test_by_default_the_copies_are_in_the_users_cache(tmp_path, there, server, monkeypatch, caplog):
    monkeypatch.setattr(remote, "SAY_S", 0.0)
    caplog.set_level("INFO", "titanrepa")
    server.answer = lambda name, number: "slow"
    WebDataset(16, path=f"{server.url}/{{000..003}}.tar")
    assert "fetching 4 shards into" in caplog.text and "of 4 shards, 0.00 GB" in caplog.text
    assert files(tmp_path / "home/titanrepa/shards") == ALL
    server.answer = lambda name, number: 404  # a later start needs no network
    assert len(WebDataset(16, path=f"{server.url}/{{000..003}}.tar")) == 10


def test_names_of_classes_come_from_a_url_a_command_or_a_file(tmp_path, there, server):
    (there / "classes.json").write_text('["ape", "bee", "cat"]')
    local, cache = WebDataset(16, path=str(there)), str(tmp_path / "cache")
    for classes in (f"{server.url}/classes.json", f"pipe:cat {there}/classes.json", str(there / "classes.json")):
        found = WebDataset(16, path=f"{server.url}/{{000..003}}.tar", classes=classes, cache=cache)
        assert found.class_names == local.class_names == ["ape", "bee", "cat"]
    assert WebDataset(16, path=f"{server.url}/{{000..003}}.tar", cache=cache).class_names == ["0", "1", "2"]
    with pytest.raises(DataError, match=r"classes = 'no\.json' does not exist"):
        WebDataset(16, path=str(there), classes="no.json")


@pytest.mark.parametrize("failure", [503, 429, "truncated"])
def test_a_failure_that_passes_is_tried_again(tmp_path, there, server, caplog, failure):
    server.answer = lambda name, number: failure if name == "002.tar" and number < 4 else None
    assert same(WebDataset(16, path=f"{server.url}/{{000..003}}.tar"), WebDataset(16, path=str(there)))
    assert server.asked.count("002.tar") == 4 and len(server.asked) == 7
    assert caplog.text.count("trying again") == 3


@pytest.mark.parametrize(
    ("answer", "tries", "message"),
    [
        (404, 1, r"002\.tar': HTTP 404 .*check its name, and the range"),
        (403, 1, r"002\.tar': HTTP 403 .*credentials .*or it does not exist"),
        (500, 4, r"002\.tar': HTTP 500"),
        ("truncated", 4, r"002\.tar' ended after \d+ of \d+ bytes"),
    ],
)
def test_a_failure_names_the_url_and_keeps_the_other_shards(tmp_path, there, server, answer, tries, message):
    server.answer = lambda name, number: answer if name == "002.tar" else None
    path, cache = f"{server.url}/{{000..003}}.tar", tmp_path / "cache"
    with pytest.raises(DataError, match=f"dataset webdataset: '{server.url}/{message}"):
        WebDataset(16, path=path, cache=str(cache))
    assert server.asked.count("002.tar") == tries
    there_already = files(cache)
    assert "002" not in there_already and not any("tmp" in name for name in os.listdir(cache))
    server.answer, server.asked = lambda name, number: None, []
    assert same(WebDataset(16, path=path, cache=str(cache)), WebDataset(16, path=str(there)))
    assert len(server.asked) == 4 - len(there_already)


def test_what_is_no_complete_tar_is_refused(tmp_path, there, server):
    server.answer = lambda name, number: "no length"
    for content in (b"<html>log in</html>", (there / "000.tar").read_bytes()[:1536], b""):
        (there / "x.tar").write_bytes(content)
        with pytest.raises(DataError, match=rf"x\.tar' gave {len(content)} bytes that are no complete tar"):
            WebDataset(16, path=f"{server.url}/x.tar", cache=str(tmp_path / "cache"))
    assert files(tmp_path / "cache") == []


def test_a_damaged_shard_is_refused_and_fetched_again_once_removed(tmp_path, there, server):
    sound = (there / "001.tar").read_bytes()
    (there / "001.tar").write_bytes(sound[:3] + b"?" + sound[4:])
    path, cache = f"{server.url}/{{000..003}}.tar", str(tmp_path / "cache")
    with pytest.raises(DataError, match=r"cache/001-\w+\.tar cannot be read: .* Repair or remove it"):
        WebDataset(16, path=path, cache=cache)
    (there / "001.tar").write_bytes(sound)
    next(Path(cache).glob("001-*")).unlink()
    assert same(WebDataset(16, path=path, cache=cache), WebDataset(16, path=str(there)))


def test_an_unreadable_image_of_a_remote_shard_is_replaced_and_named(tmp_path, there):
    images = samples(4)
    images[1] = (images[1][0][:300], 0)
    write_shards(there, images, 1)
    item = WebDataset(16, path=f"pipe:cat {there}/000.tar", cache=str(tmp_path / "cache"))[1]
    assert "cache/000-" in item.unreadable and item.unreadable.endswith(": 0001.png") and "truncated" in item.reason


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("echo starting >&2; echo no such bucket >&2; exit 3", r"ended with status 3: no such bucket$"),
        ("no_such_program x", r"'no_such_program x' ended with status 127: .*not found"),
        ("cat {there}/000.tar; exit 1", r"ended with status 1 and wrote no error"),
        ("kill -9 $$", r"ended with status -9"),
        ("head -c 2000 {there}/000.tar", r"gave 2000 bytes that are no complete tar"),
    ],
)
def test_a_command_that_fails_says_why(tmp_path, there, command, message):
    command = command.replace("{there}", str(there))
    with pytest.raises(DataError, match=f"dataset webdataset: .*{message}"):
        WebDataset(16, path=f"pipe:{command}", cache=str(tmp_path / "cache"))
    assert os.listdir(tmp_path / "cache") == []


def test_a_command_that_fails_is_tried_again(tmp_path, there):
    path = f"pipe:echo x >> {tmp_path}/tries; test $(wc -l < {tmp_path}/tries) = 3 && cat {there}/000.tar"
    assert len(WebDataset(16, path=path, cache=str(tmp_path / "cache"))) == 3
    assert (tmp_path / "tries").read_text() == "x\n" * 3


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("s3://b/{0..1}.tar", r"'s3://b/0\.tar': s3:// is not read; .*such as pipe:aws s3 cp s3://b/0\.tar -"),
        ("ftp://b/0.tar", "ftp:// is not read; expected files, http://, https://, or pipe:"),
        ("http://127.0.0.1:9/a b.tar", "URL can't contain control characters"),
        ("http://127.0.0.1:9/0.tar", "Connection refused"),
        ("::", "1 of 1 shards are missing"),
    ],
)
def test_a_source_that_cannot_be_read_says_what_to_do(there, path, message):
    with pytest.raises(DataError, match=f"dataset webdataset: .*{message}"):
        WebDataset(16, path=path)


def test_a_folder_that_cannot_be_written(tmp_path, there, server, monkeypatch, caplog):
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match=r"file/x cannot be written: Not a directory.*\[dataset\] cache"):
        WebDataset(16, path=f"{server.url}/{{000..003}}.tar", cache=str(tmp_path / "file/x"))

    @contextlib.contextmanager
    def full(target, concurrent):
        yield Path("/dev/full")

    monkeypatch.setattr(remote, "atomic_write", full)
    with pytest.raises(DataError, match=r"cache cannot be written: No space left on device\. Free disk space, or set"):
        WebDataset(16, path=f"{server.url}/{{000..003}}.tar", cache=str(tmp_path / "cache"))


def test_a_disk_that_is_too_small_is_said_after_the_first_shard(tmp_path, there, server, monkeypatch, caplog):
    monkeypatch.setattr(remote.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9, 100))
    WebDataset(16, path=f"{server.url}/{{000..003}}.tar", cache=str(tmp_path / "cache"))
    assert caplog.text.count("need about 0.0 GB") == 1


def test_left_files_are_removed_and_young_ones_kept(tmp_path, there, server):
    (cache := tmp_path / "cache").mkdir()
    for name, age in (("old", 2 * remote.LEFT_S), ("young", 60)):
        (cache / f".{name}.tmp").write_text("")
        os.utime(cache / f".{name}.tmp", (time.time() - age,) * 2)
    WebDataset(16, path=f"{server.url}/000.tar", cache=str(cache))
    assert (cache / ".young.tmp").exists() and not (cache / ".old.tmp").exists()


def test_braces_of_the_shell_are_left_to_it():
    assert shards.expand("a ${X} ${Y,,} | awk '{print $1}' {0..1}") == [
        f"a ${{X}} ${{Y,,}} | awk '{{print $1}}' {n}" for n in range(2)
    ]


def open_it(path, cache):
    remote.DELAYS_S = (0.01,) * 3
    data = WebDataset(16, path=path, cache=cache)
    return len(data), data[0].label, os.getpid()


@pytest.mark.long
def test_processes_of_a_machine_share_one_download(tmp_path, there, server):
    server.answer = lambda name, number: "slow"
    path = f"{server.url}/{{000..003}}.tar"
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        found = pool.starmap(open_it, [(path, str(tmp_path / "cache"))] * 2, chunksize=1)
    assert {count for count, *_ in found} == {10} and len({pid for *_, pid in found}) == 2
    assert sorted(server.asked) == [f"{name}.tar" for name in ALL]


SCRIPT = """
import sys
from plugins.datasets.webdataset import WebDataset
from trainer.signals import Interruptions
with Interruptions() as signals:
    try:
        WebDataset(16, path=sys.argv[1], cache=sys.argv[2])
    except KeyboardInterrupt:
        sys.exit(signals.report())
"""


@pytest.mark.long
@pytest.mark.parametrize("form", ["url", "pipe"])
@pytest.mark.parametrize("end", [signal.SIGINT, signal.SIGKILL])
def test_an_interrupted_start_goes_on_with_the_missing_shards(tmp_path, there, server, form, end):
    server.answer = lambda name, number: "stalled" if name == "003.tar" and number == 1 else None
    slow = f"if test $1 = 003.tar -a ! -e {tmp_path}/once; then touch {tmp_path}/once; sleep 60; fi"
    (tmp_path / "read").write_text(f"echo $1 >> {tmp_path}/asked; {slow}; cat {there}/$1")
    path = f"{server.url}/{{000..003}}.tar" if form == "url" else f"pipe:sh {tmp_path}/read {{000..003}}.tar"
    cache = tmp_path / "cache"
    words = [sys.executable, "-c", SCRIPT, path, str(cache)]
    process = subprocess.Popen(words, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 300
    while not (cache.exists() and len(list(cache.glob("*.tar"))) == 3):
        assert time.monotonic() < deadline and process.poll() is None, process.communicate()
        time.sleep(0.02)
    process.send_signal(end)
    said = process.communicate(timeout=300)[1]
    assert process.returncode == (-9 if end == signal.SIGKILL else 130), said
    assert end == signal.SIGKILL or ("interrupted (SIGINT)" in said and "Traceback" not in said)
    assert same(WebDataset(16, path=path, cache=str(cache)), WebDataset(16, path=str(there)))
    asked = server.asked if form == "url" else (tmp_path / "asked").read_text().split()
    assert sorted(asked) == ["000.tar", "001.tar", "002.tar", "003.tar", "003.tar"]


@pytest.mark.parametrize("workers", [0, 2])
def test_a_resume_at_another_world_size_continues_the_sequence(tmp_path, there, workers):
    data = WebDataset(16, path=f"pipe:cat {there}/{{000..003}}.tar", cache=str(tmp_path / "cache"))
    whole = take(make_loader(WebDataset(16, path=str(there)), seed=5, batch_size=4), 8)
    for done in (1, 3):
        for rank in range(2):
            found = take(
                make_loader(data, seed=5, batch_size=4, consumed=4 * done, rank=rank, world=2, workers=workers), 3
            )
            for k, batch in enumerate(found):
                assert torch.equal(batch.images, whole[done + k].images[2 * rank : 2 * rank + 2])


def read_rank(rank, world, path, cache):
    os.environ["no_proxy"] = "127.0.0.1"
    data = WebDataset(16, path=path, cache=cache)
    batches = take(make_loader(data, seed=5, batch_size=2, rank=rank, world=world), 5)
    return [batch.images for batch in batches]


@pytest.mark.long
def test_two_ranks_see_each_sample_once_in_an_epoch(tmp_path, there, server):
    path = f"{server.url}/{{000..003}}.tar"
    ranks = run_ranks(read_rank, 2, path, str(tmp_path / "cache"), timeout_s=300)
    images = [image for rank in ranks for batch in rank for image in batch]
    local = make_loader(WebDataset(16, path=str(there)), seed=5, batch_size=2)
    whole = [image for batch in take(local, 5) for image in batch.images]
    assert len(images) == 10 and all(sum(torch.equal(a, b) for b in images) == 1 for a in whole)
    assert len(server.asked) == 4
