"""image_folder reads all common image formats as ADM does, and survives unreadable files."""

import os
import pickle
import struct
import sys
import warnings
import zlib

import numpy as np
import PIL.Image
import pytest
import torch
from PIL.Image import Transpose
from pydantic import ValidationError

from components import registry
from components.contracts import Dataset
from components.data import images
from components.data.classes import Classes
from components.data.loader import DataError, collate
from plugins.datasets.image_folder import ImageFolder

RED, GREEN, BLUE, WHITE = (200, 0, 0), (0, 200, 0), (0, 0, 200), (255, 255, 255)
COLORS = (RED, GREEN, BLUE, WHITE)


def quadrants(colors=COLORS, size=32):
    """Four colors: top left, top right, bottom left, bottom right."""
    half = size // 2
    image = PIL.Image.new("RGB", (size, size))
    for place, color in enumerate(colors):
        left, top = place % 2 * half, place // 2 * half
        image.paste(color, (left, top, left + half, top + half))
    return image


def grays(colors):
    return tuple((round(0.299 * r + 0.587 * g + 0.114 * b),) * 3 for r, g, b in colors)


def palette(image, **info):
    image = image.convert("P", palette=PIL.Image.Palette.ADAPTIVE, colors=8)
    image.info.update(info)
    return image


def transparent(image):
    image = image.convert("RGBA")
    image.putalpha(PIL.Image.linear_gradient("L").resize(image.size))
    return image


def sixteen_bit_gray():
    levels = np.kron(np.array([[0, 100], [200, 255]]), np.ones((16, 16))).astype(np.uint16) * 257
    return PIL.Image.fromarray(levels)


def sixteen_bit_rgb(file):
    """PIL cannot write these: header, one zlib stream of rows (filter byte 0), end."""
    pixels = np.asarray(quadrants()).astype(">u2") * 257
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)
    chunks = [
        (b"IHDR", struct.pack(">IIBBBBB", 32, 32, 16, 2, 0, 0, 0)),
        (b"IDAT", zlib.compress(rows)),
        (b"IEND", b""),
    ]
    file.write_bytes(
        b"\x89PNG\r\n\x1a\n"
        + b"".join(
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
            for kind, data in chunks
        )
    )


def orientation(number):
    exif = PIL.Image.Exif()
    exif[0x0112] = number
    return exif


def nonsense(number):
    """Metadata with an orientation and a float as camera maker, on which PIL fails."""
    make = struct.pack("<HHII", 0x010F, 12, 1, 38) + struct.pack("<I", 0) + bytes(8)
    return b"Exif\0\0II*\0\x08\0\0\0\x02\0" + struct.pack("<HHII", 0x0112, 3, 1, number) + make


def animation(file):
    quadrants().save(file, save_all=True, append_images=[PIL.Image.new("RGB", (32, 32), "black")])


