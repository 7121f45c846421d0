"""Runs a function on several gloo ranks on this machine."""

from __future__ import annotations

import multiprocessing
import tempfile
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

# The fork server imports these once and then forks ranks in milliseconds. torch._dynamo, which the first functional
# collective or the first torch.compile would import, takes seconds.
PRELOAD = [
    "torch",
    "torch.distributed",
    "torch._dynamo",
    "trainer.run.loop",
    "torch.utils.tensorboard",
    "torchvision.utils",
]


def run_ranks(
    fn: Callable[..., Any], world: int, *args: Any, timeout_s: float = 120.0, backend: str = "gloo"
) -> list[Any]:
    """Call ``fn(rank, world, *args)`` on every rank of a process group, with one thread each.

    Args:
        fn: a module-level function (it is pickled by name).
        world: number of ranks.
        args: picklable arguments.
        timeout_s: seconds after which the ranks are killed.
        backend: of the process group.

    Returns:
        The return value of each rank, in rank order; anything that ``torch.save`` accepts.

    Raises:
        torch.multiprocessing.ProcessRaisedException: a rank raised; contains its traceback.
        TimeoutError: the ranks did not finish in time.
    """
    multiprocessing.set_forkserver_preload(PRELOAD)
    with tempfile.TemporaryDirectory() as folder:
        context = torch.multiprocessing.start_processes(
            _rank, args=(fn, world, folder, args, backend), nprocs=world, join=False, start_method="forkserver"
        )
        deadline = time.monotonic() + timeout_s
        while not context.join(timeout=max(0.0, deadline - time.monotonic())):
            if time.monotonic() >= deadline:
                for process in context.processes:
                    process.kill()
                raise TimeoutError(f"{fn.__qualname__} on {world} ranks: not done after {timeout_s} s")
        return [torch.load(Path(folder, f"{rank}.pt"), weights_only=False) for rank in range(world)]


def _rank(rank: int, fn: Callable[..., Any], world: int, folder: str, args: tuple[Any, ...], backend: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        backend, init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world, timeout=timedelta(seconds=60)
    )
    try:
        torch.save(fn(rank, world, *args), Path(folder, f"{rank}.pt"))
        dist.barrier()
    finally:
        dist.destroy_process_group()
