"""The architecture rules: which package may import which, and plugin imports stay light."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support import ROOT

PACKAGES = ("trainer", "components", "plugins")
MAY_IMPORT = {"trainer": {"trainer", "components"}, "components": {"components"}, "plugins": {"components"}}
FILES = [p for package in PACKAGES for p in sorted((ROOT / package).rglob("*.py"))]


def imported(path: Path) -> set[str]:
    """Return the dotted names of all imports in a file, including those inside functions."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_follow_the_table(path):
    package, *_ = parts = path.relative_to(ROOT).parts
    ours = {name for name in imported(path) if name.split(".")[0] in PACKAGES}
    outside = {name for name in ours if name.split(".")[0] not in MAY_IMPORT[package]}
    if package == "plugins":  # a plugin may derive from another of its kind
        kind = ".".join(path.relative_to(ROOT).parent.parts)
        outside = {name for name in outside if not name.startswith(f"{kind}.")}
    if path.name == "train_shapes_nets.py":  # a script that trains the networks of two plugins
        outside = {name for name in outside if not name.startswith("plugins.")}
    if package == "plugins" and len(parts) > 3:  # a plugin of several files
        outside = {name for name in outside if not name.startswith(".".join(parts[:-1]) + ".")}
    assert not outside, f"{path.relative_to(ROOT)} imports {sorted(outside)}"


def test_only_the_config_module_and_its_readers_know_the_config():
    for path in FILES:
        if path.relative_to(ROOT).parts[0] != "trainer":
            assert "trainer.config" not in path.read_text()


def test_no_branch_on_a_plugins_name():
    """A test like `config.recipe.name == "repae"` in the core needs an edit for every new plugin: ask the object."""
    from components import registry

    registry.discover("plugins")
    names = {plugin.name for kind in registry.KINDS.values() for plugin in kind}
    for path in FILES:
        if path.relative_to(ROOT).parts[0] == "plugins":
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Compare) and "name" in ast.unparse(node.left):
                constants = {c.value for c in ast.walk(node) if isinstance(c, ast.Constant)}
                assert not names & constants, f"{path.relative_to(ROOT)}:{node.lineno}: {ast.unparse(node)}"


MAY_ASK = {  # uses of getattr and hasattr on objects that are no plugins
    "components/checkpoint/state_tree.py": "torch: a dtype by name",
    "components/data/loader.py": "signal, on macOS",
    "components/data/prefetch.py": "torchdata's iterator; named tuples",
    "components/nn/timm_encoder.py": "timm's models",
    "components/registry.py": "annotations of options",
    "trainer/launch/settings.py": "os, on macOS",
    "trainer/run/pictures.py": "a wrapper passes on what it does not know",
    "trainer/run/terminal.py": "a log record",
    "trainer/models/importing.py": "options of a published checkpoint; a config table",
    "trainer/run/first_use.py": "reads every attribute that a base class declares, to check it; stands for a part",
}


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_no_plugin_is_asked_what_it_can_do(path):
    """Base classes declare what plugins may have, with defaults, so nothing is left to ask."""
    calls = [n for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Call)]
    asks = [n for n in calls if isinstance(n.func, ast.Name) and n.func.id in ("getattr", "hasattr")]
    place = str(path.relative_to(ROOT))
    assert not asks or place in MAY_ASK, f"{place}:{asks[0].lineno}: {ast.unparse(asks[0])}"
    assert asks or place not in MAY_ASK, f"{place} need not be in MAY_ASK"