FILES = {
    "rgb.png": lambda f: quadrants().save(f),
    "rgb.JPEG": lambda f: quadrants().save(f, quality=95, subsampling=0),
    "rgb.webp": lambda f: quadrants().save(f, lossless=True),
    "rgb.bmp": lambda f: quadrants().save(f),
    "a jpeg called.png": lambda f: quadrants().save(f, format="JPEG", quality=95, subsampling=0),
    "progressive.jpg": lambda f: quadrants().save(f, quality=95, subsampling=0, progressive=True),
    "cmyk.jpg": lambda f: quadrants().convert("CMYK").save(f, quality=95),
    "palette.png": lambda f: palette(quadrants()).save(f),
    "palette_with_transparent_color.png": lambda f: palette(quadrants()).save(f, transparency=0),
    "palette_with_alpha.png": lambda f: palette(quadrants()).save(f, transparency=bytes(range(0, 256, 32))),
    "palette.gif": lambda f: palette(quadrants()).save(f),
    "animated.gif": animation,
    "animated.webp": lambda f: quadrants().save(
        f, save_all=True, append_images=[PIL.Image.new("RGB", (32, 32))], lossless=True
    ),
    "rgba.png": lambda f: transparent(quadrants()).save(f),
    "rgba.webp": lambda f: transparent(quadrants()).save(f, lossless=True, exact=True),
    "rgb16.png": sixteen_bit_rgb,
    "exif6.jpg": lambda f: (
        quadrants().transpose(Transpose.ROTATE_90).save(f, quality=95, subsampling=0, exif=orientation(6))
    ),
    "exif3.png": lambda f: quadrants().transpose(Transpose.ROTATE_180).save(f, exif=orientation(3)),
    "exif6_among_nonsense.jpg": lambda f: (
        quadrants().transpose(Transpose.ROTATE_90).save(f, quality=95, subsampling=0, exif=nonsense(6))
    ),
    "gray.png": lambda f: quadrants().convert("L").save(f),
    "gray.jpg": lambda f: quadrants().convert("L").save(f, quality=95),
    "gray_alpha.png": lambda f: quadrants().convert("LA").save(f),
    "gray16.png": lambda f: sixteen_bit_gray().save(f),
    "black_and_white.png": lambda f: quadrants().convert("1", dither=PIL.Image.Dither.NONE).save(f),
}
EXPECTED = {
    "gray.png": grays(COLORS),
    "gray.jpg": grays(COLORS),
    "gray_alpha.png": grays(COLORS),
    "gray16.png": ((0,) * 3, (100,) * 3, (200,) * 3, (255,) * 3),
    "black_and_white.png": ((0,) * 3, (0,) * 3, (0,) * 3, (255,) * 3),
}


def folder(tmp_path, files, name="a"):
    (tmp_path / name).mkdir(exist_ok=True)
    for file, make in files.items():
        make(tmp_path / name / file)
    return str(tmp_path)


@pytest.mark.parametrize("name", FILES)
def test_every_kind_of_file_becomes_rgb(tmp_path, name):
    with warnings.catch_warnings(record=True) as remarks:
        warnings.simplefilter("always")
        sample = ImageFolder(16, path=folder(tmp_path, {name: FILES[name]}))[0]
    assert (sample.image.shape, sample.image.dtype) == ((3, 16, 16), torch.uint8)
    assert sample.label == 0 and sample.unreadable is None and not remarks
    # Away from the edges, where filters and JPEG blocks mix the colors.
    found = [sample.image[:, y, x].tolist() for y in (3, 12) for x in (3, 12)]
    np.testing.assert_allclose(found, EXPECTED.get(name, COLORS), atol=6)


def truncated(format):
    def make(file):
        noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
        PIL.Image.fromarray(noise).save(file, format=format)
        file.write_bytes(file.read_bytes()[:-2000])

    return make


UNREADABLE = {
    "1.jpg": truncated("JPEG"),
    "2.png": truncated("PNG"),
    "3.webp": truncated("WEBP"),
    "4.jpg": lambda f: f.write_bytes(b""),
    "5.png": lambda f: f.write_text("not an image"),
    "6.jpg": lambda f: f.symlink_to("nowhere"),
}


@pytest.mark.parametrize("name", UNREADABLE)
def test_an_unreadable_file_is_replaced_by_the_next_readable_one(tmp_path, name):
    folder(tmp_path, {name: UNREADABLE[name]}, "a")
    path = folder(tmp_path, {"4.jpg": UNREADABLE["4.jpg"], "5.png": FILES["rgb.png"]}, "b")
    dataset = ImageFolder(16, path=path)
    for index, file in ((0, f"a/{name}"), (1, "b/4.jpg")):
        sample = dataset[index]
        assert sample.unreadable == str(tmp_path / file)
        assert sample.label == 1 and torch.equal(sample.image, dataset[2].image)
    assert dataset[2].unreadable is None


