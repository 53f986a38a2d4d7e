"""Asking for a stop: what is said, what is remembered, and that nothing is inherited."""

from __future__ import annotations

import os
import signal

import pytest

from nextblock.training.signals import Stopped, StopRequest


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
