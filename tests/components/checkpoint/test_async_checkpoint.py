"""A background checkpoint contains the state at the moment of saving, and has every guarantee of a synchronous one."""

import contextlib
import os
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from components.checkpoint import (
    CheckpointError,
    CheckpointManager,
    load_module_state,
    module_state,
    optimizer_state,
)
from components.checkpoint import manager as checkpoint
from components.checkpoint.folder import MARGIN_BYTES
from components.checkpoint.tensors import OVERHEAD_BYTES, Writer, call_dcp, disk_bytes, share, stage
from components.distributed.ranks import Ranks
from tests.support import ROOT
from tests.support.checkpoints import assert_holds, full_disk, state_at, steps
from tests.support.ranks import run_ranks

torch.set_num_threads(1)


def pending(manager: CheckpointManager) -> bool:
    return manager._pending is not None


def done(manager: CheckpointManager) -> bool:
    return manager._pending is None or manager._pending.done()


class Gate:
    """Blocks all tensor writes until opened."""

    def __init__(self) -> None:
        self.reached, self._open = threading.Event(), threading.Event()
        original = Writer.write_data

        def held(writer, plan, planner):
            self.reached.set()
            assert self._open.wait(60)
            return original(writer, plan, planner)

        self.write_data = held

    def open(self) -> None:
        self._open.set()

    def open_after(self, seconds: float) -> None:
        threading.Timer(seconds, self.open).start()


@pytest.fixture
def gate(monkeypatch):
    gate = Gate()
    monkeypatch.setattr(Writer, "write_data", gate.write_data)
    yield gate
    gate.open()


# -- state at the moment of saving ----------------------------------------------------------------------------------


def tensors_of_every_kind() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    dense = torch.randn(16, 8, generator=generator)
    return {
        "dense": dense,
        "alias": dense.view(8, 16),
        "same": dense,
        "part": dense[2:4],
        "transposed": torch.randn(6, 3, generator=generator).t(),
        "strided": torch.arange(100)[10:20:3],
        "expanded": torch.randn(1, 4, generator=generator).expand(3, 4),
        "scalar": torch.tensor(7),
        "empty": torch.empty(0, 4),
        "bf16": torch.randn(33, generator=generator).bfloat16(),
        "parameter": nn.Parameter(torch.randn(5, generator=generator)),
    }


def test_the_state_may_change_at_once(tmp_path, gate):
    tensors = tensors_of_every_kind()
    before = {name: t.detach().clone() for name, t in tensors.items()}
    state = {"t": tensors, "list": [tensors["dense"]], "progress": {"seen": [1, 2]}}
    manager = CheckpointManager(tmp_path)
    manager.save_async(5, state)
    assert gate.reached.wait(60)
    with torch.no_grad():
        for name, t in tensors.items():
            (t[:, :1] if name == "expanded" else t).fill_(99)
    state["progress"]["seen"].append(3)
    state["list"].clear()
    gate.open()
    path = manager.wait()
    assert path == tmp_path / "step_00000005"
    template = {name: torch.zeros_like(t) for name, t in before.items()}
    loaded = manager.load(path, {"t": template, "list": [torch.zeros(16, 8)], "progress": {}})
    for name, expected in before.items():
        assert torch.equal(template[name], expected), name
    assert torch.equal(loaded["list"][0], before["dense"])
    assert loaded["progress"] == {"seen": [1, 2]}


def test_the_copies_need_no_further_copy_when_they_are_written():
    copies = stage(tensors_of_every_kind())
    assert list(copies) == list(tensors_of_every_kind())
    pointers = set()
    for name, copy in copies.items():
        assert copy.untyped_storage().nbytes() == copy.nbytes, name
        assert not copy.requires_grad and not copy.is_shared(), name
        pointers.add(copy.data_ptr())
    assert len(pointers) == len(copies)  # the address of "empty" is 0


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_the_state_on_a_gpu_may_change_at_once(tmp_path, gate):
    a = torch.randn(2048, 2048, device="cuda")
    b = torch.randn(64, 32, device="cuda").t()
    before = a.cpu(), b.cpu()
    manager = CheckpointManager(tmp_path)
    manager.save_async(1, {"a": a, "b": b, "cpu": torch.ones(3)})
    a.fill_(0), b.fill_(0)
    gate.open()
    manager.wait()
    state = manager.load(1, {"a": a, "b": b, "cpu": torch.zeros(3)})
    assert torch.equal(state["a"].cpu(), before[0]) and torch.equal(state["b"].cpu(), before[1])
    assert not any(copy.is_pinned() for copy in stage({"a": a, "b": b}).values())  # else they stay allocated


