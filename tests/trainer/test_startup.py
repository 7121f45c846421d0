"""What a command does until its work begins: imports without garbage collection, which is on afterwards."""

import gc
import subprocess
import sys

import pytest

from tests.support import ROOT
from trainer.startup import without_garbage_collection


def test_collection_goes_on_after_an_error_too():
    assert gc.isenabled()
    with pytest.raises(ValueError), without_garbage_collection():
        assert not gc.isenabled()
        raise ValueError
    assert gc.isenabled()


def test_what_was_off_stays_off():
    gc.disable()
    try:
        with without_garbage_collection():
            pass
        assert not gc.isenabled()
    finally:
        gc.enable()


def test_pytorch_is_imported_with_few_collections():
    code = (
        "import gc, sys\nfrom trainer import config\nfrom trainer.commands.train import set_backends\n"
        "def count(): return sum(generation['collections'] for generation in gc.get_stats())\n"
        "before = count()\nloaded = config.load('train_configs/quickstart.toml')\nset_backends(loaded)\n"
        "print(count() - before)\nassert gc.isenabled() and {'torch', 'torch._dynamo'} <= set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 100  # of the order of a thousand otherwise
