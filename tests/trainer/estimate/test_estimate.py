"""`check` builds the run that would be trained, and counts the memory, traffic and operations of one GPU."""

from __future__ import annotations

import math
import os
import re
import subprocess
import sys
from functools import cache

import pytest
import torch
import torch.nn.functional as F

from components import registry
from components.distributed.parallel import World
from components.nn.group_norm import GroupNorm
from tests.support import ROOT, toys
from trainer import config as configs
from trainer.__main__ import main
from trainer.commands.check import gpu_hours, verdict
from trainer.config import ConfigError
from trainer.estimate.dry_run import AVERAGES, FROZEN, GATHERED, GRADIENTS, PARAMETERS, STATES, TEMPORARY, dry_run
from trainer.estimate.fake_ranks import cuda_autocast
from trainer.run import assemble
from trainer.run.prepare import Preparation

pytestmark = pytest.mark.long

# Skipped, since a similar config stands for each: the ablations differ in timm's vision transformer, two tokenizers
# share an architecture, LightningDiT and DiT-DH resemble SiT, and iREPA and REG differ from REPA by a head and by one
# token.
ALIKE = (
    "ablation_encoder_dinov2",
    "ablation_encoder_ijepa", "repae_sit_xl_vavae", "irepa_sit_xl", "reg_sit_xl", "repae_lightningdit", "repae_ditdh",
    "raev2_d",
)  # fmt: skip
CONFIGS = sorted(p for p in (ROOT / "train_configs").glob("*.toml") if not p.name.startswith(ALIKE))
FLOAT = 4  # bytes
# A width that 8 ranks do not divide; only the denoiser trains.
UNEVEN = ("--recipe.name=ldm", "--denoiser.width=36")


@pytest.fixture(scope="module")
def toml(tmp_path_factory):
    path = tmp_path_factory.mktemp("estimate") / "toy.toml"
    path.write_text(toys.TOML)
    return str(path)


@cache
def cost(toml: str, size: int, local_size: int, *options: str):
    return dry_run(configs.load(toml, list(options)), size, local_size, bf16=False)


def denoiser(toml: str, *options: str):
    return assemble.check(configs.load(toml, list(options)), 1).modules.denoiser


def held(parameters, shards: int) -> int:
    """Return the number of elements on rank 0: rows are sharded in equal chunks, rounded up."""
    return sum(math.ceil(p.shape[0] / shards) * p.shape[1:].numel() for p in parameters)


def test_sharded_bytes_are_those_counted_by_hand(toml):
    found = cost(toml, 8, 8, *UNEVEN)
    network = denoiser(toml, *UNEVEN)
    parameters = list(network.parameters())
    part = held(parameters, 8)
    assert part > sum(p.numel() for p in parameters) / 8, "the case is meant to be uneven"
    buffers = sum(b.numel() for b in network.buffers())
    assert found.mesh == (1, 8)
    assert found.peak[PARAMETERS] == FLOAT * (part + buffers)
    assert found.peak[STATES] == FLOAT * (2 * part + len(parameters))  # two moments, and a step count each
    assert found.most[GRADIENTS] == FLOAT * part  # fewer at the peak, which is mostly activations
    # The latent statistics: mean and variance of 4 channels, and an int64 count.
    assert found.peak[AVERAGES] == FLOAT * (part + buffers + 8) + 8


def test_replicated_bytes_are_whole_and_frozen_parts_too(toml):
    found = cost(toml, 8, 4, *UNEVEN, "--parallel.strategy=ddp")
    parts = assemble.check(configs.load(toml, list(UNEVEN)), 8)
    network = parts.modules.denoiser
    assert found.peak[PARAMETERS] == FLOAT * sum(t.numel() for t in (*network.parameters(), *network.buffers()))
    frozen = [parts.modules.tokenizer, parts.modules.latent_norm]
    sizes = [t.numel() * t.element_size() for m in frozen for t in (*m.parameters(), *m.buffers())]
    assert found.peak[FROZEN] == sum(sizes)


def test_a_sharded_step_never_holds_whole_weights(toml):
    wide = ("--recipe.name=ldm", "--denoiser.width=256", "--denoiser.depth=8")
    found = cost(toml, 8, 8, *wide)
    whole = FLOAT * sum(p.numel() for p in denoiser(toml, *wide).parameters())
    assert found.most[GATHERED] + found.most[TEMPORARY] < 0.9 * whole


def test_fsdp_gathers_blocks_twice_and_the_rest_once(toml):
    """Ring: each rank forwards (n - 1) / n of the gathered tensor; 2 of the 8 links cross between two nodes."""
    found = cost(toml, 8, 4, *UNEVEN)
    network = denoiser(toml, *UNEVEN)
    whole = 8 * held(network.parameters(), 8)
    blocks = 8 * sum(held(unit.parameters(), 8) for unit in network.units())
    within, across = found.traffic.within, found.traffic.across
    for name, elements in (("all-gather", whole + blocks), ("reduce-scatter", whole)):
        sent = 7 / 8 * FLOAT * elements
        assert within[name] + across[name] == pytest.approx(sent)
        assert across[name] == pytest.approx(sent * 2 / 8)


