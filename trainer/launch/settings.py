"""Arguments and environment variables of run_train.sh, and what follows from them for the processes it starts."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import time
from collections.abc import Mapping, MutableMapping, Sequence
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
STATUS_FILE = "TITANREPA_STATUS_FILE"  # names a file to which a complete run writes a status other than 0

# Statuses of a trainer that has explained its end: 2 for an error of the user, 128 + n for signal n.
EXPLAINED = (2, *(128 + number for number in SIGNALS))

# A signal makes torchrun kill its workers, and Slurm sends one to every process of a job. This one ignores all but
# SIGQUIT and SIGUSR2. Handlers that do nothing, unlike ignored signals, are not inherited by the workers. It does not
# report an explained end, and ends with the status of the process that ended first.
TORCHRUN = f"""
import logging, signal, sys
for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1"):
    signal.signal(getattr(signal, name), lambda *_: None)
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import main
explained = {set(EXPLAINED)}
hidden = ["closing signal", *(f"(exitcode: {{status}})" for status in explained)]
def show(record):
    return not any(text in record.getMessage() for text in hidden)
for name in ("torch.distributed.elastic.multiprocessing.api", "torch.distributed.elastic.agent.server.api"):
    logging.getLogger(name).addFilter(show)
try:
    main()
except SignalException:
    sys.exit(1)
except ChildFailedError as error:
    first = error.get_first_failure()[1].exitcode
    others = {{failure.exitcode for failure in error.failures.values()}} - {{-signal.SIGTERM}}  # ended by torchrun
    if first not in explained or not others <= explained:
        raise
    sys.exit(first)
