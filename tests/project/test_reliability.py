"""docs/reliability.md names tests that exist."""

import ast
import re

from tests.support import ROOT


def test_every_promise_names_tests_that_exist():
    """A cell may continue with `::name`, which is in the file named before."""
    functions: dict[str, set[str]] = {}
    rows = [
        line for line in (ROOT / "docs/reliability.md").read_text().splitlines() if "tests/" in line and "|" in line
    ]
    assert len(rows) >= 60
    for row in rows:
        file = ""
        for named, function in re.findall(r"`([\w/.]*)::(\w+)`", row.rsplit("|", 2)[1]):
            file = named or file
            if file not in functions:
                tree = ast.parse((ROOT / file).read_text())
                functions[file] = {n.name for n in ast.walk(tree) if isinstance(n, ast.FunctionDef)}
            assert function in functions[file], f"{file}::{function}"
        assert file, row
