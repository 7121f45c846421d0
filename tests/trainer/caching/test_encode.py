"""python -m trainer encode: the cache holds the networks' outputs, survives a kill, and is the same for any ranks."""

import argparse
import os
import shutil
import signal

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from components.data.loader import DataError
from components.distributed.parallel import World
from components.latent_cache.cache import LatentCache
from plugins.encoders.tiny_vit import TinyViT
from plugins.tokenizers.autoencoder_kl import AutoencoderKL
from tests.support import toys
from tests.support.ranks import run_ranks
from trainer.__main__ import main
from trainer.caching import encoding
from trainer.commands import encode

pytestmark = pytest.mark.long

ARGUMENTS = ["--flip", "--features", "--dtype=fp32", "--shard-size=16", "--batch-size=8"]


def make_tokenizer(scale: float = 1.0) -> AutoencoderKL:
    torch.manual_seed(0)
    tokenizer = AutoencoderKL(latent_channels=4, channels=8, multipliers=[1, 2, 2], norm_groups=4, res_blocks=1)
    with torch.no_grad():
        tokenizer.quant_conv.weight.mul_(scale)
    return tokenizer.eval()


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A config, its tokenizer and another one, and a finished cache in `whole`."""
    folder = tmp_path_factory.mktemp("encode")
    for name, scale in (("tuned", 1.0), ("other", 2.0), ("huge", 1e7)):
        save_file(make_tokenizer(scale).state_dict(), folder / f"{name}.safetensors")
    text = toys.TOML.replace("[tokenizer]", f'[tokenizer]\ncheckpoint = "{folder / "tuned.safetensors"}"')
    (folder / "toy.toml").write_text(text)
    assert run(str(folder / "toy.toml"), folder / "whole") == 0
    return folder


@pytest.fixture
def toml(place):
    return str(place / "toy.toml")


def run(toml: str, out, *more: str) -> int:
    return main(["encode", toml, "--out", str(out), *ARGUMENTS, *more])


def files(folder) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def on_ranks(rank: int, world: int, toml: str, out: str, killed: str) -> None:
    """Run the command on a rank; ``killed``: at "writing" of the second shard, at its "record", or at the "index"."""

    def kill(*_) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    if killed == "writing":
        make = encoding.Encoding._make
        encoding.Encoding._make = lambda self, n, batches, progress: make(self, n, batches, kill if n else progress)
    elif killed:
        write = encoding.write_json
        name = {"record": "00001.json", "index": "index.json"}[killed]
        encoding.write_json = lambda path, fields: kill() if path.name == name else write(path, fields)
    parser = argparse.ArgumentParser()
    encode.add_arguments(parser)
    encode.encode(parser.parse_args([toml, "--out", out, *ARGUMENTS]), [], World(rank, world))


def test_a_cache_holds_what_the_networks_say(place):
    out = place / "whole"
    cache, tokenizer, encoder = LatentCache(out), make_tokenizer(), TinyViT(32, 4)
    encoder.load_weights()
    from plugins.datasets.shapes import Shapes

    dataset = Shapes(32, size=40)
    means, stds = [], []
    for i in range(40):
        x = dataset[i].image[None].float() / 127.5 - 1
        for flipped in (False, True):
            cached, label = cache.read(i, flipped, ["tiny_vit"])
            seen = x.flip(-1) if flipped else x
            with torch.no_grad():
                posterior = tokenizer.encode(seen)
            assert label == dataset[i].label
            assert torch.allclose(cached.mean, posterior.mean[0], rtol=1e-5, atol=1e-5)
            assert torch.allclose(cached.std, posterior.std[0], rtol=1e-5, atol=1e-5)
            assert torch.allclose(cached.features["tiny_vit"], encoder(seen)[0], rtol=1e-4, atol=1e-5)
            means.append(posterior.mean[0].double())
            stds.append(posterior.std[0].double())
    mean, std = torch.stack(means), torch.stack(stds)
    total = (std.square().mean((0, 2, 3)) + mean.var((0, 2, 3), unbiased=False)).sqrt()
    found = load_file(out / "latents-stats.safetensors")
    for got, expected in zip((found["mean"], found["std"]), (mean.mean((0, 2, 3)), total)):
        assert torch.allclose(got, expected, rtol=1e-6, atol=1e-9)
    assert all(torch.equal(a, b) for a, b in zip(cache.statistics, (found["mean"], found["std"])))
    assert files(out).keys() == {*(f"latents-0000{n}.safetensors" for n in range(3)), "latents-stats.safetensors",
                                 "index.json"}  # fmt: skip


def test_killed_it_goes_on_and_ranks_change_nothing(place, toml, tmp_path, capsys):
    whole = files(place / "whole")
    run_ranks(on_ranks, 2, toml, str(tmp_path / "ranks"), "")
    assert files(tmp_path / "ranks") == whole
    for killed in ("writing", "record", "index"):
        out = tmp_path / killed
        with pytest.raises(torch.multiprocessing.ProcessExitedException, match="SIGKILL"):
            run_ranks(on_ranks, 1, toml, str(out), killed)
        assert "index.json" not in files_of(out) and "00000.json" in files_of(out / "progress")
        first = (out / "latents-00000.safetensors").stat().st_mtime_ns
        assert run(toml, out, "--dtype=bf16") == 2 and 'dtype: "fp32" -> "bf16"' in capsys.readouterr().err
        assert run(toml, out) == 0
        assert files(out) == whole
        assert (out / "latents-00000.safetensors").stat().st_mtime_ns == first


def files_of(folder) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_a_finished_cache_is_checked_and_mended(place, toml, tmp_path, capsys):
    out, whole = shutil.copytree(place / "whole", tmp_path / "out"), files(place / "whole")
    assert run(toml, out) == 0 and "Already complete, all files verified" in capsys.readouterr().out
    damaged = bytearray(whole["latents-00001.safetensors"])
    damaged[5000] ^= 1
    (out / "latents-00001.safetensors").write_bytes(damaged)
    (out / "latents-00002.safetensors").unlink()
    assert run(toml, out) == 0 and "Done" in capsys.readouterr().out
    assert files(out) == whole


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (["--dtype=bf16"], 'dtype: "fp32" -> "bf16"'),
        (["--shard-size=8"], "shard_size: 16 -> 8"),
        (["--dataset.size=50"], "count: 40 -> 50"),
        (["--tokenizer.checkpoint={folder}/other.safetensors"], "tokenizer.fingerprint"),
    ],
)
def test_a_folder_of_other_settings_is_refused(place, toml, more, says, capsys):
    before = files(place / "whole")
    assert run(toml, place / "whole", *(word.format(folder=place) for word in more)) == 2
    assert says in capsys.readouterr().err and files(place / "whole") == before


def test_other_folders_and_bad_numbers_are_refused(toml, tmp_path, capsys):
    (tmp_path / "notes.txt").touch()
    assert run(toml, tmp_path) == 2 and "holds other files" in capsys.readouterr().err
    assert run(toml, tmp_path / "out", "--batch-size=0") == 2
    assert "--batch-size=0: expected at least 1" in capsys.readouterr().err


def test_what_does_not_fit_fp16_is_refused(place, toml, tmp_path, capsys):
    huge = f"--tokenizer.checkpoint={place / 'huge.safetensors'}"
    assert run(toml, tmp_path / "out", "--dtype=fp16", huge) == 2
    assert "images 0 to 7: 'mean' does not fit fp16; encode with --dtype bf16" in capsys.readouterr().err
    assert not any(path.suffix == ".partial" for path in (tmp_path / "out").iterdir())


def test_unreadable_images_are_replaced_and_recorded(place, tmp_path, capsys, caplog):
    for label in ("a", "b"):
        (tmp_path / "data" / label).mkdir(parents=True)
        for i in range(2):
            Image.new("RGB", (32, 32), (200 * i, 90, 7)).save(tmp_path / "data" / label / f"{i}.png")
    broken = tmp_path / "data" / "a" / "1.png"
    broken.write_bytes(b"no image")
    text = (place / "toy.toml").read_text().split("[dataset]")[0]
    (tmp_path / "toy.toml").write_text(f'{text}[dataset]\nname = "image_folder"\npath = "{tmp_path / "data"}"\n')
    assert run(str(tmp_path / "toy.toml"), tmp_path / "out", "--loader.workers=0") == 0
    assert "1 were unreadable" in capsys.readouterr().out and str(broken) in caplog.text
    cache = LatentCache(tmp_path / "out")
    assert cache.index["unreadable"] == [[1, str(broken)]] and cache.read(1)[1] == cache.read(2)[1] == 1
    assert torch.equal(cache.read(1)[0].mean, cache.read(2)[0].mean)


def test_statistics_per_position(place, toml, tmp_path):
    """They are the moments of the stored latents, survive the repair of a shard, and a run on the cache takes them."""
    out, more = tmp_path / "cache", "--latent_norm.per_position=true"
    assert run(toml, out, more) == 0
    cache, stored = LatentCache(out), []
    for i in range(40):
        for flipped in (False, True):
            cached, _ = cache.read(i, flipped)
            stored.append(torch.stack([cached.mean, cached.std]).double())
    mean, std = torch.stack(stored, 1)
    total = (std.square().mean(0) + mean.var(0, unbiased=False)).sqrt()
    for got, expected in zip(cache.position_statistics(), (mean.mean(0), total)):
        assert torch.allclose(got, expected, rtol=1e-6, atol=1e-9)
    assert torch.allclose(cache.statistics[0], mean.mean((0, 2, 3)), rtol=1e-6, atol=1e-9)
    before = (out / "latents-stats.safetensors").read_bytes()
    (out / "latents-00001.safetensors").write_bytes(b"damaged")
    assert run(toml, out, more) == 0 and (out / "latents-stats.safetensors").read_bytes() == before
    with pytest.raises(DataError, match="has statistics per channel only"):
        LatentCache(place / "whole").position_statistics()