def test_muon_sends_its_matrices_twice_within_the_shards(toml):
    """Their rows to the ranks that orthogonalize them, and back; among replicas, each gathers what others computed."""
    found = cost(toml, 8, 4, *UNEVEN, "--parallel.strategy=hsdp", "--optimizer.name=muon")
    adamw = cost(toml, 8, 4, *UNEVEN, "--parallel.strategy=hsdp")
    matrices = [p for p in denoiser(toml, *UNEVEN).blocks.parameters() if p.ndim == 2]
    within, across = found.traffic.within, found.traffic.across
    # Rank 0 owns the largest of the matrices that are dealt out, so it sends a little more than the mean.
    most = 3 / 4 * FLOAT * held(matrices, 4)
    assert 0.9 * most < within["all-to-all"] < 2 * most and across["all-to-all"] == 0
    assert across["all-gather"] > 0 and adamw.traffic.across["all-gather"] == 0
    assert found.most[STATES] < adamw.most[STATES]


def test_hsdp_scatters_within_a_node_and_sums_across(toml):
    found = cost(toml, 8, 4, *UNEVEN, "--parallel.strategy=hsdp")
    part = held(denoiser(toml, *UNEVEN).parameters(), 4)
    within, across = found.traffic.within, found.traffic.across
    assert found.mesh == (2, 4)
    assert within["reduce-scatter"] == pytest.approx(3 / 4 * FLOAT * 4 * part)
    assert across["reduce-scatter"] == across["all-gather"] == 0
    # Gradient norms, losses and latent statistics are also summed: hundreds of bytes.
    assert across["all-reduce"] == pytest.approx(2 * 1 / 2 * FLOAT * part, rel=0.03)


def test_ddp_only_sums_gradients(toml):
    found = cost(toml, 8, 4, *UNEVEN, "--parallel.strategy=ddp")
    count = sum(p.numel() for p in denoiser(toml, *UNEVEN).parameters())
    within, across = found.traffic.within, found.traffic.across
    assert within["all-gather"] + within["reduce-scatter"] + across["all-gather"] + across["reduce-scatter"] == 0
    sent = within["all-reduce"] + across["all-reduce"]
    assert sent == pytest.approx(2 * 7 / 8 * FLOAT * count, rel=0.03)
    assert across["all-reduce"] == pytest.approx(sent * 2 / 8)


def test_accumulation_repeats_all_traffic(toml):
    hsdp = (*UNEVEN, "--parallel.strategy=hsdp", "--training.batch_size=32")
    once, four = (cost(toml, 8, 4, *hsdp, f"--training.accumulation={n}") for n in (1, 4))
    assert four.images == 1 and four.flops == once.flops
    assert four.traffic.within["all-gather"] == pytest.approx(4 * once.traffic.within["all-gather"])
    assert four.traffic.within["reduce-scatter"] == pytest.approx(4 * once.traffic.within["reduce-scatter"])
    assert four.traffic.across["all-reduce"] == pytest.approx(4 * once.traffic.across["all-reduce"], rel=0.03)


def test_recomputation_lowers_activations_and_costs_flops(toml):
    deep = (*UNEVEN, "--denoiser.depth=6", "--training.batch_size=64")
    none, full = (cost(toml, 1, 1, *deep, f"--activation_checkpoint.denoiser={form}") for form in ("none", "full"))
    assert full.peak[TEMPORARY] < 0.5 * none.peak[TEMPORARY]
    assert 1.15 * none.flops < full.flops < 4 / 3 * none.flops  # one more forward pass; none for the frozen tokenizer


def test_norms_and_interpolation_stay_fp32_as_on_cuda():
    x = torch.ones(2, 4, 4, 4, dtype=torch.bfloat16).contiguous(memory_format=torch.channels_last)
    norm = GroupNorm(2, 4)
    calls = [
        lambda: F.group_norm(x, 2),
        lambda: norm(x),
        lambda: F.layer_norm(x, (4,)),
        lambda: F.interpolate(x, scale_factor=2.0),
    ]
    with cuda_autocast():
        assert all(call().dtype == torch.bfloat16 for call in calls)
        with torch.autocast("cpu", torch.bfloat16):
            assert all(call().dtype == torch.float32 for call in calls)
            assert F.conv2d(x, x).dtype == torch.bfloat16


def test_bf16_halves_products_only(toml):
    deep = (*UNEVEN, "--denoiser.depth=6", "--training.batch_size=64")
    half = dry_run(configs.load(toml, list(deep)), 1, 1, bf16=True)
    whole = cost(toml, 1, 1, *deep, "--activation_checkpoint.denoiser=none")
    assert 0.55 < half.peak[TEMPORARY] / whole.peak[TEMPORARY] < 0.95
    assert half.peak[PARAMETERS] == whole.peak[PARAMETERS]
    full = dry_run(configs.load(toml, [*deep, "--activation_checkpoint.denoiser=full"]), 1, 1, bf16=True)
    assert full.peak[TEMPORARY] < half.peak[TEMPORARY], "the recomputed forward pass is in bf16, too"


