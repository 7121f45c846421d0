"""Trains on two processes under random faults, and compares every step with an undisturbed run, bit for bit.

    python tests/faults/soak.py --minutes 40 --seed 0

About every 20 seconds one fault: kill -9 of one process or of all, SIGTERM, SIGINT, SIGHUP, a full disk, the newest
checkpoint damaged while the run is down, data that cannot be read. After each, the same command goes on. When the time
is over, an undisturbed run takes as many steps. Some steps are NaN in both runs and skipped. Prints memory and open
files of the processes over time. Linux only.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TOML = """
plugins = ["{plugin}"]

[training]
steps = 1000000
batch_size = 8
resolution = 32
precision = "fp32"
threads = 1

[run]
log_every = 1
checkpoint_every = 15
keep_checkpoints = 3

[recipe]
name = "soak_repae"

[tokenizer]
name = "autoencoder_kl"
channels = 8
multipliers = [1, 2, 2]
norm_groups = 4
res_blocks = 1

[denoiser]
name = "sit"
width = 32
depth = 2
heads = 2
align_depth = 1

[encoders.tiny_vit]

[losses.l1]
[losses.kl]
[losses.patchgan]
channels = 8
layers = 2
[losses.cosine]
head_width = 32

[dataset]
name = "soak_shapes"

[latent_norm]
images = 16

[sampling]
every = 50
images = 10
steps = 2

[loader]
workers = 1
"""
FAULTS = ("kill one", "kill all", "term", "int", "hup", "disk full", "damaged checkpoint", "data gone")


class Run:
    """One run, which the same command starts and goes on with."""

    def __init__(self, folder: Path, delay: float) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self.toml = folder / "soak.toml"
        self.toml.write_text(TOML.format(plugin=Path(__file__).with_name("soak_plugin.py")))
        self.out = folder / "run"
        self.env = os.environ | {
            "NGPU": "2", "OMP_NUM_THREADS": "1", "SOAK_FOLDER": str(folder), "SOAK_DELAY": str(delay),
            "PYTHON": sys.executable, "PYTHONPATH": str(ROOT),
        }  # fmt: skip
        self.process: subprocess.Popen | None = None
        self.starts = 0

    def start(self, *options: str) -> None:
        self.starts += 1
        with open(self.folder / "output.log", "a") as log:
            self.process = subprocess.Popen(
                [ROOT / "run_train.sh", self.toml, f"--run.dir={self.out}", *options],
                env=self.env, cwd=self.folder, stdout=log, stderr=log, start_new_session=True,
            )  # fmt: skip

    def alive(self) -> bool:
        return self.process is not None and self.process.poll() is None

    def stop(self, number: int = signal.SIGKILL) -> None:
        """Send a signal to every process of the run, and wait until all are gone."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, number)
        for pid in self.ranks():
            _signal(pid, number)
        self.wait(120)

    def wait(self, seconds: float) -> None:
        try:
            self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
        for pid in self.ranks():
            _signal(pid, signal.SIGKILL)

    def ranks(self) -> list[int]:
        """Processes that train, without their launcher and their data workers."""
        parents = {}
        for entry in Path("/proc").iterdir():
            ours = entry.name.isdigit() and str(self.out) in _read(entry / "cmdline")
            if ours and "\0RANK=" in _read(entry / "environ"):
                lines = _read(entry / "status").splitlines()
                parents[int(entry.name)] = next((int(x.split()[1]) for x in lines if x.startswith("PPid")), 0)
        return sorted(pid for pid, parent in parents.items() if parent not in parents)

    def step(self) -> int:
        lines = _read(self.out / "metrics.jsonl").splitlines()
        return json.loads(lines[-1])["step"] if lines else 0

    def losses(self) -> dict[int, dict[str, float]]:
        """Losses and gradient norms by step; of a step taken again after a restart, the last."""
        found = {}
        for line in _read(self.out / "metrics.jsonl").splitlines():
            row = json.loads(line)
            found[row["step"]] = {k: v for k, v in row.items() if k.endswith("/loss") or k.startswith("grad_norm/")}
        return found

    def usage(self) -> list[tuple[float, int]]:
        """(MiB of memory, open files) of each process that trains."""
        found = []
        for pid in self.ranks():
            size = [line.split()[1] for line in _read(Path(f"/proc/{pid}/status")).splitlines() if "VmRSS" in line]
            try:
                found.append((int(size[0]) / 1024, len(os.listdir(f"/proc/{pid}/fd"))))
            except (OSError, IndexError):
                continue
        return found


