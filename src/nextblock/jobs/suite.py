"""A suite of data sets, one after the other, each in a folder of its own; what is finished is not done again."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from nextblock.data.named import data_root, find, named
from nextblock.data.named.published import PUBLISHED, SUITES
from nextblock.errors import ConfigError, DataError, RunError, nearest
from nextblock.figures.suite import draw_suite
from nextblock.jobs.output import say
from nextblock.jobs.probe_report import Probed, read_result
from nextblock.jobs.share import Units, array_share, units_of_first
from nextblock.training.agreement import require_alike
from nextblock.training.launch import Fabric, on_first_process, one_ends_all
from nextblock.training.run_record import claim_folder, read_json, to_json, write_text
from nextblock.training.signals import requeue

SIGNATURE = "suite.json"
RESULTS = "results.jsonl"
GO_ON = "The same command goes on with what is there."
HEAD_KEYS = ("lr", "weight_decay", "layers", "mean_per_class", "macro_f1")


@dataclass
class Suite:
    """rows: one for each data set: `dataset`, `status` ("done", "missing", "failed", "stopped") and accuracies."""

    folder: Path
    rows: list[dict[str, Any]]
    signal: int = 0


def require_suite(suite: str) -> None:
    """Raise ConfigError when there is no such suite."""
    if suite not in SUITES:
        raise ConfigError(f"There is no suite '{suite}'.{nearest(suite, SUITES)} Suites: {', '.join(SUITES)}.")


def run_suite(
    suite: str,
    signature: Mapping[str, Any],
    root: str | Path | None,
    folder: Path,
    fabric: Fabric,
    console: Console,
    one: Callable[[str, Path, bool], Probed],
) -> Suite:
    """Probe each data set of the suite that is on this machine; `one` does it in a folder, where it may be begun.

    A data set that fails is told, and the next one is taken. `signature` says what was asked of which weights; a
    suite goes on only with the same. Raises RunError for a folder that holds something else, and, on each of several
    processes, where a data set fails on some of them only; DataError when none of the data sets is here.
    """
    if not fabric.is_global_zero:
        console = Console(quiet=True)
    names = SUITES[suite]
    here = [name for name in names if find(name, data_root(root)) is not None]
    if not here:
        raise DataError(
            f"None of the {len(names)} data sets of {suite} is in {data_root(root)}. `nextblock datasets` says how to "
            "get each; --data_root names their folder."
        )
    with units_of_first(fabric, folder, array_share()) as units:
        mine = _begin(folder, signature, here, fabric, units)
        say(console, f"{len(here)} of the {len(names)} data sets of {suite} are here: {', '.join(here)}")
        if len(mine) < len(here):
            say(console, f"{array_share().told}: {', '.join(mine) or 'none'}")
        with one_ends_all(fabric, GO_ON):
            rows, received = _run_each(suite, names, here, mine, folder, fabric, units, console, one)
    _tell(console, folder, suite, rows)
    return Suite(folder, rows, received)


def _begin(
    folder: Path, signature: Mapping[str, Any], here: Sequence[str], fabric: Fabric, units: Units | None
) -> list[str]:  # fmt: skip
    """Claim the folder; the data sets that this job is to probe, the same on every process of it."""
    problem: RunError | None = None
    mine: list[str] = []
    try:
        if units is not None:
            with units.alone():
                _claim(folder, signature)
            mine = [here[number] for number in units.claim(range(len(here)))]
    except RunError as error:
        problem = error
    on_first_process(fabric, problem)
    return list(fabric.broadcast(mine))


def _run_each(
    suite: str, names: Sequence[str], here: Sequence[str], mine: Sequence[str], folder: Path, fabric: Fabric,
    units: Units | None, console: Console, one: Callable[[str, Path, bool], Probed],
) -> tuple[list[dict[str, Any]], int]:  # fmt: skip
    """Probe the data sets `mine`. Returns the rows of all, and the signal that stopped it, or 0."""
    rows: list[dict[str, Any]] = []
    stopped = 0
    for name in mine:
        console.print(f"\n{named(name).title}", style="bold", highlight=False)
        begun = bool(fabric.broadcast(fabric.is_global_zero and _begun(folder / name)))  # as the first process sees it
        try:
            done = one(name, folder / name, begun)
        except (Exception, SystemExit) as error:  # whatever it is, it must not cost the other data sets
            reason = require_alike(fabric, name, error, GO_ON)
            say(console, f"failed: {reason}")
            rows.append({"dataset": name, "status": "failed", "reason": reason})
            continue
        if done.signal:
            stopped = done.signal
            rows.append({"dataset": name, "status": "stopped"})
            break
        rows.append(row_of(name, folder / name))
        if units is not None:
            with units.alone():
                _write(folder, suite, _all_rows(folder, names, here, mine, rows))
    if units is None:
        return _all_rows(folder, names, here, mine, rows), stopped
    with units.alone():  # the last of several writes what all have found
        rows = _all_rows(folder, names, here, mine, rows)
        _write(folder, suite, rows)
    if told := requeue(stopped):
        say(console, told)
    return rows, stopped


def _all_rows(
    folder: Path, names: Sequence[str], here: Sequence[str], mine: Sequence[str], rows: Sequence[dict[str, Any]]
) -> list[dict[str, Any]]:  # fmt: skip
    """A row for each data set: `rows` of those that are `mine`, what other processes have left of the others."""
    own = {row["dataset"]: row for row in rows}
    file = folder / RESULTS
    before = {row["dataset"]: row for row in map(json.loads, file.read_text().splitlines())} if file.is_file() else {}

    def row(name: str) -> dict[str, Any]:
        if name in own:
            return own[name]
        if name in here and name not in mine:
            if read_result(folder / name) is not None:
                return row_of(name, folder / name)
            if before.get(name, {}).get("status") in ("failed", "stopped"):
                return dict(before[name])
        return {"dataset": name, "status": "not begun" if name in here else "missing"}

    return [row(name) for name in names]


def row_of(name: str, folder: Path) -> dict[str, Any]:
    """The accuracies of a finished probe, best head of each kind."""
    result = read_result(folder)
    assert result is not None
    row: dict[str, Any] = {"dataset": name, "status": "done", "protocol": result["protocol"]}
    row |= {"select": result["select"], "training": result["training"]}
    for kind in ("linear", "attentive"):
        mine = [head for head in result["rows"] if head["kind"] == kind]
        if mine:
            best = max(mine, key=lambda head: head["chosen_by"])
            row[kind] = best["test_top1"]
            row[f"{kind}_head"] = {
                key: best[key] for key in ("lr", "weight_decay", "layers", "mean_per_class", "macro_f1")
            }
    return row


def mean_of(rows: Sequence[dict[str, Any]], kind: str) -> float | None:
    values = [row[kind] for row in rows if row.get(kind) is not None]
    return sum(values) / len(values) if values else None


def _claim(folder: Path, signature: Mapping[str, Any]) -> None:
    file = folder / SIGNATURE
    if file.is_file():
        stored = read_json(file, (), "Choose another --out.")
        changed = [name for name in signature if stored.get(name) != json.loads(json.dumps(signature[name]))]
        if changed:
            what = {"suite": "another suite", "weights": "other weights", "probe": "other --probe options"}
            told = " and ".join(what[name] for name in changed)
            raise RunError(f"{folder} was begun with {told}. Give the same to go on, or choose another --out.")
        return
    claim_folder(folder)
    write_text(file, to_json(dict(signature)))


def _begun(folder: Path) -> bool:
    """Whether a probe was begun there; what one left that was killed before its config.yaml is removed."""
    if (folder / "config.yaml").is_file():
        return True
    if folder.is_dir():
        shutil.rmtree(folder)
    return False


def _write(folder: Path, suite: str, rows: Sequence[dict[str, Any]]) -> None:
    """results.jsonl, table.md and the picture, of what is known now."""
    write_text(folder / RESULTS, "".join(json.dumps(row) + "\n" for row in rows))
    write_text(folder / "table.md", _markdown(suite, rows))
    done = [row for row in rows if row["status"] == "done"]
    if done:
        drawn = [{"name": named(row["dataset"]).title, "linear": row.get("linear"), "attentive": row.get("attentive"),
                  "published": _published(row["dataset"])} for row in done]  # fmt: skip
        draw_suite(drawn, folder / "figures" / "suite.png", title=f"{suite}: frozen encoder")


def _published(name: str) -> dict[str, float]:
    return {row.model: row.accuracy[name] for row in PUBLISHED if name in row.accuracy}


def _cells(rows: Sequence[dict[str, Any]]) -> list[list[str]]:
    """The lines of the table: a data set each, then the means."""

    def percent(value: float | None) -> str:
        return "" if value is None else f"{value:.1f}"

    lines = []
    for row in rows:
        published = _published(row["dataset"])
        own = [percent(row.get(kind)) for kind in ("linear", "attentive")]
        if row["status"] != "done":
            own = [row["status"], ""]
        lines.append([named(row["dataset"]).title, *own, *(percent(published.get(p.model)) for p in PUBLISHED)])
    means = [percent(mean_of(rows, kind)) for kind in ("linear", "attentive")]
    done = [row["dataset"] for row in rows if row["status"] == "done"]
    published_means = (p.mean if len(done) == len(rows) else p.mean_of(done) for p in PUBLISHED)
    lines.append([f"mean of {len(done)}", *means, *map(percent, published_means)])
    return lines


def _header() -> list[str]:
    return ["data set", "linear", "attentive", *(p.model for p in PUBLISHED)]


def _markdown(suite: str, rows: Sequence[dict[str, Any]]) -> str:
    lines = [_header(), ["---"] * len(_header()), *_cells(rows)]
    how = {"test": "best head chosen on the test images, as in the papers' codes: optimistic"}
    how["validation"] = "best head chosen on held-out training images"
    protocols = sorted({how[row["select"]] for row in rows if "select" in row})
    note = f"Top-1 accuracy in percent, frozen encoder; {'; '.join(protocols)}."
    trained = sorted({row["training"] for row in rows if "training" in row})
    note += f" Heads: {'; '.join(trained)} (published: 100 epochs, RandAugment and erasing)." if trained else ""
    note += " Published columns: attentive probes, their mean over the same data sets, where all are known."
    return f"# {suite}\n\n" + "\n".join(f"| {' | '.join(line)} |" for line in lines) + f"\n\n{note}\n"


def _tell(console: Console, folder: Path, suite: str, rows: Sequence[dict[str, Any]]) -> None:
    title = f"{suite}: top-1 accuracy in percent; published columns are attentive probes"
    table = Table(title=title, box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for i, title in enumerate(_header()):
        table.add_column(title, no_wrap=i == 0, min_width=9)
    cells = _cells(rows)
    for row, line in zip(rows, cells[:-1], strict=True):
        if row["status"] != "missing":
            table.add_row(row["dataset"], *line[1:])
    table.add_section()
    table.add_row(*cells[-1])
    console.print(table)
    if missing := [row["dataset"] for row in rows if row["status"] == "missing"]:
        say(console, f"not on this machine: {', '.join(missing)}")
    say(console, f"everything is in {folder}: results.jsonl, table.md, figures/suite.png")
