"""Several processes divide a job's units (shards, batches of images, data sets) without talking to each other.

Which share is this process's comes from what started it, see `my_share`. Share i of n takes the units i, i + n, ...;
what is made of a unit does not depend on who makes it. So that nothing is made twice where shares overlap (a job is
started again with another number of them while one of the old still runs), a process locks the units that it is at, and
all that several write is written under a lock. Locks are POSIX locks on bytes of one file beside the job's output:
they work between nodes on network file systems, end with the process that holds them, and workers do not inherit them.
"""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import torch

from nextblock.errors import ConfigError, RunError
from nextblock.training.launch import Fabric, on_first_process
from nextblock.training.launcher import VARIABLE, launched
from nextblock.training.signals import Stopped, requeue

WAIT_S = 1800.0  # for another process that begins or records: it may have to list ten million images
_POLL_S = 0.05
_LEAVE_S = 10.0  # for another process that leaves at the same time
# Bytes of the lock file. _HERE: all share it, from opening the file to leaving. _LEAVING: held while one leaves.
_ALONE, _LAST, _HERE, _LEAVING, _FIRST_UNIT = range(5)
_TAKEN = (errno.EACCES, errno.EAGAIN)
_ARRAY = "SLURM_ARRAY_TASK_"


@dataclass(frozen=True)
class Share:
    """Share number `index`, from 0, of `count`. Raises ConfigError when there is no such share."""

    index: int = 0
    count: int = 1

    def __post_init__(self) -> None:
        if not 0 <= self.index < self.count:
            raise ConfigError(f"there is no share {self.index + 1} of {self.count}: shares go from 1 to their number.")

    @property
    def whole(self) -> bool:
        return self.count == 1

    @property
    def told(self) -> str:
        return f"share {self.index + 1} of {self.count}"

    def divided(self, among: Share) -> Share:
        """One share of this share."""
        return Share(self.index * among.count + among.index, self.count * among.count)

    def of(self, units: Iterable[int]) -> list[int]:
        """Those of this share, by their own numbers: whoever looks, and when, divides alike."""
        return [unit for unit in units if unit % self.count == self.index]


def array_share(environment: Mapping[str, str] = os.environ) -> Share:
    """The share of this job among those of a Slurm array, or what $NEXTBLOCK_SHARE says: 3/8 (the third of eight), for
    any other scheduler, or all, to do everything within an array. The whole where there is neither.

    Raises ConfigError for what cannot be understood, and for an array whose numbers are not evenly spaced.
    """
    given = environment.get(VARIABLE, "")
    if given:
        return Share() if given == "all" else _parsed(given)
    if f"{_ARRAY}ID" not in environment:
        return Share()
    if f"{_ARRAY}COUNT" not in environment:
        raise ConfigError(
            f"{_ARRAY}ID is set, but {_ARRAY}COUNT is not, so the number of tasks is not known. Set {VARIABLE}=3/8 for "
            f"the third of eight, or {VARIABLE}=all."
        )
    number, first, step, count = (int(environment.get(_ARRAY + name, 1)) for name in ("ID", "MIN", "STEP", "COUNT"))
    index, rest = divmod(number - first, max(1, step))
    if rest or index >= count:
        raise ConfigError(
            f"task {number} of the Slurm array is none of {count} evenly spaced ones from {first} on. Number them "
            f"as in --array=0-{count - 1}, or set {VARIABLE}=3/8 in each job yourself."
        )
    return Share(index, count)


def my_share(environment: Mapping[str, str] = os.environ) -> Share:
    """`array_share`, divided among the processes that torchrun or srun started together.

    For jobs whose processes do not know each other; those of a Fabric share the array's part in their own way.
    """
    if environment.get(VARIABLE) == "all":
        return Share()
    found = launched(environment)
    own = Share() if found is None else Share(found.rank, found.world)
    return array_share(environment).divided(own)


def require_named(out: object, share: Share) -> None:
    """Raise ConfigError where `share` is one of several that would each make a dated folder of their own."""
    if out is None and not share.whole:
        raise ConfigError(
            f"this is {share.told}, and all shares write into one folder: name it with --out. For all of it in a "
            f"folder of this process's own, set {VARIABLE}=all."
        )


def take_own_device(environment: Mapping[str, str] = os.environ) -> None:
    """Make "cuda" mean another device for each process of a node, where there are several of both."""
    local = environment.get("LOCAL_RANK", environment.get("SLURM_LOCALID", "0"))
    if local != "0" and torch.cuda.device_count() > 1:
        torch.cuda.set_device(int(local) % torch.cuda.device_count())


def stopped(advice: str, received: int) -> Stopped:
    """What a job raises that a signal has stopped: with `advice`, how to go on, and what Slurm said where it was asked
    to run the job again (by one of the processes that it started together)."""
    first = all(os.environ.get(name, "0") == "0" for name in ("RANK", "SLURM_PROCID"))
    told = requeue(received) if first else ""
    return Stopped(f"{advice}\n{told}" if told else advice, received)