def inject(run: Run, fault: str, rng: random.Random) -> None:
    """Cause one fault, and leave the run down or going on."""
    if fault == "kill one":
        if pids := run.ranks():
            _signal(rng.choice(pids), signal.SIGKILL)
        run.wait(120)
    elif fault in ("kill all", "damaged checkpoint"):
        run.stop()
        if fault == "damaged checkpoint":
            damage(run.out / "checkpoints", rng)
    elif fault in ("term", "int", "hup"):
        _signal(run.process.pid, {"term": signal.SIGTERM, "int": signal.SIGINT, "hup": signal.SIGHUP}[fault])
        run.wait(120)
    else:
        flag = run.folder / ("disk_full" if fault == "disk full" else "data_gone")
        flag.touch()
        time.sleep(rng.uniform(2, 12))
        flag.unlink()


def damage(checkpoints: Path, rng: random.Random) -> None:
    """Flip one byte of the newest checkpoint, if there is an older one."""
    there = sorted(checkpoints.glob("step_*"))
    files = [p for p in there[-1].rglob("*") if p.is_file() and p.stat().st_size] if len(there) > 1 else []
    if files:
        file = rng.choice(files)
        data = bytearray(file.read_bytes())
        data[rng.randrange(len(data))] ^= 0xFF
        file.write_bytes(data)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=40, help="duration of the disturbed run (default: 40)")
    parser.add_argument("--seed", type=int, default=0, help="of the faults (default: 0)")
    parser.add_argument("--every", type=float, default=20, help="mean seconds between faults (default: 20)")
    parser.add_argument("--delay", type=float, default=0.3, help="seconds added to each disturbed step (default: 0.3)")
    parser.add_argument("--out", type=Path, default=Path("outputs/soak"), help="new folder (default: outputs/soak)")
    arguments = parser.parse_args()
    if arguments.out.exists():
        parser.error(f"--out={arguments.out} exists; remove it or name another")
    out, rng = arguments.out.absolute(), random.Random(arguments.seed)

    run, counts, usage = Run(out / "faults", arguments.delay), dict.fromkeys(FAULTS, 0), []
    begin = time.monotonic()
    due = begin + arguments.every
    while (now := time.monotonic()) - begin < arguments.minutes * 60:
        if not run.alive():
            run.start()
        elif now > due and run.ranks():
            fault, at = rng.choice(FAULTS), run.step()
            counts[fault] += 1
            usage.append((now - begin, at, run.usage()))
            inject(run, fault, rng)
            print(f"{now - begin:6.0f} s  step {at:5}  {fault}", flush=True)
            due = time.monotonic() + rng.expovariate(1 / arguments.every)
        time.sleep(0.5)
    if not run.alive():
        run.start()
    steps = run.step() + 20
    while run.alive() and run.step() < steps:  # the last fault leaves no step unfinished
        time.sleep(0.5)
    run.stop(signal.SIGTERM)
    steps = run.step()
    print(f"disturbed: {time.monotonic() - begin:.0f} s, {run.starts} starts, {sum(counts.values())} faults: {counts}")
    for seconds, at, each in usage[:: max(1, len(usage) // 12)]:
        shown = ", ".join(f"{memory:.0f} MiB {files} files" for memory, files in each)
        print(f"{seconds:6.0f} s  step {at:5}  {shown}")

    begin = time.monotonic()
    plain = Run(out / "plain", 0)
    plain.start(f"--training.steps={steps}")
    plain.process.wait()
    took = time.monotonic() - begin
    print(f"undisturbed: {steps} steps in {took:.0f} s, status {plain.process.returncode}", flush=True)
    expected, found = plain.losses(), run.losses()
    differ = [step for step in expected if str(found.get(step)) != str(expected[step])]
    print(f"{len(expected) - len(differ)} of {len(expected)} steps are equal bit for bit")
    if differ:
        print(f"not: {differ[:20]}")
    return int(bool(differ) or len(expected) != steps or len(found) != steps)


def _read(path: Path) -> str:
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""


def _signal(pid: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)


if __name__ == "__main__":
    sys.exit(main())
