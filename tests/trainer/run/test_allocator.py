"""glibc keeps freed memory on CPU runs, unless the user set the allocator; measured peaks give it back."""

import os
import platform
import subprocess
import sys

import pytest

from tests.support import ROOT
from trainer.run import allocator

# Frees a tensor of 256 MiB, touched; prints whether the allocator was set, and the MiB still resident.
FREE = """
import sys
from trainer.run.allocator import keep_freed_memory, return_freed_memory

def resident():
    return int(open("/proc/self/statm").read().split()[1]) * 4096 / 2**20

kept = keep_freed_memory() if "keep" in sys.argv else None
returned = return_freed_memory() if "return" in sys.argv else None
before = resident()
block = bytearray(b"x" * 2**20) * 256
del block
print(kept, returned, resident() - before > 200)
"""


def freed(*how: str, **environment: str) -> list[str]:
    clean = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    clean.pop("GLIBC_TUNABLES", None)
    done = subprocess.run([sys.executable, "-c", FREE, *how], env={**clean, **environment}, cwd=ROOT,
                          capture_output=True, text=True, check=True)  # fmt: skip
    return done.stdout.split()


needs_glibc = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs glibc")


@needs_glibc
def test_freed_memory_stays_and_can_be_returned():
    assert freed() == ["None", "None", "False"]
    assert freed("keep") == ["True", "None", "True"]
    assert freed("keep", "return") == ["True", "True", "False"]


@needs_glibc
@pytest.mark.parametrize(
    "name, value", [("MALLOC_ARENA_MAX", "2"), ("GLIBC_TUNABLES", "glibc.malloc.check=0"), (allocator.SWITCH, "0")]
)
def test_the_users_settings_come_first(name, value):
    assert freed("keep", **{name: value}) == ["False", "None", "False"]


def test_other_libraries_are_left_alone(monkeypatch):
    monkeypatch.setattr(allocator.ctypes, "CDLL", lambda name: object())
    assert not allocator.keep_freed_memory() and not allocator.return_freed_memory()