def test_a_decompression_bomb_is_unreadable(tmp_path, monkeypatch):
    path = folder(
        tmp_path, {"1.png": lambda f: quadrants(size=32).save(f), "2.png": lambda f: quadrants(size=8).save(f)}
    )
    dataset = ImageFolder(16, path=path)
    assert dataset[0].unreadable is None
    monkeypatch.setattr(PIL.Image, "MAX_IMAGE_PIXELS", 100)
    assert dataset[0].unreadable == str(tmp_path / "a" / "1.png")


def test_replacement_goes_round_the_end_and_gives_up(tmp_path):
    path = folder(tmp_path, {"1.png": FILES["rgb.png"], "2.png": UNREADABLE["5.png"]})
    dataset = ImageFolder(16, path=path)
    assert torch.equal(dataset[1].image, dataset[0].image)
    os.remove(tmp_path / "a" / "1.png")
    with pytest.raises(DataError, match=r"(?s)2 images in a row .*2\.png; the last: .*1\.png: No such file"):
        dataset[1]


def test_a_deleted_folder_is_noticed_after_a_hundred_files(tmp_path):
    path = folder(tmp_path, {f"{i:03}.png": UNREADABLE["4.jpg"] for i in range(150)})
    with pytest.raises(DataError, match=r"100 images in a row"):
        ImageFolder(16, path=path)[120]


# The fast decoder


@pytest.fixture
def decoded(monkeypatch):
    """Results of torchvision's decoder."""
    found, decode = [], images._torchvision_jpeg
    monkeypatch.setattr(images, "_torchvision_jpeg", lambda content: found.append(decode(content)) or found[-1])
    return found


def xmp(number):
    return b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf tiff:Orientation="%d"/></x:xmpmeta>' % number


def saved(image, **options):
    return lambda file: image.save(file, format="JPEG", quality=90, **options)


PHOTO = PIL.Image.fromarray(
    np.linspace((0, 40, 255), (255, 0, 90), 150 * 113).reshape(113, 150, 3).astype(np.uint8)
).transpose(Transpose.ROTATE_90)
FAST = {
    "color": saved(PHOTO),
    "color without subsampling": saved(PHOTO, subsampling=0),
    "progressive": saved(PHOTO, progressive=True),
    "gray": saved(PHOTO.convert("L")),
    "upright by EXIF": saved(PHOTO, exif=orientation(1)),
    "stored as RGB": saved(PHOTO, keep_rgb=True),
    "large profile": saved(PHOTO, icc_profile=bytes(100_000)),
}
BY_PILLOW = {
    "turned by EXIF": saved(PHOTO, exif=orientation(6)),
    "turned, among nonsense": saved(PHOTO, exif=nonsense(6)),
    "turned by XMP": saved(PHOTO, xmp=xmp(6)),
    "CMYK": saved(PHOTO.convert("CMYK")),
    "PNG": lambda f: PHOTO.save(f, format="PNG"),
    "16 bits": lambda f: sixteen_bit_gray().save(f, format="PNG"),
}


@pytest.mark.parametrize("name", FAST | BY_PILLOW)
def test_the_fast_decoder_differs_by_two_levels(tmp_path, decoded, name):
    path = folder(tmp_path, {"1.jpg": (FAST | BY_PILLOW)[name]})
    for resolution in (48, 100):
        exact = ImageFolder(resolution, path=path)[0].image
        dataset = ImageFolder(resolution, path=path, decoder="fast")
        del decoded[:]  # the constructor's check
        apart = (dataset[0].image.int() - exact.int()).abs()
        assert len(decoded) == (name in FAST)
        assert apart.max() <= (2 if name in FAST else 0) and apart.float().mean() < 0.02


@pytest.mark.parametrize("name", FILES)
def test_the_fast_decoder_reads_every_kind_of_file_alike(tmp_path, name):
    path = folder(tmp_path, {name: FILES[name]})
    exact, fast = (ImageFolder(16, path=path, decoder=decoder)[0] for decoder in ("exact", "fast"))
    assert (exact.image.int() - fast.image.int()).abs().max() <= 2 and fast.unreadable is None


