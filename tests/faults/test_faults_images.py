"""Training and evaluation read the same images, and say what they leave out and why a file cannot be read."""

import json
import logging
import os

import numpy as np
import PIL.Image
import pytest
import torch

from components.data import images
from components.data.images import ImageError, Listing, extensions, printable, read_rgb
from components.data.loader import DataError, UnreadableCounter, collate
from components.evaluation import EvaluationError
from components.evaluation.images import DatasetImages, ImageFiles
from plugins.datasets.image_folder import ImageFolder
from tests.plugins.datasets.test_image_folder import COLORS, EXPECTED, FILES, UNREADABLE, quadrants

MORE = {
    "rgb.tif": lambda f: quadrants().save(f),
    "gray16.tiff": lambda f: PIL.Image.fromarray(
        np.kron(np.array([[0, 100], [200, 255]]), np.ones((16, 16))).astype(np.uint16) * 257
    ).save(f),
    "cmyk.tif": lambda f: quadrants().convert("CMYK").save(f),
    "rgb.avif": lambda f: quadrants().save(f, quality=100, subsampling="4:4:4"),
    "rgb.ppm": lambda f: quadrants().save(f),
    "rgb.jfif": lambda f: quadrants().save(f, format="JPEG", quality=95, subsampling=0),
    "rgb.tga": lambda f: quadrants().save(f),
    "rgb.jp2": lambda f: quadrants().save(f),
}
EXPECTED = EXPECTED | {"gray16.tiff": EXPECTED["gray16.png"]}


@pytest.fixture(autouse=True)
def said_again():
    images._warn_once.cache_clear()


def save(path, color=(200, 0, 0), size=16):
    path.parent.mkdir(parents=True, exist_ok=True)
    PIL.Image.new("RGB", (size, size), color).save(path)


@pytest.mark.parametrize("name", {**FILES, **MORE})
def test_evaluation_reads_what_training_reads(tmp_path, name):
    if os.path.splitext(name)[1].lower() not in extensions():
        pytest.skip(f"this Pillow cannot read {name}")
    (tmp_path / "a").mkdir()
    {**FILES, **MORE}[name](tmp_path / "a" / name)
    training, evaluation = ImageFolder(32, path=str(tmp_path)), ImageFiles(tmp_path)
    assert len(training) == len(evaluation) == 1
    assert torch.equal(training[0].image, evaluation[0])
    corners = [evaluation[0][:, y, x].tolist() for y in (6, 25) for x in (6, 25)]
    np.testing.assert_allclose(corners, EXPECTED.get(name, COLORS), atol=6)


def test_linked_class_folders_and_files_count_in_both(tmp_path):
    for folder in ("data/a", "elsewhere/b", "elsewhere/deep"):
        for i in range(2):
            save(tmp_path / folder / f"{i}.png")
    (tmp_path / "data" / "b").symlink_to(tmp_path / "elsewhere" / "b")
    (tmp_path / "data" / "c").symlink_to(tmp_path / "data" / "a")  # one folder as two classes
    (tmp_path / "data" / "a" / "more").symlink_to(tmp_path / "elsewhere" / "deep")
    (tmp_path / "data" / "a" / "2.png").symlink_to(tmp_path / "elsewhere" / "b" / "0.png")
    training, evaluation = ImageFolder(8, path=str(tmp_path / "data")), ImageFiles(tmp_path / "data")
    assert len(training) == len(evaluation) == 5 + 2 + 5
    assert sorted(training.file(i) for i in range(12)) == sorted(str(file) for file in evaluation.files)


def loops(root):
    save(root / "a" / "1.png")
    save(root / "a" / "deep" / "2.png")
    (root / "a" / "again").symlink_to(root / "a")
    (root / "a" / "deep" / "up").symlink_to("..")
    (root / "a" / "early").symlink_to("deep")  # sorts before what it leads to
    (root / "a" / "zlink").symlink_to("deep")
    (root / "b").symlink_to(".")
    (root / "c").symlink_to("..")
    (root / "d").symlink_to("/")
    (root / "self").symlink_to("self")


