"""Tests that need a GPU; skipped without one."""

import json

import pytest
import torch

from components.distributed.parallel import World
from tests.support import toys
from tests.support.compiled import assert_learns_alike, learn
from tests.support.ranks import run_ranks
from trainer import config
from trainer.run.loop import Trainer

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]


def losses(folder) -> list[float]:
    return [json.loads(line)["denoiser/loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


def train(tmp_path, name: str, *overrides: str) -> list[float]:
    toml = tmp_path / "toy.toml"
    toml.write_text(toys.TOML)
    loaded = config.load(str(toml), [f"--run.dir={tmp_path / name}", "--loader.workers=2", *overrides])
    Trainer(loaded, World(device=torch.device("cuda", 0))).run()
    return losses(tmp_path / name)


def test_gpu_equals_cpu_in_fp64(tmp_path):
    gpu = train(tmp_path, "gpu", "--training.precision=fp64")
    loaded = config.load(str(tmp_path / "toy.toml"), [f"--run.dir={tmp_path / 'cpu'}", "--training.precision=fp64"])
    Trainer(loaded, World()).run()
    assert gpu == pytest.approx(losses(tmp_path / "cpu"), rel=1e-5)


def test_bf16_compiled_trains_and_resumes(tmp_path):
    options = ["--training.precision=bf16", "--training.compile"]
    eager = train(tmp_path, "eager", "--training.precision=bf16")
    train(tmp_path, "parts", *options, "--training.steps=3")
    compiled = train(tmp_path, "parts", *options)
    assert compiled == pytest.approx(eager, rel=0.05)


@pytest.mark.parametrize("recipe", ["repae", "naive_e2e"])
def test_every_parameter_learns_compiled_as_in_eager_mode(tmp_path, recipe):
    """Gradient by gradient: losses that agree within 5 % would hide heads that never learn."""
    (tmp_path / "toy.toml").write_text(toys.TOML)
    rates = [f"--optimizer.{group}lr=1e-6" for group in ("", "tokenizer.", "discriminator.", "denoiser.")]
    loaded = config.load(str(tmp_path / "toy.toml"), [f"--recipe.name={recipe}", "--training.num_classes=10", *rates])
    eager, compiled = learn(loaded, None, device="cuda"), learn(loaded, "inductor", device="cuda")
    assert_learns_alike(eager, compiled, rtol=2e-2)  # convolutions in TF32


@pytest.mark.parametrize("recompute", ["full", "selective", "budget 0.5"])
def test_recomputing_and_compiled_trains_alike(tmp_path, recompute):
    options = ["--training.precision=bf16", "--training.compile"]
    plain = train(tmp_path, "plain", *options)
    both = [f"--activation_checkpoint.{part}={recompute}" for part in ("denoiser", "tokenizer")]
    assert train(tmp_path, "recomputing", *options, *both) == pytest.approx(plain, rel=0.05)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_offloaded_equals_plain_in_fp64(tmp_path, optimizer):
    """One rank, wrapped by FSDP2, with weights and optimizer on the host."""
    options = ["--training.precision=fp64", f"--optimizer.name={optimizer}"]
    plain = train(tmp_path, "plain", *options)
    try:
        offloaded = train(tmp_path, "offloaded", *options, "--parallel.cpu_offload")
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
    assert offloaded == pytest.approx(plain, rel=1e-8)


def on_every_gpu(rank: int, world: int, toml: str, folder: str, options: list[str]) -> None:
    torch.cuda.set_device(rank)
    loaded = config.load(toml, [f"--run.dir={folder}", *options])
    Trainer(loaded, World(rank, world, torch.device("cuda", rank), world)).run()


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA GPUs")
@pytest.mark.parametrize("strategy", ["fsdp", "ddp"])
def test_two_gpus_equal_one_in_fp64(tmp_path, strategy):
    one = train(tmp_path, "one", "--training.precision=fp64")
    options = ["--training.precision=fp64", f"--parallel.strategy={strategy}"]
    run_ranks(on_every_gpu, 2, str(tmp_path / "toy.toml"), str(tmp_path / "two"), options, backend="cpu:gloo,cuda:nccl")
    assert losses(tmp_path / "two") == pytest.approx(one, rel=1e-8)


PATCHGAN = "[losses.patchgan]\nchannels = 8\nlayers = 2\n"
DINO_GAN = '[losses.dino_gan]\nencoder = "tiny_vit"\ngrid = 8\nblocks = [0, 2]\n'


@pytest.mark.parametrize(
    ("more", "adversary"),
    [
        ([], PATCHGAN),
        (["--optimizer.name=muon"], PATCHGAN),
        (["--losses.patchgan.adaptive=true"], PATCHGAN),
        ([], DINO_GAN),
    ],
    ids=["plain", "muon", "adaptive", "dino_gan"],
)
def test_a_step_does_not_wait_for_the_gpu(tmp_path, more, adversary):
    """After the first steps, PyTorch treats every synchronization as an error."""
    assert PATCHGAN in toys.TOML
    (tmp_path / "toy.toml").write_text(toys.TOML.replace(PATCHGAN, adversary))
    options = ["--training.steps=12", "--run.log_every=100", "--run.checkpoint_every=0", "--training.precision=fp32"]
    loaded = config.load(str(tmp_path / "toy.toml"), [f"--run.dir={tmp_path / 'run'}", *options, *more])
    trainer = Trainer(loaded, World(device=torch.device("cuda", 0)))
    step = trainer.train_step

    def watched(k, batches, *rest):
        batches = list(batches)
        torch.cuda.set_sync_debug_mode("error" if 3 <= k < 11 else "default")
        try:
            return step(k, batches, *rest)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    watched.evaluating, watched.whole = step.evaluating, True
    trainer.train_step = watched
    assert trainer.run()
