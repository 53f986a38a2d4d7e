"""A trace of a few steps as a file that a browser opens (chrome://tracing, ui.perfetto.dev), kept small."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

MOST_EVENTS = 40_000  # the longest ones; about 5 MB


def start_trace(device: torch.device) -> profile:
    """A profile of the host and, where it is another, the device; it has begun."""
    cuda = [ProfilerActivity.CUDA] if device.type == "cuda" else []
    trace = profile(activities=[ProfilerActivity.CPU, *cuda])
    with _silent():
        trace.start()
    return trace


def stop_trace(trace: profile, file: Path | None) -> None:
    """Stop it and write it as a Chrome trace, what ran when on which thread or stream; nothing when `file` is None."""
    with _silent():
        trace.stop()
    if file is not None:
        _write(trace, file)


def _write(trace: profile, file: Path) -> None:
    whole = file.with_name(f".{file.name}.whole")
    try:
        trace.export_chrome_trace(str(whole))
        values = json.loads(whole.read_text(encoding="utf-8"))
        file.write_text(json.dumps(slim(values), separators=(",", ":")), encoding="utf-8")
    finally:
        whole.unlink(missing_ok=True)


@contextmanager
def _silent() -> Iterator[None]:
    """Nothing of this process reaches the standard error stream: torch's profiler tells there that it starts and
    stops, from below Python and at every log level."""
    sys.stderr.flush()
    try:
        kept = os.dup(2)
    except OSError:  # there is no such stream
        yield
        return
    try:
        with open(os.devnull, "wb") as nowhere:
            os.dup2(nowhere.fileno(), 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def slim(trace: dict[str, Any], most: int = MOST_EVENTS) -> dict[str, Any]:
    """Of the events the `most` longest ones, without details and arrows, in their order, and the names of threads."""
    events = trace.get("traceEvents", [])
    names = [event for event in events if event.get("ph") == "M"]
    spans = [event for event in events if event.get("ph") == "X"]
    # Our own phases frame the rest and come before anything as long.
    spans.sort(key=lambda event: (str(event.get("name")).startswith("nextblock: "), event.get("dur", 0)), reverse=True)
    kept = sorted(spans[:most], key=lambda event: event["ts"])
    wanted = ("name", "ph", "cat", "ts", "dur", "pid", "tid")
    plain = [{key: event[key] for key in wanted if key in event} for event in kept]
    return {"traceEvents": names + plain, "displayTimeUnit": "ms"}
