"""compare: numbers of made-up runs, over seeds, after resumes and damage, and figures that open."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support import ROOT
from trainer.__main__ import main
from trainer.compare import figures, statistics
from trainer.compare.arms import make_arms
from trainer.compare.runs import read_run

TOML = """
[training]
steps = {steps}
batch_size = 10
seed = {seed}

[run]
dir = "{folder}"

[denoiser]
width = {width}

[evaluation]
images = {images}
"""


def make_run(
    folder: Path, fids: dict[int, float], *, seed=0, width=8, steps=None, images=100, speed=5.0, losses=None
) -> Path:
    """A run folder whose evaluations and losses are given by step; each step trains 10 images at ``speed`` images/s."""
    (folder / "images").mkdir(parents=True)
    steps = steps or max(fids)
    text = TOML.format(steps=steps, seed=seed, folder=folder, width=width, images=images)
    (folder / "config.toml").write_text(text)
    for step, fid in fids.items():
        loss = (losses or {}).get(step, 1.0)
        add(folder, step, {"denoiser/loss": loss, "speed/images_per_s": speed, "time/outside/evaluation": 3.0})
        add(folder, step, {"evaluation/fid": fid, "evaluation/is": 100 - fid})
    return folder


def add(folder: Path, step: int, values: dict[str, float]) -> None:
    with open(folder / "metrics.jsonl", "a") as file:
        file.write(json.dumps({"step": step, **values}) + "\n")


def compare(tmp_path: Path, *words) -> dict:
    assert main(["compare", *map(str, words), f"--out={tmp_path / 'out'}"]) == 0
    return json.loads((tmp_path / "out" / "compare.json").read_text())


@pytest.fixture
def slow(tmp_path) -> Path:
    return make_run(tmp_path / "slow", {10: 80.0, 20: 40.0, 30: 30.0, 40: 20.0}, width=4)


@pytest.fixture
def fast(tmp_path) -> Path:
    return make_run(tmp_path / "fast", {10: 20.0, 20: 8.0, 30: 10.0, 40: 12.0})


def test_last_and_best_values_and_the_steps_to_scores(tmp_path, slow, fast):
    found = compare(tmp_path, slow, fast, "--threshold", "fid=30", "--threshold=is=91")
    metrics = found["arms"]["fast"]["metrics"]
    assert metrics["evaluation/fid"]["last"] == {"step": 40, "mean": 12.0, "std": None, "values": [12.0]}
    assert metrics["evaluation/fid"]["best"]["mean"] == 8.0 and metrics["evaluation/fid"]["best"]["step"] == 20
    assert metrics["evaluation/is"]["best"]["mean"] == 92.0, "higher is better"
    goals = {(goal["metric"], goal["final_score_of"]): goal for goal in found["goals"]}
    assert set(goals) == {
        ("evaluation/fid", None), ("evaluation/is", None), ("evaluation/fid", "slow"), ("evaluation/is", "slow")
    }  # fmt: skip
    reached = goals["evaluation/fid", None]["reached"]
    assert reached["slow"]["step"] == 30 and reached["fast"]["step"] == 10 and reached["fast"]["times_fewer"] is None
    reached = goals["evaluation/is", None]["reached"]
    assert reached["slow"]["steps"] == [None] and reached["slow"]["step"] is None and reached["fast"]["step"] == 20
    reached = goals["evaluation/fid", "slow"]["reached"]
    assert reached["fast"] == {
        "steps": [10], "step": 10.0, "std": None, "seconds": 20.0, "epochs": None,
        "times_fewer": 4.0, "times_faster": 4.0,
    }  # fmt: skip
    assert reached["slow"]["step"] == 40 and reached["slow"]["times_fewer"] is None


def test_the_table_shows_these_numbers(tmp_path, slow, fast, capsys):
    compare(tmp_path, slow, fast, "--threshold=fid=10")
    page = (tmp_path / "out" / "table.md").read_text()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in page.splitlines() if line.startswith("|")]
    assert ["slow", "1", "40", "5", "0:01:20", "0:01:32"] in rows, "40 steps of 10 images at 5 images/s, 4 evaluations"
    assert ["evaluation/fid (lower is better)", "40", "20", "**12**"] in rows
    assert ["evaluation/fid (lower is better)", "", "20 at 40", "**8** at 20"] in rows
    assert ["evaluation/fid ≤ 10", "not reached", "20"] in rows
    assert ["evaluation/fid ≤ 20", "40", "10 (4x fewer steps, 4x less training time)"] in rows
    assert page in capsys.readouterr().out


def test_epochs_to_a_score(tmp_path, slow):
    """From the passes over the dataset that the run recorded, also between and after its records."""
    middle = enumerate((4.0, 2.0))
    folders = [make_run(tmp_path / f"seed{seed}", {10: 8.0, 20: fid, 36: 2.0}, seed=seed) for seed, fid in middle]
    for folder in folders:  # 10 images a step, 40 in the dataset
        for step in (8, 32):
            add(folder, step, {"data/epoch": step * 10 / 40})
    for folder in folders:  # in the order of a run
        lines = sorted((folder / "metrics.jsonl").read_text().splitlines(), key=lambda line: json.loads(line)["step"])
        (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    found = compare(tmp_path, *folders, slow, "--threshold=fid=2", "--threshold=fid=100")
    first, second = (goal["reached"] for goal in found["goals"][:2])
    (label,) = set(first) - {"slow"}
    assert first[label]["steps"] == [36, 20] and first[label]["epochs"] == pytest.approx((9 + 5) / 2)
    assert second["slow"]["step"] == 10 and second["slow"]["epochs"] is None, "not recorded"
    table = (tmp_path / "out" / "table.md").read_text()
    assert "28 ± 11 (7 epochs)" in table and "(7 epochs, " not in table


def test_fewer_steps_can_take_more_time(tmp_path, slow):
    make_run(tmp_path / "heavy", {10: 50.0, 20: 20.0}, speed=1.0)
    compare(tmp_path, slow, tmp_path / "heavy")
    assert "20 (2x fewer steps, 2.5x more training time)" in (tmp_path / "out" / "table.md").read_text()


def test_wall_time_counts_the_speed_of_each_interval(tmp_path):
    folder = make_run(tmp_path / "run", {10: 3.0, 20: 2.0}, speed=5.0)
    add(folder, 30, {"speed/images_per_s": 50.0})
    run = read_run(folder)
    assert run.seconds([0, 5, 10, 20, 25, 30]).tolist() == pytest.approx([0, 10, 20, 40, 41, 42])
    assert run.wall_s == pytest.approx(48) and run.images_per_s == 27.5


def test_seeds_of_one_config_are_one_arm(tmp_path, slow):
    for seed, last in enumerate((10.0, 14.0, 18.0)):
        make_run(tmp_path / f"fast-seed{seed}", {10: 50.0, 20: 30.0 - 10 * (seed == 0), 40: last}, seed=seed)
    found = compare(tmp_path, slow, *sorted(tmp_path.glob("fast-seed*")), "--reach", "slow")
    assert list(found["arms"]) == ["slow", "fast"]
    last = found["arms"]["fast"]["metrics"]["evaluation/fid"]["last"]
    assert last == {"step": 40, "mean": 14.0, "std": 4.0, "values": [10.0, 14.0, 18.0]}
    reached = next(goal for goal in found["goals"] if goal["metric"] == "evaluation/fid")["reached"]["fast"]
    assert reached["steps"] == [20, 40, 40] and reached["step"] == pytest.approx(100 / 3)
    assert reached["times_fewer"] == pytest.approx(1.2)
    page = (tmp_path / "out" / "table.md").read_text()
    assert "14 ± 4" in page and "± is the sample standard deviation over the seeds" in page


def test_a_goal_that_some_seeds_miss_has_no_mean(tmp_path, slow):
    for seed, last in enumerate((10.0, 30.0)):
        make_run(tmp_path / f"b{seed}", {20: 50.0, 40: last}, seed=seed)
    found = compare(tmp_path, slow, tmp_path / "b0", tmp_path / "b1", "--threshold=fid=20")
    assert found["goals"][0]["reached"]["b"] == {
        "steps": [40, None], "step": None, "std": None, "seconds": None, "epochs": None,
        "times_fewer": None, "times_faster": None,
    }  # fmt: skip
    assert "reached by 1 of 2 seeds" in (tmp_path / "out" / "table.md").read_text()


def test_labels_and_what_is_no_seed(tmp_path, slow, fast):
    other = make_run(tmp_path / "other", {40: 1.0}, seed=1, width=99)
    assert [arm.label for arm in make_arms([str(slow), str(other)])] == ["slow", "other"]
    arms = make_arms([f"A={slow},{other}", f"B={fast}"])
    assert [(arm.label, len(arm.runs)) for arm in arms] == [("A", 2), ("B", 1)]
    found = compare(tmp_path, f"A={slow},{other}")
    assert found["notes"] == ["the runs of 'A' differ in more than their seed: denoiser.width"]
    again = make_run(tmp_path / "again" / "slow", {40: 1.0}, seed=1, width=5)
    assert [arm.label for arm in make_arms([str(slow), str(again)])] == ["slow", "slow (2)"]


def test_after_a_resume_the_last_values_count(tmp_path):
    folder = make_run(tmp_path / "run", {10: 9.0, 20: 8.0, 30: 7.0, 35: 6.0}, steps=40)
    for step, fid in {20: 5.0, 40: 4.0}.items():
        add(folder, step, {"evaluation/fid": fid})
    fid = read_run(folder).curves["evaluation/fid"]
    assert fid == {10: 9.0, 20: 5.0, 40: 4.0}, "steps 30 and 35 were discarded"


def test_unfinished_and_damaged_runs_are_said(tmp_path, slow, fast, capsys):
    text = (fast / "config.toml").read_text().replace("steps = 40", "steps = 2000")
    (fast / "config.toml").write_text(text)
    lines = (fast / "metrics.jsonl").read_text()
    (fast / "metrics.jsonl").write_text("{broken\n" + lines + '{"step": 50, "evaluation/fid": 1')
    add(slow, 40, {"evaluation/fid": float("nan")})
    found = compare(tmp_path, slow, fast)
    assert found["arms"]["fast"]["metrics"]["evaluation/fid"]["last"]["step"] == 40
    assert found["arms"]["slow"]["metrics"]["evaluation/fid"]["last"]["mean"] == 20
    assert found["notes"] == [
        f"{fast}: metrics.jsonl: line 1 is damaged and left out",
        f"{fast}: metrics.jsonl: the last line is incomplete and left out",
        f"{fast}: unfinished: step 40 of 2,000",
    ]
    assert "unfinished: step 40 of 2,000" in capsys.readouterr().out


def test_other_settings_of_the_evaluation_are_said(tmp_path, slow):
    other = make_run(tmp_path / "other", {40: 1.0}, images=5000)
    assert compare(tmp_path, slow, other)["notes"] == [
        "evaluation.images differs (slow 100, other 5000): scores are not comparable"
    ]


def test_metrics_are_found_by_tag_word_and_pattern(slow):
    arms = make_arms([str(slow)])
    assert statistics.choose([], arms) == ["evaluation/fid", "evaluation/is", "denoiser/loss"]
    assert statistics.choose(["loss", "evaluation/*", "evaluation/fid"], arms) == [
        "denoiser/loss", "evaluation/fid", "evaluation/is"
    ]  # fmt: skip


@pytest.mark.parametrize(
    "words, message",
    [
        (["nowhere"], r"'nowhere' does not exist; expected outputs/NAME of a run\n"),
        (["{slow}w"], r"sloww' does not exist; expected outputs/NAME of a run; did you mean '.*slow'\?"),
        ([str(ROOT / "docs")], r"docs' is no run folder: it has no config.toml"),
        (["{slow}", "{slow}/"], r"slow' is named twice"),
        (["=x"], r"'=x': expected NAME=RUN"),
        (["{slow}", "--metric=fidd"], r"no run has the metric 'fidd'; the nearest names: evaluation/fid"),
        (["{slow}", "--threshold=fid"], r"--threshold=fid: expected METRIC=NUMBER"),
        (["{slow}", "--threshold=fid=nan"], r"--threshold=fid=nan: expected METRIC=NUMBER"),
        (["{slow}", "--threshold=images_per_s=1", "--threshold=evaluation=1"], r"neither a higher nor a lower"),
        (["{slow}", "--reach=fast"], r"--reach=fast: expected one of the arms: slow"),
        (["{slow}", "--smooth=1"], r"--smooth=1: expected at least 0 and below 1"),
        (["{slow}", "--metrics=fid"], r"unexpected argument '--metrics=fid'"),
    ],
)
def test_errors_take_one_line(slow, capsys, words, message):
    assert main(["compare", *(word.format(slow=slow) for word in words)]) == 2
    error = capsys.readouterr().err
    assert re.search(message, error) and error.count("\n") == 1


def test_a_run_without_points(tmp_path, slow, capsys):
    (slow / "metrics.jsonl").unlink()
    assert main(["compare", str(slow)]) == 2
    assert "has no points yet" in capsys.readouterr().err


def test_figures_open_and_have_the_expected_size(tmp_path, slow, fast):
    pytest.importorskip("matplotlib")
    from PIL import Image

    for folder, side in ((slow, 100), (fast, 200)):
        for step in (20, 40):
            Image.new("RGB", (side, side), (step, 0, 0)).save(folder / "images" / f"samples_{step:08d}.png")
    Image.new("RGB", (100, 100), (7, 7, 7)).save(fast / "images" / "reconstructions_00000040.png")
    compare(tmp_path, slow, fast, "--smooth=0.5")
    with Image.open(tmp_path / "out" / "curves.png") as curves:
        inches = 2 * figures.PANEL[0] + figures.LABELS + 0.75, 3 * (figures.PANEL[1] + 0.65)
        assert curves.size == pytest.approx([side * figures.DPI for side in inches], abs=2)
        corner = curves.convert("RGBA").getpixel((0, 0))
        assert corner == (255, 255, 255, 255), "opaque, for dark pages"
        colors = {color for _, color in curves.convert("RGB").getcolors(1 << 20)}
        assert {tuple(bytes.fromhex(color[1:])) for color in figures.COLORS[:2]} <= colors
    with Image.open(tmp_path / "out" / "samples.png") as samples:
        assert samples.size == pytest.approx((2 * (600 + 16) + 16, 600 + 36 + 16), abs=50)
        assert samples.convert("RGB").getpixel((40, 60)) == (40, 0, 0), "the last grid"
    with Image.open(tmp_path / "out" / "reconstructions.png") as pictures:
        assert pictures.size == pytest.approx((600 + 3 * 16, 600 + 36 + 16), abs=50), "of the arm that has them"
        assert pictures.convert("RGB").getpixel((40, 60)) == (7, 7, 7)


def test_runs_without_pictures_have_no_samples(tmp_path, slow, capsys):
    pytest.importorskip("matplotlib")
    compare(tmp_path, slow)
    assert not (tmp_path / "out" / "samples.png").exists() and "without samples" in capsys.readouterr().out


def test_labels_move_apart_and_smoothing_is_tensorboards():
    assert figures.spread([0.1, 0.1, 0.9], 0.2) == pytest.approx([0.0, 0.2, 0.9])
    assert figures.spread([0.5, 0.55, 0.6], 0.1) == pytest.approx([0.45, 0.55, 0.65])
    assert figures.smoothed([1.0, 1.0, 4.0], 0.5).tolist() == pytest.approx([1, 1, 2.7142857])


def test_it_needs_neither_torch_nor_matplotlib(tmp_path, slow):
    """The table and the numbers are written without matplotlib."""
    code = (
        "import sys; sys.modules['matplotlib'] = None; import importlib.util as u; find = u.find_spec\n"
        "u.find_spec = lambda name, *rest: None if name == 'matplotlib' else find(name, *rest)\n"
        f"from trainer.__main__ import main\nassert main(['compare', {str(slow)!r}, '--out={tmp_path}/out']) == 0\n"
        "assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "pip install 'titanrepa[compare]'" in done.stdout
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["compare.json", "table.md"]


def test_help(capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["compare", "--help"])
    text = capsys.readouterr().out
    assert all(option in text for option in ("--metric", "--threshold", "--reach", "--smooth", "--out"))
