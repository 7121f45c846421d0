"""hf_dataset reads Arrow and Parquet folders as image_folder reads files."""

import builtins
import json
import pickle

import pytest
import torch

from components.data import columns
from components.data.loader import DataError, make_loader
from plugins.datasets.hf_dataset import HFDataset
from plugins.datasets.image_folder import ImageFolder
from tests.components.data.test_data import take
from tests.plugins.datasets.test_webdataset import same
from tests.support.image_files import noise, samples, write_folder, write_table

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def needs_pyarrow(request):
    if "pyarrow_absent" not in request.fixturenames:
        pytest.importorskip("pyarrow", reason='hf_dataset needs pyarrow: pip install "titanrepa[hf]"')


@pytest.fixture
def pyarrow_absent(monkeypatch):
    real = builtins.__import__

    def importing(name, *rest):
        if name.startswith("pyarrow"):
            raise ImportError("No module named 'pyarrow'")
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", importing)


@pytest.mark.parametrize("kind", ["arrow", "parquet"])
def test_tables_give_the_items_of_an_image_folder(tmp_path, kind):
    images = samples(11)
    folder = ImageFolder(24, path=str(write_folder(tmp_path / "a", images)))
    for part, piece in enumerate((images[:5], images[5:])):
        write_table(tmp_path / f"b/data/train-0000{part}-of-00002.{kind}", piece)
    write_table(tmp_path / f"b/data/validation-00000-of-00001.{kind}", images[:2])
    found = HFDataset(24, path=str(tmp_path / "b"))
    assert same(found, folder) and same(pickle.loads(pickle.dumps(found)), folder)
    assert found.class_names == folder.class_names == ["a", "b", "c"]
    assert found.class_counts() == folder.class_counts()
    assert len(HFDataset(24, path=str(tmp_path / "b"), split="validation")) == 2
    with pytest.raises(DataError, match="no split 'test', but 'train', 'validation'; set"):
        HFDataset(24, path=str(tmp_path / "b"), split="test")


@pytest.mark.parametrize("kind", ["arrow", "parquet"])
def test_a_resume_at_another_world_size_continues_the_sequence(tmp_path, kind):
    write_table(tmp_path / f"train.{kind}", samples(30))
    data = HFDataset(16, path=str(tmp_path))
    whole = take(make_loader(data, seed=5, batch_size=8), 6)
    for rank in range(2):
        found = take(make_loader(data, seed=5, batch_size=8, consumed=24, rank=rank, world=2, workers=2), 3)
        for k, batch in enumerate(found):
            assert torch.equal(batch.images, whole[3 + k].images[4 * rank : 4 * rank + 4])


def test_what_save_to_disk_writes(tmp_path):
    """DatasetDict: a folder per split, features in dataset_info.json; cache-*.arrow are results of map()."""
    write_table(tmp_path / "train/data-00000-of-00001.arrow", samples(5), names=None)
    write_table(tmp_path / "train/cache-abc.arrow", samples(9), names=None)
    write_table(tmp_path / "test/data-00000-of-00001.arrow", samples(3), names=None)
    features = {"label": {"names": ["x", "y", "z", "w"], "_type": "ClassLabel"}}
    (tmp_path / "train/dataset_info.json").write_text(json.dumps({"features": features}))
    data = HFDataset(16, path=str(tmp_path))
    assert (len(data), data.class_names) == (5, ["x", "y", "z", "w"])
    assert HFDataset(16, path=str(tmp_path), split="test").class_names == ["0", "1", "2"]


def test_one_row_of_an_arrow_file_is_read_alone_and_a_row_group_once(tmp_path, monkeypatch):
    write_table(tmp_path / "a/x.arrow", samples(8))
    write_table(tmp_path / "b/x.parquet", samples(8))
    read = []
    block = columns.Table.block
    monkeypatch.setattr(columns.Table, "block", lambda self, *place: read.append(place) or block(self, *place))
    arrow, parquet = HFDataset(16, path=str(tmp_path / "a")), HFDataset(16, path=str(tmp_path / "b"))
    read.clear()
    assert isinstance(arrow.encoded(5), bytes) and read == [(1, "image")]
    read.clear()
    for index in (4, 5, 6, 7, 0, 4):  # neighbors, as pack and encode read; two groups are kept
        parquet.encoded(index)
    assert read == [(1, "image"), (0, "image")]


def test_an_unreadable_row_is_replaced_and_named(tmp_path):
    images = samples(4)
    images[1] = (images[1][0][:300], 0)
    images[3] = (None, 2)
    write_table(tmp_path / "train.parquet", images)
    data = HFDataset(16, path=str(tmp_path))
    assert data[1].unreadable == f"{tmp_path}/train.parquet: row 1" and "truncated" in data[1].reason
    assert data[3].reason == "No such file or directory"  # its path, beside the file


def test_paths_and_plain_bytes(tmp_path):
    import pyarrow
    from pyarrow import parquet

    (tmp_path / "1.png").write_bytes(noise(1))
    for name, column in (("p", ["1.png"]), ("b", [noise(1)])):
        parquet.write_table(pyarrow.table({"picture": column, "kind": ["dog"]}), tmp_path / f"{name}.parquet")
    names = {"image_column": "picture", "label_column": "kind"}
    one, other = (HFDataset(16, path=str(tmp_path / f"{name}.parquet"), **names) for name in "pb")
    assert same(one, other) and one[0].unreadable is None and one.class_names == ["dog"]
    with pytest.raises(DataError, match=r"no column 'image'.*\(valid: kind, picture\); set \[dataset\] image_column"):
        HFDataset(16, path=str(tmp_path / "p.parquet"))


def test_large_row_groups_are_said(tmp_path, caplog):
    write_table(tmp_path / "a.parquet", samples(40), rows=20)
    HFDataset(16, path=str(tmp_path))
    assert "a row group of up to 20 images" in caplog.text and "trainer pack" in caplog.text


def test_errors_name_the_file_and_the_remedy(tmp_path):
    def message(**options):
        with pytest.raises(DataError) as error:
            HFDataset(16, path=str(tmp_path), **options)
        return str(error.value)

    assert "no .arrow or .parquet files" in message()
    file = write_table(tmp_path / "x.parquet", [(noise(0), -1), (noise(1), 0)])
    assert "1 of 2 labels are none of its 3 classes: '-1'" in message()
    write_table(file, [(noise(0), None), (noise(1), 0)])
    assert "x.parquet: 1 rows have no 'label'" in message()
    file.write_bytes(file.read_bytes()[:-100])
    assert "x.parquet cannot be read" in message() and "Download it again" in message()
    write_table(tmp_path / "y.arrow", samples(2))
    assert "both .arrow and .parquet" in message()


def test_without_pyarrow_the_command_is_named(tmp_path, pyarrow_absent):
    with pytest.raises(DataError, match=r'hf_dataset: needs pyarrow.*pip install "titanrepa\[hf\]"'):
        HFDataset(16, path=str(tmp_path))
