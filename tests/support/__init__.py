"""What several test files share: toy parts and configs, ranks, stubs, and the paths of this repository."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
DATA = ROOT / "tests" / "data"
