"""The phase clock assigns every millisecond of a step to one phase, by the recipe's own boundaries."""

from collections.abc import Iterator
from unittest import mock

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from components.contracts import Batch
from components.monitor import phases
from components.monitor.metrics import StepRecord, same_on_all_ranks
from components.monitor.phases import PhaseClock, end_segment, phase, segments, timed, waiting
from components.registry import discover
from tests.support import toys
from tests.trainer.run.test_step import make_step

discover("plugins")


@pytest.fixture
def ticks():
    """A clock that advances only by the added amounts."""
    now = [0.0]
    with mock.patch.object(phases.time, "perf_counter", lambda: now[0]):
        yield lambda milliseconds: now.__setitem__(0, now[0] + milliseconds / 1e3)


def test_time_is_charged_once_and_to_the_innermost_phase(ticks):
    with timed(PhaseClock(torch.device("cpu"))) as times:
        ticks(1)
        with phase("encoders"):
            ticks(2)
            with phase("tokenizer"):
                ticks(4)
            ticks(8)
        ticks(16)
    ticks(32)
    found = times.read()
    assert found == pytest.approx({"optimizer": 17, "encoders": 10, "tokenizer": 4, "step": 31})
    assert times.read() == found


def test_a_segment_is_named_when_it_ends(ticks):
    def items():
        for _ in range(2):
            ticks(1)
            yield None

    with timed(PhaseClock(torch.device("cpu"))) as times:
        for _ in waiting("data", items()):
            with segments():
                ticks(10)
                with phase("encoders"):
                    ticks(100)
                ticks(20)
                end_segment("tokenizer")
                ticks(300)
                end_segment("denoiser")
                ticks(1000)  # belongs to no phase
            ticks(2000)
    expected = {"data": 2, "tokenizer": 60, "encoders": 200, "denoiser": 600, "optimizer": 6000, "step": 6862}
    assert times.read() == pytest.approx(expected)


def test_without_a_clock_nothing_happens():
    with phase("encoders"), segments(), timed(None) as times:
        end_segment("denoiser")
    assert times is None and phase("a") is phase("b")


def test_an_error_within_a_phase_ends_the_clock():
    clock = PhaseClock(torch.device("cpu"))
    with pytest.raises(KeyboardInterrupt), timed(clock), segments(), phase("encoders"):
        raise KeyboardInterrupt
    assert phases._current is None
    with timed(clock) as times, segments():
        end_segment("denoiser")
    assert set(times.read()) == {"optimizer", "denoiser", "step"}


def test_a_step_of_repae_has_all_phases_and_they_sum_to_the_step():
    m = toys.modules()
    step = make_step(m, "repae", 2)
    step.clock = PhaseClock(torch.device("cpu"))
    values = step(0, [toys.batch(0), toys.batch(1)]).read()
    times = {name.removeprefix("time/"): v for name, v in values.items() if name.startswith("time/")}
    assert set(times) == {"data", "encoders", "tokenizer", "discriminator", "denoiser", "optimizer", "step"}
    assert sum(times.values()) == pytest.approx(2 * times["step"]) and min(times.values()) > 0
    assert not any(name.startswith("time/") for name in same_on_all_ranks(values))
    assert same_on_all_ranks(values).keys() == make_step(toys.modules(), "repae", 1)(0, [toys.batch()]).read().keys()


def test_a_frozen_tokenizer_is_charged_to_its_own_name():
    step = make_step(toys.modules(), "repa", 1)
    step.clock = PhaseClock(torch.device("cpu"))
    assert {"time/tokenizer", "time/encoders", "time/denoiser"} <= step(0, [toys.batch()]).read().keys()


def test_a_record_reads_its_times_in_milliseconds(ticks):
    with timed(PhaseClock(torch.device("cpu"))) as times:
        ticks(5)
    record = StepRecord(0, ("a",), torch.ones(1, dtype=torch.float64), times=times)
    assert record.read() == pytest.approx({"a": 1.0, "time/optimizer": 5.0, "time/step": 5.0})


@pytest.mark.long
def test_a_trace_shows_the_phases_by_name_where_asked():
    step = make_step(toys.modules(), "repae", 1)
    step.clock = PhaseClock(torch.device("cpu"))
    names = {"data", "encoders", "tokenizer", "discriminator", "denoiser", "optimizer"}
    found = []
    for ranges in (False, True):
        step.clock.ranges = ranges
        with profile(activities=[ProfilerActivity.CPU]) as trace:
            step(int(ranges), [toys.batch()])
        found.append({event.name for event in trace.events()} & names)
    assert found == [set(), names]


def steps_on_a_gpu() -> Iterator[tuple[PhaseClock, dict[str, float]]]:
    """Run three steps, none of which may wait for the GPU; return the clock and its measurements."""
    device = torch.device("cuda", 0)
    m = toys.modules(dtype=torch.float32)
    for module in m.named().values():
        module.to(device)
    step = make_step(m, "repae", 1)
    step.clock, step.device = PhaseClock(device), device
    for k in range(3):
        images, draws = toys.batch(k, dtype=torch.float32)
        batch, draws = Batch(images.images.to(device), images.condition.to(device)), draws
        draws = {name: numbers.to(device) for name, numbers in draws.items()}
        torch.cuda.set_sync_debug_mode("error" if k else "default")
        try:
            record = step(k, [(batch, draws)])
        finally:
            torch.cuda.set_sync_debug_mode("default")
        yield step.clock, {n.removeprefix("time/"): v for n, v in record.read().items() if n.startswith("time/")}


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_on_a_gpu_events_are_used_again():
    counts = []
    for clock, times in steps_on_a_gpu():
        assert set(times) == {"data", "encoders", "tokenizer", "discriminator", "denoiser", "optimizer", "step"}
        counts.append(len(clock._pool))
    assert 8 < counts[0] == counts[1] == counts[2] < 20


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_on_a_gpu_phases_sum_to_the_step():
    for _, times in steps_on_a_gpu():
        assert sum(times.values()) == pytest.approx(2 * times["step"], rel=0.01) and min(times.values()) >= 0
