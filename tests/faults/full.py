"""Every fault test, at full length: `python -m tests.faults.full --kills 200 --report benchmarks/results/faults.json`.

Kills in chains, of all kinds of work, and random damage to what was written. Prints a table, writes a report, and
returns 1 when anything was not as it must be.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import random
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from queue import Queue
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]  # as pytest has them

from scipy.stats import beta  # noqa: E402

from bit_flips import SUBJECTS, damaged_at_random  # noqa: E402
from fork_server import ForkServer  # noqa: E402
from killing import Killer  # noqa: E402
from victims import make_material, victims  # noqa: E402

CHAIN = 20
# Of the kills, and how each chain mixes them.
SHARE = {"xtra": 0.3, "xar": 0.2, "probe suite": 0.15, "latents": 0.1, "samples": 0.1, "prepare": 0.15}
WAYS = {
    "xtra": ["moment", "save", "moment", "validation", "moment", "worker"],
    "xar": ["moment", "save", "moment", "validation", "moment", "worker"],
    "probe suite": ["moment", "save", "moment", "features", "moment", "result"],
    "latents": ["moment", "save", "moment", "worker", "moment", "reading"],
    "samples": ["moment", "save"],
    "prepare": ["moment", "save", "moment", "worker", "moment", "index"],
}


@dataclass
class Tally:
    """Of one kind: what was tried, by way, and what failed, in words; the rest as in `Outcome`."""

    tries: Counter[str] = field(default_factory=Counter)
    finished: int = 0
    told: int = 0
    failures: list[str] = field(default_factory=list)

    @property
    def count(self) -> int:
        return self.tries.total()


def upper_bound(failures: int, tries: int) -> float:
    """Of the true failure rate, 95 % one-sided (Clopper and Pearson 1934)."""
    return 1.0 if failures >= tries else float(beta.ppf(0.95, failures + 1, tries - failures))


def chains(kills: int, shares: Mapping[str, float] = SHARE) -> list[tuple[str, int]]:
    """(kind, kills): chains of `CHAIN` and rests, longest kinds first, of so many kills together."""
    found = []
    left = kills
    for number, (name, share) in enumerate(shares.items()):
        mine = left if number == len(shares) - 1 else min(left, round(kills * share))
        left -= mine
        found += [(name, min(CHAIN, mine - start)) for start in range(0, mine, CHAIN)]
    return found


def kill(kills: int, processes: int, seed: int, scratch: Path, workers_only: bool = False) -> dict[str, Tally]:
    """All chains, so many at once."""
    work = victims(make_material(scratch / "material", noise=150), length=3)
    ways = {name: [way for way in ways if way == "worker" or not workers_only] for name, ways in WAYS.items()}
    share = {name: part for name, part in SHARE.items() if ways[name]}
    share = {name: part / sum(share.values()) for name, part in share.items()}
    tallies = {name: Tally() for name in share}
    servers: Queue[ForkServer] = Queue()
    lock = threading.Lock()

    def one(number: int, name: str, count: int) -> None:
        server = servers.get()
        try:
            killer = Killer(
                server, work[name], scratch / f"{number}-{name.replace(' ', '-')}", random.Random(seed + number)
            )
            outcome = killer.chain(count, ways[name], latest=0.25)
            problem = outcome.failures
        except Exception as error:
            outcome, problem = None, [f"{type(error).__name__}: {error}"]
        finally:
            servers.put(server)
        with lock:
            tally = tallies[name]
            if outcome:
                tally.tries += outcome.kills
                tally.finished += outcome.finished
                tally.told += outcome.told
            tally.failures += problem
            print(f"{name}: {count} kills in a chain: {'as they must be' if not problem else problem[0]}", flush=True)

    started = [ForkServer() for _ in range(processes)]
    for server in started:
        servers.put(server)
    with ThreadPoolExecutor(processes) as pool:
        for future in [pool.submit(one, number, *chain) for number, chain in enumerate(chains(kills, share))]:
            future.result()
    for server in started:
        server.__exit__(None, None, None)
    return tallies


def damage(count: int, seed: int, scratch: Path) -> dict[str, Tally]:
    """So many random flips and cuts of what was written, shared evenly among the subjects."""
    tallies = {}
    for number, (name, make) in enumerate(SUBJECTS.items()):
        mine = count // len(SUBJECTS) + (number < count % len(SUBJECTS))
        folder = scratch / name.replace(" ", "-")
        folder.mkdir(parents=True)
        found = damaged_at_random(make(folder), mine, random.Random(seed + number))
        tallies[f"damage: {name}"] = Tally(found.tries, failures=found.failures)
        print(f"{name}: {mine} damaged, {len(found.failures)} not noticed", flush=True)
    return tallies


def table(tallies: dict[str, Tally]) -> str:
    """One line for each kind, and the sums."""
    lines = [f"{'kind':<28}{'tries':>7}{'failed':>8}{'at most (95 %)':>16}  how"]
    for name, tally in tallies.items():
        how = ", ".join(f"{way} {number}" for way, number in sorted(tally.tries.items()))
        lines.append(f"{name:<28}{tally.count:>7}{len(tally.failures):>8}{_percent(tally):>16}  {how}")
    for kind, is_of in (("all kills", False), ("all damage", True)):
        some = [tally for name, tally in tallies.items() if name.startswith("damage") == is_of]
        tries: Counter[str] = sum((tally.tries for tally in some), Counter())
        whole = Tally(tries, failures=[failure for tally in some for failure in tally.failures])
        lines.append(f"{kind:<28}{whole.count:>7}{len(whole.failures):>8}{_percent(whole):>16}")
    return "\n".join(lines)


def _percent(tally: Tally) -> str:
    return f"{100 * upper_bound(len(tally.failures), tally.count):.2f} %" if tally.count else "-"


def report(tallies: dict[str, Tally], seconds: float, seed: int) -> dict[str, Any]:
    """What is written down; of this machine no paths."""
    from nextblock.training.run_record import environment

    about = environment(seed, "cpu")
    return {
        "date": datetime.date.today().isoformat(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "seconds": round(seconds),
        "seed": seed,
        "versions": about["packages"] | {"python": about["python"], "platform": about["platform"]},
        "commit": about["commit"],
        "changed_since": _changed(),
        "kinds": {
            name: {
                "tries": tally.count,
                "how": dict(sorted(tally.tries.items())),
                "compared_at_the_end": tally.finished,
                "deaths_of_workers_told": tally.told,
                "failures": [re.sub(r"(?<![\w.])/[\w./~-]+/", "", failure) for failure in tally.failures],
                "failure_rate_at_most_95": upper_bound(len(tally.failures), tally.count) if tally.count else None,
            }
            for name, tally in tallies.items()
        },
    }


def _changed() -> bool | None:
    """Whether the working tree is not that of the commit."""
    try:
        command = ["git", "-C", str(HERE), "status", "--porcelain"]
        return bool(subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip())
    except (OSError, subprocess.SubprocessError):
        return None


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--damage", type=int, default=1000, help="flips and cuts")
    parser.add_argument("--workers-only", action="store_true", help="kill worker processes and nothing else")
    parser.add_argument("--processes", type=int, default=2, help="jobs at once")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--report", type=Path)
    asked = parser.parse_args()
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        tallies = damage(asked.damage, asked.seed, Path(folder) / "damage") if asked.damage else {}
        if asked.kills:
            place = Path(folder) / "kills"
            tallies = kill(asked.kills, asked.processes, asked.seed, place, asked.workers_only) | tallies
    print(table(tallies))
    failures = [f"{name}: {each}" for name, tally in tallies.items() for each in tally.failures]
    print("\n".join(failures))
    if asked.report:
        asked.report.parent.mkdir(parents=True, exist_ok=True)
        asked.report.write_text(json.dumps(report(tallies, time.monotonic() - start, asked.seed), indent=1) + "\n")
    short = asked.kills > sum(tally.count for name, tally in tallies.items() if not name.startswith("damage"))
    return 1 if failures or short else 0


if __name__ == "__main__":
    sys.exit(main())
