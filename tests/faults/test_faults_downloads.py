"""Weights are downloaded once per machine, however many processes start together."""

import multiprocessing
import time
from pathlib import Path

import pytest

from components.files.weights import local_file


def _fetch(folder: str) -> str:
    import huggingface_hub
    from huggingface_hub.utils import LocalEntryNotFoundError

    there = Path(folder, "weights")

    def download(repo_id, filename, revision, local_files_only=False):
        if not there.exists():
            if local_files_only:
                raise LocalEntryNotFoundError("not there")
            with open(Path(folder, "downloads"), "a") as file:
                file.write("1\n")
            time.sleep(0.5)
            there.touch()
        return str(there)

    huggingface_hub.hf_hub_download = download
    huggingface_hub.get_hf_file_metadata = lambda *_, **__: None
    return str(local_file(f"hf://a/b/{Path(folder).name}", "test"))


@pytest.mark.long
def test_four_processes_download_once(tmp_path):
    with multiprocessing.get_context("spawn").Pool(4) as pool:
        assert pool.map(_fetch, [str(tmp_path)] * 4, chunksize=1) == [str(tmp_path / "weights")] * 4
    assert (tmp_path / "downloads").read_text() == "1\n"
