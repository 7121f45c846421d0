"""A checkpoint is complete or absent, comes back bit for bit, and a bad one never hides the good one before it."""

import contextlib
import json
import logging
import multiprocessing
import os
import random
import resource
import shutil
import signal
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from components import checkpoint, manifest
from components.checkpoint import (
    CheckpointError,
    CheckpointManager,
    load_module_state,
    load_optimizer_state,
    module_state,
    optimizer_state,
)
from components.checkpoint_folder import MARGIN_BYTES
from tests.ranks import PRELOAD, run_ranks

torch.set_num_threads(1)


def state_at(step: int) -> dict:
    """A state whose every value tells the step."""
    return {"model": {"w": torch.full((64, 8), float(step)), "n": torch.tensor(step)}, "step": step}


def blank() -> dict:
    return {"model": {"w": torch.zeros(64, 8), "n": torch.tensor(0)}, "step": None}


def assert_holds(manager: CheckpointManager, path: Path, step: int) -> None:
    state = manager.load(path, blank())
    assert state["step"] == step
    assert state["model"]["n"].item() == step
    assert (state["model"]["w"] == step).all()


def steps(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    a_bits, b_bits = (t.contiguous().reshape(-1).view(torch.uint8) for t in (a, b))
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a_bits, b_bits)


class Net(nn.Module):
    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.body = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Linear(8, 4))
        self.unused = nn.Parameter(torch.randn(3))

    def forward(self, x):
        return self.body(x)


def train(net: nn.Module, optimizer: torch.optim.Optimizer, first: int, last: int) -> None:
    for step in range(first, last):
        generator = torch.Generator().manual_seed(step)
        net(torch.randn(16, 8, generator=generator)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()


# -- what comes back ------------------------------------------------------------------------------------------------


def test_tensors_of_every_kind_come_back_bit_for_bit_and_in_place(tmp_path):
    generator = torch.Generator().manual_seed(0)
    tensors = {
        "bf16": torch.randn(33, 7, generator=generator).bfloat16(),
        "half": torch.tensor([float("nan"), -0.0, float("inf")], dtype=torch.float16),
        "double": torch.randn(5, generator=generator, dtype=torch.float64),
        "int64": torch.tensor([2**62 + 1, -(2**63)]),
        "scalar": torch.tensor(2**53 + 1),
        "bytes": torch.get_rng_state(),
        "bool": torch.tensor([True, False]),
        "empty": torch.empty(0, 4),
        "transposed": torch.randn(6, 3, generator=generator).t(),
        "view": torch.arange(100)[10:20:3],
    }
    CheckpointManager(tmp_path).save(1, {"a": tensors, "list": [tensors["double"], {"x": (tensors["int64"], 7)}]})
    template = {name: torch.zeros(t.shape, dtype=t.dtype) for name, t in tensors.items()}
    lists = [torch.zeros(5, dtype=torch.float64), {"x": (torch.zeros(2, dtype=torch.int64), 0)}]
    state = CheckpointManager(tmp_path).load(1, {"a": template, "list": lists})
    for name, tensor in tensors.items():
        assert state["a"][name] is template[name]
        assert same_bits(template[name], tensor), name
    assert torch.equal(state["list"][0], tensors["double"])
    assert torch.equal(state["list"][1]["x"][0], tensors["int64"]) and state["list"][1]["x"][1] == 7
    assert type(state["list"][1]["x"]) is tuple


def test_plain_values_come_back_exactly(tmp_path):
    values = {
        "step": 10**30,
        "lr": 0.1 + 0.2,
        "infinite": [float("inf"), -0.0],
        "betas": (0.9, (0.999,)),
        "flag": True,
        "none": None,
        "config": 'name = "ä\n\ud800"',
        "by_number": {1: "a", (2, 3): {"$tuple": []}},
        "empty": {},
    }
    CheckpointManager(tmp_path).save(1, {"plain": values, "count": 3, "new": {"seen": 1}})
    template = {"plain": dict.fromkeys(values), "count": 0, "new": {}}
    state = CheckpointManager(tmp_path).load(1, template)
    assert repr(state["plain"]) == repr(values)
    assert state["count"] == 3 and state["new"] == {"seen": 1}
    assert template["count"] == 0


@pytest.mark.parametrize("value", [Path("x"), torch.float32, object(), b"bytes", torch.Size([1])])
def test_a_value_that_would_come_back_as_another_type_is_refused_by_name(tmp_path, value):
    with pytest.raises(TypeError, match=r"'loader.odd' of the state"):
        CheckpointManager(tmp_path).save(1, {"loader": {"odd": value}})
    assert steps(tmp_path) == []


def test_two_tensors_of_one_path_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"both called 'a\.b'"):
        CheckpointManager(tmp_path).save(1, {"a.b": torch.ones(1), "a": {"b": torch.zeros(1)}})


