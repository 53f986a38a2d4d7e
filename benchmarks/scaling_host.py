"""The curves of `scaling` that belong to the host: pipeline, index, fingerprint, shuffle, checkpoint."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import count, islice
from pathlib import Path
from statistics import mean

import numpy as np
import torch

from benchmarks import data_pipeline, index
from benchmarks.curves import About, Curve, curve
from benchmarks.measure import interleaved
from nextblock.data.augment import CropConfig
from nextblock.data.decoders import chosen_decoder
from nextblock.data.loading import training_batches
from nextblock.data.preprocess import Preprocessing
from nextblock.data.sources import Source, open_source
from nextblock.data.stream import TrainingStream
from nextblock.randomness import shuffled
from nextblock.training.checkpoint import save_checkpoint
from nextblock.training.profile_numbers import LOADED_IMAGES, ROUNDS, loader_rate

PLACES = 100_000  # looked up at once in the shuffle
MIB = 2**20
LEAST_MIB = 0.01  # below, nothing is to be told in pages of 4 KiB

Samples = Mapping[str, Mapping[float, list[float]]]

# One process imports and is then forked for each task of (what, folder): seconds and MiB, a line each.
_CHILD = """
import json, os, sys, time
from nextblock.data.sources import fingerprint, open_source

def mib(file, key):
    return sum(int(line.split()[1]) for line in open("/proc/self/" + file) if line.startswith(key)) / 1024

def opened(folder):
    before, started = mib("smaps_rollup", "Anonymous"), time.perf_counter()
    source = open_source(folder)
    return time.perf_counter() - started, mib("smaps_rollup", "Anonymous") - before

def digested(folder):
    source = open_source(folder)
    open("/proc/self/clear_refs", "w").write("5")  # the highest so far is forgotten
    before, started = mib("status", "VmRSS"), time.perf_counter()
    fingerprint(source)
    return time.perf_counter() - started, mib("status", "VmHWM") - before

for what, folder in json.loads(sys.argv[1]):
    if os.fork() == 0:
        print(json.dumps(globals()[what](folder)), flush=True)
        os._exit(0)
    if os.wait()[1]:
        sys.exit(f"{what} failed on {folder}")
