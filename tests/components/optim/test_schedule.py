"""Learning rates of each step, by the schedule's definition."""

import math

import pytest

from components.optim.schedule import Schedule


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ("constant", [0.5, 1.0, 1.0, 1.0, 1.0, 1.0]),
        ("linear", [0.5, 1.0, 1.0, 0.7, 0.4, 0.1]),
        ("cosine", [0.5, 1.0, 1.0, 0.1 + 0.9 * 0.75, 0.1 + 0.9 * 0.25, 0.1]),
    ],
)
def test_constant_linear_and_cosine(shape, expected):
    schedule = Schedule(2.0, shape, steps=6, warmup_steps=2, final_ratio=0.1)
    assert [schedule.at(k) / 2.0 for k in range(6)] == pytest.approx(expected)


@pytest.mark.parametrize(
    ("shape", "left"),
    [("linear", [0.75, 0.5, 0.25, 0.0]), ("1-sqrt", [0.5, 1 - math.sqrt(0.5), 1 - math.sqrt(0.75), 0.0])],
)
def test_wsd_is_constant_and_decays_in_the_last_steps(shape, left):
    schedule = Schedule(2.0, "wsd", steps=10, warmup_steps=2, final_ratio=0.1, decay_steps=4, decay_shape=shape)
    expected = [0.5, 1.0, 1.0, 1.0, 1.0, 1.0, *(0.1 + 0.9 * x for x in left)]
    assert [schedule.at(k) / 2.0 for k in range(10)] == pytest.approx(expected, rel=1e-15)
    assert schedule.at(20) == pytest.approx(0.2, rel=1e-15)


def test_a_wsd_decay_that_is_longer_than_the_run_begins_after_warmup():
    schedule = Schedule(1.0, "wsd", steps=4, warmup_steps=2, decay_steps=100)
    assert [schedule.at(k) for k in range(4)] == [0.5, 1.0, 0.5, 0.0]
    assert [Schedule(1.0, "wsd", steps=3).at(k) for k in range(3)] == [1.0, 1.0, 0.0]


def test_piecewise_passes_through_its_points():
    """RAEv2's schedule (arXiv 2605.18324): constant, linear to a lower rate, constant."""
    schedule = Schedule(2.0, "piecewise", steps=8, points=[(2, 1.0), (6, 0.2)])
    expected = [1.0, 1.0, 1.0, 0.8, 0.6, 0.4, 0.2, 0.2]
    assert [schedule.at(k) / 2.0 for k in range(8)] == pytest.approx(expected, rel=1e-15)
    steps = Schedule(2.0, "piecewise", points=[(2, 1.0), (4, 0.5), (6, 0.2)], between="constant")
    assert [steps.at(k) for k in range(8)] == [2.0, 2.0, 2.0, 2.0, 1.0, 1.0, 0.4, 0.4]
    assert Schedule(2.0, "piecewise", points=[(3, 0.5)]).at(0) == 1.0


def test_warmup_rises_to_the_first_value_of_a_piecewise_schedule():
    schedule = Schedule(2.0, "piecewise", warmup_steps=4, points=[(0, 0.0), (8, 1.0)])
    assert [schedule.at(k) for k in range(6)] == [0.25, 0.5, 0.75, 1.0, 1.0, 1.25]


def test_only_wsd_linear_and_cosine_depend_on_the_total_number_of_steps():
    """A resumed run with another training.steps follows the schedule of the new total from its step on."""

    def rates(shape, steps):
        return [Schedule(1.0, shape, steps, decay_steps=2, points=[(0, 1.0), (4, 0.0)]).at(k) for k in range(4)]

    assert all(rates(shape, 6) == rates(shape, 8) for shape in ("constant", "piecewise"))
    assert all(rates(shape, 6) != rates(shape, 8) for shape in ("linear", "cosine"))
    assert rates("wsd", 4) == [1.0, 1.0, 0.5, 0.0] and rates("wsd", 6) == [1.0] * 4


def test_another_peak_scales_every_step():
    schedule = Schedule(2.0, "linear", steps=6, warmup_steps=2)
    assert [schedule.at(k, 1.0) for k in range(6)] == [schedule.at(k) / 2 for k in range(6)]