def test_objects_with_state_dicts_are_saved_and_filled(tmp_path):
    class Counter:
        def __init__(self, n):
            self.n = n

        def state_dict(self):
            return {"n": self.n, "t": torch.tensor(self.n)}

        def load_state_dict(self, state):
            self.n = state["n"] + int(state["t"])

    CheckpointManager(tmp_path).save(1, {"counter": Counter(4)})
    counter = Counter(0)
    CheckpointManager(tmp_path).load(1, {"counter": counter})
    assert counter.n == 8


@pytest.mark.parametrize(
    "make",
    [
        lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.1),
        lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9),
        lambda p: torch.optim.SGD(p, lr=1e-2),
    ],
    ids=["adamw", "momentum", "sgd"],
)
def test_training_goes_on_bit_for_bit(tmp_path, make):
    net, manager = Net(0), CheckpointManager(tmp_path)
    optimizer = make(net.parameters())
    train(net, optimizer, 0, 5)
    manager.save(5, {"net": module_state(net), "opt": optimizer_state(net, optimizer)})
    train(net, optimizer, 5, 10)

    other = Net(1)
    other_optimizer = make(other.parameters())
    state = CheckpointManager(tmp_path).load(
        5, {"net": module_state(other), "opt": optimizer_state(other, other_optimizer)}
    )
    load_module_state(other, state["net"])
    load_optimizer_state(other, other_optimizer, state["opt"])
    train(other, other_optimizer, 5, 10)
    for name, value in net.state_dict().items():
        assert same_bits(value, other.state_dict()[name]), name


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_training_on_a_gpu_goes_on_bit_for_bit(tmp_path):
    def train_on_gpu(net, optimizer, first, last):
        for step in range(first, last):
            net(torch.randn(16, 8, generator=torch.Generator().manual_seed(step)).cuda()).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()

    net, other = Net(0).cuda(), Net(1).cuda()
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2, fused=True)
    other_optimizer = torch.optim.AdamW(other.parameters(), lr=1e-2, fused=True)
    train_on_gpu(net, optimizer, 0, 5)
    CheckpointManager(tmp_path).save(5, {"net": module_state(net), "opt": optimizer_state(net, optimizer)})
    train_on_gpu(net, optimizer, 5, 10)
    template = {"net": module_state(other), "opt": optimizer_state(other, other_optimizer)}
    state = CheckpointManager(tmp_path).load(5, template)
    load_module_state(other, state["net"])
    load_optimizer_state(other, other_optimizer, state["opt"])
    train_on_gpu(other, other_optimizer, 5, 10)
    for name, value in net.state_dict().items():
        assert same_bits(value, other.state_dict()[name]), name


def test_the_options_of_the_optimizer_come_back(tmp_path):
    net = Net(0)
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.1, betas=(0.8, 0.9))
    optimizer.param_groups[0]["lr"] = 0.03125
    CheckpointManager(tmp_path).save(1, {"opt": optimizer_state(net, optimizer)})
    fresh = torch.optim.AdamW(net.parameters(), lr=0.5)
    state = CheckpointManager(tmp_path).load(1, {"opt": optimizer_state(net, fresh)})
    load_optimizer_state(net, fresh, state["opt"])
    assert fresh.param_groups[0]["lr"] == 0.03125
    assert fresh.param_groups[0]["betas"] == (0.8, 0.9) and type(fresh.param_groups[0]["betas"]) is tuple


