"""The guard reports a failing run once, with the correct onset, and stays silent in a healthy run."""

import json
import math
import random
import time

import pytest

from components.monitor.guard import Alarm, Guard

N = 600  # first step of the failure in most tests: after the first windows


def healthy(step: int, rng: random.Random, noise: float = 1.0) -> dict[str, float]:
    """A step of a run whose tokenizer loss crosses zero and whose norms have heavy tails."""
    falling = math.exp(-step / 4000)
    values = {
        "tokenizer/loss": -0.6 + 1.5 * falling + noise * rng.gauss(0, 0.1),
        "tokenizer/lpips": 0.2 + 0.4 * falling + noise * rng.gauss(0, 0.02),
        "tokenizer/align": -0.5 + 0.3 * falling + noise * rng.gauss(0, 0.02),
        "discriminator/loss": abs(0.5 + noise * rng.gauss(0, 0.15)),
        "denoiser/loss": 0.4 + 0.8 * falling + noise * rng.gauss(0, 0.05),
        "latent/variance": 17 - 10 * falling + noise * rng.gauss(0, 0.1),
        "lr/denoiser": 1e-4,
    }
    for group, size in (("tokenizer", 1.0), ("discriminator", 0.5), ("denoiser", 0.3)):
        warm_up = 1 + 2000 * math.exp(-step / 20)
        values[f"grad_norm/{group}"] = size * warm_up * (0.1 + 0.9 * falling) * math.exp(noise * rng.gauss(0, 0.45))
    return values | {"adversary/loss": values["discriminator/loss"]}


def steady(step: int) -> dict[str, float]:
    return healthy(step, random.Random(step), noise=0.3)


def run(guard: Guard, steps: range, change=lambda step, values: None) -> list[Alarm]:
    """Return the alarms of steady steps changed in place by ``change(step, values)``; False marks a skipped step."""
    found = []
    for step in steps:
        values = steady(step)
        applied = change(step, values) is not False
        found += guard.observe(step, values, applied)
    return found


def only(alarms: list[Alarm], name: str, metric: str) -> Alarm:
    assert [(a.name, a.metric) for a in alarms] == [(name, metric)], alarms
    return alarms[0]


def from_step(onset: int, metric: str, value: float, end: float = math.inf):
    def change(step, values):
        if onset <= step < end:
            values[metric] = value

    return change


def nan_everywhere(first: str, onset: int, end: float = math.inf):
    """NaN in ``first`` and everything derived from it at ``onset``, and in all metrics one step later."""
    group = first.split("/")[0]

    def change(step, values):
        if not onset <= step < end:
            return True
        for name in values if step > onset else (f"grad_norm/{group}", f"{group}/loss", first):
            values[name] = math.nan
        return False

    return change


# -- no false alarms -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(2))
def test_a_healthy_run_raises_nothing(seed):
    guard, rng = Guard(), random.Random(seed)
    for step in range(20_000):
        assert guard.observe(step, healthy(step, rng), True) == []
    assert guard.first_anomaly() is None


@pytest.mark.parametrize("noise", [0.0, 0.01])
def test_a_loss_that_crosses_zero_is_no_trouble(noise):
    guard, rng = Guard(window=50), random.Random(0)
    for step in range(4000):
        values = {"tokenizer/loss": 1 - step / 2000 + noise * rng.gauss(0, 1), "grad_norm/tokenizer": 1.0}
        assert guard.observe(step, values, True) == []


def test_names_may_be_missing():
    guard, rng = Guard(), random.Random(0)
    for step in range(6000):
        values = healthy(step, rng)
        if step < 3000:  # as a discriminator before its start step
            values["discriminator/loss"] = 0.0
            del values["grad_norm/discriminator"], values["adversary/loss"]
        elif step % 7 == 0:
            del values["latent/variance"], values["tokenizer/loss"]
        assert guard.observe(step, values if step % 11 else {}, True) == []


def test_the_first_half_window_is_no_measure_of_a_spike():
    for step, expected in ((99, []), (100, ["spike"])):
        alarms = run(Guard(), range(150), from_step(step, "denoiser/loss", 90.0, step + 1))
        assert [alarm.name for alarm in alarms] == expected