"""


def pipeline(quick: bool, data: Path = data_pipeline.DATA) -> list[Curve]:
    """Images per second over workers, the process that takes them doing nothing else. None without the images."""
    if not data.is_dir():
        return []
    size = (data_pipeline.SIZE_PX, data_pipeline.SIZE_PX)
    stream = TrainingStream(open_source(str(data)), 0, CropConfig(size), Preprocessing(size), decoder=chosen_decoder())
    workers = (0, 1, 2) if quick else (0, 1, 2, 4)
    found: dict[float, list[float]] = {n: [] for n in workers}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="This DataLoader will create")  # more workers than cores: on purpose
        for turn in range(1 if quick else 5):
            for n in workers[turn % len(workers) :] + workers[: turn % len(workers)]:
                found[n].append(arrivals(stream, n, turn * 10_000))
    cores = len(os.sched_getaffinity(0))
    about = About(
        "pipeline", "image pipeline", "workers", "images/s", f"workers, up to {cores} cores", rate=True,
        note=f"{size[0]} px random crops of {mean_bytes(stream.source):,.0f} bytes on average; workers 0: the main "
        f"process alone",
    )  # fmt: skip
    made = curve(about, found, {n: min(n, cores) for n in workers})
    return [made | {"bytes_per_image": mean_bytes(stream.source)}]


def mean_bytes(source: Source) -> float:
    return mean(size for _, size in source.manifest())


def arrivals(stream: TrainingStream, workers: int, start: int) -> float:
    """Images per second in the long run."""
    if workers:
        return loader_rate(
            stream, start=start, images=LOADED_IMAGES, workers=workers, pin_memory=False, timeout_s=120
        )  # fmt: skip
    plan = (list(range(at, at + LOADED_IMAGES)) for at in count(start, LOADED_IMAGES))
    batches = training_batches(stream, plan, workers=0)
    next(batches)
    begin = time.perf_counter()
    for _ in islice(batches, ROUNDS):
        pass
    return ROUNDS * LOADED_IMAGES / (time.perf_counter() - begin)


def opening(quick: bool) -> list[Curve]:
    """Opening files and rows of Parquet, what a process keeps of it, and the fingerprint of the files."""
    sizes = (1000, 2000) if quick else (10**3, 10**4, 10**5, 10**6)
    kinds = {"files": ("opened", "files"), "rows": ("opened", "rows"), "fingerprint": ("digested", "files")}
    with scratch() as folder:
        for n in sizes:
            index.make_files(folder / f"files{n}", n)
            index.make_parquet(folder / f"rows{n}", n, group=min(10_000, n // 10))
        first = [("opened", folder / f"rows{n}") for n in sizes]  # `datasets` makes its Arrow files
        turns = [(kind, n) for _ in range(1 if quick else 3) for n in sizes for kind in kinds]
        tasks = [(kinds[kind][0], folder / f"{kinds[kind][1]}{n}") for kind, n in turns]
        measured = in_forks([*first, *tasks], folder / "cache")[len(first) :]
    seconds, memory = ({kind: {float(n): [] for n in sizes} for kind in kinds} for _ in range(2))
    for (kind, n), (took, mib) in zip(turns, measured, strict=True):
        seconds[kind][n].append(took)
        memory[kind][n].append(max(mib, LEAST_MIB))
    return opening_curves(seconds, memory)


def opening_curves(seconds: Samples, memory: Samples) -> list[Curve]:
    """Both in proportion to the images, says theory."""
    told = {
        "files": ("open files", "index of files", "1,000 folders, in the file system's cache"),
        "rows": ("open Parquet rows", "index of Parquet rows", "10 files, opened before"),
        "fingerprint": ("fingerprint of files", "fingerprint of files, peak", "names and sizes, in the system's cache"),
    }
    found = []
    for panel, unit, samples in (("opening a data set", "s", seconds), ("memory of opening", "MiB", memory)):
        for kind, (timed, kept, note) in told.items():
            about = About(timed if unit == "s" else kept, panel, "images", unit, "images", note=note)
            found.append(curve(about, samples[kind], {n: n for n in samples[kind]}))
    return found


def in_forks(tasks: Sequence[tuple[str, Path]], cache: Path) -> list[tuple[float, float]]:
    """Seconds and MiB of each task, one after the other, each in a process that has only imported."""
    command = [sys.executable, "-c", _CHILD, json.dumps([(what, str(folder)) for what, folder in tasks])]
    surroundings = os.environ | {"HF_DATASETS_CACHE": str(cache), "HF_DATASETS_OFFLINE": "1"}
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=surroundings)
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("[")]
    return [(took, mib) for took, mib in lines]


def shuffle(quick: bool) -> list[Curve]:
    """The computed permutation over its length: no table, so neither memory nor time grow with it."""
    sizes = (10**3, 10**5) if quick else tuple(10**n for n in range(3, 11))

    def walk(n: int) -> None:
        shuffled(0, "order", n, np.arange(PLACES) % n)

    timed = interleaved({str(n): partial(walk, n) for n in sizes}, rounds=2 if quick else 7, warmup=1, device="cpu")
    found = {int(n): [s / PLACES * 1e9 for s in seconds] for n, seconds in timed.seconds.items()}
    # The network permutes a power of 4, and is walked until the place lies inside: so often, on average.
    amounts = {n: 4 ** ((int(n - 1).bit_length() + 1) // 2) / n for n in sizes}
    about = About(
        "shuffle", "computed shuffle", "images", "ns/image", "rounds until a place lies inside",
        note=f"{PLACES:,} places at once; nothing is stored",
    )  # fmt: skip
    return [curve(about, found, amounts)]


def checkpoint(quick: bool) -> list[Curve]:
    """Writing, hashing and flushing a checkpoint over its bytes."""
    sizes = [MIB, 2 * MIB] if quick else [4**n * MIB for n in range(1, 5)]
    with scratch() as folder:
        steps = count(1)

        def save(state: dict[str, torch.Tensor], where: Path) -> None:
            save_checkpoint(where, next(steps), state, keep=1)

        arms: dict[str, Callable[[], object]] = {
            str(n): partial(save, {"weights": torch.rand(n // 4)}, folder / str(n)) for n in sizes
        }
        timed = interleaved(arms, rounds=1 if quick else 3, warmup=1, device="cpu")
    found = {int(n): seconds for n, seconds in timed.seconds.items()}
    about = About(
        "checkpoint", "writing a checkpoint", "bytes", "s", "bytes", note="SHA-256 and flush to disk included"
    )
    return [curve(about, found, {n: float(n) for n in sizes})]


@contextmanager
def scratch() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="nextblock-scaling-") as name:
        yield Path(name)
