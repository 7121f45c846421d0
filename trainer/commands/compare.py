"""python -m trainer compare: curves and a table of runs side by side."""

from __future__ import annotations

import argparse
import importlib.util
import json
from pathlib import Path

from trainer import config as configs

SUMMARY = "show curves, samples and a table of runs side by side"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "runs",
        nargs="+",
        metavar="RUN|NAME=RUN[,RUN...]",
        help="run folder (outputs/NAME); or several of one arm, with a label. Runs whose configs differ in "
        "training.seed only are seeds of one arm",
    )
    parser.add_argument("--out", default="outputs/compare", metavar="FOLDER", help="default: outputs/compare")
    parser.add_argument(
        "--metric",
        action="append",
        default=[],
        metavar="NAME[,NAME...]",
        help="scalars to show: denoiser/loss, fid, 'latent/*' (default: all evaluations, and the losses)",
    )
    parser.add_argument(
        "--threshold",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="also show the steps and epochs until a metric reaches a value, such as fid=2; may be repeated",
    )
    parser.add_argument(
        "--reach",
        metavar="RUN",
        help="also show the steps until each arm reaches the final scores of this arm, and how many times fewer they "
        "are (default: the first arm's evaluations)",
    )
    parser.add_argument(
        "--smooth",
        type=float,
        default=0.0,
        metavar="WEIGHT",
        help="moving average of the losses in curves.png, in [0, 1), as in TensorBoard (default: 0)",
    )
    parser.epilog = (
        "Writes curves.png, samples.png, reconstructions.png, table.md and compare.json. Figures need matplotlib:\n"
        "pip install 'titanrepa[compare]'; without it, only the table and the numbers are written.\n"
        "docs/compare.md defines the numbers."
    )


def run(arguments: argparse.Namespace, rest: list[str]) -> int:
    if rest:
        raise configs.ConfigError(f"unexpected argument '{rest[0]}'; see python -m trainer compare --help")
    if not 0 <= arguments.smooth < 1:
        raise configs.ConfigError(f"--smooth={arguments.smooth:g}: expected at least 0 and below 1")
    from trainer.compare import statistics
    from trainer.compare.arms import make_arms, notes_on
    from trainer.compare.table import markdown

    arms = make_arms(arguments.runs)
    names = [name.strip() for names in arguments.metric for name in names.split(",") if name.strip()]
    tags = statistics.choose(names, arms)
    goals = statistics.thresholds(arguments.threshold, arms)
    goals += statistics.final_scores(arguments.reach, tags, arms)
    tags = list(dict.fromkeys([*tags, *(goal.tag for goal in goals)]))
    notes = notes_on(arms)
    # A metric that the seeds of an arm have at different steps has no mean.
    notes += [
        f"the seeds of '{arm.label}' have no common step of {tag}: left out"
        for arm in arms
        for tag in tags
        if tag in arm.tags and arm.series(tag) is None
    ]
    tags = [tag for tag in tags if any(arm.series(tag) is not None for arm in arms)]
    if not tags:
        raise configs.ConfigError("the runs have no metrics in common with the choice; name some with --metric")

    folder = Path(arguments.out).expanduser()
    table = markdown(arms, tags, goals, notes)
    written = ["table.md", "compare.json"]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "table.md").write_text(table, encoding="utf-8")
        numbers = statistics.everything(arms, tags, goals, notes)
        (folder / "compare.json").write_text(json.dumps(numbers, indent=1, allow_nan=False), encoding="utf-8")
        print(table)
        if importlib.util.find_spec("matplotlib") is None:
            print("no figures, as matplotlib is not installed: pip install 'titanrepa[compare]', or matplotlib")
        else:
            written = [*_draw(folder, arms, tags, goals, arguments.smooth), *written]
    except OSError as error:
        raise configs.ConfigError(f"cannot write to {folder} ({error.strerror}); choose another --out") from error
    print(f"written to {folder}/: {', '.join(written)}")
    return 0


def _draw(folder: Path, arms: list, tags: list[str], goals: list, smooth: float) -> list[str]:
    """Write the figures, and return their names."""
    from trainer.compare.figures import draw_curves, draw_pictures

    draw_curves(folder / "curves.png", arms, tags, goals, smooth)
    written = ["curves.png"]
    for kind in ("samples", "reconstructions"):
        without = draw_pictures(folder / f"{kind}.png", arms, kind)
        if without:
            print(f"without {kind} in images/: {', '.join(without)}")
        if len(without) < len(arms):
            written.append(f"{kind}.png")
    return written
