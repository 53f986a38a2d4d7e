"""The picture of a profile."""

from __future__ import annotations

from pathlib import Path

import pytest

from nextblock.errors import DataError
from nextblock.figures.profile import FIXED, ROOMS, _colours, draw_profile

PHASES = ("data", "transfer", "inputs", "encoder", "heads", "loss", "backward", "optimizer", "other")


def test_steps_are_stacked_and_drawn(tmp_path: Path) -> None:
    steps = [dict.fromkeys(PHASES, 0.001 * (i + 1)) | {"transfer": 0.0} for i in range(4)]
    assert draw_profile(PHASES, steps, tmp_path / "profile.png", title="t").stat().st_size > 5000
    still = [dict.fromkeys(PHASES, 0.0)]
    assert draw_profile(PHASES, still, tmp_path / "still.png").stat().st_size > 5000
    with pytest.raises(DataError, match="no step to draw"):
        draw_profile(PHASES, [], tmp_path / "none.png")


def test_no_two_phases_look_alike() -> None:
    colours = _colours(PHASES)
    assert len(set(colours)) == len(PHASES)
    assert colours[3:6] == list(ROOMS[:3])
    assert not set(ROOMS) & set(FIXED.values())
