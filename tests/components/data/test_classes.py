"""Classes of two datasets: equal, or a difference that names what changed."""

import pytest

from components.data.classes import Classes
from plugins.datasets.shapes import Shapes


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("abc", "abc", ""),
        ("", "abc", ""),  # unknown
        ("abc", "", ""),
        ("abc", "bc", "3 classes -> 2; missing: 'a' (index 0); index 0: 'a' -> 'b', index 1: 'b' -> 'c'"),
        ("ab", "abc", "2 classes -> 3; new: 'c' (index 2)"),
        ("abc", "acb", "index 1: 'b' -> 'c', index 2: 'c' -> 'b'"),
        ("abc", "abd", "missing: 'c' (index 2); new: 'd' (index 2)"),
        ("a", "b", "missing: 'a' (index 0); new: 'b' (index 0)"),
    ],
)
def test_a_difference_names_what_changed(old, new, message):
    assert Classes(tuple(old)).difference(Classes(tuple(new))) == message


def test_a_long_difference_is_one_short_line():
    many = tuple(f"n{i:08d}" for i in range(1000))
    message = Classes(many).difference(Classes(many[1:]))
    assert message.startswith("1000 classes -> 999; missing: 'n00000000' (index 0); index 0:")
    assert len(message) < 300 and "\n" not in message


def test_a_record_restores_the_classes_and_other_records_are_unknown():
    classes = Classes(("a", "b"), (3, 0))
    assert Classes.from_record(classes.record()) == classes
    for record in (None, [], {}, {"names": 3}, {"names": ["a"], "counts": ["x"]}):
        assert Classes.from_record(record) == Classes()
    assert Classes.from_json("{") == Classes.from_json("") == Classes()


def test_counts_declared_are_those_of_the_items():
    for size in (10, 23):
        dataset = Shapes(16, size=size)
        labels = [dataset[i].label for i in range(size)]
        assert Classes.of(dataset).counts == tuple(labels.count(c) for c in range(10))
    dataset.class_counts = lambda: None
    assert Classes.of(dataset).counts == ()
    assert Classes.of(dataset, count=True).counts == tuple(labels.count(c) for c in range(10))


def test_notes_name_empty_classes_numbers_in_the_order_of_text_and_a_single_class():
    numbers = tuple(sorted(map(str, range(12))))
    assert "index 2 is class '10'" in Classes(numbers, (1,) * 12).notes()[0]
    assert Classes(tuple(f"{i:02d}" for i in range(12)), (1,) * 12).notes() == []
    assert Classes(("3", "7"), (1, 1)).notes() == []
    assert "2 of 3 classes have no images" in Classes(tuple("abc"), (0, 4, 0)).notes()[0]
    assert "1 class, 'train'" in Classes(("train",), (5,)).notes()[0]


def test_labels_without_images_are_left_out_if_the_counts_are_known():
    assert Classes(tuple("abc"), (0, 4, 1)).with_images(3) == [1, 2]
    assert Classes(tuple("abc"), (2, 4, 1)).with_images(5) == [0, 1, 2]  # classes 3 and 4 were never trained
    assert Classes(tuple("abc")).with_images(3) == Classes().with_images(3) == [0, 1, 2]
