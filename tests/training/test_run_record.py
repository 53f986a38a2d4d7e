"""What is in a run folder before it is one: left by a start that ended, or somebody's own."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from nextblock.errors import RunError
from nextblock.training.run_record import (
    environment,
    is_unborn,
    read_config,
    read_environment,
    read_json,
    remove_unborn,
    to_json,
)


@pytest.fixture
def left(tmp_path: Path) -> Path:
    """All that a start may leave."""
    folder = tmp_path / "run"
    (folder / "checkpoints" / "step-00000000").mkdir(parents=True)
    (folder / "checkpoints" / ".partial-step-00000000").mkdir()
    (folder / "tensorboard").mkdir()
    (folder / "environment.json").write_text(to_json(environment(0, "cpu")))
    (folder / "data_manifest.txt.gz").write_bytes(b"")
    (folder / "metrics.csv").write_text("step,loss\n")
    (folder / ".config.yaml.partial").write_text("")
    return folder


def test_what_a_start_has_left_is_removed(left: Path) -> None:
    with pytest.raises(RunError, match="ended before its first checkpoint was saved: start the run again"):
        read_config(left)
    remove_unborn(left)
    assert list(left.iterdir()) == []


@pytest.mark.parametrize(
    "change",
    [
        lambda folder: (folder / "config.yaml").write_text(""),
        lambda folder: (folder / "thesis.tex").write_text(""),
        lambda folder: (folder / "exported").mkdir(),
        lambda folder: (folder / "checkpoints" / "step-00000500").mkdir(),
        lambda folder: (folder / "metrics.csv").write_text("step,loss\n1,2.0\n"),
        lambda folder: (folder / "environment.json").write_text('{"python": "3.12"}'),
        lambda folder: (folder / "environment.json").write_text('{"packages": {}}'),
        lambda folder: (folder / "environment.json").unlink(),
    ],
    ids=["a run", "more", "weights", "a later step", "rows", "of another tool", "of another record", "no record"],
)
def test_everything_else_stays(left: Path, change: Callable[[Path], object]) -> None:
    change(left)
    before = sorted(left.rglob("*"))
    assert not is_unborn(left)
    remove_unborn(left)
    assert sorted(left.rglob("*")) == before


def test_a_run_that_has_lost_its_configuration_is_not_begun_again(left: Path) -> None:
    (left / "checkpoints" / "step-00000500").mkdir()
    with pytest.raises(RunError, match=r"has lost its config.yaml. Bring it back from a copy, or start a new run"):
        read_config(left)


@pytest.mark.parametrize("text", ["", "{", "[]", "[" * 10_000, '{"data": 1}', '{"more": {}}', "\xff"])
def test_a_record_that_is_none_is_told(tmp_path: Path, text: str) -> None:
    (tmp_path / "environment.json").write_text(text, encoding="latin-1")
    with pytest.raises(RunError, match=r"environment.json (cannot be read|is not what was written).*start a new run"):
        read_environment(tmp_path, "data")


def test_a_record_says_what_it_lacks(tmp_path: Path) -> None:
    (tmp_path / "result.json").write_text('{"a": 1}')
    assert read_json(tmp_path / "result.json", ["a"], "") == {"a": 1}
    with pytest.raises(RunError, match=r"it lacks b, c\. Remove it"):
        read_json(tmp_path / "result.json", ["a", "b", "c"], "Remove it.")
