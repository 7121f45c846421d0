"""Monitoring: descriptions, speed without interruptions, MFU, hyperparameters, pictures and log lines."""

import json
import logging
import sys
from pathlib import Path
from unittest import mock

import PIL.Image
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.compat.proto.summary_pb2 import DATA_CLASS_SCALAR
from tensorboard.plugins.hparams.metadata import SESSION_START_INFO_TAG
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData
from torch.distributed import _functional_collectives as functional_collectives

from components.distributed.parallel import World
from components.monitor.flops import FlopCounter
from tests.support import ROOT, toys
from tests.support.ranks import run_ranks
from trainer import config
from trainer.commands.train import log_to
from trainer.estimate.dry_run import dry_run
from trainer.estimate.fake_ranks import pretended_ranks
from trainer.evaluation.results import write_curves
from trainer.run import assemble
from trainer.run.alarms import GuardStop
from trainer.run.loop import Trainer
from trainer.run.monitor import speed
from trainer.run.monitor.flops import flops_per_image, try_flops_per_image
from trainer.run.monitor.speed import Stopwatch, speeds
from trainer.run.monitor.tags import describe, is_generic
from trainer.run.report import Reporter
from trainer.run.run_log import start_run_log


@pytest.fixture(scope="module")
def toml(tmp_path_factory):
    path = tmp_path_factory.mktemp("monitor") / "toy.toml"
    path.write_text(toys.TOML)
    return str(path)


def make(toml: str, folder: Path, *overrides: str) -> Trainer:
    return Trainer(config.load(toml, [f"--run.dir={folder}", "--run.checkpoint_every=0", *overrides]), World())


@pytest.fixture(scope="module")
def run(toml, tmp_path_factory):
    """Three steps with pictures after the second and the last, then one more step of the same run."""
    folder = tmp_path_factory.mktemp("run")
    make(toml, folder, "--training.steps=3", "--sampling.every=2").run()
    make(toml, folder, "--training.steps=4", "--sampling.every=2").run()
    return folder


@pytest.fixture(scope="module")
def events(run):
    found = EventAccumulator(str(run / "tensorboard"), size_guidance={"scalars": 0, "tensors": 0})
    return found.Reload()


