"""The lock file of shares: there as long as one process is at the job, also one that holds no lock on a unit."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from nextblock.jobs.share import Share, Units

# Another process: does what it is told, line by line, and says what came of it.
OTHER = """
import sys
from pathlib import Path
from nextblock.jobs.share import Share, Units

def last():
    with units.last() as got:
        return got

for line in sys.stdin:
    if line.strip() == "enter":
        units = Units(Path(sys.argv[1]), Share()).__enter__()
        print("entered", flush=True)
    elif line.strip() == "leave":
        units.__exit__(None, None, None)
        print("left", flush=True)
    else:
        print(eval(line), flush=True)
"""


class Other:
    """Another process at the same target."""

    def __init__(self, target: Path) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", OTHER, str(target)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            bufsize=1, env=os.environ | {"OMP_NUM_THREADS": "1"},
        )  # fmt: skip

    def __call__(self, told: str) -> str:
        assert self.process.stdin
        assert self.process.stdout
        self.process.stdin.write(told + "\n")
        return self.process.stdout.readline().strip()


@pytest.fixture
def target(tmp_path: Path) -> Path:
    return tmp_path / "out"


@pytest.fixture
def other(target: Path) -> Iterator[Other]:
    found = Other(target)
    yield found
    found.process.kill()
    found.process.communicate()


def test_nobody_removes_the_file_under_a_process_between_two_locks(target: Path, other: Other) -> None:
    with Units(target, Share()) as units:
        assert [other(told) for told in ("enter", "units.claim([0])", "leave")] == ["entered", "[0]", "left"]
        assert units.claim([0, 2]) == [0, 2]
        assert other("enter") == "entered"
        assert other("units.claim([0, 1, 2])") == "[1]"
        with units.last() as got:
            assert got
            assert other("last()") == "False"
        assert other("leave") == "left"
    assert not list(target.parent.iterdir())


def test_the_last_one_removes_the_file(target: Path, other: Other) -> None:
    with Units(target, Share()) as units:
        assert other("enter") == "entered"
        with units.alone():
            assert other("leave") == "left"  # and waits for nobody
        assert other("enter") == "entered"
    assert [path.name for path in target.parent.iterdir()] == [".out.lock"]
    assert other("leave") == "left"
    assert not list(target.parent.iterdir())


def test_a_process_that_was_killed_is_not_there(target: Path, other: Other) -> None:
    assert [other(told) for told in ("enter", "units.claim([3])")] == ["entered", "[3]"]
    with Units(target, Share()) as units:
        other.process.kill()
        other.process.wait()
        assert units.claim([3]) == [3]
    assert not list(target.parent.iterdir())


def test_one_lock_by_whatever_name(target: Path, other: Other, tmp_path: Path) -> None:
    target.mkdir()
    (tmp_path / "link").symlink_to(target)
    assert other("enter") == "entered"
    assert other("units.claim([0])") == "[0]"
    with Units(tmp_path / "link", Share()) as units:
        assert units.locks
        assert units.claim([0]) == []


def test_a_file_of_another_is_not_removed(target: Path) -> None:
    file = target.with_name(f".{target.name}.lock")
    file.write_text("mine")
    with Units(target, Share()) as units:
        assert units.claim([0]) == [0]
    assert file.read_text() == "mine"
