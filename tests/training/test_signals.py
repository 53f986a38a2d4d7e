"""Asking for a stop: what is said, what is remembered, and that nothing is inherited."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from nextblock.training.signals import Stopped, StopRequest, requeue


def test_a_stop_says_until_when(capsys: pytest.CaptureFixture[str]) -> None:
    with StopRequest("this batch is done") as stop:
        assert not stop()
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop()
        assert stop.received == signal.SIGTERM
    assert capsys.readouterr().err == "\nstopping when this batch is done; Ctrl-C again stops at once\n"
    with StopRequest() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert "when this step is done and saved;" in capsys.readouterr().err


def test_an_ignored_signal_is_heard_and_ignored_again_afterwards() -> None:
    """A shell starts what stands before `&` in a script with Ctrl-C ignored."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with StopRequest() as stop:
            os.kill(os.getpid(), signal.SIGINT)
            assert stop()
        assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_clean_stop_is_an_interrupt_that_knows_its_signal() -> None:
    error = Stopped("go on so", signal.SIGTERM)
    assert isinstance(error, KeyboardInterrupt)
    assert (str(error), error.signal) == ("go on so", signal.SIGTERM)
    assert Stopped("go on so", 0).signal == signal.SIGINT  # a second Ctrl-C leaves none


def test_a_schedulers_warning_is_a_stop() -> None:
    with StopRequest() as stop:
        os.kill(os.getpid(), signal.SIGUSR1)
        assert stop()
        assert stop.received == signal.SIGUSR1


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A job of Slurm that wants to be run again; returns what `scontrol` was asked."""
    asked, program = tmp_path / "asked", tmp_path / "scontrol"
    program.write_text(f'#!/bin/sh\necho "$@" >> {asked}\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    for name in ("SLURM_ARRAY_JOB_ID", "SLURM_ARRAY_TASK_ID"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    monkeypatch.setenv("NEXTBLOCK_REQUEUE", "1")
    return asked


def test_slurm_is_asked_to_run_the_job_again(slurm: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert requeue(signal.SIGUSR1) == "job 77 is in Slurm's queue again"
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "70")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "3")
    assert requeue(signal.SIGUSR1) == "job 70_3 is in Slurm's queue again"
    assert slurm.read_text() == "requeue 77\nrequeue 70_3\n"


def test_slurm_is_not_asked_for_another_stop_or_unless_wanted(slurm: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert requeue(signal.SIGTERM) == ""
    assert requeue(signal.SIGINT) == ""
    assert requeue(0) == ""
    monkeypatch.delenv("NEXTBLOCK_REQUEUE")
    assert requeue(signal.SIGUSR1) == ""
    assert not slurm.exists()


def test_what_slurm_refuses_is_told(slurm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "scontrol").write_text("#!/bin/sh\necho Access denied >&2; exit 1\n")
    assert requeue(signal.SIGUSR1) == "Slurm did not take job 77 back into its queue: Access denied"
    (tmp_path / "scontrol").unlink()
    assert "did not take job 77 back" in requeue(signal.SIGUSR1)
    monkeypatch.delenv("SLURM_JOB_ID")
    assert requeue(signal.SIGUSR1) == "NEXTBLOCK_REQUEUE is set, but this is no job of Slurm: SLURM_JOB_ID is missing."
