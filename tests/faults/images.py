"""Decodes damaged images, and says what became of them.

    python -m tests.faults.images --mutations 10000 --report FILE

Each is decoded twice by each decoder, in a process whose memory is limited; a crash of that process, or an image that
takes for ever, is counted and named, and the next process goes on behind it. Returns 1 if anything is not as it should
be. NEXTBLOCK_SAMPLES may name a folder of JPEGs, which are then damaged as well.
"""

from __future__ import annotations

import argparse
import faulthandler
import importlib.util
import json
import os
import platform
import re
import resource
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path
from typing import Any

from .base_images import base_images
from .mutations import mutated

MOST_SECONDS = 2.0  # of processor time, for one image and one decoder, and
MOST_SECONDS_A_PIXEL = 4e-8  # beyond that: 9 s for the most pixels that are allowed
MOST_BYTES = 3 * 2**30  # of address space, beyond what the process has at its start
HUNG_SECONDS = 240  # of the clock, on a machine with other work
SIZE_PX = (64, 64)
_PAGE = resource.getpagesize()


def whole(height: int, width: int) -> tuple[int, int, int, int]:
    return 0, 0, height, width


def verdict(content: bytes, decoder: str) -> tuple[str, int]:
    """`valid` and a digest of the pixels, or the reason of the SampleError; and how many pixels. The rest is raised."""
    from nextblock.data.decode import decode
    from nextblock.data.decoders import decode_crop
    from nextblock.errors import SampleError

    try:
        pixels = decode(content, "x") if decoder == "whole" else decode_crop(
            content, "x", whole, SIZE_PX, decoder=decoder
        )  # fmt: skip
    except SampleError as error:
        return error.reason, 0
    if str(pixels.dtype) != "uint8" or pixels.ndim != 3 or pixels.shape[2] != 3 or not pixels.size:
        raise AssertionError(f"pixels are {pixels.dtype} {pixels.shape}")
    return f"valid {sha256(pixels).hexdigest()[:16]}", pixels.shape[0] * pixels.shape[1]


def decoders() -> list[str]:
    """Whole images, and crops by each decoder that is installed."""
    there = importlib.util.find_spec("simplejpeg") is not None
    return ["whole", "pillow", "pillow-scaled", *(["simplejpeg"] if there else [])]


def judged(seed: int, number: int) -> dict[str, Any]:
    """What became of one image: its `verdict`, and `wrong`, a list of what should not have happened."""
    image, wrong, verdicts, slowest, most = mutated(seed, number), [], {}, 0.0, 0
    for decoder in decoders():
        start = time.process_time()
        try:
            verdicts[decoder], pixels = verdict(image.content, decoder)
        except Exception as error:
            wrong.append(f"{decoder} raised {type(error).__name__}: {error}")
            continue
        slowest, most = max(slowest, time.process_time() - start), max(most, pixels)
        if verdict(image.content, decoder)[0] != verdicts[decoder]:
            wrong.append(f"{decoder} gives another result the second time")
    if slowest > MOST_SECONDS + MOST_SECONDS_A_PIXEL * most:
        wrong.append(f"took {slowest:.1f} s")
    said = {"valid" if each.startswith("valid ") else each for each in verdicts.values()}
    if len(said) > 1:
        wrong.append(f"decoders differ: {verdicts}")
    if any(len(each) > 300 or "\n" in each or " object at " in each for each in said):
        wrong.append(f"not a reason to read: {said}")
    return {
        "number": number, "base": image.base, "what": image.what, "kind": image.kind, "verdict": sorted(said)[-1:],
        "wrong": wrong, "seconds": slowest, "peak_mb": _peak_mb(),
    }  # fmt: skip


