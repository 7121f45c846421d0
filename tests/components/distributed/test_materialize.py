"""From the meta device to weights: none is skipped, none is held whole, and numbers are the same on any ranks."""

from __future__ import annotations

import weakref

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from components.contracts import LatentShape
from components.distributed.materialize import InitError, materialize
from components.distributed.parallel import ParallelError, Sharding, World, make_mesh, mesh_shape, shard, sharded_parts
from plugins.denoisers.sit import SiT
from tests.support.ranks import run_ranks

pytestmark = pytest.mark.long

CPU = torch.device("cpu")


def sit() -> SiT:
    return SiT(LatentShape(4, 8, 8), 10, width=64, depth=12, heads=2, align_depth=2)


class Peak(TorchDispatchMode):
    """Tracks the peak bytes of live tensors created by the operations inside."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0
        self.seen = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in out if isinstance(out, (list, tuple)) else [out]:
            t = t.to_local() if hasattr(t, "to_local") else t
            if isinstance(t, torch.Tensor) and not t.is_meta and t.untyped_storage()._cdata not in self.seen:
                storage = t.untyped_storage()
                self.seen.add(storage._cdata)
                self.now += storage.nbytes()
                self.most = max(self.most, self.now)
                weakref.finalize(storage, self.forget, storage._cdata, storage.nbytes())
        return out

    def forget(self, key: int, nbytes: int) -> None:
        self.seen.discard(key)
        self.now -= nbytes


def shard_and_fill(rank: int, world: int, shape: tuple[int, int]) -> tuple[dict[str, torch.Tensor], int, int]:
    with torch.device("meta"):
        module = sit()
    whole = sum(p.numel() * p.element_size() for p in module.parameters())
    shard(module, Sharding(make_mesh("cpu", shape)))
    torch.manual_seed(3)
    with Peak() as peak:
        materialize(module, CPU)
    state = {name: p.full_tensor().detach().clone() for name, p in module.named_parameters()}
    return state | {name: b.clone() for name, b in module.named_buffers()}, whole, peak.most


@pytest.mark.parametrize("shape", [(1, 4), (2, 2), (4, 1)])
def test_initial_weights_are_those_of_one_process_bit_for_bit(shape):
    torch.manual_seed(3)
    with torch.device("meta"):
        alone = sit()
    torch.manual_seed(3)
    materialize(alone, CPU)
    expected = dict(alone.state_dict())
    assert any(value.std() > 0 for value in expected.values())
    for found, whole, peak in run_ranks(shard_and_fill, 4, shape):
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], value) for name, value in expected.items())
        if shape == (1, 4):
            assert peak < whole / 2, f"{peak} bytes at once, of a module of {whole}"


def test_random_numbers_for_another_device_are_drawn_on_the_cpu():
    """The same mode serves GPUs; here a subclass stands in for one."""
    from components.distributed.materialize import WholeTensorRandom, fill

    target = torch.empty(3, 5)
    torch.manual_seed(0)
    expected = torch.empty(3, 5).normal_()
    torch.manual_seed(0)
    with WholeTensorRandom():
        nn.init.normal_(target)
    assert torch.equal(target, expected)
    fill(target, torch.zeros(3, 5))
    assert not target.any()


class Forgetful(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 2)
        self.register_buffer("scale", torch.ones(2))

    def init_weights(self) -> None:
        self.layer.reset_parameters()


def test_what_init_weights_forgets_is_named():
    with torch.device("meta"):
        module = Forgetful()
    with pytest.raises(InitError, match=r"Forgetful.init_weights\(\) leaves uninitialized: scale; it must fill"):
        materialize(module, CPU)


def test_meshes():
    assert mesh_shape("fsdp", 8, 4) == (1, 8) and mesh_shape("ddp", 8, 4) == (8, 1)
    assert mesh_shape("hsdp", 8, 4) == (2, 4) and mesh_shape("none", 1, 1) == (1, 1)
    with pytest.raises(ParallelError, match=r"parallel.shard = 3 does not divide 8 ranks; allowed: 1, 2, 4, 8"):
        mesh_shape("hsdp", 8, 3)
    with pytest.raises(ParallelError, match=r"parallel.strategy = 'none' needs a single process, but there are 8"):
        mesh_shape("none", 8, 1)


def homes(rank: int, world: int, strategy: str, folder: str) -> dict[str, tuple[bool, bool]]:
    """Return for each averaged module whether it and its source are wrapped by FSDP2; only then are both on the CPU."""
    from components.registry import discover
    from tests.support import toys
    from trainer.config import loads
    from trainer.run.assemble import build

    discover("plugins")
    config = loads(toys.TOML, folder, ["--parallel.cpu_offload", f"--parallel.strategy={strategy}", "--ema.tokenizer"])
    parts = build(config, World(rank, world, CPU, world))
    named = parts.modules.named()

    def wrapped(module: nn.Module) -> bool:
        return any(True for _ in sharded_parts(module))

    return {name: (wrapped(copy), wrapped(named[name])) for name, copy in parts.averages.items()}


@pytest.mark.parametrize(("world", "strategy"), [(1, "fsdp"), (2, "ddp"), (2, "fsdp")])
def test_offloaded_averages_live_where_their_sources_do(world, strategy, tmp_path):
    """Otherwise an average on the GPU would be combined with a source on the host."""
    for found in run_ranks(homes, world, strategy, str(tmp_path)):
        assert {"denoiser", "tokenizer", "heads"} <= set(found)
        assert all(copy == source for copy, source in found.values()), found
        assert found["denoiser"] == (True, True)
