"""Templates for ``python -m trainer new``: one working plugin a kind, its tests (tests.py) and a run (run.toml)."""

from __future__ import annotations

import re
from pathlib import Path

HERE = Path(__file__).parent
RUN = HERE / "run.toml"
REPLACES = {  # the shipped plugin that a new one replaces in run.toml; for other kinds, the table of the kind
    "encoder": "encoders.tiny_vit",
    "reconstruction_loss": "losses.l1",
    "adversarial_loss": "losses.patchgan",
    "alignment_loss": "losses.cosine",
}


def render(kind: str, name: str) -> dict[str, str]:
    """Return the files of a new plugin, by file name: the plugin, its tests, and a config that trains with it.

    Args:
        kind: name of a template, such as "encoder" or "alignment_loss".
        name: name to register the plugin under, a lower-case Python identifier.
    """
    plugin, tests, run = (file.read_text(encoding="utf-8") for file in (HERE / f"{kind}.py", HERE / "tests.py", RUN))
    # Of the tests of behavior, keep the one of this kind.
    blocks = tests.split("\n\n\n")
    kept = [b for b in blocks if not (m := re.match(r"def test_(\w+)_behavior", b)) or m[1] == kind]
    tests = "\n\n\n".join(kept).rstrip() + "\n"
    tests = tests.replace(f"test_{kind}_behavior", "test_behavior")
    place = REPLACES.get(kind, kind)
    table = f"[{place.partition('.')[0]}.template]\n" if kind in REPLACES else f'[{kind}]\nname = "template"\n'
    run = re.sub(rf"\[{re.escape(place)}\]\n(.+\n)*", table, run)
    title = "".join(part.capitalize() for part in name.split("_"))
    texts = {f"{name}.py": plugin, f"test_{name}.py": tests, f"{name}.toml": run}
    return {file: text.replace("template", name).replace("Template", title) for file, text in texts.items()}
