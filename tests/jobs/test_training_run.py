from __future__ import annotations

import pytest
from rich.console import Console

from nextblock.jobs.training_run import TrainingRun
from nextblock.training.config import TrainingConfig
from nextblock.training.launch import launch


def test_a_run_with_a_gap_cannot_be_made() -> None:
    class Unfinished(TrainingRun):
        verb = "pretrain"

    with pytest.raises(TypeError, match=r"abstract methods? .*data_record.*what_changed"):
        Unfinished(launch(TrainingConfig(device="cpu")), Console(quiet=True))  # type: ignore[abstract]