"""


class UsageError(Exception):
    """An argument or a variable has a wrong value."""


class Settings(NamedTuple):
    """The environment variables of run_train.sh, validated."""

    min_nodes: int
    max_nodes: int
    processes: int | None  # on this machine; None: one per GPU
    master: str  # HOST:PORT
    node_rank: int | None
    local_addr: str
    rdzv_id: str
    rdzv_conf: str  # PET_RDZV_CONF, appended to ours
    max_restarts: int
    stop_file: str  # empty: none
    log_rank: str

    @classmethod
    def read(cls, env: Mapping[str, str]) -> Settings:
        """Raises UsageError. An empty variable counts as unset."""

        def given(*names: str, default: str = "") -> str:
            return next((env[name] for name in names if env.get(name)), default)

        nodes = given("NNODES", "PET_NNODES", default="1")
        fewest, colon, most = nodes.partition(":")
        endpoint = given("PET_RDZV_ENDPOINT", default=":29500").rsplit(":", 1)
        address = given("MASTER_ADDR", default=endpoint[0])
        node_rank = given("NODE_RANK", "PET_NODE_RANK")
        processes = given("NGPU", "PET_NPROC_PER_NODE")
        stop_file = given("STOP_FILE")

        min_nodes = whole_number("NNODES", fewest, 1)
        max_nodes = whole_number("NNODES", most if colon else fewest, min_nodes)
        port = whole_number("MASTER_PORT", given("MASTER_PORT", default=endpoint[-1]), 1)
        max_restarts = whole_number("MAX_RESTARTS", given("MAX_RESTARTS", "PET_MAX_RESTARTS", default="0"), 0)
        rank = whole_number("NODE_RANK", node_rank, 0) if node_rank else None
        if rank is not None and rank >= max_nodes:
            raise UsageError(f"NODE_RANK is {rank}, but of NNODES={max_nodes} machines the last is {max_nodes - 1}")
        if max_nodes > 1 and not address:
            raise UsageError(f"NNODES={max_nodes} needs MASTER_ADDR, the name or address of machine 0")
        if processes in ("auto", "gpu"):
            processes = ""
        count = whole_number("NGPU", processes, 1) if processes else None
        if stop_file and not Path(stop_file).parent.is_dir():
            raise UsageError(f"STOP_FILE={stop_file} is in a folder that does not exist")
        return cls(
            min_nodes=min_nodes,
            max_nodes=max_nodes,
            processes=count,
            master=f"{address}:{port}",
            node_rank=rank,
            local_addr=given("LOCAL_ADDR"),
            rdzv_id=given("RDZV_ID", "PET_RDZV_ID", "SLURM_JOB_ID", default="titanrepa"),
            rdzv_conf=given("PET_RDZV_CONF"),
            max_restarts=max_restarts,
            stop_file=stop_file,
            log_rank=given("LOG_RANK", default="0"),
        )


def whole_number(name: str, value: str, minimum: int) -> int:
    if not re.fullmatch("[0-9]{1,6}", value) or int(value) < minimum:
        raise UsageError(f"{name} must be a whole number from {minimum} on, not '{value}'")
    return int(value)


def check_config(path: str) -> None:
    """Raises UsageError unless the first argument is an existing file."""
    if path.startswith("-"):
        raise UsageError(f"the first argument is the config file, not '{path}' (--help explains)")
    if not os.path.isfile(path):
        shipped = "".join(f"\n  {file}" for file in sorted(ROOT.glob("train_configs/*.toml")))
        here = os.environ.get("PWD") or os.getcwd()
        raise UsageError(f"there is no config file '{path}' (looked from {here}). Shipped ones:{shipped}")


def count_gpus(python: str, env: Mapping[str, str]) -> int:
    """GPUs that processes of this environment see; 0 if there are none or they cannot be counted."""
    count = sum(line.startswith("GPU ") for line in output("nvidia-smi", "-L", stderr=subprocess.DEVNULL).splitlines())
    hidden = {"CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES"} & set(env)
    # torch knows best what the variables hide, but takes seconds to ask.
    if (count and hidden) or (not count and os.path.exists("/dev/kfd")):
        told = output(python, "-c", "import torch; print(torch.cuda.device_count())").strip()
        count = int(told) if told.isdecimal() else 0
    return count


def change_environment(env: MutableMapping[str, str]) -> None:
    """Sets what every run needs."""
    # A scheduler's, about machines or all processes; torchrun tells each of its processes their own.
    for name in ("PET_NODE_RANK", "WORLD_SIZE", "RANK", "LOCAL_RANK"):
        env.pop(name, None)
    # Fewer failures for want of memory at the same peak use.
    if not env.get("PYTORCH_ALLOC_CONF") and not env.get("PYTORCH_CUDA_ALLOC_CONF"):
        env["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"
    # OpenMP's threads spin while they wait for each other: for whole time slices, if another process has the core of
    # one of them. Steps on a CPU were seven times as slow as with threads that sleep.
    spare = (os.cpu_count() or 1) - available_cores()
    if not env.get("OMP_WAIT_POLICY") and not env.get("GOMP_SPINCOUNT") and competitors() > spare:
        env["OMP_WAIT_POLICY"] = "passive"


def competitors(samples: int = 5) -> int:
    """Threads of other processes that want a core of this machine, at any time in 40 ms; 0 where Linux does not say."""
    found = []
    for wait in (0.0, *[0.01] * (samples - 1)):
        time.sleep(wait)
        try:  # "0.20 0.18 0.12 RUNNABLE/ALL LAST_PID"; this process is one of them
            found.append(int(Path("/proc/loadavg").read_text().split()[3].split("/")[0]) - 1)
        except (OSError, ValueError, IndexError):
            return 0
    return min(found)


def change_torchrun_environment(env: MutableMapping[str, str], processes: int) -> None:
    """Sets what runs under torchrun need besides."""
    # A store for each start. In torchrun's own, restarted workers find the addresses of the dead; and machines, which
    # count a restart differently (a failure where it happened, a new member elsewhere), do not find each other.
    env["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
    if not env.get("OMP_NUM_THREADS"):
        env["OMP_NUM_THREADS"] = str(max(1, available_cores() // processes))


def available_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def torchrun_command(python: str, settings: Settings, processes: int, logs: str, arguments: Sequence[str]) -> list[str]:
    if settings.max_nodes == 1:
        rendezvous = ["--rdzv-endpoint", "localhost:0", "--local-addr", "localhost"]
    else:
        # Machine 0 may take minutes to come up; the others would give up after one.
        conf = "read_timeout=600"
        if settings.rdzv_conf:
            conf += f",{settings.rdzv_conf}"
        if settings.node_rank is not None:
            conf += f",is_host={int(settings.node_rank == 0)}"
        rendezvous = ["--rdzv-endpoint", settings.master, "--rdzv-id", settings.rdzv_id, "--rdzv-conf", conf]
        if settings.local_addr:
            rendezvous += ["--local-addr", settings.local_addr]
    return [
        *(python, "-c", TORCHRUN, "--nnodes", f"{settings.min_nodes}:{settings.max_nodes}"),
        *("--nproc-per-node", str(processes), "--max-restarts", str(settings.max_restarts)),
        *("--rdzv-backend", "c10d", *rendezvous, "--signals-to-handle", "SIGQUIT,SIGUSR2", "--log-dir", logs),
        *("--local-ranks-filter", settings.log_rank, "--role", "rank", "--tee", "3"),
        *("-m", "trainer", "train", *arguments),
    ]


def output(*command: str, stderr: int | None = None) -> str:
    """Standard output of a command; empty if it does not exist."""
    try:
        return subprocess.run(command, stdout=subprocess.PIPE, stderr=stderr, text=True, errors="replace").stdout
    except OSError:
        return ""
