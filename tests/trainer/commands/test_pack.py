"""python -m trainer pack: what webdataset reads back is what the dataset gave; a killed command goes on."""

import errno
import io
import json
import tarfile

import pytest
import torch

from components.data.crop import to_image
from components.data.loader import DataError
from plugins.datasets.image_folder import ImageFolder
from plugins.datasets.webdataset import WebDataset
from tests.plugins.datasets.test_webdataset import same
from tests.support import ROOT
from tests.support.image_files import noise, samples, write_folder, write_shards, write_table
from trainer.__main__ import main, user_message
from trainer.caching import packing

torch.set_num_threads(1)


@pytest.fixture
def place(tmp_path):
    """A folder with images of three classes, one of them empty; its path is added to that of the output."""
    write_folder(tmp_path / "images", samples(10, 2), names=("cats", "dogs"))
    (tmp_path / "images/none").mkdir()
    return tmp_path


def pack(place, *words: str, out="out", source="images") -> int:
    return main(["pack", str(place / source), f"--out={place / out}", "--size=24", "--workers=0", *words])


def png(image: torch.Tensor) -> bytes:
    file = io.BytesIO()
    to_image(image).save(file, "PNG")
    return file.getvalue()


def content(folder) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("*.tar")}


def test_png_keeps_pixels_labels_and_classes(place, capsys):
    assert pack(place, "--shard-size=4") == 0
    assert "Done: 10 images of 3 classes in 3 shards" in capsys.readouterr().out
    data, folder = WebDataset(24, path=str(place / "out")), ImageFolder(24, path=str(place / "images"))
    assert same(data, folder)
    assert data.class_names == folder.class_names and data.class_counts() == folder.class_counts() == [5, 5, 0]
    with tarfile.open(place / "out/shard-000001.tar") as tar:
        assert tar.getnames()[:2] == ["000000004.png", "000000004.cls"]


@pytest.mark.parametrize(("format", "apart"), [("jpg", 40), ("webp", 60)])
def test_other_formats_come_near(tmp_path, format, apart):
    smooth = torch.linspace(0, 255, 30).round().byte()
    image = torch.stack([smooth.expand(30, 30), smooth[:, None].expand(30, 30), 255 - smooth.expand(30, 30)])
    write_folder(tmp_path / "images", [(png(image), 0)])
    assert pack(tmp_path, f"--format={format}", "--quality=90") == 0
    found, expected = (
        cls(24, path=str(tmp_path / at))[0] for cls, at in ((WebDataset, "out"), (ImageFolder, "images"))
    )
    difference = (found.image.int() - expected.image.int()).abs()
    assert 0 < difference.max() < apart and difference.float().mean() < 4


def test_original_files_are_kept_at_every_resolution(place):
    assert pack(place, "--format=original") == 0
    for side in (16, 48):
        assert same(WebDataset(side, path=str(place / "out")), ImageFolder(side, path=str(place / "images")))
    with tarfile.open(place / "out/shard-000000.tar") as tar:
        assert tar.extractfile("000000003.png").read() == noise(3)