@pytest.mark.parametrize("name", UNREADABLE)
def test_the_fast_decoder_gives_the_same_reason(tmp_path, name):
    path = folder(tmp_path, {name: UNREADABLE[name], "9.png": FILES["rgb.png"]})
    exact, fast = (ImageFolder(16, path=path, decoder=decoder)[0] for decoder in ("exact", "fast"))
    assert fast.unreadable and fast[2:] == exact[2:]


def test_truncated_jpegs_are_unreadable_to_both_decoders(tmp_path):
    FAST["color"](tmp_path / "whole.jpg")
    whole = (tmp_path / "whole.jpg").read_bytes()
    for length in range(0, len(whole) - 2, len(whole) // 50):
        (tmp_path / "cut.jpg").write_bytes(whole[:length])
        outcomes = []
        for read in (images.read_rgb, images.read_rgb_fast):
            with pytest.raises(images.ImageError) as caught:
                read(tmp_path / "cut.jpg")
            outcomes.append(str(caught.value))
        assert outcomes[0] == outcomes[1]


def test_a_jpeg_bomb_is_unreadable_to_the_fast_decoder(tmp_path, monkeypatch):
    path = folder(tmp_path, {"1.jpg": FAST["color"], "2.png": lambda f: quadrants(size=8).save(f)})
    dataset = ImageFolder(16, path=path, decoder="fast")
    monkeypatch.setattr(PIL.Image, "MAX_IMAGE_PIXELS", 100)
    assert dataset[0].unreadable == str(tmp_path / "a" / "1.jpg")


def test_without_torchvision_the_fast_decoder_is_refused(tmp_path, monkeypatch):
    path = folder(tmp_path, {"1.jpg": FAST["color"]})
    monkeypatch.setitem(sys.modules, "torchvision.io", None)
    with pytest.raises(DataError, match=r'decoder = "fast": torchvision cannot decode JPEGs.*set decoder = "exact"'):
        ImageFolder(16, path=path, decoder="fast")
    assert ImageFolder(16, path=path)[0].unreadable is None


def test_batches_keep_the_decoders_layout(tmp_path):
    path = folder(tmp_path, {"1.jpg": FAST["color"], "2.png": FILES["rgb.png"], "3.jpg": BY_PILLOW["turned by EXIF"]})
    for decoder in ("exact", "fast"):
        dataset = ImageFolder(16, path=path, decoder=decoder)
        items = [dataset[0], dataset.mirrored(1), dataset[2]]
        batch = collate(items).images
        assert batch.shape == (3, 3, 16, 16) and batch.is_contiguous(memory_format=torch.channels_last)
        assert torch.equal(batch, torch.stack([item.image for item in items]))


# Folder


def test_classes_are_sorted_folders_with_nested_files(tmp_path):
    rgb = FILES["rgb.png"]
    folder(tmp_path, {"1.png": rgb}, "wren")
    folder(tmp_path, {"2.PNG": rgb, "1.png": rgb, "notes.txt": lambda f: f.write_text(""), ".hidden.png": rgb}, "Owl")
    folder(tmp_path / "Owl", {"0.png": rgb}, "deep")
    folder(tmp_path, {"x.png": rgb}, ".cache")
    rgb(tmp_path / "outside.png")
    (tmp_path / "kite").symlink_to(tmp_path / "wren")
    os.rename(tmp_path / "wren" / "1.png", os.fsencode(tmp_path / "wren") + b"/\xff.png")
    dataset = ImageFolder(8, path=str(tmp_path))
    assert isinstance(dataset, Dataset)
    assert (list(dataset.class_names), dataset.num_classes) == (["Owl", "kite", "wren"], 3)
    files = [os.fsencode(os.path.relpath(dataset.file(i), tmp_path)) for i in range(len(dataset))]
    assert files == [b"Owl/1.png", b"Owl/2.PNG", b"Owl/deep/0.png", b"kite/\xff.png", b"wren/\xff.png"]
    assert [dataset[i].label for i in range(len(dataset))] == [0, 0, 0, 1, 2]
    for index in (-1, 5):
        with pytest.raises(IndexError):
            dataset[index]


def test_options_and_registration(tmp_path):
    path = folder(tmp_path, {"1.png": FILES["rgb.png"]})
    options = registry.datasets.get("image_folder").options
    assert {name: o.default for name, o in options.items() if not o.required} == {"flip": True, "decoder": "exact"}
    assert options["path"].required and all(o.doc for o in options.values())
    assert not ImageFolder(8, path=path, flip=False).flip
    with pytest.raises(ValidationError, match="'exact' or 'fast'"):
        registry.datasets.get("image_folder").schema()(path=path, decoder="quick")


def test_workers_get_a_small_copy(tmp_path):
    path = folder(tmp_path, {f"{i:05}.png": lambda f: f.touch() for i in range(1000)})
    dataset = ImageFolder(8, path=path)
    copy = pickle.loads(pickle.dumps(dataset))
    assert [copy.file(i) for i in range(1000)] == [dataset.file(i) for i in range(1000)]
    assert len(pickle.dumps(dataset)) < 1000 * (len("a/00000.png") + 8 + 4) + 1000


def test_workers_keep_quiet(tmp_path):
    path = folder(tmp_path, {"1.png": FILES["palette_with_alpha.png"]})
    state = pickle.dumps(ImageFolder(8, path=path))
    with warnings.catch_warnings(record=True) as remarks:
        warnings.resetwarnings()  # as in a new process
        warnings.simplefilter("always")
        pickle.loads(state)[0]
    assert not remarks


def test_an_empty_class_keeps_its_label_and_is_reported(tmp_path):
    folder(tmp_path, {}, "a")
    dataset = ImageFolder(8, path=folder(tmp_path, {"1.png": FILES["rgb.png"]}, "b"))
    assert dataset.num_classes == 2 and dataset[0].label == 1
    assert dataset.class_counts() == [0, 1]
    classes = Classes.of(dataset)
    (note,) = classes.notes()
    assert note.startswith("1 of 2 classes have no images") and note.endswith("0 'a'")
    assert classes.with_images(2) == [1]


def test_a_missing_folder_says_how_to_get_imagenet(tmp_path):
    for path in (str(tmp_path / "nowhere"), ""):
        with pytest.raises(DataError) as caught:
            ImageFolder(8, path=path)
        message = str(caught.value)
        assert f"'{path}' is not a folder" in message and "[dataset] path" in message
        assert "n01440764/*.JPEG" in message and "image-net.org" in message and "ILSVRC/imagenet-1k" in message


def test_a_folder_without_classes_or_images_says_what_it_holds(tmp_path):
    FILES["rgb.png"](tmp_path / "1.png")
    with pytest.raises(DataError, match=r"no sub-folders, one per class; it holds 1 \.png\."):
        ImageFolder(8, path=str(tmp_path))
    folder(tmp_path, {f"{i}.tar": lambda f: f.touch() for i in range(3)}, "n01440764")
    with pytest.raises(DataError, match=r"1 sub-folders \(n01440764\) but no images \(\.jpg .*it holds 3 \.tar"):
        ImageFolder(8, path=str(tmp_path))


def test_splits_are_not_taken_for_classes(tmp_path):
    for split in ("train", "val"):
        (tmp_path / split).mkdir()
        folder(tmp_path / split, {"1.png": FILES["rgb.png"]}, "n01440764")
    with pytest.raises(DataError, match=r"\(train, val\) are splits, not classes; set \[dataset\] path to '.*/train'"):
        ImageFolder(8, path=str(tmp_path))
    assert ImageFolder(8, path=str(tmp_path / "train")).num_classes == 1
