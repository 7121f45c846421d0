"""Data order is a pure function of (seed, position); loading neither hangs nor hides errors."""

import itertools
import logging
import multiprocessing
import random
import subprocess
import sys
import threading
import time
import traceback

import pytest
import torch

from components.contracts import Dataset, DatasetItem
from components.data.loader import DataError, GlobalOrder, MicroBatches, TrainingView, UnreadableCounter, make_loader
from components.data.prefetch import Prefetcher
from tests.support import ROOT

torch.set_num_threads(1)


class Numbers(Dataset):
    """Dataset whose sample i shows i on the left and 0 on the right, with label i."""

    def __init__(self, size=10, flip=False, broken=(), unreadable=(), delay=0.0):
        self.num_classes = size
        self.class_names = [str(i) for i in range(size)]
        self.flip = flip
        self.broken = broken
        self.unreadable = unreadable
        self.delay = delay

    def __len__(self):
        return self.num_classes

    def __getitem__(self, index):
        time.sleep(self.delay)
        if index in self.broken:
            raise ValueError(f"sample {index} is broken")
        image = torch.zeros(3, 2, 4, dtype=torch.uint8)
        image[..., :2] = index
        return DatasetItem(image, index, f"{index}.png" if index in self.unreadable else None)


def take(loader, count):
    return list(itertools.islice(iter(loader), count))


def global_batches(steps, world=1, accumulation=1, consumed=0, size=50, batch_size=8):
    """Return the labels of each step in global order, assembled from every rank's micro-batches."""
    loaders = [
        make_loader(
            Numbers(size),
            seed=3,
            batch_size=batch_size,
            rank=rank,
            world=world,
            accumulation=accumulation,
            consumed=consumed,
        )
        for rank in range(world)
    ]
    ranks = [take(loader, steps * accumulation) for loader in loaders]
    return [
        [x for i in range(accumulation) for r in ranks for x in r[k * accumulation + i].condition.label.tolist()]
        for k in range(steps)
    ]


# Order


def test_every_epoch_shows_every_sample_once_in_another_order():
    order = GlobalOrder(50, seed=1)
    epochs = [[order.at(p) for p in range(e * 50, e * 50 + 50)] for e in range(3)]
    for number, epoch in enumerate(epochs):
        assert {e for e, _ in epoch} == {number}
        assert sorted(i for _, i in epoch) == list(range(50))
    permutations = [[i for _, i in epoch] for epoch in epochs]
    permutations += [list(range(50)), [GlobalOrder(50, seed=2).at(p)[1] for p in range(50)]]
    assert len(set(map(tuple, permutations))) == 5


def test_order_depends_on_seed_and_position_alone():
    forward = [GlobalOrder(7, seed=1).at(p) for p in range(70)]
    jumping, scattered = GlobalOrder(7, seed=1), random.Random(0).sample(range(70), 70)
    assert {p: jumping.at(p) for p in scattered} == dict(enumerate(forward))


@pytest.mark.parametrize("world, accumulation", [(2, 1), (4, 1), (1, 4), (2, 2)])
@pytest.mark.parametrize("size", [50, 3])  # an epoch ends within a batch; a batch spans several epochs
def test_global_batches_do_not_depend_on_ranks_and_accumulation(world, accumulation, size):
    assert global_batches(15, world, accumulation, size=size) == global_batches(15, size=size)


def test_ranks_share_no_sample():
    steps = global_batches(6, world=4, size=48)
    assert sorted(itertools.chain.from_iterable(steps)) == list(range(48))