def test_workers_and_an_interruption_change_nothing(place, monkeypatch):
    assert pack(place, "--shard-size=3") == 0
    add, added = packing._add, []

    def killed(*arguments):
        added.append(arguments)
        if len(added) == 9:  # in the second shard
            raise KeyboardInterrupt
        add(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(packing, "_add", killed)
        assert pack(place, "--shard-size=3", out="b") != 0
    assert list(content(place / "b")) == ["shard-000000.tar"]
    with pytest.raises(DataError, match="not packed completely; repeat"):
        WebDataset(24, path=str(place / "b"))
    with monkeypatch.context() as patch:
        patch.setattr(packing.Packing, "rows", only_after(packing.Packing.rows, 1))
        assert pack(place, "--shard-size=3", "--workers=2", out="b") == 0
    assert content(place / "b") == content(place / "out")


def only_after(rows, first):
    """``Packing.rows`` that refuses shards before ``first``: they are not to be written again."""

    def checked(self, number):
        assert number >= first
        return rows(self, number)

    return checked


def test_a_complete_folder_stays_as_it_is(place, capsys):
    assert pack(place) == pack(place) == 0
    assert "Already complete: 10 images" in capsys.readouterr().out


def test_unreadable_images_are_left_out_and_said(place, capsys, caplog):
    (place / "images/cats/0002.png").write_bytes(noise(2)[:200])
    assert pack(place) == 0
    assert "9 images of 3 classes" in (out := capsys.readouterr().out) and "1 were unreadable and left out" in out
    assert "images/cats/0002.png" in caplog.text
    data, folder = WebDataset(24, path=str(place / "out")), ImageFolder(24, path=str(place / "images"))
    assert [data[i].label for i in range(9)] == [0] * 4 + [1] * 5
    assert torch.equal(data[2].image, folder[3].image)


@pytest.mark.parametrize("kind", ["tar", "parquet", "arrow"])
def test_folders_of_other_kinds(tmp_path, kind):
    images = samples(5)
    if kind == "tar":
        write_shards(tmp_path / "images", images)
        words = []
    else:
        pytest.importorskip("pyarrow", reason='hf_dataset needs pyarrow: pip install "titanrepa[hf]"')
        write_table(tmp_path / f"images/data/test-00000-of-00001.{kind}", images)
        words = ["--dataset.split=test"]
    assert pack(tmp_path, *words) == 0
    folder = ImageFolder(24, path=str(write_folder(tmp_path / "same", images)))
    assert same(WebDataset(24, path=str(tmp_path / "out")), folder)


def test_a_config_trains_on_what_was_packed_from_it(tmp_path, capsys):
    quickstart = str(ROOT / "train_configs/quickstart.toml")
    assert main(["pack", quickstart, f"--out={tmp_path / 'out'}", "--workers=0", "--dataset.size=20"]) == 0
    assert "20 images of 10 classes" in capsys.readouterr().out
    data = WebDataset(32, path=str(tmp_path / "out"))
    assert data.class_names[:2] == ["disc", "ring"] and data[11].label == 1
    assert main(["pack", quickstart, f"--out={tmp_path / 'b'}", "--format=original"]) == 2
    assert "the dataset 'shapes' has no image files; choose png" in capsys.readouterr().err
    assert not (tmp_path / "b").exists()


def test_another_dataset_or_choice_is_refused_and_changes_nothing(place, capsys):
    assert pack(place) == 0
    before = content(place / "out")
    assert pack(place, "--format=webp") == 2
    assert 'another packed dataset (packed -> now):\n  format: "png" -> "webp"' in capsys.readouterr().err
    (place / "images/cats/0000.png").write_bytes(noise(99))  # the same name and number
    assert pack(place) == 2
    assert "its images (a sample was compared)" in capsys.readouterr().err
    (place / "images/birds").mkdir()
    assert pack(place) == 2
    assert "class_names: " in capsys.readouterr().err
    assert content(place / "out") == before


def test_a_full_disk_leaves_whole_shards_only(place, monkeypatch):
    def full(*arguments):
        raise OSError(errno.ENOSPC, "No space left on device", "shard")

    monkeypatch.setattr(packing, "_add", full)
    assert pack(place) == 2
    assert sorted(path.name for path in (place / "out").iterdir()) == ["pack.json"]
    assert "free disk space" in user_message(OSError(errno.ENOSPC, "No space left on device", "shard"))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["pack", "nowhere", "--out=o"], "'nowhere' is neither a folder nor a .toml file"),
        (["pack", "images", "--out=o", "--dataset.flipp=1"], "flipp: unknown key; did you mean 'flip'?"),
        (["pack", "images", "--out=o", "--training.steps=1"], "for a folder, set options of its dataset only"),
        (["pack", "images", "--out=images"], "the folder holds other files (cats, dogs, none); choose a new one"),
        (["pack", "images", "--out=o", "--shard-size=0"], "--shard-size=0: expected 1 to"),
        (["pack", "empty", "--out=o"], "dataset image_folder: 'empty' has no sub-folders"),
    ],
)
def test_mistakes_are_one_line(place, monkeypatch, capsys, words, message):
    monkeypatch.chdir(place)
    (place / "empty").mkdir()
    assert main(words) == 2
    assert message in capsys.readouterr().err
    assert not (place / "o").exists()


def test_a_damaged_record_is_named(place, capsys):
    assert pack(place) == 0
    (place / "out/pack.json").write_text(json.dumps({}))
    assert pack(place) == 2
    assert "pack.json cannot be read" in capsys.readouterr().err
