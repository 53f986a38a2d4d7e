"""Speed, as ratios in one run on one machine: the whole table, its plot, and the README's.

    python -m benchmarks.bench --device cpu [--only NAME ...] [--quick]

Runs the modules of `TABLES` one after the other and writes benchmarks/results/speed-DEVICE.json after each (rows,
device, versions, commit; see README.md here), then draws docs/speed.png and rewrites what stands in README.md between
the two markers. With `--only` the other tables keep what was measured before. `--quick` runs everything in sizes that
say nothing, into a file of its own, and leaves picture and README alone.

A module has `rows(device, quick)`, and `planned(device)` for what is to be measured where there is no such device.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import re
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.measure import NOT_MEASURED, Row, described
from nextblock.figures.speed import draw_speed
from nextblock.training.run_record import environment

TABLES = (
    "startup", "training_step", "attention", "sampling_speed", "solvers", "probe_sweep", "data_pipeline", "index",
    "latent_caching",
)  # fmt: skip
ROOT = Path(__file__).parents[1]
BEGIN, END = "<!-- speed table: begin -->", "<!-- speed table: end -->"
DEVICES = ("cpu", "cuda")
_FIELDS = ("ours", "plain", "second", "limit", "ratio", "ratio_second", "share_of_limit")


def as_row(found: Row | dict[str, Any], device: str) -> dict[str, Any]:
    """One row as the results hold it; what a module's own dictionary leaves out is filled in."""
    given = found.to_dict() if isinstance(found, Row) else dict(found)
    if not given.get("name"):
        raise ValueError(f"a row needs a name: {given}")
    row = dict.fromkeys(_FIELDS) | {"unit": "", "device": device, "target": "", "note": "", "spread": {}}
    row |= {"met": NOT_MEASURED} | given
    for ratio, other in (("ratio", "plain"), ("ratio_second", "second"), ("share_of_limit", "limit")):
        if row[ratio] is None and row["ours"] is not None and row[other]:
            row[ratio] = row["ours"] / row[other]
    if not isinstance(row["met"], str):
        row["met"] = bool(row["met"])  # NumPy's is no JSON
    return row


def present_tables(only: Sequence[str]) -> list[str]:
    """The tables that are asked for and there. Raises SystemExit for an unknown one."""
    unknown = [name for name in only if name not in TABLES]
    if unknown:
        raise SystemExit(f"no table {', '.join(unknown)}; tables: {', '.join(TABLES)}.")
    wanted = only or TABLES
    return [name for name in wanted if importlib.util.find_spec(f"benchmarks.{name}") is not None]


def planned_rows(device: str) -> list[dict[str, Any]]:
    """What there is to measure on a device, without numbers."""
    found: list[dict[str, Any]] = []
    for name in present_tables(()):
        planned = getattr(importlib.import_module(f"benchmarks.{name}"), "planned", None)
        found += [as_row(row, device) for row in planned(device)] if planned else []
    return found


def measure(device: str, names: Iterable[str], file: Path, *, quick: bool) -> list[str]:
    """Run the tables, writing `file` after each; the names of those that failed."""
    failed = []
    for name in names:
        started = time.perf_counter()
        print(f"{name} ...", flush=True)
        try:
            made = importlib.import_module(f"benchmarks.{name}").rows(device, quick)
        except Exception as error:  # one table that fails must not cost the others
            print(f"{name} failed: {type(error).__name__}: {error}", file=sys.stderr)
            failed.append(name)
            continue
        table = {
            "rows": [as_row(row, device) for row in made],
            "seconds": round(time.perf_counter() - started, 1),
            "date": time.strftime("%Y-%m-%d"),
            "device": described(device),
            "environment": environment(0, device) | {"command": ["python", "-m", "benchmarks.bench", *sys.argv[1:]]},
        }
        tables = read_tables(file) | {name: table}
        file.parent.mkdir(parents=True, exist_ok=True)
        ordered = {each: tables[each] for each in TABLES if each in tables}
        file.write_text(json.dumps({"device": device, "tables": ordered}, indent=2) + "\n")
    return failed


def read_tables(file: Path) -> dict[str, Any]:
    return json.loads(file.read_text())["tables"] if file.is_file() else {}


def read_rows(file: Path) -> list[dict[str, Any]]:
    return [row for table in read_tables(file).values() for row in table["rows"]]