def test_positions_follow_the_published_formula():
    world, accumulation, batch_size, rank = 2, 3, 12, 1
    batches = MicroBatches(
        GlobalOrder(5, seed=0), batch_size=batch_size, rank=rank, world=world, accumulation=accumulation
    )
    b = batch_size // (world * accumulation)
    expected = [k * batch_size + (i * world + rank) * b for k in range(4) for i in range(accumulation)]
    assert list(itertools.islice(batches.positions(), 12)) == expected


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("world, accumulation", [(1, 1), (2, 2)])
def test_resume_continues_the_uninterrupted_sequence(workers, world, accumulation):
    dataset = Numbers(30, flip=True)
    whole = take(make_loader(dataset, seed=5, batch_size=8), 12)
    for done in (1, 5):
        rank = world - 1
        resumed = take(
            make_loader(
                dataset,
                seed=5,
                batch_size=8,
                consumed=8 * done,
                workers=workers,
                world=world,
                accumulation=accumulation,
                rank=rank,
            ),
            3 * accumulation,
        )
        size = 8 // (world * accumulation)
        for m, batch in enumerate(resumed):
            step, i = divmod(m, accumulation)
            part = slice((i * world + rank) * size, (i * world + rank + 1) * size)
            assert torch.equal(batch.images, whole[done + step].images[part])
            assert torch.equal(batch.condition.label, whole[done + step].condition.label[part])


def test_an_indivisible_batch_and_an_empty_dataset_are_refused():
    with pytest.raises(DataError, match=r"10 images .* 4 ranks x 1 micro-batches; .*multiple of 4"):
        make_loader(Numbers(), seed=0, batch_size=10, world=4)
    with pytest.raises(DataError, match="empty"):
        make_loader(Numbers(0), seed=0, batch_size=1)


# Samples


def mirrored(dataset, seed, epoch):
    view = TrainingView(dataset, seed)
    return [bool(view[epoch, i].image[0, 0, 0] == 0) for i in range(1, len(dataset))]


def test_mirroring_is_decided_by_seed_epoch_and_index():
    dataset = Numbers(250, flip=True)
    first = mirrored(dataset, 0, 0)
    assert 90 < sum(first) < 160
    assert first == mirrored(dataset, 0, 0)
    for other in (mirrored(dataset, 0, 1), mirrored(dataset, 1, 0)):
        assert 70 < sum(a != b for a, b in zip(first, other)) < 180
    image = TrainingView(dataset, 0)[0, 1 + first.index(True)].image
    assert torch.equal(image, dataset[1 + first.index(True)].image.flip(-1))


def test_nothing_is_mirrored_unless_the_dataset_allows_it():
    assert not any(mirrored(Numbers(50, flip=False), 0, 0))


@pytest.mark.parametrize(
    "sample, message",
    [
        (
            DatasetItem(torch.zeros(3, 4, 4), 0),
            r"Numbers\[0\]: image is torch.float32 \(3, 4, 4\), expected torch.uint8",
        ),
        (
            DatasetItem(torch.zeros(4, 4, 3, dtype=torch.uint8), 0),
            r"\(4, 4, 3\), expected torch.uint8 \(3, R, R\)",
        ),
        (DatasetItem(torch.zeros(3, 4, 4, dtype=torch.uint8), 10), r"label 10 is outside \[0, 10\)"),
    ],
)
def test_a_dataset_that_breaks_its_contract_is_named(sample, message):
    class Wrong(Numbers):
        def __getitem__(self, index):
            return sample

    Wrong.__name__ = "Numbers"
    with pytest.raises(DataError, match=message):
        TrainingView(Wrong(10), 0)[0, 0]


def test_workers_leave_the_global_generator_alone():
    before = torch.get_rng_state()
    take(make_loader(Numbers(), seed=0, batch_size=2, workers=1), 1)
    assert torch.equal(torch.get_rng_state(), before)


# Unreadable files


def test_unreadable_files_are_counted_and_logged_once(caplog):
    counter = UnreadableCounter(0.01)
    loader = make_loader(Numbers(10, unreadable={4, 7}), seed=0, batch_size=10)
    with caplog.at_level(logging.WARNING), Prefetcher(loader, "cpu") as batches:
        for batch, _, unreadable in itertools.islice(batches, 3):
            assert sorted(unreadable) == ["4.png", "7.png"]
            counter.update(len(batch.condition.label), unreadable)
    assert (counter.count, counter.seen) == (6, 30)
    assert sorted(r.getMessage().split()[-1] for r in caplog.records) == ["4.png", "7.png"]


