"""webdataset reads tar shards as image_folder reads files, in any order, and refuses damaged and changed ones."""

import os
import pickle
import shutil
import tarfile

import pytest
import torch

from components.data import shards
from components.data.classes import Classes
from components.data.loader import DataError, make_loader
from plugins.datasets.image_folder import ImageFolder
from plugins.datasets.webdataset import WebDataset
from tests.components.data.test_data import take
from tests.support.image_files import noise, samples, write_folder, write_shards, write_tar

torch.set_num_threads(1)


def same(a, b):
    assert len(a) == len(b)
    for i in range(len(a)):
        assert torch.equal(a[i].image, b[i].image) and a[i].label == b[i].label, i
    return True


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path


@pytest.mark.parametrize("decoder", ["exact", "fast"])
def test_shards_give_the_items_of_an_image_folder(tmp_path, decoder):
    images = [*samples(7), (noise(9, (60, 33), "JPEG"), 2)]
    folder = ImageFolder(24, path=str(write_folder(tmp_path / "a", images)), decoder=decoder)
    found = WebDataset(24, path=str(write_shards(tmp_path / "b", images, 3)), decoder=decoder)
    assert same(found, folder) and found.class_counts() == folder.class_counts()
    assert same(pickle.loads(pickle.dumps(found)), folder)  # from the stored index
    assert (found.num_classes, found.class_names, found.flip) == (3, ["0", "1", "2"], True)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_resume_at_another_world_size_continues_the_sequence(tmp_path, workers):
    data = WebDataset(16, path=str(write_shards(tmp_path, samples(30), 4)))
    whole = take(make_loader(data, seed=5, batch_size=8), 8)
    for done in (1, 5):  # within the first epoch, and beyond its end
        for rank in range(2):
            found = take(
                make_loader(data, seed=5, batch_size=8, consumed=8 * done, rank=rank, world=2, workers=workers), 3
            )
            for k, batch in enumerate(found):
                assert torch.equal(batch.images, whole[done + k].images[4 * rank : 4 * rank + 4])
                assert torch.equal(batch.condition.label, whole[done + k].condition.label[4 * rank : 4 * rank + 4])


def test_a_pattern_a_file_and_a_folder_name_the_same_shards(tmp_path, monkeypatch):
    write_shards(tmp_path / "s", samples(6), 3)
    whole = WebDataset(16, path=str(tmp_path / "s"))
    monkeypatch.chdir(tmp_path)
    for path in ("s/{000..002}.tar", "s/*.tar", "s/{000,001,002}.tar"):
        assert same(WebDataset(16, path=path), whole)
    assert len(WebDataset(16, path="s/001.tar")) == 2
    assert shards.expand("{a,b}-{08..11}") == [f"{x}-{n}" for x in "ab" for n in ("08", "09", "10", "11")]


def test_labels_are_indices_or_names_from_cls_or_json(tmp_path):
    image = noise(0)
    members = [
        ("x/1.png", image),
        ("x/1.json", b'{"label": "dog", "size": 3}'),
        ("x/2.PNG", image),
        ("x/2.cls", b"cat\n"),
    ]
    write_tar(tmp_path / "0.tar", members)
    data = WebDataset(16, path=str(tmp_path))
    assert data.class_names == ["cat", "dog"] and [data[i].label for i in range(2)] == [1, 0]
    (tmp_path / "classes.json").write_text('["ape", "dog", "cat"]')
    data = WebDataset(16, path=str(tmp_path))
    assert data.num_classes == 3 and [data[i].label for i in range(2)] == [1, 2]
    (tmp_path / "classes.json").write_text('["dog"]')
    with pytest.raises(DataError, match=r"classes\.json: 1 of 2 labels are none of its 1 classes: 'cat'"):
        WebDataset(16, path=str(tmp_path))
    (tmp_path / "classes.json").unlink()
    write_tar(tmp_path / "0.tar", [("1.png", image), ("1.json", b'{"label": 9, "id": 2}')])
    data = WebDataset(16, path=str(tmp_path), label_key="id")
    assert data[0].label == 2 and data.class_counts() == [0, 0, 1]


def test_what_belongs_to_no_sample_is_left_out_and_counted(tmp_path, caplog):
    image = noise(0)
    members = [("1.png", image), ("1.cls", b"0"), ("1.txt", b"a dog"), ("1.mask.png", image), ("2.png", image)]
    write_tar(tmp_path / "0.tar", [*members, ("3.cls", b"1"), ("._1.png", b"")])
    assert len(WebDataset(16, path=str(tmp_path))) == 1
    for what in ("1 .txt", "1 .mask.png", "1 images without a label", "1 labels without an image", "1 hidden"):
        assert what in caplog.text
    write_tar(tmp_path / "0.tar", [("1.png", image), ("1.txt", b"a dog")])
    with pytest.raises(DataError, match=r"no images with a label \(1 \.txt, 1 images without a label\); .*label_key"):
        WebDataset(16, path=str(tmp_path))


