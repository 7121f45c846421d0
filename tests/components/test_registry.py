"""The registry: schemas from signatures, duplicates, discovery and broken plugins."""

import importlib
import sys
import textwrap

import pytest
from pydantic import ValidationError

from components import registry
from components.contracts import Encoder, ReconstructionLoss
from components.registry import PluginError, Registry
from trainer import config
from trainer.__main__ import main
from trainer.caching import cached


@pytest.fixture(autouse=True)
def restored():
    """Remove the plugins that a test registers."""
    registry.discover("plugins")
    before = {kind: dict(r._plugins) for kind, r in registry.KINDS.items()}
    yield
    for kind, r in registry.KINDS.items():
        r._plugins.clear()
        r._plugins.update(before[kind])
    registry.failures.clear()


def write(path, text):
    path.write_text(textwrap.dedent(text))
    return str(path)


def test_signature_is_the_schema():
    kind = Registry("thing")

    @kind.register("a")
    class A:
        """One line.

        Args:
            number: how many,
                in pieces.
            name: what to call it.
        """

        def __init__(self, given, *, number: int, name: str = "x"):
            pass

    plugin = kind.get("a")
    assert plugin.summary == "One line."
    assert list(plugin.options) == ["number", "name"]
    assert plugin.options["number"].required and plugin.options["number"].doc == "how many, in pieces."
    assert plugin.schema().model_validate({"number": 3}).model_dump() == {"number": 3, "name": "x"}
    for bad in ({}, {"number": "3"}, {"number": 3, "nam": "y"}, {"given": 1, "number": 3}):
        with pytest.raises(ValidationError):
            plugin.schema().model_validate(bad)


def test_files_are_declared_and_found_beside_the_toml(tmp_path):
    write(tmp_path / "words.txt", "")
    write(
        tmp_path / "talk.py",
        """
        from components import registry
        from components.contracts import Encoder, ReconstructionLoss
        from components.registry import File

        @registry.encoders.register("talk")
        class Talk(Encoder):
            '''Talk.

            Args:
                vocabulary: words.
                grammar: rules.
                some_path: not a file.
            '''

            def __init__(self, resolution, grid, *, vocabulary: File, grammar: File | None = None, some_path: str = ""):
                pass
        """,
    )
    tables = {"tokenizer": {"name": "identity"}, "recipe": {"name": "ldm"}, "dataset": {"name": "shapes"}}
    options = {"vocabulary": "words.txt", "some_path": "words.txt"}
    data = {"plugins": ["talk.py"], **tables, "encoders": {"talk": options}}
    found = config.validate(data, str(tmp_path / "run.toml")).encoders["talk"].options
    assert found == {"vocabulary": str(tmp_path / "words.txt"), "some_path": "words.txt"}
    plugin = registry.encoders.get("talk")
    assert plugin.files == ["vocabulary", "grammar"]
    assert [option.type_name for option in plugin.options.values()] == ["file", "file | none", "str"]
    kept = cached.describe("encoder", config.PluginTable(name="talk", **options))["options"]
    assert kept == {"some_path": "words.txt"}
    options["vocabulary"] = 3
    with pytest.raises(config.ConfigError, match=r"encoders\.talk\.vocabulary = 3: expected file"):
        config.validate(data, str(tmp_path / "run.toml"))


def test_duplicate_names_name_both_files(tmp_path):
    source = """
        from components import contracts, registry

        @registry.losses.register("twice")
        class Twice(contracts.ReconstructionLoss):
            '''Twice.'''
    """
    first, second = write(tmp_path / "one.py", source), write(tmp_path / "two.py", source)
    with pytest.raises(PluginError) as error:
        registry.discover("plugins", [first, second])
    assert "'twice'" in str(error.value) and "one.py:4" in str(error.value) and "two.py:4" in str(error.value)


def test_the_same_file_named_twice_is_no_duplicate(tmp_path):
    path = write(
        tmp_path / "once.py",
        """
        from components import contracts, registry

        @registry.losses.register("once")
        class Once(contracts.ReconstructionLoss):
            '''Once.'''
        """,
    )
    registry.discover("plugins", [path, path])
    assert registry.losses.get("once").where.endswith("once.py:4")


def test_kwargs_are_refused():
    with pytest.raises(PluginError, match=r"\*\*options"):

        @registry.losses.register("loose")
        class Loose(ReconstructionLoss):
            def __init__(self, **options):
                pass


def test_other_constructor_arguments_than_those_of_the_kind_are_refused():
    with pytest.raises(PluginError, match=r"with \(resolution, grid\), but __init__ takes \(resolution\)"):

        @registry.encoders.register("gridless")
        class Gridless(Encoder):
            def __init__(self, resolution: int, *, grid: int = 4) -> None:
                super().__init__()


