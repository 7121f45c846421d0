"""Mistakes on the command line: one line that says what was expected, and nothing that was not asked for."""

import math
import subprocess
import sys

import pytest

from components import registry
from tests.support import ROOT, toys
from trainer import config
from trainer.__main__ import main
from trainer.config import ConfigError
from trainer.config.schema import Sampling

QUICKSTART = str(ROOT / "train_configs" / "quickstart.toml")


@pytest.fixture
def toy(tmp_path):
    (tmp_path / "toy.toml").write_text(toys.TOML)
    return str(tmp_path / "toy.toml")


def floats(table: dict, prefix: str = ""):
    for key, value in table.items():
        if isinstance(value, dict):
            yield from floats(value, f"{prefix}{key}.")
        elif isinstance(value, float):
            yield f"{prefix}{key}"


@pytest.mark.parametrize("value", ["inf", "-inf", "nan"])
def test_every_float_must_be_finite(toy, value):
    keys = list(floats(config.load(toy).model_dump()))
    assert {"optimizer.lr", "ema.decay", "flow.time_std", "guard.spike", "sampling.guidance"} <= set(keys)
    for key in keys:
        with pytest.raises(ConfigError, match=rf"{key} = {value}: expected a finite number"):
            config.load(toy, [f"--{key}={value}"])


def test_options_of_sample_must_be_finite():
    with pytest.raises(ConfigError, match=r"--guidance = inf: .*finite"):
        config.check_table(Sampling, {"guidance": math.inf}, "--")


def test_a_missing_config_lists_configs_only(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    with pytest.raises(ConfigError) as error:
        config.load("nope.toml")
    assert "\n  train_configs/quickstart.toml" in str(error.value) and "pyproject" not in str(error.value)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=r"expected a \.toml file$"):
        config.load("nope.toml")


@pytest.mark.parametrize("place", [ROOT, ROOT / "docs"])
def test_a_missing_config_in_a_folder_without_any(place, monkeypatch):
    monkeypatch.chdir(ROOT)
    with pytest.raises(ConfigError, match=r"train_configs/quickstart\.toml"):
        config.load(str(place / "nope.toml"))


def test_another_plugin_by_name_drops_the_options_it_does_not_have(caplog):
    loaded = config.load(QUICKSTART, ["--dataset.name=image_folder", "--dataset.path=data"])
    assert loaded.dataset.options == {"path": "data"}
    assert "dataset.name = 'image_folder' replaces 'shapes': dropped its variety" in caplog.text


@pytest.mark.parametrize(
    ("overrides", "table", "options", "says"),
    [
        (
            ["--denoiser.name=lightningdit"],
            lambda c: c.denoiser,
            {"width": 32, "depth": 2, "heads": 2, "align_depth": 1},
            "",
        ),
        (["--tokenizer.name=identity"], lambda c: c.tokenizer, {}, "dropped its latent_channels, channels, multipl"),
        (["--losses.cosine.name=smooth_l1", "--recipe.name=sra"], lambda c: c.losses["cosine"], {}, "dropped its head"),
        (["--losses.l1.name=lpips"], lambda c: c.losses["l1"], {}, ""),
        (
            ["--encoders.tiny_vit.name=clip", "--encoders.tiny_vit.weight=2.0"],
            lambda c: c.encoders["tiny_vit"],
            {},
            "",
        ),
        (["--dataset.name=shapes"], lambda c: c.dataset, {"size": 40}, ""),
    ],
)
def test_what_is_dropped_and_kept(toy, caplog, overrides, table, options, says):
    assert table(config.load(toy, overrides)).options == options
    assert says in caplog.text and bool(says) == ("dropped" in caplog.text)


def test_an_option_of_the_same_name_but_another_type_is_dropped(tmp_path, caplog):
    text = toys.TOML.replace("[encoders.tiny_vit]", '[encoders.a]\nname = "dinov2"\nsize = "g"\nregisters = true')
    (tmp_path / "toy.toml").write_text(text)
    loaded = config.load(str(tmp_path / "toy.toml"), ["--encoders.a.name=clip", "--encoders.a.pretrained=false"])
    assert loaded.encoders["a"].options == {"pretrained": False}
    assert "encoders.a.name = 'clip' replaces 'dinov2': dropped its size, registers" in caplog.text


def test_options_on_the_command_line_are_never_dropped(toy):
    with pytest.raises(ConfigError, match=r"dataset\.size: unknown key"):
        config.load(toy, ["--dataset.name=image_folder", "--dataset.path=data", "--dataset.size=4"])


def test_options_in_a_file_are_never_dropped(tmp_path):
    (tmp_path / "bad.toml").write_text(toys.TOML.replace('name = "shapes"', 'name = "image_folder"\npath = "data"'))
    with pytest.raises(ConfigError, match=r"dataset\.size: unknown key"):
        config.load(str(tmp_path / "bad.toml"))


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ([], "dataset image_folder requires the option path (file); add --option path=VALUE"),
        (
            ["path=x", "pth=x"],
            "dataset image_folder has no option 'pth'; did you mean 'path'? (valid: decoder, flip, path)",
        ),
        (["path=x", "flip=2"], "dataset image_folder option flip = 2: input should be a valid boolean"),
    ],
)
def test_conform_with_wrong_options(capsys, monkeypatch, options, says):
    monkeypatch.setattr(registry.datasets, "_plugins", dict(registry.datasets._plugins))  # the file registers again
    words = [word for option in options for word in ("--option", option)]
    assert main(["conform", str(ROOT / "plugins/datasets/image_folder.py"), *words]) == 2
    assert capsys.readouterr().err == f"error: {says}\n"


def ends_early(code: str) -> int:
    """Exit status of Python code whose reader ends before the first line; nothing may be said on stderr."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, text=True, **pipes)
    process.stdout.close()
    assert process.stderr.read() == ""
    return process.wait(120)


@pytest.mark.parametrize("lines", [1, 100_000])
def test_a_reader_that_ends_early_is_no_fault(lines):
    code = f"from trainer.pipes import ends_with_its_reader as d; exit(d(lambda: print('x\\n' * {lines}) or 0)())"
    assert ends_early(code) == 141


@pytest.mark.parametrize(
    ("command", "status"),
    [
        pytest.param(["plugins"], 141, marks=pytest.mark.long),
        pytest.param(["check", QUICKSTART], 141, marks=pytest.mark.long),
        (["train", "--help"], 0),  # argparse ignores it
        (["--version"], 0),
    ],
)
def test_no_command_minds_a_reader_that_ends_early(command, status):
    code = f"import sys; sys.argv = ['titanrepa']; from trainer.__main__ import main; sys.exit(main({command!r}))"
    assert ends_early(code) == status


def test_another_broken_pipe_is_a_fault(monkeypatch):
    from trainer.commands import plugins

    def broken(*_):
        raise BrokenPipeError("of a worker")

    monkeypatch.setattr(plugins, "run", broken)
    with pytest.raises(BrokenPipeError, match="of a worker"):
        main(["plugins"])
