"""benchmarks/gpu.py runs completely on a CPU, and its file is complete after every part, however the run ends."""

import json
import os
import signal
import subprocess
import sys
import time
import weakref
from pathlib import Path

import pytest
import torch

from benchmarks import floor, gpu
from benchmarks.gpu_parts import Bench
from benchmarks.results import Results
from tests.support import ROOT, toys
from trainer import config as configs

pytestmark = pytest.mark.long

PARTS = [
    "machine",
    "ceilings",
    "TFLOP per image",
    "build",
    "joint step, compiled, batch 3",
    "kernels, compiled, batch 3",
    "joint step beside the plain step, compiled, batch 3",
    "joint step, compiled, beside the plain step, eager, batch 3",
    "second stage, compiled, batch 9",
    "second stage, compiled, batch 24",
    "kernels, second stage, compiled, batch 9",
    "LPIPS and discriminator in bf16, compiled, batch 3",
    "PyTorch's group norm, compiled, batch 3",
    "joint step, compiled, batch 4",
    "joint step beside the plain step, eager, batch 2",
    "joint step, eager, batch 2",
    "joint step, eager, batch 3",
    "joint step, eager, batch 4",
    "floor, batch 3",
    "sampling, eager, batch 6",
    "second stage beside the plain step, eager, batch 9",
    "second stage, eager, batch 9",
    "second stage, eager, batch 24",
    "kernels, eager, batch 2",
]


def read(file: Path) -> dict:
    def refuse(name):
        raise AssertionError(f"{name} is no JSON")

    return json.loads(file.read_text(), parse_constant=refuse)


@pytest.fixture
def toml(tmp_path) -> str:
    path = tmp_path / "toy.toml"
    path.write_text(toys.TOML)
    return str(path)


# -- the file ----------------------------------------------------------------------------------------------------------


def test_the_file_is_whole_before_and_after_every_part(tmp_path):
    file = tmp_path / "gpu.json"
    results = Results(file, 60)
    assert read(file)["parts"] == {}

    def part():
        assert read(file)["parts"]["second"] == {"status": "running"}
        assert read(file)["parts"]["first"]["status"] == "done"
        return {"loss": float("nan"), "images/s": 3.0}

    results.part("first", 0, lambda: 1)
    results.part("second", 0, part)
    assert read(file)["parts"]["second"]["result"] == {"loss": "nan", "images/s": 3.0}
    assert [f.name for f in tmp_path.iterdir()] == ["gpu.json"]


def test_a_part_that_fails_leaves_its_traceback_and_the_next_one_runs(tmp_path):
    cleaned = []
    results = Results(tmp_path / "gpu.json", 60, after=lambda: cleaned.append(1))

    def broken():
        raise ValueError("no such kernel")

    assert results.part("broken", 0, broken) is None
    assert results.part("next", 0, lambda: 7) == 7
    parts = read(tmp_path / "gpu.json")["parts"]
    assert parts["broken"]["status"] == "failed" and parts["broken"]["error"] == "ValueError: no such kernel"
    assert "in broken" in parts["broken"]["traceback"]
    assert parts["next"]["result"] == 7 and len(cleaned) == 2


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
        RuntimeError("backend='inductor' raised:\nOutOfMemoryError: CUDA out of memory. Tried to allocate 2 GiB"),
    ],
)
def test_out_of_memory_is_a_result(tmp_path, error):
    def part():
        raise error

    Results(tmp_path / "gpu.json", 60).part("large", 0, part)
    entry = read(tmp_path / "gpu.json")["parts"]["large"]
    assert entry["status"] == "out of memory" and "Tried to allocate 2 GiB" in entry["error"]
    assert "traceback" not in entry


def test_parts_that_time_does_not_suffice_for_are_left_out_by_name(tmp_path):
    results = Results(tmp_path / "gpu.json", 5)
    results.part("long", 60, lambda: 1)
    results.part("short", 1, lambda: 2)
    parts = read(tmp_path / "gpu.json")["parts"]
    assert parts["long"] == {"status": "left out", "left s": 5, "needs s": 60}
    assert parts["short"]["result"] == 2


