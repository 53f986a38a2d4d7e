"""What `fid` refuses or says of its options and sets, and what a refusal leaves behind: nothing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from nextblock.errors import ConfigError, DataError, RunError
from nextblock.evaluation.generation import compare
from nextblock.jobs.fid import fid


def noise(count: int, seed: int, size: int = 4) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, size, size, 3), dtype=np.uint8)


def judged(**given: Any) -> Any:
    everything = {"samples": noise(20, 0), "reference": noise(30, 1), "pixels": True, "workers": 0, "quiet": True}
    return fid(**{**everything, **given})


@pytest.mark.parametrize("name", ["fid", "FID", "frechet_distance"])
def test_the_metric_that_papers_call_fid_is_named(name: str) -> None:
    with pytest.raises(ConfigError, match=r"no metric is named .*Did you mean 'frechet'\?"):
        judged(metrics=name)
    with pytest.raises(ConfigError, match=r"Did you mean 'frechet'\?"):
        compare(np.zeros((5, 2)), np.zeros((5, 2)), metrics=[name])


def test_more_images_than_a_set_has_cannot_be_drawn(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"--count 25 .* the samples are 20 images\. .* at most 20, or 0 for all"):
        judged(count=25, out=tmp_path / "out")
    with pytest.raises(
        ConfigError, match=r"the samples are 20 images and the reference is 30 images\. Take at most 20"
    ):
        judged(count=31)
    with pytest.raises(ConfigError, match=r"the reference is 30 images\. Take at most 30"):
        judged(count=31, samples=noise(40, 2))
    assert judged(count=20).results["counts"] == [20, 20]
    kept = tmp_path / "kept.npz"
    judged(save_stats=kept, metrics="kid")
    assert judged(count=20, reference=kept).results["frechet_counts"] == [20, 30]  # statistics are as they are
    assert not (tmp_path / "out").exists()


def test_a_high_recall_beside_no_precision_is_explained(capsys: pytest.CaptureFixture[str]) -> None:
    """Samples far apart reach everything and resemble nothing."""
    reference = np.random.default_rng(0).integers(120, 130, (60, 4, 4, 3), dtype=np.uint8)
    found = judged(reference=reference, samples=noise(40, 1), quiet=False)
    assert found.results["recall"] > 0.9
    assert found.results["precision"] < 0.05
    note = next(note for note in found.notes if "Recall" in note and "balls" in note)
    assert "little" in note
    assert "says little" in " ".join(capsys.readouterr().out.split())
    for others in ({"samples": reference[:30]}, {"metrics": "frechet"}):
        assert not any("balls" in note for note in judged(reference=reference, **others).notes)


def test_a_refusal_leaves_no_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "new" / "out"
    with pytest.raises(DataError, match="no such file"):
        judged(samples=tmp_path / "none.npz", out=out)
    with pytest.raises(ConfigError, match="In which features"):
        judged(pixels=False, out=out)
    (tmp_path / "broken").mkdir()
    Image.fromarray(noise(1, 0)[0]).save(tmp_path / "broken" / "a.png")
    (tmp_path / "broken" / "b.png").write_bytes(b"no")
    with pytest.raises(DataError, match="only one of 2 images"):
        judged(samples=str(tmp_path / "broken"), out=out)

    def interrupted(*arguments: Any) -> Any:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("nextblock.jobs.fid.judge", interrupted)
        with pytest.raises(KeyboardInterrupt):
            judged(out=out)
    assert not (tmp_path / "new").exists()
    judged(out=out)
    assert json.loads((out / "fid.json").read_text())["samples"]["images"] == 20


def test_a_folder_that_was_there_stays(tmp_path: Path) -> None:
    mine = tmp_path / "mine"
    mine.mkdir()
    with pytest.raises(DataError, match="no such file"):
        judged(samples=tmp_path / "none.npz", out=mine)
    assert mine.is_dir()
    (mine / "notes.txt").write_text("keep")
    with pytest.raises(RunError, match="not empty"):
        judged(out=mine)
    assert (mine / "notes.txt").read_text() == "keep"
