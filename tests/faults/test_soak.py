"""A run of a few hundred steps leaks nothing; what leaks is noticed. `python -m tests.faults.soak` takes 5,000."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from matplotlib.figure import Figure
from soak import Sample, drifts, growths, left_behind, samples_of, soak

from fork_server import ForkServer
from nextblock.figures.canvas import freed, save

STEPS = 300


def test_a_run_leaks_nothing(server: ForkServer, tmp_path: Path) -> None:
    soaked = soak(server, tmp_path, STEPS, look_every=60)
    assert not soaked.code, (tmp_path / "log").read_text()
    assert len(soaked.wall_s) >= STEPS
    assert len(soaked.samples) > STEPS // 10, "too few samples to tell"
    assert {sample.processes for sample in soaked.samples} == {3}, "the run and its workers"
    _, wrong = soaked.judged(cpu=1.6, wall=None)  # a short run beside others says little about time
    assert not wrong, wrong


# A process that counts steps as a run does, and leaks one thing at each.
VICTIM = """
import mmap, os, sys, threading, time

what, metrics = sys.argv[1:]
kept = []

def shared():
    kept.append(mmap.mmap(-1, 2**17))
    kept[-1].write(b"x" * 2**17)

def process():
    if os.fork() == 0:
        time.sleep(60)
        os._exit(0)

leaks = {
    "nothing": lambda step: time.sleep(0.001),
    "resident": lambda step: kept.append(b"x" * 50_000),
    "shared": lambda step: shared(),
    "files": lambda step: kept.append(open(os.devnull)) if step % 50 == 0 else None,
    "threads": lambda step: None if step % 50 else threading.Thread(target=time.sleep, args=(60,), daemon=True).start(),
    "processes": lambda step: process() if step % 100 == 0 else None,
    "cpu": lambda step: sum(range(150 * step)),
}
with open(metrics, "w") as file:
    file.write("step,images_per_s\\n")
    for step in range(1, 401):
        leaks[what](step)
        time.sleep(0.002)
        file.write(f"{step},1.0\\n")
        file.flush()
os._exit(0)
"""


@pytest.mark.parametrize("what", ["nothing", "resident", "shared", "files", "threads", "processes", "cpu"])
def test_what_leaks_is_noticed(what: str, tmp_path: Path) -> None:
    metrics = tmp_path / "metrics.csv"
    victim = subprocess.Popen([sys.executable, "-S", "-c", VICTIM, what, str(metrics)], start_new_session=True)
    try:
        samples = samples_of(victim.pid, metrics, 5, lambda: victim.poll() is not None)
        left = left_behind([victim.pid])
    finally:
        if victim.poll() is None or left_behind([victim.pid]):
            os.killpg(victim.pid, signal.SIGKILL)
    measured = [sample for sample in samples if sample.step >= 40]
    assert len(measured) > 20
    noticed = {name for name, each in growths(measured).items() if each.is_leak}
    noticed |= {name for name, each in drifts(measured, [1.0] * 400).items() if each.is_slower}
    with_it = {"shared": {"resident"}, "processes": {"resident", "files", "threads"}}.get(what, set())
    assert {what} - {"nothing", "cpu"} <= noticed - {"cpu"} <= {what} | with_it
    assert ("cpu" in noticed) or what != "cpu"
    assert bool(left) == (what == "processes")


def test_a_few_odd_samples_are_no_leak() -> None:
    steps = range(100, 1100, 10)
    plain = [Sample(step, 10**8, 10**8, 10**6, 40, 5, 3, step / 100) for step in steps]
    odd = [
        Sample(s.step, s.resident * 2, s.proportional, s.shared, 60, 9, 3, s.cpu_s) if i % 7 == 0 else s
        for i, s in enumerate(plain)
    ]
    assert not any(each.is_leak for each in growths(odd).values())
    assert not any(each.is_slower for each in drifts(odd, [1.0] * 1000).values())
    creeping = [Sample(s.step, s.resident + 10_000 * s.step, 0, 0, s.files + s.step // 300, 5, 3, 0) for s in plain]
    assert {name for name, each in growths(creeping).items() if each.is_leak} == {"resident", "files"}


def test_slower_steps_are_noticed() -> None:
    samples = [Sample(step, 0, 0, 0, 0, 0, 0, (step / 1000) ** 2) for step in range(100, 1100, 10)]
    found = drifts(samples, [0.01] * 400 + [0.02] * 400)
    assert found["cpu"].is_slower
    assert found["wall"].is_slower
    assert found["wall"].ratio == pytest.approx(2)
    assert not drifts(samples, [0.01] * 400 + [0.02] * 400, cpu=9, wall=None)["wall"].is_slower


def test_drawn_pictures_leave_no_figures(tmp_path: Path) -> None:
    """Or a run with pictures grows for as long as nobody looks through all objects."""

    def figures() -> int:
        return sum(type(each) is Figure for each in gc.get_objects())

    def sheet() -> None:
        figure = Figure()
        figure.subplots(2, 2)
        save(figure, tmp_path / "sheet.png")

    gc.collect()
    before = figures()
    was = gc.get_threshold()
    gc.set_threshold(0)  # as between two collections
    try:
        freed(sheet)()
        assert figures() == before
        sheet()
        assert figures() > before, "a figure that nobody frees stays"
    finally:
        gc.set_threshold(*was)