def test_a_part_ends_with_the_time(tmp_path):
    results = Results(tmp_path / "gpu.json", 0.2)

    def endless():
        try:
            while True:
                time.sleep(0.01)
        except Exception:
            pytest.fail("a library that catches errors would swallow the end of the time")

    before = signal.getsignal(signal.SIGALRM)
    results.part("endless", 0, endless)
    results.part("next", 0.1, lambda: 1)
    parts = read(tmp_path / "gpu.json")["parts"]
    assert parts["endless"]["status"] == "out of time" and parts["next"]["status"] == "left out"
    assert signal.getsignal(signal.SIGALRM) == before


def test_a_part_has_its_share_of_the_time(tmp_path):
    results = Results(tmp_path / "gpu.json", 60)
    results.part("slow", 0, lambda: time.sleep(30), share=0.002)
    results.part("next", 0, lambda: 1)
    parts = read(tmp_path / "gpu.json")["parts"]
    assert parts["slow"]["status"] == "out of time" and parts["next"]["status"] == "done"


def test_an_interrupt_leaves_the_file_whole(tmp_path):
    results = Results(tmp_path / "gpu.json", 60)
    results.part("first", 0, lambda: 1)
    with pytest.raises(KeyboardInterrupt):
        results.part("second", 0, lambda: signal.raise_signal(signal.SIGINT))
    parts = read(tmp_path / "gpu.json")["parts"]
    assert parts["first"]["result"] == 1 and parts["second"] == {"status": "interrupted"}


def test_only_some_parts(tmp_path):
    results = Results(tmp_path / "gpu.json", 60, only=["plain"])
    results.part("build", 0, lambda: 1, required=True)
    results.part("sampling", 0, lambda: 1)
    results.part("beside the plain step", 0, lambda: 1)
    assert list(read(tmp_path / "gpu.json")["parts"]) == ["build", "beside the plain step"]


# -- the parts ---------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_every_part_runs_on_a_cpu(tmp_path, toml, capsys):
    """Runs `--tiny` with the networks of the toy config. Compiled parts trace as Inductor does."""
    try:
        options = ["--training.precision=bf16", "--training.threads=1"]
        status = gpu.main(["--out", str(tmp_path / "out"), "--config", toml, "--tiny", *options])
    finally:
        torch._dynamo.reset()
    assert status == 0
    found = read(tmp_path / "out" / "gpu.json")
    assert list(found["parts"]) == PARTS
    assert {name: entry["status"] for name, entry in found["parts"].items()} == dict.fromkeys(PARTS, "done")
    result = {name: entry["result"] for name, entry in found["parts"].items()}
    joint = result["joint step, eager, batch 3"]
    assert joint["finite"] and joint["ms"]["median"] > 0
    assert joint["images/s"] == pytest.approx(3 / joint["ms"]["median"] * 1e3, rel=0.02)
    phases = joint["phases ms"]
    assert set(phases) == {"data", "encoders", "tokenizer", "discriminator", "denoiser", "optimizer", "step"}
    compared = [name for name in PARTS if "beside the plain step" in name]
    assert len(compared) == 4 and all(result[name]["ratio"]["median"] > 0 for name in compared)
    assert 0 < result["TFLOP per image"]["second stage"] < result["TFLOP per image"]["joint step"]
    kernels = result["kernels, compiled, batch 3"]["top, per step"]
    assert len(kernels) == 12 and kernels[0]["ms"] >= kernels[-1]["ms"] > 0
    assert (tmp_path / "out" / "kernels_compiled.txt").exists()
    assert result["sampling, eager, batch 6"]["steps"] == 2
    floor = result["floor, batch 3"]
    assert floor["ms"] == pytest.approx(sum(floor["by kind"].values()), abs=0.3)
    assert set(floor["by kind"]) == {"products", *(f"{kind}, {way}" for kind in ("convolutions", "attention")
                                                   for way in ("forward", "backward"))}  # fmt: skip
    assert "[" in capsys.readouterr().out


