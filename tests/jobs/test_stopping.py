"""What the shell says and returns when a job that returns nothing else was stopped."""

from __future__ import annotations

import signal

import pytest

from nextblock.cli import main
from nextblock.training.signals import Stopped


@pytest.mark.parametrize(("received", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130), (0, 130)])
def test_a_clean_stop_says_how_to_go_on_and_nothing_else(
    received: int, code: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def stopped() -> None:
        raise Stopped("stopped. To go on: nextblock doctor", received)

    monkeypatch.setattr("nextblock.jobs.doctor.doctor", stopped)
    assert main(["doctor"]) == code
    assert capsys.readouterr().err == "nextblock: stopped. To go on: nextblock doctor\n"