def lines(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


# -- TensorBoard -----------------------------------------------------------------------------------------------------


def test_every_scalar_of_a_run_has_its_description(events):
    tags = events.Tags()["scalars"]
    for tag in tags:
        assert describe(tag), tag
        assert events.SummaryMetadata(tag).summary_description == describe(tag)
        assert events.SummaryMetadata(tag).plugin_data.plugin_name == "scalars"
        assert events.SummaryMetadata(tag).data_class == DATA_CLASS_SCALAR, "else TensorBoard's fast loader drops it"
    assert not [tag for tag in tags if is_generic(tag)], "what is shipped is described in words of its own"


def test_the_groups_of_a_run_are_these(events):
    assert {tag.split("/")[0] for tag in events.Tags()["scalars"]} == {
        "tokenizer", "discriminator", "denoiser", "grad_norm", "lr", "skipped_steps", "latent", "latent_norm",
        "time", "speed", "memory", "data", "samples",
    }  # fmt: skip


@pytest.mark.parametrize(
    "tag",
    [
        "alarms/spike",
        "evaluation/fid",
        "evaluation/fid_tiny_vit",
        "memory/peak_gib",
        "mine/my_term",
        "speed/mfu",
        "speed/slowest_rank_ratio",
        "time/outside/evaluation",
    ],
)
def test_rare_tags_have_one_too(tag):
    assert describe(tag)


def test_the_curves_of_evaluate_have_one_too(tmp_path):
    folder = write_curves(tmp_path, "", 3, {"fid": 2.0, "is": None})
    found = EventAccumulator(str(folder)).Reload()
    assert found.Tags()["scalars"] == ["evaluation/fid"]
    assert found.SummaryMetadata("evaluation/fid").summary_description == describe("evaluation/fid")


def test_metrics_jsonl_has_the_same_scalars(run, events):
    logged = {name for line in lines(run) for name in line} - {"step"}
    assert logged == set(events.Tags()["scalars"]) - {"samples/judged_right"}


def test_what_each_step_shows(run):
    last = lines(run)[-1]
    for name in ("latent/mean", "latent/spatial_variance", "latent/total_variation", "latent_norm/mean",
                 "latent_norm/mean_abs_max", "latent_norm/variance_mean", "latent_norm/variance_min",
                 "latent_norm/variance_max", "time/data", "time/encoders", "time/tokenizer", "time/discriminator",
                 "time/denoiser", "time/optimizer", "time/step", "time/outside/share", "speed/images_per_s",
                 "speed/images_per_s_per_gpu", "speed/tflops_per_gpu", "memory/resident_gib"):  # fmt: skip
        assert name in last, name
    assert "speed/mfu" not in last, "a CPU has no peak"
    assert last["latent/variance"] == last["latent_norm/variance_mean"]
    assert 0.05 < last["memory/resident_gib"] < 100


def test_hyperparameters_and_final_metrics_are_in_the_runs_own_folder(run, events):
    assert [p for p in (run / "tensorboard").iterdir() if p.is_dir()] == [], "a second folder would be a second run"
    data = HParamsPluginData.FromString(events.SummaryMetadata(SESSION_START_INFO_TAG).plugin_data.content)
    shown = data.session_start_info.hparams
    assert shown["training.batch_size"].number_value == 8 and shown["recipe.name"].string_value == "repae"
    assert shown["training.compile"].string_value == "False"
    experiment = HParamsPluginData.FromString(events.SummaryMetadata("_hparams_/experiment").plugin_data.content)
    metrics = {info.name.tag for info in experiment.experiment.metric_infos}
    assert {"denoiser/loss", "samples/judged_right", "speed/images_per_s"} <= metrics <= set(events.Tags()["scalars"])


def test_a_run_that_the_guard_stops_has_them_too(toml, tmp_path):
    trainer = make(toml, tmp_path, "--recipe.name=ldm", "--guard.policy=stop", "--guard.skipped=1")
    step = trainer.parts.recipe.step

    def broken(m, batch, draws, update, k):
        def nan(group, terms):
            update(group, {name: term._replace(value=term.value * float("nan")) for name, term in terms.items()})

        step(m, batch, draws, nan if k == 1 else update, k)

    trainer.parts.recipe.step = broken
    with pytest.raises(GuardStop):
        trainer.run()
    found = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert found.SummaryMetadata(SESSION_START_INFO_TAG).plugin_data.plugin_name == "hparams"
    data = HParamsPluginData.FromString(found.SummaryMetadata("_hparams_/experiment").plugin_data.content)
    metrics = {info.name.tag for info in data.experiment.metric_infos}
    assert {"denoiser/loss", "samples/judged_right"} <= metrics, "what comes after a resume has its column, too"


def test_pictures_have_a_row_of_latents_and_histograms_stand_beside_them(run, events):
    with PIL.Image.open(run / "images" / "reconstructions_00000002.png") as file:
        assert file.size == (10 * 34 + 2, 6 * 34 + 2)  # 20 images: two rows of originals, reconstructions, latents
        cut = file.convert("RGB").crop((2, 2 * 34 + 2, 34, 3 * 34))
    row = torch.tensor(list(cut.tobytes())).view(32, 32, 3)
    cells = row.view(8, 4, 8, 4, 3)
    assert (cells == cells[:, :1, :, :1]).all(), "a latent position is a square of one color"
    assert row.float().std() > 10
    assert {"latent_norm/running_mean", "latent_norm/running_variance"} <= set(events.Tags()["histograms"])


# -- speed -----------------------------------------------------------------------------------------------------------


def test_the_stopwatch_divides_the_time():
    now = [0.0]
    with mock.patch.object(speed.time, "perf_counter", lambda: now[0]):
        watch = Stopwatch(torch.device("cpu"))
        now[0] = 10
        for _ in range(2):
            with watch.outside("saving"):
                now[0] += 3
        now[0] += 4
        assert watch.read() == (14, {"saving": 6})
        now[0] += 1
        assert watch.read() == (1, {})


def test_mfu_by_hand():
    found = speeds(images=640, seconds=2.0, ranks=8, flops_per_image=5 * 10**12, peak=989)
    assert found["speed/images_per_s"] == 320 and found["speed/images_per_s_per_gpu"] == 40
    assert found["speed/tflops_per_gpu"] == 200 and found["speed/mfu"] == pytest.approx(200 / 989)
    assert "speed/mfu" not in speeds(640, 2.0, 8, 1, None) and "speed/tflops_per_gpu" not in speeds(
        640, 2.0, 8, None, 989
    )


def test_images_per_second_are_without_the_time_of_pictures_and_saving(toml, tmp_path):
    extra = [0.0]
    real = speed.time.perf_counter
    draw, hour = Reporter.draw, 3600.0

    def slow(self, *rest):
        extra[0] += hour
        draw(self, *rest)

    with (
        mock.patch.object(speed.time, "perf_counter", lambda: real() + extra[0]),
        mock.patch.object(Reporter, "draw", slow),
    ):
        make(toml, tmp_path, "--recipe.name=ldm", "--training.steps=4", "--sampling.every=2").run()
    found = {line["step"]: line for line in lines(tmp_path)}
    assert min(line["speed/images_per_s"] for line in found.values()) > 8 / hour * 10
    assert found[3]["time/outside/pictures"] >= hour and found[3]["time/outside/share"] > 0.99
    assert "time/outside/pictures" not in found[2] | found[4]


# -- operations ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        (),
        ("--recipe.name=repa",),
        ("--recipe.name=ldm",),
        ("--recipe.name=naive_e2e",),
        ("--training.accumulation=4",),
        ("--training.channels_last=false",),
    ],
)
@pytest.mark.long
def test_operations_equal_those_of_check(options):
    loaded = config.load(str(ROOT / "train_configs" / "quickstart.toml"), list(options))
    cost = dry_run(loaded, 1, 1, bf16=False)
    expected = cost.flops / (cost.images * loaded.training.accumulation)
    assert flops_per_image(loaded, assemble.check(loaded, 1)) == expected > 1e6


