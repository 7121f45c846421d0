"""Saved state is restored bit for bit on any number of ranks, or the error names what does not match."""

import contextlib
import os
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
    load_optimizer_state,
    module_state,
    optimizer_state,
)
from components.files import manifest
from tests.support.checkpoints import assert_holds, blank, full_disk, state_at, steps, two_checkpoints
from tests.support.ranks import run_ranks

torch.set_num_threads(1)


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


# -- round trips ----------------------------------------------------------------------------------------------------


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
    with pytest.raises(ValueError, match=r"both named 'a\.b'"):
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


# -- mismatches -----------------------------------------------------------------------------------------------------


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
    assert "step_00000001 does not match" in text
    assert "13 missing in the checkpoint: model.v00, model.v01" in text
    assert "model.v07, ..." in text and "model.v08" not in text
    assert "19 in the checkpoint but not here: model.w01" in text
    assert "model.w00: checkpoint float32 (2,), here float32 (2, 2)" in text
    assert "model.b: checkpoint float32 (3,), here float16 (3,)" in text
    assert "config that wrote it" in text
    assert not template["model"]["v00"].any()


def test_parts_that_are_not_asked_for_are_not_read(tmp_path):
    CheckpointManager(tmp_path).save(
        1, {"model": {"w": torch.ones(2)}, "ema": {"w": torch.full((2,), 3.0)}, "config": "x"}
    )
    state = CheckpointManager(tmp_path).load(1, {"ema": {"w": torch.zeros(2)}, "config": ""})
    assert state["config"] == "x" and (state["ema"]["w"] == 3).all()
    with pytest.raises(CheckpointError, match="missing in the checkpoint: discriminator"):
        CheckpointManager(tmp_path).load(1, {"discriminator": {}})
    with pytest.raises(CheckpointError, match="of a different type: model"):
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


@pytest.mark.long
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
    assert state["seen"] == 48  # rank 0's value
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
    with pytest.raises(CheckpointError, match="does not match"):
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
