"""What is told: names and paths as they are, whatever characters they have."""

from __future__ import annotations

import errno
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console
from rich.table import Table

from nextblock.data.stream import BadSample
from nextblock.errors import RunError
from nextblock.jobs import predict, probe_report, segmentation_report, suite
from nextblock.jobs.output import plain, say, tell_bad, written_whole

NAME = "a[/b]c[bold]:cat: d"  # an end of markup without a beginning, a style, an emoji


def told(tell: Callable[..., None], *given: Any) -> str:
    file = io.StringIO()
    tell(Console(file=file, width=200), *given)
    return file.getvalue()


def test_what_is_said_is_said_as_it_is() -> None:
    assert told(say, f"{NAME} {'long ' * 60}") == f"{NAME} {'long ' * 60}\n"
    assert told(say, "caf\udce9") == "caf?\n"
    assert f"left out: {NAME}: broken" in told(tell_bad, [BadSample(NAME, "broken", 0)])


def test_cells_and_titles_hold_what_they_are_given() -> None:
    table = Table("x", title=plain(NAME, "table.title"))
    table.add_row(plain(f"{NAME} caf\udce9"))
    text = told(Console.print, table)
    assert text.count(NAME) == 2
    assert "caf?" in text


def test_predictions_are_shown_as_they_are_called() -> None:
    made = predict.Predictions([NAME], np.array([[NAME]]), np.ones((1, 1), np.float32), [])
    assert told(predict._show, made).count(NAME) == 2


PROBED = {
    "dataset": NAME, "metric": "accuracy", "images": {"training": 1, "test": 1}, "training": NAME, "protocol": NAME,
    "rows": [{"kind": NAME, "layers": "[1]", "lr": 1.0, "weight_decay": 0.0, "val_top1": None, "test_top1": 1.0}],
    "left_out": [(NAME, "broken", 0)],
}  # fmt: skip


def test_a_disk_that_refuses_all_is_told_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(Path, "unlink", refuse)
    told = r"cannot write .*x\.npz: Read-only file system\. Choose another --out"
    with pytest.raises(RunError, match=told), written_whole(tmp_path / "x.npz"):
        refuse()


def test_a_finished_probe_is_told_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe_report, "_at_the_edge", lambda result: "edge [/x]")
    text = told(probe_report.tell, Path("runs") / NAME, PROBED | {"heads": [{"diverged": False}]})
    assert f"{NAME}, frozen encoder" in text
    assert f"everything is in runs/{NAME}; look at runs/{NAME}/figures" in text
    assert f"{NAME}; {NAME}\nedge [/x]\n" in text
    assert text.count(NAME) == 7


def test_a_finished_segmentation_is_told_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(segmentation_report, "_notes", lambda result: [f"note {NAME}"])
    monkeypatch.setattr(segmentation_report, "_lines", lambda result: [[NAME] * len(segmentation_report.COLUMNS)])
    file = io.StringIO()
    segmentation_report.tell(Console(file=file, width=300), Path(NAME), {"dataset": NAME})
    text = file.getvalue()
    assert f"{NAME}: segmentation, frozen encoder" in text
    assert text.count(NAME) == 4 + len(segmentation_report.COLUMNS)


def test_a_finished_suite_is_told_as_it_is() -> None:
    text = told(suite._tell, Path("runs") / NAME, "vtab", [{"dataset": "cifar10", "status": "failed"}])
    assert f"everything is in runs/{NAME}: results.jsonl" in text


def test_what_cannot_be_written_names_the_option(tmp_path: Path) -> None:
    target = tmp_path / "absent" / "x"
    for named, option in (((), "--out"), (("--to",), "--to")):
        with pytest.raises(RunError, match=rf"cannot write .*Choose another {option}\."), written_whole(target, *named):
            target.with_name("y").write_text("x")
