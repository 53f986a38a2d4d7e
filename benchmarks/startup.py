"""How long the shell and the import take, in new processes.

    python -m benchmarks.startup [--quick]

`nextblock --help` is timed from start to end; `import nextblock` inside the process, without the interpreter's start.
The note of the first has the seconds of a Python that does nothing.
"""

from __future__ import annotations

import subprocess
import sys
import time
from dataclasses import replace
from statistics import median

from benchmarks.measure import Row, Target, quartiles, run_alone

_IMPORT = "import time; t = time.perf_counter(); import nextblock; print(time.perf_counter() - t)"


def planned(device: str) -> list[Row]:
    """The rows, not measured; they are the CPU's."""
    if device != "cpu":
        return []
    return [
        Row("nextblock --help", "s", device, (Target("itself", "<=", 0.5),)),
        Row("import nextblock", "s", device, (Target("itself", "<=", 0.3),)),
    ]


def rows(device: str, quick: bool = False) -> list[Row]:
    """Measure them; `quick`: once."""
    if device != "cpu":
        return []
    help_row, import_row = planned(device)
    found: dict[str, list[float]] = {"help": [], "nothing": [], "import": []}
    shell = [sys.executable, "-c", "from nextblock.cli import main; main(['--help'])"]
    for turn in range(1 if quick else 12):
        seconds = {"help": _wall(shell), "nothing": _wall([sys.executable, "-c", "pass"]), "import": _import_time()}
        if turn or quick:  # the first one reads the files from disk
            for name, value in seconds.items():
                found[name].append(value)
    return [
        replace(help_row, ours=median(found["help"]), spread={"ours": quartiles(found["help"])},
                note=f"a Python that does nothing: {median(found['nothing']):.3f} s"),
        replace(import_row, ours=median(found["import"]), spread={"ours": quartiles(found["import"])}),
    ]  # fmt: skip


def _wall(command: list[str]) -> float:
    started = time.perf_counter()
    subprocess.run(command, check=True, capture_output=True)
    return time.perf_counter() - started


def _import_time() -> float:
    done = subprocess.run([sys.executable, "-c", _IMPORT], check=True, capture_output=True, text=True)
    return float(done.stdout)


if __name__ == "__main__":
    run_alone(__doc__, rows)
