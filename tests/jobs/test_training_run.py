from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from nextblock.errors import ConfigError, RunError
from nextblock.jobs.starting import FREE_ON_RESUME, continued
from nextblock.jobs.training_run import TrainingRun
from nextblock.recipes.config import PRETRAIN
from nextblock.training.config import TrainingConfig
from nextblock.training.launch import launch
from tiny_run import tiny


def test_a_run_with_a_gap_cannot_be_made() -> None:
    class Unfinished(TrainingRun):
        verb = "pretrain"

    with pytest.raises(TypeError, match=r"abstract methods? .*data_record.*what_changed"):
        Unfinished(launch(TrainingConfig(device="cpu")), Console(quiet=True))  # type: ignore[abstract]


def asked(given: dict[str, Any], **values: Any) -> Any:
    nothing: dict[str, Any] = dict.fromkeys(("resume", "out", "config", "preset", "init_from"))
    return continued(PRETRAIN, given, FREE_ON_RESUME, **(nothing | values))


def test_auto_begins_a_run_and_continues_it_with_the_same_command(run: Path, images: Path, tmp_path: Path) -> None:
    sections = tiny(data={"train": str(images), "val": str(images)})
    command: dict[str, Any] = {"resume": "auto", "config": "xtra_cifar10"}
    assert asked(sections) is None
    assert asked(sections, out=tmp_path / "new", **command) is None
    folder, settings = asked(sections, out=run, **command)
    assert (folder, settings.model.width) == (run, 16)
    folder, settings = asked(sections | {"data": sections["data"] | {"decoder": "auto"}}, out=run, **command)
    assert settings.data.decoder == "pillow"
    assert asked({}, resume=run)[0] == run


def test_auto_refuses_another_configuration(run: Path) -> None:
    with pytest.raises(ConfigError, match=r"training\.epochs was 2\.0, now 3"):
        asked(tiny(training={"epochs": 3}), resume="auto", out=run, config="xtra_cifar10")
    with pytest.raises(ConfigError, match="--resume auto needs --out"):
        asked({}, resume="auto")
    with pytest.raises(ConfigError, match="leave out --config"):
        asked({}, resume=run, config="xtra_cifar10")
    with pytest.raises(RunError, match="does not exist"):
        asked({}, resume="nowhere")