def test_a_loss_that_was_always_zero_may_begin():
    def change(step, values):
        values["discriminator/loss"] = 0.0 if step < N else 1.0

    assert run(Guard(), range(2 * N), change) == []


def test_a_discriminator_that_comes_back_from_winning_is_no_spike():
    def change(step, values):
        values["discriminator/loss"] = values["adversary/loss"] = 0.02 if step < N else 0.9

    assert run(Guard(), range(2 * N), change) == []


# -- each alarm, once, with its onset ------------------------------------------------------------------------------


def test_skipped_steps():
    alarm = only(run(Guard(), range(N + 100), nan_everywhere("tokenizer/lpips", N)), "skipped", "tokenizer/lpips")
    assert (alarm.step, alarm.onset) == (N + 9, N)
    assert "10 consecutive steps" in alarm.message and f"step {N}" in alarm.message and "nan" in alarm.message


def test_skipped_steps_that_end_in_time_are_no_alarm():
    assert run(Guard(), range(N + 300), nan_everywhere("tokenizer/lpips", N, N + 9)) == []


def test_a_spike():
    alarm = only(
        run(Guard(), range(N + 300), from_step(N, "grad_norm/denoiser", 50.0, N + 3)), "spike", "grad_norm/denoiser"
    )
    assert (alarm.step, alarm.onset) == (N, N)
    assert f"grad_norm/denoiser is 50 at step {N}" in alarm.message and "median of 0.2" in alarm.message


def test_a_spike_of_a_loss_about_zero():
    def change(step, values):
        values["tokenizer/loss"] = 0.1 * math.sin(step) if step != N else 3.0

    assert only(run(Guard(), range(N + 300), change), "spike", "tokenizer/loss").onset == N


def test_a_new_level_alarms_once_and_becomes_usual():
    guard = Guard()
    assert only(run(guard, range(2000), from_step(N, "denoiser/loss", 40.0)), "spike", "denoiser/loss").step == N
    again = only(run(guard, range(2000, 2300), from_step(2000, "denoiser/loss", 900.0)), "spike", "denoiser/loss")
    assert again.onset == 2000


def test_a_spike_is_not_raised_again_before_it_was_normal():
    def flickers(step, values):
        if step >= N and step % 5 == 0:
            values["grad_norm/tokenizer"] = 100.0

    steps = [alarm.step for alarm in run(Guard(), range(N + 450), flickers)]
    assert steps == [N, N + 200, N + 400]

    def twice(step, values):
        if step in (N, N + 30):
            values["grad_norm/tokenizer"] = 100.0

    assert [(a.step, a.onset) for a in run(Guard(), range(N + 100), twice)] == [(N, N), (N + 30, N + 30)]


def test_vanishing_gradients():
    alarm = only(
        run(Guard(), range(N + 250), from_step(N, "grad_norm/denoiser", 1e-5)), "collapse", "grad_norm/denoiser"
    )
    assert (alarm.step, alarm.onset) == (N + 99, N)
    assert "100 consecutive steps" in alarm.message and f"step {N}" in alarm.message and "1e-05" in alarm.message


def test_gradients_that_come_back_in_time_are_no_collapse():
    assert run(Guard(), range(N + 400), from_step(N, "grad_norm/denoiser", 1e-5, N + 99)) == []


def test_the_onset_is_that_of_the_steps_in_a_row():
    def change(step, values):
        if step == N - 5 or step >= N:
            values["grad_norm/denoiser"] = 1e-5

    assert only(run(Guard(), range(N + 150), change), "collapse", "grad_norm/denoiser").onset == N


def test_norms_that_fall_from_those_of_the_first_window_are_no_collapse():
    guard = Guard()
    for step in range(2000):
        assert guard.observe(step, {"grad_norm/a": 1e4 if step < 200 else 1.0}, True) == []


def test_a_plateau_of_spikes_does_not_make_the_usual_norm_a_collapse():
    alarms = run(Guard(), range(N + 600), from_step(N, "grad_norm/denoiser", 1e6, N + 110))
    assert {a.name for a in alarms} == {"spike"}


