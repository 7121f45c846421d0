"""Benchmark of reading images: images/s of each dataset beside torchvision's ImageFolder, and how far pixels differ.

    python benchmarks/images.py --out FOLDER [--data FOLDER] [--resolutions 256 128] [--workers 0 1 2]

Every reader goes from files to collated batches in one thread, alternating; times are CPU times of the process, which
other processes disturb less. Without --data, it draws JPEGs of 500 x 375 with the spectrum and file size of photos.
"Stores" are the same images in a random order from the original files, shards, Arrow, Parquet in row groups of 100
(the latter two need pyarrow), and from what `pack` writes at that resolution.
FOLDER/images.json holds the results.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import PIL.Image
import torch
from PIL.Image import Resampling
from torch import Tensor
from torch.utils.data import default_collate

from benchmarks.results import Results
from benchmarks.workload import machine
from components.contracts import Dataset, DatasetItem
from components.data import columns
from components.data.loader import collate, make_loader
from components.data.pixels import to_float
from components.evaluation.comparison import frechet_distance
from components.evaluation.statistics import Moments
from plugins.datasets.hf_dataset import HFDataset
from plugins.datasets.image_folder import ImageFolder
from plugins.datasets.webdataset import WebDataset
from plugins.encoders.tiny_vit import TinyViT

Reader = Callable[[list[int]], Tensor]
FEATURES = "mean of the patch tokens of encoder tiny_vit (96 features, trained on dataset shapes), of tiles of 64 px"


def photo(seed: int, width: int = 500, height: int = 375) -> PIL.Image.Image:
    """Random image with the 1/f amplitudes of photos, about 105 KB at the quality 85, the mean size in ImageNet."""
    random = np.random.default_rng(seed)
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None])
    frequency[0, 0] = 1
    planes = []
    for deviation in (60, 14, 14):  # luminance, two colors
        plane = np.fft.irfft2(np.fft.rfft2(random.standard_normal((height, width))) / frequency, s=(height, width))
        planes.append(128 + deviation * (plane - plane.mean()) / plane.std())
    pixels = np.stack(planes, -1).clip(0, 255).round().astype(np.uint8)
    return PIL.Image.merge("YCbCr", [PIL.Image.fromarray(pixels[..., c].copy()) for c in range(3)]).convert("RGB")


def draw(folder: Path, count: int) -> None:
    (folder / "photos").mkdir(parents=True)
    for seed in range(count):
        photo(seed).save(folder / "photos" / f"{seed:05}.jpg", quality=85)


def published_crop(image: PIL.Image.Image, resolution: int) -> PIL.Image.Image:
    """ADM's crop (arXiv 2105.05233), as in its data preparation: resize the whole image, then crop."""
    while min(image.size) >= 2 * resolution:
        image = image.resize((image.width // 2, image.height // 2), Resampling.BOX)
    scale = resolution / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Resampling.BICUBIC)
    left, top = (image.width - resolution) // 2, (image.height - resolution) // 2
    return image.crop((left, top, left + resolution, top + resolution))


def readers(data: str, resolution: int) -> dict[str, Reader]:
    """Functions from indices to a batch uint8 (B, 3, R, R), or float in [-1, 1], by name.

    "plain": torchvision's ImageFolder, ADM's crop and PILToTensor. "plain, float": with ToTensor and Normalize instead,
    as in the training scripts of DiT and SiT.
    """
    from torchvision import datasets, transforms

    def plain(*steps: Callable) -> Reader:
        def crop(image: PIL.Image.Image) -> PIL.Image.Image:
            return published_crop(image, resolution)

        dataset = datasets.ImageFolder(data, transforms.Compose([crop, *steps]))
        return lambda indices: default_collate([dataset[i] for i in indices])[0]

    def ours(decoder: Any) -> Reader:
        dataset = ImageFolder(resolution, path=data, decoder=decoder)
        return lambda indices: collate([dataset[i] for i in indices]).images

    normalize = transforms.Normalize([0.5] * 3, [0.5] * 3)
    return {
        "plain": plain(transforms.PILToTensor()),
        "plain, float": plain(transforms.ToTensor(), normalize),
        "exact": ours("exact"),
        "fast": ours("fast"),
    }


def stores(data: str, folder: Path, resolution: int) -> dict[str, Reader]:
    """Readers of the same images from other files, written into ``folder``, by name; "image_folder" for comparison.

    "shards", "arrow" and "parquet" (the latter two if pyarrow is installed) hold the original files; "packed png" and
    "packed jpg" the crops.
    """
    from trainer.__main__ import main as trainer

    def pack(name: str, *words: str) -> str:
        if trainer(["pack", data, f"--out={folder / name}", f"--size={resolution}", "--workers=0", *words]):
            raise RuntimeError("pack failed")
        return str(folder / name)

    images = ImageFolder(resolution, path=data)
    found: dict[str, Dataset] = {
        "image_folder": images,
        "shards": WebDataset(resolution, path=pack("shards", "--format=original")),
    }
    if importlib.util.find_spec("pyarrow"):
        for kind in ("arrow", "parquet"):
            write_table(images, folder / f"{kind}/train.{kind}")
            found[kind] = HFDataset(resolution, path=str(folder / kind))
    for kind in ("png", "jpg"):
        found[f"packed {kind}"] = WebDataset(resolution, path=pack(f"packed {kind}", f"--format={kind}"))

    def item(dataset: Dataset, index: int) -> DatasetItem:
        columns.forget()  # in a large dataset, hardly any row group is already decoded
        return dataset[index]

    def reader(dataset: Dataset) -> Reader:
        return lambda indices: collate([item(dataset, i) for i in indices]).images

    return {name: reader(dataset) for name, dataset in found.items()}


def write_table(images: ImageFolder, file: Path) -> None:
    """The files of an image folder as one Arrow or Parquet file, 100 to a block, as the datasets library does."""
    import pyarrow
    from pyarrow import parquet

    file.parent.mkdir()
    rows = [{"bytes": Path(images.file(i)).read_bytes(), "path": None} for i in range(len(images))]
    table = pyarrow.table({"image": rows, "label": [images.label(i) for i in range(len(images))]})
    if file.suffix == ".parquet":
        parquet.write_table(table, file, row_group_size=100)
    else:
        with pyarrow.OSFile(str(file), "wb") as out, pyarrow.ipc.new_stream(out, table.schema) as writer:
            writer.write_table(table, max_chunksize=100)


def speed(
    found: dict[str, Reader], batches: list[list[int]], rounds: int, base: str = "plain"
) -> dict[str, dict[str, float]]:
    """Images per CPU second of each reader, and the median over the rounds of its ratio to the reader ``base``."""
    count = sum(map(len, batches))
    seconds: dict[str, list[float]] = {name: [] for name in found}
    for _ in range(rounds + 1):
        for name, read in found.items():
            start = time.process_time()
            for indices in batches:
                read(indices)
            seconds[name].append(time.process_time() - start)
    seconds = {name: times[1:] for name, times in seconds.items()}  # the first round warms up
    return {
        name: {
            "images/s": round(count / median(times), 1),
            "most images/s": round(count / min(times), 1),
            f"ratio to {base}": round(median(a / b for a, b in zip(seconds[base], times)), 3),
        }
        for name, times in seconds.items()
    }


@torch.inference_mode()
def differences(found: dict[str, Reader], batches: list[list[int]]) -> dict[str, Any]:
    """Differences to "plain" in levels of 255, and the Frechet distances (without a factor) between their features.

    For scale: the distance between the two halves of "plain".
    """
    side = found["plain"]([0]).shape[-1]
    tile = side if side % 64 else 64
    network = TinyViT(tile, tile // 4)
    network.load_weights()
    moments = {name: Moments(network.embed_dim) for name in ("plain", "exact", "fast", "half 0", "half 1")}
    levels: dict[str, list[np.ndarray]] = {"exact": [], "fast": []}
    for number, indices in enumerate(batches):
        images = {name: found[name](indices) for name in ("plain", *levels)}
        for name, batch in images.items():
            tiles = batch.unfold(2, tile, tile).unfold(3, tile, tile).permute(0, 2, 3, 1, 4, 5).flatten(0, 2)
            features = network(to_float(tiles)).mean(1)
            moments[name].update(features)
            if name == "plain":
                moments[f"half {number % 2}"].update(features)
            else:
                apart = (batch.int() - images["plain"].int()).abs()
                levels[name].append(np.bincount(apart.flatten().numpy(), minlength=256))
    gaussians = {name: m.gaussian() for name, m in moments.items() if m.count > 1}

    def distance(a: str, b: str) -> float | None:
        if a not in gaussians or b not in gaussians:
            return None
        return float(f"{frechet_distance(gaussians[a], gaussians[b], allow_singular=True).value:.3g}")

    result: dict[str, Any] = {"features": FEATURES}
    for name, counts in levels.items():
        histogram = sum(counts) / sum(map(np.sum, counts))
        result[name] = {
            "most": int(histogram.nonzero()[0].max()),
            "mean": float(f"{float(histogram @ np.arange(256)):.3g}"),
            "share of values": float(f"{1 - histogram[0]:.3g}"),
            "Frechet distance": distance(name, "plain"),
        }
    return result | {"Frechet distance of halves": distance("half 0", "half 1")}


def loading(data: str, resolution: int, workers: int, batch: int, batches: int) -> dict[str, float]:
    """Images per second of wall time that the training loader delivers with each decoder, after its first batches."""
    found = {}
    for decoder in ("exact", "fast"):
        dataset = ImageFolder(resolution, path=data, decoder=decoder)
        stream = iter(make_loader(dataset, seed=0, batch_size=batch, workers=workers, resolution=resolution))
        for _ in range(1 + 2 * workers):
            next(stream)
        start = time.perf_counter()
        for _ in range(batches):
            next(stream)
        found[decoder] = round(batches * batch / (time.perf_counter() - start), 1)
        if workers:
            stream._shutdown_workers()
    return found


def measure(arguments: argparse.Namespace, data: str, results: Results) -> None:
    torch.set_num_threads(1)
    results.part("machine", 0, lambda: machine(torch.device("cpu")))
    for resolution in arguments.resolutions:
        found = readers(data, resolution)
        count = min(arguments.images, len(ImageFolder(resolution, path=data)))
        batches = [list(range(count))[i : i + arguments.batch] for i in range(0, count, arguments.batch)]
        results.part(f"images/s, {resolution} px", 0, partial(speed, found, batches, arguments.rounds))
        with tempfile.TemporaryDirectory() as folder:
            order = np.random.default_rng(0).permutation(count).tolist()
            shuffled = [order[i : i + arguments.batch] for i in range(0, count, arguments.batch)]
            others = partial(stores, data, Path(folder), resolution)
            run = partial(lambda make, *rest: speed(make(), *rest, "image_folder"), others, shuffled, arguments.rounds)
            results.part(f"stores' images/s, {resolution} px", 0, run)
        results.part(f"differences, {resolution} px", 0, partial(differences, found, batches))
    side = arguments.resolutions[0]
    for workers in arguments.workers:
        run = partial(loading, data, side, workers, arguments.batch, 4 * arguments.rounds)
        results.part(f"loader's images/s, {side} px, {workers} workers", 0, run)


def main(argv: list[str] | None = None) -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(description="Time the readers of image files and compare their pixels.")
    parser.add_argument("--out", type=Path, required=True, help="folder for images.json")
    parser.add_argument("--data", help="folder with one sub-folder per class (default: draws photos)")
    parser.add_argument("--images", type=int, default=256, help="number of images (default: 256)")
    parser.add_argument("--batch", type=int, default=32, help="images per batch (default: 32)")
    parser.add_argument(
        "--resolutions", type=int, nargs="+", default=[256, 128], metavar="R", help="(default: 256 128)"
    )
    parser.add_argument("--rounds", type=int, default=7, help="measurements per reader (default: 7)")
    parser.add_argument("--workers", type=int, nargs="*", default=[0, 1, 2], help="worker processes (default: 0 1 2)")
    parser.add_argument("--seconds", type=float, default=3600, help="time limit in seconds (default: 3600)")
    arguments = parser.parse_args(argv)
    results = Results(arguments.out / "images.json", arguments.seconds)
    with tempfile.TemporaryDirectory() as folder:
        if arguments.data is None:
            draw(Path(folder, "data"), arguments.images)
        data = os.path.abspath(arguments.data or Path(folder, "data"))
        measure(arguments, data, results)
    return int(any(part["status"] != "done" for part in results.parts.values()))


if __name__ == "__main__":
    sys.exit(main())