def test_too_many_unreadable_files_stop_the_run():
    counter = UnreadableCounter(0.01)
    counter.update(32, [f"{i}.png" for i in range(10)])  # 1 % of 1000: too few images to judge
    with pytest.raises(DataError, match=r"(?s)11 of 64 .*17\.19%.*loader\.max_unreadable = 0\.01.*  last\.png"):
        counter.update(32, ["last.png"])

    counter = UnreadableCounter(0.01)
    counter.update(100_000, [f"{i}.png" for i in range(1000)])
    with pytest.raises(DataError):
        counter.update(1, ["1000.png"])

    with pytest.raises(DataError):
        UnreadableCounter(0.0).update(1, ["0.png"])


def test_counts_survive_a_resume():
    counter = UnreadableCounter(0.01)
    counter.update(500, ["a.png"] * 10)
    resumed = UnreadableCounter(0.01)
    resumed.load_state_dict(counter.state_dict())
    assert (resumed.seen, resumed.count) == (500, 10)
    with pytest.raises(DataError):
        resumed.update(1, ["b.png"])


# Prefetcher


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_arrive_in_order_as_floats(workers):
    arguments = {"seed": 1, "batch_size": 8, "world": 2, "rank": 1, "accumulation": 2, "consumed": 16}
    dataset = Numbers(200)
    loader = make_loader(dataset, workers=workers, **arguments)
    expected = take(make_loader(dataset, **arguments), 10)
    with Prefetcher(loader, "cpu", beside=lambda position: position * 10) as batches:
        for m, (batch, beside, unreadable) in enumerate(itertools.islice(batches, 10)):
            assert torch.equal(batch.images, expected[m].images.to(torch.float32) / 127.5 - 1)
            assert (
                torch.equal(batch.condition.label, expected[m].condition.label)
                and batch.condition.label.dtype == torch.int64
            )
            assert beside == 10 * (16 + 8 * (m // 2) + (2 * (m % 2) + 1) * 2)
            assert unreadable == []


def test_the_range_of_bytes_is_minus_one_to_one():
    with Prefetcher(make_loader(Numbers(256), seed=0, batch_size=256), "cpu") as batches:
        images = next(batches)[0].images
    assert (images.dtype, images.min(), images.max()) == (torch.float32, -1, 1)


@pytest.mark.long
def test_workers_need_no_fork():
    loader = make_loader(Numbers(), seed=0, batch_size=2, workers=1)
    loader.multiprocessing_context = "forkserver"
    with Prefetcher(loader, "cpu") as batches:
        assert torch.equal(
            next(batches)[0].condition.label, take(make_loader(Numbers(), seed=0, batch_size=2), 1)[0].condition.label
        )


@pytest.mark.parametrize("workers", [0, 2])
def test_an_error_in_the_dataset_reaches_the_consumer(workers):
    order = [GlobalOrder(10, seed=0).at(position)[1] for position in range(7)]
    loader = make_loader(Numbers(10, broken={order[6]}), seed=0, batch_size=2, workers=workers)
    with Prefetcher(loader, "cpu") as batches:
        for first in (0, 2, 4):
            assert next(batches)[0].condition.label.tolist() == order[first : first + 2]
        for _ in range(2):  # raised every time, without hanging
            with pytest.raises(ValueError, match=f"sample {order[6]} is broken") as caught:
                next(batches)
            shown = "".join(traceback.format_exception(caught.value))
            assert "image = torch.zeros" not in shown and 'raise ValueError(f"sample {index} is broken")' in shown


def test_an_error_in_beside_reaches_the_consumer_with_its_traceback():
    def draw(position):
        raise KeyError(position)

    with Prefetcher(make_loader(Numbers(), seed=0, batch_size=2), "cpu", beside=draw) as batches:
        with pytest.raises(KeyError) as caught:
            next(batches)
        assert "draw" in [frame.name for frame in traceback.extract_tb(caught.value.__traceback__)]


def test_waiting_is_measured():
    with Prefetcher(make_loader(Numbers(delay=0.05), seed=0, batch_size=2), "cpu") as batches:
        next(batches)
        assert 0.05 < batches.waited_s < 30
        time.sleep(0.5)
        before = batches.waited_s
        next(batches)
        assert batches.waited_s - before < 0.1


def test_one_batch_is_prepared_ahead_and_no_more():
    started = []
    with Prefetcher(make_loader(Numbers(), seed=0, batch_size=2), "cpu", beside=started.append) as batches:
        for used in range(3):
            deadline = time.monotonic() + 10
            while len(started) <= used and time.monotonic() < deadline:
                time.sleep(0.01)
            time.sleep(0.05)
            assert len(started) == used + 1
            next(batches)


def prefetch_threads():
    return [t for t in threading.enumerate() if t.name == "prefetch"]


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("used, delay", [(0, 0.0), (3, 0.0), (1, 0.1)])
def test_close_ends_thread_and_workers(workers, used, delay):
    others = set(multiprocessing.active_children())
    batches = Prefetcher(make_loader(Numbers(delay=delay), seed=0, batch_size=2, workers=workers), "cpu")
    for _ in range(used):
        next(batches)
    assert len(set(multiprocessing.active_children()) - others) == workers
    start = time.perf_counter()
    batches.close()
    batches.close()
    assert time.perf_counter() - start < 4
    assert not prefetch_threads() and set(multiprocessing.active_children()) <= others
    with pytest.raises(StopIteration):
        next(batches)


def test_close_after_an_error():
    loader = make_loader(Numbers(broken={0}), seed=0, batch_size=10, workers=2)
    with pytest.raises(ValueError, match="is broken"), Prefetcher(loader, "cpu") as batches:
        next(batches)
    assert not prefetch_threads()


@pytest.mark.long
def test_a_process_that_forgets_to_close_still_ends():
    script = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
from tests.components.data.test_data import Numbers, Prefetcher, make_loader
bare = iter(make_loader(Numbers(), seed=0, batch_size=2, workers=1))
batches = Prefetcher(make_loader(Numbers(), seed=0, batch_size=2, workers=2), "cpu")
next(bare), next(batches)
raise SystemExit(3)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (3, "", "")


def test_signals_to_the_whole_job_spare_the_workers():
    others = set(multiprocessing.active_children())
    with Prefetcher(make_loader(Numbers(), seed=0, batch_size=2, workers=2), "cpu") as batches:
        next(batches)
        workers = set(multiprocessing.active_children()) - others
        for name in ("INT", "TERM", "USR1"):
            subprocess.run(["kill", f"-{name}", *(str(w.pid) for w in workers)], check=True)
        for _ in range(20):
            next(batches)
        assert len(workers) == 2 and all(w.is_alive() for w in workers)


def test_a_worker_obeys_its_own_trainer():
    others = set(multiprocessing.active_children())
    batches = iter(make_loader(Numbers(), seed=0, batch_size=2, workers=1))
    next(batches)
    (worker,) = set(multiprocessing.active_children()) - others
    worker.terminate()
    worker.join(timeout=5)
    assert worker.exitcode == 0


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_the_gpu_gets_the_same_batches():
    dataset = Numbers(200)
    expected = take(make_loader(dataset, seed=0, batch_size=64), 20)
    loader = make_loader(dataset, seed=0, batch_size=64, workers=2, pin_memory=True)
    draws = lambda position: {"noise": torch.full((1000, 1000), float(position))}  # noqa: E731
    with Prefetcher(loader, "cuda", beside=draws) as batches:
        for m, (batch, beside, _) in enumerate(itertools.islice(batches, 20)):
            # With a busy stream, memory that the side stream reuses too early would show.
            torch.cuda._sleep(20_000_000)
            images, noise = batch.images.clone(), beside["noise"].clone()
            del batch, beside
            assert torch.equal(images.cpu(), expected[m].images.float().div(127.5).sub(1))
            assert bool((noise == m * 64).all())