def test_recomputation_does_not_count(toml):
    both = [
        flops_per_image(loaded, assemble.check(loaded, 1))
        for loaded in (config.load(toml), config.load(toml, ["--activation_checkpoint.denoiser=full"]))
    ]
    assert both[0] == both[1]


def test_what_is_cached_does_not_count(toml):
    loaded = config.load(toml, ["--recipe.name=repa"])
    plain, latents, all_of_it = (
        flops_per_image(loaded, assemble.check(loaded, 1), cached) for cached in (None, [], ["tiny_vit"])
    )
    assert plain > latents > all_of_it
    encoder = assemble.check(loaded, 1).modules.encoders["tiny_vit"].to_empty(device="cpu")
    tokenizer = assemble.check(loaded, 1).modules.tokenizer.to_empty(device="cpu")
    counts = []
    for part in (encoder, tokenizer.encode):
        with FlopCounter() as counter, torch.no_grad():
            part(torch.zeros(1, 3, 32, 32))
        counts.append(counter.flops)
    assert [latents - all_of_it, plain - latents] == counts


def on_rank(rank: int, world: int, toml: str, folder: str) -> tuple[int, list[dict]]:
    torch.set_num_threads(1)
    loaded = config.load(toml)
    # Run on rank 0 only: this recipe's batch norms would wait forever for the other rank.
    alone = flops_per_image(loaded, assemble.check(loaded, world), None, world) if rank == 0 else 0
    loaded = config.load(toml, [f"--run.dir={folder}", "--training.steps=2", "--recipe.name=repa"])
    Trainer(loaded, World(rank, world)).run()
    return alone, lines(Path(folder)) if rank == 0 else []


@pytest.mark.long
def test_rank_0_of_several_counts_by_itself_and_each_shares_the_speed(toml, tmp_path):
    alone, found = run_ranks(on_rank, 2, toml, str(tmp_path / "run"))[0]
    loaded = config.load(toml)
    assert alone == flops_per_image(loaded, assemble.check(loaded, 2), None, 2)
    loaded = config.load(toml, ["--recipe.name=repa"])
    per_image = flops_per_image(loaded, assemble.check(loaded, 2), None, 2)
    last = found[-1]
    assert last["speed/images_per_s_per_gpu"] == pytest.approx(last["speed/images_per_s"] / 2)
    assert last["speed/tflops_per_gpu"] == pytest.approx(last["speed/images_per_s_per_gpu"] * per_image / 1e12)


def test_a_collective_is_an_error_where_a_rank_counts_alone():
    with pretended_ranks(2), FlopCounter(), pytest.raises(RuntimeError, match="communicates with other ranks"):
        functional_collectives.all_reduce(torch.ones(2), "sum", torch.distributed.group.WORLD)


def test_a_part_that_needs_values_costs_mfu_and_not_the_run(toml, caplog):
    loaded = config.load(toml)
    meta = assemble.check(loaded, 1)
    meta.recipe.step = lambda *_: torch.rand(3).numpy()
    caplog.set_level(logging.INFO)
    assert try_flops_per_image(loaded, meta, meta, World()) is None
    assert "not reporting TFLOP/s and MFU" in caplog.text


# -- the log ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("terminal", [False, True])
def test_the_log_has_a_line_of_each_report_with_speed_and_eta(toml, tmp_path, monkeypatch, terminal, capsys):
    loaded = config.load(toml, [f"--run.dir={tmp_path}", "--training.steps=3"])
    root, level = logging.getLogger(), logging.getLogger().level
    before = list(root.handlers)
    try:
        log_to(loaded, World())
        start_run_log()
        monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal)
        reporter = Reporter(loaded, World(), ["denoiser"], 0, flops_per_image=10**9)
        for step in (1, 2, 3):
            reporter.report(step, {"denoiser/loss": 0.5}, 0.0)
        reporter.close()
    finally:
        for handler in set(root.handlers) - set(before):
            handler.close()
        root.handlers, root.level = before, level
    text = (tmp_path / "log.txt").read_text()
    for step in (1, 2, 3):
        assert f"step {step} of 3: denoiser 0.500, " in text
    assert text.count("images/s") == 3 and text.count("TFLOP/s") == 3 and text.count(" to go") == 1
    printed = capsys.readouterr()
    assert ("step 2 of 3" in printed.out + printed.err) is not terminal
