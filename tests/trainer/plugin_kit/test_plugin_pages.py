"""Files generated from the registry: the JSON Schema for editors, and docs/plugins.md."""

import copy
import json
import sys

import pytest
from jsonschema import Draft7Validator

from components import registry
from tests.support import ROOT, toys
from trainer import config
from trainer.__main__ import main
from trainer.config import ConfigError
from trainer.config.json_schema import json_schema
from trainer.plugin_kit.plugins_page import COMMAND, plugins_page

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

CONFIGS = sorted((ROOT / "train_configs").glob("*.toml"))


@pytest.fixture(scope="module", autouse=True)
def shipped_plugins():
    """Only those in plugins/, regardless of other installed or registered plugins."""
    registry.discover("plugins")
    with pytest.MonkeyPatch.context() as patch:
        for kind in registry.KINDS.values():
            own = {name: p for name, p in kind._plugins.items() if p.cls.__module__.startswith("plugins.")}
            patch.setattr(kind, "_plugins", own)
        yield


@pytest.fixture(scope="module")
def schema(shipped_plugins):
    made = json_schema()
    Draft7Validator.check_schema(made)
    return Draft7Validator(made)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_shipped_config_fits_the_schema(schema, path):
    assert not [e.message for e in schema.iter_errors(tomllib.loads(path.read_text()))]


def test_what_a_run_writes_fits_the_schema(schema, tmp_path):
    path = tmp_path / "toy.toml"
    path.write_text(toys.TOML)
    assert schema.is_valid(tomllib.loads(config.load(str(path)).to_toml()))


@pytest.mark.parametrize(
    ("key", "value", "fits"),
    [
        ("training.stepz", 3, False),
        ("training.steps", "3", False),
        ("training.steps", 0, False),
        ("training.precision", "fp8", False),
        ("trainig.steps", 3, False),
        ("recipe.name", "repaee", False),
        ("denoiser.align_deph", 1, False),
        ("denoiser.align_depth", "1", False),
        ("denoiser.size", "M", False),
        ("denoiser.size", "S", True),
        ("encoders.tiny_vit.checkpont", "x", False),
        ("encoders.second.checkpoint", "x", False),  # no such plugin, and no name
        ("encoders.second.name", "tiny_vit", True),
        ("encoders.tiny_vit.name", "dinov2", True),
        ("encoders.tiny_vit.size", "s", False),  # an option of dinov2 only
        ("losses.l1.weight", 1, True),
        ("losses.l1.weight", "1", False),
        ("losses.other", {"name": "l2", "weight": 0.5}, True),
        ("losses.other", {"name": "l2", "wieght": 0.5}, False),
        ("losses.l3", {}, False),
        ("optimizer.tokenizer.lr", 1e-4, True),
        ("optimizer.tokenizer.lrr", 1e-4, False),
        ("optimizer.tokeniser.lr", 1e-4, False),
        ("optimizer.lr", 0.0, False),
        ("optimizer.name", "muon", True),
        ("optimizer.name", "muonn", False),
        ("optimizer.momentum", 0.9, False),  # an option of muon only
        ("optimizer.denoiser", {"name": "muon", "momentum": 0.9}, True),
        ("optimizer.denoiser", {"name": "muon", "momentun": 0.9}, False),
        ("optimizer.points", [[0, 1.0], [9, 0.5]], True),
        ("plugins", "my.py", False),
    ],
)
def test_schema_and_trainer_agree(schema, key, value, fits):
    data = copy.deepcopy(tomllib.loads(toys.TOML))
    config.assign(data, key, value)
    assert schema.is_valid(data) == fits
    try:
        config.validate(data, "toy.toml")
        loads = True
    except ConfigError:
        loads = False
    assert loads == fits


def test_every_key_is_explained_and_has_its_default(schema):
    definitions = schema.schema["definitions"]
    steps = definitions["Training"]["properties"]["steps"]
    assert steps["default"] == 400_000 and "Optimizer steps" in steps["description"]
    for kind in registry.KINDS.values():
        for plugin in kind:
            keys = definitions[f"{plugin.kind}.{plugin.name}"]["properties"]
            common = {"weight"} if plugin.kind == "encoder" else set()  # added by the trainer for every encoder
            assert keys.keys() == {"name", *plugin.options} | common
            for name, option in plugin.options.items():
                assert keys[name]["description"] == option.doc
                assert option.default in (None, keys[name].get("default")) or option.required


def test_the_command_writes_the_schema_and_says_which_line_to_put(tmp_path, capsys):
    own = tmp_path / "mine.py"
    own.write_text(
        "from components.contracts import AlignmentLoss\nfrom components.registry import losses\n\n"
        "@losses.register('mine')\nclass Mine(AlignmentLoss):\n    '''Mine.'''\n\n"
        "    def __init__(self, *, weight: float = 1.0):\n        self.weight = weight\n"
    )
    out = tmp_path / "folder" / "schema.json"
    assert main(["plugins", "--schema", "--plugins", str(own), "--out", str(out)]) == 0
    assert "#:schema ./schema.json" in capsys.readouterr().out
    assert "loss.mine" in json.loads(out.read_text())["definitions"]
    registry.losses._plugins.pop("mine")
    assert main(["plugins", "--out", str(out)]) == 2
    assert "--schema or --docs" in capsys.readouterr().err


def test_the_page_of_plugins_is_current():
    page = ROOT / "docs" / "plugins.md"
    stale = not page.is_file() or page.read_text(encoding="utf-8") != plugins_page()
    assert not stale, f"docs/plugins.md is not what the plugins say; run: {COMMAND}"
