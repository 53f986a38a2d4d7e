"""Ask a job to stop at the next good moment: Ctrl-C, SIGTERM, and SIGUSR1, which a scheduler sends before the end.

In a job of Slurm that was begun with `#SBATCH --requeue --signal=USR1@120`, with NEXTBLOCK_REQUEUE=1 in its
environment, SIGUSR1 also asks Slurm to run the job again. Its script must then continue what is there:

    if [ -f RUN/config.yaml ]; then srun nextblock pretrain --resume RUN; else srun nextblock pretrain ... --out RUN; fi
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from types import FrameType, TracebackType


class Stopped(KeyboardInterrupt):
    """A job that returns nothing else was stopped; its message says how to go on.

    `signal` is the number of the signal that stopped it: SIGINT where none was noted.
    """

    def __init__(self, message: str, received: int) -> None:
        super().__init__(message)
        self.signal = int(received or signal.SIGINT)


class StopRequest:
    """While active, the first signal is remembered, also one that was ignored before (of what a script starts with
    `&`, Ctrl-C is); a second Ctrl-C interrupts at once.

    Args:
        until: what is still waited for, as is told when a signal comes.

    `received` is the signal's number, or 0.
    """

    signals: tuple[signal.Signals, ...] = tuple(
        getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGUSR1") if hasattr(signal, name)
    )

    def __init__(self, until: str = "this step is done and saved") -> None:
        self.until, self.received = until, 0
        self._before: dict[int, object] = {}

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._note) for number in self.signals}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def __call__(self) -> bool:
        return self.received != 0

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.received and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = number
        print(f"\nstopping when {self.until}; Ctrl-C again stops at once", file=sys.stderr, flush=True)


def requeue(received: int) -> str:
    """Ask Slurm to run this job again, where SIGUSR1 announced its end and NEXTBLOCK_REQUEUE is 1.

    Returns what to tell about it; nothing where it was not asked for. The exit code stays that of a stop, 138:
    what follows in the script is so kept from taking the run for finished, and Slurm does not mind.
    """
    if received != getattr(signal, "SIGUSR1", None) or os.environ.get("NEXTBLOCK_REQUEUE") != "1":
        return ""
    job, task = os.environ.get("SLURM_ARRAY_JOB_ID"), os.environ.get("SLURM_ARRAY_TASK_ID")
    name = f"{job}_{task}" if job and task else os.environ.get("SLURM_JOB_ID")
    if not name:
        return "NEXTBLOCK_REQUEUE is set, but this is no job of Slurm: SLURM_JOB_ID is missing."
    try:
        subprocess.run(["scontrol", "requeue", name], check=True, capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.SubprocessError) as error:
        why = str(getattr(error, "stderr", None) or error).strip()
        return f"Slurm did not take job {name} back into its queue: {why}"
    return f"job {name} is in Slurm's queue again"
