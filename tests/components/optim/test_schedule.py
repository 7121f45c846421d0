"""Learning rates of each step, by the schedule's definition."""

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


def test_another_peak_scales_every_step():
    schedule = Schedule(2.0, "linear", steps=6, warmup_steps=2)
    assert [schedule.at(k, 1.0) for k in range(6)] == [schedule.at(k) / 2 for k in range(6)]
