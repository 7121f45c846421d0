"""Images in folders, tar shards, and Arrow and Parquet files, for tests."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import PIL.Image

Sample = tuple[bytes, int]  # content of an image file, and its class


def noise(seed: int, size: tuple[int, int] = (50, 40), format: str = "PNG", **options) -> bytes:
    """Content of a file of random pixels."""
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    file = io.BytesIO()
    PIL.Image.fromarray(pixels).save(file, format, **options)
    return file.getvalue()


def samples(count: int, classes: int = 3) -> list[Sample]:
    """Noise in the order of an image folder: by class."""
    return [(noise(i), i * classes // count) for i in range(count)]


def write_folder(folder: Path, images: Sequence[Sample], names: str = "abcdefgh") -> Path:
    for number, (content, label) in enumerate(images):
        (folder / names[label]).mkdir(parents=True, exist_ok=True)
        (folder / names[label] / f"{number:04}.png").write_bytes(content)
    return folder


def write_tar(file: Path, members: Sequence[tuple[str, bytes]]) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(file, "w") as tar:
        for name, content in members:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return file


def write_shards(folder: Path, images: Sequence[Sample], shards: int = 2) -> Path:
    """Shards 000.tar, ... with KEY.png and KEY.cls."""
    size = -(-len(images) // shards)
    for shard in range(shards):
        members = []
        for number in range(shard * size, min((shard + 1) * size, len(images))):
            content, label = images[number]
            members += [(f"{number:04}.png", content), (f"{number:04}.cls", str(label).encode())]
        write_tar(folder / f"{shard:03}.tar", members)
    return folder


def write_table(
    file: Path, images: Sequence[tuple], names: Sequence[str] | None = ("a", "b", "c"), rows: int = 4
) -> Path:
    """Arrow stream (.arrow) or Parquet file with the columns image {bytes, path} and label, in blocks of ``rows``."""
    import pyarrow
    from pyarrow import parquet

    file.parent.mkdir(parents=True, exist_ok=True)
    column = [{"bytes": content, "path": f"{i}.png"} for i, (content, _) in enumerate(images)]
    table = pyarrow.table({"image": column, "label": [label for _, label in images]})
    if names is not None:
        features = {"image": {"_type": "Image"}, "label": {"names": list(names), "_type": "ClassLabel"}}
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    if file.suffix == ".parquet":
        parquet.write_table(table, file, row_group_size=rows)
    else:
        with pyarrow.OSFile(str(file), "wb") as out, pyarrow.ipc.new_stream(out, table.schema) as writer:
            writer.write_table(table, max_chunksize=rows)
    return file