def test_a_long_name_is_read(tmp_path):
    name = "folder/" * 20 + "image"
    write_tar(tmp_path / "0.tar", [(f"{name}.png", noise(1)), (f"{name}.cls", b"0")])
    assert WebDataset(16, path=str(tmp_path))[0].unreadable is None


def test_an_unreadable_member_is_replaced_and_named(tmp_path):
    images = samples(4)
    images[1] = (images[1][0][:300], 0)
    item = WebDataset(16, path=str(write_shards(tmp_path, images)))[1]
    assert item.unreadable == f"{tmp_path}/000.tar: 0001.png" and "truncated" in item.reason
    assert item.label == images[2][1] and torch.equal(item.image, WebDataset(16, path=str(tmp_path))[2].image)


@pytest.mark.parametrize("cut", ["end", "header", "data", "byte"])
def test_a_damaged_shard_is_refused(tmp_path, cut):
    file = write_shards(tmp_path, samples(4), 1) / "000.tar"
    with tarfile.open(file) as tar:
        last = tar.getmembers()[-1]
        end = last.offset_data + 512
    content = bytearray(file.read_bytes())
    content[last.offset + 3] ^= cut == "byte"
    file.write_bytes(content[: {"end": end, "header": last.offset + 100, "data": last.offset_data}.get(cut)])
    with pytest.raises(DataError, match=r"webdataset: .*000\.tar cannot be read: .*(cut off|end of data)"):
        WebDataset(16, path=str(tmp_path))


def test_the_index_is_made_once_and_again_for_changed_shards(home, monkeypatch):
    scans = []
    scan = shards._scan
    monkeypatch.setattr(shards, "_scan", lambda *a: scans.append(a) or scan(*a))
    folder = write_shards(home / "s", samples(6), 2)
    for _ in range(2):
        assert len(WebDataset(16, path=str(folder))) == 6
    assert len(scans) == 2
    stored = next(folder.glob(".titanrepa-index-*"))
    stored.write_bytes(stored.read_bytes()[:100])  # damaged
    assert len(WebDataset(16, path=str(folder))) == 6 and len(scans) == 4
    write_shards(folder, samples(8), 2)
    assert len(WebDataset(16, path=str(folder))) == 8 and len(scans) == 6
    assert not (home / "cache").exists()


def test_the_index_of_a_read_only_folder_is_kept_elsewhere(home, monkeypatch):
    folder, write = write_shards(home / "s", samples(4)), shards._save

    def refused(place, index):
        if place.parent == folder:
            raise PermissionError(13, "Permission denied")
        write(place, index)

    monkeypatch.setattr(shards, "_save", refused)
    WebDataset(16, path=str(folder))
    assert list((home / "cache/titanrepa").glob(".titanrepa-index-*"))
    monkeypatch.setattr(shards, "_scan", None)
    assert len(WebDataset(16, path=str(folder))) == 4


def test_a_shard_that_changes_under_a_run_is_unreadable(tmp_path):
    data = WebDataset(16, path=str(write_shards(tmp_path, samples(6), 2)))
    os.utime(tmp_path / "001.tar", (1, 1))
    shards._open.cache_clear()  # as in a new worker
    item = data[3]
    assert "001.tar" in item.unreadable and "changed since the dataset was opened" in item.reason
    shutil.rmtree(tmp_path)
    shards._open.cache_clear()
    with pytest.raises(DataError, match=r"6 images in a row cannot be read, .* Check that .* still exists"):
        data[0]


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("no/{000..003}.tar", r"4 of 4 shards are missing, such as .*/no/000\.tar"),
        ("*.nothing", "no such file"),
        (".", r"holds no \.tar files \(it holds 1 \.gz, 1 \.txt\)"),
        ("a.tar.gz", "cannot be read"),
    ],
)
def test_what_cannot_be_read_says_what_to_do(tmp_path, monkeypatch, path, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.txt").write_text("")
    with tarfile.open("a.tar.gz", "w:gz"):
        pass
    with pytest.raises(DataError, match=f"dataset webdataset: .*{message}"):
        WebDataset(16, path=path)


def test_two_images_in_a_sample_are_refused(tmp_path):
    write_tar(tmp_path / "0.tar", [("7.png", noise(0)), ("7.jpg", noise(1)), ("7.cls", b"0")])
    with pytest.raises(DataError, match="sample '7' has several images"):
        WebDataset(16, path=str(tmp_path))


def test_other_shards_are_other_classes_and_counts(tmp_path):
    """What a resume compares; it refuses other classes and reports other counts."""
    before = Classes.of(WebDataset(16, path=str(write_shards(tmp_path, samples(6)))))
    more = Classes.of(WebDataset(16, path=str(write_shards(tmp_path, samples(8)))))
    assert before.difference(more) == "" and before.counts != more.counts
    (tmp_path / "classes.json").write_text('["a", "b", "c"]')
    assert "new: 'a' (index 0)" in before.difference(Classes.of(WebDataset(16, path=str(tmp_path))))
