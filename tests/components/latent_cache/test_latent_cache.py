"""The latent cache on disk: random access from any process; damage is reported, never read."""

import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.utils.data import DataLoader

from components.data.loader import DataError, collate
from components.diffusion.random_numbers import generator
from components.files.fingerprint import fingerprint
from components.latent_cache import cache as latent_cache
from components.latent_cache.cache import DTYPES, INDEX, LatentCache, ShardWriter, shard_name, write_json
from components.latent_cache.dataset import CachedDataset

torch.set_num_threads(1)
COUNT, SHARD, LATENT, TOKENS = 11, 4, (2, 3, 3), (5, 7)


def rows(name: str, dtype: torch.dtype) -> torch.Tensor:
    shape = TOKENS if name.startswith("features") else LATENT
    return torch.randn(COUNT, *shape, generator=generator(name)).abs().to(dtype)


@pytest.fixture(params=["fp32", "fp16", "bf16"])
def made(request, tmp_path):
    """A complete cache of eleven images in three shards, and its tensors."""
    dtype = DTYPES[request.param]
    names = [f"{name}{suffix}" for name in ("mean", "std") for suffix in ("", "_flipped")]
    tensors = {name: rows(name, dtype) for name in [*names, "features.vit", "features_flipped.vit"]}
    tensors["labels"] = torch.arange(COUNT) % 10
    shards = []
    for number, first in enumerate(range(0, COUNT, SHARD)):
        part = {name: tensor[first : first + SHARD] for name, tensor in tensors.items()}
        with ShardWriter(tmp_path / shard_name(number), {k: (v.dtype, v.shape) for k, v in part.items()}) as writer:
            for name, tensor in part.items():  # in two pieces, the second first
                writer.write(name, 1, tensor[1:])
                writer.write(name, 0, tensor[:1])
            shards.append({"file": shard_name(number), **writer.commit()})
        assert load_file(tmp_path / shard_name(number)).keys() == part.keys()
    index = {
        "format": 1, "count": COUNT, "shard_size": SHARD, "latent": LATENT, "dtype": request.param, "flipped": True,
        "num_classes": 10, "class_names": list("abcdefghij"), "unreadable": [[2, "b.png"]], "shards": shards,
        "statistics": {"mean": [0.1, 0.2], "std": [1.0, 2.0]}, "features": {"vit": {}},
    }  # fmt: skip
    write_json(tmp_path / INDEX, index)
    return tmp_path, tensors


def assert_reads(cache: LatentCache, tensors: dict[str, torch.Tensor]) -> None:
    for i in [10, 0, 4, 3, 7, 10]:
        for flipped, suffix in ((False, ""), (True, "_flipped")):
            cached, label = cache.read(i, flipped, ["vit"])
            assert label == i % 10
            found = (cached.mean, cached.std, cached.features["vit"])
            for value, name in zip(found, (f"mean{suffix}", f"std{suffix}", f"features{suffix}.vit")):
                assert value.dtype == tensors[name].dtype and torch.equal(value, tensors[name][i])


def test_any_image_by_its_index(made, monkeypatch):
    path, tensors = made
    cache = LatentCache(path)
    assert_reads(cache, tensors)
    assert len(cache) == COUNT and cache.replaced == {2} and cache.statistics[1].tolist() == [1.0, 2.0]
    monkeypatch.setattr(LatentCache, "open_shards", 1)
    cache = LatentCache(path)
    assert_reads(cache, tensors)
    assert len(cache._open) == 1
    for outside in (-1, COUNT):
        with pytest.raises(IndexError, match=f"index {outside} is outside its 11"):
            cache.read(outside)


def test_pickled_and_in_forked_workers(made):
    path, tensors = made
    cache = LatentCache(path)
    cache.read(0)
    assert_reads(pickle.loads(pickle.dumps(cache)), tensors)
    assert len(pickle.loads(pickle.dumps(cache))._open) == 0
    dataset = CachedDataset(cache, None, flip=True, features=["vit"])
    loader = DataLoader(dataset, batch_size=3, num_workers=2, collate_fn=collate, multiprocessing_context="fork")
    batches = list(loader)
    assert torch.equal(torch.cat([b.cached.mean for b in batches]), tensors["mean"])
    assert torch.equal(torch.cat([b.cached.features["vit"] for b in batches]), tensors["features.vit"])
    assert batches[0].images is None and torch.equal(torch.cat([b.condition.label for b in batches]), tensors["labels"])


@pytest.mark.parametrize("made", ["fp16"], indirect=True)
@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda p: (p / shard_name(1)).write_bytes((p / shard_name(1)).read_bytes()[:-1]), "latents-00001.*damaged"),
        (lambda p: (p / shard_name(2)).unlink(), "latents-00002.safetensors cannot be read: No such file"),
        (lambda p: (p / INDEX).write_text((p / INDEX).read_text()[:-30]), "index.json is damaged"),
        (lambda p: (p / INDEX).write_text((p / INDEX).read_text().replace("11", "12")), "index.json is damaged: .*CRC"),
        (lambda p: (p / INDEX).unlink(), "is not a latent cache: it has no index.json.*trainer encode"),
        (lambda p: ((p / INDEX).unlink(), (p / "progress").mkdir()), "is incomplete; run the same"),
        (lambda p: write_json(p / INDEX, {"format": 2}), "has format 2; this version reads format 1"),
    ],
)
def test_damage_is_named(made, damage, says):
    damage(made[0])
    with pytest.raises(DataError, match=says):
        LatentCache(made[0])


@pytest.mark.parametrize("made", ["fp16"], indirect=True)
def test_damage_behind_a_running_training_is_named(made):
    path, _ = made
    cache = LatentCache(path)
    (path / shard_name(0)).write_bytes(b"")
    with pytest.raises(DataError, match=r"latents-00000.safetensors is damaged: 0 bytes"):
        cache.read(0)
    size = (path / shard_name(1)).stat().st_size
    (path / shard_name(1)).write_bytes(b"\0" * size)
    with pytest.raises(DataError, match=r"latents-00001.safetensors is damaged"):
        cache.read(5)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_is_named(tmp_path):
    with ShardWriter(tmp_path / "a", {"labels": (torch.int64, (1,))}) as writer:
        writer._file = open("/dev/full", "wb", buffering=0)  # noqa: SIM115, the writer closes it
        with pytest.raises(DataError, match=r"a\.partial cannot be written: No space left on device"):
            writer.write("labels", 0, torch.zeros(1, dtype=torch.int64))
    assert not any(tmp_path.iterdir())


def test_json_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    write_json(tmp_path / "a.json", {"crc32": "of something else", "b": [1.5, None]})
    before = (tmp_path / "a.json").read_bytes()
    assert latent_cache.read_json(tmp_path / "a.json") == {"crc32": "of something else", "b": [1.5, None]}
    monkeypatch.setattr(Path, "write_text", lambda path, _: path.write_bytes(b'{"half') and 1 / 0)
    with pytest.raises(ZeroDivisionError):
        write_json(tmp_path / "a.json", {"b": 2})
    assert (tmp_path / "a.json").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]


def test_a_fingerprint_is_of_the_weights_alone():
    torch.manual_seed(0)
    module = nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3))
    before = fingerprint(module)
    assert fingerprint(module.double().to(memory_format=torch.channels_last)) == before
    module[1].num_batches_tracked += 1
    counted = fingerprint(module)
    with torch.no_grad():
        module[0].bias[1] += 1e-3
    renamed = nn.Sequential(module[0], nn.Identity(), module[1])
    assert len({before, counted, fingerprint(module), fingerprint(renamed)}) == 4
