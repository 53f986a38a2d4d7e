"""Kills a victim again and again, lets it go on, and compares what comes out with that of one that was left alone."""

from __future__ import annotations

import os
import random
import re
import shutil
import signal
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from fork_server import ForkServer
from victims import Digest, Victim

PATIENCE_S = 240.0
_POLL_S = 0.005
TOLD = re.compile(r"^nextblock: a data worker died", flags=re.M)  # a job that ends as a worker is gone says so


@dataclass
class Reference:
    """What an uninterrupted job left, and how long it took."""

    out: Path
    digest: Digest
    seconds: float


@dataclass
class Outcome:
    """kills: by when. told: how often a job ended with the message that a worker died; else it needed it no more.
    finished: how often a job went on to its end, each compared. failures: what was not as it must be, in words."""

    kills: Counter[str] = field(default_factory=Counter)
    told: int = 0
    finished: int = 0
    failures: list[str] = field(default_factory=list)


class Killer:
    """Of one kind of work, in the folder `scratch`. `draw` decides the moments."""

    def __init__(self, server: ForkServer, victim: Victim, scratch: Path, draw: random.Random) -> None:
        self.server, self.victim, self.scratch, self.draw = server, victim, scratch, draw
        self.out, self._starts = scratch / "cut", 0
        self._hit = False  # a worker has been killed in this try
        scratch.mkdir(parents=True, exist_ok=True)
        self.reference = self._uninterrupted()
        self.outcome = Outcome()

    def _uninterrupted(self) -> Reference:
        out, start = self.scratch / "whole", time.monotonic()
        code = self._wait(self._start(self.victim.begin(out)))
        assert code == 0, self._told()
        return Reference(out, self.victim.digest(out), time.monotonic() - start)

    def chain(self, kills: int, ways: list[str], latest: float = 0.5) -> Outcome:
        """So many kills, one after the other, in each of `ways` in turn ("moment", "worker", or one of the victim's
        marks), then on to the end.

        latest: of a job's whole time, when "moment" kills at the latest.
        """
        counted = 0
        tries = 0
        while counted < kills and not self.outcome.failures and tries < 4 * kills + 20:
            way, tries = ways[tries % len(ways)], tries + 1
            code = self._killed(way, self.draw.uniform(0, latest * self.reference.seconds))
            self._judge(way, code)
            if code == 0:
                self._compare()
                shutil.rmtree(self.out)
                shutil.rmtree(f"{self.out}.features", ignore_errors=True)
            if code or self._hit:
                counted += 1
                self.outcome.kills[way] += 1
        if counted < kills and not self.outcome.failures:
            self.outcome.failures.append(f"only {counted} of {kills} kills came before the end: {ways}")
        if not self.outcome.failures:
            self._to_the_end()
        return self.outcome

    def _killed(self, way: str, after_s: float) -> int:
        self._hit = False
        pattern = self.victim.marks.get(way)
        suicide = None if pattern is None else (pattern, self.draw.randint(1, 25))
        pid, start = self._start(self._command(), suicide), time.monotonic()
        if suicide is not None:
            return self._wait(pid)
        while time.monotonic() - start < after_s and self.server.poll(pid) is None:
            time.sleep(_POLL_S)
        if way == "worker":
            return self._without_a_worker(pid)
        with suppress(ProcessLookupError):
            os.killpg(pid, signal.SIGKILL)
        return self._wait(pid)

    def _without_a_worker(self, pid: int) -> int:
        """Kill one of its workers only, as soon as it has some; it may end, or go on without."""
        while (code := self.server.poll(pid)) is None:
            workers = children_of(pid)
            if workers:
                with suppress(ProcessLookupError):
                    os.kill(self.draw.choice(workers), signal.SIGKILL)
                    self._hit = True
                return self._wait(pid)
            time.sleep(_POLL_S)
        return code

    def _start(self, arguments: list[str], suicide: tuple[str, int] | None = None) -> int:
        self._starts += 1
        return self.server.start(arguments, self.log, suicide)

    @property
    def log(self) -> Path:
        """What the last one that was started has said."""
        return self.scratch / f"log-{self._starts}"

    def _command(self) -> list[str]:
        if self.out.exists() and self.victim.begun(self.out):
            return self.victim.again(self.out)
        return self.victim.begin(self.out)

    def _judge(self, way: str, code: int) -> None:
        told_so = way == "worker" and code == 1 and TOLD.search(self._told()) is not None
        self.outcome.told += told_so
        if code not in (0, -signal.SIGKILL) and not told_so:
            self.outcome.failures.append(f"{way}: exit code {code}\n{self._told()}")
        elif "Traceback" in self._told():
            self.outcome.failures.append(f"{way}: a traceback\n{self._told()}")
        elif self.out.is_dir():
            self._held(way, lambda: self.victim.check(self.out, self.reference.out))

    def _to_the_end(self) -> None:
        code = self._wait(self._start(self._command()))
        if code:
            self.outcome.failures.append(f"the last resume: exit code {code}\n{self._told()}")
        else:
            self._compare()

    def _compare(self) -> None:
        self.outcome.finished += 1
        self._held("the end", self._require_same)

    def _require_same(self) -> None:
        found, expected = self.victim.digest(self.out), self.reference.digest
        other = [name for name in {*found, *expected} if found.get(name) != expected.get(name)]
        assert not other, f"differs from an uninterrupted one in {', '.join(sorted(other))}"

    def _held(self, when: str, check: Callable[[], None]) -> None:
        try:
            check()
        except Exception as error:  # whatever is wrong with the folder is what is looked for
            self.outcome.failures.append(f"{when}: {type(error).__name__}: {error}")

    def _wait(self, pid: int) -> int:
        """Its exit code, when its whole group is gone."""
        deadline = time.monotonic() + PATIENCE_S
        while (code := self.server.poll(pid)) is None:
            if time.monotonic() > deadline:
                os.killpg(pid, signal.SIGKILL)
                raise AssertionError(f"{self.victim.name} does not end\n{self._told()}")
            time.sleep(_POLL_S)
        while time.monotonic() < deadline and living_of_group(pid):
            time.sleep(_POLL_S)
        return code

    def _told(self) -> str:
        return self.log.read_text(errors="replace")[-3000:] if self.log.exists() else ""


def _processes() -> list[tuple[int, str, int, int]]:
    """Number, state, parent and group of every process."""
    found = []
    for path in os.listdir("/proc"):
        if path.isdigit():
            with suppress(OSError), open(f"/proc/{path}/stat") as file:
                state, parent, group = file.read().rpartition(")")[2].split()[:3]
                found.append((int(path), state, int(parent), int(group)))
    return found


def children_of(pid: int) -> list[int]:
    """That run the same program: not those, such as git, that it only asks something."""
    children = [number for number, state, parent, _ in _processes() if parent == pid and state != "Z"]
    return [number for number in children if _program(number) == _program(pid)]


def _program(pid: int) -> str | None:
    try:
        return os.readlink(f"/proc/{pid}/exe")
    except OSError:
        return None  # it has just ended


def living_of_group(group: int) -> list[int]:
    return [number for number, state, _, its in _processes() if its == group and state != "Z"]