def test_discovery_imports_no_heavy_library():
    code = (
        "import sys; from components import registry; registry.discover('plugins'); "
        "assert not registry.failures, registry.failures; "
        "print([m for m in ('timm', 'torchvision', 'torchmetrics', 'tensorboard') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.strip() == "[]"


def test_every_option_of_every_plugin_is_documented():
    from components import registry

    registry.discover("plugins")
    for kind in registry.KINDS.values():
        for plugin in kind:
            assert plugin.summary, f"{plugin.kind} {plugin.name} has no docstring"
            for option in plugin.options.values():
                assert option.doc, f"{plugin.kind} {plugin.name}: option {option.name} is not in its Args"


def test_help_comes_without_torch():
    code = (
        "import sys\nfrom trainer.__main__ import main\n"
        "try: main(['train', '--help'])\nfinally: assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "[training]" in done.stdout


MODULES = {".".join(p.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): p for p in FILES}


def needed() -> dict[str, set[str]]:
    """Return the modules that each module imports, including those inside functions and for annotations."""
    needs = {}
    for name, path in MODULES.items():
        found = {i if i in MODULES else i.rpartition(".")[0] for i in imported(path)}
        needs[name] = {other for other in found if other in MODULES and other != name}
    return needs


def test_matplotlib_is_imported_by_the_figures_only_when_they_are_drawn():
    users = {name for name, path in MODULES.items() if any(i.startswith("matplotlib") for i in imported(path))}
    assert users == {"trainer.compare.figures"}
    top = [n for n in ast.parse(MODULES["trainer.compare.figures"].read_text()).body if isinstance(n, ast.ImportFrom)]
    assert top and not any(node.module.startswith("matplotlib") for node in top)


def test_training_does_not_import_the_plugin_kit():
    needs, todo, found = needed(), ["trainer.commands.train"], set()
    while todo:
        found.add(name := todo.pop())
        todo += needs[name] - found
    assert "trainer.run.loop" in found
    assert not [name for name in found if name.startswith("trainer.plugin_kit")]


@pytest.mark.parametrize(
    ("command", "unused"),
    [
        ("plugins", "torch numpy timm"),
        ("check train_configs/quickstart.toml", "timm torchvision tensorboard torchdata torch.distributed.checkpoint"),
    ],
)
def test_a_command_imports_no_library_that_it_does_not_use(command, unused):
    code = (
        f"import sys\nfrom trainer.__main__ import main\nassert main({command.split()}) == 0\n"
        f"print([name for name in {unused.split()} if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "[]"


def test_a_training_run_imports_only_what_it_uses():
    code = (
        "import sys\nimport trainer.commands.train\nfrom trainer import config\n"
        "loaded = config.load('train_configs/quickstart.toml', ['--evaluation.every=0', '--training.resolution=32'])\n"
        "from components.distributed.parallel import World\nfrom trainer.run.loop import Trainer\n"
        "Trainer(loaded, World())\nprint(*sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = [name for name in done.stdout.splitlines()[-1].split() if name in MODULES]
    unused = ("components.evaluation", "trainer.evaluation", "trainer.estimate", "trainer.plugin_kit", "trainer.models")
    unused += ("trainer.compare",)
    assert [name for name in found if name.startswith(unused)] == []
    libraries = ("timm", "torchvision", "torchmetrics", "tensorboard", "torchdata", "torch_fidelity", "PIL")
    assert [name for name in libraries if name in done.stdout.splitlines()[-1].split()] == []
    named = {"recipes.repae", "tokenizers.autoencoder_kl", "tokenizers.autoencoder_kl.diffusers_format"}
    named |= {"denoisers.sit", "encoders.tiny_vit", "datasets.shapes", "optimizers.adamw"}
    named |= {f"losses.{name}" for name in ("cosine", "patchgan", "reconstruction")}
    plugins = {name.removeprefix("plugins.") for name in found if name.count(".") > 1 and name.startswith("plugins.")}
    assert plugins == named


def test_no_circle_of_imports():
    needs = needed()
    while free := {name for name, others in needs.items() if not others}:
        needs = {name: others - free for name, others in needs.items() if name not in free}
    assert not needs, f"among these modules: {sorted(needs)}"


@pytest.mark.parametrize("package", ["components", "trainer"])
def test_the_core_is_arranged_in_rooms(package):
    files = [p.name for p in (ROOT / package).iterdir() if p.is_file() and p.name != "__init__.py"]
    assert len(files) <= 5, f"{files}: which subject does each belong to?"