def _peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def decode_range(seed: int, first: int, last: int, into: Path) -> None:
    """Judge the images `first` to `last` in this process, one line of JSON for each as soon as it is done."""
    import nextblock.data.decoders  # noqa: F401 - before memory is limited: torch alone takes gigabytes of addresses

    base_images()
    used = int(Path("/proc/self/statm").read_text().split()[0]) * _PAGE
    resource.setrlimit(resource.RLIMIT_AS, (used + MOST_BYTES, resource.RLIM_INFINITY))
    faulthandler.enable()
    with open(into, "a", encoding="utf-8") as out:
        for number in range(first, last):
            faulthandler.dump_traceback_later(HUNG_SECONDS, exit=True)
            if os.environ.get("NEXTBLOCK_CRASH_AT") == str(number):  # for the test that a crash is seen
                faulthandler._sigsegv()
            out.write(json.dumps(judged(seed, number)) + "\n")
            out.flush()
    faulthandler.cancel_dump_traceback_later()


def run(seed: int, count: int, folder: Path) -> list[dict[str, Any]]:
    """Judge `count` images, in one process for as long as it lives."""
    into, found = folder / "judged.jsonl", []
    root = Path(__file__).resolve().parents[2]
    while len(found) < count:
        command = [sys.executable, "-m", "tests.faults.images", "--range", f"{len(found)}:{count}"]
        into.unlink(missing_ok=True)
        child = subprocess.run(
            [*command, "--seed", str(seed), "--report", str(into)], cwd=root, stderr=subprocess.PIPE, text=True,
            timeout=600 + count,
        )  # fmt: skip
        found += [json.loads(line) for line in into.read_text().splitlines()] if into.exists() else []
        if child.returncode == 0:
            continue
        if not into.exists():  # it did not come as far as the first image
            raise RuntimeError(child.stderr)
        image = mutated(seed, len(found))
        said = re.sub(r"(?<![\w.])/[\w./~-]+/", "", child.stderr[-2000:])  # without this machine's paths
        ended = f"the process ended with {child.returncode}: {said}"
        found.append({
            "number": len(found), "base": image.base, "what": image.what, "kind": image.kind, "verdict": ["none"],
            "wrong": [ended], "seconds": 0.0, "peak_mb": 0.0,
        })  # fmt: skip
    return found


def summary(found: Sequence[dict[str, Any]], seed: int) -> dict[str, Any]:
    """The report: verdicts by kind of damage, the slowest, the peak of memory, and all that is wrong."""
    by_kind: dict[str, Counter[str]] = {}
    reasons: Counter[str] = Counter()
    for one in found:
        valid = one["verdict"] == ["valid"]
        by_kind.setdefault(one["kind"] if " + " not in one["kind"] else "two of them", Counter())[
            "valid" if valid else "SampleError"
        ] += 1
        if not valid:
            reasons[re.sub(r"\d+", "N", one["verdict"][0])] += 1
    slowest = sorted(found, key=lambda one: -one["seconds"])[:5]
    return {
        "images": len(found), "seed": seed, "wrong": [one for one in found if one["wrong"]],
        "verdicts": {kind: dict(counts) for kind, counts in sorted(by_kind.items())},
        "reasons": dict(reasons.most_common()), "peak_mb": round(max(one["peak_mb"] for one in found)),
        "seconds": round(sum(one["seconds"] for one in found), 1),
        "slowest": [{key: one[key] for key in ("number", "base", "what", "seconds")} for one in slowest],
        "versions": {package: version(package) for package in ("nextblock", "pillow", "torch", "numpy")},
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}",
    }  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mutations", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--report", type=Path, required=True)
    parser.add_argument("--range", help=argparse.SUPPRESS)
    asked = parser.parse_args(arguments)
    if asked.range:
        first, last = map(int, asked.range.split(":"))
        decode_range(asked.seed, first, last, asked.report)
        return 0
    with tempfile.TemporaryDirectory() as folder:
        started = time.monotonic()
        report = summary(run(asked.seed, asked.mutations, Path(folder)), asked.seed)
    report["wall_seconds"] = round(time.monotonic() - started, 1)
    asked.report.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    for kind, counts in report["verdicts"].items():
        print(f"{kind:16} {counts.get('valid', 0):6} valid {counts.get('SampleError', 0):6} SampleError")
    print(f"{report['images']} images, {len(report['wrong'])} wrong, peak {report['peak_mb']} MB; {asked.report}")
    return 1 if report["wrong"] else 0


if __name__ == "__main__":
    sys.exit(main())