def test_asking_for_the_optimizer_state_changes_nothing():
    asked, unasked = Net(0), Net(0)
    asked_optimizer = torch.optim.AdamW(asked.parameters(), lr=1e-2)
    unasked_optimizer = torch.optim.AdamW(unasked.parameters(), lr=1e-2)
    for first in (0, 1, 2):
        asked.unused.grad = torch.ones(3) if first != 1 else None
        unasked.unused.grad = torch.ones(3) if first != 1 else None
        optimizer_state(asked, asked_optimizer)
        train(asked, asked_optimizer, first, first + 1)
        train(unasked, unasked_optimizer, first, first + 1)
    assert all(same_bits(a, b) for a, b in zip(asked.state_dict().values(), unasked.state_dict().values()))


# -- what does not fit ----------------------------------------------------------------------------------------------


def test_a_mismatch_names_the_keys_and_leaves_the_template_alone(tmp_path):
    CheckpointManager(tmp_path).save(
        1, {"model": {f"w{i:02}": torch.ones(2) for i in range(20)} | {"b": torch.ones(3)}}
    )
    template = {
        "model": {f"v{i:02}": torch.zeros(2) for i in range(12)}
        | {"w00": torch.zeros(2, 2), "b": torch.zeros(3).half()},
        "ema": {"w": torch.zeros(1)},
    }
    with pytest.raises(CheckpointError) as caught:
        CheckpointManager(tmp_path).load(1, template)
    text = str(caught.value)
    assert "step_00000001 does not fit" in text
    assert "13 missing in the checkpoint: model.v00, model.v01" in text
    assert "model.v07, ..." in text and "model.v08" not in text
    assert "19 in the checkpoint but not here: model.w01" in text
    assert "model.w00: checkpoint float32 (2,), here float32 (2, 2)" in text
    assert "model.b: checkpoint float32 (3,), here float16 (3,)" in text
    assert "configuration that wrote it" in text
    assert not template["model"]["v00"].any()


def test_parts_that_are_not_asked_for_are_not_read(tmp_path):
    CheckpointManager(tmp_path).save(
        1, {"model": {"w": torch.ones(2)}, "ema": {"w": torch.full((2,), 3.0)}, "config": "x"}
    )
    state = CheckpointManager(tmp_path).load(1, {"ema": {"w": torch.zeros(2)}, "config": ""})
    assert state["config"] == "x" and (state["ema"]["w"] == 3).all()
    with pytest.raises(CheckpointError, match="missing in the checkpoint: discriminator"):
        CheckpointManager(tmp_path).load(1, {"discriminator": {}})
    with pytest.raises(CheckpointError, match="of another kind: model"):
        CheckpointManager(tmp_path).load(1, {"model": 3})
    with pytest.raises(CheckpointError, match="a plain value in the checkpoint, a tensor here: config"):
        CheckpointManager(tmp_path).load(1, {"config": torch.zeros(1)})


def test_a_checkpoint_that_is_not_there_is_an_error_that_lists_the_others(tmp_path):
    manager = CheckpointManager(tmp_path)
    manager.save(3, state_at(3))
    with pytest.raises(CheckpointError, match=r"step_00000004 cannot be used: it does not exist .*step_00000003"):
        manager.load(4, blank())


def test_what_dcp_cannot_read_names_the_versions(tmp_path):
    path = CheckpointManager(tmp_path).save(1, state_at(1))
    (path / ".metadata").write_bytes(b"of another torch")
    files = manifest.read(path)["files"]
    files[".metadata"] = manifest.checksum(path / ".metadata", sync=False)
    manifest.write(path, 1, files)
    with pytest.raises(CheckpointError, match=rf"written by torch .*cannot be read by torch {torch.__version__[:4]}"):
        CheckpointManager(tmp_path).load(1, blank())


# -- damage ---------------------------------------------------------------------------------------------------------

FILES = [".metadata", "__0_0.distcp", "meta.json", "manifest.json"]


def two_checkpoints(folder: Path) -> Path:
    manager = CheckpointManager(folder)
    manager.save(1, state_at(1))
    return manager.save(2, state_at(2))


def assert_falls_back(folder: Path, caplog, *words: str) -> None:
    caplog.clear()
    manager = CheckpointManager(folder)
    with caplog.at_level(logging.WARNING):
        path = manager.latest()
    assert path == folder / "step_00000001"
    assert_holds(manager, path, 1)
    (warning,) = (r.getMessage() for r in caplog.records if r.name == "components.checkpoint")
    for word in ("step_00000002", *words):
        assert word in warning