def test_gradients_of_a_loss_of_zero_are_no_collapse():
    def change(step, values):
        if step >= N:
            values |= {"grad_norm/discriminator": 0.0, "discriminator/loss": 0.0, "adversary/loss": 0.0}

    alarm = only(run(Guard(), range(N + 250), change), "discriminator", "adversary/loss")
    assert (alarm.step, alarm.onset) == (N + 99, N)


def test_flat_latents():
    def change(step, values):  # as published for naive end-to-end training
        if step >= N:
            values["latent/variance"] = 0.02

    alarm = only(run(Guard(), range(N + 150), change), "latent_variance", "latent/variance")
    assert (alarm.step, alarm.onset) == (N + 9, N)
    assert "0.02" in alarm.message


def test_latents_that_flatten_slowly():
    def change(step, values):
        values["latent/variance"] = 17 * math.exp(-max(0, step - N) / 1000)

    alarm = only(run(Guard(), range(N + 3150), change), "latent_variance", "latent/variance")
    assert abs(alarm.onset - (N + 1000 * math.log(20))) < 2


@pytest.mark.parametrize("name", ["latent/mean", "latent/spatial_variance", "latent_norm/variance_max", "time/step"])
def test_other_curves_of_the_latents_and_times_are_not_what_first_anomaly(name):
    guard = Guard()

    def change(step, values):
        values[name] = 1e6 if step >= N - 20 else 1.0

    assert run(guard, range(N), change) == []
    assert guard.first_anomaly() is None


def test_a_discriminator_that_wins_outright():
    alarm = only(run(Guard(), range(N + 250), from_step(N, "adversary/loss", 0.003)), "discriminator", "adversary/loss")
    assert (alarm.step, alarm.onset) == (N + 99, N)


# -- values that are not finite, thresholds ------------------------------------------------------------------------


def test_values_of_skipped_steps_and_broken_ones_stay_out_of_medians():
    clean, dirty = Guard(window=20), Guard(window=20)
    later = 0
    for step in range(300):
        clean.observe(step, {"grad_norm/a": 1.0}, True)
        dirty.observe(later, {"grad_norm/a": 1.0, "latent/variance": math.nan}, True)
        dirty.observe(later + 1, {"grad_norm/a": 1e9, "b/loss": math.inf}, False)
        dirty.observe(later + 2, {"grad_norm/a": math.nan}, True)
        later += 3
    for guard in (clean, dirty):
        assert [a.name for a in guard.observe(later, {"grad_norm/a": 11.5}, True)] == ["spike"]


def test_nan_of_an_applied_step_pauses_a_watch():
    def change(step, values):
        if step % 3 == 0:
            values["latent/variance"] = math.nan
        elif step >= N:
            values["latent/variance"] = 0.02

    alarm = only(run(Guard(), range(N + 150), change), "latent_variance", "latent/variance")
    assert (alarm.step, alarm.onset) == (N + 14, N + 1)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("skipped", nan_everywhere("tokenizer/lpips", N)),
        ("spike", from_step(N, "grad_norm/denoiser", 50.0, N + 3)),
        ("collapse", from_step(N, "grad_norm/denoiser", 0.0)),
        ("latent_variance", from_step(N, "latent/variance", 0.02)),
        ("discriminator", from_step(N, "adversary/loss", 0.0)),
    ],
)
def test_zero_switches_a_watch_off(name, change):
    assert [alarm.name for alarm in run(Guard(), range(N + 150), change)] == [name]
    assert run(Guard(**{name: 0}), range(N + 150), change) == []


def test_a_discriminator_watch_of_zero_is_off_for_negative_losses():
    assert run(Guard(discriminator=0), range(150), from_step(0, "adversary/loss", -1.0)) == []


@pytest.mark.parametrize(
    "wrong",
    [
        {"window": 1},
        {"window": 20.5},
        {"spike": -1.0},
        {"spike": math.nan},
        {"skipped": -1},
        {"collapse": 1.0},
        {"latent_variance": 1.5},
        {"discriminator": math.inf},
        {"patience": 0},
        {"history": 0},
    ],
)
def test_nonsense_is_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Guard(**wrong)


