"""The listing of benchmark data sets: whole, readable at 100 columns, and true about this machine."""

from __future__ import annotations

from pathlib import Path

import pytest

from nextblock.data.named import NAMED
from nextblock.errors import DataError
from nextblock.jobs.datasets import datasets


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.delenv("COLUMNS", raising=False)
    (tmp_path / "food-101/images").mkdir(parents=True)
    (tmp_path / "dtd").mkdir()  # empty: not there
    return tmp_path


def test_lists_all_of_them(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = datasets(data_root=root)
    printed = capsys.readouterr().out
    assert [row["name"] for row in rows] == list(NAMED)
    assert {row["name"]: row["path"] for row in rows if row["path"]} == {"food101": str(root / "food-101")}
    lines = printed.splitlines()
    assert max(map(len, lines)) <= 100
    for row in rows:
        (line,) = [line for line in lines if line.split()[:1] == [row["name"]]]  # nothing wraps
        assert row["title"] in line
        assert f" {row['classes']} " in line
        assert line.rstrip().endswith("real data (Parquet)" if row["name"] == "cifar10" else "a fixture")
    assert "train+val -> test" in printed
    assert "food-101/" in printed
    assert "1 of 15 are below" in printed


@pytest.mark.parametrize("name", NAMED)
def test_tells_everything_about_one(name: str, root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (row,) = datasets(data_root=root, name=name)
    printed = capsys.readouterr().out
    assert max(map(len, printed.splitlines())) <= 100
    words = " ".join(printed.split())
    for text in (NAMED[name].url, " ".join(f"{lr:g}" for lr in NAMED[name].lrs), f"{NAMED[name].batch_size}"):
        assert text in words
    for word in NAMED[name].how.split():
        assert word in printed
    assert (row["metric"], row["warmup_epochs"]) == (NAMED[name].metric, NAMED[name].warmup_epochs)


def test_says_little_when_asked_to(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert len(datasets(data_root=root, quiet=True)) == 15
    assert capsys.readouterr().out == ""
    with pytest.raises(DataError, match=r"no data set is named 'pet'\. Did you mean 'pets'\?"):
        datasets(data_root=root, name="pet")
