"""Listing plugins: what the source tells is what an import tells, and what it does not tell is imported."""

import subprocess
import sys

import pytest

from components import registry
from components.plugin_list import Listed, Sources, Unclear, list_plugins, plugins_in
from components.registry import PluginError
from tests.support import ROOT

HEAD = "from components import registry\nfrom components.contracts import Encoder, ReconstructionLoss\n\n"
LOSS = "@registry.losses.register({name})\nclass {cls}(ReconstructionLoss):\n    '''A loss.'''\n"
GOOD = HEAD + LOSS.format(name='"good"', cls="Good")


@pytest.fixture
def package(tmp_path, monkeypatch, request, restored):
    """Write modules of a new package; returns its name."""
    monkeypatch.syspath_prepend(tmp_path)
    name = f"lab_{abs(hash(request.node.name))}"
    folder = tmp_path / name
    folder.mkdir()

    def make(**modules):
        for module, text in {"__init__": "", **modules}.items():
            (folder / f"{module}.py").write_text(text)
        return name

    return make


@pytest.fixture
def restored():
    """Remove the plugins that a test registers."""
    before = {kind: r.imported() for kind, r in registry.KINDS.items()}
    for r in registry.KINDS.values():
        r._plugins.clear()
    yield
    for kind, r in registry.KINDS.items():
        r._plugins.clear()
        r._plugins.update(before[kind])
    registry.failures.clear()


def test_the_source_of_every_shipped_plugin_tells_what_its_import_tells():
    registry.discover("plugins", lazy=True)
    sources = Sources("plugins")
    told = [plugin for module in registry.pending() for plugin in plugins_in(sources.read(module))]
    registry.discover("plugins")
    shipped = [p for r in registry.KINDS.values() for p in r if p.cls.__module__.startswith("plugins.")]
    assert len(told) > 30

    def key(plugin):
        return plugin.kind, plugin.name

    assert sorted(told, key=key) == sorted(map(Listed.of, shipped), key=key)


def test_listing_comes_without_torch_even_with_options_of_a_base_class():
    code = (
        "import sys\nfrom trainer.__main__ import main\nmain(['plugins'])\n"
        "from components import registry\nassert registry.pending() and not registry.failures\n"
        "assert not {'torch', 'numpy', 'timm'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines = [line.strip() for line in done.stdout.splitlines()]
    # The options of MeanFlow's denoiser are those of SiT, from which it derives.
    inherited = next(line for line in lines if "plugins/denoisers/meanflow_sit.py:" in line)
    assert inherited.startswith("options: size, ")


@pytest.mark.parametrize(
    "text",
    [
        GOOD.replace("import registry", "import registry\nimport does_not_exist"),
        GOOD.replace("import Encoder,", "import Encoder, does_not_exist,"),
        "from components.does_not import exist\n" + GOOD,
        "1 / 0\n" + GOOD,
        "def f(:\n" + GOOD,
    ],
    ids=["package", "name", "module", "error", "syntax"],
)
def test_a_module_that_cannot_be_imported_is_reported(package, text):
    assert [p.name for p in list_plugins(package(bad=text, good=GOOD.replace("good", "other")))] == ["other"]
    assert [f.where.split(".")[1] for f in registry.failures] == ["bad"]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (GOOD.replace("(ReconstructionLoss)", ""), "must derive from"),
        (GOOD + "    def __init__(self, *, a=1, **more): ...\n", r"takes \*\*more"),
        (GOOD + "    def __init__(self, a): ...\n", r"__init__ takes \(a\)"),
    ],
    ids=["base", "kwargs", "given"],
)
def test_a_class_that_cannot_be_registered_is_refused(package, text, says):
    with pytest.raises(PluginError, match=says):
        list_plugins(package(bad=text))


def test_what_the_source_does_not_tell_is_imported(package):
    hidden = HEAD + LOSS.format(name='"".join("hidden")', cls="Hidden")
    inherited = HEAD + LOSS.format(name='"bare"', cls="Bare").replace("    '''A loss.'''\n", "    pass\n")
    name = package(plain=GOOD, hidden=hidden, inherited=inherited)
    assert [p.name for p in list_plugins(name)] == ["bare", "good", "hidden"]
    assert registry.pending() == [name, f"{name}.plain"]


def test_two_plugins_of_a_name_are_refused(package):
    with pytest.raises(PluginError, match="two loss plugins are called 'good'"):
        list_plugins(package(one=GOOD, two=GOOD))


def test_a_name_that_a_file_of_the_users_takes_as_well_is_refused(package, tmp_path):
    (tmp_path / "mine.py").write_text(GOOD)
    with pytest.raises(PluginError, match="two loss plugins are called 'good'"):
        list_plugins(package(one=GOOD), [str(tmp_path / "mine.py")])


def test_a_module_elsewhere_has_no_source_to_read():
    with pytest.raises(Unclear):
        Sources("plugins").read("plugins.does_not_exist")