def test_there_are_no_other_files(tmp_path):
    assert steps(two_checkpoints(tmp_path)) == sorted(FILES)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("how", ["emptied", "halved", "longer", "gone", "a folder"])
def test_a_file_of_another_length_is_noticed(tmp_path, caplog, name, how):
    file = two_checkpoints(tmp_path) / name
    size = file.stat().st_size
    if how in ("gone", "a folder"):
        file.unlink()
        if how == "a folder":
            file.mkdir()
    else:
        os.truncate(file, {"emptied": 0, "halved": size // 2, "longer": size + 1}[how])
    assert_falls_back(tmp_path, caplog, name)


@pytest.mark.parametrize("name", FILES)
def test_a_flipped_byte_is_noticed(tmp_path, caplog, name):
    file = two_checkpoints(tmp_path) / name
    whole = file.read_bytes()
    for at in random.Random(0).sample(range(len(whole)), 5):
        file.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        assert_falls_back(tmp_path, caplog, name, "damaged")


def test_a_damaged_checkpoint_asked_for_by_name_is_an_error(tmp_path):
    path = two_checkpoints(tmp_path)
    os.truncate(path / "__0_0.distcp", 10)
    with pytest.raises(CheckpointError, match=r"__0_0\.distcp is damaged: 10 bytes, expected"):
        CheckpointManager(tmp_path).load(2, blank())


def test_a_file_that_cannot_be_read_is_not_a_sound_checkpoint(tmp_path, caplog, monkeypatch):
    two_checkpoints(tmp_path)
    original = open

    def refuse(file, *args, **kwargs):
        if str(file).endswith("step_00000002/__0_0.distcp"):
            raise PermissionError(13, "Permission denied", str(file))
        return original(file, *args, **kwargs)

    monkeypatch.setattr(manifest, "open", refuse, raising=False)
    assert_falls_back(tmp_path, caplog, "__0_0.distcp", "Permission denied")


def test_an_unknown_format_is_skipped(tmp_path, caplog):
    path = two_checkpoints(tmp_path)
    fields = json.loads((path / "manifest.json").read_text())
    del fields["crc32"]
    fields["format"] = 99
    (path / "manifest.json").write_text(json.dumps(fields | {"crc32": manifest._fields_crc32(fields)}))
    assert_falls_back(tmp_path, caplog, "format 99")


def test_strangers_in_the_folder_are_no_checkpoints(tmp_path, caplog):
    assert CheckpointManager(tmp_path / "absent").latest() is None
    assert CheckpointManager(tmp_path).latest() is None
    CheckpointManager(tmp_path).save(1, state_at(1))
    (tmp_path / "step_x").write_text("a stray file")
    (tmp_path / "step_00000009").write_text("a file, not a folder")
    (tmp_path / "step_00000008").mkdir()
    (tmp_path / "step_12").mkdir()
    shutil.copytree(tmp_path / "step_00000001", tmp_path / "step_00000007.partial")
    assert list(CheckpointManager(tmp_path).candidates()) == [tmp_path / "step_00000001"]
    assert "step_00000009 is skipped: it is not a folder" in caplog.text
    assert "step_00000008 is skipped: manifest.json" in caplog.text
    assert "step_x" not in caplog.text
    manager = CheckpointManager(tmp_path)
    assert_holds(manager, manager.save(9, state_at(9)), 9)  # the stray file gives way
    assert steps(tmp_path) == ["step_00000001", "step_00000008", "step_00000009", "step_12", "step_x"]


# -- retention ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("keep", [1, 3, 0])
def test_exactly_the_newest_are_kept(tmp_path, keep):
    manager = CheckpointManager(tmp_path, keep=keep)
    for step in range(1, 6):
        manager.save(step, state_at(step))
        kept = range(1 if keep == 0 else max(1, step - keep + 1), step + 1)
        assert steps(tmp_path) == [f"step_{s:08d}" for s in kept]
    assert [p.name for p in manager.candidates()] == steps(tmp_path)[::-1]


@pytest.mark.parametrize("keep_every, kept", [(3, [3, 6, 7, 8]), (4, [4, 7, 8]), (1, [1, 2, 3, 4, 5, 6, 7, 8])])
def test_multiples_are_kept_for_ever_besides_the_newest(tmp_path, keep_every, kept):
    manager = CheckpointManager(tmp_path, keep=2, keep_every=keep_every)
    for step in range(1, 9):
        manager.save(step, state_at(step))
    assert steps(tmp_path) == [f"step_{s:08d}" for s in kept]
    with pytest.raises(ValueError, match="keep_every must be 0"):
        CheckpointManager(tmp_path, keep_every=-1)


def test_what_was_just_saved_stays_and_the_damaged_do_not_count(tmp_path):
    manager = CheckpointManager(tmp_path, keep=2)
    for step in (1, 8, 9):
        manager.save(step, state_at(step))
    os.truncate(tmp_path / "step_00000009" / "meta.json", 1)
    manager.save(2, state_at(2))
    assert steps(tmp_path) == ["step_00000002", "step_00000008", "step_00000009"]


def test_saving_a_step_again_replaces_it(tmp_path):
    manager = CheckpointManager(tmp_path)
    manager.save(1, state_at(1))
    path = manager.save(1, state_at(7))
    assert steps(tmp_path) == ["step_00000001"]
    assert_holds(CheckpointManager(tmp_path), path, 7)


# -- kills ----------------------------------------------------------------------------------------------------------


def _context():
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    return context


def _die_at_event(folder: Path, fatal: int) -> None:
    """Replaces step 2, then saves step 3 in the background, which retires step 1; dies before the given operation."""
    count = 0

    def audit(event, arguments):
        nonlocal count
        writes = event == "open" and arguments[1] is not None and not arguments[1].startswith("r")
        changes = event in ("os.rename", "os.remove", "os.rmdir", "os.mkdir")
        in_removed_folder = event in ("os.remove", "os.rmdir") and arguments[1] >= 0  # rmtree: names in an open folder
        if in_removed_folder or ((writes or changes) and str(folder) in str(arguments[0])):
            count += 1
            if count == fatal:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(audit)
    manager = CheckpointManager(folder, keep=2)
    manager.save(2, state_at(2))
    manager.save_async(3, state_at(3))
    manager.wait()


def _die_at_every_event(folder: Path) -> None:
    torch.set_num_threads(1)
    start = folder / "start"
    two_checkpoints(start)
    fatal, newest, exit_code = 0, 2, None
    while exit_code != 0:
        fatal += 1
        run = folder / str(fatal)
        shutil.copytree(start, run)
        child = os.fork()
        if child == 0:
            _die_at_event(run, fatal)
            os._exit(0)
        exit_code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        assert exit_code in (0, -signal.SIGKILL)
        manager = CheckpointManager(run, keep=2)
        found = list(manager.candidates())
        assert len(found) >= 2
        for path in found:
            assert_holds(manager, path, int(path.name[5:13]))
        assert int(found[0].name[5:13]) in (newest, newest + 1)
        newest = int(found[0].name[5:13])
        manager.save(4, state_at(4))
        assert steps(run) == [f"step_{newest:08d}", "step_00000004"]
        assert_holds(CheckpointManager(run), manager.latest(), 4)
        shutil.rmtree(run)
    assert newest == 3
    assert fatal > 20  # the hook sees the operations


def test_a_kill_before_any_file_operation_loses_nothing(tmp_path):
    """Every moment at which a save can be killed, one after the other."""
    child = _context().Process(
        target=_die_at_every_event, args=(tmp_path,)
    )  # forks, which pytest's process had better not
    child.start()
    child.join()
    assert child.exitcode == 0


def _save_for_ever(folder: Path) -> None:
    torch.set_num_threads(1)
    manager, step = CheckpointManager(folder, keep=2), 0
    latest = manager.latest()
    if latest is not None:
        step = manager.load(latest, {"step": 0})["step"]
    while True:
        step += 1
        manager.save(step, state_at(step))


def test_a_run_that_is_killed_again_and_again_moves_on(tmp_path):
    context, rng, reached = _context(), random.Random(0), 0
    for _ in range(5):
        child = context.Process(target=_save_for_ever, args=(tmp_path,))
        child.start()
        until = time.monotonic() + 60
        while not (tmp_path / f"step_{reached + 2:08d}").exists() and time.monotonic() < until:
            time.sleep(0.001)
        time.sleep(rng.random() * 0.03)
        child.kill()
        child.join()
        manager = CheckpointManager(tmp_path, keep=2)
        path = manager.latest()
        step = int(path.name[5:])
        assert step > reached
        assert_holds(manager, path, step)
        reached = step


# -- a save that fails ----------------------------------------------------------------------------------------------


def test_no_permission_names_the_folder_and_the_reason(tmp_path):
    inside = tmp_path / "file"
    inside.write_text("")
    with pytest.raises(CheckpointError, match=r"step 1 could not be written to .*file: (File exists|Not a directory)"):
        CheckpointManager(inside).save(1, state_at(1))
    shut = tmp_path / "shut"
    CheckpointManager(shut).save(1, state_at(1))
    shut.chmod(0o500)
    root = os.geteuid() == 0
    try:
        if root:  # root is never refused
            os.chmod(tmp_path, 0o711)
            os.seteuid(65534)
        with pytest.raises(CheckpointError, match=r"could not be written to .*: Permission denied"):
            CheckpointManager(shut).save(2, state_at(2))
    finally:
        if root:
            os.seteuid(0)
        shut.chmod(0o700)
    assert steps(shut) == ["step_00000001"]


@contextlib.contextmanager
def full_disk():
    """A limit on the size of files stands in for the full disk: writing fails in the middle just so."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_removes_the_partial_and_names_the_reason(tmp_path):
    CheckpointManager(tmp_path).save(1, state_at(1))
    with full_disk(), pytest.raises(CheckpointError, match=r"to .*: File too large.*earlier checkpoints") as caught:
        CheckpointManager(tmp_path).save(2, {"w": torch.ones(50_000)})
    assert str(tmp_path) in str(caught.value)
    assert steps(tmp_path) == ["step_00000001"]
    manager = CheckpointManager(tmp_path)
    assert_holds(manager, manager.latest(), 1)


def test_a_checkpoint_without_room_is_not_begun(tmp_path, monkeypatch):
    folder, asked, free = tmp_path / "a" / "b", [], 3 << 30

    def disk_usage(path):
        asked.append(Path(path))
        return shutil._ntuple_diskusage(100 << 30, 90 << 30, free)

    monkeypatch.setattr(shutil, "disk_usage", disk_usage)
    monkeypatch.setattr(checkpoint, "disk_bytes", lambda tensors: 5 << 30)
    with pytest.raises(CheckpointError, match=r"it needs 5\.06 GiB, of which 3\.00 GiB are free\. .*Make room"):
        CheckpointManager(folder).save(1, state_at(1))
    assert asked == [tmp_path] and steps(tmp_path) == []
    free = 6 << 30
    CheckpointManager(folder).save(1, state_at(1))
    free = 3 << 30
    with pytest.raises(CheckpointError, match=r"GiB are free"):
        CheckpointManager(folder).save(2, state_at(2))
    assert asked[-1] == folder and steps(folder) == ["step_00000001"]


def test_the_room_asked_for_is_enough_and_counts_what_killed_runs_left(tmp_path, monkeypatch):
    state = {"module": {f"blocks.{i}.attention.projection.weight.exp_avg_sq": torch.ones(50) for i in range(300)}}
    need = checkpoint.disk_bytes(state["module"])
    left = tmp_path / "step_00000001.partial"
    left.mkdir()

    def disk_usage(path):
        assert not left.exists()
        return shutil._ntuple_diskusage(0, 0, need + MARGIN_BYTES)

    monkeypatch.setattr(shutil, "disk_usage", disk_usage)
    path = CheckpointManager(tmp_path).save(2, state)
    assert 0.3 * need < sum(file.stat().st_size for file in path.iterdir()) <= need


@pytest.mark.parametrize("where", ["write", "checksum", "sync_folder"])
def test_a_disk_that_fills_at_the_end_leaves_no_partial_either(tmp_path, monkeypatch, where):
    CheckpointManager(tmp_path).save(1, state_at(1))

    def full(*args, **kwargs):
        if where == "checksum":
            return "No space left on device"
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(manifest, where, full)
    with pytest.raises(CheckpointError, match="No space left on device"):
        CheckpointManager(tmp_path).save(2, state_at(2))
    monkeypatch.undo()
    assert steps(tmp_path) == ["step_00000001"]


def test_ctrl_c_during_a_save_is_still_ctrl_c(tmp_path, monkeypatch):
    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint.Writer, "write_data", interrupt)
    with pytest.raises(KeyboardInterrupt):
        CheckpointManager(tmp_path).save(1, state_at(1))
    assert steps(tmp_path) == []


# -- several ranks --------------------------------------------------------------------------------------------------


def _sharded() -> tuple[nn.Module, torch.optim.Optimizer]:
    net = Net(0)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    fully_shard(net.body[0], mesh=mesh)
    fully_shard(net, mesh=mesh)
    return net, torch.optim.AdamW(net.parameters(), lr=1e-2)


def _train_sharded_and_save(rank: int, world: int, folder: Path) -> None:
    net, optimizer = _sharded()
    train(net, optimizer, 0, 3)
    state = {"net": module_state(net), "opt": optimizer_state(net, optimizer), "seen": 48 + rank}
    assert CheckpointManager(folder).save(3, state) == folder / "step_00000003"
    train(net, optimizer, 3, 6)
    CheckpointManager(folder).save(6, {"net": module_state(net), "opt": optimizer_state(net, optimizer), "seen": 96})


def _load_sharded_and_compare(rank: int, world: int, folder: Path) -> None:
    net, optimizer = _sharded()
    manager = CheckpointManager(folder)
    state = manager.load(3, {"net": module_state(net), "opt": optimizer_state(net, optimizer), "seen": 0})
    load_module_state(net, state["net"])
    load_optimizer_state(net, optimizer, state["opt"])
    assert state["seen"] == 48
    train(net, optimizer, 3, 6)
    path = manager.latest()
    assert path == folder / "step_00000006"
    later = Net(1)
    later = manager.load(path, {"net": module_state(later)})["net"]
    for name, value in module_state(net).items():
        value = value.full_tensor() if isinstance(value, DTensor) else value
        assert torch.allclose(value, later[name], rtol=0, atol=1e-6), name


def test_two_sharded_ranks_save_and_any_number_loads(tmp_path):
    folder = tmp_path / "checkpoints"
    run_ranks(_train_sharded_and_save, 2, folder)
    assert steps(folder) == ["step_00000003", "step_00000006"]
    assert {"__0_0.distcp", "__1_0.distcp"} <= set(steps(folder / "step_00000003"))
    run_ranks(_load_sharded_and_compare, 2, folder)

    net = Net(1)
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2)
    state = CheckpointManager(folder).load(
        3, {"net": module_state(net), "opt": optimizer_state(net, optimizer), "seen": 0}
    )
    assert state["seen"] == 48  # rank 0's
    load_module_state(net, state["net"])
    load_optimizer_state(net, optimizer, state["opt"])
    train(net, optimizer, 3, 6)
    later = Net(2)
    CheckpointManager(folder).load(6, {"net": module_state(later)})
    for name, value in later.state_dict().items():
        assert torch.allclose(value, net.state_dict()[name], rtol=0, atol=1e-6), name


def _meet_damage(rank: int, world: int, folder: Path) -> None:
    manager = CheckpointManager(folder)
    path = manager.latest()
    assert path == folder / "step_00000001"
    assert_holds(manager, path, 1)
    with pytest.raises(CheckpointError, match="step_00000002 cannot be used"):
        manager.load(2, blank())
    with pytest.raises(CheckpointError, match="does not fit"):
        manager.load(1, {"model": {"w": torch.zeros(1)}})
    with pytest.raises(CheckpointError, match="could not be written"):
        CheckpointManager(folder / "step_00000001" / "meta.json").save(1, state_at(1))
    with full_disk() if rank == 1 else contextlib.nullcontext(), pytest.raises(CheckpointError, match="File too large"):
        manager.save(3, {"a": torch.ones(50_000), "b": torch.ones(50_000)})


def test_ranks_agree_about_damage_and_failures(tmp_path):
    folder = tmp_path / "checkpoints"
    os.truncate(two_checkpoints(folder) / "__0_0.distcp", 10)
    run_ranks(_meet_damage, 2, folder)
    assert steps(folder) == ["step_00000001", "step_00000002"]
