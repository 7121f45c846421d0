"""python -m trainer pack: write a dataset as tar shards of square crops, which the dataset webdataset reads."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from trainer import config as configs

if TYPE_CHECKING:
    from components.contracts import Dataset

SUMMARY = "write a dataset as tar shards of square crops, which the dataset webdataset reads"
SIZE = 256
CLASS_FOLDERS, SHARDS = "image_folder", "webdataset"  # what folders are otherwise; what reads the output
LIMITS = {"size": (1, 2**16), "quality": (0, 100), "shard_size": (1, 10**9), "workers": (0, 1024)}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "source",
        metavar="CONFIG_OR_FOLDER",
        help="TOML config whose dataset to pack, or a folder: of class folders, tar shards, or Parquet or Arrow files",
    )
    parser.add_argument("--out", required=True, metavar="FOLDER", help="folder of the shards, created if missing")
    parser.add_argument(
        "--size", type=int, help="side of the crops in pixels (default: training.resolution; of a folder, 256)"
    )
    parser.add_argument("--shard-size", type=int, default=4096, help="images per shard (default: 4096)")
    parser.add_argument(
        "--format",
        choices=("png", "jpg", "webp", "original"),
        default="png",
        help="png (default): without loss; original: the files as they are, not cropped",
    )
    parser.add_argument("--quality", type=int, default=95, help="of jpg and webp, 0 to 100 (default: 95)")
    parser.add_argument(
        "--workers",
        type=int,
        default=min(os.cpu_count() or 1, 16),
        help="processes that read and encode (default: the CPUs, at most 16)",
    )
    parser.epilog = (
        "The crop is that of training. What crops lose: other resolutions (at most this size is sound), the parts of\n"
        "the image outside the central square and, as jpg or webp, some detail. Unreadable images are left out.\n"
        "Options of the dataset: --dataset.KEY=VALUE. Repeat the command to resume after an interruption.\n"
        "Then train: python -m trainer train CONFIG --dataset.name=webdataset --dataset.path=FOLDER"
    )


def run(arguments: argparse.Namespace, overrides: list[str]) -> int:
    for name, (low, high) in LIMITS.items():
        value = vars(arguments)[name]
        if value is not None and not low <= value <= high:
            raise configs.ConfigError(f"--{name.replace('_', '-')}={value}: expected {low} to {high}")
    from tqdm import tqdm

    from components import registry
    from components.data.classes import Classes
    from components.data.image_dataset import ImageDataset
    from components.data.loader import DataError
    from components.files.lock import owned
    from trainer.caching.packing import ORIGINAL, Choices, Packing, size_of

    dataset, table, size, max_unreadable = open_dataset(arguments, overrides)
    if arguments.format == ORIGINAL and not isinstance(dataset, ImageDataset):
        raise configs.ConfigError(f"--format=original: the dataset '{table.name}' has no image files; choose png")
    if dataset.conditions:
        raise configs.ConfigError(f"the dataset '{table.name}' has conditions beside the class, which pack cannot keep")
    if not len(dataset):
        raise DataError(f"the dataset '{table.name}' is empty")
    for note in Classes.of(dataset).notes():
        print(f"note: {note}", file=sys.stderr)
    out = Path(arguments.out).expanduser()
    choices = Choices(size, arguments.format, arguments.quality, arguments.shard_size)
    with owned(out, "--out"):
        packing = Packing(out, dataset, table, choices, max_unreadable)
        count = sum(len(packing.rows(number)) for number in packing.missing())
        with tqdm(total=count, unit="image", disable=None, dynamic_ncols=True) as bar:
            packing.run(arguments.workers, bar.update)
        written = registry.datasets.get(SHARDS).cls(size, path=str(out))  # also stores the index
    lost = len(dataset) - len(written)
    print(
        f"{'Already complete' if packing.complete else 'Done'}: {len(written)} images of {written.num_classes} classes "
        f"in {packing.shards} shards in {out}/ ({size_of(out) / 2**30:.2f} GiB).\n"
        + (f"{lost} were unreadable and left out.\n" if lost else "")
        + f"Train on it: python -m trainer train CONFIG --dataset.name={SHARDS} --dataset.path={out}"
    )
    return 0


def open_dataset(
    arguments: argparse.Namespace, overrides: list[str]
) -> tuple[Dataset, configs.PluginTable, int, float]:
    """The dataset to pack, its table, the side of its crops, and the fraction of images that may be unreadable.

    Raises:
        ConfigError: the source is missing, or an option is unknown.
        DataError: the dataset cannot be opened.
    """
    from components import registry
    from trainer.run.construct import make_plugin

    source = Path(arguments.source).expanduser()
    if source.is_dir():
        registry.discover("plugins", lazy=True)
        name, options = plugin_for(source), {"path": str(source)}
        for key, value in configs.parse_overrides(overrides):
            section, _, option = key.partition(".")
            if section != "dataset":
                raise configs.ConfigError(f"--{key}: for a folder, set options of its dataset only: --dataset.KEY")
            options[option] = value
        configs.check_table(registry.datasets.get(name).schema(), options, "--dataset.")
        table, size, max_unreadable = configs.PluginTable(name=name, **options), arguments.size or SIZE, 0.01
    elif source.suffix == ".toml":
        config = configs.load(str(source), overrides)
        table, max_unreadable = config.dataset, config.loader.max_unreadable
        size = arguments.size or config.training.resolution
    else:
        raise configs.ConfigError(f"'{arguments.source}' is neither a folder nor a .toml file; see pack --help")
    return make_plugin("dataset", "dataset", table, size), table, size, max_unreadable


def plugin_for(folder: Path) -> str:
    """The dataset that reads a folder: by a file of its ``suffixes`` at most two folders below, else class folders."""
    from components import registry

    for plugin in registry.datasets:
        for suffix in plugin.cls.suffixes:
            if any(any(folder.glob(f"{above}*{suffix}")) for above in ("", "*/", "*/*/")):
                return plugin.name
    return CLASS_FOLDERS