# -- state ---------------------------------------------------------------------------------------------------------


def disasters(step, values):
    """Triggers every watch; incidents are in progress at steps 605, 700 and 900."""
    if 560 <= step < 720:
        values["grad_norm/denoiser"] = 1e-6
    if 600 <= step < 612:
        values["tokenizer/lpips"] = values["tokenizer/loss"] = math.inf
        return False
    if 650 <= step < 800:
        values["adversary/loss"] = 0.0
    if step >= 895:
        values["latent/variance"] = 0.01
    if 880 <= step < 1150 and step % 3 == 0:
        values["grad_norm/tokenizer"] = 300.0
    return True


@pytest.mark.parametrize("stop", [150, 605, 625, 700, 900, 1000])
def test_a_resumed_run_raises_the_same_alarms(stop):
    whole, first, second = Guard(), Guard(), Guard()
    expected = run(whole, range(1300), disasters)
    assert {a.name for a in expected} == {"skipped", "spike", "collapse", "latent_variance", "discriminator"}
    found = run(first, range(stop), disasters)
    state = json.loads(json.dumps(first.state_dict(), allow_nan=False))
    second.load_state_dict(state)
    assert repr(second.first_anomaly()) == repr(first.first_anomaly())
    assert repr(list(second.history)) == repr(list(first.history))
    assert second.state_dict() == state
    assert found + run(second, range(stop, 1300), disasters) == expected


def test_the_state_is_small():
    guard = Guard()
    run(guard, range(N))
    assert len(json.dumps(guard.state_dict())) < 100_000


def test_forget_drops_what_was_seen_and_alarms_anew():
    change = from_step(N, "grad_norm/denoiser", 1e-6)
    fresh, guard = Guard(), Guard()
    run(fresh, range(N - 20))
    run(guard, range(N - 20))
    alarm = only(run(guard, range(N - 20, N + 120), change), "collapse", "grad_norm/denoiser")
    guard.forget(N - 20)
    assert all(step < N - 20 for step, _ in guard.history)
    assert guard.first_anomaly() is None
    assert all(step < N - 20 for step in guard.state_dict()["steps"])
    assert run(guard, range(N - 20, N + 120), change) == [alarm]  # the reference was kept


def test_forget_drops_trouble_under_way():
    guard = Guard()
    run(guard, range(N + 8), nan_everywhere("tokenizer/lpips", N))
    guard.forget(N + 8)
    assert run(guard, range(N + 8, N + 17), nan_everywhere("tokenizer/lpips", N + 8)) == []


# -- which module failed first -------------------------------------------------------------------------------------


def test_the_history_is_bounded_and_holds_skipped_steps():
    guard = Guard(history=7)
    run(guard, range(N + 5), nan_everywhere("tokenizer/lpips", N))
    assert [step for step, _ in guard.history] == list(range(N - 2, N + 5))
    assert math.isnan(guard.history[-1][1]["denoiser/loss"])


@pytest.mark.parametrize("skipped", [10, 0])
def test_the_first_nan_is_named_by_its_term(skipped):
    guard = Guard(skipped=skipped)
    run(guard, range(N + 10), nan_everywhere("tokenizer/lpips", N))
    first = guard.first_anomaly()
    assert (first.metric, first.module, first.step) == ("tokenizer/lpips", "tokenizer", N)
    assert math.isnan(first.value) and first.usual == pytest.approx(0.54, abs=0.03)


def test_an_explosion_five_steps_earlier_is_named():
    def change(step, values):
        if step >= N:
            values["grad_norm/discriminator"] = 60.0 * 2 ** (step - N)
        if step >= N + 5:
            values["grad_norm/tokenizer"] = 100.0

    guard = Guard()
    run(guard, range(N + 8), change)
    first = guard.first_anomaly()
    assert (first.metric, first.module, first.step, first.value) == (
        "grad_norm/discriminator",
        "discriminator",
        N,
        60.0,
    )
    assert 0.3 < first.usual < 0.7


