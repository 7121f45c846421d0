"""Faults in the identity of data: other classes, other samples, other orders; and folders that cannot be written."""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch

from components.checkpoint import CheckpointManager
from components.diffusion.random_numbers import generator
from components.distributed.parallel import World
from components.evaluation.inception_score import InceptionScore, content_keys
from tests.support import toys
from trainer import config
from trainer.__main__ import main
from trainer.models.sample_folder import labels_of
from trainer.models.source import open_source
from trainer.run import assemble
from trainer.run.loop import Trainer

RECIPE = ["--recipe.name=ldm", "--training.steps=2", "--run.checkpoint_every=0", "--sampling.images=6"]


def image_folder(path: Path, counts: dict[str, int]) -> Path:
    """Write noise images, ``counts`` by class."""
    for name, count in counts.items():
        (path / name).mkdir(parents=True, exist_ok=True)
        for i in range(count):
            seed = generator("image", name, i)
            pixels = torch.randint(256, (32, 32, 3), generator=seed, dtype=torch.uint8)
            PIL.Image.fromarray(pixels.numpy()).save(path / name / f"{i}.png")
    return path


def train(folder: Path, data: Path, *words: str, name: str = "run") -> int:
    toml = folder / "toy.toml"
    if not toml.exists():
        toml.write_text(toys.TOML.replace('name = "shapes"\nsize = 40', f'name = "image_folder"\npath = "{data}"'))
    return main(["train", str(toml), f"--run.dir={folder / name}", *RECIPE, *words])


