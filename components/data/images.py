"""The reader of image files for training, encoding and evaluation: which files of a folder count, and their RGB pixels.

Formats: those of :data:`FORMATS` that the installed Pillow decodes. Links are followed, but each folder is listed once
below a class. Hidden files and folders (names that begin with a dot) and other files are left out, and counted.

Pixels become 8-bit RGB: gray is repeated, palettes are looked up, CMYK is converted without a profile, 16 bits are
scaled to 8, alpha is dropped (the stored color shows, as in ADM), EXIF rotation is applied, and the first frame of an
animation is read.
"""

from __future__ import annotations

import collections
import contextlib
import functools
import io
import logging
import math
import os
import struct
import warnings
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from PIL.Image import Image

logger = logging.getLogger(__name__)

# Formats of pictures by extension. Pillow knows more: EPS would run Ghostscript, and PDF is written only.
FORMATS = {
    **dict.fromkeys((".jpg", ".jpeg", ".jpe", ".jfif"), "JPEG"),
    **dict.fromkeys((".png", ".apng"), "PNG"),
    ".webp": "WEBP",
    ".bmp": "BMP",
    ".dib": "DIB",
    ".gif": "GIF",
    **dict.fromkeys((".tif", ".tiff"), "TIFF"),
    **dict.fromkeys((".avif", ".avifs"), "AVIF"),
    **dict.fromkeys((".jp2", ".j2k", ".j2c", ".jpx", ".jpf", ".jpc"), "JPEG2000"),
    **dict.fromkeys((".ppm", ".pgm", ".pbm", ".pnm"), "PPM"),
    ".tga": "TGA",
    ".qoi": "QOI",
    **dict.fromkeys((".heic", ".heif", ".hif"), "HEIF"),  # if pillow_heif is registered
    ".jxl": "JXL",  # if pillow_jxl is registered
}
LEAST = {"WEBP": "webp", "AVIF": "avif", "JPEG2000": "jpg_2000"}  # libraries that Pillow may have been built without


class ImageError(Exception):
    """An image file cannot be read; the message is the reason, without the path."""