def test_a_departure_below_the_alarm_is_named():
    def change(step, values):  # sevenfold: abnormal, but not a spike
        if step >= N:
            values["grad_norm/discriminator"] = 3.5
        if step >= N + 5:
            values["grad_norm/tokenizer"] = 100.0

    guard = Guard()
    assert only(run(guard, range(N + 6), change), "spike", "grad_norm/tokenizer").step == N + 5
    assert guard.first_anomaly()[:3] == ("grad_norm/discriminator", "discriminator", N)


def test_an_explosion_that_ends_in_nan_is_named():
    def change(step, values):
        if step >= N:
            values["grad_norm/discriminator"] = 60.0
        return nan_everywhere("tokenizer/lpips", N + 5)(step, values)

    guard = Guard()
    run(guard, range(N + 20), change)
    assert guard.first_anomaly()[:3] == ("grad_norm/discriminator", "discriminator", N)


def test_nan_comes_before_what_is_merely_unusual_and_before_old_trouble():
    def change(step, values):
        if step == N - 30:
            values["denoiser/loss"] = math.nan
            return False
        if step >= N - 2:
            values["denoiser/loss"] = 2.5
        return nan_everywhere("tokenizer/lpips", N)(step, values)

    guard = Guard()
    run(guard, range(N + 10), change)
    assert guard.first_anomaly()[:3] == ("tokenizer/lpips", "tokenizer", N)


def test_a_slow_death_longer_than_the_history_is_named():
    guard = Guard()

    def change(step, values):
        if step >= N:
            values["grad_norm/denoiser"] = 1e-6
        if step >= N + 60:
            values["denoiser/loss"] = 30.0

    run(guard, range(N + 100), change)
    assert guard.first_anomaly()[:4] == ("grad_norm/denoiser", "denoiser", N, 1e-6)


def test_a_winning_discriminator_is_named_by_its_group():
    def change(step, values):
        if step >= N:
            values["adversary/loss"] = values["discriminator/loss"] = 0.004

    guard = Guard()
    run(guard, range(N + 100), change)
    assert guard.first_anomaly()[:3] == ("adversary/loss", "discriminator", N)


def test_nothing_to_name():
    assert Guard().first_anomaly() is None
    for steps in (1, 3, 8, 30):
        guard = Guard()
        run(guard, range(steps))
        assert guard.first_anomaly() is None


def test_a_run_that_begins_with_nan():
    guard = Guard()
    alarm = only(run(guard, range(20), nan_everywhere("tokenizer/lpips", 0)), "skipped", "tokenizer/lpips")
    assert (alarm.step, alarm.onset) == (9, 0)
    assert guard.first_anomaly()[:3] == ("tokenizer/lpips", "tokenizer", 0)


def test_a_step_costs_well_below_a_millisecond():
    guard, rng = Guard(), random.Random(0)
    steps = [healthy(step, rng) for step in range(1000)]
    costs = []
    for step, values in enumerate(steps):
        start = time.perf_counter()
        guard.observe(step, values, True)
        costs.append(time.perf_counter() - start)
    assert sorted(costs)[500] < 1e-3


def losses_of(values: list[float], **options) -> list:
    guard, alarms = Guard(window=20, patience=10, skipped=0, **options), []
    for step, value in enumerate(values):
        alarms += guard.observe(step, {"tokenizer/loss": value, "grad_norm/tokenizer": abs(value)}, applied=True)
    return alarms


def test_a_loss_that_becomes_exactly_0_and_stays_so_is_an_alarm():
    alarms = losses_of([1.0] * 15 + [0.0] * 40)
    assert [(a.name, a.metric, a.onset) for a in alarms] == [("collapse", "tokenizer/loss", 15)] * 2
    assert "tokenizer/loss has been exactly 0 for 10 consecutive steps, since step 15: 1 was usual" in alarms[0].message
    assert not losses_of([1.0] * 15 + [0.0] * 40, collapse=0)


@pytest.mark.parametrize(
    "values",
    [
        [0.0] * 60 + [1.0] * 60,  # scheduled, like a discriminator before its start step
        [1.0, *[0.0] * 8] * 12,  # a hinge that most batches satisfy
    ],
    ids=["scheduled", "hinge"],
)
def test_a_loss_that_is_0_before_it_starts_or_now_and_then_is_none(values):
    assert not losses_of(values, spike=0)