def _parsed(given: str) -> Share:
    try:
        number, count = map(int, given.split("/"))
    except ValueError:
        raise ConfigError(f"{VARIABLE} must be as in 3/8, the third of eight, or all; got {given!r}.") from None
    return Share(number - 1, count)


class Units:
    """The units of a job that makes `target`, as one process sees them that may not be the only one.

    A context manager: what it has locked is free when it ends, however it ends. One for each target in a process:
    POSIX locks are the process's own, and all go when it closes the file once. The last process that leaves removes
    the file; others lock the same one until then.
    Raises RunError where there are several shares and the file system has no locks; a single process goes without.
    """

    def __init__(self, target: Path, share: Share) -> None:
        self.target, self.share = target, share
        target = Path(os.path.realpath(target))  # by whatever name: one lock
        self._file = target.parent / f".{target.name}.lock"
        self._handle: int | None = None

    def __enter__(self) -> Units:
        if os.name == "posix":
            try:
                self._file.parent.mkdir(parents=True, exist_ok=True)
                self._open()
            except OSError as error:
                self._require_single(error)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._handle is None:
            return
        # One leaves at a time. Whoever is alone meanwhile opens the file or is at work, and so leaves later.
        last = self._waited(_LEAVING, _LEAVE_S) and self._locked(_ALONE) and self._locked(_HERE)
        if last and self._handle is not None and not os.fstat(self._handle).st_size:  # another's file is not empty
            self._file.unlink(missing_ok=True)
        self._close()

    @property
    def locks(self) -> bool:
        """Whether others would be noticed: the file system has locks."""
        return self._handle is not None

    def claim(self, units: Iterable[int]) -> list[int]:
        """Those of this share that no other process is at; they are this one's from now on."""
        return [unit for unit in self.share.of(units) if self._locked(_FIRST_UNIT + unit)]

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Read and write what all share. Waits for others; raises RunError after half an hour."""
        self._wait_alone()
        try:
            yield
        finally:
            self._release(_ALONE)

    @contextmanager
    def last(self) -> Iterator[bool]:
        """Do what comes after all units. Gives False where another process is at it already.

        Look whether all units are there before, and within again whether it is still to be done.
        """
        got = self._locked(_LAST)
        try:
            yield got
        finally:
            if got:
                self._release(_LAST)

    def _open(self) -> None:
        """Open the lock file that is there now, and not one that another process has just removed."""
        while True:
            self._handle = os.open(self._file, os.O_RDWR | os.O_CREAT, 0o666)
            self._wait_alone()
            if self._handle is None or self._is_there(self._handle):
                self._locked(_HERE, shared=True)  # never taken: who leaves tries it while alone only
                self._release(_ALONE)
                return
            self._close()

    def _is_there(self, handle: int) -> bool:
        try:
            return os.path.samestat(os.fstat(handle), self._file.stat())
        except FileNotFoundError:
            return False

    def _wait_alone(self) -> None:
        if not self._waited(_ALONE, WAIT_S):
            raise RunError(
                f"another process is at {self.target} for more than {WAIT_S / 60:.0f} minutes. Does it hang? End "
                "it, and give the same command again."
            )

    def _waited(self, byte: int, patience_s: float) -> bool:
        """Lock a byte as soon as it is free; False where it is not for so long."""
        deadline = time.monotonic() + patience_s
        while not self._locked(byte):
            if time.monotonic() > deadline:
                return False
            time.sleep(_POLL_S)
        return True

    def _close(self) -> None:
        if self._handle is not None:
            os.close(self._handle)
            self._handle = None

    def _locked(self, byte: int, shared: bool = False) -> bool:
        if self._handle is None:
            return True
        import fcntl  # not everywhere

        try:
            fcntl.lockf(self._handle, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB, 1, byte)
        except OSError as error:
            if error.errno in _TAKEN:
                return False
            self._require_single(error)
            self._close()
        return True

    def _release(self, byte: int) -> None:
        if self._handle is not None:
            import fcntl

            fcntl.lockf(self._handle, fcntl.LOCK_UN, 1, byte)

    def _require_single(self, error: OSError) -> None:
        if not self.share.whole:
            raise RunError(
                f"{self._file} cannot be locked ({error.strerror or error}), which several processes at one job need. "
                f"Choose an --out on another file system, or one process ({VARIABLE}=all)."
            ) from error


@contextmanager
def units_of_first(fabric: Fabric, target: Path, share: Share) -> Iterator[Units | None]:
    """`Units` on the first process of a run, which holds what is theirs; None on the others. Raises on all what it
    raises."""
    problem: RunError | None = None
    units: Units | None = None
    with ExitStack() as held:
        if fabric.is_global_zero:
            try:
                units = held.enter_context(Units(target, share))
            except RunError as error:
                problem = error
        on_first_process(fabric, problem)
        yield units
