"""How long does it take to open very many images, and what does a process keep of it in memory?

    python -m benchmarks.index [--quick]

1,000,000 files (hard links to one, in 1,000 folders) and 10,000,000 rows of Parquet (one tiny JPEG over and over) are
made in a temporary folder and removed. Each is opened in a new process. Opened before: files have been listed once, so
that names and inodes are in the file system's cache; the rows have been turned into `datasets`' Arrow file, which a
first opening does once. Memory is anonymous memory, what opening adds to that of the imports; and what a forked worker
has of its own after reading names, labels and samples all over the index: nothing, where the index is shared.
"""

from __future__ import annotations

import io
import os
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from benchmarks.measure import Row, Target, run_alone

FILES, ROWS = 1_000_000, 10_000_000

_CHILD = """
import os, sys, time
import numpy as np
from nextblock.data.sources import open_source

def own():
    kib = sum(int(line.split()[1]) for line in open("/proc/self/smaps_rollup") if line.startswith(sys.argv[2]))
    return kib / 1024

def look(source, count):
    labels = source.labels()
    for index in np.random.default_rng(0).integers(0, len(source), count).tolist():
        source.name(index), labels[index], source[index]

before, started = own(), time.perf_counter()
source = open_source(sys.argv[1])
seconds, kept = time.perf_counter() - started, own() - before
look(source, 1)
sys.argv[2] = "Private_Dirty"
if os.fork():
    os.wait()
    print(len(source), seconds, kept)
else:
    at_first = own()
    look(source, 5000)
    print(own() - at_first, flush=True)
    os._exit(0)
"""


def planned(device: str) -> list[Row]:
    """The rows, not measured; they are the CPU's."""
    if device != "cpu":
        return []
    limits = (("1,000,000 files", 20), ("10 M Parquet rows", 2))
    return [
        row
        for what, seconds in limits
        for row in (
            Row(f"open {what}", "s", device, (Target("itself", "<=", seconds),)),
            Row(f"index of {what}, memory of a process", "MiB", device, (Target("itself", "<=", 200),)),
        )
    ]


def rows(device: str, quick: bool = False) -> list[Row]:
    """Measure them; `quick`: with a hundredth of the images."""
    found = planned(device)
    if not found:
        return []
    share = 100 if quick else 1
    with tempfile.TemporaryDirectory(prefix="nextblock-index-") as name:
        folder = Path(name)
        make_files(folder / "files", FILES // share)
        make_parquet(folder / "rows", ROWS // share)
        measured: list[Row] = []
        for place, (opening, memory) in (("files", found[:2]), ("rows", found[2:])):
            first = opened(folder / place, folder / "cache")
            count, seconds, kept, of_worker = opened(folder / place, folder / "cache")
            note = f"{count:,} images; the first time {first[1]:.2g} s"
            measured.append(replace(opening, ours=seconds, note=note))
            measured.append(
                replace(
                    memory, ours=kept, note=f"{count:,} images; a worker's own after 5,000 reads: {of_worker:.1f} MiB"
                )
            )
        return measured


def opened(images: Path, cache: Path) -> tuple[int, float, float, float]:
    """Images, seconds, MiB, and MiB of a worker's own."""
    command = [sys.executable, "-c", _CHILD, str(images), "Anonymous"]
    surroundings = os.environ | {"HF_DATASETS_CACHE": str(cache), "HF_DATASETS_OFFLINE": "1"}
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=surroundings)
    of_worker, (count, seconds, kept) = done.stdout.splitlines()[0], done.stdout.splitlines()[1].split()
    return int(count), float(seconds), float(kept), float(of_worker)


def tiny_jpeg() -> bytes:
    out = io.BytesIO()
    Image.new("L", (1, 1)).save(out, "JPEG", quality=1, optimize=True)
    return out.getvalue()


def make_files(folder: Path, count: int) -> None:
    """`count` image files in 1,000 folders, their names as long as ImageNet's."""
    classes = [folder / f"n{number:08d}" for number in range(1000)]
    for each in classes:
        each.mkdir(parents=True)
    for each in classes:
        first = each / "n00000000_00000.JPEG"  # a file has at most 65,000 links, so there is one in each folder
        first.write_bytes(tiny_jpeg())
        for number in range(1, count // len(classes)):
            os.link(first, each / f"{each.name}_{number:05d}.JPEG")


def make_parquet(folder: Path, count: int, files: int = 10, group: int = 10_000) -> None:
    folder.mkdir(parents=True)
    image = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    schema = pa.schema([("image", image), ("label", pa.int64())])
    columns = [pa.array([tiny_jpeg()] * group, pa.binary()), pa.array([None] * group, pa.string())]
    labels = pa.array(np.arange(group) % 1000)
    images = pa.StructArray.from_arrays(columns, ["bytes", "path"])
    table = pa.table({"image": images, "label": labels}, schema=schema)
    for number in range(files):
        with pq.ParquetWriter(folder / f"train-{number:05d}-of-{files:05d}.parquet", schema) as writer:
            for _ in range(count // files // group):
                writer.write_table(table)


if __name__ == "__main__":
    run_alone(__doc__, rows)