def test_offloaded_weights_are_not_on_the_gpu(toml):
    found = cost(toml, 1, 1, *UNEVEN, "--parallel.cpu_offload")
    assert not {PARAMETERS, GRADIENTS, STATES, AVERAGES} & set(found.most)
    # They are copied to the GPU for use.
    assert found.most[GATHERED] == FLOAT * sum(p.numel() for p in denoiser(toml, *UNEVEN).parameters())


@pytest.mark.parametrize(
    "options", [["--training.batch_size=9"], ["--parallel.strategy=hsdp", "--parallel.shard=3"],
                ["--parallel.strategy=none"]],
    ids=["batch", "shard", "none"],
)  # fmt: skip
def test_what_cannot_run_is_refused_as_in_a_run(toml, options, capsys):
    config = configs.load(toml, options)
    with pytest.raises(ConfigError) as refusal:
        assemble.check(config, 8)
        Preparation(config, set(), World(0, 8), files=False)
    assert main(["check", toml, "--world-size=8", *options]) == 2
    assert str(refusal.value) in capsys.readouterr().err


def test_says_whether_it_fits_and_what_would_help(toml):
    config = configs.load(toml, ["--parallel.strategy=ddp"])
    found = cost(toml, 8, 4, *UNEVEN, "--parallel.strategy=ddp")
    assert verdict(config, found, "h100").startswith("fits h100 (79.1 GiB): 97% free")
    huge = type(found)(**(vars(found) | {"peak": {TEMPORARY: 90 * 2**30, PARAMETERS: 2**30}}))
    text = verdict(config, huge, "h100")
    assert text.startswith("does not fit h100 (79.1 GiB): needs 97.5 GiB")
    assert text.index('activation_checkpoint.denoiser = "full"') < text.index('parallel.strategy = "fsdp"')


def test_gpu_hours_are_operations_over_what_the_gpu_computes(toml):
    config = configs.load(toml, ["--training.steps=360_000"])
    found = cost(toml, 1, 1)
    found = type(found)(**(vars(found) | {"flops": 312 * 10**12}))  # 2 s per step at half of an A100's peak
    assert "800 GPU-hours, 200 hours on 4, assuming 50% of 312" in gpu_hours(config, found, 4, "a100-80", (0.5,))
    said = gpu_hours(config, found, 4, "a100-80", (0.25, 0.5))
    assert "800 to 1,600 GPU-hours, 200 to 400 hours on 4, assuming 25% to 50% of 312" in said


@pytest.mark.parametrize("wrong", ["x", "0", "1.5", "0.5-2", "-0.1"])
def test_an_impossible_utilization_is_named(toml, capsys, wrong):
    with pytest.raises(SystemExit):
        main(["check", toml, "--gpu=h100", f"--utilization={wrong}"])
    assert f"{wrong}: expected a number in (0, 1]" in capsys.readouterr().err


def test_prints_parts_memory_traffic_and_verdict(toml, capsys):
    assert main(["check", toml, "--world-size=16", "--gpu=l40s", "--parallel.strategy=hsdp"]) == 2
    assert "training.batch_size = 8: not divisible by 16" in capsys.readouterr().err
    options = [*UNEVEN, "--parallel.strategy=hsdp", "--training.batch_size=16"]
    assert main(["check", toml, "--world-size=16", "--gpu=l40s", *options]) == 0
    out = capsys.readouterr().out
    for text in ("2 replicas x 8 shards", "16 ranks x 1 images", "optimizer states", "frozen parts", "GFLOP per image",
                 "all-reduce", "to other nodes", "fits l40s"):  # fmt: skip
        assert text in out


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_every_shipped_config_runs_dry(path, monkeypatch):
    """With one block per aligned depth and one residual block per level, to save time; the rest is the config's."""
    monkeypatch.chdir(ROOT)
    config = configs.load(str(path))
    options = registry.tokenizers.get(config.tokenizer.name).options
    thin = [f"--tokenizer.{key}=1" for key in ("res_blocks", "depth") if key in options]
    if config.denoiser is not None and "size" in config.denoiser.options:
        depths = config.denoiser.options.get("align_depth")
        blocks = len(depths) if isinstance(depths, list) else 1
        aligned = list(range(1, blocks + 1)) if isinstance(depths, list) else 1
        thin += [f"--denoiser.depth={blocks}", f"--denoiser.align_depth={aligned}"]
    found = dry_run(configs.load(str(path), thin), 1, 1, bf16=True)
    assert found.total > 0 and found.flops > 0 and not found.parts.unused


def test_is_near_the_measured_peak(tmp_path):
    """Real steps in a separate process, in fp32: resident memory grows by the estimate."""
    path = tmp_path / "mid.toml"
    path.write_text(toys.TOML)
    options = ["--training.resolution=64", "--tokenizer.channels=32", "--denoiser.width=256", "--denoiser.depth=4",
               "--training.threads=1"]  # fmt: skip
    command = [sys.executable, "-m", "trainer", "check", str(path), "--measure", *options]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    error = float(re.search(r"estimation error ([-+][\d.]+)%", done.stdout)[1])
    assert abs(error) < 25, done.stdout