def test_a_plugin_derives_from_the_base_of_its_kind():
    with pytest.raises(PluginError, match=r"encoder 'bare' .*: Bare must derive from components.contracts.Encoder"):

        @registry.encoders.register("bare")
        class Bare:
            pass

    assert "bare" not in registry.encoders.names()


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ("import does_not_exist\n", ["ModuleNotFoundError", "does_not_exist", "broken.py:1"]),
        ("x = 1\ndef f(:\n", ["SyntaxError", "broken.py:2"]),
        ("x = 1\n\n1 / 0\n", ["ZeroDivisionError", "broken.py:3"]),
    ],
)
def test_a_plugin_that_cannot_be_imported_names_file_and_line(tmp_path, source, says):
    with pytest.raises(PluginError) as error:
        registry.discover("plugins", [write(tmp_path / "broken.py", source)])
    for text in says:
        assert text in str(error.value)


def test_a_broken_file_in_plugins_spares_the_others_and_is_named_when_missed(tmp_path, monkeypatch):
    package = tmp_path / "lab_plugins"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "bad.py").write_text("import does_not_exist\n")
    monkeypatch.syspath_prepend(tmp_path)
    registry.discover("lab_plugins")
    assert [f.where for f in registry.failures] == ["lab_plugins.bad"]
    with pytest.raises(PluginError, match=r"lab_plugins\.bad: ModuleNotFoundError"):
        registry.encoders.get("mine")


def test_lazily_only_what_is_asked_for_is_imported(tmp_path, monkeypatch):
    package = tmp_path / "lazy_plugins"
    (package / "inner").mkdir(parents=True)
    for name in ("", "inner/"):
        (package / f"{name}__init__.py").write_text("")
    text = (
        "from components import registry\nfrom components.contracts import ReconstructionLoss\n\n"
        "@registry.losses.register({})\nclass Loss(ReconstructionLoss):\n    '''Loss.'''\n"
    )
    (package / "one.py").write_text(text.format('"one"'))
    (package / "inner" / "two.py").write_text(text.format('"two"'))
    (package / "again.py").write_text(text.format('"two"'))
    (package / "hidden.py").write_text(text.format('"".join("hidden")'))
    (package / "bad.py").write_text("import does_not_exist\n")
    monkeypatch.syspath_prepend(tmp_path)
    registry.discover("lazy_plugins", lazy=True)

    def imported():
        return sorted(name for name in sys.modules if name.startswith("lazy_plugins."))

    assert not imported() and not registry.failures
    assert registry.losses.get("one").cls.__module__ == "lazy_plugins.one"
    assert imported() == ["lazy_plugins.one"]
    with pytest.raises(PluginError, match="two loss plugins are called 'two'"):
        registry.losses.get("two")
    # A name that no decorator states is found by importing everything, as is every plugin of a list.
    assert registry.losses.get("hidden").cls.__module__ == "lazy_plugins.hidden"
    assert {"lazy_plugins.again", "lazy_plugins.inner.two"} & set(imported())
    with pytest.raises(PluginError, match=r"(?s)did you mean 'one'.*lazy_plugins\.bad: ModuleNotFoundError"):
        registry.losses.get("onee")
    assert {"one", "two", "hidden"} <= set(registry.losses.names())


def test_entry_points_of_installed_packages(tmp_path, monkeypatch):
    (tmp_path / "third_party.py").write_text(
        "from components import contracts, registry\n\n@registry.losses.register('third')\n"
        "class Third(contracts.ReconstructionLoss):\n    '''Third.'''\n"
    )
    info = tmp_path / "third_party-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: third-party\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[titanrepa.plugins]\nthird = third_party\n")
    monkeypatch.syspath_prepend(tmp_path)
    importlib.invalidate_caches()
    registry.discover("plugins")
    assert registry.losses.get("third").summary == "Third."


def test_plugins_command_lists_everything(capsys):
    assert main(["plugins"]) == 0
    listed = capsys.readouterr().out
    for kind in registry.KINDS.values():
        for plugin in kind:
            assert plugin.name in listed and plugin.summary in listed

    assert main(["plugins", "denoiser", "sit"]) == 0
    shown = capsys.readouterr().out
    for text in (
        "'S' | 'B' | 'L' | 'XL'",
        "default 'XL'",
        "plugins/denoisers/sit.py:",
        "align_depth: int | list[int], default 8",
    ):
        assert text in shown

    assert main(["plugins", "denoiser", "sitt"]) == 2
    assert "did you mean 'sit'" in capsys.readouterr().err