def all_rows(results: Path) -> list[dict[str, Any]]:
    """Every row of every device: measured, or planned."""
    found: list[dict[str, Any]] = []
    for device in DEVICES:
        measured = read_rows(results / f"speed-{device}.json")
        names = {row["name"] for row in measured}
        found += [*measured, *(row for row in planned_rows(device) if row["name"] not in names)]
    return found


def markdown(rows: Sequence[dict[str, Any]], results: Path) -> str:
    """The README's table, and on what it was measured."""
    lines = ["| | on | ours | × plain | × second | of the limit | target | met |", "|---|---|---|---|---|---|---|---|"]
    for row in rows:
        share = row["share_of_limit"]
        cells = [
            row["name"], {"cpu": "CPU", "cuda": "GPU"}.get(row["device"], row["device"]), amount(row),
            number(row["ratio"]), number(row["ratio_second"]), "" if share is None else f"{100 * share:.0f} %",
            str(row["target"]), {True: "yes", False: "**no**"}.get(row["met"], str(row["met"])),
        ]  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    notes = [f"- {row['name']}: {row['note']}" for row in rows if row["ours"] is not None and row["note"]]
    if notes:
        lines += ["", "<details><summary>What exactly was measured</summary>", "", *notes, "", "</details>"]
    about = []
    for device in DEVICES:
        tables = read_tables(results / f"speed-{device}.json").values()
        told = {(t["device"], t["environment"]["packages"].get("torch"), t["date"]) for t in tables}
        about += [f"{name}, torch {version}, {date}" for name, version, date in sorted(told, key=str)]
    if about:
        lines += ["", f"Measured on: {'; '.join(about)}."]
    return "\n".join(lines)


def amount(row: dict[str, Any]) -> str:
    return "" if row["ours"] is None else f"{number(row['ours'])} {row['unit']}".strip()


def number(value: float | None) -> str:
    """Three digits that count."""
    if value is None:
        return ""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def rewrite(readme: Path, table: str) -> bool:
    """Put the table between the markers; False where the file has none."""
    text = readme.read_text()
    pattern = re.compile(f"({re.escape(BEGIN)}\n).*?({re.escape(END)})", flags=re.S)
    changed, count = pattern.subn(lambda found: f"{found[1]}{table}\n{found[2]}", text)
    if count:
        readme.write_text(changed)
    return bool(count)


def print_rows(rows: Sequence[dict[str, Any]]) -> None:
    """For a person, with quartiles of the ratio against the plain path."""
    table = Table("", "ours", "plain", "× plain", "quartiles", "× second", "of the limit", "target", "met")
    for row in rows:
        spread, share = row.get("spread", {}).get("ours/plain"), row.get("share_of_limit")
        table.add_row(
            f"{row['name']} ({row.get('device', '')})", amount(row), number(row.get("plain")), number(row.get("ratio")),
            " to ".join(number(value) for value in spread) if spread else "", number(row.get("ratio_second")),
            "" if share is None else f"{100 * share:.0f} %", str(row.get("target", "")), str(row.get("met", "")),
        )  # fmt: skip
    console = Console()
    console.width = max(console.width, 150)  # a file, or a pipe, is not 80 columns wide
    console.print(table)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.bench", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", default="cpu", choices=DEVICES)
    parser.add_argument("--only", nargs="+", default=[], metavar="NAME", help=", ".join(TABLES))
    parser.add_argument("--quick", action="store_true", help="in sizes that say nothing; picture and README stay")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results", help="folder of the results")
    parser.add_argument("--readme", type=Path, default=ROOT / "README.md")
    parser.add_argument("--figure", type=Path, default=ROOT / "docs" / "speed.png")
    options = parser.parse_args(argv)
    if options.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("no CUDA device is usable here; run it with --device cpu.")
    file = options.out / f"speed-{options.device}{'-quick' if options.quick else ''}.json"
    failed = measure(options.device, present_tables(options.only), file, quick=options.quick)
    print_rows(read_rows(file))
    if not options.quick:
        publish(options.out, options.readme, options.figure)
    print(file)
    return 1 if failed else 0


def publish(results: Path, readme: Path, figure: Path) -> None:
    """Draw what was measured and put the table into the README."""
    rows = all_rows(results)
    if any(row["ratio"] for row in rows):
        print(draw_speed(rows, figure))
    if not rewrite(readme, markdown(rows, results)):
        print(f"{readme} has no lines {BEGIN} and {END}: its table is not rewritten.")


if __name__ == "__main__":
    raise SystemExit(main())