def test_a_loop_of_links_is_listed_once_and_said(tmp_path, caplog):
    loops(tmp_path / "data")
    training = ImageFolder(8, path=str(tmp_path / "data"))
    assert list(training.class_names) == ["a"]
    assert [os.path.relpath(training.file(i), tmp_path) for i in range(2)] == ["data/a/1.png", "data/a/deep/2.png"]
    assert len(training) == len(ImageFiles(tmp_path / "data")) == 2
    assert "left out 7 links to a folder that is listed already or contains the link, 1 dangling links" in caplog.text
    assert len(caplog.text.splitlines()) == 2  # once for training, once for evaluation


def test_the_listing_does_not_depend_on_the_order_of_entries(tmp_path, monkeypatch):
    loops(tmp_path)
    scandir = os.scandir

    class Reversed:
        def __init__(self, path):
            with scandir(path) as entries:
                self.entries = sorted(entries, key=lambda e: e.name)[:: self.turn]

        def __enter__(self):
            return iter(self.entries)

        def __exit__(self, *_):
            pass

    found = []
    for turn in (1, -1):
        Reversed.turn = turn
        monkeypatch.setattr(os, "scandir", Reversed)
        found.append(Listing(str(tmp_path)).all())
    assert found[0] == found[1] == ["a/1.png", "a/deep/2.png"]


def test_what_is_left_out_is_counted_by_reason_and_said_once(tmp_path, caplog):
    save(tmp_path / "a" / "1.png")
    save(tmp_path / "beside.png")
    for name in (".DS_Store", "notes.txt", "more.txt", "x.heic", "LICENSE"):
        (tmp_path / "a" / name).touch()
    (tmp_path / "a" / "gone").symlink_to("nowhere")
    for _ in range(2):
        assert len(ImageFolder(8, path=str(tmp_path))) == 1
    assert caplog.text.count("left out") == 1
    for reason in ("2 .txt", "1 hidden", "1 without extension", "1 dangling links", "1 images beside the class"):
        assert reason in caplog.text
    assert "1 .heic (this Pillow cannot read HEIF; convert them)" in caplog.text
    ImageFiles(tmp_path)
    assert "left out 2 .txt" in caplog.text.splitlines()[-1] and "beside" not in caplog.text.splitlines()[-1]


def test_a_dangling_link_is_an_unreadable_image(tmp_path):
    save(tmp_path / "a" / "2.png")
    (tmp_path / "a" / "1.png").symlink_to("nowhere")
    item = ImageFolder(8, path=str(tmp_path))[0]
    assert item.unreadable == str(tmp_path / "a" / "1.png") and item.reason == "No such file or directory"
    with pytest.raises(EvaluationError, match=r"a/1\.png cannot be read \(No such file or directory\); replace or rem"):
        ImageFiles(tmp_path)


def test_a_flat_folder_says_what_to_do(tmp_path):
    save(tmp_path / "1.png")
    with pytest.raises(DataError, match=r"1 \.png\. For one class, put them into one sub-folder, such as '.*/all'"):
        ImageFolder(8, path=str(tmp_path))


def test_a_name_that_is_not_utf8_breaks_neither_log_nor_evaluation(tmp_path, capfd):
    folder = os.fsencode(tmp_path) + b"/caf\xe9"
    os.mkdir(folder)
    for name, content in ((b"\xff.png", None), (b"\xfe.png", b"no image")):
        path = os.path.join(folder, name)
        if content is None:
            PIL.Image.new("RGB", (8, 8)).save(os.fsdecode(path))
        else:
            with open(path, "wb") as file:
                file.write(content)
    dataset = ImageFolder(8, path=str(tmp_path))
    assert list(dataset.class_names) == ["caf\\xe9"]
    item = dataset[0]
    for text in (item.unreadable, *dataset.class_names):
        text.encode()  # as log.txt, TensorBoard and TOML do
        json.dumps(text, ensure_ascii=False).encode()
    handler = logging.FileHandler(tmp_path / "log.txt", encoding="utf-8")
    logger = logging.getLogger("components.data.loader")
    logger.addHandler(handler)
    try:
        UnreadableCounter(1.0).update(1, collate([item]).unreadable)
    finally:
        logger.removeHandler(handler)
        handler.close()
    assert "caf\\xe9/\\xfe.png (its content is none of the image formats" in (tmp_path / "log.txt").read_text()
    assert "Logging error" not in capfd.readouterr().err
    evaluated = ImageFiles(tmp_path)
    with pytest.raises(EvaluationError, match=r"caf\\xe9/\\xfe\.png cannot be read") as caught:
        evaluated[0]
    str(caught.value).encode()
    assert evaluated[1].shape == (3, 8, 8)


