"""benchmarks/images.py measures every reader and compares their pixels."""

import json

import numpy as np
import pytest

from benchmarks import images


@pytest.mark.long
def test_results(tmp_path):
    options = ["--images", "4", "--batch", "2", "--rounds", "1", "--resolutions", "96", "48", "--workers", "0"]
    assert images.main(["--out", str(tmp_path), *options]) == 0
    parts = json.loads((tmp_path / "images.json").read_text())["parts"]
    for side in (96, 48):
        assert set(parts[f"images/s, {side} px"]["result"]) == {"plain", "plain, float", "exact", "fast"}
        others = parts[f"stores' images/s, {side} px"]["result"]
        assert {"image_folder", "shards", "packed png", "packed jpg"} <= set(others)
        found = parts[f"differences, {side} px"]["result"]
        assert found["exact"]["most"] <= 1 and found["exact"]["share of values"] < 1e-3
        assert 0 < found["fast"]["most"] <= 2 and found["fast"]["mean"] < 0.02
        assert found["fast"]["Frechet distance"] < 1e-3 * found["Frechet distance of halves"]
    assert parts["loader's images/s, 96 px, 0 workers"]["result"]["fast"] > 0


def test_photos_are_as_large_as_those_of_imagenet(tmp_path):
    images.draw(tmp_path / "data", 4)
    files = list((tmp_path / "data" / "photos").iterdir())
    assert 90_000 < np.mean([file.stat().st_size for file in files]) < 120_000