def printable(path: str | os.PathLike) -> str:
    """The path as text that any log, terminal and JSON file can hold: bytes that are not UTF-8 become ``\\xff``."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


@functools.cache
def extensions() -> tuple[str, ...]:
    """Extensions of the formats that the installed Pillow decodes, in lower case."""
    import PIL.Image
    from PIL import features

    PIL.Image.init()
    lacking = {name for name, library in LEAST.items() if not features.check(library)}
    return tuple(e for e, name in FORMATS.items() if name in PIL.Image.OPEN and name not in lacking)


@functools.cache
def _formats() -> list[str]:
    """The formats to decode: a file with the extension of one of them may be in any other, even in EPS."""
    return sorted({FORMATS[extension] for extension in extensions()})


class Listing:
    """Image files of a folder, and what is left out.

    Args:
        root: the folder.

    Attributes:
        folders: names of the folders in it, sorted.
        files: names of the image files in the root itself, sorted.
        left_out: number of files and folders that are left out, by reason.

    Raises:
        OSError: the folder cannot be opened.
    """

    def __init__(self, root: str) -> None:
        self.root = root
        self.left_out: collections.Counter[str] = collections.Counter()
        # A link to one of these would lead back here.
        self._above, place = {_identity(root)}, os.path.realpath(root)
        while place != os.path.dirname(place):
            place = os.path.dirname(place)
            self._above.add(_identity(place))
        folders, links, files = self._scan("")
        links = [name for name in links if self._is_new(_identity(os.path.join(root, name)), self._above)]
        self.folders, self.files = sorted(folders + links), sorted(files)

    def below(self, folder: str) -> list[str]:
        """Image files in a folder of the root and below it, relative to the root, in any order.

        Raises:
            OSError: a folder cannot be opened.
        """
        found: list[str] = []
        pending, later, seen = [folder], list[str](), set(self._above)
        while pending or later:
            # Links come after all folders, in order: what is listed must not depend on the order of directory entries.
            later.sort(reverse=True)
            here = pending.pop() if pending else later.pop()
            if self._is_new(identity := _identity(os.path.join(self.root, here)), seen):
                seen.add(identity)
                folders, links, files = self._scan(here)
                found += [f"{here}/{name}" for name in files]
                pending += [f"{here}/{name}" for name in folders]
                later += [f"{here}/{name}" for name in links]
        return found

    def all(self) -> list[str]:
        """Image files in the root and below it, sorted by folder."""
        found = [*self.files, *(file for folder in self.folders for file in self.below(folder))]
        return sorted(found, key=lambda file: file.split("/"))

    def say(self, what: str) -> None:
        """Log what was left out, once in a process."""
        say_left_out(what, self.left_out)

    def _is_new(self, identity: tuple[int, int], seen: set[tuple[int, int]]) -> bool:
        if identity in seen:
            self.left_out["links to a folder that is listed already or contains the link"] += 1
        return identity not in seen

    def _scan(self, folder: str) -> tuple[list[str], list[str], list[str]]:
        """Names of the folders, links to folders and image files in a folder. Needs no stat per file."""
        folders, links, files = [], [], []
        with os.scandir(os.path.join(self.root, folder)) as entries:
            for entry in entries:
                extension = os.path.splitext(entry.name)[1].lower()
                if entry.name.startswith("."):
                    self.left_out["hidden"] += 1
                elif entry.is_dir(follow_symlinks=False):
                    folders.append(entry.name)
                elif extension in extensions():
                    files.append(entry.name)
                elif entry.is_symlink() and not os.path.exists(entry.path):
                    self.left_out["dangling links"] += 1
                elif entry.is_dir():
                    links.append(entry.name)
                elif extension in FORMATS:
                    self.left_out[f"{extension} (this Pillow cannot read {FORMATS[extension]}; convert them)"] += 1
                else:
                    self.left_out[printable(extension) or "without extension"] += 1
        return folders, links, files


def say_left_out(what: str, left_out: collections.Counter[str]) -> None:
    """Log, once in a process, how much of ``what`` was left out, by reason."""
    counts = [f"{count} {reason}" for reason, count in left_out.most_common()]
    if counts:
        _warn_once(f"{what}: left out {', '.join(counts[:8])}{', ...' if len(counts) > 8 else ''}")


def read_rgb(source: str | os.PathLike | bytes) -> Image:
    """Read an image file, or its content, as 8-bit RGB, upright.

    Raises:
        ImageError: it cannot be read; says why.
    """
    import PIL.Image
    from PIL.ImageOps import exif_transpose

    try:
        file = io.BytesIO(source) if isinstance(source, bytes) else source
        with PIL.Image.open(file, formats=_formats()) as image:
            image.load()
            # In a JPEG, Pillow takes 3 % of the time to look for metadata in vain.
            if image.format != "JPEG" or "exif" in image.info or "xmp" in image.info:
                with contextlib.suppress(Exception):  # the pixels are valid even if EXIF is broken
                    exif_transpose(image, in_place=True)
            return _to_rgb(image)
    except PIL.Image.DecompressionBombError as error:
        limit = "PIL.Image.MAX_IMAGE_PIXELS, which guards against decompression bombs; scale the image down"
        raise ImageError(f"{str(error).split(', could')[0].rstrip('.')}: {limit}") from error
    except PIL.UnidentifiedImageError as error:
        raise ImageError("its content is none of the image formats that are read, or damaged") from error
    except OSError as error:
        raise ImageError(error.strerror or str(error)) from error
    except Exception as error:  # decoders raise many types of exceptions for broken files
        raise ImageError(f"{type(error).__name__}: {error}") from error


def read_rgb_fast(source: str | os.PathLike | bytes) -> Image | Tensor:
    """Read an image file, or its content, as 8-bit RGB, upright; JPEGs become tensors uint8 (3, H, W), channels last.

    The pixels are those of :func:`read_rgb` if Pillow and torchvision contain the same JPEG library. Other formats,
    JPEGs in CMYK, rotated ones and those that torchvision refuses are read by Pillow. See :func:`check_fast_decoder`.

    Raises:
        ImageError: it cannot be read; says why.
    """
    with contextlib.suppress(OSError, RuntimeError):  # Pillow knows the reason
        # PyTorch warns about tensors on bytes, which are read-only; copying 100 KB takes 0.01 ms.
        in_memory = isinstance(source, bytes)
        content = np.frombuffer(bytearray(source), np.uint8) if in_memory else np.fromfile(source, np.uint8)
        if is_plain_jpeg(memoryview(content)):
            return _torchvision_jpeg(content)
    return read_rgb(source)


def check_fast_decoder() -> None:
    """Raise an :class:`ImageError` if torchvision cannot decode JPEGs."""
    import PIL.Image

    file = io.BytesIO()
    PIL.Image.new("RGB", (8, 8)).save(file, format="JPEG")
    try:
        _torchvision_jpeg(np.frombuffer(bytearray(file.getvalue()), np.uint8))
    except Exception as error:  # not installed, for another PyTorch, or without a JPEG library
        raise ImageError(f"torchvision cannot decode JPEGs here ({type(error).__name__}: {error})") from error


def silence_decoders() -> None:
    """Ignore warnings that would come from every worker: Pillow's about files, torchvision's about its future."""
    warnings.filterwarnings("ignore", module=r"PIL\.")
    warnings.filterwarnings("ignore", message="The image decoding and encoding capabilities of TorchVision")


def is_plain_jpeg(content: memoryview) -> bool:
    """Whether a file is a Huffman-coded JPEG, 8 bits, gray or of three components, upright and not too large.

    Reads the segments itself: opening the file with Pillow for that takes 5 % of the time to read an image.
    """
    import PIL.Image

    place = 2
    try:
        while content[:2] == b"\xff\xd8":
            begin, marker, length = struct.unpack_from(">BBH", content, place)
            segment = content[place + 4 : place + 2 + length]
            if begin != 0xFF or marker in (0xFF, 0xD9, 0xDA):  # no segment, end of the image, pixels
                return False
            if marker in (0xC0, 0xC1, 0xC2):  # baseline, extended, progressive
                bits, height, width, components = struct.unpack_from(">BHHB", segment)
                limit = PIL.Image.MAX_IMAGE_PIXELS or math.inf
                return bits == 8 and components in (1, 3) and 0 < width * height <= limit
            if marker == 0xE1 and _may_turn(bytes(segment)):
                return False
            place += 2 + length
    except struct.error:  # the file ends
        pass
    return False


def _may_turn(segment: bytes) -> bool:
    """Whether a metadata segment of a JPEG contains an orientation, unless it is "upright" in EXIF."""
    import PIL.Image

    if not segment.startswith(b"Exif"):
        return b"Orientation" in segment  # XMP
    exif = PIL.Image.Exif()
    try:
        exif.load(segment)
        return exif.get(0x0112, 1) != 1
    except Exception:  # Pillow raises many types of exceptions for broken metadata
        return True


def _to_rgb(image: Image) -> Image:
    import PIL.Image

    if image.mode == "F":
        raise ImageError("its pixels are floats, whose range no format defines; convert it to 8 or 16 bits")
    if image.mode.startswith("I"):
        # 16-bit gray: convert() would clip at 255. Keep the high byte, as PIL does for 16-bit RGB.
        gray = np.asarray(image).astype(np.int64)
        if gray.min() < 0 or gray.max() > 65535:
            raise ImageError("its pixels exceed 16 bits; convert it to 8 or 16 bits")
        image = PIL.Image.fromarray((gray >> 8).astype(np.uint8))
    return image if image.mode == "RGB" else image.convert("RGB")  # convert() would copy


def _torchvision_jpeg(content: np.ndarray) -> Tensor:
    """Decode a JPEG file's bytes, uint8 (n,), to RGB, uint8 (3, H, W); raises RuntimeError if it is damaged."""
    from torchvision.io import ImageReadMode, decode_jpeg

    return decode_jpeg(torch.from_numpy(content), mode=ImageReadMode.RGB)


def _identity(path: str) -> tuple[int, int]:
    found = os.stat(path)
    return found.st_dev, found.st_ino


@functools.cache
def _warn_once(message: str) -> None:
    logger.warning(message)