def test_eager_parts_do_not_run_compiled_code(tmp_path, toml):
    calls = []

    def backend(graph, inputs):
        def counted(*arguments):
            calls.append(1)
            return graph(*arguments)

        return counted

    bench = Bench(configs.load(toml, ["--training.threads=1"]), torch.device("cpu"), 1, 1, tmp_path, backend)
    try:
        bench.using(False, lambda: bench.work.runner(2)())
        assert not calls
        bench.using(True, lambda: bench.work.runner(2)())
        assert calls
    finally:
        torch._dynamo.reset()


def test_the_floor_counts_and_times_every_operation():
    convolution = torch.nn.Conv2d(3, 4, 3)

    def step():
        maps = convolution(torch.zeros(2, 3, 8, 8))
        q = maps.flatten(2).mT[:, None].contiguous()  # (2, 1, 36, 4)
        loss = torch.nn.functional.scaled_dot_product_attention(q, q, q).square().sum()
        (torch.zeros(2, 3) @ torch.zeros(3, 4)).sum().add(loss).backward()

    with floor.Operations() as operations:
        step()
        step()
    expected = {"products", "convolutions, forward", "convolutions, backward", floor.FORWARD, floor.BACKWARD}
    assert {kind: count for (kind, *_), count in operations.seen.items()} == dict.fromkeys(expected, 2)
    found = floor.measure(operations.seen, torch.device("cpu"), lambda run, count: run() is None or 1.0)
    assert found["ms"] == 10.0 and found["by kind"] == dict.fromkeys(expected, 2.0)


def test_the_plain_step_leaves_no_memory(tmp_path, toml):
    """Otherwise its weights would count as memory of every later part."""
    config = configs.load(toml, ["--training.threads=1"])
    bench = Bench(config, torch.device("cpu"), 1, 1, tmp_path, "eager")
    build, built = bench.plain, []

    def plain(*arguments):
        work = build(*arguments)
        built.append(weakref.ref(work.plain.model))
        return work

    bench.plain = plain
    try:
        bench.using(False, bench.beside_plain, 2)
        bench.clear()
        assert built[0]() is None
    finally:
        torch._dynamo.reset()


def test_a_broken_build_does_not_end_the_run(tmp_path, toml):
    """Parts that need the model fail, each with the reason."""
    out, options = tmp_path / "out", ["--only", "ceilings", "build", "sampling", "--tiny"]
    assert gpu.main(["--out", str(out), "--config", toml, *options, "--training.resolution=30"]) == 0
    parts = read(out / "gpu.json")["parts"]
    assert {name: entry["status"] for name, entry in parts.items()} == {
        "machine": "done", "ceilings": "done", "build": "failed", "sampling, eager, batch 6": "failed",
    }  # fmt: skip
    assert "training.resolution = 30" in parts["build"]["error"]


def test_bad_arguments_are_named(tmp_path, toml, capsys):
    assert gpu.main(["--out", str(tmp_path), "--config", toml, "--denoiser.deth=2"]) == 2
    assert "denoiser.deth" in capsys.readouterr().err
    assert gpu.main(["--out", str(tmp_path), "--config", toml, "--batches", "0", "1", "2"]) == 2
    assert "--batches" in capsys.readouterr().err


# -- the script --------------------------------------------------------------------------------------------------------


def test_script_keeps_the_file_whole_when_time_is_short(tmp_path):
    environment = os.environ | {"PYTHON": sys.executable, "SKIP_TESTS": "1", "OMP_NUM_THREADS": "1"}
    command = ["bash", str(ROOT / "benchmarks/gpu.sh"), str(tmp_path / "out"), "15", "--tiny"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)
    # A machine that takes longer than this to import PyTorch is interrupted.
    assert done.returncode in (0, 124, 130), done.stdout + done.stderr
    statuses = {entry["status"] for entry in read(tmp_path / "out" / "gpu.json")["parts"].values()}
    assert statuses <= {"done", "left out", "out of time", "interrupted"} and statuses != {"done"}
    log = (tmp_path / "out" / "log.txt").read_text()
    assert "torchvision" in log and "gpu.py ended with" in log