def content(folder: Path) -> dict[str, str]:
    """Hash of every file of a folder."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """Folder with data/ of three classes and run/ trained on them; read-only."""
    folder = tmp_path_factory.mktemp("identity")
    image_folder(folder / "data", {"a": 6, "b": 2, "c": 4})
    assert train(folder, folder / "data") == 0
    return folder


@pytest.fixture
def own(trained, tmp_path) -> Path:
    """Copy of ``trained`` that a test may change; its dataset path is that of the copy."""
    folder = tmp_path / "own"
    shutil.copytree(trained, folder)
    (folder / "toy.toml").write_text((trained / "toy.toml").read_text().replace(str(trained), str(folder)))
    return folder


def test_a_wrapper_folder_is_not_a_class(tmp_path, capsys):
    data = image_folder(tmp_path / "data" / "wrapper", {"a": 2, "b": 2, "c": 2}).parent
    assert train(tmp_path, data, "--training.num_classes=1000") == 2
    message = capsys.readouterr().err
    assert "1 class found (0 'wrapper'), 1000 expected" in message and "dataset.path one level too high" in message
    assert not (tmp_path / "run").exists()
    assert train(tmp_path, data / "wrapper", "--training.num_classes=4", "--dataset.path=" + str(data / "wrapper")) == 2
    assert "3 classes found" in capsys.readouterr().err


def test_fewer_classes_need_a_word_of_consent_and_are_never_sampled(tmp_path):
    data = image_folder(tmp_path / "data", {"a": 4, "b": 4})
    assert train(tmp_path, data, "--training.num_classes=5", "--training.allow_fewer_classes=true") == 0
    assert main(["sample", str(tmp_path / "run"), "--num-samples=3", f"--out={tmp_path / 'out'}", "--no-npz"]) == 0
    settings = json.loads((tmp_path / "out" / "samples.json").read_text())
    assert settings["num_classes"] == 5 and settings["classes_left_out"] == [2, 3, 4]


def test_a_single_class_is_said(tmp_path, caplog):
    with caplog.at_level("INFO", logger="titanrepa"):
        assert train(tmp_path, image_folder(tmp_path / "data", {"train": 8})) == 0
    assert "the dataset has 1 class, 'train': every label is 0" in (tmp_path / "run" / "log.txt").read_text()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda data: shutil.rmtree(data / "a"), "3 classes -> 2; missing: 'a' (index 0)"),
        (lambda data: image_folder(data, {"aa": 3}), "3 classes -> 4; new: 'aa' (index 1)"),
        (lambda data: (data / "b").rename(data / "z"), "missing: 'b' (index 1); new: 'z' (index 2)"),
    ],
)
def test_a_resume_with_other_classes_is_refused_and_changes_nothing(own, capsys, change, message):
    change(own / "data")
    before = content(own / "run")
    assert train(own, own / "data", "--training.steps=3") == 2
    said = capsys.readouterr().err
    assert message in said and "choose another run.dir" in said and len(said.strip().splitlines()[-1]) < 600
    assert content(own / "run") == before


def test_renamed_classes_are_accepted_once(own, capsys):
    (own / "data" / "b").rename(own / "data" / "bee")
    assert train(own, own / "data", "--training.steps=3") == 2
    assert train(own, own / "data", "--training.steps=3", "--accept-classes") == 0
    assert train(own, own / "data", "--training.steps=4") == 0


def test_more_images_of_the_same_classes_are_said(own):
    image_folder(own / "data", {"b": 5})
    assert train(own, own / "data", "--training.steps=3") == 0
    assert "images per class changed since that checkpoint" in (own / "run" / "log.txt").read_text()


def test_a_checkpoint_without_classes_resumes_and_samples(own, monkeypatch, capsys):
    """As older versions wrote it."""
    state = Trainer.state
    monkeypatch.setattr(Trainer, "state", lambda self: {k: v for k, v in state(self).items() if k != "classes"})
    load = CheckpointManager.load
    monkeypatch.setattr("trainer.run.checkpoints.Checkpoints.load", _load_of_old(load))
    assert train(own, own / "data", name="old") == 0
    monkeypatch.undo()
    assert train(own, own / "data", "--training.steps=3", name="old") == 0
    shutil.rmtree(own / "old" / "checkpoints" / "step_00000003")
    loaded = open_source(str(own / "old"), World())
    assert loaded.classes.names == ()
    capsys.readouterr()
    words = ["sample", str(own / "old"), "--num-samples=2", "--no-npz"]
    assert main([*words, "--labels=b", f"--out={own / 'named'}"]) == 0
    assert json.loads((own / "named" / "samples.json").read_text())["labels"] == [1]
    shutil.rmtree(own / "data")
    assert main([*words, "--labels=b", f"--out={own / 'lost'}"]) == 2
    assert "does not record its classes, and its dataset is not available" in capsys.readouterr().err
    assert main([*words, "--labels=1", f"--out={own / 'index'}"]) == 0


def _load_of_old(load):
    def old(self, path):
        template = self.state()
        del template["version"]
        return load(self.manager, path, template) | {"version": ""}

    return old


@pytest.mark.parametrize("recipe", ["tokenizer", "repa"])
def test_a_refused_resume_changes_nothing(own, capsys, recipe):
    """It used to replace config.toml before the checkpoint was compared."""
    before = content(own / "run")
    assert train(own, own / "data", f"--recipe.name={recipe}", "--denoiser.width=64") == 2
    assert "does not match this run" in capsys.readouterr().err
    assert content(own / "run") == before


def test_a_guide_of_other_classes_is_refused(trained, tmp_path, capsys):
    data = image_folder(tmp_path / "data", {"a": 4, "c": 4, "d": 4})
    assert train(tmp_path, data) == 0
    guided = ["sample", str(trained / "run"), f"--guide={tmp_path / 'run'}", f"--out={tmp_path / 'out'}"]
    assert main(guided) == 2
    assert "--guide=" in (message := capsys.readouterr().err) and "missing: 'b' (index 1)" in message
    assert not (tmp_path / "out").exists()


def test_samples_of_a_model_with_other_classes_are_not_mixed(trained, tmp_path, capsys):
    out = tmp_path / "out"
    words = ["sample", str(trained / "run"), "--num-samples=2", "--no-npz", f"--out={out}"]
    assert main(words) == 0
    settings = json.loads((out / "samples.json").read_text())
    assert settings["classes"] == {"0": "a", "1": "b", "2": "c"}
    (out / "samples.json").write_text(json.dumps(settings | {"classes": {"0": "a", "1": "c", "2": "b"}}))
    assert main(words) == 2
    assert "other classes (folder -> now): index 1: 'c' -> 'b'" in capsys.readouterr().err
    del settings["classes"]  # as older versions wrote it
    (out / "samples.json").write_text(json.dumps(settings))
    assert main(words) == 0


def test_an_export_has_the_classes(own, capsys):
    out = own / "model"
    assert main(["export", str(own / "run"), "--format=safetensors", f"--out={out}"]) == 0
    assert open_source(str(out), World()).classes.names == ("a", "b", "c")
    shutil.rmtree(own / "data")
    words = ["sample", str(out), "--num-samples=2", "--no-npz"]
    assert main([*words, "--labels=c,a", f"--out={own / 'named'}"]) == 0
    assert json.loads((own / "named" / "samples.json").read_text())["labels"] == [2, 0]
    assert main([*words, "--labels=cat", f"--out={own / 'wrong'}"]) == 2
    assert "Classes: 0 'a', 1 'b', 2 'c'" in capsys.readouterr().err


@pytest.fixture
def without_b(trained) -> Iterator[Callable[[], None]]:
    """Function that takes class b away, until the end of the test."""
    yield lambda: (trained / "data" / "b").rename(trained / "b")
    (trained / "b").rename(trained / "data" / "b")


def test_an_encode_or_evaluation_with_other_classes_is_refused(trained, own, without_b, capsys):
    out, cache = own / "out", own / "cache"
    assert main(["encode", str(own / "run"), f"--out={cache}"]) == 0
    assert json.loads((cache / "index.json").read_text())["class_counts"] == [6, 2, 4]
    assert main(["sample", str(own / "run"), "--num-samples=2", "--no-npz", f"--out={out}"]) == 0
    without_b()
    capsys.readouterr()
    assert main(["encode", str(own / "run"), f"--out={own / 'again'}"]) == 2
    assert "3 classes -> 2; missing: 'b'" in capsys.readouterr().err
    assert main(["encode", str(own / "run"), f"--out={cache}", f"--dataset.path={trained / 'data'}"]) == 2
    assert "cache of other classes (cache -> now): 3 classes -> 2" in capsys.readouterr().err
    words = ["--encoder=tiny_vit", "--reference=dataset", "--allow-singular"]
    assert main(["evaluate", str(out), *words]) == 2
    assert "--reference=dataset: its classes differ from those of the samples" in capsys.readouterr().err
    loaded = config.load(str(trained / "toy.toml"), ["--recipe.name=ldm", f"--latent_cache.path={cache}"])
    with pytest.raises(config.ConfigError, match=r"its classes differ .* \(cache -> this run\): 3 classes -> 2"):
        assemble.build(loaded, World())


def test_a_folder_with_more_images_than_asked_for_is_refused(trained, tmp_path, capsys):
    out = tmp_path / "out"
    words = ["sample", str(trained / "run"), f"--out={out}"]
    assert main([*words, "--num-samples=6"]) == 0
    before = content(out)
    assert main([*words, "--num-samples=2"]) == 2
    message = capsys.readouterr().err
    assert "holds 4 samples beyond the 2 asked for" in message and "--num-samples=6" in message
    assert content(out) == before
    (out / "holiday.jpg").write_bytes(b"mine")
    assert main([*words, "--num-samples=6"]) == 2
    assert "1 images that are not its samples (holiday.jpg)" in capsys.readouterr().err
    evaluation = ["evaluate", str(out), f"--reference={out}", "--encoder=tiny_vit", "--allow-singular"]
    assert main(evaluation) == 2
    assert "holds 7 images, but samples.json lists 6" in capsys.readouterr().err


def test_labels_by_name_where_names_are_numbers(tmp_path, capsys):
    data = image_folder(tmp_path / "data", {str(i): 1 for i in range(12)})
    assert train(tmp_path, data, "--training.batch_size=4") == 0
    assert "index 2 is class '10'" in (tmp_path / "run" / "log.txt").read_text()
    words = ["sample", str(tmp_path / "run"), "--num-samples=1", "--no-npz"]
    assert main([*words, "--labels=2", f"--out={tmp_path / 'x'}"]) == 2
    message = capsys.readouterr().err
    assert "'2' is ambiguous: index 2 '10', but the class named '2' has index 4" in message
    for number, (word, label) in enumerate((("name:2", 4), ("index:2", 2), ("0", 0))):
        assert main([*words, f"--labels={word}", f"--out={tmp_path / str(number)}"]) == 0
        settings = json.loads((tmp_path / str(number) / "samples.json").read_text())
        assert settings["labels"] == [label] and settings["classes"]["2"] == "10"


def test_labels_as_in_the_dataset(trained, tmp_path):
    out = tmp_path / "out"
    assert main(["sample", str(trained / "run"), "--num-samples=3", "--labels=dataset", f"--out={out}"]) == 0
    assert json.loads((out / "samples.json").read_text())["class_counts"] == [6, 2, 4]
    balanced = labels_of(range(5000), "balanced", range(1000), 0)
    assert np.bincount(balanced).tolist() == [5] * 1000
    drawn = labels_of(range(20_000), "random", range(10), 3)
    assert np.bincount(drawn) / 20_000 == pytest.approx([0.1] * 10, abs=0.01)
    in_parts = [
        label
        for part in torch.arange(20_000).split(7)[:50]
        for label in labels_of(part.tolist(), "random", range(10), 3)
    ]
    assert in_parts == drawn[:350] and drawn != labels_of(range(20_000), "random", range(10), 4)
    labels = labels_of(range(12_000), "dataset", [0, 1, 2], 0, (6, 2, 4))
    assert np.bincount(labels) / 12_000 == pytest.approx([1 / 2, 1 / 6, 1 / 3], abs=0.02)
    assert labels[100:110] == labels_of(range(100, 110), "dataset", [0, 1, 2], 0, (6, 2, 4))
    assert set(labels_of(range(2000), "dataset", [0, 2], 0, (9, 0, 1))) == {0, 2}


def test_a_skewed_dataset_is_said_by_an_evaluation_with_balanced_labels(trained, tmp_path):
    for labels, warned in (("balanced", True), ("dataset", False)):
        out = tmp_path / labels
        assert main(["sample", str(trained / "run"), "--num-samples=4", f"--labels={labels}", f"--out={out}"]) == 0
        words = ["--encoder=tiny_vit", "--reference=dataset", "--allow-singular"]
        assert main(["evaluate", str(out), *words]) == 0
        warnings = json.loads((out / "evaluation.json").read_text())["warnings"]
        assert any("3.0 times as many images" in warning for warning in warnings) == warned
        assert not (out / ".evaluation").exists()


def test_a_class_without_images_is_said_once_and_never_sampled(tmp_path, capsys):
    data = image_folder(tmp_path / "data", {"a": 4, "b": 0, "c": 4})
    assert train(tmp_path, data) == 0
    assert (tmp_path / "run" / "log.txt").read_text().count("have no images") == 1
    out = tmp_path / "out"
    assert main(["sample", str(tmp_path / "run"), "--num-samples=3", f"--out={out}"]) == 0
    assert capsys.readouterr().err.count("classes without images are left out: 1 'b'") == 1
    assert json.loads((out / "samples.json").read_text())["classes_left_out"] == [1]
    parts = open_source(str(tmp_path / "run"), World()).parts
    assert parts.sampling_condition(torch.arange(4)).label.tolist() == [0, 2, 0, 2]


def test_the_inception_score_does_not_depend_on_the_order_of_files():
    classes = torch.arange(400) // 40  # sorted by class, ten of them
    logits = 8.0 * torch.nn.functional.one_hot(classes, 10) + torch.randn(400, 10, generator=generator("noise"))
    images = torch.randint(256, (400, 3, 4, 4), generator=generator("pixels"), dtype=torch.uint8)
    keys = content_keys(images)
    assert len(keys.unique()) == 400

    def score(order, with_keys=True):
        ours = InceptionScore(split_size=100)
        for part in order.split(64):
            ours.update(logits[part], keys[part] if with_keys else None)
        return ours.value()

    by_class, shuffled = torch.arange(400), torch.randperm(400, generator=generator("order"))
    assert score(by_class) == score(shuffled) == score(by_class.flip(0))
    assert score(by_class, with_keys=False) < 0.5 * score(by_class)
    whole = InceptionScore(split_size=400)
    whole.update(logits)
    assert score(by_class) == pytest.approx(whole.value(), rel=0.1)


def test_an_empty_run_dir_is_the_default(tmp_path):
    (tmp_path / "toy.toml").write_text(toys.TOML)
    (tmp_path / "named.toml").write_text(toys.TOML.replace("[run]", '[run]\ndir = "mine"'))
    assert config.load(str(tmp_path / "toy.toml"), ["--run.dir="]).run.dir == "outputs/toy"
    assert config.load(str(tmp_path / "toy.toml"), ["--run.dir", ""]).run.dir == "outputs/toy"
    assert config.load(str(tmp_path / "named.toml"), ["--run.dir="]).run.dir == "mine"


@pytest.mark.parametrize("command", ["train", "sample", "encode", "export", "import", "evaluate"])
def test_an_output_that_is_a_file_or_cannot_be_written_is_one_line(trained, tmp_path, capsys, monkeypatch, command):
    target, run = tmp_path / "target", str(trained / "run")
    key = {"train": "run.dir", "evaluate": "--output"}.get(command, "--out")
    images = image_folder(tmp_path / "images", {"x": 4})
    words = {
        "train": [str(trained / "toy.toml"), *RECIPE, f"--run.dir={target}"],
        "sample": [run, "--num-samples=2", f"--out={target}"],
        "encode": [run, f"--out={target}"],
        "export": [run, "--format=safetensors", f"--out={target}"],
        "import": [f"{tmp_path}/model/tokenizer.safetensors", f"--config={trained}/toy.toml", f"--out={target}"],
        "evaluate": [str(images), f"--reference={images}", "--encoder=tiny_vit", "--allow-singular",
                     f"--output={target}/x.json"],
    }[command]  # fmt: skip
    if command == "import":
        assert main(["export", run, "--format=safetensors", f"--out={tmp_path / 'model'}", "--parts=tokenizer"]) == 0
    target.write_text("mine")
    capsys.readouterr()
    assert main([command, *words]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert lines[-1].startswith(f"error: {key} = '{target}") and f"'{target}' is a file, not a folder" in lines[-1]
    assert target.read_text() == "mine"

    target.unlink()
    make = os.mkdir

    def read_only(path, *rest, **options):
        if str(path).startswith(str(target)):
            raise OSError(30, "Read-only file system", str(path))
        make(path, *rest, **options)

    monkeypatch.setattr(os, "mkdir", read_only)
    assert main([command, *words]) == 2
    assert "cannot be written: Read-only file system" in capsys.readouterr().err.strip().splitlines()[-1]