REASONS = {
    "1.jpg": r"truncated",
    "2.png": r"truncated|broken",
    "4.jpg": r"none of the image formats that are read, or damaged",
    "5.png": r"none of the image formats that are read, or damaged",
    "6.jpg": r"No such file",
}


@pytest.mark.parametrize("name", REASONS)
def test_the_reason_reaches_item_log_and_evaluation(tmp_path, caplog, name):
    (tmp_path / "a").mkdir()
    UNREADABLE[name](tmp_path / "a" / name)
    save(tmp_path / "b" / "1.png")
    dataset = ImageFolder(8, path=str(tmp_path))
    item = dataset[0]
    UnreadableCounter(1.0).update(1, collate([item]).unreadable)
    assert f"{name} ({item.reason})" in caplog.text
    with pytest.raises(ImageError, match=REASONS[name]):
        read_rgb(tmp_path / "a" / name)
    with pytest.raises(EvaluationError, match=rf"{name} of x cannot be read \(.*({REASONS[name]}).*\); repair"):
        DatasetImages(dataset, "x", "")[0]


def test_pillows_limit_is_the_reason(tmp_path, monkeypatch):
    save(tmp_path / "a" / "1.png", size=32)
    save(tmp_path / "a" / "2.png", size=8)
    monkeypatch.setattr(PIL.Image, "MAX_IMAGE_PIXELS", 100)
    reason = ImageFolder(8, path=str(tmp_path))[0].reason
    assert reason.startswith("Image size (1024 pixels) exceeds limit of 200 pixels: PIL.Image.MAX_IMAGE_PIXELS")
    with pytest.raises(EvaluationError, match=r"1\.png cannot be read \(Image size .*scale the image down\)"):
        ImageFiles(tmp_path)[0]


@pytest.mark.parametrize(
    "array, reason",
    [(np.ones((8, 8), np.float32), "floats, whose range"), (np.full((8, 8), 1 << 20, np.int32), "exceed 16 bits")],
)
def test_pixels_without_a_range_are_refused(tmp_path, array, reason):
    PIL.Image.fromarray(array).save(tmp_path / "1.tif")
    with pytest.raises(EvaluationError, match=reason):
        ImageFiles(tmp_path)[0]


def test_other_formats_are_not_decoded_whatever_their_extension(tmp_path, monkeypatch):
    """EPS would start Ghostscript."""
    from PIL import EpsImagePlugin

    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *_, **__: pytest.fail("Ghostscript was started"))
    quadrants().save(tmp_path / "1.eps")
    os.rename(tmp_path / "1.eps", tmp_path / "1.jpg")
    with pytest.raises(ImageError, match="none of the image formats"):
        read_rgb(tmp_path / "1.jpg")


def test_a_folder_that_cannot_be_listed_is_named(tmp_path, monkeypatch):
    save(tmp_path / "a" / "1.png")
    scandir = os.scandir

    def refused(path):
        if str(path).endswith("/a"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refused)
    with pytest.raises(DataError, match=r"image_folder: .*/a cannot be listed \(Permission denied\); make it readable"):
        ImageFolder(8, path=str(tmp_path))
    with pytest.raises(EvaluationError, match=r"/a cannot be read \(Permission denied\)"):
        ImageFiles(tmp_path)


def test_printable_keeps_ordinary_names():
    for name in ("a b/ü.png", "漢字.jpg", "x\\y.png"):
        assert printable(name) == name
