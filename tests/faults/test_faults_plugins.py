"""Plugins and commands that a run or model folder names run only if the user trusts them, in every command."""

import json
import shutil
from pathlib import Path

import pytest
import tomli_w

from components import registry
from components.files import manifest
from tests.faults.test_faults_foreign_code import payloads, rewritten
from tests.support import toys
from trainer import config
from trainer.__main__ import main
from trainer.config import trust
from trainer.config.load import tomllib

SPEED = ["--training.steps=1", "--training.threads=1", "--training.batch_size=2", "--sampling.images=2"]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A run, the model folder exported from it, and a folder of samples, all without plugins."""
    folder = tmp_path_factory.mktemp("made")
    (folder / "toy.toml").write_text(toys.TOML)
    assert main(["train", str(folder / "toy.toml"), f"--run.dir={folder / 'run'}", *SPEED]) == 0
    run, model, samples = (str(folder / name) for name in ("run", "model", "samples"))
    assert main(["export", run, "--format=safetensors", f"--out={model}"]) == 0
    assert main(["sample", run, "--num-samples=2", "--steps=1", f"--out={samples}"]) == 0
    return folder


@pytest.fixture
def here(made, tmp_path, monkeypatch):
    """A copy of them in the current folder, which is importable, too."""
    shutil.copytree(made, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


@pytest.fixture
def evil(here):
    """Source of a plugin that leaves a mark when it runs; every test must say whether it did."""
    return f"from pathlib import Path\nPath({str(here / 'code_ran')!r}).touch()\n"


def ran(here: Path) -> bool:
    found = (here / "code_ran").exists()
    (here / "code_ran").unlink(missing_ok=True)
    return found


def name_plugin(here: Path, name: str) -> None:
    """Let run, checkpoint and model folder name a plugin, and the samples name that run."""
    line = f"plugins = [{name!r}]\n"
    for folder in ("run", "model"):
        file = here / folder / "config.toml"
        file.write_text(line + file.read_text().replace("plugins = []\n", ""))
    checkpoint = next((here / "run" / "checkpoints").iterdir())
    meta = json.loads((checkpoint / "meta.json").read_text())
    meta["config"] = line + meta["config"].replace("plugins = []\n", "")
    rewritten(checkpoint, "meta.json", json.dumps(meta).encode())
    settings = json.loads((here / "samples" / "samples.json").read_text())
    (here / "samples" / "samples.json").write_text(json.dumps(settings | {"run": str(here / "run")}))


PLACES = {
    "beside": ("model/evil.py", "evil.py"),
    "in the current folder": ("evil.py", "evil.py"),
    "in a folder below": ("model/sub/evil.py", "sub/evil.py"),
    "above": ("evil.py", "../evil.py"),
    "absolute": ("elsewhere/evil.py", "{here}/elsewhere/evil.py"),
    "module": ("evil_of_strangers.py", "evil_of_strangers"),
    "package": ("strangers/evil.py", "strangers.evil"),
    "module that is installed": ("unused.py", "antigravity"),
}
COMMANDS = {
    "sample": ["sample", "model", "--num-samples=2", "--steps=1", "--out=out"],
    "sample a run": ["sample", "run", "--num-samples=2", "--steps=1", "--out=out"],
    "sample a checkpoint": ["sample", "run/checkpoints/step_00000001", "--num-samples=2", "--steps=1", "--out=out"],
    "guide": ["sample", "sound", "--guide=model", "--num-samples=2", "--steps=1", "--guidance=2", "--out=out"],
    "encode": ["encode", "model", "--out=out", "--batch-size=2"],
    "encode its config": ["encode", "model/config.toml", "--out=out"],
    "export": ["export", "run", "--format=safetensors", "--out=out"],
    "export diffusers": ["export", "model", "--format=diffusers", "--out=out"],
    "import": ["import", "model/tokenizer.safetensors", "--config=model/config.toml", "--out=out"],
    "evaluate": ["evaluate", "samples", "--reference=dataset"],
    "evaluate --config": ["evaluate", "samples", "--reference=dataset", "--config=model"],
    "evaluate --config=TOML": ["evaluate", "samples", "--reference=dataset", "--config=run/config.toml"],
    "reconstruction": ["evaluate", "model", "--reconstruction", "--metrics=psnr"],
    "train": ["train", "run/config.toml"],
    "check": ["check", "model/config.toml"],
    "benchmark": ["benchmark", "run/config.toml"],
}


def put(here: Path, place: str, source: str) -> None:
    file, name = PLACES[place]
    (here / file).parent.mkdir(exist_ok=True)
    (here / file).write_text(source)
    name_plugin(here, name.format(here=here))


@pytest.mark.parametrize("place", PLACES)
def test_a_plugin_named_by_a_folder_does_not_run(here, evil, capsys, place):
    put(here, place, evil)
    assert main(COMMANDS["sample"]) == 2
    said = capsys.readouterr().err.strip()
    assert "--trust-plugins" in said and PLACES[place][1].split("/")[-1] in said and "\n" not in said
    assert not ran(here) and not (here / "out").exists()


@pytest.mark.parametrize("command", COMMANDS)
def test_no_command_runs_it(here, evil, capsys, command):
    shutil.copytree(here / "model", here / "sound")
    put(here, "in the current folder", evil)
    assert main(COMMANDS[command]) == 2
    said = capsys.readouterr().err
    assert f"names the file {here / 'evil.py'} as a plugin" in said and "--trust-plugins" in said
    assert not ran(here) and not (here / "out" / "samples.json").exists()


def name_command(here: Path, command: str, heldout: bool = False) -> None:
    """Let run, checkpoint and model folder name a command whose output their dataset reads."""
    table = f'[dataset]\nname = "webdataset"\npath = "x.tar::pipe:{command}"\n'
    if heldout:
        table = '[dataset]\nname = "webdataset"\npath = "x.tar"\n'

    def changed(text: str) -> str:
        data = tomllib.loads(text)
        data["dataset"] = tomllib.loads(table)["dataset"]
        if heldout:
            data["evaluation"]["heldout"] = {"path": f"pipe:{command}", "classes": "pipe:true"}
        return tomli_w.dumps(data)

    for folder in ("run", "model"):
        file = here / folder / "config.toml"
        file.write_text(changed(file.read_text()))
    checkpoint = next((here / "run" / "checkpoints").iterdir())
    meta = json.loads((checkpoint / "meta.json").read_text())
    meta["config"] = changed(meta["config"])
    rewritten(checkpoint, "meta.json", json.dumps(meta).encode())
    settings = json.loads((here / "samples" / "samples.json").read_text())
    (here / "samples" / "samples.json").write_text(json.dumps(settings | {"run": str(here / "run")}))


@pytest.mark.parametrize("command", COMMANDS)
def test_no_command_runs_a_pipe_of_a_folder(here, capsys, command):
    shutil.copytree(here / "model", here / "sound")
    name_command(here, f"touch {here}/code_ran")
    assert main(COMMANDS[command]) == 2
    said = capsys.readouterr().err
    assert f"dataset.path runs the command 'pipe:touch {here}/code_ran'" in said and "--trust-plugins" in said
    assert not ran(here) and not (here / "out" / "samples.json").exists()


def test_a_pipe_of_heldout_images_does_not_run(here, capsys):
    name_command(here, f"touch {here}/code_ran", heldout=True)
    trust.remember([], ["pipe:true"])  # the other command that it names
    assert main(COMMANDS["evaluate --config"]) == 2
    assert "evaluation.heldout.path runs the command 'pipe:touch" in capsys.readouterr().err and not ran(here)


def test_a_trusted_pipe_runs_and_is_remembered_by_its_text(here, capsys, monkeypatch):
    monkeypatch.setattr("components.data.remote.DELAYS_S", ())
    (here / "x.tar").write_bytes(bytes(10240))  # a tar without members
    name_command(here, f"touch {here}/code_ran")
    evaluate = COMMANDS["reconstruction"]
    for words in ([*evaluate, "--trust-plugins"], evaluate):  # the second time from memory
        assert main(words) == 2 and ran(here), capsys.readouterr().err
        assert "no complete tar" in capsys.readouterr().err
    name_command(here, f"touch {here}/code_ran #")
    assert main(evaluate) == 2 and not ran(here)
    assert main([*evaluate, "--plugins=[]"]) == 2 and not ran(here)  # trusts plugins, not commands
    assert main([*evaluate, f"--dataset.path=pipe:touch {here}/code_ran; #"]) == 2 and ran(here)
    capsys.readouterr()


EXPORT = ["export", "model", "--format=safetensors", "--parts=tokenizer", "--out=out"]


def forget() -> None:
    """Python has imported the file; the next command of a test stands for a new process."""
    import sys

    for name in [name for name in sys.modules if name.startswith(("titanrepa_plugin_evil", "evil_of"))]:
        del sys.modules[name]


@pytest.mark.parametrize(
    "consent",
    [["--trust-plugins"], ['--plugins=["evil.py"]'], ["--trust-plugins", '--plugins=["evil.py"]']],
    ids=["--trust-plugins", "--plugins", "both"],
)
def test_with_consent_it_runs_and_is_remembered_by_path_and_content(here, evil, capsys, consent):
    put(here, "in the current folder", evil)
    assert main([*EXPORT, *consent]) == 0
    assert ran(here)
    forget()
    assert main(EXPORT) == 0  # the same file again
    assert ran(here)
    forget()
    (here / "evil.py").write_text(evil + "# changed\n")
    assert main(EXPORT) == 2
    assert "--trust-plugins" in capsys.readouterr().err and not ran(here)
    (here / "model" / "other.py").write_text(evil)  # the same content elsewhere
    name_plugin(here, "other.py")
    assert main(EXPORT) == 2 and not ran(here)
    forget()


@pytest.mark.long
def test_what_the_user_trained_with_needs_no_consent(here, evil, capsys):
    """The usual case: a run of one's own, with one's own plugin."""
    (here / "evil.py").write_text(evil)
    (here / "own.toml").write_text('plugins = ["evil.py"]\n' + toys.TOML)
    assert main(["train", "own.toml", *SPEED]) == 0 and ran(here)
    forget()
    assert main(["export", "outputs/own", "--format=safetensors", "--out=out"]) == 0 and ran(here)
    forget()
    shutil.rmtree(trust.state_folder())
    assert main(["export", "outputs/own", "--format=safetensors", "--out=out"]) == 2 and not ran(here)
    capsys.readouterr()


def test_consent_ends_with_the_command(here, evil, capsys):
    put(here, "module", evil)
    assert main([*EXPORT, "--trust-plugins"]) == 0 and ran(here)
    forget()
    assert main(EXPORT) == 2 and not ran(here)  # modules are not remembered


def test_where_nothing_can_be_remembered_consent_still_works(here, evil, monkeypatch, capsys):
    put(here, "in the current folder", evil)
    (here / "file").write_text("")
    monkeypatch.setenv("XDG_STATE_HOME", str(here / "file"))
    assert main([*EXPORT, "--trust-plugins"]) == 0 and ran(here)
    forget()
    assert main(EXPORT) == 2 and not ran(here)


def test_entry_points_of_installed_packages_are_trusted(monkeypatch):
    from importlib.metadata import EntryPoint

    entry = EntryPoint("lab", "json", registry.ENTRY_POINT_GROUP)
    monkeypatch.setattr("importlib.metadata.entry_points", lambda group: [entry])
    assert trust.refused(["json", "json.decoder"]) is None
    assert trust.refused(["json", "jsonx"]) == "the module 'jsonx'"
    assert trust.refused(["json.py"]) is not None


def test_a_config_without_plugins_needs_no_consent(made):
    text = (made / "run" / "config.toml").read_text()
    assert config.loads(text, str(made / "run" / "config.toml")).plugins == []


@pytest.mark.parametrize(
    "command", [COMMANDS[name] for name in ("sample a run", "encode", "export")] + [["train", "toy.toml"]], ids=" ".join
)
def test_no_command_runs_code_of_a_checkpoint(here, capsys, command):
    checkpoint = next((here / "run" / "checkpoints").iterdir())
    import pickle

    rewritten(checkpoint, ".metadata", pickle.dumps(payloads(here / "code_ran")["posix.system"]))
    assert manifest.problem(checkpoint) is None
    words = [word.replace("model", "run") for word in command]
    if command[0] == "train":
        words += [f"--run.dir={here / 'run'}", *SPEED, "--training.steps=2"]
    assert main(words) == 2
    said = capsys.readouterr().err
    assert "is refused: its .metadata pickles posix.system" in said and not ran(here)


def test_a_guide_whose_checkpoint_pickles_code(here, capsys):
    import pickle

    checkpoint = next((here / "run" / "checkpoints").iterdir())
    rewritten(checkpoint, ".metadata", pickle.dumps(payloads(here / "code_ran")["builtins.exec"]))
    words = ["sample", "model", "--guide=run", "--guidance=2", "--num-samples=2", "--steps=1", "--out=out"]
    assert main(words) == 2
    assert "is refused: its .metadata pickles builtins.exec" in capsys.readouterr().err and not ran(here)
