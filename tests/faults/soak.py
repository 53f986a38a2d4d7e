"""A long run of small steps, looked at from outside: memory, open files, threads and step time stay what they are.

`python -m tests.faults.soak --steps 5000 --report benchmarks/results/soak.json` trains a real tiny XTRA with two
workers, a checkpoint every 50 steps and a look at validation images now and then, and reads /proc while it runs
(Linux). Prints a table, writes a report, and returns 1 when something grew.

What grew is told from noise by the slope of Theil (1950) and Sen (1968), the median of the slopes between all pairs of
samples, which a few odd samples do not move; and by the medians of the first and the last fifth.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]  # as pytest has them

from scipy.stats import theilslopes  # noqa: E402

from fork_server import ForkServer  # noqa: E402
from nextblock.training.run_folder import read_metrics  # noqa: E402
from nextblock.training.run_record import environment  # noqa: E402
from tiny_run import flags, tiny, write_images  # noqa: E402

CHECKPOINT_EVERY, LOOK_EVERY, BATCH, IMAGES = 50, 250, 8, 24
WARM_UP = 0.25  # of the steps: caches fill, the allocator finds its size
SAMPLES = 200
# What a resource may grow by over the measured steps: bytes at all and for each step; of what is counted, nothing.
MEMORY_NOISE, MEMORY_STEP = 2 * 2**20, 512
CPU_DRIFT, WALL_DRIFT = 1.25, 1.5


@dataclass(frozen=True)
class Sample:
    """After `step` steps, of the process that trains and its workers together.

    resident: bytes, what is shared counting in each. proportional: bytes, what is shared counting once. shared: bytes
    of shared memory. files, threads, processes: how many. cpu_s: of the thread that trains, since it began.
    """

    step: int
    resident: int
    proportional: int
    shared: int
    files: int
    threads: int
    processes: int
    cpu_s: float


@dataclass(frozen=True)
class Growth:
    """Of one resource over the measured steps: medians of the first and the last fifth, growth by slope and by these
    medians, and the most that it may be."""

    first: float
    last: float
    by_slope: float
    allowed: float

    @property
    def found(self) -> float:
        return max(self.by_slope, self.last - self.first)

    @property
    def is_leak(self) -> bool:
        return self.found > self.allowed


@dataclass(frozen=True)
class Drift:
    """Medians of the time of a step in the first and the last fifth, in seconds, and the largest ratio allowed."""

    first_s: float
    last_s: float
    allowed: float | None

    @property
    def ratio(self) -> float:
        return self.last_s / self.first_s

    @property
    def is_slower(self) -> bool:
        return self.allowed is not None and self.ratio > self.allowed


# --- looking


def group(leader: int) -> Iterator[Path]:
    """The processes of a group that are there, as folders in /proc."""
    for process in Path("/proc").iterdir():
        if process.name.isdigit():
            try:
                fields = (process / "stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue
            if int(fields[2]) == leader and fields[0] != "Z":
                yield process


def looked_at(leader: int, step: int) -> Sample | None:
    """None when a process ends in this moment."""
    try:
        members = list(group(leader))
        status = [_fields(process / "status") for process in members]
        rollups = [_fields(process / "smaps_rollup") for process in members]
        files = sum(len(os.listdir(process / "fd")) for process in members)
        cpu_ns = int(Path(f"/proc/{leader}/schedstat").read_text().split()[0])
    except (OSError, IndexError):
        return None
    kib = {name: sum(each.get(name, 0) for each in status) for name in ("VmRSS", "RssShmem", "Threads")}
    proportional = sum(each.get("Pss", 0) for each in rollups)
    return Sample(
        step, kib["VmRSS"] * 1024, proportional * 1024, kib["RssShmem"] * 1024, files, kib["Threads"], len(members),
        cpu_ns / 1e9,
    )  # fmt: skip


def _fields(file: Path) -> dict[str, int]:
    """The lines "Name: number ..." of a file."""
    rows = (line.partition(":") for line in file.read_text().splitlines())
    return {name: int(value.split()[0]) for name, _, value in rows if value.split()[:1] and value.split()[0].isdigit()}


def last_step(metrics: Path) -> int:
    """Of the last whole row, 0 before there is one."""
    try:
        with open(metrics, "rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - 2000))
            row = file.read().rpartition(b"\n")[0].rpartition(b"\n")[2].partition(b",")[0]
    except OSError:
        return 0
    return int(row) if row.isdigit() else 0


def samples_of(leader: int, metrics: Path, every: int, ended: Callable[[], bool]) -> list[Sample]:
    """One sample each `every` steps or a little later, until the run has ended. The leader's number is its group's."""
    found: list[Sample] = []
    while not ended():
        step = last_step(metrics)
        if step // every > (found[-1].step // every if found else 0) and (sample := looked_at(leader, step)):
            found.append(sample)
        time.sleep(0.005)
    return found


def left_behind(leaders: Sequence[int]) -> list[str]:
    """What these process groups have left: processes, and files of shared memory that torch names by process."""
    processes = [process.name for leader in leaders for process in group(leader)]
    memory = Path("/dev/shm").iterdir() if Path("/dev/shm").is_dir() else ()
    return processes + [file.name for file in memory if any(f"torch_{leader}_" in file.name for leader in leaders)]


# --- judging


def growths(samples: Sequence[Sample]) -> dict[str, Growth]:
    """By resource, of samples behind the warm-up."""
    steps = [sample.step for sample in samples]
    span = steps[-1] - steps[0]
    found = {}
    for name in ("resident", "shared", "files", "threads", "processes"):
        values = [float(getattr(sample, name)) for sample in samples]
        allowed = MEMORY_NOISE + MEMORY_STEP * span if name in ("resident", "shared") else 0.5
        first, last = _ends(values)
        found[name] = Growth(first, last, float(theilslopes(values, steps)[0]) * span, allowed)
    return found


def _ends(values: Sequence[float]) -> tuple[float, float]:
    """Medians of the first and of the last fifth."""
    fifth = max(1, len(values) // 5)
    return median(values[:fifth]), median(values[-fifth:])


def drifts(
    samples: Sequence[Sample], wall_s: Sequence[float], cpu: float = CPU_DRIFT, wall: float | None = WALL_DRIFT
) -> dict[str, Drift]:
    """Of the processor's time, which other work on the machine hardly changes, and of the time that passes.

    wall_s: of each step behind the warm-up. A limit of None: told, not judged.
    """
    per_step = [(after.cpu_s - before.cpu_s) / (after.step - before.step) for before, after in pairwise(samples)]
    return {"cpu": Drift(*_ends(per_step), cpu), "wall": Drift(*_ends(wall_s), wall)}


def behind_warm_up(samples: Sequence[Sample], steps: int) -> list[Sample]:
    return [sample for sample in samples if sample.step >= WARM_UP * steps]


# --- the run


@dataclass(frozen=True)
class Soaked:
    """samples: all of them. wall_s: of every step. code: how the run ended. left: what it left behind."""

    steps: int
    samples: list[Sample]
    wall_s: list[float]
    code: int
    left: list[str]

    def judged(self, cpu: float = CPU_DRIFT, wall: float | None = WALL_DRIFT) -> tuple[dict[str, Any], list[str]]:
        """Growths and drifts by name, and what is wrong, in words."""
        measured = behind_warm_up(self.samples, self.steps)
        grown = growths(measured)
        slower = drifts(measured, self.wall_s[int(WARM_UP * self.steps) :], cpu, wall)
        wrong = [
            f"{name}: {each.found:,.0f} more than in the beginning" for name, each in grown.items() if each.is_leak
        ]
        wrong += [f"{name} time of a step: {each.ratio:.2f} times" for name, each in slower.items() if each.is_slower]
        wrong += [f"exit code {self.code}"] if self.code else []
        wrong += [f"left behind: {', '.join(self.left)}"] if self.left else []
        return grown | slower, wrong


def soak(server: ForkServer, folder: Path, steps: int, look_every: int = LOOK_EVERY) -> Soaked:
    """Train so many steps in `folder`/run, on images in `folder`, and look at it all the while."""
    out, log, images = folder / "run", folder / "log", write_images(folder / "images", IMAGES // 2)
    sections = tiny(
        data={"train": images, "val": write_images(folder / "val", 4), "workers": 2},
        model={"drop_path": 0.1, "order": "pseudo_random"},
        training={
            "epochs": steps * BATCH / IMAGES, "batch_size": BATCH, "checkpoint_every_steps": CHECKPOINT_EVERY,
            "checkpoint_every_minutes": 0, "device": "cpu",
        },
        watch={"every_epochs": look_every * BATCH / IMAGES, "pictures": 2},
    )  # fmt: skip
    pid = server.start(["pretrain", "--config", "xtra_cifar10", *flags(sections), "--out", str(out)], log)
    codes: list[int] = []

    def ended() -> bool:
        code = server.poll(pid)
        codes.extend([] if code is None else [code])
        return code is not None

    try:
        samples = samples_of(pid, out / "metrics.csv", max(1, steps // SAMPLES), ended)
    finally:
        if not codes:
            os.killpg(pid, signal.SIGKILL)
    rows = read_metrics(out / "metrics.csv") if (out / "metrics.csv").is_file() else []
    wall_s = [BATCH / float(row["images_per_s"]) for row in rows if row["images_per_s"]]
    training = [sample for sample in samples if sample.step < steps]  # at the last one the workers are sent home
    return Soaked(steps, training, wall_s, codes[-1], left_behind([pid]))


def table(judged: dict[str, Any]) -> str:
    """One line for each resource and each time."""
    lines = [f"{'':<12}{'at first':>14}{'at last':>14}{'growth':>12}{'allowed':>12}"]
    for name, each in judged.items():
        if isinstance(each, Growth):
            numbers = f"{each.first:>14,.0f}{each.last:>14,.0f}{each.found:>12,.1f}{each.allowed:>12,.1f}"
        else:
            most = "-" if each.allowed is None else f"{each.allowed:.2f}"
            numbers = f"{each.first_s * 1e3:>11.3f} ms{each.last_s * 1e3:>11.3f} ms{each.ratio:>12.3f}{most:>12}"
        lines.append(f"{name:<12}{numbers}")
    return "\n".join(lines)


def report(soaked: Soaked, judged: dict[str, Any], wrong: list[str], seconds: float) -> dict[str, Any]:
    """What is written down."""
    about = environment(0, "cpu")
    thin = max(1, len(soaked.samples) // 50)
    return {
        "date": datetime.date.today().isoformat(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "seconds": round(seconds),
        "versions": about["packages"] | {"python": about["python"], "platform": about["platform"]},
        "commit": about["commit"],
        "steps": soaked.steps,
        "checkpoints": soaked.steps // CHECKPOINT_EVERY,
        "looks": soaked.steps // LOOK_EVERY,
        "warm_up": WARM_UP,
        "resources": {
            name: asdict(each) | {"growth": each.found} for name, each in judged.items() if isinstance(each, Growth)
        },
        "step_time": {
            name: asdict(each) | {"ratio": each.ratio} for name, each in judged.items() if isinstance(each, Drift)
        },
        "wrong": wrong,
        "samples": [asdict(sample) for sample in soaked.samples[::thin]],
    }  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=int, default=5000)
    parser.add_argument("--report", type=Path)
    asked = parser.parse_args()
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as folder, ForkServer() as server:
        soaked = soak(server, Path(folder), asked.steps)
        if soaked.code:
            print((Path(folder) / "log").read_text()[-2000:])
    judged, wrong = soaked.judged()
    print(table(judged))
    print("\n".join(wrong) or f"nothing grew in {asked.steps:,} steps")
    if asked.report:
        asked.report.parent.mkdir(parents=True, exist_ok=True)
        content = report(soaked, judged, wrong, time.monotonic() - start)
        asked.report.write_text(json.dumps(content, indent=1) + "\n")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
