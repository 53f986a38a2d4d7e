"""Every test that docs/determinism.md and SECURITY.md name is there."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGES = ("docs/determinism.md", "SECURITY.md")


def named_in(file: Path) -> set[str]:
    """The names of a file's test functions."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    return {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")}


def missing(page: str) -> list[str]:
    """What a page names in backquotes that is no test file, or no test in the file (or, without one, anywhere)."""
    every = set[str]().union(*map(named_in, (ROOT / "tests").rglob("test_*.py")))
    found = []
    for file, name in re.findall(r"`(?:(tests/[\w/]+\.py)(?:::)?)?(test_\w+)?`", page):
        if file and not (ROOT / file).is_file():
            found.append(file)
        elif name and name not in (named_in(ROOT / file) if file else every):
            found.append(f"{file}::{name}")
    return found


@pytest.mark.parametrize("page", PAGES)
def test_every_named_test_exists(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    assert len(re.findall(r"`[^`\n]*test_\w+[^`\n]*`", text)) > 15
    assert not missing(text)


def test_a_wrong_name_is_found() -> None:
    here = "tests/test_determinism_page.py"
    assert not missing(f"see `{here}::test_a_wrong_name_is_found`, `test_every_named_test_exists` and `{here}`")
    wrong = {
        f"{here}::test_nothing": None,
        "tests/test_no_file.py::test_x": "tests/test_no_file.py",
        "test_no": "::test_no",
    }
    for name, told in wrong.items():
        assert missing(f"see `{name}`") == [told or name]