# -- when it becomes complete ---------------------------------------------------------------------------------------


def test_it_counts_when_it_is_complete_and_not_before(tmp_path, gate):
    manager = CheckpointManager(tmp_path)
    assert manager.wait() is None
    assert done(manager) and not pending(manager)
    manager.save_async(1, state_at(1))
    assert gate.reached.wait(60)
    assert pending(manager) and not done(manager)
    assert steps(tmp_path) == ["step_00000001.partial"]
    assert CheckpointManager(tmp_path).latest() is None
    gate.open()
    assert manager.wait() == tmp_path / "step_00000001"
    assert done(manager) and not pending(manager)
    assert manager.wait() is None
    assert_holds(CheckpointManager(tmp_path), tmp_path / "step_00000001", 1)


@pytest.mark.parametrize("call", ["save", "save_async", "load", "latest"])
def test_every_other_call_waits_for_it(tmp_path, gate, call):
    manager = CheckpointManager(tmp_path)
    manager.save_async(1, state_at(1))
    assert gate.reached.wait(60)
    gate.open_after(0.2)
    if call == "load":
        assert_holds(manager, tmp_path / "step_00000001", 1)
    elif call == "latest":
        assert manager.latest() == tmp_path / "step_00000001"
    else:
        getattr(manager, call)(2, state_at(2))
        assert "step_00000001" in steps(tmp_path)
        manager.wait()
        assert steps(tmp_path) == ["step_00000001", "step_00000002"]


def test_the_old_ones_go_as_after_a_save(tmp_path):
    manager = CheckpointManager(tmp_path, keep=2, keep_every=3)
    for step in range(1, 8):
        manager.save_async(step, state_at(step))
    manager.wait()
    assert steps(tmp_path) == [f"step_{s:08d}" for s in (3, 6, 7)]
    manager.save_async(7, state_at(70))
    assert_holds(manager, manager.wait(), 70)


# -- failures -------------------------------------------------------------------------------------------------------


def fail(manager: CheckpointManager) -> None:
    """Start a save of step 2 on a full disk."""
    with full_disk():
        manager.save_async(2, {"w": torch.ones(50_000)})
        while not done(manager):
            time.sleep(0.001)


@pytest.mark.parametrize("call", ["wait", "save", "save_async"])
def test_a_failure_is_told_once_and_loses_nothing(tmp_path, call):
    manager = CheckpointManager(tmp_path)
    manager.save(1, state_at(1))
    fail(manager)
    assert steps(tmp_path) == ["step_00000001"]
    assert manager.latest() == tmp_path / "step_00000001"
    assert_holds(manager, tmp_path / "step_00000001", 1)
    words = r"step 2 could not be written to .*: File too large.*earlier checkpoints are intact"
    with pytest.raises(CheckpointError, match=words):
        getattr(manager, call)(*(() if call == "wait" else (3, state_at(3))))
    assert steps(tmp_path) == ["step_00000001"]
    assert manager.wait() is None
    manager.save_async(4, state_at(4))
    assert_holds(manager, manager.wait(), 4)


@pytest.mark.parametrize("where", ["write", "checksum", "sync_folder"])
def test_a_disk_that_fills_at_the_end_leaves_no_partial_either(tmp_path, monkeypatch, where):
    manager = CheckpointManager(tmp_path)
    manager.save(1, state_at(1))

    def full(*args, **kwargs):
        if where == "checksum":
            return "No space left on device"
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint.manifest, where, full)
    manager.save_async(2, state_at(2))
    with pytest.raises(CheckpointError, match="No space left on device"):
        manager.wait()
    assert steps(tmp_path) == ["step_00000001"]


def test_what_cannot_begin_is_told_at_once(tmp_path, monkeypatch):
    manager = CheckpointManager(tmp_path / "run")
    with pytest.raises(TypeError, match=r"'odd' of the state"):
        manager.save_async(1, {"odd": object()})
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 10, 0))
    with pytest.raises(CheckpointError, match="GiB are free"):
        manager.save_async(1, state_at(1))
    assert manager.wait() is None
    assert steps(tmp_path) == []


# -- exits (kills: test_checkpoint_kills.py) ------------------------------------------------------------------------


