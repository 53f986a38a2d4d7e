"""Of what was written, a flipped bit or a missing end is noticed before it is used; `tests.faults.full` tries 1,000."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from bit_flips import SUBJECTS, Subject, damaged_at_random
from full import damage

TRIES = 15


@pytest.mark.parametrize("name", list(SUBJECTS))
def test_damage_is_noticed(name: str, tmp_path: Path) -> None:
    found = damaged_at_random(SUBJECTS[name](tmp_path), TRIES, random.Random(name))
    assert not found.failures, found.failures[0]
    assert found.tries.total() == TRIES


@pytest.mark.parametrize(("old", "new"), [('"step": 8', '"step": 9'), ('"step"', '"stop"'), ("{", "[")])
def test_a_record_that_says_something_else_is_noticed(tmp_path: Path, old: str, new: str) -> None:
    subject = SUBJECTS["checkpoints"](tmp_path)
    (record,) = (file for file in subject.files if file.suffix == ".json")
    record.write_text(record.read_text().replace(old, new))
    with pytest.raises(Exception, match="step-00000008 is damaged"):
        subject.use()


def test_damage_that_nobody_notices_is_found(tmp_path: Path) -> None:
    """The test can fail: a file that is read as it is."""
    file = tmp_path / "file"
    file.write_bytes(bytes(100))
    found = damaged_at_random(Subject([file], lambda: file.read_bytes().hex()), 5, random.Random(0))
    assert len(found.failures) == 5
    assert "not noticed: other content" in found.failures[0]


def test_the_full_report_tries_each_subject(tmp_path: Path) -> None:
    tallies = damage(len(SUBJECTS), 0, tmp_path / "scratch")
    assert list(tallies) == [f"damage: {name}" for name in SUBJECTS]
    assert all(not tally.failures and tally.tries.total() == 1 for tally in tallies.values())