EXIT = """
import sys, time
from pathlib import Path
import torch
from components.checkpoint import CheckpointManager
from components.checkpoint.tensors import Writer

write_data = Writer.write_data
def slow(*args):
    time.sleep(0.5)
    return write_data(*args)
Writer.write_data = slow
CheckpointManager(Path(sys.argv[1])).save_async(3, {"w": torch.full((64, 8), 3.0), "step": 3})
raise RuntimeError("the training failed")
"""


def test_an_interpreter_that_exits_finishes_it(tmp_path):
    command = [sys.executable, "-c", EXIT, str(tmp_path)]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert ended.returncode == 1
    assert ended.stderr.strip().endswith("RuntimeError: the training failed")
    assert steps(tmp_path) == ["step_00000003"]
    state = CheckpointManager(tmp_path).load(3, {"w": torch.zeros(64, 8), "step": None})
    assert state["step"] == 3 and (state["w"] == 3).all()


# -- several ranks --------------------------------------------------------------------------------------------------


class Net(nn.Module):
    """Odd sizes: on four ranks the shards differ, and some are empty."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.body = nn.Sequential(nn.Linear(8, 9), nn.BatchNorm1d(9), nn.Linear(9, 3))

    def forward(self, x):
        return self.body(x)


def sharded(seed: int, *mesh_shape: int) -> tuple[nn.Module, torch.optim.Optimizer]:
    net = Net(seed)
    names = ("replicate", "shard")[-len(mesh_shape) :]
    mesh = init_device_mesh("cpu", mesh_shape, mesh_dim_names=names)
    fully_shard(net.body[0], mesh=mesh)
    fully_shard(net, mesh=mesh)
    return net, torch.optim.AdamW(net.parameters(), lr=1e-2)


def train(net: nn.Module, optimizer: torch.optim.Optimizer, seed: int) -> None:
    net(torch.randn(16, 8, generator=torch.Generator().manual_seed(seed))).square().sum().backward()
    optimizer.step()
    optimizer.zero_grad()


def whole(state: dict) -> dict[str, torch.Tensor]:
    return {n: (t.full_tensor() if isinstance(t, DTensor) else t).clone() for n, t in state.items()}


def _save_and_train_on(rank: int, world: int, folder: Path) -> dict:
    """Each rank writes at its own pace, so background and training collectives interleave in no fixed order."""
    write_data = Writer.write_data

    def slow(*args):
        time.sleep(0.05 * rank)
        return write_data(*args)

    Writer.write_data = slow
    expected = {}
    for name, shape in (("fsdp", (4,)), ("hsdp", (2, 2))):
        net, optimizer = sharded(0, *shape)
        train(net, optimizer, 0)
        manager = CheckpointManager(folder / name)
        for step in (1, 2):
            state = {"net": module_state(net), "opt": optimizer_state(net, optimizer), "seen": rank}
            expected[name] = whole(state["net"])
            manager.save_async(step, state)
            assert pending(manager)
            turns, waiting = 0, torch.tensor(1)
            while turns < 3 or waiting:
                train(net, optimizer, 10 * step + turns)
                turns += 1
                waiting = torch.tensor(0 if done(manager) else 1)
                dist.all_reduce(waiting)
            assert manager.wait() == folder / name / f"step_{step:08d}"
        assert not torch.equal(whole(module_state(net))["body.0.weight"], expected[name]["body.0.weight"])
    return expected


def _load(rank: int, world: int, folder: Path) -> dict:
    loaded = {}
    for name in ("fsdp", "hsdp"):
        net, optimizer = sharded(1, world)
        template = {"net": module_state(net), "opt": optimizer_state(net, optimizer), "seen": -1}
        manager = CheckpointManager(folder / name)
        state = manager.load(manager.latest(), template)
        assert state["seen"] == 0
        load_module_state(net, state["net"])
        loaded[name] = whole(module_state(net))
    return loaded


@pytest.mark.long
def test_four_ranks_save_while_they_train_and_any_number_loads(tmp_path):
    expected, *_ = run_ranks(_save_and_train_on, 4, tmp_path)
    for loaded in run_ranks(_load, 2, tmp_path):
        for name, tensors in expected.items():
            for key, value in tensors.items():
                assert torch.equal(loaded[name][key], value), (name, key)
    for name, tensors in expected.items():
        net = Net(2)
        CheckpointManager(tmp_path / name).load(2, {"net": module_state(net)})
        for key, value in tensors.items():
            assert torch.equal(net.state_dict()[key], value), (name, key)


def _count(rank: int, world: int, folder: Path) -> list[tuple[int, int]]:
    counts = []
    replicated = {f"layer{i}": torch.randn(100, 10) for i in range(8)}
    fsdp, hsdp = (module_state(sharded(0, *shape)[0]) for shape in ((4,), (2, 2)))
    for index, state in enumerate((replicated, fsdp, hsdp, {**replicated, "fsdp": fsdp, "hsdp": hsdp})):
        flat = checkpoint.state_tree.encode(state)[1]
        mine = share(flat, Ranks(None))
        full = sum(t.numel() * t.element_size() for t in flat.values())
        CheckpointManager(folder / str(index)).save(1, state)
        counts.append((disk_bytes(mine) - OVERHEAD_BYTES * len(mine), full))
    return counts


@pytest.mark.long
def test_the_ranks_share_the_bytes_so_that_each_is_counted_once(tmp_path):
    by_rank = run_ranks(_count, 4, tmp_path)
    for index, counts in enumerate(zip(*by_rank)):
        ours, fulls = zip(*counts)
        assert sum(ours) == fulls[0]
        assert max(ours) < 0.6 * fulls[0]
        written = sum(f.stat().st_size for f in (tmp_path / str(index) / "step_00000001").iterdir())
        assert written > fulls[0]
    assert [ours for (ours, _), *_ in by_rank] == [8000] * 4  # two of eight replicated tensors each


def _meet_failures(rank: int, world: int, folder: Path) -> None:
    manager = CheckpointManager(folder)
    manager.save_async(1, state_at(1))
    assert manager.wait() == folder / "step_00000001"

    with full_disk() if rank == 1 else contextlib.nullcontext():
        manager.save_async(2, {"a": torch.ones(50_000), "b": torch.ones(50_000)})
        with pytest.raises(CheckpointError, match="File too large"):
            manager.wait()
    assert manager.wait() is None

    def no_memory(tensors):
        raise MemoryError("no memory for the copies")

    if rank == 1:
        checkpoint.stage = no_memory
    with pytest.raises(CheckpointError, match="no memory for the copies"):
        manager.save_async(3, state_at(3))
    checkpoint.stage = stage
    assert not pending(manager)

    # Only rank 0 checks the space, for all ranks together, with replicas counted once.
    size = 2 * (4 * 50_000 + OVERHEAD_BYTES) + MARGIN_BYTES
    for free, fits in ((size - 1, False), (size, True)):
        shutil.disk_usage = lambda path, free=free: shutil._ntuple_diskusage(0, 0, free)
        with contextlib.nullcontext() if fits else pytest.raises(CheckpointError, match="are free"):
            manager.save_async(4, {"a": torch.ones(50_000), "b": torch.ones(50_000)})
    assert manager.latest() == folder / "step_00000004"
    manager.save_async(5, state_at(5))
    # The process group is destroyed first: the save is lost, but nothing hangs and nothing is half saved.


def test_ranks_agree_about_failures(tmp_path):
    folder = tmp_path / "checkpoints"
    run_ranks(_meet_failures, 2, folder)
    assert [name for name in steps(folder) if name != "step_00000005"] == ["step_00000001", "step_00000004"]


def test_a_destroyed_group_is_an_error_and_not_a_wait():
    """Another thread may destroy it, as at the end of a failed run; DCP would then save as if this rank were alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    ranks = Ranks(dist.new_group(backend="gloo"))
    dist.destroy_process_group()

    def never(*arguments, **options):
        pytest.fail("called without its group")

    for call in (ranks.check, lambda: call_dcp(never, {}, ranks)):
        with pytest.raises(RuntimeError, match="process group was destroyed"):
            call()


def _lose_a_rank(rank: int, world: int, folder: Path) -> None:
    manager = CheckpointManager(folder)
    manager.save(1, state_at(1))
    if rank == 1:
        Writer.write_data = lambda *args: os._exit(0)
    manager.save_async(2, state_at(2))
    with pytest.raises(CheckpointError, match="step 2 could not be written"):
        manager.wait()
    (folder / "told").touch()
    os._exit(0)


def test_a_rank_that_dies_leaves_the_others_neither_hanging_nor_half_saved(tmp_path):
    with pytest.raises(FileNotFoundError):  # the missing return value of rank 0
        run_ranks(_lose_a_rank, 2, tmp_path)
    assert steps(tmp_path) == ["step_00000001", "told"]
